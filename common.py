"""
What every image trainer needs and no paper is about: flags, data, schedule, checkpoints, and one training loop.
Nothing here knows of masks, teachers, or decoders. A method file brings:

    draw_mask(rng, cfg) -> array              everything random about a sample besides its crop; runs in the data worker
    model = Method(cfg)                       reads the Config directly; the class name is the method's name in files
    model(imgs, draws) -> loss, metrics       imgs (B, 3, H, W) normalized, draws stacked; loss: a mean over images;
                                              metrics: name -> 0-dim tensor, only logged if there is a slash in the name
    model.encoder                             what encoder.pt holds and kNN measures, unless there is a model.exported
    model.after_step(step, steps_per_epoch)   optional: EMA and the like; step counts from 1. Processes do not share
                                              buffers: reduce here what `forward` collects in them
    model.preview(imgs, draws) -> panels      optional: title -> images (B, 3, H, W), maps (B, h, w) where 0 is blank,
                                              or features (B, h, w, D), which become common colors

Besides RunConfig, `train` reads batch_size and epochs (or iterations). The default samples, optimizer, and schedule,
which finetune.py and transfer/ replace, read the rest of a method's recipe.

Randomness is keyed, never stateful. Crop, flip, and mask of a sample are functions of (seed, epoch, index), the order
of an epoch of (seed, epoch), anything random inside the model of (seed, step, rank, micro-batch). So the data do not
depend on processes, workers, or micro-batches, and a checkpoint needs no generator state.
"""
import argparse
import atexit
import contextlib
import difflib
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections import ChainMap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2
from tqdm import tqdm

from sources import (MEAN, STD, Crop, Folder, draft, feed, make_loader, mean_std, name_of, open_data,  # noqa: F401
                     planar, resident, to_rgb)

RANK, LOCAL_RANK, WORLD, LOCAL_WORLD = (int(os.environ.get(k, d)) for k, d in (
    ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))  # set by torchrun


