"""UperNet against independent oracles: published counts and logged rates, loops over pixels, closed forms, tiny folders."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import ddae
from transfer import segment

ROOT = Path(__file__).parent.parent
SIZES = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, channels=8)
TINY = "--img_size 32 --patch_size 8 --embed_dim 24 --depth 4 --num_heads 2 --channels 8 --batch_size 4 --warmup 0 " \
       "--num_workers 0 --preview_every 0 --device cpu --iterations 6 --log_every 1 --eval_images 3 --eval_every 99"


def config(flags=""):
    return common.parse(segment.Config, segment.RECIPES, argv=f"{TINY} {flags}".split(), flag="recipe")


def main(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["segment.py", *TINY.split(), *flags.split()])
    segment.main()


def ade(root, counts=(5, 3), K=4, seed=0):
    """A folder in ADE20K's layout: squares of random classes, colour tells class; sizes differ -> its path."""
    rng = np.random.default_rng(seed)
    for part, n in zip(("training", "validation"), counts):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            H, W = rng.integers(24, 60, 2)
            label = np.kron(rng.integers(0, K + 1, (H // 8 + 1, W // 8 + 1)), np.ones((8, 8), int))[:H, :W]
            Image.fromarray(label.astype(np.uint8)).save(root / "annotations" / part / f"{i}.png")
            rgb = np.stack((label * 50, 255 - label * 50, label % 2 * 200), -1).astype(np.uint8)
            Image.fromarray(rgb).save(root / "images" / part / f"{i}.png")
    (root / "classes.json").write_text(json.dumps([dict(id=k + 1, name=f"k{k}") for k in range(K)]))
    return root


def encoder_file(path, **sizes):
    """An encoder.pt as the method scripts write it."""
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2) | sizes
    vit = ddae.ViT(**sizes)
    torch.save(dict(model=vit.state_dict(), config=dict(sizes, method="ddae")), path)
    return vit


def numel(module):
    return sum(p.numel() for p in module.parameters())


# --- model ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, total, trunk", [
    (dict(rel_pos_bias=True), 163_877_228, 87_023_424), (dict(), 163_286_828, 86_433_024),
    (dict(rel_pos_bias=True, aux_weight=0), 162_068_694, 87_023_424), (dict(aux_weight=0), 161_478_294, 86_433_024)])
def test_parameter_counts_are_the_published_ones(options, total, trunk):
    with torch.device("meta"):
        model = segment.UperNet(**options)
    assert (numel(model), numel(model.backbone), numel(model.scales)) == (total, trunk, 7_081_728)
    if not options:
        assert numel(model.aux) == 1_808_534 and all(p.requires_grad for p in model.parameters())


def test_taps_are_the_papers_and_come_before_the_final_norm():
    for depth, taps in ((12, [4, 6, 8, 12]), (24, [8, 12, 16, 24]), (4, [1, 2, 3, 4]), (1, [1, 1, 1, 1])):
        assert segment.Backbone(16, 8, 8, depth, 1).taps == taps
    vit, backbone = ddae.ViT(32, 8, 24, 6, 2), segment.Backbone(32, 8, 24, 6, 2)
    backbone.load_state_dict({k: v for k, v in vit.state_dict().items() if not k.startswith("norm.")})
    imgs = torch.randn(2, 3, 32, 32)
    outputs = vit(imgs)
    for tap, found in zip((2, 3, 4, 6), backbone(imgs)):
        token = outputs[tap - 1][1, 1 + 2 * 4 + 3]  # row 2, column 3
        assert torch.allclose(found[1, :, 2, 3], token, atol=1e-5)


