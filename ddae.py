"""
DDAE: Towards Deep Dynamic Vision BERT Pretraining. Chen et al., AAAI 2024 [AAAI]; an earlier version is
"Deep Dynamic AutoEncoder for Vision BERT Pretraining", ICLR 2023 submission [ICLR]. No official code is public.

A masked patch next to a visible one is easy to predict, one far from all visible ones is hard. DDAE weights each masked
patch by its distance to the nearest visible patch, raised to a learnable power beta: beta < 0 favors easy patches,
beta > 0 hard ones. K blocks of the encoder are supervised, each with its own beta, by two targets: the pixels, and the
features that a teacher, an EMA of the encoder, computes from the whole image.

One training step, `DDAE.forward` and `after_step`; the supervised blocks are g_i = depth / K * i, i = 1..K:
    ids_keep, ids_mask = ids_shuffle.split([V, M], 1)                    # block-wise mask, drawn in the data worker
    distance = distance_map(ids_keep)[ids_mask]                          # D(m), in patches
    s_i      = softmax(distance ** beta_i);  weight_i = s_i / max(s_i)                              # Eq. 2
    latent_i = norm(encoder(imgs, ids_keep)[g_i])
    pixel    = sum_i mean(weight_i * |pixel_decoder(latent_i) - pixels|^2)                          # Eq. 3, one-vs-all
    feature  = sum_i mean(weight_i * |LN(feature_decoder(latent_i)) - LN(teacher(imgs)[g_i])|^2)    # Eq. 5, all-vs-all
    loss     = pixel + feature + reg_batch * sum_i lambda_i * mean(|s_i|_2 - 1 / sqrt(M))           # Eq. 6
    optimizer step; teacher = m * teacher + (1 - m) * encoder                                       # Eq. 4

One-vs-all: all blocks predict one target, the pixels. All-vs-all: each block predicts the teacher's same block.
B images, N patches = V visible + M masked, P values per patch, D width, T tokens in attention.

`--pixel` and `--feature` switch each branch: dds (deep and dynamic), ds (deep supervision), d (dynamic weights on the
last block alone), plain, none. With `--preset mae`, `--pixel plain` is MAE; d, ds, dds are D-MAE, DS-MAE, DDS-MAE.

Deviations and choices that the papers leave open, besides those at their lines: squared errors are means over values,
masked patches, and images, not divided by the sum of weights; the decoders are MAE's (BootMAE's, the papers' base, have
cross-attention); both branches share a block's beta, as Eq. 6 suggests; AdamW (ICLR App. A: Adam with weight decay).

    python ddae.py --preset quick                                       # generated images, 2 CPU cores, 2 minutes
    torchrun --nproc_per_node=8 ddae.py --epochs 100 --data IMAGENET    # the paper's short recipe, ViT-B
"""
import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

Supervision = Literal["none", "plain", "d", "ds", "dds"]
FIRST = dict(plain=-1, d=-1, ds=0, dds=0)  # where a branch's slice of the K taps starts: -1 is the last alone, 0 is all


