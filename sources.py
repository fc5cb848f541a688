"""Where images come from: folders, torchvision's data sets by name, generated shapes; how they become batches."""
import copy
import functools
import inspect
import math
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from filelock import FileLock  # torch needs it, too
from PIL import Image
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from shapes import Shapes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
DATA_TIMEOUT = 300  # seconds after which a batch that does not come ends the run


def open_data(cfg, split):
    """Data set for a split, such as "train": [i] -> PIL image, label. A folder without labels has `classes` [""]."""
    path, make = Path(cfg.data), getattr(torchvision.datasets, cfg.data, None)
    if cfg.data == "shapes":
        return kept(Shapes(split, cfg.img_size))
    if path.is_dir():
        names = dict(train=("train", "."), val=("val", "validation", "test")).get(split, [split])
        found = next((path / name for name in names if (path / name).is_dir()), path / names[0])
        try:
            return kept(Folder(found))
        except FileNotFoundError as error:  # no such folder, or no images in it
            sys.exit(f"--data {path.absolute()}, {split}: {error}")
    if not inspect.isclass(make):
        sys.exit(f"--data {path.absolute()} is not a folder, nor {cfg.data} a class in torchvision.datasets")
    flags = inspect.signature(make).parameters
    which = dict(split=split if split == "train" or cfg.data in ("ImageNet", "Imagenette") else "test")
    which = dict(train=split == "train") if "train" in flags else which
    if "download" not in flags:
        return kept(make("data", **which))
    os.makedirs("data", exist_ok=True)
    with FileLock("data/download.lock"):  # one process, of any machine, downloads; the others find the files
        return kept(make("data", **which, download=True))


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


def kept(source, limit=2**31):
    """`source`, or `Kept` of it if images like its first one take at most `limit` bytes."""
    try:
        image = source[0][0]
        fits = 3 * len(source) * image.width * image.height <= limit
    except Exception:  # broken; `Samples` names it
        return source
    return Kept(source, image.size) if fits else source


class Kept:
    """Data set that keeps images of size (W, H) in memory, as RGB, once they are read; forked workers share it."""

    def __init__(self, source, size):
        self.source, self.size, N = source, size, len(source)
        self.images = np.frombuffer(mmap.mmap(-1, 3 * N * math.prod(size)), np.uint8).reshape(N, *size[::-1], 3)
        self.labels = np.frombuffer(mmap.mmap(-1, 8 * N), np.int64)  # label + 1; 0: not read yet

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        if not self.labels[i]:
            image, label = self.source[i]
            if image.size != self.size:
                return image, label
            self.images[i] = to_rgb(image).permute(1, 2, 0)
            self.labels[i] = label + 1
        return Image.fromarray(self.images[i]), int(self.labels[i]) - 1


def name_of(source, index):
    return source.samples[index][0] if hasattr(source, "samples") else f"image {index}"


def to_rgb(image):
    """PIL image -> uint8 (3, H, W). Raises ValueError for 32-bit pixels, whose range is unknown."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))  # Pillow would saturate it to white
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (PIL mode {image.mode}) have no known range; convert them to 8 or 16 bits")
    return v2.functional.pil_to_tensor(image.convert("RGB"))


def planar(image):
    """The same uint8 (3, H, W), contiguous; in tensors made of PIL images, a pixel's channels are neighbors."""
    return torch.from_numpy(np.ascontiguousarray(image.numpy()))  # a third of the time of torch's contiguous()


def draft(image, scale):
    """Let a JPEG be decoded at 1/2, 1/4, or 1/8 of its size, if that is at least `scale` of it; takes less time."""
    image.draft("RGB", [math.ceil(n * scale) for n in image.size])


class Crop(v2.RandomResizedCrop):
    """torchvision's crop of an image, bicubic -> uint8 (3, S, S). Of a PIL image only the crop becomes a tensor.

    The crop of a JPEG that is at least 2 * S pixels high and wide is decoded at reduced scale, hence a little blurred,
    unless the image is `Kept`. All others are bitwise torchvision's.
    """

    def __init__(self, size, scale):
        super().__init__(size, scale, interpolation=InterpolationMode.BICUBIC)

    def transform(self, image, params):
        if isinstance(image, Image.Image):
            (W, H), (top, left, h, w) = image.size, (params[k] for k in ("top", "left", "height", "width"))
            draft(image, self.size[0] / min(h, w))
            fx, fy = image.width / W, image.height / H
            box = round(left * fx), round(top * fy), round((left + w) * fx), round((top + h) * fy)
            image = to_rgb(image.crop(box))
            params = dict(top=0, left=0, height=image.shape[1], width=image.shape[2])
        return planar(super().transform(image, params))


@functools.cache  # copied to the device once: a copy per step would wait for the GPU
def mean_std(device):
    return torch.tensor(MEAN, device=device).view(3, 1, 1), torch.tensor(STD, device=device).view(3, 1, 1)


