"""
What an encoder is worth: fine-tuning, linear probe, k nearest neighbours, training from scratch, evaluation.

    --mode finetune    all weights, layer-wise learning rates, mixup, RandAugment (recipes mae, ddae, deepmim, sdae, ...)
    --mode linear      a linear layer on frozen features, LARS
    --mode knn         no training: weighted votes of the nearest training images
    --mode scratch     the same training without pretrained weights; --init then gives the sizes only
    --eval             no training: accuracy of a fine-tuned file

`--init` takes encoder.pt of any method here, best.pt of this file, or a ViT of MAE or timm. What is loaded, left out and
drawn anew is printed; anything missing but head and fc_norm is an error (`--allow_partial`).

One training step, `Classifier.forward`:
    imgs, soft labels = mixup or cutmix of pairs in the batch
    tokens = blocks(patch_embed(imgs) + pos_embed)
    logits = head(fc_norm(mean of the patch tokens))                  # --pool cls: head(norm(tokens)[CLS])
    loss   = cross-entropy of soft, smoothed labels

Learning rates: lr = base_lr * batch_size / 256 of the head, times layer_decay ** (depth + 1 - i) at layer i; embeddings
are layer 0, head and fc_norm layer depth + 1.

Where the papers contradict one another or themselves:
  - DDAE states 8e-3 at batch 1024, four times MAE's, CAE's and SdAE's rate; CAE's 8e-3 is of batch 4096, which recipe
    `ddae` assumes. `ddae_literal` takes the text's word
  - DeepMIM states 2e-4 (CLIP: 4e-4) at 1024 without base; its CLIP log peaks at 4e-4, so both are read as absolute. Layer
    decay 0.6 is of 800 epochs in its text (`deepmim_800`), of 1600 in its repository, there for CLIP
  - SdAE's 5e-4 is a base rate, as MAE's, from which it takes the rest
What is not as in MAE's code:
  - RandAugment is torchvision's, two operations of probability 1/2 each; magnitude 27 of 30 stands for timm's 9 of 10. It is
    bilinear, has Identity, no noise on the magnitude, no Invert and SolarizeAdd, and its Posterize keeps more bits
  - the probe's random crop is torchvision's, which looks for a fitting aspect ratio; MAE's takes the first draw
  - in fine-tuning a head that --init holds is kept if it fits the classes, where MAE's code draws it anew
  - no moving average of the weights, which MAE takes from scratch and BootMAE always
  - inputs are normalised with ImageNet's mean and deviation, also for files that were trained with 0.5 (some of timm's)

Run:
    torchrun --nproc_per_node=8 finetune.py --recipe ddae --data IMAGENET --init out/ddae_b100/encoder.pt --out_dir out/ft
    torchrun --nproc_per_node=8 finetune.py --mode linear --data IMAGENET --init out/ddae_b100/encoder.pt --out_dir out/lin
    python finetune.py --eval --data IMAGENET --init out/ft/best.pt                                  # needs val/ only
    python finetune.py --recipe quick --init out/quick/encoder.pt       # generated images, 2 CPU cores
"""
import csv
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

import common
from ddae import Block, ViT, init_weights


