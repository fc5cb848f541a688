"""DDS on BEiT v2 against independent oracles: timm's BEiT, loops over images and patches, scipy, DDAE's h_beta."""
import dataclasses
import math
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from scipy.ndimage import distance_transform_edt

import beit2
import common
import ddae
import finetune

SMALL = dict(img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=2, early_layers=3, head_layers=2,
             tokenizer="pixels", codes=40, out_dir="nowhere")
SHARED = "rel_pos_bias.relative_position_bias_table"


@pytest.fixture(autouse=True)
def codes(monkeypatch):
    """Random codes: fitting takes a second."""
    fit = beit2.fit_codes
    monkeypatch.setattr(beit2, "fit_codes", lambda cfg: torch.randn(
        cfg.codes, 3 * cfg.patch_size ** 2, generator=torch.Generator().manual_seed(1)))
    return fit


def batch(B=4, fill=False):
    cfg = beit2.Config(**SMALL, fill_mask=fill)
    masks = [beit2.draw_mask(np.random.default_rng(seed), cfg) for seed in range(B)]
    for i, mask in enumerate([] if fill else masks):  # of clearly different counts
        mask[np.flatnonzero(mask)[:2 * (i % 5)]] = False
    return torch.randn(B, 3, 32, 32, generator=torch.manual_seed(0)), torch.from_numpy(np.stack(masks))


def stir(model):
    with torch.no_grad():  # zero biases and unit norms would hide mistakes
        for name, p in model.named_parameters():
            if p.requires_grad and (p.ndim == 1 or "bias_table" in name) and name != "beta":
                p.add_(0.1 * torch.randn_like(p))
    return model


def make(**options):
    torch.manual_seed(0)
    return stir(beit2.BEiT2(beit2.Config(**SMALL | options)))


# --- masks, distances, h_beta -----------------------------------------------------------------------------------------

