"""
Object detection and instance segmentation: Mask R-CNN on a plain ViT, in the two forms in which encoders are measured on COCO.

The model, `MaskRCNN`. D width, C channels, K classes, strides for patches of 16 pixels:
    --style taps (SdAE, DDAE, CAE): global attention, images of any size, 12 epochs
        taps = outputs of blocks 4, 6, 8, 12 of 12, without [CLS] and without the final norm           # strides 16 16 16 16
        maps = FPN(taps at 4, 2, 1 and 1/2 times their resolution)                                     # strides 4 8 16 32
    --style vitdet (DeepMIM, MAE): four blocks with global attention, the others in windows of 14 x 14; one square canvas
        maps = the last block's output at 4, 2, 1 and 1/2 times its resolution, each then 1x1 and 3x3  # strides 4 8 16 32
    maps += [every second pixel of the coarsest]                                                       # stride 64, for the RPN
    proposals = rpn(maps)                       # 3 anchors per position, NMS                          # (n, 4) per image
    classes, boxes = box_head(RoIAlign(maps, proposals))                                               # (n, K + 1), (n, 4K + 4)
    masks = mask_head(RoIAlign(maps, boxes))                                                           # (n, K + 1, 28, 28)
    loss = CE(anchors) + smooth L1(anchors) + CE(classes) + L1 or 10 GIoU(boxes) + BCE(masks of positives)
The ViT and the pyramid may run in bf16; from the maps on nothing does: bf16 anchors are off by up to 4 pixels, and boxes
decoded in bf16 overlap the right ones by 0.83 only.

Data: `--data FOLDER` in COCO's layout, {train,val}2017/*.jpg and annotations/instances_{train,val}2017.json, with masks as
polygons, RLE or compressed RLE; or `shapes`, generated. Category ids may have gaps. Crowds are left out of training and
count in evaluation as COCO's rules say. Images that show no instance, or crowds alone, are left out of training.
out_dir/results_{bbox,segm}.json are in COCO's format; APb and APm are pycocotools', in percent.

What is easily done otherwise, or torchvision does otherwise:
  - the strides that RoIAlign assumes are constants; torchvision guesses them from the first batch, before padding
  - mask targets are cut out of the true masks with aligned RoIAlign and stay soft, and masks are pasted by bilinear
    sampling: true masks coded like this and back reach 99 AP; torchvision's unaligned targets and whole-pixel boxes 88
  - masks are resized by the pixel at each centre; torchvision's nearest moves them half a pixel off image and boxes
  - after a crop boxes are drawn anew around what is left of the masks
  - ViTDet decays biases but no norm of the ViT and no position table; the other style all that is no vector, and its
    position table is not trained
  - images of a micro-batch are padded to one size, which the position table is stretched to, so the micro-batch matters;
    recipes of the first style take the published 2 at a time. Published samplers also paired images of like orientation
  - the RPN's box loss is torchvision's, quadratic below 1/9, where the published code has L1; nothing is antialiased
SdAE names CAE's setting, DDAE SdAE's: CAE's box head of four convolutions and its GIoU loss are therefore the defaults, but no
text states them; `--box_head 2fc --box_loss l1` is MMDetection's base. With DeepMIM only batch, rates and canvas are
stated; epochs and drops are MAE's, whose setting it follows. CAE alone also crops at random; SdAE does not, nor do we.

Run:
    python -m transfer.detect --recipe quick --init out/quick/encoder.pt           # generated images, 2 CPU cores
    torchrun --nproc_per_node=8 -m transfer.detect --recipe ddae --data COCO --init out/ddae/encoder.pt --out_dir out/coco
    python -m transfer.detect --eval --data COCO --init out/coco/best.pt
    python -m transfer.detect --predict photo.jpg --init out/coco/best.pt          # photo_detected.png, beside best.pt
"""
import contextlib
import dataclasses
import io
import json
import os
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.checkpoint import checkpoint
from torchvision import tv_tensors
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, generalized_box_iou_loss, masks_to_boxes, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import InterpolationMode, v2

import common
from ddae import Block, ViT, init_weights, patchify, sincos_pos_embed
from transfer.segment import SIZES, make_model, open_picture, palette, settle_places


