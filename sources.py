"""Where images come from: folders, torchvision's data sets by name, and generated shapes."""
import inspect
import os
import sys
from pathlib import Path

import torchvision
from filelock import FileLock  # torch needs it, too
from PIL import Image

from shapes import Shapes


def open_data(cfg, split):
    """Data set for `split`, "train" or "val": [i] -> PIL image, label. A folder without labels has `classes` [""]."""
    path, make = Path(cfg.data), getattr(torchvision.datasets, cfg.data, None)
    if cfg.data == "shapes":
        return Shapes(split, cfg.img_size)
    if path.is_dir():
        try:
            return Folder(path / split if split == "val" or (path / split).is_dir() else path)
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
        super().__init__(str(root), loader=Image.open, is_valid_file=lambda path: "/." not in path[len(str(root)):]
                         and torchvision.datasets.folder.is_image_file(path))

    def find_classes(self, root):
        classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")) or [""]
        return classes, {name: i for i, name in enumerate(classes)}
