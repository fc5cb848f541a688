"""finetune.py and transfer/robustness.py against golden values, loops, timm; files and data that do not fit."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import common
import ddae
import finetune
from transfer import robustness

ROOT = Path(__file__).parent.parent
VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2)
CLASSES = ["ant", "bee", "cow"]
HERE = "--device cpu --num_workers 0"
FAST = f"{HERE} --batch_size 12 --base_lr 0.02 --epochs 2 --warmup_epochs 0.1 --log_every 1 --crop_min 0.5"


@pytest.fixture
def images(tmp_path):
    """Three classes that differ in color: 36 images for training, 13 for validation, of different sizes."""
    rng = np.random.default_rng(0)
    for i in range(49):
        path = tmp_path / "images" / ("train" if i < 36 else "val") / CLASSES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 156, (*rng.integers(16, 40, 2), 3), dtype=np.uint8)
        pixels[..., i % 3] += 90
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


@pytest.fixture
def encoder(tmp_path):
    """encoder.pt as pretraining leaves it."""
    torch.manual_seed(0)
    path = tmp_path / "encoder.pt"
    torch.save(dict(model=noisy(ddae.ViT(**VIT)).state_dict(), config=VIT | dict(method="ddae")), path)
    return path


@pytest.fixture
def tuned(tmp_path):
    """model.pt as fine-tuning leaves it."""
    torch.manual_seed(1)
    sizes = " ".join(f"--{k} {v}" for k, v in VIT.items())
    model = noisy(build(f"--mode scratch {sizes}"))
    torch.save(dict(model=model.state_dict(), config=VIT | dict(classes=CLASSES)), tmp_path / "tuned.pt")
    return tmp_path / "tuned.pt"


def noisy(model):
    with torch.no_grad():  # zero biases and unit norms would hide mistakes, and the head is nearly zero at first
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def resave(path, to, model=None, **config):
    """A copy of a file with other tensors and config entries."""
    file = common.load(path)
    torch.save(dict(model=file["model"] | (model or {}), config=file["config"] | config), to)
    return to


def config(flags):
    return common.parse(finetune.Config, finetune.PRESETS, argv=flags.split())


def build(flags, num_classes=3):
    """The model that a command trains or evaluates."""
    cfg, weights, _ = finetune.settle(config(flags))
    return finetune.build(cfg, weights, num_classes)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(flags) -> what a script prints, in this process."""
    def run(flags, module=finetune):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["x.py", *flags.split()])
        module.main()
        return capsys.readouterr().out
    return run


