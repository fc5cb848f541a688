"""Stop it, kill it, damage its files: nothing is lost and nothing silently wrong. soak.py is the long version."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soak
import torch
from conftest import ROOT
from conftest import load as load_module
from soak import FLAGS, Run, differences, log, steps
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import ddae


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
    """Run ddae.py in this process -> what it printed, with the message or code of its exit."""
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


def until(condition, alive, seconds=60):
    """Wait until the condition holds; the process under test must live so long."""
    end = time.monotonic() + seconds
    while not condition():
        assert alive() and time.monotonic() < end
        time.sleep(0.01)


def at(steps, action, rank, to=None):
    """Hook for Run: do `action` in process `to`, or in all, when so many steps are done."""
    def schedule(step, *args):
        if step in steps:
            action()
        return common.cosine(step, *args)

    if to in (None, rank):
        common.train = partial(common.train, schedule=schedule)


def send(number, step, to=None):
    return partial(at, [step], partial(signal.raise_signal, number), to=to)


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
    """Evaluations are due at steps 4 and 8: none is lost, and none is in the log twice."""
    processes, flags, whole = undisturbed
    flags += f" --out_dir {tmp_path}"
    for i, stop in enumerate((1, 4, 8, 11)):
        match ("SIGKILL", "SIGTERM", "max_steps")[(i + turn) % 3]:
            case "SIGKILL":
                assert Run(flags, processes, send(signal.SIGKILL, stop)).wait() == [-9] * processes
            case "SIGTERM":  # arrives within the step, which both finish, in one process
                run = Run(flags, processes, send(signal.SIGTERM, stop - 1, to=processes - 1))
                assert run.wait() == [143] * processes, run.output()
                assert f"stopped by a signal after step {stop}; the same command resumes" in run.output()
            case "max_steps":
                assert Run(f"{flags} --max_steps {stop}", processes).wait() == [0] * processes
        assert load(tmp_path)["step"] == stop
    assert Run(flags, processes).wait() == [0] * processes
    assert differences(whole, tmp_path) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_short_soak(processes, tmp_path):
    assert soak.soak(tmp_path, stops=3, processes=processes, total=48) == []


def test_evaluation_does_not_disturb_the_run_and_a_finished_run_stays_as_it_is(here, tmp_path):
    evaluate = "--eval_every 0.5 --eval_images 60"
    here("--max_steps 4", tmp_path / "without")
    here(f"--max_steps 4 {evaluate}")
    assert differences(tmp_path / "out", tmp_path / "without") == ["log"]
    assert [line for line in log(tmp_path / "out") if "loss" in line] == log(tmp_path / "without")
    before, lines = load(tmp_path / "out"), log(tmp_path / "out")
    for stop in (4, 2):  # also one that is past its end
        assert "Traceback" not in here(f"--max_steps {stop} {evaluate}")
        assert log(tmp_path / "out") == lines and load(tmp_path / "out")["log"] == before["log"]


@pytest.mark.parametrize("damage", ["flipped bit", "later steps", "torn end", "lost"])
def test_a_damaged_log_loses_nothing_else(damage, here, tmp_path):
    here("--max_steps 3")
    path = tmp_path / "out" / "log.jsonl"
    text, (a, b, c) = path.read_bytes(), path.read_bytes().splitlines()
    flipped = bytes([a[0] ^ 0x80]) + a[1:]  # no UTF-8
    damaged, want = {"flipped bit": (flipped + text[len(a):], [flipped, b, c]), "torn end": (text[:-20], [a, b]),
                     "later steps": (text + a + b'\n{"step": 5, "ep', [a, b, c]), "lost": (b"", [])}[damage]
    path.write_bytes(damaged)
    here("--max_steps 5")
    lines = path.read_bytes().splitlines()
    assert lines[:-2] == want and [json.loads(line)["step"] for line in lines[-2:]] == [4, 5]


def test_other_runs_are_refused(here, images, tmp_path):
    here("--max_steps 2")
    before = files(tmp_path / "out")
    other, fewer = soak.make_images(tmp_path / "other"), soak.make_images(tmp_path / "fewer", 63)
    next((other / "train").iterdir()).rename(other / "train" / "renamed")
    for flags, data, text in (("--base_lr 1 --seed 2", images, "base_lr: checkpoint 0.01, command 1.0"),
                              ("--base_lr 1 --seed 2", images, "seed: checkpoint 0, command 2"),
                              ("", other, "classes: checkpoint ["), ("", fewer, "images: checkpoint 64, command 63")):
        line = here(flags, data=data).splitlines()[-1]
        assert "out/last.pt is of another run" in line and text in line and files(tmp_path / "out") == before
    here("--max_steps 3 --micro_batch 4 --clip_grad 3 --max_bad 0.5 --log_every 2")  # these may change
    assert load(tmp_path / "out")["step"] == 3


def test_an_edited_method_warns_or_is_refused_in_a_line(here, tmp_path):
    def edited(name, old, new):
        (tmp_path / name).write_text((ROOT / "ddae.py").read_text().replace(old, new))
        return load_module(tmp_path / name)

    assert "has changed" not in here("--max_steps 1") + here("--max_steps 2")
    text = here("--max_steps 3", method=edited("warns.py", "def main():\n", "def main():\n    print(1)\n"))
    assert text.count(f"{tmp_path}/warns.py has changed since ") == 1 and load(tmp_path / "out")["step"] == 3
    for name, old, new, message in (
            ("adds.py", "self.beta =", "self.more = nn.Linear(2, 2)\n        self.beta =", "more.weight, in the model"),
            ("reshapes.py", "per_block(cfg.beta_init)", "per_block(cfg.beta_init)[:1]", "beta, in the model (1,)")):
        warning, *others, line = here("--max_steps 4", method=edited(name, old, new)).splitlines()
        assert "has changed" in warning and message in line and "last.pt" in line and not others


def test_init_starts_encoder_and_teacher_and_resume_does_not_need_it(here, tmp_path):
    here("--max_steps 2", tmp_path / "a")
    (tmp_path / "a" / "encoder.pt").rename(tmp_path / "start.pt")
    start, flags = common.load(tmp_path / "start.pt")["model"], f"--seed 5 --init {tmp_path / 'start.pt'}"
    here(f"--max_steps 1 {flags}")
    model = load(tmp_path / "out")["model"]  # the first step has learning rate 0
    assert all(torch.equal(v, model[f"{part}.{k}"]) for k, v in start.items() for part in ("encoder", "teacher"))
    (tmp_path / "start.pt").unlink()
    here(f"--max_steps 2 {flags}")
    (tmp_path / "out" / "last.pt").unlink()  # killed between the renames of a save
    here(f"--max_steps 3 {flags}")
    assert load(tmp_path / "out")["step"] == 3


# --- files ------------------------------------------------------------------------------------------------------------

def test_a_damaged_checkpoint_is_noticed_and_does_not_displace_the_good_one(here, tmp_path):
    here("--save_every 0.25", tmp_path / "whole")
    here("--save_every 0.25 --max_steps 4")
    last, previous = tmp_path / "out" / "last.pt", tmp_path / "out" / "last.prev.pt"
    data, good = last.read_bytes(), previous.read_bytes()
    last.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    text = here("--save_every 0.25 --max_steps 4")
    assert text.count("last.pt is missing, damaged") == 1 and f"resuming from {previous}" in text
    assert load(tmp_path / "out")["step"] == 4 and previous.read_bytes() == good
    here("--save_every 0.25")
    assert differences(tmp_path / "whole", tmp_path / "out") == []
    for path in (last, previous):
        path.write_bytes(path.read_bytes()[:-50])
    before = files(tmp_path / "out")
    assert "last.prev.pt is missing, damaged" in here().splitlines()[-1] and files(tmp_path / "out") == before


def test_damaged_files_are_never_read_wrong(tmp_path):
    path, state, rng = tmp_path / "x.pt", dict(a=torch.arange(2000.0), b=[1, "two"]), np.random.default_rng(0)

    def refuses(data):
        path.write_bytes(data)
        try:
            read = common.load(path)
        except SystemExit as stop:
            assert "x.pt is missing, damaged" in stop.code and "\n" not in stop.code
            return True
        assert torch.equal(read["a"], state["a"]) and read["b"] == state["b"]
        return False

    torch.save(state, path)
    good, refused = path.read_bytes(), 0
    assert all(refuses(good[:n]) for n in (0, 1, 64, len(good) // 4, len(good) - 1))
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.integers(len(good))] ^= 1 << int(rng.integers(8))
        refused += refuses(bad)
    assert refused > 150


def die_at(function, number, rank):
    """Killed at the n-th torch.save, whose file is half written, or before the n-th os.replace."""
    module = torch if function == "save" else os
    real, count = getattr(module, function), iter(range(1, 100))

    def dying(*args):
        if next(count) == number:
            if function == "save":
                args[1].write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)

    setattr(module, function, dying)


@pytest.mark.parametrize("function, number", [("save", 3), ("save", 4), ("replace", 3), ("replace", 4), ("replace", 5)])
def test_killed_anywhere_in_a_save(function, number, here, images, tmp_path):
    """The second save writes encoder.pt and last.pt, and renames encoder.pt, the last.pt before it, and last.pt."""
    here(out=tmp_path / "whole")
    assert Run(f"{FLAGS} --data {images} --out_dir {tmp_path / 'out'} --save_every 1",
               hook=partial(die_at, function, number)).wait() == [-9]
    assert "steps 4 to 12" in here("--save_every 1") and differences(tmp_path / "whole", tmp_path / "out") == []
    encoder, model = common.load(tmp_path / "out" / "encoder.pt")["model"], load(tmp_path / "whole")["model"]
    assert all(torch.equal(v, model[f"encoder.{k}"]) for k, v in encoder.items())


def noise(*args):
    return {"noise": torch.randn(6, 3, 64, 64)}  # a large file


@pytest.mark.parametrize("room, written", [
    (5000, []), (100_000, ["encoder.pt"]), (350_000, ["encoder.pt", "last.prev.pt", "last.pt"])])
def test_a_full_disk_leaves_no_torn_file_and_the_run_goes_on(room, written, here, monkeypatch, tmp_path):
    monkeypatch.setattr(ddae.DDAE, "preview", noise, raising=False)
    here("--max_steps 2 --save_every 0.25")
    before, (soft, hard) = files(tmp_path / "out"), resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [len(before[name]) for name in ("log.jsonl", "encoder.pt", "last.pt", "preview.png")]
    assert sizes[0] < 4000 < sizes[1] < 100_000 < sizes[2] < 350_000 < sizes[3]
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        text = here("--max_steps 5 --save_every 0.25")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after, failed = files(tmp_path / "out"), "last.pt" not in written
    assert text.count(f"warning: {'cannot save' if failed else 'no'} {tmp_path}/out/") == 3
    assert text.endswith("\n1\n") == failed and steps(tmp_path / "out") == [1, 2, 3, 4, 5]
    assert after.keys() == before.keys() and {k for k in after if after[k] != before[k]} == {"log.jsonl", *written}


def test_a_failed_save_is_made_up_for_by_the_last_one(here, monkeypatch, tmp_path):
    def preview(*args):
        raise ValueError("wrong")

    def save(*args):
        if errors:
            raise errors.pop()
        real(*args)

    errors, modes, real = [OSError("full"), RuntimeError("full")], [], torch.save
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(ddae.DDAE, "preview", preview, raising=False)
    monkeypatch.setattr(ddae.DDAE, "after_step", lambda model, *args: modes.append(model.training))
    text = here("--save_every 0.5 --eval_every 1 --eval_images 60")
    assert text.count("warning: cannot save") == 2 and text.count("preview.png: ValueError: wrong") == 4
    assert modes == [True] * 12 and load(tmp_path / "out")["step"] == 12 and not text.endswith("\n1\n")


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


def poison():
    forward = ddae.DDAE.forward
    ddae.DDAE.forward = lambda *args: (forward(*args)[0] * float("nan"), {})


@pytest.mark.parametrize("processes, where", [(1, 0), (2, 0), (2, 1)])
def test_nan_in_one_process_stops_all_before_the_step(processes, where, images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path} --save_every 0.25"
    run = Run(flags, processes, partial(at, [6], poison, to=where))
    assert run.wait(60) == [1] * processes and "Traceback" not in run.output()
    assert run.output().count("gradients not finite") == processes
    assert f"gradients not finite at step 7, loss nan in process {where}" in run.output()
    assert load(tmp_path)["step"] == 6 and all(v.isfinite().all() for v in load(tmp_path)["model"].values())


# --- processes --------------------------------------------------------------------------------------------------------

FAULT = """
import os, sys
sys.path.insert(0, {root!r})
import common, ddae
def schedule(step, *args):
    if step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(17)
    return common.cosine(step, *args)
