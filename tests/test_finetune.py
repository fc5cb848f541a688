"""finetune.py, augment.py, and transfer/robustness.py against golden values, loops, timm; files that do not fit."""
import argparse
import re
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, Run, differences, log
from PIL import Image
from safetensors.torch import save_file
from timm.data.auto_augment import rand_augment_transform

import augment
import common
import ddae
import finetune
from transfer import robustness

VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2)
SIZES = " ".join(f"--{k} {v}" for k, v in VIT.items())
CLASSES = ["ant", "bee", "cow"]
HERE = "--device cpu --num_workers 0"
FAST = f"{HERE} --batch_size 12 --base_lr 0.02 --epochs 2 --warmup_epochs 0.1 --log_every 1 --crop_min 0.5"


@pytest.fixture
def images(tmp_path):
    """Three classes that differ in color: 36 images for training, 13 for validation, of different sizes."""
    rng = np.random.default_rng(0)
    for i in range(49):
        path = tmp_path / "images" / ("train", "val")[i >= 36] / CLASSES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 156, (*rng.integers(16, 40, 2), 3), dtype=np.uint8)
        pixels[..., i % 3] += 90
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


@pytest.fixture
def encoder(tmp_path):
    return save(tmp_path / "e.pt", noisy(ddae.ViT(**VIT)).state_dict(), **VIT, method="ddae")


@pytest.fixture
def tuned(tmp_path):
    return save(tmp_path / "tuned.pt", noisy(build(f"--mode scratch {SIZES}")).state_dict(), **VIT, classes=CLASSES)


def save(path, model, **config):
    torch.save(dict(model=model, config=config), path)
    return path


def noisy(model):
    torch.manual_seed(1)
    with torch.no_grad():  # zero biases and unit norms would hide mistakes, and the head is nearly zero at first
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def config(flags):
    return common.parse(finetune.Config, finetune.PRESETS, argv=flags.split())


