"""Measurements and pictures of evaluate.py and analyze.py against loops, golden values, and single pixels."""
import csv
import functools
import json
import shutil
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, TINY, Run
from matplotlib.image import imread
from PIL import Image
from scipy.ndimage import distance_transform_edt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from test_common import config
from test_finetune import (CLASSES, HERE, VIT, build, center, encoder, images, noisy, run, save,  # noqa: F401
                           tuned)
from torchvision.transforms import v2

import analyze
import common
import ddae
import deepmim
import evaluate
import sdae


def knn_by_loop(train, val):
    """Percent of val right; train, val: lists of feature (D,), label."""
    right = 0
    for x, label in val:
        near = sorted(((x @ z).item(), y) for z, y in train)[-20:]
        right += int(np.argmax([sum(np.exp(s / 0.07) for s, y in near if y == c) for c in range(3)])) == label
    return 100 * right / len(val)


def feature(vit, x):
    return F.normalize(vit.norm(vit(x)[-1])[0, 1:].mean(0), dim=0)


@torch.no_grad()
def test_knn_of_two_processes_equals_a_loop(images, encoder):
    x, y = F.normalize(torch.randn(240, 3)), torch.randint(3, (240,))
    assert evaluate.knn_accuracy(x[:140], y[:140], x[140:], y[140:]) == pytest.approx(
        knn_by_loop(list(zip(x[:140], y[:140])), list(zip(x[140:], y[140:]))))
    broken = sorted((images / "train" / "bee").iterdir())[0]
    broken.write_text("no image")
    flags = f"--mode knn --data {images} --init {encoder} --device cpu --num_workers 1 --max_bad 0.05"
    out = Run(flags, 2, path=ROOT / "finetune.py").output()
    broken.unlink()
    vit = ddae.ViT(**VIT).eval()
    vit.load_state_dict(common.load(encoder)["model"])
    found = knn_by_loop(*([(feature(vit, center(image, 16, 1)), y) for image, y in common.Folder(images / split)]
                          for split in ("train", "val")))
    se = 100 * np.std([1] * round(0.13 * found) + [0] * round(13 - 0.13 * found)) / 13 ** 0.5
    assert out.count(f"unreadable {broken}") == 1 and f"knn {found:.6g}  knn_se {se:.6g}  val_images 13  train" in out


def test_probe_equals_scikit_learn(images, encoder, monkeypatch, run):
    """Strength, accuracy, and the minimum; and two processes equal one."""
    flags = f"--mode probe --data {images} --init {encoder} {HERE}"
    assert run(flags).splitlines()[-1] == Run(flags, 2, path=ROOT / "finetune.py").output().splitlines()[-1]
    x, noise = torch.randn(900, 2, 10), torch.randn(900, 3)
    y, x = (x[:, 0, :3] + noise).argmax(1), 5 * x + 1
    monkeypatch.setattr(evaluate, "outputs", lambda *_: [(x[:600], y[:600], 0), (x[600:], y[600:], 0)])
    found = evaluate.probe(None, None, "cpu", None)

    def fit(ids, strength):
        return LogisticRegression(C=1 / (len(ids) * strength), tol=1e-8, max_iter=1000).fit(z[ids], y[ids])

    z, order = x.flatten(1), np.random.default_rng(0).permutation(600)
    z = (z - z[:600].mean(0)) / z[:600].std(0, correction=0)
    losses = {10.0 ** i: log_loss(y[order[:120]], fit(order[120:], 10.0 ** i).predict_proba(z[order[:120]]))
              for i in range(-6, 2)}
    theirs, head = fit(range(600), found["strength"]), nn.Linear(20, 3)
    assert found["strength"] == min(losses, key=losses.get) not in (1e-6, 10)
    assert found["probe"] == pytest.approx(100 * theirs.score(z[600:], y[600:]), abs=0.3)
    evaluate.logistic_regression(head, z[:600], y[:600], found["strength"], 1000)
    assert np.abs(head.weight.detach().numpy() - theirs.coef_).max() < 1e-3