def test_head_is_upernet_written_out():
    torch.manual_seed(0)
    model = segment.UperNet(**SIZES, num_classes=5).eval()
    taps = [torch.randn(2, 24, 4, 4) for _ in range(4)]
    up = torch.nn.functional.interpolate
    a, b, c, d = (scale(tap) for scale, tap in zip(model.scales, taps))
    assert [x.shape[-1] for x in (a, b, c, d)] == [16, 8, 4, 2]
    pools = [up(block[1](F.adaptive_avg_pool2d(d, n)), (2, 2), mode="bilinear")
             for n, block in zip((1, 2, 3, 6), model.pools)]
    p4 = model.bottleneck(torch.cat([d, *pools], 1))
    p3 = model.laterals[2](c) + up(p4, scale_factor=2, mode="bilinear")
    p2 = model.laterals[1](b) + up(p3, scale_factor=2, mode="bilinear")
    p1 = model.laterals[0](a) + up(p2, scale_factor=2, mode="bilinear")
    levels = [model.fpn[0](p1), model.fpn[1](p2), model.fpn[2](p3), p4]
    x = torch.cat([up(x, (16, 16), mode="bilinear") for x in levels], 1)
    assert torch.allclose(model.head(taps), model.classify[1](model.fuse(x)), atol=1e-5)
    assert isinstance(model.scales[0][1], nn.BatchNorm2d) and len(model.scales[0]) == 4


def test_bias_and_layer_scale_begin_without_effect_and_then_have_it():
    plain, biased = segment.Backbone(32, 8, 24, 4, 2).eval(), segment.Backbone(32, 8, 24, 4, 2, rel_pos_bias=True).eval()
    attn = biased.blocks[3].attn  # as `init_weights` draws: Xavier with zero bias
    assert not attn.qkv.bias.any() and 0.9 < attn.qkv.weight.max() / (6 / 96) ** 0.5 <= 1
    missing = biased.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {k.split(".")[-1] for k in missing} == {"rel_pos", "gamma_1", "gamma_2"}
    for shape in ((2, 3, 32, 32), (1, 3, 16, 56)):
        imgs = torch.randn(shape)
        for x, y in zip(plain(imgs), biased(imgs)):
            assert torch.allclose(x, y, atol=1e-5)
    nn.init.normal_(biased.blocks[0].rel_pos, std=2.0)
    assert (plain(imgs)[0] - biased(imgs)[0]).abs().max() > 1e-3


