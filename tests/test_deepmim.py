"""DeepMIM and its targets against independent oracles: MAE, loops, timm's models under the published files' names."""
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer, _convert_openai_clip

import common
import ddae
import deepmim
import targets

SMALL = dict(img_size=32, patch_size=4, embed_dim=24, depth=6, num_heads=2, decoder_dim=16, decoder_heads=2,
             decoder_depth=1)


def batch():
    torch.manual_seed(0)
    return torch.randn(3, 3, 32, 32), torch.stack([torch.randperm(64) for _ in range(3)])


def stir(model):
    """Zero biases and unit norms would hide mistakes."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def make(**options):
    torch.manual_seed(0)
    return stir(deepmim.DeepMIM(deepmim.Config(**SMALL | options)))


# --- the method -------------------------------------------------------------------------------------------------------

def test_one_tap_is_mae():
    options = SMALL | dict(K=1, pixel="plain", feature="none", decoder_depth=3)
    ours, mae = make(taps=(6,), decoder_depth=3), ddae.DDAE(ddae.Config(**options))
    weights = {k.replace("decoders.0", "pixel_decoder"): v for k, v in ours.state_dict().items()}
    assert mae.load_state_dict(weights, strict=False) == (["beta"], ["whole"])
    imgs, ids = batch()
    assert ours(imgs, ids)[0].item() == pytest.approx(mae(imgs, ids)[0].item(), rel=1e-6)


@pytest.mark.parametrize("shared, norm_pix", [(False, True), (True, False)])
def test_loss_is_the_sum_of_maes_losses(shared, norm_pix):
    model = make(shared_decoder=shared, norm_pix=norm_pix)
    imgs, ids = batch()
    outputs, total = model.encoder(imgs, ids[:, :16], range(7)), 0
    loss, metrics = model(imgs, ids)
    assert len(metrics) == 4 and len(model.decoders) == (1 if shared else 4)
    for i, g in enumerate((3, 4, 5, 6)):
        decoder = model.decoders[0 if shared else i]
        x = decoder.decoder_embed(outputs[g - 1] if g < 6 else model.encoder.norm(outputs[5]))
        tokens = torch.cat((x[:, 1:], decoder.mask_token.expand(3, 48, -1)), 1)
        tokens = torch.stack([t[r] for t, r in zip(tokens, ids.argsort(1))])  # in the image's order, as MAE does it
        x = torch.cat((x[:, :1], tokens), 1) + decoder.decoder_pos_embed
        for block in decoder.decoder_blocks:
            x = block(x)
        pred = decoder.decoder_pred(decoder.decoder_norm(x))[:, 1:]
        target = F.unfold(imgs, 4, stride=4).view(3, 3, 16, 64).permute(0, 3, 2, 1).flatten(2)
        if norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = ((pred - target) ** 2).mean(-1).gather(1, ids[:, 16:]).mean()
        assert metrics[f"pixel/{g}"].item() == pytest.approx(error.item(), rel=1e-5)
        total = total + error
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_parameter_counts():
    def count(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    model = deepmim.DeepMIM(deepmim.Config())
    assert [count(d) for d in model.decoders] == [13_398_784] * 4
    frozen = model.encoder.pos_embed.numel() + model.decoders[0].decoder_pos_embed.numel()  # the code has one for all
    assert count(model) + frozen == 139_494_656
    assert count(deepmim.DeepMIM(deepmim.Config(taps=(12,), decoder_depth=8))) + frozen == 111_907_840  # MAE's
    assert count(deepmim.Decoder(768, 512, 4, 16, (14, 14), 512)) == 13_267_456


def test_hybrid_targets(tmp_path):
    (imgs, ids), mae, plain = batch(), make(decoder_heads=1), make()
    x = torch.stack([ddae.patchify(imgs, 4)[b, ids[b, 16:]] for b in range(3)])
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    x_hat = mae.decode(mae.encode(imgs, ids[:, :16]), ids)[-1]  # by the deepest of its four decoders
    torch.save(dict(model=mae.state_dict(), about=vars(mae.cfg)), tmp_path / "last.pt")
    names = {k.removeprefix("encoder.").removeprefix("decoders.3."): v for k, v in mae.state_dict().items()}
    torch.save(dict(model=names, about=dict(num_heads=2, decoder_heads=1)), tmp_path / "mae.pth")
    cases = ("last.pt", "file", "normalized"), ("last.pt", "file", "raw"), ("mae.pth", "no", "normalized")
    for file, norm_pix, space in cases:
        model = make(hybrid=str(tmp_path / file), hybrid_norm_pix=norm_pix, hybrid_space=space)
        for a, target in zip((0, 1 / 3, 2 / 3, 1), model.targets(imgs, ids)):
            want = a * (x - mean) / std + (1 - a) * (x_hat if norm_pix == "file" else (x_hat - mean) / std)
            if space == "raw":  # the same as blending pixels, up to the mean and deviation of the blend
                want = (want - want.mean(-1, keepdim=True)) / want.std(-1, keepdim=True)
            torch.testing.assert_close(target, want, atol=2e-4, rtol=1e-4)
        assert [*dict(model.named_parameters())] == [*dict(plain.named_parameters())]
        assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
    assert make(hybrid=str(tmp_path / "last.pt"), taps=(6,)).alpha.flatten().tolist() == [1]


# --- masks ------------------------------------------------------------------------------------------------------------

def clusters(B, k, noise):
    """Tokens (B, 64, 16) of k well separated clusters, the first k of different ones, and the cluster of each."""
    g = torch.Generator().manual_seed(1)
    truth = torch.randint(k, (B, 64), generator=g)
    truth[:, :k] = torch.arange(k)
    return torch.eye(16)[truth] + noise * torch.randn(B, 64, 16, generator=g), truth


def test_kmeans_finds_clusters():
    tokens, truth = clusters(5, 4, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(targets.kmeans(tokens + 100, torch.arange(4).expand(5, -1)), truth)  # alike in bf16


def test_semantic_guided_masks_parts_as_the_loop_says():
    tokens, truth = clusters(8, 6, 0.02)
    noise = torch.rand(8, 2, 64, generator=torch.manual_seed(0))
    noise[:, 0, :6] += 1  # k-means starts in the six parts
    for whole in (0.0, 0.4, 1.0):
        got = targets.semantic_guided(tokens, noise, 0.75, torch.tensor(whole))
        for (start, order), new, part in zip(noise.argsort(2).tolist(), got.tolist(), truth.tolist()):
            sizes = {p: part.count(p) for p in range(6)}
            left, entire = 48, {}
            for p in reversed(start[-6:]):
                entire[p] = min(sizes[p], left)
                left -= entire[p]
            seen, masked = dict.fromkeys(range(6), 0), []
            for n in order:
                p = part[n]
                seen[p] += 1
                if seen[p] <= round((1 - whole) * round(sizes[p] * 0.75) + whole * entire[p]):
                    masked.append(n)
            assert new == [n for n in order if n not in masked] + masked
    model = make(epochs=300)
    for step, whole in ((300, 0.01), (1500, 0.25), (3000, 1.0)):  # SemMAE's code: 1 - whole = 1 - (epoch / epochs)^2
        model.after_step(step, 10)
        assert model.state_dict()["whole"].item() == pytest.approx(whole)


@pytest.mark.parametrize("whole", [0.0, 0.5, 1.0])
def test_semantic_guided_masks_all_positions_alike(whole):
    g = torch.Generator().manual_seed(0)
    tokens = F.interpolate(torch.randn(3000, 16, 4, 4, generator=g), (14, 14), mode="bicubic").flatten(2).mT  # smooth
    ids = targets.semantic_guided(tokens, torch.rand(3000, 2, 196, generator=g), 0.75, torch.tensor(whole))
    share = torch.zeros(3000, 196).scatter(1, ids[:, 49:], 1.0).view(3000, 14, 14).mean(0)
    for line in (share.mean(0), share.mean(1)):
        torch.testing.assert_close(line, torch.full((14,), 0.75), atol=0.03, rtol=0)


def test_semantic_aware_keeps_what_cls_attends_to():
    p = torch.tensor([0.5, 0.25, 0.15, 0.1] + [0.0] * 192)
    got = targets.semantic_aware(p.expand(8000, -1), torch.rand(8000, 2, 196, generator=torch.manual_seed(0)))
    assert torch.equal(got.sort(1)[0], torch.arange(196).expand(8000, -1))
    first = torch.bincount(got[:, 0], minlength=196) / 8000
    torch.testing.assert_close(first, p, atol=0.02, rtol=0)
    assert set(got[:, :4].flatten().tolist()) == {0, 1, 2, 3}  # what has no attention comes last


def test_masks_come_from_the_mask_network(files):
    (imgs, ids), noise = batch(), torch.rand(3, 2, 64)
    guided = make(mask="semantic_guided", mask_file=files["dino"])
    aware = make(mask="semantic_aware", mask_file=files["clip"])
    tokens, _ = targets.dino(files["dino"]).tokens(imgs, (8, 8))
    assert torch.equal(guided.shuffle(imgs, noise), targets.semantic_guided(tokens[:, 1:], noise, 0.75, guided.whole))
    attention = targets.clip(files["clip"]).tokens(imgs, (8, 8))[1]
    assert torch.equal(aware.shuffle(imgs, noise), targets.semantic_aware(attention, noise))
    assert torch.equal(make().shuffle(imgs, ids), ids)
    with pytest.raises(ValueError, match="unknown mask cross"):
        deepmim.draw_mask(np.random.default_rng(0), dataclasses.replace(deepmim.Config(), mask="cross"))


# --- targets ----------------------------------------------------------------------------------------------------------

def slow_hog(img, patch):
    """img (3, H, W) -> (N, 108), pixel by pixel."""
    cell, h, w = patch // 2, img.shape[1] // patch, img.shape[2] // patch
    x, out = np.pad(img.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="reflect"), np.zeros((h, w, 3, 9, 2, 2))
    for c, i, j in np.ndindex(img.shape):
        window = x[c, i:i + 3, j:j + 3]
        gx = (window[:, 0] - window[:, 2]) @ [1, 2, 1]
        gy = (window[0] - window[2]) @ [1, 2, 1]
        b = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
        out[i // patch, j // patch, c, b, i % patch // cell, j % patch // cell] += math.hypot(gx, gy)
    norm = np.sqrt((out ** 2).sum(3, keepdims=True))
    return (out / np.maximum(norm, 1e-12)).reshape(h * w, -1)


@pytest.mark.parametrize("patch", [4, 16])
def test_hog_equals_a_loop_over_pixels(patch):
    imgs = torch.randn(2, 3, 32, 48, generator=torch.manual_seed(0))
    for img, mine in zip(imgs.numpy(), targets.hog(imgs, patch).numpy(), strict=True):
        np.testing.assert_allclose(mine, slow_hog(img, patch), atol=2e-5)


def renormalized(imgs, mean, std):
    pixels = imgs * torch.tensor(common.STD).view(3, 1, 1) + torch.tensor(common.MEAN).view(3, 1, 1)
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def vit(**options):
    torch.manual_seed(3)
    model = stir(VisionTransformer(img_size=224, patch_size=16, embed_dim=128, depth=2, num_heads=2, **options)).eval()
    nn.init.normal_(model.pos_embed, std=0.5)
    return model


def clip_weights():
    """Random, under OpenAI's names."""
    shapes = {"class_embedding": (128,), "positional_embedding": (197, 128), "proj": (128, 32),
              "conv1.weight": (128, 3, 16, 16)}
    for i in range(2):
        for name, shape in (("attn.in_proj_", (384, 128)), ("attn.out_proj.", (128, 128)), ("mlp.c_fc.", (512, 128)),
                            ("mlp.c_proj.", (128, 512)), ("ln_1.", (128,)), ("ln_2.", (128,))):
            block = f"transformer.resblocks.{i}.{name}"
            shapes |= {f"{block}weight": shape, f"{block}bias": shape[:1]}
    shapes |= {f"{name}.{kind}": (128,) for name in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    g = torch.Generator().manual_seed(4)
    weights = {f"visual.{k}": torch.randn(shape, generator=g) * 0.08 + (len(shape) == 1) for k, shape in shapes.items()}
    return weights | {"token_embedding.weight": torch.randn(7, 9)}


def codebook_weights():
    """Random, under VQ-KD's names, and the same as timm's model with a head."""
    model = vit(num_classes=0, global_pool="avg")
    head = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 32))
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.bias[128:256])  # BEiT has none on keys
    weights = {"encoder." + k: v for k, v in model.state_dict().items()}
    for k in [k for k in weights if k.endswith("qkv.bias")]:
        q, _, v = weights.pop(k).chunk(3)
        weights |= {k.replace("qkv.bias", "q_bias"): q, k.replace("qkv.bias", "v_bias"): v}
    weights |= {f"encode_task_layer.{k}": v for k, v in head.state_dict().items()}
    weights |= {"quantize.embedding.weight": F.normalize(torch.randn(500, 32), dim=-1)}
    return weights, model, head


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    torch.save(vit(num_classes=0).state_dict(), folder / "dino")
    torch.save(clip_weights(), folder / "clip")
    torch.save({"model": codebook_weights()[0]}, folder / "codebook")
    return {name: str(folder / name) for name in ("dino", "clip", "codebook")}


