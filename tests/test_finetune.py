"""Fine-tuning against golden values, loops, timm; files that do not fit; ImageNet's relatives on fake trees."""
import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
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
FAST = "--batch_size 12 --base_lr 0.02 --epochs 2 --warmup_epochs 0.1 --log_every 1 --device cpu --num_workers 0 " \
       "--preview_every 0 --eval_batch 4 --crop_min 0.5"


@pytest.fixture
def images(tmp_path):
    """Three classes that differ in colour: 36 images for training, 13 for validation, of different sizes."""
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
    common.save(dict(model=noisy(ddae.ViT(**VIT)).state_dict(), config=dict(VIT, method="ddae")), path)
    return path


@pytest.fixture
def best(tmp_path):
    """best.pt as fine-tuning leaves it."""
    torch.manual_seed(1)
    path = tmp_path / "best.pt"
    common.save(dict(model=noisy(finetune.Classifier(3, **VIT)).state_dict(), config=VIT, classes=CLASSES), path)
    return path


def noisy(model):
    with torch.no_grad():  # zero biases and unit norms would hide mistakes, and the head is nearly zero at first
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def config(flags):
    return common.parse(finetune.Config, finetune.RECIPES, argv=flags.split(), flag="recipe", default=lambda given: None)


def main(monkeypatch, flags, module=finetune):
    """Run a script in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags.split()])
    module.main()


def launch(processes, *flags):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.Popen([sys.executable, *torchrun, str(ROOT / "finetune.py"), *" ".join(flags).split()],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# --- recipes ----------------------------------------------------------------------------------------------------------

def test_learning_rate_golden_values():
    """Peaks: MAE 2e-3, DDAE 8e-3 at batch 4096 or taken at its word, DeepMIM's log 4e-4, ..."""
    def lr(recipe, epoch):
        return common.learning_rate(round(epoch * 1000), 1000, config(f"--init x --recipe {recipe}"))

    assert lr("mae", 2.5) == pytest.approx(1e-3) and lr("mae", 5) == pytest.approx(2e-3)
    assert lr("mae", 52.5) == pytest.approx((2e-3 + 1e-6) / 2) and lr("mae", 100) == pytest.approx(1e-6)
    peaks = dict(mae_large=4e-3, ddae=2e-3, ddae_small=4e-3, ddae_literal=8e-3, deepmim=2e-4, deepmim_clip=4e-4,
                 deepmim_800=2e-4, sdae=4e-3, sdae_large=8e-3, scratch=1.6e-3, linear=6.4, linear_boot=6.4,
                 linear_boot_large=4.48)
    for recipe, peak in peaks.items():
        cfg = config(f"--init x --recipe {recipe}")
        assert lr(recipe, cfg.warmup_epochs) == pytest.approx(peak), recipe
    assert {r: config(f"--init x --recipe {r}").epochs for r in ("ddae", "sdae_large", "scratch", "linear")} == dict(
        ddae=100, sdae_large=50, scratch=300, linear=90)


def test_layer_decay_golden_values():
    """0.65 ** (13 - id); embeddings 0, blocks 1 to 12, head and fc_norm 13; the same names as MAE decays."""
    with torch.device("meta"):
        model = finetune.Classifier(1000)
    groups = finetune.make_optimizer(model, finetune.sized(config("--mode scratch"))[0]).param_groups
    of = {id(p): g for g in groups for p in g["params"]}
    found = {name: of[id(p)] for name, p in model.named_parameters()}
    assert len(of) == len(found) == 152
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert found[name]["lr_scale"] == pytest.approx(0.0036972, rel=1e-4), name
    for i, scale in enumerate((0.0056880, 0.0087508, 0.0134627, 0.0207118, 0.0318644, 0.0490222, 0.0754188, 0.1160290,
                               0.1785063, 0.2746250, 0.4225, 0.65)):
        scales = {g["lr_scale"] for n, g in found.items() if n.startswith(f"blocks.{i}.")}
        assert len(scales) == 1 and scales.pop() == pytest.approx(scale, rel=1e-5)
    assert {found[n]["lr_scale"] for n in ("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias")} == {1}
    assert {n for n, g in found.items() if g["weight_decay"]} == {
        "patch_embed.proj.weight", "head.weight",
        *(f"blocks.{i}.{m}.weight" for i in range(12) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))}


