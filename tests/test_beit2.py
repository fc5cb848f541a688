"""DDS on BEiT v2 against independent oracles: timm's BEiT, loops over images and patches, scipy, DDAE's h_beta."""
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
BETAS = -1.0, -0.5, 0.0, 0.7


@pytest.fixture(autouse=True)
def fit_codes(monkeypatch):
    """Random codes, because fitting takes a second -> the real function."""
    fit = beit2.fit_codes
    monkeypatch.setattr(beit2, "fit_codes", lambda cfg: torch.randn(
        cfg.codes, 3 * cfg.patch_size ** 2, generator=torch.Generator().manual_seed(1)))
    return fit


def batch(B=4, fill=False):
    """Images, and masks of clearly different counts, or with `fill` of the same."""
    masks = [beit2.draw_mask(np.random.default_rng(i), beit2.Config(**SMALL, fill_mask=fill)) for i in range(B)]
    for i, mask in enumerate([] if fill else masks):
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


# --- masks and weights ------------------------------------------------------------------------------------------------

def test_block_masks_have_the_statistics_of_beits_generator():
    """An independent simulation of 3000 masks: mean 74.50, 75 in 68%, never below 66; mean distance 1.79."""
    masks = np.stack([beit2.block_mask(np.random.default_rng(s), (14, 14), 75) for s in range(1500)])
    count, distance = masks.sum((1, 2)), np.stack([distance_transform_edt(m) for m in masks])
    assert count.max() == 75 and count.min() >= 60 and count.mean() == pytest.approx(74.5, abs=0.15)
    assert (count == 75).mean() == pytest.approx(0.68, abs=0.04)
    assert distance[masks].mean() == pytest.approx(1.79, abs=0.03)
    assert (distance[masks] == 1).mean() == pytest.approx(0.447, abs=0.02)


