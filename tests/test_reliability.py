"""Kill it, starve it, feed it rubbish: nothing is lost and nothing silently wrong. soak.py is the long version."""
import os
import random
import re
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
from PIL import Image
from soak import FLAGS, Run
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import ddae

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """64 images for training: 4 steps of 16 an epoch."""
    return soak.make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def nothing_stays():
    """Whatever a failed test leaves running is killed."""
    yield
    for run in soak.RUNS:
        run.signal(signal.SIGKILL)
    soak.RUNS.clear()


def load(out_dir):
    return torch.load(Path(out_dir) / "last.pt", weights_only=True)


def until(condition, alive, seconds=60):
    """Wait until the condition holds; the process under test must live so long."""
    end = time.monotonic() + seconds
    while not condition():
        assert alive() and time.monotonic() < end
        time.sleep(0.01)


# Hooks run in the process under test, before ddae.py starts. `learning_rate` is called once per step, with its number.

def at_step(step, do):
    real = common.learning_rate

    def learning_rate(now, *args):
        if now == step:
            do()
        return real(now, *args)

    common.learning_rate = learning_rate


def send(step, number, rank):
    """The signal arrives when `step` steps are done."""
    at_step(step, lambda: os.kill(os.getpid(), number))


# --- files ------------------------------------------------------------------------------------------------------------

def save_for_ever(folder):
    step = 0
    while True:
        step += 1
        common.save(dict(step=step, a=torch.full((3 << 20,), float(step))), folder / "last.pt", True)
        (folder / "done").write_text(str(step))


def test_sigkill_while_saving_leaves_a_finished_step(tmp_path):
    rng, seen = random.Random(0), set()
    for _ in range(20):
        job = soak.SERVER.Process(target=save_for_ever, args=(tmp_path,))
        job.start()
        until((tmp_path / "done").exists, job.is_alive)
        time.sleep(rng.uniform(0, 0.3))
        job.kill()
        job.join()
        done = int((tmp_path / "done").read_text() or 0)  # empty if killed while writing it
        files = {p.name for p in tmp_path.iterdir()}
        assert files <= {"last.pt", "last.prev.pt", "last.tmp", "done"}
        state = common.load(tmp_path / ("last.pt" if "last.pt" in files else "last.prev.pt"))
        assert state["step"] >= done and (state["a"] == state["step"]).all()
        seen.add("last.tmp" in files)
        (tmp_path / "done").unlink()
    assert True in seen, "no kill fell into the writing"


def test_a_save_without_room_keeps_the_file_before(tmp_path):
    path, soft = tmp_path / "x.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 100_000):  # torch.save reports the small one as OSError, the large one as RuntimeError
        common.save(dict(a=torch.zeros(10)), path)
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2, soft[1]))
        try:
            with pytest.raises(OSError, match=re.escape(f"cannot save {path}: File too large (")):
                common.save(dict(a=torch.ones(size)), path, keep_previous=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def limit_files(rank):
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))  # writing on gives an error, as a full disk