def test_bias_of_two_patches_depends_on_their_offset_alone():
    block = segment.BiasedBlock(8, 2, 0.0, 3)
    with torch.no_grad():
        block.rel_pos.copy_(torch.arange(56).view(28, 2))
    bias = block.bias((3, 3))  # (2, 10, 10)
    for i in range(9):
        for j in range(9):
            row = (i // 3 - j // 3 + 2) * 5 + i % 3 - j % 3 + 2
            assert bias[1, 1 + i, 1 + j] == block.rel_pos[row, 1]
    assert (bias[0, 0, 1:] == block.rel_pos[25, 0]).all() and (bias[0, 1:, 0] == block.rel_pos[26, 0]).all()
    assert bias[0, 0, 0] == block.rel_pos[27, 0] and block.bias((2, 5)).shape == (2, 11, 11)


def test_position_table_is_resized_as_coordinates_not_recomputed(tmp_path):
    vit = encoder_file(tmp_path / "e.pt", img_size=112, embed_dim=768, depth=1)
    weights = common.read_weights(tmp_path / "e.pt")
    for size in (112, 256):
        backbone = segment.Backbone(size, 8, 768, 1, 2)
        segment.load_backbone(backbone, dict(weights), "e.pt")
        n = size // 8
        at = (np.arange(n) + 0.5) * 14 / n - 0.5  # where the new patches lie on the old grid
        angle = at[:, None] * 10000.0 ** (-np.arange(192) / 192)
        waves = np.concatenate((np.sin(angle), np.cos(angle)), 1)  # (n, 384)
        table = np.concatenate((np.broadcast_to(waves, (n, n, 384)), np.broadcast_to(waves[:, None], (n, n, 384))), 2)
        cosine = F.cosine_similarity(backbone.pos_embed[0, 1:], torch.from_numpy(table).float().flatten(0, 1), dim=-1)
        assert cosine.mean() > 0.9999 - 1e-4 and backbone.pos_embed.requires_grad
        assert torch.equal(backbone.pos_embed[:, :1], vit.pos_embed[:, :1])
    assert F.cosine_similarity(backbone.pos_embed, ddae.sincos_pos_embed(768, (32, 32)), dim=-1)[0, 1:].mean() < 0.8


def test_cross_entropy_counts_unlabelled_pixels_or_not():
    logits, labels = torch.randn(2, 5, 8, 8), torch.randint(5, (2, 8, 8))
    labels[1] = 255
    losses = [segment.UperNet(**SIZES, num_classes=5, loss_mean=mean).cross_entropy(logits, labels) for mean in
              ("all", "labelled")]
    slow = [-logits[0, :, y, x].log_softmax(0)[labels[0, y, x]] for y in range(8) for x in range(8)]
    assert losses[1].item() == pytest.approx(torch.stack(slow).mean().item(), rel=1e-5)
    assert (losses[0] / losses[1]).item() == pytest.approx(0.5, rel=1e-6)
    model = segment.UperNet(**SIZES, num_classes=5, loss_mean="labelled")
    assert model.cross_entropy(logits, torch.full_like(labels, 255)) == 0


def test_first_loss_is_that_of_a_guess_and_gradients_reach_everything():
    torch.manual_seed(0)
    model = segment.UperNet(**SIZES, num_classes=50, rel_pos_bias=True)
    labels = torch.randint(50, (4, 32, 32), dtype=torch.uint8)
    labels[:, :8] = 255
    loss, metrics = model(torch.randn(4, 3, 32, 32), labels)
    assert metrics["ce/main"].item() == pytest.approx(math.log(50) * 0.75, rel=0.05)
    assert loss.item() == pytest.approx((metrics["ce/main"] + 0.4 * metrics["ce/aux"]).item(), rel=1e-6)
    loss.backward()
    again = model.eval()(imgs := torch.randn(2, 3, 32, 32), labels[:2])[1]["ce/aux"]
    assert torch.equal(again, model.cross_entropy(model.aux(model.backbone(imgs)[2]), labels[:2].long()).detach())
    assert all(p.grad is not None for p in model.parameters())


# --- optimiser --------------------------------------------------------------------------------------------------------

def test_learning_rate_is_what_a_published_run_logged():
    cfg = segment.Config(lr=5e-5, layer_decay=0.9, patch_size=16, depth=12)
    with torch.device("meta"):
        groups = segment.make_optimizer(segment.UperNet(), cfg).param_groups
    logged = {50: "4.151e-07", 100: "8.383e-07", 1000: "8.412e-06", 1500: "1.258e-05", 1550: "1.259e-05",
              12500: "1.172e-05", 150450: "7.587e-07"}  # of group 0, after so many iterations
    for iteration, value in logged.items():
        assert f"{groups[0]['lr_scale'] * segment.learning_rate(iteration - 1, 1263, cfg):.3e}" == value


def test_groups():
    cfg = config("--layer_decay 0.65 --depth 12")
    model = segment.UperNet(**SIZES | dict(depth=12), num_classes=5, rel_pos_bias=True)
    groups = segment.make_optimizer(model, cfg).param_groups
    assert len(groups) == 28
    where = {p: (round(math.log(g["lr_scale"], 0.65)), g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(where) == len(list(model.parameters()))
    for name, expected in {"backbone.pos_embed": (13, 0.05), "backbone.cls_token": (13, 0.05),
                           "backbone.patch_embed.proj.bias": (13, 0.0), "backbone.blocks.0.attn.qkv.weight": (12, 0.05),
                           "backbone.blocks.11.rel_pos": (1, 0.05), "backbone.blocks.11.gamma_1": (1, 0.0),
                           "scales.1.weight": (0, 0.05), "classify.1.bias": (0, 0.0), "aux.2.weight": (0, 0.05)}.items():
        assert where[model.get_parameter(name)] == expected, name


# --- data -------------------------------------------------------------------------------------------------------------

def test_layout_maps_0_to_unlabelled_and_k_to_k_minus_1(tmp_path):
    root = ade(tmp_path)
    raw = np.arange(6, dtype=np.uint8).repeat(40).reshape(12, 20)
    raw[raw == 5] = 255
    Image.fromarray(raw).save(root / "annotations/training/0.png")
    Image.new("RGB", (20, 12)).save(root / "images/training/0.png")
    source = segment.Ade(root, "train", 0)
    image, label = source.pair(0)
    assert source.classes == ["k0", "k1", "k2", "k3"] and image.size == (20, 12)
    assert [sorted(set(label[raw == k])) for k in (0, 1, 2, 3, 4, 255)] == [[255], [0], [1], [2], [3], [255]]
    assert len(segment.Ade(root, "val", 150).classes) == 150 and len(source) == 5


def test_samples_depend_on_their_key_alone_and_fill_their_range(tmp_path):
    cfg = config()
    samples = segment.Crops(segment.Ade(ade(tmp_path), "train", 0), cfg)
    for key in ((0, 1), (3, 4)):
        first, target, *_ = samples[key]
        torch.rand(3), np.random.rand(3)
        again, same, *_ = samples[key]
        assert torch.equal(first, again) and (target == same).all()
        assert first.dtype == torch.uint8 and first.shape == (3, 32, 32) and target.dtype == np.uint8
        assert set(np.unique(target)) <= {0, 1, 2, 3, 255}
    assert not torch.equal(samples[0, 1][0], samples[1, 1][0])
    loaders = [torch.utils.data.DataLoader(samples, batch_sampler=common.Batches(5, cfg, 0, 3), num_workers=n,
                                           collate_fn=common.collate) for n in (0, 2)]
    for one, two in zip(*loaders):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]


def test_labels_stay_on_their_pixels(tmp_path):
    cfg = config("--no-distort --scale 0.5 2")
    samples = segment.Crops(segment.Ade(ade(tmp_path, counts=(5, 1)), "train", 0), cfg)
    colours, right, total = np.array([[(k + 1) * 50, 205 - k * 50, (k + 1) % 2 * 200] for k in range(4)]), 0, 0
    for epoch in range(20):
        img, label, *_ = samples[epoch, epoch % 5]
        known, pixels = label != 255, img.permute(1, 2, 0).numpy().astype(int)
        nearest = abs(pixels[known][:, None] - colours).sum(-1).argmin(-1)
        right, total = right + (nearest == label[known]).sum(), total + known.sum()
    assert right / total > 0.85  # bilinear pixels at the borders of squares are of no class's colour


def test_padding_is_right_and_below_and_the_mean_colour():
    class One:
        def pair(self, i):
            label = np.arange(64, dtype=np.uint8).reshape(1, 64).repeat(64, 0) // 16
            return Image.new("RGB", (64, 64), (250, 5, 5)), label

    sample = segment.Crops(One(), config("--scale 0.5 0.5 --no-distort"))
    img, label = sample.sample(0, np.random.default_rng(0))
    assert (label[:16, :16] != 255).all() and (label[16:] == 255).all() and (label[:, 16:] == 255).all()
    assert (img[0, :16, :16] == 250).all() and common.normalise(img, "cpu")[:, 20:].abs().max() < 0.01


def test_crops_are_drawn_again_while_one_class_rules():
    label = np.zeros((128, 128), np.uint8)
    label[:, 104:] = 1  # of the 97 places in a row, 15 have less than three quarters of one class
    label[:60] = 255  # unlabelled pixels do not matter

    class Stripe:
        def pair(self, i):
            return Image.new("RGB", (128, 128)), label

    samples, mixed = segment.Crops(Stripe(), config("--scale 4 4 --no-distort")), []
    for i in range(200):
        crop = samples.sample(0, np.random.default_rng(i))[1]
        mixed.append(np.bincount(crop[crop < 255], minlength=2).max(initial=0) < 0.75 * (crop < 255).sum())
    p = 15 / 97 * 68 / 97  # 29 of 97 windows lie above row 60 and have no label at all
    assert np.mean(mixed) == pytest.approx(1 - (1 - p) ** 11, abs=0.08)
    label[:] = 3
    draws = []

    class Counting:  # a label of one class is never good enough
        def __init__(self, rng):
            self.random, self.uniform = rng.random, rng.uniform

        def integers(self, n):
            draws.append(n)
            return 0

    samples.sample(0, Counting(np.random.default_rng(0)))
    assert len(draws) == 2 * 11


def test_distortion_keeps_to_its_ranges():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    means = np.array([segment.distort(grey, np.random.default_rng(i)).float().mean() for i in range(400)])
    assert 100 * 0.5 - 34 <= means.min() < 60 and 160 < means.max() <= 132 * 1.5 + 1
    assert 0.1 < np.mean(means == 100) < 0.4  # brightness and contrast both left out: a quarter
    seen = torch.cat([segment.distort(torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1),
                                      np.random.default_rng(i)).view(1, 3) for i in range(300)]).float()
    assert (seen[:, 0] > seen[:, 2]).float().mean() > 0.97  # red stays above blue: channels are never permuted


def test_saturation_is_that_of_hsv():
    import colorsys

    class Only:  # skips brightness, contrast, hue
        def __init__(self, factor):
            self.answers, self.factor = iter((1, 1, 0, 1, 1)), factor

        def random(self):
            return next(self.answers)

        def uniform(self, low, high):
            return self.factor

    rgb = torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8)
    for factor in (0.5, 0.8, 1.5):
        found = segment.distort(rgb, Only(factor))
        for y in range(5):
            for x in range(5):
                h, s, v = colorsys.rgb_to_hsv(*(rgb[:, y, x] / 255).tolist())
                expected = 255 * np.array(colorsys.hsv_to_rgb(h, min(1, s * factor), v))
                assert abs(found[:, y, x].numpy() - expected).max() <= 1.01