@torch.no_grad()
def test_evaluation_during_pretraining(images):
    """val_loss is the mean over images under masks that no seed changes; eval_images / 5 of val/ are used."""
    found = []
    for seed in (0, 7):
        flags = f"--preset quick --data {images} --img_size 16 --eval_images 36 --seed {seed} {HERE}"
        cfg = common.parse(ddae.Config, ddae.PRESETS, argv=flags.split())
        torch.manual_seed(3)
        model, samples = ddae.DDAE(cfg).eval(), common.Samples(common.open_data(cfg, "train"), cfg, ddae.draw_mask)
        found.append(evaluate.evaluate_encoder(model, cfg, *common.setup(cfg), samples))
    samples.source.classes = [""]  # unlabeled
    found.append(evaluate.evaluate_encoder(model, cfg, *common.setup(cfg), samples))
    assert found[0] == found[1] == found[2] | {k: found[0][k] for k in ("knn", "knn_se")} != found[2]
    val, ids = common.open_data(cfg, "val"), np.random.default_rng(0).permutation(13)[:7].tolist()
    picked = [(center(val[i][0], 16, 1), val[i][1]) for i in ids]
    masks = [torch.from_numpy(ddae.draw_mask(np.random.default_rng((0, i)), cfg))[None] for i in ids]
    losses = [model(x, mask)[0].item() for (x, _), mask in zip(picked, masks)]
    assert found[0]["val_loss"] == pytest.approx(np.mean(losses), rel=1e-3)
    train = [(feature(model.encoder, center(image, 16, 1)), y) for image, y in common.Folder(images / "train")]
    assert found[0]["knn"] == pytest.approx(knn_by_loop(train, [(feature(model.encoder, x), y) for x, y in picked]))


