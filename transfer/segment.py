"""
Semantic segmentation: UperNet on a plain ViT, as BEiT, MAE, DeepMIM and BootMAE measure their encoders on ADE20K.

The model, `UperNet`. D width, C head channels, K classes, (h, w) grid of patches:
    taps = outputs of blocks 4, 6, 8, 12 of 12, without [CLS] and without the final norm              # 4 x (B, D, h, w)
    maps = taps at 4, 2, 1 and 1/2 times their resolution                                             # strides 4 8 16 32
    top  = conv(maps[3] and its averages over 1, 2, 3 and 6 squared cells)                            # pyramid pooling
    each finer level = lateral 1x1 of its map + the coarser level, resized                            # FPN
    logits = 1x1(dropout(conv(all four levels at the finest)))                                        # (B, K, 4h, 4w)
    aux    = a small convolutional head on the third tap, in training only
    loss = CE(logits, labels) + 0.4 * CE(aux, labels), both resized to the crop

Data: `--data FOLDER` in ADE20K's layout, images/{training,validation}/*.jpg and annotations/{training,validation}/*.png of
the same name, where 0 and 255 are unlabelled and 1..K the classes; or `shapes`, generated, whose first class is the ground.
Label 255 below is "unlabelled": it trains nothing and counts in no figure.

What is easily done otherwise, and is done here as in the published runs:
  - cross-entropy is divided by all pixels, unlabelled and padded ones too, as mmseg does (else: `--loss_mean labelled`)
  - position table, [CLS] and relative position bias are weight-decayed; only vectors are not
  - the warm-up multiplies a rate that is falling already; the rate falls linearly to 0 over all iterations
  - brightness is shifted by up to 32, not scaled; channels are not permuted
  - evaluation adds logits of overlapping windows, and compares at the size of the label file, which is never resized
  - mIoU sums intersections and unions over the whole set; a class that is neither labelled nor predicted is left out
DeepMIM and BootMAE add a relative position bias, zero at first, and a layer scale of 1 (`--rel_pos_bias`); DDAE and SdAE do
not say. With one process, or on CPU, batch statistics are those of a micro-batch; on several GPUs, of those of one micro-step.

Run:
    python -m transfer.segment --recipe quick --init out/quick/encoder.pt          # generated images, 2 CPU cores
    torchrun --nproc_per_node=8 -m transfer.segment --recipe ddae --data ADE --init out/ddae/encoder.pt --out_dir out/ade
    python -m transfer.segment --eval --data ADE --init out/ade/best.pt
    python -m transfer.segment --predict photo.jpg --init out/ade/best.pt          # photo_segmented.png, beside best.pt
"""
import colorsys
import dataclasses
import functools
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

import common
from ddae import Block, ViT, init_weights, patchify

IGNORE = 255  # the label of pixels without one


