"""
DeepMIM: Deep Supervision for Masked Image Modeling. Ren et al., arXiv 2303.08817 [paper].
Official code, for the CLIP target only: github.com/OliverRensu/DeepMIM [code].

MAE supervises only the last block of its encoder, through an eight-block decoder. DeepMIM supervises blocks 6, 8, 10,
and 12, each through a lighter decoder of its own, so that shallow blocks learn more, too. Optionally (the paper's
DeepMIM†) shallow blocks get easier targets: blends of the image and its reconstruction by a pretrained MAE.

One training step, `DeepMIM.forward`, with i over the supervised blocks g_i:
    ids_keep, ids_mask = ids_shuffle.split([V, M], 1)                    # random, or a semantic mask
    x        = pixel_target(patchify(imgs)[ids_mask])                    # each patch to mean 0, variance 1, as in MAE
    x_hat    = generator(imgs, ids_keep, ids_shuffle)                    # --hybrid: a pretrained MAE's reconstruction
    target_i = alpha_i * x + (1 - alpha_i) * x_hat                       # Eq. 1; without --hybrid, alpha_i = 1
    latent_i = encoder(imgs, ids_keep)[g_i]                              # the last block's also passes the final norm
    pred_i   = decoder_i(latent_i, ids_shuffle)                          # for the masked patches
    loss     = sum_i mean(|pred_i - target_i|^2)                         # Eq. 2

B images, N patches = V visible + M masked, P values per patch, C per target, D width, K supervised blocks, T tokens.

`--target` replaces x by HOG, by features of a pretrained target network (DINO, CLIP), or by the token numbers of a
codebook (Table 11); `--mask` replaces random masks by SemMAE's or MILAN's (Table 12). Both are in targets.py. MAE, the
baseline, is `--taps 12 --decoder_depth 8`; Table 10's ablation is `--shared_decoder`.

Differs from the paper or is not said there, besides what stands at the lines concerned: squared errors are means over a
patch's values, as in MAE, not sums; Eq. 1 blends normalized pixels, which keeps a blurred x_hat faint (`--hybrid_space
raw` blends raw pixels, then normalizes, as Eq. 1 may also mean; the code never blends); the codebook is BEiT v2's, as
the paper's, PeCo's, is not public. A block that predicts 0 for all normalized pixels has an error of 1.0.

    python deepmim.py --preset quick                                     # generated images, 2 CPU cores, 2 minutes
    torchrun --nproc_per_node=8 deepmim.py --epochs 300 --data IMAGENET  # the paper's ablation recipe, ViT-B
    torchrun --nproc_per_node=8 deepmim.py --data IMAGENET --hybrid mae_pretrain_vit_base_full.pth --hybrid_norm_pix yes
"""
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import targets