# --- evaluation -------------------------------------------------------------------------------------------------------

def test_figures_equal_a_loop_over_pixels_and_leave_out_absent_classes():
    rng, K = np.random.default_rng(0), 6
    labels = [rng.integers(0, 4, (9, 7)) for _ in range(5)]  # classes 4 and 5 are never labelled, 4 is predicted
    for label in labels:
        label[rng.random(label.shape) < 0.2] = 255
    predictions = [rng.choice([0, 1, 2, 3, 4], (9, 7)) for _ in labels]
    confusion = sum(segment.confusion_matrix(torch.from_numpy(p), torch.from_numpy(y), K)
                    for p, y in zip(predictions, labels))
    assert confusion.dtype == torch.int64 and confusion.sum() == sum((y != 255).sum() for y in labels)
    iou, acc = segment.class_figures(confusion)
    for k in range(K):
        inside = union = labelled = 0
        for p, y in zip(predictions, labels):
            for a, b in zip(p.ravel(), y.ravel()):
                if b != 255:
                    inside, union, labelled = inside + (a == b == k), union + (a == k or b == k), labelled + (b == k)
        assert iou[k].item() == pytest.approx(100 * inside / union if union else math.nan, nan_ok=True)
        assert acc[k].item() == pytest.approx(100 * inside / labelled if labelled else math.nan, nan_ok=True)
    assert iou[4] == 0 and iou[5].isnan() and acc[4].isnan()
    iou, _ = segment.class_figures(torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]]))
    assert iou.nanmean() == 25  # half right, predicted only, absent


