"""Where images come from: folders, torchvision's data sets by name, and generated shapes."""
import inspect
import os
import sys
from pathlib import Path

import numpy as np
import torchvision
from filelock import FileLock  # torch needs it, too
from PIL import Image
from torchvision.transforms import v2

from shapes import Shapes


def open_data(cfg, split):
    """Data set for `split`, "train" or "val": [i] -> PIL image, label. A folder without labels has `classes` [""]."""
    path, make = Path(cfg.data), getattr(torchvision.datasets, cfg.data, None)
    if cfg.data == "shapes":
        return Shapes(split, cfg.img_size)
    if path.is_dir():
        names = ("val", "validation", "test") if split == "val" else ("train", ".")
        found = next((path / name for name in names if (path / name).is_dir()), path / "val")
        try:
            return Folder(found)
        except FileNotFoundError as error:  # no such folder, or no images in it
            sys.exit(f"--data {path.absolute()}, {split}: {error}")
    if not inspect.isclass(make):
        sys.exit(f"--data {path.absolute()} is not a folder, nor {cfg.data} a class in torchvision.datasets")
    flags = inspect.signature(make).parameters
    which = dict(split=split if split == "train" or cfg.data in ("ImageNet", "Imagenette") else "test")
    which = dict(train=split == "train") if "train" in flags else which
    if "download" not in flags:
        return make("data", **which)
    os.makedirs("data", exist_ok=True)
    with FileLock("data/download.lock"):  # one process, of any machine, downloads; the others find the files
        return make("data", **which, download=True)


class Folder(torchvision.datasets.ImageFolder):
    """ImageFolder without hidden folders and files; one without any class folder is unlabeled, with `classes` [""]."""

    def __init__(self, root):
        if (root / "val_annotations.txt").exists():
            sys.exit(f"{root} has no class folders, as in Tiny-ImageNet; make them by: cd {root}; while read f c _; do "
                     "mkdir -p $c; mv images/$f $c; done < val_annotations.txt; rmdir images; rm val_annotations.txt")
        super().__init__(str(root), loader=Image.open, is_valid_file=lambda path: "/." not in path[len(str(root)):]
                         and torchvision.datasets.folder.is_image_file(path))

    def find_classes(self, root):
        classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")) or [""]
        return classes, {name: i for i, name in enumerate(classes)}


def name_of(source, index):
    return source.samples[index][0] if hasattr(source, "samples") else f"image {index}"


def to_rgb(image):
    """PIL image -> uint8 (3, H, W). Raises ValueError for 32-bit pixels, whose range is unknown."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))  # Pillow would saturate it to white
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (PIL mode {image.mode}) have no known range; convert them to 8 or 16 bits")
    return v2.functional.pil_to_tensor(image.convert("RGB"))
