"""SdAE against independent oracles: loops over samples, folds and tokens, closed forms, the paper's schedule."""
import inspect
import math
import re
import sys

import numpy as np
import pytest
import soak
import torch
import torch.nn.functional as F

import common
import ddae
import deepmim
import sdae

SMALL = dict(img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=2, decoder_dim=16, decoder_heads=2,
             decoder_depth=1, drop_path=0.0)


def batch(B=3, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(64) for _ in range(B)])
    return torch.randn(B, 3, 32, 32, generator=torch.manual_seed(seed)), torch.from_numpy(ids)


def make(**options):
    torch.manual_seed(0)
    model = sdae.SdAE(**SMALL | options)
    with torch.no_grad():  # zero biases and unit norms would hide mistakes; teacher and student must differ
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) * (p.ndim == 1 or 0.2))
    return model


def test_shared_vit_is_the_same_text():
    texts = [inspect.getsource(m).split("# --- shared ViT")[1].split("# --- end of shared ViT")[0]
             for m in (ddae, deepmim, sdae)]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 4000
    assert inspect.getsource(ddae.Decoder) == inspect.getsource(deepmim.Decoder) == inspect.getsource(sdae.Decoder)
    assert inspect.getsource(deepmim.first_components) == inspect.getsource(sdae.first_components)
    assert inspect.getsource(deepmim.DeepMIM.fill) == inspect.getsource(sdae.SdAE.fill)


def slow_teacher(model, img, ids):
    """One image, one fold, token after token -> (T, D)."""
    vit = model.teacher
    patches = [img[:, n // 8 * 4:n // 8 * 4 + 4, n % 8 * 4:n % 8 * 4 + 4] for n in ids]
    x = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]] + [(vit.patch_embed.proj.weight * p).sum((1, 2, 3)) + vit.patch_embed.proj.bias
                                 + vit.pos_embed[0, 1 + n] for p, n in zip(patches, ids)]
    x = torch.stack(x).unsqueeze(0)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)[0, 1:]


@pytest.mark.parametrize("options, sizes", [
    (dict(), [16] * 3), (dict(folds=2), [24] * 2), (dict(folds=5), [9] * 5), (dict(feed="masked"), [48]),
    (dict(feed="crop"), [16]), (dict(feed="crop", crop_ratio=0.6), [29]), (dict(normalise=False), [16] * 3)])
@pytest.mark.parametrize("axis", ["channel", "token", "global"])
@torch.no_grad()
def test_loss_equals_a_loop_over_folds_and_tokens(options, sizes, axis):
    model = make(cosine_axis=axis, **options)
    imgs, ids = batch()
    latent = model.encoder.norm(model.encoder(imgs, ids[:, :16])[-1])
    pred = model.decoder(latent[None], ids)[0]  # the text of ddae's decoder, which test_ddae holds against a loop
    cosines = []
    for b in range(3):
        targets, preds, at = [], [], 16
        for T in sizes:
            t = slow_teacher(model, imgs[b], ids[b, at:at + T].tolist())
            if model.normalise:
                t = (t - t.mean(1, keepdim=True)) / (t.var(1, keepdim=True) + 1e-6).sqrt()
            targets.append(t)
            preds.append(pred[b, at - 16:at - 16 + T])
            at += T
        if axis == "global":
            cosines.append(F.cosine_similarity(torch.cat(targets).flatten(), torch.cat(preds).flatten(), dim=0))
        else:
            for t, p in zip(targets, preds):
                t, p = (t, p) if axis == "channel" else (t.T, p.T)
                cosines += [(x @ y) / (x.norm() * y.norm()) for x, y in zip(t, p)]
    assert model(imgs, ids)[0].item() == pytest.approx(1 - torch.stack(cosines).mean().item(), abs=1e-5)


