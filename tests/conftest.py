import importlib.util
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny models; two spinning threads would starve the processes that tests start


@pytest.fixture(autouse=True)
def interruptible():
    """`common.train` keeps the signals; give Ctrl-C back."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--method", action="append", help="method file for test_contract.py; default: those here")


def pytest_generate_tests(metafunc):
    if "method" in metafunc.fixturenames:
        paths = [Path(p).resolve() for p in metafunc.config.getoption("method") or []]
        paths = paths or [ROOT / f"{name}.py" for name in ("ddae", "deepmim", "sdae", "videomae")]
        modules, names = [load(path) for path in paths], [path.stem for path in paths]
        metafunc.parametrize("method", modules, ids=names, scope="module")


def load(path):
    """Import a file from anywhere."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[path.stem]