@dataclass(frozen=True)
class Config(common.RunConfig):
    data: str = "shapes"  # [ours] folder in ADE20K's layout, or shapes
    init: str = ""  # [ours] encoder.pt, a ViT of MAE or timm, or best.pt of this file; sizes are taken from it
    out_dir: str = "out/segment"  # [ours] checkpoints, log, pictures; a run found there is continued; else --init's folder
    eval: bool = False  # [ours] no training: figures of --init, or of out_dir's best.pt
    predict: str = ""  # [ours] no training: segment this picture with --init, or out_dir's best.pt
    img_size: int = 512  # [AAAI, SdAE, DeepMIM] side of the square crop, and of the windows in evaluation
    patch_size: int = 0  # [MAE] 0: as in --init, else 16
    embed_dim: int = 0  # [MAE] 0: as in --init, else 768
    depth: int = 0  # [MAE] 0: as in --init, else 12
    num_heads: int = 0  # [MAE] 0: as in --init, else 12
    rel_pos_bias: bool = False  # [code: DeepMIM, BootMAE] relative position bias, zero at first, and layer scale
    drop_path: float = 0.1  # [DeepMIM] largest share of samples that skip a branch of the last block
    channels: int = 768  # [code: DeepMIM, BootMAE] width of the head
    aux_weight: float = 0.4  # [code: DeepMIM, BootMAE] weight of the auxiliary head; 0: none
    num_classes: int = 0  # [ours] 0: as many as classes.json or objectInfo150.txt of --data names, else 150
    loss_mean: Literal["all", "labelled"] = "all"  # [code: mmseg] pixels that the cross-entropy is divided by
    scale: tuple[float, ...] = (0.5, 2.0)  # [code: DeepMIM, BootMAE] range of random sizes; 1: shorter side is img_size
    distort: bool = True  # [code: DeepMIM, BootMAE] random brightness, contrast, saturation and hue
    iterations: int = 160000  # [AAAI] optimiser steps
    warmup: int = 1500  # [AAAI] of them warm-up
    batch_size: int = 16  # [AAAI, SdAE, DeepMIM] images per optimiser step, over all processes
    lr: float = 4e-4  # [AAAI, SdAE] learning rate of the heads, as it is: no factor for the batch
    layer_decay: float = 0.65  # [AAAI, SdAE, DeepMIM] factor from each layer to the one below
    weight_decay: float = 0.05  # [AAAI, DeepMIM] not on vectors
    adam_betas: tuple[float, ...] = (0.9, 0.999)  # [code: DeepMIM, BootMAE] AdamW's two moments
    inference: Literal["slide", "whole"] = "slide"  # [code: DeepMIM, BootMAE] windows of img_size, or the image at once
    eval_every: float = 12.7  # [code: DeepMIM] epochs between evaluations; this is 16k steps on ADE20K
    eval_images: int = 0  # [ours] how many images of the validation set to take; 0: all
    epochs, warmup_epochs, min_lr = 1, 0.0, 0.0  # no flags: `main` counts the epochs that the iterations make up

    def __post_init__(self):
        check = common.check
        common.above(0, self, "img_size channels iterations batch_size lr layer_decay eval_every")
        super().__post_init__()
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "aux_weight", "num_classes", "warmup", "eval_images"):
            check(getattr(self, name) >= 0, f"--{name} must not be negative, got {getattr(self, name)}")
        check(self.warmup < self.iterations, f"--warmup {self.warmup} must be below --iterations {self.iterations}")
        check(0 <= self.drop_path < 1, f"--drop_path must be in [0, 1), got {self.drop_path}")
        check(self.layer_decay <= 1, f"--layer_decay must be at most 1, got {self.layer_decay}")
        check(self.num_classes < IGNORE, f"--num_classes {self.num_classes}: 8-bit labels allow for 254")
        check(len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1], f"--scale takes low and high, got {self.scale}")
        check(len(self.adam_betas) == 2 and all(0 <= b < 1 for b in self.adam_betas),
              f"--adam_betas takes 2 values in [0, 1), got {self.adam_betas}")
        p, D, heads = self.patch_size, self.embed_dim, self.num_heads
        check(not p or self.img_size % p == 0 and self.img_size > p, f"--img_size {self.img_size} is not a whole number "
              f"of patches of {p} pixels, two at least; use {max(2, self.img_size // (p or 1)) * p}")
        check(not D or D % 4 == 0 and D % (heads or 1) == 0,
              f"--embed_dim {D} must be divisible by 4 and by --num_heads {heads}")


RECIPES = {
    "ddae": dict(),
    "sdae": dict(),  # the same figures; weight decay and drop path are CAE's, whose setting it names
    "deepmim": dict(lr=1e-4, rel_pos_bias=True),  # targets other than CLIP
    "deepmim_clip": dict(lr=5e-5, layer_decay=0.9, rel_pos_bias=True),
    "bootmae": dict(clip_grad=3.0, rel_pos_bias=True),  # its pixels were scaled to [-1, 1], here as everywhere
    "quick": dict(img_size=64, patch_size=4, embed_dim=96, depth=4, num_heads=3, channels=32, drop_path=0.0,
                  scale=(0.75, 1.5), iterations=240, warmup=20, lr=2e-3, layer_decay=0.9, eval_images=200, eval_every=0.128,
                  preview_every=0, out_dir="out/quick_segment"),
}


# --- data -------------------------------------------------------------------------------------------------------------

