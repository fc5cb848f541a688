"""
Semantic segmentation: UperNet on a plain ViT, as BEiT, MAE, DeepMIM, and BootMAE measure their encoders on ADE20K.

One training step, `UperNet.forward`. D width, C head channels, K classes, (h, w) grid of patches:
    taps   = outputs of blocks 4, 6, 8, 12 of 12, without [CLS] and without the final norm          # 4 x (B, D, h, w)
    maps   = taps at 4, 2, 1, and 1/2 times their resolution                                        # strides 4 8 16 32
    top    = conv(maps[3] and its averages over 1, 2, 3, and 6 squared cells)                       # pyramid pooling
    each finer level = lateral 1x1 of its map + the coarser level, resized                          # FPN
    logits = 1x1(dropout(conv(all four levels at the finest)))                                      # (B, K, 4h, 4w)
    loss   = CE(logits, labels) + 0.4 * CE(aux(taps[2]), labels), both resized to the crop

Data: `--data FOLDER` in ADE20K's layout, images/{training,validation}/*.jpg and annotations/{training,validation}/*.png
of the same name, where 0 and 255 are unlabeled and 1..K the classes (others: --labels_from, --ignore_label); or
`shapes`, generated. Label 255 below is unlabeled: ignored in the loss and in all metrics.

Easy to get wrong, and done here as in the published runs:
  - the cross-entropy is divided by all pixels, unlabeled and padded ones too, as in mmseg
  - position table, [CLS], and relative position bias have weight decay; only vectors have none
  - the warm-up multiplies a learning rate that is already falling, linearly to 0 over all iterations
  - brightness is shifted by up to 32, not scaled; channels are not permuted
  - evaluation averages the logits of overlapping windows, and compares at the size of the label file
  - mIoU sums intersections and unions over the whole set, and leaves out classes neither labeled nor predicted
  - batch norm has the statistics of a micro-batch, with several GPUs of all their micro-batches

    python -m transfer.segment --preset quick --init out/quick/encoder.pt         # generated images, 2 CPU cores
    torchrun --nproc_per_node=8 -m transfer.segment --preset ddae --data ADE --init out/ddae/encoder.pt --out_dir out/s
    python -m transfer.segment --eval --data ADE --init out/s/model.pt
    python -m transfer.segment --predict photo.jpg --init out/s/model.pt    # or a folder; out/s/predicted/photo.png
"""
import colorsys
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

import common
import finetune
from ddae import Block, ViT, init_weights, patchify
from evaluate import Attempt, choose, read_each, sync_buffers
from shapes import LabeledShapes
from transfer import SIZES, Pictures, run

IGNORE = 255  # the label of unlabeled pixels


