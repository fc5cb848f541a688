"""UperNet against independent oracles: published counts and logged rates, loops, closed forms, tiny folders."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy.ndimage import map_coordinates

import common
import ddae
import transfer
from transfer import segment

ROOT = Path(__file__).parent.parent
TINY = "--img_size 32 --patch_size 8 --embed_dim 24 --depth 4 --num_heads 2 --channels 8 --batch_size 4 --warmup 1 " \
       "--num_workers 0 --device cpu --iterations 6 --log_every 1 --eval_images 3 --eval_every 99"
BASE = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, num_classes=150)
FP32 = torch.autocast("cpu", enabled=False)


def config(flags=""):
    return common.parse(segment.Config, segment.PRESETS, argv=f"{TINY} --num_classes 5 {flags}".split())


def main(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["segment.py", *TINY.split(), *flags.split()])
    segment.main()


def ade(root, counts=(5, 3)):
    """A folder in ADE20K's layout: pictures of any size, squares of four classes, colored by class -> its path."""
    rng = np.random.default_rng(0)
    for part, n in zip(("training", "validation"), counts):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for i in range(n):
            H, W = rng.integers(24, 60, 2)
            label = np.kron(rng.integers(0, 5, (H // 8 + 1, W // 8 + 1)), np.ones((8, 8), int))[:H, :W]
            Image.fromarray(label.astype(np.uint8)).save(root / "annotations" / part / f"{i}.png")
            rgb = np.stack((label * 50, 255 - label * 50, label % 2 * 200), -1).astype(np.uint8)
            Image.fromarray(rgb).save(root / "images" / part / f"{i}.png")
    (root / "classes.json").write_text(json.dumps([dict(name=f"k{k}") for k in range(4)]))
    return root


def encoder_file(path, img_size, patch_size):
    weights = ddae.ViT(img_size, patch_size, 24, 4, 2).state_dict()
    torch.save(dict(model=weights, config=dict(num_heads=2, method="ddae")), path)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options, total, trunk", [
    (dict(rel_pos_bias=True), 163_877_228, 87_023_424), (dict(), 163_286_828, 86_433_024),
    (dict(rel_pos_bias=True, aux_weight=0.0), 162_068_694, 87_023_424)])
def test_parameter_counts_are_the_published_ones(options, total, trunk):
    with torch.device("meta"):
        model = segment.UperNet(segment.Config(**BASE, **options))
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, model.backbone, model.scales)]
    assert counts == [total, trunk, 7_081_728]


def test_taps_are_the_papers_and_precede_the_final_norm():
    for depth, taps in ((12, [4, 6, 8, 12]), (24, [8, 12, 16, 24]), (4, [1, 2, 3, 4]), (1, [1, 1, 1, 1])):
        assert segment.Backbone(config(f"--depth {depth}")).taps == taps
    vit, backbone, imgs = ddae.ViT(32, 8, 24, 6, 2), segment.Backbone(config("--depth 6")), torch.randn(2, 3, 32, 32)
    transfer.load_backbone(backbone.eval(), vit.state_dict(), "e.pt")
    for tap, found in zip((2, 3, 4, 6), backbone(imgs)):
        assert torch.allclose(found[1, :, 2, 3], vit(imgs)[tap - 1][1, 1 + 2 * 4 + 3], atol=1e-5)  # row 2, column 3


def test_head_is_upernet_written_out():
    torch.manual_seed(0)
    model = segment.UperNet(config()).eval()
    taps = [torch.randn(2, 24, 4, 4) for _ in range(4)]
    a, b, c, d = (scale(tap) for scale, tap in zip(model.scales, taps))
    assert [x.shape[-1] for x in (a, b, c, d)] == [16, 8, 4, 2]
    pools = [F.interpolate(block[1](F.adaptive_avg_pool2d(d, n)), (2, 2), mode="bilinear")
             for n, block in zip((1, 2, 3, 6), model.pools)]
    p4 = model.bottleneck(torch.cat([d, *pools], 1))
    p3 = model.laterals[2](c) + F.interpolate(p4, scale_factor=2, mode="bilinear")
    p2 = model.laterals[1](b) + F.interpolate(p3, scale_factor=2, mode="bilinear")
    p1 = model.laterals[0](a) + F.interpolate(p2, scale_factor=2, mode="bilinear")
    levels = [model.fpn[0](p1), model.fpn[1](p2), model.fpn[2](p3), p4]
    x = torch.cat([F.interpolate(x, (16, 16), mode="bilinear") for x in levels], 1)
    assert torch.allclose(model.head(taps), model.classify[1](model.fuse(x)), atol=1e-5)


