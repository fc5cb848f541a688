"""
DDAE: Towards Deep Dynamic Vision BERT Pretraining. Chen et al., AAAI 2024 [AAAI]; the earlier version is
"Deep Dynamic AutoEncoder for Vision BERT Pretraining", ICLR 2023 submission [ICLR]. No official code is public.

The idea. A masked patch next to a visible one is easy to fill in, one far from all visible ones is hard. DDAE weighs
every masked patch by its distance to the nearest visible patch, raised to a learnable power beta: beta < 0 favours
easy patches, beta > 0 hard ones. K blocks of the encoder are supervised, each with a beta of its own, by two targets:
the pixels, and the features that a slow copy of the encoder (the teacher) computes from the whole image.

One training step, `DDAE.forward`:
    ids_keep, ids_mask = ids_shuffle                                  # block_mask, drawn in the data worker
    weight = h_beta(distance_map(ids_keep), beta)                     # Eq. 2, one map per supervised block
    latent = norm(encoder(visible patches) at blocks g_i)             # g_i = depth / K * i
    pixel   = sum_i mean(weight_i * |pixel_decoder(latent_i) - pixels|^2)                  # Eq. 3, one-vs-all
    feature = sum_i mean(weight_i * |feature_decoder(latent_i) - teacher(image)_i|^2)      # Eq. 5, all-vs-all
    loss = pixel + feature + sum_i lambda_i * ||softmax weight_i||_2                       # Eq. 6
    optimiser step; teacher = m * teacher + (1 - m) * encoder                              # Eq. 4, `after_step`

Shapes: B images, N patches = V visible + M masked, P numbers per patch, D width, K supervised blocks.

`--pixel` and `--feature` switch each branch: dds (deep and dynamic), ds (deep only), d (dynamic only), plain, none.
So the MAE family is here too (`--preset mae`, then `--pixel d | ds | dds`), with MAE's random mask and 8-block decoder.

Differs from, or is not said in, the papers (the README says more, and which test backs each):
  - mask: exactly M patches in blocks of at least 16; the papers give no count, and BEiT's generator may fall short
  - pixels are normalised per patch as in MAE, whose 82.9 is the papers' baseline; the text says raw (`--no-norm_pix`)
  - target and prediction of the feature branch pass a LayerNorm without weights, as in BootMAE, the papers' model
  - every tap passes the encoder's own final norm; decoders are plain MAE ones (BootMAE's have cross-attention)
  - squared errors are means over a patch's numbers, over masked patches and over images, never divided by the weights
  - ||.||_2 is summed over the batch in Algorithm 1; here it is mean * `reg_batch`, the same for any batch size
  - the maximum in h_beta stays in the graph; beta is fp32, has no weight decay and the common learning rate
  - momentum rises as in [ICLR App. A] and BootMAE's code; both texts also say 0.9999 (`--momentum 0.9999`)
  - distances are raw, as Eq. 2 defines them, though the figures show them divided by the largest
  - pixel and feature branch share a beta per tap, as the symbols and the single sum of Eq. 6 suggest
  - the last tap is weighted like the others, in DDS-MAE too, which keeps MAE's random mask
  - AdamW, where [ICLR App. A] says Adam with weight decay; cosine to 0; MAE's initialisation, ImageNet mean and deviation

Run:
    python ddae.py --preset quick                                       # generated images, 2 CPU cores, 2 minutes
    torchrun --nproc_per_node=8 ddae.py --epochs 100 --data IMAGENET    # the paper's short recipe, ViT-B
Expect: normalised pixels cost 1.0 per tap when predicted as the patch mean, features 2.0 when predicted at random.
"""
import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

Supervision = Literal["none", "plain", "d", "ds", "dds"]