@dataclass(frozen=True)
class Config(common.RunConfig):
    data: str = "shapes"  # [ours] folder in ADE20K's layout, or shapes (generated)
    init: str = ""  # [ours] encoder.pt, a ViT of MAE or timm, or model.pt of this file; sizes are taken from it
    out_dir: str = "out/segment"  # [ours] checkpoints, log, pictures; if not given, --eval and --predict take --init's
    eval: bool = False  # [ours] no training: metrics of --init, by default out_dir's model.pt
    predict: str = ""  # [ours] no training: segment this picture or folder with --init, by default out_dir's model.pt
    img_size: int = 512  # [AAAI, SdAE, DeepMIM] side of the square crop, and of the windows in evaluation
    patch_size: int = 0  # [MAE] 0: as in --init, else 16
    embed_dim: int = 0  # [MAE] 0: as in --init, else 768
    depth: int = 0  # [MAE] 0: as in --init, else 12
    num_heads: int = 0  # [MAE] 0: as in --init, else 12
    rel_pos_bias: bool = True  # [code: BEiT, CAE, BootMAE, DeepMIM, mmseg] relative position bias and layer scale
    train_pos_embed: bool = True  # [code: DeepMIM, BootMAE] train the position table
    drop_path: float = 0.1  # [DeepMIM] largest fraction of samples that skip a branch, in the last block
    channels: int = 768  # [code: DeepMIM, BootMAE] width of the head
    aux_weight: float = 0.4  # [code: DeepMIM, BootMAE] weight of the auxiliary head; 0: none
    num_classes: int = 0  # [ours] 0: as many as classes.json or objectInfo150.txt of --data names
    labels_from: Literal["0", "1"] = "1"  # [ours] the first class in label files; from 1, 0 is unlabeled
    ignore_label: int = 255  # [ours] what is unlabeled in label files
    scale: tuple[float, ...] = (0.5, 2.0)  # [code: DeepMIM, BootMAE] range of random sizes; 1: shorter side is img_size
    distort: bool = True  # [code: DeepMIM, BootMAE] random brightness, contrast, saturation, and hue
    iterations: int = 160000  # [AAAI] optimizer steps
    warmup: int = 1500  # [AAAI] warm-up steps among them
    batch_size: int = 16  # [AAAI, SdAE, DeepMIM] images per optimizer step, over all processes
    lr: float = 4e-4  # [AAAI, SdAE] learning rate of the heads, not scaled by the batch size
    layer_decay: float = 0.65  # [AAAI, SdAE, DeepMIM] factor from each layer to the one below
    weight_decay: float = 0.05  # [AAAI, DeepMIM] not on vectors
    adam_betas: tuple[float, ...] = (0.9, 0.999)  # [code: DeepMIM, BootMAE] AdamW's two moments
    eval_every: float = 12.7  # [code: DeepMIM] epochs between evaluations; this is 16k steps on ADE20K
    eval_images: int = 0  # [ours] validation images to use, spread over all; 0: all

    def __post_init__(self):
        super().__post_init__()
        assert self.warmup < self.iterations, f"--warmup {self.warmup} must be below --iterations {self.iterations}"
        assert len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1], f"--scale takes low and high: {self.scale}"
        S, p, D, heads = self.img_size, self.patch_size or 1, self.embed_dim, self.num_heads or 1
        assert S > p and S % p == 0, f"--img_size {S} must be two or more whole patches of {p} pixels"
        assert D % 4 == D % heads == 0, f"--embed_dim {D} must be divisible by 4 and by --num_heads {heads}"
        assert (self.micro_batch or self.batch_size) != 1 or common.WORLD > 1, "--micro_batch 1: batch norm needs more"


PRESETS = {
    "ddae": dict(),  # what the paper does not state is as in BEiT, which it names
    "sdae": dict(train_pos_embed=False),  # what the paper does not state is CAE's, whose setting it names
    "sdae_large": dict(train_pos_embed=False, lr=4e-5, layer_decay=0.95, drop_path=0.15, channels=1024),  # CAE's
    "deepmim": dict(lr=1e-4),  # targets other than CLIP
    "deepmim_clip": dict(lr=5e-5, layer_decay=0.9),
    "bootmae": dict(clip_grad=3.0),  # its pixels were scaled to [-1, 1], here as everywhere
    "quick": dict(img_size=64, patch_size=4, embed_dim=96, depth=4, num_heads=3, channels=32, drop_path=0.0,
                  scale=(0.75, 1.5), iterations=240, warmup=20, lr=2e-3, layer_decay=0.9, eval_images=200,
                  eval_every=0.128, out_dir="out/quick_segment"),
}


# --- data -------------------------------------------------------------------------------------------------------------