class Ade:
    """ADE20K's folder layout, of any number of classes: `image(i)` RGB, `label(i)` uint8 (H, W) with 255 unlabelled."""

    def __init__(self, root, split, num_classes):
        part = {"train": "training", "val": "validation"}[split]
        self.images, self.annotations = root / "images" / part, root / "annotations" / part
        for folder in (self.images, self.annotations):
            if not folder.is_dir():
                common.fail(f"--data {folder.absolute()} is missing; {root} must hold images/{part}, annotations/{part}")
        endings = torchvision.datasets.folder.IMG_EXTENSIONS
        files = sorted(p.name for p in self.images.iterdir()
                       if p.suffix.lower() in endings and not p.name.startswith("."))
        if not files:
            common.fail(f"--data {self.images.absolute()} holds no images; expected files ending in {' '.join(endings)}")
        self.files = np.array(files)  # one array: a list would be copied into every worker, reference by reference
        self.classes = self.names(root, num_classes)
        there = {p.name for p in self.annotations.iterdir()}
        missing = [f for f in files if f"{Path(f).stem}.png" not in there]
        if missing:
            common.fail(f"--data {self.annotations.absolute()} lacks the labels of {len(missing)} of {len(files)} images, "
                        f"e.g. {Path(missing[0]).stem}.png of {missing[0]}")
        for i in np.linspace(0, len(files) - 1, min(len(files), 200)).astype(int):  # a wrong set shows before training
            try:
                self.label(i)
            except (ValueError, OSError) as error:
                common.fail(f"--data {error}")

    @staticmethod
    def names(root, num_classes):
        """Class names: from classes.json (list of {"name": ...}) or ADE20K's objectInfo150.txt, else numbers from 1."""
        found = []
        if (root / "classes.json").exists():
            try:
                found = [str(c["name"]) for c in json.loads((root / "classes.json").read_text())]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"--data {root / 'classes.json'} is no list of {{\"name\": ...}}: {error}") from None
        elif (root / "objectInfo150.txt").exists():
            lines = (root / "objectInfo150.txt").read_text().splitlines()[1:]
            found = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
        n = num_classes or len(found) or 150
        return (found + [f"class {i + 1}" for i in range(len(found), n)])[:n]

    def __len__(self):
        return len(self.files)

    def name(self, i):
        return str(self.images / self.files[i])

    def image(self, i):
        return common.to_rgb(Image.open(self.name(i)))

    def label(self, i):
        """0 and 255 of the file -> 255, k -> k - 1. Raises ValueError naming a file that does not fit."""
        path, K = self.annotations / f"{Path(self.files[i]).stem}.png", len(self.classes)
        with Image.open(path) as label, Image.open(self.name(i)) as image:
            common.check(label.mode in ("L", "P"), f"{path} is of PIL mode {label.mode}, no map of 8-bit class numbers")
            common.check(label.size == image.size, f"{path} is {label.size[0]} x {label.size[1]} pixels, its image "
                         f"{image.size[0]} x {image.size[1]}; make them the same")
            raw = np.array(label)
        highest = raw[raw < 255].max(initial=0)
        common.check(highest <= K, f"{path} has a label {highest}, above the {K} classes; labels are 0 for none, then 1 to "
                     f"{K}: correct it, or give --num_classes")
        return np.where(raw == 255, np.uint8(IGNORE), raw - np.uint8(1))  # 0 - 1 wraps to 255

    def pair(self, i):
        return self.image(i), self.label(i)


class LabelledShapes:
    """Generated pictures; the ground is a class of its own, so every pixel has a label."""
    classes = ("ground", *common.Shapes.classes)

    def __init__(self, split, size):
        self.shapes = common.Shapes(split, size)

    def __len__(self):
        return len(self.shapes)

    def name(self, i):
        return self.shapes.name(i)

    def pair(self, i):
        item = self.shapes.item(i)
        return Image.fromarray(item["image"]), item["mask"]


def open_pairs(cfg, split):
    """The images and labels of --data for `split`, "train" or "val": an object with len, pair(i), name(i), classes."""
    if cfg.data == "shapes":
        return LabelledShapes(split, cfg.img_size)
    if not Path(cfg.data).is_dir():
        common.fail(f"--data {Path(cfg.data).absolute()} is not a folder; give one in ADE20K's layout, or shapes")
    return Ade(Path(cfg.data), split, cfg.num_classes)


def rescale(imgs, size, low, high):
    """Image and label, (..., H, W) each, resized so that the shorter side is `low`, but the longer at most `high`.

    Bilinear without antialiasing for the image and nearest for the label, as OpenCV does in the published runs.
    """
    H, W = size
    factor = min(high / max(H, W), low / min(H, W))
    new = [max(1, int(H * factor + 0.5)), max(1, int(W * factor + 0.5))]
    modes = (InterpolationMode.BILINEAR, InterpolationMode.NEAREST)
    return [v2.functional.resize(x, new, interpolation=mode, antialias=False) for x, mode in zip(imgs, modes)]