def test_full_disk(images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path / 'out'} --epochs 3 --save_every 0.5 --num_workers 0"
    assert Run(f"{flags} --max_steps 4").wait() == [0]
    before = {p: p.read_bytes() for p in (tmp_path / "out").glob("last*")}
    run = Run(flags, hook=limit_files)
    assert run.wait() == [1]  # the last save counts
    assert run.output().count(f"warning    cannot save {tmp_path}/out/last.pt: File too large (") == 4
    assert [x["step"] for x in soak.log(tmp_path / "out")] == list(range(1, 13))
    assert {p: p.read_bytes() for p in (tmp_path / "out").glob("last*")} == before
    assert Run(flags).wait() == [0] and load(tmp_path / "out")["step"] == 12


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save(dict(model=Evil(str(tmp_path / "proof"))), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt holds more than tensors and plain values"):
        common.load(tmp_path / "evil.pt")
    assert not (tmp_path / "proof").exists()
    calls = [line for p in (*ROOT.glob("*.py"), *ROOT.glob("transfer/*.py")) for line in p.read_text().splitlines()
             if "torch.load(" in line]
    assert calls and all("weights_only=True" in line for line in calls)


def test_two_runs_in_one_folder(images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path / 'out'} --epochs 1000 --num_workers 0"
    first = Run(flags)
    until(lambda: soak.lines(tmp_path / "out"), first.alive)
    second = Run(flags)
    assert second.wait() == [2]
    assert f"another run is writing to {tmp_path}/out; wait for it or use another --out_dir" in second.output()
    first.signal(signal.SIGKILL)
    first.wait()
    assert Run(f"{flags} --max_steps 5").wait() == [0]


# --- resume -----------------------------------------------------------------------------------------------------------

STOPS = (1, 5, 8, 11)  # 4 steps are an epoch


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request, images, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("whole")
    flags = f"{FLAGS} --data {images} --epochs 3 --save_every 0.25 --num_workers 0"
    assert not any(Run(f"{flags} --out_dir {out_dir}", request.param).wait())
    return request.param, flags, out_dir


@pytest.mark.parametrize("turn", range(3))
def test_stopped_anywhere_in_any_way(undisturbed, turn, tmp_path):
    processes, flags, whole = undisturbed
    flags += f" --out_dir {tmp_path / 'cut'}"
    for i, stop in enumerate(STOPS):  # three turns try every way at every place
        match ("SIGKILL", "SIGTERM", "max_steps")[(i + turn) % 3]:
            case "SIGKILL":
                assert Run(flags, processes, partial(send, stop, signal.SIGKILL)).wait() == [-9] * processes
            case "SIGTERM":  # arrives in the step, which is finished
                assert Run(flags, processes, partial(send, stop - 1, signal.SIGTERM)).wait() == [143] * processes
            case "max_steps":
                assert Run(f"{flags} --max_steps {stop}", processes).wait() == [0] * processes
        assert load(tmp_path / "cut")["step"] == stop
    assert Run(flags, processes).wait() == [0] * processes
    assert soak.differences(whole, tmp_path / "cut") == []
    model = load(tmp_path / "cut")["model"]
    assert [x["step"] for x in soak.log(whole)] == list(range(1, 13))
    assert any(not torch.equal(v, model[k.replace("teacher", "encoder")]) for k, v in model.items() if "teacher" in k)


@pytest.mark.parametrize("processes", [1, 2])
def test_short_soak(processes, tmp_path):
    assert soak.soak(tmp_path, stops=5, processes=processes, steps=60) == []


def test_the_log_has_each_step_once_after_a_torn_line(images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path} --epochs 3 --num_workers 0"
    assert Run(f"{flags} --max_steps 3").wait() == [0]
    whole = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    for torn, steps in ((whole + ['{"step": 4, "epoch": 1.0}\n', '{"step": 5, "ep'], [1, 2, 3, 4, 5, 6]),
                        (whole[:2] + [whole[2][:20]], [1, 2, 4, 5, 6])):  # power failed before the log was written
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes())
        (tmp_path / "again" / "log.jsonl").write_text("".join(torn))
        assert Run(f"{flags} --out_dir {tmp_path / 'again'} --max_steps 6").wait() == [0]
        lines = soak.log(tmp_path / "again")
        assert [x["step"] for x in lines] == steps and all("loss" in x for x in lines)


def die_between(rank):
    """Killed when encoder.pt of the last step is written, and last.pt is not."""
    real = common.save

    def save(state, path, *more):
        if path.name == "last.pt" and state["step"] == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        real(state, path, *more)

    common.save = save


def test_killed_between_the_two_files_of_the_last_step(images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path} --epochs 3 --num_workers 0"
    assert Run(flags, hook=die_between).wait() == [-9]
    assert load(tmp_path)["step"] == 8
    assert Run(flags).wait() == [0]
    model, encoder = load(tmp_path)["model"], torch.load(tmp_path / "encoder.pt", weights_only=True)["model"]
    assert all(torch.equal(v, model[f"encoder.{k}"]) for k, v in encoder.items())
    assert (tmp_path / "preview.png").exists()


def test_a_damaged_file_does_not_displace_the_good_one(images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path} --epochs 3 --save_every 0.25 --num_workers 0"
    assert Run(f"{flags} --max_steps 4").wait() == [0]
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-50])
    good = (tmp_path / "last.prev.pt").read_bytes()
    run = Run(f"{flags} --max_steps 4")
    assert run.wait() == [0] and "last.pt is damaged" in run.output()
    assert load(tmp_path)["step"] == 4 and (tmp_path / "last.prev.pt").read_bytes() == good


def test_resume_names_a_start_only(images, tmp_path):
    flags = f"{FLAGS} --data {images} --epochs 3 --num_workers 0"
    assert Run(f"{flags} --out_dir {tmp_path / 'a'} --max_steps 2").wait() == [0]
    for stop in (5, 12):
        run = Run(f"{flags} --out_dir {tmp_path / 'b'} --resume {tmp_path / 'a' / 'last.pt'} --max_steps {stop}")
        assert run.wait() == [0] and load(tmp_path / "b")["step"] == stop
    assert "from 5" in run.output() and [x["step"] for x in soak.log(tmp_path / "b")] == list(range(3, 13))