@dataclass(frozen=True)
class Config(common.RunConfig):
    img_size: int = 224  # [AAAI Implementation] side of the square crop, pixels
    patch_size: int = 16  # [AAAI Implementation] side of a patch, pixels
    embed_dim: int = 768  # [AAAI Implementation] encoder width; ViT-S 384, ViT-B 768, ViT-L 1024
    depth: int = 12  # [AAAI Implementation] encoder blocks; ViT-L 24
    num_heads: int = 12  # [AAAI Implementation] attention heads; ViT-S 6, ViT-L 16
    mask: Literal["block", "random"] = "block"  # [AAAI Implementation] block-wise; random is MAE's
    mask_ratio: float = 0.75  # [AAAI Implementation] fraction of patches hidden from the encoder
    K: int = 4  # [AAAI Table 4] supervised blocks, at depth / K * i, rounded down
    pixel: Supervision = "dds"  # [AAAI Tables 2, 3, Eq. 3] pixel branch: dds, ds, d, plain, none
    feature: Supervision = "dds"  # [AAAI Tables 2, 3, Eq. 5] feature self-distillation branch, same choices
    beta_init: tuple[float, ...] = (-0.5,)  # [AAAI Implementation, ICLR Table 7] one for all blocks, or K values
    beta_learnable: bool = True  # [ICLR Table 7] --no-beta_learnable keeps beta fixed
    loss_scale: tuple[float, ...] = (1.0,)  # [ICLR Eq. 3, 5] per block, one or K values; ICLR: 0.75 0.75 0.75 1
    reg: tuple[float, ...] = ()  # [AAAI Eq. 6] lambda_i, one or K values; none: 0.1 * block number; ICLR: 0.5
    reg_batch: int = 128  # [ours] Algorithm 1 sums the L2 term over the local batch; this fixes that batch's size
    norm_pix: bool = True  # [code: MAE] normalize each patch of the pixel target; the texts say raw pixels
    decoder_depth: int = 2  # [AAAI Implementation] blocks in each of the two decoders; MAE 8
    decoder_dim: int = 512  # [AAAI Implementation] width of the pixel decoder; the feature decoder has embed_dim
    decoder_heads: int = 16  # [code: MAE] heads of the pixel decoder; the feature decoder has num_heads
    momentum: tuple[float, ...] = (0.999, 0.9999, 0.99999)  # [ICLR App. A, BootMAE] at epochs 0, 100, 400; or one
    epochs: int = 100  # [ICLR App. A] 100 or 800
    warmup_epochs: float = 20.0  # [ICLR App. A] linear warm-up; 20 for 100 epochs, 40 for 800
    batch_size: int = 4096  # [ICLR App. A] images per optimizer step, over all processes
    base_lr: float = 1.5e-4  # [ICLR App. A] learning rate = base_lr * batch_size / 256
    min_lr: float = 0.0  # [ours] learning rate at the end of the cosine; BootMAE's base script has 1e-4
    weight_decay: float = 0.05  # [ICLR App. A] not on biases, norms, position table, [CLS], beta
    adam_betas: tuple[float, ...] = (0.9, 0.95)  # [code: MAE, BootMAE] AdamW's two moments
    crop_min: float = 0.2  # [code: MAE, BootMAE] smallest area of the random crop, fraction of the image

    def __post_init__(self):
        super().__post_init__()
        check_vit(self)
        K, deep = self.K, {self.pixel, self.feature} & {"ds", "dds"}
        assert K <= self.depth or not deep, f"--K {K} is above --depth {self.depth}"
        assert {self.pixel, self.feature} != {"none"}, "--pixel none --feature none leaves nothing to learn from"
        for name, counts in dict(beta_init=(1, K), loss_scale=(1, K), reg=(0, 1, K), momentum=(1, 3)).items():
            assert len(getattr(self, name)) in counts, f"--{name} takes {' or '.join(map(str, counts))} values"

    @property
    def num_keep(self):  # V
        return int((self.img_size // self.patch_size) ** 2 * (1 - self.mask_ratio))


PRESETS = {
    "small": dict(embed_dim=384, num_heads=6),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "mae": dict(pixel="plain", feature="none", mask="random", decoder_depth=8),
    "quick": dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, decoder_dim=64, decoder_heads=2,
                  decoder_depth=1, momentum=(0.99,), epochs=2, warmup_epochs=0.3, batch_size=32, base_lr=1.2e-2,
                  eval_every=1, eval_images=5000, out_dir="out/quick"),
}


# --- shared by all methods, word for word: ViT and decoder, under timm's and MAE's names ------------------------------

def check_vit(cfg):
    assert cfg.img_size % cfg.patch_size == 0, f"--img_size must be divisible by --patch_size {cfg.patch_size}"
    N = (cfg.img_size // cfg.patch_size) ** 2
    assert 0 < cfg.num_keep < N, f"--mask_ratio {cfg.mask_ratio} must leave some of {N} patches visible and some masked"
    for width, heads in (("embed_dim", "num_heads"), ("decoder_dim", "decoder_heads")):
        assert getattr(cfg, width) % getattr(cfg, heads) == getattr(cfg, width) % 4 == 0, \
            f"--{width} must be divisible by 4 and by --{heads}"


def patchify(imgs, p):
    """Images (B, 3, H, W) -> patches (B, N, p*p*3), row by row; values ordered row, column, channel as in MAE."""
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


def unshuffle(visible, masked, ids_shuffle):
    """Tokens (B, V, D) and (B, M, D) -> (B, N, D) in the order of the image: argsort inverts a permutation."""
    return take(torch.cat((visible, masked), 1), ids_shuffle.argsort(1))


def sincos_pos_embed(dim, grid):
    """Fixed table (1, 1 + h*w, dim): zeros for [CLS]; sin | cos of each patch's column, then of its row, as in MAE."""
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angle = torch.stack((col.flatten(), row.flatten()), 1).unsqueeze(-1) * omega  # (N, 2, dim/4)
    table = torch.cat((angle.sin(), angle.cos()), -1).flatten(1)  # (N, dim)
    return torch.cat((torch.zeros(1, dim), table)).float().unsqueeze(0)


def init_weights(module):
    """MAE's initialization: Xavier-uniform linear layers with zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Pre-norm transformer block. In training, a fraction `drop_path` of the samples skips each branch."""

    def __init__(self, dim, num_heads, drop_path=0.0):
        super().__init__()
        self.num_heads, self.drop_path = num_heads, drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, first=0):
        """(B, T, D) -> outputs of the tokens from `first` on; they attend to all."""
        x = x[:, first:] + self.drop(self.attend(self.norm1(x), first))
        return x + self.drop(self.mlp(self.norm2(x)))

    def attend(self, x, first):
        q, k, v = (t.transpose(1, 2) for t in self.attn.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2))
        x = F.scaled_dot_product_attention(q[:, :, first:], k, v)  # (B, heads, T, d)
        return self.attn.proj(x.transpose(1, 2).flatten(2))

    def drop(self, x):
        if not self.training or not self.drop_path:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)