@dataclass(frozen=True)
class Config(common.RunConfig):
    data: str = "shapes"  # [ours] folder in COCO's layout, or shapes
    init: str = ""  # [ours] encoder.pt, a ViT of MAE or timm, or best.pt of this file; sizes are taken from it
    out_dir: str = "out/detect"  # [ours] checkpoints, log, pictures; a run found there is continued; else --init's folder
    eval: bool = False  # [ours] no training: AP of --init, or of out_dir's best.pt
    predict: str = ""  # [ours] no training: boxes and masks on this picture with --init, or out_dir's best.pt
    style: Literal["taps", "vitdet"] = "taps"  # [SdAE; DeepMIM] see above
    img_size: int = 800  # [SdAE] taps: longest shorter side, the longer is at most 5/3 of it; vitdet: side of the canvas
    scale: tuple[float, ...] = (0.6, 1.0)  # [SdAE] range of random sizes, of img_size; taps: in steps of 1/25 of img_size
    patch_size: int = 0  # [MAE] 0: as in --init, else 16
    embed_dim: int = 0  # [MAE] 0: as in --init, else 768
    depth: int = 0  # [MAE] 0: as in --init, else 12
    num_heads: int = 0  # [MAE] 0: as in --init, else 12
    table: tuple[int, ...] = ()  # [code: CAE] rows, columns of the position table; none: 42 68; vitdet: as in --init
    layer_scale: bool = False  # [code: CAE] with taps: a learnt factor, 1 at first, on each branch of a block
    window: int = 14  # [code: ViTDet] with vitdet: side of the windows, in patches
    drop_path: float = 0.2  # [code: CAE] largest share of samples that skip a branch of the last block
    checkpointing: bool = False  # [code: CAE] compute blocks anew in the backward pass: less memory, more time
    channels: int = 256  # [Mask R-CNN] width of pyramid and heads; fully connected layers have four times as many
    box_head: Literal["4conv1fc", "2fc"] = "4conv1fc"  # [code: CAE, ViTDet] layers between a region and its class and box
    box_loss: Literal["giou", "l1"] = "giou"  # [code: CAE] 10 GIoU of decoded boxes, or L1 of offsets
    proposals: tuple[int, ...] = (2000, 2000)  # [code: CAE] per level before NMS, per image after; at most 1000 in evaluation
    regions: int = 512  # [Mask R-CNN] of them trained on per image, a quarter of them positive at most
    num_classes: int = 0  # [ours] 0: as many as --data names
    epochs: int = 12  # [SdAE, AAAI] passes over the training images
    drops: tuple[float, ...] = (9.0, 11.0)  # [SdAE] epochs after which the learning rate falls to a tenth
    warmup: int = 500  # [code: CAE] optimiser steps over which it rises from a thousandth
    batch_size: int = 32  # [SdAE] images per optimiser step, over all processes
    lr: float = 3e-4  # [SdAE] learning rate of the heads, as it is: no factor for the batch
    layer_decay: float = 0.75  # [SdAE, DeepMIM] factor from each layer to the one below
    weight_decay: float = 0.05  # [code: CAE] see above for what is not decayed
    adam_betas: tuple[float, ...] = (0.9, 0.999)  # [code: CAE, ViTDet] AdamW's two moments
    eval_every: float = 1.0  # [ours] epochs between evaluations; the best model is kept in best.pt
    eval_images: int = 0  # [ours] how many images of the validation set to take; 0: all
    warmup_epochs, min_lr = 0.0, 0.0  # no flags

    def __post_init__(self):
        check = common.check
        common.above(0, self, "img_size channels batch_size lr layer_decay regions window eval_every")
        super().__post_init__()
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "num_classes", "warmup", "eval_images"):
            check(getattr(self, name) >= 0, f"--{name} must not be negative, got {getattr(self, name)}")
        check(0 <= self.drop_path < 1, f"--drop_path must be in [0, 1), got {self.drop_path}")
        check(self.layer_decay <= 1, f"--layer_decay must be at most 1, got {self.layer_decay}")
        check(len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1], f"--scale takes low and high, got {self.scale}")
        for name, sizes in (("table", (0, 2)), ("proposals", (2,))):
            values = getattr(self, name)
            check(len(values) in sizes and min(values, default=1) > 0, f"--{name} takes 2 positive values, got {values}")
        check(len(self.adam_betas) == 2 and all(0 <= b < 1 for b in self.adam_betas),
              f"--adam_betas takes 2 values in [0, 1), got {self.adam_betas}")
        check(self.style == "taps" or not self.layer_scale, "--layer_scale goes with --style taps")
        p, D, heads = self.patch_size, self.embed_dim, self.num_heads
        check(not p or self.style == "taps" or self.img_size % (4 * p) == 0, f"--img_size {self.img_size} is not divisible "
              f"by the coarsest stride, 4 patches of {p} pixels; use {max(1, self.img_size // (4 * (p or 1))) * 4 * p}")
        check(not p or p % 4 == 0, f"patches of {p} pixels are not divisible by 4, so the finest map has no whole stride")
        check(not D or D % 4 == 0 and D % (heads or 1) == 0,
              f"--embed_dim {D} must be divisible by 4 and by --num_heads {heads}")


VITDET = dict(style="vitdet", img_size=1024, scale=(0.1, 2.0), box_loss="l1", proposals=(2000, 1000), epochs=100,
              drops=(88.889, 96.296), warmup=250, lr=1e-4, weight_decay=0.1, drop_path=0.1, eval_every=10)
RECIPES = {
    "ddae": dict(micro_batch=2),
    "sdae": dict(micro_batch=2),
    "cae": dict(micro_batch=2, layer_scale=True),
    "deepmim": dict(VITDET, batch_size=16),
    "mae": dict(VITDET, batch_size=64, layer_decay=0.7),
    "quick": dict(img_size=64, patch_size=4, embed_dim=96, depth=4, num_heads=3, table=(16, 16), drop_path=0.0, channels=32,
                  box_head="2fc", box_loss="l1", proposals=(200, 200), regions=32, epochs=1, drops=(0.2,), warmup=20,
                  batch_size=8, lr=2e-3, layer_decay=0.9, max_steps=300, eval_every=0.24, eval_images=100, preview_every=0,
                  out_dir="out/quick_detect"),
}


# --- data -------------------------------------------------------------------------------------------------------------

