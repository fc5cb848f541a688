"""DDAE against independent oracles: loops over patches, scipy, timm, closed forms, the papers' numbers."""
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt

import common
import ddae

SMALL = dict(img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=2, decoder_dim=16, decoder_heads=2,
             decoder_depth=1)
DEEP = dict(embed_dim=24, num_heads=2, decoder_dim=16, decoder_heads=2)  # 12 blocks, 14 x 14 patches


def batch(B=3, seed=0, mask="random"):
    rng, cfg = np.random.default_rng(seed), ddae.Config(**SMALL, mask=mask)
    ids = [ddae.draw_mask(rng, cfg) for _ in range(B)]
    return torch.randn(B, 3, 32, 32, generator=torch.manual_seed(seed)), torch.from_numpy(np.stack(ids))


def build(**options):
    return ddae.DDAE(ddae.Config(**options))


def make(**options):
    torch.manual_seed(0)
    model = build(**SMALL | options)
    with torch.no_grad():  # zero biases and unit norms would hide mistakes
        for name, p in model.named_parameters():
            if p.requires_grad and p.ndim == 1 and name != "beta":
                p.add_(0.1 * torch.randn_like(p))
    return model


# --- masks and distances ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mask", ["block", "random"])
@pytest.mark.parametrize("size, patch, ratio", [(224, 16, 0.75), (32, 4, 0.4), (16, 8, 0.5), (96, 8, 0.95)])
def test_masks_are_exact(mask, size, patch, ratio):
    N, distinct = (size // patch) ** 2, set()
    visible = int(N * (1 - ratio))
    for seed in range(100):
        cfg = ddae.Config(img_size=size, patch_size=patch, mask=mask, mask_ratio=ratio)
        ids = ddae.draw_mask(np.random.default_rng(seed), cfg)
        assert sorted(ids) == list(range(N))
        if mask == "block":  # visible patches come first, all of them
            masked = ddae.block_mask(np.random.default_rng(seed), (size // patch,) * 2, N - visible).ravel()
            assert masked.sum() == N - visible and not masked[ids[:visible]].any()
        distinct.add(tuple(sorted(ids[:visible])))
    assert len(distinct) > 80 or N == 4


def test_block_masks_are_those_of_the_generators_own_distributions():
    def simulate(rng, h, w, missing):
        mask, smallest = np.zeros((h, w), bool), max(1.0, 16 * h * w / 196)
        while missing:
            area, aspect = rng.uniform(*sorted((smallest, missing))), np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
            rows, cols = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < rows < h and 0 < cols < w:
                top, left = rng.integers(h - rows, endpoint=True), rng.integers(w - cols, endpoint=True)
                larger = mask.copy()
                larger[top:top + rows, left:left + cols] = True
                if (larger & ~mask).sum() <= missing:
                    missing, mask = missing - (larger & ~mask).sum(), larger
        return mask

    for (h, w), missing in (((14, 14), 147), ((8, 8), 48), ((5, 11), 30)):
        for seed in range(40):
            mask, rng = ddae.block_mask(np.random.default_rng(seed), (h, w), missing), np.random.default_rng(seed)
            assert np.array_equal(mask, simulate(rng, h, w, missing))


def test_block_masks_have_the_statistics_of_beits_generator():
    masks = [ddae.block_mask(np.random.default_rng(s), (14, 14), 147) for s in range(1500)]
    distance, masks = np.stack([distance_transform_edt(m) for m in masks]), np.stack(masks)
    assert (masks.sum((1, 2)) == 147).all()
    assert distance[masks].mean() == pytest.approx(2.83, abs=0.08)  # an independent simulation of 3000 masks
    assert (distance[masks] == 1).mean() == pytest.approx(0.221, abs=0.012)
    rate = masks.mean(0)  # every edge is reached alike, height and width are alike
    for flipped in (rate[::-1], rate[:, ::-1], rate.T):
        assert abs(rate - flipped).max() < 0.08 and abs(rate[0] - flipped[0]).mean() < 0.03


@pytest.mark.parametrize("mask", ["block", "random"])
def test_distance_map_equals_scipy_and_a_loop(mask):
    cfg = ddae.Config(**DEEP, mask=mask)
    ids = torch.from_numpy(np.stack([ddae.draw_mask(np.random.default_rng(s), cfg) for s in range(50)]))
    ours = ddae.distance_map(ids[:, :49], ddae.DDAE(cfg).distances)
    for order, row in zip(ids.numpy(), ours.numpy()):
        masked = np.ones(196)
        masked[order[:49]] = 0
        np.testing.assert_allclose(row, distance_transform_edt(masked.reshape(14, 14)).ravel(), atol=1e-6)
    cells = [(i // 14, i % 14) for i in range(196)]
    loop = [min(math.dist(cells[i], cells[j]) for j in ids[0, :49].tolist()) for i in range(196)]
    np.testing.assert_allclose(ours[0].numpy(), loop, atol=1e-6)


# --- h_beta -----------------------------------------------------------------------------------------------------------

D5 = torch.tensor([[1, 1, math.sqrt(2), 2, 3]])
GOLDEN = {-0.5: ([1, 1, .852908, .746102, .655308], .005751), 0.0: ([1] * 5, 0),
          0.5: ([.480922, .480922, .581093, .727721, 1], .019474),
          1.0: ([.135335, .135335, .204787, .367879, 1], .150492)}


def test_h_beta_golden_values():
    weight, excess = ddae.h_beta(D5, torch.tensor(list(GOLDEN)))
    for k, (w, e) in enumerate(GOLDEN.values()):
        torch.testing.assert_close(weight[k, 0], torch.tensor(w, dtype=torch.float32), atol=2e-6, rtol=0)
        assert excess[k, 0].item() == pytest.approx(e, abs=2e-6)


def test_h_beta_gradient():
    distance = torch.from_numpy(np.stack([np.sort(distance_transform_edt(ddae.block_mask(
        np.random.default_rng(s), (14, 14), 147)).ravel())[49:] for s in range(300)])).float()
    beta = torch.tensor([-1.0, -0.5, -0.1, 0.1, 0.5, 1.0], requires_grad=True)
    weight, excess = ddae.h_beta(distance, beta)
    slope_w, = torch.autograd.grad(weight.mean((1, 2)).sum(), beta, retain_graph=True)
    slope_e, = torch.autograd.grad(excess.mean(1).sum(), beta)
    torch.testing.assert_close(slope_w, torch.tensor([.140, .306, .685, -1.04, -1.04, -.35]), atol=0.02, rtol=0.05)
    torch.testing.assert_close(slope_e, torch.tensor([-.0044, -.0051, -.0022, .0034, .049, .365]), atol=0.003, rtol=0.1)
    slopes = []
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):  # at 0 all weights tie
        beta = torch.zeros(1, requires_grad=True)
        slopes += torch.autograd.grad(ddae.h_beta(D5[:, order], beta)[0].sum(), beta)
    torch.testing.assert_close(slopes[1:], slopes[:1] * 2)


def test_beta_settles_at_the_equilibria_of_the_paper_s_lambda():
    """Constant errors .4 + .1 (D - 1) up to .8 in both branches, as if measured; beta alone learns."""
    model = build(**DEEP)
    distance = torch.from_numpy(np.stack([np.sort(distance_transform_edt(ddae.block_mask(
        np.random.default_rng(s), (14, 14), 147)).ravel())[49:] for s in range(256)])).float()
    error = (0.4 + 0.1 * (distance - 1)).clamp(max=0.8).expand(4, -1, -1)

    def settle(start, reg):
        with torch.no_grad():
            model.beta.copy_(torch.tensor(start))
            model.reg.copy_(torch.tensor(reg))
        optimizer = torch.optim.Adam([model.beta], 0.02)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 0.02 if step < 250 else 0.002
            weight, excess = ddae.h_beta(distance, model.beta)
            loss = 2 * model.weighted(error, weight, "dds") + model.cfg.reg_batch * (model.reg * excess.mean(1)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.beta.tolist()

    aaai = model.reg.tolist()
    assert aaai == pytest.approx([0.3, 0.6, 0.9, 1.2])
    assert settle([-0.5] * 4, aaai) == pytest.approx([-1.0, -0.48, -0.32, -0.24], abs=0.1)
    assert settle([-0.1, -0.3, -0.5, -0.7], aaai) == pytest.approx([-1.0, -0.48, -0.32, -0.24], abs=0.1)
    assert settle([0.3] * 4, aaai) == pytest.approx([0.42, 0.30, 0.24, 0.18], abs=0.1)
    assert settle([-0.5] * 4, [0.5] * 4) == pytest.approx([-0.58] * 4, abs=0.1)  # no order by depth without lambda's


# --- losses -----------------------------------------------------------------------------------------------------------

def plain_blocks(blocks, x):
    """Transformer blocks with explicit attention."""
    for b in blocks:
        h = F.layer_norm(x, x.shape[-1:], b.norm1.weight, b.norm1.bias, 1e-6)
        q, k, v = (F.linear(h, b.attn.qkv.weight, b.attn.qkv.bias)).chunk(3, -1)
        heads = [torch.softmax(qq @ kk.mT / math.sqrt(qq.shape[-1]), -1) @ vv for qq, kk, vv in zip(
            *(t.chunk(b.num_heads, -1) for t in (q, k, v)))]
        x = x + F.linear(torch.cat(heads, -1), b.attn.proj.weight, b.attn.proj.bias)
        h = F.layer_norm(x, x.shape[-1:], b.norm2.weight, b.norm2.bias, 1e-6)
        x = x + b.mlp.fc2(F.gelu(b.mlp.fc1(h)))
        yield x


def slow_encoder(vit, img, keep=None):
    """One image (3, H, W) through the convolution that timm uses -> outputs of all blocks, [CLS] first."""
    tokens = vit.patch_embed.proj(img[None]).flatten(2).mT[0] + vit.pos_embed[0, 1:]
    tokens = tokens if keep is None else tokens[keep]
    return list(plain_blocks(vit.blocks, torch.cat((vit.cls_token[0] + vit.pos_embed[0, :1], tokens))))


def slow_decoder(dec, latent, keep, N):
    """One image, tokens in grid order as MAE un-shuffles them -> prediction of all N patches."""
    x = dec.decoder_embed(latent)
    full = dec.mask_token[0].repeat(N, 1)
    full[keep] = x[1:]
    x = torch.cat((x[:1], full)) + dec.decoder_pos_embed[0]
    *_, x = plain_blocks(dec.decoder_blocks, x)
    return dec.decoder_pred(dec.decoder_norm(x))[1:]


def slow_loss(model, imgs, ids, reg, scale):
    """Eq. 2 to 6 patch by patch, for the deep and dynamic form with both branches."""
    total, N = 0, ids.shape[1]
    for img, order in zip(imgs, ids.tolist()):
        keep, masked = order[:model.cfg.num_keep], order[model.cfg.num_keep:]
        student, teacher = slow_encoder(model.encoder, img, keep), slow_encoder(model.teacher, img)
        d = [min(math.dist((i // 8, i % 8), (j // 8, j % 8)) for j in keep) for i in masked]
        for k, g in enumerate(model.taps):
            latent = model.encoder.norm(student[g - 1])
            pixels = slow_decoder(model.pixel_decoder, latent, keep, N)
            features = slow_decoder(model.feature_decoder, latent, keep, N)
            e = [math.exp(x ** model.beta[k].item()) for x in d]
            softmax = [x / sum(e) for x in e]
            for i, s in zip(masked, softmax):
                y, x = i // 8 * 4, i % 8 * 4
                patch = img[:, y:y + 4, x:x + 4].permute(1, 2, 0).flatten()  # row, column, channel
                patch = (patch - patch.mean()) / torch.sqrt(patch.var(unbiased=True) + 1e-6)
                want, got = (t - t.mean() for t in (teacher[g - 1][1 + i], features[i]))
                want, got = (t / torch.sqrt((t * t).mean() + 1e-6) for t in (want, got))
                error = ((pixels[i] - patch) ** 2).mean() + ((got - want) ** 2).mean()
                total += scale[k] * s / max(softmax) * error / len(masked) / len(imgs)
            norm = math.sqrt(sum(s * s for s in softmax)) - 1 / math.sqrt(len(masked))
            total += model.cfg.reg_batch * reg[k] * norm / len(imgs)
    return total


@pytest.mark.parametrize("mask", ["block", "random"])
def test_loss_equals_a_loop_over_patches(mask):
    model = make(beta_init=(-0.7, -0.2, 0.1, 0.4), reg=(0.1, 0.2, 0.3, 0.4), loss_scale=(0.75, 0.75, 0.75, 1.0))
    with torch.no_grad():
        model.teacher.blocks[1].mlp.fc1.weight.mul_(1.5)  # teacher unlike student
        imgs, ids = batch(mask=mask)
        loss, metrics = model(imgs, ids)
        want = slow_loss(model, imgs, ids, (0.1, 0.2, 0.3, 0.4), (0.75, 0.75, 0.75, 1.0))
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert metrics["beta/1"].item() == pytest.approx(-0.7)


def mae(**options):
    return make(feature="none", **dict(pixel="plain") | options)


def test_mae_family_identities():
    plain, K1 = mae(), mae(pixel="ds", K=1)
    imgs, ids = batch()
    deep, dds = mae(pixel="ds"), mae(pixel="dds", beta_init=(0.0,), beta_learnable=False, reg=(0.0,))
    assert dds(imgs, ids)[0].item() == deep(imgs, ids)[0].item()
    assert K1(imgs, ids)[0].item() == plain(imgs, ids)[0].item()
    d = mae(pixel="d", beta_init=(0.0,))
    assert d(imgs, ids)[0].item() == pytest.approx(plain(imgs, ids)[0].item(), rel=1e-6)
    keep = ids[:, :16]
    latents = [plain.encoder.norm(slow_encoder(plain.encoder, i, k)[-1]) for i, k in zip(imgs, keep)]
    pixels = torch.stack([slow_decoder(plain.pixel_decoder, latent, k, 64) for latent, k in zip(latents, keep)])
    target = ddae.patchify(imgs, 4)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    mask = torch.ones(3, 64).scatter(1, keep, 0.0)
    want = (((pixels - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    assert plain(imgs, ids)[0].item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("pixel", ["none", "plain", "d", "ds", "dds"])
@pytest.mark.parametrize("feature", ["none", "plain", "d", "ds", "dds"])
def test_every_ablation_trains_what_it_should(pixel, feature):
    if pixel == feature == "none":
        return
    model = make(pixel=pixel, feature=feature)
    loss, metrics = model(*batch())
    loss.backward()
    for name, p in model.named_parameters():  # DDP needs a gradient for every trainable parameter
        assert (p.grad is not None) == p.requires_grad, name
        assert not (name.startswith("teacher") and p.requires_grad)
    assert not make(pixel=pixel, feature=feature, beta_learnable=False).beta.requires_grad
    acts = 4 if "dds" in (pixel, feature) else 1 if "d" in (pixel, feature) else 0
    assert len(model.beta) == acts and (not acts or (model.beta.grad != 0).all())
    assert model.reg.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4][4 - acts:])
    for kind, name in ((pixel, "pixel"), (feature, "feature")):
        taps = {"none": 0, "plain": 1, "d": 1, "ds": 4, "dds": 4}[kind]
        assert sum(m.startswith(name + "/") for m in metrics) == taps


def test_only_masked_patches_count_and_the_teacher_sees_the_whole_image(monkeypatch):
    model, (imgs, ids) = make(feature="none", pixel="ds"), batch(B=1)
    seen = []
    monkeypatch.setattr(ddae, "pixel_target", lambda patches, norm_pix: seen.append(patches) or patches)
    model(imgs, ids)
    assert torch.equal(seen[0], ddae.patchify(imgs, 4)[:, ids[0, 16:]])
    model = make()
    before = model.targets(imgs, ids[:, 16:])[0]
    changed = ddae.patchify(imgs, 4)
    changed[0, ids[0, -1]] = 0
    after = model.targets(ddae.unpatchify(changed, 4, (8, 8)), ids[:, 16:])[0]
    assert not torch.allclose(before[0, 0, 0], after[0, 0, 0], atol=1e-3)
    assert (before.var(-1, correction=0) - 1).abs().max() < 1e-3


def test_preview_puts_patches_and_weights_in_their_places():
    patches = 3 * torch.randn(2, 5, 48) + 1
    for norm_pix in (True, False):  # the picture inverts the target
        target = ddae.pixel_target(patches, norm_pix)
        torch.testing.assert_close(ddae.pixel_picture(target, patches, norm_pix), patches)
    (imgs, ids), model = batch(), make(norm_pix=False).eval()
    with torch.no_grad():
        assert list(mae().preview(imgs, ids)) == ["input", "masked", "true means", "reconstruction\n(true mean, std)"]
        panels = model.preview(imgs, ids)
        weight = model.weights(ids[:, :16], ids[:, 16:])[0]
        pred = model.pixel_decoder(model.encode(imgs, ids[:, :16])[-1:], ids)[0]
    for b in range(3):
        for place, n in enumerate(ids[b].tolist()):
            patch = (slice(None), slice(n // 8 * 4, n // 8 * 4 + 4), slice(n % 8 * 4, n % 8 * 4 + 4))
            masked = place >= 16
            assert torch.equal(panels["masked"][b][patch], 0 * imgs[b][patch] if masked else imgs[b][patch])
            want = pred[b, place - 16].view(4, 4, 3).permute(2, 0, 1) if masked else imgs[b][patch]
            assert torch.allclose(panels["reconstruction"][b][patch], want, atol=1e-5)
            assert (panels["distance"][b, n // 8, n % 8] > 0) == masked
            want = weight[2, b, place - 16] if masked else 0
            assert panels["weight, block 3\n(beta -0.50)"][b, n // 8, n % 8] == want


def test_taps_are_block_outputs():
    for K, taps in ((1, [12]), (2, [6, 12]), (4, [3, 6, 9, 12]), (6, [2, 4, 6, 8, 10, 12])):
        assert build(**DEEP, K=K).taps == taps
    model, seen = make(K=2), []
    imgs, ids = batch()
    for g in model.taps:
        model.encoder.blocks[g - 1].register_forward_hook(lambda m, i, o: seen.append(o))
    latent = model.encode(imgs, ids[:, :16])
    for tap, out in zip(latent, seen):
        assert torch.equal(tap, model.encoder.norm(out))


# --- teacher ----------------------------------------------------------------------------------------------------------

def test_teacher_is_the_closed_form_average():
    model = make(momentum=(0.9,))
    student, teacher = model.encoder.blocks[0].attn.qkv.weight, model.teacher.blocks[0].attn.qkv.weight
    assert torch.equal(student, teacher) and student.data_ptr() != teacher.data_ptr()
    want = 0.9 ** 5 * teacher.clone()
    for k in range(5):
        with torch.no_grad():
            student.add_(k + 1)
        want += 0.1 * 0.9 ** (4 - k) * student.detach()
        model.after_step(k + 1, 5)
    torch.testing.assert_close(teacher, want)
    assert torch.equal(model.teacher.pos_embed, model.encoder.pos_embed)


@pytest.mark.parametrize("epoch, m", [(0, .999), (50, .99945), (100, .9999), (250, .999945), (799, .99999)])
def test_momentum_schedule(epoch, m):
    for momentum, want in (((0.999, 0.9999, 0.99999), m), ((0.9999,), 0.9999)):
        model = make(momentum=momentum).double()
        with torch.no_grad():
            model.teacher.cls_token.zero_()
            model.encoder.cls_token.fill_(1)
        model.after_step(3 * epoch, 3)
        assert 1 - model.teacher.cls_token[0, 0, 0].item() == pytest.approx(want, abs=1e-9)


# --- the ViT and other people's ---------------------------------------------------------------------------------------

def test_position_table_is_the_closed_form_columns_first():
    table = ddae.sincos_pos_embed(16, (3, 5))[0]
    assert table[0].abs().max() == 0
    for i in range(15):
        for half, position in ((0, i % 5), (8, i // 5)):
            for k in range(4):
                angle = position / 10000 ** (k / 4)
                assert table[1 + i, half + k].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert table[1 + i, half + 4 + k].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_patchify_round_trip_and_order():
    imgs = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    patches = ddae.patchify(imgs, 4)
    assert torch.equal(patches[0, 4], imgs[0, :, 4:8, 4:8].permute(1, 2, 0).flatten())
    assert torch.equal(ddae.unpatchify(patches, 4, (2, 3)), imgs)


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_parameter_counts():
    base = build()
    assert count(base.encoder) == 85_647_360
    assert (count(base.pixel_decoder), count(base.feature_decoder)) == (7_094_016, 15_359_232)
    assert count(base) == 108_100_612
    small = build(embed_dim=384, num_heads=6)
    counts = [count(m) for m in (small.encoder, small.pixel_decoder, small.feature_decoder)]
    assert counts == [21_590_016, 6_897_408, 3_845_760]


def test_a_vit_b_in_timm():
    model, vit, imgs = build(), timm.create_model("vit_base_patch16_224", num_classes=0), torch.randn(2, 3, 224, 224)
    vit.load_state_dict(model.encoder.state_dict())
    with torch.no_grad():
        ours = model.encoder.norm(model.encoder(imgs)[-1])
        assert (vit.eval().forward_features(imgs) - ours).abs().max() < 1e-5


def test_init_takes_maes_and_timms_files(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=4, depth=4, embed_dim=24,
                            num_heads=2)
    weights = vit.state_dict() | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}
    imgs = torch.randn(2, 3, 32, 32)
    for content in ({"model": weights}, vit.state_dict()):
        torch.save(content, tmp_path / "mae.pth")
        model = build(**SMALL, init=str(tmp_path / "mae.pth"), out_dir=str(tmp_path))
        with torch.no_grad():
            for encoder in (model.encoder, model.teacher):
                features = encoder.norm(encoder(imgs)[-1])
                torch.testing.assert_close(features, vit.eval().forward_features(imgs), atol=1e-5, rtol=0)


# --- the recipe -------------------------------------------------------------------------------------------------------

def test_defaults_are_the_paper_s_recipe():
    cfg = common.parse(ddae.Config, ddae.PRESETS, argv=[])
    paper = dict(  # AAAI-24 Implementation and Eq. 6; ICLR Appendix A; code parents where both are silent
        img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mask="block", mask_ratio=0.75, K=4,
        pixel="dds", feature="dds", beta_init=(-0.5,), beta_learnable=True, loss_scale=(1.0,), reg=(), norm_pix=True,
        reg_batch=128, decoder_depth=2, decoder_dim=512, decoder_heads=16, momentum=(0.999, 0.9999, 0.99999),
        epochs=100, warmup_epochs=20, batch_size=4096, base_lr=1.5e-4, min_lr=0, weight_decay=0.05,
        adam_betas=(0.9, 0.95), crop_min=0.2)
    assert {name: getattr(cfg, name) for name in paper} == paper
    assert build().reg.tolist() == pytest.approx([0.3, 0.6, 0.9, 1.2])


@pytest.mark.parametrize("flags, message", [
    ("--img_size 20", "--img_size must be divisible by --patch_size 16"), ("--K 13", "--K 13 is above --depth 12"),
    ("--mask_ratio 1", "must leave some of 196 patches"), ("--num_heads 5", "--embed_dim must be divisible"),
    ("--beta_init 1 2 3", "--beta_init takes 1 or 4 values"), ("--momentum 0.9 0.9", "--momentum takes 1 or 3 values"),
    ("--pixel none --feature none", "leaves nothing to learn from"), ("--mask blok", "invalid choice: 'blok'")])
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        common.parse(ddae.Config, ddae.PRESETS, argv=flags.split())
    assert message in capsys.readouterr().err.splitlines()[-1]
