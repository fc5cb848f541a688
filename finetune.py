"""
Evaluate a pretrained encoder by fine-tuning, a linear probe, or nearest neighbors; train from scratch to compare.

    --mode finetune    train all weights; layer-wise learning rates, mixup, RandAugment [MAE App. A.1]
    --mode linear      train a linear layer on frozen features with LARS [MAE App. A.1]; needs a linear preset, which is
                       tuned for ImageNet's 1.28 million images
    --mode probe       logistic regression on frozen features, [CLS] and the patches' mean; nothing to tune
    --mode knn         no training: weighted vote of the 20 nearest training images [DINO]
    --mode scratch     train from random weights [MAE App. A.2]: --preset scratch; --init then gives only the sizes
    --eval             no training: accuracy of a fine-tuned model.pt on val/
    --predict PHOTOS   no training: out_dir/predictions.csv, the five classes that a model.pt finds most probable
    --embed PHOTOS     no training: out_dir/features.npz, an encoder's features; PHOTOS is a file or a folder

--init takes encoder.pt of any method here, a ViT of MAE, DINO, BEiT v2, or timm, also as safetensors, or model.pt of
this script, but not for knn, probe, and --embed if it reads the patches' mean: it lacks the encoder's norm.
Training prints which tensors are used, initialized anew, and left out. The last model is what is evaluated and saved,
in out_dir/model.pt; with --ema the average of its weights.

One training step, `Classifier.forward`, for B images, N patches, width D, C classes:
    imgs, labels = mix(imgs, labels)            # mixup or cutmix within the batch; labels become soft, (B, C)
    tokens = vit(imgs)[-1]                      # the last block's output, [CLS] first, (B, 1 + N, D)
    x      = fc_norm(tokens[:, 1:].mean(1))     # with --pool cls: norm(tokens)[:, 0]
    logits = head(bn(x))                        # bn, without parameters, only in --mode linear; model.pt has it in head
    loss   = cross_entropy(logits, labels)      # smoothed labels

The learning rate of layer i is base_lr * batch_size / 256 * layer_decay ** (depth + 1 - i). The embeddings are layer 0,
block i is layer i + 1, head and fc_norm are layer depth + 1.

Inputs are normalized with ImageNet's mean and deviation, also for timm's files trained with 0.5.

    python finetune.py --preset quick --init out/quick/encoder.pt                       # generated images, 2 CPU cores
    torchrun --nproc_per_node=8 finetune.py --preset ddae --data IMAGENET --init out/encoder.pt --out_dir out/ft
    torchrun --nproc_per_node=8 finetune.py --preset linear --data IMAGENET --init out/encoder.pt --out_dir out/linear
    python finetune.py --eval --data IMAGENET --init out/ft/model.pt                    # needs val/ only
    python finetune.py --predict PHOTOS --init out/ft/model.pt
"""
import copy
import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms import v2

import beit2
import common
from augment import Erase, FirstCrop, RandAugment
from ddae import ViT
from evaluate import choose, knn, outputs, predict, probe, save_features, standard_error, sync_buffers
from vit_files import read_weights, resize_pos_embed, vit_sizes, vit_weights

VITS = dict(plain=ViT, beit2=beit2.ViT)