class Ade:
    """ADE20K's folder layout: [i] -> PIL image, label uint8 (H, W) with 255 unlabeled."""

    def __init__(self, root, split, num_classes=0, first=1, ignored=255):
        part = {"train": "training", "val": "validation"}[split]
        images, annotations = root / "images" / part, root / "annotations" / part
        if not images.is_dir() or not annotations.is_dir():
            sys.exit(f"--data {root.absolute()} must hold the folders images/{part} and annotations/{part}")
        self.samples = [(p, str(annotations / f"{Path(p).stem}.png")) for p, in Pictures(images).samples]
        names, self.folder, self.first, self.ignored = class_names(root), annotations, first, ignored
        if not names and not num_classes:
            sys.exit(f"{root.absolute()} has no classes.json, a list of names; add it, or give --num_classes")
        self.classes = (names + [f"class {i + first}" for i in range(len(names), num_classes)])[:num_classes or None]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, K = self.samples[i][1], len(self.classes)
        image, label = map(Image.open, self.samples[i])
        ImageOps.exif_transpose(image, in_place=True)
        if label.mode not in ("L", "P") or label.size != image.size:
            raise ValueError(f"{path} has mode {label.mode} and size {label.size}, not 8 bits and size {image.size}")
        raw = np.array(label)
        unlabeled = (raw == self.ignored) | (raw < self.first)
        highest = raw[~unlabeled].max(initial=0)
        if highest >= K + self.first:  # no broken file, but wrong flags: it must not be skipped
            sys.exit(f"{path} has label {highest}, but {K} classes from {self.first} end at {K + self.first - 1}; give "
                     f"--num_classes, --labels_from, or --ignore_label {highest} if it is unlabeled")
        return image, torch.from_numpy(np.where(unlabeled, np.uint8(IGNORE), raw - np.uint8(self.first)))

    def print_labels(self):
        """Print the share of each class in a hundred files: training on wrongly numbered labels does not fail."""
        files, counts = choose(len(self), 100), torch.zeros(IGNORE + 1)
        for item, broken in map(Attempt(self.__getitem__, self).__getitem__, files):
            counts += item[1].flatten().bincount(minlength=IGNORE + 1) if item else 0
        share = (counts / counts.sum()).tolist()
        shown = [f"{i} {name} {x:.1%}" for i, (name, x) in enumerate(zip(self.classes, share), self.first) if x > 0]
        common.print0(f"{self.folder}: {len(shown)} of {len(self.classes)} classes in {len(files)} of {len(self):,} "
                      f"files: {', '.join(shown)}; unlabeled ({'0, ' * self.first}{self.ignored}) {share[IGNORE]:.1%}")
        if not shown:
            sys.exit(f"no pixel is labeled; {broken}")


def class_names(root):
    """Names in classes.json, ["sky", ...] or [{"name": "sky"}, ...], or in ADE20K's objectInfo150.txt; [] without."""
    ours, ade = root / "classes.json", root / "objectInfo150.txt"
    if ours.exists():
        return [str(c["name"] if isinstance(c, dict) else c) for c in json.loads(ours.read_text())]
    lines = ade.read_text().splitlines()[1:] if ade.exists() else []
    return [line.split("\t")[-1].split(",")[0].strip() for line in lines]


def open_pairs(cfg, split):
    """Images and labels of --data for `split`, "train" or "val"."""
    if cfg.data == "shapes":
        return LabeledShapes(split, cfg.img_size)
    source = Ade(Path(cfg.data), split, cfg.num_classes, int(cfg.labels_from), cfg.ignore_label)
    source.print_labels()
    return source


def rescale(x, low, high, mode=InterpolationMode.BILINEAR):
    """(..., H, W) -> shorter side `low`, but the longer at most `high`; without antialiasing, like OpenCV."""
    H, W = x.shape[-2:]
    factor = min(high / max(H, W), low / min(H, W))
    return v2.functional.resize(x, [max(1, int(n * factor + 0.5)) for n in (H, W)], mode, antialias=False)


def distort(img, rng):
    """Photometric distortion of an RGB image uint8 (3, H, W), in mmseg's order; each step has probability 1/2."""
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
    """Training crops by key (epoch, index)."""

    def __init__(self, source, cfg):
        self.source, self.cfg, self.crop = source, cfg, common.to_rgb  # `sample` crops, together with the label

    def sample(self, item, rng):
        """Image uint8 (3, H, W), label uint8 (H, W) -> crop uint8 (3, S, S), its label uint8 (S, S)."""
        S, (img, label) = self.cfg.img_size, item
        ratio = rng.uniform(*self.cfg.scale)
        low, high = int(S * ratio), int(4 * S * ratio)
        img, label = rescale(img, low, high), rescale(label[None], low, high, InterpolationMode.NEAREST)[0]
        H, W = label.shape
        for _ in range(11):  # while one class covers three quarters, up to ten more draws; the last is taken as it is
            top, left = rng.integers(max(H - S, 0) + 1), rng.integers(max(W - S, 0) + 1)
            part = label[top:top + S, left:left + S]
            counts = part.flatten().bincount(minlength=IGNORE + 1)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
                break
        img, label = img[:, top:top + S, left:left + S], part
        if rng.random() < 0.5:
            img, label = img.flip(-1), label.flip(-1)
        if self.cfg.distort:
            img = distort(img, rng)
        right, below = S - label.shape[1], S - label.shape[0]
        gray = [round(255 * m) for m in common.MEAN]  # published runs pad with 0 after normalization
        return v2.functional.pad(img, [0, 0, right, below], gray), F.pad(label, (0, right, 0, below), value=IGNORE)


