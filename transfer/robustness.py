"""
A fine-tuned ImageNet classifier on ImageNet-A, -R and -C (DeepMIM Table 6).

    python -m transfer.robustness --init out/ft/best.pt --a IMAGENET-A --r IMAGENET-R --c IMAGENET-C

-A and -R hold 200 of the 1,000 classes each, and only these may be answered: other logits are dropped before the argmax.
-C answers among all classes. It holds 15 corruptions at 5 severities in its published layout,
corruption/severity/class/image; the 4 extra corruptions are not counted. Two figures come from it, side by side, since
papers do not always say which they mean: the plain mean of the 75 error rates, and mCE, where each corruption's errors are
divided by AlexNet's (Hendrycks and Dietterich 2019).

Folders are named by class (wnid). Which logit a class has is known from best.pt; for files that do not say, `--classes`
names a folder whose subfolders, sorted, are the classes, such as ImageNet's val/, or a text file with a name per line.
Fewer corruptions, severities or classes than published are refused unless `--partial`.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import common
import finetune

ALEXNET = {  # error rates of AlexNet, mean over severities; Hendrycks and Dietterich, Table 1 and their code
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500}


@dataclass(frozen=True)
class Config:
    init: str = ""  # [ours] the classifier: best.pt of finetune.py, or a fine-tuned ViT of MAE or timm
    a: str = ""  # [DeepMIM Table 6] folder of ImageNet-A
    r: str = ""  # [DeepMIM Table 6] folder of ImageNet-R
    c: str = ""  # [DeepMIM Table 6] folder of ImageNet-C, with corruption/severity/class/image
    classes: str = ""  # [ours] class names in the order of the logits, where --init does not hold them
    partial: bool = False  # [ours] measure what there is of incomplete sets
    crop_pct: float = 0.0  # [MAE] crop's side / resized image's shorter, 0: as --init's; -C is not cut
    device: Literal["auto", "cpu", "cuda"] = "auto"  # [ours] auto takes CUDA where there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # [ours] auto: bf16 autocast on GPUs that have it
    eval_batch: int = 100  # [ours] images per process at a time
    num_workers: int = -1  # [ours] data workers per process; -1: the cores divided among processes, at most 10

    def __post_init__(self):
        common.check(self.init, "--init FILE is missing: a fine-tuned classifier, such as best.pt of finetune.py")
        common.check(self.a or self.r or self.c, "nothing to measure; give --a, --r or --c")
        common.above(0, self, "eval_batch")
        common.check(0 <= self.crop_pct <= 1, f"--crop_pct must be in [0, 1], got {self.crop_pct}")


def class_names(cfg, trained_on):
    """Names of the model's classes in the order of its logits; raises ValueError where nothing says them."""
    if not cfg.classes:
        common.check(trained_on, f"{cfg.init} does not name its classes; give --classes, ImageNet's val/ for instance")
        return trained_on
    path = Path(cfg.classes)
    common.check(path.exists(), f"--classes {path.absolute()} does not exist")
    if path.is_dir():
        return sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def measure(model, root, names, crop, context, expect, restrict):
    """Accuracy over the class folders in `root` -> figures as in `finetune.accuracy`.

    context: cfg, device, autocast.  expect: how many classes there should be; None takes any number.
    restrict: answer among them alone.
    Raises ValueError for a folder that is no class of the model's.
    """
    source = common.Folder(Path(root))
    common.check(source.classes, f"{root} has images outside class folders; expected a folder per class")
    unknown = sorted(set(source.classes) - set(names))
    common.check(not unknown, f"{root} has {len(unknown)} folders that are no class of the model, e.g. {unknown[:1]}; "
                 "if its classes go by other names, give --classes")
    common.check(expect in (None, len(source.classes)), f"{root} has {len(source.classes)} class folders instead of "
                 f"{expect}; complete it, or give --partial")
    numbers = np.array([names.index(c) for c in source.classes])
    source.labels = numbers[source.labels]
    keep = torch.zeros(len(names), dtype=torch.bool).index_fill(0, torch.from_numpy(numbers), True)
    return finetune.accuracy(model, source, crop, *context, keep=keep if restrict else None)[0]


def corruptions(model, root, names, crop, context, partial):
    """ImageNet-C -> error rates of each corruption by severity; prints a line for each."""
    root, errors = Path(root), {}
    for corruption in ALEXNET:
        found = [root / corruption / str(s) for s in range(1, 6) if (root / corruption / str(s)).is_dir()]
        common.check(partial or len(found) == 5, f"--c {root / corruption} has {len(found)} of the severities 1 to 5; "
                     "complete it, or give --partial")
        figures = [measure(model, f, names, crop, context, None if partial else len(names), False) for f in found]
        if figures:
            errors[corruption] = [1 - figure["acc1"] / 100 for figure in figures]
            common.say(f"{corruption:18} error " + " ".join(f"{100 * e:5.1f}" for e in errors[corruption])
                       + f"  mean {100 * np.mean(errors[corruption]):5.2f}  AlexNet's {100 * ALEXNET[corruption]:5.2f}  "
                       f"({sum(figure['val_images'] for figure in figures):,} images)")
    common.check(errors, f"--c {root.absolute()} has none of the folders {', '.join(ALEXNET)}")
    return errors


def main():
    """Command line -> figures."""
    cfg = common.parse(Config, {}, __doc__)
    try:
        for flag in ("a", "r", "c"):
            path = getattr(cfg, flag)
            common.check(not path or Path(path).is_dir(), f"--{flag} {Path(path).absolute()} is not a folder")
        cfg_model, weights, trained_on = finetune.sized(finetune.Config(init=cfg.init, eval=True, crop_pct=cfg.crop_pct))
        names = class_names(cfg, trained_on)
        outputs = len(weights.get("head.weight", names))
        common.check(outputs == len(names), f"{cfg.init} has a head for {outputs} classes, --classes names {len(names)}")
        device, autocast = common.setup(cfg)
        model = finetune.build(cfg_model, weights, len(names)).to(device).eval()
        size, context = (cfg_model.img_size,) * 2, (cfg, device, autocast)
        resized = finetune.centre_crop(size, cfg_model.crop_pct)
        for flag, title in (("a", "ImageNet-A"), ("r", "ImageNet-R")):
            if path := getattr(cfg, flag):
                found = measure(model, path, names, resized, context, None if cfg.partial else 200, True)
                common.say(f"{title}         acc1 {found['acc1']:.2f} on {found['val_images']:,} images")
        if cfg.c:
            whole = finetune.centre_crop(size, 1.0)  # takes 224 px as they are
            errors = corruptions(model, cfg.c, names, whole, context, cfg.partial)
            plain = np.mean([np.mean(rates) for rates in errors.values()])
            mce = f"{100 * np.mean([np.mean(errors[c]) / ALEXNET[c] for c in errors]):.2f} (AlexNet 100)"
            if any(len(rates) < 5 for rates in errors.values()):
                mce = "none, as AlexNet's errors are means over 5 severities"
            common.say(f"ImageNet-C         mean error {100 * plain:.2f}  mCE {mce}, over {len(errors)} corruptions")
    except ValueError as error:
        common.fail(str(error))
    common.leave()


if __name__ == "__main__":
    main()