@torch.no_grad()
def test_full_image_and_identities():
    imgs, ids = batch()
    full = make(feed="full")
    target = full.teach(imgs, ids[:, 16:])[0][:, 0]
    whole = full.teacher.norm(full.teacher(imgs)[-1])[:, 1:]
    want = torch.stack([whole[b, ids[b, 16:]] for b in range(3)])
    torch.testing.assert_close(target, sdae.normalise_tokens(want))
    assert target.square().sum(-1).mean().item() == pytest.approx(23, abs=0.01)  # D - 1: the variance is unbiased
    losses = [make(**o)(imgs, ids)[0] for o in (dict(feed="masked"), dict(folds=1), dict(feed="crop", crop_ratio=1.0))]
    assert losses[0] == losses[1] == losses[2]


@torch.no_grad()
def test_tokens_of_one_fold_do_not_see_another():
    model = make()
    imgs, ids = batch()
    before = model.teach(imgs, ids[:, 16:])[0]
    other = imgs.clone()
    n = ids[1, 16 + 20].item()  # sample 1, fold 1, token 4
    other[1, :, n // 8 * 4:n // 8 * 4 + 4, n % 8 * 4:n % 8 * 4 + 4] += 1
    changed = (model.teach(other, ids[:, 16:])[0] - before).abs().sum(-1) > 1e-6
    assert changed[1, 1].all() and changed.sum() == 16
    visible = imgs.clone()
    n = ids[0, 3].item()
    visible[0, :, n // 8 * 4:n // 8 * 4 + 4, n % 8 * 4:n % 8 * 4 + 4] += 1
    assert torch.equal(model.teach(visible, ids[:, 16:])[0], before)


def test_axes_differ_as_the_probe_says():
    g = torch.Generator().manual_seed(0)
    pred, target = torch.randn(1, 1, 49, 768, generator=g), torch.randn(1, 1, 49, 768, generator=g)
    pred[..., 0] = target[..., 0] = 100  # one constant channel
    assert sdae.cosine_loss(pred, target, "channel") < 0.1 < sdae.cosine_loss(pred, target, "token")


def test_momentum_schedule():
    golden = {0: 0.96, 75: 0.9644, 150: 0.975, 225: 0.9856, 299: 0.99}
    for epoch, m in golden.items():
        assert sdae.momentum_at(epoch, 300, (0.96, 0.99)) == pytest.approx(m, abs=6e-5)
    left = np.cumprod([sdae.momentum_at(e, 300, (0.96, 0.99)) for e in range(300)])
    assert left[24] == pytest.approx(0.362, abs=2e-3) and left[99] == pytest.approx(0.022, abs=1e-3)
    plain = np.prod([0.99 + 0.5 * (0.96 - 0.99) * (1 + math.cos(math.pi * e / 20)) for e in range(20)])
    short = np.prod([sdae.momentum_at(e, 20, (0.96, 0.99)) for e in range(20)])
    assert sdae.momentum_at(0, 100, (0.96, 0.99)) == 0.96
    assert sdae.momentum_at(0, 99, (0.96, 0.99)) == pytest.approx(0.96 ** (300 / 99))
    assert plain == pytest.approx(0.593, abs=2e-3) and short == pytest.approx(plain ** 15) and short < 1e-3


@pytest.mark.parametrize("every", ["epoch", "step"])
def test_teacher_is_the_closed_form_average(every):
    model = make(ema_every=every, epochs=4, momentum=(0.995, 0.999))
    names = [n for n, p in model.encoder.named_parameters() if p.requires_grad]
    start = {n: model.teacher.get_parameter(n).clone().double() for n in names}
    momenta, students = [], []
    for step in range(1, 13):  # 3 steps an epoch
        with torch.no_grad():
            for p in model.encoder.parameters():
                p.add_(0.01 * torch.randn_like(p))
        model.after_step(step / 12)
        if every == "step" or step % 3 == 0:
            epoch = (step - 1) // 3
            m = 0.999 + 0.5 * (0.995 - 0.999) * (1 + math.cos(math.pi * epoch / 4))
            momenta.append(m ** (300 / 4) if every == "epoch" else m)
            students.append({n: model.encoder.get_parameter(n).detach().clone().double() for n in names})
        for n in names:  # each student counts 1 - its m, times all later m
            want = start[n] * math.prod(momenta) + sum(
                (1 - momenta[i]) * math.prod(momenta[i + 1:]) * students[i][n] for i in range(len(momenta)))
            torch.testing.assert_close(model.teacher.get_parameter(n).double(), want, atol=1e-6, rtol=1e-6)


def test_epochs_end_where_they_should(monkeypatch):
    """In floating point, step / total * epochs is not quite whole at the end of some epochs."""
    for per_epoch, epochs in ((130, 100), (312, 2), (1, 5)):
        model, steps, epochs_seen, total = make(epochs=epochs), [], [], per_epoch * epochs
        monkeypatch.setattr(sdae, "momentum_at", lambda epoch, *_: epochs_seen.append(epoch) or 0.5)
        for step in range(1, total + 1):
            before = len(epochs_seen)
            model.after_step(step / total)
            steps += [step] * (len(epochs_seen) - before)
        assert steps == list(range(per_epoch, total + 1, per_epoch)) and epochs_seen == list(range(epochs))


def test_teacher_gets_no_gradient_and_starts_as_told():
    model = make()
    imgs, ids = batch()
    model(imgs, ids)[0].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in [*model.encoder.parameters(), *model.decoder.parameters()] if p.requires_grad)
    copy, own = sdae.SdAE(**SMALL), sdae.SdAE(**SMALL | dict(teacher_init="independent"))
    assert all(torch.equal(v, copy.teacher.state_dict()[k]) for k, v in copy.encoder.state_dict().items())
    assert not torch.equal(own.encoder.blocks[0].mlp.fc1.weight, own.teacher.blocks[0].mlp.fc1.weight)
    for export in ("student", "teacher"):
        model = make(export=export)
        assert model.exported is (model.teacher if export == "teacher" else model.encoder)


@pytest.mark.parametrize("export", ["student", "teacher"])
@pytest.mark.parametrize("teacher_init", ["copy", "independent"])
def test_init_reaches_the_student(export, teacher_init, tmp_path, monkeypatch):
    sizes = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    vit = sdae.ViT(**sizes)
    common.save(dict(model=vit.state_dict(), config=sizes), tmp_path / "encoder.pt")
    main(monkeypatch, f"--max_steps 1 --preview_every 0 --data {soak.make_images(tmp_path / 'images')} --batch_size 16 "
         f"--micro_batch 0 --init {tmp_path}/encoder.pt --export {export} --teacher_init {teacher_init} --out_dir {tmp_path}/o")
    found = common.load(tmp_path / "o" / "last.pt")["model"]  # the first step has learning rate 0
    for part, like in (("encoder", True), ("teacher", teacher_init == "copy")):
        assert torch.equal(found[f"{part}.blocks.1.mlp.fc1.weight"], vit.blocks[1].mlp.fc1.weight) == like


def test_drop_path_is_in_the_student_only():
    model = sdae.SdAE(**SMALL | dict(depth=12, drop_path=0.25))
    assert [b.drop_path for b in model.encoder.blocks] == pytest.approx(np.linspace(0, 0.25, 12))
    assert not any(b.drop_path for part in (model.teacher.blocks, model.decoder.decoder_blocks) for b in part)
    block = sdae.Block(24, 2, drop_path=0.5)
    x = torch.randn(2000, 2, 24)
    branch = block.drop(x)
    kept = (branch != 0).any(-1).any(-1)
    assert 0.45 < kept.float().mean() < 0.55 and torch.equal(branch[kept], x[kept] * 2)
    assert torch.equal(block.eval().drop(x), x)


def test_monitor_tells_of_collapse():
    model = make()
    imgs, ids = batch()
    healthy = model(imgs, ids)[1]
    x = torch.stack([slow_teacher(model, imgs[b], ids[b, at:at + 16].tolist()) for b in range(3) for at in (16, 32, 48)])
    x = x.detach().flatten(0, 1).numpy()
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in x for b in x]
    assert healthy["teacher_std"].item() == pytest.approx(x.std(0).mean(), rel=1e-4)
    assert healthy["teacher_cosine"].item() == pytest.approx(np.mean(cosines), rel=1e-4)
    with torch.no_grad():
        model.teacher.norm.weight.zero_()
    collapsed = model(imgs, ids)[1]
    assert model.warning(healthy) == "" and "collapse: deviation 0, mean cosine of any two 1;" in model.warning(collapsed)
    assert model.warning(dict(teacher_std=0.2, teacher_cosine=0.96)) and model.warning(dict(teacher_std=0.04, teacher_cosine=0))
    assert collapsed["teacher_cosine"] == pytest.approx(1) and collapsed["teacher_std"] < 1e-6
    assert healthy["teacher_cosine"] < 0.99 and healthy["teacher_std"] > 0.05