def test_windows():
    assert [segment.starts(size, 512, 341) for size in (512, 683, 853, 1024, 300)] == [
        [0], [0, 171], [0, 341], [0, 341, 512], [0]]


@pytest.mark.parametrize("size", [(32, 32), (40, 71), (20, 90), (7, 5)])
def test_slide_equals_whole_for_a_model_without_surroundings(size):
    pixelwise = nn.Conv2d(3, 5, 1)
    img = torch.randn(3, *size)
    with torch.no_grad():
        found = segment.slide(pixelwise, img, 32, 21)
        assert found.shape == (5, *size) and torch.allclose(found, pixelwise(img[None])[0], atol=1e-5)
        assert torch.allclose(found, segment.whole(pixelwise, img, 8), atol=1e-5)


@pytest.mark.parametrize("inference", ["slide", "whole"])
@torch.no_grad()
def test_any_size_is_segmented(inference):
    cfg = config(f"--inference {inference}")
    model = segment.UperNet(**SIZES, num_classes=5, rel_pos_bias=True).eval()
    for size in ((50, 33), (10, 200), (200, 10), (1, 1)):  # more than 4 : 1, where the shorter side stays small
        img = torch.zeros(3, *size, dtype=torch.uint8)
        logits = segment.segment(model, img, cfg, "cpu", torch.autocast("cpu", enabled=False))
        factor = min(32 / min(size), 128 / max(size))
        assert logits.shape == (5, *(round(x * factor) for x in size)) and logits.isfinite().all()


