"""
Object detection and instance segmentation: Mask R-CNN on a plain ViT, in the two forms in which encoders are compared.

The model, `MaskRCNN`. D width, C channels, K classes; strides are those of patches of 16 pixels:
    --style taps (SdAE, DDAE, CAE): global attention, images of any size, 12 epochs
        taps = outputs of blocks 4, 6, 8, 12 of 12, without [CLS] and the final norm      # strides 16 16 16 16
        maps = FPN(taps at 4, 2, 1, and 1/2 times their resolution)                       # strides 4 8 16 32
    --style vitdet (DeepMIM, MAE): four blocks with global attention, the others in windows of 14 x 14; a square canvas
        maps = the last block's output at 4, 2, 1, and 1/2 times its resolution, each through 1x1 and 3x3 convolutions
    maps += [every second pixel of the coarsest]                                          # stride 64, for the RPN
    proposals = rpn(maps)                                                                 # (n, 4) per image
    classes, boxes = box_head(RoIAlign(maps, proposals))                                  # (n, K + 1), (n, 4K + 4)
    masks = mask_head(RoIAlign(maps, boxes))                                              # (n, K + 1, 28, 28)
    loss = CE(anchors) + smooth L1(anchors) + CE(classes) + 10 GIoU(boxes) or L1(offsets) + BCE(masks of positives)
The ViT and the pyramid may run in bf16. The heads never do: bf16 anchors are off by up to 4 pixels.

Data: `--data FOLDER` in COCO's layout, {train,val}2017/*.jpg and annotations/instances_{train,val}2017.json, with masks
as polygons, RLE, or compressed RLE; or `shapes`, generated. Crowds are not trained on, and ignored in evaluation as
pycocotools does. Images without instances are not trained on. APb and APm are pycocotools', in percent.

Easy to get wrong, or different in torchvision:
  - the strides that RoIAlign assumes are constants; torchvision infers them from the first batch, before padding
  - mask targets are cut out of the true masks with aligned RoIAlign and stay soft, and masks are pasted by bilinear
    sampling. True masks coded like this and back have 98.6 to 99.1 AP, with torchvision's coding 88 to 97. Trained with
    the quick preset, the two are equal, APm 26.7 and 26.9; larger models were not compared
  - masks are resized by the pixel at each center; torchvision's nearest moves them half a pixel off image and boxes
  - weight decay: ViTDet's on biases too, but not on the ViT's norms and position table; the other style's on all but
    vectors, and its position table is frozen
  - images of a micro-batch are padded to one size, to which the position table is resized, so the micro-batch matters:
    presets of style taps take the published 2. Published samplers also paired images of like orientation
  - the RPN's box loss is torchvision's, quadratic below 1/9, where the published code has L1
SdAE names CAE's setting, and DDAE SdAE's. So CAE's box head of four convolutions and its GIoU loss are the defaults,
though no text states them; `--box_head 2fc --box_loss l1` is MMDetection's base. CAE's layer scale and random crops are
left out. DeepMIM states only batch size, learning rates, and canvas; the rest is MAE's, whose setting it follows.

    python -m transfer.detect --preset quick --init out/quick/encoder.pt           # generated images, 2 CPU cores
    torchrun --nproc_per_node=8 -m transfer.detect --preset ddae --data COCO --init out/ddae/encoder.pt
    python -m transfer.detect --eval --data COCO --init out/detect/model.pt
    python -m transfer.detect --predict photo.jpg --init out/detect/model.pt       # photo_detected.png beside model.pt
"""
import contextlib
import io
import json
import math
import pickle
import sys
from collections import ChainMap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.checkpoint import checkpoint
from torchvision import ops, tv_tensors
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import anchor_utils, faster_rcnn, mask_rcnn, roi_heads, rpn, transform
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import common
import finetune
from ddae import Block, ViT, init_weights, patchify, sincos_pos_embed
from shapes import Shapes
from transfer import segment


