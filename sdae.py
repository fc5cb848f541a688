"""
SdAE: Self-distillated Masked Autoencoder. Chen et al., ECCV 2022 [paper], with its supplement [supp].
Official code: github.com/AbrahamYabo/SdAE [code].

The idea. A masked autoencoder should reconstruct features rather than pixels, and need no teacher trained before: an
average of its own encoder is one. Seeing the whole image, that teacher would know far more than the student, so it
reads the masked patches only, in folds as small as what the student sees.

One training step, `SdAE.forward`:
    ids_keep, ids_mask = ids_shuffle                                  # random
    pred   = decoder(encoder(visible patches))                        # the student
    folds  = ids_mask cut into 3 pieces of 49                         # Sec. 2.2
    target = normalise(teacher(each fold by itself))                  # Eq. 3, each token to mean 0, variance 1
    loss   = 1 - cosine(target, pred)                                 # Eq. 4
    optimiser step; at the end of an epoch teacher = m * teacher + (1 - m) * student     # Eq. 7, `after_step`

Shapes: B images, N patches = V visible + M masked, D width, G folds of T patches.

Over which axis the cosine runs is unsettled. The text says feature similarity: per token over its channels, the default
here. The released code takes, by a default argument, each channel over the tokens of a fold (`--cosine_axis token`), but
channels where the teacher reads the full image, so the paper's Table 5 changes two things at once. Eq. 4 as printed sums
over tokens as well: one cosine of everything in an image (`--cosine_axis global`). Per token, Eq. 3's division by the
deviation has no effect, since a cosine knows no scale; its subtraction of the mean has.

Differs from, or is not said in, the paper or the code:
  - the loss is 1 - cosine; Eq. 4 is the likelihood to maximise, and prints the target in its numerator unnormalised
  - the teacher's final norm comes before Eq. 3, and drop path grows linearly with depth, both as in the code
  - the teacher starts as a copy of the student; in the code it is drawn independently (`--teacher_init independent`), and
    its position table at random, which the average then leads to the student's
  - where the folds do not divide M, the rest of the masked patches is left out on both sides, as in the code: 2 x 73 of
    147, where the paper's Sec. 4.3 says 2 x 79
  - under 100 epochs, the paper's shortest run, a momentum per epoch is raised to the power 300 / epochs, or the teacher
    would hardly move: of 20 epochs 59% of its initial self would be left; a momentum per step is taken as it is
  - weight decay 0.05 as in the paper; the code's default is 0.04
  - [CLS], with its zero position, stands in front of every fold, as in the code

Run:
    python sdae.py --preset quick                                       # generated images, 2 CPU cores, two minutes
    torchrun --nproc_per_node=8 sdae.py --data IMAGENET                 # the paper's recipe, ViT-B, 300 epochs
    torchrun --nproc_per_node=8 sdae.py --epochs 100 --warmup_epochs 20 --data IMAGENET
Expect: a loss of 1.0 when nothing is known. It falls fast and rises when the teacher moves, so it compares no two runs;
`teacher_cosine` should stay well below 1: where all features are alike, any loss is 0, and a warning says so.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import common


@dataclass(frozen=True)
class Config(common.PretrainConfig):
    img_size: int = 224  # [code] side of the square crop, pixels
    patch_size: int = 16  # [paper Sec. 4.3] side of a patch, pixels
    embed_dim: int = 768  # [code] encoder width; ViT-S 384, ViT-B 768, ViT-L 1024
    depth: int = 12  # [code] encoder blocks; ViT-L 24
    num_heads: int = 12  # [code] attention heads; ViT-S 6, ViT-L 16
    drop_path: float = 0.25  # [supp A.1] largest share of samples that skip a branch of the student's last block
    mask_ratio: float = 0.75  # [supp A.1] share of patches hidden from the student
    feed: Literal["folds", "full", "masked", "crop"] = "folds"  # [paper Tables 1, 5] what the teacher reads
    folds: int = 3  # [paper Fig. 4b] pieces in which it reads the masked patches: 2, 3 or 4
    crop_ratio: float = 1 / 3  # [paper Fig. 4b] share of the masked patches that --feed crop reads
    normalise: bool = True  # [paper Eq. 3, Table 5] each target token to mean 0, variance 1
    cosine_axis: Literal["channel", "token", "global"] = "channel"  # [paper Eq. 4] see above; the code has token
    teacher_init: Literal["copy", "independent"] = "copy"  # [code] the code draws the teacher independently
    momentum: tuple[float, ...] = (0.96, 0.99)  # [supp A.1] of the teacher, from the first towards the second along a cosine
    ema_every: Literal["epoch", "step"] = "epoch"  # [paper Sec. 4.2] how often; per step take momenta near 1, e.g. 0.999
    export: Literal["student", "teacher"] = "student"  # [paper Fig. 4c] which encoder goes to encoder.pt and kNN
    decoder_depth: int = 8  # [supp A.4] decoder blocks
    decoder_dim: int = 512  # [code] width of the decoder
    decoder_heads: int = 16  # [code] heads of the decoder
    epochs: int = 300  # [supp A.1] ViT-B's 300; Table 2 has 100 as well, A.2 800
    warmup_epochs: float = 60.0  # [supp A.1] linear warm-up, a fifth of the epochs: 20 of 100, 160 of 800
    batch_size: int = 768  # [supp A.1] images per optimiser step, over all processes
    base_lr: float = 8e-4 / 3  # [supp A.1] learning rate 8e-4 = base_lr * batch_size / 256
    min_lr: float = 0.0  # [code] learning rate at the end of the cosine
    weight_decay: float = 0.05  # [supp A.1] not on biases, norms, position table, cls token
    adam_betas: tuple[float, ...] = (0.9, 0.95)  # [code] AdamW's two moments
    crop_min: float = 0.2  # [code] smallest area of the random crop, share of the image

    def __post_init__(self):
        super().__post_init__()
        check = common.check
        common.above(0, self, "embed_dim depth num_heads folds decoder_depth decoder_dim decoder_heads")
        for width, heads in (("embed_dim", "num_heads"), ("decoder_dim", "decoder_heads")):
            w, h = getattr(self, width), getattr(self, heads)
            check(w % 4 == 0 and w % h == 0, f"--{width} {w} must be divisible by 4 and by --{heads} {h}")
        check(0 <= self.drop_path < 1, f"--drop_path must be in [0, 1), got {self.drop_path}")
        for name in ("momentum", "adam_betas"):
            check(len(getattr(self, name)) == 2, f"--{name} takes 2 values, got {len(getattr(self, name))}")
        check(all(0 <= m < 1 for m in self.momentum), f"--momentum must be in [0, 1), got {self.momentum}")
        N = (self.img_size // self.patch_size) ** 2
        check(0 < self.mask_ratio < 1, f"--mask_ratio {self.mask_ratio} must be between 0 and 1, e.g. 0.75")
        check(0 < int(N * (1 - self.mask_ratio)) < N, f"--mask_ratio {self.mask_ratio} of {N} patches leaves "
              f"no visible or no masked patch; use {1 / N:.3g} to {1 - 1.5 / N:.3g}")
        M = N - int(N * (1 - self.mask_ratio))
        check(self.folds <= M, f"--folds {self.folds} is more than the {M} masked patches")
        check(0 < self.crop_ratio <= 1 and round(M * self.crop_ratio) > 0,
              f"--crop_ratio {self.crop_ratio:g} must be in (0, 1] and leave one of {M} masked patches")


PRESETS = {
    "tiny": dict(embed_dim=192, num_heads=3, decoder_dim=192, decoder_heads=3, drop_path=0.0),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "quick": dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, decoder_dim=64, decoder_heads=2,
                  decoder_depth=1, drop_path=0.0, cosine_axis="token", epochs=4, warmup_epochs=0.5, batch_size=32,
                  base_lr=1.2e-2, knn_every=2, knn_images=5000, out_dir="out/quick_sdae"),
}


# --- shared ViT: the same text in every method file; skip it if you know ViT ------------------------------------------

def patchify(imgs, p):
    """Cut (B, 3, H, W) into (B, N, p*p*3) patches, row by row; numbers ordered row, column, channel as in MAE."""
    B, C, H, W = imgs.shape
    x = imgs.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)  # (B, N, P)


def unpatchify(patches, p, grid):
    """Inverse of `patchify` for a (h, w) grid of patches: (B, N, p*p*3) -> (B, 3, H, W)."""
    x = patches.reshape(len(patches), *grid, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, p)
    return x.reshape(len(patches), -1, grid[0] * p, grid[1] * p)


def take(tokens, ids):
    """Pick tokens (B, N, D) by number (B, L) -> (B, L, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sincos_pos_embed(dim, grid):
    """Fixed table (1, 1 + h*w, dim): a zero row for [CLS], then sin | cos of the column and of the row of each patch.

    Columns fill the first half, as in MAE's released weights; MoCo-v3 and BootMAE put rows first.
    """
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angle = torch.stack((col.flatten(), row.flatten()), 1).unsqueeze(-1) * omega  # (N, 2, dim/4)
    table = torch.cat((angle.sin(), angle.cos()), -1).flatten(1)  # (N, dim)
    return torch.cat((torch.zeros(1, dim), table)).float().unsqueeze(0)


def init_weights(module):
    """MAE's initialisation: Xavier-uniform linear layers with zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    """Linear map of patches, kept as timm's convolution weight; on patches it may skip the masked ones, 4x cheaper."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(embed_dim, -1))

    def forward(self, patches):  # (B, V, P) -> (B, V, D)
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # the order of `patchify`
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, T, D)
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, T, D/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """Two linear layers with GELU between, four times as wide inside."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):  # (B, T, D)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; in training each branch is left out for a share `drop_path` of the samples."""

    def __init__(self, dim, num_heads, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x):  # (B, T, D)
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, x):
        if not self.training or not self.drop_path:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)