@dataclass(frozen=True)
class Config(common.PretrainConfig):
    img_size: int = 224  # [AAAI Implementation] side of the square crop, pixels
    patch_size: int = 16  # [AAAI Implementation] side of a patch, pixels
    embed_dim: int = 768  # [AAAI Implementation] encoder width; ViT-S 384, ViT-B 768, ViT-L 1024
    depth: int = 12  # [AAAI Implementation] encoder blocks; ViT-L 24
    num_heads: int = 12  # [AAAI Implementation] attention heads; ViT-S 6, ViT-L 16
    mask: Literal["block", "random"] = "block"  # [AAAI Implementation] block-wise; random is MAE's
    mask_ratio: float = 0.75  # [AAAI Implementation] share of patches hidden from the encoder
    K: int = 4  # [AAAI Table 4] supervised blocks, at depth/K * i
    pixel: Supervision = "dds"  # [AAAI Tables 2, 3, Eq. 3] pixel branch: dds, ds (no weights), d (last block), plain, none
    feature: Supervision = "dds"  # [AAAI Tables 2, 3, Eq. 5] feature self-distillation branch, same choices
    beta_init: tuple[float, ...] = (-0.5,)  # [AAAI Implementation, ICLR Table 7] one for all taps, or K values
    beta_learnable: bool = True  # [ICLR Table 7] --no-beta_learnable keeps beta fixed
    loss_scale: tuple[float, ...] = (1.0,)  # [AAAI Eq. 3, 5] factor per tap, one or K values; ICLR: 0.75 0.75 0.75 1
    reg: tuple[float, ...] = ()  # [AAAI Eq. 6] lambda_i, none: 0.1 * block number; one or K values; ICLR: 0.5
    reg_batch: int = 128  # [ours] Algorithm 1 sums the L2 term over the local batch; this fixes that batch's size
    norm_pix: bool = True  # [code: MAE] normalise each patch of the pixel target; the texts say raw pixels
    decoder_depth: int = 2  # [AAAI Implementation] blocks in each of the two decoders; MAE 8
    decoder_dim: int = 512  # [AAAI Implementation] width of the pixel decoder; the feature decoder has embed_dim
    decoder_heads: int = 16  # [code: MAE] heads of the pixel decoder; the feature decoder has num_heads
    momentum: tuple[float, ...] = (0.999, 0.9999, 0.99999)  # [ICLR App. A] at epochs 0, 100, 400; one value: constant
    epochs: int = 100  # [AAAI Table 2] 100 or 800
    warmup_epochs: float = 20.0  # [ICLR App. A] linear warm-up; 20 for 100 epochs, 40 for 800
    batch_size: int = 4096  # [ICLR App. A] images per optimiser step, over all processes
    base_lr: float = 1.5e-4  # [ICLR App. A] learning rate = base_lr * batch_size / 256
    min_lr: float = 0.0  # [ours] learning rate at the end of the cosine; the papers are silent, BootMAE's base script 1e-4
    weight_decay: float = 0.05  # [ICLR App. A] not on biases, norms, position table, cls token, beta
    adam_betas: tuple[float, ...] = (0.9, 0.95)  # [code: MAE, BootMAE] AdamW's two moments
    crop_min: float = 0.2  # [code: MAE, BootMAE] smallest area of the random crop, share of the image

    def __post_init__(self):
        super().__post_init__()
        check = common.check
        common.above(0, self, "embed_dim depth num_heads K decoder_depth decoder_dim decoder_heads reg_batch")
        for width, heads in (("embed_dim", "num_heads"), ("decoder_dim", "decoder_heads")):
            w, h = getattr(self, width), getattr(self, heads)
            check(w % 4 == 0 and w % h == 0, f"--{width} {w} must be divisible by 4 and by --{heads} {h}")
        check(self.depth % self.K == 0, f"--depth {self.depth} is not divisible by --K {self.K}; "
              f"use a K of {', '.join(str(k) for k in range(1, self.depth + 1) if self.depth % k == 0)}")
        check(self.pixel != "none" or self.feature != "none", "--pixel none --feature none leaves nothing to learn from")
        for name, sizes in (("beta_init", (1, self.K)), ("loss_scale", (1, self.K)), ("reg", (0, 1, self.K)),
                            ("momentum", (1, 3)), ("adam_betas", (2,))):
            check(len(getattr(self, name)) in sizes,
                  f"--{name} takes {' or '.join(map(str, sizes))} values, got {len(getattr(self, name))}")
        check(all(0 <= m < 1 for m in self.momentum), f"--momentum must be in [0, 1), got {self.momentum}")
        N = (self.img_size // self.patch_size) ** 2
        check(0 < self.mask_ratio < 1, f"--mask_ratio {self.mask_ratio} must be between 0 and 1, e.g. 0.75")
        check(0 < int(N * (1 - self.mask_ratio)) < N, f"--mask_ratio {self.mask_ratio} of {N} patches leaves "
              f"no visible or no masked patch; use {1 / N:.3g} to {1 - 1.5 / N:.3g}")


PRESETS = {
    "tiny": dict(embed_dim=192, num_heads=3, decoder_dim=192, decoder_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "mae": dict(pixel="plain", feature="none", mask="random", decoder_depth=8),
    "quick": dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, decoder_dim=64, decoder_heads=2,
                  decoder_depth=1, momentum=(0.99,), epochs=2, warmup_epochs=0.3, batch_size=32, base_lr=1.2e-2,
                  knn_every=1, knn_images=5000, out_dir="out/quick"),
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

def block_mask(rng, grid, num_mask):
    """Draw BEiT's rectangles until exactly `num_mask` patches are covered -> bool (h, w), True = masked.

    A rectangle has an area of 16 patches (on a 14 x 14 grid, in proportion on others) up to what is still missing, an
    aspect ratio of 0.3 to 1/0.3, and may overlap earlier ones. [BEiT Algorithm 1]
    """
    h, w = grid
    mask, missing, smallest = np.zeros(grid, bool), num_mask, max(1.0, 16 * h * w / 196)
    while missing:
        area = rng.uniform(*sorted((smallest, missing)))
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        rows, cols = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < rows < h and 0 < cols < w):
            continue
        top, left = rng.integers(h - rows, endpoint=True), rng.integers(w - cols, endpoint=True)
        block = mask[top:top + rows, left:left + cols]
        new = rows * cols - np.count_nonzero(block)
        if new <= missing:
            block[:] = True
            missing -= new
    return mask


def draw_mask(rng, img_size, patch_size, mask, mask_ratio):
    """What is random about one sample besides its crop: the order of its patches, visible first -> ids_shuffle (N,).

    Runs in the data worker. The distance map needs the final mask, so nothing trims it later.
    """
    side = img_size // patch_size
    num_mask = side * side - int(side * side * (1 - mask_ratio))
    # Fork here: any bool array with exactly num_mask True entries is a mask.
    if mask == "block":
        masked = block_mask(rng, (side, side), num_mask).ravel()
    else:
        masked = rng.permutation(side * side) < num_mask
    assert masked.size == side * side and masked.sum() == num_mask, (masked.size, masked.sum(), num_mask)
    return np.argsort(masked, kind="stable")


# --- distance map and loss weights ------------------------------------------------------------------------------------

def patch_distances(grid):
    """Euclidean distance between every two patches of the grid, in patches -> (N, N)."""
    cells = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid))  # (N, 2)
    return torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist")


