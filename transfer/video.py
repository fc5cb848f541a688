"""
Video classification: fine-tuning of videomae.py's encoder, and evaluation with several clips and crops.

Recipe: DeepMIM's appendix, arXiv 2303.08817 [paper]; what it leaves open is VideoMAE's, github.com/MCG-NJU/VideoMAE
[code]. --init takes encoder.pt, model.pt of this script, or a file of VideoMAE, pretrained or fine-tuned.

One training step, `VideoClassifier.forward`, for B videos, of each `repeats` augmented copies of one clip, C classes:
    clips, labels = mix(clips, labels)                    # mixup or cutmix, the same in all frames; labels (B, C)
    tokens = vit(clips)[-1]                               # the last block's output (B, N, D)
    logits = head(fc_norm(tokens.mean(1)))
    loss   = cross_entropy(logits, labels)                # smoothed labels

During training a video of val/ is judged by the center crop of its middle clip; with --eval, by the mean probability
over `clips` clips, evenly spread, times `crops` square crops, evenly spread along the longer side.

Differs from VideoMAE's code: erased places have the same noise in all frames; during training a clip takes every
stride-th frame, where the code stretches 16 frames over 64.

    python -m transfer.video --preset quick --init out/quick_videomae/encoder.pt         # generated videos, 2 CPU cores
    torchrun --nproc_per_node=8 -m transfer.video --data KINETICS --init out/encoder.pt --out_dir out/video
    torchrun --nproc_per_node=8 -m transfer.video --eval --data KINETICS --init out/video/model.pt
"""
import argparse
import functools
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

import common
import videomae
import videos
from augment import Erase, RandAugment
from evaluate import read_each
from finetune import layer_groups


@dataclass(frozen=True)
class Config(common.RunConfig):
    data: str = "motions"  # [ours] folder with train/ and val/ of class folders of videos; motions (generated)
    eval: bool = False  # [ours] no training: accuracy of --init on val/ with several clips and crops
    eval_every: float = 1.0  # [ours] epochs between evaluations on val/ with one clip and crop; 0: never
    img_size: int = 0  # [code] side of the crop, pixels; 0: as in --init, else 224
    patch_size: int = 0  # [code] 0: as in --init, else 16
    num_frames: int = 0  # [code] frames of a clip; 0: as in --init, else 16
    tubelet_size: int = 0  # [code] 0: as in --init, else 2
    stride: int = 0  # [code] every stride-th frame of the video is in the clip; 0: as in --init, else 4
    embed_dim: int = 0  # [code] 0: as in --init, else 768
    depth: int = 0  # [code] 0: as in --init, else 12
    num_heads: int = 0  # [code] 0: as in --init, else 12
    epochs: int = 75  # [paper App. A] VideoMAE 100 for ViT-B after 800 epochs
    warmup_epochs: float = 5.0  # [paper App. A] linear warm-up
    batch_size: int = 512  # [code] videos per optimizer step, over all processes
    repeats: int = 2  # [code] augmented copies of a video's clip in the batch, which do not count in batch_size
    base_lr: float = 1e-3  # [paper App. A] learning rate of the head = base_lr * batch_size / 256
    min_lr: float = 2e-6  # [code] learning rate at the end of the cosine
    layer_decay: float = 0.75  # [paper App. A] factor from each layer to the one below
    weight_decay: float = 0.05  # [paper App. A] not on biases and norms
    adam_betas: tuple[float, ...] = (0.9, 0.999)  # [code] AdamW's two moments
    drop_path: float = 0.1  # [paper App. A] fraction of samples that skip a branch of the last block
    smoothing: float = 0.1  # [paper App. A] label smoothing
    mixup: float = 0.8  # [paper App. A] alpha of mixup; 0: none
    cutmix: float = 1.0  # [paper App. A] alpha of cutmix, which alternates with mixup at random; 0: none
    rand_augment: float = 7.0  # [code] magnitude of RandAugment, of 10; 0: none
    erase: float = 0.25  # [code] probability of random erasing
    crop_min: float = 0.08  # [code] smallest area of the random crop, fraction of the frame
    flip: bool = True  # [code] flip half of the clips; not for Something-Something
    clips: int = 5  # [paper App. A] with --eval: clips of each video
    crops: int = 3  # [paper App. A] with --eval: crops of each clip

    def __post_init__(self):
        super().__post_init__()
        assert self.init or not self.eval, "--init is missing: model.pt of this script, for instance"
        for name in ("layer_decay", "drop_path", "smoothing", "erase", "crop_min"):
            assert getattr(self, name) <= 1, f"--{name} must be at most 1"
        assert self.rand_augment <= 10, "--rand_augment must be at most 10"