# --- runs -------------------------------------------------------------------------------------------------------------

def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_overfits(tmp_path, monkeypatch):
    root = ade(tmp_path / "data", counts=(4, 0))
    for kind in ("images", "annotations"):
        (root / kind / "validation").rmdir()
        (root / kind / "validation").symlink_to(root / kind / "training")
    main(monkeypatch, f"--data {root} --out_dir {tmp_path / 'out'} --iterations 100 --patch_size 4 --channels 16 "
         "--scale 1 1 --no-distort --lr 1e-2 --layer_decay 1 --eval_images 0 --drop_path 0 --eval_every 50 --save_every 100 --log_every 20")
    lines = log(tmp_path / "out")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and lines[-1]["mIoU"] > 80 and lines[-1]["aAcc"] > 90
    best = common.load(tmp_path / "out/best.pt")
    assert best["figures"]["mIoU"] == pytest.approx(max(x.get("mIoU", 0) for x in lines), rel=1e-5)
    table = (tmp_path / "out/per_class.txt").read_text().splitlines()
    assert len(table) == 5 and table[1].startswith("k0 ")


def test_resumes_bitwise_and_then_evaluates_and_predicts(tmp_path, monkeypatch, capsys):
    data = ade(tmp_path / "data", counts=(9, 3))
    encoder_file(tmp_path / "encoder.pt", img_size=16)
    flags = f"--data {data} --init {tmp_path / 'encoder.pt'} --rel_pos_bias --clip_grad 1 "
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(monkeypatch, flags + f"--out_dir {whole}")
    said = capsys.readouterr().out
    assert "4 -> 16 patches" in said and "norm.weight" in said and "scratch" not in said
    main(monkeypatch, flags + f"--out_dir {cut} --max_steps 3 --eval_images 2 --inference whole")  # these may change
    main(monkeypatch, flags + f"--out_dir {cut}")
    one, two = common.load(whole / "last.pt"), common.load(cut / "last.pt")
    assert one["step"] == two["step"] == 6
    for k in one["model"]:
        assert torch.equal(one["model"][k], two["model"][k]), k
    for group in ("mIoU", "loss", "grad_norm"):
        assert log(whole)[-1][group] == log(cut)[-1][group]
    capsys.readouterr()
    main(monkeypatch, f"--data {data} --out_dir {whole} --eval")
    assert f"mIoU {common.load(whole / 'best.pt')['figures']['mIoU']:.6g}" in capsys.readouterr().out
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (70, 45), (200, 30, 30)).save(photo)
    main(monkeypatch, f"--predict {photo} --init {whole / 'best.pt'} --out_dir {tmp_path / 'pictures'}")
    with Image.open(tmp_path / "pictures/photo_segmented.png") as picture:
        assert picture.width > 500


