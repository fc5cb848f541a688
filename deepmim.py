"""
DeepMIM: Deep Supervision for Masked Image Modeling. Ren et al., arXiv 2303.08817 [paper].
Official code, for the CLIP target only: github.com/OliverRensu/DeepMIM [code].

The idea. In MAE only the last block of the encoder is told how good the reconstruction is, and through eight decoder
blocks at that. DeepMIM gives blocks 6, 8 and 10 a light decoder of their own as well, so that shallow blocks, too, learn
something that reconstructs. Optionally they need not reconstruct the image itself but what a trained MAE makes of it.

One training step, `DeepMIM.forward`:
    ids_keep, ids_mask = ids_shuffle                                  # random, or what a teacher finds worth seeing
    latents = encoder(visible patches) at blocks 6, 8, 10, 12         # normalised after the last one only
    preds   = [decoder(latent) for each latent, decoder]              # independent decoders of 4 blocks
    targets = alpha_i * x + (1 - alpha_i) * mae(visible patches)      # Eq. 1; alpha = 1 without --hybrid: x itself
    loss    = sum_i mean |pred_i - target_i|^2                        # Eq. 2, over masked patches

Shapes: B images, N patches = V visible + M masked, P numbers per patch, D width, K supervised blocks, C target numbers.

`--target` swaps x for HOG, DINO or CLIP features, or for the tokens of a codebook (Table 11; targets.py). `--taps 12
--decoder_depth 8` is MAE's model and loss; its code has weight decay on [CLS], which is spared here.

Differs from, or is not said in, the paper:
  - taps before the last are raw block outputs, as in the code; the last one passes the encoder's norm
  - squared errors are means over a patch's numbers, as in MAE; the printed norms are sums
  - features of DINO and CLIP are compared by 2 - 2 cos, as the code does for CLIP; the paper calls it l2, which it is
    after normalisation
  - the codebook is BEiT v2's; the paper's, PeCo's, is not public
  - hybrid targets blend normalised pixels, so that a blurred x_hat stays faint; `--hybrid_space raw` blends pixels first
    and normalises after, which the paper's Eq. 1 may also mean. The released code never blends
  - semantic-guided masks take their parts from k-means of DINO tokens, where SemMAE has a part network of its own
  - other depths: taps at 1/2, 2/3, 5/6 and all of the blocks

Run:
    python deepmim.py --preset quick                                    # generated images, 2 CPU cores, a minute and a half
    torchrun --nproc_per_node=8 deepmim.py --epochs 300 --data IMAGENET # the paper's ablation recipe, ViT-B
Expect: normalised pixels cost 1.0 per tap when predicted as the patch mean; the deepest tap ends lowest.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import targets


@dataclass(frozen=True)
class Config(common.PretrainConfig):
    img_size: int = 224  # [paper Sec. 5] side of the square crop, pixels
    patch_size: int = 16  # [paper Sec. 5] side of a patch, pixels
    embed_dim: int = 768  # [paper Sec. 5] encoder width; ViT-S 384, ViT-B 768, ViT-L 1024
    depth: int = 12  # [paper Sec. 5] encoder blocks; ViT-L 24
    num_heads: int = 12  # [paper Sec. 5] attention heads; ViT-S 6, ViT-L 16
    mask: Literal["random", "semantic_guided", "semantic_aware"] = "random"  # [paper Table 12] MAE's, SemMAE's, MILAN's; with --hybrid there
    mask_file: str = ""  # [paper Table 12] teacher of a semantic mask: DINO's file for guided, CLIP's for aware
    mask_ratio: float = 0.75  # [paper App. A] share of patches hidden from the encoder
    taps: tuple[int, ...] = ()  # [paper Table 8] supervised blocks, none: depth * 1/2, 2/3, 5/6, 1, that is 6 8 10 12
    shared_decoder: bool = False  # [paper Table 10] one decoder for all taps, which costs 2 points
    target: Literal["pixel", "hog", "dino", "clip", "codebook"] = "pixel"  # [paper Table 11] what masked patches predict
    target_file: str = ""  # [paper Table 11] the frozen teacher's weights for dino, clip or codebook
    norm_pix: bool = True  # [code: MAE] normalise each patch of the pixel target
    hybrid: str = ""  # [paper Eq. 1] trained model with a decoder: last.pt of this script, MAE's mae_visualize_* or *_full
    hybrid_norm_pix: Literal["file", "yes", "no"] = "file"  # [ours] it predicts normalised pixels: *_full yes, *_visualize_* no
    alpha: tuple[float, ...] = ()  # [paper Table 9] share of the image in each tap's hybrid target; none: 0 to 1 evenly
    hybrid_space: Literal["normalised", "raw"] = "normalised"  # [ours] blend after or before pixels are normalised
    decoder_depth: int = 4  # [paper Sec. 3] blocks in each decoder; MAE 8
    decoder_dim: int = 512  # [code] width of the decoders
    decoder_heads: int = 16  # [code] heads of the decoders
    epochs: int = 300  # [paper Sec. 5] 300 or 1600
    warmup_epochs: float = 40.0  # [paper App. A] linear warm-up
    batch_size: int = 4096  # [paper App. A] images per optimiser step, over all processes
    base_lr: float = 1.5e-4  # [paper App. A] learning rate = base_lr * batch_size / 256
    min_lr: float = 0.0  # [code] learning rate at the end of the cosine
    weight_decay: float = 0.05  # [paper App. A] not on biases, norms, position table, cls token (which are ours to spare)
    adam_betas: tuple[float, ...] = (0.9, 0.95)  # [code] AdamW's two moments
    crop_min: float = 0.2  # [code] smallest area of the random crop, share of the image

    def __post_init__(self):
        super().__post_init__()
        check = common.check
        common.above(0, self, "embed_dim depth num_heads decoder_depth decoder_dim decoder_heads")
        for width, heads in (("embed_dim", "num_heads"), ("decoder_dim", "decoder_heads")):
            w, h = getattr(self, width), getattr(self, heads)
            check(w % 4 == 0 and w % h == 0, f"--{width} {w} must be divisible by 4 and by --{heads} {h}")
        check(list(self.taps) == sorted(set(self.taps)), f"--taps must rise, got {self.taps}")
        check(not self.taps or self.taps[0] > 0 and self.taps[-1] == self.depth,
              f"--taps must be between 1 and --depth {self.depth} and end with it, got {self.taps}")
        check(len(self.adam_betas) == 2, f"--adam_betas takes 2 values, got {len(self.adam_betas)}")
        K = len(self.taps or default_taps(self.depth))
        check(len(self.alpha) in (0, K), f"--alpha takes none or {K} values, got {len(self.alpha)}")
        check(all(0 <= a <= 1 for a in self.alpha), f"--alpha must be in [0, 1], got {self.alpha}")
        check(not self.alpha or self.hybrid, "--alpha needs --hybrid, the file of a trained MAE")
        check(not self.hybrid or self.target == "pixel", f"--hybrid is for --target pixel, not {self.target}")
        check(bool(self.target_file) == (self.target in ("dino", "clip", "codebook")),
              f"--target {self.target} " + ("takes no --target_file" if self.target_file else NEEDS.get(self.target, "")))
        check(bool(self.mask_file) == (self.mask != "random"),
              f"--mask {self.mask} " + ("takes no --mask_file" if self.mask_file else NEEDS.get(self.mask, "")))
        check(self.target != "hog" or self.patch_size % 2 == 0, f"--target hog needs an even --patch_size, "
              f"got {self.patch_size}")
        N = (self.img_size // self.patch_size) ** 2
        check(0 < self.mask_ratio < 1, f"--mask_ratio {self.mask_ratio} must be between 0 and 1, e.g. 0.75")
        check(0 < int(N * (1 - self.mask_ratio)) < N, f"--mask_ratio {self.mask_ratio} of {N} patches leaves "
              f"no visible or no masked patch; use {1 / N:.3g} to {1 - 1.5 / N:.3g}")


NEEDS = {  # what to say when a teacher's file is not given
    "dino": "needs --target_file dino_vitbase16_pretrain.pth, from github.com/facebookresearch/dino",
    "clip": "needs --target_file ViT-B-16.pt, from github.com/openai/CLIP",
    "codebook": "needs --target_file vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth, from "
                "github.com/microsoft/unilm/tree/master/beit2",
    "semantic_guided": "needs --mask_file dino_vitbase16_pretrain.pth, from github.com/facebookresearch/dino",
    "semantic_aware": "needs --mask_file ViT-B-16.pt, from github.com/openai/CLIP",
}

PRESETS = {
    "tiny": dict(embed_dim=192, num_heads=3, decoder_dim=192, decoder_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "quick": dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, decoder_dim=64, decoder_heads=2,
                  decoder_depth=1, epochs=2, warmup_epochs=0.3, batch_size=32, base_lr=1.2e-2, knn_every=1,
                  knn_images=5000, out_dir="out/quick_deepmim"),
}


def default_taps(depth):
    """Blocks 6, 8, 10, 12 of 12; the same shares of other depths, each once."""
    return tuple(sorted({max(1, round(depth * share)) for share in (1 / 2, 2 / 3, 5 / 6, 1)}))


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

    Runs in the data worker. Semantic masks reorder it in the model, where it is their only source of chance.
    """
    # Fork here: any order is a mask, its first num_keep patches are visible.
    return rng.permutation((img_size // patch_size) ** 2)


def semantic_guided(tokens, ids_shuffle, ratio, whole, k=6):
    """SemMAE's masks: at first some of each part, at last whole parts. [paper Table 12; SemMAE Sec. 3.3 and code]

    tokens (B, N, D) of a teacher, ids_shuffle (B, N), whole () in [0, 1] the share of the second way -> ids_shuffle.
    """
    part = kmeans(tokens, ids_shuffle[:, :k])  # (B, N)
    member = F.one_hot(part, k).float()  # (B, N, k)
    size = member.sum(1)  # (B, k)
    some = (size * ratio).round()
    order = ids_shuffle[:, :k].argsort(1)  # k different numbers in random order: a random order of the parts
    before = size.gather(1, order).cumsum(1).gather(1, order.argsort(1)) - size  # patches in parts that come first
    entire = (part.shape[1] * ratio - before).clamp(min=0).minimum(size)
    quota = ((1 - whole) * some + whole * entire).round()  # (B, k) patches to mask in each part
    shuffled = take(member, ids_shuffle)  # (B, N, k)
    rank = (shuffled.cumsum(1) * shuffled).sum(-1)  # of each patch in its part, from 1, along the random order
    masked = rank <= (shuffled * quota.unsqueeze(1)).sum(-1)
    return ids_shuffle.gather(1, masked.int().argsort(dim=1, stable=True))  # where quotas miss the count, chance decides


def kmeans(tokens, first, iterations=10):
    """Spherical k-means of each image's tokens (B, N, D), from the tokens `first` (B, k) -> cluster of each (B, N)."""
    tokens = F.normalize(tokens.double(), dim=-1)  # autocast leaves double alone; in bf16 neighbours would tie
    centres = take(tokens, first)  # (B, k, D)
    for _ in range(iterations):
        member = F.one_hot((tokens @ centres.transpose(1, 2)).argmax(-1), first.shape[1]).to(tokens)  # (B, N, k)
        total = member.transpose(1, 2) @ tokens  # (B, k, D)
        centres = torch.where(member.sum(1).unsqueeze(-1) > 0, F.normalize(total, dim=-1), centres)
    return (tokens @ centres.transpose(1, 2)).argmax(-1)


def semantic_aware(attention, ids_shuffle):
    """MILAN's masks: the more [CLS] attends to a patch, the likelier it stays visible. [paper Table 12; MILAN Sec. 3.3]

    attention (B, N) -> ids_shuffle, drawn one after the other without replacement in proportion to attention: sorting
    exponential variables divided by their rate does that. The sample's order gives evenly spread uniform numbers.
    """
    uniform = (ids_shuffle.argsort(1) + 0.5) / ids_shuffle.shape[1]
    return (-uniform.log() / (attention + 1e-8)).argsort(1)


# --- targets ----------------------------------------------------------------------------------------------------------

def normalise_patches(patches):
    """MAE's norm_pix: each patch (..., P) to mean 0, variance 1 -> normalised patches, mean, standard deviation."""
    mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


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


class Generator(nn.Module):
    """A trained MAE that makes hybrid targets, frozen: its parameters become buffers that no checkpoint holds.

    path: last.pt of this script, whose deepest decoder counts, or MAE's file with its decoder, which does not say whether
    pixels were normalised: norm_pix "yes" or "no". Raises ValueError if it is neither, or of other patches.
    """

    def __init__(self, path, img_size, patch_size, norm_pix="file"):
        super().__init__()
        config, weights = common.header(path)[1], targets.read(path)
        deepest = max((int(k.split(".")[1]) for k in weights if k.startswith("decoders.")), default=0)
        weights = {k.removeprefix("encoder.").removeprefix(f"decoders.{deepest}."): v for k, v in weights.items()}
        for name, ndim in (("pos_embed", 3), ("decoder_embed.weight", 2), ("decoder_pred.weight", 2)):
            common.check(name in weights and weights[name].ndim == ndim, f"--hybrid {path} lacks {name}; it takes last.pt of "
                         "deepmim.py, or MAE's file with the decoder")
        target = config.get("target", "pixel")
        common.check(target == "pixel", f"--hybrid {path} predicts {target}, not pixels")
        common.check("norm_pix" in config or norm_pix != "file", f"--hybrid {path} does not say whether it predicts normalised "
                     "pixels; give --hybrid_norm_pix yes (mae_pretrain_*_full) or no (mae_visualize_*)")
        D, Dd = weights["pos_embed"].shape[-1], len(weights["decoder_embed.weight"])
        P, N = len(weights["decoder_pred.weight"]), weights["pos_embed"].shape[1] - 1
        common.check((P, N) == (3 * patch_size ** 2, (img_size // patch_size) ** 2),
                     f"--hybrid {path} has {N} patches of {math.isqrt(P // 3)} px, this run "
                     f"{(img_size // patch_size) ** 2} of {patch_size} px; they must be the same")
        depth, decoder_depth = (len({k for k in weights if k.startswith(part) and k.endswith("norm1.weight")})
                                for part in ("blocks.", "decoder_blocks."))
        self.norm_pix = config["norm_pix"] if norm_pix == "file" else norm_pix == "yes"
        self.encoder = ViT(img_size, patch_size, D, depth, config.get("num_heads", common.usual_heads(D)))
        self.decoder = Decoder(D, Dd, decoder_depth, config.get("decoder_heads", 16), self.encoder.grid, P)
        for part in (self.encoder, self.decoder):
            common.load_weights(part, weights, path)
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                del module._parameters[name]
                module.register_buffer(name, parameter.detach(), persistent=False)

    @torch.no_grad()
    def forward(self, imgs, ids_keep, ids_shuffle):
        """x_hat of the masked patches (B, M, P), as normalised as the generator's own target was."""
        latent = self.encoder.norm(self.encoder(imgs, ids_keep)[-1])
        return self.decoder(latent.unsqueeze(0), ids_shuffle)[0]


# --- the method -------------------------------------------------------------------------------------------------------

class DeepMIM(nn.Module):
    """Encoder, a decoder per tap, and what is frozen: teacher, generator, mask teacher; arguments as in `Config`."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mask="random", mask_file="",
                 mask_ratio=0.75, taps=(), shared_decoder=False, target="pixel", target_file="", norm_pix=True, hybrid="",
                 hybrid_norm_pix="file", alpha=(), hybrid_space="normalised", decoder_depth=4, decoder_dim=512, decoder_heads=16):
        super().__init__()
        self.mask, self.mask_ratio, self.target, self.norm_pix = mask, mask_ratio, target, norm_pix
        self.hybrid_space, self.patch_size = hybrid_space, patch_size
        self.taps = taps or default_taps(depth)  # counted from 1
        self.encoder = ViT(img_size, patch_size, embed_dim, depth, num_heads)
        self.grid, N = self.encoder.grid, self.encoder.pos_embed.shape[1] - 1
        self.num_keep = int(N * (1 - mask_ratio))
        teacher = getattr(targets, target)(target_file) if target_file else None
        out_dim = teacher.out_dim if teacher else targets.HOG_DIM if target == "hog" else 3 * patch_size ** 2
        self.decoders = nn.ModuleList(
            Decoder(embed_dim, decoder_dim, decoder_depth, decoder_heads, self.grid, out_dim)
            for _ in range(1 if shared_decoder else len(self.taps)))
        self.teacher = teacher
        mask_teacher = {"semantic_guided": targets.dino, "semantic_aware": targets.clip}
        self.mask_teacher = mask_teacher[mask](mask_file) if mask_file else None
        self.generator = Generator(hybrid, img_size, patch_size, hybrid_norm_pix) if hybrid else None
        K = len(self.taps)
        alpha = alpha or [1 - i / max(1, K - 1) for i in reversed(range(K))]  # 0, 1/3, 2/3, 1
        self.register_buffer("alpha", torch.tensor(alpha).view(K, 1, 1, 1), persistent=False)
        self.register_buffer("whole", torch.zeros(()))  # how far SemMAE's schedule is; saved, so that a resumed run knows

    def forward(self, imgs, ids_shuffle):
        """imgs (B, 3, H, W), ids_shuffle (B, N) -> loss (), metrics: name -> tensor ()."""
        ids_shuffle = self.reorder(imgs, ids_shuffle)
        target = self.teach(imgs, ids_shuffle)  # (1 or K, B, M, C), or (1, B, M) token numbers
        pred = self.decode(self.encode(imgs, ids_shuffle[:, :self.num_keep]), ids_shuffle)  # (K, B, M, C)
        error = self.compare(pred, target)  # (K,)
        return error.sum(), {f"{self.target}/{g}": e for g, e in zip(self.taps, error.detach())}  # Eq. 2

    def reorder(self, imgs, ids_shuffle):
        """The masking strategies of Table 12: ids_shuffle (B, N) after a teacher's opinion."""
        if self.mask == "random":
            return ids_shuffle
        tokens, attention = self.mask_teacher.tokens(imgs, self.grid)
        if self.mask == "semantic_aware":
            return semantic_aware(attention, ids_shuffle)
        return semantic_guided(tokens[:, 1:], ids_shuffle, self.mask_ratio, self.whole)

    def encode(self, imgs, ids_keep):
        """Latents of the K taps, the last one normalised -> (K, B, 1 + V, D)."""
        outputs = self.encoder(imgs, ids_keep)
        return torch.stack([outputs[g - 1] for g in self.taps[:-1]] + [self.encoder.norm(outputs[-1])])

    def decode(self, latent, ids_shuffle):
        """latent (K, B, 1 + V, D) -> predictions (K, B, M, C)."""
        if len(self.decoders) == 1:
            return self.decoders[0](latent, ids_shuffle)
        return torch.cat([decoder(x, ids_shuffle) for decoder, x in zip(self.decoders, latent.split(1))])

    @torch.no_grad()
    def teach(self, imgs, ids_shuffle):
        """What the masked patches should be predicted as -> (1, B, M, C), or one per tap (K, B, M, C) with --hybrid."""
        ids_keep, ids_mask = ids_shuffle[:, :self.num_keep], ids_shuffle[:, self.num_keep:]
        if self.target == "codebook":
            return self.teacher(imgs, self.grid).gather(1, ids_mask).unsqueeze(0)
        # Fork here: any (B, N, C) that is a function of the images can be a target.
        if self.teacher is not None:
            return take(self.teacher(imgs, self.grid), ids_mask).unsqueeze(0)
        if self.target == "hog":
            return take(targets.hog(imgs, self.patch_size), ids_mask).unsqueeze(0)
        x = take(patchify(imgs, self.patch_size), ids_mask)  # (B, M, P)
        normal, mean, std = normalise_patches(x)
        if self.generator is None:
            return (normal if self.norm_pix else x).unsqueeze(0)
        x_hat = self.generator(imgs, ids_keep, ids_shuffle).float()  # (B, M, P)
        if self.norm_pix and self.hybrid_space == "normalised":  # Eq. 1 on normalised pixels
            x_hat = x_hat if self.generator.norm_pix else (x_hat - mean) / std
            return self.alpha * normal + (1 - self.alpha) * x_hat
        x_hat = x_hat * std + mean if self.generator.norm_pix else x_hat
        t = self.alpha * x + (1 - self.alpha) * x_hat  # Eq. 1 on pixels
        return normalise_patches(t)[0] if self.norm_pix else t

    def compare(self, pred, target):
        """Error of each tap, mean over masked patches -> (K,)."""
        if self.target == "codebook":
            loss = F.cross_entropy(pred.float().movedim(-1, 1), target.expand(len(pred), -1, -1), reduction="none")
            return loss.mean((1, 2))
        if self.target in ("dino", "clip"):
            return (2 - 2 * F.cosine_similarity(pred.float(), target.float(), dim=-1)).mean((1, 2))
        return (pred - target).square().mean((1, 2, 3))

    @torch.no_grad()
    def after_step(self, progress):
        """SemMAE's schedule, from parts of parts to whole parts; progress in (0, 1] of the whole training."""
        self.whole.fill_(progress ** 2)

    @torch.no_grad()
    def preview(self, imgs, ids_shuffle):
        """Panels for preview.png: title -> images (B, 3, H, W) as normalised as `imgs`."""
        ids_shuffle, p = self.reorder(imgs, ids_shuffle), self.patch_size
        ids_keep, ids_mask = ids_shuffle[:, :self.num_keep], ids_shuffle[:, self.num_keep:]
        ids_restore = ids_shuffle.argsort(1)  # argsort of a permutation is its inverse
        pred = self.decode(self.encode(imgs, ids_keep), ids_shuffle).float()  # (K, B, M, C)
        target = self.teach(imgs, ids_shuffle).float()
        visible = take(patchify(imgs, p), ids_keep)  # (B, V, P)
        panels = {"input": imgs, "masked": self.fill(visible, torch.zeros_like(take(patchify(imgs, p), ids_mask)),
                                                     ids_restore)}
        if self.target == "pixel":
            if self.norm_pix:  # predictions are relative; the true mean and deviation make them pictures
                _, mean, std = normalise_patches(take(patchify(imgs, p), ids_mask))
                pred, target = pred * std + mean, target * std + mean
        else:  # numbers without colours of their own
            if self.target == "codebook":
                codes = self.teacher.weight("quantize.embedding.weight")
                pred, target = codes[pred.argmax(-1)], codes[target.long()]
            visible = torch.zeros_like(visible)
            colours = [first_components(x, target.flatten(0, 2)) for x in (pred, target)]
            mean, std = (t.view(3) for t in common.mean_std(imgs.device))
            pred, target = (((c - mean) / std).repeat(1, 1, 1, p * p) for c in colours)
        if self.target != "pixel" or self.generator is not None:
            panels |= {f"target{f', block {g}' if len(target) > 1 else ''}": self.fill(visible, t, ids_restore)
                       for g, t in zip(self.taps, target)}
        return panels | {f"block {g}": self.fill(visible, x, ids_restore) for g, x in zip(self.taps, pred)}

    def fill(self, visible, masked, ids_restore):
        """Picture from patches (B, V, P) and (B, M, P) -> (B, 3, H, W)."""
        return unpatchify(take(torch.cat((visible, masked), 1), ids_restore), self.patch_size, self.grid)


def main():
    """Command line -> model -> training."""
    cfg = common.parse(Config, PRESETS, __doc__)
    torch.manual_seed(cfg.seed)
    try:
        model = DeepMIM(**common.arguments(DeepMIM, cfg))
    except ValueError as error:
        common.fail(str(error))
    common.train(cfg, model, partial(draw_mask, **common.arguments(draw_mask, cfg)))


if __name__ == "__main__":
    main()