def test_panels_are_images_maps_and_features_in_common_colors(tmp_path):
    colors, features = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, 5)
    features[:, :2] = torch.randn(2, 2, 4, 5)
    panels = dict(image=colors, map=torch.arange(32.0).view(2, 4, 4), target=features, prediction=features.clone())
    evaluate.draw_panels(panels, tmp_path / "preview.png")
    picture = imread(tmp_path / "preview.png")[..., :3]
    H, W = picture.shape[:2]
    columns = [picture[:, W * i // 4:W * (i + 1) // 4] for i in range(4)]
    assert np.abs(columns[2][:, :W // 5] - columns[3][:, :W // 5]).mean() < 0.05  # the same colors
    assert (columns[2] == 1).all(-1).mean() > 0.4  # zeros stay blank
    want = (colors[0, :, 0, 0].numpy() * common.STD + common.MEAN).clip(0, 1)
    assert np.abs(columns[0] - want).max(-1).min() < 0.02  # the color of the first pixel is there


def test_small_images_are_decoded_once_by_all_workers(tmp_path):
    (tmp_path / "a").mkdir()
    for i, shape in enumerate([(10, 12, 3)] * 6 + [(9, 12, 3), (10, 12)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"a/{i}.png")
    cfg, bad = config(f"--data {tmp_path} --num_workers 2"), {}
    source = common.open_data(cfg, "train")
    read = functools.partial(evaluate.read_center, source, cfg)
    first = [x for x in evaluate.read_each(read, source, range(8), cfg, batch_size=2)]
    shutil.rmtree(tmp_path / "a")
    again = [x for x in evaluate.read_each(read, source, range(8), cfg, batch_size=2, bad=bad)]
    first, again = sum(first, []), sum(again, [])
    assert len(first) == 8 and [Path(name).name for name in bad] == ["6.png"]
    for (img, *label), (img2, *label2) in zip(first[:6] + first[7:], again, strict=True):
        assert torch.equal(img, img2) and label == label2


def test_center_crops_of_large_jpegs_are_nearly_those_of_the_whole_image(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8))
    noise.resize((600, 400), Image.Resampling.BICUBIC).save(tmp_path / "x.jpg")
    found = evaluate.read_center([(image := Image.open(tmp_path / "x.jpg"), 0)], config("--img_size 64"), 0)[0].int()
    x = v2.functional.resize(common.to_rgb(Image.open(tmp_path / "x.jpg")), [64], v2.InterpolationMode.BICUBIC)
    assert image.size == (300, 200) and (found - v2.functional.center_crop(x, [64])).abs().float().mean() < 1


@torch.no_grad()
def test_photos_are_classified_and_embedded(tuned, encoder, tmp_path, run):
    """Turned as EXIF says, also in subfolders. A broken one is named; what is no image is passed over."""
    names, exif = [tmp_path / "photos" / name for name in ("c.png", "sub/d.png", "sub/e.png")], Image.Exif()
    names[1].parent.mkdir(parents=True)
    for other in ("a.png", "b.txt"):
        (tmp_path / "photos" / other).write_text("broken")
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    for name in names:
        image.save(name, exif=exif)
    image, flags = image.transpose(Image.Transpose.ROTATE_270), f"{tmp_path}/photos {HERE} --out_dir {tmp_path} --init"
    assert run(f"--predict {flags} {tuned}").count("unreadable") == 1
    p = build(f"--eval --init {tuned}").eval().logits(center(image, 16, 0.875)).softmax(1)[0]
    want = [text for i in p.argsort(descending=True) for text in (CLASSES[i], f"{p[i]:.4g}")]
    assert list(csv.reader(open(tmp_path / "predictions.csv")))[1:] == [[str(name), *want] for name in names]
    Run(f"--embed {flags} {encoder}", 2, path=ROOT / "finetune.py").wait()
    vit = timm.models.VisionTransformer(16, 4, embed_dim=16, depth=3, num_heads=2, num_classes=0).eval()
    vit.load_state_dict(common.load(encoder)["model"])
    tokens, found = vit.forward_features(center(image, 16, 1))[0].numpy(), np.load(tmp_path / "features.npz")
    assert found["files"].tolist() == [str(name) for name in names]  # as in one process
    np.testing.assert_allclose(found["cls"], [tokens[0]] * 3, atol=1e-5)
    np.testing.assert_allclose(found["mean"], [tokens[1:].mean(0)] * 3, atol=1e-5)


def test_micro_batch_auto_is_the_largest_divisor_with_which_a_step_fits(images, monkeypatch):
    forward, tried = ddae.DDAE.forward, []

    def small_memory(model, imgs, draws):
        tried.append(len(imgs))
        if len(imgs) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, imgs, draws)

    monkeypatch.setattr(ddae.DDAE, "forward", small_memory)
    cfg = config(f"--batch_size 24 --micro_batch auto --data {images}")
    model, samples = ddae.DDAE(cfg), common.Samples(common.open_data(cfg, "train"), cfg, ddae.draw_mask)
    before = [p.clone() for p in model.parameters()]
    found = evaluate.largest_batch(model, cfg, *common.setup(cfg), samples, common.adamw)
    assert found == 6 and tried == [24, 12, 8, 6, 6]
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(model.parameters(), before))


# --- analyze.py -------------------------------------------------------------------------------------------------------

def distances(A, side, p):
    """Attention (T, T) of one head on a side x side grid of p pixels -> mean distance, rescaled and as it is."""
    vit = SimpleNamespace(patch_size=p, grid=(side, side))
    return analyze.attention_distance(A[None, None], vit).flatten().tolist()


def test_attention_distance_golden_values():
    for side, p, pixels in ((14, 16, 116.492), (8, 4, 16.546)):
        A = torch.full((1 + side ** 2,) * 2, 0.4 / side ** 2)
        A[:, 0] = 0.6  # [CLS]
        assert distances(A, side, p) == pytest.approx([pixels, 0.4 * pixels], abs=1e-3)
        assert distances(torch.eye(1 + side ** 2), side, p) == [0, 0]
    A = torch.zeros(5, 5)
    A[:, 4] = 1  # all look at the lower right corner of 2 x 2 patches
    assert distances(A, 2, 10) == pytest.approx([10 * (2 ** 0.5 + 1 + 1) / 4] * 2)


def test_head_similarity_of_identical_disjoint_and_random_heads():
    A = torch.rand(2, 3, 5, 5).softmax(-1)
    assert analyze.head_similarity(A[:, :1].expand(2, 3, 5, 5), None).numpy() == pytest.approx(1)
    assert analyze.head_similarity(torch.eye(3)[None, :, None].expand(1, 3, 3, 3), None).eq(0).all()
    want = [[np.mean([F.cosine_similarity(A[b, h, i], A[b, g, i], dim=0) for g in {0, 1, 2} - {h} for i in range(5)])
             for h in range(3)] for b in range(2)]
    assert analyze.head_similarity(A, None)[0].numpy() == pytest.approx(np.array(want), rel=1e-5)


def gram(*features):
    return torch.stack([x.double() @ x.double().T for x in features])


def test_cka_is_unbiased_and_invariant():
    K, L = gram(torch.randn(6, 3), torch.randn(6, 4))  # HSIC by its definition: a mean over quadruples of images
    terms = [K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]) for i, j, q, r in permutations(range(6), 4)]
    assert analyze.hsic(K[None], L[None]).item() == pytest.approx((sum(terms) / len(terms)).item())
    rotation = torch.linalg.qr(torch.randn(20, 20))[0]
    batches = [gram(x, 3 * x @ rotation + 5) for x in (torch.randn(12, 20), torch.randn(9, 20))]
    assert analyze.cka_from(batches).numpy() == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)
    found = [analyze.cka_from([gram(*torch.randn(2, 16, 300)) for _ in range(2)])[0, 1].item() for _ in range(400)]
    assert abs(np.mean(found)) < 2 * np.std(found) / 400 ** 0.5 < 0.01  # independent features; the biased CKA is 0.95