def distort(img, rng):
    """Photometric distortion of an RGB image uint8 (3, H, W), in mmseg's order; each step is left out half the time."""
    def linear(x, factor=1.0, shift=0.0):
        return (x.float() * factor + shift).clamp(0, 255).to(torch.uint8)

    if rng.random() < 0.5:
        img = linear(img, shift=rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    if contrast_first and rng.random() < 0.5:
        img = linear(img, rng.uniform(0.5, 1.5))
    if rng.random() < 0.5:  # saturation of HSV: distances to the largest channel grow, until the smallest is 0
        x, factor = img.float(), rng.uniform(0.5, 1.5)
        top, bottom = x.amax(0), x.amin(0)
        img = linear(top - (top - x) * (top / (top - bottom).clamp(min=1e-6)).clamp(max=factor))
    if rng.random() < 0.5:
        img = v2.functional.adjust_hue(img, int(rng.integers(-18, 18)) / 180)
    if not contrast_first and rng.random() < 0.5:
        img = linear(img, rng.uniform(0.5, 1.5))
    return img


class Crops(common.Samples):
    """The training pipeline by key (epoch, index) -> crop uint8 (3, S, S), label uint8 (S, S), key, unreadable files."""

    def __init__(self, source, cfg):
        self.source, self.seed, self.cfg = source, cfg.seed, cfg

    def draw(self, rng):
        """All that is random about a sample comes from its own generator."""
        return rng

    def sample(self, index, rng):
        S, pair = self.cfg.img_size, self.source.pair(index)
        img, label = v2.functional.pil_to_tensor(pair[0]), torch.from_numpy(pair[1])[None]  # (3, H, W), (1, H, W)
        ratio = rng.uniform(*self.cfg.scale)
        img, label = rescale((img, label), img.shape[1:], int(S * ratio), int(4 * S * ratio))
        H, W = label.shape[1:]
        for _ in range(11):  # a first draw and ten more; the last is taken as it is
            top, left = rng.integers(max(H - S, 0) + 1), rng.integers(max(W - S, 0) + 1)
            part = label[:, top:top + S, left:left + S]
            counts = part.flatten().bincount(minlength=IGNORE + 1)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
                break
        img, label = img[:, top:top + S, left:left + S], part
        if rng.random() < 0.5:
            img, label = img.flip(-1), label.flip(-1)
        if self.cfg.distort:
            img = distort(img, rng)
        # Published: zeros after normalisation, that is ImageNet's mean; in uint8 it is off by at most half a step.
        canvas = torch.tensor([round(255 * m) for m in common.MEAN], dtype=torch.uint8).view(3, 1, 1).repeat(1, S, S)
        target = np.full((S, S), IGNORE, np.uint8)
        canvas[:, :img.shape[1], :img.shape[2]] = img
        target[:img.shape[1], :img.shape[2]] = label[0].numpy()
        return canvas, target


# --- model ------------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=4)
def relative_index(grid, device):
    """Row of the bias table for every two patches of a (h, w) grid -> (N, N); tables lie row by row, (2h-1) x (2w-1)."""
    h, w = grid
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    return ((y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1).to(device)


class BiasedBlock(Block):
    """Block with a relative position bias and layer scale, which begin as 0 and 1 and so leave the function as it was."""

    def __init__(self, dim, num_heads, drop_path, side):
        super().__init__(dim, num_heads, drop_path)
        self.side, self.num_heads = side, num_heads
        self.rel_pos = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, num_heads))  # the 3: [CLS] to patch, back, itself
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def bias(self, grid):
        """What is added to the attention logits -> (heads, 1 + N, 1 + N); bicubic where the grid is another one."""
        h, w = grid
        table = self.rel_pos[:-3].T.unflatten(1, (2 * self.side - 1,) * 2).unsqueeze(0)  # (1, heads, 2n-1, 2n-1)
        if (h, w) != (self.side, self.side):
            table = F.interpolate(table, (2 * h - 1, 2 * w - 1), mode="bicubic", align_corners=False)
        patches = table[0].flatten(1)[:, relative_index((h, w), table.device)]  # (heads, N, N)
        from_cls, to_cls, itself = self.rel_pos[-3:, :, None, None]  # (heads, 1, 1) each
        top = torch.cat((itself, from_cls.expand(-1, -1, h * w)), 2)
        return torch.cat((top, torch.cat((to_cls.expand(-1, h * w, -1), patches), 2)), 1)

    def forward(self, x, grid):  # (B, T, D)
        B, T, D = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(grid).to(q.dtype))  # (B, heads, T, D/heads)
        x = x + self.drop(self.gamma_1 * self.attn.proj(attended.transpose(1, 2).reshape(B, T, D)))
        return x + self.drop(self.gamma_2 * self.mlp(self.norm2(x)))


