"""
What every method file must fulfill, and every fork of one:

    python -m pytest tests/test_contract.py --method mine.py

Its main is run with `--preset quick` at tiny sizes, on a folder of 40 images, or of 40 videos of 12 frames.
"""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import common
from shapes import Shapes

ROOT = Path(__file__).parent.parent
FLAGS = "--preset quick --img_size 16 --patch_size 4 --embed_dim 16 --depth 4 --num_heads 2 --decoder_dim 16 " \
        "--decoder_heads 2 --batch_size 16 --base_lr 1e-2 --warmup_epochs 0.1 --epochs 4 --save_every 0 " \
        "--eval_every 0 --log_every 1 --device cpu --num_workers 0"
STEPS = 8  # 2 an epoch


@pytest.fixture(scope="module")
def images(method, tmp_path_factory):
    folder, frames = tmp_path_factory.mktemp("images"), 12 if hasattr(method, "videos") else 0
    for split, count in (("train", 40), ("val", 20)):
        for i in range(count):
            image, label = Shapes(split, 24)[i]
            path = folder / split / str(label) / f"{i}.png"
            for path in [path.with_suffix("") / f"{t}.png" for t in range(frames)] or [path]:
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    return folder


def run(method, images, out, flags="", monkeypatch=None):
    flags = f"{FLAGS} --data {images} --out_dir {out} {flags}"
    monkeypatch.setattr(sys, "argv", [method.__file__, *flags.split()])
    method.main()


def log(out):
    return [{k: v for k, v in json.loads(line).items() if k not in ("images_per_s", "data_wait")}
            for line in (out / "log.jsonl").read_text().splitlines()]


def make(method, images, out):
    """The model of a tiny run, images, and draws, on which a training step works."""
    argv = [*FLAGS.split(), *f"--data {images} --out_dir {out}".split()]
    cfg = common.parse(method.Config, method.PRESETS, argv=argv)
    torch.manual_seed(0)
    model = next(v for v in vars(method).values() if isinstance(v, type) and v.__module__ == method.__name__
                 and hasattr(v, "preview"))(cfg)
    source = getattr(method, "videos", common).open_data(cfg, "train")
    samples = getattr(method, "Samples", common.Samples)(source, cfg, method.draw_mask)
    imgs, draws, _ = samples.collate([samples[0, i] for i in range(8)])
    return cfg, model, *common.to_device(imgs, draws, torch.device("cpu"))


def test_masks_are_permutations_that_depend_on_the_key(method, images, tmp_path):
    cfg, _, _, draws = make(method, images, tmp_path)
    N = (cfg.img_size // cfg.patch_size) ** 2 * (getattr(cfg, "num_frames", 1) // getattr(cfg, "tubelet_size", 1))
    assert (draws.sort(1).values == torch.arange(N)).all() and 0 < cfg.num_keep < N
    drawn = [[tuple(method.draw_mask(np.random.default_rng(seed), cfg)) for seed in range(20)] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


def test_gradients_are_finite_and_reach_what_learns(method, images, tmp_path):
    _, model, imgs, draws = make(method, images, tmp_path)
    loss, metrics = model(imgs, draws)
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad and v.isfinite() for v in metrics.values())
    for name, p in model.named_parameters():  # DDP needs a gradient for each trainable parameter
        assert (p.grad is not None) == p.requires_grad, name
        assert p.grad is None or p.grad.isfinite().all(), name
        assert not (name.startswith("teacher.") and p.requires_grad), name


def test_the_loss_is_a_mean_over_images(method, images, tmp_path):
    _, model, imgs, draws = make(method, images, tmp_path)
    with torch.no_grad():
        whole, parts = model(imgs, draws)[0], [model(imgs[i:i + 2], draws[i:i + 2])[0] for i in range(0, 8, 2)]
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)


def test_bf16_is_close_to_fp32(method, images, tmp_path):
    _, model, imgs, draws = make(method, images, tmp_path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = model(imgs, draws)[0]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(model(imgs, draws)[0].item(), rel=0.03)


def test_a_run_learns_stops_resumes_and_exports(method, images, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(method, images, whole, monkeypatch=monkeypatch)
    for stop in (1, 4, 7, STEPS):
        run(method, images, cut, f"--max_steps {stop}", monkeypatch)
    a, b = (common.load(out / "last.pt") for out in (whole, cut))
    assert a["step"] == b["step"] == STEPS and log(whole) == log(cut)
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][i][k]) for k, v in state.items())

    assert [line["step"] for line in log(whole)] == list(range(1, STEPS + 1))
    assert all(math.isfinite(v) for line in log(whole) for v in line.values())
    assert (whole / "preview.png").stat().st_size > 10_000

    file = common.load(whole / "encoder.pt")
    assert file["config"]["embed_dim"] == 16
    if hasattr(method, "videos"):  # timm has no ViT for them
        return
    vit = timm.models.VisionTransformer(16, 4, embed_dim=16, depth=4, num_heads=2, num_classes=0)
    vit.load_state_dict(file["model"])
    cfg, model, imgs, _ = make(method, images, tmp_path / "new")
    model.load_state_dict(a["model"])
    encoder = getattr(model, "exported", model.encoder)
    with torch.no_grad():
        features = encoder.norm(encoder(imgs)[-1])
        torch.testing.assert_close(features, vit.eval().forward_features(imgs), atol=1e-5, rtol=0)
    assert file["config"]["method"] == type(model).__name__.lower()


def test_processes_and_micro_batches_change_nothing(method, images, tmp_path, monkeypatch):
    run(method, images, tmp_path / "one", monkeypatch=monkeypatch)
    run(method, images, tmp_path / "micro", "--micro_batch 4", monkeypatch)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", method.__file__]
    flags = [*FLAGS.split(), "--data", images, "--out_dir", tmp_path / "two", "--micro_batch", "4"]
    subprocess.run([*torchrun, *flags], check=True)
    for name in ("micro", "two"):
        for a, b in zip(log(tmp_path / "one"), log(tmp_path / name), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4) and b["lr"] == a["lr"]
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_every_equation_and_every_flag_is_in_the_code(method):
    text = open(method.__file__).read()
    body = text.replace(method.__doc__, "")
    told, done = (set(re.findall(r"Eq\. \d", part)) for part in (method.__doc__, body[body.index("# --- masking"):]))
    assert told == done
    assert 1 <= text.count("Fork here:") <= 4
    read = text + open(common.__file__).read()
    for name in method.Config.__annotations__:
        assert re.search(rf"(cfg|self)\.{name}\b", read), f"Config.{name} is read nowhere"


def test_the_shared_part_is_the_same_text_in_the_methods_here():
    texts = [(ROOT / f"{name}.py").read_text() for name in ("ddae", "deepmim", "sdae")]
    parts = [re.search(r"# --- shared by all methods.*?# --- end of the shared part", text, re.S)[0] for text in texts]
    assert parts[0] == parts[1] == parts[2] and len(parts[0]) > 5000