@dataclass(frozen=True)
class Config(common.RunConfig):
    mode: Literal["finetune", "linear", "probe", "knn", "scratch"] = "finetune"  # [ours] as listed above
    eval: bool = False  # [ours] no training: accuracy of --init on val/
    predict: str = ""  # [ours] no training: classes of this image file, or of all in this folder and below
    embed: str = ""  # [ours] no training: features of this image file, or of all in this folder and below
    split: str = "val"  # [ours] folder in --data, such as test, that everything evaluates on instead of val/
    eval_every: float = 1.0  # [ours] epochs between evaluations on val/; 0: never
    eval_images: int = 0  # [ours] with --mode probe and knn: images of train/ to use; 0: all
    vit: Literal["", "plain", "beit2"] = ""  # [ours] kind of ViT; none: as in --init, else plain
    img_size: int = 0  # [MAE] side of the crop, pixels; 0: as in --init, else 224
    patch_size: int = 0  # [MAE] 0: as in --init, else 16
    embed_dim: int = 0  # [MAE] 0: as in --init, else 768
    depth: int = 0  # [MAE] 0: as in --init, else 12
    num_heads: int = 0  # [MAE] 0: as in --init, else 12
    pool: Literal["mean", "cls"] = "mean"  # [MAE] the head reads the patches' mean, or [CLS]; --eval: as in --init
    layer: int = 0  # [BootMAE] block whose features the head reads; 0: the last
    last_k: int = 0  # [DeepMIM Fig. 7] train only the last k blocks and the head; 0: everything
    reinit_last_k: int = 0  # [DeepMIM Fig. 8] initialize the last k blocks anew before fine-tuning
    epochs: int = 100  # [MAE] ViT-B; ViT-L 50
    warmup_epochs: float = 5.0  # [MAE] linear warm-up
    batch_size: int = 1024  # [MAE] images per optimizer step, over all processes
    base_lr: float = 5e-4  # [MAE] learning rate of the head = base_lr * batch_size / 256
    min_lr: float = 1e-6  # [MAE] learning rate at the end of the cosine
    layer_decay: float = 0.65  # [MAE] factor from each layer to the one below
    weight_decay: float = 0.05  # [MAE] not on biases, norms, position table, [CLS]
    adam_betas: tuple[float, ...] = (0.9, 0.999)  # [MAE] AdamW's two moments
    drop_path: float = 0.1  # [MAE] fraction of samples that skip a branch of the last block
    smoothing: float = 0.1  # [MAE] label smoothing
    mixup: float = 0.8  # [MAE] alpha of mixup; 0: none
    cutmix: float = 1.0  # [MAE] alpha of cutmix, which alternates with mixup at random; 0: none
    rand_augment: float = 9.0  # [MAE] magnitude of RandAugment, of 10; 0: none
    erase: float = 0.25  # [MAE] probability of random erasing
    crop_min: float = 0.08  # [MAE] smallest area of the random crop, fraction of the image
    ema: float = 0.0  # [MAE App. A.2] decay of the average of the weights; 0: none
    crop_pct: float = 0.0  # [MAE] center crop / resized shorter side; 0: as in --init, else 224/256, above 224 pixels 1

    def __post_init__(self):
        super().__post_init__()
        assert self.init or self.mode == "scratch" and not self.eval, "--init is missing: encoder.pt, for instance"
        assert self.mode != "linear" or self.eval or not (self.mixup or self.cutmix or self.drop_path or self.last_k), \
            "--mode linear needs --preset linear, linear_large, linear_boot, or linear_boot_large, and no --last_k"
        for name in ("layer_decay", "drop_path", "smoothing", "erase", "crop_min", "ema", "crop_pct"):
            assert getattr(self, name) <= 1, f"--{name} must be at most 1"
        assert self.rand_augment <= 10, "--rand_augment must be at most 10"


SCRATCH = dict(mode="scratch", epochs=300, warmup_epochs=20, batch_size=4096, base_lr=1e-4, weight_decay=0.3,
               layer_decay=1.0, adam_betas=(0.9, 0.95), min_lr=0.0, erase=0.0, ema=0.9999)
LINEAR = dict(mode="linear", epochs=90, warmup_epochs=10, batch_size=16384, base_lr=0.1, min_lr=0.0, weight_decay=0.0,
              layer_decay=1.0, drop_path=0.0, smoothing=0.0, mixup=0.0, cutmix=0.0, rand_augment=0, erase=0.0,
              pool="cls")
