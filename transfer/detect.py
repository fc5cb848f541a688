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

Data: `--data FOLDER` in COCO's layout, {train,val}2017/*.jpg and annotations/instances_{train,val}2017.json, with masks
as polygons or RLE; or `shapes`, generated. Crowds and images without instances are not trained on; evaluation ignores
crowds as pycocotools does. APb and APm are pycocotools', in percent.

Easy to get wrong, or different in torchvision:
  - masks are cropped and pasted by torchvision, half a pixel off: true masks coded like this and back have 88 AP, with
    all aligned 99. Yet a model trained with the quick preset gains nothing by it: APm 26.7, and 26.9 as it is here
  - masks are resized by the pixel at each center; torchvision's nearest moves them half a pixel off image and boxes
  - weight decay: style vitdet decays biases, but not the ViT's norms and position table; style taps all but vectors
  - images of a micro-batch are padded to one size, to which the position table is resized, so the micro-batch matters:
    presets of style taps take the published 2. Published samplers also paired images of like orientation
  - the RPN's box loss is torchvision's, quadratic below 1/9, where the published code has L1
SdAE names CAE's setting, and DDAE SdAE's. So CAE's box head of four convolutions and its GIoU loss are the defaults,
though no text states them; `--box_head 2fc --box_loss l1` is MMDetection's base. CAE's layer scale and random crops are
left out. DeepMIM states only batch size, learning rates, and canvas; the rest is MAE's, whose setting it follows. Its
"MAE 50.3" APb is of four taps with windows and an FPN (Benchmarking Detection Transfer Learning with Vision
Transformers), while style vitdet is ViTDet, which reaches 51.6 APb and 45.9 APm with the same weights.

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
from matplotlib.font_manager import findfont
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import ops, tv_tensors
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import _utils, anchor_utils, faster_rcnn, mask_rcnn, roi_heads, rpn, transform
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import common
import finetune
from ddae import Block, ViT, init_weights, patchify, sincos_pos_embed
from evaluate import read_each, sync_buffers
from shapes import Shapes
from transfer import segment


@dataclass(frozen=True)
class Config(common.RunConfig):
    data: str = "shapes"  # [ours] folder in COCO's layout, or shapes (generated)
    init: str = ""  # [ours] encoder.pt, a ViT of MAE or timm, or model.pt of this file; sizes are taken from it
    out_dir: str = "out/detect"  # [ours] checkpoints, log, and pictures; with --eval or --predict: --init's folder
    eval: bool = False  # [ours] no training: AP of --init, by default out_dir's model.pt
    predict: str = ""  # [ours] no training: draw what --init, by default out_dir's model.pt, finds in picture or folder
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
        assert len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1], "--scale takes low and high"
        assert len(self.table) == len(self.proposals) == 2 and min(self.table + self.proposals) > 0, \
            "--table and --proposals take two positive numbers each"
        p = self.patch_size or 4
        assert p % 4 == 0, f"patches of {p} pixels are not divisible by 4, so the finest map would have no whole stride"
        assert self.style == "taps" or self.img_size % (4 * p) == 0, \
            f"--img_size {self.img_size} is not divisible by {4 * p}, the coarsest stride with patches of {p} pixels"


VITDET = dict(style="vitdet", img_size=1024, scale=(0.1, 2.0), table=(14, 14), box_loss="l1", proposals=(2000, 1000),
              epochs=100, drops=(88.889, 96.296), warmup=250, lr=1e-4, weight_decay=0.1, drop_path=0.1, eval_every=10)
PRESETS = {
    "ddae": dict(micro_batch=2),
    "sdae": dict(micro_batch=2),
    "deepmim": dict(VITDET, batch_size=16),
    "mae": dict(VITDET, batch_size=64, layer_decay=0.7),
    "mae_large": dict(VITDET, batch_size=64, layer_decay=0.8, drop_path=0.4),  # for ViT-L; mae_huge: ViT-H/16
    "mae_huge": dict(VITDET, batch_size=64, layer_decay=0.9, drop_path=0.5, epochs=75, drops=(66.667, 72.222)),
    "quick": dict(img_size=64, patch_size=4, embed_dim=96, depth=4, num_heads=3, table=(16, 16), drop_path=0.0,
                  channels=32, box_head="2fc", box_loss="l1", proposals=(200, 200), regions=32, epochs=1, drops=(0.2,),
                  warmup=20, batch_size=8, lr=2e-3, layer_decay=0.9, max_steps=300, eval_every=0.24, eval_images=100,
                  out_dir="out/quick_detect"),
}


