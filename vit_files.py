"""
Files with a ViT, of this repository or others: what is in them, which ViT it is, and its position table at other sizes.
"""
import math
import re
import sys

import torch
import torch.nn.functional as F

import beit2
import common


def read_weights(path):
    """A file written here, by MAE, DINO, or timm, or safetensors -> tensors by name, flags of its run or {}."""
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import load_file  # optional
            file = load_file(path)
        except Exception as error:  # damaged files raise nearly anything
            sys.exit(f"{path}: {error}")
    else:
        file = common.load(path)
    file = file if isinstance(file, dict) else {}
    named = [file[k] for k in ("model", "state_dict", "teacher", "student") if isinstance(file.get(k), dict)] + [file]
    config = file.get("config", file.get("about"))  # last.pt has the latter
    return {k: v for k, v in named[0].items() if torch.is_tensor(v)}, config if isinstance(config, dict) else {}


def vit_weights(weights, path):
    """The ViT among tensors by name: the first one's prefix, such as DINO's "backbone.", is removed."""
    first = next((k for k in weights if k.endswith("patch_embed.proj.weight")), None)
    if not first:
        sys.exit(f"{path} holds no ViT under timm's names: no patch_embed.proj.weight among {[*weights][:5]} ...")
    prefix = first.removesuffix("patch_embed.proj.weight")
    return beit2.own_tables({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})


def load_encoder(encoder, path):
    """--init of pretraining: load all of the encoder from a file with a ViT; the position table is resized."""
    weights = vit_weights(read_weights(path)[0], path)
    if "pos_embed" in weights:
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], encoder.grid)
    common.load_weights(encoder, weights, path)


def vit_sizes(weights, config, path):
    """img_size, patch_size, embed_dim, depth, and num_heads of a ViT's weights. Ends the program for other weights."""
    for name, ndim in dict(cls_token=3, pos_embed=3, **{"patch_embed.proj.weight": 4}).items():
        if name not in weights or weights[name].ndim != ndim:
            sys.exit(f"{path} holds no ViT: {name} is missing or has another shape; found: {[*weights][:5]} ...")
    known = r"patch_embed\.proj\.|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\."
    more = [k for k in weights if re.match(r"patch_embed|blocks|norm_pre|reg_token", k) and not re.match(known, k)]
    if more:
        sys.exit(f"{path} is another kind of ViT: {len(more)} tensors are unknown here, such as {more[0]}")
    D, _, p, _ = weights["patch_embed.proj.weight"].shape
    side = math.isqrt(max(0, weights["pos_embed"].shape[1] - 1))
    # Weights do not tell the number of heads: mostly 64 channels each, but 80 in the ViT-H of MAE and timm.
    heads = config.get("num_heads", 16 if D == 1280 else max(1, D // 64))
    if "num_heads" not in config:
        common.print0(f"{path} does not say how many heads it has; taken: {heads}. Otherwise, give --num_heads")
    if D % 4 or D % heads:
        sys.exit(f"{path}: width {D} is not divisible by 4 and by {heads} heads")
    depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    return dict(img_size=side * p, patch_size=p, embed_dim=D, depth=depth, num_heads=heads)


def resize_pos_embed(table, grid):
    """Position table (1, 1 + n*n, D) -> (1, 1 + h*w, D) for a (h, w) grid: bicubic, [CLS]'s row kept."""
    side = math.isqrt(max(0, table.shape[1] - 1))
    if side ** 2 + 1 != table.shape[1]:
        sys.exit(f"pos_embed has {table.shape[1]} rows, which are not one of [CLS] and a square of patches; ViTs "
                 "without [CLS], or with register or distillation tokens, are another kind")
    if (side, side) == tuple(grid):
        return table
    rows = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, n, n)
    rows = F.interpolate(rows, grid, mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], rows.flatten(2).transpose(1, 2).to(table)), 1)