class ViT(nn.Module):
    """Vision transformer that reads all patches, or only those in `ids_keep`."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, drop_path=0.0):
        super().__init__()
        self.patch_size, self.grid = patch_size, (img_size // patch_size, img_size // patch_size)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, embed_dim, patch_size, patch_size)))
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(embed_dim, -1))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid), requires_grad=False)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)

    def embed(self, patches):
        """(B, V, P) -> (B, V, D). timm's convolution as a linear map of patches, so that masked ones are skipped."""
        proj = self.patch_embed.proj
        return F.linear(patches, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias)  # in the order of `patchify`

    def forward(self, imgs, ids_keep=None, taps=(), folds=1):
        """imgs (B, 3, H, W), ids_keep (B, V) or None for all -> outputs of the blocks in `taps`, counted from 1, and of
        the last, before `norm`: (B, 1 + V, D), or (B * folds, 1 + V / folds, D) if folds do not see each other."""
        patches, pos = patchify(imgs, self.patch_size), self.pos_embed[:, 1:]  # (B, N, P), (1, N, D)
        if ids_keep is not None:
            patches, pos = take(patches, ids_keep), pos[0, ids_keep]  # (B, V, P), (B, V, D)
        x = (self.embed(patches) + pos).unflatten(1, (folds, -1)).flatten(0, 1)  # (B * folds, V / folds, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x, outputs = torch.cat((cls, x), 1), []  # [CLS] first
        for g, block in enumerate(self.blocks, 1):
            x = block(x)
            if g in taps or g == len(self.blocks):
                outputs.append(x)
        return outputs


