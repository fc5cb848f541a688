"""
DDS on BEiT v2: deep dynamic supervision from "DDAE: Towards Deep Dynamic Vision BERT Pretraining" (Chen et al., AAAI
2024, Table 5 [AAAI]), moved to "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers" (Peng et al.,
2022 [BEiT v2]). Code of BEiT v2: github.com/microsoft/unilm/tree/master/beit2 [code]; none of DDAE is public.

BEiT v2 predicts for each masked patch which of 8,192 visual tokens it is; a frozen network, VQ-KD, has numbered them.
Mask tokens enter the encoder, so there is no decoder, only a linear head. DDS, as in ddae.py: K blocks are supervised
through one norm and one head, and a masked patch counts by its distance to the nearest visible one, raised to a
learnable power beta per block. Patch aggregation, BEiT v2's own auxiliary loss, makes [CLS] useful: it must carry what
patch tokens of block 9 lack, as two more blocks predict the visual tokens from these and the last block's [CLS].

One training step, `BEiT2.forward`; the supervised blocks are g_i = depth / K * i, i = 1..K:
    target   = tokenizer(imgs)                                           # visual token of each patch
    distance = distance_map(mask)                                        # D(m), in patches; 0 if visible
    s_i      = softmax(distance ** beta_i);  weight_i = s_i / max(s_i)   # over the image's masked patches       Eq. 2
    outputs  = encoder(where(mask, mask_token, embed(imgs)))             # of every block
    error_i  = cross_entropy(lm_head(norm(outputs[g_i])), target)        # of the masked patches
    error_c  = cross_entropy(lm_head(norm(cls_pt_layers(cat(outputs[12][CLS], outputs[9][patches])))), target)
    loss     = sum_i mean(weight_i * error_i) + mean(error_c)                                                  # Eq. 3
             + reg_batch * sum_i lambda_i * mean(|s_i|_2 - 1 / sqrt(M))                                        # Eq. 6

B images, N patches, at most M of them masked, D width, C visual tokens, T tokens in attention.

`--dds` switches: dds (deep and dynamic), ds (deep supervision), d (dynamic weights on the last block alone), none. The
last is BEiT v2; `--no-aggregation` leaves out patch aggregation.

Choices where DDAE's two sentences on BEiT v2 leave everything open, besides those at their lines: all supervised
blocks are weighted, the last one, too, as in DDAE; patch aggregation is not, and has weight 1; taps, beta's start, and
lambda are DDAE's. Cross-entropies are larger than DDAE's squared errors, so lambda holds beta back less: with errors of
about 6, the betas settle at -3.5 to -0.9, DDAE's at -1.0 to -0.24. Differs from BEiT v2: means are per image, then over
images, which is the same if all images have as many masked patches.

    python beit2.py --preset quick                                      # generated images, 2 CPU cores, 2 minutes
    torchrun --nproc_per_node=8 beit2.py --epochs 100 --data IMAGENET --tokenizer \
        vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth            # ViT-B; for the file, see targets.py
"""
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2

import common
import targets

FIRST = dict(none=-1, d=-1, ds=0, dds=0)  # where the supervised ones of the K taps start: -1 is the last, 0 is all


