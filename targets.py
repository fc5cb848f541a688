"""
What DeepMIM borrows from other papers: targets to predict (its Table 11) and masks (its Table 12). All of it is frozen.

    hog(imgs, patch_size)       (B, N, 108)   histograms of oriented gradients, as in MaskFeat
    dino(path)(imgs, grid)      (B, N, D)     patch tokens of DINO's ViT
    clip(path)(imgs, grid)      (B, N, 512)   patch tokens of CLIP's image encoder, in the space shared with text
    codebook(path)(imgs, grid)  (B, N, 1)     numbers of BEiT v2's visual tokens

imgs (B, 3, H, W) are normalized with ImageNet's mean and deviation; each network undoes that and applies its own. It
reads the whole image, resized so that its patches are those of the (h, w) grid. With 224 px images and 16 px patches
nothing is resized.

The published files (nothing is downloaded here):
    DINO      dino_vitbase16_pretrain.pth                          github.com/facebookresearch/dino
    CLIP      ViT-B-16.pt, the archive or its state dict           github.com/openai/CLIP
    VQ-KD     vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth github.com/microsoft/unilm/tree/master/beit2
"""
import math
import sys
import zipfile
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HOG_DIM = 3 * 9 * 2 * 2


# --- masks ------------------------------------------------------------------------------------------------------------

def semantic_guided(tokens, noise, ratio, whole, k=6):
    """SemMAE's masks: first a fraction of each part, later whole parts. [DeepMIM Table 12; SemMAE Sec. 3.3 and code]

    tokens (B, N, D) of a pretrained network, noise (B, 2, N) uniform, whole () in [0, 1]: weight of the later kind
    -> ids_shuffle (B, N), visible first. Parts are k-means clusters of tokens; SemMAE trains a part network.
    """
    part = kmeans(tokens, noise[:, 0].topk(k).indices)  # (B, N), numbered in random order
    ids_shuffle = noise[:, 1].argsort(1)
    size = F.one_hot(part, k).float().sum(1)  # (B, k)
    some = (size * ratio).round()
    entire = (part.shape[1] * ratio - size.cumsum(1) + size).clamp(min=0).minimum(size)  # one part after the other
    quota = ((1 - whole) * some + whole * entire).round()  # (B, k) patches to mask in each part
    shuffled = F.one_hot(part.gather(1, ids_shuffle), k).float()  # (B, N, k)
    rank = (shuffled.cumsum(1) * shuffled).sum(-1)  # of each patch in its part, from 1, in random order
    masked = rank <= (shuffled * quota.unsqueeze(1)).sum(-1)
    # The cut after num_keep patches fixes the count; where quotas miss it, the random order decides.
    return ids_shuffle.gather(1, masked.int().argsort(dim=1, stable=True))


def kmeans(tokens, first, iterations=10):
    """Spherical k-means of each image's tokens (B, N, D), starting at the tokens `first` (B, k) -> cluster (B, N)."""
    tokens = F.normalize(tokens.double(), dim=-1)  # autocast leaves double alone; in bf16 neighbors would tie
    centers = tokens.gather(1, first.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))  # (B, k, D)
    for _ in range(iterations):
        member = F.one_hot((tokens @ centers.transpose(1, 2)).argmax(-1), first.shape[1]).to(tokens)  # (B, N, k)
        total = member.transpose(1, 2) @ tokens  # (B, k, D)
        centers = torch.where(member.sum(1).unsqueeze(-1) > 0, F.normalize(total, dim=-1), centers)
    return (tokens @ centers.transpose(1, 2)).argmax(-1)


def semantic_aware(attention, noise):
    """MILAN's masks: the more [CLS] attends to a patch, the likelier it is visible. [DeepMIM Table 12; MILAN Sec. 3.3]

    attention (B, N), noise (B, 2, N) uniform -> ids_shuffle (B, N), drawn without replacement in proportion to
    attention: sorting exponential variables divided by their rates does that.
    """
    return (-noise[:, 0].log() / (attention + 1e-8)).argsort(1)


# --- HOG --------------------------------------------------------------------------------------------------------------