@torch.no_grad()
def test_dino(files):
    model, imgs, network = vit(num_classes=0), torch.randn(2, 3, 224, 224), targets.dino(files["dino"])
    torch.testing.assert_close(network(imgs, (14, 14)), model.forward_features(imgs)[:, 1:], atol=2e-5, rtol=1e-4)
    attention = network.tokens(imgs, (14, 14))[1]
    x = model.blocks[0](model._pos_embed(model.patch_embed(imgs)))
    q, k, _ = model.blocks[1].attn.qkv(model.blocks[1].norm1(x)).view(2, 197, 3, 2, 64).permute(2, 0, 3, 1, 4)
    want = (q @ k.transpose(2, 3) / 8).softmax(-1).mean(1)[:, 0, 1:]  # the head-averaged row of [CLS]
    torch.testing.assert_close(attention, want, atol=1e-6, rtol=1e-4)
    assert network(torch.randn(2, 3, 32, 32), (8, 8)).shape == (2, 64, 128)  # image and position table are resized
    assert not list(network.parameters()) and not network.state_dict()


def nested(weights):
    """Module of modules with the tensors of a state dict, to be scripted."""
    root = nn.Module()
    for name, value in weights.items():
        node, (*parents, leaf) = root, name.split(".")
        for part in parents:
            node.add_module(part, getattr(node, part, nn.Module()))
            node = getattr(node, part)
        node.register_parameter(leaf, nn.Parameter(value))
    return root


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_clip(files, tmp_path):
    weights, imgs = clip_weights(), torch.randn(2, 3, 224, 224)
    model = vit(num_classes=32, pre_norm=True, norm_layer=lambda d, **k: nn.LayerNorm(d, eps=1e-5), act_layer=QuickGELU,
                global_pool="token")
    model.load_state_dict(_convert_openai_clip(weights, model))
    want = model.head(model.forward_features(renormalized(imgs, targets.CLIP_MEAN, targets.CLIP_STD)))[:, 1:]
    torch.jit.save(torch.jit.script(nested(weights)), tmp_path / "archive")
    for path in (files["clip"], tmp_path / "archive"):
        network = targets.clip(path)
        torch.testing.assert_close(network(imgs, (14, 14)), want, atol=2e-5, rtol=1e-4)
    assert network.out_dim == 32