class Coco:
    """COCO's folder layout: `record(i)` is an image's line of the JSON file with its annotations, `image(i)` RGB."""

    def __init__(self, root, split):
        path, self.images = root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"
        for part in (path, self.images):
            if not part.exists():
                common.fail(f"--data {part.absolute()} is missing; {root} must hold {split}2017/ and annotations/{path.name}")
        try:
            file = json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            common.fail(f"--data {path.absolute()} is no readable JSON ({error}); is it whole?")
        try:
            self.read(file, split)
        except ValueError as error:
            common.fail(f"--data {path.absolute()}: {error}")
        except (TypeError, KeyError, AttributeError) as error:  # a null or a string where a number or a list should be
            common.fail(f"--data {path.absolute()} is no COCO file: {type(error).__name__}: {error}")

    def read(self, file, split):
        """Check everything that can be without opening an image; raises ValueError."""
        check = common.check
        check(isinstance(file, dict), "this is no COCO file, which is an object of images, annotations and categories")
        for part, keys in (("images", "id file_name height width"), ("categories", "id name"),
                           ("annotations", "image_id category_id bbox segmentation")):
            check(isinstance(file.get(part), list), f"there is no list under '{part}'; give a file of COCO instances")
            for i, entry in enumerate(file[part]):
                missing = [k for k in keys.split() if not isinstance(entry, dict) or k not in entry]
                check(not missing, f"entry {i} of '{part}' has no '{missing and missing[0]}'")
        categories = sorted(file["categories"], key=lambda c: c["id"])
        self.ids, self.classes = [c["id"] for c in categories], [str(c["name"]) for c in categories]
        records = {im["id"]: dict({k: im[k] for k in ("id", "file_name", "height", "width")}, annotations=[])
                   for im in file["images"]}
        check(len(records) == len(file["images"]), "two images have the same id")
        check(len(set(self.ids)) == len(self.ids), "two categories have the same id")
        known, without = set(self.ids), []
        for i, a in enumerate(file["annotations"]):
            name = f"annotation {a.get('id', f'number {i}')}"
            check(a["image_id"] in records, f"{name} is of image {a['image_id']}, which is not under 'images'; remove it")
            check(a["category_id"] in known, f"{name} is of category {a['category_id']}, which is not under 'categories'; "
                  "add that, or correct it")
            check(len(a["bbox"]) == 4, f"{name} has a bbox of {len(a['bbox'])} numbers, not of x, y, width, height")
            polygons = a["segmentation"] if isinstance(a["segmentation"], list) else [range(6)]
            if not (any(len(p) >= 6 for p in polygons) and a["bbox"][2] > 0 and a["bbox"][3] > 0):
                without.append(name)
                continue
            record = records[a["image_id"]]
            a = {k: a.get(k, 0) for k in ("category_id", "bbox", "iscrowd", "segmentation", "area")}
            try:
                a["segmentation"] = to_rle(a["segmentation"], record)
            except Exception as error:  # pycocotools raises nearly anything
                check(False, f"{name} has a segmentation that is no polygon and no RLE of image {record['id']}: {error}")
            a["area"] = a["area"] or float(rle.area(a["segmentation"]))
            record["annotations"].append(a)
        if without:
            common.say(f"warning    {len(without)} annotations without width, height or mask are left out, e.g. {without[0]}")
        there = set(os.listdir(self.images))
        missing = [r["file_name"] for r in records.values()
                   if r["file_name"] not in there and not (self.images / r["file_name"]).is_file()]
        check(not missing, f"{len(missing)} of {len(records)} images are not in {self.images.absolute()}, "
              f"e.g. {missing and missing[0]}")
        kept = [r for r in records.values() if split != "train" or not all(a["iscrowd"] for a in r["annotations"])]
        if len(kept) < len(records):
            common.say(f"data       {len(records) - len(kept)} images without instances, or with crowds alone, are left out "
                       "of training")
        check(kept if split == "train" else any(r["annotations"] for r in kept), "there is nothing to train on or compare with")
        # One array of bytes: dicts would be copied into every worker, reference by reference.
        blobs = [pickle.dumps(r) for r in kept]
        self.ends = np.cumsum([len(b) for b in blobs])
        self.records = np.frombuffer(b"".join(blobs), np.uint8)

    def __len__(self):
        return len(self.ends)

    def record(self, i):
        return pickle.loads(self.records[self.ends[i - 1] if i else 0:self.ends[i]].tobytes())

    def name(self, i):
        return str(self.images / self.record(i)["file_name"])

    def image(self, i):
        record = self.record(i)
        image = common.to_rgb(Image.open(self.images / record["file_name"]))
        common.check(image.size == (record["width"], record["height"]), f"the file has {image.size[0]} x {image.size[1]} "
                     f"pixels, the annotations {record['width']} x {record['height']}")
        return image


class Figures(common.Shapes):
    """Generated pictures as COCO records: each figure an instance, as far as it is seen."""
    ids = range(1, 1 + len(common.Shapes.classes))

    def figure(self, kind, u, v):
        inside, texture = super().figure(kind, u, v)
        self.drawn.append((kind, inside))  # in the order of painting; `item` returns no masks of instances
        return inside, texture

    def record(self, i):
        self.drawn = []
        self.item(i)
        annotations, hidden = [], np.zeros((self.size, self.size), bool)
        for kind, inside in reversed(self.drawn):
            code, hidden = encode((inside & ~hidden)[None])[0], hidden | inside
            if rle.area(code):
                annotations.append(dict(category_id=kind + 1, bbox=rle.toBbox(code).tolist(), iscrowd=0, segmentation=code,
                                        area=float(rle.area(code))))
        return dict(id=i, height=self.size, width=self.size, annotations=annotations)

    def image(self, i):
        self.drawn = []
        return super().image(i)


def open_scenes(cfg, split):
    """The images and annotations of --data for `split`, "train" or "val": len, record(i), image(i), name(i), classes, ids."""
    if cfg.data == "shapes":
        return Figures(split, cfg.img_size)
    if not Path(cfg.data).is_dir():
        common.fail(f"--data {Path(cfg.data).absolute()} is not a folder; give one in COCO's layout, or shapes")
    return Coco(Path(cfg.data), split)


def to_rle(segmentation, record):
    """A mask as polygons, RLE or compressed RLE -> compressed RLE as JSON holds it."""
    size = record["height"], record["width"]
    if isinstance(segmentation, list):
        polygons = [p for p in segmentation if len(p) >= 6]  # three corners; pycocotools takes four numbers for a box
        code = rle.merge(rle.frPyObjects(polygons, *size))
    elif isinstance(segmentation["counts"], list):
        code = rle.frPyObjects(segmentation, *size)
    else:
        code = segmentation
    common.check(tuple(code["size"]) == size, f"its size is {code['size']}, the image's {list(size)}")
    counts = code["counts"]
    return dict(size=list(size), counts=counts if isinstance(counts, str) else counts.decode())


def encode(masks):
    """bool (n, H, W) -> list of compressed RLE."""
    codes = rle.encode(np.asfortranarray(np.asarray(masks, np.uint8).transpose(1, 2, 0)))
    return [dict(code, counts=code["counts"].decode()) for code in codes]