@dataclass(frozen=True)
class Config(common.RunConfig):
    data: str = "shapes"  # [ours] folder in COCO's layout, or shapes (generated)
    init: str = ""  # [ours] encoder.pt, a ViT of MAE or timm, or model.pt of this file; sizes are taken from it
    out_dir: str = "out/detect"  # [ours] checkpoints, log, and pictures; with --eval or --predict: --init's folder
    eval: bool = False  # [ours] no training: AP of --init, by default out_dir's model.pt
    predict: str = ""  # [ours] no training: draw what --init, by default out_dir's model.pt, finds in this picture
    style: Literal["taps", "vitdet"] = "taps"  # [SdAE; DeepMIM] see above
    img_size: int = 800  # [SdAE] taps: largest shorter side, the longer is up to 5/3 of it; vitdet: side of the canvas
    scale: tuple[float, ...] = (0.6, 1.0)  # [SdAE] range of random sizes, times img_size; taps: steps of img_size / 25
    patch_size: int = 0  # [MAE] 0: as in --init, else 16
    embed_dim: int = 0  # [MAE] 0: as in --init, else 768
    depth: int = 0  # [MAE] 0: as in --init, else 12
    num_heads: int = 0  # [MAE] 0: as in --init, else 12
    table: tuple[int, ...] = (42, 68)  # [code: CAE] rows and columns of the position table; --init's is resized to it
    window: int = 14  # [code: ViTDet] vitdet: side of the windows, in patches
    drop_path: float = 0.2  # [code: CAE] largest fraction of samples that skip a branch, in the last block
    checkpointing: bool = False  # [code: CAE] recompute blocks in the backward pass: less memory, more time
    channels: int = 256  # [Mask R-CNN] width of pyramid and heads; fully connected layers are four times as wide
    box_head: Literal["4conv1fc", "2fc"] = "4conv1fc"  # [code: CAE, ViTDet] layers between a region, its class, its box
    box_loss: Literal["giou", "l1"] = "giou"  # [code: CAE] 10 GIoU of decoded boxes, or L1 of offsets
    proposals: tuple[int, ...] = (2000, 2000)  # [code: CAE] per level before NMS, per image after; evaluation: <= 1000
    regions: int = 512  # [Mask R-CNN] of them trained on per image, at most a quarter of them positive
    num_classes: int = 0  # [ours] 0: as many as --data has
    epochs: int = 12  # [SdAE, AAAI] passes over the training images
    drops: tuple[float, ...] = (9.0, 11.0)  # [SdAE] epochs after which the learning rate falls to a tenth
    warmup: int = 500  # [code: CAE] steps of linear warm-up from a thousandth
    batch_size: int = 32  # [SdAE] images per optimizer step, over all processes
    lr: float = 3e-4  # [SdAE] learning rate of the heads, not scaled by the batch size
    layer_decay: float = 0.75  # [SdAE, DeepMIM] factor from each layer to the one below
    weight_decay: float = 0.05  # [code: CAE] see above for what is not decayed
    adam_betas: tuple[float, ...] = (0.9, 0.999)  # [code: CAE, ViTDet] AdamW's two moments
    eval_every: float = 1.0  # [ours] epochs between evaluations; 0: never
    eval_images: int = 0  # [ours] validation images to use; 0: all

    def __post_init__(self):
        super().__post_init__()
        assert self.drop_path < 1, f"--drop_path must be below 1, got {self.drop_path}"
        assert len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1], "--scale takes low and high"
        assert len(self.table) == len(self.proposals) == 2 and min(self.table + self.proposals) > 0, \
            "--table and --proposals take two positive numbers each"
        p, D, heads = self.patch_size or 4, self.embed_dim, self.num_heads or 1
        assert p % 4 == 0, f"patches of {p} pixels are not divisible by 4, so the finest map would have no whole stride"
        assert self.style == "taps" or self.img_size % (4 * p) == 0, \
            f"--img_size {self.img_size} is not divisible by {4 * p}, the coarsest stride with patches of {p} pixels"
        assert D % 4 == D % heads == 0, f"--embed_dim {D} must be divisible by 4 and by --num_heads {heads}"


VITDET = dict(style="vitdet", img_size=1024, scale=(0.1, 2.0), table=(14, 14), box_loss="l1", proposals=(2000, 1000),
              epochs=100, drops=(88.889, 96.296), warmup=250, lr=1e-4, weight_decay=0.1, drop_path=0.1, eval_every=10)
PRESETS = {
    "ddae": dict(micro_batch=2),
    "sdae": dict(micro_batch=2),
    "deepmim": dict(VITDET, batch_size=16),
    "mae": dict(VITDET, batch_size=64, layer_decay=0.7),
    "quick": dict(img_size=64, patch_size=4, embed_dim=96, depth=4, num_heads=3, table=(16, 16), drop_path=0.0,
                  channels=32, box_head="2fc", box_loss="l1", proposals=(200, 200), regions=32, epochs=1, drops=(0.2,),
                  warmup=20, batch_size=8, lr=2e-3, layer_decay=0.9, max_steps=300, eval_every=0.24, eval_images=100,
                  out_dir="out/quick_detect"),
}


# --- data -------------------------------------------------------------------------------------------------------------
# source[i] -> PIL image, record: its line in the JSON file with its annotations, their masks as compressed RLE.
# source.ids: category ids of the labels 1 to K.