class Decoder(nn.Module):
    """MAE's decoder: mask tokens join the latents, then a few blocks, then a prediction for each masked patch."""

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
        """latent (K, B, 1 + V, D), ids_shuffle (B, N) -> (K, B, M, out_dim). Tokens stay in shuffled order."""
        (K, B), V = latent.shape[:2], latent.shape[2] - 1
        pos = self.decoder_pos_embed[0, 1:][ids_shuffle]  # (B, N, Dd); [CLS]'s own row is zero
        x = self.decoder_embed(latent)  # (K, B, 1 + V, Dd)
        masked = (self.mask_token + pos[:, V:]).expand(K, -1, -1, -1)  # (K, B, M, Dd)
        x = torch.cat((x[:, :, :1], x[:, :, 1:] + pos[:, :V], masked), 2).flatten(0, 1)  # (K*B, 1 + N, Dd)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, first=1 + V)  # (K*B, M, Dd)
        return self.decoder_pred(self.decoder_norm(x)).unflatten(0, (K, B))

# --- end of the shared part -------------------------------------------------------------------------------------------


# --- masking and loss weights -----------------------------------------------------------------------------------------

def block_mask(rng, grid, num_mask):
    """Draw rectangles until exactly `num_mask` patches are covered -> bool (h, w), True = masked. [BEiT Algorithm 1]

    A rectangle has an area of 16 patches (of 14 x 14, in proportion on other grids) up to what is still missing, an
    aspect ratio of 0.3 to 1/0.3, and may overlap earlier ones. BEiT's count may fall short.
    """
    h, w = grid
    mask, missing, smallest = np.zeros(grid, bool), num_mask, max(1.0, 16 * h * w / 196)
    while missing:
        low, high = sorted((smallest, missing))  # the last ones may be too large, and are rejected below
        area, aspect = low + (high - low) * rng.random(), 0.3 ** (1 - 2 * rng.random())
        rows, cols = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < rows < h and 0 < cols < w:
            bits = rng.bit_generator.random_raw()  # 64; rng.integers uses 32 each in the same way, but takes longer
            top, left = (bits % 2**32) * (h - rows + 1) >> 32, (bits >> 32) * (w - cols + 1) >> 32
            block = mask[top:top + rows, left:left + cols]
            new = rows * cols - block.tobytes().count(1)
            if new <= missing:
                block.fill(True)
                missing -= new
    return mask


def draw_mask(rng, cfg):
    """Everything random about a sample besides its crop -> ids_shuffle (N,), visible patches first."""
    side = cfg.img_size // cfg.patch_size
    num_mask = side * side - cfg.num_keep
    # Fork here: any bool array with exactly num_mask True entries is a mask.
    if cfg.mask == "block":
        masked = block_mask(rng, (side, side), num_mask).ravel()
    elif cfg.mask == "random":
        masked = rng.permutation(side * side) < num_mask
    else:
        raise ValueError(f"unknown mask {cfg.mask}")
    assert masked.size == side * side and masked.sum() == num_mask, (masked.size, masked.sum(), num_mask)
    return np.argsort(masked, kind="stable")


def distance_map(ids_keep, distances):
    """D(m), from each patch to the nearest visible one, 0 if visible: ids_keep (B, V), distances (N, N) -> (B, N)."""
    return distances[ids_keep].amin(1)


def h_beta(distance, beta):
    """Eq. 2 and Algorithm 1: distance (B, M) of masked patches, beta (K,) -> weight (K, B, M) in (0, 1], excess (K, B).

    The excess of the L2 norm over its minimum, 1 / sqrt(M), keeps beta from extremes. Visible: 0 ** -0.5 = infinity.
    """
    s = (distance ** beta[:, None, None]).softmax(-1)  # Eq. 2
    excess = s.norm(dim=-1) - s.shape[-1] ** -0.5
    # The maximum stays in the graph. amax, not max: at beta = 0 all weights tie, and max would pick one of them.
    return s / s.amax(-1, keepdim=True), excess


# --- targets ----------------------------------------------------------------------------------------------------------

def pixel_target(patches, norm_pix):
    """Masked patches (B, M, P) -> target; norm_pix: mean 0, variance 1 per patch, as in MAE. Fork here: any target."""
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt() if norm_pix else patches