def targets(record, ids):
    """Instances of a record, crowds left out -> boxes xyxy (n, 4), masks uint8 (n, H, W), labels (n,) from 1."""
    things, size = [a for a in record["annotations"] if not a["iscrowd"]], (record["height"], record["width"])
    boxes = torch.tensor([a["bbox"] for a in things], dtype=torch.float32).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = rle.decode([a["segmentation"] for a in things]).transpose(2, 0, 1) if things else np.zeros((0, *size), np.uint8)
    return dict(boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
                masks=tv_tensors.Mask(np.ascontiguousarray(masks)),
                labels=torch.tensor([ids.index(a["category_id"]) + 1 for a in things], dtype=torch.int64))


class Scenes(common.Samples):
    """The training pipeline by key (epoch, index) -> image uint8 (3, H, W), boxes, masks, labels, key, unreadable files."""

    def __init__(self, source, cfg):
        self.source, self.seed, self.S, self.style = source, cfg.seed, cfg.img_size, cfg.style
        S, (low, high) = cfg.img_size, cfg.scale
        if cfg.style == "taps":
            sides = list(range(round(S * low), round(S * high) + 1, max(1, S // 25)))
            self.resize = v2.RandomShortestSize(sides, S * 5 // 3, antialias=False)
        else:
            self.resize = v2.ScaleJitter((S, S), (low, high), antialias=False)
        self.flip = v2.RandomHorizontalFlip()
        self.tidy = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])

    def draw(self, rng):
        """All that is random about a sample comes from its own generator."""
        return rng

    def sample(self, index, rng):
        img = tv_tensors.Image(v2.functional.pil_to_tensor(self.source.image(index)))  # (3, H, W)
        target = targets(self.source.record(index), self.source.ids)
        masks = target.pop("masks")
        img, target = self.resize(img, target)
        masks = v2.functional.resize(masks.as_subclass(torch.Tensor), list(img.shape[1:]), InterpolationMode.NEAREST_EXACT)
        img, target = self.flip(img, dict(target, masks=tv_tensors.Mask(masks)))
        if self.style == "vitdet":
            (H, W), S = img.shape[1:], self.S
            top, left = rng.integers(max(H - S, 0) + 1), rng.integers(max(W - S, 0) + 1)
            img, masks = img[:, top:top + S, left:left + S], target["masks"][:, top:top + S, left:left + S]
            seen = masks.flatten(1).any(1).bool()
            boxes = masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])  # torchvision's end at the last pixel
            target = dict(boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=img.shape[1:]),
                          masks=tv_tensors.Mask(masks[seen]), labels=target["labels"][seen])
        target = self.tidy(target)
        return img.as_subclass(torch.Tensor), {k: v.as_subclass(torch.Tensor) for k, v in target.items()}


# --- backbone ---------------------------------------------------------------------------------------------------------

class ScaledBlock(Block):
    """Block with layer scale, 1 at first."""

    def __init__(self, dim, num_heads, drop_path):
        super().__init__(dim, num_heads, drop_path)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x):  # (B, T, D)
        x = x + self.drop(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop(self.gamma_2 * self.mlp(self.norm2(x)))


class WindowedBlock(Block):
    """Block on a square grid of `side` x `side` tokens: attention within windows, or everywhere if window is 0.

    To the attention logits come query * (an offset's row and column vector), zero at first: decomposed relative position.
    """

    def __init__(self, dim, num_heads, drop_path, side, window):
        super().__init__(dim, num_heads, drop_path)
        self.num_heads, self.side, self.window = num_heads, side, window if 0 < window < side else side
        for name in ("rel_pos_h", "rel_pos_w"):
            self.register_parameter(name, nn.Parameter(torch.zeros(2 * self.window - 1, dim // num_heads)))

    def attend(self, x):
        """Attention of all tokens in (B, n, n, D), n the side of a window, with one another -> the same shape."""
        B, n, _, D = x.shape
        q, k, v = self.attn.qkv(x).reshape(B, n * n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, n*n, d) each
        offset = torch.arange(n, device=x.device)
        offset = offset[:, None] - offset + n - 1  # (n, n): query less key
        grid = q.unflatten(2, (n, n))
        rows = torch.einsum("bhyxd,yjd->bhyxj", grid, self.rel_pos_h[offset].to(q.dtype))
        cols = torch.einsum("bhyxd,xjd->bhyxj", grid, self.rel_pos_w[offset].to(q.dtype))
        bias = (rows.unsqueeze(-1) + cols.unsqueeze(-2)).flatten(4).flatten(2, 3)  # (B, heads, n*n, n*n)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.attn.proj(x.transpose(1, 2).reshape(B, n, n, D))

    def forward(self, x):  # (B, side * side, D)
        (B, _, D), n = x.shape, self.window
        y = self.norm1(x).view(B, self.side, self.side, D)
        count = -(-self.side // n)  # windows along a side; those at the end are filled up with zeros, which take part
        y = F.pad(y, (0, 0, 0, count * n - self.side, 0, count * n - self.side))
        y = y.view(B, count, n, count, n, D).transpose(2, 3).reshape(-1, n, n, D)
        y = self.attend(y).view(B, count, count, n, n, D).transpose(2, 3).reshape(B, count * n, count * n, D)
        x = x + self.drop(y[:, :self.side, :self.side].reshape(x.shape))
        return x + self.drop(self.mlp(self.norm2(x)))


def resize_table(table, old, new):
    """`common.resize_pos_embed` for a table (1, 1 + h*w, D) of any grid (h, w), not square ones alone."""
    if tuple(old) == tuple(new):
        return table
    rows = table[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, h, w)
    rows = F.interpolate(rows, new, mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], rows.flatten(2).transpose(1, 2)), 1)


class Backbone(ViT):
    """The shared ViT for detection: four taps as maps, or with style vitdet, where [CLS] is no more, the last map alone."""

    def __init__(self, style, img_size, table, patch_size, embed_dim, depth, num_heads, drop_path=0.0, layer_scale=False,
                 window=14, checkpointing=False):
        super().__init__(patch_size, patch_size, embed_dim, depth, num_heads, drop_path)
        self.grid, self.checkpointing = tuple(table), checkpointing
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, table), requires_grad=style == "vitdet")
        del self.norm  # the maps do not pass it
        rates = [block.drop_path for block in self.blocks]
        if style == "vitdet":
            del self.cls_token
            everywhere = [max(1, round(depth * i / 4)) - 1 for i in (1, 2, 3, 4)]
            self.taps = [depth]
            self.blocks = nn.ModuleList(WindowedBlock(embed_dim, num_heads, rate, img_size // patch_size, window * (
                i not in everywhere)) for i, rate in enumerate(rates)).apply(init_weights)
        else:
            self.taps = [max(1, round(depth * tap / 12)) for tap in (4, 6, 8, 12)]
            if layer_scale:
                self.blocks = nn.ModuleList(ScaledBlock(embed_dim, num_heads, rate) for rate in rates).apply(init_weights)

    def forward(self, imgs):
        """imgs (B, 3, H, W), H and W multiples of the patch -> maps (B, D, h, w)."""
        p = self.patch_size
        grid = (imgs.shape[2] // p, imgs.shape[3] // p)
        pos = resize_table(self.pos_embed, self.grid, grid)
        x = self.patch_embed(patchify(imgs, p)) + pos[:, 1:]  # (B, N, D)
        if hasattr(self, "cls_token"):
            x = torch.cat(((self.cls_token + pos[:, :1]).expand(len(x), -1, -1), x), 1)  # (B, 1 + N, D)
        outputs = []
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
            outputs.append(x)
        N = grid[0] * grid[1]
        return [outputs[tap - 1][:, -N:].transpose(1, 2).unflatten(2, grid) for tap in self.taps]


norm_2d = partial(LayerNorm2d, eps=1e-6)


class TapPyramid(nn.Module):
    """Four taps -> the four scales -> torchvision's FPN -> five maps (B, C, h, w) by name."""

    def __init__(self, embed_dim, channels):
        super().__init__()
        D = embed_dim
        self.scales = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(D, D, 2, 2), nn.BatchNorm2d(D), nn.GELU(), nn.ConvTranspose2d(D, D, 2, 2)),
            nn.ConvTranspose2d(D, D, 2, 2), nn.Identity(), nn.MaxPool2d(2)])
        self.fpn = FeaturePyramidNetwork([D] * 4, channels, LastLevelMaxPool())

    def forward(self, taps):
        return self.fpn(OrderedDict((str(i), scale(tap)) for i, (scale, tap) in enumerate(zip(self.scales, taps))))