# --- model ------------------------------------------------------------------------------------------------------------

class BiasedBlock(Block):
    """Block with relative position bias and layer scale. They start as 0 and 1, which does not change the output."""

    def __init__(self, dim, num_heads, drop_path, side):
        super().__init__(dim, num_heads, drop_path)
        self.side = side
        self.rel_pos = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, num_heads))  # + [CLS] to patch, back, itself
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def bias(self, index, grid):
        """Added to the attention logits -> (heads, 1 + N, 1 + N); `index` as from `relative_index`."""
        table, (h, w) = self.rel_pos[:-3].T.unflatten(1, (2 * self.side - 1,) * 2), grid  # (heads, 2n-1, 2n-1)
        if (h, w) != (self.side, self.side):
            table = F.interpolate(table[None], (2 * h - 1, 2 * w - 1), mode="bicubic", align_corners=False)[0]
        from_cls, to_cls, itself = self.rel_pos[-3:, :, None, None]  # (heads, 1, 1) each
        rows = torch.cat((to_cls.expand(-1, h * w, -1), table.flatten(1)[:, index]), 2)  # (heads, N, 1 + N)
        return torch.cat((torch.cat((itself, from_cls.expand(-1, -1, h * w)), 2), rows), 1)

    def forward(self, x, index, grid):  # (B, T, D)
        B, T, D = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(index, grid).to(q.dtype))
        x = x + self.drop(self.gamma_1 * self.attn.proj(attended.transpose(1, 2).reshape(B, T, D)))
        return x + self.drop(self.gamma_2 * self.mlp(self.norm2(x)))


def relative_index(grid, device):
    """Row of the flattened (2h-1) x (2w-1) bias table for every two patches of a (h, w) grid -> (N, N)."""
    h, w = grid
    y, x = (t.flatten() for t in torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))
    return (y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1


class Backbone(ViT):
    """The shared ViT for images of any size: four taps as maps; its position table is resized."""

    def __init__(self, cfg):
        super().__init__(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads, cfg.drop_path)
        self.rel_pos_bias, self.taps = cfg.rel_pos_bias, [max(1, round(cfg.depth * tap / 12)) for tap in (4, 6, 8, 12)]
        self.pos_embed.requires_grad_(cfg.train_pos_embed)
        del self.norm  # not used by the taps
        if cfg.rel_pos_bias:
            blocks = (BiasedBlock(cfg.embed_dim, cfg.num_heads, b.drop_path, self.grid[0]) for b in self.blocks)
            self.blocks = nn.ModuleList(blocks).apply(init_weights)

    def forward(self, imgs):
        """imgs (B, 3, H, W), H and W multiples of the patch -> four maps (B, D, h, w)."""
        grid = imgs.shape[2] // self.patch_size, imgs.shape[3] // self.patch_size
        patches = self.embed(patchify(imgs, self.patch_size))
        x = torch.cat((self.cls_token.expand(len(imgs), -1, -1), patches), 1)  # (B, 1 + N, D)
        x = x + finetune.resize_pos_embed(self.pos_embed, grid)
        index = relative_index(grid, x.device) if self.rel_pos_bias else None
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1], index, grid) if self.rel_pos_bias else block(outputs[-1]))
        return [outputs[tap][:, 1:].transpose(1, 2).unflatten(2, grid) for tap in self.taps]