@dataclass(frozen=True)
class Config(common.RunConfig):
    img_size: int = 224  # [BEiT v2] side of the square crop, pixels
    patch_size: int = 16  # [BEiT v2] side of a patch, pixels
    embed_dim: int = 768  # [BEiT v2] encoder width; ViT-L 1024
    depth: int = 12  # [BEiT v2] encoder blocks; ViT-L 24
    num_heads: int = 12  # [BEiT v2] attention heads; ViT-L 16
    layer_scale: float = 0.1  # [code] initial factor of each residual branch; ViT-L 1e-5
    drop_path: float = 0.0  # [code] fraction of samples that skip a branch of the last block; 0.1 for 1600 epochs
    mask_ratio: float = 0.385  # [code] fraction of patches masked, at most: 75 of 196
    fill_mask: bool = True  # [code] where blocks fall short of that, mask single patches; BEiT's masks stay short
    tokenizer: str = ""  # [BEiT v2] VQ-KD's file; or pixels: nearest k-means code of the run's own patches
    codes: int = 512  # [ours] visual tokens of --tokenizer pixels; VQ-KD has 8192
    aggregation: bool = True  # [BEiT v2] patch aggregation; --no-aggregation: none
    early_layers: int = 9  # [code] block whose patch tokens patch aggregation reads; ViT-L 21
    head_layers: int = 2  # [code] blocks of patch aggregation
    K: int = 4  # [AAAI Table 4] supervised blocks, at depth / K * i, rounded down
    dds: Literal["none", "d", "ds", "dds"] = "dds"  # [AAAI Table 5] deep dynamic supervision, halves of it, or none
    beta_init: tuple[float, ...] = (-0.5,)  # [AAAI Implementation] one for all blocks, or K values
    beta_learnable: bool = True  # [ICLR Table 7] --no-beta_learnable keeps beta fixed
    reg: tuple[float, ...] = ()  # [AAAI Eq. 6] lambda_i, one or K values; none: 0.1 * block number
    reg_batch: int = 128  # [ours] Algorithm 1 sums the L2 term over the local batch; this fixes that batch's size
    epochs: int = 100  # [AAAI Table 5] BEiT v2: 300 or 1600
    warmup_epochs: float = 10.0  # [code] linear warm-up
    batch_size: int = 2048  # [code] images per optimizer step, over all processes
    base_lr: float = 1.875e-4  # [code] learning rate = base_lr * batch_size / 256, here 1.5e-3
    min_lr: float = 1e-5  # [code] learning rate at the end of the cosine
    weight_decay: float = 0.05  # [code] not on biases, norms, layer scale, [CLS], beta
    adam_betas: tuple[float, ...] = (0.9, 0.98)  # [code] AdamW's two moments; 0.9 0.999 for 1600 epochs
    clip_grad: float = 3.0  # [code] largest gradient norm; 0: no clipping
    crop_min: float = 0.2  # [code] smallest area of the random crop, fraction of the image
    color_jitter: float = 0.4  # [code] largest change of brightness, contrast, and saturation; 0: none

    def __post_init__(self):
        super().__post_init__()
        assert self.img_size % self.patch_size == 0, f"--img_size must be divisible by --patch_size {self.patch_size}"
        N = (self.img_size // self.patch_size) ** 2
        assert 0 < self.num_mask < N, \
            f"--mask_ratio {self.mask_ratio} must leave some of {N} patches visible and some masked"
        assert self.embed_dim % self.num_heads == 0, "--embed_dim must be divisible by --num_heads"
        assert self.K <= self.depth, f"--K {self.K} is above --depth {self.depth}"
        assert self.early_layers <= self.depth, f"--early_layers must be at most --depth {self.depth}"
        assert self.tokenizer, "--tokenizer is missing: VQ-KD's file, or pixels"
        for name, counts in dict(beta_init=(1, self.K), reg=(0, 1, self.K)).items():
            assert len(getattr(self, name)) in counts, f"--{name} takes {' or '.join(map(str, counts))} values"

    @property
    def num_mask(self):  # M
        return int((self.img_size // self.patch_size) ** 2 * self.mask_ratio)


PRESETS = {
    "large": dict(embed_dim=1024, depth=24, num_heads=16, layer_scale=1e-5, early_layers=21),
    "quick": dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, early_layers=3, head_layers=1,
                  tokenizer="pixels", codes=128, epochs=2, warmup_epochs=0.3, batch_size=32, base_lr=1.2e-2,
                  color_jitter=0.0, eval_every=1, eval_images=5000, out_dir="out/quick_beit2"),
}


# --- ViT with relative position bias and layer scale, under the names of BEiT v2 and timm -----------------------------

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


def relative_positions(grid):
    """Row of the bias table for each pair of tokens (1 + N, 1 + N), query first: one per offset between two patches,
    then one each for [CLS] to patch, patch to [CLS], and [CLS] to itself."""
    h, w = grid
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    down, right = (x.flatten()[:, None] - x.flatten() for x in (row, col))  # (N, N)
    index = torch.empty(1 + h * w, 1 + h * w, dtype=torch.long)
    index[1:, 1:] = (down + h - 1) * (2 * w - 1) + right + w - 1
    offsets = (2 * h - 1) * (2 * w - 1)
    index[0], index[1:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


def init_weights(module):
    """BEiT's initialization: normal, cut at one deviation, with zero bias."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Pre-norm transformer block. In training, a fraction `drop_path` of the samples skips each branch."""

    def __init__(self, dim, num_heads, grid, number, layer_scale, drop_path=0.0):
        super().__init__()
        self.num_heads, self.drop_path = num_heads, drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim, bias=False), proj=nn.Linear(dim, dim)))
        self.attn.q_bias, self.attn.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.attn.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, num_heads))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))
        self.apply(init_weights)
        with torch.no_grad():  # deeper blocks, counted from 1, start weaker
            self.attn.proj.weight.div_(math.sqrt(2 * number))
            self.mlp.fc2.weight.div_(math.sqrt(2 * number))

    def forward(self, x, positions):  # (B, T, D), (T, T)
        x = x + self.drop(self.gamma_1 * self.attend(self.norm1(x), positions))
        return x + self.drop(self.gamma_2 * self.mlp(self.norm2(x)))

    def attend(self, x, positions):
        bias = torch.cat((self.attn.q_bias, torch.zeros_like(self.attn.q_bias), self.attn.v_bias))  # none on keys
        x = F.linear(x, self.attn.qkv.weight, bias)
        q, k, v = (t.transpose(1, 2) for t in x.unflatten(2, (3, self.num_heads, -1)).unbind(2))  # (B, heads, T, d)
        bias = F.embedding(positions, self.attn.relative_position_bias_table).permute(2, 0, 1)  # (heads, T, T)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.attn.proj(x.transpose(1, 2).flatten(2))

    def drop(self, x):
        if not self.training or not self.drop_path:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)