def test_bias_and_layer_scale_start_without_effect_and_then_have_one():
    plain, biased = segment.Backbone(config()).eval(), segment.Backbone(config("--rel_pos_bias")).eval()
    missing = biased.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {k.split(".")[-1] for k in missing} == {"rel_pos", "gamma_1", "gamma_2"}
    for shape in ((2, 3, 32, 32), (1, 3, 16, 56)):
        imgs = torch.randn(shape)
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(plain(imgs), biased(imgs)))
    nn.init.normal_(biased.blocks[0].rel_pos, std=2.0)
    assert (plain(imgs)[0] - biased(imgs)[0]).abs().max() > 1e-3


def test_bias_depends_on_the_offset_of_two_patches_alone():
    block = segment.BiasedBlock(8, 2, 0.0, 3)
    block.rel_pos.data = torch.arange(56.0).view(28, 2)
    bias = block.bias(segment.relative_index((3, 3), "cpu"), (3, 3))  # (2, 10, 10)
    for i in range(9):
        for j in range(9):
            row = (i // 3 - j // 3 + 2) * 5 + i % 3 - j % 3 + 2
            assert bias[1, 1 + i, 1 + j] == block.rel_pos[row, 1]
    assert (bias[0, 0, 1:] == block.rel_pos[25, 0]).all() and (bias[0, 1:, 0] == block.rel_pos[26, 0]).all()
    assert bias[0, 0, 0] == block.rel_pos[27, 0]


def test_loss_of_a_guess_counts_unlabeled_pixels_and_gradients_reach_everything():
    torch.manual_seed(0)
    model = segment.UperNet(config("--num_classes 50 --rel_pos_bias"))
    labels = torch.randint(50, (4, 32, 32), dtype=torch.uint8)
    labels[:, :8] = 255  # a quarter
    loss, metrics = model(torch.randn(4, 3, 32, 32), labels)
    assert metrics["ce/main"].item() == pytest.approx(math.log(50) * 0.75, rel=0.05)
    assert loss.item() == pytest.approx((metrics["ce/main"] + 0.4 * metrics["ce/aux"]).item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    logits = torch.randn(1, 50, 32, 32)
    slow = sum(-logits[0, :, y, x].log_softmax(0)[labels[0, y, x].item()] for y in range(8, 32) for x in range(32))
    assert model.cross_entropy(logits, labels[:1].long()).item() == pytest.approx(slow.item() / 32 ** 2, rel=1e-4)


def test_learning_rate_is_what_a_published_run_logged():
    cfg = segment.Config(**BASE, lr=5e-5, layer_decay=0.9)
    with torch.device("meta"):
        groups = segment.make_optimizer(segment.UperNet(cfg), cfg).param_groups
    logged = {50: "4.151e-07", 100: "8.383e-07", 1000: "8.412e-06", 1500: "1.258e-05", 1550: "1.259e-05",
              12500: "1.172e-05", 150450: "7.587e-07"}  # of group 0, after so many iterations
    for iteration, value in logged.items():
        assert f"{groups[0]['lr_scale'] * segment.learning_rate(iteration - 1, 1263, cfg):.3e}" == value


def test_parameter_groups():
    cfg = config("--depth 12 --rel_pos_bias")
    model = segment.UperNet(cfg)
    groups = segment.make_optimizer(model, cfg).param_groups
    where = {p: (round(math.log(g["lr_scale"], 0.65)), g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(groups) == 28 and len(where) == len(list(model.parameters()))
    for name, expected in {"backbone.pos_embed": (13, 0.05), "backbone.cls_token": (13, 0.05),
                           "backbone.patch_embed.proj.bias": (13, 0.0), "backbone.blocks.0.attn.qkv.weight": (12, 0.05),
                           "backbone.blocks.11.rel_pos": (1, 0.05), "backbone.blocks.11.gamma_1": (1, 0.0),
                           "scales.1.weight": (0, 0.05), "classify.1.bias": (0, 0.0)}.items():
        assert where[model.get_parameter(name)] == expected, name


def test_layout_maps_0_to_unlabeled_and_k_to_k_minus_1(tmp_path):
    root, raw = ade(tmp_path), np.array([0, 1, 2, 3, 4, 255], np.uint8).repeat(40).reshape(12, 20)
    Image.fromarray(raw).save(root / "annotations/training/0.png")
    Image.new("RGB", (20, 12)).save(root / "images/training/0.png")
    source = segment.Ade(root, "train", 0)
    assert source[0][1][::2, ::20].flatten().tolist() == [255, 0, 1, 2, 3, 255] and len(source) == 5
    assert source.classes == ["k0", "k1", "k2", "k3"] and len(segment.Ade(root, "val", 150).classes) == 150
    assert segment.LabeledShapes("val", 32)[1][1].unique()[0] == 0 and len(segment.LabeledShapes.classes) == 9


def test_samples_depend_on_their_key_alone_and_labels_stay_on_their_pixels(tmp_path):
    samples = segment.Crops(segment.Ade(ade(tmp_path), "train", 0), config("--no-distort"))
    colors, right = np.array([[(k + 1) * 50, 205 - k * 50, (k + 1) % 2 * 200] for k in range(4)]), []
    for key in ((epoch, epoch % 5) for epoch in range(20)):
        ((img, label), _), ((again, same), _) = samples[key], samples[key]
        assert torch.equal(img, again) and torch.equal(label, same) and img.shape[1:] == label.shape == (32, 32)
        known, pixels = label != 255, img.permute(1, 2, 0).numpy().astype(int)
        nearest = abs(pixels[known][:, None] - colors).sum(-1).argmin(-1)
        right.extend(nearest == label[known].numpy())
    assert np.mean(right) > 0.85  # bilinear pixels at the borders of squares have no class's color


def test_rescale_is_bilinear_and_nearest_without_antialiasing():
    img, label = torch.randint(0, 256, (1, 20, 30)).float(), torch.randint(0, 5, (1, 20, 30), dtype=torch.uint8)
    small, shrunk = segment.rescale(img, 8, 99), segment.rescale(label, 8, 99, segment.InterpolationMode.NEAREST)
    assert small.shape == shrunk.shape == (1, 8, 12) and segment.rescale(img, 40, 45).shape == (1, 30, 45)
    assert torch.equal(shrunk[0], label[0, [int(2.5 * y) for y in range(8)]][:, [int(2.5 * x) for x in range(12)]])
    at = [(np.arange(n) + 0.5) * 2.5 - 0.5 for n in (8, 12)]
    assert np.allclose(small[0], map_coordinates(img[0].numpy(), np.meshgrid(*at, indexing="ij"), order=1), atol=1e-2)


def test_padding_is_right_and_below_with_the_mean_color():
    label = torch.arange(64, dtype=torch.uint8).div(16, rounding_mode="floor").expand(64, 64)
    item = torch.tensor([250, 5, 5], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 64), label
    img, label = segment.Crops(None, config("--scale 0.5 0.5 --no-distort")).sample(item, np.random.default_rng(0))
    assert (label[:16, :16] != 255).all() and (label[16:] == 255).all() and (label[:, 16:] == 255).all()
    assert (img[0, :16, :16] == 250).all() and common.to_device(img, label, "cpu")[0][:, 20:].abs().max() < 0.01


def test_crops_are_drawn_again_while_one_class_rules():
    label = torch.zeros(128, 128, dtype=torch.uint8)
    label[:, 104:] = 1  # of the 97 places in a row, 15 have less than three quarters of one class
    label[:60] = 255  # unlabeled pixels do not matter
    samples, img, mixed = segment.Crops(None, config("--scale 4 4 --no-distort")), torch.zeros(3, 128, 128).byte(), []
    for i in range(200):
        crop = samples.sample((img, label), np.random.default_rng(i))[1]
        mixed.append(np.bincount(crop[crop < 255], minlength=2).max(initial=0) < 0.75 * (crop < 255).sum())
    p = 15 / 97 * 68 / 97  # 29 of 97 windows lie above row 60 and have no label at all
    assert np.mean(mixed) == pytest.approx(1 - (1 - p) ** 11, abs=0.08)


def test_saturation_is_that_of_hsv():
    rgb = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8)
    for factor in (0.5, 0.8, 1.5):
        rng = SimpleNamespace(random=iter((1, 1, 0, 1, 1)).__next__, uniform=lambda low, high: factor)  # nothing else
        hsv = rgb_to_hsv(rgb.numpy() / 255)
        hsv[..., 1] = (factor * hsv[..., 1]).clip(max=1)
        found = segment.distort(rgb.permute(2, 0, 1), rng).permute(1, 2, 0)
        assert abs(found.numpy() - 255 * hsv_to_rgb(hsv)).max() <= 1.01


def test_metrics_equal_sets_of_pixels_and_leave_out_absent_classes():
    rng, K = np.random.default_rng(0), 6
    label = rng.integers(0, 4, 300)  # classes 4 and 5 are never labeled, 4 is predicted
    label[rng.random(300) < 0.2] = 255
    prediction = rng.integers(0, 5, 300)
    iou, acc = segment.class_metrics(segment.confusion_matrix(*map(torch.from_numpy, (prediction, label)), K))
    for k in range(K):
        found, true = ({i for i in range(300) if x[i] == k and label[i] != 255} for x in (prediction, label))
        for metric, all_pixels in ((iou[k], found | true), (acc[k], true)):
            expected = 100 * len(found & true) / len(all_pixels) if all_pixels else math.nan
            assert metric.item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("size, windows", [((32, 32), 1), ((40, 71), 2 * 3), ((20, 90), 4), ((7, 5), 1)])
def test_slide_equals_the_whole_image_for_a_1x1_convolution(size, windows):
    net, img, seen = nn.Conv2d(3, 5, 1), torch.randn(3, *size), []
    with torch.no_grad():
        found = segment.slide(lambda x: seen.append(x.shape) or net(x), img, 32, 21)
        assert found.shape == (5, *size) and torch.allclose(found, net(img[None])[0], atol=1e-5)
    assert seen == [(1, 3, 32, 32)] * windows
    model = segment.UperNet(config("--rel_pos_bias")).eval()
    logits = segment.segment(model, img.byte(), config(), torch.device("cpu"), FP32)
    factor = min(32 / min(size), 128 / max(size))
    assert logits.shape == (5, *(int(x * factor + 0.5) for x in size)) and logits.isfinite().all()


def test_evaluation_counts_at_the_size_of_labels_and_ends_on_nan(tmp_path):
    cfg, source, logit = config(f"--out_dir {tmp_path}"), segment.Ade(ade(tmp_path), "val", 0), torch.zeros(4)
    model = SimpleNamespace(logits=lambda imgs: logit.view(1, 4, 1, 1).expand(1, 4, 32, 32))
    logit[2] = 1  # it says class 2 everywhere
    metrics = segment.evaluate(model, cfg, torch.device("cpu"), FP32, source)
    n = np.bincount(np.concatenate([label.flatten() for _, label in source]), minlength=256)[:4]
    accuracy = 100 * n[2] / n.sum()
    assert metrics == pytest.approx(dict(mIoU=accuracy / 4, mAcc=25, aAcc=accuracy, val_images=3))
    row = (tmp_path / "per_class.txt").read_text().splitlines()[3].split()
    assert row == ["k2", f"{accuracy:.2f}", "100.00", f"{n[2]:,}", f"{n.sum():,}"]
    logit[3] = math.nan
    with pytest.raises(SystemExit, match="not finite"):
        segment.evaluate(model, cfg, torch.device("cpu"), FP32, source)


def test_resumes_bitwise_without_the_init_file_and_then_evaluates_and_predicts(tmp_path, monkeypatch, capsys):
    data, encoder, photo = ade(tmp_path / "data", counts=(9, 3)), tmp_path / "encoder.pt", tmp_path / "photo.jpg"
    encoder_file(encoder, img_size=16, patch_size=8)
    flags = f"--data {data} --init {encoder} --rel_pos_bias --clip_grad 1"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(monkeypatch, f"{flags} --out_dir {whole}")
    assert "4 -> 16 patches; not used: norm.weight, norm.bias" in capsys.readouterr().out
    main(monkeypatch, f"{flags} --out_dir {cut} --max_steps 3 --eval_images 2")
    encoder.unlink()
    main(monkeypatch, f"{flags} --out_dir {cut}")
    one, two = common.load(whole / "last.pt"), common.load(cut / "last.pt")
    assert one["step"] == two["step"] == 6 and all(torch.equal(v, two["model"][k]) for k, v in one["model"].items())
    assert log(whole)[-1] == log(cut)[-1] and "mIoU" in log(cut)[-1]
    capsys.readouterr()
    main(monkeypatch, f"--data {data} --out_dir {whole} --eval")
    assert f"mIoU {log(whole)[-1]['mIoU']:.6g}" in capsys.readouterr().out
    Image.new("RGB", (70, 45), (200, 30, 30)).save(photo)
    main(monkeypatch, f"--predict {photo} --init {whole / 'model.pt'}")
    with Image.open(whole / "photo_segmented.png") as picture:
        assert picture.width > 500
    (data / "classes.json").write_text(json.dumps([dict(name=f"k{k}") for k in (1, 0, 2, 3)]))
    for refused in (f"--out_dir {cut} {flags} --max_steps 9", f"--eval --data {data} --init {cut}/model.pt"):
        with pytest.raises(SystemExit, match="trained on other classes .* k0, now k1; k1, now k0"):
            main(monkeypatch, refused)


def test_two_processes_evaluate_like_one_on_an_odd_number_of_images(tmp_path, monkeypatch, capfd):
    data, out = ade(tmp_path / "data", counts=(4, 5)), tmp_path / "out"
    flags = f"--data {data} --out_dir {out} --iterations 4 --lr 1e-2 --eval_images 0".split()

    def two(*more):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run([*command, "-m", "transfer.segment", *TINY.split(), *flags, *more], cwd=ROOT, check=True,
                              stdout=subprocess.PIPE, text=True, timeout=99, env=os.environ | dict(OMP_NUM_THREADS="1"))
        return done.stdout, (out / "per_class.txt").read_text()

    _, trained = two()
    evaluated = two("--eval")
    main(monkeypatch, " ".join([*flags, "--eval"]))
    assert evaluated == (capfd.readouterr().out, trained) and trained == (out / "per_class.txt").read_text()


def test_broken_files_are_skipped_counted_and_limited(tmp_path, monkeypatch, capsys):
    root, out = ade(tmp_path / "data", counts=(12, 3)), tmp_path / "out"
    images, labels = root / "images/training", root / "annotations/training"
    (images / "0.png").write_bytes(b"no image")
    Image.new("1", (15_000, 15_000)).save(images / "1.png")
    with Image.open(images / "2.png") as image:
        Image.new("L", image.size, 9).save(labels / "2.png")
    (labels / "3.png").unlink()
    Image.new("L", (5, 5)).save(root / "annotations/validation/1.png")
    main(monkeypatch, f"--data {root} --out_dir {out} --max_bad 0.5")
    said = capsys.readouterr().out
    for reason in ("training/0.png: Unidentified", "training/1.png: DecompressionBomb", "training/2.png has label 9",
                   "training/3.png: FileNotFoundError", "validation/1.png has mode L and size (5, 5)"):
        assert reason in said
    assert log(out)[-2]["unreadable"] == 4 and log(out)[-1]["val_images"] == 2
    with pytest.raises(SystemExit, match="1 of 3 images are unreadable, more than --max_bad"):
        main(monkeypatch, f"--data {root} --out_dir {out} --eval")


@pytest.mark.parametrize("flags, says", [
    ("--data nowhere", "nowhere must hold the folders images/validation and annotations/validation"),
    ("--img_size 30", "--img_size 30 must be two or more whole patches of 8 pixels"),
    ("--warmup 6", "--warmup 6 must be below --iterations 6"),
    ("--micro_batch 1", "--micro_batch must be 2 or more"),
    ("--init {tmp}/other.pt", "--init {tmp}/other.pt: --img_size 32 must be two or more whole patches of 12 pixels"),
    ("--eval --init {tmp}/other.pt", "other.pt is no upernet model"),
    ("--eval --out_dir {tmp}/new", "new/model.pt is missing"),
])
def test_bad_input_is_answered_in_one_line(flags, says, tmp_path, monkeypatch, capfd):
    encoder_file(tmp_path / "other.pt", patch_size=12, img_size=36)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"--data {ade(tmp_path / 'data')} --out_dir {tmp_path / 'out'} {flags.format(tmp=tmp_path)}")
    assert says.format(tmp=tmp_path) in (capfd.readouterr().err if stop.value.code == 2 else stop.value.code)