QUICK = dict(epochs=1, batch_size=64, base_lr=4e-3, rand_augment=0, erase=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0,
             crop_pct=1.0, crop_min=0.4, warmup_epochs=0.2)
PRESETS = {
    "mae": dict(),
    "mae_large": dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "mae_huge": dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3),
    "ddae": dict(),  # states 8e-3 at batch 1024; at 4096, as in CAE, this is MAE's rate
    "ddae_small": dict(base_lr=1e-3, layer_decay=0.75),  # 1.6e-2 at 4096
    "ddae_beit": dict(base_lr=1e-3, warmup_epochs=20),  # 4e-3 at 1024 as in BEiT, whose protocol DDAE names
    "ddae_literal": dict(base_lr=2e-3),  # 8e-3 at 1024
    "deepmim": dict(base_lr=5e-5),  # 2e-4 at 1024, not a base rate: its log for CLIP, below, peaks at the stated 4e-4
    "deepmim_clip": dict(base_lr=1e-4),
    "deepmim_800": dict(base_lr=5e-5, layer_decay=0.6),  # after 800 epochs
    "deepmim_code": dict(base_lr=1e-4, layer_decay=0.6),  # its command, for CLIP after 1600 epochs
    "sdae": dict(batch_size=2048, warmup_epochs=10),  # states 5e-4, a base rate as in MAE
    "sdae_large": dict(batch_size=2048, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "beit2": dict(base_lr=1.25e-4, warmup_epochs=20),  # [code: BEiT v2] 5e-4 at 1024; after 300 epochs of pretraining
    "beit2_1600": dict(base_lr=1.25e-4, warmup_epochs=20, layer_decay=0.6, drop_path=0.2),
    "beit2_large": dict(base_lr=1.25e-4, epochs=50, layer_decay=0.8, drop_path=0.2),  # after 1600 epochs: 5e-5
    "scratch": SCRATCH,
    "scratch_large": SCRATCH | dict(epochs=200, drop_path=0.2),
    "linear": LINEAR,
    "linear_large": LINEAR | dict(epochs=50),
    "linear_boot": LINEAR | dict(pool="mean", layer=10),  # [code: BootMAE]
    "linear_boot_large": LINEAR | dict(epochs=50, base_lr=0.07, pool="mean", layer=18),
    "quick": QUICK | dict(layer_decay=0.9, out_dir="out/quick_finetune"),
    "quick_scratch": QUICK | dict(mode="scratch", layer_decay=1.0, patch_size=4, img_size=32, embed_dim=96, depth=4,
                                  num_heads=3, out_dir="out/quick_scratch"),
}


# --- data -------------------------------------------------------------------------------------------------------------

class Samples(common.Samples):
    """Augmented crops uint8 (3, S, S) with their labels."""

    def __init__(self, source, cfg):
        super().__init__(source, cfg)
        if cfg.mode == "linear":
            self.crop = v2.Compose([FirstCrop(cfg.img_size, (cfg.crop_min, 1.0)), v2.RandomHorizontalFlip()])
        augment = [RandAugment(cfg.rand_augment)] if cfg.rand_augment else []
        self.crop = v2.Compose([self.crop, *augment, *([Erase(cfg.erase)] if cfg.erase else [])])

    def sample(self, item, rng):
        return item


# --- from --init to the model -----------------------------------------------------------------------------------------

