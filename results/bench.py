"""
Speed and memory of pretraining.

    python results/bench.py step                  every method, ViT-B and tiny (32 pixels, patches of 4), fp32 and bf16
    python results/bench.py step --mae PATH --deepmim PATH --sdae PATH --bootmae PATH      beside official checkouts
    python results/bench.py step --methods MAE SdAE SdAE-masked SdAE-full SdAE-crop        ways to feed SdAE's teacher
    python results/bench.py step --methods BEiT2-none BEiT2-dds --sizes B                  DDS over plain BEiT v2
    python results/bench.py step --methods DDAE --sizes B --profile                        with the costliest operations
    python results/bench.py step --methods DDAE --sizes B --compile       beside eager; one method and size at a time
    python results/bench.py step --device cuda --batch 256 [--recompute]                   with peak memory
    python results/bench.py memory                what the papers' recipes need per GPU, counted without a GPU
    python results/bench.py scaling               cost per image against batch size, image size, K, and processes
    python results/bench.py loader --data FOLDER [--img_size 32 --patch_size 4]            beside MAE's own pipeline
    python results/bench.py mask                  time of a block-wise and a random mask

Models run alternately in one process, so that drift of the machine cancels out; times are medians. On a CPU, one core
computes, and its time is counted, not the clock's: other jobs disturb little. A step is forward, backward, gradient
norm, optimizer, and what follows each step; no data loading. `limit` is a product of 4096 x 4096 matrices in that run.
"""
import argparse
import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).parent.parent))
import beit2  # noqa: E402
import common  # noqa: E402
import ddae  # noqa: E402
import deepmim  # noqa: E402
import sdae  # noqa: E402
from results.bench_loader import loader, mask  # noqa: E402
from results.official import official  # noqa: E402

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
    **{f"BEiT2-{dds}": partial(lambda dds, **size: beit2.BEiT2(
        beit2.Config(dds=dds, tokenizer="pixels", codes=8192, **size)), dds) for dds in ("none", "d", "ds", "dds")},
}
beit2.fit_codes = lambda cfg: torch.randn(cfg.codes, 3 * cfg.patch_size ** 2)  # any codes will do


def batch(model, B, device):
    """-> images (B, 3, H, W), what the method draws of them."""
    cfg, draw = model.cfg, sys.modules[type(model).__module__].draw_mask
    draws = np.stack([draw(np.random.default_rng(i), cfg) for i in range(B)])
    return torch.randn(B, 3, cfg.img_size, cfg.img_size, device=device), torch.from_numpy(draws).to(device)