def pause_before_lock(path, rank):
    real = common.lock

    def lock(file):
        path.touch()
        until((path.parent / "go").exists, lambda: True)
        return real(file)

    common.lock = lock


def test_a_run_that_read_an_old_checkpoint_steps_back(images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path / 'out'} --epochs 3 --num_workers 0"
    assert Run(f"{flags} --max_steps 2").wait() == [0]
    late = Run(flags, hook=partial(pause_before_lock, tmp_path / "paused"))
    until((tmp_path / "paused").exists, late.alive)
    assert Run(f"{flags} --max_steps 7").wait() == [0]
    (tmp_path / "go").touch()
    assert late.wait() == [2] and "another run wrote" in late.output()
    assert load(tmp_path / "out")["step"] == 7 and soak.lines(tmp_path / "out") == 7


# --- gradients --------------------------------------------------------------------------------------------------------

def record_in_double(path, rank):
    """Everything in float64; rank 0 keeps the gradients that the optimiser is given."""
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
    for processes, micro in ((1, 16), (1, 8), (1, 4), (2, 8), (2, 4), (2, 2)):
        out = tmp_path / f"{processes}_{micro}"
        flags = f"{FLAGS} --data {images} --out_dir {out} --epochs 3 --max_steps 2 --micro_batch {micro} --num_workers 0"
        run = Run(flags, processes, partial(record_in_double, f"{out}.grads"))
        assert not any(run.wait()), run.output()
        grads[processes, micro] = torch.load(f"{out}.grads")
    for step, exact in enumerate(grads.pop((1, 16))):  # the first has learning rate 0, so both start from the same weights
        for split, other in grads.items():
            worst = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(exact, other[step]))
            assert exact[0].dtype == torch.float64 and worst <= 1e-12, (split, step, worst)


def break_loss(step, where, rank):
    def poison():
        forward = ddae.DDAE.forward
        ddae.DDAE.forward = lambda *args: (forward(*args)[0] * float("nan"), {})

    if rank == where:
        at_step(step, poison)


@pytest.mark.parametrize("processes, where", [(1, 0), (2, 0), (2, 1)])
def test_nan_on_one_rank_stops_all_before_the_step(processes, where, images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path} --epochs 3 --save_every 0.25 --num_workers 0"
    run = Run(flags, processes, partial(break_loss, 6, where))
    assert run.wait(60) == [1] * processes
    line, = [x for x in run.output().splitlines() if "not finite" in x]
    assert f"at step 7, lr 0.000409, rank {where}: {{'loss': nan" in line and str(images / "train") in line
    state = load(tmp_path)
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["model"].values())


# --- processes --------------------------------------------------------------------------------------------------------

FAULT = """
import os, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import common, ddae, test_reliability
def die():
    os._exit(17)
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    test_reliability.at_step(7, die)
ddae.main()
"""


def torchrun(script, flags, *options):
    """Start torchrun with two processes in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, str(script),
         *flags.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def processes_with(text):
    """Numbers of the live processes that have `text` in their command line."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (p / "cmdline").read_bytes() and "State:\tZ" not in (p / "status").read_text():
                found.append(int(p.name))
        except OSError:  # it ended while we looked
            pass
    return found