def hog(imgs, patch_size):
    """Histograms of oriented gradients -> (B, N, 108), ordered channel, bin, cell row, cell column.

    Per color channel: Sobel gradients, their magnitude added to one of 9 unsigned directions, summed over cells of half
    a patch; each cell's histogram has length 1. [MaskFeat Sec. 3.2; SlowFast's HOGLayerC without Gaussian window]
    """
    x = F.pad(imgs.float().flatten(0, 1), (1, 1, 1, 1), mode="reflect")  # (B*3, H+2, W+2)
    # Sobel by sums: a convolution may run in bf16 or TF32, and directions of weak gradients need fp32.
    rows, cols = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:], x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    gx, gy = rows[..., :-2] - rows[..., 2:], cols[:, :-2] - cols[:, 2:]  # (B*3, H, W)
    bins = (torch.atan2(gx, gy) / math.pi * 9).floor().long() % 9
    votes = torch.zeros(len(gx), 9, *gx.shape[1:], device=imgs.device)
    votes.scatter_(1, bins.unsqueeze(1), torch.hypot(gx, gy).unsqueeze(1))
    cells = F.normalize(F.avg_pool2d(votes, patch_size // 2), dim=1)  # (B*3, 9, 2h, 2w); sum or mean: same direction
    cells = cells.unflatten(0, (-1, 3)).unflatten(3, (-1, 2)).unflatten(5, (-1, 2))  # (B, 3, 9, h, 2, w, 2)
    return cells.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)  # (B, N, 108)


# --- pretrained networks ----------------------------------------------------------------------------------------------

def freeze(module):
    """Turn parameters into buffers that no checkpoint holds and no optimizer sees."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach(), persistent=False)


class FrozenViT(nn.Module):
    """A pretrained ViT from weights under timm's names, with 64 channels per attention head.

    head: from the patch tokens to the targets, loaded from "head."; out_dim: values (or classes) to predict per patch.
    """

    def __init__(self, weights, path, mean, std, eps=1e-6, act=nn.GELU, head=None, out_dim=None):
        super().__init__()
        (*_, D), (_, T, *_), (*_, p) = shapes(weights, path, "cls_token", "pos_embed", "patch_embed.proj.weight")
        depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
        self.cls_token, self.pos_embed = nn.Parameter(torch.empty(1, 1, D)), nn.Parameter(torch.empty(1, T, D))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, D, p, p)))
        self.norm_pre = nn.LayerNorm(D, eps) if "norm_pre.weight" in weights else nn.Identity()
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(D, eps), attn=nn.ModuleDict(dict(qkv=nn.Linear(D, 3 * D), proj=nn.Linear(D, D))),
            norm2=nn.LayerNorm(D, eps),
            mlp=nn.Sequential(OrderedDict(fc1=nn.Linear(D, 4 * D), act=act(), fc2=nn.Linear(4 * D, D)))
        )) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps)
        self.head, self.out_dim = head or nn.Identity(), out_dim or D
        common.load_weights(self, weights, path)
        extra = [k for k in weights.keys() - self.state_dict().keys() if k.startswith(("blocks.", "reg_", "dist_"))]
        if extra or D % 64 or D == 1280:  # 1280, ViT-H, has 80 channels per head
            sys.exit(f"{path} is not a plain ViT with 64 channels per head: width {D}, additional tensors {extra[:3]}")
        freeze(self)
        scale = torch.tensor(common.STD) / torch.tensor(std)
        shift = (torch.tensor(common.MEAN) - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def embed(self, imgs, grid):
        """Images -> tokens (B, 1 + N, D) of the (h, w) grid; image and position table are resized to it."""
        proj, pos = self.patch_embed.proj, self.pos_embed
        size = [n * proj.kernel_size[0] for n in grid]
        if list(imgs.shape[2:]) != size:
            imgs = F.interpolate(imgs, size, mode="bicubic", antialias=True)
        x = proj(imgs * self.scale + self.shift).flatten(2).transpose(1, 2)  # (B, N, D)
        side = math.isqrt(pos.shape[1] - 1)
        if (side, side) != tuple(grid):
            rows = pos[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            rows = F.interpolate(rows, grid, mode="bicubic").flatten(2).transpose(1, 2)
            pos = torch.cat((pos[:, :1], rows), 1)
        return torch.cat((self.cls_token.expand(len(imgs), -1, -1), x), 1) + pos

    @torch.no_grad()
    def tokens(self, imgs, grid):
        """-> tokens (B, 1 + N, D) after the final norm, and the last block's attention from [CLS] to patches (B, N)."""
        x = self.norm_pre(self.embed(imgs, grid))
        for block in self.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)
            x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        attention = (q[:, :, :1] @ k.transpose(2, 3) / 8).float().softmax(-1).mean(1)[:, 0, 1:]
        return self.norm(x), attention

    @torch.no_grad()
    def forward(self, imgs, grid):
        """Targets (B, N, ...) of all patches."""
        return self.head(self.tokens(imgs, grid)[0][:, 1:])