class ViT(nn.Module):
    """Vision transformer with timm's parameter names; reads all patches, or only those in `ids_keep`."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, drop_path=0.0):
        super().__init__()
        self.patch_size, self.grid = patch_size, (img_size // patch_size, img_size // patch_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)

    def forward(self, imgs, ids_keep=None):
        """imgs (B, 3, H, W), ids_keep (B, V) or None for all -> list of every block's output (B, 1 + V, D), no norm."""
        patches, pos = patchify(imgs, self.patch_size), self.pos_embed[:, 1:]  # (B, N, P), (1, N, D)
        if ids_keep is not None:
            patches, pos = take(patches, ids_keep), pos[0, ids_keep]  # (B, V, P), (B, V, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(imgs), -1, -1)
        x = torch.cat((cls, self.patch_embed(patches) + pos), 1)  # (B, 1 + V, D)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

# --- end of shared ViT ------------------------------------------------------------------------------------------------


# --- masking ----------------------------------------------------------------------------------------------------------

def draw_mask(rng, img_size, patch_size):
    """What is random about one sample besides its crop: the order of its patches, visible first -> ids_shuffle (N,).

    Runs in the data worker. The masked ones are cut into folds in this order.
    """
    # Fork here: any order is a mask, its first num_keep patches are visible.
    return rng.permutation((img_size // patch_size) ** 2)


# --- targets ----------------------------------------------------------------------------------------------------------

def normalise_tokens(tokens):
    """Eq. 3: each token (..., D) to mean 0, variance 1 over its channels; unbiased variance, as in the code."""
    return (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True) + 1e-6).sqrt()


def cosine_loss(pred, target, axis):
    """Eq. 4 as 1 - cosine; pred and target (B, G, T, D), folds of their own -> ()."""
    if axis == "global":
        pred, target = pred.flatten(1), target.flatten(1)
    return 1 - F.cosine_similarity(pred, target, dim=2 if axis == "token" else -1).mean()


def momentum_at(epoch, epochs, momentum, ema_every="epoch"):
    """EMA momentum of an epoch counted from 0: half a cosine from the first value towards the second. [supp A.1, code]

    Per epoch, runs under 100 epochs keep as much of the initial teacher as 300 epochs would.
    """
    first, last = momentum
    m = last + 0.5 * (first - last) * (1 + math.cos(math.pi * epoch / epochs))
    return m ** (300 / epochs) if ema_every == "epoch" and epochs < 100 else m


def first_components(features, fit):
    """Principal components of vectors (..., C) as colours (..., 3) in [0, 1]; axes and range come from `fit` (n, C)."""
    features, fit = features.double(), fit.double()  # autocast leaves double alone, and quantile takes no bf16
    mean = fit.mean(0)
    axes = torch.linalg.svd(fit - mean, full_matrices=False)[2][:3].T  # (C, 3)
    low, high = torch.quantile((fit - mean) @ axes, torch.tensor([0.02, 0.98]).to(fit), dim=0)
    return (((features - mean) @ axes - low) / (high - low + 1e-6)).clamp(0, 1).float()


# --- decoder ----------------------------------------------------------------------------------------------------------

class Decoder(nn.Module):
    """MAE's decoder: mask tokens join the latents, a few blocks, one prediction per masked patch."""

    def __init__(self, embed_dim, decoder_dim, depth, num_heads, grid, out_dim):
        super().__init__()
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder_dim, grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, num_heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, out_dim)
        self.apply(init_weights)

    def forward(self, latent, ids_shuffle):
        """latent (K, B, 1 + V, D), ids_shuffle (B, N) -> (K, B, M, out): all K taps in one pass.

        Tokens stay in shuffled order, [CLS], visible, masked: attention is blind to order, positions come by table.
        """
        K, B, T, _ = latent.shape
        pos = self.decoder_pos_embed[0, 1:][ids_shuffle]  # (B, N, Dd); [CLS]'s own row is zero
        x = self.decoder_embed(latent)  # (K, B, 1 + V, Dd)
        masked = (self.mask_token + pos[:, T - 1:]).expand(K, -1, -1, -1)  # (K, B, M, Dd)
        x = torch.cat((x[:, :, :1], x[:, :, 1:] + pos[:, :T - 1], masked), 2).flatten(0, 1)  # (K*B, 1 + N, Dd)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, T:])).unflatten(0, (K, B))


