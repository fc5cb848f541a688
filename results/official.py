"""
Training steps of official codes, for bench.py: their model, loss, optimizer, and what follows each step.

Checkouts of facebookresearch/mae, OliverRensu/DeepMIM, AbrahamYabo/SdAE, and LightDXY/BootMAE on GitHub; needs timm.
"""
import copy
import sys
import types
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def load(path, name):
    """A module of an official checkout. Names that current timm and NumPy no longer have are put back meanwhile."""
    import timm.models.vision_transformer as vit
    for other in [m for m in sys.modules if m.split(".")[0] in ("models_mae", "models_teacher", "models", "util")]:
        del sys.modules[other]
    block, np.float, sys.path[:0] = vit.Block, float, [path]
    vit.Block = lambda *args, qk_scale=None, **more: block(*args, **more)
    try:
        return __import__(name, fromlist=["x"])
    finally:
        vit.Block = block
        del sys.path[0]


def official(name, path, cfg, imgs, features, precision):
    """The official code at `path` for the method `name`, at the size of `cfg` -> a function that makes one step."""
    from timm.optim import param_groups_weight_decay
    device, B, after = imgs.device.type, len(imgs), lambda: None
    N, D, p = (cfg.img_size // cfg.patch_size) ** 2, cfg.embed_dim, cfg.patch_size
    vit = dict(img_size=cfg.img_size, patch_size=p, embed_dim=D, depth=cfg.depth, num_heads=cfg.num_heads,
               norm_layer=partial(nn.LayerNorm, eps=1e-6))
    decoder = dict(decoder_embed_dim=cfg.decoder_dim, decoder_depth=cfg.decoder_depth,
                   decoder_num_heads=cfg.decoder_heads)
    if name == "MAE":
        model = load(path, "models_mae").MaskedAutoencoderViT(**vit, **decoder, norm_pix_loss=True)
        loss_of = lambda: model(imgs, mask_ratio=0.75)[0]  # noqa: E731
    elif name == "DeepMIM":
        model = load(path, "models_mae").MaskedAutoencoderViT(**vit, **decoder)
        loss_of = lambda: sum(model(imgs, features(imgs, (1, 1 + N)), mask_ratio=0.75))  # noqa: E731
    elif name == "SdAE":  # its EMA is part of an epoch, not of a step
        model = load(path, "models_mae").MaskedAutoencoderViT(**vit, **decoder, drop_path=0.25)
        teacher = load(path, "models_teacher").VisionTransformer(num_classes=1, qkv_bias=True, **vit).to(device)
        M = N - int(N * 0.25)

        def loss_of():
            pred, _, ids = model(imgs, mask_ratio=0.75)
            with torch.no_grad():
                target = teacher(imgs, ids_unkeep=ids, shrink_num=M, ncrop_loss=3)
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
            pred = pred.gather(1, ids.unsqueeze(-1).repeat(1, 1, D)).reshape(target.shape)
            return 1 - F.cosine_similarity(target, pred).mean()
    else:  # BootMAE, DDAE's base: pixels and features of one block, and timm's EMA after each step
        if device == "cpu":
            torch.Tensor.cuda = lambda x: x
        sys.modules["timm.models.registry"] = types.SimpleNamespace(register_model=lambda f: f)
        model = load(path, "models.modeling_pretrain_bootmae").VisionTransformerForMaskedImageModeling(
            **vit, decode_dim=cfg.decoder_dim, fea_list=[0, cfg.depth - 1])
        teacher, ids = copy.deepcopy(model).eval().to(device), torch.rand(B, N, device=device).argsort(1)
        weight = torch.rand(B, 1, cfg.img_size, cfg.img_size, device=device)

        def loss_of():
            pixels, features = model(imgs, N - N // 4, ids)
            with torch.no_grad():
                target = F.layer_norm(teacher.get_feature(imgs, 0, ids), (D,), eps=1e-6)
            error = (F.layer_norm(features, (D,), eps=1e-6) - target).square()
            return (weight * (pixels - imgs).square()).mean() + (weight.flatten(1)[:, :N, None] * error).mean()

        @torch.no_grad()
        def after():
            new = model.state_dict()
            for key, old in teacher.state_dict().items():
                old.copy_(old * 0.999 + 0.001 * new[key].detach())
    model.to(device)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=0, betas=(0.9, 0.95))

    def step():
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.item()
        loss.backward()
        torch.norm(torch.stack([torch.norm(p.grad) for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
        after()
    return step
