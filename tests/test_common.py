"""The trainer: the same run on any machine, schedule, data, damaged files, one-line answers to bad input."""
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import ddae
import deepmim
import finetune
import sdae
from transfer import detect, robustness, segment

ROOT = Path(__file__).parent.parent
TINY = "--img_size 16 --patch_size 4 --embed_dim 16 --depth 2 --K 2 --num_heads 2 --decoder_dim 16 --decoder_heads 2 " \
       "--decoder_depth 1 --batch_size 16 --base_lr 1e-2 --warmup_epochs 0.01 --log_every 1 --device cpu --num_workers 0 " \
       "--preview_every 0 --save_every 1000 --epochs 2"


@pytest.fixture
def images(tmp_path):
    """A folder of 40 labelled JPEGs of different sizes, split in train and val."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "images" / ("train" if i < 40 else "val") / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = rng.integers(16, 40, 2)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def config(flags=""):
    return common.parse(ddae.Config, ddae.PRESETS, argv=f"{TINY} {flags}".split())


def main(monkeypatch, flags, base=TINY):
    """Run ddae.py in this process."""
    monkeypatch.setattr(sys, "argv", ["ddae.py", *base.split(), *flags.split()])
    ddae.main()


def launch(flags, processes=0, **popen):
    """Run ddae.py as a user does."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.Popen([sys.executable, *torchrun, str(ROOT / "ddae.py"), *TINY.split(), *flags.split()],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# --- the same run on any machine --------------------------------------------------------------------------------------

def samples(cfg, world, workers, monkeypatch, steps=6):
    """Per step, everything that all processes read: key -> crop and mask."""
    source, result = common.open_data(cfg, "train"), [{} for _ in range(steps)]
    draw = partial(ddae.draw_mask, **common.arguments(ddae.draw_mask, cfg))
    for rank in range(world):
        monkeypatch.setattr(common, "RANK", rank)
        monkeypatch.setattr(common, "WORLD", world)
        batches = common.Batches(len(source), cfg, 0, steps)
        loader = torch.utils.data.DataLoader(common.Samples(source, cfg, draw), batch_sampler=batches,
                                             num_workers=workers, collate_fn=common.collate)
        for i, (imgs, ids, keys, bad) in enumerate(loader):
            result[i * steps // len(batches)] |= {k: (a, b) for k, a, b in zip(keys, imgs, ids)}
    return result


def test_any_split_of_a_batch_reads_the_same_crops_and_masks(images, monkeypatch):
    want = samples(config(f"--data {images}"), 1, 0, monkeypatch)
    assert all(len(step) == 16 for step in want)
    for world, workers, micro in ((1, 1, 0), (1, 3, 4), (2, 0, 0), (4, 2, 2)):
        got = samples(config(f"--data {images} --micro_batch {micro}"), world, workers, monkeypatch)
        for a, b in zip(want, got):
            assert a.keys() == b.keys()
            assert all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k]))
    first, second = want[0] | want[1], want[2] | want[3]  # two steps are an epoch here
    assert len(first) == 32 and {e for e, _ in first} == {0} and {e for e, _ in second} == {1}
    both = [i for e, i in first if (1, i) in second]
    assert all(not torch.equal(first[0, i][0], second[1, i][0]) for i in both)
    assert sum(torch.equal(first[0, i][1], second[1, i][1]) for i in both) < len(both) / 2
    other = samples(config(f"--data {images} --seed 1"), 1, 0, monkeypatch)
    assert other[0].keys() != want[0].keys()


