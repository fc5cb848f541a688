"""
Speed and memory of pretraining.

    python results/bench.py step                  every method, ViT-B and ViT-tiny (32 pixels, patches of 4), fp32 and bf16
    python results/bench.py step --mae PATH --deepmim PATH --sdae PATH --bootmae PATH       beside official checkouts; timm
    python results/bench.py step --methods SdAE SdAE-masked SdAE-full SdAE-crop             ways to feed SdAE's teacher
    python results/bench.py step --methods DDAE --sizes B --profile                         the ten most expensive operations
    python results/bench.py memory                what the papers' recipes need per GPU, counted without a GPU
    python results/bench.py scaling               cost per image against batch size, image size, K, and processes

Models run alternately in one process, so that drift of the machine cancels out; times are medians. On a CPU, one core
computes, and its time is counted, not the clock's: other jobs disturb little. A step is forward, backward, gradient
norm, optimizer, and what follows each step; no data loading. `limit` is a product of 4096 x 4096 matrices in that run.
"""
import argparse
import contextlib
import copy
import json
import sys
import time
import types
import warnings
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import ddae  # noqa: E402
import deepmim  # noqa: E402
import sdae  # noqa: E402

SIZES = dict(B={}, S=ddae.PRESETS["small"], L=ddae.PRESETS["large"], tiny=dict(
    img_size=32, patch_size=4, embed_dim=192, num_heads=3, decoder_dim=192, decoder_heads=3))


class Features(nn.Module):
    """Takes the place of CLIP: random features of the patches, so that only the rest of the step is measured."""
    out_dim = 512

    def forward(self, imgs, grid):
        return torch.ones(len(imgs), grid[0] * grid[1], self.out_dim, device=imgs.device).normal_()


deepmim.targets.clip = lambda file: Features()
METHODS = {
    "MAE": lambda **size: ddae.DDAE(ddae.Config(**ddae.PRESETS["mae"], **size)),
    "DDAE": lambda **size: ddae.DDAE(ddae.Config(**size)),
    "DeepMIM": lambda **size: deepmim.DeepMIM(deepmim.Config(target="clip", target_file="random", **size)),
    "DeepMIM-pixel": lambda **size: deepmim.DeepMIM(deepmim.Config(**size)),
    "SdAE": lambda **size: sdae.SdAE(sdae.Config(**size)),
    **{f"SdAE-{feed}": partial(lambda feed, **size: sdae.SdAE(sdae.Config(feed=feed, **size)), feed)
       for feed in ("masked", "full", "crop")},
}


def batch(model, B, device):
    """-> images (B, 3, H, W), what the method draws of them."""
    cfg, draw = model.cfg, sys.modules[type(model).__module__].draw_mask
    draws = np.stack([draw(np.random.default_rng(i), cfg) for i in range(B)])
    return torch.randn(B, 3, cfg.img_size, cfg.img_size, device=device), torch.from_numpy(draws).to(device)


def ours(name, size, B, precision, args):
    """-> training step as in common.train."""
    model = METHODS[name](**SIZES[size]).to(args.device)
    cfg = common.RunConfig(device=args.device, precision=precision, compile=args.compile, recompute=args.recompute)
    optimizer = common.adamw(model, model.cfg)
    common.wrap_blocks(model, cfg)
    imgs, draws = batch(model, B, args.device)

    def step():
        autocast = common.setup(cfg)[1]  # every time: the official codes run with torch's defaults
        with autocast:
            loss = model(imgs, draws)[0]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item()
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model, "after_step"):
            model.after_step(1, 10000)
    return step


# --- official codes ---------------------------------------------------------------------------------------------------

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


