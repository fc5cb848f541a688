"""
SdAE: Self-distillated Masked Autoencoder. Chen et al., ECCV 2022 [paper], with its supplement [supp].
Official code: github.com/AbrahamYabo/SdAE [code].

A masked autoencoder should predict features rather than pixels, and needs no pretrained network for that: its teacher
is an EMA of its own encoder, the student. A teacher that sees the whole image would know far more than the student, so
it reads only the masked patches, in folds as small as what the student sees.

One training step, `SdAE.forward` and `after_step`:
    ids_keep, ids_mask = ids_shuffle.split([V, M], 1)                    # random
    latent = norm(encoder(imgs, ids_keep)[-1])                           # the student
    pred   = decoder(latent, ids_shuffle)                                # for the masked patches
    folds  = ids_mask.unflatten(1, (G, L))                               # 3 folds of 49 patches, Sec. 2.2
    target = normalize(teacher(imgs, each fold by itself))               # Eq. 3: each token to mean 0, variance 1
    loss   = 1 - cosine(target, pred)                                    # Eq. 4
    optimizer step; at the end of an epoch teacher = m * teacher + (1 - m) * encoder     # Eq. 7

B images, N patches = V visible + M masked, P values per patch, D width, G folds of L patches, T tokens in attention.

The papers do not settle what the cosine runs over (`--cosine_axis`):
    channel   the D channels of a token            cos(target[b, g, l, :], pred[b, g, l, :])   the text; default
    token     the L tokens of a fold, per channel  cos(target[b, g, :, d], pred[b, g, :, d])   the code, for folds
    global    everything in an image               cos(target[b, :, :, :], pred[b, :, :, :])   Eq. 4 as printed
The code's full-image teacher takes channel, so the paper's Table 5 changes two things at once.

Differs from paper or code, besides what stands at the lines concerned: Eq. 4 is a likelihood to maximize and prints the
target in its numerator unnormalized; where folds do not divide M, the rest of the masked patches is left out, as in the
code (2 x 73 of 147; the paper's Sec. 4.3 says 2 x 79); weight decay is the paper's 0.05, the code's default is 0.04;
[CLS] stands in front of every fold, as in the code.

    python sdae.py --preset quick                                        # generated images, 2 CPU cores, 2 minutes
    torchrun --nproc_per_node=8 sdae.py --data IMAGENET                  # the paper's recipe, ViT-B, 300 epochs
    torchrun --nproc_per_node=8 sdae.py --epochs 100 --warmup_epochs 20 --data IMAGENET

The loss is 1.0 if nothing is known. It rises when the teacher moves, so it does not compare runs. `teacher_cosine`, the
mean cosine between features, must stay well below 1: if all features are alike, any loss is 0.
"""
import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import common


