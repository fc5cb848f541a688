"""
What any image training needs and no paper is about: command line, processes, data, schedule, optimiser, checkpoints,
log, pictures, kNN accuracy, and the one training loop. Nothing here knows of masks, teachers or decoders.

A method file brings:
    draw(rng) -> int array                     what is random about one sample besides its crop; runs in the data worker
    model(imgs, drawn) -> loss, metrics        imgs (B, 3, H, W) normalised, drawn (B, ...) the stacked draws
and, where it has use for them:
    model.after_step(progress)                 after each optimiser step; progress in (0, 1] of the whole training
    model.after_init()                         after --init has loaded weights into model.encoder
    model.warning(line) -> text                what a line of the log warns of, or ""
    model.preview(imgs, drawn) -> panels       title -> (B, 3, H, W) or (B, h, w), for preview.png
    model.encoder                              what --init loads, encoder.pt holds and kNN measures; lists its blocks' outputs
    model.exported                             another encoder for encoder.pt and kNN
finetune.py and transfer/ bring their own samples, optimiser, schedule and evaluation as well; see `train`.

Randomness by key. Sample `index` of `epoch` gets its crop, flip and draw from (seed, epoch, index); the order of an
epoch comes from (seed, epoch); anything random inside the model from (seed, step, rank, micro-step). So masks and crops
are the same for any number of processes, workers and micro-batches, and a checkpoint needs neither generator nor sampler state.
"""
import argparse
import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import functools
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import typing
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in all codes but BootMAE's
RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (  # what torchrun says; a plain run is one process
    int(os.environ.get(name, default)) if "RANK" in os.environ else default
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
warnings.simplefilter("error", Image.DecompressionBombWarning)  # such a file counts as unreadable


# --- config and command line ------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Flags that concern the machine and the run, not the method; the Config of each script adds its recipe."""
    data: str = "shapes"  # [ours] image folder (with train/ and val/ or not), a data set's name (`--data list`), or shapes
    data_root: str = "data"  # [ours] where named data sets lie, or are downloaded to
    out_dir: str = "out"  # [ours] checkpoints, log and pictures; a run found there is continued
    init: str = ""  # [ours] start from the encoder weights in this file: encoder.pt, or MAE's or timm's
    resume: str = "auto"  # [ours] checkpoint to start from where out_dir has none of its own, which always goes before
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"  # [ours] auto takes CUDA where there is one
    precision: typing.Literal["auto", "fp32", "bf16"] = "auto"  # [ours] auto: bf16 autocast on GPUs that have it
    compile: bool = False  # [ours] torch.compile the model
    micro_batch: int = 0  # [ours] images per process and forward pass; 0: batch_size / processes, no accumulation
    num_workers: int = -1  # [ours] data workers per process; -1: the cores divided among processes, at most 10
    seed: int = 0  # [ours] of everything random
    clip_grad: float = 0.0  # [ours] largest gradient norm; 0: no clipping, as in MAE's and BootMAE's pretraining
    max_steps: int = 0  # [ours] stop and save after this many optimiser steps; the schedule still spans all epochs
    log_every: int = 20  # [ours] steps between lines of the log
    save_every: float = 1.0  # [ours] epochs between checkpoints; fractions are fine here and below
    preview_every: float = 1.0  # [ours] epochs between pictures; 0: only at the end
    max_bad: float = 0.01  # [ours] the share of unreadable images above which a run stops

    def __post_init__(self):
        for f in dataclasses.fields(self):
            values = getattr(self, f.name) if isinstance(getattr(self, f.name), tuple) else (getattr(self, f.name),)
            check(all(math.isfinite(v) for v in values if isinstance(v, float)), f"--{f.name} must be finite")
        above(0, self, "epochs batch_size log_every save_every " + rate_flag(self))
        for name in ("micro_batch", "clip_grad", "max_steps", "preview_every", "max_bad", "warmup_epochs", "weight_decay",
                     "min_lr", "seed"):
            check(getattr(self, name) >= 0, f"--{name} must not be negative, got {getattr(self, name)}")
        check(self.warmup_epochs < self.epochs,
              f"--warmup_epochs {self.warmup_epochs:g} must be below --epochs {self.epochs}")


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """RunConfig and what else pretraining has, whatever the method."""
    knn_every: float = 0.0  # [ours] epochs between kNN accuracies of the encoder, needs labels and val/; 0: never
    knn_images: int = 10000  # [ours] images from train/ that kNN compares with, and a fifth as many from val/ to classify
    val_every: float = 0.0  # [ours] epochs between losses on images from val/, always the same crops and masks; 0: never
    val_images: int = 1000  # [ours] how many of them

    def __post_init__(self):
        super().__post_init__()
        above(0, self, "img_size patch_size knn_images val_images")
        for name in ("knn_every", "val_every"):
            check(getattr(self, name) >= 0, f"--{name} must not be negative, got {getattr(self, name)}")
        check(all(0 <= b < 1 for b in self.adam_betas), f"--adam_betas must be in [0, 1), got {self.adam_betas}")
        check(0 < self.crop_min <= 1, f"--crop_min must be in (0, 1], got {self.crop_min}")
        down = self.img_size // self.patch_size * self.patch_size
        check(self.img_size == down, f"--img_size {self.img_size} is not divisible by --patch_size {self.patch_size}; "
              f"use {f'{down} or ' * (down > 0)}{down + self.patch_size}")


def check(condition, message):
    """Raise ValueError(message) unless the condition holds; `parse` turns it into one line."""
    if not condition:
        raise ValueError(message)


def rate_flag(cfg):
    """The flag of the learning rate: base_lr per 256 images, or lr as it is."""
    return "base_lr" if hasattr(cfg, "base_lr") else "lr"


def above(limit, cfg, names):
    """Check that every flag in `names`, separated by spaces, is above the limit."""
    for name in names.split():
        check(getattr(cfg, name) > limit, f"--{name} must be above {limit}, got {getattr(cfg, name)}")


def fail(message, code=2, alone=False):
    """End the program with one line on stderr per machine; code 2 is bad input.

    alone: this process found the fault by itself, so it speaks whatever its rank; torchrun then ends the others.
    """
    if alone or LOCAL_RANK == 0:
        complain(f"{Path(sys.argv[0]).name}: error: {message}")
    sys.exit(code)


def complain(message):
    """A line on stderr."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


@functools.cache  # once per file, however often it is met
def complain_of(name, reason):
    """A line on stderr about a file that cannot be read."""
    complain(f"unreadable {name}: {reason}")


def leave():
    """Take leave of the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value):
    """The values of all processes, in order of rank, on each of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def say(message):
    """Print from the first process only, above the progress bar if there is one."""
    if RANK == 0:
        try:
            tqdm.write(message)
            sys.stdout.flush()
        except OSError:  # the terminal is gone, or the disk under its log full: no reason to end a run
            sys.stdout = open(os.devnull, "w")


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line."""

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1].split("=")[0], self._option_string_actions, 1)
            message = f"unknown flag {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")
        fail(f"{message} (see --help)".replace("argument --", "--"))