def test_one_process_four_micro_steps_two_processes(tmp_path):
    jobs = {n: launch(f"--out_dir {tmp_path / n} --max_steps 10 {flags}", processes) for n, processes, flags in (
        ("one", 0, ""), ("micro", 0, "--micro_batch 4"), ("both", 2, "--micro_batch 4"))}
    for name, job in jobs.items():
        assert job.wait(180) == 0, job.stdout.read()
    one = [line for line in log(tmp_path / "one") if "loss" in line]
    assert [line["step"] for line in one] == list(range(1, 11)) and one[-1]["loss"] < one[0]["loss"]
    exact = torch.load(tmp_path / "one" / "last.pt", weights_only=True)
    for name in ("micro", "both"):
        for a, b in zip(one, log(tmp_path / name)):
            for key in a:
                if key not in ("images_per_s", "data_wait") and "target_std" not in key:  # a spread over the local batch
                    assert b[key] == pytest.approx(a[key], rel=1e-5, abs=2e-6), (name, a["step"], key)
        other = torch.load(tmp_path / name / "last.pt", weights_only=True)
        assert other["model"].keys() == exact["model"].keys()  # no "module." of DDP


# --- schedule and optimiser -------------------------------------------------------------------------------------------

def test_learning_rate_golden_values():
    cfg = common.parse(ddae.Config, ddae.PRESETS, argv="--warmup_epochs 40 --epochs 800".split())
    lr = partial(common.learning_rate, steps_per_epoch=312, cfg=cfg)
    assert lr(0) == 0 and lr(156) == pytest.approx(3e-5) and lr(40 * 312) == pytest.approx(2.4e-3)
    assert lr(420 * 312) == pytest.approx(1.2e-3) and lr(800 * 312) == pytest.approx(0, abs=1e-12)


def test_weight_decay_groups():
    model = ddae.DDAE(embed_dim=24, num_heads=2, decoder_dim=16, decoder_heads=2)
    decay, keep = common.make_optimizer(model, common.parse(ddae.Config, ddae.PRESETS, argv=[])).param_groups
    name = {id(p): n for n, p in model.named_parameters()}
    decayed, kept = ({name[id(p)] for p in g["params"]} for g in (decay, keep))
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.05, 0)
    assert {"beta", "encoder.cls_token", "encoder.norm.weight", "encoder.patch_embed.proj.bias"} <= kept
    assert {"pixel_decoder.mask_token", "encoder.patch_embed.proj.weight", "encoder.blocks.3.attn.qkv.weight"} <= decayed
    assert decayed | kept == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("teacher" in n or "pos_embed" in n for n in decayed | kept)


# --- data -------------------------------------------------------------------------------------------------------------

def test_folders(tmp_path, images):
    source = common.open_data(config(f"--data {images}"), "train")
    assert len(source) == 40 and source.classes == ["a", "b"]
    assert all(Path(source.name(i)).parent.name == "ab"[source.label(i)] for i in range(40))
    odd = tmp_path / "odd" / "über all"
    odd.mkdir(parents=True)
    (odd / "a b é.PNG").write_bytes(next((images / "train" / "a").iterdir()).read_bytes())
    (odd / "._a.jpg").write_bytes(b"x")
    (odd / "folder.jpg").mkdir()
    (odd / "loop").symlink_to(tmp_path / "odd")
    flat = common.open_data(config(f"--data {odd.parent}".replace(" ", " ", 1)), "train")
    assert len(flat) == 1 and flat.image(0).mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F"])
def test_modes(mode, tmp_path):
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray((ramp.astype(np.uint16) * 257) if mode == "I;16" else
                                ramp.astype(np.int32 if mode == "I" else np.float32))
    else:
        image = Image.fromarray(ramp).convert("RGB").convert(mode)
    path = tmp_path / f"x.{'tif' if mode in 'CMYK I F' else 'png'}"
    image.save(path)
    if mode in ("I", "F"):
        with pytest.raises(ValueError, match="32-bit"):
            common.to_rgb(Image.open(path))
    else:
        got = common.to_rgb(Image.open(path))
        assert got.mode == "RGB" and abs(np.asarray(got).mean() - 127.5) < (20 if mode == "1" else 5)


