"""
DeepMIM on VideoMAE: Deep Supervision for Masked Image Modeling. Ren et al., arXiv 2303.08817 [paper], Table 5.
VideoMAE: Tong et al., NeurIPS 2022, arXiv 2203.12602; official code github.com/MCG-NJU/VideoMAE [code].
No official code of DeepMIM on VideoMAE is public.

VideoMAE is MAE on videos. Tokens are tubelets of 2 frames x 16 x 16 pixels, and 90% of them are hidden. They are hidden
in tubes, at the same places in all frames, so that a masked patch cannot be copied from the next frame. DeepMIM
supervises blocks 6, 8, 10, and 12 instead of the last one alone, each through a decoder of its own, so that shallow
blocks learn more, too.

One training step, `VideoMAE.forward`, with i over the supervised blocks g_i:
    ids_keep, ids_mask = ids_shuffle.split([V, M], 1)                    # tubes, drawn in the data worker
    target   = pixel_target(patchify(clips)[ids_mask])                   # each tubelet's channels to mean 0, variance 1
    latent_i = encoder(clips, ids_keep)[g_i]                             # the last block's also passes the final norm
    pred_i   = decoder_i(latent_i, ids_shuffle)                          # for the masked tubelets
    loss     = sum_i mean(|pred_i - target|^2)                           # Eq. 2

B clips of T frames, N tubelets = V visible + M masked, P values per tubelet, D width, K supervised blocks, L tokens.

VideoMAE, the baseline, is `--taps 12`.

Differs from the papers or is not said there, besides what stands at the lines concerned: the decoders of blocks 6, 8,
and 10 are like the last block's, and only this one's latent is normalized, as in DeepMIM on images; crops are
VideoMAE's, though the appendix also says that augmentation is that of images; weight decay includes mask tokens, as in
MAE. A block that predicts 0 for all normalized pixels has an error of 1.0.

    python videomae.py --preset quick                                    # generated videos, 2 CPU cores, 3 minutes
    torchrun --nproc_per_node=8 videomae.py --data KINETICS              # the paper's recipe, ViT-B, 800 epochs
"""
import functools
import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode, v2

import common
import videos
from evaluate import choose, knn_accuracy, read_each