def launch(flags):
    """What two processes print."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(ROOT / "finetune.py"), *flags.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=180).stdout


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def center(image, size, crop_pct):
    """The evaluation crop of one image, normalized -> (1, 3, size, size)."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    short, sides = round(size / crop_pct), x.shape[2:]
    x = F.interpolate(x, [short * n // min(sides) for n in sides], mode="bicubic", antialias=True)
    top, left = (round((n - size) / 2) for n in x.shape[2:])
    x = x[:, :, top:top + size, left:left + size] / 255
    return (x - torch.tensor(common.MEAN).view(3, 1, 1)) / torch.tensor(common.STD).view(3, 1, 1)


# --- recipes ----------------------------------------------------------------------------------------------------------

def test_learning_rate_golden_values():
    """Peaks: MAE 2e-3, DDAE 8e-3 at batch 4096 or as the text says, DeepMIM's log 4e-4, ..."""
    def lr(preset, epoch):
        return common.cosine(round(epoch * 1000), 1000, config(f"--init x --preset {preset}"))

    assert lr("mae", 2.5) == pytest.approx(1e-3) and lr("mae", 5) == pytest.approx(2e-3)
    assert lr("mae", 52.5) == pytest.approx((2e-3 + 1e-6) / 2) and lr("mae", 100) == pytest.approx(1e-6)
    peaks = dict(mae_large=4e-3, ddae=2e-3, ddae_small=4e-3, ddae_literal=8e-3, deepmim=2e-4, deepmim_clip=4e-4,
                 deepmim_800=2e-4, sdae=4e-3, sdae_large=8e-3, scratch=1.6e-3, linear=6.4, linear_boot=6.4,
                 linear_boot_large=4.48)
    assert {p: lr(p, config(f"--init x --preset {p}").warmup_epochs) for p in peaks} == pytest.approx(peaks)
    assert {p: config(f"--init x --preset {p}").epochs for p in ("ddae", "sdae_large", "scratch", "linear")} == dict(
        ddae=100, sdae_large=50, scratch=300, linear=90)


def test_layer_decay_golden_values():
    """0.65 ** (13 - layer); the same names as MAE decays."""
    scales = (0.0036972, 0.0056880, 0.0087508, 0.0134627, 0.0207118, 0.0318644, 0.0490222, 0.0754188, 0.1160290,
              0.1785063, 0.2746250, 0.4225, 0.65, 1)
    cfg = finetune.settle(config("--mode scratch --mixup 0 --cutmix 0"))[0]
    with torch.device("meta"):
        model = finetune.Classifier(cfg, 1000)
    of = {id(p): g for g in finetune.make_optimizer(model, cfg).param_groups for p in g["params"]}
    found = {name: of[id(p)] for name, p in model.named_parameters()}
    assert len(of) == len(found) == 152
    for name, group in found.items():
        layer = 13 if name.startswith(("head", "fc_norm")) else int(name.split(".")[1]) + 1 if "blocks" in name else 0
        assert group["lr_scale"] == pytest.approx(scales[layer], rel=1e-4), name
    assert {n for n, g in found.items() if g["weight_decay"]} == {
        "patch_embed.proj.weight", "head.weight",
        *(f"blocks.{i}.{m}.weight" for i in range(12) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))}


def test_lars_equals_a_loop():
    torch.manual_seed(0)
    params = [x.requires_grad_() for x in (torch.randn(4, 3), torch.randn(4), torch.zeros(2, 2))]
    optimizer = finetune.LARS(params, weight_decay=0.1)
    want, momentum = [p.detach().numpy().astype(float) for p in params], [0.0, 0.0, 0.0]
    for lr in (0.5, 0.4, 0.3, 0.2, 0.1):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for i, p in enumerate(params):
            g = p.grad.numpy().astype(float)
            if want[i].ndim == 2:
                g = g + 0.1 * want[i]
                length = (want[i] ** 2).sum() ** 0.5
                g = g * 0.001 * length / (g ** 2).sum() ** 0.5 if length else g
            momentum[i] = 0.9 * momentum[i] + g
            want[i] = want[i] - lr * momentum[i]
    for p, expected in zip(params, want):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


# --- model, samples, files --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("global_pool", ["token", "avg"])
@torch.no_grad()
def test_logits_of_a_timm_vit(tmp_path, global_pool):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7, global_pool=global_pool).eval()
    for p in vit.parameters():
        p.add_(0.02 * torch.randn_like(p))
    torch.save(vit.state_dict(), tmp_path / "timm.pt")
    model, imgs = build(f"--eval --init {tmp_path / 'timm.pt'}", 7).eval(), torch.randn(2, 3, 224, 224)
    assert (model.cfg.img_size, model.cfg.depth, model.cfg.num_heads) == (224, 12, 3)
    torch.testing.assert_close(model.logits(imgs), vit(imgs), rtol=0, atol=1e-5)


@torch.no_grad()
def test_loss_by_hand(encoder):
    """Smoothed cross-entropy of images that mixup or cutmix has changed; cutmix keeps pixels, mixup does not."""
    model, kinds = noisy(build(f"--init {encoder}")).eval(), set()
    imgs, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 2, 1, 2])
    for seed in range(20):
        torch.manual_seed(seed)
        loss, _ = model(imgs, labels)
        torch.manual_seed(seed)
        mixed, soft = model.mix(imgs, labels)
        kinds.add(torch.isin(mixed, imgs).all().item())
        want = -((0.9 * soft + 0.1 / 3) * model.logits(mixed).log_softmax(1)).sum(1).mean()
        assert soft.shape == (4, 3) and loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert kinds == {True, False}