def test_shapes_are_what_they_say():
    source = common.Shapes("train", 48)
    items = [source.item(i) for i in range(60)]
    assert {x["label"] for x in items} == set(range(8))
    assert all(np.array_equal(x["image"], source.item(i)["image"]) for i, x in enumerate(items))
    assert not np.array_equal(common.Shapes("val", 48).item(0)["image"], items[0]["image"])
    for x in items:
        areas = (x["boxes"][:, 2:] - x["boxes"][:, :2]).prod(1)
        assert x["image"].shape == (48, 48, 3) and x["label"] == x["classes"][0] and areas.argmax() == 0
        assert set(np.unique(x["mask"])) <= {0, *(x["classes"] + 1)}
        rows, cols = np.nonzero(x["mask"])
        left, top, right, bottom = x["boxes"][:, 0].min(), x["boxes"][:, 1].min(), x["boxes"][:, 2].max(), x["boxes"][:, 3].max()
        assert (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1) == (left, top, right, bottom)


def test_knn_finds_copies():
    cfg, vit = config("--knn_images 400"), ddae.ViT(16, 4, 16, 2, 2)
    source = common.Shapes("train", 16)
    autocast = torch.autocast("cpu", enabled=False)
    assert common.knn_accuracy(vit, cfg, "cpu", autocast, (source, source), (40, 40), k=1) == (100, 40, 40)
    assert common.knn_accuracy(vit, cfg, "cpu", autocast, (source, common.Shapes("val", 16)), (400, 80))[0] < 70


def test_validation_loss_is_the_mean_over_images_whatever_the_seed(images):
    torch.manual_seed(0)
    cfg = config(f"--data {images} --val_images 15")
    model, source = ddae.DDAE(**common.arguments(ddae.DDAE, cfg)), common.open_data(cfg, "val")
    draw, autocast = partial(ddae.draw_mask, **common.arguments(ddae.draw_mask, cfg)), torch.autocast("cpu", enabled=False)
    got = common.validation_loss(model, cfg, "cpu", autocast, source, draw)
    other = config(f"--data {images} --val_images 15 --seed 3")
    assert got == common.validation_loss(model, other, "cpu", autocast, source, draw)
    losses = []
    for i in np.random.default_rng(0).permutation(20)[:15]:
        image = common.normalise(common.centre_crop(cfg)(source.image(i)).unsqueeze(0), "cpu")
        losses.append(model(image, torch.from_numpy(draw(np.random.default_rng((0, i)))).unsqueeze(0))[0].item())
    assert got["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


# --- checkpoints ------------------------------------------------------------------------------------------------------

def test_damaged_files_are_refused_never_read_wrong(tmp_path):
    path, state = tmp_path / "x.pt", dict(a=torch.arange(2000.0), b=[1, "two"])
    common.save(state, path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for n in (0, 1, 64, len(good) // 4, len(good) - 1):
        path.write_bytes(good[:n])
        with pytest.raises(ValueError, match="x.pt is damaged"):
            common.load(path)
    refused = 0
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.integers(len(good))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            loaded = common.load(path)
            assert torch.equal(loaded["a"], state["a"]) and loaded["b"] == state["b"]
        except ValueError:
            refused += 1
    assert refused > 150


def test_init_starts_encoder_and_teacher(tmp_path, monkeypatch):
    main(monkeypatch, f"--out_dir {tmp_path / 'a'} --max_steps 2")
    main(monkeypatch, f"--out_dir {tmp_path / 'b'} --max_steps 1 --seed 5 --init {tmp_path / 'a' / 'encoder.pt'}")
    first = torch.load(tmp_path / "a" / "encoder.pt", weights_only=True)["model"]
    state = torch.load(tmp_path / "b" / "last.pt", weights_only=True)["model"]  # the first step has learning rate 0
    assert all(torch.equal(v, state[f"{part}.{k}"]) for k, v in first.items() for part in ("encoder", "teacher"))


def test_resume_falls_back_to_the_file_before(tmp_path, monkeypatch, capsys):
    main(monkeypatch, f"--out_dir {tmp_path} --max_steps 2")
    main(monkeypatch, f"--out_dir {tmp_path} --max_steps 4")
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-50])
    capsys.readouterr()
    main(monkeypatch, f"--out_dir {tmp_path} --max_steps 5")
    out = capsys.readouterr().out
    assert "last.pt is damaged" in out and f"going on from {tmp_path / 'last.prev.pt'}" in out
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5]