def distance_map(ids_keep, table):
    """D(m): distance from each patch to the nearest visible one; ids_keep (B, V), table (N, N) -> (B, N).

    Equals scipy.ndimage.distance_transform_edt(mask) and is several times faster; 0 where visible, >= 1 where masked.
    """
    return table[ids_keep].amin(1)


def h_beta(distance, beta):
    """Loss weights of masked patches, Eq. 2 and Algorithm 1; distance (B, M) >= 1, beta (K,).

    Returns weight (K, B, M) in (0, 1], and excess (K, B): the L2 norm of the softmax less its minimum 1/sqrt(M).
    Only masked patches enter: 0 ** beta is infinite for beta < 0.
    """
    s = (distance ** beta[:, None, None]).softmax(-1)  # Eq. 2
    excess = s.norm(dim=-1) - s.shape[-1] ** -0.5  # before the division below
    # amax, not max: at beta = 0 all weights tie, and max would send the gradient to one arbitrary patch.
    return s / s.amax(-1, keepdim=True), excess


# --- targets ----------------------------------------------------------------------------------------------------------

def normalise_patches(patches):
    """MAE's norm_pix: each patch (..., P) to mean 0, variance 1 -> normalised patches, mean, standard deviation."""
    mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def momentum_at(epoch, momentum):
    """EMA momentum: piecewise linear through epochs 0, 100 and 400, or constant. [ICLR App. A; BootMAE's code]"""
    return float(np.interp(epoch, (0, 100, 400), momentum)) if len(momentum) == 3 else momentum[0]


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