def settle(cfg):
    """Read --init -> Config with the sizes, pool, and crop that it decides; its tensors by name; its class names.

    A resumed run does not need the file: model.pt has its sizes, and common.train loads the weights from last.pt.
    """
    own = Path(cfg.out_dir) / "model.pt"
    saved = own.exists() and any(own.with_name(name).exists() for name in ("last.pt", "last.prev.pt"))
    resumes = saved and not cfg.eval and cfg.mode not in ("knn", "probe")
    path, weights, was = own if resumes else cfg.init, {}, {}
    sizes = dict(vit="plain", img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12)
    if path:
        weights, was = read_weights(path)
        weights = vit_weights(weights, path)
        config = dict(num_heads=cfg.num_heads) | was if cfg.num_heads else was
        sizes |= beit2.sizes(weights) or vit_sizes(weights, config, path)
    for name, size in sizes.items():
        given = getattr(cfg, name)
        if path and name != "img_size" and given and given != size:
            sys.exit(f"--{name} {given}, but {path} has {size}")
        sizes[name] = given or size
    img_size, patch_size, depth = sizes["img_size"], sizes["patch_size"], sizes["depth"]
    if img_size % patch_size or max(cfg.layer, cfg.last_k, cfg.reinit_last_k) > depth:
        sys.exit(f"--img_size {img_size} is not divisible by {patch_size}, the patch size, or --layer, --last_k, or "
                 f"--reinit_last_k is above {depth}, the number of blocks")
    crop_pct = cfg.crop_pct or was.get("crop_pct") or (0.875 if img_size <= 224 else 1.0)
    cfg = replace(cfg, crop_pct=crop_pct, **sizes | dict(depth=cfg.layer or depth))  # blocks above --layer are not used
    if cfg.eval:
        cfg = replace(cfg, mode="linear" if "bn.running_mean" in weights else "finetune",
                      pool="mean" if "fc_norm.weight" in weights else "cls")
    if resumes or cfg.mode == "scratch":
        return cfg, {}, []
    if "pos_embed" in weights:
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], (img_size // patch_size,) * 2)
    return cfg, weights, was.get("classes", [])


class Head(nn.Module):
    """Makes a ViT's subclass a classifier, under timm's names; cfg as from `settle`. --mode linear trains it alone."""

    def __init__(self, cfg, num_classes):
        super().__init__(cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads, cfg.drop_path)
        self.cfg, linear = cfg, cfg.mode == "linear"
        if cfg.pool == "mean":
            self.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(cfg.embed_dim, eps=1e-6)
        self.requires_grad_(not linear)  # the position table is trained as well, as in MAE's fine-tuning
        self.bn = nn.BatchNorm1d(cfg.embed_dim, affine=False, eps=1e-6) if linear else nn.Identity()
        self.head = nn.Linear(cfg.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01 if linear else 2e-5)
        nn.init.zeros_(self.head.bias)
        mixes = [v2.MixUp(alpha=cfg.mixup, num_classes=num_classes)] if cfg.mixup else []
        mixes += [v2.CutMix(alpha=cfg.cutmix, num_classes=num_classes)] if cfg.cutmix else []
        self.mixes = v2.RandomChoice(mixes) if mixes else None

    @torch.compiler.disable  # every decision in it would break the graph
    def mix(self, imgs, labels):
        """Mixup or cutmix within the batch, by chance: labels (B,) -> (B, C)."""
        return self.mixes(imgs, labels)

    def forward(self, imgs, labels):
        """imgs (B, 3, H, W), labels (B,) -> loss (), metrics: name -> tensor ()."""
        if self.mixes:
            imgs, labels = self.mix(imgs, labels)
        logits = self.logits(imgs)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.cfg.smoothing)
        return loss, {} if self.mixes else {"train_acc1": 100 * (logits.argmax(-1) == labels).float().mean()}

    def logits(self, imgs):
        """imgs (B, 3, H, W) -> (B, C)."""
        tokens = super().forward(imgs)[-1]  # (B, 1 + N, D)
        x = self.fc_norm(tokens[:, 1:].mean(1)) if self.cfg.pool == "mean" else self.norm(tokens)[:, 0]  # (B, D)
        return self.head(self.bn(x))

    @property
    @torch.no_grad()
    def exported(self):
        """What is evaluated and saved: the average of the weights, if any; without batch norm, which timm has not."""
        model = getattr(self, "average", self)
        if isinstance(self.bn, nn.BatchNorm1d):
            model = copy.deepcopy(model)
            model.head.weight *= (self.bn.running_var + self.bn.eps).rsqrt()
            model.head.bias -= model.head.weight @ self.bn.running_mean
            model.bn = nn.Identity()
        return model

    def after_step(self, step, steps_per_epoch):
        if self.cfg.ema:
            average = list(self.average.parameters())
            get_ema_multi_avg_fn(self.cfg.ema)(average, list(self.parameters())[:len(average)], None)