def ours(name, size, B, precision, args, compile=False):
    """-> training step as in common.train."""
    model = METHODS[name](**SIZES[size]).to(args.device)
    cfg = common.RunConfig(device=args.device, precision=precision, compile=compile, recompute=args.recompute)
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
    """FLOPs of a call, which is also the warm-up, with attention, which is not counted if it is fused."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), mock.patch("torch.backends.cuda.enable_flash_sdp"), \
            torch.compiler.set_stance("force_eager"):  # the steps set what the context has set
        step()
    return counter.get_total_flops()


def step(args):
    rows = []
    print(f"{'size':5}{'type':6}{'':22}{'images/s':>9}{'GFLOP/image':>12}{'of limit':>9}  time / time of (range)")
    for size in args.sizes:
        B = args.batch or (32 if size == "tiny" else 8)
        for precision in args.precision:
            x = torch.randn(4096, 4096, device=args.device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
            steps, against = {}, {}
            for name in args.methods:
                steps[name], against[name] = ours(name, size, B, precision, args), args.methods[0]
                if args.compile:
                    compiled = f"{name} compiled"
                    steps[compiled], against[compiled] = ours(name, size, B, precision, args, True), name
                path = getattr(args, "bootmae" if name == "DDAE" else name.lower(), None)
                if path:
                    model, other = METHODS[name](**SIZES[size]), "official " + ("BootMAE" if name == "DDAE" else name)
                    imgs = batch(model, B, args.device)[0]
                    with contextlib.redirect_stdout(None):  # SdAE and BootMAE print what they build
                        steps[other] = official(name, path, model.cfg, imgs, Features(), precision)
                    against[other] = name
            flops = {name: flops_of(run) / B for name, run in steps.items()}
            if args.compile:
                for run in steps.values():  # compiles
                    run()
            times = alternate(steps | dict(limit=lambda: x @ x), args)
            limit = 2 * 4096 ** 3 / np.median(times["limit"])
            for name in steps:
                speed = B / float(np.median(times[name]))
                ratio = np.array(times[name]) / times[against[name]]  # pair by pair
                row = dict(size=size, type=precision, name=name, batch=B, images_per_s=speed, gflop=flops[name] / 1e9,
                           of_limit=flops[name] * speed / limit, against=against[name], ratio=float(np.median(ratio)))
                if args.device == "cuda":
                    row["peak_gib"] = peak_of(steps[name])
                rows.append(row)
                print(f"{size:5}{precision:6}{name:22}{speed:9.3g}{row['gflop']:12.4g}{row['of_limit']:9.0%}"
                      + (f"  {row['peak_gib']:.1f} GiB" if "peak_gib" in row else "")
                      + f"  {row['ratio']:.2f} {against[name]} ({min(ratio):.2f} to {max(ratio):.2f})", flush=True)
            if args.profile:
                print_profile(steps[args.methods[0]])
    return rows


def peak_of(run):
    """Peak memory of a step in GiB; other models' weights and optimizer states count, if they are held."""
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def print_profile(run):
    """The ten operations that take the most time of a step, by themselves."""
    with torch.profiler.profile() as profile:
        run()
    cost = {e.key: (e.self_device_time_total if torch.cuda.is_available() else e.self_cpu_time_total, e.count)
            for e in profile.key_averages()}
    for name, (seconds, count) in sorted(cost.items(), key=lambda item: -item[1][0])[:10]:
        print(f"    {name:60}{count:6} calls{seconds / sum(t for t, _ in cost.values()):7.1%}")


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
    """Time and FLOPs per image of DDAE, ViT-tiny, 32 pixels, K = 4, batch 16, with one thing changed."""
    tiny = SIZES["tiny"]
    cases = {f"batch {B}": (B, {}) for B in (1, 4, 16, 64)} | {f"K = {K}": (16, dict(K=K)) for K in (1, 2, 6)}
    cases |= {f"{S} pixels": (16, dict(img_size=S)) for S in (16, 48, 64)}
    steps = {}
    for name, (B, more) in cases.items():
        SIZES[name] = tiny | more
        steps[name] = ours("DDAE", name, B, args.precision[0], args, args.compile)
    flops = {name: flops_of(run) / cases[name][0] for name, run in steps.items()}
    rows = []
    for name, t in alternate(steps, args).items():
        B, seconds = cases[name][0], float(np.median(t))
        rows.append(dict(name=name, ms_per_image=1e3 * seconds / B, gflop=flops[name] / 1e9))
        print(f"{name:12}{1e3 * seconds / B:8.1f} ms/image {flops[name] / 1e9:7.2f} GFLOP/image "
              f"{flops[name] * B / seconds / 1e9:7.0f} GFLOP/s")
    for n in (n for n in args.processes if args.device == "cpu" or n <= torch.cuda.device_count()):
        rows.append(dict(name=f"{n} processes", images_per_s=rate_of(n, args)))
        print(f"{n} processes x 16 images: {rows[-1]['images_per_s']:.1f} images/s by the clock, with data loading")
    return rows


def rate_of(processes, args):
    """Images/s of a whole run of that many processes: the median of its log lines but the first."""
    with tempfile.TemporaryDirectory() as out:
        flags = {f"--{k}": v for k, v in SIZES["tiny"].items()} | {
            "--batch_size": 16 * processes, "--max_steps": 10 * (args.runs + 1), "--log_every": 10, "--save_every": 0,
            "--device": args.device, "--precision": args.precision[0], "--out_dir": out}
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                        ddae.__file__, *(str(x) for flag in flags.items() for x in flag)], check=True,
                       stdout=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
        lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return float(np.median([json.loads(line)["images_per_s"] for line in lines[1:]]))


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
    commands = dict(step=step, memory=memory, scaling=scaling, ema=ema, loader=loader, mask=mask)
    parser.add_argument("command", choices=commands)
    for name in ("mae", "deepmim", "sdae", "bootmae"):
        parser.add_argument(f"--{name}", metavar="PATH", help="checkout of the official code")
    parser.add_argument("--methods", nargs="+", default=["MAE", "DDAE", "DeepMIM", "SdAE"], choices=METHODS)
    parser.add_argument("--sizes", nargs="+", default=["B", "tiny"], choices=SIZES)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, help="default: step 8, tiny 32; memory 512, SdAE 96")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="scaling")
    parser.add_argument("--data", help="loader: folder with train/, with a folder of JPEGs per class")
    for flag, default in dict(img_size=224, patch_size=16, images=64).items():
        parser.add_argument(f"--{flag}", type=int, default=default, help="loader")
    for flag in ("compile", "recompute", "profile"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch._dynamo.config.recompile_limit = 100  # of all models here together; beyond, they would run eagerly
    if args.device == "cpu":
        torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'one CPU core'}, "
          f"medians of {args.runs}")
    rows = commands[args.command](args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
