"""Measurements and pictures of analyze.py against loops and single pixels."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Run
from matplotlib.image import imread
from test_finetune import HERE, VIT, center, encoder, images  # noqa: F401, fixtures

import analyze
import common
import ddae


def knn_by_loop(train, val):
    """Percent of val right; train, val: lists of feature (D,), label."""
    right = 0
    for x, label in val:
        near = sorted(((x @ z).item(), y) for z, y in train)[-20:]
        right += int(np.argmax([sum(np.exp(s / 0.07) for s, y in near if y == c) for c in range(3)])) == label
    return 100 * right / len(val)


def feature(vit, x):
    return F.normalize(vit.norm(vit(x)[-1])[0, 1:].mean(0), dim=0)


@torch.no_grad()
def test_knn_of_two_processes_equals_a_loop(images, encoder):
    x, y = F.normalize(torch.randn(240, 3)), torch.randint(3, (240,))
    assert analyze.knn_accuracy(x[:140], y[:140], x[140:], y[140:]) == pytest.approx(
        knn_by_loop(list(zip(x[:140], y[:140])), list(zip(x[140:], y[140:]))))
    broken = sorted((images / "train" / "bee").iterdir())[0]
    broken.write_text("no image")
    flags = f"--mode knn --data {images} --init {encoder} --device cpu --num_workers 1 --max_bad 0.05"
    out = Run(flags, 2, path=ROOT / "finetune.py").output()
    broken.unlink()
    vit = ddae.ViT(**VIT).eval()
    vit.load_state_dict(common.load(encoder)["model"])
    found = knn_by_loop(*([(feature(vit, center(image, 16, 1)), y) for image, y in common.Folder(images / split)]
                          for split in ("train", "val")))
    assert out.count(f"unreadable {broken}") == 1 and f"knn {found:.6g}  val_images 13  train_images 35" in out


@torch.no_grad()
def test_evaluation_during_pretraining(images):
    """val_loss is the mean over images under masks that no seed changes; eval_images / 5 of val/ are used."""
    found = []
    for seed in (0, 7):
        flags = f"--preset quick --data {images} --img_size 16 --eval_images 36 --seed {seed} {HERE}"
        cfg = common.parse(ddae.Config, ddae.PRESETS, argv=flags.split())
        torch.manual_seed(3)
        model, samples = ddae.DDAE(cfg).eval(), common.Samples(common.open_data(cfg, "train"), cfg, ddae.draw_mask)
        found.append(analyze.evaluate_encoder(model, cfg, *common.setup(cfg), samples))
    samples.source.classes = [""]  # unlabeled
    found.append(analyze.evaluate_encoder(model, cfg, *common.setup(cfg), samples))
    assert found[0] == found[1] == found[2] | dict(knn=found[0]["knn"]) and "knn" not in found[2]
    val, ids = common.open_data(cfg, "val"), np.random.default_rng(0).permutation(13)[:7].tolist()
    picked = [(center(val[i][0], 16, 1), val[i][1]) for i in ids]
    masks = [torch.from_numpy(ddae.draw_mask(np.random.default_rng((0, i)), cfg))[None] for i in ids]
    losses = [model(x, mask)[0].item() for (x, _), mask in zip(picked, masks)]
    assert found[0]["val_loss"] == pytest.approx(np.mean(losses), rel=1e-3)
    train = [(feature(model.encoder, center(image, 16, 1)), y) for image, y in common.Folder(images / "train")]
    assert found[0]["knn"] == pytest.approx(knn_by_loop(train, [(feature(model.encoder, x), y) for x, y in picked]))


def test_panels_are_images_maps_and_features_in_common_colors(tmp_path):
    colors, features = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, 5)
    features[:, :2] = torch.randn(2, 2, 4, 5)
    panels = dict(image=colors, map=torch.arange(32.0).view(2, 4, 4), target=features, prediction=features.clone())
    analyze.draw_panels(panels, tmp_path / "preview.png")
    picture = imread(tmp_path / "preview.png")[..., :3]
    H, W = picture.shape[:2]
    columns = [picture[:, W * i // 4:W * (i + 1) // 4] for i in range(4)]
    assert np.abs(columns[2][:, :W // 5] - columns[3][:, :W // 5]).mean() < 0.05  # the same colors
    assert (columns[2] == 1).all(-1).mean() > 0.4  # zeros stay blank
    want = (colors[0, :, 0, 0].numpy() * common.STD + common.MEAN).clip(0, 1)
    assert np.abs(columns[0] - want).max(-1).min() < 0.02  # the color of the first pixel is there