@dataclass(frozen=True)
class Config(common.RunConfig):
    mode: Literal["finetune", "linear", "knn", "scratch"] = "finetune"  # [ours] see above
    eval: bool = False  # [ours] no training: accuracy of --init on val/
    eval_size: tuple[int, ...] = ()  # [ours] with --eval: height and width to classify at; none: a square of img_size
    eval_every: float = 1.0  # [ours] epochs between evaluations; the best model is kept in best.pt
    eval_batch: int = 100  # [ours] images per process at a time in evaluation
    confusion: bool = False  # [ours] write confusion.csv: rows are classes, columns what they were taken for
    allow_partial: bool = False  # [ours] go on where --init lacks more than head and fc_norm
    knn_images: int = 0  # [ours] with --mode knn: images from train/ to compare with; 0: all
    img_size: int = 0  # [MAE] side of the crop, pixels; 0: as in --init, else 224
    patch_size: int = 0  # [MAE] 0: as in --init, else 16
    embed_dim: int = 0  # [MAE] 0: as in --init, else 768
    depth: int = 0  # [MAE] 0: as in --init, else 12
    num_heads: int = 0  # [MAE] 0: as in --init, else 12
    pool: Literal["auto", "mean", "cls"] = "auto"  # [MAE] auto: mean to fine-tune, cls for linear; with --eval by the file
    layer: int = 0  # [BootMAE] block whose features --mode linear reads; 0: the last
    last_k: int = 0  # [DeepMIM Fig. 7] train only the last k blocks and the head; 0, or all blocks: everything
    reinit_last_k: int = 0  # [DeepMIM Fig. 8] draw the last k blocks anew before fine-tuning
    epochs: int = 100  # [MAE] ViT-B; ViT-L 50
    warmup_epochs: float = 5.0  # [MAE] linear warm-up
    batch_size: int = 1024  # [MAE] images per optimiser step, over all processes
    base_lr: float = 5e-4  # [MAE] learning rate of the head = base_lr * batch_size / 256
    min_lr: float = 1e-6  # [MAE] learning rate at the end of the cosine
    layer_decay: float = 0.65  # [MAE] factor from each layer to the one below
    weight_decay: float = 0.05  # [MAE] not on biases, norms, position table, cls token
    adam_betas: tuple[float, ...] = (0.9, 0.999)  # [MAE] AdamW's two moments
    drop_path: float = 0.1  # [MAE] largest share of samples that skip a branch of the last block
    smoothing: float = 0.1  # [MAE] label smoothing
    mixup: float = 0.8  # [MAE] alpha of mixup; 0: none
    cutmix: float = 1.0  # [MAE] alpha of cutmix, which takes turns with mixup; 0: none
    rand_augment: int = 27  # [MAE] magnitude of RandAugment, of 30; 0: none
    erase: float = 0.25  # [MAE] probability of random erasing
    crop_min: float = 0.08  # [MAE] smallest area of the random crop, share of the image
    crop_pct: float = 0.0  # [MAE] evaluation: crop's side / resized image's shorter; 0: as --init's, else 224/256, above 224 px 1

    def __post_init__(self):
        super().__post_init__()
        check = common.check
        common.above(0, self, "eval_every eval_batch layer_decay crop_min")
        for name in ("knn_images", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "layer", "last_k",
                     "reinit_last_k", "mixup", "cutmix", "crop_pct"):
            check(getattr(self, name) >= 0, f"--{name} must not be negative, got {getattr(self, name)}")
        for name in ("drop_path", "smoothing", "erase"):
            check(0 <= getattr(self, name) < 1, f"--{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("layer_decay", "crop_min", "crop_pct"):
            check(getattr(self, name) <= 1, f"--{name} must be at most 1, got {getattr(self, name)}")
        check(len(self.adam_betas) == 2 and all(0 <= b < 1 for b in self.adam_betas),
              f"--adam_betas takes 2 values in [0, 1), got {self.adam_betas}")
        check(self.rand_augment in range(31), f"--rand_augment must be in 0..30, got {self.rand_augment}")
        check(len(self.eval_size) in (0, 2), f"--eval_size takes height and width, got {self.eval_size}")
        check(not self.eval_size or self.eval, "--eval_size goes with --eval")
        check(self.init or self.mode == "scratch" and not self.eval,
              "--init FILE is missing: encoder.pt of a method here, best.pt, or a ViT of MAE or timm (or --mode scratch)")
        check(self.mode != "linear" or not (self.mixup or self.cutmix or self.drop_path or self.last_k),
              "--mode linear is trained by --recipe linear or linear_boot, without mixup, cutmix, drop_path and last_k")
        check(self.mode == "linear" or not self.layer, f"--layer goes with --mode linear, not {self.mode}")
        check(not (self.last_k or self.reinit_last_k) or self.mode == "finetune" and not self.eval,
              "--last_k and --reinit_last_k go with --mode finetune, and not with --eval")
        micro = self.micro_batch or self.batch_size // common.WORLD
        check(micro != 1 or self.eval or self.mode == "knn" or not (self.mixup or self.cutmix or self.mode == "linear"),
              "mixup, cutmix and --mode linear's batch norm need --micro_batch 2 at least")


LINEAR = dict(mode="linear", epochs=90, warmup_epochs=10, batch_size=16384, base_lr=0.1, min_lr=0.0, weight_decay=0.0,
              layer_decay=1.0, drop_path=0.0, smoothing=0.0, mixup=0.0, cutmix=0.0, rand_augment=0, erase=0.0)
SMALL_IMAGES = dict(batch_size=64, rand_augment=0, erase=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0, crop_pct=1.0,
                    crop_min=0.4, warmup_epochs=0.2)
RECIPES = {
    "mae": dict(),
    "mae_large": dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "ddae": dict(),  # 8e-3 at 4096 is MAE's 2e-3 at 1024; decay 0.65, warm-up 5, 100 epochs as well
    "ddae_small": dict(base_lr=1e-3, layer_decay=0.75),  # 1.6e-2, at 4096 as for ViT-B
    "ddae_literal": dict(base_lr=2e-3),  # 8e-3 at 1024
    "deepmim": dict(base_lr=5e-5),  # 2e-4 at 1024; targets other than CLIP
    "deepmim_clip": dict(base_lr=1e-4),  # 4e-4 at 1024
    "deepmim_800": dict(base_lr=5e-5, layer_decay=0.6),
    "sdae": dict(batch_size=2048, warmup_epochs=10),
    "sdae_large": dict(batch_size=2048, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "scratch": dict(mode="scratch", epochs=300, warmup_epochs=20, batch_size=4096, base_lr=1e-4, weight_decay=0.3,
                    layer_decay=1.0, adam_betas=(0.9, 0.95), min_lr=0.0, erase=0.0),  # MAE's appendix A.2, but no EMA
    "linear": LINEAR,
    "linear_boot": LINEAR | dict(pool="mean", layer=10),  # BootMAE's scripts
    "linear_boot_large": LINEAR | dict(epochs=50, base_lr=0.07, pool="mean", layer=18),
    "quick": SMALL_IMAGES | dict(epochs=1, base_lr=4e-3, layer_decay=0.9, out_dir="out/quick_finetune"),
    "quick_scratch": SMALL_IMAGES | dict(mode="scratch", epochs=1, base_lr=4e-3, layer_decay=1.0, patch_size=4, img_size=32,
                                         embed_dim=96, depth=4, num_heads=3, out_dir="out/quick_scratch"),
    "quick_linear": LINEAR | dict(epochs=2, warmup_epochs=0.2, batch_size=256, base_lr=20.0, crop_pct=1.0, crop_min=0.4,
                                  pool="mean", out_dir="out/quick_linear"),
}


# --- data -------------------------------------------------------------------------------------------------------------

def open_labelled(cfg):
    """Train and val images of --data with the same classes; ends the program with one line where they are not so.

    With --eval, val images alone.
    """
    if not cfg.eval and Path(cfg.data, "val").is_dir() and not Path(cfg.data, "train").is_dir():
        common.fail(f"--data {cfg.data} has val/ but no train/; add it, or give --eval")
    sources = [common.open_data(cfg, split) for split in ("train", "val")[cfg.eval:]]
    for source in sources:
        if source.labels is None:
            common.fail(f"--data {cfg.data} has no labels; it needs train/ and val/, each with a folder per class")
        if isinstance(source, common.Folder):
            empty = sorted({p.name for p in source.root.iterdir() if p.is_dir() and p.name[0] != "."} - set(source.classes))
            if empty:
                common.fail(f"class folder {(source.root / empty[0]).absolute()} holds no images; fill or remove it, "
                            "in train/ and in val/")
    train, val = list(sources[0].classes), list(sources[-1].classes)
    if train != val:
        where, names = ("val", set(train) - set(val)) if set(train) - set(val) else ("train", set(val) - set(train))
        common.fail(f"{where}/ of --data {cfg.data} lacks {len(names)} of the classes, e.g. the folder {min(names)}; "
                    "train/ and val/ must have the same")
    return sources


class Erase(nn.Module):
    """Random erasing of uint8 images with noise, as MAE's: deviation 1 after normalisation, here cut off at 0 and 255."""

    def __init__(self, p):
        super().__init__()
        self.erase = v2.RandomErasing(p, value="random")

    def forward(self, img):  # (3, H, W)
        mean, std = common.mean_std(img.device)
        x = (img.float() / 255 - mean) / std
        erased = self.erase(x)
        if erased is x:
            return img
        return ((erased * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


class Samples(common.Samples):
    """Augmented crops with labels, by key (epoch, index) -> uint8 (3, S, S), label, key, unreadable files."""

    def __init__(self, source, cfg):
        super().__init__(source, cfg, draw=None)
        fill = [round(255 * m) for m in common.MEAN]
        augment = v2.RandAugment(1, cfg.rand_augment, interpolation=InterpolationMode.BILINEAR, fill=fill)
        twice = [v2.RandomApply([augment], 0.5)] * 2 if cfg.rand_augment else []
        self.crop = v2.Compose([self.crop, *twice, *([Erase(cfg.erase)] if cfg.erase else [])])

    def sample(self, index, drawn):
        return super().sample(index, drawn)[0], self.source.label(index)


def centre_crop(size, crop_pct):
    """Resize the shorter side to the crop's longer / crop_pct, bicubic, and cut the middle out; size (height, width)."""
    return v2.Compose([v2.PILToTensor(), v2.Resize(round(max(size) / crop_pct), InterpolationMode.BICUBIC), v2.CenterCrop(size)])


# --- model ------------------------------------------------------------------------------------------------------------

class Classifier(ViT):
    """ViT with a head, under timm's names. Only `linear` has a batch norm before it, and freezes the rest.

    pool: "mean" puts fc_norm on the mean of the patch tokens, "cls" takes [CLS] after norm.
    """

    def __init__(self, num_classes, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, drop_path=0.0,
                 pool="mean", linear=False, smoothing=0.0, mixup=0.0, cutmix=0.0):
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, drop_path)
        self.pool, self.smoothing = pool, smoothing
        if pool == "mean":
            self.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.requires_grad_(not linear)  # the position table is trained as well, as in MAE's fine-tuning
        self.bn = nn.BatchNorm1d(embed_dim, affine=False, eps=1e-6) if linear else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01 if linear else 2e-5)
        nn.init.zeros_(self.head.bias)
        mixes = [make(alpha=alpha, num_classes=num_classes) for make, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def forward(self, imgs, labels):
        """imgs (B, 3, H, W), labels (B,) -> loss (), metrics: name -> tensor ()."""
        if self.mix:
            imgs, labels = self.mix(imgs, labels)  # labels (B, C)
        logits = self.logits(imgs)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        return loss, {} if self.mix else {"train_acc1": 100 * (logits.argmax(-1) == labels).float().mean()}

    def logits(self, imgs):
        """imgs (B, 3, H, W) -> (B, C)."""
        x = super().forward(imgs)[-1]  # (B, 1 + N, D)
        x = self.fc_norm(x[:, 1:].mean(1)) if self.pool == "mean" else self.norm(x)[:, 0]  # (B, D)
        return self.head(self.bn(x))


def sized(cfg):
    """Settle what --init decides -> cfg with sizes, pool and crop, its tensors by name, class names it was trained on or none.

    Raises ValueError where flags and file contradict.
    """
    sizes = dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12)
    weights, file, was = {}, {}, {}
    if cfg.init:
        weights, (file, was) = common.read_weights(cfg.init), common.header(cfg.init)
        sizes = common.vit_sizes(weights, cfg.init)
    free = {"img_size"} if "num_heads" in was else {"img_size", "num_heads"}  # heads leave no trace in the weights
    for name in sizes:
        given = getattr(cfg, name)
        common.check(not given or not cfg.init or name in free or given == sizes[name],
                     f"--{name} {given}, but {cfg.init} has {sizes[name]}; leave the flag out")
        sizes[name] = given or sizes[name]
    img_size, p, depth = sizes["img_size"], sizes["patch_size"], sizes["depth"]
    for size in (img_size, *cfg.eval_size):
        common.check(size > 0 and size % p == 0, f"an image side of {size} px is not divisible by patches of {p} px; "
                     f"use {max(p, size // p * p)} or {size // p * p + p}")
    D, heads = sizes["embed_dim"], sizes["num_heads"]
    common.check(D % 4 == 0 and D % heads == 0, f"a width of {D} must be divisible by 4 and by --num_heads {heads}")
    for name in ("layer", "last_k", "reinit_last_k"):
        common.check(getattr(cfg, name) <= depth, f"--{name} {getattr(cfg, name)} is out of range: the encoder has {depth} blocks")
    if cfg.layer:
        sizes["depth"] = cfg.layer  # the blocks above have no say
    pool = cfg.pool
    if pool == "auto" and cfg.eval:
        pool = "mean" if "fc_norm.weight" in weights else "cls"
    elif pool == "auto":
        pool = "cls" if cfg.mode == "linear" else "mean"
    crop_pct = cfg.crop_pct or was.get("crop_pct") or (0.875 if img_size <= 224 else 1.0)
    return dataclasses.replace(cfg, pool=pool, crop_pct=crop_pct, **sizes), weights, file.get("classes") or []


def brief(names):
    """Names of tensors in few words: `head (2), blocks (144)`."""
    counts = {}
    for name in names:
        counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + 1
    return ", ".join(f"{k} ({n})" for k, n in counts.items()) or "none"


def load_pretrained(model, weights, path, allow_partial=False, need_head=False):
    """Load a Classifier, its position table resized, and say what was used; a head of another size is left out.

    Raises ValueError where anything but head, fc_norm and bn is missing (unless allow_partial) or of another shape.
    """
    own = model.state_dict()
    weights = dict(weights)
    weights["pos_embed"] = common.resize_pos_embed(weights["pos_embed"], model.grid)
    head = weights.get("head.weight")
    if need_head:
        common.check(head is not None, f"{path} has no tensor head.weight; give a fine-tuned file, such as best.pt")
        common.check(len(head) == len(model.head.weight), f"{path} has a head for {len(head)} classes, --data has "
                     f"{len(model.head.weight)}; give the data it was trained on")
    used = {k: weights[k] for k in own if k in weights}
    if head is not None and head.shape != model.head.weight.shape:
        used = {k: v for k, v in used.items() if not k.startswith("head.")}
    missing, unexpected = [k for k in own if k not in used], [k for k in weights if k not in used]
    fresh = () if need_head else ("head.", "fc_norm.", "bn.")
    lacking = [k for k in missing if not k.startswith(fresh)]
    common.check(allow_partial or not lacking, f"{path} lacks {brief(lacking)}, e.g. {lacking[:1]}; --allow_partial goes on")
    common.load_weights(model, {**own, **used}, path)
    common.say(f"init       {len(used)} of {len(own)} tensors from {path}: {brief(used)}\n"
               f"           drawn anew: {brief(missing)}; left out: {brief(unexpected)}")


def build(cfg, weights, num_classes):
    """The Classifier that cfg, already `sized`, asks for."""
    linear = "bn.running_mean" in weights if cfg.eval else cfg.mode == "linear"
    model = Classifier(num_classes, linear=linear, **common.arguments(Classifier, cfg))
    if cfg.eval_size:
        model.grid = tuple(size // cfg.patch_size for size in cfg.eval_size)
        model.pos_embed = nn.Parameter(common.resize_pos_embed(model.pos_embed.data, model.grid))
    if cfg.eval or cfg.mode != "scratch":
        load_pretrained(model, weights, cfg.init, cfg.allow_partial, cfg.eval)
    if cfg.reinit_last_k:
        for i in range(cfg.depth - cfg.reinit_last_k, cfg.depth):
            model.blocks[i] = Block(cfg.embed_dim, cfg.num_heads, model.blocks[i].drop_path).apply(init_weights)
    if 0 < cfg.last_k < cfg.depth:
        frozen = (model.patch_embed, *model.blocks[:cfg.depth - cfg.last_k])
        for parameter in (model.cls_token, model.pos_embed, *(p for m in frozen for p in m.parameters())):
            parameter.requires_grad_(False)
    return model


# --- optimisers -------------------------------------------------------------------------------------------------------

class LARS(torch.optim.Optimizer):
    """SGD whose step on a matrix has a length in proportion to the matrix's, as MAE's linear probe takes it.

    You, Gitman, Ginsburg 2017; momentum is applied before the learning rate, and vectors take plain SGD steps.
    """

    def __init__(self, params, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=0.0, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = p.grad
                if p.ndim > 1:
                    d = d + group["weight_decay"] * p
                    length, step = p.norm(), d.norm()
                    d = d * torch.where((length > 0) & (step > 0), group["trust"] * length / step, torch.ones_like(step))
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * momentum.mul_(group["momentum"]).add_(d))


def make_optimizer(model, cfg):
    """LARS for the linear probe, otherwise AdamW with a learning rate per layer."""
    if cfg.mode == "linear":
        return LARS(model.head.parameters(), cfg.weight_decay)
    groups = common.layer_groups(model, "", cfg.depth, cfg.layer_decay, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.adam_betas, fused=True)


# --- evaluation -------------------------------------------------------------------------------------------------------

class Attempt(torch.utils.data.Dataset):
    """[i] -> read(i) and {}, or None and {file: reason}."""

    def __init__(self, read, source):
        self.read, self.source = read, source

    def __getitem__(self, i):
        try:
            return self.read(i), {}
        except Exception as error:  # broken files raise nearly anything
            return None, {common.name_of(self.source, i): f"{type(error).__name__}: {error}"}


def read_each(read, source, ids, cfg, batch_size=100):
    """Yield lists of read(i) for this process's part of `ids`. Broken files are named, left out, and limited in number."""
    new_bad = {}
    for pairs in common.make_loader(Attempt(read, source), cfg, batch_size=batch_size, sampler=ids[common.RANK::common.WORLD],
                                    collate_fn=list):
        for _, bad in pairs:
            new_bad |= bad
        if items := [item for item, bad in pairs if not bad]:
            yield items
    common.note_bad({}, new_bad, len(ids), cfg)


class Centered:
    """[i] -> center crop uint8 (3, S, S), a draw that no seed changes, label."""

    def __init__(self, source, cfg, draw):
        self.source, self.cfg, self.draw = source, cfg, draw
        self.crop = v2.Compose([v2.Resize(cfg.img_size, InterpolationMode.BICUBIC), v2.CenterCrop(cfg.img_size)])

    def read(self, i):
        image, label = self.source[i]
        return self.crop(common.to_rgb(image)), self.draw(np.random.default_rng((0, i)), self.cfg), label


@torch.no_grad()
def evaluate_encoder(model, cfg, device, autocast, samples):
    """For pretraining: loss and metrics on val/, always under the same masks; with labels also kNN accuracy -> by name.

    kNN is weighted as in DINO, k = 20, on the mean patch features of the last block. Exact for any number of processes.
    """
    encoder, sums, found = getattr(model, "exported", getattr(model, "encoder")), {}, []
    val = common.open_data(cfg, "val")
    for source, limit in ((samples.source, cfg.eval_images), (val, max(1, cfg.eval_images // 5))):
        ids, parts = np.random.default_rng(0).permutation(len(source))[:limit].tolist(), []
        for items in read_each(Centered(source, cfg, samples.draw).read, source, ids, cfg):
            imgs, draws, labels = torch.utils.data.default_collate(items)
            imgs, draws = common.to_device(imgs, draws, device)
            with autocast:
                features = encoder.norm(encoder(imgs)[-1])[:, 1:].float().mean(1)  # (B, D)
                loss, metrics = model(imgs, draws) if source is val else (torch.zeros(()), {})
            parts.append((F.normalize(features).cpu(), labels))
            for name, value in dict(n=torch.ones(()), loss=loss, **metrics).items() if source is val else ():
                sums[name] = sums.get(name, 0) + len(imgs) * value.item()
        found.append([torch.cat(x) for x in zip(*sum(common.gather(parts), []))])
    sums = {name: sum(part.get(name, 0) for part in common.gather(sums)) for name in sums}
    n = sums.pop("n")
    figures = {f"val_{name}": value / n for name, value in sums.items()}
    classes = getattr(samples.source, "classes", [])
    return figures if classes == [""] else dict(knn=knn_accuracy(*found[0], *found[1]), **figures)


def knn_accuracy(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Percent of queries (n, D) whose weighted vote of the k nearest in bank (m, D) is right; all are of length 1."""
    similarity, ids = (queries @ bank.T).topk(min(k, len(bank)))
    votes = torch.zeros(len(queries), 1 + int(max(labels.max(), bank_labels.max())))
    votes.scatter_add_(1, bank_labels[ids], (similarity / temperature).exp())
    return 100 * (votes.argmax(1) == labels).float().mean().item()

@torch.no_grad()
def accuracy(model, source, crop, cfg, device, autocast, keep=None):
    """Classify every image of `source` once, whatever the number of processes.

    keep: bool (C,), the classes that may be answered; None: all.
    -> acc1, acc5 (percent), val_loss, val_images by name; confusion matrix int64 (C, C), rows are labels.
    """
    mine = range(len(source))[common.RANK::common.WORLD]
    loader = torch.utils.data.DataLoader(common.Centred(source, crop), cfg.eval_batch, sampler=mine, collate_fn=list,
                                         num_workers=common.num_workers(cfg), worker_init_fn=common.own_group)
    C = len(model.head.weight)
    confusion = torch.zeros(C * C, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # right among the first five; cross-entropy
    for batch in loader:
        imgs, labels = common.readable(batch)
        if not len(imgs):
            continue
        labels = labels.to(device)
        with autocast:
            logits = model.logits(common.normalise(imgs, device)).float()
        if keep is not None:
            logits = logits.masked_fill(~keep.to(device), -torch.inf)
        top = logits.topk(min(5, C)).indices  # (B, 5)
        confusion += (labels * C + top[:, 0]).bincount(minlength=C * C)
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack(((top == labels.unsqueeze(1)).sum().double(), cross_entropy.double()))
    if dist.is_initialized():
        dist.all_reduce(confusion)
        dist.all_reduce(sums)
    confusion, (right5, loss) = confusion.view(C, C).cpu(), sums.tolist()
    n = confusion.sum().item()
    if not n:
        common.fail(f"none of the {len(source)} images could be read, e.g. {source.name(0)}")
    return dict(acc1=100 * confusion.trace().item() / n, acc5=100 * right5 / n, val_loss=loss / n, val_images=n), confusion


def evaluate(model, device, autocast, due, cfg, source):
    """`accuracy` on val/ where it is due; batch norm's averages are the first process's."""
    if not due(cfg.eval_every):
        return {}
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    figures, confusion = accuracy(model, source, centre_crop(cfg.eval_size or (cfg.img_size,) * 2, cfg.crop_pct), cfg,
                                  device, autocast)
    if cfg.confusion and common.RANK == 0:
        path = Path(cfg.out_dir) / "confusion.csv"
        try:
            write_confusion(confusion, source.classes, path)
        except OSError as error:
            common.say(f"warning    cannot write {path.absolute()}: {error.strerror}")
    return figures


def write_confusion(confusion, classes, path):
    """A table for any spreadsheet: a row per class with its accuracy, and how often it was taken for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["class", "images", "accuracy", *classes])
        for i, (name, row) in enumerate(zip(classes, confusion.tolist())):
            table.writerow([name, sum(row), f"{100 * row[i] / max(1, sum(row)):.2f}", *row])


# --- main -------------------------------------------------------------------------------------------------------------

def knn(cfg, weights, device, autocast, sources):
    """Print the accuracy of the frozen encoder's nearest neighbours."""
    vit = ViT(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads)
    weights["pos_embed"] = common.resize_pos_embed(weights["pos_embed"], vit.grid)
    common.load_weights(vit, weights, cfg.init)
    limits = (cfg.knn_images or len(sources[0]), len(sources[1]))
    figure, compared, asked = common.knn_accuracy(vit.to(device).eval(), cfg, device, autocast, sources, limits)
    common.say(f"knn        {figure:.2f}% of {asked:,} images, against {compared:,}")
    common.leave()


def main():
    """Command line -> model -> training or evaluation."""
    cfg = common.parse(Config, RECIPES, __doc__, flag="recipe", default=lambda given: {
        "linear": "linear", "scratch": "scratch"}.get(given.get("mode")))
    try:
        cfg, weights, trained_on = sized(cfg)
        device, autocast = common.setup(cfg)
        sources = open_labelled(cfg)
        classes = [str(c) for c in sources[-1].classes]
        if cfg.mode == "knn" and not cfg.eval:
            return knn(cfg, weights, device, autocast, sources)
        if not cfg.eval and (cfg.mode == "linear" or trained_on not in ([], classes)):  # a new head, or one for other things
            weights = {k: v for k, v in weights.items() if not k.startswith(("head.", "bn."))}
        torch.manual_seed(cfg.seed)
        model = build(cfg, weights, len(classes))
        other = [f"{was}, --data has {now}" for was, now in zip(trained_on, classes) if was != now]
        common.check(not cfg.eval or not other, f"{cfg.init} was trained on other classes: {' '.join(other[:1])}")
    except ValueError as error:
        common.fail(str(error))
    if not cfg.eval:
        return common.train(cfg, model, samples=Samples(sources[0], cfg), optimizer=make_optimizer,
                            evaluate=functools.partial(evaluate, cfg=cfg, source=sources[1]))
    figures = evaluate(model.to(device).eval(), device, autocast, lambda epochs: True, cfg, sources[0])
    common.say("eval       " + "  ".join(f"{k} {v:.6g}" for k, v in figures.items()))
    common.leave()


if __name__ == "__main__":
    main()