class Backbone(ViT):
    """The shared ViT for images of any size: four taps as maps, a position table that is trained and resized."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, drop_path=0.0, rel_pos_bias=False):
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, drop_path)
        self.rel_pos_bias, self.taps = rel_pos_bias, [max(1, round(depth * tap / 12)) for tap in (4, 6, 8, 12)]
        self.pos_embed.requires_grad_(True)
        del self.norm  # the taps do not pass it
        if rel_pos_bias:
            blocks = (BiasedBlock(embed_dim, num_heads, b.drop_path, self.grid[0]) for b in self.blocks)
            self.blocks = nn.ModuleList(blocks).apply(init_weights)

    def forward(self, imgs):
        """imgs (B, 3, H, W), H and W multiples of the patch -> four maps (B, D, h, w)."""
        grid, p = (imgs.shape[2] // self.patch_size, imgs.shape[3] // self.patch_size), self.patch_size
        x = torch.cat((self.cls_token.expand(len(imgs), -1, -1), self.patch_embed(patchify(imgs, p))), 1)  # (B, 1 + N, D)
        x = x + common.resize_pos_embed(self.pos_embed, grid)
        outputs = []
        for block in self.blocks:
            x = block(x, grid) if self.rel_pos_bias else block(x)
            outputs.append(x)
        return [outputs[tap - 1][:, 1:].transpose(1, 2).unflatten(2, grid) for tap in self.taps]


def conv(inputs, outputs, size):
    """Convolution, batch norm, ReLU; initialised as mmcv's."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def classifier(inputs, num_classes):
    """Dropout of whole channels, then one logit per class."""
    layer = nn.Conv2d(inputs, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(0.1), layer)