SIZES = dict(img_size=224, patch_size=16, num_frames=16, tubelet_size=2, stride=4, embed_dim=768, depth=12,
             num_heads=12)
PRESETS = {
    "quick": dict(epochs=3, warmup_epochs=0.3, batch_size=32, repeats=1, base_lr=8e-3, min_lr=0.0, layer_decay=0.9,
                  drop_path=0.0, mixup=0.0, cutmix=0.0, rand_augment=0.0, erase=0.0, crop_min=0.8, clips=3, crops=1,
                  out_dir="out/quick_video"),
}


# --- data -------------------------------------------------------------------------------------------------------------

class Framewise(nn.Module):
    """Applies a random transform of images to all frames of a clip uint8 (T, 3, H, W), with the same random numbers."""

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, clip):
        state, frames = torch.get_rng_state(), []
        for frame in clip:
            torch.set_rng_state(state)
            frames.append(self.transform(frame))
        return torch.stack(frames)


class Samples(videomae.Samples):
    """Augmented copies of a clip uint8 (repeats, T, 3, S, S) with their labels (repeats,)."""

    def __init__(self, source, cfg):
        super().__init__(source, cfg, None)
        twice = v2.Compose([RandAugment(cfg.rand_augment)] * 2)  # four operations, each with probability 1/2
        self.augment = v2.Compose([
            *([Framewise(twice)] if cfg.rand_augment else []),
            v2.RandomResizedCrop(cfg.img_size, (cfg.crop_min, 1.0), interpolation=InterpolationMode.BICUBIC),
            *([v2.RandomHorizontalFlip()] if cfg.flip else []),
            *([Erase(cfg.erase)] if cfg.erase else [])])

    def sample(self, item, rng):
        clip, label = item
        copies = [self.augment(clip) for _ in range(self.cfg.repeats)]
        return torch.stack(copies), torch.full((len(copies),), label)

    def collate(self, batch):
        """-> clips uint8 (B * repeats, T, 3, S, S), labels (B * repeats,), unreadable files."""
        clips, labels, bad = super().collate(batch)
        return clips.flatten(0, 1), labels.flatten(), bad


# --- model ------------------------------------------------------------------------------------------------------------