class Coco:
    """COCO's folder layout. Annotations without a usable box or mask are left out."""

    def __init__(self, root, split):
        path = root / "annotations" / f"instances_{split}2017.json"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                coco = COCO(path)
            self.ids = sorted(coco.cats)
            self.classes = [f"{i} {coco.cats[i]['name']}" for i in self.ids]  # with ids, so that resuming compares them
            records = [{k: image[k] for k in ("id", "file_name", "height", "width")} for image in coco.imgs.values()]
            for record in records:
                annotations = [usable(a, record, self.ids) for a in coco.imgToAnns[record["id"]]]
                record["annotations"] = [a for a in annotations if a]
        except Exception as error:  # wrong types raise nearly anything
            sys.exit(f"--data {path.absolute()}: missing or no COCO instances: {type(error).__name__}: {error}")
        total, kept = len(coco.dataset.get("annotations", [])), sum(len(r["annotations"]) for r in records)
        if kept < total:
            common.print0(f"warning: {total - kept} of {total} annotations in {path} are left out: no usable box or "
                          "mask, or an unknown category or image")
        if split == "train":
            records = [r for r in records if not all(a["iscrowd"] for a in r["annotations"])]
        if not any(r["annotations"] for r in records):
            sys.exit(f"--data {path.absolute()}: no image has a usable instance")
        self.samples = [(str(root / f"{split}2017" / r["file_name"]),) for r in records]
        # One array of bytes: reference counts would copy millions of small objects into every data worker.
        blobs = [pickle.dumps(r) for r in records]
        self.blob, self.ends = np.frombuffer(b"".join(blobs), np.uint8), np.cumsum([0, *map(len, blobs)])

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return Image.open(self.samples[i][0]), pickle.loads(self.blob[self.ends[i]:self.ends[i + 1]].tobytes())


class Stars(Shapes):
    """Generated pictures. The visible part of each star is an instance."""
    ids = range(1, 1 + len(Shapes.classes))
    classes = [f"{i} {name}" for i, name in enumerate(Shapes.classes, 1)]

    def __getitem__(self, i):
        image, masks, labels = self.scene(i)
        annotations = [dict(image_id=i, category_id=self.ids[label], bbox=rle.toBbox(code).tolist(), iscrowd=0,
                            area=float(rle.area(code)), segmentation=code)
                       for code, label in zip(encode(masks), labels) if rle.area(code)]
        return Image.fromarray(image), dict(id=i, height=self.size, width=self.size, annotations=annotations)


def open_scenes(cfg, split):
    """Images and annotations of --data for `split`, "train" or "val"."""
    return Stars(split, cfg.img_size) if cfg.data == "shapes" else Coco(Path(cfg.data), split)


def usable(annotation, record, ids):
    """Entry of the JSON file -> the same with its mask as compressed RLE; None for a wrong category, box, or mask."""
    try:
        ids.index(annotation["category_id"])
        x, y, width, height = map(float, annotation["bbox"])
        code = to_rle(annotation["segmentation"], record["height"], record["width"])
        area = annotation.get("area") or float(rle.area(code))
        good = width > 0 and height > 0 and math.isfinite(x + y + width + height)
        return dict(annotation, segmentation=code, area=area, iscrowd=annotation.get("iscrowd", 0)) if good else None
    except Exception:  # wrong types raise nearly anything
        return None


def to_rle(segmentation, H, W):
    """Polygons, RLE, or compressed RLE -> compressed RLE as in JSON. Raises if it is no mask of H x W pixels."""
    if isinstance(segmentation, list):
        polygons = [p for p in segmentation if len(p) >= 6]  # three corners; pycocotools takes four numbers for a box
        if not np.abs(np.concatenate(polygons)).max() < 4 * max(H, W):
            raise ValueError("a corner far outside the image")  # pycocotools walks there, and runs out of memory
        code = rle.merge(rle.frPyObjects(polygons, H, W))
    else:
        plain = isinstance(segmentation["counts"], list)
        runs = segmentation["counts"] if plain else run_lengths(segmentation["counts"])
        if list(segmentation["size"]) != [H, W] or min(runs) < 0 or sum(runs) != H * W:
            raise ValueError("the runs do not fill the image")  # pycocotools would decode uninitialized memory
        code = rle.frPyObjects(segmentation, H, W) if plain else segmentation
    counts = code["counts"]
    return dict(size=[H, W], counts=counts if isinstance(counts, str) else counts.decode())


def run_lengths(counts):
    """Counts of a compressed RLE -> run lengths. [code: pycocotools, rleFrString]

    5 bits per character, the lowest first, and a sixth if more follow; from the fourth on, differences from two before.
    """
    runs, value, shift = [], 0, 0
    for byte in counts.encode():
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits >> 4 & 1) << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return [-1] if shift else runs  # -1: cut off within a number


def encode(masks):
    """bool (n, H, W) -> list of compressed RLE."""
    codes = rle.encode(np.asfortranarray(np.asarray(masks, np.uint8).transpose(1, 2, 0)))
    return [dict(code, counts=code["counts"].decode()) for code in codes]


def instances(record, ids):
    """Record -> what is trained on, no crowds: boxes xyxy (n, 4), masks uint8 (n, H, W), labels (n,) from 1."""
    things, size = [a for a in record["annotations"] if not a["iscrowd"]], (record["height"], record["width"])
    boxes = torch.tensor([a["bbox"] for a in things], dtype=torch.float32).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = np.zeros((len(things), *size), np.uint8)
    for mask, a in zip(masks, things):
        mask[:] = rle.decode(a["segmentation"])
    return dict(boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size), masks=tv_tensors.Mask(masks),
                labels=torch.tensor([ids.index(a["category_id"]) + 1 for a in things], dtype=torch.int64))


