"""
Images per second and core of the loader, and the time of a mask. Alternated in one process.

    python results/bench_loader.py loader --data FOLDER      FOLDER/train has class folders of JPEGs
    python results/bench_loader.py loader --data FOLDER --img_size 32 --patch_size 4        CIFAR-10
    python results/bench_loader.py mask
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import ddae  # noqa: E402
import evaluate  # noqa: E402


def alternate(ways, runs):
    """Call all `ways` in turn, one more time than `runs` -> name -> seconds (runs,), the first left out."""
    times = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(seconds[1:]) for name, seconds in times.items()}


def loader(args):
    """DDAE's samples, mask included, against MAE's own pipeline (its main_pretrain.py), with collation; no workers."""
    torch.set_num_threads(1)
    mae = datasets.ImageFolder(f"{args.data}/train", transforms.Compose([
        transforms.RandomResizedCrop(args.img_size, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(common.MEAN, common.STD)]))
    cfg = ddae.Config(data=args.data, img_size=args.img_size, patch_size=args.patch_size)
    source = common.Folder(Path(args.data) / "train")  # as of a set that is too large to be kept in memory
    samples, ids = common.Samples(source, cfg, ddae.draw_mask), range(min(args.images, len(source)))
    kept = common.Samples(common.open_data(cfg, "train"), cfg, ddae.draw_mask)
    times = alternate({
        "MAE's pipeline": lambda: default_collate([mae[i] for i in ids]),
        "ours": lambda: samples.collate([samples[0, i] for i in ids]),
        "ours, second epoch": lambda: kept.collate([kept[0, i] for i in ids]),  # faster if the set fits in memory
        "ours, evaluation": lambda: default_collate([evaluate.read_center(source, cfg, i) for i in ids]),
        "decoding alone": lambda: [Image.open(source.samples[i][0]).load() for i in ids]}, args.runs)
    report(times, len(ids), "MAE's pipeline")


def mask(args):
    """A sample's mask as the loader draws it, for 14 x 14 patches."""
    torch.set_num_threads(1)
    configs = {"block": ddae.Config(), "random": ddae.Config(mask="random")}
    times = alternate({name: lambda cfg=cfg: [ddae.draw_mask(np.random.default_rng((0, 0, i)), cfg) for i in range(500)]
                       for name, cfg in configs.items()}, args.runs)
    report(times, 500, "random")


def report(times, n, base):
    """Print a line per way and one of JSON: microseconds per item, and the median ratio to `base`, run by run."""
    rows = {name: dict(microseconds=1e6 * np.median(t) / n, per_s=n / np.median(t), lowest=n / t.max(),
                       highest=n / t.min(), times_base=np.median(times[base] / t)) for name, t in times.items()}
    for name, row in rows.items():
        print("{:18} {microseconds:8.1f} us {per_s:8.0f}/s ({lowest:.0f} to {highest:.0f}), {times_base:.2f} x {}"
              .format(name, base, **row))
    print(json.dumps(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loader", "mask"])
    parser.add_argument("--data", help="folder with train/, with a folder of JPEGs per class")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    dict(loader=loader, mask=mask)[args.what](args)
