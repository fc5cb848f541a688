"""Shared by the tests: --method, images, tiny runs in processes of their own, and what a run leaves in its folder."""
import functools
import importlib.util
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny models; two spinning threads would starve the processes that tests start
TINY = "--img_size 16 --patch_size 4 --embed_dim 16 --num_heads 2 --decoder_dim 16 --decoder_heads 2 --batch_size 16" \
       " --base_lr 1e-2 --save_every 0 --log_every 1 --device cpu --num_workers 0"
SERVER = multiprocessing.get_context("forkserver")  # imports these once, which saves seconds per run
SERVER.set_forkserver_preload(["torch", "torchvision", "scipy.ndimage", "matplotlib.figure", "pytest"])
JOBS = []  # all processes that were started


@pytest.fixture(autouse=True)
def as_before():
    """Kill what a failed test leaves running, and give Ctrl-C back: `common.train` keeps the signals."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for job in JOBS:
        job.kill()


def pytest_addoption(parser):
    parser.addoption("--method", action="append", help="method file for test_contract.py; default: those here")


def pytest_generate_tests(metafunc):
    if "method" in metafunc.fixturenames:
        paths = [Path(p).resolve() for p in metafunc.config.getoption("method") or []]
        paths = paths or [ROOT / f"{name}.py" for name in ("ddae", "deepmim", "sdae", "beit2", "videomae")]
        metafunc.parametrize("method", [load(p) for p in paths], ids=[p.stem for p in paths], scope="module")


def load(path):
    """Import a file from anywhere."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[path.stem]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """train/ and val/ with 64 images each, in a/ and b/: a red that tells the number, and noise."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for i in range(128):
        path = folder / ("train", "val")[i // 64] / "ab"[i % 2] / f"{i % 64}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (*rng.integers(16, 40, 2), 3), dtype=np.uint8)
        pixels[..., 0] = 4 * (i % 64)
        Image.fromarray(pixels).save(path)
    return folder


# --- runs -------------------------------------------------------------------------------------------------------------

@functools.cache
def store():
    """Where processes meet. All runs share it, as torchrun's restarts do."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def body(path, flags, torchrun, output, hook):
    """What a forked process does: run a method file, after `hook(rank)` has tampered with it."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    os.environ |= {k: str(v) for k, v in torchrun.items()}  # before the next line imports common, which reads it
    method, hook = load(path), pickle.loads(hook)
    for value in list(vars(method).values()):
        if "preview" in getattr(value, "__dict__", ()):
            del value.preview  # a picture takes as long as 50 steps
    if hook:
        hook(torchrun["RANK"])
    sys.argv = [str(path), *flags.split()]
    method.main()


class Run:
    """A started method file, in one process or in several as torchrun would start them."""

    def __init__(self, flags, processes=1, hook=None, path=ROOT / "ddae.py", output=None):
        self.file, hook, self.jobs = tempfile.NamedTemporaryFile(), pickle.dumps(hook), []
        for rank in range(processes):
            torchrun = dict(RANK=rank, WORLD_SIZE=processes, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=processes,
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=store().port, TORCHELASTIC_USE_AGENT_STORE=True,
                            TORCHELASTIC_RESTART_COUNT=len(JOBS))
            arguments = path, flags, torchrun, output or self.file.name, hook
            self.jobs.append(SERVER.Process(target=body, args=arguments))
            self.jobs[-1].start()
        JOBS.extend(self.jobs)

    def wait(self):
        """-> exit codes; negative: killed by that signal."""
        for job in self.jobs:
            job.join(60)
        assert not any(job.is_alive() for job in self.jobs), f"still running:\n{Path(self.file.name).read_text()}"
        return [job.exitcode for job in self.jobs]

    def output(self):
        """What it printed until its end."""
        self.wait()
        return Path(self.file.name).read_text()


def read(path):
    return torch.load(path, weights_only=True)


def log(out):
    """The log's whole lines, without the clock."""
    path, clock = Path(out) / "log.jsonl", ("images_per_s", "data_wait", "minutes", "minutes_left")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def steps(out):
    """The training steps in the log, in order."""
    return [line["step"] for line in log(out) if "loss" in line]


def differences(*folders):
    """What is not bitwise the same in two output folders."""
    def contents(out):
        state = read(Path(out) / "last.pt")
        moments = {f"{i}.{k}": v for i, of in state["optimizer"]["state"].items() for k, v in of.items()}
        return state["model"] | moments | dict(step=state["step"], log=log(out))

    a, b = map(contents, folders)
    return [k for k in a.keys() | b.keys() if k not in a or k not in b or not (
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]
