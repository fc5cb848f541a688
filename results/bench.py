"""
Step times. All models run alternately in one process, so that drift of the machine cancels out.

    python results/bench.py                 DDAE and MAE, ViT-B; block masks and distance maps compared with DDAE's step
    python results/bench.py --mae PATH      also a checkout of github.com/facebookresearch/mae; needs timm
    python results/bench.py --sdae          SdAE's four ways to feed the teacher compared with MAE, with FLOPs
    python results/bench.py --device cuda --batch 256 [--compile]       bf16, with peak memory
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import ddae  # noqa: E402
import sdae  # noqa: E402


def official_mae(path):
    """MAE's own ViT-B. Two names that current timm and NumPy no longer have are put back."""
    import timm.models.vision_transformer as vit
    block = vit.Block
    vit.Block = lambda *args, qk_scale=None, **kwargs: block(*args, **kwargs)
    np.float = float
    sys.path.insert(0, path)
    import models_mae
    model = models_mae.mae_vit_base_patch16(norm_pix_loss=True)
    vit.Block = block
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mae", metavar="PATH")
    parser.add_argument("--sdae", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    cuda, B, cfg = args.device == "cuda", args.batch, ddae.Config()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}, {torch.get_num_threads()} "
          f"threads, batch {B}, {'bf16' if cuda else 'fp32'}, median of {args.runs}")
    ids = torch.from_numpy(np.stack([ddae.draw_mask(np.random.default_rng(i), cfg) for i in range(B)])).to(args.device)
    imgs = torch.randn(B, 3, 224, 224, device=args.device)

    def stepper(model, draws=ids):
        model.to(args.device)
        if args.compile:
            model.compile()
        optimizer = common.adamw(model, cfg)

        def step():
            with torch.autocast(args.device, torch.bfloat16, enabled=cuda):
                loss = model(imgs, draws)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if hasattr(model, "after_step"):
                model.after_step(1, 10000)
        return step

    steps = {"MAE": stepper(ddae.DDAE(ddae.Config(**ddae.PRESETS["mae"])))}
    if args.sdae:
        for feed in ("full", "masked", "crop", "folds"):
            steps[f"SdAE, {feed}"] = stepper(sdae.SdAE(sdae.Config(feed=feed)))
    else:
        model = ddae.DDAE(cfg)
        steps["DDAE"] = stepper(model)
        steps["block masks"] = lambda: [ddae.draw_mask(np.random.default_rng(i), cfg) for i in range(B)]
        steps["distance maps"] = lambda: ddae.distance_map(ids[:, :cfg.num_keep], model.distances)
    if args.mae:
        steps["official MAE"] = stepper(official_mae(args.mae), 0.75)  # it takes a mask ratio

    times, memory = {name: [] for name in steps}, {}
    for run in range(args.runs + 1):  # the first is a warm-up
        for name, step in steps.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
                memory[name] = f", peak memory with all models held {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            times[name] += [time.perf_counter() - start] if run else []
    for name, t in times.items():
        print(f"{name:14} {1e3 * np.median(t):10.3f} ms per batch ({1e3 * min(t):.3f} to {1e3 * max(t):.3f}), "
              f"{B / np.median(t):.4g} images/s{memory.get(name, '')}")

    flops = {}
    for name in steps if args.sdae else ():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
            steps[name]()
        flops[name] = counter.get_total_flops()
    for name in steps:
        if name != "MAE" and (args.sdae or "MAE" in name):
            ratios = np.array(times[name]) / times["MAE"]  # pair by pair
            print(f"{name:14} / MAE: time {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})"
                  + (f", FLOPs {flops[name] / flops['MAE']:.3f}" if flops else ""))
    if not args.sdae:
        share = (np.median(times["block masks"]) + np.median(times["distance maps"])) / np.median(times["DDAE"])
        print(f"block masks and distance maps / DDAE: {share:.3%}")


if __name__ == "__main__":
    main()