# --- flags ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RunConfig:
    """Flags of the run; init and seed may not change when it resumes, nor the recipe, which a script's Config adds."""
    data: str = "shapes"  # [ours] folder with train/ and val/, or of images; a torchvision data set; shapes (generated)
    out_dir: str = "out"  # [ours] checkpoints, log, and pictures; the same command resumes the run found there
    init: str = ""  # [ours] start from the encoder weights in this file
    seed: int = 0  # [ours] of everything random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # [ours] auto: CUDA if there is a GPU; mps is not tested
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # [ours] auto: bf16 autocast on GPUs that support it
    compile: bool = False  # [ours] torch.compile each block
    recompute: bool = False  # [ours] save memory: keep blocks' inputs only, and compute the rest again in the backward
    micro_batch: int | Literal["auto"] = 0  # [ours] images per process and pass; 0: all; auto: what the GPU holds
    num_workers: int = min(10, max(1, (os.cpu_count() or 1) // LOCAL_WORLD))  # [ours] data workers per process
    clip_grad: float = 0.0  # [ours] largest gradient norm; 0: no clipping
    max_steps: int = 0  # [ours] stop and save after this many steps; the schedule still spans all epochs
    log_every: int = 20  # [ours] steps between log lines
    save_every: float = 1.0  # [ours] epochs between checkpoints and previews; fractions are fine; 0: at the end only
    eval_every: float = 0.0  # [ours] epochs between evaluations on val/: loss, and kNN accuracy with labels; 0: never
    eval_images: int = 10000  # [ours] images of train/ that kNN compares with; a fifth as many of val/ are evaluated
    max_bad: float = 0.01  # [ours] fraction of unreadable images above which a run stops

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            lowest = int(type(f.default) is int and f.default > 0 and f.name != "num_workers")
            if isinstance(value, (int, float)):
                assert lowest <= value < math.inf, f"--{f.name} must be finite and at least {lowest}, got {value}"
        assert self.data, "--data is empty"
        assert getattr(self, "warmup_epochs", 0) < getattr(self, "epochs", 1), "--warmup_epochs must be below --epochs"


def parse(Config, presets, doc="", argv=None):
    """Command line -> frozen Config. One field, one flag; its comment is the help; presets replace defaults."""
    source = "".join(inspect.getsource(c) for c in reversed(Config.__mro__[:-1]))
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    parser = argparse.ArgumentParser(usage="%(prog)s [--flag value ...]", description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "\n".join(f"--preset {k}: {' '.join(f'{f}={x}' for f, x in v.items())}" for k, v in presets.items())
    parser.add_argument("--preset", nargs="+", default=[], choices=presets,
                        help="[ours] replaces defaults, as listed at the end; of several, later ones win")
    for f in fields(Config):
        kind, args = get_origin(f.type) or f.type, get_args(f.type)
        if f.name not in helps or kind not in (bool, int, float, str, tuple, Literal, Union):
            sys.exit(f"Config.{f.name} needs a type that a flag can have (bool, int, float, str, tuple[float, ...], "
                     "Literal), and at the end of its line, after two spaces, a comment, the flag's help")
        how = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs="*", type=args and args[0]),
               Union: dict(type=lambda x: x if x == "auto" else int(x)),  # --micro_batch
               Literal: dict(choices=args)}.get(kind, dict(type=kind))
        text = f"{helps[f.name]} (default: {f.default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = [k for k in helps if k.endswith(unknown[0].strip("-"))] + difflib.get_close_matches(unknown[0], helps)
        parser.error(f"unknown {unknown[0]}" + "".join(f"; did you mean --{name}?" for name in near[:1]))
    given = dict(ChainMap(vars(given), *(presets[name] for name in reversed(vars(given).pop("preset")))))
    try:
        return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except AssertionError as error:  # __post_init__
        parser.error(str(error))


def print0(message):
    """Print from the first process, above the progress bar. A terminal that is gone does not end a run."""
    if RANK == 0 and sys.stdout:  # None if it was closed when Python started
        try:
            tqdm.write(message.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding))
            sys.stdout.flush()
        except (OSError, ValueError):
            sys.stdout = None


print_once = functools.cache(print0)


# --- data -------------------------------------------------------------------------------------------------------------

class Samples(Dataset):
    """Training samples by key (epoch, index). An unreadable image is replaced by another one, always the same."""

    def __init__(self, source, cfg, draw=None):
        self.source, self.cfg, self.draw = source, cfg, draw
        self.crop = v2.Compose([Crop(cfg.img_size, (cfg.crop_min, 1.0)), v2.RandomHorizontalFlip()])

    def __getitem__(self, key):
        """-> what `sample` returns, and the unreadable files: name -> reason."""
        rng, index, bad = np.random.default_rng((self.cfg.seed, *key)), key[1], {}
        torch.default_generator.manual_seed(int(rng.integers(2**62)))  # torchvision's crop and flip
        for _ in range(20):
            try:
                item = self.read(index)
            except Exception as error:  # broken files raise nearly anything
                bad[name_of(self.source, index)] = f"{type(error).__name__}: {error}"
                index = int(rng.integers(len(self.source)))
            else:
                return self.sample(item, rng), bad
        sys.exit(f"20 unreadable images in a row: {bad}")

    def read(self, index):
        """-> crop uint8 (3, S, S), label. An error here means a broken file."""
        image, label = self.source[index]
        return self.crop(image), label

    def sample(self, item, rng):
        return item[0], self.draw(rng, self.cfg)

    def collate(self, batch):
        """-> images uint8 (B, 3, H, W), draws (B, ...), unreadable files."""
        samples, bad = zip(*batch)
        return *default_collate(samples), dict(ChainMap(*bad))


def note_bad(known, new, total, cfg):
    """Add the unreadable files that all processes have met, name -> reason. Ends the run if they are too many."""
    for name, reason in ChainMap(*gather(new)).items():
        if name not in known:
            print0(f"unreadable {name}: {reason}")
        known[name] = reason
    new.clear()
    if len(known) > cfg.max_bad * total:
        sys.exit(f"{len(known)} of {total} images are unreadable, more than --max_bad {cfg.max_bad:g}")