# --- bad input: one line, exit code 2, nothing written ----------------------------------------------------------------

BAD = {
    "--data {tmp}/nowhere": "is not a folder, and no data set's name either",
    "--data {tmp}/empty": "holds no images, only []",
    "--data {tmp}/text": "holds no images, only ['note.txt']",
    "--img_size 18": "--img_size 18 is not divisible by --patch_size 4; use 16 or 20",
    "--depth 3": "--depth 3 is not divisible by --K 2; use a K of 1, 3",
    "--mask_ratio 1.0": "--mask_ratio 1.0 must be between 0 and 1",
    "--mask_ratio 0": "--mask_ratio 0.0 must be between 0 and 1",
    "--mask_ratio 0.99": "leaves no visible or no masked patch; use 0.0625 to 0.906",
    "--mask_ratio nan": "--mask_ratio must be finite",
    "--batch_size 16 --micro_batch 3": "--batch_size 16 is not divisible by --micro_batch 3 x 1 processes",
    "--batch_size 20000": "10000 images in --data shapes are fewer than --batch_size 20000; use --batch_size 10000 or less",
    "--batch_size 0": "--batch_size must be above 0",
    "--epoch 3": "unknown flag --epoch; did you mean --epochs?",
    "--nonsense": "unknown flag --nonsense",
    "--epochs ten": "--epochs: invalid int value: 'ten'",
    "--mask blok": "--mask: invalid choice: 'blok'",
    "--beta_init 1 2 3": "--beta_init takes 1 or 2 values, got 3",
    "--momentum 1.5": "--momentum must be in [0, 1)",
    "--seed -1": "--seed must not be negative",
    "--adam_betas 0.9 1.0": "--adam_betas must be in [0, 1)",
    "--warmup_epochs 2": "--warmup_epochs 2 must be below --epochs 2",
    "--data {tmp}/odd --batch_size 2 --knn_every 1": "have different classes",
    "--data {tmp}/float --batch_size 2": "20 unreadable images in a row",
    "--num_heads 3": "--embed_dim 16 must be divisible by 4 and by --num_heads 3",
    "--pixel none --feature none": "leaves nothing to learn from",
    "--out_dir /proc/run": "--out_dir /proc/run is not writable",
    "--out_dir {tmp}/text/note.txt/x": "is not writable",
    "--resume {tmp}/none.pt": "none.pt does not exist",
    "--resume {tmp}/text/note.txt": "note.txt is damaged or not a checkpoint",
    "--resume {tmp}/half.pt": "half.pt is no training checkpoint",
    "--init {tmp}/half.pt": "half.pt has no state dict under 'model'",
    "--init {tmp}/lists.pt": "is of another size; cls_token: file ('?',), model (1, 1, 16)",
    "--data {tmp}/badval --batch_size 2 --knn_every 1": "kNN: none of",
    "--data {tmp}/badval --batch_size 2 --val_every 1": "--val_every: none of",
    "--resume {tmp}/run/encoder.pt": "encoder.pt is no training checkpoint (last.pt is one)",
    "--init {tmp}/text/note.txt": "--init {tmp}/text/note.txt is damaged or not a checkpoint",
    "--init {tmp}/run/encoder.pt --embed_dim 32": "is of another size; cls_token: file (1, 1, 16), model (1, 1, 32)",
    "--init {tmp}/run/encoder.pt --depth 4": "lacks 24 of",
    "--resume {tmp}/run/last.pt --embed_dim 32": "embed_dim: checkpoint 16, command 32",
    "--resume {tmp}/run/last.pt --img_size 20": "img_size: checkpoint 16, command 20",
    "--resume {tmp}/run/last.pt --patch_size 8": "patch_size: checkpoint 4, command 8",
    "--resume {tmp}/run/last.pt --batch_size 32": "batch_size: checkpoint 16, command 32",
    "--resume {tmp}/run/last.pt --epochs 3 --base_lr 1": "base_lr: checkpoint 0.01, command 1.0",
    "--resume {tmp}/other.pt": "other.pt is of another method, sdae; give another --out_dir",
    "--data {tmp}/flat --batch_size 2 --knn_every 1": "--knn_every needs {tmp}/flat/val",
    "--data {tmp}/flat --batch_size 2 --val_every 1": "--val_every needs {tmp}/flat/val; leave it out, or make that folder",
    "--data {tmp}/unlabelled --batch_size 2 --knn_every 1": "--knn_every needs labels",
    "--device cuda": "--device cuda, but torch sees no GPU",
    "--data list": "cifar10, cifar100, stl10",
    "--data cifar10 --data_root {tmp}/text/note.txt": "--data cifar10 in --data_root",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input(flags, tmp_path, monkeypatch, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    if "/proc" in flags and not os.path.isdir("/proc"):
        pytest.skip("no /proc here")
    for folder in ("empty", "text", "flat", "unlabelled/train", "unlabelled/val"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "text" / "note.txt").write_text("not an image")
    for folder in ("flat", "unlabelled/train", "unlabelled/val"):
        for i in range(2):
            Image.new("RGB", (20, 20)).save(tmp_path / folder / f"{i}.png")
    for folder in ("odd/train/a", "odd/train/b", "odd/val/a"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / folder / "x.png")
    (tmp_path / "float").mkdir()
    for i in range(2):
        Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / "float" / f"{i}.tif")
    if "run/" in flags or "other.pt" in flags:
        main(monkeypatch, f"--out_dir {tmp_path / 'run'} --max_steps 1")
        state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
        state["config"]["method"] = "sdae"
        torch.save(state, tmp_path / "other.pt")
    torch.save(dict(model=torch.zeros(3), optimizer={}), tmp_path / "half.pt")
    torch.save({k: [1, 2] for k in ddae.ViT(16, 4, 16, 2, 2).state_dict()}, tmp_path / "lists.pt")
    for split in ("train", "val"):
        for i in range(2):
            path = tmp_path / "badval" / split / "a" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20)).save(path) if split == "train" else path.write_text("no image")

    def files():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "log.jsonl"}

    before = files()
    capsys.readouterr()
    out_dir = "" if "--out_dir" in flags else f" --out_dir {tmp_path}/new"
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, flags.format(tmp=tmp_path) + out_dir)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert BAD[flags].format(tmp=tmp_path) in err
    err = "".join(line for line in err.splitlines(True) if not line.startswith("unreadable"))
    assert err.startswith("ddae.py: error: ") and len(err.splitlines()) <= (6 if "another run" in err else 1)
    assert files() == before
    assert "float" in flags or "badval" in flags or not (tmp_path / "new").exists()


