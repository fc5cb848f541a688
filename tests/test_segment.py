"""UperNet against independent oracles: published counts and logged rates, loops, closed forms, tiny folders."""
import functools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import ROOT, Run, differences, log
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy.ndimage import map_coordinates

import common
import ddae
import transfer
from transfer import segment

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


def test_parameter_counts_are_the_published_ones():
    for options, total, trunk in ((dict(), 163_877_228, 87_023_424), (dict(aux_weight=0), 162_068_694, 87_023_424),
                                  (dict(rel_pos_bias=False), 163_286_828, 86_433_024)):
        with torch.device("meta"):
            model = segment.UperNet(segment.Config(**BASE, **options))
        counts = [sum(p.numel() for p in m.parameters()) for m in (model, model.backbone, model.scales)]
        assert counts == [total, trunk, 7_081_728]


def test_recipes_train_relative_position_bias_and_all_but_cae_the_position_table():
    frozen = []
    for preset in segment.PRESETS:
        cfg = common.parse(segment.Config, segment.PRESETS, argv=f"{TINY} --preset {preset}".split())
        fixed = [k for k, p in segment.Backbone(cfg).named_parameters() if not p.requires_grad]
        frozen += [(preset, *fixed)] if fixed or not cfg.rel_pos_bias else []
    assert frozen == [("sdae", "pos_embed"), ("sdae_large", "pos_embed")]


def test_taps_are_the_papers_and_precede_the_final_norm():
    for depth, taps in ((12, [4, 6, 8, 12]), (24, [8, 12, 16, 24]), (4, [1, 2, 3, 4]), (1, [1, 1, 1, 1])):
        assert segment.Backbone(config(f"--depth {depth}")).taps == taps
    vit, backbone, imgs = ddae.ViT(32, 8, 24, 6, 2), segment.Backbone(config("--depth 6")), torch.randn(2, 3, 32, 32)
    transfer.load_backbone(backbone.eval(), vit.state_dict(), "e.pt")
    for tap, found in zip((2, 3, 4, 6), backbone(imgs)):
        assert torch.allclose(found[1, :, 2, 3], vit(imgs)[tap - 1][1, 1 + 2 * 4 + 3], atol=1e-5)  # row 2, column 3


def test_head_is_upernet_written_out():
    up = functools.partial(F.interpolate, mode="bilinear")
    model, taps = segment.UperNet(config()).eval(), torch.randn(4, 2, 24, 4, 4)
    a, b, c, d = (scale(tap) for scale, tap in zip(model.scales, taps))  # sides 16, 8, 4, 2
    pools = [up(block[1](F.adaptive_avg_pool2d(d, n)), 2) for n, block in zip((1, 2, 3, 6), model.pools)]
    p4 = model.bottleneck(torch.cat([d, *pools], 1))
    p3 = model.laterals[2](c) + up(p4, 4)
    p2 = model.laterals[1](b) + up(p3, 8)
    p1 = model.laterals[0](a) + up(p2, 16)
    x = torch.cat([model.fpn[0](p1), up(model.fpn[1](p2), 16), up(model.fpn[2](p3), 16), up(p4, 16)], 1)
    assert torch.allclose(model.head(taps), model.classify[1](model.fuse(x)), atol=1e-5)


