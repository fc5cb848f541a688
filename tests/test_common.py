"""Flags, data, schedule, and optimizer of common.py, and what the README says of all scripts."""
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import ddae
import deepmim
import finetune
import sdae
from shapes import Shapes
from transfer import detect, robustness, segment

ROOT = Path(__file__).parent.parent
SCRIPTS = [ddae, deepmim, sdae, finetune, robustness, segment, detect]
TINY = "--img_size 16 --patch_size 4 --embed_dim 16 --depth 2 --K 2 --num_heads 2 --decoder_dim 16 --decoder_heads 2 " \
       "--batch_size 16 --epochs 2 --warmup_epochs 0.01"


def config(flags=""):
    return common.parse(ddae.Config, ddae.PRESETS, argv=f"{TINY} {flags}".split())


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*rng.integers(16, 40, 2), 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


# --- flags ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--epoch 3", "unrecognized arguments: --epoch 3"), ("--epochs ten", "invalid int value: 'ten'"),
    ("--epochs 0", "--epochs must be finite and at least 1, got 0"), ("--base_lr nan", "--base_lr must be finite"),
    ("--clip_grad -1", "--clip_grad must be finite and at least 0"), ("--warmup_epochs 2", "must be below --epochs"),
    ("--data=", "--data is empty"), ("--preset huge", "invalid choice: 'huge'")])
def test_wrong_flags_get_a_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        config(flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@dataclass(frozen=True)
class NoComment(common.RunConfig):
    speed: float = 1.0


@dataclass(frozen=True)
class NoType(common.RunConfig):
    options: list = ()  # a list is no flag


@pytest.mark.parametrize("Config, name", [(NoComment, "speed"), (NoType, "options")])
def test_a_config_field_that_is_no_flag_is_named(Config, name):
    with pytest.raises(SystemExit, match=rf"Config\.{name} "):
        common.parse(Config, {}, argv=[])


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
    for junk in (images / ".thumbs" / "x.jpg", images / "a" / ".cache" / "x.jpg", images / "a" / "._0.jpg"):
        junk.parent.mkdir(exist_ok=True)
        junk.write_bytes(b"x")
    (images / "a" / "notes.txt").write_text("x")
    source = common.open_data(config(f"--data {images}"), "train")
    assert len(source) == 40 and source.classes == ["a", "b"]
    assert all(Path(path).parent.name == "ab"[label] for path, label in source.samples)
    odd = tmp_path / "odd"
    odd.mkdir()
    (images / "a" / "0.jpg").rename(odd / "über é.JPG")
    flat = common.open_data(config(f"--data {odd}"), "train")
    assert len(flat) == 1 and flat.classes == [""] and common.to_rgb(flat[0][0]).shape[0] == 3
    (odd / "über é.JPG").unlink()
    for split, data in (("train", odd), ("train", tmp_path / "nowhere"), ("val", images)):
        with pytest.raises(SystemExit, match=re.escape(str(data))):
            common.open_data(config(f"--data {data}"), split)


def test_torchvision_sets_by_name(monkeypatch):
    made = []

    class ByFlag:
        def __init__(self, root, train=True, download=False):
            made.append((root, train, download))

    class BySplit:
        def __init__(self, root, split="train"):
            made.append((root, split))

    for name, make in (("FLAG", ByFlag), ("SPLIT", BySplit), ("ImageNet", BySplit)):
        monkeypatch.setattr(torchvision.datasets, name, make, raising=False)
        for split in ("train", "val"):
            common.open_data(config(f"--data {name}"), split)
    assert made == [("data", True, True), ("data", True, False), ("data", False, True), ("data", False, False),
                    ("data", "train"), ("data", "test"), ("data", "train"), ("data", "val")]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F"])
def test_modes(mode):
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    arrays = {"I;16": ramp.astype(np.uint16) * 257, "I": ramp.astype(np.int32), "F": ramp.astype(np.float32)}
    image = Image.fromarray(arrays[mode]) if mode in arrays else Image.fromarray(ramp).convert("RGB").convert(mode)
    if mode in ("I", "F"):
        with pytest.raises(ValueError, match="32-bit"):
            common.to_rgb(image)
    else:
        rgb = common.to_rgb(image)
        assert rgb.shape == (3, 64, 64) and abs(rgb.float().mean() - 127.5) < (20 if mode == "1" else 5)


def test_shapes_are_what_they_say():
    scenes = [Shapes("train", 48).scene(i) for i in range(60)]
    assert {labels[0] for _, _, labels in scenes} == set(range(8)) and {len(m) for _, m, _ in scenes} == {1, 2, 3}
    for i, (image, masks, labels) in enumerate(scenes):
        again, label = Shapes("train", 48)[i]
        assert image.shape == (48, 48, 3) and np.array_equal(image, again) and label == labels[0]
        assert masks.sum(0).max() == 1 and len(masks) == len(labels)
    assert not np.array_equal(Shapes("val", 48).scene(0)[0], scenes[0][0])


def read(cfg, source, world, workers, monkeypatch, steps=6):
    """Per step, everything that all processes read: key -> crop and mask."""
    found = [{} for _ in range(steps)]
    micro = cfg.micro_batch or cfg.batch_size // world
    monkeypatch.setattr(common, "WORLD", world)
    for rank in range(world):
        monkeypatch.setattr(common, "RANK", rank)
        keys = list(common.batches(len(source), cfg, micro, 0, steps))
        samples = common.Samples(source, cfg, ddae.draw_mask)
        loader = torch.utils.data.DataLoader
        loaded = loader(samples, batch_sampler=keys, num_workers=workers, collate_fn=samples.collate)
        for i, (imgs, ids, bad) in enumerate(loaded):
            found[i * steps // len(keys)] |= {k: (a, b) for k, a, b in zip(keys[i], imgs, ids)}
    return found


def test_any_split_of_a_batch_reads_the_same_crops_and_masks(images, monkeypatch):
    source = common.open_data(config(f"--data {images}"), "train")
    want = read(config(), source, 1, 0, monkeypatch)
    assert all(len(step) == 16 for step in want)
    for world, workers, micro in ((1, 3, 4), (2, 0, 0), (4, 2, 2)):
        got = read(config(f"--micro_batch {micro}"), source, world, workers, monkeypatch)
        for a, b in zip(want, got):
            assert a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k]))
    first, second = want[0] | want[1], want[2] | want[3]  # two steps are an epoch
    assert len(first) == 32 and {e for e, _ in first} == {0} and {e for e, _ in second} == {1}
    both = [i for e, i in first if (1, i) in second]
    assert all(not torch.equal(first[0, i][0], second[1, i][0]) for i in both)
    assert sum(torch.equal(first[0, i][1], second[1, i][1]) for i in both) < len(both) / 2
    assert read(config("--seed 1"), source, 1, 0, monkeypatch)[0].keys() != want[0].keys()


