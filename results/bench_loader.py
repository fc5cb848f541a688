"""The commands loader and mask of bench.py: images per second and core of the loader, and the time of a mask."""
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import default_collate
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

import common
import ddae
import evaluate
import sources


def alternate(ways, runs):
    """Call all `ways` in turn, one more time than `runs` -> name -> seconds (runs,), the first left out."""
    times = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(time.process_time() - start)
    return {name: np.array(seconds[1:]) for name, seconds in times.items()}


def loader(args):
    """DDAE's samples, mask included, against MAE's own pipeline (its main_pretrain.py), with collation; no workers."""
    mae = datasets.ImageFolder(f"{args.data}/train", transforms.Compose([
        transforms.RandomResizedCrop(args.img_size, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(common.MEAN, common.STD)]))
    cfg = ddae.Config(data=args.data, img_size=args.img_size, patch_size=args.patch_size)
    source = common.Folder(Path(args.data) / "train")  # as of a set that is too large to be kept in memory
    samples, ids = common.Samples(source, cfg, ddae.draw_mask), range(min(args.images, len(source)))
    kept = common.Samples(common.open_data(cfg, "train"), cfg, ddae.draw_mask)
    ways = {
        "MAE's pipeline": lambda: default_collate([mae[i] for i in ids]),
        "ours": lambda: samples.collate([samples[0, i] for i in ids]),
        "ours, second epoch": lambda: kept.collate([kept[0, i] for i in ids]),  # faster if the set fits in memory
        "ours, evaluation": lambda: default_collate([evaluate.read_center(source, cfg, i) for i in ids]),
        "decoding alone": lambda: [Image.open(source.samples[i][0]).load() for i in ids]}
    if isinstance(kept.source, sources.Kept) and all(kept.source[i][0].size == kept.source.size for i in ids):
        boxes = sources.boxes_of(kept)
        ways["ours, for a GPU"] = lambda: boxes.collate([boxes[0, i] for i in ids])  # that holds the set and crops
    return report(alternate(ways, args.runs), len(ids), "MAE's pipeline")


def mask(args):
    """A sample's mask as the loader draws it, for 14 x 14 patches."""
    configs = {"block": ddae.Config(), "random": ddae.Config(mask="random")}
    times = alternate({name: lambda cfg=cfg: [ddae.draw_mask(np.random.default_rng((0, 0, i)), cfg) for i in range(500)]
                       for name, cfg in configs.items()}, args.runs)
    return report(times, 500, "random")


def report(times, n, base):
    """Print and return microseconds per item of each way, and the median ratio to `base`, run by run."""
    rows = {name: dict(microseconds=1e6 * np.median(t) / n, per_s=n / np.median(t), lowest=n / t.max(),
                       highest=n / t.min(), times_base=np.median(times[base] / t)) for name, t in times.items()}
    for name, row in rows.items():
        print("{:18} {microseconds:8.1f} us {per_s:8.0f}/s ({lowest:.0f} to {highest:.0f}), {times_base:.2f} x {}"
              .format(name, base, **row))
    return rows