def nobody_left(text, seconds=10):
    end = time.monotonic() + seconds
    while processes_with(text) and time.monotonic() < end:
        time.sleep(0.1)
    return not processes_with(text)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies_ends_the_job_or_restarts_it(restarts, images, tmp_path):
    script, out = tmp_path / "fault.py", tmp_path / "out"
    script.write_text(FAULT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    flags = f"{FLAGS} --data {images} --out_dir {out} --epochs 3 --save_every 0.25 --num_workers 1"
    job = torchrun(script, flags, f"--max-restarts={restarts}")
    text, _ = job.communicate(timeout=60)
    assert job.returncode == (0 if restarts else 1), text
    assert nobody_left(str(out))
    if restarts:
        assert load(out)["step"] == 12 and [x["step"] for x in soak.log(out)] == list(range(1, 13))
        assert "from 7" in text
    else:
        assert load(out)["step"] == 7 and re.search(r"exitcode *: 17", text)


@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGUSR1, False), (signal.SIGINT, True)])
def test_signals_through_torchrun(number, to_all, images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path / 'out'} --epochs 2000 --save_every 1000 --num_workers 1"
    job = torchrun(ROOT / "ddae.py", flags, "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    until(lambda: soak.lines(tmp_path / "out") >= 3, lambda: job.poll() is None)
    start = time.monotonic()
    os.killpg(job.pid, number) if to_all else job.send_signal(number)  # Ctrl-C reaches the group of the terminal
    text, _ = job.communicate(timeout=30)
    assert time.monotonic() - start < 15 and job.returncode != 0
    assert nobody_left(str(tmp_path / "out"))
    steps = [x["step"] for x in soak.log(tmp_path / "out")]
    assert load(tmp_path / "out")["step"] == len(steps) and f"stopped    by a signal after step {len(steps)}" in text


def test_sigterm_to_the_whole_group(images, tmp_path):
    """As `timeout` and schedulers send it: data workers get it too, and must live until the step is done."""
    run = Run(f"{FLAGS} --data {images} --out_dir {tmp_path} --epochs 2000 --save_every 1000 --num_workers 1")
    until(lambda: soak.lines(tmp_path) >= 3, run.alive)
    os.killpg(run.pids[0], signal.SIGTERM)
    assert run.wait(30) == [143] and load(tmp_path)["step"] == soak.lines(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_terminal_that_cannot_be_written(images, tmp_path):
    with open("/dev/full", "w") as full:
        job = subprocess.Popen([sys.executable, str(ROOT / "ddae.py"), *FLAGS.split(), "--data", str(images), "--out_dir",
                                str(tmp_path), "--max_steps", "5"], stdout=full, stderr=full)
    job.wait(60)
    assert load(tmp_path)["step"] == soak.lines(tmp_path) == 5


def send_to(where, step, rank):
    if rank == where:
        send(step, signal.SIGTERM, rank)


def test_sigterm_to_one_rank_stops_both_after_the_same_step(images, tmp_path):
    run = Run(f"{FLAGS} --data {images} --out_dir {tmp_path} --epochs 3 --num_workers 0", 2, partial(send_to, 1, 6))
    assert run.wait(60) == [143, 143] and load(tmp_path)["step"] == soak.lines(tmp_path) == 7


def kill_worker(rank):
    """A data worker is killed in step 4, as the kernel does when memory runs out."""
    def kill():
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    at_step(3, kill)


def test_a_data_worker_that_is_killed(images, tmp_path):
    run = Run(f"{FLAGS} --data {images} --out_dir {tmp_path} --epochs 100 --save_every 0.25 --num_workers 1",
              hook=kill_worker)
    assert run.wait(60) == [1]
    assert re.search(r"a data worker died \(|DataLoader worker \(pid", run.output())
    assert load(tmp_path)["step"] >= 3


def watch(path, rank):
    def note():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with open(path, "a") as file:
            file.write(f"{pages} {len(os.listdir('/proc/self/fd'))}\n")

    for step in (60, 210, 360):
        at_step(step, note)


def test_memory_and_open_files_stay_constant(images, tmp_path):
    flags = f"{FLAGS} --data {images} --out_dir {tmp_path / 'out'} --epochs 100 --num_workers 1 --max_steps 361"
    assert Run(flags, hook=partial(watch, tmp_path / "seen")).wait() == [0]
    (first, files), *later = [map(int, line.split()) for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(later) == 2
    for pages, now in later:
        assert pages < 1.05 * first and now == files


def test_measuring_does_not_depend_on_the_processes_or_disturb_the_run(images, tmp_path):
    flags = f"{FLAGS} --data {images} --epochs 2 --num_workers 0"
    found = {}
    for processes, extra in ((1, ""), (1, "--val_every 0.5 --knn_every 0.5"), (2, "--val_every 0.5 --knn_every 0.5")):
        out = tmp_path / f"{processes}{bool(extra)}"
        assert not any(Run(f"{flags} {extra} --out_dir {out}", processes).wait())
        found[processes, bool(extra)] = soak.log(out)
    one, two = found[1, True], found[2, True]
    assert [x["step"] for x in one if "val_loss" in x] == [x["step"] for x in one if "knn" in x] == [0, 2, 4, 6, 8]
    for a, b in zip(one, two):
        for key in ("val_loss", "val_pixel/2", "knn"):
            assert (key in a) == (key in b) and a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-4)
    assert [x["loss"] for x in one if "loss" in x] == [x["loss"] for x in found[1, False]]


# --- images -----------------------------------------------------------------------------------------------------------

def test_image_zoo(tmp_path):
    """Every odd file among good ones: read right, or named once with the reason and replaced by the same image each time."""
    zoo = tmp_path / "zoo" / "ünï code"
    zoo.mkdir(parents=True)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8))
    for mode, name in (("CMYK", "cmyk.jpg"), ("L", "grey.JPEG"), ("P", "palette.png"), ("RGBA", "alpha.webp"),
                       ("LA", "grey alpha.png"), ("1", "bits.tif"), ("RGB", "new\nline.bmp")):
        picture.convert(mode).save(zoo / name)
    Image.fromarray(rng.integers(0, 65535, (32, 32), dtype=np.uint16)).save(zoo / "16bit.png")
    picture.save(zoo / "tail.jpg")
    (zoo / "tail.jpg").write_bytes((zoo / "tail.jpg").read_bytes() + b"garbage")
    picture.save(zoo / "png named.jpg", "png")
    good = {p.name for p in zoo.iterdir()}

    Image.fromarray(rng.integers(0, 2**30, (32, 32), dtype=np.int32)).save(zoo / "32bit.tif")
    Image.fromarray(rng.random((32, 32), dtype=np.float32)).save(zoo / "float.tif")
    picture.save(zoo / "cut.jpg")
    (zoo / "cut.jpg").write_bytes((zoo / "cut.jpg").read_bytes()[:400])
    (zoo / "empty.png").write_bytes(b"")
    (zoo / "page.jpg").write_text("<html>404</html>")
    Image.new("1", (9500, 9500)).save(zoo / "bomb.png")  # 90 million pixels in 11 kB
    (zoo / "dangling.png").symlink_to("nowhere")
    bad = {p.name for p in zoo.iterdir()} - good

    (zoo / "._apple.jpg").write_bytes(b"x")  # these are no images and are passed over
    (zoo / "folder.jpg").mkdir()
    (zoo / "loop").symlink_to(tmp_path / "zoo")
    (zoo / "notes.txt").write_text("x")

    runs = {}
    for workers, max_bad in ((0, 0.5), (1, 0.5), (0, 0.01)):
        out = tmp_path / f"{workers} {max_bad}".replace(" ", "_")
        runs[workers, max_bad] = run = Run(f"{FLAGS.replace('--batch_size 16', '--batch_size 17')} --data {tmp_path / 'zoo'} "
                                           f"--out_dir {out} --epochs 4 --max_bad {max_bad} --num_workers {workers}")
        assert run.wait() == [2 if max_bad < 0.1 else 0], run.output()
        text = run.output()
        for name in bad:
            assert text.count(f"unreadable {zoo / name}: ") == 1, text
        assert text.count("unreadable /") == len(bad)
    last = soak.log(tmp_path / "0_0.5")
    assert last[-1]["unreadable"] == len(bad) == 7
    assert soak.differences(tmp_path / "0_0.5", tmp_path / "1_0.5") == []  # the same replacements
    error = runs[0, 0.01].output().splitlines()[-1]
    assert len(re.findall(re.escape(str(zoo)) + r"/[\w.]+ \(\w+: ", error)) == 5 and "7 of 17 images are unreadable, more than --max_bad 0.01" in error
    assert not (tmp_path / "0_0.01" / "last.pt").exists()