class ViT(nn.Module):
    """BEiT v2's encoder without position table. Each block has a table of position biases; pretraining shares one."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, drop_path=0.0, layer_scale=0.1):
        super().__init__()
        self.patch_size, self.grid = patch_size, (img_size // patch_size, img_size // patch_size)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, embed_dim, patch_size, patch_size)))
        init_weights(self.patch_embed.proj)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02, a=-0.02, b=0.02))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, self.grid, i, layer_scale, rate)
                                    for i, rate in enumerate(rates, 1))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.register_buffer("positions", relative_positions(self.grid), persistent=False)

    def forward(self, imgs, mask=None, mask_token=None):
        """imgs (B, 3, H, W), mask (B, N) bool or None -> every block's output (B, 1 + N, D), before `norm`."""
        x = self.patch_embed.proj(imgs).flatten(2).transpose(1, 2)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
        outputs = [torch.cat((self.cls_token.expand(len(imgs), -1, -1), x), 1)]  # (B, 1 + N, D), [CLS] first
        for block in self.blocks:
            outputs.append(block(outputs[-1], self.positions))
        return outputs[1:]


def own_tables(weights):
    """Released files have one table of position biases; give one to each block, as in timm and in fine-tuning."""
    table = weights.get("rel_pos_bias.relative_position_bias_table")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.") and table is not None}
    return weights | {f"blocks.{i}.attn.relative_position_bias_table": table for i in blocks}


def sizes(weights):
    """Sizes of an encoder, from its weights with a table per block; {} if it is another kind of ViT."""
    if "blocks.0.attn.relative_position_bias_table" not in weights:
        return {}
    rows, num_heads = weights["blocks.0.attn.relative_position_bias_table"].shape
    D, _, p, _ = weights["patch_embed.proj.weight"].shape
    side = (math.isqrt(rows - 3) + 1) // 2  # a row for each of (2 * side - 1) ** 2 offsets, and three for [CLS]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return dict(vit="beit2", img_size=side * p, patch_size=p, embed_dim=D, depth=depth, num_heads=num_heads)