def test_block_masks_have_the_statistics_of_beits_generator():
    """An independent simulation of 3000 masks: mean 74.50, 75 in 68%, never below 66; mean distance 1.79."""
    masks = np.stack([beit2.block_mask(np.random.default_rng(s), (14, 14), 75) for s in range(1500)])
    count, distance = masks.sum((1, 2)), np.stack([distance_transform_edt(m) for m in masks])
    assert count.max() == 75 and count.min() >= 60 and count.mean() == pytest.approx(74.5, abs=0.15)
    assert (count == 75).mean() == pytest.approx(0.68, abs=0.04)
    assert distance[masks].mean() == pytest.approx(1.79, abs=0.03)
    assert (distance[masks] == 1).mean() == pytest.approx(0.447, abs=0.02)


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("size, patch, ratio, most", [(224, 16, 0.385, 75), (32, 4, 0.385, 24), (16, 8, 0.5, 2)])
def test_masks_are_exact_if_filled_and_never_empty(size, patch, ratio, most, fill):
    cfg = beit2.Config(img_size=size, patch_size=patch, mask_ratio=ratio, fill_mask=fill, tokenizer="x")
    distinct = set()
    for seed in range(200):
        mask = beit2.draw_mask(np.random.default_rng(seed), cfg)
        blocks = beit2.block_mask(np.random.default_rng(seed), (size // patch,) * 2, most).ravel()
        assert mask.dtype == bool and (mask >= blocks).all() and mask.sum() == (most if fill else blocks.sum()) > 0
        distinct.add(tuple(mask))
    assert len(distinct) > 150 or size == 16


def test_distance_map_equals_scipy():
    _, mask = batch(50)
    ours = beit2.distance_map(mask, make().distances)
    for row, m in zip(ours.numpy(), mask.numpy()):
        np.testing.assert_allclose(row, distance_transform_edt(m.reshape(8, 8)).ravel(), atol=1e-6)
    assert len(mask.sum(1).unique()) > 2  # of different counts


def test_h_beta_equals_a_softmax_per_image():
    _, mask = batch(20)
    model = make(beta_init=(-1.0, -0.5, 0.0, 0.7))
    distance = beit2.distance_map(mask, model.distances)
    weight, excess = model.weights(mask)
    for b in range(20):
        for k, beta in enumerate((-1.0, -0.5, 0.0, 0.7)):
            e = {j: math.exp(distance[b, j].item() ** beta) for j in range(64) if mask[b, j]}
            s = {j: x / sum(e.values()) for j, x in e.items()}
            want = [s.get(j, 0.0) / max(s.values()) for j in range(64)]
            assert weight[k, b].tolist() == pytest.approx(want, abs=1e-5)
            norm = math.sqrt(sum(x * x for x in s.values())) - 1 / math.sqrt(len(s))
            assert excess[k, b].item() == pytest.approx(norm, abs=1e-6)
    (weight.square().mean() + excess.mean()).backward()
    assert model.beta.grad.isfinite().all() and model.beta.grad.abs().min() > 0


def test_h_beta_equals_ddaes_on_equal_counts():
    _, mask = batch(20, fill=True)
    distance = beit2.distance_map(mask, make().distances)
    found = []
    for h_beta, d in ((beit2.h_beta, distance), (ddae.h_beta, distance[mask].view(20, -1))):
        beta = torch.tensor([-1.0, -0.5, 0.0, 0.7], requires_grad=True)
        weight, excess = h_beta(d, beta)
        weight = weight if d is not distance else weight[:, mask].view(4, 20, -1)
        (weight.square().mean() + excess.square().mean()).backward()
        found.append((weight, excess, beta.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_beta_settles_farther_below_zero_than_ddaes():
    """Constant cross-entropies of about 6, under the paper's lambda: DDAE's squared errors give -1.0 to -0.24."""
    model = beit2.BEiT2(beit2.Config(embed_dim=24, num_heads=2, tokenizer="pixels", codes=4))
    masks = [beit2.draw_mask(np.random.default_rng(s), model.cfg) for s in range(128)]
    distance = beit2.distance_map(torch.from_numpy(np.stack(masks)), model.distances)
    optimizer = torch.optim.Adam([model.beta], 0.03)
    for _ in range(300):
        weight, excess = beit2.h_beta(distance, model.beta)
        error = (6 + 0.3 * (distance - 1)) / (distance > 0).sum(1, keepdim=True)
        loss = (weight * error).sum(-1).mean(1).sum() + 128 * (model.reg * excess.mean(1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert -4 < model.beta[0] < -3 and model.beta.tolist()[1:] == pytest.approx([-2.46, -1.29, -0.89], abs=0.15)


# --- timm's BEiT as the oracle ----------------------------------------------------------------------------------------

def official():
    """BEiT v2 for pretraining, of timm's parts, under the names of the released files."""
    vit = timm.models.beit.Beit(32, 4, num_classes=0, embed_dim=24, depth=4, num_heads=2, init_values=0.1,
                                use_abs_pos_emb=False, use_shared_rel_pos_bias=True, global_pool="token",
                                norm_layer=lambda d, **k: nn.LayerNorm(d, eps=1e-6))
    vit.mask_token = nn.Parameter(torch.zeros(1, 1, 24))
    vit.cls_pt_layers = nn.ModuleList(timm.models.beit.Block(
        24, 2, qkv_bias=True, init_values=0.1, norm_layer=lambda d, **k: nn.LayerNorm(d, eps=1e-6))
        for _ in range(2))
    vit.lm_head = nn.Linear(24, 40)
    return vit


def rename(name):
    """Our names -> those of the released files."""
    name = name.removeprefix("encoder.")
    return SHARED if name.endswith("relative_position_bias_table") else name


def test_positions_equal_timms():
    for grid in ((14, 14), (3, 5)):
        assert torch.equal(beit2.relative_positions(grid), timm.models.beit.gen_relative_position_index(grid))


@pytest.mark.parametrize("aggregation", [True, False])
def test_plain_beit2_equals_a_straightforward_one(aggregation):
    """Loss and all gradients; masked tokens of the whole batch in one mean, as in its code."""
    model, oracle, (imgs, mask) = make(dds="none", K=1, aggregation=aggregation), official(), batch(fill=True)
    ours = {rename(k): v for k, v in model.state_dict().items() if k not in ("beta", "tokenizer.codes")}
    oracle.load_state_dict(ours | ({} if aggregation else {  # then not used
        k: v for k, v in oracle.state_dict().items() if k.startswith("cls_pt_layers")}))
    x = oracle.patch_embed(imgs)
    x = x * (1 - mask.float().unsqueeze(-1)) + oracle.mask_token * mask.float().unsqueeze(-1)
    outputs, bias = [torch.cat((oracle.cls_token.expand(4, -1, -1), x), 1)], oracle.rel_pos_bias()
    for block in oracle.blocks:
        outputs.append(block(outputs[-1], shared_rel_pos_bias=bias))
    latents = [outputs[4]]
    if aggregation:
        latents.append(torch.cat((outputs[4][:, [0]], outputs[3][:, 1:]), 1))
        for block in oracle.cls_pt_layers:
            latents[1] = block(latents[1], shared_rel_pos_bias=bias)
    ids = model.tokenizer(imgs, (8, 8)).squeeze(-1)
    want = sum(F.cross_entropy(oracle.lm_head(oracle.norm(y)[:, 1:][mask]), ids[mask]) for y in latents)
    want.backward()
    loss, metrics = model(imgs, mask)
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6) and ("ce/cls" in metrics) == aggregation
    gradients = {k: p.grad for k, p in oracle.named_parameters() if p.grad is not None}
    assert gradients.keys() == {rename(k) for k, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[rename(name)], atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
def test_features_of_a_vit_b_in_timm():
    model, imgs = stir(beit2.BEiT2(beit2.Config(tokenizer="pixels", codes=4))), torch.randn(2, 3, 224, 224)
    vit = timm.create_model("beitv2_base_patch16_224", num_classes=0, global_pool="token").eval()
    vit.load_state_dict(model.encoder.state_dict())  # strictly
    ours = model.encoder.norm(model.encoder(imgs)[-1])
    assert (ours - vit.forward_features(imgs)).abs().max() < 1e-5
    count = sum(p.numel() for p in model.encoder.parameters())
    assert count == sum(p.numel() for p in vit.parameters()) - 11 * 732 * 12  # one table instead of twelve


def test_released_weights_load(tmp_path):
    vit, imgs = stir(official()).eval(), torch.randn(2, 3, 32, 32)
    index = {"rel_pos_bias.relative_position_index": beit2.relative_positions((8, 8))}  # a buffer of theirs
    torch.save(dict(model=vit.state_dict() | index), tmp_path / "beitv2.pth")
    model = make(init=str(tmp_path / "beitv2.pth"), out_dir=str(tmp_path))
    model = beit2.BEiT2(model.cfg)  # `make` has stirred that one
    with torch.no_grad():
        features = model.encoder.norm(model.encoder(imgs)[-1])
        torch.testing.assert_close(features, vit.forward_features(imgs), atol=1e-5, rtol=0)
    assert len({id(block.attn.relative_position_bias_table) for block in model.encoder.blocks}) == 1


def test_initial_weights_are_beits():
    model = beit2.BEiT2(beit2.Config(**SMALL | dict(embed_dim=192, codes=300)))
    for i, block in enumerate((*model.encoder.blocks, *model.cls_pt_layers)):  # cls_pt_layers follow block 3
        number = i + 1 if i < 4 else i
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.abs().max().item() == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.01)
        assert block.mlp.fc1.weight.abs().max().item() == pytest.approx(0.02, rel=0.01)
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all() and not block.mlp.fc1.bias.any()
    for p in (model.lm_head.weight, model.mask_token, model.encoder.cls_token, model.encoder.patch_embed.proj.weight):
        assert p.abs().max() <= 0.02 and p.std().item() == pytest.approx(0.0108, rel=0.15)  # of the cut normal


# --- losses -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dds", ["none", "d", "ds", "dds"])
def test_loss_equals_a_loop_over_patches(dds):
    """Ragged masks, a beta and lambda per block. All supervised blocks are weighted, patch aggregation is not."""
    betas, lambdas = (-0.9, -0.5, 0.3, 0.6), (0.1, 0.2, 0.3, 0.4)
    model, (imgs, mask) = make(dds=dds, beta_init=betas, reg=lambdas), batch()
    assert len(mask.sum(1).unique()) > 1
    with torch.no_grad():
        loss, metrics = model(imgs, mask)
        ids = model.tokenizer(imgs, (8, 8)).squeeze(-1)
        outputs = model.encoder(imgs, mask, model.mask_token)
        x = torch.cat((outputs[3][:, :1], outputs[2][:, 1:]), 1)
        for block in model.cls_pt_layers:
            x = block(x, model.encoder.positions)
        total, ce = 0, np.zeros(5)
        for b in range(4):
            masked = mask[b].nonzero().flatten().tolist()
            distance = distance_transform_edt(mask[b].view(8, 8)).ravel()
            for k, tokens in enumerate((*outputs, x)):
                e = {i: math.exp(distance[i] ** betas[k]) if k < 4 else 1 for i in masked}
                for i in masked:
                    logp = model.lm_head(model.encoder.norm(tokens[b, 1 + i])).log_softmax(-1)
                    error = -logp[ids[b, i]].item() / len(masked) / 4
                    ce[k] += error
                    supervised = k == 4 or k == 3 or dds in ("ds", "dds")
                    dynamic = k < 4 and dds in ("d", "dds")
                    total += supervised * error * (e[i] / max(e.values()) if dynamic else 1)
                if k == 3 and dds == "d" or k < 4 and dds == "dds":
                    norm = math.sqrt(sum(v * v for v in e.values())) / sum(e.values()) - 1 / math.sqrt(len(masked))
                    total += 128 * lambdas[k] * norm / 4
    assert loss.item() == pytest.approx(total, rel=1e-5)
    logged = {k: v.item() for k, v in metrics.items() if k.startswith("ce/")}
    want = {"ce/4": ce[3], "ce/cls": ce[4]} | ({f"ce/{g}": ce[g - 1] for g in (1, 2, 3)} if "ds" in dds else {})
    assert logged == pytest.approx(want, rel=1e-5)


def test_identities():
    (imgs, mask) = batch()
    for a, b in ((dict(dds="dds", beta_init=(0.0,), reg=(0.0,)), dict(dds="ds")),
                 (dict(dds="ds", K=1), dict(dds="none")), (dict(dds="d", beta_init=(0.0,)), dict(dds="none"))):
        assert make(**a)(imgs, mask)[0].item() == pytest.approx(make(**b)(imgs, mask)[0].item(), rel=1e-6)


@pytest.mark.parametrize("aggregation", [True, False])
@pytest.mark.parametrize("dds", ["none", "d", "ds", "dds"])
def test_every_ablation_trains_what_it_should(dds, aggregation):
    model = make(dds=dds, aggregation=aggregation)
    model(*batch())[0].backward()
    for name, p in model.named_parameters():  # DDP needs a gradient for every trainable parameter
        assert (p.grad is not None) == p.requires_grad, name
    assert (model.dynamic, len(model.beta)) == {"dds": ([1, 2, 3, 4], 4), "d": ([4], 1)}.get(dds, ([], 0))
    assert not model.dynamic or model.beta.grad.abs().min() > 0
    assert not make(dds=dds, beta_learnable=False).beta.requires_grad


def test_masked_patches_are_hidden_and_visible_ones_do_not_count():
    model, (imgs, mask) = make(), batch(2)
    hidden = beit2.unpatchify(torch.where(mask.unsqueeze(-1), 7.0, beit2.patchify(imgs, 4)), 4, (8, 8))
    with torch.no_grad():
        for a, b in zip(*(model.encoder(x, mask, model.mask_token) for x in (imgs, hidden))):
            assert torch.equal(a, b)
        target = model.tokenizer(imgs, (8, 8)).squeeze(-1)
        model.tokenizer.forward = lambda imgs, grid: target.unsqueeze(-1)
        loss = model(imgs, mask)[0]
        target = torch.where(mask, target, 0)
        assert torch.equal(model(imgs, mask)[0], loss)


# --- tokenizers -------------------------------------------------------------------------------------------------------

def test_pixel_codes_equal_scipys_k_means(codes, tmp_path):
    cfg = beit2.Config(**SMALL | dict(out_dir=str(tmp_path)))
    seen = []
    patchify = beit2.patchify
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beit2, "patchify", lambda imgs, p: seen.append(patchify(imgs, p)) or seen[0])
        found = codes(cfg, images=60, iterations=7)
    assert torch.equal(found, codes(cfg, images=60, iterations=7))
    order = torch.randperm(60 * 64, generator=torch.Generator().manual_seed(0))
    patches = seen[0].flatten(0, 1)[order].numpy()
    want = kmeans2(patches, patches[:40], iter=7, minit="matrix")[0]
    np.testing.assert_allclose(found.numpy(), want, atol=1e-4)
    picture = found[torch.arange(3)].repeat(22, 1)[:64]
    model = make()
    model.tokenizer.codes.copy_(found)
    assert model.tokenizer(beit2.unpatchify(picture[None], 4, (8, 8)), (8, 8))[0, :, 0].tolist() == [0, 1, 2] * 21 + [0]


def test_codes_are_saved_and_not_fitted_again(tmp_path, monkeypatch):
    fits = []
    monkeypatch.setattr(beit2, "fit_codes", lambda cfg: fits.append(1) or torch.randn(cfg.codes, 48))
    flags = "x --preset quick --embed_dim 12 --codes 30 --batch_size 8 --max_steps {} --save_every 0 --eval_every 0 " \
            "--num_workers 0 --device cpu --out_dir " + str(tmp_path)
    saved = []
    for steps in (1, 2):
        monkeypatch.setattr(sys, "argv", flags.format(steps).split())
        beit2.main()
        saved.append(common.load(tmp_path / "last.pt")["model"]["tokenizer.codes"])
    assert len(fits) == 1 and torch.equal(*saved) and saved[0].any()


def test_initial_weights_do_not_depend_on_the_tokenizer(codes, monkeypatch):
    torch.manual_seed(0)
    a = beit2.BEiT2(beit2.Config(**SMALL))
    monkeypatch.setattr(beit2, "fit_codes", lambda cfg: codes(cfg, images=10, iterations=1))
    torch.manual_seed(0)
    b = beit2.BEiT2(beit2.Config(**SMALL))
    assert torch.equal(a.lm_head.weight, b.lm_head.weight) and not torch.equal(a.tokenizer.codes, b.tokenizer.codes)


@torch.no_grad()
def test_vq_kd_ids_are_the_targets(tmp_path):
    """Random weights under VQ-KD's names; the oracle is timm's BEiT, without position biases, and a loop over codes."""
    torch.manual_seed(2)
    vit = stir(timm.models.beit.Beit(32, 4, num_classes=0, embed_dim=64, depth=2, num_heads=1, global_pool="avg",
                                     norm_layer=lambda d, **k: nn.LayerNorm(d, eps=1e-6))).eval()
    nn.init.normal_(vit.pos_embed, std=0.5)
    head, codes = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), F.normalize(torch.randn(90, 8))
    weights = {"encoder." + k: v for k, v in vit.state_dict().items()} | {"quantize.embedding.weight": codes}
    torch.save(weights | {f"encode_task_layer.{k}": v for k, v in head.state_dict().items()}, tmp_path / "vqkd.pth")
    model, (imgs, mask) = make(tokenizer=str(tmp_path / "vqkd.pth"), dds="none", aggregation=False), batch()
    assert model.lm_head.out_features == 90 and not any(k.startswith("tokenizer") for k in model.state_dict())
    pixels = imgs * torch.tensor(common.STD).view(3, 1, 1) + torch.tensor(common.MEAN).view(3, 1, 1)
    x = F.normalize(head(vit.fc_norm(vit.forward_features(2 * pixels - 1))[:, 1:]), dim=-1)
    ids = torch.stack([torch.stack([(codes - token).square().sum(1).argmin() for token in row]) for row in x])
    assert len(ids.unique()) > 10 and torch.equal(model.tokenizer(imgs, (8, 8)).squeeze(-1), ids)
    every = torch.arange(64).expand(4, -1)
    logp = model.predict(imgs, mask, every)[0].log_softmax(-1)
    rows = [-logp[b][mask[b], ids[b][mask[b]]].mean() for b in range(4)]
    assert model(imgs, mask)[0].item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)
    assert model.preview(imgs, mask)["visual tokens"].shape == (4, 8, 8, 8)


def test_colors_are_jittered_before_the_crop(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(common, "train", lambda cfg, model, samples: seen.setdefault(cfg.color_jitter, samples))
    for jitter in (0.4, 0.0):
        monkeypatch.setattr(sys, "argv", f"x --preset quick --color_jitter {jitter} --out_dir {tmp_path}".split())
        beit2.main()
    (a, mask), _ = seen[0.4][3, 7]
    assert torch.equal(a, seen[0.4][3, 7][0][0]) and not torch.equal(a, seen[0.0][3, 7][0][0])
    assert torch.equal(torch.from_numpy(mask), torch.from_numpy(seen[0.0][3, 7][0][1]))
    assert [type(x).__name__ for x in seen[0.4].crop.transforms] == ["ColorJitter", "Compose"]


# --- preview and recipe -----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_preview_puts_everything_in_its_place():
    model, (imgs, mask) = make(beta_init=(-0.5, 0.2, 0.1, 0.4)).eval(), batch()
    panels = model.preview(imgs, mask)
    outputs = model.encoder(imgs, mask, model.mask_token)
    pred = model.lm_head(model.encoder.norm(outputs[-1]))[:, 1:].argmax(-1)
    weight, codes = model.weights(mask)[0], model.tokenizer.codes
    for b in range(4):
        for i in range(64):
            y, x = i // 8, i % 8
            patch = imgs[b, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4]
            nearest = (codes - patch.permute(1, 2, 0).flatten()).square().sum(1).argmin()
            assert torch.equal(panels["masked"][b, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4], patch * ~mask[b, i])
            assert torch.equal(panels["visual tokens"][b, y, x], codes[nearest])
            assert torch.equal(panels["predicted"][b, y, x], codes[pred[b, i]] * mask[b, i])
            assert panels["weight, block 2\n(beta 0.20)"][b, y, x] == weight[1, b, i]


def test_defaults_are_the_papers_recipe():
    cfg = common.parse(beit2.Config, beit2.PRESETS, argv=["--tokenizer", "vqkd.pth"])
    paper = dict(  # BEiT v2's command for 300 epochs; AAAI-24 Implementation and Eq. 6
        img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, layer_scale=0.1, drop_path=0, num_mask=75,
        early_layers=9, head_layers=2, K=4, dds="dds", beta_init=(-0.5,), beta_learnable=True, reg_batch=128,
        epochs=100, warmup_epochs=10, batch_size=2048, min_lr=1e-5, weight_decay=0.05, adam_betas=(0.9, 0.98),
        clip_grad=3, crop_min=0.2, color_jitter=0.4)
    for name, value in paper.items():
        assert getattr(cfg, name) == value, name
    assert common.cosine(10, 1, cfg) == pytest.approx(1.5e-3)
    model = beit2.BEiT2(dataclasses.replace(cfg, tokenizer="pixels", codes=4, embed_dim=24))
    assert model.taps == [3, 6, 9, 12] and model.reg.tolist() == pytest.approx([0.3, 0.6, 0.9, 1.2])
    decayed, free = (set(map(id, g["params"])) for g in common.adamw(model, cfg).param_groups)
    for name, p in model.named_parameters():
        bare = name.endswith(("bias", "gamma_1", "gamma_2", "cls_token", "beta")) or "norm" in name
        assert id(p) in (free if bare else decayed), name  # also decayed: position biases and the mask token
    large = beit2.Config(**beit2.PRESETS["large"], tokenizer="x")
    assert (large.depth, large.early_layers, large.layer_scale) == (24, 21, 1e-5)


@pytest.mark.parametrize("flags, message", [
    ("", "--tokenizer is missing"), ("--K 13", "--K 13 is above --depth 12"), ("--num_heads 5", "divisible by --num_h"),
    ("--mask_ratio 1", "must leave some of 196 patches"), ("--beta_init 1 2 3", "--beta_init takes 1 or 4 values"),
    ("--early_layers 13", "--early_layers must be at most --depth 12")])
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        common.parse(beit2.Config, beit2.PRESETS, argv=[*flags.split(), *["--tokenizer", "x"] * bool(flags)])
    assert message in capsys.readouterr().err.splitlines()[-1]


# --- fine-tuning ------------------------------------------------------------------------------------------------------

def tune(flags):
    """The model that a command of finetune.py trains or evaluates."""
    cfg, weights, _ = finetune.settle(common.parse(finetune.Config, finetune.PRESETS, argv=flags.split()))
    return finetune.build(cfg, weights, 5)


@pytest.fixture
def encoder(tmp_path):
    torch.save(dict(model=make().encoder.state_dict(), config=dict(num_heads=2)), tmp_path / "encoder.pt")
    return tmp_path / "encoder.pt"


@torch.no_grad()
def test_finetune_takes_encoders_of_beit2(encoder, tmp_path):
    """encoder.pt, a released file, and a fine-tuned model of timm's, whose tables differ between blocks."""
    imgs = torch.randn(2, 3, 32, 32)
    vit = timm.models.beit.Beit(32, 4, num_classes=5, embed_dim=24, depth=4, num_heads=2, init_values=0.1,
                                use_abs_pos_emb=False, use_rel_pos_bias=True, global_pool="avg",
                                norm_layer=lambda d, **k: nn.LayerNorm(d, eps=1e-6)).eval()
    released = stir(official()).eval()
    torch.save(dict(model=released.state_dict()), tmp_path / "beitv2.pth")
    for path in (encoder, tmp_path / "beitv2.pth"):
        model = tune(f"--init {path} --preset beit2").eval()
        vit.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.logits(imgs), vit(imgs), atol=1e-6, rtol=0)
        assert len({id(block.attn.relative_position_bias_table) for block in model.blocks}) == 4  # learned apart
    tokens = released.norm(beit2.ViT.forward(model, imgs)[-1])
    torch.testing.assert_close(tokens, released.forward_features(imgs), atol=1e-5, rtol=0)
    torch.save(stir(vit).state_dict(), tmp_path / "tuned.pth")
    model = tune(f"--init {tmp_path}/tuned.pth --eval").eval()
    torch.testing.assert_close(model.logits(imgs), vit(imgs), atol=1e-5, rtol=0)


def test_layer_wise_rates_are_those_of_beit2(encoder):
    model = tune(f"--init {encoder} --preset beit2")
    cfg = model.cfg
    assert (common.cosine(20, 1, dataclasses.replace(cfg, batch_size=1024)), cfg.layer_decay) == (5e-4, 0.65)
    of = {id(p): g for g in finetune.make_optimizer(model, cfg).param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        layer = 5 if name.startswith(("head", "fc_norm")) else int(name.split(".")[1]) + 1 if "blocks" in name else 0
        bare = name.endswith(("bias", "gamma_1", "gamma_2", "cls_token")) or "norm" in name
        assert of[id(p)]["lr_scale"] == pytest.approx(0.65 ** (5 - layer)), name
        assert of[id(p)]["weight_decay"] == (0 if bare else 0.05), name


def test_finetune_runs_resumes_and_evaluates(encoder, tmp_path, monkeypatch, capsys):
    def run(flags):
        monkeypatch.setattr(sys, "argv", f"x {flags} --device cpu --num_workers 0 --eval_every 0".split())
        finetune.main()

    monkeypatch.setattr("shapes.Shapes.__len__", lambda self: 64)
    for out, stops in (("whole", [2]), ("cut", [1, 2])):
        init = tmp_path / f"{out}.pt"
        init.write_bytes(encoder.read_bytes())
        for stop in stops:
            run(f"--preset quick --batch_size 32 --drop_path 0.2 --epochs 2 --init {init} --max_steps {stop} "
                f"--save_every 0 --out_dir {tmp_path / out}")
            init.unlink(missing_ok=True)  # a resumed run does not need it
    a, b = (common.load(tmp_path / out / "model.pt")["model"] for out in ("whole", "cut"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    run(f"--preset quick_linear --batch_size 32 --init {encoder} --max_steps 1 --out_dir {tmp_path}/linear")
    before, after = (common.load(path)["model"] for path in (encoder, tmp_path / "linear" / "model.pt"))
    assert all(torch.equal(v, before[k]) for k, v in after.items() if "blocks" in k)
    for flags in (f"--eval --init {tmp_path}/cut/model.pt", f"--mode knn --init {encoder}"):
        capsys.readouterr()
        run(flags)
        assert "val_images 64" in capsys.readouterr().out


def test_partial_finetuning_and_other_sizes(encoder, tmp_path):
    model, before = tune(f"--init {encoder} --last_k 1 --reinit_last_k 1"), common.load(encoder)["model"]
    trained = {name.split(".")[0] + name.split(".")[1] * ("blocks" in name)
               for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks3", "fc_norm", "head"}
    same = [torch.equal(model.blocks[i].mlp.fc1.weight, before[f"blocks.{i}.mlp.fc1.weight"]) for i in range(4)]
    assert same == [True, True, True, False] and (model.blocks[3].gamma_1 == 0.1).all()
    assert tune("--mode scratch --vit beit2 --img_size 32 --patch_size 8 --embed_dim 24 --num_heads 2 --depth 2").blocks
    for flags, message in (("--img_size 64", "blocks.0.attn.relative_position_bias_table, in the model .964, 2"),
                           ("--vit plain", "--vit plain, but .* has beit2"), ("--num_heads 3", "but .* has 2")):
        with pytest.raises(SystemExit, match=message):
            tune(f"--init {encoder} {flags}")