@dataclass(frozen=True)
class Config(common.RunConfig):
    img_size: int = 224  # [code] side of the square crop, pixels
    patch_size: int = 16  # [paper Sec. 4.3] side of a patch, pixels
    embed_dim: int = 768  # [code] encoder width; ViT-S 384, ViT-B 768, ViT-L 1024
    depth: int = 12  # [code] encoder blocks; ViT-L 24
    num_heads: int = 12  # [code] attention heads; ViT-S 6, ViT-L 16
    drop_path: float = 0.25  # [supp A.1] largest fraction of samples that skip a branch, in the student's last block
    mask_ratio: float = 0.75  # [supp A.1] fraction of patches hidden from the student
    feed: Literal["folds", "full", "masked", "crop"] = "folds"  # [paper Tables 1, 5] what the teacher reads
    folds: int = 3  # [paper Fig. 4b] pieces in which it reads the masked patches: 2, 3, or 4
    crop_ratio: float = 1 / 3  # [paper Fig. 4b] fraction of the masked patches that --feed crop reads
    normalize: bool = True  # [paper Eq. 3, Table 5] each target token to mean 0, variance 1
    cosine_axis: Literal["channel", "token", "global"] = "channel"  # [paper Eq. 4] see above; the code has token
    teacher_init: Literal["copy", "independent"] = "copy"  # [code] the code draws the teacher independently
    momentum: tuple[float, ...] = (0.96, 0.99)  # [supp A.1] of the teacher, from the first to the second along a cosine
    ema_every: Literal["epoch", "step"] = "epoch"  # [paper Sec. 4.2] how often; per step needs momenta near 1
    export: Literal["student", "teacher"] = "student"  # [paper Fig. 4c] which encoder goes to encoder.pt and kNN
    decoder_depth: int = 8  # [supp A.4] decoder blocks
    decoder_dim: int = 512  # [code] width of the decoder
    decoder_heads: int = 16  # [code] heads of the decoder
    epochs: int = 300  # [supp A.1] ViT-B's 300; Table 2 has 100 as well, A.2 800
    warmup_epochs: float = 60.0  # [supp A.1] linear warm-up, a fifth of the epochs: 20 of 100, 160 of 800
    batch_size: int = 768  # [supp A.1] images per optimizer step, over all processes
    base_lr: float = 8e-4 / 3  # [supp A.1] learning rate 8e-4 = base_lr * batch_size / 256
    min_lr: float = 0.0  # [code] learning rate at the end of the cosine
    weight_decay: float = 0.05  # [supp A.1] not on biases, norms, position table, [CLS]
    adam_betas: tuple[float, ...] = (0.9, 0.95)  # [code] AdamW's two moments
    crop_min: float = 0.2  # [code] smallest area of the random crop, fraction of the image

    def __post_init__(self):
        super().__post_init__()
        check_vit(self)
        assert self.drop_path < 1, "--drop_path must be below 1"
        assert len(self.momentum) == 2 and max(self.momentum) < 1, "--momentum takes 2 values below 1"
        assert self.num_read > 0, "--folds or --crop_ratio leaves the teacher no patch to read"

    @property
    def num_keep(self):  # V
        return int((self.img_size // self.patch_size) ** 2 * (1 - self.mask_ratio))

    @property
    def num_folds(self):  # G
        return self.folds if self.feed == "folds" else 1

    @property
    def num_read(self):  # G * L
        M = (self.img_size // self.patch_size) ** 2 - self.num_keep
        return round(M * self.crop_ratio) if self.feed == "crop" else M - M % self.num_folds


PRESETS = {
    "small": dict(embed_dim=384, num_heads=6),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "quick": dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, decoder_dim=64, decoder_heads=2,
                  decoder_depth=1, drop_path=0.0, cosine_axis="token", epochs=4, warmup_epochs=0.5, batch_size=32,
                  base_lr=1.2e-2, eval_every=2, eval_images=5000, out_dir="out/quick_sdae"),
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

    The masked ones are cut into folds in this order.
    """
    # Fork here: any order of the patches is a mask; the first num_keep are visible.
    return rng.permutation((cfg.img_size // cfg.patch_size) ** 2)


# --- targets ----------------------------------------------------------------------------------------------------------

def normalize_tokens(tokens):
    """Eq. 3: each token (..., D) to mean 0, variance 1 over its channels; unbiased variance, as in the code."""
    return (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True) + 1e-6).sqrt()


def cosine_loss(pred, target, axis):
    """Eq. 4 as 1 - cosine: pred and target (B, G, L, D) -> ()."""
    if axis == "global":
        pred, target = pred.flatten(1), target.flatten(1)
    return 1 - F.cosine_similarity(pred, target, dim=2 if axis == "token" else -1).mean()


def momentum_at(epoch, cfg):
    """EMA momentum in `epoch`, counted from 0: half a cosine from the first value toward the second. [supp A.1, code]

    Runs of under 100 epochs, the paper's shortest, with an EMA per epoch keep as much of the initial teacher as 300
    epochs would: otherwise it would hardly move, and 59% of it would be left after 20 epochs.
    """
    start, end = cfg.momentum
    m = end + 0.5 * (start - end) * (1 + math.cos(math.pi * epoch / cfg.epochs))
    return m ** (300 / cfg.epochs) if cfg.ema_every == "epoch" and cfg.epochs < 100 else m


# --- the method -------------------------------------------------------------------------------------------------------

class SdAE(nn.Module):
    """Student encoder, decoder, and teacher."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, sizes = cfg, (cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads)
        self.encoder = ViT(*sizes, cfg.drop_path)
        common.init_encoder(self.encoder, cfg)
        self.decoder = Decoder(cfg.embed_dim, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads, self.encoder.grid,
                               cfg.embed_dim)
        self.teacher = copy.deepcopy(self.encoder) if cfg.teacher_init == "copy" else ViT(*sizes)
        self.teacher.requires_grad_(False)
        for block in self.teacher.blocks:
            block.drop_path = 0.0  # linear in depth for the student, as in the code; none for the teacher

    @property
    def exported(self):
        return self.encoder if self.cfg.export == "student" else self.teacher

    def forward(self, imgs, ids_shuffle):
        """imgs (B, 3, H, W), ids_shuffle (B, N) -> loss (), metrics: name -> tensor ()."""
        cfg = self.cfg
        ids_keep, ids_mask = ids_shuffle[:, :cfg.num_keep], ids_shuffle[:, cfg.num_keep:]  # (B, V), (B, M)
        latent = self.encode(imgs, ids_keep)  # (1, B, 1 + V, D)
        pred = self.decoder(latent, ids_shuffle)[0]  # (B, M, D)
        pred = pred[:, :cfg.num_read].unflatten(1, (cfg.num_folds, -1))  # (B, G, L, D)
        target, metrics = self.targets(imgs, ids_mask)  # (B, G, L, D)
        return cosine_loss(pred.float(), target, cfg.cosine_axis), metrics

    def encode(self, imgs, ids_keep):
        """The student's latents, through its final norm -> (1, B, 1 + V, D)."""
        return self.encoder.norm(self.encoder(imgs, ids_keep)[-1]).unsqueeze(0)

    @torch.no_grad()
    def targets(self, imgs, ids_mask):
        """Teacher's features of the masked patches -> targets (B, G, L, D), metrics that tell of a collapse."""
        cfg = self.cfg
        # Fork here: any (B, G, L, D) that is a function of the masked patches, in their order, can be a target.
        if cfg.feed == "full":
            tokens = take(self.teacher(imgs)[-1][:, 1:], ids_mask)
        else:
            tokens = self.teacher(imgs, ids_mask[:, :cfg.num_read], folds=cfg.num_folds)[-1][:, 1:]  # (B*G, L, D)
        tokens = self.teacher.norm(tokens).float()  # the final norm comes before Eq. 3, as in the code
        tokens = tokens.reshape(len(imgs), cfg.num_folds, -1, cfg.embed_dim)  # (B, G, L, D)
        directions = F.normalize(tokens.flatten(0, 2), dim=-1)
        metrics = dict(teacher_std=tokens.flatten(0, 2).std(0, correction=0).mean(),  # 0 if all features are alike
                       teacher_cosine=directions.mean(0).square().sum())  # mean over all pairs, also with itself
        return normalize_tokens(tokens) if cfg.normalize else tokens, metrics

    @torch.no_grad()
    def after_step(self, step, steps_per_epoch):
        if self.cfg.ema_every == "epoch" and step % steps_per_epoch:
            return
        m = momentum_at((step - 1) // steps_per_epoch, self.cfg)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.encoder.parameters()), 1 - m)  # Eq. 7

    def preview(self, imgs, ids_shuffle):
        """Panels for preview.png: title -> images (B, 3, H, W), maps (B, h, w), or features (B, h, w, D)."""
        cfg, grid = self.cfg, self.encoder.grid
        ids_keep, ids_mask = ids_shuffle[:, :cfg.num_keep], ids_shuffle[:, cfg.num_keep:]
        patches = patchify(imgs, cfg.patch_size)

        def picture(masked):  # values of masked patches (B, G*L, C) -> (B, h, w, C), 0 elsewhere
            masked = F.pad(masked, (0, 0, 0, ids_mask.shape[1] - cfg.num_read))
            visible = masked.new_zeros(len(imgs), cfg.num_keep, masked.shape[-1])
            return unshuffle(visible, masked, ids_shuffle).unflatten(1, grid)

        seen = unshuffle(take(patches, ids_keep), torch.zeros_like(take(patches, ids_mask)), ids_shuffle)
        fold = torch.arange(1, 1 + cfg.num_folds, device=imgs.device).repeat_interleave(cfg.num_read // cfg.num_folds)
        target = normalize_tokens(self.targets(imgs, ids_mask)[0].flatten(1, 2))  # (B, G*L, D)
        pred = self.decoder(self.encode(imgs, ids_keep), ids_shuffle)[0, :, :cfg.num_read].float()
        return {"input": imgs, "masked": unpatchify(seen, cfg.patch_size, grid),
                "fold": picture(fold.expand(len(imgs), -1).unsqueeze(-1)).squeeze(-1),
                "teacher": picture(target), "student": picture(normalize_tokens(pred))}


def main():
    cfg = common.parse(Config, PRESETS, __doc__)
    torch.manual_seed(cfg.seed)
    common.train(cfg, SdAE(cfg), common.Samples(common.open_data(cfg, "train"), cfg, draw_mask))


if __name__ == "__main__":
    main()