def test_bias_and_layer_scale_start_without_effect_and_depend_on_the_offset_of_two_patches_alone():
    plain, biased = segment.Backbone(config("--no-rel_pos_bias")).eval(), segment.Backbone(config()).eval()
    missing, unexpected = biased.load_state_dict(plain.state_dict(), strict=False)
    assert {k.split(".")[-1] for k in missing} == {"rel_pos", "gamma_1", "gamma_2"} and not unexpected
    for imgs in (torch.randn(2, 3, 32, 32), torch.randn(1, 3, 16, 56)):
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(plain(imgs), biased(imgs)))
    nn.init.normal_(biased.blocks[0].rel_pos, std=2.0)
    assert (plain(imgs)[0] - biased(imgs)[0]).abs().max() > 1e-3
    block = segment.BiasedBlock(8, 2, 0.0, 3)
    block.rel_pos.data = torch.arange(56.0).view(28, 2)
    bias = block.bias(segment.relative_index((3, 3), "cpu"), (3, 3))  # (2, 10, 10)
    for i, j in np.ndindex(9, 9):
        assert bias[1, 1 + i, 1 + j] == 1 + 2 * ((i // 3 - j // 3 + 2) * 5 + i % 3 - j % 3 + 2)
    assert (bias[0, 0, 1:] == 50).all() and (bias[0, 1:, 0] == 52).all() and bias[0, 0, 0] == 54


def test_loss_of_a_guess_counts_unlabeled_pixels_and_gradients_reach_everything():
    torch.manual_seed(0)
    model = segment.UperNet(config("--num_classes 50"))
    labels = torch.randint(50, (4, 32, 32), dtype=torch.uint8)
    labels[:, :8] = 255  # a quarter
    loss, metrics = model(torch.randn(4, 3, 32, 32), labels)
    assert metrics["ce/main"].item() == pytest.approx(math.log(50) * 0.75, rel=0.05)
    assert loss.item() == pytest.approx((metrics["ce/main"] + 0.4 * metrics["ce/aux"]).item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    logits, labels = torch.randn(1, 50, 32, 32), labels[:1].long()
    slow = sum(-logits[0, :, y, x].log_softmax(0)[labels[0, y, x]] for y in range(8, 32) for x in range(32)) / 32 ** 2
    assert model.cross_entropy(logits, labels).item() == pytest.approx(slow.item(), rel=1e-4)


def test_learning_rate_is_what_a_published_run_logged_and_only_vectors_are_not_decayed():
    cfg = segment.Config(**BASE, lr=5e-5, layer_decay=0.9)
    with torch.device("meta"):
        model = segment.UperNet(cfg)
    groups = segment.make_optimizer(model, cfg).param_groups
    for iteration, value in {50: "4.151e-07", 100: "8.383e-07", 1000: "8.412e-06", 1500: "1.258e-05", 1550: "1.259e-05",
                             12500: "1.172e-05", 150450: "7.587e-07"}.items():  # logged of group 0
        assert f"{groups[0]['lr_scale'] * segment.learning_rate(iteration - 1, 1263, cfg):.3e}" == value
    where = {p: (round(math.log(g["lr_scale"], 0.9)), g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(groups) == 28 and len(where) == len(list(model.parameters()))
    for name, expected in {"backbone.pos_embed": (13, 0.05), "backbone.cls_token": (13, 0.05), "fuse.1.bias": (0, 0.0),
                           "backbone.patch_embed.proj.bias": (13, 0.0), "backbone.blocks.0.attn.qkv.weight": (12, 0.05),
                           "backbone.blocks.11.rel_pos": (1, 0.05), "scales.1.weight": (0, 0.05)}.items():
        assert where[model.get_parameter(name)] == expected, name


def test_layout_maps_0_to_unlabeled_and_k_to_k_minus_1(tmp_path):
    root, raw = ade(tmp_path), np.array([0, 1, 2, 3, 4, 255], np.uint8).repeat(40).reshape(12, 20)
    Image.fromarray(raw).save(root / "annotations/training/0.png")
    Image.new("RGB", (20, 12)).save(root / "images/training/0.png")
    source = segment.Ade(root, "train", 0)
    assert source[0][1][::2, ::20].flatten().tolist() == [255, 0, 1, 2, 3, 255] and len(source) == 5
    assert source.classes == ["k0", "k1", "k2", "k3"] and len(segment.Ade(root, "val", 150).classes) == 150
    with pytest.raises(SystemExit, match="0.png has label 4, but 4 classes from 0 end at 3"):
        segment.Ade(root, "train", 0, 0)[0]
    assert segment.Ade(root, "train", 5, 0)[0][1][::2, ::20].flatten().tolist() == [0, 1, 2, 3, 4, 255]


def test_shares_of_labels_are_printed(tmp_path, capsys):
    root = ade(tmp_path)
    segment.open_pairs(config(f"--data {root} --ignore_label 4"), "train")
    n = sum(np.bincount(np.array(Image.open(p)).ravel()) for p in (root / "annotations/training").iterdir())
    a, b, c, d, e = n / n.sum()
    says = f"3 of 5 classes in 5 of 5 files: 1 k0 {b:.1%}, 2 k1 {c:.1%}, 3 k2 {d:.1%}; unlabeled (0, 4) {a + e:.1%}"
    assert f"{root}/annotations/training: {says}\n" == capsys.readouterr().out


def test_samples_depend_on_their_key_alone_and_are_padded_with_gray_right_and_below(tmp_path):
    samples = segment.Crops(segment.Ade(ade(tmp_path), "train", 0), config("--no-distort"))
    gray, right, padded = torch.tensor([round(255 * m) for m in common.MEAN]), [], []
    colors = torch.tensor([[k * 50, 255 - k * 50, k % 2 * 200] for k in (1, 2, 3, 4, 0)] + [gray.tolist()])
    for epoch in range(20):
        ((img, label), _), ((again, same), _) = (samples[epoch, epoch % 5] for _ in "ab")
        assert torch.equal(img, again) and torch.equal(label, same) and img.shape[1:] == label.shape == (32, 32)
        nearest = abs(img.permute(1, 2, 0)[:, :, None].int() - colors).sum(-1).argmin(-1)
        right.append((nearest == label) | (nearest > 3) & (label == 255))
        padded.append((img == gray[:, None, None]).all(0))
        of_row, of_column = padded[-1][0], padded[-1][:, 0]
        assert torch.equal(padded[-1], of_row | of_column[:, None]) and (label[padded[-1]] == 255).all()
        assert all(torch.equal(x, x.sort()[0]) for x in (of_row, of_column))
    assert torch.stack(padded).any() and torch.stack(right).float().mean() > 0.85  # borders of squares are blends


def test_rescale_is_bilinear_and_nearest_without_antialiasing():
    img, label = torch.randint(0, 256, (1, 20, 30)).float(), torch.randint(0, 5, (1, 20, 30), dtype=torch.uint8)
    small, shrunk = segment.rescale(img, 8, 99), segment.rescale(label, 8, 99, segment.InterpolationMode.NEAREST)
    assert torch.equal(shrunk[0], label[0, [int(2.5 * y) for y in range(8)]][:, [int(2.5 * x) for x in range(12)]])
    assert segment.rescale(img, 40, 45).shape == (1, 30, 45)
    at = [(np.arange(n) + 0.5) * 2.5 - 0.5 for n in (8, 12)]
    assert np.allclose(small[0], map_coordinates(img[0].numpy(), np.meshgrid(*at, indexing="ij"), order=1), atol=1e-2)


def test_crops_are_drawn_again_while_one_class_rules():
    label = torch.zeros(128, 128, dtype=torch.uint8)
    label[:, 104:] = 1  # of the 97 places in a row, 15 have less than three quarters of one class
    label[:60] = 255  # unlabeled pixels do not matter
    samples, item = segment.Crops(None, config("--scale 4 4 --no-distort")), (torch.zeros(3, 128, 128).byte(), label)
    crops = [samples.sample(item, np.random.default_rng(i))[1] for i in range(200)]
    mixed = [max((crop == 0).sum(), (crop == 1).sum()) < 0.75 * (crop < 255).sum() for crop in crops]
    p = 15 / 97 * 68 / 97  # 29 of 97 windows lie above row 60 and have no label at all
    assert np.mean(mixed) == pytest.approx(1 - (1 - p) ** 11, abs=0.08)


def test_saturation_is_that_of_hsv():
    rgb = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8)
    for factor in (0.5, 0.8, 1.5):
        rng = SimpleNamespace(random=iter((1, 1, 0, 1, 1)).__next__, uniform=lambda low, high: factor)  # nothing else
        hsv = np.minimum(rgb_to_hsv(rgb.numpy() / 255) * (1, factor, 1), 1)
        found = segment.distort(rgb.permute(2, 0, 1), rng).permute(1, 2, 0)
        assert abs(found.numpy() - 255 * hsv_to_rgb(hsv)).max() <= 1.01


def test_metrics_equal_sets_of_pixels_and_leave_out_absent_classes():
    rng, K = np.random.default_rng(0), 6
    prediction = rng.integers(0, 5, 300)
    label = np.where(rng.random(300) < 0.2, 255, rng.integers(0, 4, 300))  # never 4, which is predicted, or 5
    iou, acc = segment.class_metrics(segment.confusion_matrix(*map(torch.from_numpy, (prediction, label)), K))
    for k in range(K):
        found, true = ({i for i in range(300) if x[i] == k and label[i] != 255} for x in (prediction, label))
        want = [100 * len(found & true) / len(pixels) if pixels else math.nan for pixels in (found | true, true)]
        assert [iou[k].item(), acc[k].item()] == pytest.approx(want, nan_ok=True)


@torch.no_grad()
def test_slide_equals_the_whole_image_for_a_1x1_convolution():
    for size, windows in (((32, 32), 1), ((40, 71), 2 * 3), ((20, 90), 4), ((7, 5), 1)):
        net, img, seen = nn.Conv2d(3, 5, 1), torch.randn(3, *size), []
        found = segment.slide(lambda x: seen.append(x.shape) or net(x), img, 32, 21)
        assert found.shape == (5, *size) and torch.allclose(found, net(img[None])[0], atol=1e-5)
        assert seen == [(1, 3, 32, 32)] * windows  # one shape, whatever the image's: kernels are planned once


def test_evaluation_counts_at_the_size_of_labels_of_a_spread_and_ends_on_nan(tmp_path, monkeypatch):
    cfg, source, logit = config(f"--out_dir {tmp_path}"), segment.Ade(ade(tmp_path), "val", 0), torch.zeros(4)
    model = SimpleNamespace(logits=lambda imgs: logit.view(1, 4, 1, 1).expand(1, 4, 32, 32))
    logit[2] = 1  # it says class 2 everywhere
    metrics = segment.evaluate(model, cfg, torch.device("cpu"), FP32, source)
    n = np.bincount(np.concatenate([label.flatten() for _, label in source]), minlength=256)[:4]
    accuracy = 100 * n[2] / n.sum()
    assert metrics == pytest.approx(dict(mIoU=accuracy / 4, mAcc=25, aAcc=accuracy, val_images=3))
    row = ["k2", f"{accuracy:.2f}", "100.00", f"{n[2]:,}", f"{n.sum():,}"]
    assert (tmp_path / "per_class.txt").read_text().splitlines()[3].split() == row
    logit[3] = math.nan
    with pytest.raises(SystemExit, match="not finite"):
        segment.evaluate(model, cfg, torch.device("cpu"), FP32, source)
    monkeypatch.setattr(segment, "read_each", lambda read, source, ids, *_, **more: seen.extend(ids) or [])
    source.samples, seen = source.samples * 30, []
    segment.evaluate(model, cfg, torch.device("cpu"), FP32, source)
    assert len(seen) == 3 and max(seen) > 9


def test_resumes_bitwise_without_the_init_file_and_then_evaluates_and_predicts(tmp_path, monkeypatch, capsys):
    data, encoder, photo = ade(tmp_path / "data", counts=(9, 3)), tmp_path / "encoder.pt", tmp_path / "photo.jpg"
    torch.save(ddae.ViT(16, 8, 24, 4, 1).state_dict(), encoder)
    flags, whole, cut, new = f"--data {data} --init {encoder} --clip_grad 1", *(tmp_path / x for x in "wcn")
    main(monkeypatch, f"{flags} --out_dir {whole}")
    assert "4 -> 16 patches; not used: norm.weight, norm.bias" in capsys.readouterr().out
    main(monkeypatch, f"{flags} --out_dir {cut} --max_steps 3 --eval_every 0")
    encoder.unlink()
    main(monkeypatch, f"{flags} --out_dir {cut}")
    assert not differences(whole, cut)
    Image.new("RGB", (70, 45), (200, 30, 30)).save(photo)
    table, before = (whole / "per_class.txt").read_text(), {*whole.iterdir()}
    for out, more in ((whole, f"--init {whole}/model.pt"), (new, f"--init {whole}/model.pt --out_dir {new}")):
        Run(f"{TINY} --data {data} --eval {more}", 2, path=ROOT / "transfer/segment.py").wait()
        main(monkeypatch, f"--predict {photo} {more}")
        assert {p.name for p in {*out.iterdir()} - before} == {"eval_per_class.txt", "predicted"}
        assert (out / "eval_per_class.txt").read_text() == table == (whole / "per_class.txt").read_text()
    main(monkeypatch, f"--predict {data}/images/validation --out_dir {whole}")
    found, true = (torch.cat([torchvision.io.decode_image(f"{path}/{i}.png").flatten() for i in range(3)])
                   for path in (whole / "predicted", data / "annotations/validation"))
    assert 100 * (found == true)[true > 0].double().mean() == pytest.approx(log(whole)[-1]["aAcc"], rel=1e-5)
    (data / "classes.json").write_text(json.dumps([dict(name=f"k{k}") for k in (1, 0, 2, 3)]))
    with pytest.raises(SystemExit, match="trained on other classes .* k0, now k1; k1, now k0"):
        main(monkeypatch, f"--eval --data {data} --out_dir {cut}")


def test_broken_files_are_skipped_counted_and_limited(tmp_path, monkeypatch, capsys):
    root, out = ade(tmp_path / "data", counts=(12, 3)), tmp_path / "out"
    (root / "images/training/0.png").write_bytes(b"no image")
    (root / "annotations/training/1.png").unlink()
    Image.new("L", (5, 5)).save(root / "annotations/validation/1.png")
    main(monkeypatch, f"--data {root} --out_dir {out} --max_bad 0.5")
    said = capsys.readouterr().out
    assert "training/0.png: Unidentified" in said and "training/1.png: FileNotFoundError" in said
    assert "validation/1.png has mode L and size (5, 5)" in said
    assert log(out)[-2]["unreadable"] == 2 and log(out)[-1]["val_images"] == 2
    with pytest.raises(SystemExit, match="1 of 3 images are unreadable, more than --max_bad"):
        main(monkeypatch, f"--data {root} --out_dir {out} --eval")


def test_bad_input_is_answered_in_one_line(tmp_path, monkeypatch):
    torch.save(ddae.ViT(36, 12, 24, 4, 1).state_dict(), tmp_path / "e.pt")
    (ade(tmp_path) / "classes.json").unlink()
    for more, says in (("", "--img_size 32 must be two or more whole patches"), ("--eval", "is no upernet model"),
                       (f"--img_size 48 --data {tmp_path}", "no classes.json")):
        with pytest.raises(SystemExit, match=says):
            main(monkeypatch, f"--init {tmp_path}/e.pt {more}")