class SimplePyramid(nn.Module):
    """ViTDet's: the last map -> four scales, each by itself -> five maps (B, C, h, w) by name."""

    def __init__(self, embed_dim, channels):
        super().__init__()
        D, C = embed_dim, channels
        scales = [[nn.ConvTranspose2d(D, D // 2, 2, 2), norm_2d(D // 2), nn.GELU(), nn.ConvTranspose2d(D // 2, D // 4, 2, 2)],
                  [nn.ConvTranspose2d(D, D // 2, 2, 2)], [], [nn.MaxPool2d(2)]]
        self.levels = nn.ModuleList(nn.Sequential(
            *scale, nn.Conv2d(width, C, 1, bias=False), norm_2d(C), nn.Conv2d(C, C, 3, padding=1, bias=False), norm_2d(C))
            for scale, width in zip(scales, (D // 4, D // 2, D, D)))

    def forward(self, taps):
        maps = [level(taps[0]) for level in self.levels]
        return OrderedDict(zip(("0", "1", "2", "3", "pool"), (*maps, F.max_pool2d(maps[-1], 1, 2))))


# --- heads ------------------------------------------------------------------------------------------------------------

class RegionPool(nn.Module):
    """Aligned RoIAlign of boxes at the level their size calls for; strides are `patch_size` / 4, / 2, x 1 and x 2."""

    def __init__(self, size, patch_size):
        super().__init__()
        self.size, self.patch_size = size, patch_size

    def forward(self, maps, boxes, image_sizes):
        """maps by name, boxes: per image (n, 4) -> (all n, C, size, size)."""
        rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])  # (n, 5): number of the image, box
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        levels = (side / (14 * self.patch_size) + 1e-8).log2().floor().add(2).clamp(0, 3)  # 224 of 16-pixel patches: 2
        pooled = rois.new_zeros(len(rois), maps["0"].shape[1], self.size, self.size)
        for level in range(4):
            here = torch.where(levels == level)[0]
            pooled[here] = roi_align(maps[str(level)], rois[here], self.size, 2 ** (2 - level) / self.patch_size, 0, True)
        return pooled


def mask_targets(masks, boxes, index=None, size=28):
    """What of masks (m, H, W) lies in boxes (n, 4), as shares in [0, 1]; index (n,) tells whose mask -> (n, size, size)."""
    index = torch.arange(len(boxes), device=boxes.device) if index is None else index
    rois = torch.cat((index[:, None].to(boxes), boxes), 1)
    return roi_align(masks[:, None].float(), rois, size, 1.0, 0, True)[:, 0]


def paste(masks, boxes, size):
    """Put masks (n, 28, 28) of probabilities where their boxes (n, 4) lie in an image of (H, W) -> bool (n, H, W)."""
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    step = max(1, 2 ** 24 // (size[0] * size[1]))  # at most 200 MB at a time
    for i in range(0, len(masks), step):
        left, top, right, bottom = boxes[i:i + step].T[..., None]  # (n, 1) each
        y = (torch.arange(size[0], device=boxes.device) + 0.5 - top) / (bottom - top) * 2 - 1  # (n, H): pixel centres, -1 to 1
        x = (torch.arange(size[1], device=boxes.device) + 0.5 - left) / (right - left) * 2 - 1  # (n, W)
        grid = torch.stack((x[:, None].expand(-1, size[0], -1), y[..., None].expand(-1, -1, size[1])), -1)  # (n, H, W, 2)
        pasted[i:i + step] = F.grid_sample(masks[i:i + step, None], grid, align_corners=False)[:, 0] >= 0.5
    return pasted


class Heads(RoIHeads):
    """torchvision's RoIHeads with another box loss, and masks that stay where they are."""
    box_loss = "l1"

    def forward(self, maps, proposals, image_sizes, targets=None):
        """-> per image boxes, labels, scores, masks (n, 28, 28) of probabilities, and {}; in training [] and the losses."""
        if self.training:
            proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        logits, regressed = self.box_predictor(self.box_head(self.box_roi_pool(maps, proposals, image_sizes)))
        if not self.training:
            found = [dict(zip(("boxes", "scores", "labels"), f)) for f in zip(
                *self.postprocess_detections(logits, regressed, proposals, image_sizes))]
            masks = self.masks(maps, [f["boxes"] for f in found], image_sizes, torch.cat([f["labels"] for f in found]))
            for f, m in zip(found, masks.sigmoid().split([len(f["boxes"]) for f in found])):
                f["masks"] = m
            return found, {}
        losses = self.box_losses(logits, regressed, torch.cat(proposals), torch.cat(labels), torch.cat(offsets))
        positive = [torch.where(y > 0)[0] for y in labels]
        boxes = [b[i] for b, i in zip(proposals, positive)]
        predicted = self.masks(maps, boxes, image_sizes, torch.cat([y[i] for y, i in zip(labels, positive)]))  # (n, 28, 28)
        true = [mask_targets(t["masks"], b, m[i]) for t, m, i, b in zip(targets, matched, positive, boxes) if len(i)]
        losses["loss/mask"] = (F.binary_cross_entropy_with_logits(predicted, torch.cat(true)) if true
                               else 0 * predicted.sum())
        return [], losses

    def masks(self, maps, boxes, image_sizes, labels):
        """Logits of the masks of labels (n,) in boxes, n over all images -> (n, 28, 28)."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes, image_sizes)))  # (n, K + 1, 28, 28)
        return logits[torch.arange(len(labels), device=labels.device), labels]

    def box_losses(self, logits, regressed, boxes, labels, offsets):
        """logits (n, K + 1), regressed (n, 4K + 4), boxes (n, 4), labels (n,), offsets (n, 4) from boxes to the true ones."""
        rows = torch.where(labels > 0)[0]
        regressed, offsets, boxes = regressed.unflatten(1, (-1, 4))[rows, labels[rows]], offsets[rows], boxes[rows]
        if self.box_loss == "l1":
            loss = F.l1_loss(regressed, offsets, reduction="sum")
        else:
            loss = 10 * generalized_box_iou_loss(self.box_coder.decode_single(regressed, boxes),
                                                 self.box_coder.decode_single(offsets, boxes), reduction="sum")
        return {"loss/class": F.cross_entropy(logits, labels), "loss/box": loss / len(labels)}


class MaskRCNN(nn.Module):
    """Backbone, pyramid, torchvision's RPN and the heads; arguments as in `Config`."""

    def __init__(self, style="taps", img_size=800, table=(42, 68), patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 drop_path=0.2, layer_scale=False, window=14, checkpointing=False, channels=256, box_head="4conv1fc",
                 box_loss="giou", proposals=(2000, 2000), regions=512, num_classes=80):
        super().__init__()
        C, K, S, vitdet = channels, num_classes, img_size, style == "vitdet"
        self.backbone = Backbone(style, img_size, table, patch_size, embed_dim, depth, num_heads, drop_path, layer_scale,
                                 window, checkpointing)
        self.pyramid = (SimplePyramid if vitdet else TapPyramid)(embed_dim, C)
        # Images come normalised and, in training, resized. The divisor keeps strides whole: torchvision divides sizes to
        # find them, and of 800 rows, which are 13 in the coarsest map, it would make 61 instead of 64.
        self.transform = GeneralizedRCNNTransform(S, S if vitdet else S * 5 // 3, [0.0] * 3, [1.0] * 3, _skip_resize=True,
                                                  size_divisible=S if vitdet else 4 * patch_size)
        anchors = AnchorGenerator(tuple((2 * patch_size * 2 ** i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
        self.rpn = RegionProposalNetwork(
            anchors, RPNHead(C, 3, conv_depth=2 if vitdet else 1), fg_iou_thresh=0.7, bg_iou_thresh=0.3,
            batch_size_per_image=256, positive_fraction=0.5, nms_thresh=0.7,
            pre_nms_top_n=dict(training=proposals[0], testing=min(1000, proposals[0])),
            post_nms_top_n=dict(training=proposals[1], testing=min(1000, proposals[1])))
        norm = norm_2d if vitdet else nn.BatchNorm2d
        self.heads = Heads(
            RegionPool(7, patch_size), FastRCNNConvFCHead((C, 7, 7), [C] * 4, [4 * C], norm) if box_head == "4conv1fc"
            else TwoMLPHead(49 * C, 4 * C), FastRCNNPredictor(4 * C, K + 1), fg_iou_thresh=0.5, bg_iou_thresh=0.5,
            batch_size_per_image=regions, positive_fraction=0.25, bbox_reg_weights=None, score_thresh=0.05, nms_thresh=0.5,
            detections_per_img=100, mask_roi_pool=RegionPool(14, patch_size),
            mask_head=MaskRCNNHeads(C, [C] * 4, 1, norm_2d if vitdet else None), mask_predictor=MaskRCNNPredictor(C, C, K + 1))
        self.heads.box_loss = box_loss
        for layer, std in ((self.heads.box_predictor.cls_score, 0.01), (self.heads.box_predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def run(self, imgs, targets=None):
        """imgs: list of (3, H, W) -> detections in the size of the model's input, losses, those sizes."""
        images, targets = self.transform(imgs, targets)
        maps = self.pyramid(self.backbone(images.tensors))
        with torch.autocast(images.tensors.device.type, enabled=False):
            maps = OrderedDict((name, x.float()) for name, x in maps.items())
            proposals, rpn = self.rpn(images, maps, targets)
            found, losses = self.heads(maps, proposals, images.image_sizes, targets)
        if rpn:
            losses = {"loss/objectness": rpn["loss_objectness"], "loss/proposal": rpn["loss_rpn_box_reg"]} | losses
        return found, losses, images.image_sizes

    def forward(self, imgs, targets):
        """imgs: list of (3, H, W), targets: list of boxes, masks, labels by name -> loss (), metrics: name -> ()."""
        losses = self.run(imgs, targets)[1]
        return sum(losses.values()), {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def detect(self, imgs):
        """imgs: list of (3, H, W) of any size -> per image boxes (n, 4) in its pixels, labels, scores, masks (n, 28, 28)."""
        found, _, sizes = self.run(imgs)
        for f, size, img in zip(found, sizes, imgs):
            f["boxes"] = resize_boxes(f["boxes"], size, img.shape[1:])
        return found

    def preview(self, imgs, targets):
        """Panels for preview.png: images, true instances, and what the model finds, of scores above a half."""
        panels = {"image": [], "instances": [], "prediction": []}
        size = [max(img.shape[i] for img in imgs) for i in (1, 2)]
        mean, std = common.mean_std(imgs[0].device)
        for img, target, found in zip(imgs, targets, self.detect(imgs)):
            sure = {k: v[found["scores"] > 0.5] for k, v in found.items()}
            sure["masks"] = paste(sure["masks"], sure["boxes"], img.shape[1:])
            raw = ((img * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            for panel, x in zip(panels.values(), (raw, *(paint(raw, f) for f in (target, sure)))):
                panel.append(F.pad(common.normalise(x, img.device), (0, size[1] - x.shape[2], 0, size[0] - x.shape[1])))
        return {title: torch.stack(panel) for title, panel in panels.items()}


def paint(img, found, texts=None):
    """Boxes and masks (n, H, W) over an image uint8 (3, H, W), a colour per label, with a text at each box -> such an image."""
    if not len(found["boxes"]):
        return img
    colours = [tuple(palette(254)[(y - 1) % 254].tolist()) for y in found["labels"].tolist()]
    for mask, colour in zip(found["masks"].bool().flip(0), colours[::-1]):  # the surest last; all at once, overlaps stay bare
        img = torchvision.utils.draw_segmentation_masks(img, mask, 0.5, colour)
    font = {}
    if texts:
        from matplotlib.font_manager import findfont  # its own font is there everywhere
        font = dict(labels=texts, font=findfont("DejaVu Sans"), font_size=14, label_colors="white", fill_labels=True)
    return torchvision.utils.draw_bounding_boxes(img, found["boxes"], colors=colours, width=1 + img.shape[1] // 400, **font)


# --- optimiser and schedule -------------------------------------------------------------------------------------------

def make_optimizer(model, cfg):
    """AdamW with a rate per layer; what is decayed is each style's published choice."""
    layers = partial(common.layer_groups, model, "backbone.", cfg.depth, cfg.layer_decay)
    if cfg.style == "taps":
        groups = layers(cfg.weight_decay, skip=())
    else:  # the type itself: ViTDet's own norm over channels is not in the list of norms of the published code
        spared = {p for m in model.modules() if type(m) is nn.LayerNorm for p in m.parameters()} | {model.backbone.pos_embed}
        groups = [dict(group, params=params, weight_decay=decay) for group in layers(0.0) for params, decay in (
            ([p for p in group["params"] if p in spared], 0.0),
            ([p for p in group["params"] if p not in spared], cfg.weight_decay)) if params]
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.adam_betas, fused=True)


def learning_rate(step, steps_per_epoch, cfg):
    """Linear warm-up from a thousandth; a tenth after each of `drops`."""
    lr = cfg.lr * 0.1 ** sum(step >= round(epoch * steps_per_epoch) for epoch in cfg.drops)
    return lr * (1 - (1 - step / cfg.warmup) * (1 - 1e-3)) if step < cfg.warmup else lr


# --- evaluation -------------------------------------------------------------------------------------------------------

def results(found, record, ids):
    """Detections of an image, with pasted masks (n, H, W) -> bbox and segm entries in COCO's format.

    Two lists: given both, pycocotools takes the box's area for the mask's.
    """
    boxes = found["boxes"].cpu().double()
    boxes[:, 2:] -= boxes[:, :2]  # x, y, width, height
    entries = [dict(image_id=record["id"], category_id=ids[y - 1], score=s) for y, s in zip(
        found["labels"].tolist(), found["scores"].tolist())]
    return ([dict(e, bbox=b) for e, b in zip(entries, boxes.tolist())],
            [dict(e, segmentation=m) for e, m in zip(entries, encode(found["masks"].cpu()) if entries else [])])


def average_precision(records, source, entries, kind):
    """pycocotools' twelve figures of kind bbox or segm: AP, AP50, AP75, small, medium, large, and six recalls."""
    if not entries:
        return [0.0] * 12
    annotations = [dict(a, image_id=r["id"]) for r in records for a in r["annotations"]]
    truth = COCO()
    truth.dataset = dict(images=[{k: r[k] for k in ("id", "height", "width")} for r in records],
                         annotations=[dict(a, id=i + 1) for i, a in enumerate(annotations)],  # 0 would be "no match"
                         categories=[dict(id=i, name=name) for i, name in zip(source.ids, source.classes)])
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        measure = COCOeval(truth, truth.loadRes(entries), kind)
        measure.evaluate()
        measure.accumulate()
        measure.summarize()
    return measure.stats.tolist()


def evaluation(cfg, source):
    """The `evaluate` that `common.train` calls: AP over `source`; out_dir/results_{bbox,segm}.json are what it is of.

    Images that cannot be read are named and left out; `val_images` counts the others.
    """
    n = min(cfg.eval_images or len(source), len(source))
    records = [source.record(i) for i in range(n)] if common.RANK == 0 else []

    def evaluate(model, device, autocast, due):
        if not due(cfg.eval_every):
            return {}
        if dist.is_initialized():  # on CPU batch statistics differ between processes; the first one's are those saved
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        mine = []
        for i in range(n)[common.RANK::common.WORLD]:
            try:
                img = v2.functional.pil_to_tensor(source.image(i))
            except Exception as error:  # broken files raise nearly anything
                common.complain_of(source.name(i), f"{type(error).__name__}: {error}")
                continue
            with autocast:
                found = model.detect([common.normalise(img, device)])[0]
            found["masks"] = paste(found["masks"], found["boxes"], img.shape[1:])
            mine.append((i, *results(found, source.record(i), source.ids)))
        everything = sorted(sum(common.gather(mine), []), key=lambda item: item[0])
        if not everything:
            common.fail(f"--data {cfg.data}: none of the {n} validation images could be read, e.g. {source.name(0)}")
        figures = measure(everything) if common.RANK == 0 else None
        return common.gather(figures)[0]

    def measure(everything):
        figures, rest, seen = {}, {}, [records[i] for i, *_ in everything]
        for j, (kind, name) in enumerate((("bbox", "APb"), ("segm", "APm")), 1):
            entries = [e for item in everything for e in item[j]]
            path = Path(cfg.out_dir) / f"results_{kind}.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(entries))
            except OSError as error:
                common.say(f"warning    cannot write {path.absolute()}: {error.strerror}")
            values = average_precision(seen, source, entries, kind)
            parts = ("", "50", "/75", "/small", "/medium", "/large")
            values = {k: 100 * v for k, v in zip(parts, values) if v >= 0}  # -1: there are no such instances
            figures |= {f"{name}{k}": values.pop(k, 0.0) for k in ("", "50")}
            rest |= {f"{name}{k}": v for k, v in values.items()}
        return figures | dict(val_images=len(seen)) | rest
    return evaluate


# --- the run ----------------------------------------------------------------------------------------------------------

SAVED = (*SIZES, "style", "img_size", "table", "layer_scale", "window", "channels", "box_head", "proposals", "num_classes")


def fit(cfg):
    """Config with the sizes of the file in --init, its weights, and the classes it has learnt if it is one of ours.

    Raises ValueError where the file holds no ViT, or its patches do not suit --img_size.
    """
    weights, side = {}, 14
    if cfg.init:
        weights, (state, config) = common.read_weights(cfg.init), common.header(cfg.init)
        if config.get("method") == "maskrcnn":
            common.check("classes" in state, f"{cfg.init} is to resume from; --init takes best.pt, which lies beside it")
            config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
            return dataclasses.replace(cfg, **{k: config[k] for k in SAVED}), weights, state["classes"]
        sizes = common.vit_sizes(weights, cfg.init)
        side = sizes["img_size"] // sizes["patch_size"]
    else:
        sizes = {k: getattr(cfg, k) or size for k, size in zip(SIZES, (16, 768, 12, 12))}
    table = cfg.table or ((side, side) if cfg.style == "vitdet" else (42, 68))
    return dataclasses.replace(cfg, **{k: sizes[k] for k in SIZES}, table=table), weights, []


def main():
    """Command line -> model -> training, evaluation, or one picture."""
    cfg = settle_places(common.parse(Config, RECIPES, __doc__, flag="recipe"))
    training, asked, out_dir = not (cfg.eval or cfg.predict), cfg.num_classes, Path(cfg.out_dir)
    try:
        cfg, weights, classes = fit(cfg)
        common.check(training or classes, f"--init {cfg.init} is no detection model; give a best.pt of this script")
        source = open_scenes(cfg, "train") if training else None
        val_source = None if cfg.predict else open_scenes(cfg, "val")
        if val_source:
            cfg = dataclasses.replace(cfg, num_classes=len(val_source.classes))
            common.check(asked in (0, cfg.num_classes),
                         f"--num_classes {asked}, but --data {cfg.data} has {cfg.num_classes}; leave the flag out")
        if training:
            common.check(list(source.classes) == list(val_source.classes) and list(source.ids) == list(val_source.ids),
                         f"training and validation set of --data {cfg.data} have different categories; make them the same")
        model = make_model(MaskRCNN, cfg, weights, classes, val_source.classes if val_source else classes)
    except ValueError as error:
        common.fail(str(error))
    device, autocast = common.setup(cfg)
    if cfg.predict:
        img = open_picture(cfg.predict)
        with autocast:
            found = model.to(device).eval().detect([common.normalise(img, device)])[0]
        sure, size = {k: v[found["scores"] > 0.5].cpu() for k, v in found.items()}, img.shape[1:]
        img = v2.functional.resize(img, 640, max_size=1280)  # the size of the picture; masks of a camera's fill the memory
        sure["boxes"] = resize_boxes(sure["boxes"], size, img.shape[1:])
        sure["masks"] = paste(sure["masks"], sure["boxes"], img.shape[1:])
        texts = [f"{classes[y - 1]} {s:.0%}" for y, s in zip(sure["labels"].tolist(), sure["scores"].tolist())]
        path = out_dir / f"{Path(cfg.predict).stem}_detected.png"
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            v2.functional.to_pil_image(paint(img, sure, texts)).save(path)
        except OSError as error:
            common.fail(f"--out_dir {path.absolute()} cannot be written: {error.strerror}")
        common.say(f"done       {path}: {', '.join(texts) or 'nothing found'}")
        return
    evaluate = evaluation(cfg, val_source)
    if cfg.eval:
        figures = evaluate(model.to(device).eval(), device, autocast, lambda epochs: True)
        common.say("  ".join(f"{k} {v:.6g}" for k, v in figures.items()) + f"; results in {out_dir / 'results_bbox.json'}")
        common.leave()
        return
    if not cfg.init:
        common.say("warning    no --init: the ViT starts from scratch, which needs a far longer training")
    if dist.is_initialized() and device.type == "cuda":  # SyncBatchNorm has no CPU version
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    common.train(cfg, model, samples=Scenes(source, cfg), optimizer=make_optimizer, schedule=learning_rate,
                 evaluate=evaluate)


if __name__ == "__main__":
    main()
