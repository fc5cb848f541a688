"""Stop it, kill it, damage its files: nothing is lost and nothing silently wrong."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1

import pytest
import torch
from conftest import ROOT, TINY, Run, differences, log, read, steps
from torch.utils.data import DataLoader

import ddae

FLAGS = f"{TINY} --depth 2 --K 2 --decoder_depth 1 --warmup_epochs 0.5 --epochs 3"  # 12 steps


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    assert Run(f"{FLAGS} --data {images} --out_dir {out}").wait() == [0]
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def start(images, out):
    """Start ddae.py. Flags may replace those here."""
    return lambda flags="", *args, **options: Run(f"{FLAGS} --data {images} --out_dir {out} {flags}", *args, **options)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def until_step(step, out):
    end = time.monotonic() + 180
    while len(steps(out)) < step:
        assert time.monotonic() < end
        time.sleep(0.01)


def at(step, action, rank, to=None):
    """Hook for Run: do `action` after so many steps, before the log and the save; in process `to`, or in all."""
    after_step = ddae.DDAE.after_step

    def acting(model, done, *args):
        after_step(model, done, *args)
        if done == step:
            action()

    if to in (None, rank):
        ddae.DDAE.after_step = acting


# --- stop and resume --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("processes, ways", [(1, [SIGTERM, SIGKILL, SIGINT, "max_steps", SIGUSR1]),
                                             (2, ["max_steps", SIGUSR1, SIGTERM, SIGKILL, SIGINT])])
def test_stopped_anywhere_in_any_way(processes, ways, start, whole, out):
    """A signal reaches one process only. Evaluations are due at steps 4 and 8: none is lost, none is logged twice."""
    flags, ends = "--save_every 1 --eval_every 1 --eval_images 60", [0] * processes
    assert start(f"{flags} --out_dir {out}/whole", processes).wait() == ends
    assert [line["step"] for line in log(out / "whole") if "knn" in line] == [0, 4, 8, 12]
    assert processes > 1 or differences(whole, out / "whole") == ["log"]  # evaluation does not disturb
    for step, way in zip((2, 4, 6, 8, 11), ways):
        if way == "max_steps":
            assert start(f"{flags} --max_steps {step}", processes).wait() == ends
        else:
            moment = step + 1 if way == SIGKILL else step - 1  # the step after a signal is finished
            run = start(flags, processes, partial(at, moment, partial(signal.raise_signal, way), to=processes - 1))
            assert run.wait()[-1] == (-way if way == SIGKILL else 128 + way) and all(run.wait())
            assert (f"stopped by a signal after step {step}; the same" in run.output()) == (way != SIGKILL)
        assert read(out / "last.pt")["step"] == step
    for _ in range(2):  # the second finds nothing to do
        assert start(flags, processes).wait() == ends and differences(out / "whole", out) == []


def test_torchrun_passes_signals_on(images, out):
    flags = f"{FLAGS} --data {images} --out_dir {out} --epochs 2000 --num_workers 1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "--signals-to-handle=SIGTERM,SIGUSR1", ROOT / "ddae.py", *flags.split()]
    job = subprocess.Popen(torchrun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until_step(6, out)
    job.send_signal(SIGUSR1)
    text, last = job.communicate(timeout=180)[0], read(out / "last.pt")["step"]
    assert f"stopped by a signal after step {last}" in text and steps(out) == list(range(1, last + 1)), text


@pytest.mark.parametrize("damage", ["flipped bit and later steps", "torn end"])
def test_a_damaged_log_loses_nothing_else(damage, start, out):
    start("--max_steps 3").wait()
    a, b, c = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    flipped = bytes([a[0] ^ 0x80]) + a[1:]  # no UTF-8
    kept, added = ([a, b], c[:-20]) if damage == "torn end" else ([flipped, b, c], a + b'{"step": 5, "ep')
    (out / "log.jsonl").write_bytes(b"".join(kept) + added)
    start("--max_steps 5").wait()
    *lines, d, e = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert lines == kept and [json.loads(line)["step"] for line in (d, e)] == [4, 5]


def test_other_runs_are_refused(start, images, out, tmp_path):
    start("--max_steps 2").wait()
    before, other = files(out), shutil.copytree(images, tmp_path / "other")
    next((other / "train").rglob("*.png")).unlink()
    line = start(f"--base_lr 1 --seed 2 --data {other}").output().splitlines()[-1]
    for text in ("out/last.pt is of another run", "base_lr: checkpoint 0.01, command 1.0",
                 "seed: checkpoint 0, command 2", "images: checkpoint 64, command 63"):
        assert text in line
    assert files(out) == before
    start("--max_steps 3 --micro_batch 4 --clip_grad 3 --max_bad 0.5 --log_every 2").wait()  # these may change
    assert read(out / "last.pt")["step"] == 3


def test_an_edited_method_file_is_told(start, out, tmp_path):
    assert "has changed" not in start("--max_steps 1").output() + start("--max_steps 2").output()
    path = tmp_path / "edited.py"
    path.write_text((ROOT / "ddae.py").read_text().replace("\ndef main", "\n\ndef main"))
    assert start("--max_steps 3", path=path).output().count(f"{path} has changed since ") == 1
    assert steps(out) == [1, 2, 3]


def test_init_starts_encoder_and_teacher_and_resume_does_not_need_it(start, whole, out, tmp_path):
    shutil.copy(whole / "encoder.pt", tmp_path)
    weights, flags = read(whole / "encoder.pt")["model"], f"--seed 5 --init {tmp_path / 'encoder.pt'}"
    start(f"--max_steps 1 {flags}").wait()
    model = read(out / "last.pt")["model"]  # the first step has learning rate 0
    assert all(torch.equal(v, model[f"{part}.{k}"]) for k, v in weights.items() for part in ("encoder", "teacher"))
    (tmp_path / "encoder.pt").unlink()
    start(f"--max_steps 2 {flags}").wait()
    assert steps(out) == [1, 2]


# --- files ------------------------------------------------------------------------------------------------------------

def test_a_damaged_checkpoint_is_noticed_and_does_not_displace_the_good_one(start, whole, out):
    start("--save_every 0.25 --max_steps 4").wait()
    last, previous = out / "last.pt", out / "last.prev.pt"
    data, good = last.read_bytes(), previous.read_bytes()
    for damaged in (data[:-1], b"", data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]):
        last.write_bytes(damaged)
        text = start("--save_every 0.25 --max_steps 4").output()
        assert text.count("last.pt is missing, damaged") == 1 and f"resuming from {previous}" in text
        assert read(last)["step"] == 4 and previous.read_bytes() == good
    start("--save_every 0.25").wait()
    assert differences(whole, out) == []
    for path in (last, previous):
        path.write_bytes(path.read_bytes()[:-50])
    before = files(out)
    assert "last.prev.pt is missing, damaged" in start().output().splitlines()[-1] and files(out) == before


def die_at_rename(name):
    replace = os.replace
    os.replace = lambda a, b: signal.raise_signal(SIGKILL) if Path(b).name == name else replace(a, b)


@pytest.mark.parametrize("name", ["encoder.pt", "last.prev.pt", "last.pt"])
def test_killed_anywhere_in_a_save(name, start, whole, out):
    assert start("--save_every 1", hook=partial(at, 8, partial(die_at_rename, name))).wait() == [-9]
    assert "steps 4 to 12" in start("--save_every 1").output() and differences(whole, out) == []
    encoder, model = read(out / "encoder.pt")["model"], read(whole / "last.pt")["model"]
    assert all(torch.equal(v, model[f"encoder.{k}"]) for k, v in encoder.items())


def limit(room, rank):
    ddae.DDAE.preview = lambda *args: {"noise": torch.randn(6, 3, 64, 64)}  # a large file
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


@pytest.mark.parametrize("room, written", [
    (5000, []), (100_000, ["encoder.pt"]), (350_000, ["encoder.pt", "last.prev.pt", "last.pt"])])
def test_a_full_disk_leaves_no_torn_file_and_the_run_goes_on(room, written, start, out):
    start("--max_steps 2 --save_every 0.25", hook=partial(limit, 10**7)).wait()
    before, failed = files(out), "last.pt" not in written
    run = start("--max_steps 5 --save_every 0.25", hook=partial(limit, room))
    assert run.wait() == [failed] and steps(out) == [1, 2, 3, 4, 5]
    assert run.output().count(f"warning: {'cannot save' if failed else 'no'} {out}/") == 3
    after = files(out)
    assert after.keys() == before.keys() and {k for k in after if after[k] != before[k]} == {"log.jsonl", *written}


def test_two_runs_in_a_folder_and_a_signal_to_the_whole_group(start, out):
    """As `timeout`, schedulers, and Ctrl-C send it: the data workers must finish the running step."""
    first = start("--epochs 2000 --num_workers 1")
    until_step(5, out)
    assert start().output() == f"another run is writing to {out}; choose another --out_dir\n"
    os.killpg(first.jobs[0].pid, SIGTERM)
    assert first.wait() == [143] and read(out / "last.pt")["step"] == len(steps(out))


# --- processes --------------------------------------------------------------------------------------------------------

def poison():
    forward = ddae.DDAE.forward
    ddae.DDAE.forward = lambda *args: (forward(*args)[0] * float("nan"), {})


@pytest.mark.parametrize("rank", [0, 1])
def test_nan_in_one_process_stops_all_before_the_step(rank, start, out):
    run = start("--save_every 0.25", 2, partial(at, 6, poison, to=rank))
    assert run.wait() == [1, 1] and "Traceback" not in run.output()
    assert run.output().count("gradients not finite") == 2
    assert f"gradients not finite at step 7, loss nan in process {rank}" in run.output()
    state = read(out / "last.pt")
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["model"].values())


def impatient(rank):
    init = DataLoader.__init__
    DataLoader.__init__ = lambda *args, timeout=0, **options: init(*args, timeout=min(2, timeout), **options)


def kill_worker():
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[0]), SIGKILL)  # as the kernel does when memory is full


@pytest.mark.parametrize("hook", [impatient, partial(at, 3, kill_worker)], ids=["hangs", "killed"])
def test_a_data_worker_that_hangs_or_is_killed(hook, start, images, tmp_path):
    data = shutil.copytree(images, tmp_path / "images")
    if hook is impatient:
        path = next((data / "train").rglob("*.png"))
        path.unlink()
        os.mkfifo(path)
    run = start(f"--data {data} --num_workers 1 --epochs 100", hook=hook)
    assert run.wait() == [1] and "Traceback" not in run.output() and "--num_workers" in run.output(), run.output()


def test_a_terminal_that_is_closed_or_cannot_be_written(start, images, out):
    assert start("--max_steps 3", output="/dev/full").wait() == [0]
    command = f"{sys.executable} {ROOT / 'ddae.py'} {FLAGS} --max_steps 3 --data {images} --out_dir {out}/closed"
    subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], check=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert steps(out) == [1, 2, 3] and differences(out, out / "closed") == []


# --- images -----------------------------------------------------------------------------------------------------------

def test_broken_images_are_skipped_named_once_and_counted(start, images, out, tmp_path):
    """In an unlabeled folder: 32 images and 5 that are broken."""
    folder = shutil.copytree(images / "val" / "a", tmp_path / "images")
    bad = ["cut.png", "empty.png", "html.jpg", "bomb.ppm", "dangling.png"]
    cut = (folder / "0.png").read_bytes()[:400]
    for name, data in zip(bad, (cut, b"", b"<html>404</html>", b"P6 20000 20000 255\n")):
        (folder / name).write_bytes(data)
    (folder / bad[-1]).symlink_to("nowhere")
    flags = f"--batch_size 8 --data {folder}"
    run = start(f"{flags} --out_dir {out}/worker --max_bad 0.5 --num_workers 1")
    assert run.wait() == [0] and all(run.output().count(f"unreadable {folder / name}: ") == 1 for name in bad)
    assert run.output().count("unreadable /") == 5 and log(out / "worker")[-1]["unreadable"] == 5
    for stop in (2, 5, 12):  # counted on, and the same replacements
        start(f"{flags} --max_bad 0.5 --max_steps {stop}").wait()
    assert differences(out / "worker", out) == []
    text = start(f"{flags} --max_bad 0.12 --out_dir {out}/many").output().splitlines()[-1]
    assert text == "5 of 37 images are unreadable, more than --max_bad 0.12"


def test_trains_without_what_windows_lacks(images, tmp_path):
    code = "import filelock, os, signal, sys, torchvision; sys.modules['fcntl'] = None; " \
           "del os.fork, os.pread, signal.SIGUSR1, signal.SIGCHLD; import ddae; ddae.main()"
    flags = f"{TINY} --data {images} --epochs 1 --warmup_epochs 0 --max_steps 2 --out_dir {tmp_path}"
    subprocess.run([sys.executable, "-c", code, *flags.split()], cwd=ROOT, check=True)