def conv(inputs, outputs, size):
    """Convolution, batch norm, ReLU; initialized as in mmcv."""
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
    """Backbone, four scales, head, and auxiliary head."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, C = cfg, cfg.embed_dim, cfg.channels
        self.backbone = Backbone(cfg)
        self.scales = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(D, D, 2, 2), nn.BatchNorm2d(D), nn.GELU(), nn.ConvTranspose2d(D, D, 2, 2)),
            nn.ConvTranspose2d(D, D, 2, 2), nn.Identity(), nn.MaxPool2d(2)])
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(D, C, 1)) for n in (1, 2, 3, 6))
        self.bottleneck = conv(D + 4 * C, C, 3)
        self.laterals = nn.ModuleList(conv(D, C, 1) for _ in range(3))
        self.fpn = nn.ModuleList(conv(C, C, 3) for _ in range(3))
        self.fuse = conv(4 * C, C, 3)
        self.classify = classifier(C, cfg.num_classes)
        if cfg.aux_weight:
            self.aux = nn.Sequential(conv(D, min(256, C), 3), *classifier(min(256, C), cfg.num_classes))

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
        """logits (B, K, h, w), labels (B, H, W) with 255 unlabeled -> ()."""
        logits = resize(logits.float(), labels.shape[1:])
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()

    def forward(self, imgs, labels):
        """imgs (B, 3, H, W), labels uint8 (B, H, W) -> loss (), metrics: name -> tensor ()."""
        taps, labels = self.backbone(imgs), labels.long()
        main = self.cross_entropy(self.head(taps), labels)
        if not self.cfg.aux_weight:
            return main, {}
        aux = self.cross_entropy(self.aux(taps[2]), labels)
        return main + self.cfg.aux_weight * aux, {"ce/main": main.detach(), "ce/aux": aux.detach()}

    def preview(self, imgs, labels):
        """Panels for preview.png: crops, their labels, and the prediction; black is unlabeled."""
        logits, (mean, std) = self.logits(imgs), common.mean_std(imgs.device)
        colors = torch.from_numpy(palette(logits.shape[1])).to(imgs.device) / 255  # (256, 3)
        painted = [(colors[x.long()].permute(0, 3, 1, 2) - mean) / std for x in (labels, logits.argmax(1))]
        return {"crop": imgs, "label": painted[0], "prediction": painted[1]}


def palette(num_classes):
    """A color per class, neighbors far apart, and black for 255 -> uint8 (256, 3)."""
    colors = np.zeros((256, 3))
    for i in range(num_classes):
        colors[i] = colorsys.hsv_to_rgb((0.6 + 0.618 * i) % 1, (0.4, 0.8, 1.0)[i % 3], (0.8, 1.0, 0.65)[i % 3])
    return (255 * colors).round().astype(np.uint8)


# --- optimizer and schedule -------------------------------------------------------------------------------------------

def make_optimizer(model, cfg):
    """AdamW with layer-wise learning rates; unlike elsewhere tables and [CLS] are decayed, as in all published runs."""
    groups = finetune.layer_groups(model, "backbone.", cfg.depth, cfg.layer_decay, cfg.weight_decay, skip=())
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.adam_betas, fused=True)


def learning_rate(step, steps_per_epoch, cfg):
    """Linear decay to 0 over all iterations, times a linear warm-up from 1e-6 of it."""
    regular = cfg.lr * (1 - step / cfg.iterations)
    return regular * (1 - (1 - step / cfg.warmup) * (1 - 1e-6)) if step < cfg.warmup else regular


# --- evaluation -------------------------------------------------------------------------------------------------------

def slide(net, img, crop, stride):
    """Mean logits of overlapping windows of one size: net (n, 3, S, S) -> (n, K, S, S); img (3, H, W) -> (K, H, W)."""
    H, W = img.shape[1:]
    img = F.pad(img, (0, max(0, crop - W), 0, max(0, crop - H)))  # a smaller image: mean color right and below
    room, total, count = [size - crop for size in img.shape[1:]], 0, 0
    starts = (sorted({min(i, r) for i in range(0, r + stride, stride)}) for r in room)  # the last ends with the image
    for y, x in itertools.product(*starts):
        around = (x, room[1] - x, y, room[0] - y)
        logits = net(img[None, :, y:y + crop, x:x + crop])[0]
        total = total + F.pad(logits, around)
        count = count + F.pad(torch.ones_like(logits[:1]), around)
    return (total / count)[:, :H, :W]


@torch.no_grad()
def segment(model, img, cfg, device, autocast):
    """Image uint8 (3, H, W) -> logits (K, h, w), at the size it is resized to: shorter side img_size, at most 4 : 1."""
    S = cfg.img_size
    img = common.to_device(rescale(img, S, 4 * S), {}, device)[0]
    with autocast:
        return slide(model.logits, img, S, max(1, S * 2 // 3))


def confusion_matrix(predicted, label, num_classes):
    """Pixels by label (rows) and prediction (columns), int64 (K, K), without unlabeled ones."""
    known = label != IGNORE
    pairs = num_classes * label[known].long() + predicted[known].long()
    return pairs.bincount(minlength=num_classes ** 2).view(num_classes, num_classes)


def class_metrics(confusion):
    """Intersection over union and accuracy of each class (K,), in percent; nan for 0 / 0."""
    confusion = confusion.double()
    inside, labeled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    return 100 * inside / (labeled + predicted - inside), 100 * inside / labeled


def evaluate(model, cfg, device, autocast, source):
    """mIoU, mAcc, and aAcc over `source` -> metrics by name; out_dir/per_class.txt, or eval_per_class.txt, by class."""
    sync_buffers(model)
    K, ids = len(source.classes), choose(len(source), cfg.eval_images)
    confusion, count = torch.zeros(K, K, dtype=torch.int64), 0
    for (img, label), in read_each(Crops(source, cfg).read, source, ids, cfg, batch_size=1):
        logits = segment(model, img, cfg, device, autocast)
        if not logits.isfinite().all():
            sys.exit("evaluation stopped: the model's logits are not finite; try --precision fp32")
        predicted = resize(logits[None], label.shape)[0].argmax(0)  # at the label's size: labels are never resized
        confusion += confusion_matrix(predicted.cpu(), label, K)
        count += 1
    confusion, count = sum(common.gather(confusion)), sum(common.gather(count))
    iou, acc = class_metrics(confusion)
    if common.RANK == 0:
        path, table = Path(cfg.out_dir) / ("eval_per_class.txt" if cfg.eval else "per_class.txt"), ""
        for row in zip(source.classes, *(x.tolist() for x in (iou, acc, confusion.sum(1), confusion.sum(0)))):
            table += "{:<24.23}{:8.2f}{:8.2f}{:14,}{:14,}\n".format(*row)
        try:
            with common.replacing(path) as temporary:
                temporary.write_text(f"{'class':<24}{'IoU':>8}{'acc':>8}{'labeled':>14}{'predicted':>14}\n{table}")
        except OSError as error:
            common.print0(f"warning: {path} not written: {error}")
    return dict(mIoU=iou.nanmean().item(), mAcc=acc.nanmean().item(),
                aAcc=100 * (confusion.diag().sum() / confusion.sum()).item(), val_images=count)


def label_map(logits, size):
    """Logits (K, h, w) -> classes uint8 (*size), one by one: all logits of a camera's picture would fill the memory."""
    best, label = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.uint8)
    for k, x in enumerate(logits.cpu()):
        x = resize(x[None, None], size)[0, 0]
        label[x > best] = k
        best = best.maximum(x)
    return label