def resize(x, size):
    """Bilinear (B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """Backbone, four scales, head and auxiliary head; arguments as in `Config`."""

    def __init__(self, img_size=512, patch_size=16, embed_dim=768, depth=12, num_heads=12, drop_path=0.1,
                 rel_pos_bias=False, channels=768, aux_weight=0.4, num_classes=150, loss_mean="all"):
        super().__init__()
        self.aux_weight, self.loss_mean = aux_weight, loss_mean
        self.backbone = Backbone(img_size, patch_size, embed_dim, depth, num_heads, drop_path, rel_pos_bias)
        D, C = embed_dim, channels
        self.scales = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(D, D, 2, 2), nn.BatchNorm2d(D), nn.GELU(), nn.ConvTranspose2d(D, D, 2, 2)),
            nn.ConvTranspose2d(D, D, 2, 2), nn.Identity(), nn.MaxPool2d(2)])
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(D, C, 1)) for n in (1, 2, 3, 6))
        self.bottleneck = conv(D + 4 * C, C, 3)
        self.laterals = nn.ModuleList(conv(D, C, 1) for _ in range(3))
        self.fpn = nn.ModuleList(conv(C, C, 3) for _ in range(3))
        self.fuse = conv(4 * C, C, 3)
        self.classify = classifier(C, num_classes)
        if aux_weight:
            self.aux = nn.Sequential(conv(D, min(256, C), 3), *classifier(min(256, C), num_classes))

    def head(self, taps):
        """Four maps (B, D, h, w) of one size -> logits (B, K, 4h, 4w)."""
        maps = [scale(tap) for scale, tap in zip(self.scales, taps)]
        pooled = [resize(pool(maps[3]), maps[3].shape[2:]) for pool in self.pools]
        x = self.bottleneck(torch.cat((maps[3], *pooled), 1))  # (B, C, h/2, w/2)
        levels = [x]
        for i in (2, 1, 0):
            x = self.laterals[i](maps[i]) + resize(x, maps[i].shape[2:])  # top-down
            levels.append(self.fpn[i](x))
        levels = [resize(level, maps[0].shape[2:]) for level in reversed(levels)]  # 4 x (B, C, 4h, 4w)
        return self.classify(self.fuse(torch.cat(levels, 1)))

    def logits(self, imgs):
        """imgs (B, 3, H, W), H and W multiples of the patch -> (B, K, H, W)."""
        return resize(self.head(self.backbone(imgs)).float(), imgs.shape[2:])

    def cross_entropy(self, logits, labels):
        """logits (B, K, h, w), labels (B, H, W) with 255 unlabelled -> ()."""
        total = F.cross_entropy(resize(logits.float(), labels.shape[1:]), labels, ignore_index=IGNORE, reduction="sum")
        counted = labels.numel() if self.loss_mean == "all" else (labels != IGNORE).sum().clamp(min=1)
        return total / counted

    def forward(self, imgs, labels):
        """imgs (B, 3, H, W), labels uint8 (B, H, W) -> loss (), metrics: name -> tensor ()."""
        taps, labels = self.backbone(imgs), labels.long()
        logits = self.head(taps)
        loss = main = self.cross_entropy(logits, labels)
        metrics = {"ce/main": main}
        if self.aux_weight:
            metrics["ce/aux"] = self.cross_entropy(self.aux(taps[2]), labels)
            loss = main + self.aux_weight * metrics["ce/aux"]
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def preview(self, imgs, labels):
        """Panels for preview.png: crops, their labels and what the model says; black is unlabelled."""
        logits = self.logits(imgs)
        colours = torch.from_numpy(palette(logits.shape[1])).to(imgs.device)  # (256, 3)
        paint = [common.normalise(colours[x.long()].permute(0, 3, 1, 2), imgs.device) for x in (labels, logits.argmax(1))]
        return {"crop": imgs, "label": paint[0], "prediction": paint[1]}


def palette(num_classes):
    """A colour per class, neighbours far apart, and black for 255 -> uint8 (256, 3)."""
    colours = np.zeros((256, 3))
    for i in range(num_classes):
        colours[i] = colorsys.hsv_to_rgb((0.6 + 0.618 * i) % 1, (0.4, 0.8, 1.0)[i % 3], (0.8, 1.0, 0.65)[i % 3])
    return (255 * colours).round().astype(np.uint8)


# --- optimiser and schedule -------------------------------------------------------------------------------------------

def make_optimizer(model, cfg):
    """AdamW with a rate per layer; unlike elsewhere the tables and [CLS] are decayed, as in all published runs."""
    groups = common.layer_groups(model, "backbone.", cfg.depth, cfg.layer_decay, cfg.weight_decay, skip=())
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.adam_betas, fused=True)


def learning_rate(step, steps_per_epoch, cfg):
    """Linear decay to 0 over all iterations, times a linear warm-up from 1e-6 of it."""
    regular = cfg.lr * (1 - step / cfg.iterations)
    return regular * (1 - (1 - step / cfg.warmup) * (1 - 1e-6)) if step < cfg.warmup else regular


# --- evaluation -------------------------------------------------------------------------------------------------------

def starts(size, crop, stride):
    """Where the windows along a side begin: every `stride`, the last moved back so that it ends with the image."""
    n = max(0, math.ceil((size - crop) / stride)) + 1
    return [min(i * stride, max(0, size - crop)) for i in range(n)]


def slide(net, img, crop, stride):
    """Mean logits of overlapping windows, all of one size: net (n, 3, S, S) -> (n, K, S, S); img (3, H, W) -> (K, H, W)."""
    H, W = img.shape[1:]
    img = F.pad(img, (0, max(0, crop - W), 0, max(0, crop - H)))  # a smaller image: mean colour right and below
    total = count = 0
    for y, x in itertools.product(*(starts(size, crop, stride) for size in img.shape[1:])):
        around = (x, img.shape[2] - crop - x, y, img.shape[1] - crop - y)
        logits = net(img[None, :, y:y + crop, x:x + crop])[0]
        total = total + F.pad(logits, around)
        count = count + F.pad(torch.ones_like(logits[:1]), around)
    return (total / count)[:, :H, :W]


def whole(net, img, patch_size):
    """Logits of the whole image at once, img (3, H, W) -> (K, H, W); sides are padded to two or more whole patches."""
    H, W = img.shape[1:]
    more = [max(2, math.ceil(size / patch_size)) * patch_size - size for size in (H, W)]
    return net(F.pad(img, (0, more[1], 0, more[0]))[None])[0, :, :H, :W]


@torch.no_grad()
def segment(model, img, cfg, device, autocast):
    """Image uint8 (3, H, W) -> logits (K, h, w), at the size it is resized to: shorter side img_size, at most 4 : 1."""
    S = cfg.img_size
    img, = rescale((img,), img.shape[1:], S, 4 * S)
    img = common.normalise(img[None], device)[0]
    with autocast:
        if cfg.inference == "slide":
            return slide(model.logits, img, S, max(1, S * 2 // 3))
        return whole(model.logits, img, cfg.patch_size)


def confusion_matrix(predicted, label, num_classes):
    """Pixels by label (rows) and prediction (columns), int64 (K, K); unlabelled ones are left out."""
    known = label != IGNORE
    pairs = num_classes * label[known].long() + predicted[known].long()
    return pairs.bincount(minlength=num_classes ** 2).view(num_classes, num_classes)


def class_figures(confusion):
    """Intersection over union and accuracy of each class (K,), in percent; nan where nothing is to be divided by."""
    confusion = confusion.double()
    inside, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    return 100 * inside / (labelled + predicted - inside), 100 * inside / labelled


def evaluation(cfg, source):
    """The `evaluate` that `common.train` calls: mIoU, mAcc and aAcc over `source`; out_dir/per_class.txt has the rest.

    Images that cannot be read, or whose label does not fit, are named and left out; `val_images` counts the others.
    """
    def evaluate(model, device, autocast, due):
        if not due(cfg.eval_every):
            return {}
        if dist.is_initialized():  # on CPU batch statistics differ between processes; the first one's are those saved
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        K, n = len(source.classes), min(cfg.eval_images or len(source), len(source))
        confusion, read = torch.zeros(K, K, dtype=torch.int64), 0
        for i in range(n)[common.RANK::common.WORLD]:
            try:
                img, label = source.pair(i)
            except Exception as error:  # broken files raise nearly anything
                common.complain_of(source.name(i), f"{type(error).__name__}: {error}")
                continue
            read += 1
            logits = segment(model, v2.functional.pil_to_tensor(img), cfg, device, autocast)
            predicted = resize(logits[None], label.shape)[0].argmax(0)  # at the label's size, which is never resized
            confusion += confusion_matrix(predicted.cpu(), torch.from_numpy(label), K)
        confusion, read = sum(common.gather(confusion)), sum(common.gather(read))
        if not confusion.sum():
            common.fail(f"--data {cfg.data}: not one labelled pixel in the {read} validation images that could be read")
        iou, acc = class_figures(confusion)
        if common.RANK == 0:
            path = Path(cfg.out_dir) / "per_class.txt"
            try:
                write_table(path, source.classes, iou, acc, confusion)
            except OSError as error:
                common.say(f"warning    cannot write {path.absolute()}: {error.strerror}")
        return dict(mIoU=iou.nanmean().item(), mAcc=acc.nanmean().item(),
                    aAcc=100 * (confusion.diag().sum() / confusion.sum()).item(), val_images=read)
    return evaluate


def write_table(path, classes, iou, acc, confusion):
    """A line per class: name, IoU, accuracy, pixels labelled and predicted; nan: there are none."""
    rows = zip(classes, iou.tolist(), acc.tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist())
    lines = [f"{'class':<24}{'IoU':>8}{'acc':>8}{'labelled':>14}{'predicted':>14}"]
    lines += [f"{name[:23]:<24}{i:8.2f}{a:8.2f}{labelled:14,}{predicted:14,}" for name, i, a, labelled, predicted in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def overlay(img, predicted, classes, path):
    """Write a picture: image uint8 (3, h, w), and over it the classes (h, w) in colour with the largest ones named."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    colours, (h, w) = palette(len(classes)) / 255, predicted.shape
    picture = img.numpy().transpose(1, 2, 0) / 255
    figure = Figure((10, 5 * h / w + 0.8), layout="constrained")
    for ax, shown in zip(figure.subplots(1, 2), (picture, 0.4 * picture + 0.6 * colours[predicted])):
        ax.imshow(shown)
        ax.set_axis_off()
    share = np.bincount(predicted.ravel(), minlength=len(classes)) / predicted.size
    largest = [k for k in share.argsort()[::-1][:10] if share[k] >= 0.005]
    figure.legend(handles=[Patch(color=colours[k], label=f"{classes[k]} {share[k]:.0%}") for k in largest],
                  loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


# --- the run ----------------------------------------------------------------------------------------------------------

SIZES = ("patch_size", "embed_dim", "depth", "num_heads")
SAVED = (*SIZES, "img_size", "rel_pos_bias", "channels", "aux_weight", "num_classes")


def fit(cfg):
    """Config with the sizes of the file in --init, its weights, and the classes it has learnt if it is one of ours.

    Raises ValueError where the file holds no ViT, or --img_size is no multiple of its patches.
    """
    weights = {}
    if cfg.init:
        weights, (state, config) = common.read_weights(cfg.init), common.header(cfg.init)
        if config.get("method") == "upernet":
            common.check("classes" in state, f"{cfg.init} is to resume from; --init takes best.pt, which lies beside it")
            return dataclasses.replace(cfg, **{k: config[k] for k in SAVED}), weights, state["classes"]
        sizes = common.vit_sizes(weights, cfg.init)
    else:
        sizes = {k: getattr(cfg, k) or size for k, size in zip(SIZES, (16, 768, 12, 12))}
    return dataclasses.replace(cfg, **{k: sizes[k] for k in SIZES}), weights, []


def load_backbone(backbone, weights, path):
    """Load encoder weights; the position table is resized, what the blocks have more may be missing, all else is left out."""
    own = backbone.state_dict()
    new = [k for k in own if k.rpartition(".")[2] in ("rel_pos", "rel_pos_h", "rel_pos_w", "gamma_1", "gamma_2")]
    table = common.resize_pos_embed(weights["pos_embed"], backbone.grid)
    common.load_weights(backbone, weights | {k: own[k] for k in new} | {"pos_embed": table}, path)
    others = [k for k in weights if k not in own]
    common.say(f"init       {len(own) - len(new)} of {len(own)} backbone tensors from {path}"
               f"{f', {len(new)} of positions or layer scale without effect yet' if new else ''}; position table "
               f"{weights['pos_embed'].shape[1] - 1} -> {table.shape[1] - 1} patches; left out {others[:4]}"
               f"{f' and {len(others) - 4} more' if len(others) > 4 else ''}")


def make_model(Model, cfg, weights, classes, source_classes):
    """The model with what --init holds; raises ValueError where that does not fit."""
    if classes:
        common.check(list(source_classes) == list(classes), f"{cfg.init} knows "
                     f"{len(classes)} classes, {', '.join(classes[:3])}, ...; --data {cfg.data} has others")
    torch.manual_seed(cfg.seed)
    model = Model(**common.arguments(Model, cfg))
    if classes:
        common.load_weights(model, weights, cfg.init)
    elif weights:
        load_backbone(model.backbone, weights, cfg.init)
    return model


def settle_places(cfg):
    """Without training, --init is out_dir's best.pt where it is not given, and out_dir is the folder of an --init given."""
    if not (cfg.eval or cfg.predict):
        return cfg
    if not cfg.init:
        return dataclasses.replace(cfg, init=str(Path(cfg.out_dir) / "best.pt"))
    return dataclasses.replace(cfg, out_dir=str(Path(cfg.init).parent)) if cfg.out_dir == type(cfg).out_dir else cfg


def open_picture(path):
    """The picture of --predict, turned as its EXIF says -> uint8 (3, H, W); ends the program where it is none."""
    try:
        return v2.functional.pil_to_tensor(common.to_rgb(ImageOps.exif_transpose(Image.open(path))))
    except Exception as error:  # broken files raise nearly anything
        common.fail(f"--predict {path}: {getattr(error, 'strerror', None) or error}")


def main():
    """Command line -> model -> training, evaluation, or one picture."""
    cfg = settle_places(common.parse(Config, RECIPES, __doc__, flag="recipe"))
    training, asked, out_dir = not (cfg.eval or cfg.predict), cfg.num_classes, Path(cfg.out_dir)
    try:
        cfg, weights, classes = fit(cfg)
        common.check(training or classes, f"--init {cfg.init} is no segmentation model; give a best.pt of this script")
        source = open_pairs(cfg, "train") if training else None
        val_source = None if cfg.predict else open_pairs(cfg, "val")
        if val_source:
            cfg = dataclasses.replace(cfg, num_classes=len(val_source.classes))
            common.check(asked in (0, cfg.num_classes),
                         f"--num_classes {asked}, but --data {cfg.data} has {cfg.num_classes}; leave the flag out")
        model = make_model(UperNet, cfg, weights, classes, val_source.classes if val_source else classes)
    except ValueError as error:
        common.fail(str(error))
    device, autocast = common.setup(cfg)
    if cfg.predict:
        img = open_picture(cfg.predict)
        logits = segment(model.to(device).eval(), img, cfg, device, autocast)
        img, = rescale((img,), img.shape[1:], 640, 1280)  # the size of the picture; one of a camera would fill the memory
        path = out_dir / f"{Path(cfg.predict).stem}_segmented.png"
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            overlay(img, resize(logits[None], img.shape[1:])[0].argmax(0).cpu().numpy(), classes, path)
        except OSError as error:
            common.fail(f"--out_dir {path.absolute()} cannot be written: {error.strerror}")
        common.say(f"done       {path}")
        return
    evaluate = evaluation(cfg, val_source)
    if cfg.eval:
        figures = evaluate(model.to(device).eval(), device, autocast, lambda epochs: True)
        common.say("  ".join(f"{k} {v:.6g}" for k, v in figures.items()) + f"; by class in {out_dir / 'per_class.txt'}")
        common.leave()
        return
    if not cfg.init:
        common.say("warning    no --init: the ViT starts from scratch, which on ADE20K ends at 20 to 30 mIoU")
    synchronised = dist.is_initialized() and device.type == "cuda"  # SyncBatchNorm has no CPU version
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    steps_per_epoch = max(1, len(source) // cfg.batch_size)
    micro = cfg.micro_batch or cfg.batch_size // common.WORLD
    if 0 < micro * (common.WORLD if synchronised else 1) < 2:
        common.fail("batch norm of one value, the average over one image, is undefined; use --micro_batch 2 or more")
    cfg = dataclasses.replace(cfg, max_steps=min(cfg.max_steps or cfg.iterations, cfg.iterations))
    object.__setattr__(cfg, "epochs", math.ceil(cfg.iterations / steps_per_epoch))  # what `train` counts in
    common.train(cfg, model, samples=Crops(source, cfg), optimizer=make_optimizer, schedule=learning_rate,
                 evaluate=evaluate)


if __name__ == "__main__":
    main()