# --- data -------------------------------------------------------------------------------------------------------------

class Coco:
    """COCO's folder layout: [i] -> PIL image, its entry in the JSON file, which holds its annotations."""

    def __init__(self, root, split):
        path = root / "annotations" / f"instances_{split}2017.json"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                coco = COCO(path)
            self.ids = sorted(coco.cats)  # of the labels 1 to K
            self.classes = [f"{i} {coco.cats[i]['name']}" for i in self.ids]  # with ids, so that resuming compares them
            records = [{k: image[k] for k in ("id", "file_name", "height", "width")} for image in coco.imgs.values()]
            for record in records:
                annotations = (usable(a, record, self.ids) for a in coco.imgToAnns[record["id"]])
                record["annotations"] = [a for a in annotations if a]
        except Exception as error:  # wrong types raise nearly anything
            sys.exit(f"--data {path.absolute()}: missing or no COCO instances: {type(error).__name__}: {error}")
        total = len(coco.dataset.get("annotations", []))
        if left_out := total - sum(len(r["annotations"]) for r in records):
            common.print0(f"warning: {left_out} of {total} annotations in {path} are left out: bad box, mask, or ids")
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
                       for code, label in zip(map(encode, masks), labels) if rle.area(code)]
        return Image.fromarray(image), dict(id=i, height=self.size, width=self.size, annotations=annotations)


def open_scenes(cfg, split):
    """Images and annotations of --data for `split`, "train" or "val"."""
    return Stars(split, cfg.img_size) if cfg.data == "shapes" else Coco(Path(cfg.data), split)


def usable(annotation, record, ids):
    """Annotation with its mask as compressed RLE; None if its category is unknown or its box or mask not usable."""
    try:
        mask, H, W = annotation["segmentation"], record["height"], record["width"]
        if isinstance(mask, list):
            polygons = [p for p in mask if len(p) >= 6]  # to pycocotools, four numbers are a box
            good = np.abs(np.concatenate(polygons)).max() < 4 * max(H, W)  # else pycocotools runs out of memory
            code = rle.merge(rle.frPyObjects(polygons, H, W)) if good else None
        else:
            code = rle.frPyObjects(mask, H, W) if isinstance(mask["counts"], list) else mask
            good = code["size"] == [H, W] and fills(code["counts"], H * W)
        x, y, width, height = map(float, annotation["bbox"])
        good = good and width > 0 and height > 0 and math.isfinite(x + y + width + height)
        if good and annotation["category_id"] in ids:
            area, crowd = annotation.get("area") or float(rle.area(code)), annotation.get("iscrowd", 0)
            return dict(annotation, segmentation=code, area=area, iscrowd=crowd)
    except Exception:  # wrong types raise nearly anything
        pass
    return None


def fills(counts, pixels):
    """Whether the runs of a compressed RLE sum to `pixels`. Otherwise, pycocotools decodes uninitialized memory."""
    if ord(counts[-1:]) >= 80:  # ends within a number: pycocotools would read on
        return False
    rle.decode(dict(size=[pixels, 1], counts=counts))  # raises ValueError if they are longer
    try:
        rle.decode(dict(size=[pixels - 1, 1], counts=counts))
    except ValueError:
        return True
    return False


def encode(mask):
    """bool (H, W) -> compressed RLE."""
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return dict(code, counts=code["counts"].decode())


def instances(record, ids):
    """Record -> what is trained on, no crowds: boxes xyxy (n, 4), masks uint8 (n, H, W), labels (n,) from 1."""
    things, size = [a for a in record["annotations"] if not a["iscrowd"]], (record["height"], record["width"])
    boxes = torch.tensor([a["bbox"] for a in things], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    masks = rle.decode([a["segmentation"] for a in things]).transpose(2, 0, 1)
    return dict(boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size), masks=tv_tensors.Mask(masks),
                labels=torch.tensor([ids.index(a["category_id"]) + 1 for a in things]))