# --- the method -------------------------------------------------------------------------------------------------------

class SdAE(nn.Module):
    """Student, decoder and teacher; arguments as in `Config`."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, drop_path=0.25, mask_ratio=0.75,
                 feed="folds", folds=3, crop_ratio=1 / 3, normalise=True, cosine_axis="channel", teacher_init="copy",
                 momentum=(0.96, 0.99), ema_every="epoch", export="student", decoder_depth=8, decoder_dim=512,
                 decoder_heads=16, epochs=300):
        super().__init__()
        self.feed, self.normalise, self.cosine_axis, self.teacher_init = feed, normalise, cosine_axis, teacher_init
        self.momentum, self.ema_every, self.export, self.epochs = momentum, ema_every, export, epochs
        self.encoder = ViT(img_size, patch_size, embed_dim, depth, num_heads, drop_path)
        self.patch_size, self.grid, N = patch_size, self.encoder.grid, self.encoder.pos_embed.shape[1] - 1
        self.num_keep = int(N * (1 - mask_ratio))
        M = N - self.num_keep
        self.folds = folds if feed == "folds" else 1
        self.num_read = round(M * crop_ratio) if feed == "crop" else M - M % self.folds  # masked patches that count
        self.decoder = Decoder(embed_dim, decoder_dim, decoder_depth, decoder_heads, self.grid, embed_dim)
        self.teacher = ViT(img_size, patch_size, embed_dim, depth, num_heads).requires_grad_(False)
        self.after_init()

    @property
    def exported(self):
        """What encoder.pt holds and kNN measures."""
        return self.encoder if self.export == "student" else self.teacher

    def forward(self, imgs, ids_shuffle):
        """imgs (B, 3, H, W), ids_shuffle (B, N) -> loss (), metrics: name -> tensor ()."""
        ids_keep, ids_mask = ids_shuffle[:, :self.num_keep], ids_shuffle[:, self.num_keep:]  # (B, V), (B, M)
        latent = self.encoder.norm(self.encoder(imgs, ids_keep)[-1])  # (B, 1 + V, D)
        pred = self.decoder(latent.unsqueeze(0), ids_shuffle)[0]  # (B, M, D)
        target, monitor = self.teach(imgs, ids_mask)  # (B, G, T, D)
        pred = pred[:, :self.num_read].unflatten(1, (self.folds, -1))  # the same patches
        return cosine_loss(pred.float(), target, self.cosine_axis), monitor

    @torch.no_grad()
    def teach(self, imgs, ids_mask):
        """Teacher's features of the masked patches -> targets (B, G, T, D), and what tells of a collapse, by name."""
        # Fork here: any (B, G, T, D) that is a function of the masked patches, in their order, can be a target.
        if self.feed == "full":
            tokens = take(self.teacher.norm(self.teacher(imgs)[-1])[:, 1:], ids_mask)
        else:  # each fold is a row of the batch: its tokens attend to no other fold
            ids = ids_mask[:, :self.num_read].unflatten(1, (self.folds, -1)).flatten(0, 1)  # (B*G, T)
            outputs = self.teacher(imgs.repeat_interleave(self.folds, 0), ids)
            tokens = self.teacher.norm(outputs[-1])[:, 1:]
        tokens = tokens.float().reshape(len(imgs), self.folds, -1, tokens.shape[-1])  # (B, G, T, D)
        flat = F.normalize(tokens.flatten(0, 2), dim=-1)
        monitor = {"teacher_std": tokens.flatten(0, 2).std(0, correction=0).mean(),  # 0 if all features are alike
                   "teacher_cosine": flat.mean(0).square().sum()}  # mean cosine of any two here, itself among them
        return normalise_tokens(tokens) if self.normalise else tokens, monitor

    def after_init(self):
        """The teacher starts as a copy of the student, also of one loaded with --init, unless drawn independently."""
        if self.teacher_init == "copy":
            self.teacher.load_state_dict(self.encoder.state_dict())

    @torch.no_grad()
    def after_step(self, progress):
        """Eq. 7, after the optimiser step or where an epoch ends; progress in (0, 1] of the whole training."""
        epoch = progress * self.epochs
        if self.ema_every == "epoch" and abs(epoch - round(epoch)) > 1e-7:
            return
        m = momentum_at(math.ceil(epoch - 1e-7) - 1, self.epochs, self.momentum, self.ema_every)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.encoder.parameters()), 1 - m)

    def warning(self, line):
        """What the figures just logged warn of, or "": features all alike, which any student predicts."""
        std, cosine = line["teacher_std"], line["teacher_cosine"]
        return (f"the teacher's features collapse: deviation {std:.3g}, mean cosine of any two {cosine:.3g}; "
                "try a lower --base_lr or a slower teacher (--momentum)") if std < 0.05 or cosine > 0.95 else ""

    @torch.no_grad()
    def preview(self, imgs, ids_shuffle):
        """Panels for preview.png: title -> images (B, 3, H, W) as normalised as `imgs`, or maps (B, h, w)."""
        ids_keep, ids_mask = ids_shuffle[:, :self.num_keep], ids_shuffle[:, self.num_keep:]
        ids_restore = ids_shuffle.argsort(1)  # argsort of a permutation is its inverse
        p, M = self.patch_size, ids_mask.shape[1]
        visible = take(patchify(imgs, p), ids_keep)  # (B, V, P)
        blank = visible.new_zeros(len(imgs), M, visible.shape[-1])
        fold = torch.arange(M, device=imgs.device) // (self.num_read // self.folds) + 1
        fold = torch.where(fold > self.folds, 0, fold).expand(len(imgs), -1)  # 0: visible, or left out
        target = normalise_tokens(self.teach(imgs, ids_mask)[0].flatten(1, 2))  # (B, num_read, D)
        pred = self.decoder(self.encoder.norm(self.encoder(imgs, ids_keep)[-1]).unsqueeze(0), ids_shuffle)[0].float()
        pred = normalise_tokens(pred[:, :self.num_read])
        panels = {"input": imgs, "masked": self.fill(visible, blank, ids_restore),
                  "fold": torch.cat((torch.zeros_like(ids_keep), fold), 1).gather(1, ids_restore).unflatten(1, self.grid)}
        mean, std = (t.view(3) for t in common.mean_std(imgs.device))
        for title, x in (("teacher", target), ("student", pred)):
            colours = (first_components(x, target.flatten(0, 1)) - mean) / std
            masked = torch.cat((colours.repeat(1, 1, p * p), blank[:, self.num_read:]), 1)
            panels[title] = self.fill(visible, masked, ids_restore)
        return panels

    def fill(self, visible, masked, ids_restore):
        """Picture from patches (B, V, P) and (B, M, P) -> (B, 3, H, W)."""
        return unpatchify(take(torch.cat((visible, masked), 1), ids_restore), self.patch_size, self.grid)


def main():
    """Command line -> model -> training."""
    cfg = common.parse(Config, PRESETS, __doc__)
    torch.manual_seed(cfg.seed)
    model = SdAE(**common.arguments(SdAE, cfg))
    first, last = (momentum_at(e, cfg.epochs, cfg.momentum, cfg.ema_every) for e in (0, cfg.epochs - 1))
    common.say(f"teacher    keeps {first:.4g} of itself per {cfg.ema_every} at first, {last:.4g} at last" + (
        f" ({cfg.momentum} to the power 300 / {cfg.epochs})" if cfg.ema_every == "epoch" and cfg.epochs < 100 else ""))
    common.train(cfg, model, partial(draw_mask, **common.arguments(draw_mask, cfg)))


if __name__ == "__main__":
    main()