def dino(path):
    """DINO's released backbone, or a plain ViT of timm's."""
    return FrozenViT(read(path)[0], path, common.MEAN, common.STD)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def clip(path):
    """OpenAI's CLIP: every token through ln_post and the projection, as in DeepMIM's clip.py."""
    names = (("conv1", "patch_embed.proj"), ("positional_embedding", "pos_embed"), ("class_embedding", "cls_token"),
             ("transformer.resblocks.", "blocks."), ("ln_pre", "norm_pre"), ("ln_post", "norm"), ("ln_", "norm"),
             ("attn.in_proj_", "attn.qkv."), ("attn.out_proj", "attn.proj"), ("c_fc", "fc1"), ("c_proj", "fc2"))
    found, weights = read(path)[0], {}
    (D, out_dim), _ = shapes(found, path, "visual.proj", "visual.ln_pre.weight")
    for name, value in found.items():
        if name.startswith("visual."):
            name = name.removeprefix("visual.")
            for theirs, timms in names:
                name = name.replace(theirs, timms)
            weights[name] = value.view(1, -1, value.shape[-1]) if name in ("cls_token", "pos_embed") else value
    weights |= {"patch_embed.proj.bias": torch.zeros(D), "head.weight": weights["proj"].T}
    return FrozenViT(weights, path, CLIP_MEAN, CLIP_STD, 1e-5, QuickGELU, nn.Linear(D, out_dim, bias=False), out_dim)


class Quantizer(nn.Module):
    """VQ-KD's: tokens (B, N, D) -> number of the code with the closest direction (B, N, 1)."""

    def __init__(self, dim, num_codes, code_dim):
        super().__init__()
        self.encode_task_layer = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, code_dim))
        self.codes = nn.Parameter(torch.empty(num_codes, code_dim))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(self.encode_task_layer(x.float()), dim=-1)
            closeness = 2 * x @ self.codes.T - self.codes.square().sum(-1)  # |x|^2 - |x - c|^2
            return closeness.argmax(-1, keepdim=True)


def codebook(path):
    """BEiT v2's VQ-KD tokenizer. Pixels go in as [-1, 1]; its code guesses their range from the batch's largest."""
    found, weights = read(path)[0], {}
    (num_codes, code_dim), (*_, D) = shapes(found, path, "quantize.embedding.weight", "encoder.cls_token")
    for name, value in found.items():
        name = name.removeprefix("encoder.").replace("fc_norm", "norm")
        weights["head." + name if name.startswith("encode_task_layer.") else name] = value
    weights["head.codes"] = found["quantize.embedding.weight"]
    for name in [k for k in weights if k.endswith("attn.q_bias") and k.replace("q_bias", "v_bias") in weights]:
        q, v = weights.pop(name), weights.pop(name.replace("q_bias", "v_bias"))  # keys have no bias in BEiT
        weights[name.replace("q_bias", "qkv.bias")] = torch.cat((q, torch.zeros_like(q), v))
    head = Quantizer(D, num_codes, code_dim)
    return FrozenViT(weights, path, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), head=head, out_dim=num_codes)


# --- files ------------------------------------------------------------------------------------------------------------

def read(path):
    """Read a checkpoint, or a TorchScript archive -> tensors by name, what a last.pt says of its run."""
    try:
        with zipfile.ZipFile(path) as archive:
            script = any("/code/" in name for name in archive.namelist())
        file = torch.jit.load(path, map_location="cpu").state_dict() if script else common.load(path)
    except (OSError, RuntimeError, zipfile.BadZipFile):
        file = common.load(path)  # ends the program
    weights = file.get("model", file.get("state_dict", file)) if isinstance(file, dict) else None
    if not isinstance(weights, dict):
        sys.exit(f"{path} holds no state dict")
    return {name: value for name, value in weights.items() if torch.is_tensor(value)}, file.get("about", {})


def shapes(weights, path, *names):
    """Shapes of these tensors. Ends the program if one is missing."""
    missing = [name for name in names if name not in weights]
    if missing:
        sys.exit(f"{path} has no {' and no '.join(missing)}")
    return [weights[name].shape for name in names]
