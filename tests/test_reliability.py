"""Stop it, kill it, starve it, damage its files: nothing is lost and nothing silently wrong. soak.py is the long version."""
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soak
import torch
from PIL import Image
from soak import FLAGS, Run, differences, log, steps
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import ddae

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """64 images for training: 4 steps of 16 are an epoch, 12 steps a run."""
    return soak.make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def nothing_stays():
    """Whatever a failed test leaves running is killed."""
    yield
    for run in soak.RUNS:
        run.signal(signal.SIGKILL)
    soak.RUNS.clear()


@pytest.fixture
def here(images, tmp_path, monkeypatch, capfd):
    """Run ddae.py in this process -> what it printed; a message that ended it is the last line."""
    monkeypatch.delattr(ddae.DDAE, "preview")

    def run(flags="", out=tmp_path / "out", data=images, method=ddae):
        monkeypatch.setattr(sys, "argv", ["x.py", *FLAGS.split(), *f"--data {data} --out_dir {out} {flags}".split()])
        capfd.readouterr()
        try:
            method.main()
        except SystemExit as stop:
            print(stop.code)
        return "".join(capfd.readouterr())

    return run


def load(out_dir):
    return common.load(Path(out_dir) / "last.pt")


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def flip(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x80
    path.write_bytes(data)


def until(condition, alive, seconds=60):
    """Wait until the condition holds; the process under test must live so long."""
    end = time.monotonic() + seconds
    while not condition():
        assert alive() and time.monotonic() < end
        time.sleep(0.01)


# Hooks run in the process under test, before ddae.py starts. A schedule is called once per step, with its number.

def at_steps(actions):
    """actions: number of finished steps -> what to do then."""
    def schedule(step, *args):
        if step in actions:
            actions[step]()
        return common.cosine(step, *args)

    common.train = partial(common.train, schedule=schedule)


def send(step, number, rank, to=None):
    """Send the signal to process `to`, or to all, when `step` steps are done."""
    if to in (None, rank):
        at_steps({step: lambda: os.kill(os.getpid(), number)})


# --- stop and resume --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request, images, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("whole")
    flags = f"{FLAGS} --data {images} --save_every 0.25 --eval_every 1 --eval_images 60"
    assert not any(Run(f"{flags} --out_dir {out_dir}", request.param).wait())
    assert steps(out_dir) == list(range(1, 13))
    assert [line["step"] for line in log(out_dir) if "knn" in line] == [0, 4, 8, 12]
    return request.param, flags, out_dir


@pytest.mark.parametrize("turn", range(3))
def test_stopped_anywhere_in_any_way(undisturbed, turn, tmp_path):
    """Steps 4 and 8 are evaluated: that must not be lost, nor made twice."""
    processes, flags, whole = undisturbed
    flags += f" --out_dir {tmp_path}"
    for i, stop in enumerate((1, 4, 8, 11)):
        match ("SIGKILL", "SIGTERM", "max_steps")[(i + turn) % 3]:
            case "SIGKILL":
                assert Run(flags, processes, partial(send, stop, signal.SIGKILL)).wait() == [-9] * processes
            case "SIGTERM":  # arrives in the step, which is finished
                run = Run(flags, processes, partial(send, stop - 1, signal.SIGTERM))
                assert run.wait() == [143] * processes, run.output()
                assert f"stopped by a signal after step {stop}; the same command resumes" in run.output()
            case "max_steps":
                assert Run(f"{flags} --max_steps {stop}", processes).wait() == [0] * processes
        assert load(tmp_path)["step"] == stop
    assert Run(flags, processes).wait() == [0] * processes
    assert differences(whole, tmp_path) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_short_soak(processes, tmp_path):
    assert soak.soak(tmp_path, stops=4, processes=processes, total=48) == []


def test_evaluation_does_not_disturb_the_run(here, tmp_path):
    here("--eval_every 0.5 --eval_images 60", tmp_path / "with")
    here("--eval_every 0", tmp_path / "without")
    assert {k: v for k, v in soak.contents(tmp_path / "with").items() if k != "log"}.keys() > {"step"}
    assert differences(tmp_path / "with", tmp_path / "without") == ["log"]
    assert [line for line in log(tmp_path / "with") if "loss" in line] == log(tmp_path / "without")


def test_a_finished_run_stays_as_it_is(here, tmp_path):
    here("--max_steps 4 --eval_every 1 --eval_images 60")
    before, lines = files(tmp_path / "out"), log(tmp_path / "out")
    for flags in ("--max_steps 4", "--max_steps 2"):  # also one that is already past its end
        assert "Traceback" not in here(f"{flags} --eval_every 1 --eval_images 60")
        assert log(tmp_path / "out") == lines
        assert {k: v for k, v in files(tmp_path / "out").items() if k != "log.jsonl"}.items() <= before.items()


def damaged_logs(text):
    """Name -> a damaged log.jsonl of three steps, and the lines that must still be there."""
    flipped, lines = bytearray(text), text.splitlines(keepends=True)
    flipped[3] ^= 0x80  # no longer UTF-8
    return {"flipped bit": (bytes(flipped), [1, 2]), "later steps": (text + lines[2] + b'{"step": 5, "ep', [0, 1, 2]),
            "torn end": (text[:-20], [0, 1]), "lost": (b"", [])}


@pytest.mark.parametrize("damage", damaged_logs(b"aaaa\nb\nc\n"))
def test_a_damaged_log_loses_nothing_else(damage, here, tmp_path):
    here("--max_steps 3")
    path = tmp_path / "out" / "log.jsonl"
    whole = path.read_bytes()
    damaged, kept = damaged_logs(whole)[damage]
    path.write_bytes(damaged)
    here("--max_steps 5")
    lines, want = path.read_bytes().splitlines(), [whole.splitlines()[i] for i in kept]
    assert load(tmp_path / "out")["step"] == 5
    assert [line for line in lines if line in whole.splitlines()] == want
    assert [re.match(rb'{"step": (\d)\.0, .*}$', line)[1] for line in lines[-2:]] == [b"4", b"5"]
    assert len(lines) == len(want) + 2 + (damage == "flipped bit")


def test_other_runs_are_refused(here, images, tmp_path):
    here("--max_steps 2")
    before = files(tmp_path / "out")
    other = soak.make_images(tmp_path / "other")
    next((other / "train").iterdir()).rename(other / "train" / "renamed")
    fewer = soak.make_images(tmp_path / "fewer", 63)
    for flags, data, text in (("--base_lr 1 --seed 2", images, "base_lr: checkpoint 0.01, command 1.0"),
                              ("--base_lr 1 --seed 2", images, "seed: checkpoint 0, command 2"),
                              ("", other, "classes: checkpoint ["), ("", fewer, "images: checkpoint 64, command 63")):
        line = here(flags, data=data).splitlines()[-1]
        assert "out/last.pt is of another run" in line and text in line
        assert files(tmp_path / "out") == before
    assert "another run" not in here("--max_steps 3 --micro_batch 4 --clip_grad 3 --max_bad 0.5 --log_every 2 --eval_every 0")
    assert load(tmp_path / "out")["step"] == 3


def edited(folder, old, new):
    """ddae.py with another text in one place, as a module."""
    path, text = folder / "mine.py", (ROOT / "ddae.py").read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    sys.modules["mine"] = module = types.ModuleType("mine")
    module.__file__ = str(path)
    exec(compile(path.read_text(), path, "exec"), vars(module))
    return module


def test_an_edited_method_warns_or_is_refused_in_a_line(here, tmp_path):
    beta = "self.beta = nn.Parameter(per_block(cfg.beta_init)"
    assert "has changed" not in here("--max_steps 1") + here("--max_steps 2")
    print_more = edited(tmp_path, "def main():\n", "def main():\n    print('edited')\n")
    text = here("--max_steps 3", method=print_more)
    assert text.count(f"{tmp_path}/mine.py has changed since ") == 1 and load(tmp_path / "out")["step"] == 3
    before = files(tmp_path / "out")
    for new, message in ((f"self.more = nn.Linear(2, 2)\n        {beta}", "more.weight, in the model (2, 2)"),
                         (beta.replace("per_block", "0 * torch.ones(3, 3) + per_block"), "beta, in the model (3, 3)"),
                         (beta.replace("beta = nn.Parameter(", "beta = (lambda x, requires_grad: x)("), "optimizer")):
        lines = here("--max_steps 4", method=edited(tmp_path, beta, new)).splitlines()
        assert message in lines[-1] and "last.pt" in lines[-1] and len(lines) <= 3  # with the warning of above
        assert files(tmp_path / "out") == before


def test_init_starts_encoder_and_teacher_and_resume_does_not_need_it(here, tmp_path):
    here("--max_steps 2", tmp_path / "a")
    (tmp_path / "a" / "encoder.pt").rename(tmp_path / "start.pt")
    start = common.load(tmp_path / "start.pt")["model"]
    for stop in (1, 2):
        here(f"--max_steps {stop} --seed 5 --init {tmp_path / 'start.pt'}")
        model = load(tmp_path / "out")["model"]  # the first step has learning rate 0
        same = [torch.equal(v, model[f"{part}.{k}"]) for k, v in start.items() for part in ("encoder", "teacher")]
        assert all(same) == (stop == 1)
    (tmp_path / "start.pt").unlink()
    here(f"--max_steps 3 --seed 5 --init {tmp_path / 'start.pt'}")
    (tmp_path / "out" / "last.pt").unlink()  # as after a kill between the two renames of a save
    here(f"--max_steps 4 --seed 5 --init {tmp_path / 'start.pt'}")
    assert load(tmp_path / "out")["step"] == 4


# --- files ------------------------------------------------------------------------------------------------------------

def test_a_damaged_file_is_noticed_and_does_not_displace_the_good_one(here, tmp_path):
    here("--save_every 0.25 ", tmp_path / "whole")
    here("--save_every 0.25 --max_steps 4")
    good = (tmp_path / "out" / "last.prev.pt").read_bytes()
    flip(tmp_path / "out" / "last.pt", 5000)
    text = here("--save_every 0.25 --max_steps 4")
    assert text.count("last.pt is missing, damaged") == 1 and f"resuming from {tmp_path}/out/last.prev.pt" in text
    assert load(tmp_path / "out")["step"] == 4 and (tmp_path / "out" / "last.prev.pt").read_bytes() == good
    here("--save_every 0.25")
    assert differences(tmp_path / "whole", tmp_path / "out") == []
    for name in ("last.pt", "last.prev.pt"):
        flip(tmp_path / "out" / name, 5000)
    before = files(tmp_path / "out")
    assert "last.prev.pt is missing, damaged" in here().splitlines()[-1] and files(tmp_path / "out") == before


class Evil:
    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.parametrize("optimize", [0, 2])  # python -OO has no asserts
def test_damaged_files_are_never_read_wrong(optimize, tmp_path):
    path, state, rng = tmp_path / "x.pt", dict(a=torch.arange(2000.0), b=[1, "two"]), np.random.default_rng(0)
    torch.save(state, path)
    good, refused, scope = path.read_bytes(), 0, dict(vars(common))
    exec(compile((ROOT / "common.py").read_text(), "common.py", "exec", optimize=optimize), scope)

    def refuses(data):
        path.write_bytes(data)
        try:
            read = scope["load"](path)
        except SystemExit as stop:
            assert "x.pt is missing, damaged" in stop.code and "\n" not in stop.code
            return True
        assert torch.equal(read["a"], state["a"]) and read["b"] == state["b"]
        return False

    for n in (0, 1, 64, len(good) // 4, len(good) - 1):
        assert refuses(good[:n])
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.integers(len(good))] ^= 1 << int(rng.integers(8))
        refused += refuses(bad)
    assert refused > 150
    torch.save(dict(model=Evil()), path)
    assert refuses(path.read_bytes())


class Big(torch.nn.Module):
    """A model whose encoder.pt, preview.png, and last.pt have about 3, 60, and 400 kB."""

    def __init__(self, size=100_000):
        super().__init__()
        self.encoder, self.more = torch.nn.Linear(10, 10), torch.nn.Parameter(torch.zeros(size))

    def preview(self, imgs, draws):
        return {"noise": torch.randn(6, 3, 64, 64)}


class Fake:
    source = range(6)

    def __getitem__(self, key):
        return torch.zeros(3, 4, 4), torch.zeros(4), {}

    def collate(self, batch):
        return *map(torch.stack, list(zip(*batch))[:2]), {}


def save(out, model, step):
    model.requires_grad_(False).more.fill_(step)
    model.encoder.weight.fill_(step)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    return common.checkpoint(out, model, optimizer, Fake(), torch.device("cpu"), torch.autocast("cpu", enabled=False),
                             step=step, about={})


def test_a_save_without_room_leaves_no_torn_file(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = Big()
    assert save(tmp_path, model, 1) and save(tmp_path, model, 2)
    before = files(tmp_path)
    assert len(before["encoder.pt"]) < 10_000 < len(before["preview.png"]) < 300_000 < len(before["last.pt"])
    for room, written in ((1000, set()), (10_000, {"encoder.pt"}), (300_000, {"encoder.pt", "preview.png"})):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            assert not save(tmp_path, model, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f"warning: cannot save {tmp_path}/last.pt: " in capsys.readouterr().out and model.training
        after = files(tmp_path)
        assert after.keys() == before.keys() and after["last.prev.pt"] == before["last.prev.pt"]
        assert {name for name in after if after[name] != before[name]} <= written
        assert load(tmp_path)["step"] == 2 and Image.open(tmp_path / "preview.png").load()
    assert save(tmp_path, model, 3) and load(tmp_path)["step"] == 3


def save_forever(folder):
    model = Big(3 << 20)
    del Big.preview
    for step in range(1, 1000):
        save(folder, model, step)
        (folder / "done").write_text(str(step))


def test_sigkill_while_saving_leaves_a_whole_file(tmp_path):
    rng, seen = random.Random(0), set()
    for _ in range(12):
        job = soak.SERVER.Process(target=save_forever, args=(tmp_path,))
        job.start()
        until((tmp_path / "done").exists, job.is_alive)
        time.sleep(rng.uniform(0, 0.2))
        job.kill()
        job.join()
        done, names = int((tmp_path / "done").read_text() or 0), {p.name for p in tmp_path.iterdir()}  # 0: killed there
        assert names <= {"last.pt", "last.prev.pt", "last.tmp.pt", "encoder.pt", "encoder.tmp.pt", "done"}
        state = common.load(tmp_path / ("last.pt" if "last.pt" in names else "last.prev.pt"))
        assert state["step"] >= done and (state["model"]["more"] == state["step"]).all()
        weight = common.load(tmp_path / "encoder.pt")["model"]["weight"]
        assert done <= weight[0, 0] <= state["step"] + 1 and (weight == weight[0, 0]).all()
        seen.add("last.tmp.pt" in names)
        (tmp_path / "done").unlink()
    assert True in seen, "no kill fell into the writing"


def die_at_rename(number, rank):
    """Killed before the n-th rename."""
    replace, count = os.replace, iter(range(1, 1000))

    def counting(*args):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    os.replace = counting


def test_killed_between_any_two_files(here, images, tmp_path):
    here("--save_every 1", tmp_path / "whole")
    for number in range(3, 9):  # a save renames encoder.pt, last.pt to last.prev.pt unless it is the first, and last.pt
        flags = f"{FLAGS} --data {images} --out_dir {tmp_path / str(number)} --save_every 1"
        assert Run(flags, hook=partial(die_at_rename, number)).wait() == [-9]
        run = Run(flags)
        assert run.wait() == [0] and f"steps {4 if number < 6 else 8} to 12" in run.output()
        assert differences(tmp_path / "whole", tmp_path / str(number)) == []
        encoder, model = common.load(tmp_path / str(number) / "encoder.pt")["model"], load(tmp_path / "whole")["model"]
        assert all(torch.equal(v, model[f"encoder.{k}"]) for k, v in encoder.items())


def full_disk(last, rank):
    """No room for last.pt, but for encoder.pt, up to step `last`."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    limit((100_000, -1))
    at_steps({last: lambda: limit((-1, -1))})


def test_a_failed_save_warns_and_the_run_goes_on(here, images, tmp_path):
    here("", tmp_path / "whole")
    for last, code, warnings in ((100, 1, 6), (11, 0, 5)):  # 1: the last save counts
        out = tmp_path / str(last)
        run = Run(f"{FLAGS} --data {images} --out_dir {out} --save_every 0.5", hook=partial(full_disk, last))
        assert run.wait() == [code] and run.output().count(f"warning: cannot save {out}/last.pt: ") == warnings
        assert steps(out) == list(range(1, 13)) and not (out / "last.tmp.pt").exists()
        assert (out / "last.pt").exists() == (code == 0)
        here("", out)
        assert differences(tmp_path / "whole", out) == []


def test_two_runs_in_one_folder(here, images, tmp_path):
    first = Run(f"{FLAGS} --data {images} --out_dir {tmp_path / 'out'} --epochs 1000")
    until(lambda: steps(tmp_path / "out"), first.alive)
    assert here() == f"another run is writing to {tmp_path}/out; choose another --out_dir\n" and first.alive()
    first.signal(signal.SIGKILL)
    first.wait()
    here("--max_steps 5")
    assert steps(tmp_path / "out") == [1, 2, 3, 4, 5]


# --- gradients --------------------------------------------------------------------------------------------------------

def record_in_double(path, rank):
    """Everything in float64; rank 0 keeps the gradients that the optimizer is given."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    kept = []

    def keep(optimizer, *_):
        kept.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        if rank == 0:
            torch.save(kept, path)

    register_optimizer_step_pre_hook(keep)


def test_gradients_of_any_split_are_the_same(images, tmp_path):
    grads = {}
    for processes, micro in ((1, 16), (1, 4), (2, 8), (2, 2)):
        out = tmp_path / f"{processes}_{micro}"
        run = Run(f"{FLAGS} --data {images} --out_dir {out} --max_steps 2 --micro_batch {micro}", processes,
                  partial(record_in_double, f"{out}.grads"))
        assert not any(run.wait()), run.output()
        grads[processes, micro] = torch.load(f"{out}.grads")
    for step, exact in enumerate(grads.pop((1, 16))):  # the first has learning rate 0: both start from the same weights
        for split, other in grads.items():
            worst = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(exact, other[step]))
            assert exact[0].dtype == torch.float64 and worst <= 1e-12, (split, step, worst)


def poison(step, where, rank):
    def to_nan():
        forward = ddae.DDAE.forward
        ddae.DDAE.forward = lambda *args: (forward(*args)[0] * float("nan"), {})

    if rank == where:
        at_steps({step: to_nan})


@pytest.mark.parametrize("processes, where", [(1, 0), (2, 0), (2, 1)])
def test_nan_in_one_process_stops_all_before_the_step(processes, where, images, tmp_path):
    run = Run(f"{FLAGS} --data {images} --out_dir {tmp_path} --save_every 0.25", processes, partial(poison, 6, where))
    assert run.wait(60) == [1] * processes and "Traceback" not in run.output()
    assert run.output().count("gradients not finite") == processes
    assert f"step 7 not taken, gradients not finite; loss nan in process {where}" in run.output()
    assert load(tmp_path)["step"] == 6 and all(v.isfinite().all() for v in load(tmp_path)["model"].values())


# --- processes --------------------------------------------------------------------------------------------------------

FAULT = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import ddae, test_reliability
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    test_reliability.at_steps({{7: lambda: os._exit(17)}})
ddae.main()
"""


def torchrun(script, flags, *options):
    """Start torchrun with two processes in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, str(script),
         *flags.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_torchrun_restarts_a_job_whose_process_died(images, tmp_path):
    (tmp_path / "fault.py").write_text(FAULT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    job = torchrun(tmp_path / "fault.py", f"{FLAGS} --data {images} --out_dir {tmp_path} --save_every 0.25", "--max-restarts=1")
    text, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "steps 0 to" in text and "exitcode: 17" in text and "steps 7 to" in text, text
    assert steps(tmp_path) == list(range(1, 13))


def test_torchrun_passes_a_signal_on(images, tmp_path):
    job = torchrun(ROOT / "ddae.py", f"{FLAGS} --data {images} --out_dir {tmp_path} --epochs 2000 --num_workers 1",
                   "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    until(lambda: len(steps(tmp_path)) >= 3, lambda: job.poll() is None)
    job.send_signal(signal.SIGUSR1)
    text, _ = job.communicate(timeout=30)
    assert job.returncode != 0 and f"stopped by a signal after step {len(steps(tmp_path))}" in text
    assert load(tmp_path)["step"] == len(steps(tmp_path))


def test_a_signal_to_the_whole_group_spares_the_data_workers(images, tmp_path):
    """Ctrl-C, `timeout`, and schedulers send it to all; the data of the step must still come."""
    for number in (signal.SIGINT, signal.SIGTERM):
        run = Run(f"{FLAGS} --data {images} --out_dir {tmp_path} --epochs 2000 --num_workers 1")
        until(lambda: "step" in run.output()[-300:] and steps(tmp_path)[-1] % 10 > 5, run.alive)
        os.killpg(run.jobs[0].pid, number)
        assert run.wait(30) == [128 + number] and load(tmp_path)["step"] == steps(tmp_path)[-1]


def test_a_signal_to_one_process_stops_both_after_the_same_step(images, tmp_path):
    run = Run(f"{FLAGS} --data {images} --out_dir {tmp_path}", 2, partial(send, 6, signal.SIGTERM, to=1))
    assert run.wait(60) == [143, 143] and load(tmp_path)["step"] == 7 and steps(tmp_path) == list(range(1, 8))


def short_timeout(rank):
    common.DATA_TIMEOUT = 2


def kill_worker(rank):
    """As the kernel does when memory is full."""
    def kill():
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    at_steps({3: kill})


@pytest.mark.parametrize("hook, message", [(short_timeout, "timed out"), (kill_worker, "killed by signal|exited unexpectedly")])
def test_a_data_worker_that_hangs_or_is_killed(hook, message, images, tmp_path):
    data = soak.make_images(tmp_path / "images")
    if hook is short_timeout:
        path = next((data / "train").rglob("*.png"))
        path.unlink()
        os.mkfifo(path)
    run = Run(f"{FLAGS} --data {data} --out_dir {tmp_path / 'out'} --num_workers 1 --epochs 100", hook=hook)
    assert run.wait(60) == [1] and "Traceback" not in run.output()
    assert re.search(f"DataLoader.*({message}).*--num_workers", run.output().splitlines()[-1])


def test_a_terminal_that_is_gone(images, tmp_path):
    jobs = {}
    for name, redirect in dict(closed=">&- 2>&-", full=">/dev/full 2>&1").items():
        command = f"exec {sys.executable} {ROOT / 'ddae.py'} {FLAGS} --data {images} --out_dir {tmp_path / name} {redirect}"
        jobs[name] = subprocess.Popen(["sh", "-c", command])
    for name, job in jobs.items():
        assert job.wait(60) == 0 and load(tmp_path / name)["step"] == 12 and len(steps(tmp_path / name)) == 12


def ascii_only(rank):
    sys.stdout.reconfigure(encoding="ascii")


def watch(path, rank):
    def note():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with open(path, "a") as file:
            file.write(f"{pages} {len(os.listdir('/proc/self/fd'))}\n")

    at_steps(dict.fromkeys((60, 160, 260), note))


def test_memory_and_open_files_stay_constant(images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path / 'out'} --epochs 100 --save_every 10 --num_workers 1 --max_steps 261"
    assert Run(flags, hook=partial(watch, tmp_path / "seen")).wait() == [0]
    (first, count), *later = [map(int, line.split()) for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(later) == 2
    for pages, now in later:
        assert pages < 1.05 * first and now == count


# --- images -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def zoo(tmp_path):
    """A folder of good and broken images without labels, and the names of the broken ones."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8))
    for mode, name in (("CMYK", "cmyk.jpg"), ("L", "gray.JPEG"), ("P", "palette.png"), ("RGBA", "alpha.webp"),
                       ("LA", "gray_alpha.png"), ("1", "bits.tif"), ("RGB", "é.bmp")):
        picture.convert(mode).save(folder / name)
    Image.fromarray(rng.integers(0, 65535, (32, 32), dtype=np.uint16)).save(folder / "16bit.png")
    picture.save(folder / "named.jpg", "png")
    good = {p.name for p in folder.iterdir()}
    Image.fromarray(rng.random((32, 32), dtype=np.float32)).save(folder / "float.tif")
    (folder / "cut.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "ü.jpg").write_text("<html>404</html>")
    (folder / "bomb.ppm").write_bytes(b"P6 20000 20000 255\n")
    (folder / "dangling.png").symlink_to("nowhere")
    return folder, {p.name for p in folder.iterdir()} - good


def test_broken_images_are_skipped_named_once_and_counted(zoo, here, tmp_path):
    folder, bad = zoo
    flags = f"{FLAGS} --batch_size 5 --data {folder} --out_dir {tmp_path}"
    for name, options in dict(whole="--max_bad 0.5", worker="--max_bad 0.5 --num_workers 1").items():
        run = Run(f"{flags}/{name} {options}", hook=ascii_only)
        assert run.wait() == [0], run.output()
        for file in bad:
            written = str(folder / file).encode("ascii", "backslashreplace").decode()
            assert run.output().count(f"unreadable {written}: ") == 1, run.output()
        assert run.output().count("unreadable /") == len(bad) == 6 and "\nstep 9 " in run.output()
    assert log(tmp_path / "whole")[-1]["unreadable"] == 6
    for stop in (2, 5, 9):  # counted on, and named once more at most
        here(f"--batch_size 5 --max_bad 0.5 --max_steps {stop}", tmp_path / "cut", folder)
    for name in ("worker", "cut"):
        assert differences(tmp_path / "whole", tmp_path / name) == []  # the same replacements
    text = here("--batch_size 5 --max_bad 0.3", tmp_path / "many", folder).splitlines()[-1]
    assert re.fullmatch("[56] of 15 images are unreadable, more than --max_bad 0.3", text)


def test_a_folder_of_broken_images_ends_the_run(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    run = Run(f"{FLAGS} --data {tmp_path} --out_dir {tmp_path / 'out'} --num_workers 1")
    assert run.wait() == [1] and f"unreadable images in a row: {{'{tmp_path}/" in run.output()
