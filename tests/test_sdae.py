"""SdAE against independent oracles: loops over samples, folds and tokens, closed forms, the paper's schedule."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import sdae

SMALL = dict(img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=2, decoder_dim=16, decoder_heads=2,
             decoder_depth=1, drop_path=0.0)


def batch(B=3, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(64) for _ in range(B)])
    return torch.randn(B, 3, 32, 32, generator=torch.manual_seed(seed)), torch.from_numpy(ids)


def make(**options):
    torch.manual_seed(0)
    model = sdae.SdAE(sdae.Config(**SMALL | options))
    with torch.no_grad():  # zero biases and unit norms would hide mistakes; teacher and student must differ
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) * (p.ndim == 1 or 0.2))
    return model


def slow_teacher(model, img, ids):
    """One image, one fold, token after token -> (T, D)."""
    vit = model.teacher
    patches = [img[:, n // 8 * 4:n // 8 * 4 + 4, n % 8 * 4:n % 8 * 4 + 4] for n in ids]
    weight, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    x = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
    x += [(weight * p).sum((1, 2, 3)) + bias + vit.pos_embed[0, 1 + n] for p, n in zip(patches, ids)]
    x = torch.stack(x).unsqueeze(0)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)[0, 1:]


@pytest.mark.parametrize("options, sizes", [
    (dict(), [16] * 3), (dict(folds=2), [24] * 2), (dict(folds=5), [9] * 5), (dict(feed="masked"), [48]),
    (dict(feed="crop"), [16]), (dict(feed="crop", crop_ratio=0.6), [29]), (dict(normalize=False), [16] * 3)])
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
            if model.cfg.normalize:
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
    target = full.targets(imgs, ids[:, 16:])[0][:, 0]
    whole = full.teacher.norm(full.teacher(imgs)[-1])[:, 1:]
    want = torch.stack([whole[b, ids[b, 16:]] for b in range(3)])
    torch.testing.assert_close(target, sdae.normalize_tokens(want))
    assert target.square().sum(-1).mean().item() == pytest.approx(23, abs=0.01)  # D - 1: the variance is unbiased
    losses = [make(**o)(imgs, ids)[0] for o in (dict(feed="masked"), dict(folds=1), dict(feed="crop", crop_ratio=1.0))]
    assert losses[0] == losses[1] == losses[2]


@torch.no_grad()
def test_tokens_of_one_fold_do_not_see_another():
    model = make()
    imgs, ids = batch()
    before = model.targets(imgs, ids[:, 16:])[0]
    other = imgs.clone()
    n = ids[1, 16 + 20].item()  # sample 1, fold 1, token 4
    other[1, :, n // 8 * 4:n // 8 * 4 + 4, n % 8 * 4:n % 8 * 4 + 4] += 1
    changed = (model.targets(other, ids[:, 16:])[0] - before).abs().sum(-1) > 1e-6
    assert changed[1, 1].all() and changed.sum() == 16
    visible = imgs.clone()
    n = ids[0, 3].item()
    visible[0, :, n // 8 * 4:n // 8 * 4 + 4, n % 8 * 4:n % 8 * 4 + 4] += 1
    assert torch.equal(model.targets(visible, ids[:, 16:])[0], before)


def test_axes_differ_as_the_probe_says():
    g = torch.Generator().manual_seed(0)
    pred, target = torch.randn(1, 1, 49, 768, generator=g), torch.randn(1, 1, 49, 768, generator=g)
    pred[..., 0] = target[..., 0] = 100  # one constant channel
    assert sdae.cosine_loss(pred, target, "channel") < 0.1 < sdae.cosine_loss(pred, target, "token")


def test_momentum_schedule():
    def momenta(epochs):
        return [sdae.momentum_at(e, sdae.Config(epochs=epochs, warmup_epochs=0)) for e in range(epochs)]

    golden = {0: 0.96, 75: 0.9644, 150: 0.975, 225: 0.9856, 299: 0.99}
    assert {e: momenta(300)[e] for e in golden} == pytest.approx(golden, abs=6e-5)
    left = np.cumprod(momenta(300))
    assert left[24] == pytest.approx(0.362, abs=2e-3) and left[99] == pytest.approx(0.022, abs=1e-3)
    plain = np.prod([0.99 + 0.5 * (0.96 - 0.99) * (1 + math.cos(math.pi * e / 20)) for e in range(20)])
    short = np.prod(momenta(20))
    assert momenta(100)[0] == 0.96 and momenta(99)[0] == pytest.approx(0.96 ** (300 / 99))
    assert plain == pytest.approx(0.593, abs=2e-3) and short == pytest.approx(plain ** 15) and short < 1e-3


@pytest.mark.parametrize("every", ["epoch", "step"])
def test_teacher_is_the_closed_form_average(every):
    model = make(ema_every=every, epochs=4, warmup_epochs=0, momentum=(0.995, 0.999))
    names = [n for n, p in model.encoder.named_parameters() if p.requires_grad]
    start = {n: model.teacher.get_parameter(n).clone().double() for n in names}
    momenta, students = [], []
    for step in range(1, 13):  # 3 steps an epoch
        with torch.no_grad():
            for p in model.encoder.parameters():
                p.add_(0.01 * torch.randn_like(p))
        model.after_step(step, 3)
        if every == "step" or step % 3 == 0:
            epoch = (step - 1) // 3
            m = 0.999 + 0.5 * (0.995 - 0.999) * (1 + math.cos(math.pi * epoch / 4))
            momenta.append(m ** (300 / 4) if every == "epoch" else m)
            students.append({n: model.encoder.get_parameter(n).detach().clone().double() for n in names})
        for n in names:  # each student counts 1 - its m, times all later m
            want = start[n] * math.prod(momenta) + sum(
                (1 - momenta[i]) * math.prod(momenta[i + 1:]) * students[i][n] for i in range(len(momenta)))
            torch.testing.assert_close(model.teacher.get_parameter(n).double(), want, atol=1e-6, rtol=1e-6)


def test_teacher_gets_no_gradient_and_starts_as_told():
    model = make()
    imgs, ids = batch()
    model(imgs, ids)[0].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    learning = [*model.encoder.parameters(), *model.decoder.parameters()]
    assert all(p.grad is not None for p in learning if p.requires_grad)
    copy, own = (sdae.SdAE(sdae.Config(**SMALL, teacher_init=how)) for how in ("copy", "independent"))
    assert all(torch.equal(v, copy.teacher.state_dict()[k]) for k, v in copy.encoder.state_dict().items())
    assert not torch.equal(own.encoder.blocks[0].mlp.fc1.weight, own.teacher.blocks[0].mlp.fc1.weight)
    for export in ("student", "teacher"):
        model = make(export=export)
        assert model.exported is (model.teacher if export == "teacher" else model.encoder)


@pytest.mark.parametrize("teacher_init", ["copy", "independent"])
def test_init_reaches_the_student(teacher_init, tmp_path):
    vit = sdae.ViT(32, 4, 24, 3, 2)
    torch.save(dict(model=vit.state_dict()), tmp_path / "encoder.pt")
    options = dict(SMALL, teacher_init=teacher_init, init=str(tmp_path / "encoder.pt"), out_dir=str(tmp_path))
    model = sdae.SdAE(sdae.Config(**options))
    for part, like in ((model.encoder, True), (model.teacher, teacher_init == "copy")):
        assert torch.equal(part.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight) == like


def test_drop_path_is_in_the_student_only():
    model = sdae.SdAE(sdae.Config(**SMALL | dict(depth=12, drop_path=0.25)))
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
    folds = [(imgs[b], ids[b, at:at + 16].tolist()) for b in range(3) for at in (16, 32, 48)]
    x = torch.stack([slow_teacher(model, *fold) for fold in folds])
    x = x.detach().flatten(0, 1).numpy()
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in x for b in x]
    assert healthy["teacher_std"].item() == pytest.approx(x.std(0).mean(), rel=1e-4)
    assert healthy["teacher_cosine"].item() == pytest.approx(np.mean(cosines), rel=1e-4)
    with torch.no_grad():
        model.teacher.norm.weight.zero_()
    collapsed = model(imgs, ids)[1]
    assert collapsed["teacher_cosine"] == pytest.approx(1) and collapsed["teacher_std"] < 1e-6
    assert healthy["teacher_cosine"] < 0.99 and healthy["teacher_std"] > 0.05


@torch.no_grad()
def test_bf16_is_close_to_fp32():
    model, (imgs, ids) = make(), batch()
    exact, _ = model(imgs, ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(imgs, ids)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize("options, L", [(dict(), 16), (dict(folds=5), 9), (dict(feed="crop"), 16)])
@torch.no_grad()
def test_preview_shows_folds_and_targets(options, L):
    model, (imgs, ids) = make(**options).eval(), batch()
    target = model.targets(imgs, ids[:, 16:])[0].flatten(1, 2)
    panels = model.preview(imgs, ids)
    assert torch.equal(panels["input"], imgs) and panels["student"].shape == (3, 8, 8, 24)
    for b in range(3):
        for place, n in enumerate(ids[b].tolist()):
            patch = (slice(None), slice(n // 8 * 4, n // 8 * 4 + 4), slice(n % 8 * 4, n % 8 * 4 + 4))
            fold = (place - 16) // L + 1 if 16 <= place < 16 + L * model.cfg.num_folds else 0
            assert panels["fold"][b, n // 8, n % 8] == fold
            assert torch.equal(panels["masked"][b][patch], imgs[b][patch]) == (place < 16)
            want = target[b, place - 16] if fold else torch.zeros(24)
            assert torch.allclose(panels["teacher"][b, n // 8, n % 8], want, atol=1e-4)
            assert panels["student"][b, n // 8, n % 8].any() == bool(fold)


@pytest.mark.parametrize("flags, message", [
    ("--folds 0", "--folds must be finite and at least 1"), ("--folds 148", "--folds or --crop_ratio leaves"),
    ("--feed crop --crop_ratio 0.001", "leaves the teacher no patch"), ("--drop_path 1", "--drop_path must be below 1"),
    ("--momentum 0.9", "--momentum takes 2 values"), ("--cosine_axis tokens", "invalid choice: 'tokens'")])
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        common.parse(sdae.Config, sdae.PRESETS, argv=flags.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_defaults_are_the_paper_s_recipe():
    cfg = common.parse(sdae.Config, sdae.PRESETS, argv=[])
    paper = dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, drop_path=0.25, mask_ratio=0.75,
                 feed="folds", folds=3, crop_ratio=1 / 3, normalize=True, cosine_axis="channel", teacher_init="copy",
                 momentum=(0.96, 0.99), ema_every="epoch", export="student", decoder_depth=8, decoder_dim=512,
                 decoder_heads=16, epochs=300, warmup_epochs=60, batch_size=768, base_lr=8e-4 / 3, min_lr=0,
                 weight_decay=0.05, adam_betas=(0.9, 0.95), crop_min=0.2)
    assert {k: getattr(cfg, k) for k in paper} == paper
    assert cfg.base_lr * cfg.batch_size / 256 == pytest.approx(8e-4)
    assert [sdae.Config(folds=folds).num_read for folds in (2, 3, 4)] == [146, 147, 144]