@dataclass(frozen=True)
class Config(common.RunConfig):
    data: str = "motions"  # [ours] folder with train/ and val/ of videos or folders of frames; motions (generated)
    img_size: int = 224  # [code] side of the square crop, pixels
    patch_size: int = 16  # [code] side of a tubelet, pixels
    num_frames: int = 16  # [code] frames of a clip
    tubelet_size: int = 2  # [code] frames of a tubelet
    stride: int = 4  # [code] every stride-th frame of the video is in the clip; 4 for Kinetics
    embed_dim: int = 768  # [code] encoder width; ViT-S 384, ViT-B 768, ViT-L 1024
    depth: int = 12  # [code] encoder blocks; ViT-L 24
    num_heads: int = 12  # [code] attention heads; ViT-S 6, ViT-L 16
    mask_ratio: float = 0.9  # [code] fraction of the places in a frame hidden from the encoder
    taps: tuple[int, ...] = ()  # [paper Table 8] supervised blocks; none: depth * 1/2, 2/3, 5/6, 1, that is 6 8 10 12
    norm_pix: bool = True  # [code] normalize each tubelet and channel of the target
    decoder_depth: int = 4  # [code] blocks in each decoder
    decoder_dim: int = 384  # [code] width of the decoders; half the encoder's
    decoder_heads: int = 6  # [code] heads of the decoders
    epochs: int = 800  # [paper Sec. 5.1] as the VideoMAE that it is compared with
    warmup_epochs: float = 40.0  # [paper App. A] linear warm-up
    batch_size: int = 1024  # [paper App. A] clips per optimizer step, over all processes
    base_lr: float = 1.5e-4  # [paper App. A] learning rate = base_lr * batch_size / 256
    min_lr: float = 4e-5  # [code] learning rate at the end of the cosine; 1e-5 * batch_size / 256
    weight_decay: float = 0.05  # [paper App. A] not on biases and norms
    adam_betas: tuple[float, ...] = (0.9, 0.95)  # [code] AdamW's two moments
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)  # [code] sides of crops, fractions of the shorter side
    flip: bool = True  # [VideoMAE Table 8] flip half of the clips; not for Something-Something. The code never flips

    def __post_init__(self):
        super().__post_init__()
        check_vit(self)
        taps = self.supervised
        assert list(taps) == sorted(set(taps)) and taps[0] > 0 and taps[-1] == self.depth, \
            f"--taps must increase from at least 1 to --depth {self.depth}"
        assert all(0 < scale <= 1 for scale in self.crop_scales or (0,)), "--crop_scales must be above 0 and at most 1"

    @property
    def num_keep(self):  # V
        places = (self.img_size // self.patch_size) ** 2
        return (places - int(places * self.mask_ratio)) * (self.num_frames // self.tubelet_size)

    @property
    def supervised(self):  # g_i, counted from 1
        return self.taps or sorted({max(1, round(self.depth * share)) for share in (1 / 2, 2 / 3, 5 / 6, 1)})


PRESETS = {
    "small": dict(embed_dim=384, num_heads=6, decoder_dim=192, decoder_heads=3),
    "large": dict(embed_dim=1024, depth=24, num_heads=16, decoder_dim=512, decoder_heads=8),
    "quick": dict(img_size=32, patch_size=8, num_frames=8, stride=2, embed_dim=96, depth=4, num_heads=3, decoder_dim=64,
                  decoder_heads=2, decoder_depth=1, mask_ratio=0.75, epochs=6, warmup_epochs=1, batch_size=32,
                  base_lr=1.6e-2, min_lr=0.0, crop_scales=(1.0,), eval_every=3, out_dir="out/quick_videomae"),
}


# --- ViT and decoder, under VideoMAE's names --------------------------------------------------------------------------

def check_vit(cfg):
    assert cfg.img_size % cfg.patch_size == 0, f"--img_size must be divisible by --patch_size {cfg.patch_size}"
    assert cfg.num_frames % cfg.tubelet_size == 0, "--num_frames must be divisible by --tubelet_size"
    N = (cfg.img_size // cfg.patch_size) ** 2 * (cfg.num_frames // cfg.tubelet_size)
    assert 0 < cfg.num_keep < N, f"--mask_ratio {cfg.mask_ratio} must leave some of {N} tokens visible and some masked"
    for width, heads in (("embed_dim", "num_heads"), ("decoder_dim", "decoder_heads")):
        assert getattr(cfg, width) % getattr(cfg, heads) == getattr(cfg, width) % 2 == 0, \
            f"--{width} must be divisible by 2 and by --{heads}"


def patchify(clips, t, p):
    """Clips (B, T, 3, H, W) -> tubelets (B, N, t*p*p*3), frame by frame; values ordered frame, row, column, channel."""
    B, T, C, H, W = clips.shape
    x = clips.reshape(B, T // t, t, C, H // p, p, W // p, p)
    x = x.permute(0, 1, 4, 6, 2, 5, 7, 3)  # (B, T/t, h, w, t, p, p, C)
    return x.reshape(B, -1, t * p * p * C)  # (B, N, P)


def unpatchify(tubelets, t, p, grid):
    """Inverse of `patchify` for a (T/t, h, w) grid of tubelets: (B, N, t*p*p*3) -> (B, T, 3, H, W)."""
    x = tubelets.unflatten(2, (t, p, p, -1)).unflatten(1, grid)  # (B, T/t, h, w, t, p, p, C)
    x = x.permute(0, 1, 4, 7, 2, 5, 3, 6)  # (B, T/t, t, C, h, p, w, p)
    return x.reshape(len(tubelets), grid[0] * t, -1, grid[1] * p, grid[2] * p)


def take(tokens, ids):
    """Pick tokens (B, N, D) by number (B, L) -> (B, L, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def unshuffle(visible, masked, ids_shuffle):
    """Tokens (B, V, D) and (B, M, D) -> (B, N, D) in the order of the clip: argsort inverts a permutation."""
    return take(torch.cat((visible, masked), 1), ids_shuffle.argsort(1))


def sine_pos_embed(dim, N):
    """Fixed table (1, N, dim) over the N tubelets in one row, unlike MAE's, with sin and cos interleaved."""
    omega = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.arange(N, dtype=torch.float64).unsqueeze(1) * omega  # (N, dim/2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1).float().unsqueeze(0)


def init_weights(module):
    """MAE's initialization: Xavier-uniform linear layers with zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Pre-norm transformer block. In training, a fraction `drop_path` of the samples skips each branch."""

    def __init__(self, dim, num_heads, drop_path=0.0):
        super().__init__()
        self.num_heads, self.drop_path = num_heads, drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim, bias=False), proj=nn.Linear(dim, dim)))
        self.attn.q_bias = nn.Parameter(torch.zeros(dim))
        self.attn.v_bias = nn.Parameter(torch.zeros(dim))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):  # (B, L, D)
        x = x + self.drop(self.attend(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def attend(self, x):
        q_bias, v_bias = self.attn.q_bias, self.attn.v_bias
        bias = torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))  # the softmax would cancel a bias of k
        qkv = F.linear(x, self.attn.qkv.weight, bias)  # (B, L, 3 * D)
        q, k, v = (t.transpose(1, 2) for t in qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2))  # (B, heads, L, d)
        return self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def drop(self, x):
        if not self.training or not self.drop_path:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)