def test_position_table_equals_timm(encoder):
    table = torch.randn(1, 17, 16)
    for grid in ((6, 8), (3, 3)):
        want = timm.layers.resample_abs_pos_embed(table, grid, antialias=False, num_prefix_tokens=1)
        torch.testing.assert_close(finetune.resize_pos_embed(table, grid), want)
    assert finetune.resize_pos_embed(table, (4, 4)) is table
    larger = build(f"--init {encoder} --img_size 32")
    assert larger.pos_embed.shape == (1, 65, 16) and larger.logits(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_last_k_and_reinit_last_k(encoder):
    model, weights = build(f"--init {encoder} --last_k 2 --reinit_last_k 2"), common.load(encoder)["model"]
    trained = {re.match(r"blocks\.\d|\w+", name)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks.1", "blocks.2", "fc_norm", "head"}
    kept = [torch.equal(model.blocks[i].attn.qkv.weight, weights[f"blocks.{i}.attn.qkv.weight"]) for i in range(3)]
    fresh = model.blocks[1].attn.qkv
    assert kept == [True, False, False] and not fresh.bias.any() and fresh.weight.abs().max() <= (6 / 64) ** 0.5 + 1e-6
    assert [b.drop_path for b in model.blocks] == pytest.approx([0, 0.05, 0.1])
    assert all(p.requires_grad for p in build(f"--init {encoder} --last_k 3").parameters())


def test_what_is_loaded(encoder, tuned, capsys):
    build(f"--init {encoder}")
    out = capsys.readouterr().out
    assert "blocks (36)" in out and "anew: fc_norm (2), head (2)\n" in out and "left out: norm (2)\n" in out
    assert build(f"--init {tuned}").head.weight.std() < 1e-3  # a new head, also for the same classes
    assert build(f"--preset linear --init {encoder}", 500).head.weight.std().item() == pytest.approx(0.01, rel=0.05)


# --- runs -------------------------------------------------------------------------------------------------------------

def test_a_run_learns_and_resumes_bitwise(images, encoder, tmp_path, run):
    """Without the --init file, but not with permuted classes."""
    flags = f"--data {images} --init {encoder} {FAST} --epochs 8 --layer_decay 0.8"
    run(f"{flags} --out_dir {tmp_path / 'a'}")
    run(f"{flags} --out_dir {tmp_path / 'b'} --max_steps 5")
    encoder.unlink()
    run(f"{flags} --out_dir {tmp_path / 'b'} --max_steps 11")
    for split in ("train", "val"):
        (images / split / "ant").rename(images / split / "dog")
    with pytest.raises(SystemExit, match="classes: checkpoint .*ant.*dog"):
        run(f"{flags} --out_dir {tmp_path / 'b'}")
    for split in ("train", "val"):
        (images / split / "dog").rename(images / split / "ant")
    run(f"{flags} --out_dir {tmp_path / 'b'}")
    a, b = (common.load(tmp_path / x / "last.pt") for x in "ab")
    assert a["step"] == b["step"] == 24 and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    lines = [line for line in log(tmp_path / "a") if "acc1" in line]
    assert [line["epoch"] for line in lines] == list(range(1, 9)) and lines[-1]["val_images"] == 13
    assert lines[-1]["acc1"] > 60  # three classes, told by their color
    out = run(f"--eval --data {images} --init {tmp_path}/a/model.pt {HERE}")
    assert f"acc1 {lines[-1]['acc1']:.6g} " in out and f"val_loss {lines[-1]['val_loss']:.6g} " in out


@torch.no_grad()
def test_linear_probe_trains_the_head_alone_on_any_layer(images, encoder, tmp_path, run):
    with torch.enable_grad():
        run(f"--preset quick_linear --layer 2 --data {images} --init {encoder} {HERE} --epochs 20 --batch_size 36 "
            f"--base_lr 100 --eval_every 5 --out_dir {tmp_path}/out")
    new, old = common.load(tmp_path / "out" / "model.pt")["model"], common.load(encoder)["model"]
    assert all(torch.equal(v, old[k]) for k, v in new.items() if k.startswith(("blocks", "pos", "cls", "patch")))
    assert "blocks.1.norm1.bias" in new and "blocks.2.norm1.bias" not in new and log(tmp_path / "out")[-1]["acc1"] > 50
    imgs, vit = torch.randn(2, 3, 16, 16), ddae.ViT(**VIT)
    vit.load_state_dict(old)
    x = F.layer_norm(vit(imgs)[1][:, 1:].mean(1), (16,), new["fc_norm.weight"], new["fc_norm.bias"], 1e-6)
    x = (x - new["bn.running_mean"]) / (new["bn.running_var"] + 1e-6).sqrt()
    logits = build(f"--eval --init {tmp_path}/out/model.pt").eval().logits(imgs)
    torch.testing.assert_close(logits, x @ new["head.weight"].T + new["head.bias"])


@torch.no_grad()
def test_two_processes_evaluate_every_image_once(images, tuned, run):
    """13 images: 2 processes get 7 and 6 of them."""
    flags = f"--eval --data {images} --init {tuned} --device cpu --num_workers"
    one, two = (re.search(r"^acc1 .*$", out, re.M)[0] for out in (run(f"{flags} 0"), launch(f"{flags} 1")))
    model, source = build(f"--eval --init {tuned}").eval(), common.Folder(images / "val")
    logits = torch.cat([model.logits(center(image, 16, 0.875)) for image, _ in source])
    labels = torch.tensor([label for _, label in source])
    right, loss = (logits.argmax(1) == labels).float().mean(), F.cross_entropy(logits, labels)
    assert one == two == f"acc1 {100 * right:.6g}  acc5 100  val_loss {loss:.6g}  val_images 13"


def test_evaluation_takes_crop_and_weights_from_the_file(images, tuned, tmp_path, run):
    """Whatever the preset, and without train/."""
    whole = resave(tuned, tmp_path / "whole.pt", crop_pct=1.0)
    (images / "train").rename(tmp_path / "elsewhere")
    out = [run(f"--eval --data {images} --init {file} {HERE} {flags}").splitlines()[-1]
           for file, flags in ((whole, ""), (whole, "--preset scratch"), (tuned, "--crop_pct 1"), (tuned, ""))]
    assert out[0] == out[1] == out[2] != out[3]


def test_broken_images_are_named_and_limited(images, tuned, run):
    flags = f"--eval --data {images} --init {tuned} {HERE} --max_bad 0.1"
    files = sorted((images / "val" / "bee").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])
    out = run(flags)
    assert out.count(f"unreadable {files[0]}") == 1 and "val_images 12" in out
    files[1].write_bytes(b"")
    with pytest.raises(SystemExit, match="2 of 13 images are unreadable"):
        run(flags)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "": "--init is missing",
    "--init {tmp}/none.pt": "none.pt is missing, damaged",
    "--init {encoder} --eval": "2 of 44 tensors are missing, misshapen, or not finite: .'head.weight",
    "--init {tmp}/renamed.pt --eval": "is for other classes than --data: \\['cow'",
    "--init {tmp}/nan.pt": "1 of 44 tensors are missing, misshapen, or not finite: .'blocks.1",
    "--init {tmp}/scaled.pt": "another kind of ViT: 1 tensors are unknown here, such as blocks.0.ls1.gamma",
    "--init {tmp}/huge.pt --eval": "logits are not finite",
    "--init {encoder} --last_k 4": "above 3, the number of blocks",
    "--init {encoder} --mode linear": "--mode linear needs --preset linear",
    "--init {encoder} --data {tmp}/unlike": "the same class folders in train/ and val/; only in one: .'cow'",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_ends_with_one_line(flags, images, encoder, tuned, tmp_path, run, capsys):
    for path in ("unlike/train/ant", "unlike/train/cow", "unlike/val/ant"):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / path / "1.png")
    resave(encoder, tmp_path / "nan.pt", {"blocks.1.norm1.bias": torch.full((16,), torch.nan)})
    resave(encoder, tmp_path / "scaled.pt", {"blocks.0.ls1.gamma": torch.ones(16)})
    resave(tuned, tmp_path / "huge.pt", {"head.weight": torch.full((3, 16), 3e38)})
    resave(tuned, tmp_path / "renamed.pt", classes=["cow", "bee", "ant"])
    data = "" if "--data" in flags else f"--data {images}"
    with pytest.raises(SystemExit) as stop:
        run(f"{FAST} {flags.format(tmp=tmp_path, encoder=encoder)} {data} --out_dir {tmp_path}/out")
    message = capsys.readouterr().err if stop.value.code == 2 else stop.value.code
    assert re.search(BAD[flags], message), message
    assert not (tmp_path / "out" / "last.pt").exists()