def test_weights_of_the_file_are_those_of_the_model(tmp_path):
    vit = encoder_file(tmp_path / "encoder.pt")
    cfg, weights, classes = segment.fit(config(f"--init {tmp_path / 'encoder.pt'} --num_classes 7 --embed_dim 40"))
    model = segment.make_model(segment.UperNet, cfg, weights, classes, ["a"] * 7)
    assert not classes and cfg.embed_dim == 24
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, vit.state_dict()[name]), name


def test_two_processes_find_the_same_figures_on_an_odd_number_of_images(tmp_path, monkeypatch, capfd):
    data, out = ade(tmp_path / "data", counts=(4, 5)), tmp_path / "out"
    flags = f"{TINY} --data {data} --out_dir {out} --iterations 4 --lr 1e-2 --eval_images 0".split()

    def two(*more):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run([*command, "-m", "transfer.segment", *flags, *more], cwd=ROOT, capture_output=True,
                              text=True, timeout=100, env=os.environ | dict(OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr
        return done.stdout, (out / "per_class.txt").read_text()

    _, trained = two()
    evaluated = two("--eval")
    main(monkeypatch, " ".join([*flags, "--eval"]))
    assert evaluated == (capfd.readouterr().out, trained)
    assert evaluated[1] == (out / "per_class.txt").read_text() and "mIoU" in evaluated[0]


def test_classes_that_occur_nowhere_leave_the_mean_alone(tmp_path):
    class Says2(nn.Module):
        def logits(self, imgs):
            return F.one_hot(torch.full_like(imgs[:, 0], 2).long(), 6).permute(0, 3, 1, 2).float()

    class Halves:
        classes = list("abcdef")

        def __len__(self):
            return 2

        def pair(self, i):
            label = np.full((50, 40), 255, np.uint8)
            label[:20], label[20:30] = 2, 4 * i
            return Image.new("RGB", (40, 50)), label

    figures = segment.evaluation(config(f"--out_dir {tmp_path}"), Halves())(
        Says2(), "cpu", torch.autocast("cpu", enabled=False), lambda epochs: True)
    assert figures == pytest.approx(dict(mIoU=200 / 3 / 3, mAcc=100 / 3, aAcc=200 / 3, val_images=2))  # of classes 0, 2, 4
    lines = (tmp_path / "per_class.txt").read_text().splitlines()
    assert lines[3].split() == ["c", "66.67", "100.00", "1,600", "2,400"] and lines[2].split()[1:3] == ["nan", "nan"]


def test_shapes_train_and_warn_that_nothing_was_loaded(tmp_path, monkeypatch, capsys):
    main(monkeypatch, f"--out_dir {tmp_path} --iterations 2")
    assert "from scratch" in capsys.readouterr().out
    assert common.load(tmp_path / "best.pt")["classes"][:2] == ["ground", "disc"]
    assert segment.LabelledShapes("val", 32).pair(1)[1].max() <= 8


# --- bad input --------------------------------------------------------------------------------------------------------

def break_label(root):
    Image.fromarray(np.full((30, 30), 9, np.uint8)).save(root / "annotations/validation/1.png")
    Image.new("RGB", (30, 30)).save(root / "images/validation/1.png")


def break_size(root):
    Image.fromarray(np.ones((30, 31), np.uint8)).save(root / "annotations/training/2.png")


def break_mode(root):
    with Image.open(root / "images/training/2.png") as image:
        image.save(root / "annotations/training/2.png")


def empty(root):
    for path in (root / "images/training").iterdir():
        path.unlink()


def other_weights(root):
    torch.save(dict(model=dict(x=torch.zeros(3))), root / "other.pt")


def patch_12(root):
    encoder_file(root / "other.pt", patch_size=12, img_size=36)


def unfinished(root):
    torch.save(dict(model=encoder_file(root / "e.pt").state_dict(), config=dict(method="upernet")), root / "other.pt")


@pytest.mark.parametrize("damage, flags, says", [
    (break_label, "", "annotations/validation/1.png has a label 9, above the 4 classes"),
    (break_size, "", "annotations/training/2.png is 31 x 30 pixels, its image"),
    (break_mode, "", "annotations/training/2.png is of PIL mode RGB"),
    (lambda root: (root / "annotations/training/3.png").unlink(), "", "lacks the labels of 1 of 5 images, e.g. 3.png"),
    (empty, "", "images/training holds no images"),
    (None, "--data {root}/images", "images/images/training is missing"),
    (None, "--data nowhere", "nowhere is not a folder"),
    (other_weights, "--init {root}/other.pt", "holds no ViT: patch_embed.proj.weight is missing"),
    (patch_12, "--init {root}/other.pt", "--img_size 32 is not a whole number of patches of 12 pixels"),
    (None, "--img_size 30", "of patches of 8 pixels, two at least; use 24"),
    (None, "--init {root}/none.pt", "none.pt does not exist"),
    (unfinished, "--init {root}/other.pt", "--init takes best.pt"),
    (unfinished, "--eval --init {root}/e.pt", "e.pt is no segmentation model"),
    (None, "--eval --out_dir {root}/new", "new/best.pt does not exist"),
    (None, "--predict {root}/classes.json --init {root}/best.pt", "best.pt does not exist"),
    (None, "--micro_batch 1", "batch norm of one value"),
    (None, "--num_classes 300", "8-bit labels allow for 254"),
    (lambda root: (root / "classes.json").write_text('["a"]'), "", "classes.json is no list of"),
    (None, "--warmup 6", "--warmup 6 must be below --iterations 6"),
    (None, "--scale 2", "--scale takes low and high"),
    (None, "--embed_dim 26", "must be divisible by 4"),
])
def test_bad_input_is_answered_in_one_line(damage, flags, says, tmp_path, monkeypatch, capfd):
    root = ade(tmp_path / "images")
    if damage:
        damage(root)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"--data {root} --out_dir {tmp_path / 'out'} {flags.format(root=root)}")
    assert stop.value.code == 2
    err = capfd.readouterr().err.strip()
    assert says in err and len(err.splitlines()) == 1


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    pixels, exif = np.zeros((8, 12, 3), np.uint8), Image.Exif()
    pixels[:, 0] = 255  # the left column
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise, which brings it to the top
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    img = segment.open_picture(tmp_path / "x.png")
    assert img.shape == (3, 12, 8) and (img[:, 0] == 255).all() and not img[:, 1:].any()


def test_a_file_that_breaks_later_is_named(tmp_path, monkeypatch, capfd):
    root = ade(tmp_path / "data", counts=(8, 3))
    (root / "images/validation/2.png").write_bytes((root / "images/validation/2.png").read_bytes()[:60])
    main(monkeypatch, f"--data {root} --out_dir {tmp_path / 'out'} --iterations 2")
    out, err = capfd.readouterr()
    assert "validation/2.png: OSError" in err and "val_images 2" in out
    for file in (root / "images/validation").iterdir():
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(SystemExit):
        main(monkeypatch, f"--data {root} --eval --init {tmp_path / 'out'}/best.pt --device cpu")
    assert "not one labelled pixel in the 0 validation images" in capfd.readouterr().err


def test_recipes():
    for recipe, lr, decay in (("ddae", 4e-4, 0.65), ("sdae", 4e-4, 0.65), ("deepmim", 1e-4, 0.65),
                              ("deepmim_clip", 5e-5, 0.9)):
        cfg = common.parse(segment.Config, segment.RECIPES, argv=["--recipe", recipe], flag="recipe")
        assert (cfg.lr, cfg.layer_decay, cfg.weight_decay, cfg.batch_size, cfg.iterations, cfg.warmup, cfg.img_size,
                cfg.drop_path) == (lr, decay, 0.05, 16, 160000, 1500, 512, 0.1)
        assert cfg.rel_pos_bias == recipe.startswith("deepmim")
