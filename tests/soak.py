"""
Stop a tiny run of ddae.py again and again at random moments, and compare its end with an undisturbed run.

    python tests/soak.py --stops 30                  # SIGKILL or SIGTERM; --processes 2 for two of them

Exit code 1 unless weights, teacher, optimizer, and log are bitwise the same. test_reliability.py uses these functions
too. Processes are forked from a server that has already imported torch, which saves seconds each.
"""
import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

ROOT = str(Path(__file__).parent.parent)
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = ROOT  # the server ignores sys.path
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ddae", "finetune", "analyze"])
FLAGS = "--img_size 16 --patch_size 4 --embed_dim 16 --depth 2 --K 2 --num_heads 2 --decoder_dim 16 --decoder_heads 2" \
        " --decoder_depth 1 --base_lr 1e-2 --warmup_epochs 0.5 --batch_size 16 --log_every 1 --save_every 0" \
        " --epochs 3 --device cpu --num_workers 0"
RUNS = []  # all that were started, for whoever must clean up


def body(flags, rank, processes, port, output, hook):
    """What a forked process does: become rank `rank`, let `hook` tamper with the program, run ddae.py."""
    import torch
    import common
    import ddae
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for the data workers, as in a plain run
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if processes > 1:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        os.environ |= dict(zip(names, map(str, (rank, processes, rank, processes, "127.0.0.1", port))))
        common.RANK = common.LOCAL_RANK = rank
        common.WORLD = common.LOCAL_WORLD = processes
    sys.argv = ["ddae.py", *flags]
    del ddae.DDAE.preview  # a picture takes as long as 50 steps
    if hook:
        hook(rank)
    ddae.main()


class Run:
    """A started ddae.py."""

    def __init__(self, flags, processes=1, hook=None):
        self.file = tempfile.NamedTemporaryFile(suffix=".out")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.jobs = [SERVER.Process(target=body, args=(flags.split(), rank, processes, port, self.file.name, hook))
                     for rank in range(processes)]
        for job in self.jobs:
            job.start()
        RUNS.append(self)

    def signal(self, number):
        for job in self.jobs:
            if job.is_alive():
                os.kill(job.pid, number)

    def alive(self):
        return any(job.is_alive() for job in self.jobs)

    def wait(self, timeout=100):
        end = time.monotonic() + timeout
        while self.alive():
            assert time.monotonic() < end, f"still running after {timeout} s:\n{self.output()}"
            time.sleep(0.01)
        return [job.exitcode for job in self.jobs]

    def output(self):
        return Path(self.file.name).read_text()


def log(out_dir):
    """The log's whole lines, without the clock."""
    path, clock = Path(out_dir) / "log.jsonl", ("images_per_s", "data_wait")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def steps(out_dir):
    """The training steps in the log, in order."""
    return [line["step"] for line in log(out_dir) if "loss" in line]


def contents(out_dir):
    """What must not depend on stops: name -> value."""
    import common
    state = common.load(Path(out_dir) / "last.pt")
    for f in fields(common.RunConfig):
        del state["about"][f.name]
    state |= {f"optimizer {i}": tensors for i, tensors in state.pop("optimizer")["state"].items()}
    del state["log"]  # its size in bytes, which depends on the clock
    flat = {(part, k): v for part, of in state.items() if isinstance(of, dict) for k, v in of.items()}
    return flat | {"step": state["step"], "log": log(out_dir)}


def differences(a, b):
    """What is not bitwise the same in two output folders."""
    import torch
    a, b = contents(a), contents(b)
    return [k for k in a.keys() | b.keys() if k not in a or k not in b or not (
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]


def make_images(folder, count=64):
    """PNG files in folder/train and folder/val -> folder."""
    from shapes import Shapes
    for split in ("train", "val"):
        for i in range(count):
            image, label = Shapes(split, 24)[i]
            path = Path(folder) / split / Shapes.classes[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return Path(folder)


def soak(folder, stops, processes=1, total=300):
    """Run undisturbed for `total` steps, then with `stops` stops at random times -> differences, a list."""
    rng, folder = random.Random(0), Path(folder)
    flags = f"{FLAGS} --data {make_images(folder / 'images')} --epochs {total // 4} --save_every 0.75 --num_workers 1" \
            f" --eval_every {total / 12} --eval_images 60 --out_dir {folder}"
    assert not any(Run(f"{flags}/whole", processes).wait(600))
    for stop in range(stops):
        number, done = rng.choice((signal.SIGKILL, signal.SIGTERM)), len(steps(folder / "cut"))
        goal = done + rng.randint(0, 2 * (total - done) // (stops - stop + 3))
        run = Run(f"{flags}/cut", processes)
        while run.alive() and len(steps(folder / "cut")) < goal:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.05)
        run.signal(number)
        codes = run.wait(60)
        print(f"stop {stop + 1}: {signal.Signals(number).name}, exit codes {codes}, step {len(steps(folder / 'cut'))}")
        assert {*codes} <= {-number, 128 + number}, run.output()  # a run that ended by itself was not stopped
    assert not any(Run(f"{flags}/cut", processes).wait(600))
    assert steps(folder / "cut") == list(range(1, total + 1))
    return differences(folder / "whole", folder / "cut")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(folder, args.stops, args.processes)
    print(f"DIFFERENT: {found}" if found else "bitwise the same")
    sys.exit(bool(found))