@torch.no_grad()
def test_captured_attention_is_that_of_the_fused_kernel():
    """It equals a softmax written out, and gives the block's output when values are mixed by it."""
    vit, imgs = noisy(ddae.ViT(**VIT)), torch.randn(2, 3, 16, 16)
    outputs, found = vit(imgs), list(analyze.attention(vit, imgs))
    assert len(found) == 3 and not vit.blocks[0].attn.qkv._forward_hooks
    for block, A, x, output in zip(vit.blocks[1:], found[1:], outputs, outputs[1:]):
        q, k, v = (block.norm1(x) @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
        mixed = []
        for h, d in enumerate((slice(0, 8), slice(8, 16))):
            e = (q[..., d] @ k[..., d].mT / 8 ** 0.5).exp()
            assert A[:, h].numpy() == pytest.approx((e / e.sum(-1, keepdim=True)).numpy(), abs=1e-5)
            mixed.append(A[:, h] @ v[..., d])
        x = x + block.attn.proj(torch.cat(mixed, -1))
        assert (x + block.mlp(block.norm2(x))).numpy() == pytest.approx(output.numpy(), abs=1e-4)


@pytest.fixture
def draw(run, tmp_path):  # noqa: F811
    def draw(figure, flags):
        """-> the numbers of a figure, and the bytes of its picture."""
        path = tmp_path / "figures" / f"{figure}.png"
        run(f"{figure} {flags} {HERE} --out {path}", analyze)
        assert imread(path).std() > 0.01
        return json.loads(path.with_suffix(".json").read_text()), path.read_bytes()
    return draw


@torch.no_grad()
def test_figures_of_encoders(draw, images, encoder, tmp_path):  # noqa: F811
    """Ours, timm's, and one of a single block in one figure; one image, another grid, bf16; always the same."""
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    one = save(tmp_path / "one.pt", noisy(ddae.ViT(**VIT | dict(depth=1))).state_dict(), **VIT)
    photo, found = sorted((images / "val" / "bee").iterdir())[0], {}
    for figure in ("attention-distance", "attention-map", "cka"):
        flags = f"{figure} --data {images} --init {encoder} {one} {tmp_path / 'timm.pth'}".split(" ", 1)
        found[figure] = draw(*flags)
        assert found[figure] == draw(*flags)
    for figure in ("attention-distance", "attention-map", "head-similarity"):
        assert draw(figure, f"--init {one} --image {photo} --img_size 24 --precision bf16")[0].keys() == {"one"}
    assert found["attention-distance"][0].keys() == found["attention-map"][0].keys() == {"e", "one", "timm"}
    cka = {pair: np.array(x) for pair, x in found["cka"][0].items()}
    assert cka["e, timm"].shape == (3, 2) and cka["e, one"] == pytest.approx(cka["one, e"].T)
    assert np.diag(cka["e, e"]) == pytest.approx(1) and cka["one, one"] == pytest.approx(1)

    vit, val, ids = ddae.ViT(**VIT).eval(), common.Folder(images / "val"), np.random.default_rng(0).permutation(13)[:3]
    vit.load_state_dict(common.load(encoder)["model"])
    of = [[*analyze.attention(vit, center(val[i][0], 16, 1))] for i in ids]
    want = np.mean([[analyze.head_similarity(A, vit)[0, 0] for A in blocks] for blocks in of], 0)  # (L, heads)
    found = draw("head-similarity", f"--init {encoder} --data {images} --images 3")[0]["e"]
    assert np.array([*found.values()][0]) == pytest.approx(want, abs=2e-3)
    found = draw("attention-map", f"--init {encoder} --data {images} --images 3 --block 2")[0]["e"]
    assert np.reshape(found, (3, 2, 16)) == pytest.approx(torch.cat([A[1][:, :, 0, 1:] for A in of]).numpy(), abs=2e-3)


def test_mask_numbers_are_those_of_scipy(draw):
    found, cfg = draw("mask", "--ratios 0.75 0.9")[0], ddae.Config(mask="random", mask_ratio=0.9)
    assert found["block 0.75"] == pytest.approx(2.83, abs=0.1) and found["random 0.75"] == pytest.approx(1.24, abs=0.01)
    masks = np.ones((200, 196))
    for i, mask in enumerate(masks):
        mask[ddae.draw_mask(np.random.default_rng(i), cfg)[:cfg.num_keep]] = 0
    D = np.concatenate([distance_transform_edt(mask.reshape(14, 14)) for mask in masks])
    assert found["random 0.9"] == pytest.approx(D[D > 0].mean(), rel=1e-5)


@pytest.mark.parametrize("Model, flags", [(ddae.DDAE, "--K 3"), (ddae.DDAE, "--preset mae --K 2"),
                                          (deepmim.DeepMIM, "--taps 1 3"), (sdae.SdAE, "")])
@torch.no_grad()
def test_errors_of_a_reconstruction_are_the_losses(draw, images, tmp_path, Model, flags):  # noqa: F811
    method = sys.modules[Model.__module__]
    cfg = common.parse(method.Config, method.PRESETS, argv=f"--data {images} {TINY} --depth 3 {flags}".split())
    model = noisy(Model(cfg)).eval()
    if Model is sdae.SdAE:  # the figure centers predictions, the loss does not
        model.decoder.decoder_pred.weight -= model.decoder.decoder_pred.weight.mean(0)
        model.decoder.decoder_pred.bias -= model.decoder.decoder_pred.bias.mean()
    torch.save(dict(model=model.state_dict(), about=common.describe(cfg, model, [])), tmp_path / "last.pt")
    found = draw("reconstruction", f"--init {tmp_path / 'last.pt'} --data {images} --images 4")[0]
    imgs = evaluate.read_images(analyze.Config(data=str(images), images=4, num_workers=0), 16, 0)
    draws = torch.from_numpy(np.stack([method.draw_mask(np.random.default_rng((0, i)), cfg) for i in range(4)]))
    loss, metrics = model(*common.to_device(imgs, draws, "cpu"))
    want = [v.item() for name, v in metrics.items() if name.startswith("pixel/")] or [loss.item()]
    assert [*found.values()] == pytest.approx(want, rel=1e-3)


def test_curves_and_what_does_not_fit(draw, encoder, tmp_path):  # noqa: F811
    lines = [{"epoch": s / 10, "pixel/2": 9, "pixel/10": 1 / s, "beta/2": -s, "beta/10": s} for s in range(1, 21)]
    lines.append({"epoch": 2.0, "val_pixel/10": 7, "knn": 1})
    log, flat, text = tmp_path / "log.jsonl", tmp_path / "flat.jsonl", tmp_path / "a.jpg"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flat.write_text(json.dumps({"epoch": 1.0, "loss": 2.0}) + "\n")
    text.write_text("no image")
    assert draw("beta", f"--init {log}")[0][tmp_path.name]["beta/10"] == [[s / 10, s] for s in range(1, 21)]
    assert draw("loss", f"--init {log}")[0] == dict(
        training={f"{tmp_path.name}, pixel/10": [[s / 10, 1 / s] for s in range(2, 21)]},
        validation={f"{tmp_path.name}, val_pixel/10": [[2.0, 7]]})
    assert draw("loss", f"--init {flat} --key loss")[0] == dict(training={"flat, loss": [[1.0, 2.0]]}, validation={})
    for figure, flags, message in (
            ("beta", f"--init {flat}", "flat.jsonl has no beta/"), ("loss", f"--init {encoder}", "is no log.jsonl"),
            ("cka", f"--init {log}", "no checkpoint"), ("cka", f"--init {encoder} --images 3", "at least 4 images"),
            ("cka", "", "--init"), ("cka", f"--init {encoder} --img_size 15", "--img_size 15"),
            ("attention-map", f"--init {encoder} --block 4", "has 3 blocks"), ("attention", "", "attention-distance"),
            ("reconstruction", f"--init {encoder}", "is no last.pt"), ("mask", "--ratios 1", "--mask_ratio"),
            ("mask", f"--image {text}", "a.jpg: cannot identify")):
        with pytest.raises(SystemExit, match=message):
            draw(figure, flags)
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"beta.png", "beta.json", "loss.png", "loss.json"}
