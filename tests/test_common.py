"""Flags, data, schedule, and optimizer of common.py, and what the README says of all scripts."""
import itertools
import re
import shutil
import sys
from dataclasses import dataclass, make_dataclass
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, TINY
from PIL import Image
from torchvision.transforms import v2

import beit2
import common
import ddae
import deepmim
import finetune
import sdae
from shapes import Shapes
from transfer import detect, robustness, segment

SCRIPTS = [ddae, deepmim, sdae, beit2, finetune, robustness, segment, detect]


def config(flags=""):
    return common.parse(ddae.Config, ddae.PRESETS, argv=f"{TINY} --depth 2 --K 2 --warmup_epochs 1 {flags}".split())


# --- flags ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--epoch 3", "unknown --epoch; did you mean --epochs?"), ("--epochs ten", "invalid int value: 'ten'"),
    ("--epochs 0", "--epochs must be finite and at least 1, got 0"), ("--base_lr nan", "--base_lr must be finite"),
    ("--epochs 1", "must be below --epochs"), ("--data=", "--data is empty"), ("--zzz 1", "unknown --zzz")])
def test_wrong_flags_get_a_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        config(flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_presets_combine():
    cfg = common.parse(ddae.Config, ddae.PRESETS, argv="--preset mae quick --epochs 5".split())
    assert (cfg.pixel, cfg.mask, cfg.decoder_depth, cfg.img_size, cfg.epochs) == ("plain", "random", 1, 32, 5)


def test_a_config_field_without_a_comment_is_named():
    @dataclass(frozen=True)
    class NoComment(common.RunConfig):
        speed: float = 1.0

    with pytest.raises(SystemExit, match=r"Config\.speed "):
        common.parse(NoComment, {}, argv=[])


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda m: m.__name__)
def test_help_explains_every_flag_with_its_source(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name in module.Config.__dataclass_fields__:
        assert re.search(rf"--{name}\b[^\[]*(\[[A-Z_]+ \.\.\.\] )?\[\w[^\]]*\]", text), name


def test_readme_names_files_and_flags_that_exist():
    text = "".join((ROOT / name).read_text() for name in ("README.md", "results/README.md"))
    for module in SCRIPTS:
        for command in re.findall(rf"(?:{module.__name__}\.py|-m {module.__name__}) ([^\n`|]*)", text):
            for flag in re.findall(r"--([a-zA-Z_]+)", command.split(" && ")[0]):
                assert flag.removeprefix("no-") in {*module.Config.__dataclass_fields__, "preset", "help"}, flag
    for name in re.findall(r"\]\(([\w./]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), name


# --- data -------------------------------------------------------------------------------------------------------------

def test_folders(images, tmp_path):
    folder = shutil.copytree(images / "train", tmp_path / "images")
    for junk in (folder / ".thumbs" / "x.jpg", folder / "a" / "._0.jpg", folder / "a" / "notes.txt"):
        junk.parent.mkdir(exist_ok=True)
        junk.write_bytes(b"x")
    source = common.open_data(config(f"--data {folder}"), "train")
    assert len(source) == 64 and source.classes == ["a", "b"]
    assert all(path.split("/")[-2] == "ab"[label] for path, label in source.samples)
    (tmp_path / "empty").mkdir()
    for split, data in (("train", tmp_path / "empty"), ("train", tmp_path / "nowhere"), ("val", folder)):
        with pytest.raises(SystemExit, match=re.escape(str(data))):
            common.open_data(config(f"--data {data}"), split)


def test_torchvision_sets_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_flag = make_dataclass("ByFlag", ["root", "train", ("download", bool, False)])
    by_split = make_dataclass("BySplit", ["root", "split"])
    for name, make, values in (("FLAG", by_flag, [True, False]), ("SPLIT", by_split, ["train", "test"]),
                               ("ImageNet", by_split, ["train", "val"])):
        monkeypatch.setattr(torchvision.datasets, name, make, raising=False)
        opened = [vars(common.open_data(config(f"--data {name}"), split)) for split in ("train", "val")]
        assert [data.get("train", data.get("split")) for data in opened] == values


def test_modes():
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    gray, color = Image.fromarray(ramp), Image.fromarray(ramp).convert("RGB")
    for image in (gray, color, color.convert("CMYK"), Image.fromarray(ramp.astype(np.uint16) * 257)):
        assert np.abs(common.to_rgb(image).numpy() - ramp.astype(float)).max() < 4
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="32-bit"):
            common.to_rgb(Image.fromarray(ramp.astype(kind)))


def test_crops_are_torchvisions_and_nearly_so_of_jpegs_at_reduced_scale(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8))
    noise.resize((600, 400), Image.Resampling.BICUBIC).save(tmp_path / "x.jpg")
    full, cubic = common.to_rgb(Image.open(tmp_path / "x.jpg")), v2.InterpolationMode.BICUBIC
    for size, seed in itertools.product((210, 64), range(10)):  # every crop has twice the pixels of the latter
        torch.manual_seed(seed)
        found = common.Crop(size, (0.2, 1.0))(image := Image.open(tmp_path / "x.jpg")).int()
        torch.manual_seed(seed)
        wanted = v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=cubic)(full)
        assert (image.width < 600) == (size == 64)
        assert (found - wanted).abs().float().mean() < 2 if size == 64 else torch.equal(found, wanted.int())


