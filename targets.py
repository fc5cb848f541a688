"""
What DeepMIM borrows from other papers, all of it frozen: targets to predict, and teachers whose opinion makes a mask.

    hog(imgs, patch_size)       (B, N, 108)   histograms of oriented gradients, as MaskFeat takes them
    dino(path)(imgs, grid)      (B, N, D)     patch tokens of DINO's ViT
    clip(path)(imgs, grid)      (B, N, 512)   patch tokens of CLIP's image tower, in the space shared with text
    codebook(path)(imgs, grid)  (B, N)        numbers of BEiT v2's visual tokens

imgs (B, 3, H, W) carry ImageNet's mean and deviation; each teacher undoes that and applies its own. A teacher sees the
whole image, resized so that its patches are the student's: with 224 px and 16 px patches nothing is resized.

Files, as their authors publish them (nothing is downloaded here):
    DINO      dino_vitbase16_pretrain.pth                          github.com/facebookresearch/dino
    CLIP      ViT-B-16.pt, the archive or its state dict           github.com/openai/CLIP
    VQ-KD     vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth github.com/microsoft/unilm/tree/master/beit2
"""
import math
import zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HOG_DIM = 3 * 9 * 2 * 2


def hog(imgs, patch_size):
    """Histograms of oriented gradients -> (B, N, 108), ordered channel, bin, cell row, cell column.

    Per colour channel: Sobel gradients, their strength added to one of 9 unsigned directions, summed over cells of half
    a patch, each cell's histogram of length 1. [MaskFeat Sec. 3.2; SlowFast's HOGLayerC without Gaussian window]
    """
    x = F.pad(imgs.float().flatten(0, 1), (1, 1, 1, 1), mode="reflect")  # (B*3, H+2, W+2)
    # Sobel by sums, since a convolution may run in bf16 or TF32, and directions of weak gradients need fp32.
    rows, cols = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:], x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    gx, gy = rows[..., :-2] - rows[..., 2:], cols[:, :-2] - cols[:, 2:]  # (B*3, H, W)
    bins = (torch.atan2(gx, gy) / math.pi * 9).floor().long() % 9
    votes = torch.zeros(len(gx), 9, *gx.shape[1:], device=imgs.device)
    votes.scatter_(1, bins.unsqueeze(1), torch.hypot(gx, gy).unsqueeze(1))
    cells = F.normalize(F.avg_pool2d(votes, patch_size // 2), dim=1)  # (B*3, 9, 2h, 2w); sum or mean: same direction
    cells = cells.unflatten(0, (-1, 3)).unflatten(3, (-1, 2)).unflatten(5, (-1, 2))  # (B, 3, 9, h, 2, w, 2)
    return cells.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)  # (B, N, 108)


class Teacher(nn.Module):
    """A frozen ViT from weights under timm's names. They are buffers that no checkpoint holds and no optimiser sees.

    eps and gelu are the model's LayerNorm constant and activation; heads have 64 channels each, as in every ViT here.
    """

    def __init__(self, weights, mean, std, eps=1e-6, gelu=F.gelu, head=None, out_dim=None):
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name.replace(".", "/"), value.float(), persistent=False)
        self.eps, self.gelu, self.head = eps, gelu, head
        self.out_dim = out_dim or weights["cls_token"].shape[-1]
        self.depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        scale = torch.tensor(common.STD) / torch.tensor(std)
        shift = (torch.tensor(common.MEAN) - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def weight(self, name):
        return self._buffers.get(name.replace(".", "/"))

    def linear(self, x, name):
        return F.linear(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), self.eps)

    def embed(self, imgs, grid):
        """Images -> tokens (B, 1 + N, D) of the (h, w) grid; position table resized to it."""
        patch, pos = self.weight("patch_embed.proj.weight"), self.weight("pos_embed")
        size = [n * patch.shape[-1] for n in grid]
        if list(imgs.shape[2:]) != size:
            imgs = F.interpolate(imgs, size, mode="bicubic", antialias=True)
        x = F.conv2d(imgs * self.scale + self.shift, patch, self.weight("patch_embed.proj.bias"), patch.shape[-1])
        side = math.isqrt(pos.shape[1] - 1)
        if (side, side) != tuple(grid):
            rows = pos[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            rows = F.interpolate(rows, grid, mode="bicubic").flatten(2).transpose(1, 2)
            pos = torch.cat((pos[:, :1], rows), 1)
        cls = self.weight("cls_token").expand(len(imgs), -1, -1)
        return torch.cat((cls, x.flatten(2).transpose(1, 2)), 1) + pos

    @torch.no_grad()
    def tokens(self, imgs, grid):
        """-> tokens (B, 1 + N, D) after the final norm, and the last block's attention from [CLS] to patches (B, N)."""
        x = self.embed(imgs, grid)
        if self.weight("norm_pre.weight") is not None:
            x = self.norm(x, "norm_pre")
        for i in range(self.depth):
            y = self.linear(self.norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
            q, k, v = y.unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # each (B, heads, 1 + N, 64)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.linear(y, f"blocks.{i}.attn.proj")
            y = self.gelu(self.linear(self.norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
            x = x + self.linear(y, f"blocks.{i}.mlp.fc2")
        attention = (q[:, :, :1] @ k.transpose(2, 3) / 8).float().softmax(-1).mean(1)[:, 0, 1:]
        return self.norm(x, "norm"), attention

    @torch.no_grad()
    def forward(self, imgs, grid):
        """Targets (B, N, ...) of the patches."""
        x = self.tokens(imgs, grid)[0][:, 1:]
        return x if self.head is None else self.head(self, x)


def dino(path):
    """Teacher from DINO's released backbone, or a plain ViT of timm with 64 channels per head."""
    return Teacher(checked(read(path), path), common.MEAN, common.STD)


def clip(path):
    """Teacher from OpenAI's CLIP: every token through ln_post and the projection, as DeepMIM's clip.py does."""
    names = (("conv1", "patch_embed.proj"), ("positional_embedding", "pos_embed"), ("class_embedding", "cls_token"),
             ("transformer.resblocks.", "blocks."), ("ln_pre", "norm_pre"), ("ln_post", "norm"), ("ln_", "norm"),
             ("attn.in_proj_", "attn.qkv."), ("attn.out_proj", "attn.proj"), ("c_fc", "fc1"), ("c_proj", "fc2"))
    weights = {}
    for name, value in read(path).items():
        if name.startswith("visual."):
            name = name.removeprefix("visual.")
            for theirs, timms in names:
                name = name.replace(theirs, timms)
            weights[name] = value.view(1, -1, value.shape[-1]) if name in ("cls_token", "pos_embed") else value
    weights = checked(weights, path, without=("patch_embed.proj.bias",), extra=("norm_pre.weight", "norm_pre.bias", "proj"))
    return Teacher(weights, CLIP_MEAN, CLIP_STD, 1e-5, lambda x: x * torch.sigmoid(1.702 * x),
                   lambda self, x: x @ self.weight("proj"), weights["proj"].shape[1])


def codebook(path):
    """Teacher from BEiT v2's VQ-KD tokenizer: the number of the code nearest in direction to each patch.

    It takes pixels in [-1, 1]; its own code guesses their range from the batch's largest value, which is not done here.
    """
    found = read(path)
    weights = {k.removeprefix("encoder.").replace("fc_norm", "norm"): v for k, v in found.items()
               if k.startswith("encoder.")}
    for name in [k for k in weights if k.endswith("attn.q_bias") and k.replace("q_bias", "v_bias") in weights]:
        # BEiT's attention has no bias on keys.
        q, v = weights.pop(name), weights.pop(name.replace("q_bias", "v_bias"))
        weights[name.replace("q_bias", "qkv.bias")] = torch.cat((q, torch.zeros_like(q), v))
    extra = [f"encode_task_layer.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")] + ["quantize.embedding.weight"]
    weights |= {k: found[k] for k in extra if k in found}

    def head(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = self.linear(self.linear(x.float(), "encode_task_layer.0").tanh(), "encode_task_layer.2")
            return nearest(x, self.weight("quantize.embedding.weight"))

    weights = checked(weights, path, extra=extra)
    return Teacher(weights, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), head=head, out_dim=len(weights[extra[-1]]))


def nearest(x, codes):
    """Number of the code (n, C) nearest to each normalised vector of x (B, N, C) -> (B, N)."""
    x = F.normalize(x, dim=-1)
    return (2 * x @ codes.T - codes.square().sum(-1)).argmax(-1)  # |x - c|^2 without |x|^2


def read(path):
    """State dict from a checkpoint, bare or under "model" or "state_dict", or from a TorchScript archive.

    Raises ValueError naming the file; a checkpoint that holds more than tensors is refused, TorchScript runs no Python.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            script = any("/code/" in name for name in archive.namelist())
        found = torch.jit.load(path, map_location="cpu").state_dict() if script else None
    except (OSError, RuntimeError, zipfile.BadZipFile):
        found = None
    if found is None:
        found = common.load(path)
    if isinstance(found, dict):
        found = found.get("model", found.get("state_dict", found))
    common.check(isinstance(found, dict), f"{path} holds no state dict")
    return {name: value for name, value in found.items() if torch.is_tensor(value)}


def checked(weights, path, without=(), extra=()):
    """The weights a Teacher needs, out of those in a file. Raises ValueError with the first five that do not fit."""
    depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    D = weights["cls_token"].shape[-1] if "cls_token" in weights else 768
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, None, D), "patch_embed.proj.weight": (D, 3, None, None),
              "patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,)}
    for i in range(max(1, depth)):
        for name, shape in (("norm1", (D,)), ("attn.qkv", (3 * D, D)), ("attn.proj", (D, D)), ("norm2", (D,)),
                            ("mlp.fc1", (4 * D, D)), ("mlp.fc2", (D, 4 * D))):
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    shapes |= {name: None for name in extra}
    for name in without:
        del shapes[name]
    wrong = []
    for name, shape in shapes.items():
        found = tuple(weights[name].shape) if name in weights else None
        if found is None:
            wrong.append(f"{name} is missing")
        elif shape and (len(found) != len(shape) or any(b not in (None, a) for a, b in zip(found, shape))):
            wrong.append(f"{name} is {found}, not {tuple(n or '*' for n in shape)}")
    wrong += [f"{name} is unknown" for name in weights if name not in shapes  # it would compute something else
              and name.startswith(("blocks.", "norm_pre", "reg_token", "dist_token"))]
    common.check(not wrong, f"{path} is no such teacher ({len(wrong)} of {len(shapes)} tensors do not fit): "
                 + "; ".join(wrong[:5]))
    common.check(D % 64 == 0 and D != 1280, f"{path} has width {D}, whose heads are not known to have 64 channels")
    return {name: weights[name] for name in shapes}
