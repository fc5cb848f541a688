"""
Stop one tiny run again and again at random moments, and compare its end with a run that nobody disturbed.

    python tests/soak.py --stops 30                  # SIGKILL or SIGTERM; --processes 2 for two of them

Prints every stop; exit code 1 unless weights, teacher, optimiser and log are bitwise the same. The functions here serve
test_reliability.py too. Processes are forked from a server that has already imported torch, which saves seconds each.
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
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ddae", "matplotlib.figure"])
FLAGS = "--img_size 16 --patch_size 4 --embed_dim 16 --depth 2 --K 2 --num_heads 2 --decoder_dim 16 --decoder_heads 2 " \
        "--decoder_depth 1 --base_lr 1e-2 --warmup_epochs 0.5 --batch_size 16 --log_every 1 --device cpu --preview_every 0"


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
    if hook:
        hook(rank)
    code = 0
    try:
        ddae.main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # multiprocessing's own exit waits seconds for the data workers


RUNS = []  # all that were started, for whoever must clean up


class Run:
    """A started ddae.py: `pids`, `wait() -> exit codes`, `signal(number)`, `output()`."""

    def __init__(self, flags, processes=1, hook=None):
        self.file = tempfile.NamedTemporaryFile(suffix=".out")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.jobs = [SERVER.Process(target=body, args=(flags.split(), rank, processes, port, self.file.name, hook))
                     for rank in range(processes)]
        for job in self.jobs:
            job.start()
        self.pids = [job.pid for job in self.jobs]
        RUNS.append(self)

    def signal(self, number):
        for job in self.jobs:
            if job.is_alive():
                os.kill(job.pid, number)

    def alive(self):
        return any(job.is_alive() for job in self.jobs)

    def wait(self, timeout=100):
        end = time.monotonic() + timeout
        for job in self.jobs:
            job.join(max(0, end - time.monotonic()))
        hung = [job.kill() for job in self.jobs if job.is_alive()]
        for job in self.jobs:
            job.join()
        assert not hung, f"still running after {timeout} s:\n{self.output()}"
        return [job.exitcode for job in self.jobs]

    def output(self):
        return Path(self.file.name).read_text()


def lines(out_dir):
    """How many steps are in the log."""
    path = Path(out_dir) / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def log(out_dir):
    """The log without its clock."""
    lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in lines]


def differences(a, b):
    """What is not bitwise the same in two output folders: step, config, model with teacher, optimiser, log."""
    import common
    import torch
    a, b = Path(a), Path(b)
    x, y = (torch.load(p / "last.pt", weights_only=True) for p in (a, b))
    flat = [{"step": s["step"], **{f"config {k}": v for k, v in s["config"].items() if k not in common.MAY_CHANGE},
             **{f"model {k}": v for k, v in s["model"].items()},
             **{f"optimizer {i} {k}": v for i, state in s["optimizer"]["state"].items() for k, v in state.items()}}
            for s in (x, y)]
    found = [k for k in flat[0].keys() | flat[1].keys() if k not in flat[0] or k not in flat[1] or not (
        torch.equal(flat[0][k], flat[1][k]) if torch.is_tensor(flat[0][k]) else flat[0][k] == flat[1][k])]
    return found + ["log"] * (log(a) != log(b))


def make_images(folder, count=64):
    """PNG files of `shapes` in folder/train and folder/val -> folder."""
    import common
    from PIL import Image
    for split in ("train", "val"):
        for i in range(count):
            item = common.Shapes(split, 24).item(i)
            path = Path(folder) / split / common.Shapes.classes[item["label"]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(item["image"]).save(path)
    return Path(folder)


def soak(folder, stops, processes=1, steps=300, seed=0, tell=print):
    """Run undisturbed, then with `stops` stops, at random times -> differences, a list."""
    rng, folder = random.Random(seed), Path(folder)
    flags = f"{FLAGS} --data {make_images(folder / 'images')} --epochs {steps // 4} --save_every 0.75 --num_workers 1"
    whole, cut = folder / "whole", folder / "cut"
    begin = time.monotonic()
    run = Run(f"{flags} --out_dir {whole}", processes)
    assert not any(run.wait(600)), run.output()
    duration = time.monotonic() - begin
    tell(f"undisturbed: {steps} steps in {duration:.1f} s")
    for stop in range(stops):
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        goal = lines(cut) + rng.randint(0, 2 * (steps - lines(cut)) // (stops - stop + 3))
        run = Run(f"{flags} --out_dir {cut}", processes)
        while run.alive() and lines(cut) < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        run.signal(number)
        codes = run.wait(60)
        tell(f"stop {stop + 1:3d}: {signal.Signals(number).name} -> exit codes {codes}, log at step {lines(cut)}")
        assert {*codes} <= {-number, 128 + number}, run.output()  # a run that ended by itself was not stopped
    run = Run(f"{flags} --out_dir {cut}", processes)
    assert not any(run.wait(600)), run.output()
    assert [line["step"] for line in log(cut)] == list(range(1, steps + 1))
    return differences(whole, cut)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(folder, args.stops, args.processes, seed=args.seed)
    print("DIFFERENT: " + ", ".join(found) if found else "bitwise the same")
    sys.exit(bool(found))