class Scenes(common.Samples):
    """Training samples by key (epoch, index)."""

    def __init__(self, source, cfg):
        self.source, self.cfg = source, cfg
        S, (low, high) = cfg.img_size, cfg.scale
        if cfg.style == "taps":
            sides = list(range(round(S * low), round(S * high) + 1, max(1, S // 25)))
            self.resize = v2.RandomShortestSize(sides, S * 5 // 3, antialias=False)
        else:
            self.resize = v2.ScaleJitter((S, S), (low, high))  # antialiased, like Pillow in detectron2

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
        img, target = v2.RandomHorizontalFlip()(img, dict(target, masks=tv_tensors.Mask(masks)))
        if self.cfg.style == "vitdet":
            img, target = v2.RandomCrop([min(n, self.cfg.img_size) for n in img.shape[1:]])(img, target)
            seen = target["masks"].flatten(1).any(1).bool()
            masks, labels = target["masks"][seen], target["labels"][seen]
            boxes = ops.masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # torchvision's end at the last pixel
            boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=img.shape[1:])
            target = dict(boxes=boxes, masks=tv_tensors.Mask(masks), labels=labels)
        target = v2.SanitizeBoundingBoxes()(v2.ClampBoundingBoxes()(target))
        return img.as_subclass(torch.Tensor), {k: v.as_subclass(torch.Tensor) for k, v in target.items()}

    def collate(self, batch):
        """-> lists of images, which differ in size, and of their instances, and the unreadable files."""
        samples, bad = zip(*batch)
        return *map(list, zip(*samples)), dict(ChainMap(*bad))


# --- model ------------------------------------------------------------------------------------------------------------

class WindowedBlock(Block):
    """Block on a square grid of `side` x `side` tokens: attention within windows, or global if window is 0.

    Attention logits get query * (row vector + column vector of the offset), initially 0: decomposed relative position.
    """

    def __init__(self, dim, num_heads, drop_path, side, window):
        super().__init__(dim, num_heads, drop_path)
        self.side, self.window = side, window if 0 < window < side else side
        for name in ("rel_pos_h", "rel_pos_w"):
            self.register_parameter(name, nn.Parameter(torch.zeros(2 * self.window - 1, dim // num_heads)))

    def attend(self, x, first):  # (B, side * side, D); first is 0
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
        self.grid = tuple(cfg.table)
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
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return [outputs[tap][:, -pos.shape[1]:].transpose(1, 2).unflatten(2, grid) for tap in self.taps]


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


def region_pool(maps, boxes, image_sizes, size, patch_size):
    """RoIAlign of boxes, each at the level for its size: maps by name, per image (n, 4) -> (n, C, size, size)."""
    # torchvision's MultiScaleRoIAlign is not aligned, and takes the strides from the first batch, before padding.
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])  # (n, 5): number of the image, box
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    levels = (side / (14 * patch_size) + 1e-8).log2().floor().add(2).clamp(0, 3)  # level 2 from 14 patches on
    pooled = rois.new_zeros(len(rois), maps["0"].shape[1], size, size)
    for level in range(4):
        here, scale = torch.where(levels == level)[0], 2 ** (2 - level) / patch_size
        pooled[here] = ops.roi_align(maps[str(level)], rois[here], size, scale, aligned=True)
    return pooled


class AnchorMatcher(_utils.Matcher):
    """Also matches an instance with its best anchors if their IoU is at least 0.3. [code: MMDetection]"""

    def set_low_quality_matches_(self, matches, all_matches, iou):  # (anchors,), (anchors,), (instances, anchors)
        instance, anchor = torch.where((iou == iou.amax(1, keepdim=True)) & (iou >= self.low_threshold))
        matches[anchor] = instance


class Heads(roi_heads.RoIHeads):
    """torchvision's RoIHeads with other losses of boxes."""

    def forward(self, maps, proposals, image_sizes, targets=None):
        """-> per image boxes, labels, scores, masks (n, 1, 28, 28), and {}; in training [] and losses by name."""
        if not self.training:
            return super().forward(maps, proposals, image_sizes)
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        logits, regressed = self.box_predictor(self.box_head(self.box_roi_pool(maps, proposals, image_sizes)))
        losses = self.box_losses(logits, regressed, torch.cat(proposals), torch.cat(labels), torch.cat(offsets))
        positive = [torch.where(y > 0)[0] for y in labels]
        boxes, matched = ([x[i] for x, i in zip(xs, positive)] for xs in (proposals, matched))
        pred = self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes, image_sizes)))  # (n, K + 1, 28, 28)
        masks, labels = ([t[name] for t in targets] for name in ("masks", "labels"))
        losses["mask"] = roi_heads.maskrcnn_loss(pred, boxes, masks, labels, matched)
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
        return {"class": F.cross_entropy(logits, labels), "box": loss / len(labels)}


class MaskRCNN(nn.Module):
    """Backbone, pyramid, torchvision's RPN, and the heads."""

    def __init__(self, cfg):
        super().__init__()
        C, K, S, p, vitdet = cfg.channels, cfg.num_classes, cfg.img_size, cfg.patch_size, cfg.style == "vitdet"
        self.cfg, self.backbone = cfg, Backbone(cfg)
        self.pyramid = (SimplePyramid if vitdet else TapPyramid)(cfg.embed_dim, C)
        # Images come normalized and, in training, resized. The divisor keeps strides whole: torchvision divides sizes
        # to find them, and 800 rows, which are 13 in the coarsest map, would give 61 instead of 64.
        self.transform = transform.GeneralizedRCNNTransform(
            S, S if vitdet else S * 5 // 3, [0] * 3, [1] * 3, size_divisible=S if vitdet else 4 * p, _skip_resize=True)
        anchors = anchor_utils.AnchorGenerator(tuple((2 * p * 2 ** i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
        before, after = (dict(training=n, testing=min(1000, n)) for n in cfg.proposals)  # NMS
        self.rpn = rpn.RegionProposalNetwork(
            anchors, rpn.RPNHead(C, 3, conv_depth=2 if vitdet else 1), fg_iou_thresh=0.7, bg_iou_thresh=0.3,
            batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=before, post_nms_top_n=after, nms_thresh=0.7)
        self.rpn.proposal_matcher = (_utils.Matcher if vitdet else AnchorMatcher)(0.7, 0.3, True)
        convs, layers = ([], [4 * C] * 2) if cfg.box_head == "2fc" else ([C] * 4, [4 * C])
        box_head = faster_rcnn.FastRCNNConvFCHead((C, 7, 7), convs, layers, norm_2d if vitdet else nn.BatchNorm2d)
        self.heads = Heads(
            partial(region_pool, size=7, patch_size=p), box_head, faster_rcnn.FastRCNNPredictor(4 * C, K + 1),
            mask_roi_pool=partial(region_pool, size=14, patch_size=p),
            mask_head=mask_rcnn.MaskRCNNHeads(C, [C] * 4, 1, norm_2d if vitdet else None),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(C, C, K + 1), fg_iou_thresh=0.5, bg_iou_thresh=0.5,
            batch_size_per_image=cfg.regions, positive_fraction=0.25, bbox_reg_weights=None, score_thresh=0.05,
            nms_thresh=0.5, detections_per_img=100)
        self.heads.box_loss = cfg.box_loss
        normal = {self.heads.box_predictor.cls_score: 0.01, self.heads.box_predictor.bbox_pred: 0.001}
        if vitdet:  # [code: detectron2]
            normal[self.heads.mask_predictor.mask_fcn_logits] = 0.001
            for layer in (m for m in box_head if isinstance(m, nn.Linear)):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)
        for layer, std in normal.items():
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, imgs, targets=None):
        """Lists of images (3, H, W) and their `instances` -> loss (), metrics; in evaluation, what `Heads` finds."""
        inputs = imgs
        if self.cfg.style == "vitdet" and not self.training:  # antialiased, which torchvision's own resizing is not
            inputs = [v2.functional.resize(img, None, max_size=self.cfg.img_size) for img in imgs]
        images, targets = self.transform(inputs, targets)
        maps = self.pyramid(self.backbone(images.tensors))
        with torch.autocast(images.tensors.device.type, enabled=False):  # bf16 anchors would be off by up to 4 pixels
            maps = {name: x.float() for name, x in maps.items()}
            proposals, rpn_losses = self.rpn(images, maps, targets)
            found, losses = self.heads(maps, proposals, images.image_sizes, targets)
        if self.training:
            losses = {f"loss/{name.removeprefix('loss_')}": x for name, x in (rpn_losses | losses).items()}
            return sum(losses.values()), {name: x.detach() for name, x in losses.items()}
        for f, size, img in zip(found, images.image_sizes, imgs):
            f["boxes"] = transform.resize_boxes(f["boxes"], size, img.shape[1:])
        return found


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

def results(found, masks, record, ids):
    """Detections in an image and their masks (H, W) -> entries in COCO's format."""
    boxes = ops.box_convert(found["boxes"].double(), "xyxy", "xywh").tolist()
    return [dict(image_id=record["id"], category_id=ids[y - 1], score=s, bbox=b, segmentation=encode(m))
            for y, s, b, m in zip(found["labels"].tolist(), found["scores"].tolist(), boxes, masks)]


def average_precision(found, source):
    """Records with their entries -> pycocotools' APs by name, in percent."""
    metrics = dict(APb=0.0, APb50=0.0, APm=0.0, APm50=0.0, val_images=len(found))
    annotations, truth = [a for record, _ in found for a in record["annotations"]], COCO()
    truth.dataset = dict(images=[record for record, _ in found], categories=[dict(id=i) for i in source.ids],
                         annotations=[dict(a, id=i) for i, a in enumerate(annotations, 1)])  # 0 would mean "no match"
    entries = [e for _, entries in found for e in entries]
    for kind, name, unused in (("bbox", "APb", "segmentation"), ("segm", "APm", "bbox")) if entries else ():
        # Given both, pycocotools takes the box's area for the mask's.
        one_kind = [{k: v for k, v in e.items() if k != unused} for e in entries]
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            measure = COCOeval(truth, truth.loadRes(one_kind), kind)
            measure.evaluate()
            measure.accumulate()
            measure.summarize()
        for part, value in zip(("", "50", "/75", "/small", "/medium", "/large"), measure.stats.tolist()):
            if value >= 0:  # else there are no such instances
                metrics[name + part] = 100 * value
    return metrics


@torch.no_grad()
def evaluate(model, cfg, device, autocast, source):
    """AP over `source` -> metrics by name; results.json (eval_results.json) has them in COCO's format."""
    sync_buffers(model)
    ids, found = range(len(source))[:cfg.eval_images or None], []
    for (img, record), in read_each(Scenes(source, cfg).read, source, ids, cfg, batch_size=1):
        with autocast:
            detections = model([common.to_device(img, {}, device)[0]])[0]
        detections = {k: v.cpu() for k, v in detections.items()}
        masks = (roi_heads.paste_masks_in_image(mask[None], box[None], img.shape[1:])[0, 0] >= 0.5  # one at a time:
                 for mask, box in zip(detections["masks"], detections["boxes"]))  # a hundred would fill the memory
        found.append((record, results(detections, masks, record, source.ids)))
    found = sorted(sum(common.gather(found), []), key=lambda item: item[0]["id"])
    if common.RANK:
        return common.gather(None)[0]
    try:
        with common.replacing(Path(cfg.out_dir) / ("eval_results.json" if cfg.eval else "results.json")) as path:
            path.write_text(json.dumps([e for _, entries in found for e in entries]))
    except OSError as error:
        common.print0(f"warning: detections not written: {error}")
    return common.gather(average_precision(found, source))[0]


@torch.no_grad()
def predict(model, cfg, path, img, classes, device, autocast):
    """--predict: draw boxes, masks, and names of what scores above a half."""
    if max(img.shape[1:]) > 50 * min(img.shape[1:]):
        sys.exit(f"--predict {path}: {img.shape[2]} x {img.shape[1]} pixels; resized, one side would vanish")
    img = v2.functional.resize(img, 800, max_size=1333)
    with autocast:
        found = model([common.to_device(img, {}, device)[0]])[0]
    found = {k: v[found["scores"] > 0.5].cpu() for k, v in found.items()}
    labels = [y - 1 for y in found["labels"].tolist()]
    names = [classes[y].partition(" ")[2] for y in labels]  # without the category id
    colors = [tuple(segment.palette(254)[y % 254].tolist()) for y in labels]
    masks = roi_heads.paste_masks_in_image(found["masks"], found["boxes"], img.shape[1:])[:, 0] >= 0.5
    for mask, color in zip(masks.flip(0), colors[::-1]):  # the surest on top
        img = draw_segmentation_masks(img, mask, 0.5, color)
    img = draw_bounding_boxes(img, found["boxes"], names, colors, width=3, fill_labels=True, label_colors="white",
                              font=findfont("DejaVu Sans"), font_size=14)
    path = Path(cfg.out_dir) / f"{path.stem}_detected.png"
    with common.replacing(path) as temporary:
        v2.functional.to_pil_image(img).save(temporary)
    common.print0(f"wrote {path}")


def main():
    saved = (*segment.SIZES, "style", "img_size", "table", "window", "channels", "box_head", "proposals", "num_classes")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, about a second, and here are hundreds
    segment.run(common.parse(Config, PRESETS, __doc__), MaskRCNN, saved, open_scenes, Scenes, make_optimizer,
                learning_rate, evaluate, predict)


if __name__ == "__main__":
    main()