def test_lars_equals_a_loop():
    torch.manual_seed(0)
    w, b = torch.randn(4, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    zero = torch.zeros(2, 2, requires_grad=True)
    optimizer = finetune.LARS([w, b, zero], weight_decay=0.1)
    want, momentum = [p.detach().numpy().astype(float) for p in (w, b, zero)], [0.0, 0.0, 0.0]
    for step in range(5):
        lr = 0.5 - 0.1 * step
        grads = [torch.randn_like(p) for p in (w, b, zero)]
        for p, g in zip((w, b, zero), grads):
            p.grad = g.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for i, g in enumerate(grads):
            g = g.numpy().astype(float)
            if want[i].ndim == 2:
                g = g + 0.1 * want[i]
                length = (want[i] ** 2).sum() ** 0.5
                if length > 0:
                    g = g * 0.001 * length / (g ** 2).sum() ** 0.5
            momentum[i] = 0.9 * momentum[i] + g
            want[i] = want[i] - lr * momentum[i]
    for p, expected in zip((w, b, zero), want):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


# --- model and samples ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("global_pool", ["token", "avg"])
@torch.no_grad()
def test_logits_of_a_timm_vit_b(tmp_path, global_pool):
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=7, global_pool=global_pool).eval()
    for p in vit.parameters():
        p.add_(0.02 * torch.randn_like(p))
    torch.save(vit.state_dict(), tmp_path / "timm.pt")
    cfg, weights, _ = finetune.sized(config(f"--eval --init {tmp_path / 'timm.pt'}"))
    assert (cfg.img_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads) == (224, 16, 768, 12, 12)
    imgs = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(finetune.build(cfg, weights, 7).eval().logits(imgs), vit(imgs), rtol=0, atol=1e-5)