# --- masking and loss weights -----------------------------------------------------------------------------------------

def block_mask(rng, grid, num_mask):
    """Draw rectangles until at most `num_mask` patches are covered -> bool (h, w), True = masked. [BEiT Algorithm 1]

    A rectangle has an area of 16 patches (of 14 x 14, in proportion on other grids) up to what is still missing, an
    aspect ratio of 0.3 to 1/0.3, and may overlap earlier ones. If ten in a row do not fit, the mask stays short.
    """
    h, w = grid
    mask, missing, smallest, tries = np.zeros(grid, bool), num_mask, max(1.0, 16 * h * w / 196), 0
    while missing and (tries < 10 or missing == num_mask):
        tries += 1
        area = rng.uniform(*sorted((smallest, missing)))  # the last ones may be too large, and are rejected below
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        rows, cols = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < rows < h and 0 < cols < w):
            continue
        top, left = rng.integers(h - rows, endpoint=True), rng.integers(w - cols, endpoint=True)
        block = mask[top:top + rows, left:left + cols]
        new = rows * cols - np.count_nonzero(block)
        if 0 < new <= missing:
            block[:] = True
            missing, tries = missing - new, 0
    return mask


def draw_mask(rng, cfg):
    """Everything random about a sample besides its crop -> bool (N,), True = masked, 1 to num_mask of them."""
    side = cfg.img_size // cfg.patch_size
    # Fork here: any bool array with 1 to num_mask True entries is a mask.
    mask = block_mask(rng, (side, side), cfg.num_mask).ravel()
    if cfg.fill_mask:
        mask[rng.permutation(np.flatnonzero(~mask))[:cfg.num_mask - mask.sum()]] = True
    return mask


def distance_map(mask, distances):
    """D(m), from each patch to the nearest visible one, 0 if visible: mask (B, N), distances (N, N) -> (B, N)."""
    return distances.masked_fill(mask.unsqueeze(-1), math.inf).amin(1)


def h_beta(distance, beta):
    """Eq. 2 and Algorithm 1: distance (B, M), 0 if visible, beta (K,) -> weight (K, B, M) in [0, 1], excess (K, B).

    As in ddae.py, but images may have different numbers of masked patches; visible ones weigh 0.
    The excess of the L2 norm over its minimum, 1 / sqrt(M), keeps beta from extremes.
    """
    masked = distance > 0
    power = distance.where(masked, 1) ** beta[:, None, None]  # 0 ** -0.5 would be infinite, and its gradient NaN
    s = power.masked_fill(~masked, -math.inf).softmax(-1)  # Eq. 2
    excess = s.norm(dim=-1) - masked.sum(-1) ** -0.5
    # The maximum stays in the graph. amax, not max: at beta = 0 all weights tie, and max would pick one of them.
    return s / s.amax(-1, keepdim=True), excess


# --- targets ----------------------------------------------------------------------------------------------------------

class PixelCodes(nn.Module):
    """Tokenizer without download: number of the nearest k-means code. Fork here: any with `codes` and `out_dim`."""

    def __init__(self, cfg):
        super().__init__()
        self.patch_size, self.out_dim = cfg.patch_size, cfg.codes
        codes = torch.zeros(cfg.codes, 3 * cfg.patch_size ** 2)
        if not any((Path(cfg.out_dir) / name).exists() for name in ("last.pt", "last.prev.pt")):  # they have the codes
            codes = fit_codes(cfg)
        self.register_buffer("codes", codes)  # (C, P)

    def forward(self, imgs, grid):
        with torch.autocast(imgs.device.type, enabled=False):
            return nearest(patchify(imgs, self.patch_size), self.codes).unsqueeze(-1)


def nearest(patches, codes):
    """Patches (..., P), codes (C, P) -> number of the closest code (...)."""
    return (codes.square().sum(-1) - 2 * patches @ codes.T).argmin(-1)  # |x - c|^2 - |x|^2