# --- schedule, optimizer, files ---------------------------------------------------------------------------------------

def test_learning_rate_golden_values():
    cfg = common.parse(ddae.Config, ddae.PRESETS, argv="--warmup_epochs 40 --epochs 800".split())
    lr = partial(common.cosine, steps_per_epoch=312, cfg=cfg)
    assert lr(0) == 0 and lr(156) == pytest.approx(3e-5) and lr(40 * 312) == pytest.approx(2.4e-3)
    assert lr(420 * 312) == pytest.approx(1.2e-3) and lr(800 * 312) == pytest.approx(0, abs=1e-12)


def test_weight_decay_groups():
    model = ddae.DDAE(config())
    groups = common.adamw(model, config()).param_groups
    name = {id(p): n for n, p in model.named_parameters()}
    decayed, kept = ({name[id(p)] for g in groups if g["weight_decay"] == w for p in g["params"]} for w in (0.05, 0))
    assert {"beta", "encoder.cls_token", "encoder.norm.weight", "encoder.patch_embed.proj.bias"} <= kept
    assert {"pixel_decoder.mask_token", "encoder.patch_embed.proj.weight", "encoder.blocks.1.mlp.fc1.weight"} <= decayed
    assert decayed | kept == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("damage", [dict(value=float("nan")), dict(value=float("inf")), dict(dtype=torch.int64),
                                    dict(dtype=torch.complex64)])
def test_weights_that_are_no_finite_real_numbers_are_refused(damage, tmp_path):
    weights = ddae.DDAE(config()).encoder.state_dict()
    bad = weights["norm.bias"] + damage.get("value", 0)
    torch.save(weights | {"norm.bias": bad.to(damage.get("dtype", bad.dtype))}, tmp_path / "x.pt")
    with pytest.raises(SystemExit, match="norm.bias"):
        ddae.DDAE(config(f"--init {tmp_path / 'x.pt'} --out_dir {tmp_path / 'out'}"))


def test_torch_load_is_always_safe():
    text = "\n".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("transfer/*.py")))
    calls = re.findall(r".*torch\.load\(.*", text)
    assert calls and all("weights_only=True" in line for line in calls)


def test_closed_output_does_not_end_a_run(tmp_path):
    command = f"{sys.executable} {ROOT / 'ddae.py'} --preset quick {TINY} --max_steps 2 --eval_every 0 " \
              f"--num_workers 0 --device cpu --data shapes --out_dir {tmp_path}"
    done = subprocess.run(["sh", "-c", f"{command} >&- 2>&-"])
    assert done.returncode == 0 and common.load(tmp_path / "last.pt")["step"] == 2