# --- batches ----------------------------------------------------------------------------------------------------------

def make_loader(dataset, cfg, collate_fn, **options):
    """DataLoader whose workers leave the process group: a signal to all of it spares the data of the running step."""
    def share(items):  # here an error ends the run; in the thread that sends a batch, it would lose it without a word
        return tree_map_only(torch.Tensor, torch.Tensor.share_memory_, collate_fn(items))

    if cfg.num_workers:
        options |= dict(multiprocessing_context="fork", timeout=DATA_TIMEOUT, worker_init_fn=lambda _: os.setpgrp())
    return DataLoader(dataset, collate_fn=share if cfg.num_workers else collate_fn, num_workers=cfg.num_workers,
                      pin_memory=cfg.device != "cpu" and torch.cuda.is_available(), **options)


def resident(samples, device):
    """Move the whole set to the GPU -> function from boxes of `boxes_of` to crops. None if there is no GPU, or if the
    set is not `Kept`, is cropped in another way, or has images that are unreadable or of another size."""
    source, crop = samples.source, getattr(samples.crop, "transforms", ())
    ours = [type(t) for t in crop] == [Crop, v2.RandomHorizontalFlip]
    if device.type != "cuda" or not isinstance(source, Kept) or not ours:
        return None

    def read(ids):  # in a worker, into memory shared with it
        try:
            return all(source[i][0].size == source.size for i in ids)
        except Exception:  # broken; `Samples` names it
            return False

    if not all(make_loader(range(len(source)), samples.cfg, read, batch_size=100)):
        return None
    images = torch.from_numpy(source.images).to(device).permute(0, 3, 1, 2)  # (N, 3, H, W)
    return functools.partial(cut, images, size=crop[0].size[0])


def feed(samples, crop, device, keys):
    """Iterator over the batches of `samples`, as collated, one per list of keys; crop: what `resident` has returned.

    With a set on the GPU, crops are cut there, and the workers only draw boxes and masks: by its FLOPs, a ViT-tiny
    takes more crops than they could make.
    """
    drawn = boxes_of(samples) if crop else samples
    loader = iter(make_loader(drawn, samples.cfg, samples.collate, batch_sampler=keys))  # workers start here
    return ahead(loader, device, crop) if device.type == "cuda" else loader


def ahead(loader, device, crop):
    """Yield the loader's batches on the GPU. Each is copied there, and cropped, while the one before it computes."""
    stream, previous = torch.cuda.Stream(device), None
    for batch in loader:
        stream.wait_stream(torch.cuda.current_stream(device))  # memory of old batches is reused after their work only
        with torch.cuda.stream(stream):
            imgs, *rest = tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), batch)
            if crop:  # in parts, as it takes ten times the memory of the whole images
                imgs = torch.cat([crop(part) for part in imgs.split(256)])
        if previous:
            yield previous
        torch.cuda.current_stream(device).wait_stream(stream)
        previous = imgs, *rest
    if previous:
        yield previous


def boxes_of(samples):
    """The same samples, with what crop and flip draw in place of crops: (index, top, left, height, width, flip)."""
    (crop, flip), blank = samples.crop.transforms, Image.new("L", samples.source.size)

    def read(index):
        box = crop.make_params([blank])
        box = *(box[k] for k in ("top", "left", "height", "width")), int(torch.rand(1) < flip.p)
        return torch.tensor((index, *box)), None  # no label

    drawn = copy.copy(samples)
    drawn.read = read
    return drawn


def cut(images, boxes, size):
    """The crops of `Samples`, up to rounding: images uint8 (N, 3, H, W), boxes (B, 6) -> uint8 (B, 3, S, S)."""
    index, top, left, height, width, flip = boxes.T
    x = images[index].float()  # (B, 3, H, W)
    for start, length in ((left, width), (top, height)):  # columns, then rows, each rounded, as in Pillow
        x = torch.einsum("bchw,bsw->bcsh", x, bicubic(start, length, x.shape[-1], size)).round_().clamp_(0, 255)
    return torch.where(flip.bool().view(-1, 1, 1, 1), x.flip(-1), x).byte()


def bicubic(start, length, n, size):
    """Weights of n pixels in the antialiased resize of pixels start to start + length - 1 (B,) -> (B, size, n)."""
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    pixel = torch.arange(n, device=start.device) - start  # (B, 1, n), from the left end of the crop
    center = (torch.arange(size, device=start.device).view(-1, 1) + 0.5) * length / size  # (B, size, 1)
    t = ((pixel + 0.5 - center) / (length / size).clamp(min=1)).abs()
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2  # Keys' kernel with a = -0.5
    weight = torch.where(t < 1, near, far * (t < 2)) * ((pixel >= 0) & (pixel < length))
    return weight / weight.sum(-1, keepdim=True)