def test_a_gpu_cuts_the_same_crops_itself_if_it_can_hold_the_set(images, tmp_path, monkeypatch):
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *device, **how: tensor)
    monkeypatch.setattr(torch, "cuda", MagicMock())
    for data, most in ((tmp_path, 2), (images, 0)):  # the latter are of several sizes, and cropped by the workers
        cfg, keys = config(f"--data {data} --num_workers 1"), [[(epoch, i) for i in range(12)] for epoch in range(3)]
        samples = common.Samples(common.open_data(cfg, "train"), cfg, ddae.draw_mask)
        batches = (common.feed(samples, common.resident(samples, device), device, keys)
                   for device in (torch.device("cpu"), MagicMock(type="cuda")))
        for (a, mask, _), (b, same, _) in zip(*batches, strict=True):
            difference = (a.int() - b.int()).abs()
            assert torch.equal(mask, same) and difference.max() <= most and difference.float().mean() < 0.01
            assert a.dtype == b.dtype and b.is_contiguous() and difference.any() == (most > 0)  # rounding shows


def test_shapes_are_what_they_say():
    scenes = [Shapes("train", 48).scene(i) for i in range(60)]
    assert {labels[0] for _, _, labels in scenes} == set(range(8)) and {len(m) for _, m, _ in scenes} == {1, 2, 3}
    for i, (image, masks, labels) in enumerate(scenes):
        again, label = Shapes("train", 48)[i]
        assert image.shape == (48, 48, 3) and np.array_equal(image, again) and label == labels[0]
        assert masks.sum(0).max() == 1 and len(masks) == len(labels)
    assert not np.array_equal(Shapes("val", 48).scene(0)[0], scenes[0][0])


def test_epochs_shuffle_and_draw_anew_and_any_split_reads_the_same(images, tmp_path, monkeypatch):
    forward, seen = ddae.DDAE.forward, []
    monkeypatch.delattr(ddae.DDAE, "preview")
    monkeypatch.setattr(ddae.DDAE, "forward", lambda model, *data: seen.append(data) or forward(model, *data))

    def epochs(flags=""):
        """-> per epoch: number of the image -> its crop and mask."""
        seen.clear()
        cfg = config(f"--batch_size 24 --epochs 2 --data {images} --out_dir {tmp_path / str(len(flags))} {flags}")
        common.train(cfg, ddae.DDAE(cfg), common.Samples(common.open_data(cfg, "train"), cfg, ddae.draw_mask))
        imgs, masks = map(torch.cat, zip(*seen))
        red = imgs[:, 0].mean((1, 2)) * 0.229 + 0.485  # the inverse of the normalization
        numbers = (red * 255 / 4).round().int().tolist()
        read = [dict(zip(numbers[i:i + 48], zip(imgs[i:], masks[i:]))) for i in (0, 48)]
        assert [len(epoch) for epoch in read] == [48, 48]  # two steps of 24, and 16 images left out
        return read

    first, second = whole = epochs()
    both = first.keys() & second.keys()
    assert first.keys() != second.keys() and not any(torch.equal(first[i][0], second[i][0]) for i in both)
    assert sum(torch.equal(first[i][1], second[i][1]) for i in both) < len(both) / 2
    for epoch, other in zip(whole, epochs("--micro_batch 4 --num_workers 2")):
        assert [*epoch] == [*other] and all(torch.equal(a, b) for i in epoch for a, b in zip(epoch[i], other[i]))
    assert epochs("--seed 1")[0].keys() != first.keys()


# --- schedule, optimizer, files ---------------------------------------------------------------------------------------

def test_learning_rate_golden_values():
    cfg = common.parse(ddae.Config, ddae.PRESETS, argv="--warmup_epochs 40 --epochs 800".split())
    rates = [common.cosine(epoch * 312, 312, cfg) for epoch in (0, 0.5, 40, 420, 800)]
    assert rates == pytest.approx([0, 3e-5, 2.4e-3, 1.2e-3, 0], abs=1e-12)


def test_weight_decay_groups():
    model = ddae.DDAE(config())
    groups = common.adamw(model, config()).param_groups
    name = {id(p): n for n, p in model.named_parameters()}
    decayed, kept = ({name[id(p)] for g in groups if g["weight_decay"] == w for p in g["params"]} for w in (0.05, 0))
    assert {"beta", "encoder.cls_token", "encoder.norm.weight", "encoder.patch_embed.proj.bias"} <= kept
    assert {"pixel_decoder.mask_token", "encoder.patch_embed.proj.weight", "encoder.blocks.1.mlp.fc1.weight"} <= decayed
    assert decayed | kept == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bias, message", [
    (torch.full((16,), np.nan), "norm.bias"), (torch.zeros(16, dtype=int), "norm.bias"), (print, "no checkpoint")])
def test_init_refuses_what_is_no_finite_real_number_and_runs_no_code(bias, message, tmp_path):
    weights = ddae.DDAE(config()).encoder.state_dict()
    torch.save(weights | {"norm.bias": bias}, tmp_path / "x.pt")
    with pytest.raises(SystemExit, match=message):
        ddae.DDAE(config(f"--init {tmp_path / 'x.pt'} --out_dir {tmp_path / 'out'}"))
