"""
The speed figures of the README, all alternated in one run so that a machine's drift cancels out.

    python tests/bench.py                      masks and distance maps against a ViT-B step; MAE and DDAE steps
    python tests/bench.py --mae PATH           also the step of a checkout of github.com/facebookresearch/mae
    python tests/bench.py --sdae               SdAE's four teacher feedings against MAE, with the operations of each
    python tests/bench.py --device cuda --batch 256 [--compile]      bf16 steps with peak memory
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import ddae
import sdae


def official_mae(path):
    """MAE's own ViT-B model; two arguments that today's timm and numpy no longer know are dropped."""
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
    parser.add_argument("--mae")
    parser.add_argument("--sdae", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    cuda, B = args.device == "cuda", args.batch
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else f'CPU, {torch.get_num_threads()} threads'}, "
          f"batch {B}, {'bf16' if cuda else 'fp32'}, median of {args.runs}")
    ids = torch.from_numpy(np.stack([ddae.draw_mask(np.random.default_rng(i), 224, 16, "block", 0.75) for i in range(B)]))
    ids, imgs = ids.to(args.device), torch.randn(B, 3, 224, 224, device=args.device)
    cfg = common.parse(ddae.Config, ddae.PRESETS, argv=[])

    def stepper(model, forward):
        model.to(args.device)
        if args.compile:
            model.compile()
        optimizer = common.make_optimizer(model, cfg)

        def step():
            with torch.autocast(args.device, torch.bfloat16, enabled=cuda):
                loss = forward(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if hasattr(model, "after_step"):
                model.after_step(1e-4)  # within an epoch
        return step

    mae = stepper(ddae.DDAE(pixel="plain", feature="none", decoder_depth=8), lambda model: model(imgs, ids)[0])
    if args.sdae:
        steps = {"MAE": mae}
        for feed in ("full", "masked", "crop", "folds"):
            steps[f"SdAE, {feed}"] = stepper(sdae.SdAE(feed=feed), lambda model: model(imgs, ids)[0])
    else:
        steps = {"DDAE": stepper(ddae.DDAE(), lambda model: model(imgs, ids)[0]), "MAE": mae}
        if args.mae:
            steps["official MAE"] = stepper(official_mae(args.mae), lambda model: model(imgs, 0.75)[0])
        rng, table = np.random.default_rng(0), ddae.patch_distances((14, 14)).to(args.device)
        steps["block masks"] = lambda: [ddae.draw_mask(rng, 224, 16, "block", 0.75) for _ in range(B)]
        steps["distance maps"] = lambda: ddae.distance_map(ids[:, :49], table)

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
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
            times[name] += [time.perf_counter() - start] if run else []
    median = {name: float(np.median(t)) for name, t in times.items()}
    for name, t in median.items():
        print(f"{name:14} {1e3 * t:10.3f} ms per batch, {B / t:10.4g} images/s, range {1e3 * min(times[name]):.3f} to "
              f"{1e3 * max(times[name]):.3f} ms" + (f", peak memory with all models held {memory[name]:.1f} GiB" if cuda else ""))
    if args.sdae:
        operations = {}
        for name, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            operations[name] = counter.get_total_flops()
        for name in list(steps)[1:]:
            ratios = np.array(times[name]) / np.array(times["MAE"]) - 1
            print(f"{name:12} beside MAE, pair by pair: time {np.median(ratios):+.1%} ({ratios.min():+.1%} to "
                  f"{ratios.max():+.1%}), operations {operations[name] / operations['MAE'] - 1:+.1%}")
    else:
        print(f"masks and distance maps / DDAE step: "
              f"{(median['block masks'] + median['distance maps']) / median['DDAE']:.3%}")
    if args.mae and not args.sdae:
        ratios = np.array(times["official MAE"]) / np.array(times["MAE"])
        print(f"official MAE / our MAE, pair by pair: {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})")


if __name__ == "__main__":
    main()