@dataclass(frozen=True)
class Config(common.RunConfig):
    img_size: int = 224  # [paper Sec. 5] side of the square crop, pixels
    patch_size: int = 16  # [paper Sec. 5] side of a patch, pixels
    embed_dim: int = 768  # [paper Sec. 5] encoder width; ViT-S 384, ViT-B 768, ViT-L 1024
    depth: int = 12  # [paper Sec. 5] encoder blocks; ViT-L 24
    num_heads: int = 12  # [paper Sec. 5] attention heads; ViT-S 6, ViT-L 16
    mask: Literal["random", "semantic_guided", "semantic_aware"] = "random"  # [paper Table 12] MAE's, SemMAE's, MILAN's
    mask_file: str = ""  # [paper Table 12] for semantic masks: DINO's weights for guided, CLIP's for aware
    mask_ratio: float = 0.75  # [paper App. A] fraction of patches hidden from the encoder
    taps: tuple[int, ...] = ()  # [paper Table 8] supervised blocks; none: depth * 1/2, 2/3, 5/6, 1, that is 6 8 10 12
    shared_decoder: bool = False  # [paper Table 10] one decoder for all blocks, which costs 2 points
    target: Literal["pixel", "hog", "dino", "clip", "codebook"] = "pixel"  # [paper Table 11] prediction target
    target_file: str = ""  # [paper Table 11] weights of the pretrained target network: dino, clip, codebook
    norm_pix: bool = True  # [code: MAE] normalize each patch of the pixel target
    hybrid: str = ""  # [paper Eq. 1] pretrained MAE with decoder: last.pt of this script, mae_visualize_* or *_full
    hybrid_norm_pix: Literal["file", "yes", "no"] = "file"  # [ours] does it predict normalized pixels? *_full does
    alpha: tuple[float, ...] = ()  # [paper Table 9] fraction of the image in each hybrid target; none: 0 to 1 evenly
    hybrid_space: Literal["normalized", "raw"] = "normalized"  # [ours] blend after or before pixels are normalized
    decoder_depth: int = 4  # [paper Sec. 3] blocks in each decoder; MAE 8
    decoder_dim: int = 512  # [code] width of the decoders
    decoder_heads: int = 16  # [code] heads of the decoders
    epochs: int = 300  # [paper Sec. 5] 300 or 1600
    warmup_epochs: float = 40.0  # [paper App. A] linear warm-up
    batch_size: int = 4096  # [paper App. A] images per optimizer step, over all processes
    base_lr: float = 1.5e-4  # [paper App. A] learning rate = base_lr * batch_size / 256
    min_lr: float = 0.0  # [code] learning rate at the end of the cosine
    weight_decay: float = 0.05  # [paper App. A] not on biases, norms, position table, [CLS]
    adam_betas: tuple[float, ...] = (0.9, 0.95)  # [code] AdamW's two moments
    crop_min: float = 0.2  # [code] smallest area of the random crop, fraction of the image

    def __post_init__(self):
        super().__post_init__()
        check_vit(self)
        taps, alpha = self.supervised, self.alpha
        assert list(taps) == sorted(set(taps)) and taps[0] > 0 and taps[-1] == self.depth, \
            f"--taps must increase from at least 1 to --depth {self.depth}"
        assert not alpha or self.hybrid and len(alpha) == len(taps) and min(alpha) >= 0 and max(alpha) <= 1, \
            f"--alpha takes {len(taps)} values between 0 and 1, and needs --hybrid"
        assert self.target == "pixel" or not self.hybrid, "--hybrid needs --target pixel"
        assert self.target != "hog" or self.patch_size % 2 == 0, "--target hog needs an even --patch_size"
        assert bool(self.target_file) == (self.target in ("dino", "clip", "codebook")), \
            "--target_file goes with --target dino, clip, or codebook; targets.py names the files"
        assert bool(self.mask_file) == self.mask.startswith("semantic"), \
            "--mask_file goes with --mask semantic_guided or semantic_aware; targets.py names the files"

    @property
    def num_keep(self):  # V
        return int((self.img_size // self.patch_size) ** 2 * (1 - self.mask_ratio))

    @property
    def supervised(self):  # g_i, counted from 1
        return self.taps or sorted({max(1, round(self.depth * share)) for share in (1 / 2, 2 / 3, 5 / 6, 1)})


PRESETS = {
    "small": dict(embed_dim=384, num_heads=6),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "quick": dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, decoder_dim=64, decoder_heads=2,
                  decoder_depth=1, epochs=2, warmup_epochs=0.3, batch_size=32, base_lr=1.2e-2, eval_every=1,
                  eval_images=5000, out_dir="out/quick_deepmim"),
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


# --- masking ----------------------------------------------------------------------------------------------------------

def draw_mask(rng, cfg):
    """Everything random about a sample besides its crop -> ids_shuffle (N,), visible patches first.

    Semantic masks need a network: `DeepMIM.shuffle` makes them from the noise (2, N) that is drawn here.
    """
    N = (cfg.img_size // cfg.patch_size) ** 2
    # Fork here: any order of the patches is a mask; the first num_keep are visible.
    if cfg.mask == "random":
        return rng.permutation(N)
    if cfg.mask in ("semantic_guided", "semantic_aware"):
        return rng.random((2, N))
    raise ValueError(f"unknown mask {cfg.mask}")


# --- targets ----------------------------------------------------------------------------------------------------------

def pixel_target(patches, norm_pix):
    """Masked patches (B, M, P) -> target; norm_pix: mean 0, variance 1 per patch, as in MAE. Fork here: any target."""
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt() if norm_pix else patches


def pixel_picture(pred, patches, norm_pix):
    """Inverse of `pixel_target` for the picture, with the mean and deviation of the true patches."""
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return pred * (var + 1e-6).sqrt() + mean if norm_pix else pred


def hybrid_target(patches, x_hat, alpha, x_hat_norm_pix, cfg):
    """Eq. 1: masked patches (B, M, P), their reconstruction (B, M, P), alpha (K, 1, 1, 1) -> targets (K, B, M, P)."""
    if cfg.norm_pix and cfg.hybrid_space == "normalized":
        if not x_hat_norm_pix:
            mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
            x_hat = (x_hat - mean) / (var + 1e-6).sqrt()
        return alpha * pixel_target(patches, True) + (1 - alpha) * x_hat  # Eq. 1
    x_hat = pixel_picture(x_hat, patches, x_hat_norm_pix)
    return pixel_target(alpha * patches + (1 - alpha) * x_hat, cfg.norm_pix)  # Eq. 1


class Generator(nn.Module):
    """A pretrained MAE, frozen, that reconstructs masked patches for hybrid targets; last.pt's deepest decoder."""

    def __init__(self, cfg):
        super().__init__()
        weights, about = targets.read(cfg.hybrid)
        last = max((int(k.split(".")[1]) for k in weights if k.startswith("decoders.")), default=0)
        weights = {k.removeprefix("encoder.").removeprefix(f"decoders.{last}."): v for k, v in weights.items()}
        (*_, D), (Dd, *_) = targets.shapes(weights, cfg.hybrid, "pos_embed", "decoder_embed.weight")
        depth, decoder_depth = (len({k for k in weights if k.startswith(part) and k.endswith("norm1.weight")})
                                for part in ("blocks.", "decoder_blocks."))
        if about.get("target", "pixel") != "pixel":
            sys.exit(f"--hybrid {cfg.hybrid} predicts {about['target']}, not pixels")
        if cfg.hybrid_norm_pix == "file" and "norm_pix" not in about:
            sys.exit(f"--hybrid {cfg.hybrid} does not say whether it predicts normalized pixels; give "
                     "--hybrid_norm_pix yes (mae_pretrain_*_full) or no (mae_visualize_*)")
        self.norm_pix = about["norm_pix"] if cfg.hybrid_norm_pix == "file" else cfg.hybrid_norm_pix == "yes"
        heads = about.get("num_heads", 16 if D == 1280 else D // 64)  # MAE's ViT-H has 80 channels per head
        self.encoder = ViT(cfg.img_size, cfg.patch_size, D, depth, heads)
        self.decoder = Decoder(D, Dd, decoder_depth, about.get("decoder_heads", 16), self.encoder.grid,
                               3 * cfg.patch_size ** 2)
        for part in (self.encoder, self.decoder):
            common.load_weights(part, weights, cfg.hybrid)
        targets.freeze(self)

    def forward(self, imgs, ids_keep, ids_shuffle):
        """-> x_hat (B, M, P), normalized if `norm_pix`."""
        latent = self.encoder.norm(self.encoder(imgs, ids_keep)[-1])
        return self.decoder(latent.unsqueeze(0), ids_shuffle)[0]


def per_patch_error(pred, target, kind):
    """pred (K, B, M, C), target (1 or K, B, M, C), or token numbers (1, B, M, 1) -> (K, B, M). Fork here: any error."""
    if kind == "codebook":
        target = target.squeeze(-1).expand(len(pred), -1, -1)  # (K, B, M)
        return F.cross_entropy(pred.float().movedim(-1, 1), target, reduction="none")
    if kind in ("dino", "clip"):  # the paper's l2 loss, after normalization, as in the code
        return 2 - 2 * F.cosine_similarity(pred.float(), target.float(), dim=-1)
    return (pred - target).square().mean(-1)


# --- the method -------------------------------------------------------------------------------------------------------

class DeepMIM(nn.Module):
    """Encoder, one decoder per supervised block, and frozen networks for targets and masks."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, p = cfg, cfg.embed_dim, cfg.patch_size
        self.taps, K = cfg.supervised, len(cfg.supervised)
        self.encoder = ViT(cfg.img_size, p, D, cfg.depth, cfg.num_heads)
        common.init_encoder(self.encoder, cfg)
        out_dim = targets.HOG_DIM if cfg.target == "hog" else 3 * p * p
        with torch.random.fork_rng(devices=[]):  # initial weights do not depend on what is loaded
            if cfg.target_file:
                self.target_network = getattr(targets, cfg.target)(cfg.target_file)
                out_dim = self.target_network.out_dim
            if cfg.mask_file:
                load = targets.dino if cfg.mask == "semantic_guided" else targets.clip
                self.mask_network = load(cfg.mask_file)
            if cfg.hybrid:
                self.generator = Generator(cfg)
        self.decoders = nn.ModuleList(
            Decoder(D, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads, self.encoder.grid, out_dim)
            for _ in range(1 if cfg.shared_decoder else K))
        alpha = cfg.alpha or [1 - i / max(1, K - 1) for i in reversed(range(K))]  # 0, 1/3, 2/3, 1
        self.register_buffer("alpha", torch.tensor(alpha).view(K, 1, 1, 1), persistent=False)
        self.register_buffer("whole", torch.zeros(()))  # where SemMAE's schedule is; saved for a resumed run

    def forward(self, imgs, draws):
        """imgs (B, 3, H, W), draws (B, N) or noise (B, 2, N) -> loss (), metrics: name -> tensor ()."""
        cfg = self.cfg
        ids_shuffle = self.shuffle(imgs, draws)  # (B, N)
        target = self.targets(imgs, ids_shuffle)  # (1 or K, B, M, C)
        pred = self.decode(self.encode(imgs, ids_shuffle[:, :cfg.num_keep]), ids_shuffle)  # (K, B, M, C)
        error = per_patch_error(pred, target, cfg.target).mean((1, 2))  # (K,)
        return error.sum(), {f"{cfg.target}/{g}": x for g, x in zip(self.taps, error.detach())}  # Eq. 2

    def encode(self, imgs, ids_keep):
        """Latents of the K supervised blocks, the last through the final norm, as in the code -> (K, B, 1 + V, D)."""
        *outputs, last = self.encoder(imgs, ids_keep, self.taps)
        return torch.stack([*outputs, self.encoder.norm(last)])

    def decode(self, latent, ids_shuffle):
        """latent (K, B, 1 + V, D) -> predictions for the masked patches (K, B, M, C)."""
        parts = latent.split(len(latent) // len(self.decoders))  # one block each, or all for a shared decoder
        return torch.cat([decoder(x, ids_shuffle) for decoder, x in zip(self.decoders, parts)])

    def shuffle(self, imgs, draws):
        """What `draw_mask` drew -> ids_shuffle (B, N), by the mask network for semantic masks."""
        if self.cfg.mask == "semantic_guided":
            tokens, _ = self.mask_network.tokens(imgs, self.encoder.grid)
            return targets.semantic_guided(tokens[:, 1:], draws, self.cfg.mask_ratio, self.whole)
        if self.cfg.mask == "semantic_aware":
            return targets.semantic_aware(self.mask_network.tokens(imgs, self.encoder.grid)[1], draws)
        return draws

    @torch.no_grad()
    def targets(self, imgs, ids_shuffle):
        """Targets of the masked patches -> (1, B, M, C), or, with --hybrid, one per block (K, B, M, C)."""
        cfg = self.cfg
        ids_keep, ids_mask = ids_shuffle[:, :cfg.num_keep], ids_shuffle[:, cfg.num_keep:]  # (B, V), (B, M)
        if cfg.target == "hog":
            return take(targets.hog(imgs, cfg.patch_size), ids_mask).unsqueeze(0)
        if cfg.target_file:
            return take(self.target_network(imgs, self.encoder.grid), ids_mask).unsqueeze(0)
        patches = take(patchify(imgs, cfg.patch_size), ids_mask)  # (B, M, P)
        if not cfg.hybrid:
            return pixel_target(patches, cfg.norm_pix).unsqueeze(0)
        x_hat = self.generator(imgs, ids_keep, ids_shuffle).float()  # (B, M, P)
        return hybrid_target(patches, x_hat, self.alpha, self.generator.norm_pix, cfg)

    @torch.no_grad()
    def after_step(self, step, steps_per_epoch):
        self.whole.fill_((step / (steps_per_epoch * self.cfg.epochs)) ** 2)  # SemMAE's schedule, toward whole parts

    def preview(self, imgs, draws):
        """Panels for preview.png: title -> images (B, 3, H, W), or features (B, h, w, C)."""
        cfg, grid = self.cfg, self.encoder.grid
        ids_shuffle = self.shuffle(imgs, draws)
        ids_keep, ids_mask = ids_shuffle[:, :cfg.num_keep], ids_shuffle[:, cfg.num_keep:]
        visible, true = (take(patchify(imgs, cfg.patch_size), ids) for ids in (ids_keep, ids_mask))
        target = self.targets(imgs, ids_shuffle)  # (1 or K, B, M, C)
        pred = self.decode(self.encode(imgs, ids_keep), ids_shuffle)  # (K, B, M, C)

        def picture(masked):  # (B, M, P) -> (B, 3, H, W)
            return unpatchify(unshuffle(visible, masked, ids_shuffle), cfg.patch_size, grid)

        def show(values):  # targets or predictions (B, M, C) -> panel
            if cfg.target == "pixel":
                return picture(pixel_picture(values.float(), true, cfg.norm_pix))
            blank = torch.zeros_like(values[:, :1]).expand(-1, cfg.num_keep, -1)
            return unshuffle(blank, values, ids_shuffle).float().unflatten(1, grid)

        if cfg.target == "codebook":  # codes instead of their numbers
            codes = self.target_network.head.codes
            target, pred = codes[target.squeeze(-1)], codes[pred.argmax(-1)]
        elif cfg.target in ("dino", "clip"):  # the loss leaves the length of predictions open
            target, pred = F.normalize(target.float(), dim=-1), F.normalize(pred.float(), dim=-1)
        panels = {"input": imgs, "masked": picture(torch.zeros_like(true))}
        if cfg.hybrid:
            panels |= {f"target, block {g}": show(x) for g, x in zip(self.taps, target)}
        elif cfg.target != "pixel":
            panels["target"] = show(target[0])
        helped = cfg.target == "pixel" and cfg.norm_pix  # predictions have no mean and no deviation
        if helped:
            panels["true means"] = show(torch.zeros_like(pred[0]))
        return panels | {f"block {g}" + "\n(true mean, std)" * helped: show(x) for g, x in zip(self.taps, pred)}


def main():
    cfg = common.parse(Config, PRESETS, __doc__)
    torch.manual_seed(cfg.seed)
    common.train(cfg, DeepMIM(cfg), common.Samples(common.open_data(cfg, "train"), cfg, draw_mask))


if __name__ == "__main__":
    main()