def official(name, path, size, B, precision, args):
    """-> the training step of an official code: its model, loss, and optimizer; its EMA where that is part of a step."""
    from timm.optim import param_groups_weight_decay
    cfg = METHODS.get(name, METHODS["DDAE"])(**SIZES[size]).cfg
    N, D, p = (cfg.img_size // cfg.patch_size) ** 2, cfg.embed_dim, cfg.patch_size
    vit = dict(img_size=cfg.img_size, patch_size=p, embed_dim=D, depth=cfg.depth, num_heads=cfg.num_heads,
               norm_layer=partial(nn.LayerNorm, eps=1e-6))
    decoder = dict(decoder_embed_dim=cfg.decoder_dim, decoder_depth=cfg.decoder_depth,
                   decoder_num_heads=cfg.decoder_heads)
    imgs, after = torch.randn(B, 3, cfg.img_size, cfg.img_size, device=args.device), lambda: None
    if name == "MAE":
        model = load(path, "models_mae").MaskedAutoencoderViT(**vit, **decoder, norm_pix_loss=True)
        loss_of = lambda: model(imgs, mask_ratio=0.75)[0]  # noqa: E731
    elif name == "DeepMIM":
        model = load(path, "models_mae").MaskedAutoencoderViT(**vit, **decoder)
        features = Features()
        loss_of = lambda: sum(model(imgs, features(imgs, (1, 1 + N)), mask_ratio=0.75))  # noqa: E731
    elif name == "SdAE":  # its EMA is part of an epoch, not of a step
        model = load(path, "models_mae").MaskedAutoencoderViT(**vit, **decoder, drop_path=0.25)
        teacher = load(path, "models_teacher").VisionTransformer(num_classes=1, qkv_bias=True, **vit).to(args.device)
        M = N - int(N * 0.25)

        def loss_of():
            pred, _, ids = model(imgs, mask_ratio=0.75)
            with torch.no_grad():
                target = teacher(imgs, ids_unkeep=ids, shrink_num=M, ncrop_loss=3)
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
            pred = pred.gather(1, ids.unsqueeze(-1).repeat(1, 1, D)).reshape(target.shape)
            return 1 - F.cosine_similarity(target, pred).mean()
    else:  # BootMAE, DDAE's base: pixels and features of one block, and timm's EMA after each step
        if args.device == "cpu":
            torch.Tensor.cuda = lambda x: x
        sys.modules["timm.models.registry"] = types.SimpleNamespace(register_model=lambda f: f)
        model = load(path, "models.modeling_pretrain_bootmae").VisionTransformerForMaskedImageModeling(
            **vit, decode_dim=cfg.decoder_dim, fea_list=[0, cfg.depth - 1])
        teacher, ids = copy.deepcopy(model).eval().to(args.device), torch.rand(B, N, device=args.device).argsort(1)
        weight = torch.rand(B, 1, cfg.img_size, cfg.img_size, device=args.device)

        def loss_of():
            pixels, features = model(imgs, N - N // 4, ids)
            with torch.no_grad():
                target = F.layer_norm(teacher.get_feature(imgs, 0, ids), (D,), eps=1e-6)
            return ((weight * (pixels - imgs).square()).mean()
                    + (weight.flatten(1)[:, :N, None] * (F.layer_norm(features, (D,), eps=1e-6) - target).square()).mean())

        @torch.no_grad()
        def after():
            new = model.state_dict()
            for key, old in teacher.state_dict().items():
                old.copy_(old * 0.999 + 0.001 * new[key].detach())
    model.to(args.device)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=0, betas=(0.9, 0.95))

    def step():
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
        with torch.autocast(args.device, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.item()
        loss.backward()
        torch.norm(torch.stack([torch.norm(p.grad) for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
        after()
    return step


# --- measurements -----------------------------------------------------------------------------------------------------

def clock(args):
    if args.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def alternate(steps, args):
    """Callables by name, run in turn -> name: seconds of each repetition."""
    times = {name: [] for name in steps}
    for _ in range(args.runs):
        for name, step in steps.items():
            start = clock(args)
            step()
            times[name].append(clock(args) - start)
    return times


def flops_of(step):
    """Of one run; fused attention is not counted otherwise. It is also the warm-up."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        step()
    return counter.get_total_flops()


def step(args):
    rows = []
    print(f"{'size':5}{'type':6}{'':18}{'images/s':>9}{'GFLOP/image':>12}{'of limit':>9}{'official/ours':>15}")
    for size in args.sizes:
        B = args.batch or (32 if size == "tiny" else 8)
        for precision in args.precision:
            x = torch.randn(4096, 4096, device=args.device, dtype=dict(fp32=torch.float32, bf16=torch.bfloat16)[precision])
            for name in args.methods:
                path = getattr(args, name.lower() if name != "DDAE" else "bootmae", None)
                steps = {name: ours(name, size, B, precision, args)}
                if path:
                    other = "BootMAE" if name == "DDAE" else name
                    with contextlib.redirect_stdout(None):
                        steps[f"official {other}"] = official(other, path, size, B, precision, args)
                flops = {key: flops_of(run) / B for key, run in steps.items()}
                if args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times = alternate(steps | dict(limit=lambda: x @ x), args)
                median = {key: float(np.median(t)) for key, t in times.items()}
                limit = 2 * 4096 ** 3 / median.pop("limit")
                for key, seconds in median.items():
                    ratio = np.array(times[key]) / times[name]  # pair by pair
                    row = dict(size=size, type=precision, name=key, batch=B, images_per_s=B / seconds,
                               gflop=flops[key] / 1e9, of_limit=flops[key] * B / seconds / limit, ratio=np.median(ratio))
                    if args.device == "cuda" and not path:
                        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                    rows.append(row)
                    print(f"{size:5}{precision:6}{key:18}{B / seconds:9.3g}{row['gflop']:12.4g}{row['of_limit']:9.0%}"
                          + (f"{row['ratio']:8.2f} ({min(ratio):.2f} to {max(ratio):.2f})" if key != name else "")
                          + (f"  {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""), flush=True)
                if args.profile:
                    with torch.profiler.profile() as profile:
                        steps[name]()
                    found = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total or -e.self_cpu_time_total)
                    total = sum(e.self_cpu_time_total for e in found)
                    for e in found[:10]:
                        print(f"    {e.key:50}{e.count:6} calls{e.self_cpu_time_total / total:7.1%}")
                del steps
    return rows


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, WeakIdKeyDictionary()

    def add(self, nbytes):
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage not in self.seen:
                self.seen[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out


def memory(args):
    """Two steps in bf16 with tensors that have shapes but no values. Workspaces and fragmentation come on top."""
    FakeTensorMode.__deepcopy__ = lambda self, memo: self  # for deep copies of encoders
    rows = []
    for size in args.sizes:
        for name in args.methods:
            B = args.batch or (96 if name.startswith("SdAE") else 512)
            with FakeTensorMode(), Live() as live:
                model = METHODS[name](**SIZES[size])
                common.wrap_blocks(model, args)
                optimizer, S = common.adamw(model, model.cfg), model.cfg.img_size
                imgs, ids = torch.empty(B, 3, S, S), torch.zeros(B, (S // model.cfg.patch_size) ** 2, dtype=torch.long)
                for _ in range(2):
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = model(imgs, ids)[0]
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            rows.append(dict(size=size, name=name, batch=B, peak_gib=live.peak / 2**30))
            print(f"{size:5}{name:15}{B:5} images per GPU, bf16: {live.peak / 2**30:5.1f} GiB", flush=True)
    return rows


def scaling(args):
    """Seconds per image of DDAE, ViT-tiny in fp32 unless said otherwise, alternately; FLOPs beside them."""
    tiny = SIZES["tiny"]
    cases = {f"batch {B}": (B, {}) for B in (1, 4, 16, 64)} | {f"{S} pixels": (16, dict(img_size=S)) for S in (16, 48, 64)}
    cases |= {f"K = {K}": (16, dict(K=K)) for K in (1, 2, 6)}
    steps = {}
    for name, (B, more) in cases.items():
        SIZES[name] = tiny | more
        steps[name] = ours("DDAE", name, B, args.precision[0], args)
    flops = {name: flops_of(run) / cases[name][0] for name, run in steps.items()}
    rows = []
    for name, t in alternate(steps, args).items():
        B, seconds = cases[name][0], float(np.median(t))
        rows.append(dict(name=name, ms_per_image=1e3 * seconds / B, gflop=flops[name] / 1e9))
        print(f"{name:12}{1e3 * seconds / B:8.1f} ms/image {flops[name] / 1e9:7.2f} GFLOP/image "
              f"{flops[name] * B / seconds / 1e9:7.0f} GFLOP/s")
    return rows


def ema(args):
    """Milliseconds of the teacher's EMA, ViT-B: here, and with SdAE's copy of the student."""
    new, old = (ddae.ViT(224, 16, 768, 12, 12).to(args.device).requires_grad_(False) for _ in range(2))

    def copied():
        student = copy.deepcopy(old)
        student.load_state_dict(new.state_dict())
        for a, b in zip(student.parameters(), old.parameters()):
            b.mul_(0.99).add_(0.01 * a)

    steps = dict(here=lambda: torch._foreach_lerp_(list(old.parameters()), list(new.parameters()), 0.01), SdAE=copied)
    rows = [dict(name=name, ms=1e3 * float(np.median(t))) for name, t in alternate(steps, args).items()]
    print("EMA of ViT-B, ms:", *(f"{row['name']} {row['ms']:.1f}" for row in rows))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = dict(step=step, memory=memory, scaling=scaling, ema=ema)
    parser.add_argument("command", choices=commands)
    for name in ("mae", "deepmim", "sdae", "bootmae"):
        parser.add_argument(f"--{name}", metavar="PATH", help="checkout of the official code")
    parser.add_argument("--methods", nargs="+", default=["MAE", "DDAE", "DeepMIM", "SdAE"], choices=METHODS)
    parser.add_argument("--sizes", nargs="+", default=["B", "tiny"], choices=SIZES)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, help="default: step 8, tiny 32; memory 512, SdAE 96")
    parser.add_argument("--runs", type=int, default=5)
    for flag in ("compile", "recompute", "profile"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.device == "cpu":
        torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'one CPU core'}, "
          f"medians of {args.runs}")
    rows = commands[args.command](args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