def test_two_processes_that_do_not_divide_the_batch(tmp_path):
    job = launch(f"--out_dir {tmp_path / 'x'} --batch_size 17", processes=2)
    assert job.wait(60) != 0
    assert job.stdout.read().count("--batch_size 17 is not divisible by --micro_batch 8 x 2 processes") == 1
    assert not (tmp_path / "x").exists()


SCRIPTS = [ddae, deepmim, sdae, finetune, robustness, segment, detect]


@pytest.mark.parametrize("module", SCRIPTS)
def test_help_explains_every_flag(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in module.Config.__dataclass_fields__:
        assert re.search(rf"--{name}\b[^\[]*(\[[^\]]*\]\s+)?(\[no[^\]]*\]\s+)?.*?\[(AAAI|ICLR|paper|supp|code|ours|MAE|BootMAE|DeepMIM|SdAE|Mask R-CNN)", text, re.S), name


# --- the README -------------------------------------------------------------------------------------------------------

def test_readme_names_files_and_flags_that_exist():
    text = (ROOT / "README.md").read_text()
    for module in SCRIPTS:
        for command in re.findall(rf"(?:{module.__name__}\.py|-m {module.__name__}) ([^\n`|]*)", text):
            for flag in re.findall(r"--([a-zA-Z_]+)", command):
                assert flag.removeprefix("no-") in {*module.Config.__dataclass_fields__, "preset", "recipe", "help"}, flag
    for name in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / name).exists(), name