def build(flags, num_classes=3):
    """The model that a command trains or evaluates."""
    return finetune.build(*finetune.settle(config(flags))[:2], num_classes)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(flags) -> what a script prints, in this process."""
    def run(flags, module=finetune):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["x.py", *flags.split()])
        module.main()
        return capsys.readouterr().out
    return run


def center(image, size, crop_pct):
    """The evaluation crop of one image, normalized -> (1, 3, size, size)."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    short, sides = round(size / crop_pct), x.shape[2:]
    x = F.interpolate(x, [short * n // min(sides) for n in sides], mode="bicubic", antialias=True)
    top, left = (round((n - size) / 2) for n in x.shape[2:])
    x = x[:, :, top:top + size, left:left + size] / 255
    return (x - torch.tensor(common.MEAN).view(3, 1, 1)) / torch.tensor(common.STD).view(3, 1, 1)


def test_learning_rate_golden_values():
    """Peaks: MAE 2e-3; DDAE 8e-3 at batch 4096, at 1024, or BEiT's 4e-3; DeepMIM's log 4e-4; ..."""
    def lr(preset, epoch):
        return common.cosine(round(epoch * 1000), 1000, config(f"--init x --preset {preset}"))

    assert [lr("mae", e) for e in (2.5, 52.5, 100)] == pytest.approx([1e-3, (2e-3 + 1e-6) / 2, 1e-6])
    peaks = dict(mae=2e-3, mae_large=4e-3, mae_huge=4e-3, ddae=2e-3, ddae_small=4e-3, ddae_beit=4e-3, ddae_literal=8e-3,
                 deepmim=2e-4, deepmim_clip=4e-4, deepmim_800=2e-4, deepmim_code=4e-4, sdae=4e-3, sdae_large=8e-3,
                 scratch=1.6e-3, scratch_large=1.6e-3, linear=6.4, linear_large=6.4, linear_boot_large=4.48)
    assert {p: lr(p, config(f"--init x --preset {p}").warmup_epochs) for p in peaks} == pytest.approx(peaks)


def test_layer_decay_and_the_names_that_mae_decays(capsys):
    cfg = finetune.settle(config("--mode scratch --mixup 0 --cutmix 0"))[0]
    with torch.device("meta"):
        model = finetune.build(cfg, {}, 1000)
    of = {id(p): g for g in finetune.make_optimizer(model, cfg).param_groups for p in g["params"]}
    found = {name: of[id(p)] for name, p in model.named_parameters()}
    assert len(of) == len(found) == 152 and not capsys.readouterr().out
    for name, group in found.items():
        layer = 13 if name.startswith(("head", "fc_norm")) else int(name.split(".")[1]) + 1 if "blocks" in name else 0
        assert group["lr_scale"] == pytest.approx(0.65 ** (13 - layer)), name
    assert {n for n, g in found.items() if g["weight_decay"]} == {
        "patch_embed.proj.weight", "head.weight",
        *(f"blocks.{i}.{m}.weight" for i in range(12) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))}
    finetune.layer_groups(model, "", 24, 0.65, 0.05)
    assert "--layer_decay 0.65, and likely learning rate and drop path, are for ViT-B" in capsys.readouterr().out


def test_lars_is_sgd_with_scaled_gradients_of_matrices():
    torch.manual_seed(0)
    shapes = torch.ones(4, 3), torch.ones(4), torch.zeros(2, 2)
    params, copies = ([nn.Parameter(x.clone()) for x in shapes] for _ in "ab")
    lars, sgd = finetune.LARS(params, 0.1), torch.optim.SGD(copies, momentum=0.9)
    for lr in (0.5, 0.4, 0.3):
        lars.param_groups[0]["lr"] = sgd.param_groups[0]["lr"] = lr
        for p, q in zip(params, copies):
            p.grad = q.grad = torch.randn_like(p)
            if q.ndim == 2:
                q.grad = p.grad + 0.1 * q.data
                q.grad *= 0.001 * q.data.norm() / q.grad.norm() if q.any() else 1
        lars.step()
        sgd.step()
    torch.testing.assert_close(params, copies)


def test_rand_augment_equals_timm_op_by_op_and_in_the_mean():
    rng = np.random.default_rng(0)
    image = Image.fromarray(np.kron(rng.integers(20, 220, (5, 6, 3)), np.ones((7, 6, 1))).astype(np.uint8))
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", dict(
        img_mean=augment.FILL, interpolation=Image.Resampling.BICUBIC, magnitude_std=0.5))
    ours, x = augment.RandAugment(9.0), torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert [re.sub("Increasing|Rel", "", op.name) for op in theirs.ops] == list(augment.OPERATIONS)
    for op, mine in zip(theirs.ops, augment.OPERATIONS.values()):
        op.prob, op.magnitude_std = 1.0, 0.0
        for level in (0.2, 0.86, 0.93):
            op.magnitude = 10 * level
            found = {mine(image, level, s).tobytes() for s in (level, -level)}
            assert found == {op(image).tobytes() for _ in range(20)}, op.name  # of both signs
        op.prob, op.magnitude_std, op.magnitude, op.magnitude_max = 0.5, 0.5, 9.0, 9.99  # its Posterize fails at 10
    assert not np.any(augment.OPERATIONS["Posterize"](image, 1.0, 1.0))  # as with the Pillow of its time
    torch.manual_seed(0)
    np.random.seed(0)
    want = [abs(np.array(theirs(image), int) - image).mean() for _ in range(3000)]
    found = [(ours(x).int() - x).abs().float().mean().item() for _ in range(3000)]
    assert np.mean(found) == pytest.approx(np.mean(want), rel=0.06)  # about three standard errors