@torch.no_grad()
def test_codebook(files):
    (weights, model, head), network = codebook_weights(), targets.codebook(files["codebook"])
    imgs = torch.randn(2, 3, 224, 224)
    x = model.fc_norm(model.forward_features(renormalized(imgs, (0.5,) * 3, (0.5,) * 3)))[:, 1:]
    x = F.normalize(head(x), dim=-1)
    want = torch.stack([torch.cdist(row, weights["quantize.embedding.weight"]).argmin(-1) for row in x])
    assert (network(imgs, (14, 14))[..., 0] == want).float().mean() > 0.995
    assert len(want.unique()) > 20 and network.out_dim == 500


def test_errors_of_feature_and_token_targets():
    pred, target = torch.randn(4, 2, 5, 7), torch.randn(1, 2, 5, 7)
    a, b = F.normalize(pred, dim=-1), F.normalize(target, dim=-1)
    for kind in ("dino", "clip"):  # l2, as the paper says
        torch.testing.assert_close(deepmim.per_patch_error(pred, target, kind), ((a - b) ** 2).sum(-1))
    torch.testing.assert_close(deepmim.per_patch_error(pred, target, "hog"), ((pred - target) ** 2).sum(-1) / 7)
    ids = torch.randint(7, (1, 2, 5, 1))
    want = [[[-p[b, m].log_softmax(0)[ids[0, b, m, 0]] for m in range(5)] for b in range(2)] for p in pred]
    torch.testing.assert_close(deepmim.per_patch_error(pred, ids, "codebook"), torch.tensor(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["hog", "dino", "clip", "codebook"])
def test_targets_are_of_the_masked_patches(target, files):
    imgs, ids = batch()
    model = make(target=target, target_file=files.get(target, ""))
    whole = targets.hog(imgs, 4) if target == "hog" else getattr(targets, target)(files[target])(imgs, (8, 8))
    got = model.targets(imgs, ids)[0]
    assert all(torch.equal(got[b, j], whole[b, ids[b, 16 + j]]) for b in range(3) for j in range(48))


# --- as a user runs it ------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("target", ["pixel", "hog"])
def test_preview_of_perfect_predictions(target, monkeypatch):
    model, (imgs, ids) = make(target=target).eval(), batch()
    perfect = model.targets(imgs, ids).expand(4, -1, -1, -1)
    monkeypatch.setattr(model, "decode", lambda *_: perfect)
    panels, help = model.preview(imgs, ids), "\n(true mean, std)" * (target == "pixel")
    blocks = [f"block {g}{help}" for g in model.taps]
    assert list(panels) == ["input", "masked", "true means" if help else "target", *blocks]
    for block in blocks:
        torch.testing.assert_close(panels[block], imgs if help else panels["target"], atol=1e-4, rtol=1e-4)
    visible = torch.zeros(3, 64, dtype=torch.bool).scatter(1, ids[:, :16], True).view(3, 8, 8)
    shown = F.max_pool2d((panels["masked"] - imgs).abs().amax(1), 4) == 0
    assert torch.equal(shown, visible) and (target == "pixel" or torch.equal(panels["target"].any(-1), ~visible))


def main(monkeypatch, flags):
    flags += " --embed_dim 48 --num_heads 2 --base_lr 2e-2 --warmup_epochs 0.01 --log_every 1 --eval_every 0"
    monkeypatch.setattr(sys, "argv", ["deepmim.py", "--preset", "quick", "--device", "cpu", *flags.split()])
    deepmim.main()


@pytest.mark.parametrize("flags", [
    "--shared_decoder", "--target hog", "--target dino --target_file {dino}", "--target clip --target_file {clip}",
    "--target codebook --target_file {codebook}", "--hybrid {tmp}/last.pt --hybrid_space raw --alpha 0.5 0.5 0.5",
    "--mask semantic_guided --mask_file {dino}", "--mask semantic_aware --mask_file {clip} --precision bf16"])
def test_every_target_and_mask_trains(flags, files, tmp_path, monkeypatch):
    model = make()
    torch.save(dict(model=model.state_dict(), about=vars(model.cfg)), tmp_path / "last.pt")
    main(monkeypatch, f"{flags.format(**files, tmp=tmp_path)} --out_dir {tmp_path / 'run'} --max_steps 12")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for tap in [k for k in lines[0] if "/" in k]:
        assert np.mean([x[tap] for x in lines[-3:]]) < np.mean([x[tap] for x in lines[:3]]), tap
    assert (tmp_path / "run" / "preview.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags, message", [
    ("--taps 2 3", "--taps must increase from at least 1 to --depth 4"),
    ("--alpha 0 0.5 1", "--alpha takes 3 values between 0 and 1, and needs --hybrid"),
    ("--target clip", "--target_file goes with --target dino, clip, or codebook"),
    ("--target clip --target_file {dino}", "dino has no visual.proj and no visual.ln_pre.weight"),
    ("--hybrid {dino}", "dino has no decoder_embed.weight")])
def test_bad_input(flags, message, files, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"{flags.format(**files, tmp=tmp_path)} --out_dir {tmp_path / 'new'}")
    line = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else stop.value.code
    assert message in line and "\n" not in line and not (tmp_path / "new").exists()


def test_defaults_are_the_papers_recipe():
    cfg = common.parse(deepmim.Config, deepmim.PRESETS, argv=[])
    paper = dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mask="random", mask_ratio=0.75,
                 supervised=[6, 8, 10, 12], shared_decoder=False, target="pixel", norm_pix=True, hybrid="",
                 decoder_depth=4, decoder_dim=512, decoder_heads=16, epochs=300, warmup_epochs=40, batch_size=4096,
                 base_lr=1.5e-4, min_lr=0, weight_decay=0.05, adam_betas=(0.9, 0.95), crop_min=0.2)
    assert {k: getattr(cfg, k) for k in paper} == paper
    for depth, taps in ((24, [12, 16, 20, 24]), (6, [3, 4, 5, 6]), (4, [2, 3, 4]), (1, [1])):
        assert deepmim.Config(depth=depth).supervised == taps