def parse(Config, presets, doc="", argv=None, flag="preset", default=lambda given: None):
    """Command line -> frozen Config: one field, one flag, the field's comment its help; `--preset` replaces defaults.

    flag: another name for --preset.  default(given flags) -> the preset where none is given.
    """
    helps = {}
    for cls in reversed(Config.__mro__[:-1]):
        helps |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
    spec = sys.modules["__main__"].__spec__  # None but under `python -m`
    parser = Parser(spec and f"python -m {spec.name}", allow_abbrev=False, description=doc,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument(f"--{flag}", choices=presets, help="[ours] sizes and starting points, see the end")
        parser.epilog = f"--{flag}\n" + "\n".join(textwrap.fill(
            f"  {k:18} {' '.join(f'{f}={v}' for f, v in p.items()) or 'the defaults'}", 120, subsequent_indent=" " * 21,
            break_long_words=False, break_on_hyphens=False) for k, p in presets.items())
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        kind, how = hints[f.name], {}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            how["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            how |= dict(nargs="*", type=typing.get_args(kind)[0])
        else:
            how["type"] = kind
        text = f"{helps[f.name]} (default: {f.default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    given = presets.get(given.pop(flag, None) or default(given), {}) | given
    try:
        return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except ValueError as error:
        fail(str(error))


def arguments(function, cfg):
    """The fields of cfg that `function` takes, by name."""
    return {name: getattr(cfg, name) for name in inspect.signature(function).parameters if hasattr(cfg, name)}


# --- data -------------------------------------------------------------------------------------------------------------

class Folder:
    """Images under a folder, at any depth; the first folder of each path is its class, if all images have one."""

    def __init__(self, root):
        files, seen = [], set()
        def unlisted(error):
            fail(f"folder {error.filename}: {error.strerror}", alone=True)

        for folder, inner, names in os.walk(root, followlinks=True, onerror=unlisted):
            if os.path.realpath(folder) in seen:  # a link that leads back
                inner.clear()
                continue
            seen.add(os.path.realpath(folder))
            files += [os.path.relpath(os.path.join(folder, n), root) for n in names
                      if not n.startswith(".") and n.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS)]
        if not files:
            fail(f"folder {root.absolute()} holds no images, only {sorted(os.listdir(root))[:3]}; expected "
                 f"files ending in {' '.join(torchvision.datasets.folder.IMG_EXTENSIONS)}")
        self.root = root
        # One array of bytes: a list of a million strings would be copied into every worker, reference by reference.
        self.files = np.array(sorted(os.fsencode(f) for f in files))
        tops = [f.split(b"/")[0] if b"/" in f else b"" for f in self.files]
        classes = sorted(set(tops)) if b"" not in tops else []
        self.classes = [os.fsdecode(c) for c in classes]
        self.labels = np.searchsorted(classes, tops) if classes else None

    def __len__(self):
        return len(self.files)

    def name(self, i):
        return os.path.join(self.root, os.fsdecode(self.files[i]))

    def image(self, i):
        return to_rgb(Image.open(self.name(i)))

    def label(self, i):
        return int(self.labels[i])


TORCHVISION = {  # name: (class, arguments for training, arguments for validation)
    "cifar10": ("CIFAR10", dict(train=True), dict(train=False)),
    "cifar100": ("CIFAR100", dict(train=True), dict(train=False)),
    "stl10": ("STL10", dict(split="train"), dict(split="test")),
    "stl10-unlabeled": ("STL10", dict(split="unlabeled"), None),
    "imagenette": ("Imagenette", dict(split="train", size="320px"), dict(split="val", size="320px")),
    "imagenet": ("ImageNet", dict(split="train"), dict(split="val")),
    "food101": ("Food101", dict(split="train"), dict(split="test")),
    "flowers102": ("Flowers102", dict(split="train"), dict(split="test")),
    "pets": ("OxfordIIITPet", dict(split="trainval"), dict(split="test")),
    "dtd": ("DTD", dict(split="train"), dict(split="test")),
    "aircraft": ("FGVCAircraft", dict(split="trainval"), dict(split="test")),
    "svhn": ("SVHN", dict(split="train"), dict(split="test")),
}


class Named:
    """A torchvision data set by name, downloaded by the first process where torchvision can."""

    def __init__(self, name, root, split):
        kind, *how = TORCHVISION[name]
        self.title, how = f"{name} {split}", how[split == "val"]
        if how is None:
            fail(f"--data {name} has no validation images; leave out --knn_every and --val_every")
        make = getattr(torchvision.datasets, kind)
        download = dict(download=True) if "download" in inspect.signature(make).parameters else {}
        try:
            if LOCAL_RANK == 0:  # the others wait until it is downloaded and unpacked
                make(root, **download, **how)
            if dist.is_initialized():
                dist.barrier()
            self.set = make(root, **how)
        except (OSError, RuntimeError) as error:
            fail(f"--data {name} in --data_root {Path(root).absolute()}: {' '.join(str(error).split())}")
        self.classes = getattr(self.set, "classes", None) or sorted({int(y) for y in getattr(self.set, "labels", [-1])})
        self.labels = None if self.classes == [-1] else self.classes

    def __len__(self):
        return len(self.set)

    def name(self, i):
        return f"{self.title} [{i}]"

    def image(self, i):
        return to_rgb(self.set[i][0])

    def label(self, i):
        return int(self.set[i][1])


class Shapes:
    """Generated pictures, the same on every machine: one to three figures, each kind with a colour and texture of its own.

    Ground, light, sizes, angles and places are random. The class is the largest figure's kind. `item` also gives a mask
    and boxes, for segmentation and detection.
    """
    classes = labels = ("disc", "ring", "square", "triangle", "flower", "cross", "bar", "crescent")

    def __init__(self, split, size):
        self.split, self.size = split, size

    def __len__(self):
        return 2000 if self.split == "val" else 10000

    def name(self, i):
        return f"shapes {self.split} [{i}]"

    def image(self, i):
        return Image.fromarray(self.item(i)["image"])

    def label(self, i):
        return self.item(i)["label"]

    def item(self, i):
        """image (S, S, 3) uint8, label, mask (S, S) uint8 with 0 ground and 1 + class, boxes (n, 4) xyxy, classes (n,)."""
        rng = np.random.default_rng((self.split == "val", i))
        S = self.size
        y, x = (np.mgrid[:S, :S].astype(np.float32) + 0.5) * 2 / S - 1  # in [-1, 1]
        canvas, mask = self.clouds(rng, 3), np.zeros((S, S), np.uint8)
        boxes, kinds = [], []
        for low, high in ((0.6, 0.9), (0.15, 0.25), (0.15, 0.25))[:rng.integers(1, 4)]:
            kind, size, turn = int(rng.integers(len(self.classes))), rng.uniform(low, high), rng.uniform(0, 2 * math.pi)
            cx, cy = rng.uniform(size - 1, 1 - size, 2)
            u = ((x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)) / size
            v = ((y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)) / size
            inside, texture = self.figure(kind, u, v)
            if not inside.any():  # smaller than a pixel
                continue
            hue = 2 * math.pi * (kind / len(self.classes) + rng.uniform(-0.04, 0.04))
            colour = 0.5 + 0.4 * np.cos(hue + np.array([0, 2, 4]) * math.pi / 3)
            paint = colour * (0.4 + 0.6 * texture[..., None]) + 0.5 * self.clouds(rng, 1) - 0.25
            canvas = np.where(inside[..., None], paint, canvas)
            mask[inside] = kind + 1
            kinds.append(kind)
            rows, cols = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
            boxes.append([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1])
        light = rng.uniform(0.5, 1.2) * rng.uniform(0.7, 1.3, 3)
        image = (canvas * light * 255).clip(0, 255).round().astype(np.uint8)
        return dict(image=image, label=kinds[0], mask=mask, boxes=np.array(boxes, np.float32),
                    classes=np.array(kinds))

    def clouds(self, rng, channels):
        """Noise of three octaves, coarse ones strongest, around 0.5 -> (S, S, channels)."""
        total = 0.5
        for cells, strength in ((2, 0.5), (4, 0.25), (8, 0.15)):
            noise = torch.from_numpy(rng.uniform(-strength, strength, (1, channels, cells + 1, cells + 1)))
            total = total + F.interpolate(noise, (self.size, self.size), mode="bilinear", align_corners=True)
        return total[0].permute(1, 2, 0).numpy()

    @staticmethod
    def figure(kind, u, v):
        """Which points (u, v) lie inside a figure of radius 1 -> bool (S, S); its texture in [0, 1] -> (S, S)."""
        r, angle = np.hypot(u, v), np.arctan2(v, u)

        def wave(t):
            return 0.5 + 0.5 * np.sin(t)

        match kind:
            case 0:
                return r < 1, wave(4 * u)
            case 1:
                return (r < 1) & (r > 0.55), wave(6 * angle)
            case 2:
                return np.maximum(abs(u), abs(v)) < 0.8, wave(9 * u) * wave(9 * v)
            case 3:
                return r * np.cos(angle % (2 * math.pi / 3) - math.pi / 3) < 0.55, wave(14 * v)
            case 4:
                return r < 0.65 + 0.35 * np.cos(5 * angle), wave(12 * r)
            case 5:
                return (np.minimum(abs(u), abs(v)) < 0.35) & (r < 1), np.round(wave(9 * u))
            case 6:
                return (abs(u) < 1) & (abs(v) < 0.4), np.round(wave(6 * u))
            case 7:
                return (r < 1) & (np.hypot(u - 0.6, v) > 0.7), np.round(wave(9 * u) * wave(9 * v) + 0.2)


def open_data(cfg, split):
    """The images of --data for `split`, "train" or "val": an object with len, image(i), label(i), name(i), classes."""
    if cfg.data == "list":
        fail("--data takes a folder, shapes, or one of " + ", ".join(TORCHVISION))
    if cfg.data == "shapes":
        return Shapes(split, cfg.img_size)
    if cfg.data in TORCHVISION:
        return Named(cfg.data, cfg.data_root, split)
    root = Path(cfg.data)
    if not root.is_dir():
        fail(f"--data {root.absolute()} is not a folder, and no data set's name either; see --data list")
    if split == "val" and not (root / "val").is_dir():
        need = "--knn_every" if getattr(cfg, "knn_every", 0) else "--val_every" if hasattr(cfg, "val_every") else "accuracy"
        fail(f"{need} needs {root.absolute() / 'val'}; {'leave it out, or ' * hasattr(cfg, 'val_every')}make that folder"
             + ", with a folder per class" * (need != "--val_every"))
    return Folder(root / split if (root / split).is_dir() else root)


def to_rgb(image):
    """PIL image of any mode -> RGB; 16-bit grey is scaled, where PIL alone would saturate it to white.

    Raises ValueError for 32-bit modes, whose range nobody knows.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (PIL mode {image.mode}) have no known range; convert them to 8 or 16 bits")
    return image.convert("RGB")


class Unreadable(RuntimeError):
    """Image after image could not be read."""


class Samples(torch.utils.data.Dataset):
    """Random crops with their draws, by key (epoch, index) -> crop uint8 (3, S, S), draw, key, unreadable files."""

    def __init__(self, source, cfg, draw):
        self.source, self.draw, self.seed = source, draw, cfg.seed
        self.crop = v2.Compose([
            v2.RandomResizedCrop(cfg.img_size, (cfg.crop_min, 1.0), interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip()])

    def __getitem__(self, key):
        rng = np.random.default_rng((self.seed, *key))
        torch.default_generator.manual_seed(int(rng.integers(2**62)))  # torchvision's crop and flip
        drawn = self.draw(rng) if self.draw else None
        index, bad = key[1], []
        for _ in range(20):
            try:
                return *self.sample(index, drawn), key, bad
            except Exception as error:  # broken files raise nearly anything; each is reported and counted
                bad.append((self.source.name(index), f"{type(error).__name__}: {error}"))
                index = int(rng.integers(len(self.source)))
        raise Unreadable(f"20 unreadable images in a row, the last {bad[-1][0]}: {bad[-1][1]}")

    def sample(self, index, drawn):
        """Image `index` and what goes with it; any exception says that the file is broken."""
        return self.crop(v2.functional.pil_to_tensor(self.source.image(index))), drawn


def collate(samples):
    """List of samples -> images (B, 3, S, S) uint8, draws (B, ...), keys, unreadable files.

    Where a draw is a dict (boxes, say), images of any size and draws stay lists.
    """
    imgs, drawn, keys, bad = zip(*samples)
    if not isinstance(drawn[0], dict):
        imgs, drawn = torch.stack(imgs), torch.from_numpy(np.stack(drawn))
    return imgs, drawn, keys, sum(bad, [])


def num_workers(cfg):
    """Data workers per process: --num_workers, or a share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cfg.num_workers if cfg.num_workers >= 0 else min(10, max(1, cores // LOCAL_WORLD))


def own_group(worker):
    """Data workers leave the process group: a SIGTERM to all of it must not take them before the last step is done."""
    os.setpgrp()


class Batches:
    """Keys of this process's micro-batches, from optimiser step `start` to `stop`.

    An epoch is a shuffle of the data set cut into total batches; process r takes the r-th part of each, and
    `batch_size` not dividing the data set leaves out the rest, others each time.
    """

    def __init__(self, num_images, cfg, start, stop):
        self.n, self.cfg, self.start, self.stop = num_images, cfg, start, stop
        self.per_rank = cfg.batch_size // WORLD
        self.micro = cfg.micro_batch or self.per_rank

    def __len__(self):
        return (self.stop - self.start) * (self.per_rank // self.micro)

    def __iter__(self):
        steps_per_epoch = self.n // self.cfg.batch_size
        order = epoch = None
        for step in range(self.start, self.stop):
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                order = np.random.default_rng((self.cfg.seed, epoch)).permutation(self.n)
            first = step % steps_per_epoch * self.cfg.batch_size + RANK * self.per_rank
            for i in range(first, first + self.per_rank, self.micro):
                yield [(epoch, int(index)) for index in order[i:i + self.micro]]


@functools.cache
def mean_std(device):
    """ImageNet's mean and deviation (3, 1, 1) on the device; copied there once, since a copy waits for the GPU."""
    return torch.tensor(MEAN, device=device).view(3, 1, 1), torch.tensor(STD, device=device).view(3, 1, 1)


class Centred(torch.utils.data.Dataset):
    """Images of `source` through `crop`, with labels; for an unreadable one its name and the reason."""

    def __init__(self, source, crop):
        self.source, self.crop = source, crop

    def __getitem__(self, i):
        try:
            return self.crop(self.source.image(i)), self.source.label(i)
        except Exception as error:  # broken files raise nearly anything
            return self.source.name(i), f"{type(error).__name__}: {error}"


def readable(batch):
    """List of what `Centred` gives -> images (B, 3, H, W), labels (B,); files that could not be read are named."""
    for name, reason in batch:
        if isinstance(name, str):
            complain_of(name, reason)
    batch = [(img, label) for img, label in batch if torch.is_tensor(img)]
    return torch.stack([img for img, _ in batch]) if batch else [], torch.tensor([label for _, label in batch])


def to_device(drawn, device):
    """Tensors, or a list of dicts of them -> the same on the device."""
    if torch.is_tensor(drawn):
        return drawn.to(device, non_blocking=True)
    return [{k: v.to(device, non_blocking=True) for k, v in d.items()} for d in drawn]


def normalise(imgs, device):
    """uint8 (B, 3, H, W), or a list of (3, H, W) -> float on the device, with ImageNet's mean and deviation."""
    if not torch.is_tensor(imgs):
        return [normalise(img, device) for img in imgs]
    mean, std = mean_std(device)
    return (imgs.to(device, non_blocking=True).float() / 255 - mean) / std


# --- optimiser and schedule -------------------------------------------------------------------------------------------

def learning_rate(step, steps_per_epoch, cfg):
    """Linear warm-up from 0, then half a cosine to min_lr, per step; the peak is base_lr * batch_size / 256."""
    epoch, peak = step / steps_per_epoch, cfg.base_lr * cfg.batch_size / 256
    if epoch < cfg.warmup_epochs:
        return peak * epoch / cfg.warmup_epochs
    done = (epoch - cfg.warmup_epochs) / (cfg.epochs - cfg.warmup_epochs)
    return cfg.min_lr + (peak - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model, cfg):
    """Fused AdamW; no weight decay on vectors and scalars (norms, biases, beta), cls token and position table."""
    decay, keep = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (keep if p.ndim <= 1 or name.endswith(("cls_token", "pos_embed")) else decay).append(p)
    groups = [dict(params=decay, weight_decay=cfg.weight_decay), dict(params=keep, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.adam_betas, fused=True)


def layer_groups(model, prefix, depth, layer_decay, weight_decay, skip=("cls_token", "pos_embed")):
    """Parameter groups for layer-wise decay: lr_scale = layer_decay ** (depth + 1 - id).

    In the ViT whose names begin with `prefix`, id is 0 for embeddings and i + 1 for block i; it is depth + 1 for all else.
    No weight decay on vectors and on names ending in one of `skip`. Frozen parameters are left out.
    """
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        inner, layer = name.removeprefix(prefix), depth + 1
        if name.startswith(prefix) and inner.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        elif name.startswith(prefix) and inner.startswith("blocks."):
            layer = int(inner.split(".")[1]) + 1
        decay = 0.0 if p.ndim <= 1 or name.endswith(tuple(skip)) else weight_decay
        group = groups.setdefault((layer, decay), dict(
            params=[], weight_decay=decay, lr_scale=layer_decay ** (depth + 1 - layer)))
        group["params"].append(p)
    return [groups[key] for key in sorted(groups)]


# --- checkpoints ------------------------------------------------------------------------------------------------------

def save(state, path, keep_previous=False):
    """torch.save that never leaves half a file under `path`: write beside it, sync, rename.

    keep_previous leaves the file that was there as *.prev.pt. Raises OSError that names the path.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, path.with_suffix(".prev.pt"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps the system's error in one of its own
        temporary.unlink(missing_ok=True)
        system = error if isinstance(error, OSError) else error.__context__
        free = shutil.disk_usage(path.parent).free >> 20
        raise OSError(f"cannot save {path.absolute()}: {getattr(system, 'strerror', error)} ({free} MiB free)") from error


def load(path):
    """Read a checkpoint safely; raises ValueError if it is damaged or none. torch.load alone misses flipped bits."""
    try:
        with zipfile.ZipFile(path) as archive:
            check(archive.testzip() is None, "flipped bits")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors and plain values; save only its 'model' anew") from None
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is damaged or not a checkpoint of today's torch.save; convert an old .pth or a "
                         ".safetensors by torch.save of its tensors by name") from None
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a checkpoint ({' '.join(str(error).split())[:100]})") from None


def header(path):
    """A checkpoint's entries and its config, {} where it has none; raises ValueError."""
    file = load(path)
    file = file if isinstance(file, dict) else {}
    config = file.get("config")
    return file, config if isinstance(config, dict) else {}


def read_weights(path):
    """Tensors by name from encoder.pt, or a ViT state dict of MAE or timm, bare or under "model"; raises ValueError."""
    weights = load(path)
    weights = weights.get("model", weights) if isinstance(weights, dict) else {}
    check(isinstance(weights, dict), f"{path} has no state dict under 'model'")
    return {k.removeprefix("encoder."): v for k, v in weights.items()}


def usual_heads(embed_dim):
    """Number of heads of a ViT whose file does not say: 64 channels each, but 80 in MAE's and timm's ViT-H."""
    return 16 if embed_dim == 1280 else max(1, embed_dim // 64)


def vit_sizes(weights, path):
    """Sizes of the ViT that such weights are of -> img_size, patch_size, embed_dim, depth, num_heads by name.

    Heads leave no trace in the weights: encoder.pt says how many, otherwise they are as usual.
    Raises ValueError where they are no ViT's.
    """
    config = header(path)[1]
    kind = f", but a model of method {config['method']}" if "method" in config else ""
    for name, ndim in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("cls_token", 3)):
        check(getattr(weights.get(name), "ndim", 0) == ndim,
              f"{path} holds no ViT{kind}: {name} is missing or of another form; give encoder.pt")
    D, _, p, _ = weights["patch_embed.proj.weight"].shape
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    check(side ** 2 == weights["pos_embed"].shape[1] - 1, f"{path} has a pos_embed of {side ** 2} patches, no square")
    heads = config.get("num_heads", usual_heads(D))
    check(D % heads == 0, f"{path}: width {D} is not divisible by {heads} heads")
    depth = len({k.split(".")[1] for k in weights if re.match(r"blocks\.\d+\.", k)})
    known = r"patch_embed\.proj\.|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\."
    more = [k for k in weights if k.startswith(("patch_embed.", "blocks.", "norm_pre", "reg_token")) and not re.match(known, k)]
    check(not more, f"{path} is another kind of ViT: {len(more)} tensors are unknown here, e.g. {more[:1]}")
    return dict(img_size=side * p, patch_size=p, embed_dim=D, depth=depth, num_heads=heads)


def resize_pos_embed(table, grid):
    """Position table (1, 1 + n*n, D) for a (h, w) grid: bicubic on the patch rows, [CLS]'s row kept -> (1, 1 + h*w, D)."""
    side = math.isqrt(table.shape[1] - 1)
    if (side, side) == tuple(grid):
        return table
    rows = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, n, n)
    rows = F.interpolate(rows, grid, mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], rows.flatten(2).transpose(1, 2).to(table)), 1)


def load_encoder(encoder, path):
    """Load `encoder` from encoder.pt, or a ViT state dict of MAE or timm, bare or under "model"; decoders are left out.

    Raises ValueError naming what is missing or of another shape.
    """
    weights, own = read_weights(path), encoder.state_dict()
    load_weights(encoder, weights, path)
    vit_sizes(weights, path)  # refuses ViTs that compute more
    say(f"init       {len(own)} of {len(own)} encoder tensors from {path}, {len(weights) - len(own)} others left out")


def load_weights(module, weights, path):
    """Load `module` out of a dict that may hold more; raises ValueError naming what is missing or of another shape."""
    own = module.state_dict()
    missing = [k for k in own if k not in weights]
    check(not missing, f"{path} lacks {len(missing)} of {len(own)} tensors, e.g. {missing[:3]}")
    wrong = [f"{k}: file {tuple(getattr(weights[k], 'shape', '?'))}, model {tuple(own[k].shape)}" for k in own
             if getattr(weights[k], "shape", None) != own[k].shape]
    check(not wrong, f"{path} is of another size; {'; '.join(wrong[:3])}")
    module.load_state_dict({k: weights[k] for k in own})


MAY_CHANGE = {"data", "data_root", "out_dir", "resume", "device", "precision", "compile", "micro_batch",
              "num_workers", "clip_grad", "max_steps", "log_every", "save_every", "preview_every", "knn_every",
              "knn_images", "val_every", "val_images", "max_bad", "eval_every", "eval_batch", "eval_images", "confusion",
              "inference", "checkpointing"}


def resume(cfg, method, num_images):
    """The state to continue from and its path, or None and None.

    It is out_dir's last.pt, or the one kept before it if that is damaged; without either, the file of --resume.
    """
    last = Path(cfg.out_dir) / "last.pt"
    paths = [p for p in (last, last.with_suffix(".prev.pt")) if p.exists()]
    if not paths and cfg.resume != "auto":
        paths = [Path(cfg.resume)]
    problems = []
    for path in paths:
        try:
            state = load(path)
            check(isinstance(state, dict) and {"step", "config", "model", "optimizer"} <= state.keys(),
                  f"{path} is no training checkpoint (last.pt is one)")
        except ValueError as error:
            problems.append(str(error))
            continue
        was, now = state["config"], dict(plain(cfg), method=method, num_images=num_images)
        if was.get("method") != method:
            fail(f"{path} is of another method, {was.get('method')}; give another --out_dir")
        changed = [f"{k}: checkpoint {was.get(k)}, command {now.get(k)}" for k in sorted(was.keys() | now.keys())
                   if k not in MAY_CHANGE and was.get(k) != now.get(k)]
        if changed:
            fail(f"{path} is of another run; give its settings, or another --out_dir\n  " + "\n  ".join(changed[:5]))
        for problem in problems:
            say(f"resume     {problem}; going on from {path}")
        return state, path
    if problems:
        fail("; ".join(problems) + "; move it away to start anew")
    return None, None


def plain(cfg):
    """A config as a dict that torch.load(weights_only=True) and JSON both give back unchanged."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(cfg).items()}


# --- what the user sees -----------------------------------------------------------------------------------------------

def centre_crop(cfg):
    """PIL image -> uint8 (3, S, S), for measuring."""
    return v2.Compose([v2.PILToTensor(), v2.Resize(cfg.img_size, InterpolationMode.BICUBIC), v2.CenterCrop(cfg.img_size)])


@torch.no_grad()
def validation_loss(model, cfg, device, autocast, source, draw):
    """Mean loss and metrics over --val_images, with centre crops and a draw per image that no seed changes -> dict."""
    crop, sums, n = centre_crop(cfg), {}, 0
    mine = np.random.default_rng(0).permutation(len(source))[:cfg.val_images][RANK::WORLD]
    for part in np.array_split(mine, max(1, len(mine) // 50)):
        samples = []
        for i in part:
            with contextlib.suppress(Exception):  # training reports unreadable files; here they are left out
                samples.append((crop(source.image(i)), draw(np.random.default_rng((0, i))), i, []))
        if samples:
            imgs, drawn, *_ = collate(samples)
            with autocast:
                loss, metrics = model(normalise(imgs, device), drawn.to(device))
            for name, value in dict(loss=loss, **metrics).items():
                sums[name] = sums.get(name, 0) + len(samples) * value.item()
            n += len(samples)
    parts = gather((sums, n))
    total = sum(n for _, n in parts)
    if not total:
        fail(f"--val_every: none of {source.name(0)} and the other images could be read")
    names = max((list(sums) for sums, _ in parts), key=len)
    return {f"val_{name}": sum(sums.get(name, 0) for sums, _ in parts) / total for name in names}


@torch.no_grad()
def knn_accuracy(encoder, cfg, device, autocast, sources, limits, k=20, temperature=0.07):
    """Weighted nearest-neighbour accuracy of mean patch features, as DINO evaluates, exact for any number of processes.

    sources: images with labels to compare with, and to classify; `limits` of them are taken, a fixed choice.
    -> percent, number compared with, number classified.
    """
    found = []
    for source, limit in zip(sources, limits):
        mine = np.random.default_rng(0).permutation(len(source))[:limit][RANK::WORLD].tolist()
        loader = torch.utils.data.DataLoader(Centred(source, centre_crop(cfg)), 100, sampler=mine, collate_fn=list,
                                             num_workers=num_workers(cfg), worker_init_fn=own_group)
        features, labels = [torch.empty(0, cfg.embed_dim)], [torch.empty(0, dtype=torch.long)]
        for imgs, y in map(readable, loader):
            if len(imgs):
                with autocast:
                    x = encoder.norm(encoder(normalise(imgs, device))[-1])  # (B, 1 + N, D)
                features.append(F.normalize(x[:, 1:].float().mean(1)).cpu())
                labels.append(y)
        found.append((torch.cat(features), torch.cat(labels)))
        if not sum(gather(len(found[-1][1]))):
            fail(f"kNN: none of {source.name(0)} and the other images could be read")
    (bank, bank_labels), (queries, labels) = found[0], [torch.cat(parts) for parts in zip(*gather(found[1]))]
    similarity, votes = [], []  # each process asks its own part of the bank, and the nearest of all parts are taken
    for part in queries.split(500):
        near, ids = (part @ bank.T).topk(min(k, len(bank)))  # (500, k)
        similarity.append(near)
        votes.append(bank_labels[ids])
    similarity, votes = [torch.cat(parts, 1) for parts in zip(*gather((torch.cat(similarity), torch.cat(votes))))]
    similarity, ids = similarity.topk(min(k, similarity.shape[1]))
    scores = torch.zeros(len(queries), 1 + int(max(labels.max(), votes.max())))
    scores.scatter_add_(1, votes.gather(1, ids), (similarity / temperature).exp())
    return 100 * (scores.argmax(1) == labels).float().mean().item(), sum(gather(len(bank))), len(queries)


def save_preview(panels, path):
    """Draw a dict of panels as a table of pictures: a row per image, a column per panel."""
    from matplotlib.figure import Figure
    rows = len(next(iter(panels.values())))
    figure = Figure((1.5 * len(panels), 1.45 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, len(panels), squeeze=False)
    for column, (title, pictures) in enumerate(panels.items()):
        pictures = pictures.float().cpu().numpy()
        for row, picture in enumerate(pictures):
            ax = axes[row, column]
            ax.set_axis_off()
            if picture.ndim == 3:
                ax.imshow((picture.transpose(1, 2, 0) * STD + MEAN).clip(0, 1))
            else:
                drawn = ax.imshow(np.ma.masked_equal(picture, 0), "viridis", vmin=0, vmax=pictures.max())  # 0 stays blank
        axes[0, column].set_title(title, fontsize=9)
        if pictures.ndim == 3:
            figure.colorbar(drawn, ax=axes[:, column], location="bottom", shrink=0.9, aspect=12)
    figure.savefig(path, dpi=110)


def save_curves(log, path):
    """Plot every number in a list of log lines against the epoch; names like beta/3 and beta/6 share a plot."""
    from matplotlib.figure import Figure
    series = {}
    for line in log:
        for key, value in line.items():
            if key not in ("step", "epoch", "images_per_s", "data_wait", "unreadable", "val_images"):
                xs, ys = series.setdefault(key.split("/")[0], {}).setdefault(key, ([], []))
                xs.append(line["epoch"])
                ys.append(value)
    rows = math.ceil(len(series) / 5)
    figure = Figure((16, 3 * rows), layout="constrained")
    for i, (group, curves) in enumerate(series.items()):
        ax = figure.add_subplot(rows, 5, i + 1)
        for key, (xs, ys) in curves.items():
            ax.plot(xs, ys, label=key, marker="." if len(xs) < 30 else "")
        ax.set_title(group)
        ax.set_xlabel("epoch")
        if len(curves) > 1:
            ax.legend(fontsize=7, framealpha=0.4)
        ax.ticklabel_format(useOffset=False)
    figure.savefig(path, dpi=90)


def lock(path):
    """Open a log for this process alone, until it ends: a second run in the same folder is refused. -> file"""
    try:
        file = open(path, "a+")
    except OSError as error:
        fail(f"cannot write {path.absolute()}: {error.strerror}")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"another run is writing to {path.parent.absolute()}; wait for it or use another --out_dir")
    except OSError:  # a file system without locks
        pass
    return file


class Log:
    """log.jsonl: one line per logged step, each step once, in order; what follows the step resumed from is cut off."""

    def __init__(self, file, step):
        self.file, self.lines, end = file, [], 0
        file.seek(0)
        for text in file.read().splitlines(keepends=True):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # torn by a kill
                break
            if line["step"] > step or not text.endswith("\n"):
                break
            self.lines.append(line)
            end += len(text.encode())
        file.truncate(end)

    def write(self, line):
        line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        self.lines.append(line)
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            say(f"warning    cannot write {self.file.name}: {error.strerror}")


# --- the loop ---------------------------------------------------------------------------------------------------------

def setup(cfg):
    """Join the other processes if there are any, choose the device -> device, autocast context."""
    cuda = torch.cuda.is_available()
    if cfg.device == "cuda" and not cuda:
        fail("--device cuda, but torch sees no GPU; use --device cpu, or install a driver and a CUDA build of torch")
    device = torch.device("cuda", LOCAL_RANK) if cuda and cfg.device != "cpu" else torch.device("cpu")
    if device.type == "cuda":
        if LOCAL_WORLD > torch.cuda.device_count():
            fail(f"{LOCAL_WORLD} processes but {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(hours=1)))
        except ValueError as error:
            fail(f"RANK is set, but {error}; start several processes with torchrun, or one with RANK unset", alone=True)
        if WORLD == LOCAL_WORLD:  # torchrun --max-restarts keeps the store, and in it the addresses of the dead
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=RANK, world_size=WORLD,
                                timeout=datetime.timedelta(hours=1))
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda"
                                       and torch.cuda.is_bf16_supported(including_emulation=False))
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def pretraining_figures(cfg, source, draw):
    """kNN accuracy and validation loss as an `evaluate` for `train`, or None where none is asked for."""
    if not cfg.knn_every and not cfg.val_every:
        return None
    val_source = open_data(cfg, "val")
    if cfg.knn_every:
        if source.labels is None or val_source.labels is None:
            fail(f"--knn_every needs labels and --data {cfg.data} has none; leave it out")
        if list(source.classes) != list(val_source.classes):
            fail(f"train/ and val/ of --data {cfg.data} have different classes; make them the same, "
                 "or leave out --knn_every")

    def evaluate(model, device, autocast, due):
        found = {}
        if due(cfg.knn_every):
            found["knn"] = knn_accuracy(getattr(model, "exported", model.encoder), cfg, device, autocast, (source, val_source),
                                        (cfg.knn_images, max(1, cfg.knn_images // 5)))[0]
        if due(cfg.val_every):
            found |= validation_loss(model, cfg, device, autocast, val_source, draw)
        return found
    return evaluate


def train(cfg, model, draw=None, samples=None, optimizer=None, schedule=None, evaluate=None):
    """Train `model` as `cfg` says; the contract with the model stands at the top of this file.

    samples: a data set as `Samples`, with its `source`; none: random crops of --data and what `draw` gives.
    optimizer(model, cfg): a group may have an "lr_scale"; none: `make_optimizer`.
    schedule(step, steps_per_epoch, cfg) -> learning rate; none: `learning_rate`.
    evaluate(model, device, autocast, due) -> figures by name, on all processes; due(epochs) tells whether their time has
    come. The model of the highest first figure is kept in best.pt. None: kNN and validation loss, which keep none.
    """
    device, autocast = setup(cfg)
    method, out_dir = type(model).__name__.lower(), Path(cfg.out_dir)
    pretraining = evaluate is None
    samples = samples or Samples(open_data(cfg, "train"), cfg, draw)
    source = samples.source
    evaluate = evaluate or pretraining_figures(cfg, source, draw)
    has_encoder = hasattr(model, "encoder")

    micro = cfg.micro_batch or cfg.batch_size // WORLD
    if not micro or cfg.batch_size % (micro * WORLD):
        fail(f"--batch_size {cfg.batch_size} is not divisible by --micro_batch {micro} x {WORLD} processes")
    accumulate = cfg.batch_size // (micro * WORLD)
    steps_per_epoch = len(source) // cfg.batch_size
    if not steps_per_epoch:
        fail(f"{len(source)} images in --data {cfg.data} are fewer than --batch_size {cfg.batch_size}; "
             f"use --batch_size {len(source)} or less")
    total = steps_per_epoch * cfg.epochs
    stop = min(cfg.max_steps or total, total)

    last = out_dir / "last.pt"
    found = last.stat().st_mtime_ns if last.exists() else None
    state, state_path = resume(cfg, method, len(source))
    resumed, step = state is not None, state["step"] if state else 0
    unreadable = dict(state.get("unreadable", {})) if state else {}  # name -> reason
    seen = gather((step, len(source)))
    if len(set(seen)) > 1:
        fail(f"processes differ in (step, images): {seen}; all machines must see one --out_dir and --data")
    try:
        if state:
            model.load_state_dict(state["model"])
        elif cfg.init and has_encoder:
            load_encoder(model.encoder, cfg.init)
            if hasattr(model, "after_init"):
                model.after_init()
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except ValueError as error:
        fail(f"--init {error}")
    except OSError as error:
        fail(f"--out_dir {out_dir.absolute()} is not writable: {error.strerror}")
    model.to(device)
    optimizer, schedule = (optimizer or make_optimizer)(model, cfg), schedule or learning_rate
    if state:
        optimizer.load_state_dict(state["optimizer"])
    best = state.get("best", -math.inf) if state else -math.inf
    del state
    if cfg.compile:
        model.compile()
    ddp = model
    if dist.is_initialized():  # buffers are constants; the flag that leaves them alone was renamed in torch 2.13
        flag = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(
            DistributedDataParallel).parameters else "broadcast_buffers"
        ddp = DistributedDataParallel(model, [LOCAL_RANK] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True, **{flag: False})

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rate = f"lr {cfg.lr:g}" if rate_flag(cfg) == "lr" else (
        f"lr {cfg.base_lr * cfg.batch_size / 256:.4g} = {cfg.base_lr:g} x {cfg.batch_size} / 256")
    say(f"data       {cfg.data}: {len(source):,} images, --img_size {cfg.img_size}")
    say(f"model      {method}, {trainable:,} trainable parameters" + (
        f", encoder {sum(p.numel() for p in model.encoder.parameters() if p.requires_grad):,}" if has_encoder else ""))
    say(f"batch      {cfg.batch_size} = {WORLD} processes x {accumulate} micro-steps x {micro}; {rate}")
    say(f"steps      {total:,} = {cfg.epochs} epochs x {steps_per_epoch:,}" + (f", until {stop:,}" if stop < total else "")
        + (f", from {step:,}" if resumed else ""))
    say(f"device     {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, "
        f"{'bf16 autocast' if autocast._enabled else 'fp32'}, torch {torch.__version__}")

    if step >= stop:  # nothing is written
        say(f"done       {last.absolute()} has these steps already; for a new run give another --out_dir")
        leave()
        return

    stopping = []  # a signal only leaves its number here; the loop ends the step, saves and exits

    def on_signal(number, frame):
        stopping.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, on_signal)
    loader = iter(torch.utils.data.DataLoader(
        samples, batch_sampler=Batches(len(source), cfg, step, stop), num_workers=num_workers(cfg), collate_fn=collate,
        worker_init_fn=own_group, pin_memory=device.type == "cuda"))
    if RANK == 0:
        file = lock(out_dir / "log.jsonl")
        if found != (last.stat().st_mtime_ns if last.exists() else None):
            fail(f"another run wrote {last.absolute()} just now; give the same command again")
        log = Log(file, step if resumed else -1)
    keep_previous = state_path != last.with_suffix(".prev.pt")  # a damaged last.pt must not displace the good one

    def due(epochs):
        return epochs and step % max(1, round(epochs * steps_per_epoch)) == 0

    def report(line):
        line = dict(step=step, epoch=step / steps_per_epoch, **line)
        if RANK == 0:
            log.write(line)
        shown = {k: v for k, v in line.items() if "/" not in k and k not in ("step", "epoch") and (v or k != "unreadable")}
        say("  ".join([f"step {step:6d}", f"epoch {line['epoch']:6.2f}", *(f"{k} {v:.4g}" for k, v in shown.items())]))

    def measure(now):
        """Figures whose time has come; the best model so far is saved."""
        nonlocal best
        model.eval()
        found = evaluate(model, device, autocast, lambda epochs: epochs and (now or due(epochs)))
        model.train()
        score = next(iter(found.values())) if found and not pretraining else -math.inf
        if score > best:
            if RANK == 0:
                try:
                    save(dict(model=model.state_dict(), config=dict(plain(cfg), method=method), step=step, figures=found,
                              classes=[str(c) for c in getattr(source, "classes", [])]), out_dir / "best.pt")
                    best = score  # the other processes save nothing
                except OSError as error:
                    say(f"warning    {error}")
        return found

    def known_unreadable():
        return {name: reason for found in gather(unreadable) for name, reason in sorted(found.items())}

    def checkpoint():
        """Save, encoder.pt first: where last.pt says that a step is done, all of it is there. -> whether it worked"""
        nonlocal keep_previous
        known = known_unreadable()
        if RANK:
            return True
        try:
            os.fsync(log.file.fileno())
            if has_encoder:
                sizes = {k: getattr(cfg, k) for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
                save(dict(model=getattr(model, "exported", model.encoder).state_dict(), config=dict(
                    sizes, method=method, mean=list(MEAN), std=list(STD))), out_dir / "encoder.pt")
            save(dict(step=step, best=best, config=dict(plain(cfg), method=method, num_images=len(source)), unreadable=known,
                      model=model.state_dict(), optimizer=optimizer.state_dict()), last, keep_previous)
            keep_previous = True
        except OSError as error:
            say(f"warning    {error}")
            return False
        return True

    def pictures():
        if RANK == 0:
            panels = None
            if hasattr(model, "preview"):
                imgs, drawn, *_ = collate([samples[0, i] for i in range(min(6, len(source)))])
                model.eval()
                with autocast:
                    panels = model.preview(normalise(imgs, device), to_device(drawn, device))
                model.train()
            try:
                if panels:
                    save_preview(panels, out_dir / "preview.png")
                if log.lines:
                    save_curves(log.lines, out_dir / "curves.png")
            except OSError as error:
                say(f"warning    cannot save pictures in {out_dir.absolute()}: {error.strerror}")

    if evaluate and pretraining and not resumed:
        report(measure(True))
    bar = tqdm(total=stop * cfg.batch_size, initial=step * cfg.batch_size, unit=" images", unit_scale=True,
               disable=RANK != 0 or not sys.stderr.isatty())
    last_time, last_step, waited = time.perf_counter(), step, 0.0
    while step < stop:
        lr = schedule(step, steps_per_epoch, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        totals, all_keys = {}, []
        for i in range(accumulate):
            start = time.perf_counter()
            try:
                imgs, drawn, keys, bad = next(loader)
            except Unreadable as error:
                fail(str(error).strip().splitlines()[-1], alone=True)
            except (RuntimeError, OSError, EOFError) as error:
                fail(f"a data worker died ({' '.join(str(error).split())}); if memory ran out, lower --num_workers", 1, True)
            waited += time.perf_counter() - start
            all_keys += keys
            for name, reason in bad:
                if unreadable.setdefault(name, reason) is reason:
                    complain_of(name, reason)
            torch.manual_seed(hash((cfg.seed, step, RANK, i)))
            # no_sync must hold around forward and backward: DDP decides in the forward whether to reduce gradients.
            quiet = ddp.no_sync() if ddp is not model and i < accumulate - 1 else contextlib.nullcontext()
            try:
                with quiet:
                    with autocast:
                        loss, metrics = ddp(normalise(imgs, device), to_device(drawn, device))
                    (loss / accumulate).backward()
            except torch.OutOfMemoryError:
                fail(f"out of GPU memory with {micro} images per process at a time; use --micro_batch {max(1, micro // 2)}",
                     1, alone=True)
            for name, value in dict(loss=loss.detach(), **metrics).items():
                totals[name] = totals.get(name, 0) + value / accumulate
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if cfg.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.clip_grad, norm)

        # The one wait for the device per step: gradients are finite everywhere, or nobody takes the step.
        flags = torch.stack((~norm.isfinite(), torch.full((), bool(stopping), device=device))).float()
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        broken, stop_now = flags.tolist()
        if broken:
            terms = {k: round(v.item(), 4) for k, v in totals.items() if not k.startswith("beta")}
            files = [source.name(index) for _, index in all_keys[:3]]
            found = [(f"rank {rank}: {terms}", files) for rank, (terms, files) in enumerate(gather((terms, files)))
                     if not math.isfinite(sum(terms.values()))]
            where, files = found[0] if found else (f"gradient norm {norm.item()}, terms {terms}", files)
            if RANK == 0:
                fail(f"loss or gradient not finite at step {step + 1}, lr {lr:.3g}, {where}, images {', '.join(files)}, ...; "
                     f"{last} is untouched; go on from it with --clip_grad 3 or --precision fp32, or start anew with a "
                     f"lower --{rate_flag(cfg)}", 1)
            sys.exit(1)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if hasattr(model, "after_step"):
            model.after_step(step / total)
        with contextlib.suppress(OSError):
            bar.update(cfg.batch_size)

        end, line = step == stop, {}
        if end or step % cfg.log_every == 0 or due(getattr(cfg, "eval_every", 0)):
            values = torch.stack([*totals.values(), norm])
            if dist.is_initialized():
                dist.all_reduce(values)
            all_bad = list(known_unreadable().items())
            now = time.perf_counter()
            line = dict(zip([*totals, "grad_norm"], (values / WORLD).tolist()), lr=lr, unreadable=len(all_bad),
                        images_per_s=(step - last_step) * cfg.batch_size / (now - last_time),
                        data_wait=waited / (now - last_time))
            last_time, last_step, waited = now, step, 0.0
            if len(all_bad) > cfg.max_bad * len(source):
                fail(f"{len(all_bad)} of {len(source)} images are unreadable, more than --max_bad {cfg.max_bad:g}: "
                     + "; ".join(f"{name} ({reason})" for name, reason in all_bad[:5]))
        pause = time.perf_counter()
        if evaluate and (end or not stop_now):
            line |= measure(end)
        if line:
            report(line)
        if "loss" in line and hasattr(model, "warning") and (text := model.warning(line)):
            say(f"warning    {text}")
        if end or due(cfg.preview_every) and not stop_now:
            pictures()
        if end or stop_now or due(cfg.save_every):
            saved = checkpoint()
        last_time += time.perf_counter() - pause
        if (end or stop_now) and not gather(saved)[0]:  # also makes all wait until the first process has written
            sys.exit(1)
        if stop_now and not end:
            say(f"stopped    by a signal after step {step}; the same command goes on from there")
            sys.exit(128 + (stopping or [signal.SIGTERM])[0])
    with contextlib.suppress(OSError):
        bar.close()
    say(f"done       {out_dir.absolute() / ('encoder.pt' if has_encoder else 'best.pt')}")
    leave()