class Scenes(common.Samples):
    """Training samples by key (epoch, index)."""

    def __init__(self, source, cfg):
        self.source, self.cfg = source, cfg
        S, (low, high) = cfg.img_size, cfg.scale
        if cfg.style == "taps":
            sides = list(range(round(S * low), round(S * high) + 1, max(1, S // 25)))
            self.resize = v2.RandomShortestSize(sides, S * 5 // 3, antialias=False)
        else:
            self.resize = v2.ScaleJitter((S, S), (low, high), antialias=False)
        self.flip = v2.RandomHorizontalFlip()
        self.tidy = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])

    def read(self, index):
        """-> image uint8 (3, H, W), record."""
        image, record = self.source[index]
        size = record["width"], record["height"]
        if image.size != size or max(size) > self.cfg.scale[0] * self.cfg.img_size * min(size):
            raise ValueError(f"{image.size} pixels; the annotations say {size}, or one side is too short to be resized")
        return common.to_rgb(image), record

    def sample(self, item, rng):
        """-> image uint8 (3, h, w), what `instances` says of it; with style vitdet at most img_size x img_size."""
        img, target = tv_tensors.Image(item[0]), instances(item[1], self.source.ids)
        masks = target.pop("masks").as_subclass(torch.Tensor)
        img, target = self.resize(img, target)
        masks = v2.functional.resize(masks, list(img.shape[1:]), InterpolationMode.NEAREST_EXACT)
        img, target = self.flip(img, dict(target, masks=tv_tensors.Mask(masks)))
        if self.cfg.style == "vitdet":
            (H, W), S = img.shape[1:], self.cfg.img_size
            top, left = rng.integers(max(H - S, 0) + 1), rng.integers(max(W - S, 0) + 1)
            img, masks = img[:, top:top + S, left:left + S], target["masks"][:, top:top + S, left:left + S]
            seen = masks.flatten(1).any(1).bool()
            boxes = ops.masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])  # torchvision's end at the last pixel
            target = dict(boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=img.shape[1:]),
                          masks=tv_tensors.Mask(masks[seen]), labels=target["labels"][seen])
        target = self.tidy(target)
        return img.as_subclass(torch.Tensor), {k: v.as_subclass(torch.Tensor) for k, v in target.items()}

    def collate(self, batch):
        """-> lists of images, which differ in size, and of their instances, and the unreadable files."""
        samples, bad = zip(*batch)
        return *map(list, zip(*samples)), dict(ChainMap(*bad))


# --- backbone ---------------------------------------------------------------------------------------------------------