def batches(n, cfg, micro, start, stop):
    """Keys of this process's micro-batches for optimizer steps `start` to `stop`. An incomplete batch is dropped."""
    for step in range(start, stop):
        epoch, i = divmod(step, n // cfg.batch_size)
        if i == 0 or step == start:
            order = np.random.default_rng((cfg.seed, epoch)).permutation(n)
        batch = order[i * cfg.batch_size:(i + 1) * cfg.batch_size].reshape(WORLD, -1, micro)
        yield from ([(epoch, int(index)) for index in part] for part in batch[RANK])


def to_device(imgs, draws, device):
    """uint8 images (B, 3, H, W) -> normalized, on the device, with their draws. Either may be a list of tensors."""
    mean, std = mean_std(device)
    imgs, draws = tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), (imgs, draws))
    return tree_map_only(torch.Tensor, lambda x: (x.float() / 255 - mean) / std, imgs), draws


# --- optimizer and schedule -------------------------------------------------------------------------------------------

def cosine(step, steps_per_epoch, cfg):
    """Linear warm-up from 0, then half a cosine to min_lr; the peak is base_lr * batch_size / 256."""
    epoch, peak = step / steps_per_epoch, cfg.base_lr * cfg.batch_size / 256
    if epoch < cfg.warmup_epochs:
        return peak * epoch / cfg.warmup_epochs
    done = (epoch - cfg.warmup_epochs) / (cfg.epochs - cfg.warmup_epochs)
    return cfg.min_lr + (peak - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def adamw(model, cfg):
    """Fused AdamW. No weight decay on vectors and scalars (norms, biases, beta), [CLS], and the position table."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))].append(p)
    return torch.optim.AdamW([dict(params=p, weight_decay=cfg.weight_decay * decays) for decays, p in groups.items()],
                             lr=0.0, betas=cfg.adam_betas, fused=True)


# --- files ------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """Yield another path to write to; the file there takes the place of `path` when it is whole and on disk."""
    temporary = path.with_stem(f"{path.stem}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows does not flush what is open for reading alone
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path):
    """Read a file of torch.save, tensors and plain values. Ends the program on damage, which torch.load overlooks."""
    try:
        with zipfile.ZipFile(path) as archive, torch.serialization.safe_globals([argparse.Namespace]):  # MAE's flags
            assert archive.testzip() is None, "flipped bits"
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        sys.exit(f"{path} is missing, damaged, or no checkpoint of tensors and plain values: {str(error):.80}")


def load_weights(module, weights, path):
    """Load all of `module` from a state dict that may hold more. Ends the program if something is missing or unfit."""
    own = module.state_dict()
    wrong = [f"{k}, in the model {tuple(v.shape)}" for k, v in own.items() if k not in weights
             or weights[k].shape != v.shape or weights[k].is_floating_point() != v.is_floating_point()
             or not weights[k].isfinite().all()]
    if wrong:
        sys.exit(f"{path}: {len(wrong)} of {len(own)} tensors are missing, misshapen, or not finite: {wrong[:3]}")
    module.load_state_dict({name: weights[name] for name in own})


def init_encoder(encoder, cfg):
    """--init: encoder.pt, or a ViT under timm's names. A resumed run does not need the file."""
    if cfg.init and not any((Path(cfg.out_dir) / name).exists() for name in ("last.pt", "last.prev.pt")):
        from vit_files import load_encoder
        load_encoder(encoder, cfg.init)


def describe(cfg, model, source):
    """What a file says of its run: flags, data, method, and the method's code."""
    code = inspect.getsource(sys.modules[type(model).__module__])
    return vars(cfg) | dict(method=type(model).__name__.lower(), code=code, images=len(source), mean=MEAN, std=STD,
                            classes=[str(c) for c in getattr(source, "classes", [])])


def resume(model, about, last):
    """State in `last`, or in the file before it if that is damaged. Ends the program if it is of another run."""
    previous = last.with_name("last.prev.pt")
    if not last.exists() and not previous.exists():
        return dict(step=0, log=0, bad={})
    try:
        state = load(last)
    except SystemExit as error:
        print0(f"warning: {error}; resuming from {previous}")
        state = load(previous)
        if RANK == 0 and last.exists():
            last.rename(last.with_name("last.damaged.pt"))  # it must not take the place of the good one
    was, free = state["about"], {f.name for f in fields(RunConfig)} - {"init", "seed"} | {"code"}
    changed = [f"{k}: checkpoint {str(was.get(k)):.80}, command {str(v):.80}" for k, v in about.items()
               if k not in free and was.get(k) != v]
    if changed:
        sys.exit(f"{last} is of another run; restore these, or choose another --out_dir: {'; '.join(changed)}")
    if was["code"] != about["code"]:
        print0(f"warning: {inspect.getfile(type(model))} has changed since {last} was saved; its weights are kept")
    load_weights(model, state.pop("model"), last)
    return state


def open_log(path):
    """log.jsonl of the first process, locked: a second run in the same folder is refused."""
    file = open(path if RANK == 0 else os.devnull, "a+b", buffering=0)
    file.seek(0)  # to read; what is written is appended
    if RANK == 0 and hasattr(os, "fork"):  # Windows has no fcntl: no lock there
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            sys.exit(f"another run is writing to {path.parent.absolute()}; choose another --out_dir")
    return file


def write_log(log, **line):
    """Log numbers by name, and print those without a slash in their name."""
    print0("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items() if "/" not in k))
    line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
    with contextlib.suppress(OSError):  # disk full: the next save warns
        log.write(json.dumps(line).encode() + b"\n")
    if line.get("data_wait", 0) > 0.2:
        print_once("hint: data are slow; raise --num_workers, use a local disk, or shrink (python -m results.shrink)")


def save(out, model, optimizer, samples, device, autocast, **state):
    """Write encoder.pt (model.pt without an encoder), last.pt, preview.png. A failure is a warning. -> success"""
    exported, last = getattr(model, "exported", getattr(model, "encoder", model)), out / "last.pt"
    try:
        with replacing(out / ("encoder.pt" if hasattr(model, "encoder") else "model.pt")) as path:
            torch.save(dict(model=exported.state_dict(), config=state["about"]), path)
        with replacing(last) as path:
            torch.save(dict(state, model=model.state_dict(), optimizer=optimizer.state_dict()), path)
            if last.exists():
                os.replace(last, last.with_name("last.prev.pt"))
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        print0(f"warning: cannot save {last}: {error}")
        return False
    if hasattr(model, "preview"):
        from evaluate import save_preview  # needs matplotlib
        with torch.compiler.set_stance("force_eager"):
            save_preview(model, samples, device, autocast, out / "preview.png")
    return True


# --- the loop ---------------------------------------------------------------------------------------------------------

def setup(cfg):
    """Join the other processes, if any -> device, autocast context."""
    cuda = cfg.device == "cuda" or cfg.device == "auto" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD > 1 and not dist.is_initialized():
        store, *_ = next(dist.rendezvous("env://"))
        if WORLD == LOCAL_WORLD:  # torchrun --max-restarts keeps the store, with the addresses of dead processes
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=RANK, world_size=WORLD,
                                device_id=torch.device("cuda", LOCAL_RANK) if cuda else None)
        atexit.register(dist.destroy_process_group)
    bf16 = cfg.precision == "bf16" or cfg.precision == "auto" and cuda and torch.cuda.is_bf16_supported(False)
    torch.backends.cuda.enable_flash_sdp(cuda or not bf16)  # CPUs are slow at it in bf16: 1.4 times ViT-tiny's step
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(not cuda)
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("mps" if cfg.device == "mps" else "cpu")
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def gather(value):
    """The values of all processes, in order of rank, on each of them."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def wrap_blocks(model, cfg):
    """--recompute and --compile, for every module whose class name ends in Block; names in checkpoints stay."""
    for block in (m for m in model.modules() if type(m).__name__.endswith("Block")):
        if cfg.recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            block.compile()


@contextlib.contextmanager
def explained():
    """One line for what ends a run on good input: memory, and data workers that die or hang."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:  # the last two from a worker that died while it sent
        if isinstance(error, RuntimeError) and not re.search("^DataLoader|^CUDA out of|shared memory", str(error)):
            raise
        signal.signal(getattr(signal, "SIGCHLD", signal.SIGINT), signal.SIG_DFL)  # torch's raises if workers die late
        sys.exit(str(error).strip().splitlines()[-1] + "\nIf GPU memory is full, --recompute, or --micro_batch auto or "
                 "a smaller divisor of batch_size / processes; if main memory or /dev/shm is, lower --num_workers")


@explained()
def train(cfg, model, samples, optimizer=adamw, schedule=cosine, evaluate=None):
    """Train `model` on `samples`. The same command resumes a stopped run, bitwise on CPU.

    optimizer(model, cfg): groups may have an "lr_scale". schedule(step, steps_per_epoch, cfg) -> learning rate.
    evaluate(model, cfg, device, autocast, samples) -> metrics, in all processes; None: evaluate.evaluate_encoder.
    """
    if cfg.eval_every and not evaluate:
        from evaluate import evaluate_encoder as evaluate
    device, autocast = setup(cfg)
    out, n, steps_per_epoch = Path(cfg.out_dir), len(samples.source), len(samples.source) // cfg.batch_size
    micro = max(1, cfg.batch_size // WORLD) if cfg.micro_batch in (0, "auto") else cfg.micro_batch
    if cfg.batch_size % (micro * WORLD) or not steps_per_epoch:
        sys.exit(f"--batch_size {cfg.batch_size} is no multiple of {micro} x {WORLD} processes, or above {n} images")
    total = getattr(cfg, "iterations", 0) or steps_per_epoch * cfg.epochs
    stop = min(cfg.max_steps or total, total)
    save_steps, eval_steps = (max(1, round(every * steps_per_epoch)) if every else total + 1
                              for every in (cfg.save_every, cfg.eval_every))

    # model and optimizer, from the last checkpoint if there is one
    out.mkdir(parents=True, exist_ok=True)
    log, about = open_log(out / "log.jsonl"), describe(cfg, model, samples.source)
    state = resume(model, about, out / "last.pt")
    step, bad, new_bad = state["step"], state["bad"], {}  # bad: unreadable files, name -> reason
    if len(set(gather((step, n)))) > 1:
        sys.exit("the processes see different --data or --out_dir")
    if RANK == 0:  # whole lines of the log as it was at that step; a power failure may have torn its end
        log.seek(log.truncate(log.read(state["log"]).rfind(b"\n") + 1))
    wrap_blocks(model.to(device), cfg)
    crop = resident(samples, device) if type(samples) is Samples and step < stop else None  # subclasses read otherwise
    if cfg.micro_batch == "auto" and device.type == "cuda":
        from evaluate import largest_batch
        micro = largest_batch(model, cfg, device, autocast, samples, optimizer)
    accumulate = cfg.batch_size // (micro * WORLD)  # micro-batches per process and step
    optimizer = optimizer(model, cfg)
    if step:
        optimizer.load_state_dict(state.pop("optimizer"))
    ddp = model if WORLD == 1 else DistributedDataParallel(model, [LOCAL_RANK] if device.type == "cuda" else None)
    ddp.broadcast_buffers = False  # after the constructor, which synchronizes them once
    loader = feed(samples, crop, device, batches(n, cfg, micro, step, stop))
    print0(f"{about['method']}: {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters to train, "
           f"{n:,} images of {cfg.data}, {device} {'bf16' if autocast._enabled else 'fp32'}\nbatch {cfg.batch_size} = "
           f"{WORLD} processes x {accumulate} micro-batches x {micro}, steps {step:,} to {stop:,} of {total:,}")

    signals = []  # a handler only notes the signal: the loop finishes the step, saves, and exits
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):  # Windows has two
        signal.signal(number, lambda number, frame: signals.append(number))
    bar = tqdm(total=stop * cfg.batch_size, initial=step * cfg.batch_size, unit=" images", unit_scale=True,
               disable=RANK > 0 or not (sys.stderr and sys.stderr.isatty()))
    caught, saved, start = 0, True, time.perf_counter()
    logged, busy, waited, sums = step, 0.0, 0.0, 0  # since the last line of the log
    while True:
        # Evaluate after saving: a signal then loses nothing. Step 0, the baseline, is of interest in pretraining only.
        if cfg.eval_every and (step >= stop or step % eval_steps == 0) and (step or hasattr(model, "encoder")):
            model.eval()
            with torch.compiler.set_stance("force_eager"):  # other batch sizes would recompile the training graph
                found = evaluate(model, cfg, device, autocast, samples)
            write_log(log, step=step, epoch=step / steps_per_epoch, **found)
            model.train()
        if step >= stop:
            break
        began = time.perf_counter()
        lr = schedule(step, steps_per_epoch, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)

        metrics = {}
        for i in range(accumulate):
            asked = time.perf_counter()
            imgs, draws, unreadable = next(loader)
            new_bad |= unreadable
            waited += time.perf_counter() - asked
            torch.manual_seed(hash((cfg.seed, step, RANK, i)))  # drop path, mixup
            ddp.require_backward_grad_sync = i == accumulate - 1  # DDP reads it in the forward
            with autocast:
                loss, terms = ddp(*to_device(imgs, draws, device))
            (loss / accumulate).backward()
            for name, value in dict(loss=loss.detach(), **terms).items():
                metrics[name] = metrics.get(name, 0) + value / accumulate
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)

        # Gradients are averaged, so a NaN in one process is one in all; a signal may have reached only some of them.
        flags = torch.stack((metrics["grad_norm"], torch.full((), float(len(signals)), device=device)))
        if WORLD > 1:
            dist.all_reduce(flags)
        norm, caught = flags.tolist()  # the only wait for the GPU in a step
        if not math.isfinite(norm):
            sys.exit(f"gradients not finite at step {step + 1}, loss {metrics['loss'].item():.4g} in process {RANK}; "
                     "resume with --clip_grad 3 or --precision fp32, or start over with a lower learning rate")
        sums = sums + torch.stack([*metrics.values()])
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if hasattr(model, "after_step"):
            model.after_step(step, steps_per_epoch)
        bar.update(cfg.batch_size)
        busy += time.perf_counter() - began

        if step == stop or step % cfg.log_every == 0:
            means = sums / (step - logged) / WORLD
            if WORLD > 1:
                dist.all_reduce(means)
            note_bad(bad, new_bad, n, cfg)
            memory = dict(peak_gib=torch.cuda.max_memory_allocated() / 2**30) if device.type == "cuda" else {}
            write_log(log, step=step, epoch=step / steps_per_epoch, **dict(zip(metrics, means.tolist())),
                      lr=lr, unreadable=len(bad), data_wait=waited / busy, **memory,
                      images_per_s=(step - logged) * cfg.batch_size / busy, minutes=(time.perf_counter() - start) / 60,
                      minutes_left=busy / 60 / (step - logged) * (stop - step))
            logged, busy, waited, sums = step, 0.0, 0.0, 0
        if step == stop or caught or step % save_steps == 0:
            note_bad(bad, new_bad, n, cfg)
            if RANK == 0:
                saved = save(out, model, optimizer, samples, device, autocast, step=step, log=log.tell(), bad=bad,
                             about=about)
        if caught:
            break
    gather(None)  # the first process has written its files
    if caught:
        print0(f"stopped by a signal after step {step}; the same command resumes")
    if caught or not saved:
        sys.exit(128 + (signals or [signal.SIGTERM])[0] if saved else 1)