train = common.train
common.train = lambda *args: train(*args, schedule=schedule)
del ddae.DDAE.preview
ddae.main()
"""


def test_torchrun_restarts_a_job_whose_process_died_and_passes_a_signal_on(images, tmp_path):
    (tmp_path / "fault.py").write_text(FAULT.format(root=str(ROOT)))
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path} --save_every 0.5 --epochs 2000 --num_workers 1"
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
         "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", tmp_path / "fault.py", *flags.split()],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    until(lambda: len(steps(tmp_path)) > 12, lambda: job.poll() is None)
    job.send_signal(signal.SIGUSR1)
    text, _ = job.communicate(timeout=60)
    last = load(tmp_path)["step"]
    assert "exitcode: 17" in text and "steps 6 to" in text and f"stopped by a signal after step {last}" in text, text
    assert job.returncode != 0 and steps(tmp_path) == list(range(1, last + 1))


def test_a_signal_to_the_whole_group_spares_the_data_workers(images, tmp_path):
    """As `timeout`, schedulers, and Ctrl-C send it. The data of the running step must still come."""
    run = Run(f"{FLAGS} --data {images} --out_dir {tmp_path} --epochs 2000 --num_workers 1")
    until(lambda: len(steps(tmp_path)) > 5, run.alive)
    os.killpg(run.jobs[0].pid, signal.SIGTERM)
    assert run.wait(30) == [143] and load(tmp_path)["step"] == len(steps(tmp_path))


def short_timeout(rank):
    common.DATA_TIMEOUT = 2


def kill_worker():
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)  # as the kernel does when memory is full


@pytest.mark.parametrize("hook", [short_timeout, partial(at, [3], kill_worker)])
def test_a_data_worker_that_hangs_or_is_killed(hook, tmp_path):
    data = soak.make_images(tmp_path / "images")
    if hook is short_timeout:
        path = next((data / "train").rglob("*.png"))
        path.unlink()
        os.mkfifo(path)
    run = Run(f"{FLAGS} --data {data} --out_dir {tmp_path / 'out'} --num_workers 1 --epochs 100", hook=hook)
    assert run.wait(60) == [1] and "Traceback" not in run.output() and "--num_workers" in run.output(), run.output()


def test_a_terminal_that_cannot_be_written(images, tmp_path):
    command = [sys.executable, ROOT / "ddae.py", *f"{FLAGS} --data {images} --max_steps 3 --out_dir {tmp_path}".split()]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, timeout=100).returncode == 0
    assert load(tmp_path)["step"] == 3 and steps(tmp_path) == [1, 2, 3]


def note(path):
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    with open(path, "a") as file:
        file.write(f"{pages} {len(os.listdir('/proc/self/fd'))}\n")


def test_memory_and_open_files_stay_constant(images, tmp_path):
    run = Run(f"{FLAGS} --data {images} --out_dir {tmp_path / 'out'} --epochs 70 --save_every 10 --num_workers 1",
              hook=partial(at, [60, 160, 260], partial(note, tmp_path / "seen")))
    assert run.wait() == [0]
    (first, count), *later = [map(int, line.split()) for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(later) == 2 and all(pages < 1.05 * first and now == count for pages, now in later)


# --- images -----------------------------------------------------------------------------------------------------------

def ascii_only(rank):
    sys.stdout.reconfigure(encoding="ascii")


def test_broken_images_are_skipped_named_once_and_counted(here, tmp_path):
    folder, bad = tmp_path / "images", ["cut.jpg", "empty.png", "ü.jpg", "bomb.ppm", "dangling.png"]
    path = next(soak.make_images(folder, 15).rglob("train/*/*"))
    for name, data in zip(bad, (path.read_bytes()[:400], b"", b"<html>404</html>", b"P6 20000 20000 255\n")):
        (path.parent / name).write_bytes(data)
    (path.parent / bad[-1]).symlink_to("nowhere")
    for name, workers in (("whole", 0), ("worker", 1)):
        run = Run(f"{FLAGS} --batch_size 5 --data {folder} --out_dir {tmp_path / name} --max_bad 0.5 "
                  f"--num_workers {workers}", hook=ascii_only)
        assert run.wait() == [0], run.output()
        for file in bad:  # in escapes, if the console cannot show it
            written = str(path.parent / file).encode("ascii", "backslashreplace").decode()
            assert run.output().count(f"unreadable {written}: ") == 1, run.output()
        assert run.output().count("unreadable /") == len(bad) and "\nstep 12 " in run.output()
    assert log(tmp_path / "whole")[-1]["unreadable"] == len(bad)
    for stop in (2, 5, 12):  # counted on
        here(f"--batch_size 5 --max_bad 0.5 --max_steps {stop}", tmp_path / "cut", folder)
    for name in ("worker", "cut"):
        assert differences(tmp_path / "whole", tmp_path / name) == []  # the same replacements
    text = here("--batch_size 5 --max_bad 0.2", tmp_path / "many", folder).splitlines()[-1]
    assert text == "5 of 20 images are unreadable, more than --max_bad 0.2"