class ViT(nn.Module):
    """Vision transformer that reads all tubelets, or only those in `ids_keep`. There is no [CLS]."""

    def __init__(self, img_size, patch_size, num_frames, tubelet_size, embed_dim, depth, num_heads, drop_path=0.0):
        super().__init__()
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        self.grid = (num_frames // tubelet_size, img_size // patch_size, img_size // patch_size)
        size = (tubelet_size, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv3d(3, embed_dim, size, size)))
        self.register_buffer("pos_embed", sine_pos_embed(embed_dim, math.prod(self.grid)), persistent=False)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)

    def embed(self, tubelets):
        """(B, V, P) -> (B, V, D). The convolution as a linear map of tubelets, so that masked ones are skipped."""
        proj = self.patch_embed.proj
        weight = proj.weight.permute(0, 2, 3, 4, 1).flatten(1)  # (D, P), in the order of `patchify`
        return F.linear(tubelets, weight, proj.bias)

    def forward(self, clips, ids_keep=None):
        """clips (B, T, 3, H, W), ids_keep (B, V) or None for all -> every block's output (B, V, D), before `norm`."""
        tubelets, pos = patchify(clips, self.tubelet_size, self.patch_size), self.pos_embed  # (B, N, P), (1, N, D)
        if ids_keep is not None:
            tubelets, pos = take(tubelets, ids_keep), pos[0, ids_keep]  # (B, V, P), (B, V, D)
        outputs = [self.embed(tubelets) + pos]  # (B, V, D)
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs[1:]