def settle(cfg):
    """Read --init -> Config with its sizes; its tensors by name; its class names.

    A resumed run does not need the file: model.pt has its sizes, and common.train loads the weights from last.pt.
    """
    own = Path(cfg.out_dir) / "model.pt"
    resumes = not cfg.eval and own.exists() and any(own.with_name(n).exists() for n in ("last.pt", "last.prev.pt"))
    path, weights, was, sizes = own if resumes else cfg.init, {}, {}, {}
    if path:
        with torch.serialization.safe_globals([argparse.Namespace]):  # VideoMAE's flags are in its files
            file = common.load(path)
        was, weights = file.get("config", {}), file.get("model", file.get("module", file))
        weights = {k.removeprefix("encoder."): v for k, v in weights.items() if torch.is_tensor(v)}
        if not {"patch_embed.proj.weight", "blocks.0.attn.q_bias"} <= weights.keys():
            sys.exit(f"{path} holds no encoder of videos; give encoder.pt of videomae.py")
        D, _, t, p, _ = weights["patch_embed.proj.weight"].shape
        depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
        heads = cfg.num_heads or (16 if D == 1280 else max(1, D // 64))  # only our files say
        fixed = dict(patch_size=p, tubelet_size=t, embed_dim=D, depth=depth, num_heads=was.get("num_heads", heads))
        for name, size in fixed.items():
            if getattr(cfg, name) not in (0, size):
                sys.exit(f"--{name} {getattr(cfg, name)}, but {path} has {size}")
        sizes = was | fixed
    cfg = replace(cfg, **{name: getattr(cfg, name) or sizes.get(name, size) for name, size in SIZES.items()})
    if cfg.img_size % cfg.patch_size or cfg.num_frames % cfg.tubelet_size:
        sys.exit(f"--img_size must be divisible by {cfg.patch_size}, --num_frames by {cfg.tubelet_size}")
    return cfg, {} if resumes else weights, was.get("classes", [])


class VideoClassifier(videomae.ViT):
    """ViT with a head, under VideoMAE's names; cfg as from `settle`."""

    def __init__(self, cfg, num_classes):
        super().__init__(cfg.img_size, cfg.patch_size, cfg.num_frames, cfg.tubelet_size, cfg.embed_dim, cfg.depth,
                         cfg.num_heads, cfg.drop_path)
        self.cfg, self.norm = cfg, nn.Identity()
        self.fc_norm = nn.LayerNorm(cfg.embed_dim, eps=1e-6)
        self.head = nn.Linear(cfg.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        mixes = [v2.MixUp(alpha=cfg.mixup, num_classes=num_classes)] if cfg.mixup else []
        mixes += [v2.CutMix(alpha=cfg.cutmix, num_classes=num_classes)] if cfg.cutmix else []
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def forward(self, clips, labels):
        """clips (B, T, 3, H, W), labels (B,) -> loss (), metrics: name -> tensor ()."""
        if self.mix:
            clips, labels = self.mix(tv_tensors.Video(clips), labels)  # labels (B, C)
            clips = clips.as_subclass(torch.Tensor)
        logits = self.logits(clips)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.cfg.smoothing)
        return loss, {} if self.mix else {"train_acc1": 100 * (logits.argmax(-1) == labels).float().mean()}

    def logits(self, clips):
        """clips (B, T, 3, H, W) -> (B, C)."""
        return self.head(self.fc_norm(super().forward(clips)[-1].mean(1)))


def build(cfg, weights, num_classes):
    """VideoClassifier with `weights`, if any, besides a head that is initialized anew for training."""
    model = VideoClassifier(cfg, num_classes)
    if weights:
        own, head = model.state_dict(), () if cfg.eval else ("head.",)
        used = {k: v for k, v in weights.items() if k in own and not k.startswith(head)}
        anew = {k: v for k, v in own.items() if k not in used and k.startswith((*head, "fc_norm."))}
        common.load_weights(model, used if cfg.eval else used | anew, cfg.init)
        for what, names in (("used", used), ("initialized anew", anew), ("left out", weights.keys() - used)):
            counts = Counter(sorted(name.split(".")[0] for name in names))
            common.print0(f"{cfg.init}, tensors {what}: {', '.join(f'{k} ({n})' for k, n in counts.items()) or 'none'}")
    return model


def make_optimizer(model, cfg):
    """AdamW with a learning rate per layer."""
    groups = layer_groups(model, "", cfg.depth, cfg.layer_decay, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.adam_betas, fused=True)


# --- evaluation -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, cfg, device, autocast, samples=None, clips=1, crops=1):
    """Classify every video of val/ once, by the mean probability over its views -> metrics by name."""
    source = videos.open_data(cfg, "val")
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # right, right in five, loss, videos
    read, batch_size = functools.partial(videos.read_views, source, cfg, clips, crops), max(1, 16 // (clips * crops))
    for views, labels, _ in read_each(read, source, range(len(source)), cfg, batch_size, default_collate):
        clip, labels = common.to_device(views.flatten(0, 1), labels, device)  # (B * views, T, 3, S, S), (B,)
        with autocast:
            logits = model.logits(clip).float()
        probability = logits.softmax(-1).unflatten(0, views.shape[:2]).mean(1)  # (B, C)
        if not probability.isfinite().all():
            sys.exit(f"logits are not finite, model from {cfg.init}; try --precision fp32")
        right = probability.topk(min(5, probability.shape[1])).indices == labels.unsqueeze(1)  # (B, 5)
        loss = F.nll_loss(probability.log(), labels, reduction="sum")
        sums += torch.stack((right[:, 0].sum(), right.sum(), loss, torch.tensor(len(labels), device=device)))
    if common.WORLD > 1:
        dist.all_reduce(sums)
    right1, right5, loss, n = sums.tolist()
    return dict(acc1=100 * right1 / n, acc5=100 * right5 / n, val_loss=loss / n, val_videos=n)


@common.explained()
def main():
    cfg, weights, trained_on = settle(common.parse(Config, PRESETS, __doc__))
    device, autocast = common.setup(cfg)
    val = videos.open_data(cfg, "val")
    train = val if cfg.eval else videos.open_data(cfg, "train")
    if train.classes != val.classes or val.classes == [""]:
        sys.exit(f"--data {cfg.data} needs the same class folders in train/ and val/; only in one: "
                 f"{sorted(set(train.classes) ^ set(val.classes))[:5]}")
    if cfg.eval and trained_on not in ([], val.classes):
        sys.exit(f"{cfg.init} is for other classes than --data: {trained_on[:4]} ... and {val.classes[:4]} ...")
    torch.manual_seed(cfg.seed)
    model = build(cfg, weights, len(val.classes))
    if not cfg.eval:
        return common.train(cfg, model, Samples(train, cfg), make_optimizer, evaluate=evaluate)
    metrics = evaluate(model.to(device).eval(), cfg, device, autocast, clips=cfg.clips, crops=cfg.crops)
    common.print0("  ".join(f"{k} {v:.6g}" for k, v in metrics.items()))


if __name__ == "__main__":
    main()