def build(cfg, weights, num_classes):
    """Classifier with `weights`, if any, besides a head that is initialized anew for training."""
    model = type("Classifier", (Head, VITS[cfg.vit]), {})(cfg, num_classes)
    if weights:
        top = [f"blocks.{i}." for i in range(cfg.depth - cfg.reinit_last_k, cfg.depth)]
        own, head = model.state_dict(), () if cfg.eval else ("head.", "bn.", *top)
        used = {k: v for k, v in weights.items() if k in own and not k.startswith(head)}
        anew = {k: v for k, v in own.items() if k not in used and k.startswith((*head, "fc_norm."))}
        common.load_weights(model, used if cfg.eval else used | anew, cfg.init)
        for what, names in (("used", used), ("initialized anew", anew), ("left out", weights.keys() - used)):
            counts = Counter(sorted(name.split(".")[0] for name in names))
            common.print0(f"{cfg.init}, tensors {what}: {', '.join(f'{k} ({n})' for k, n in counts.items()) or 'none'}")
    if 0 < cfg.last_k < cfg.depth:
        frozen = "cls_token", "pos_embed", "patch_embed.", *(f"blocks.{i}." for i in range(cfg.depth - cfg.last_k))
        for name, p in model.named_parameters():
            if name.startswith(frozen):
                p.requires_grad_(False)
    if cfg.ema:
        model.average = copy.deepcopy(model).requires_grad_(False)  # its parameters come after the others
    return model


# --- optimizers -------------------------------------------------------------------------------------------------------

def layer_groups(model, prefix, depth, layer_decay, weight_decay, skip=("cls_token", "pos_embed")):
    """Parameter groups with lr_scale = layer_decay ** (depth + 1 - layer).

    In the ViT whose names begin with `prefix`, embeddings are layer 0 and block i is layer i + 1; all else is layer
    depth + 1. No weight decay on vectors and on names that end in one of `skip`. Frozen parameters are left out.
    """
    if depth > 12 and layer_decay < 0.75:
        common.print0(f"warning: --layer_decay {layer_decay:g}, and likely learning rate and drop path, are for ViT-B; "
                      "presets for larger encoders end in _large or _huge")
    groups = {}
    for name, p in model.named_parameters():
        layer = depth + 1
        if name.startswith(tuple(prefix + part for part in ("cls_token", "pos_embed", "patch_embed"))):
            layer = 0
        elif name.startswith(f"{prefix}blocks."):
            layer = int(name.removeprefix(prefix).split(".")[1]) + 1
        if p.requires_grad:
            decay = 0.0 if p.ndim <= 1 or name.endswith(tuple(skip)) else weight_decay
            groups.setdefault((layer, decay), []).append(p)
    return [dict(params=groups[layer, decay], weight_decay=decay, lr_scale=layer_decay ** (depth + 1 - layer))
            for layer, decay in sorted(groups)]


class LARS(torch.optim.Optimizer):
    """SGD whose step on a matrix is proportional in length to the matrix; vectors take plain steps. [code: MAE]

    You, Gitman, Ginsburg 2017. Momentum is applied before the learning rate.
    """

    def __init__(self, params, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=0.0, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                d = p.grad
                if p.ndim > 1:
                    d = d + group["weight_decay"] * p
                    scale = group["trust"] * p.norm() / d.norm()
                    d = d * torch.where((scale > 0) & scale.isfinite(), scale, 1)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * momentum.mul_(group["momentum"]).add_(d))