# --- ImageNet-A, -R, -C -----------------------------------------------------------------------------------------------

@pytest.fixture
def relatives(tmp_path):
    """Trees in the published layouts, with few classes: -A of two, -R of two others, -C of all three."""
    rng, trees = np.random.default_rng(1), {"a": ("ant", "cow"), "r": ("bee", "cow")}
    for tree, classes in (trees | {f"c/{c}/{s}": CLASSES for c in robustness.ALEXNET for s in range(1, 6)}).items():
        for name in classes:
            (tmp_path / tree / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.uniform(0, 256, (18, 20, 3)) * rng.uniform(0, 1, 3)  # of some color
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / tree / name / f"{i}.png")
    return tmp_path


def error_by_loop(model, root, allowed, crop_pct):
    wrong = []
    for file in root.glob("*/*.png"):
        logits = model.logits(center(Image.open(file), 16, crop_pct))[0].tolist()
        wrong.append(max(allowed, key=lambda c: logits[CLASSES.index(c)]) != file.parent.name)
    return 100 * np.mean(wrong)


@torch.no_grad()
def test_robustness_equals_a_loop(relatives, tuned, run):
    flags = f"--init {tuned} {HERE}"
    out = run(f"{flags} --a {relatives}/a --r {relatives}/r --c {relatives}/c --partial", robustness)
    model = build(f"--eval --init {tuned}").eval()
    for name, allowed in (("a", ("ant", "cow")), ("r", ("bee", "cow"))):
        acc = 100 - error_by_loop(model, relatives / name, allowed, 0.875)
        assert f"ImageNet-{name.upper()}  acc1 {acc:.2f} on 4 images" in out
    errors = {c: np.mean([error_by_loop(model, relatives / "c" / c / str(s), CLASSES, 1) for s in range(1, 6)])
              for c in robustness.ALEXNET}
    mce = np.mean([errors[c] / robustness.ALEXNET[c] for c in errors])
    assert f"mean error {np.mean(list(errors.values())):.2f}  mCE {mce:.2f}  over 15 corruptions" in out
    (relatives / "c" / "snow" / "2").rename(relatives / "c" / "snow" / "two")
    assert "mCE nan" in run(f"{flags} --c {relatives}/c --partial", robustness)
    (relatives / "a" / "dodo").mkdir()
    Image.new("RGB", (20, 20)).save(relatives / "a" / "dodo" / "1.png")
    for bad, message in (("--c {tmp}/c", "snow has 4 of the severities"),
                         ("--r {tmp}/r", "has 2 class folders, expected 200"),
                         ("--a {tmp}/a --partial", "1 that are no class of the model: .'dodo'")):
        with pytest.raises(SystemExit, match=message):
            run(f"{flags} {bad.format(tmp=relatives)}", robustness)