class Decoder(nn.Module):
    """VideoMAE's decoder: mask tokens join the latents, then a few blocks, then a prediction per masked tubelet."""

    def __init__(self, embed_dim, decoder_dim, depth, num_heads, N, out_dim):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        self.register_buffer("pos_embed", sine_pos_embed(decoder_dim, N), persistent=False)
        self.blocks = nn.ModuleList(Block(decoder_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.head = nn.Linear(decoder_dim, out_dim)
        self.apply(init_weights)
        self.encoder_to_decoder = nn.Linear(embed_dim, decoder_dim, bias=False)  # keeps PyTorch's initialization

    def forward(self, latent, ids_shuffle):
        """latent (B, V, D), ids_shuffle (B, N) -> (B, M, out_dim). Tokens stay in shuffled order."""
        V, pos = latent.shape[1], self.pos_embed[0, ids_shuffle]  # (B, N, Dd)
        x = torch.cat((self.encoder_to_decoder(latent) + pos[:, :V], self.mask_token + pos[:, V:]), 1)  # (B, N, Dd)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, V:]))


# --- masking ----------------------------------------------------------------------------------------------------------

def draw_mask(rng, cfg):
    """Everything random about a sample besides its clip and crop -> ids_shuffle (N,), visible tubelets first."""
    places, steps = (cfg.img_size // cfg.patch_size) ** 2, cfg.num_frames // cfg.tubelet_size
    # Fork here: any order of the tubelets is a mask; the first num_keep are visible.
    order = rng.permutation(places)
    ids = order + places * np.arange(steps)[:, None]  # (steps, places): the same places at all times
    keep = places - int(places * cfg.mask_ratio)
    return np.concatenate((ids[:, :keep].ravel(), ids[:, keep:].ravel()))


# --- targets ----------------------------------------------------------------------------------------------------------

def pixel_target(tubelets, norm_pix):
    """Masked tubelets (B, M, P) -> target; norm_pix: mean 0, variance 1 per channel of each. Fork here: any target."""
    x = tubelets.unflatten(-1, (-1, 3))  # (B, M, P/3, 3)
    mean, std = x.mean(-2, keepdim=True), x.std(-2, keepdim=True)
    return ((x - mean) / (std + 1e-6)).flatten(-2) if norm_pix else tubelets  # epsilon as in the code, unlike MAE's


def pixel_picture(pred, tubelets, norm_pix):
    """Inverse of `pixel_target` for the picture, with the means and deviations of the true tubelets."""
    x = tubelets.unflatten(-1, (-1, 3))
    mean, std = x.mean(-2, keepdim=True), x.std(-2, keepdim=True)
    return (pred.unflatten(-1, (-1, 3)) * (std + 1e-6) + mean).flatten(-2) if norm_pix else pred


# --- the method -------------------------------------------------------------------------------------------------------

class VideoMAE(nn.Module):
    """Encoder, and one decoder per supervised block."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, p, t = cfg, cfg.embed_dim, cfg.patch_size, cfg.tubelet_size
        self.taps = cfg.supervised
        self.encoder = ViT(cfg.img_size, p, cfg.num_frames, t, D, cfg.depth, cfg.num_heads)
        common.init_encoder(self.encoder, cfg)
        N = math.prod(self.encoder.grid)
        self.decoders = nn.ModuleList(
            Decoder(D, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads, N, 3 * t * p * p) for _ in self.taps)

    def forward(self, clips, ids_shuffle):
        """clips (B, T, 3, H, W), ids_shuffle (B, N) -> loss (), metrics: name -> tensor ()."""
        target = self.targets(clips, ids_shuffle)  # (B, M, P)
        pred = self.decode(self.encode(clips, ids_shuffle[:, :self.cfg.num_keep]), ids_shuffle)  # (K, B, M, P)
        error = (pred - target).square().mean((1, 2, 3))  # (K,)
        return error.sum(), {f"pixel/{g}": x for g, x in zip(self.taps, error.detach())}  # Eq. 2

    def encode(self, clips, ids_keep):
        """Latents of the K supervised blocks, the last through the final norm -> (K, B, V, D)."""
        outputs = self.encoder(clips, ids_keep)
        return torch.stack([outputs[g - 1] for g in self.taps[:-1]] + [self.encoder.norm(outputs[-1])])

    def decode(self, latent, ids_shuffle):
        """latent (K, B, V, D) -> predictions for the masked tubelets (K, B, M, P)."""
        return torch.stack([decoder(x, ids_shuffle) for decoder, x in zip(self.decoders, latent)])

    def tubelets(self, clips):
        """clips (B, T, 3, H, W) -> their tubelets (B, N, P), of pixels between 0 and 1, as in the code."""
        mean, std = common.mean_std(clips.device)
        return patchify(clips * std + mean, self.cfg.tubelet_size, self.cfg.patch_size)

    @torch.no_grad()
    def targets(self, clips, ids_shuffle):
        """Targets of the masked tubelets -> (B, M, P)."""
        return pixel_target(take(self.tubelets(clips), ids_shuffle[:, self.cfg.num_keep:]), self.cfg.norm_pix)

    def preview(self, clips, ids_shuffle):
        """Panels for preview.png: title -> images (8, 3, H, W), four frames of each of the first two clips."""
        cfg, clips, ids_shuffle = self.cfg, clips[:2], ids_shuffle[:2]
        ids_keep, ids_mask = ids_shuffle[:, :cfg.num_keep], ids_shuffle[:, cfg.num_keep:]
        visible, true = (take(self.tubelets(clips), ids) for ids in (ids_keep, ids_mask))
        pred = self.decode(self.encode(clips, ids_keep), ids_shuffle).float()  # (K, B, M, P)
        mean, std = common.mean_std(clips.device)

        def picture(masked):  # (2, M, P) -> (8, 3, H, W)
            tubelets = unshuffle(visible, masked, ids_shuffle)
            frames = unpatchify(tubelets, cfg.tubelet_size, cfg.patch_size, self.encoder.grid)  # (2, T, 3, H, W)
            frames = frames[:, [i * cfg.num_frames // 4 for i in range(4)]]
            return ((frames - mean) / std).flatten(0, 1)

        gray = mean.flatten().repeat(true.shape[-1] // 3)  # (P,)
        panels = {"input": picture(true), "visible": picture(gray.expand_as(true))}
        if cfg.norm_pix:  # predictions have no means and no deviations: show what the true ones tell
            panels["true means"] = picture(pixel_picture(torch.zeros_like(true), true, True))
        return panels | {f"block {g}" + "\n(true mean, std)" * cfg.norm_pix:
                         picture(pixel_picture(x, true, cfg.norm_pix)) for g, x in zip(self.taps, pred)}


# --- data -------------------------------------------------------------------------------------------------------------

class Samples(common.Samples):
    """Clips uint8 (T, 3, S, S) with their masks. Everything random depends on the key (epoch, index)."""

    def __init__(self, source, cfg, draw):
        self.source, self.cfg, self.draw = source, cfg, draw

    def read(self, index):
        cfg = self.cfg

        def pick(n):  # a clip that begins anywhere, by torch's generator, which has the key's seed
            start = int(torch.randint(max(1, n - cfg.num_frames * cfg.stride + 1), ()))
            return videos.clip_ids(n, start, cfg.num_frames, cfg.stride)

        return self.source.read(index, pick)

    def sample(self, item, rng):
        clip = multi_scale_crop(item[0], self.cfg, rng)
        clip = clip.flip(-1) if self.cfg.flip and rng.random() < 0.5 else clip
        return clip, self.draw(rng, self.cfg)


def multi_scale_crop(clip, cfg, rng):
    """One of 13 places, of a height and width among `crop_scales` that are the same or neighbors. [code]"""
    H, W = clip.shape[-2:]
    sizes = [int(min(H, W) * scale) for scale in cfg.crop_scales]
    sizes = [cfg.img_size if abs(size - cfg.img_size) < 3 else size for size in sizes]
    h, w = rng.choice([(h, w) for i, h in enumerate(sizes) for j, w in enumerate(sizes) if abs(i - j) <= 1])
    y, x = rng.choice([(y, x) for y in range(5) for x in range(5) if (y - x) % 2 == 0])  # quarters of what is left
    top, left = y * ((H - h) // 4), x * ((W - w) // 4)
    return v2.functional.resized_crop(clip, top, left, h, w, [cfg.img_size] * 2, InterpolationMode.BILINEAR)


def embed(encoder, clips):
    """Mean tubelets of the last block, of length 1: clips (B, T, 3, H, W) -> (B, D)."""
    return F.normalize(encoder.norm(encoder(clips)[-1]).float().mean(1)).cpu()


@torch.no_grad()
def evaluate(model, cfg, device, autocast, samples):
    """Loss and metrics on val/, always with the same masks; with labels also kNN accuracy -> by name.

    knn_still is kNN of the middle frame, repeated: what can be known without motion. Exact for any number of processes.
    """
    train, val, bad, rows = samples.source, videos.open_data(cfg, "val"), {}, []
    labeled = train.classes != [""]
    sets = [(train, choose(len(train), cfg.eval_images))] * labeled  # read before processes talk: evaluate.outputs
    sets += [(val, choose(len(val), max(1, cfg.eval_images // 5)))]
    parts = [[] for _ in sets]  # of features (B, 2, D) and labels (B,)
    for part, (source, ids) in zip(parts, sets):
        read = functools.partial(videos.read_views, source, cfg, 1, 1)
        for views, labels, numbers in read_each(read, source, ids, cfg, 32, default_collate, bad):
            draws = [draw_mask(np.random.default_rng((0, int(i))), cfg) for i in numbers]  # the same for every seed
            clips, draws = common.to_device(views[:, 0], default_collate(draws), device)  # (B, T, 3, H, W), (B, N)
            still = clips[:, [cfg.num_frames // 2]].expand_as(clips)
            with autocast:
                if labeled:
                    part.append((torch.stack([embed(model.encoder, x) for x in (clips, still)], 1), labels))
                if source is val:
                    loss, metrics = model(clips, draws)
                    rows.append((len(clips), {k: v.item() for k, v in dict(loss=loss, **metrics).items()}))
    common.note_bad({}, bad, sum(len(ids) for _, ids in sets), cfg)
    found, rows = {}, sum(common.gather(rows), [])  # the batches of all processes
    if labeled:
        bank, queries = ([torch.cat(x).to(device) for x in zip(*sum(common.gather(part), []))] for part in parts)
        for i, name in enumerate(("knn", "knn_still")):
            found[name] = knn_accuracy(bank[0][:, i], bank[1], queries[0][:, i], queries[1])
    n = sum(count for count, _ in rows)
    return found | {f"val_{k}": sum(count * row[k] for count, row in rows) / n for k in rows[0][1]}


def main():
    cfg = common.parse(Config, PRESETS, __doc__)
    torch.manual_seed(cfg.seed)
    samples = Samples(videos.open_data(cfg, "train"), cfg, draw_mask)
    common.train(cfg, VideoMAE(cfg), samples, evaluate=evaluate)


if __name__ == "__main__":
    main()