def make_optimizer(model, cfg):
    """LARS for the linear probe, otherwise AdamW with a learning rate per layer."""
    if cfg.mode == "linear":
        return LARS(model.head.parameters(), cfg.weight_decay)
    groups = layer_groups(model, "", cfg.depth, cfg.layer_decay, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.adam_betas, fused=True)


# --- evaluation -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, cfg, device, autocast, samples=None, source=None, keep=None):
    """Classify every image of `source` (None: val/) -> acc1, its standard error, acc5 (percent), val_loss, val_images.

    keep: bool (C,), the classes that may be answered; None: all.
    """
    source = source or common.open_data(cfg, cfg.split)
    sync_buffers(model)
    [(logits, labels, _)] = outputs(model.exported.logits, cfg, device, autocast, (source, range(len(source))))
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    (n, C), loss = logits.shape, F.cross_entropy(logits, labels).item()
    right = logits.topk(min(5, C)).indices == labels.unsqueeze(1)  # (n, 5)
    acc1, acc5 = (100 * right[:, :k].sum().item() / n for k in (1, 5))
    if samples and cfg.mode == "linear" and loss > math.log(C):
        common.print0(f"warning: val_loss is above that of equal odds, ln({C}); --mode linear is tuned for ImageNet's "
                      "1.28 million images: lower --base_lr, or use --mode probe")
    return dict(acc1=acc1, acc1_se=standard_error(acc1, n), acc5=acc5, val_loss=loss, val_images=n)


# --- main -------------------------------------------------------------------------------------------------------------

@common.explained()
def main():
    cfg = common.parse(Config, PRESETS, __doc__)
    cfg = replace(cfg, eval=cfg.eval or bool(cfg.predict), mode="knn" if cfg.embed else cfg.mode)
    cfg, weights, trained_on = settle(cfg)
    device, autocast = common.setup(cfg)
    if cfg.predict:
        classes = trained_on or list(range(len(weights.get("head.weight", []))))
        return predict(build(cfg, weights, len(classes)).to(device).eval(), classes, cfg, device, autocast)
    if cfg.mode in ("knn", "probe"):
        vit = VITS[cfg.vit](cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads).eval().to(device)
        common.load_weights(vit, weights, cfg.init)
        cfg = replace(cfg, crop_pct=1.0)
    if cfg.embed:
        return save_features(vit, cfg, device, autocast)
    val = common.open_data(cfg, cfg.split)
    train = val if cfg.eval else common.open_data(cfg, "train")
    names, classes = ([str(c) for c in getattr(source, "classes", [])] for source in (train, val))
    if names != classes or classes in ([], [""]):
        sys.exit(f"--data {cfg.data} needs the same class folders in train/ and {cfg.split}/; only in one: "
                 f"{sorted(set(names) ^ set(classes))[:5]}")
    if cfg.eval and trained_on not in ([], classes):
        sys.exit(f"{cfg.init} is for other classes than --data: {trained_on[:4]} ... and {classes[:4]} ...")
    if cfg.mode in ("knn", "probe"):
        sets = (train, choose(len(train), cfg.eval_images)), (val, range(len(val)))
        metrics = (knn if cfg.mode == "knn" else probe)(vit, cfg, device, autocast, *sets)
    else:
        torch.manual_seed(cfg.seed)
        model = build(cfg, weights, len(classes))
        if cfg.mode == "linear" and not cfg.eval:
            common.print0("--mode linear is tuned for ImageNet's 1.28 million images; --mode probe needs no tuning")
        if not cfg.eval:
            return common.train(cfg, model, Samples(train, cfg), make_optimizer, evaluate=evaluate)
        metrics = evaluate(model.to(device).eval(), cfg, device, autocast)
    common.print0("  ".join(f"{k} {v:.6g}" for k, v in metrics.items()))


if __name__ == "__main__":
    main()