def predict(model, cfg, path, img, classes, device, autocast):
    """--predict, in out_dir/predicted: NAME.png, a label file like those of --data; NAME_segmented.png, in color."""
    label, folder = label_map(segment(model, img, cfg, device, autocast), img.shape[1:]), Path(cfg.out_dir, "predicted")
    folder.mkdir(exist_ok=True)
    with common.replacing(folder / f"{path.stem}.png") as temporary:
        Image.fromarray((label + int(cfg.labels_from)).numpy()).save(temporary)
    share, colors = label.flatten().bincount(minlength=len(classes)) / label.numel(), palette(len(classes)) / 255
    picture = rescale(img, 640, 1280).permute(1, 2, 0).numpy() / 255  # (h, w, 3)
    shown = 0.4 * picture + 0.6 * colors[rescale(label[None], 640, 1280, InterpolationMode.NEAREST)[0]]
    figure = Figure((10, 5 * shown.shape[0] / shown.shape[1] + 0.8), layout="constrained")
    for ax, panel in zip(figure.subplots(1, 2), (picture, shown)):
        ax.imshow(panel)
        ax.set_axis_off()
    largest = [k for k in share.argsort(descending=True)[:10].tolist() if share[k] >= 0.005]
    figure.legend(handles=[Patch(color=colors[k], label=f"{classes[k]} {share[k]:.0%}") for k in largest],
                  loc="outside lower center", ncols=5, frameon=False)
    with common.replacing(folder / f"{path.stem}_segmented.png") as temporary:
        figure.savefig(temporary, dpi=110)
    print(f"wrote {folder / path.stem}.png and {path.stem}_segmented.png")


# --- main -------------------------------------------------------------------------------------------------------------

SAVED = (*SIZES, "img_size", "rel_pos_bias", "channels", "aux_weight", "num_classes", "labels_from", "ignore_label")


def main():
    run(common.parse(Config, PRESETS, __doc__), UperNet, SAVED, open_pairs, Crops, make_optimizer, learning_rate,
        evaluate, predict)


if __name__ == "__main__":
    main()
