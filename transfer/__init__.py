"""
What segmentation and detection share: from --init to the run.
"""
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

import common
import finetune
from evaluate import read_each

SIZES = ("patch_size", "embed_dim", "depth", "num_heads")


def fit(cfg, method, saved):
    """--init -> Config with its sizes, its weights, and its classes if it is a trained model of `method`, else [].

    Such a model also sets the fields `saved`. If --eval or --predict has no --init, or if the file is gone when a run
    resumes, it is out_dir's model.pt.
    """
    training, own = not (cfg.eval or cfg.predict), Path(cfg.out_dir) / "model.pt"
    resumed = training and own.exists() and not Path(cfg.init).exists()
    path = own if resumed or not (training or cfg.init) else cfg.init
    fields, weights, classes = {k: getattr(cfg, k) or size for k, size in zip(SIZES, (16, 768, 12, 12))}, {}, []
    if path:
        weights, config = finetune.read_weights(path)
        if config.get("method") == method:
            fields, classes = {k: config[k] for k in saved if k in config}, config["classes"]
        else:
            weights = finetune.vit_weights(weights, path)
            sizes = finetune.vit_sizes(weights, config, path)
            fields = {k: sizes[k] for k in SIZES}
    if not training:
        if not classes:
            sys.exit(f"--init {path} is no {method} model; give a model.pt of this script")
        if cfg.out_dir == type(cfg).out_dir:  # the default
            fields["out_dir"] = str(Path(path).parent)
    try:
        return replace(cfg, **fields), weights, classes
    except AssertionError as error:  # __post_init__
        sys.exit(f"--init {path}: {error}")


def load_backbone(backbone, weights, path):
    """Load an encoder; its position table is resized. Parameters that only our blocks have start without effect."""
    own, table = backbone.state_dict(), finetune.resize_pos_embed(weights["pos_embed"], backbone.grid)
    new = {k: own[k] for k in own if k.endswith(("rel_pos", "rel_pos_h", "rel_pos_w", "gamma_1", "gamma_2"))}
    common.load_weights(backbone, weights | new | dict(pos_embed=table), path)
    common.print0(f"{len(own) - len(new)} of {len(own)} backbone tensors are from {path}; position table "
                  f"{weights['pos_embed'].shape[1] - 1} -> {table.shape[1] - 1} patches; "
                  f"not used: {', '.join([k for k in weights if k not in own][:6])}")


class Pictures:
    """A picture, or those in a folder: [i] -> its path, uint8 (3, H, W), turned as its EXIF says."""

    def __init__(self, path):
        names = sorted(path.iterdir()) if path.is_dir() else []
        found = [p for p in names if p.name[0] != "." and p.suffix.lower() in IMG_EXTENSIONS]
        if path.is_dir() and not found:
            sys.exit(f"{path.absolute()} has no pictures: files whose names end in {', '.join(IMG_EXTENSIONS)}")
        self.samples = [(str(p),) for p in found or [path]]

    def __getitem__(self, i):
        path, = self.samples[i]
        return Path(path), common.to_rgb(ImageOps.exif_transpose(Image.open(path)))


def run(cfg, Model, saved, open_data, Samples, optimizer, schedule, evaluate, predict):
    """Train, evaluate on val (--eval), or write what is found in pictures (--predict).

    open_data(cfg, split) -> source; Samples(source, cfg) -> common.Samples; evaluate(model, cfg, device, autocast,
    source) -> metrics by name, in all processes; predict(model, cfg, path, img, classes, device, autocast): a picture.
    """
    cfg, weights, classes = fit(cfg, Model.__name__.lower(), saved)
    device, autocast = common.setup(cfg)
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    if not cfg.predict:
        val = open_data(cfg, "val")
        other = [f"{was}, now {now}" for was, now in itertools.zip_longest(classes, val.classes) if was != now]
        if classes and other:
            sys.exit(f"{cfg.init} was trained on other classes than --data {cfg.data} has: {'; '.join(other[:3])}")
        if not classes and cfg.num_classes not in (0, len(val.classes)):
            sys.exit(f"--num_classes {cfg.num_classes}, but --data {cfg.data} has {len(val.classes)} classes")
        cfg = replace(cfg, num_classes=len(val.classes))
    torch.manual_seed(cfg.seed)
    model = Model(cfg)
    if classes:
        common.load_weights(model, weights, cfg.init)
    elif weights:
        load_backbone(model.backbone, weights, cfg.init)
    if cfg.predict:
        source = Pictures(Path(cfg.predict))
        model.to(device).eval()
        for (path, img), in read_each(source.__getitem__, source, range(len(source.samples)), cfg, batch_size=1):
            predict(model, cfg, path, img, classes, device, autocast)
        return
    if cfg.eval:
        metrics = evaluate(model.to(device).eval(), cfg, device, autocast, val)
        common.print0("  ".join(f"{k} {v:.6g}" for k, v in metrics.items()))
        return
    train = open_data(cfg, "train")
    if list(train.classes) != list(val.classes):
        sys.exit(f"--data {cfg.data} has different classes for training and validation")
    if not cfg.init:
        common.print0("warning: no --init, the ViT starts from scratch, which needs a far longer training")
    if common.WORLD > 1 and device.type == "cuda":  # SyncBatchNorm has no CPU version
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    common.train(cfg, model, Samples(train, cfg), optimizer, schedule,
                 lambda model, cfg, device, autocast, samples: evaluate(model, cfg, device, autocast, val))