def test_first_crop_is_the_first_draw_cut_to_the_image():
    """Whole areas at ratios 3/4 to 4/3 never fit in 10 x 40; torchvision then takes the central 10 x 13."""
    crop, img = augment.FirstCrop(8, (1.0, 1.0)), torch.zeros(3, 10, 40)
    drawn = [crop.make_params([img]) for _ in range(300)]
    assert {d["height"] for d in drawn} == {10} and {d["width"] for d in drawn} == set(range(17, 24))
    assert min(d["left"] for d in drawn) == 0 and max(d["left"] + d["width"] for d in drawn) == 40
    samples = (finetune.Samples([], config(f"--init x --preset {p} --img_size 8")) for p in ("linear", "mae"))
    used = [isinstance(s.crop.transforms[0].transforms[0], augment.FirstCrop) for s in samples]
    assert used == [True, False] and crop(img).shape == (3, 8, 8)


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@torch.no_grad()
def test_logits_of_a_timm_vit(tmp_path, global_pool):
    vit = noisy(timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=2, global_pool=global_pool)).eval()
    torch.save(vit.state_dict(), tmp_path / "t.pt")
    model, imgs = build(f"--eval --init {tmp_path}/t.pt", 7).eval(), torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(model.logits(imgs), vit(imgs), rtol=1e-4, atol=1e-4)


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
    assert build(f"--init {encoder} --img_size 32").logits(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_what_is_loaded_and_last_k_and_reinit_last_k(encoder, tuned, capsys):
    model, weights = build(f"--init {encoder} --last_k 2 --reinit_last_k 2"), common.load(encoder)["model"]
    out = capsys.readouterr().out
    assert "used: blocks (12)" in out and "anew: blocks (24), fc_norm (2), head (2)\n" in out and "norm (2)\n" in out
    trained = {re.match(r"blocks\.\d|\w+", name)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks.1", "blocks.2", "fc_norm", "head"}
    kept = [torch.equal(b.attn.qkv.weight, weights[f"blocks.{i}.attn.qkv.weight"]) for i, b in enumerate(model.blocks)]
    assert kept == [True, False, False] and not model.blocks[1].attn.qkv.bias.any()
    assert [b.drop_path for b in model.blocks] == pytest.approx([0, 0.05, 0.1])
    assert build(f"--init {tuned}").head.weight.std() < 1e-3  # a new head, also for the same classes
    assert build(f"--preset linear --init {encoder}", 500).head.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_a_run_learns_and_resumes_bitwise_without_the_init_file(images, encoder, tmp_path, run):
    flags = f"--data {images} --init {encoder} {FAST} --epochs 8 --layer_decay 0.8"
    run(f"{flags} --out_dir {tmp_path / 'a'}")
    run(f"{flags} --out_dir {tmp_path / 'b'} --max_steps 5")
    encoder.unlink()
    run(f"{flags} --out_dir {tmp_path / 'b'}")
    assert not differences(tmp_path / "a", tmp_path / "b")
    lines = [line for line in log(tmp_path / "a") if "acc1" in line]
    assert [line["epoch"] for line in lines] == list(range(1, 9)) and lines[-1]["acc1"] > 60  # three colors


def test_the_average_of_the_weights_is_saved_and_evaluated(images, tmp_path, run):
    model, out = build(f"--preset scratch {SIZES} --ema 0.8"), tmp_path / "out"
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [nn.utils.parameters_to_vector(trained), *torch.randn(3, sum(p.numel() for p in trained))]
    for w in weights[1:]:
        nn.utils.vector_to_parameters(w, trained)
        model.after_step(1, 1)
    found = nn.utils.parameters_to_vector(model.exported.parameters())
    torch.testing.assert_close(found, sum(w * a for w, a in zip(weights, (0.512, 0.128, 0.16, 0.2))))
    run(f"--preset scratch {SIZES} {FAST} --data {images} --ema 0.8 --out_dir {out}")
    last, saved = (common.load(out / name)["model"] for name in ("last.pt", "model.pt"))
    assert all(torch.equal(v, last[f"average.{k}"]) for k, v in saved.items())
    assert not torch.equal(saved["head.weight"], last["head.weight"])
    said, line = run(f"--eval --data {images} --init {out}/model.pt {HERE}"), log(out)[-1]
    assert f"acc1 {line['acc1']:.6g} " in said and f"val_loss {line['val_loss']:.6g} " in said


@torch.no_grad()
def test_linear_mode_trains_the_head_alone_on_any_layer_and_opens_in_timm(images, encoder, tmp_path, run):
    flags = f"--preset linear --data {images} --init {encoder} {HERE} --layer 2 --pool mean --crop_pct 1 " \
        f"--epochs 20 --warmup_epochs 2 --batch_size 36 --eval_every 20 --out_dir {tmp_path}/"
    with torch.enable_grad():
        assert "tuned for ImageNet" in (said := run(f"{flags}out --base_lr 100")) and "warning" not in said
        for a, b in (("ant", "x"), ("bee", "ant"), ("x", "bee")):
            (images / "val" / a).rename(images / "val" / b)
        assert "warning: val_loss is above" in run(f"{flags}wrong --base_lr 100")
    old, new, last = (common.load(path)["model"] for path in (
        encoder, tmp_path / "out" / "model.pt", tmp_path / "out" / "last.pt"))
    assert all(torch.equal(v, old[k]) for k, v in new.items() if k.startswith(("blocks", "pos", "cls", "patch")))
    assert log(tmp_path / "out")[-1]["acc1"] > 50
    imgs, vit = torch.randn(2, 3, 16, 16), ddae.ViT(**VIT)
    vit.load_state_dict(old)
    x = F.layer_norm(vit(imgs)[1][:, 1:].mean(1), (16,), new["fc_norm.weight"], new["fc_norm.bias"], 1e-6)
    x = (x - last["bn.running_mean"]) / (last["bn.running_var"] + 1e-6).sqrt()
    theirs = timm.models.VisionTransformer(16, 4, embed_dim=16, depth=2, num_heads=2, num_classes=3, global_pool="avg")
    theirs.load_state_dict(new)
    for model in (theirs.eval(), build(f"--eval --init {tmp_path}/out/model.pt").eval().logits):
        torch.testing.assert_close(model(imgs), x @ last["head.weight"].T + last["head.bias"])


@torch.no_grad()
def test_evaluation_sees_each_image_once_in_any_number_of_processes(images, tuned, tmp_path, run):
    """13 images: 2 processes get 7 and 6. Crop and weights are the file's whatever the preset; train/ is not needed."""
    (images / "train").rename(tmp_path / "elsewhere")
    (images / "val").rename(images / "held")
    flags = f"--eval --split held --data {images} --init {tuned} --device cpu --num_workers"
    two = Run(f"{flags} 1", processes=2, path=ROOT / "finetune.py").output()
    one, two = (re.search(r"^acc1 .*$", out, re.M)[0] for out in (run(f"{flags} 0"), two))
    model, files = build(f"--eval --init {tuned}").eval(), list((images / "held").glob("*/*"))
    logits = torch.cat([model.logits(center(Image.open(file), 16, 0.875)) for file in files])
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    right, loss = (logits.argmax(1) == labels).float().mean(), F.cross_entropy(logits, labels)
    se = 100 * (right * (1 - right) / 13) ** 0.5
    assert one == two == f"acc1 {100 * right:.6g}  acc1_se {se:.6g}  acc5 100  val_loss {loss:.6g}  val_images 13"
    whole = save(tmp_path / "whole.pt", common.load(tuned)["model"], **VIT, classes=CLASSES, crop_pct=1.0)
    out = [run(f"{flags} 0 {more}").splitlines()[-1] for more in (f"--init {whole} --preset linear", "--crop_pct 1")]
    assert out[0] == out[1] != one


def test_files_of_others_also_start_pretraining_at_another_size(encoder, tmp_path):
    """MAE's with its flags, DINO's, last.pt, safetensors."""
    own, path, sizes = common.load(encoder)["model"], tmp_path / "f.pt", SIZES.replace("size 16", "size 24")
    for file in (dict(model=own | {"decoder_norm.bias": torch.ones(1)}, args=argparse.Namespace(lr=1.0)),
                 dict(student={}, teacher={f"backbone.{k}": v for k, v in own.items()} | {"head.bias": torch.ones(1)}),
                 dict(model={f"module.encoder.{k}": v for k, v in own.items()}, about=VIT), None):
        torch.save(file, path) if file else save_file(own, path := tmp_path / "f.safetensors")
        cfg, weights, _ = finetune.settle(config(f"--init {path} --mode knn" + " --num_heads 2" * (file is None)))
        assert all(torch.equal(weights[k], v) for k, v in own.items()) and cfg.num_heads in (1, 2)
        flags = f"--preset quick --K 3 {sizes} --init {path} --out_dir {tmp_path}/none".split()
        got = ddae.DDAE(common.parse(ddae.Config, ddae.PRESETS, argv=flags)).teacher.state_dict()
        torch.testing.assert_close(got, own | dict(pos_embed=finetune.resize_pos_embed(own["pos_embed"], (6, 6))))


@pytest.mark.parametrize("flags, message", [
    ("--init {encoder} --mode linear", "--mode linear needs --preset linear"),
    ("--init {renamed} --eval", "is for other classes than --data: .'cow'"),
    ("--init {scaled}", "another kind of ViT: 1 tensors are unknown here, such as blocks.0.ls1.gamma"),
    ("--init {words}", "no patch_embed.proj.weight among .'bert.weight'"),
    ("--init {tokens}", "pos_embed has 18 rows")])
def test_bad_input_ends_with_one_line(flags, message, images, encoder, tuned, tmp_path, run, capsys):
    own = common.load(encoder)["model"]
    files = dict(encoder=encoder, scaled=save(tmp_path / "scaled.pt", own | {"blocks.0.ls1.gamma": torch.ones(16)}),
                 words=save(tmp_path / "words.pt", {"bert.weight": torch.ones(1)}),
                 tokens=save(tmp_path / "tokens.pt", own | dict(pos_embed=torch.ones(1, 18, 16))),
                 renamed=save(tmp_path / "renamed.pt", common.load(tuned)["model"], **VIT, classes=CLASSES[::-1]))
    with pytest.raises(SystemExit) as stop:
        run(f"{flags.format(**files)} --data {images} {HERE} --out_dir {tmp_path}/out")
    assert re.search(message, capsys.readouterr().err if stop.value.code == 2 else stop.value.code)


@torch.no_grad()
def test_robustness_equals_a_loop(tmp_path, tuned, run):
    """Trees in the published layouts, with few classes: -A of two, -R of two others, -C of all three."""
    def error(root, allowed, crop_pct):
        files = list(root.glob("*/*.png"))
        logits = torch.cat([model.logits(center(Image.open(file), 16, crop_pct)) for file in files])
        answers = logits[:, [CLASSES.index(c) for c in allowed]].argmax(1)
        return 100 * np.mean([allowed[k] != file.parent.name for k, file in zip(answers, files)])

    rng, trees = np.random.default_rng(1), {"a": ("ant", "cow"), "r": ("bee", "cow")}
    for tree, classes in (trees | {f"c/{c}/{s}": CLASSES for c in robustness.ALEXNET for s in range(1, 6)}).items():
        for name in classes:
            (tmp_path / tree / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.uniform(0, 256, (18, 20, 3)) * rng.uniform(0, 1, 3)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / tree / name / f"{i}.png")
    flags, model = f"--init {tuned} {HERE}", build(f"--eval --init {tuned}").eval()
    out = run(f"{flags} --a {tmp_path}/a --r {tmp_path}/r --c {tmp_path}/c --partial", robustness)
    for name, allowed in trees.items():
        assert f"ImageNet-{name.upper()}  acc1 {100 - error(tmp_path / name, allowed, 0.875):.2f} on 4 images" in out
    errors = [np.mean([error(tmp_path / f"c/{c}/{s}", CLASSES, 1) for s in range(1, 6)]) for c in robustness.ALEXNET]
    mce = np.mean([e / alexnet for e, alexnet in zip(errors, robustness.ALEXNET.values())])
    assert f"mean error {np.mean(errors):.2f}  mCE {mce:.2f}  over 15 corruptions" in out
    with pytest.raises(SystemExit, match="2 class folders, expected 200"):
        run(f"{flags} --r {tmp_path}/r", robustness)