def pixel_picture(pred, patches, norm_pix):
    """Inverse of `pixel_target` for the picture, with the mean and deviation of the true patches."""
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return pred * (var + 1e-6).sqrt() + mean if norm_pix else pred


# --- the method -------------------------------------------------------------------------------------------------------

class DDAE(nn.Module):
    """Encoder, pixel decoder, feature decoder, teacher, and a beta for each block whose loss is weighted."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, p, K = cfg, cfg.embed_dim, cfg.patch_size, cfg.K
        self.taps = [cfg.depth * i // K for i in range(1, K + 1)]  # g_i, counted from 1
        self.encoder = ViT(cfg.img_size, p, D, cfg.depth, cfg.num_heads)
        common.init_encoder(self.encoder, cfg)
        grid = self.encoder.grid
        if cfg.pixel != "none":
            self.pixel_decoder = Decoder(D, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads, grid, 3 * p * p)
        if cfg.feature != "none":
            self.feature_decoder = Decoder(D, D, cfg.decoder_depth, cfg.num_heads, grid, D)
            self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

        def per_block(values):  # one value for all, or K values -> (K,)
            return torch.tensor(values).repeat(K)[:K]

        kinds = {cfg.pixel, cfg.feature}
        first = 0 if "dds" in kinds else K - 1 if "d" in kinds else K
        self.dynamic = self.taps[first:]  # blocks whose beta acts
        self.beta = nn.Parameter(per_block(cfg.beta_init)[first:], requires_grad=cfg.beta_learnable and first < K)
        self.register_buffer("reg", per_block(cfg.reg or [0.1 * g for g in self.taps])[first:], persistent=False)
        self.register_buffer("loss_scale", per_block(cfg.loss_scale), persistent=False)
        cells = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid))  # (N, 2)
        distances = torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist")  # (N, N), in patches
        self.register_buffer("distances", distances, persistent=False)

    def forward(self, imgs, ids_shuffle):
        """imgs (B, 3, H, W), ids_shuffle (B, N) -> loss (), metrics: name -> tensor ()."""
        cfg, metrics = self.cfg, {}
        ids_keep, ids_mask = ids_shuffle[:, :cfg.num_keep], ids_shuffle[:, cfg.num_keep:]  # (B, V), (B, M)
        weight, excess = self.weights(ids_keep, ids_mask)  # (K, B, M), (K, B); of the last block alone, or of none
        latent = self.encode(imgs, ids_keep)  # (K, B, 1 + V, D)
        loss = 0
        if cfg.pixel != "none":
            target = pixel_target(take(patchify(imgs, cfg.patch_size), ids_mask), cfg.norm_pix)  # (B, M, P)
            pred = self.pixel_decoder(latent[FIRST[cfg.pixel]:], ids_shuffle)  # (K, B, M, P)
            error = (pred - target).square().mean(-1)  # (K, B, M)
            loss += self.weighted(error, weight, cfg.pixel)  # Eq. 3
            metrics["pixel"] = error.mean((1, 2))  # unweighted, to compare across betas
        if cfg.feature != "none":
            target, target_std = self.targets(imgs, ids_mask)  # (K, B, M, D), (K,)
            pred = self.feature_decoder(latent[FIRST[cfg.feature]:], ids_shuffle)
            pred = F.layer_norm(pred.float(), pred.shape[-1:], eps=1e-6)  # like the target, as in BootMAE
            error = (pred - target[FIRST[cfg.feature]:]).square().mean(-1)  # (K, B, M)
            loss += self.weighted(error, weight, cfg.feature)  # Eq. 5
            metrics |= dict(feature=error.mean((1, 2)), target_std=target_std)
        loss += cfg.reg_batch * (self.reg * excess.mean(1)).sum()  # Eq. 6; Algorithm 1 sums over the batch
        metrics |= dict(beta=self.beta, weight=weight.mean((1, 2)))
        return loss, {f"{name}/{g}": x.detach() for name, values in metrics.items()
                      for g, x in zip(self.taps[-len(values):], values)}  # a value per supervised block

    def weighted(self, error, weight, kind):
        """Sum over blocks of the mean weighted error: error (K, B, M), or (1, B, M) of the last block -> ()."""
        if kind in ("d", "dds"):
            error = error * weight[-len(error):]
        return (self.loss_scale[-len(error):] * error.mean((1, 2))).sum()

    def weights(self, ids_keep, ids_mask):
        """Loss weights of masked patches and what Eq. 6 penalizes -> (K, B, M), (K, B). Fork here: other weightings."""
        distance = distance_map(ids_keep, self.distances).gather(1, ids_mask)  # (B, M)
        return h_beta(distance, self.beta)

    def encode(self, imgs, ids_keep):
        """Latents of the K supervised blocks, each through the encoder's final norm -> (K, B, 1 + V, D)."""
        return self.encoder.norm(torch.stack(self.encoder(imgs, ids_keep, self.taps)))

    @torch.no_grad()
    def targets(self, imgs, ids_mask):
        """Teacher's features of the masked patches, normalized -> (K, B, M, D); their deviation before that -> (K,)."""
        target = torch.stack([take(x[:, 1:], ids_mask) for x in self.teacher(imgs, taps=self.taps)]).float()
        return F.layer_norm(target, target.shape[-1:], eps=1e-6), target.flatten(1, 2).std(1, correction=0).mean(1)

    @torch.no_grad()
    def after_step(self, step, steps_per_epoch):
        if self.cfg.feature != "none":
            epochs = (0, 100, 400)[:len(self.cfg.momentum)]  # linear in between; the texts also say 0.9999 throughout
            m = float(np.interp(step / steps_per_epoch, epochs, self.cfg.momentum))
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.encoder.parameters()), 1 - m)  # Eq. 4

    def preview(self, imgs, ids_shuffle):
        """Panels for preview.png: title -> images (B, 3, H, W) or maps (B, h, w)."""
        cfg, grid = self.cfg, self.encoder.grid
        ids_keep, ids_mask = ids_shuffle[:, :cfg.num_keep], ids_shuffle[:, cfg.num_keep:]
        visible, true = (take(patchify(imgs, cfg.patch_size), ids) for ids in (ids_keep, ids_mask))

        def picture(masked):  # (B, M, P) -> (B, 3, H, W)
            return unpatchify(unshuffle(visible, masked, ids_shuffle), cfg.patch_size, grid)

        panels = {"input": imgs, "masked": picture(torch.zeros_like(true))}
        if cfg.pixel != "none":
            pred = self.pixel_decoder(self.encode(imgs, ids_keep)[-1:], ids_shuffle)[0].float()  # (B, M, P)
            if cfg.norm_pix:  # the prediction has no mean and no deviation: show what the true ones tell
                panels["true means"] = picture(pixel_picture(torch.zeros_like(true), true, True))
            title = "reconstruction" + "\n(true mean, std)" * cfg.norm_pix
            panels[title] = picture(pixel_picture(pred, true, cfg.norm_pix))
        if self.dynamic:
            panels["distance"] = distance_map(ids_keep, self.distances).unflatten(1, grid)
        for g, beta, weight in zip(self.dynamic, self.beta, self.weights(ids_keep, ids_mask)[0]):  # weight (B, M)
            weight = unshuffle(torch.zeros_like(visible[..., :1]), weight.unsqueeze(-1), ids_shuffle)  # Algorithm 1
            panels[f"weight, block {g}\n(beta {beta:.2f})"] = weight.squeeze(-1).unflatten(1, grid)
        return panels


def main():
    cfg = common.parse(Config, PRESETS, __doc__)
    torch.manual_seed(cfg.seed)
    common.train(cfg, DDAE(cfg), common.Samples(common.open_data(cfg, "train"), cfg, draw_mask))


if __name__ == "__main__":
    main()