def test_a_resumed_run_counts_bad_files_on(tmp_path):
    images = soak.make_images(tmp_path / "images", 20)
    for path in sorted((images / "train").rglob("*.png"))[:3]:
        path.write_bytes(b"")
    flags = f"{FLAGS.replace('--batch_size 16', '--batch_size 5')} --data {images} --max_bad 0.5 --num_workers 0 --epochs 2"
    assert Run(f"{flags} --out_dir {tmp_path / 'whole'}").wait() == [0]
    for stop in (6, 8):  # 4 steps are an epoch
        assert Run(f"{flags} --out_dir {tmp_path / 'cut'} --max_steps {stop}").wait() == [0]
    assert soak.differences(tmp_path / "whole", tmp_path / "cut") == []
    assert soak.log(tmp_path / "cut")[-1]["unreadable"] == 3


def test_masks_and_crops_change_with_seed_epoch_and_sample(images):
    source = common.Folder(images / "train")
    def sample(seed, epoch, index):
        cfg = common.parse(ddae.Config, ddae.PRESETS, argv=f"{FLAGS} --seed {seed}".split())
        draw = partial(ddae.draw_mask, **common.arguments(ddae.draw_mask, cfg))
        crop, ids, *_ = common.Samples(source, cfg, draw)[epoch, index]
        return crop.numpy().tobytes(), ids.tobytes()

    base = [sample(0, 0, i) for i in range(20)]
    assert base == [sample(0, 0, i) for i in range(20)]
    for other in ([sample(1, 0, i) for i in range(20)], [sample(0, 1, i) for i in range(20)], base[1:] + base[:1]):
        assert sum(a[0] == b[0] for a, b in zip(base, other)) == 0
        assert sum(a[1] == b[1] for a, b in zip(base, other)) < 5