@torch.no_grad()
def test_bf16_is_close_to_fp32_and_draws_pictures():
    model, (imgs, ids) = make(), batch()
    exact, _ = model(imgs, ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(imgs, ids)
        panels = model.eval().preview(imgs, ids)
        colours = sdae.first_components(imgs.flatten(2), imgs.flatten(0, 1).flatten(1))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert panels["student"].shape == (3, 3, 32, 32)
    assert torch.equal(colours, sdae.first_components(imgs.flatten(2), imgs.flatten(0, 1).flatten(1)))


@pytest.mark.parametrize("options", [dict(), dict(folds=5), dict(feed="crop")])
@torch.no_grad()
def test_preview_shows_folds_and_targets(options, monkeypatch):
    model, (imgs, ids) = make(**options).eval(), batch()
    T = {3: 16, 5: 9, 1: 16}[model.folds]
    monkeypatch.setattr(model.decoder, "forward", lambda latent, ids: torch.cat(  # the student predicts the target
        (model.teach(imgs, ids[:, 16:])[0].flatten(1, 2), torch.zeros(3, 48 - T * model.folds, 24)), 1)[None])
    panels = model.preview(imgs, ids)
    assert torch.allclose(panels["teacher"], panels["student"], atol=1e-4)
    assert torch.equal(panels["input"], imgs)
    for b in range(3):
        for place, n in enumerate(ids[b].tolist()):
            patch = (slice(None), slice(n // 8 * 4, n // 8 * 4 + 4), slice(n % 8 * 4, n % 8 * 4 + 4))
            fold = (place - 16) // T + 1 if 16 <= place < 16 + T * model.folds else 0
            assert panels["fold"][b, n // 8, n % 8] == fold
            for title in ("masked", "teacher"):
                seen = place < 16
                assert torch.equal(panels[title][b][patch], imgs[b][patch]) == seen, (title, place)


TINY = "--img_size 16 --patch_size 4 --embed_dim 16 --depth 2 --num_heads 2 --decoder_dim 16 --decoder_heads 2 " \
       "--decoder_depth 1 --batch_size 2500 --micro_batch 50 --base_lr 1e-3 --warmup_epochs 0.5 --log_every 1 " \
       "--device cpu --num_workers 0 --epochs 2"


def main(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["sdae.py", *TINY.split(), *flags.split()])
    sdae.main()


@pytest.mark.parametrize("flags", ["", "--ema_every step --export teacher", "--feed full --cosine_axis token",
                                   "--feed masked --cosine_axis global --no-normalise", "--feed crop --folds 2"])
def test_trains_and_resumes_bitwise(flags, tmp_path, monkeypatch):
    images = soak.make_images(tmp_path / "images")
    flags += f" --data {images} --batch_size 16 --micro_batch 0 --epochs 4"
    main(monkeypatch, f"{flags} --out_dir {tmp_path / 'whole'}")
    for stop in (3, 8, 16):  # 4 steps an epoch
        main(monkeypatch, f"{flags} --out_dir {tmp_path / 'cut'} --max_steps {stop}")
    assert soak.differences(tmp_path / "whole", tmp_path / "cut") == []
    lines = soak.log(tmp_path / "whole")
    assert np.mean([x["loss"] for x in lines[-4:]]) < np.mean([x["loss"] for x in lines[:4]])
    model = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["model"]
    encoder = torch.load(tmp_path / "whole" / "encoder.pt", weights_only=True)["model"]
    part = "teacher" if "teacher" in flags else "encoder"
    assert all(torch.equal(v, model[f"{part}.{k}"]) for k, v in encoder.items())
    assert (tmp_path / "whole" / "preview.png").stat().st_size > 10_000


def test_first_lines_and_warning(tmp_path, monkeypatch, capsys):
    images = soak.make_images(tmp_path / "images")
    flags = f"--data {images} --batch_size 16 --micro_batch 0 --max_steps 2 --preview_every 0 --out_dir {tmp_path}/"
    main(monkeypatch, flags + "a")
    out = capsys.readouterr().out
    assert "keeps 0.002191 of itself per epoch at first, 0.02242 at last ((0.96, 0.99) to the power 300 / 2)" in out
    assert "warning  " not in out
    main(monkeypatch, flags + "b --ema_every step --momentum 0.9 0.999")
    assert "keeps 0.9 of itself per step at first, 0.9495 at last\n" in capsys.readouterr().out
    monkeypatch.setattr(sdae.SdAE, "after_init", lambda self: torch.nn.init.zeros_(self.teacher.norm.weight))
    main(monkeypatch, flags + "c")
    assert capsys.readouterr().out.count("warning    the teacher's features collapse: deviation 0, ") == 2


@pytest.mark.parametrize("flags, message", [
    ("--folds 0", "--folds must be above 0"), ("--folds 13", "--folds 13 is more than the 12 masked patches"),
    ("--crop_ratio 0.01", "--crop_ratio 0.01 must be in (0, 1]"), ("--drop_path 1", "--drop_path must be in [0, 1)"),
    ("--momentum 0.9", "--momentum takes 2 values, got 1"), ("--momentum 0.9 1.0", "--momentum must be in [0, 1)"),
    ("--cosine_axis tokens", "invalid choice: 'tokens'"), ("--mask_ratio 1", "--mask_ratio 1.0 must be between 0 and 1")])
def test_bad_input(flags, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"{flags} --out_dir {tmp_path / 'new'}")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and len(err.splitlines()) == 1 and not (tmp_path / "new").exists()


def test_recipe_and_text():
    cfg = common.parse(sdae.Config, sdae.PRESETS, argv=[])
    paper = dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, drop_path=0.25, mask_ratio=0.75,
                 feed="folds", folds=3, crop_ratio=1 / 3, normalise=True, cosine_axis="channel", teacher_init="copy",
                 momentum=(0.96, 0.99), ema_every="epoch", export="student", decoder_depth=8, decoder_dim=512,
                 decoder_heads=16, epochs=300, warmup_epochs=60, batch_size=768, base_lr=8e-4 / 3, min_lr=0,
                 weight_decay=0.05, adam_betas=(0.9, 0.95), crop_min=0.2)
    assert {k: getattr(cfg, k) for k in sdae.Config.__annotations__} == paper
    assert cfg.base_lr * cfg.batch_size / 256 == pytest.approx(8e-4)
    for name, p in inspect.signature(sdae.SdAE).parameters.items():
        assert p.default == getattr(cfg, name), name
    text, source = inspect.getsource(sdae), inspect.getsource(sdae.Config)
    for name in sdae.Config.__annotations__:
        assert re.search(rf"^    {name}: .*  # \[(paper|supp|code|ours)", source, re.M), name
        assert re.search(rf"\b{name}\b", text.replace(source, "") + inspect.getsource(common)), name
    body = text.replace(sdae.__doc__, "")
    assert set(re.findall(r"Eq\. \d", sdae.__doc__)) == set(re.findall(r"Eq\. \d", body[body.index("# --- masking"):]))
    sizes = [sdae.SdAE(img_size=224, patch_size=16, embed_dim=24, depth=1, num_heads=2, decoder_dim=16, decoder_heads=2,
                       decoder_depth=1, folds=f).num_read for f in (2, 3, 4)]
    assert sizes == [146, 147, 144]
