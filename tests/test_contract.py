"""
What every method file must fulfill, and every fork of one:

    python -m pytest tests/test_contract.py --method mine.py

Its main is run with `--preset quick` at tiny sizes, on a folder of 64 images, or on generated videos.
"""
import math
import re
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY, Run, differences, log, read

import common

FLAGS = f"--preset quick {TINY} --depth 4 --warmup_epochs 0.1 --epochs 2 --eval_every 0"
STEPS = 8  # 4 an epoch


def tiny(method, images):
    """Flags of a tiny run; not every method has decoders."""
    flags = f"{FLAGS} --data motions --max_steps {STEPS}" if hasattr(method, "videos") else f"{FLAGS} --data {images}"
    return flags if "decoder_dim" in method.Config.__annotations__ else re.sub(r"--decoder_\w+ \d+ ", "", flags)


@pytest.fixture
def run(method, images, monkeypatch):
    def run(out, flags=""):
        flags = f"{tiny(method, images)} --out_dir {out} {flags}"
        monkeypatch.setattr(sys, "argv", [method.__file__, *flags.split()])
        monkeypatch.setattr(common, "resident", lambda s, _: None if type(s) is common.Samples else pytest.fail())
        method.main()

    return run


@pytest.fixture
def parts(run, tmp_path, monkeypatch):
    """What main gives to common.train -> cfg, model, images (8, 3, H, W) or clips (8, T, 3, H, W), draws."""
    given = []
    with monkeypatch.context() as patch:
        patch.setattr(common, "train", lambda *args, **options: given.extend(args))
        run(tmp_path / "unused")
    cfg, model, samples = given[:3]
    imgs, draws, _ = samples.collate([samples[0, i] for i in range(8)])
    return cfg, model, imgs / 127.5 - 1, draws


def test_masks_depend_on_the_key(method, parts):
    """They are permutations of all patches, visible ones first, or bool, True where masked."""
    cfg, model, _, draws = parts
    N = math.prod(model.encoder.grid)
    if draws.dtype == torch.bool:
        assert draws.shape[1] == N and draws.any(1).all() and not draws.all(1).any()
    else:
        assert (draws.sort(1).values == torch.arange(N)).all() and 0 < cfg.num_keep < N
    drawn = [[tuple(method.draw_mask(np.random.default_rng(seed), cfg)) for seed in range(20)] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


def test_loss_and_gradients(parts):
    _, model, imgs, draws = parts
    loss, metrics = model(imgs, draws)
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad and v.isfinite() for v in metrics.values())
    with torch.no_grad():
        mean = sum(model(imgs[i:i + 2], draws[i:i + 2])[0] for i in range(0, 8, 2)) / 4
        with torch.autocast("cpu", torch.bfloat16):
            short = model(imgs, draws)[0]
    assert loss.item() == pytest.approx(mean.item(), rel=1e-5)  # a mean over images
    assert short.dtype == torch.float32 and short.item() == pytest.approx(loss.item(), rel=0.03)
    loss.backward()
    for name, p in model.named_parameters():  # DDP needs a gradient for each trainable parameter
        assert (p.grad is not None) == p.requires_grad, name
        assert p.grad is None or p.grad.isfinite().all(), name
        assert not (name.startswith("teacher.") and p.requires_grad), name


def test_a_run_stops_resumes_previews_and_exports(run, parts, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole)
    for stop in (3, STEPS):
        run(cut, f"--max_steps {stop}")
    assert differences(whole, cut) == [] and [line["step"] for line in log(whole)] == list(range(1, STEPS + 1))
    assert all(math.isfinite(v) for line in log(whole) for v in line.values())
    assert (whole / "preview.png").stat().st_size > 10_000

    file, (_, model, imgs, _) = read(whole / "encoder.pt"), parts
    assert file["config"]["embed_dim"] == 16 and file["config"]["method"] == type(model).__name__.lower()
    if imgs.ndim == 5:  # timm has no ViT for clips
        return
    name = "vit_base_patch16_224" if "pos_embed" in file["model"] else "beitv2_base_patch16_224"
    vit = timm.create_model(name, img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=0,
                            global_pool="token")
    vit.load_state_dict(file["model"])
    model.load_state_dict(read(whole / "last.pt")["model"])
    encoder = getattr(model, "exported", model.encoder)
    with torch.no_grad():
        features = encoder.norm(encoder(imgs)[-1])
        torch.testing.assert_close(features, vit.eval().forward_features(imgs), atol=1e-5, rtol=0)


def test_processes_and_micro_batches_change_nothing(method, images, tmp_path):
    runs = ("one", 1, ""), ("micro", 1, "--micro_batch 4 --recompute"), ("two", 2, "--micro_batch 4")
    for name, processes, more in runs:
        flags = f"{tiny(method, images)} --out_dir {tmp_path / name} {more}"
        job = Run(flags, processes, path=ROOT / method.__file__)
        assert not any(job.wait()), job.output()
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