class WindowedBlock(Block):
    """Block on a square grid of `side` x `side` tokens: attention within windows, or global if window is 0.

    Attention logits get query * (row vector + column vector of the offset), initially 0: decomposed relative position.
    """

    def __init__(self, dim, num_heads, drop_path, side, window):
        super().__init__(dim, num_heads, drop_path)
        self.side, self.window = side, window if 0 < window < side else side
        for name in ("rel_pos_h", "rel_pos_w"):
            self.register_parameter(name, nn.Parameter(torch.zeros(2 * self.window - 1, dim // num_heads)))

    def attend(self, x):  # (B, side * side, D)
        (B, _, D), n, side = x.shape, self.window, self.side
        count = -(-side // n)  # windows per side; the last are padded with zeros, which are attended to
        padding = count * n - side
        x = F.pad(x.view(B, side, side, D), (0, 0, 0, padding, 0, padding))
        x = x.view(B, count, n, count, n, D).transpose(2, 3).reshape(-1, n * n, D)  # (B * windows, n*n, D)
        q, k, v = self.attn.qkv(x).reshape(len(x), n * n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # heads first
        offset = torch.arange(n, device=x.device)
        offset = offset[:, None] - offset + n - 1  # (n, n): query - key
        grid = q.unflatten(2, (n, n))
        rows = torch.einsum("bhyxd,yjd->bhyxj", grid, self.rel_pos_h[offset].to(q.dtype))
        cols = torch.einsum("bhyxd,xjd->bhyxj", grid, self.rel_pos_w[offset].to(q.dtype))
        bias = (rows.unsqueeze(-1) + cols.unsqueeze(-2)).flatten(4).flatten(2, 3)  # (B * windows, heads, n*n, n*n)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(x.shape)
        x = self.attn.proj(x).view(B, count, count, n, n, D).transpose(2, 3).reshape(B, count * n, count * n, D)
        return x[:, :side, :side].reshape(B, -1, D)


class Backbone(ViT):
    """The shared ViT -> maps of four taps; with style vitdet, which has no [CLS], of the last block alone."""

    def __init__(self, cfg):
        D, depth, heads, p, vitdet = cfg.embed_dim, cfg.depth, cfg.num_heads, cfg.patch_size, cfg.style == "vitdet"
        super().__init__(p, p, D, depth, heads, cfg.drop_path)
        self.grid, self.checkpointing = tuple(cfg.table), cfg.checkpointing
        self.pos_embed = nn.Parameter(sincos_pos_embed(D, self.grid), requires_grad=vitdet)
        del self.norm  # the maps do not pass it
        self.taps = [depth] if vitdet else [max(1, round(depth * tap / 12)) for tap in (4, 6, 8, 12)]
        if vitdet:
            del self.cls_token
            everywhere = [max(1, round(depth * i / 4)) - 1 for i in (1, 2, 3, 4)]
            windows = [0 if i in everywhere else cfg.window for i in range(depth)]
            self.blocks = nn.ModuleList(WindowedBlock(D, heads, block.drop_path, cfg.img_size // p, window)
                                        for block, window in zip(self.blocks, windows)).apply(init_weights)

    def forward(self, imgs):
        """imgs (B, 3, H, W), H and W multiples of the patch size -> maps (B, D, h, w)."""
        p, cls, pos = self.patch_size, self.pos_embed[:, :1], self.pos_embed[:, 1:]  # (1, 1, D), (1, N, D)
        grid = (imgs.shape[2] // p, imgs.shape[3] // p)
        if grid != self.grid:
            pos = pos.transpose(1, 2).unflatten(2, self.grid)  # (1, D, rows, columns)
            pos = F.interpolate(pos, grid, mode="bicubic").flatten(2).transpose(1, 2)  # (1, h*w, D)
        x = self.embed(patchify(imgs, p)) + pos  # (B, N, D)
        if hasattr(self, "cls_token"):
            x = torch.cat(((self.cls_token + cls).expand(len(x), -1, -1), x), 1)  # (B, 1 + N, D)
        outputs = []
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
            outputs.append(x)
        N = grid[0] * grid[1]
        return [outputs[tap - 1][:, -N:].transpose(1, 2).unflatten(2, grid) for tap in self.taps]


norm_2d = partial(LayerNorm2d, eps=1e-6)


class TapPyramid(nn.Module):
    """Four taps -> the four scales -> torchvision's FPN -> five maps (B, C, h, w) by name."""

    def __init__(self, D, C):
        super().__init__()
        self.scales = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(D, D, 2, 2), nn.BatchNorm2d(D), nn.GELU(), nn.ConvTranspose2d(D, D, 2, 2)),
            nn.ConvTranspose2d(D, D, 2, 2), nn.Identity(), nn.MaxPool2d(2)])
        self.fpn = ops.FeaturePyramidNetwork([D] * 4, C, ops.feature_pyramid_network.LastLevelMaxPool())

    def forward(self, taps):
        return self.fpn({str(i): scale(tap) for i, (scale, tap) in enumerate(zip(self.scales, taps))})


class SimplePyramid(nn.Module):
    """ViTDet's: the last map -> four scales, independent of each other -> five maps (B, C, h, w) by name."""

    def __init__(self, D, C):
        super().__init__()
        half, quarter = nn.ConvTranspose2d(D, D // 2, 2, 2), nn.ConvTranspose2d(D // 2, D // 4, 2, 2)
        again = nn.ConvTranspose2d(D, D // 2, 2, 2)
        scales = [half, norm_2d(D // 2), nn.GELU(), quarter], [again], [], [nn.MaxPool2d(2)]
        self.levels = nn.ModuleList(
            nn.Sequential(*scale, nn.Conv2d(width, C, 1, bias=False), norm_2d(C),
                          nn.Conv2d(C, C, 3, padding=1, bias=False), norm_2d(C))
            for scale, width in zip(scales, (D // 4, D // 2, D, D)))

    def forward(self, taps):
        maps = [level(taps[0]) for level in self.levels]
        return dict(zip(("0", "1", "2", "3", "pool"), (*maps, F.max_pool2d(maps[-1], 1, 2))))


# --- heads ------------------------------------------------------------------------------------------------------------

def region_pool(maps, boxes, image_sizes, size, patch_size):
    """Aligned RoIAlign of boxes, each at the level for its size: maps by name, per image (n, 4) -> (n, C, size, size).

    torchvision's MultiScaleRoIAlign is not aligned: it reads half a pixel of the map away.
    """
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])  # (n, 5): number of the image, box
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    levels = (side / (14 * patch_size) + 1e-8).log2().floor().add(2).clamp(0, 3)  # level 2 from 14 patches on
    pooled = rois.new_zeros(len(rois), maps["0"].shape[1], size, size)
    for level in range(4):
        here, scale = torch.where(levels == level)[0], 2 ** (2 - level) / patch_size
        pooled[here] = ops.roi_align(maps[str(level)], rois[here], size, scale, aligned=True)
    return pooled


def mask_targets(masks, boxes, index=None, size=28):
    """Part of masks (m, H, W) in boxes (n, 4), fractions in [0, 1]; index (n,): whose mask -> (n, size, size)."""
    index = torch.arange(len(boxes), device=boxes.device) if index is None else index
    rois = torch.cat((index[:, None].to(boxes), boxes), 1)
    return ops.roi_align(masks[:, None].float(), rois, size, 1.0, 0, True)[:, 0]


def paste(masks, boxes, size):
    """Put masks (n, 28, 28) of probabilities into their boxes (n, 4) in an image of (H, W) -> bool (n, H, W)."""
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    step = max(1, 2 ** 24 // (size[0] * size[1]))  # at most 200 MB at a time
    for i in range(0, len(masks), step):
        left, top, right, bottom = boxes[i:i + step].T[..., None]  # (n, 1) each
        y = (torch.arange(size[0], device=boxes.device) + 0.5 - top) / (bottom - top) * 2 - 1  # (n, H), -1 to 1
        x = (torch.arange(size[1], device=boxes.device) + 0.5 - left) / (right - left) * 2 - 1  # (n, W)
        grid = torch.stack((x[:, None].expand(-1, size[0], -1), y[..., None].expand(-1, -1, size[1])), -1)
        pasted[i:i + step] = F.grid_sample(masks[i:i + step, None], grid, align_corners=False)[:, 0] >= 0.5
    return pasted


class Heads(roi_heads.RoIHeads):
    """torchvision's RoIHeads with other losses of boxes and masks."""
    box_loss = "l1"

    def forward(self, maps, proposals, image_sizes, targets=None):
        """-> per image boxes, labels, scores, masks (n, 1, 28, 28), and {}; in training [] and losses by name."""
        if not self.training:
            return super().forward(maps, proposals, image_sizes)
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        logits, regressed = self.box_predictor(self.box_head(self.box_roi_pool(maps, proposals, image_sizes)))
        losses = self.box_losses(logits, regressed, torch.cat(proposals), torch.cat(labels), torch.cat(offsets))
        positive = [torch.where(y > 0)[0] for y in labels]
        boxes, matched, labels = ([x[i] for x, i in zip(xs, positive)] for xs in (proposals, matched, labels))
        pred = self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes, image_sizes)))  # (n, K + 1, 28, 28)
        pred = pred[torch.arange(len(pred), device=pred.device), torch.cat(labels)]  # (n, 28, 28)
        true = [mask_targets(t["masks"], b, m) for t, b, m in zip(targets, boxes, matched) if len(b)]
        losses["loss/mask"] = F.binary_cross_entropy_with_logits(pred, torch.cat(true)) if true else 0 * pred.sum()
        return [], losses

    def box_losses(self, logits, regressed, boxes, labels, offsets):
        """logits (n, K + 1), regressed (n, 4K + 4), labels (n,), offsets (n, 4) from boxes (n, 4) to the true ones."""
        rows = torch.where(labels > 0)[0]
        regressed, offsets, boxes = regressed.unflatten(1, (-1, 4))[rows, labels[rows]], offsets[rows], boxes[rows]
        if self.box_loss == "l1":
            loss = F.l1_loss(regressed, offsets, reduction="sum")
        else:
            pred, true = (self.box_coder.decode_single(x, boxes) for x in (regressed, offsets))
            loss = 10 * ops.generalized_box_iou_loss(pred, true, reduction="sum")
        return {"loss/class": F.cross_entropy(logits, labels), "loss/box": loss / len(labels)}


class MaskRCNN(nn.Module):
    """Backbone, pyramid, torchvision's RPN, and the heads."""

    def __init__(self, cfg):
        super().__init__()
        C, K, S, p, vitdet = cfg.channels, cfg.num_classes, cfg.img_size, cfg.patch_size, cfg.style == "vitdet"
        self.backbone = Backbone(cfg)
        self.pyramid = (SimplePyramid if vitdet else TapPyramid)(cfg.embed_dim, C)
        # Images come normalized and, in training, resized. The divisor keeps strides whole: torchvision divides sizes
        # to find them, and 800 rows, which are 13 in the coarsest map, would give 61 instead of 64.
        self.transform = transform.GeneralizedRCNNTransform(
            S, S if vitdet else S * 5 // 3, [0.0] * 3, [1.0] * 3, _skip_resize=True,
            size_divisible=S if vitdet else 4 * p)
        anchors = anchor_utils.AnchorGenerator(tuple((2 * p * 2 ** i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
        before, after = (dict(training=n, testing=min(1000, n)) for n in cfg.proposals)  # NMS
        self.rpn = rpn.RegionProposalNetwork(
            anchors, rpn.RPNHead(C, 3, conv_depth=2 if vitdet else 1), fg_iou_thresh=0.7, bg_iou_thresh=0.3,
            batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=before, post_nms_top_n=after, nms_thresh=0.7)
        box_norm, mask_norm = (norm_2d, norm_2d) if vitdet else (nn.BatchNorm2d, None)
        if cfg.box_head == "2fc":
            box_head = faster_rcnn.TwoMLPHead(49 * C, 4 * C)
        else:
            box_head = faster_rcnn.FastRCNNConvFCHead((C, 7, 7), [C] * 4, [4 * C], box_norm)
        self.heads = Heads(
            partial(region_pool, size=7, patch_size=p), box_head, faster_rcnn.FastRCNNPredictor(4 * C, K + 1),
            mask_roi_pool=partial(region_pool, size=14, patch_size=p),
            mask_head=mask_rcnn.MaskRCNNHeads(C, [C] * 4, 1, mask_norm),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(C, C, K + 1), fg_iou_thresh=0.5, bg_iou_thresh=0.5,
            batch_size_per_image=cfg.regions, positive_fraction=0.25, bbox_reg_weights=None, score_thresh=0.05,
            nms_thresh=0.5, detections_per_img=100)
        self.heads.box_loss = cfg.box_loss
        for layer, std in ((self.heads.box_predictor.cls_score, 0.01), (self.heads.box_predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def run(self, imgs, targets=None):
        """imgs: list of (3, H, W) -> detections in the size of the model's input, losses, those sizes."""
        images, targets = self.transform(imgs, targets)
        maps = self.pyramid(self.backbone(images.tensors))
        with torch.autocast(images.tensors.device.type, enabled=False):
            maps = {name: x.float() for name, x in maps.items()}
            proposals, rpn_losses = self.rpn(images, maps, targets)
            found, losses = self.heads(maps, proposals, images.image_sizes, targets)
        losses = {f"loss/{k.removeprefix('loss_')}": v for k, v in rpn_losses.items()} | losses
        return found, losses, images.image_sizes

    def forward(self, imgs, targets):
        """imgs: list of (3, H, W), targets: list of boxes, masks, labels by name -> loss (), metrics: name -> ()."""
        losses = self.run(imgs, targets)[1]
        return sum(losses.values()), {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def detect(self, imgs):
        """imgs: list of (3, H, W) -> per image boxes (n, 4) in its pixels, labels, scores, masks (n, 28, 28)."""
        found, _, sizes = self.run(imgs)
        for f, size, img in zip(found, sizes, imgs):
            f["boxes"], f["masks"] = transform.resize_boxes(f["boxes"], size, img.shape[1:]), f["masks"][:, 0]
        return found

    def preview(self, imgs, targets):
        """Panels for preview.png: images, true instances, and detections."""
        panels, size = {"image": [], "instances": [], "prediction": []}, [max(x) for x in zip(*(i.shape for i in imgs))]
        mean, std = common.mean_std(imgs[0].device)
        for img, target, found in zip(imgs, targets, self.detect(imgs)):
            raw = (img * std + mean).clamp(0, 1)
            for panel, x in zip(panels.values(), (raw, paint(raw, target), paint(raw, found))):
                panel.append(F.pad((x - mean) / std, (0, size[2] - x.shape[2], 0, size[1] - x.shape[1])))
        return {title: torch.stack(panel) for title, panel in panels.items()}


def paint(img, found, classes=None):
    """Draw instances, or detections of scores above a half, with names if given, over an image (3, H, W) -> image."""
    from matplotlib.font_manager import findfont
    if "scores" in found:
        found = {k: v[found["scores"] > 0.5] for k, v in found.items()}
        found["masks"] = paste(found["masks"], found["boxes"], img.shape[1:])
    if not len(found["boxes"]):
        return img
    labels = found["labels"].tolist()
    colors = [tuple(segment.palette(254)[(y - 1) % 254].tolist()) for y in labels]
    for mask, color in reversed(list(zip(found["masks"].bool(), colors))):  # the surest on top
        img = draw_segmentation_masks(img, mask, 0.5, color)
    names = [classes[y - 1].partition(" ")[2] for y in labels] if classes else None  # without the category id
    return draw_bounding_boxes(img, found["boxes"], names, colors, width=1 + img.shape[1] // 400, fill_labels=True,
                               font=findfont("DejaVu Sans"), font_size=14, label_colors="white" if names else None)


# --- optimizer and schedule -------------------------------------------------------------------------------------------

def make_optimizer(model, cfg):
    """AdamW with layer-wise learning rates. What is decayed is each style's published choice."""
    groups = finetune.layer_groups(model, "backbone.", cfg.depth, cfg.layer_decay, cfg.weight_decay, skip=())
    if cfg.style == "vitdet":  # the published code decays the norms of pyramid and heads, which are of a subclass
        norms = [m for m in model.modules() if type(m) is nn.LayerNorm]
        spared = {model.backbone.pos_embed, *(p for m in norms for p in m.parameters())}
        groups = [dict(group, params=[p], weight_decay=0.0 if p in spared else cfg.weight_decay)
                  for group in groups for p in group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.adam_betas, fused=True)


def learning_rate(step, steps_per_epoch, cfg):
    """Linear warm-up from a thousandth; a tenth after each of `drops`."""
    lr = cfg.lr * 0.1 ** sum(step >= round(epoch * steps_per_epoch) for epoch in cfg.drops)
    return lr * (1 - (1 - step / cfg.warmup) * (1 - 1e-3)) if step < cfg.warmup else lr


# --- evaluation -------------------------------------------------------------------------------------------------------

def results(found, record, ids):
    """Detections in an image, with pasted masks (n, H, W) -> bbox and segm entries in COCO's format.

    Two lists: given both, pycocotools takes the box's area for the mask's.
    """
    boxes = ops.box_convert(found["boxes"].cpu().double(), "xyxy", "xywh")
    entries = [dict(image_id=record["id"], category_id=ids[y - 1], score=s) for y, s in zip(
        found["labels"].tolist(), found["scores"].tolist())]
    return ([dict(e, bbox=b) for e, b in zip(entries, boxes.tolist())],
            [dict(e, segmentation=m) for e, m in zip(entries, encode(found["masks"].cpu()) if entries else [])])


def average_precision(found, source):
    """Records with their bbox and segm entries -> pycocotools' APs by name, in percent."""
    metrics = dict(APb=0.0, APb50=0.0, APm=0.0, APm50=0.0, val_images=len(found))
    annotations, truth = [a for record, *_ in found for a in record["annotations"]], COCO()
    truth.dataset = dict(images=[record for record, *_ in found], categories=[dict(id=i) for i in source.ids],
                         annotations=[dict(a, id=i) for i, a in enumerate(annotations, 1)])  # 0 would mean "no match"
    for j, (kind, name) in enumerate((("bbox", "APb"), ("segm", "APm")), 1):
        entries = [e for item in found for e in item[j]]
        if not entries:
            return metrics
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            measure = COCOeval(truth, truth.loadRes(entries), kind)
            measure.evaluate()
            measure.accumulate()
            measure.summarize()
        for part, value in zip(("", "50", "/75", "/small", "/medium", "/large"), measure.stats.tolist()):
            if value >= 0:  # else there are no such instances
                metrics[name + part] = 100 * value
    return metrics


def evaluate(model, cfg, device, autocast, source):
    """AP over `source` -> metrics by name; out_dir/results_{bbox,segm}.json have the detections in COCO's format."""
    finetune.sync_buffers(model)
    ids, found = range(len(source))[:cfg.eval_images or None], []
    for (img, record), in finetune.read_each(Scenes(source, cfg).read, source, ids, cfg, batch_size=1):
        with autocast:
            detections = model.detect([common.to_device(img, {}, device)[0]])[0]
        detections["masks"] = paste(detections["masks"], detections["boxes"], img.shape[1:])
        found.append((record, *results(detections, record, source.ids)))
    found = sorted(sum(common.gather(found), []), key=lambda item: item[0]["id"])
    if common.RANK == 0:
        try:
            for j, kind in enumerate(("bbox", "segm"), 1):
                with common.replacing(Path(cfg.out_dir) / f"results_{kind}.json") as path:
                    path.write_text(json.dumps([e for item in found for e in item[j]]))
        except OSError as error:
            common.print0(f"warning: results not written: {error}")
    return common.gather(average_precision(found, source) if common.RANK == 0 else None)[0]


# --- the run ----------------------------------------------------------------------------------------------------------

def predict(model, cfg, classes, device, autocast):
    """--predict: draw boxes, masks, and names of what scores above a half."""
    img = segment.open_picture(cfg.predict)
    if max(img.shape[1:]) > 50 * min(img.shape[1:]):
        sys.exit(f"--predict {cfg.predict}: {img.shape[2]} x {img.shape[1]} pixels; resized, one side would vanish")
    with autocast:
        found = model.detect([common.to_device(img, {}, device)[0]])[0]
    size, found = img.shape[1:], {k: v.cpu() for k, v in found.items()}
    img = v2.functional.resize(img, 640, max_size=1280)  # the size of the drawing; masks of a camera's fill the memory
    found["boxes"] = transform.resize_boxes(found["boxes"], size, img.shape[1:])
    path = Path(cfg.out_dir) / f"{Path(cfg.predict).stem}_detected.png"
    with common.replacing(path) as temporary:
        v2.functional.to_pil_image(paint(img, found, classes)).save(temporary)
    common.print0(f"wrote {path}")


SAVED = (*segment.SIZES, "style", "img_size", "table", "window", "channels", "box_head", "proposals", "num_classes")


def main():
    segment.run(common.parse(Config, PRESETS, __doc__), MaskRCNN, SAVED, open_scenes, Scenes, make_optimizer,
                learning_rate, evaluate, predict)


if __name__ == "__main__":
    main()