@torch.no_grad()
def test_pooling_and_loss_by_hand(encoder):
    cfg, weights, _ = finetune.sized(config(f"--init {encoder} --drop_path 0"))
    model = noisy(finetune.build(cfg, weights, 3)).eval()
    imgs, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 2, 1, 2])
    vit = ddae.ViT(**VIT)
    rest = vit.load_state_dict(model.state_dict(), strict=False)
    assert set(rest.missing_keys) == {"norm.weight", "norm.bias"} and {k.split(".")[0] for k in rest.unexpected_keys} == {
        "fc_norm", "head"}
    features = torch.stack([sum(tokens[1:]) / 16 for tokens in vit(imgs)[-1]])
    logits = F.layer_norm(features, (16,), model.fc_norm.weight, model.fc_norm.bias, 1e-6) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model.logits(imgs), logits)
    torch.manual_seed(5)
    loss, metrics = model(imgs, labels)
    torch.manual_seed(5)
    mixed, soft = model.mix(imgs, labels)
    assert not torch.equal(mixed, imgs) and soft.shape == (4, 3)
    target = 0.9 * soft + 0.1 / 3
    assert loss.item() == pytest.approx(-(target * model.logits(mixed).log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    kinds = set()
    for seed in range(20):  # cutmix keeps pixels, mixup does not
        torch.manual_seed(seed)
        kinds.add(torch.isin(model.mix(imgs, labels)[0], imgs).all().item())
    assert kinds == {True, False}


def test_samples_depend_on_their_key_alone(images):
    cfg = finetune.sized(config("--mode scratch --img_size 16 --patch_size 4"))[0]
    source = common.open_data(common.parse(finetune.Config, {}, argv=["--mode", "scratch", "--data", str(images)]), "train")
    samples = finetune.Samples(source, cfg)
    img, label, key, bad = samples[0, 5]
    torch.rand(3)
    assert torch.equal(samples[0, 5][0], img) and label == source.label(5) and key == (0, 5) and not bad
    assert img.dtype == torch.uint8 and img.shape == (3, 16, 16)
    assert not torch.equal(samples[1, 5][0], img)
    crop, first, second, erase = samples.crop.transforms
    for half in (first, second):
        (augment,) = half.transforms
        assert half.p == 0.5 and (augment.num_ops, augment.magnitude) == (1, 27)
        assert augment.interpolation.value == "bilinear" and augment.fill == [124, 116, 104]
    assert erase.erase.p == 0.25
    plain = finetune.Samples(source, finetune.sized(config(
        "--mode scratch --img_size 16 --patch_size 4 --rand_augment 0 --erase 0"))[0])
    assert sum(torch.equal(plain[0, i][0], samples[0, i][0]) for i in range(36)) < 18
    erase, img = finetune.Erase(1.0), torch.full((3, 40, 40), 100, dtype=torch.uint8)
    shares = [(erase(img) != img).any(0).float().mean().item() for _ in range(50)]
    assert 0.02 < min(shares) and max(shares) < 0.34  # 2% to 1/3 of the area
    assert finetune.Erase(0.0)(img) is img


def test_table_is_resized_and_images_need_not_be_square(best):
    cfg, weights, _ = finetune.sized(config(f"--eval --init {best} --eval_size 24 32"))
    model = finetune.build(cfg, weights, 3).eval()
    table = weights["pos_embed"]
    want = F.interpolate(table[:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2), (6, 8), mode="bicubic")
    torch.testing.assert_close(model.pos_embed[0, 1:], want[0].flatten(1).T)
    assert torch.equal(model.pos_embed[:, 0], table[:, 0])
    assert model.logits(torch.randn(2, 3, 24, 32)).shape == (2, 3)
    same = [finetune.build(*finetune.sized(config(f"--eval --init {best}{flags}"))[:2], 3).eval() for flags in (
        "", " --eval_size 16 16")]
    imgs = torch.randn(2, 3, 16, 16)
    assert torch.equal(same[0].logits(imgs), same[1].logits(imgs))
    larger = finetune.build(*finetune.sized(config(f"--init {best} --img_size 32"))[:2], 3)
    assert larger.pos_embed.shape == (1, 65, 16) and larger.logits(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_heads_start_small():
    for linear, std in ((False, 2e-5), (True, 0.01)):
        head = finetune.Classifier(500, **VIT, linear=linear).head
        assert head.weight.std().item() == pytest.approx(std, rel=0.05) and not head.bias.any()


def test_last_k_and_reinit_last_k(encoder):
    cfg, weights, _ = finetune.sized(config(f"--init {encoder} --last_k 1 --reinit_last_k 2"))
    model = finetune.build(cfg, weights, 3)
    trained = {name.split(".")[0] + "." + name.split(".")[1] * name.startswith("blocks")
               for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks.2", "fc_norm.", "head."}
    for i, kept in enumerate((True, False, False)):
        assert torch.equal(model.blocks[i].attn.qkv.weight, weights[f"blocks.{i}.attn.qkv.weight"]) == kept
    fresh = model.blocks[1].attn.qkv
    assert fresh.bias.eq(0).all() and fresh.weight.abs().max() <= (6 / 64) ** 0.5 + 1e-6  # xavier of (48, 16)
    assert [b.drop_path for b in model.blocks] == pytest.approx([0, 0.05, 0.1])
    everything = finetune.build(finetune.sized(config(f"--init {encoder} --last_k 3"))[0], weights, 3)
    assert all(p.requires_grad for p in everything.parameters())


# --- what is loaded ---------------------------------------------------------------------------------------------------

def test_load_report_and_allow_partial(encoder, tmp_path, capsys):
    cfg, weights, _ = finetune.sized(config(f"--init {encoder}"))
    finetune.build(cfg, weights, 3)
    said = capsys.readouterr().out
    assert "40 of 44 tensors" in said and "drawn anew: fc_norm (2), head (2); left out: norm (2)" in said
    lacking = {k: v for k, v in weights.items() if k != "blocks.1.mlp.fc2.weight"} | {"decoder.x": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"lacks blocks \(1\), e.g. \['blocks.1.mlp.fc2.weight'\]; --allow_partial"):
        finetune.build(cfg, lacking, 3)
    cfg = config(f"--init {encoder} --allow_partial")
    model = finetune.build(finetune.sized(cfg)[0], lacking, 3)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
    assert "left out: norm (2), decoder (1)" in capsys.readouterr().out
    assert not torch.equal(model.blocks[1].mlp.fc2.weight, weights["blocks.1.mlp.fc2.weight"])


# --- runs -------------------------------------------------------------------------------------------------------------

def test_a_run_learns_and_resumes_bitwise(images, encoder, tmp_path, monkeypatch, capsys):
    flags = f"--data {images} --init {encoder} {FAST} --epochs 8 --layer_decay 0.8 --confusion"
    main(monkeypatch, f"{flags} --out_dir {tmp_path / 'a'}")
    for stop in (5, 11, 0):
        main(monkeypatch, f"{flags} --out_dir {tmp_path / 'b'} --max_steps {stop}")
    a, b = (common.load(tmp_path / x / "last.pt") for x in "ab")
    assert a["step"] == b["step"] == 24  # the stops at steps 5 and 11 are measured as well, so the best may differ
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    lines = [line for line in log(tmp_path / "a") if "acc1" in line]
    assert [line["epoch"] for line in lines] == list(range(1, 9)) and lines[-1]["val_images"] == 13
    kept = common.load(tmp_path / "a" / "best.pt")
    scores = [line["acc1"] for line in lines]
    assert kept["figures"]["acc1"] == max(scores) == a["best"] > 60  # three classes, told by their colour
    assert kept["step"] == 3 * (1 + scores.index(max(scores))) and kept["classes"] == CLASSES
    table = list(csv.reader(open(tmp_path / "a" / "confusion.csv")))
    assert table[0] == ["class", "images", "accuracy", *CLASSES] and sum(int(row[1]) for row in table[1:]) == 13
    right = sum(int(row[3 + i]) for i, row in enumerate(table[1:]))
    assert 100 * right / 13 == pytest.approx(scores[-1])
    capsys.readouterr()
    main(monkeypatch, f"--eval --data {images} --init {tmp_path / 'a' / 'best.pt'} --device cpu --num_workers 0")
    assert f"acc1 {max(scores):.6g}" in capsys.readouterr().out


def test_linear_probe_trains_the_head_alone_on_any_layer(images, encoder, tmp_path, monkeypatch):
    flags = f"--mode linear --recipe quick_linear --layer 2 --data {images} --init {encoder} --epochs 20 --batch_size 36 " \
            f"--img_size 16 --base_lr 100 --eval_every 5 --num_workers 0 --out_dir {tmp_path / 'o'}"
    main(monkeypatch, flags)
    state, before = common.load(tmp_path / "o" / "best.pt"), common.load(encoder)["model"]
    assert {k.split(".")[1] for k in state["model"] if k.startswith("blocks")} == {"0", "1"}
    assert all(torch.equal(v, before[k]) for k, v in state["model"].items() if k.startswith(("blocks", "pos", "cls", "patch")))
    assert state["model"]["bn.running_mean"].abs().max() > 1e-3
    assert state["figures"]["acc1"] > 50
    cfg, weights, _ = finetune.sized(config(f"--eval --init {tmp_path / 'o' / 'best.pt'}"))
    model = finetune.build(cfg, weights, 3).eval()
    imgs = torch.randn(2, 3, 16, 16)
    vit = ddae.ViT(**VIT)
    vit.load_state_dict(before)
    features = F.layer_norm(vit(imgs)[1][:, 1:].mean(1), (16,), weights["fc_norm.weight"], weights["fc_norm.bias"], 1e-6)
    features = (features - weights["bn.running_mean"]) / (weights["bn.running_var"] + 1e-6).sqrt()
    torch.testing.assert_close(model.logits(imgs), features @ weights["head.weight"].T + weights["head.bias"])


def test_evaluation_under_two_processes_counts_every_image_once(images, best, tmp_path):
    """13 images, batches of 4: 2 processes get 7 and 6 of them."""
    jobs = [launch(n, f"--eval --data {images} --init {best} --device cpu --eval_batch 4 --confusion --num_workers 1",
                   f"--out_dir {tmp_path / str(n)}") for n in (0, 2)]
    said = [job.communicate(timeout=180)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    lines = [re.search(r"^eval .*$", text, re.M)[0] for text in said]
    assert lines[0] == lines[1] and "val_images 13" in lines[0]
    tables = [(tmp_path / n / "confusion.csv").read_text() for n in "02"]
    assert tables[0] == tables[1]

    cfg, weights, _ = finetune.sized(config(f"--eval --init {best} --data {images}"))
    model, source = finetune.build(cfg, weights, 3).eval(), common.open_data(cfg, "val")
    imgs = torch.stack([finetune.centre_crop((16, 16), 0.875)(source.image(i)) for i in range(13)])
    with torch.no_grad():
        answers = model.logits(common.normalise(imgs, torch.device("cpu"))).argmax(1).tolist()
    right = sum(answer == source.label(i) for i, answer in enumerate(answers))
    assert f"acc1 {100 * right / 13:.6g} " in lines[0]
    loss = [float(x) for x in re.findall(r"val_loss ([\d.]+)", " ".join(lines))]
    assert loss[0] == loss[1]


def test_training_under_two_processes(images, encoder, tmp_path):
    flags = f"--data {images} --init {encoder} {FAST} --mixup 0 --cutmix 0 --drop_path 0 --recipe mae"
    jobs = [launch(n, flags, f"--out_dir {tmp_path / str(n)}", extra) for n, extra in ((0, "--micro_batch 3"), (2, ""))]
    for job in jobs:
        assert job.wait(180) == 0, job.stdout.read()
    assert len(log(tmp_path / "0")) == 6
    for a, b in zip(log(tmp_path / "0"), log(tmp_path / "2"), strict=True):
        assert {k: v for k, v in a.items() if k not in ("images_per_s", "data_wait")} == pytest.approx(
            {k: v for k, v in b.items() if k not in ("images_per_s", "data_wait")}, rel=1e-4)


@pytest.mark.parametrize("processes", [0, 2])
@torch.no_grad()
def test_knn_equals_a_loop(images, encoder, processes):
    broken = sorted((images / "train" / "bee").iterdir())[0]
    broken.write_text("no image")
    job = launch(processes, f"--mode knn --data {images} --init {encoder} --device cpu --num_workers 1")
    said = job.communicate(timeout=120)[0]
    assert said.count(f"unreadable {broken}") == 1
    vit = ddae.ViT(**VIT).eval()
    vit.load_state_dict(common.load(encoder)["model"])
    found = {}
    for split in ("train", "val"):
        source = common.Folder(images / split)
        for i in range(len(source)):
            if source.name(i) != str(broken):
                img = finetune.centre_crop((16, 16), 1.0)(source.image(i))
                x = vit.norm(vit(common.normalise(img[None], torch.device("cpu")))[-1])[0, 1:].mean(0).numpy()
                found.setdefault(split, []).append((x / np.linalg.norm(x), source.label(i)))
    right = 0
    for x, label in found["val"]:
        near = sorted(((x @ y).item(), c) for y, c in found["train"])[-20:]
        votes = [sum(np.exp(s / 0.07) for s, c in near if c == answer) for answer in range(3)]
        right += int(np.argmax(votes)) == label
    assert f"knn        {100 * right / 13:.2f}% of 13 images, against 35" in said


def test_evaluation_takes_crop_and_weights_from_the_file(images, best, tmp_path, capsys, monkeypatch):
    """Whatever recipe is given: a run from scratch is evaluated with its weights, and with its own crop."""
    common.save(common.load(best) | dict(config=VIT | dict(crop_pct=1.0)), tmp_path / "whole.pt")
    said = []
    for flags in ("", "--recipe scratch", "--mode knn", "--crop_pct 0.5"):
        main(monkeypatch, f"--eval --data {images} --init {tmp_path / 'whole.pt'} --device cpu --num_workers 0 {flags}")
        said.append(re.search(r"^eval .*$", capsys.readouterr().out, re.M)[0])
    assert said[0] == said[1] == said[2] != said[3]
    cfg, weights, _ = finetune.sized(config(f"--eval --init {tmp_path / 'whole.pt'}"))
    assert cfg.crop_pct == 1.0 and finetune.sized(config(f"--eval --init {best}"))[0].crop_pct == 0.875
    assert finetune.sized(config("--mode scratch --img_size 384"))[0].crop_pct == 1.0
    (images / "train").rename(tmp_path / "elsewhere")
    main(monkeypatch, f"--eval --data {images} --init {best} --device cpu --num_workers 0")


def test_a_head_of_other_classes_is_drawn_anew(images, best, tmp_path, capsys, monkeypatch):
    common.save(common.load(best) | dict(classes=["dog", "elk", "fox"]), tmp_path / "renamed.pt")
    probe = "--mode linear --recipe quick_linear --pool mean --img_size 16"
    for name, flags, anew in (("best", "", "none"), ("renamed", "", "head (2)"), ("best", probe, "bn (3), head (2)")):
        main(monkeypatch, f"{flags} --data {images} --init {tmp_path / name}.pt {FAST} --max_steps 1 "
                          f"--out_dir {tmp_path / anew[:2]}")
        assert f"drawn anew: {anew};" in capsys.readouterr().out


def test_a_folder_belongs_to_one_encoder(images, encoder, best, tmp_path, capsys, monkeypatch):
    """Another file's figures must not be read as this one's."""
    flags = f"--data {images} {FAST} --out_dir {tmp_path / 'o'}"
    main(monkeypatch, f"{flags} --init {encoder} --max_steps 1")
    with pytest.raises(SystemExit):
        main(monkeypatch, f"{flags} --init {best} --max_steps 1")
    assert f"init: checkpoint {encoder}, command {best}" in capsys.readouterr().err
    main(monkeypatch, f"{flags} --init {encoder} --max_steps 1")
    assert f"{tmp_path / 'o' / 'last.pt'} has these steps already; for a new run give another --out_dir" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [2, 3])
def test_a_signal_in_the_last_step_does_not_cost_the_figures(steps, images, encoder, tmp_path, monkeypatch):
    """The same command would find nothing left to do. After an earlier step the figures can wait."""
    forward, calls = finetune.Classifier.forward, []

    def interrupted(self, imgs, labels):
        calls.append(0)
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, imgs, labels)

    monkeypatch.setattr(finetune.Classifier, "forward", interrupted)
    command = f"--data {images} --init {encoder} {FAST} --max_steps 3 --eval_every 0.1 --out_dir {tmp_path / 'o'}"
    with contextlib.suppress(SystemExit):
        main(monkeypatch, command)
    evaluated = ["acc1" in json.loads(line) for line in open(tmp_path / "o" / "log.jsonl")]
    assert evaluated == [True] * (steps - 1) + [steps == 3]


def test_a_full_disk_costs_the_table_only(images, best, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    main(monkeypatch, f"--eval --data {images} --init {best} --confusion --out_dir {tmp_path}/file/x --device cpu --num_workers 0")
    out = capsys.readouterr().out
    assert "warning    cannot write" in out and "acc1" in out


def test_confusion_counts_rows_of_equal_names(tmp_path):
    finetune.write_confusion(torch.tensor([[1, 3], [0, 5]]), ["crane", "crane"], tmp_path / "x.csv")
    assert [row[2] for row in csv.reader(open(tmp_path / "x.csv"))][1:] == ["25.00", "100.00"]


def test_a_corrupt_image_is_named_and_left_out(images, best, capsys, monkeypatch):
    broken = sorted((images / "val" / "bee").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:100])
    main(monkeypatch, f"--eval --data {images} --init {best} --device cpu --num_workers 0")
    out, err = capsys.readouterr()
    assert f"unreadable {broken}" in err and len(err.splitlines()) == 1 and "val_images 12" in out


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "": "--init FILE is missing",
    "--init {tmp}/none.pt": "none.pt does not exist",
    "--init {encoder} --eval": "has no tensor head.weight; give a fine-tuned file, such as best.pt",
    "--init {tmp}/four.pt --eval": "has a head for 4 classes, --data has 3; give the data it was trained on",
    "--init {tmp}/renamed.pt --eval": "was trained on other classes: dog, --data has ant",
    "--init {encoder} --embed_dim 32": "--embed_dim 32, but {encoder} has 16; leave the flag out",
    "--init {tmp}/narrow.pt": "is of another size; blocks.0.mlp.fc1.weight: file (8, 16), model (64, 16)",
    "--init {encoder} --last_k 4": "--last_k 4 is out of range: the encoder has 3 blocks",
    "--init {encoder} --reinit_last_k 4": "--reinit_last_k 4 is out of range: the encoder has 3 blocks",
    "--init {encoder} --mode linear --layer 9": "--layer 9 is out of range: the encoder has 3 blocks",
    "--init {encoder} --mode linear --recipe mae": "--mode linear is trained by --recipe linear or linear_boot",
    "--init {encoder} --img_size 18": "18 px is not divisible by patches of 4 px; use 16 or 20",
    "--init {best} --eval --eval_size 16": "--eval_size takes height and width",
    "--init {best} --eval --eval_size 16 18": "18 px is not divisible by patches of 4 px",
    "--init {encoder} --eval_size 16 16": "--eval_size goes with --eval",
    "--init {encoder} --recipe maee": "--recipe: invalid choice: 'maee'",
    "--init {encoder} --rand_augment 31": "--rand_augment must be in 0..30",
    "--init {encoder} --data {tmp}/unlike": "val/ of --data {tmp}/unlike lacks 1 of the classes, e.g. the folder cow",
    "--init {encoder} --data {tmp}/empty": "class folder {tmp}/empty/train/dodo holds no images; fill or remove it",
    "--init {encoder} --data {tmp}/flat": "has no labels; it needs train/ and val/, each with a folder per class",
    "--init {encoder} --data {tmp}/no_val": "accuracy needs {tmp}/no_val/val; make that folder, with a folder per class",
    "--init {encoder} --data {tmp}/no_train": "{tmp}/no_train has val/ but no train/; add it, or give --eval",
    "--init {encoder} --num_heads 4": "--num_heads 4, but {encoder} has 2; leave the flag out",
    "--mode scratch --img_size 16 --patch_size 4 --embed_dim 30 --num_heads 4": "a width of 30 must be divisible by 4 and",
    "--init {best} --eval --reinit_last_k 1": "--last_k and --reinit_last_k go with --mode finetune, and not with --eval",
    "--init {encoder} --mode knn --last_k 1": "--last_k and --reinit_last_k go with --mode finetune",
    "--init {encoder} --micro_batch 1": "mixup, cutmix and --mode linear's batch norm need --micro_batch 2 at least",
    "--init {tmp}/scaled.pt": "is another kind of ViT: 3 tensors are unknown here, e.g. ['blocks.0.ls1.gamma']",
    "--init {tmp}/old.pth": "old.pth is damaged or not a checkpoint of today's torch.save; convert",
    "--init {encoder} --batch_size 64": "36 images in --data {tmp}/images are fewer than --batch_size 64",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_answered_in_one_line(flags, images, encoder, best, tmp_path, monkeypatch, capsys):
    picture = Image.new("RGB", (20, 20))
    for path in ("unlike/train/ant", "unlike/train/cow", "unlike/val/ant", "empty/train/ant", "empty/val/ant", "flat/train",
                 "flat/val", "no_val/train/ant", "no_train/val/ant"):
        (tmp_path / path).mkdir(parents=True)
        picture.save(tmp_path / path / "1.png")
    (tmp_path / "empty/train/dodo").mkdir()
    weights = common.load(encoder)["model"]
    common.save(dict(model=weights | {"blocks.0.mlp.fc1.weight": torch.zeros(8, 16)}, config=VIT), tmp_path / "narrow.pt")
    common.save(dict(model=weights | {f"blocks.{i}.ls1.gamma": torch.ones(16) for i in range(3)}, config=VIT),
                tmp_path / "scaled.pt")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    common.save(dict(model=finetune.Classifier(4, **VIT).state_dict(), config=VIT), tmp_path / "four.pt")
    common.save(common.load(best) | dict(classes=["dog", "elk", "fox"]), tmp_path / "renamed.pt")
    capsys.readouterr()
    data = "" if "--data" in flags else f" --data {images}"
    fast = FAST if "--batch_size" not in flags else FAST.replace("--batch_size 12", "")
    fast = fast if "--eval" not in flags else "--device cpu"
    where = dict(tmp=tmp_path, encoder=encoder, best=best)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"{fast} {flags.format(**where)}{data} --out_dir {tmp_path}/out")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("finetune.py: error: ") and BAD[flags].format(**where) in err
    assert not (tmp_path / "out" / "last.pt").exists()


def test_an_empty_class_without_a_folder_in_val(images, encoder, monkeypatch, capsys, tmp_path):
    """A class that val/ knows by an empty folder is no silent zero."""
    for file in (images / "val" / "cow").iterdir():
        file.unlink()
    with pytest.raises(SystemExit):
        main(monkeypatch, f"--data {images} --init {encoder} {FAST} --out_dir {tmp_path}/out")
    assert f"class folder {images}/val/cow holds no images" in capsys.readouterr().err


# --- ImageNet-A, -R, -C -----------------------------------------------------------------------------------------------

@pytest.fixture
def relatives(tmp_path):
    """Trees in the published layouts, with few classes: -A of two, -R of two others, -C of all three."""
    rng = np.random.default_rng(1)
    trees = {"a": ("ant", "cow"), "r": ("bee", "cow")}
    trees |= {f"c/{c}/{s}": CLASSES for c in robustness.ALEXNET for s in range(1, 6)}
    for tree, classes in trees.items():
        for name in classes:
            (tmp_path / tree / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(tmp_path / tree / name / f"{i}.png")
    return tmp_path


def errors_by_loop(model, root, crop):
    """Image after image; answers only among the folders that are there, but among all for -C."""
    allowed, wrong, n = CLASSES if "c" in root.parts[-3:] else sorted(p.name for p in root.iterdir()), 0, 0
    for folder in root.iterdir():
        for file in folder.iterdir():
            img = crop(Image.open(file))
            logits = model.logits(common.normalise(img[None], torch.device("cpu")))[0].tolist()
            answer = max(allowed, key=lambda c: logits[CLASSES.index(c)])
            wrong, n = wrong + (answer != folder.name), n + 1
    return wrong / n


@torch.no_grad()
def test_robustness_equals_a_loop(relatives, best, monkeypatch, capsys):
    main(monkeypatch, f"--init {best} --a {relatives}/a --r {relatives}/r --c {relatives}/c --partial --device cpu "
         "--num_workers 0", robustness)
    said = capsys.readouterr().out
    model = finetune.build(*finetune.sized(config(f"--eval --init {best}"))[:2], 3).eval()
    resized, cut = finetune.centre_crop((16, 16), 0.875), finetune.centre_crop((16, 16), 1.0)
    for name in "ar":
        acc = 100 * (1 - errors_by_loop(model, relatives / name, resized))
        assert f"ImageNet-{name.upper()}         acc1 {acc:.2f} on 4 images" in said
    errors = {c: np.mean([errors_by_loop(model, relatives / "c" / c / str(s), cut) for s in range(1, 6)])
              for c in robustness.ALEXNET}
    mce = np.mean([errors[c] / robustness.ALEXNET[c] for c in errors])
    assert f"mean error {100 * np.mean(list(errors.values())):.2f}  mCE {100 * mce:.2f} (AlexNet 100), over 15" in said
    assert said.count("(30 images)") == 15
    assert list(robustness.ALEXNET.values()) == [  # in the order of the paper
        .886428, .894468, .922640, .819880, .826268, .785948, .798360, .866816, .826572, .819324, .564592, .853204, .646056,
        .717840, .606500]
    for corruption in ("snow", "fog"):
        (relatives / "c" / corruption / "2").rename(relatives / "c" / corruption / "two")
    main(monkeypatch, f"--init {best} --c {relatives}/c --partial --device cpu --num_workers 0", robustness)
    assert "mCE none, as AlexNet's errors are means over 5 severities" in capsys.readouterr().out
    for file in (relatives / "c" / "fog" / "1" / "bee").iterdir():
        file.unlink()
    (relatives / "c" / "fog" / "1" / "bee").rmdir()  # the class may still be answered
    main(monkeypatch, f"--init {best} --c {relatives}/c --partial --device cpu --num_workers 0", robustness)
    assert f"fog                error {100 * errors_by_loop(model, relatives / 'c' / 'fog' / '1', cut):5.1f} " in \
        capsys.readouterr().out


BAD_TREES = {
    "": "nothing to measure; give --a, --r or --c",
    "--a {tmp}/none": "--a {tmp}/none is not a folder",
    "--a {tmp}/a": "a has 2 class folders instead of 200; complete it, or give --partial",
    "--a {tmp}/strange": "has 1 folders that are no class of the model, e.g. ['dodo']; if its",
    "--c {tmp}/c": "frost has 4 of the severities 1 to 5; complete it, or give --partial",
    "--c {tmp}/a --partial": "has none of the folders gaussian_noise",
    "--a {tmp}/a --classes {tmp}/none": "--classes {tmp}/none does not exist",
    "--a {tmp}/a --init {tmp}/nameless.pt": "does not name its classes; give --classes",
    "--a {tmp}/a --partial --classes {tmp}/two.txt": "has a head for 3 classes, --classes names 2",
}


@pytest.mark.parametrize("flags", BAD_TREES)
def test_bad_trees_are_answered_in_one_line(flags, relatives, best, monkeypatch, capsys):
    (relatives / "c" / "frost" / "3").rename(relatives / "c" / "frost" / "three")
    (relatives / "strange" / "dodo").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(relatives / "strange" / "dodo" / "1.png")
    common.save({k: v for k, v in common.load(best).items() if k != "classes"}, relatives / "nameless.pt")
    (relatives / "two.txt").write_text("ant\ncow\n")
    init = "" if "--init" in flags else f" --init {best}"
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"{flags.format(tmp=relatives)}{init} --device cpu --num_workers 0", robustness)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and BAD_TREES[flags].format(tmp=relatives) in err, err