@pytest.mark.parametrize("size, patch, ratio, most", [(224, 16, 0.385, 75), (32, 4, 0.385, 24), (16, 8, 0.5, 2)])
def test_masks_are_exact_if_filled_and_never_empty(size, patch, ratio, most):
    for fill in (True, False):
        cfg = beit2.Config(img_size=size, patch_size=patch, mask_ratio=ratio, fill_mask=fill, tokenizer="x")
        for seed in range(200):
            mask = beit2.draw_mask(np.random.default_rng(seed), cfg)
            blocks = beit2.block_mask(np.random.default_rng(seed), (size // patch,) * 2, most).ravel()
            assert mask.dtype == bool and (mask >= blocks).all() and mask.sum() == (most if fill else blocks.sum()) > 0


def test_weights_equal_a_softmax_per_image():
    mask, model = batch(20)[1], make(beta_init=BETAS)
    assert len(mask.sum(1).unique()) > 3
    weight, excess = model.weights(mask, torch.arange(64).expand(20, -1))
    for b in range(20):
        distance = distance_transform_edt(mask[b].view(8, 8)).ravel()
        for k, beta in enumerate(BETAS):
            e = {j: math.exp(distance[j] ** beta) for j in range(64) if mask[b, j]}
            want = [e.get(j, 0.0) / max(e.values()) for j in range(64)]
            assert weight[k, b].tolist() == pytest.approx(want, abs=1e-5)
            norm = math.sqrt(sum(x * x for x in e.values())) / sum(e.values())
            assert excess[k, b].item() == pytest.approx(norm - 1 / math.sqrt(len(e)), abs=1e-6)
    (weight.square().mean() + excess.mean()).backward()
    assert model.beta.grad.isfinite().all() and model.beta.grad.abs().min() > 0


def test_h_beta_equals_ddaes_on_equal_counts():
    mask, found = batch(20, fill=True)[1], []
    distance = beit2.distance_map(mask, make().distances)
    for h_beta, d in ((beit2.h_beta, distance), (ddae.h_beta, distance[mask].view(20, -1))):
        beta = torch.tensor(BETAS, requires_grad=True)
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
    assert model.beta.tolist() == pytest.approx([-3.5, -2.46, -1.29, -0.89], abs=0.5) and model.beta[3] > -1


# --- timm's BEiT as the oracle ----------------------------------------------------------------------------------------

def beit(**options):
    return timm.models.beit.Beit(32, 4, **dict(num_classes=0, embed_dim=24, depth=4, num_heads=2, init_values=0.1,
                                               use_abs_pos_emb=False, norm_layer=norm) | options)


def norm(dim, **_):
    return nn.LayerNorm(dim, eps=1e-6)


def official():
    """BEiT v2 for pretraining, of timm's parts, under the names of the released files."""
    vit = beit(use_shared_rel_pos_bias=True, global_pool="token")
    vit.mask_token, vit.lm_head = nn.Parameter(torch.zeros(1, 1, 24)), nn.Linear(24, 40)
    vit.cls_pt_layers = nn.ModuleList(timm.models.beit.Block(
        24, 2, qkv_bias=True, init_values=0.1, norm_layer=norm) for _ in range(2))
    return vit


def rename(name):
    """Our names -> those of the released files."""
    name = name.removeprefix("encoder.")
    return "rel_pos_bias.relative_position_bias_table" if name.endswith("position_bias_table") else name


def test_plain_beit2_equals_a_straightforward_one():
    """Loss and all gradients; masked tokens of the whole batch in one mean, as in its code."""
    model, oracle, (imgs, mask) = make(dds="none"), official(), batch(fill=True)
    weights = {rename(k): v for k, v in model.state_dict().items() if k not in ("beta", "tokenizer.codes")}
    oracle.load_state_dict(weights)
    x = oracle.patch_embed(imgs)
    x = x * (1 - mask.float().unsqueeze(-1)) + oracle.mask_token * mask.float().unsqueeze(-1)
    outputs, bias = [torch.cat((oracle.cls_token.expand(4, -1, -1), x), 1)], oracle.rel_pos_bias()
    for block in oracle.blocks:
        outputs.append(block(outputs[-1], shared_rel_pos_bias=bias))
    x = torch.cat((outputs[4][:, [0]], outputs[3][:, 1:]), 1)
    for block in oracle.cls_pt_layers:
        x = block(x, shared_rel_pos_bias=bias)
    ids = model.tokenizer(imgs, (8, 8)).squeeze(-1)
    want = sum(F.cross_entropy(oracle.lm_head(oracle.norm(y)[:, 1:][mask]), ids[mask]) for y in (outputs[4], x))
    want.backward()
    loss, _ = model(imgs, mask)
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    ours = {rename(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, p in oracle.named_parameters():
        torch.testing.assert_close(ours.pop(name), p.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert not ours


@torch.no_grad()
def test_features_of_a_vit_b_in_timm():
    model, imgs = stir(beit2.BEiT2(beit2.Config(tokenizer="pixels", codes=4))), torch.randn(2, 3, 224, 224)
    vit = timm.create_model("beitv2_base_patch16_224", num_classes=0, global_pool="token").eval()
    vit.load_state_dict(model.encoder.state_dict())  # strictly
    ours = model.encoder.norm(model.encoder(imgs)[-1])
    assert (ours - vit.forward_features(imgs)).abs().max() < 1e-5
    count = sum(p.numel() for p in model.encoder.parameters())
    assert count == sum(p.numel() for p in vit.parameters()) - 11 * 732 * 12  # one table instead of twelve


@torch.no_grad()
def test_released_weights_load(tmp_path):
    vit, imgs = stir(official()).eval(), torch.randn(2, 3, 32, 32)
    index = {"rel_pos_bias.relative_position_index": beit2.relative_positions((8, 8))}  # a buffer of theirs
    torch.save(dict(model=vit.state_dict() | index), tmp_path / "beitv2.pth")
    model = beit2.BEiT2(beit2.Config(**SMALL | dict(init=str(tmp_path / "beitv2.pth"))))
    features = model.encoder.norm(model.encoder(imgs)[-1])
    torch.testing.assert_close(features, vit.forward_features(imgs), atol=1e-5, rtol=0)
    assert len({id(block.attn.relative_position_bias_table) for block in model.encoder.blocks}) == 1


def test_initial_weights_are_beits():
    model = beit2.BEiT2(beit2.Config(**SMALL | dict(embed_dim=192, codes=300)))
    blocks = (*model.encoder.blocks, *model.cls_pt_layers)
    for number, block in zip((1, 2, 3, 4, 4, 5), blocks, strict=True):  # cls_pt_layers follow block 3
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.abs().max().item() == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.01)
        assert block.mlp.fc1.weight.abs().max().item() == pytest.approx(0.02, rel=0.01)
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all() and not block.mlp.fc1.bias.any()
    for p in (model.lm_head.weight, model.mask_token, model.encoder.cls_token, model.encoder.patch_embed.proj.weight):
        assert p.abs().max() <= 0.02 and p.std().item() == pytest.approx(0.0108, rel=0.15)  # of the cut normal


# --- losses -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("dds", ["none", "d", "ds", "dds"])
def test_loss_equals_a_loop_over_patches(dds):
    """Ragged masks, a beta and lambda per block. All supervised blocks are weighted, patch aggregation is not."""
    lambdas, (imgs, mask) = (0.1, 0.2, 0.3, 0.4), batch()
    model = make(dds=dds, beta_init=BETAS, reg=lambdas)
    loss, metrics = model(imgs, mask)
    ids, outputs = model.tokenizer(imgs, (8, 8)).squeeze(-1), model.encoder(imgs, mask, model.mask_token)
    x = torch.cat((outputs[3][:, :1], outputs[2][:, 1:]), 1)
    for block in model.cls_pt_layers:
        x = block(x, model.encoder.positions)
    total, ce = 0, np.zeros(5)
    for b in range(4):
        masked = mask[b].nonzero().flatten().tolist()
        distance = distance_transform_edt(mask[b].view(8, 8)).ravel()
        for k, tokens in enumerate((*outputs, x)):
            supervised, dynamic = k > 2 or "ds" in dds, k < 4 and dds == "dds" or k == 3 and dds == "d"
            e = {i: math.exp(distance[i] ** BETAS[k]) if dynamic else 1 for i in masked}
            for i in masked:
                logp = model.lm_head(model.encoder.norm(tokens[b, 1 + i])).log_softmax(-1)
                error = -logp[ids[b, i]].item() / len(masked) / 4
                ce[k] += error
                total += supervised * error * e[i] / max(e.values())
            if dynamic:
                norm = math.sqrt(sum(v * v for v in e.values())) / sum(e.values()) - 1 / math.sqrt(len(masked))
                total += 128 * lambdas[k] * norm / 4
    assert loss.item() == pytest.approx(total, rel=1e-5)
    logged = {k: v.item() for k, v in metrics.items() if k.startswith("ce/")}
    want = {"ce/4": ce[3], "ce/cls": ce[4]} | ({f"ce/{g}": ce[g - 1] for g in (1, 2, 3)} if "ds" in dds else {})
    assert logged == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dds", ["none", "d", "ds", "dds"])
def test_every_ablation_trains_what_it_should(dds):
    for aggregation in (True, False):
        model = make(dds=dds, aggregation=aggregation)
        model(*batch())[0].backward()
        for name, p in model.named_parameters():  # DDP needs a gradient for every trainable parameter
            assert (p.grad is not None) == p.requires_grad, name
        assert (model.dynamic, len(model.beta)) == {"dds": ([1, 2, 3, 4], 4), "d": ([4], 1)}.get(dds, ([], 0))
        assert not model.dynamic or model.beta.grad.abs().min() > 0
    assert not make(dds=dds, beta_learnable=False).beta.requires_grad


@torch.no_grad()
def test_masked_patches_are_hidden_and_visible_ones_do_not_count():
    model, (imgs, mask) = make(), batch()
    hidden = beit2.unpatchify(torch.where(mask.unsqueeze(-1), 7.0, beit2.patchify(imgs, 4)), 4, (8, 8))
    for a, b in zip(*(model.encoder(x, mask, model.mask_token) for x in (imgs, hidden))):
        assert torch.equal(a, b)
    loss, target = model(imgs, mask)[0], model.tokenizer(imgs, (8, 8))
    model.tokenizer.forward = lambda imgs, grid: target.where(mask.unsqueeze(-1), 0)
    assert torch.equal(model(imgs, mask)[0], loss)


# --- tokenizers -------------------------------------------------------------------------------------------------------

def test_pixel_codes_equal_scipys_k_means(fit_codes, monkeypatch):
    seen, patchify = [], beit2.patchify
    with monkeypatch.context() as patch:
        patch.setattr(beit2, "patchify", lambda imgs, p: seen.append(patchify(imgs, p)) or seen[0])
        found = fit_codes(beit2.Config(**SMALL), images=60, iterations=7)
    order = torch.randperm(60 * 64, generator=torch.Generator().manual_seed(0))
    patches = seen[0].flatten(0, 1)[order].numpy()
    want = kmeans2(patches, patches[:40], iter=7, minit="matrix")[0]
    np.testing.assert_allclose(found.numpy(), want, atol=1e-4)
    model = make()
    model.tokenizer.codes.copy_(found)
    ids = torch.arange(64) % 40
    assert torch.equal(model.tokenizer(beit2.unpatchify(found[ids][None], 4, (8, 8)), (8, 8))[0, :, 0], ids)


@torch.no_grad()
def test_vq_kd_ids_are_the_targets(tmp_path):
    """Random weights under VQ-KD's names; the oracle is timm's BEiT, without position biases, and a loop over codes."""
    torch.manual_seed(2)
    vit = stir(beit(embed_dim=64, depth=2, num_heads=1, init_values=None, use_abs_pos_emb=True, global_pool="avg"))
    nn.init.normal_(vit.eval().pos_embed, std=0.5)
    head, codes = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), F.normalize(torch.randn(90, 8))
    weights = {"encoder." + k: v for k, v in vit.state_dict().items()} | {"quantize.embedding.weight": codes}
    torch.save(weights | {f"encode_task_layer.{k}": v for k, v in head.state_dict().items()}, tmp_path / "vqkd.pth")
    model, (imgs, mask) = make(tokenizer=str(tmp_path / "vqkd.pth")), batch()
    pixels = imgs * torch.tensor(common.STD).view(3, 1, 1) + torch.tensor(common.MEAN).view(3, 1, 1)
    x = F.normalize(head(vit.fc_norm(vit.forward_features(2 * pixels - 1))[:, 1:]), dim=-1)
    ids = torch.stack([torch.stack([(codes - token).square().sum(1).argmin() for token in row]) for row in x])
    assert len(ids.unique()) > 10 and torch.equal(model.tokenizer(imgs, (8, 8)).squeeze(-1), ids)
    assert model.lm_head.out_features == 90 and not any(k.startswith("tokenizer") for k in model.state_dict())
    assert torch.equal(model.preview(imgs, mask)["visual tokens"], codes[ids].view(4, 8, 8, 8))


# --- preview and recipe -----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_preview_puts_everything_in_its_place():
    model, (imgs, mask) = make(beta_init=BETAS).eval(), batch()
    panels, codes = model.preview(imgs, mask), model.tokenizer.codes
    logits = model.lm_head(model.encoder.norm(model.encoder(imgs, mask, model.mask_token)[-1]))
    for b in range(4):
        distance = torch.from_numpy(distance_transform_edt(mask[b].view(8, 8)))
        torch.testing.assert_close(panels["distance"][b].double(), distance)
        e = (distance ** 0.7).exp() * mask[b].view(8, 8)
        torch.testing.assert_close(panels["weight, block 4\n(beta 0.70)"][b].double(), e / e.max(), atol=1e-5, rtol=0)
        for i in range(64):
            y, x = i // 8, i % 8
            patch = imgs[b, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4]
            nearest = (codes - patch.permute(1, 2, 0).flatten()).square().sum(1).argmin()
            assert torch.equal(panels["masked"][b, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4], patch * ~mask[b, i])
            assert torch.equal(panels["visual tokens"][b, y, x], codes[nearest])
            assert torch.equal(panels["predicted"][b, y, x], codes[logits[b, 1 + i].argmax()] * mask[b, i])


def test_defaults_are_the_papers_recipe(monkeypatch):
    given = []
    monkeypatch.setattr(common, "train", lambda *args: given.extend(args))
    monkeypatch.setattr(sys, "argv", "x --tokenizer pixels --codes 4 --embed_dim 24".split())
    beit2.main()
    cfg, model, samples = given
    paper = dict(  # BEiT v2's command for 300 epochs; AAAI-24 Implementation and Eq. 6
        img_size=224, patch_size=16, depth=12, num_heads=12, layer_scale=0.1, drop_path=0, num_mask=75, early_layers=9,
        head_layers=2, K=4, dds="dds", beta_init=(-0.5,), beta_learnable=True, reg_batch=128, epochs=100,
        warmup_epochs=10, batch_size=2048, min_lr=1e-5, weight_decay=0.05, adam_betas=(0.9, 0.98), clip_grad=3,
        crop_min=0.2, color_jitter=0.4)
    assert {name: getattr(cfg, name) for name in paper} == paper
    assert common.cosine(10, 1, cfg) == pytest.approx(1.5e-3)
    assert [type(x).__name__ for x in samples.crop.transforms] == ["ColorJitter", "Compose"]  # colors before the crop
    assert model.taps == [3, 6, 9, 12] and model.reg.tolist() == pytest.approx([0.3, 0.6, 0.9, 1.2])
    decayed = set(map(id, common.adamw(model, cfg).param_groups[0]["params"]))
    for name, p in model.named_parameters():  # also decayed: position biases and the mask token
        bare = name.endswith(("bias", "gamma_1", "gamma_2", "cls_token", "beta")) or "norm" in name
        assert (id(p) in decayed) != bare, name


# --- fine-tuning ------------------------------------------------------------------------------------------------------

def tune(flags):
    """The model that a command of finetune.py trains or evaluates."""
    cfg, weights, _ = finetune.settle(common.parse(finetune.Config, finetune.PRESETS, argv=flags.split()))
    return finetune.build(cfg, weights, 5)


@pytest.fixture
def encoder(tmp_path):
    torch.save(dict(model=make().encoder.state_dict(), config={}), tmp_path / "encoder.pt")
    return tmp_path / "encoder.pt"


@torch.no_grad()
def test_finetune_takes_encoders_of_beit2(encoder, tmp_path):
    """encoder.pt, a released file, and a fine-tuned model of timm's, whose tables differ between blocks."""
    imgs, released = torch.randn(2, 3, 32, 32), stir(official()).eval()
    vit = beit(num_classes=5, use_rel_pos_bias=True, global_pool="avg").eval()
    torch.save(dict(model=released.state_dict()), tmp_path / "beitv2.pth")
    for path in (encoder, tmp_path / "beitv2.pth"):
        model = tune(f"--init {path} --preset beit2").eval()
        vit.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.logits(imgs), vit(imgs), atol=1e-6, rtol=0)
        assert len({id(block.attn.relative_position_bias_table) for block in model.blocks}) == 4  # learned apart
        assert common.cosine(20, 1, model.cfg) == 5e-4
    tokens = released.norm(beit2.ViT.forward(model, imgs)[-1])
    torch.testing.assert_close(tokens, released.forward_features(imgs), atol=1e-5, rtol=0)
    torch.save(stir(vit).state_dict(), tmp_path / "tuned.pth")
    model = tune(f"--init {tmp_path}/tuned.pth --eval").eval()
    torch.testing.assert_close(model.logits(imgs), vit(imgs), atol=1e-5, rtol=0)


def test_finetune_runs_resumes_and_evaluates(encoder, tmp_path, monkeypatch, capsys):
    def run(flags):
        monkeypatch.setattr(sys, "argv", f"x {flags} --device cpu --num_workers 0 --eval_every 0".split())
        finetune.main()

    monkeypatch.setattr("shapes.Shapes.__len__", lambda self: 64)
    init = encoder.with_name("init.pt")
    init.write_bytes(encoder.read_bytes())
    for steps in (1, 2):
        run(f"--preset quick --batch_size 32 --epochs 2 --init {init} --max_steps {steps} --out_dir {tmp_path}")
        init.unlink(missing_ok=True)  # a resumed run does not need it
    for flags in (f"--eval --init {tmp_path}/model.pt", f"--mode knn --init {encoder}"):
        capsys.readouterr()
        run(flags)
        assert "val_images 64" in capsys.readouterr().out


def test_partial_finetuning_and_files_that_do_not_fit(encoder):
    model, before = tune(f"--init {encoder} --last_k 1 --reinit_last_k 1"), common.load(encoder)["model"]
    trained = {".".join(name.split(".")[:1 + ("blocks" in name)]) for name, p in model.named_parameters()
               if p.requires_grad}
    assert trained == {"blocks.3", "fc_norm", "head"}
    same = [torch.equal(model.blocks[i].mlp.fc1.weight, before[f"blocks.{i}.mlp.fc1.weight"]) for i in range(4)]
    assert same == [True, True, True, False] and (model.blocks[3].gamma_1 == 0.1).all()
    assert tune("--mode scratch --vit beit2 --img_size 32 --embed_dim 24 --num_heads 2 --depth 2").blocks[1].gamma_1[0]
    for flags, message in (("--img_size 64", "blocks.0.attn.relative_position_bias_table, in the model .964, 2"),
                           ("--vit plain", "--vit plain, but .* has beit2"), ("--num_heads 3", "but .* has 2")):
        with pytest.raises(SystemExit, match=message):
            tune(f"--init {encoder} {flags}")