def fit_codes(cfg, images=500, iterations=20):
    """k-means of the patches of a few training crops -> codes (C, P). The same for all processes."""
    source = common.open_data(cfg, "train")
    samples = common.Samples(source, cfg, lambda rng, cfg: 0)
    crops, draws, _ = samples.collate([samples[0, i * len(source) // images] for i in range(images)])
    patches = patchify(common.to_device(crops, draws, torch.device("cpu"))[0], cfg.patch_size).flatten(0, 1)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(cfg.seed))
    patches = patches[order[:100 * cfg.codes]]
    codes = patches[:cfg.codes].clone()
    for _ in range(iterations):
        member = nearest(patches, codes)
        count = member.bincount(minlength=len(codes)).unsqueeze(1)
        total = torch.zeros_like(codes).index_add_(0, member, patches)
        codes = torch.where(count > 0, total / count.clamp(min=1), codes)
    return codes


# --- the method -------------------------------------------------------------------------------------------------------

class BEiT2(nn.Module):
    """Encoder, mask token, patch aggregation, head, tokenizer, and the K betas."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, K = cfg, cfg.embed_dim, cfg.K
        self.taps = [cfg.depth * i // K for i in range(1, K + 1)]  # g_i, counted from 1
        self.supervised = self.taps[FIRST[cfg.dds]:]
        self.encoder = ViT(cfg.img_size, cfg.patch_size, D, cfg.depth, cfg.num_heads, cfg.drop_path, cfg.layer_scale)
        common.init_encoder(self.encoder, cfg)
        grid = self.encoder.grid
        with torch.random.fork_rng(devices=[]):  # initial weights do not depend on the tokenizer
            self.tokenizer = PixelCodes(cfg) if cfg.tokenizer == "pixels" else targets.codebook(cfg.tokenizer)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, D), std=0.02, a=-0.02, b=0.02))
        numbers = range(cfg.early_layers + 1, cfg.early_layers + cfg.head_layers + 1) if cfg.aggregation else ()
        rates = [cfg.drop_path * min(1, (i - 1) / max(1, cfg.depth - 1)) for i in numbers]  # as in the encoder
        self.cls_pt_layers = nn.ModuleList(Block(D, cfg.num_heads, grid, i, cfg.layer_scale, rate)
                                           for i, rate in zip(numbers, rates))
        self.lm_head = nn.Linear(D, self.tokenizer.out_dim)
        init_weights(self.lm_head)
        for block in (*self.encoder.blocks, *self.cls_pt_layers):  # one table for all
            block.attn.relative_position_bias_table = self.encoder.blocks[0].attn.relative_position_bias_table

        def per_block(values):  # one value for all, or K values -> (K,)
            return torch.tensor(values).repeat(K)[:K]

        first = dict(dds=0, d=K - 1).get(cfg.dds, K)
        self.dynamic = self.taps[first:]  # blocks whose beta acts
        self.beta = nn.Parameter(per_block(cfg.beta_init)[first:], requires_grad=cfg.beta_learnable and first < K)
        self.register_buffer("reg", per_block(cfg.reg or [0.1 * g for g in self.taps])[first:], persistent=False)
        cells = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid))  # (N, 2)
        distances = torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist")  # (N, N), in patches
        self.register_buffer("distances", distances, persistent=False)

    def forward(self, imgs, mask):
        """imgs (B, 3, H, W), mask (B, N) bool -> loss (), metrics: name -> tensor ()."""
        cfg, K = self.cfg, len(self.supervised)
        # Masked patches first. Where an image has fewer than M, visible ones follow, which count for nothing below.
        ids_mask = mask.int().argsort(dim=1, descending=True, stable=True)[:, :cfg.num_mask]  # (B, M)
        masked = mask.gather(1, ids_mask)  # (B, M)
        share = masked / masked.sum(1, keepdim=True)  # (B, M)

        def mean(x):  # over the masked patches of each image, then over images: (..., B, M) -> (...)
            return (share * x).sum(-1).mean(-1)

        weight, excess = self.weights(mask, ids_mask)  # (K, B, M), (K, B); of the last block alone, or of none
        target = self.tokenizer(imgs, self.encoder.grid).squeeze(-1).gather(1, ids_mask)  # (B, M)
        logits = self.predict(imgs, mask, ids_mask).float()  # (K + 1, B, M, C)
        error = F.cross_entropy(logits.flatten(0, 2), target.expand(len(logits), -1, -1).flatten(), reduction="none")
        error = error.view(logits.shape[:-1])  # (K + 1, B, M)
        ce = mean(error)  # (K + 1,), unweighted, to compare across betas
        deep = mean(weight * error[:K]) if self.dynamic else ce[:K]
        loss = deep.sum() + ce[K:].sum()  # Eq. 3, and patch aggregation
        loss = loss + cfg.reg_batch * (self.reg * excess.mean(1)).sum()  # Eq. 6; Algorithm 1 sums over the batch
        logged = dict(acc=100 * mean(logits[K - 1].argmax(-1) == target))  # of the last block, percent
        logged |= {"ce/cls": x.detach() for x in ce[K:]}
        for name, values in dict(ce=ce[:K], beta=self.beta, weight=mean(weight)).items():  # a value per block
            logged |= {f"{name}/{g}": x.detach() for g, x in zip(self.taps[-len(values):], values)}
        return loss, logged

    def weights(self, mask, ids):
        """Loss weights of patches `ids` and what Eq. 6 penalizes -> (K, B, M), (K, B). Fork here: other weightings."""
        distance = distance_map(mask, self.distances).gather(1, ids)  # (B, M)
        return h_beta(distance, self.beta)

    def predict(self, imgs, mask, ids):
        """Logits of the patches `ids` (B, M) by each supervised block and by patch aggregation -> (K + 1, B, M, C)."""
        outputs = self.encoder(imgs, mask, self.mask_token)
        latents = [outputs[g - 1] for g in self.supervised]
        if self.cls_pt_layers:
            x = torch.cat((outputs[-1][:, :1], outputs[self.cfg.early_layers - 1][:, 1:]), 1)  # (B, 1 + N, D)
            for block in self.cls_pt_layers:
                x = block(x, self.encoder.positions)
            latents.append(x)
        return self.lm_head(self.encoder.norm(torch.stack([take(x[:, 1:], ids) for x in latents])))

    def preview(self, imgs, mask):
        """Panels for preview.png: title -> images (B, 3, H, W), maps (B, h, w), or features (B, h, w, D)."""
        cfg, grid = self.cfg, self.encoder.grid
        ids = torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)  # (B, N), all patches
        visible = patchify(imgs, cfg.patch_size) * ~mask.unsqueeze(-1)
        panels = {"input": imgs, "masked": unpatchify(visible, cfg.patch_size, grid)}
        codes = self.tokenizer.codes if cfg.tokenizer == "pixels" else self.tokenizer.head.codes  # (C, P) or (C, 32)
        true = self.tokenizer(imgs, grid).squeeze(-1)  # (B, N)
        pred = self.predict(imgs, mask, ids)[len(self.supervised) - 1].argmax(-1)
        panels["visual tokens"] = codes[true].unflatten(1, grid)  # alike if the codes are
        panels["predicted"] = (codes[pred] * mask.unsqueeze(-1)).unflatten(1, grid)
        if self.dynamic:
            panels["distance"] = distance_map(mask, self.distances).unflatten(1, grid)
        for g, beta, weight in zip(self.dynamic, self.beta, self.weights(mask, ids)[0]):  # weight (B, N)
            panels[f"weight, block {g}\n(beta {beta:.2f})"] = weight.unflatten(1, grid)
        return panels


def main():
    cfg = common.parse(Config, PRESETS, __doc__)
    torch.manual_seed(cfg.seed)
    samples = common.Samples(common.open_data(cfg, "train"), cfg, draw_mask)
    if cfg.color_jitter:
        samples.crop = v2.Compose([v2.ColorJitter(*[cfg.color_jitter] * 3), samples.crop])
    common.train(cfg, BEiT2(cfg), samples)


if __name__ == "__main__":
    main()
