"""
Robustness of a classifier fine-tuned on ImageNet: ImageNet-A, -R, and -C. [DeepMIM Table 6]

    python -m transfer.robustness --init out/ft/model.pt --a IMAGENET-A --r IMAGENET-R --c IMAGENET-C

-A and -R have 200 of the 1,000 classes: a folder per class, and only these may be answered. Other logits are dropped
before the argmax. On -C all classes may be answered. It has 15 corruptions at 5 severities in the folders
corruption/severity/class; its 4 extra corruptions are not used. Papers do not always say which average they report, so
both are printed: the mean of the 75 error rates, and mCE, where each corruption's mean error is divided by AlexNet's.

Class folders are named like the training set's (by WordNet ids), which model.pt knows in the order of the logits. For
files that do not, --classes names a folder with a subfolder per class, such as val/ of ImageNet.
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import common
import finetune

ALEXNET = {  # error rates of AlexNet, mean over severities; Hendrycks and Dietterich 2019, Table 1 and their code
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500}


@dataclass(frozen=True)
class Config:
    init: str = ""  # [ours] the classifier: model.pt of finetune.py, or a fine-tuned ViT of MAE or timm
    a: str = ""  # [DeepMIM Table 6] folder of ImageNet-A
    r: str = ""  # [DeepMIM Table 6] folder of ImageNet-R
    c: str = ""  # [DeepMIM Table 6] folder of ImageNet-C
    classes: str = ""  # [ours] folder whose subfolders, sorted, are the model's classes; none: as in --init
    partial: bool = False  # [ours] accept fewer classes, corruptions, and severities than published
    crop_pct: float = 0.0  # [MAE] on -A and -R, center crop / resized shorter side; 0: as in --init. -C is not cropped
    device: Literal["auto", "cpu", "cuda"] = "auto"  # [ours] auto: CUDA if there is a GPU
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # [ours] auto: bf16 autocast on GPUs that support it
    num_workers: int = common.RunConfig.num_workers  # [ours] data workers per process
    max_bad: float = 0.01  # [ours] fraction of unreadable images above which the evaluation stops

    def __post_init__(self):
        assert self.init, "--init is missing: model.pt of finetune.py, for instance"
        assert self.a or self.r or self.c, "--a, --r, or --c is missing: there is nothing to evaluate"
        for flag in ("a", "r", "c", "classes"):
            path = getattr(self, flag)
            assert not path or Path(path).is_dir(), f"--{flag} {path} is not a folder"


def open_folder(root, classes, expected):
    """ImageFolder whose labels are the model's, and which classes it has, bool (C,); expected: how many, 0: any."""
    try:
        source = common.Folder(Path(root))
    except FileNotFoundError as error:  # no images, or none in some class
        sys.exit(f"{root}: {error}")
    unknown = sorted(set(source.classes) - set(classes))
    if unknown or expected not in (0, len(source.classes)):
        sys.exit(f"{root} has {len(source.classes)} class folders, expected {expected or 'any number'}, and "
                 f"{len(unknown)} that are no class of the model: {unknown[:3]}; give --partial or --classes")
    labels = [classes.index(name) for name in source.classes]
    source.target_transform = labels.__getitem__
    return source, torch.zeros(len(classes), dtype=torch.bool).index_fill(0, torch.tensor(labels), True)


def corruption_errors(model, root, classes, partial, context):
    """Error rates on ImageNet-C, a list over severities for each corruption, which are printed as they come."""
    errors = {}
    for corruption in ALEXNET:
        folders = [folder for s in range(1, 6) if (folder := Path(root, corruption, str(s))).is_dir()]
        if len(folders) < 5 and not partial:
            sys.exit(f"{Path(root, corruption)} has {len(folders)} of the severities 1 to 5; give --partial")
        for folder in folders:
            source, _ = open_folder(folder, classes, 0 if partial else len(classes))
            error = 1 - finetune.evaluate(model, *context, source=source)["acc1"] / 100
            errors.setdefault(corruption, []).append(error)
        if folders:
            percent = " ".join(f"{100 * e:5.1f}" for e in errors[corruption])
            common.print0(f"{corruption:18} error {percent}  mean {100 * np.mean(errors[corruption]):.2f}  "
                          f"AlexNet {100 * ALEXNET[corruption]:.2f}")
    return errors


@common.explained()
def main():
    cfg = common.parse(Config, {}, __doc__)
    model_cfg, weights, trained_on = finetune.settle(finetune.Config(
        init=cfg.init, eval=True, crop_pct=cfg.crop_pct, num_workers=cfg.num_workers, max_bad=cfg.max_bad))
    classes = sorted(p.name for p in Path(cfg.classes).iterdir() if p.is_dir()) if cfg.classes else trained_on
    if not classes:
        sys.exit(f"{cfg.init} does not name its classes; give --classes, such as val/ of ImageNet")
    device, autocast = common.setup(cfg)
    model = finetune.build(model_cfg, weights, len(classes)).to(device).eval()
    for name, root in (("ImageNet-A", cfg.a), ("ImageNet-R", cfg.r)):
        if root:
            source, keep = open_folder(root, classes, 0 if cfg.partial else 200)
            found = finetune.evaluate(model, model_cfg, device, autocast, source=source, keep=keep)
            common.print0(f"{name}  acc1 {found['acc1']:.2f} on {found['val_images']:,.0f} images")
    if cfg.c:
        context = replace(model_cfg, crop_pct=1.0), device, autocast  # takes 224 pixels as they are
        errors = corruption_errors(model, cfg.c, classes, cfg.partial, context)
        means = {corruption: np.mean(rates) for corruption, rates in errors.items()}
        mce = np.mean([mean / ALEXNET[corruption] for corruption, mean in means.items()])
        if any(len(rates) < 5 for rates in errors.values()):
            mce = np.nan  # AlexNet's errors are means over 5 severities
        common.print0(f"ImageNet-C  mean error {100 * np.mean(list(means.values())):.2f}  mCE {100 * mce:.2f}  "
                      f"over {len(errors)} corruptions")


if __name__ == "__main__":
    main()