class DDAE(nn.Module):
    """Encoder, pixel decoder, feature decoder, teacher and the K betas; arguments as in `Config`."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mask_ratio=0.75, K=4,
                 pixel="dds", feature="dds", beta_init=(-0.5,), beta_learnable=True, loss_scale=(1.0,), reg=(),
                 reg_batch=128, norm_pix=True, decoder_depth=2, decoder_dim=512, decoder_heads=16,
                 momentum=(0.999, 0.9999, 0.99999), epochs=100):
        super().__init__()
        self.pixel, self.feature, self.norm_pix, self.reg_batch = pixel, feature, norm_pix, reg_batch
        self.momentum, self.epochs, self.patch_size = momentum, epochs, patch_size
        self.taps = [depth // K * i for i in range(1, K + 1)]  # g_i, counted from 1
        self.encoder = ViT(img_size, patch_size, embed_dim, depth, num_heads)
        self.grid, N = self.encoder.grid, self.encoder.pos_embed.shape[1] - 1
        self.num_keep = int(N * (1 - mask_ratio))
        if pixel != "none":
            self.pixel_decoder = Decoder(embed_dim, decoder_dim, decoder_depth, decoder_heads, self.grid,
                                         3 * patch_size ** 2)
        if feature != "none":
            self.feature_decoder = Decoder(embed_dim, embed_dim, decoder_depth, num_heads, self.grid, embed_dim)
            self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

        def per_tap(values):
            return torch.tensor(values * K if len(values) == 1 else values)

        dynamic = {"dds": range(K), "d": range(K - 1, K)}  # the taps whose beta is in use
        used = {i for kind in (pixel, feature) for i in dynamic.get(kind, ())}
        self.beta = nn.Parameter(per_tap(beta_init), requires_grad=beta_learnable and bool(used))  # (K,)
        reg = per_tap(reg or tuple(0.1 * g for g in self.taps))
        self.register_buffer("reg", reg * torch.tensor([float(i in used) for i in range(K)]), persistent=False)
        self.register_buffer("loss_scale", per_tap(loss_scale), persistent=False)
        self.register_buffer("table", patch_distances(self.grid), persistent=False)

    def forward(self, imgs, ids_shuffle):
        """imgs (B, 3, H, W), ids_shuffle (B, N) -> loss (), metrics: name -> tensor ()."""
        ids_keep, ids_mask = ids_shuffle[:, :self.num_keep], ids_shuffle[:, self.num_keep:]  # (B, V), (B, M)
        distance = distance_map(ids_keep, self.table).gather(1, ids_mask)  # (B, M)
        weight, excess = h_beta(distance, self.beta)  # (K, B, M), (K, B)
        latent = self.encode(imgs, ids_keep)  # (K, B, 1 + V, D)
        loss, errors = 0, {}
        if self.pixel != "none":
            target = take(patchify(imgs, self.patch_size), ids_mask)  # (B, M, P)
            if self.norm_pix:
                target = normalise_patches(target)[0]
            pred = self.pixel_decoder(self.supervised(latent, self.pixel), ids_shuffle)  # (K, B, M, P)
            errors["pixel"] = (pred - target).square().mean(-1)  # (K, B, M)
            loss += self.weighted(errors["pixel"], weight, self.pixel)  # Eq. 3
        if self.feature != "none":
            target, target_std = self.teach(imgs, ids_mask)  # (K, B, M, D)
            pred = self.feature_decoder(self.supervised(latent, self.feature), ids_shuffle)
            pred = F.layer_norm(pred.float(), pred.shape[-1:], eps=1e-6)  # (K, B, M, D)
            errors["feature"] = (pred - self.supervised(target, self.feature)).square().mean(-1)
            loss += self.weighted(errors["feature"], weight, self.feature)  # Eq. 5
        loss += self.reg_batch * (self.reg * excess.mean(1)).sum()  # Eq. 6; Algorithm 1 sums over the batch

        metrics = {f"beta/{g}": b for g, b in zip(self.taps, self.beta)}
        metrics |= {f"weight/{g}": w for g, w in zip(self.taps, weight.mean((1, 2)))}
        for name, error in errors.items():  # unweighted: the only error comparable across betas
            metrics |= {f"{name}/{g}": e for g, e in zip(self.taps[-len(error):], error.mean((1, 2)))}
        if self.feature != "none":  # falls to 0 if the teacher collapses to a constant
            metrics |= {f"target_std/{g}": s for g, s in zip(self.taps, target_std)}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def encode(self, imgs, ids_keep):
        """Latents of the K supervised blocks, through the encoder's final norm -> (K, B, 1 + V, D)."""
        outputs = self.encoder(imgs, ids_keep)
        return self.encoder.norm(torch.stack([outputs[g - 1] for g in self.taps]))

    @torch.no_grad()
    def teach(self, imgs, ids_mask):
        """Teacher's features of the masked patches, block by block; it sees the whole image (Eq. 5).

        Returns targets (K, B, M, D), each token normalised, and their spread over the batch before that (K,).
        """
        outputs = self.teacher(imgs)
        target = torch.stack([take(outputs[g - 1][:, 1:], ids_mask) for g in self.taps]).float()
        return F.layer_norm(target, target.shape[-1:], eps=1e-6), target.flatten(1, 2).std(1, correction=0).mean(1)

    def supervised(self, per_tap, kind):
        """The taps that a branch supervises: all K, or the last one without deep supervision."""
        return per_tap if kind in ("ds", "dds") else per_tap[-1:]

    def weighted(self, error, weight, kind):
        """Sum over taps of the mean weighted error; error and weight (K, B, M) -> (). Fork here: other weightings."""
        if kind in ("d", "dds"):
            error = error * self.supervised(weight, kind)
        return (self.supervised(self.loss_scale, kind) * error.mean((1, 2))).sum()

    def after_init(self):
        """The teacher starts as a copy of the encoder, also of one loaded with --init."""
        if self.feature != "none":
            self.teacher.load_state_dict(self.encoder.state_dict())

    @torch.no_grad()
    def after_step(self, progress):
        """Eq. 4, after the optimiser step; progress in (0, 1] of the whole training."""
        if self.feature != "none":
            m = momentum_at(progress * self.epochs, self.momentum)
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.encoder.parameters()), 1 - m)

    @torch.no_grad()
    def preview(self, imgs, ids_shuffle):
        """Panels for preview.png: title -> images (B, 3, H, W) as normalised as `imgs`, or maps (B, h, w)."""
        ids_keep, ids_mask = ids_shuffle[:, :self.num_keep], ids_shuffle[:, self.num_keep:]
        ids_restore, p = ids_shuffle.argsort(1), self.patch_size  # argsort of a permutation is its inverse
        distance = distance_map(ids_keep, self.table)  # (B, N)
        patches = patchify(imgs, p)
        visible = patches * (distance == 0).unsqueeze(-1)
        panels = {"input": imgs, "masked": unpatchify(visible, p, self.grid)}
        if self.pixel != "none":
            pred = self.pixel_decoder(self.encode(imgs, ids_keep)[-1:], ids_shuffle)[0].float()  # (B, M, P)
            if self.norm_pix:  # the prediction is relative; the true mean and deviation make it a picture
                _, mean, std = normalise_patches(take(patches, ids_mask))
                pred = pred * std + mean
            filled = take(torch.cat((take(patches, ids_keep), pred), 1), ids_restore)
            panels["reconstruction"] = unpatchify(filled, p, self.grid)
        panels["distance"] = distance.unflatten(1, self.grid)
        weight = h_beta(distance.gather(1, ids_mask), self.beta)[0]  # (K, B, M)
        for g, b, w in zip(self.taps, self.beta, weight):
            w = torch.cat((torch.zeros_like(ids_keep, dtype=w.dtype), w), 1).gather(1, ids_restore)  # Algorithm 1
            panels[f"weight, block {g}\n(beta {b:.2f})"] = w.unflatten(1, self.grid)
        return panels


def main():
    """Command line -> model -> training."""
    cfg = common.parse(Config, PRESETS, __doc__)
    torch.manual_seed(cfg.seed)
    model = DDAE(**common.arguments(DDAE, cfg))
    common.train(cfg, model, partial(draw_mask, **common.arguments(draw_mask, cfg)))


if __name__ == "__main__":
    main()
