"""DeepMIM and its targets against independent oracles: MAE, loops, timm's models under the original files' names."""
import inspect
import math
import re
import sys

import numpy as np
import pytest
import soak
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, _convert_openai_clip

import common
import ddae
import deepmim
import targets

SMALL = dict(img_size=32, patch_size=4, embed_dim=24, depth=6, num_heads=2, decoder_dim=16, decoder_heads=2,
             decoder_depth=1)


def batch(B=3, seed=0, N=64):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(N) for _ in range(B)])
    return torch.randn(B, 3, 32, 32, generator=torch.manual_seed(seed)), torch.from_numpy(ids)


def stir(model):
    """Zero biases and unit norms would hide mistakes."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def make(**options):
    torch.manual_seed(0)
    return stir(deepmim.DeepMIM(**SMALL | options))


# --- the method -------------------------------------------------------------------------------------------------------

def test_one_tap_is_mae():
    ours, mae = make(taps=(6,), decoder_depth=3), ddae.DDAE(**SMALL | dict(
        K=1, pixel="plain", feature="none", decoder_depth=3))
    rest = mae.load_state_dict({k.replace("decoders.0", "pixel_decoder"): v for k, v in ours.state_dict().items()}, strict=False)
    assert rest == (["beta"], ["whole"])  # of loss weights and of semantic masks
    imgs, ids = batch()
    assert ours(imgs, ids)[0].item() == pytest.approx(mae(imgs, ids)[0].item(), rel=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_is_the_sum_of_maes_losses(shared, norm_pix):
    model = make(shared_decoder=shared, norm_pix=norm_pix)
    imgs, ids = batch()
    outputs = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda m, i, o: outputs.append(o))
    loss, metrics = model(imgs, ids)
    assert model.taps == (3, 4, 5, 6) and len(model.decoders) == (1 if shared else 4)
    mask = torch.ones(3, 64).scatter(1, ids[:, :16], 0)
    total = 0
    for i, g in enumerate(model.taps):
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
        error = ((pred - target) ** 2).mean(-1)
        error = (error * mask).sum() / mask.sum()
        assert metrics[f"pixel/{g}"].item() == pytest.approx(error.item(), rel=1e-5)
        total = total + error
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_parameter_counts():
    model = deepmim.DeepMIM()
    assert model.taps == (6, 8, 10, 12) and [count(d) for d in model.decoders] == [13_398_784] * 4
    frozen = model.encoder.pos_embed.numel() + model.decoders[0].decoder_pos_embed.numel()  # the code has one table for all
    assert count(model) + frozen == 139_494_656
    mae = deepmim.DeepMIM(taps=(12,), decoder_depth=8)
    assert sum(p.numel() for p in mae.parameters()) == 111_907_840
    assert sum(p.numel() for p in mae.decoders.parameters()) == 26_109_184
    assert count(deepmim.Decoder(768, 512, 4, 16, (14, 14), 512)) == 13_267_456


def test_taps_of_other_depths():
    assert [deepmim.default_taps(d) for d in (24, 12, 6, 4, 1)] == [
        (12, 16, 20, 24), (6, 8, 10, 12), (3, 4, 5, 6), (2, 3, 4), (1,)]
    model = make(taps=(1, 6))
    imgs, ids = batch()
    model(imgs, ids)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if p.requires_grad)


# --- hybrid targets ---------------------------------------------------------------------------------------------------

@pytest.fixture
def generator_file(tmp_path):
    mae = make(taps=(6,), decoder_depth=2, decoder_heads=1)
    torch.save(dict(model=mae.state_dict(), config=dict(num_heads=2, decoder_heads=1, norm_pix=True)), tmp_path / "mae.pt")
    return tmp_path / "mae.pt"


def test_hybrid_targets(generator_file):
    imgs, ids = batch()
    mae = make(taps=(6,), decoder_depth=2, decoder_heads=1)
    x_hat = mae.decode(mae.encode(imgs, ids[:, :16]), ids)[0]
    x = torch.stack([ddae.patchify(imgs, 4)[b, ids[b, 16:]] for b in range(3)])
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    for space in ("normalised", "raw"):
        model = make(hybrid=str(generator_file), hybrid_space=space)
        got = model.teach(imgs, ids)
        for a, target in zip((0, 1 / 3, 2 / 3, 1), got):
            if space == "normalised":
                want = a * (x - mean) / std + (1 - a) * x_hat
            else:
                t = a * x + (1 - a) * (x_hat * std + mean)
                want = (t - t.mean(-1, keepdim=True)) / t.std(-1, keepdim=True)
            torch.testing.assert_close(target, want, atol=2e-4, rtol=1e-4)
        plain = make()  # with alpha 1 everywhere, the generator changes nothing
        same = make(hybrid=str(generator_file), hybrid_space=space, alpha=(1.0, 1.0, 1.0, 1.0))
        for other in (model, same):
            other.load_state_dict(plain.state_dict())
        assert same(imgs, ids)[0].item() == pytest.approx(plain(imgs, ids)[0].item(), rel=1e-5)
        assert model(imgs, ids)[0].item() != pytest.approx(plain(imgs, ids)[0].item(), rel=1e-3)
        assert count(model) == count(plain) and model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("space", ["normalised", "raw"])
def test_a_perfect_generator_makes_alpha_irrelevant(space, generator_file, monkeypatch):
    imgs, ids = batch()
    model = make(hybrid=str(generator_file), hybrid_space=space)
    perfect = deepmim.normalise_patches(deepmim.take(deepmim.patchify(imgs, 4), ids[:, 16:]))[0]
    monkeypatch.setattr(model.generator, "forward", lambda *_: perfect)
    for target in model.teach(imgs, ids):
        torch.testing.assert_close(target, perfect, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generator_takes_the_deepest_decoder(tmp_path):
    """last.pt of an ordinary run has a decoder per tap; only the last one was trained on what the generator feeds it."""
    model, (imgs, ids) = make(), batch()
    config = dict(norm_pix=True, num_heads=model.encoder.blocks[0].attn.num_heads,
                  decoder_heads=model.decoders[0].decoder_blocks[0].attn.num_heads)
    torch.save(dict(model=model.state_dict(), config=config), tmp_path / "deep.pt")
    want = model.decode(model.encode(imgs, ids[:, :16]), ids)[-1]
    torch.testing.assert_close(deepmim.Generator(tmp_path / "deep.pt", 32, 4)(imgs, ids[:, :16], ids), want)
    assert make(hybrid=str(tmp_path / "deep.pt"), taps=(model.taps[-1],)).alpha.flatten().tolist() == [1.0]
    torch.save(dict(model=model.state_dict(), config=config | dict(target="dino")), tmp_path / "dino.pt")
    with pytest.raises(ValueError, match="dino.pt predicts dino, not pixels"):
        deepmim.Generator(tmp_path / "dino.pt", 32, 4)
    torch.save(dict(model=model.state_dict()), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="does not say whether it predicts normalised pixels; give --hybrid_norm_pix"):
        deepmim.Generator(tmp_path / "bare.pt", 32, 4)
    assert not deepmim.Generator(tmp_path / "bare.pt", 32, 4, "no").norm_pix


def test_generator_from_maes_own_names_and_with_raw_pixels(generator_file, tmp_path):
    state = torch.load(generator_file, weights_only=True)
    names = {k.removeprefix("encoder.").removeprefix("decoders.0."): v for k, v in state["model"].items()}
    torch.save(dict(model=names, config=state["config"] | dict(norm_pix=False)), tmp_path / "official.pth")
    imgs, ids = batch()
    a, b = (deepmim.Generator(tmp_path / n, 32, 4) for n in ("mae.pt", "official.pth"))
    assert torch.equal(a(imgs, ids[:, :16], ids), b(imgs, ids[:, :16], ids)) and (a.norm_pix, b.norm_pix) == (True, False)
    model = make(hybrid=str(tmp_path / "official.pth"))
    x_hat = b(imgs, ids[:, :16], ids)  # pixels: normalised with the image's own patch statistics
    _, mean, std = deepmim.normalise_patches(deepmim.take(deepmim.patchify(imgs, 4), ids[:, 16:]))
    torch.testing.assert_close(model.teach(imgs, ids)[0], (x_hat - mean) / std)


# --- masks ------------------------------------------------------------------------------------------------------------

def test_kmeans_finds_clusters():
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (5, 64), generator=g)
    truth[:, :4] = torch.arange(4)
    tokens = torch.eye(16)[truth] + 0.05 * torch.randn(5, 64, 16, generator=g)
    found = deepmim.kmeans(tokens, torch.arange(4).expand(5, -1))
    assert torch.equal(found, truth)


def test_semantic_guided_masks_parts_as_the_loop_says():
    g = torch.Generator().manual_seed(1)
    truth = torch.randint(6, (8, 64), generator=g)
    truth[:, :6] = torch.arange(6)
    tokens = torch.eye(16)[truth] + 0.02 * torch.randn(8, 64, 16, generator=g)
    ids = torch.stack([torch.cat((torch.randperm(6, generator=g), 6 + torch.randperm(58, generator=g))) for _ in range(8)])
    for whole in (0.0, 0.4, 1.0):
        got = deepmim.semantic_guided(tokens, ids, 0.75, torch.tensor(whole))
        for order, new, part in zip(ids.tolist(), got.tolist(), truth.tolist()):
            assert sorted(new) == list(range(64))
            part_of = {n: part[n] for n in order}
            sizes = {p: part.count(p) for p in range(6)}
            left, entire = 48, {}
            for n in sorted(range(6), key=lambda i: order[i]):  # cluster i starts from token order[i], of part order[i]
                p = part_of[order[n]]
                entire[p] = min(sizes[p], left)
                left -= entire[p]
            seen, masked = dict.fromkeys(range(6), 0), []
            for n in order:
                p = part_of[n]
                seen[p] += 1
                quota = round((1 - whole) * round(sizes[p] * 0.75) + whole * entire[p])
                if seen[p] <= quota:
                    masked.append(n)
            want = [n for n in order if n not in masked] + masked
            assert new == want
    last = got[:, 16:]  # whole parts: all but one of the parts are masked entirely or not at all
    for new, part in zip(last.tolist(), truth):
        shares = [sum(part[n] == p for n in new) / (part == p).sum() for p in range(6)]
        assert sum(0 < s < 1 for s in shares) <= 1


def test_schedule_goes_from_parts_of_parts_to_whole_parts_and_is_saved():
    model = make()
    assert model.whole == 0
    for progress, whole in ((0.1, 0.01), (0.5, 0.25), (1.0, 1.0)):  # SemMAE's code: 1 - whole = 1 - (epoch / epochs)^2
        model.after_step(progress)
        assert model.whole.item() == pytest.approx(whole) and model.state_dict()["whole"].item() == pytest.approx(whole)


def test_semantic_aware_keeps_what_the_teacher_attends_to():
    p = torch.tensor([0.5, 0.25, 0.15, 0.1] + [0.0] * 192)
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(196, generator=g) for _ in range(8000)])
    got = deepmim.semantic_aware(p.expand(8000, -1), ids)
    assert torch.equal(got.sort(1)[0], torch.arange(196).expand(8000, -1))
    first = torch.bincount(got[:, 0], minlength=196) / 8000
    torch.testing.assert_close(first, p, atol=0.02, rtol=0)
    second = torch.bincount(got[got[:, 0] == 0, 1], minlength=196)[:4].float()
    torch.testing.assert_close(second / second.sum(), torch.tensor([0, 0.5, 0.3, 0.2]), atol=0.03, rtol=0)
    assert set(got[:, :4].flatten().tolist()) == {0, 1, 2, 3}  # what has no attention comes last


# --- targets ----------------------------------------------------------------------------------------------------------

def slow_hog(img, patch):
    """img (3, H, W) -> (N, 108), pixel by pixel."""
    C, H, W = img.shape
    cell, h, w = patch // 2, H // patch, W // patch
    out = np.zeros((h * w, C, 9, 2, 2))
    for c in range(C):
        x = np.pad(img[c].astype(np.float64), 1, mode="reflect")
        for i in range(H):
            for j in range(W):
                window = x[i:i + 3, j:j + 3]
                gx = (window[:, 0] - window[:, 2]) @ [1, 2, 1]
                gy = (window[0] - window[2]) @ [1, 2, 1]
                b = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
                out[i // patch * w + j // patch, c, b, i % patch // cell, j % patch // cell] += math.hypot(gx, gy)
    norm = np.sqrt((out ** 2).sum(2, keepdims=True))
    return (out / np.maximum(norm, 1e-12)).reshape(h * w, -1)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_hog_equals_a_loop_over_pixels(patch):
    imgs = torch.randn(2, 3, 32, 48, generator=torch.manual_seed(0))
    got = targets.hog(imgs, patch)
    assert got.shape == (2, 6 * 16 ** 2 // patch ** 2, targets.HOG_DIM)
    for img, mine in zip(imgs.numpy(), got.numpy()):
        np.testing.assert_allclose(mine, slow_hog(img, patch), atol=2e-5)


def test_hog_sees_edges_where_they_are():
    img = torch.zeros(1, 3, 32, 32)
    img[..., 20:] = 1  # an upright edge between columns 19 and 20: patch column 1, right half is cell column 0 (16..23)
    hog = targets.hog(img, 16).view(2, 2, 3, 9, 2, 2)  # patch row, patch column, channel, bin, cell row, cell column
    assert hog[:, 0].abs().max() == 0 and hog[:, 1, ..., 1].abs().max() == 0
    assert (hog[:, 1, :, 4, :, 0] == 1).all()  # one direction, the fifth of nine
    turned = targets.hog(img.transpose(2, 3), 16).view(2, 2, 3, 9, 2, 2)
    assert (turned[1, :, :, 0, 0] == 1).all() and turned[0].abs().max() == 0


def renormalised(imgs, mean, std):
    pixels = imgs * torch.tensor(common.STD).view(3, 1, 1) + torch.tensor(common.MEAN).view(3, 1, 1)
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def vit(**options):
    torch.manual_seed(3)
    model = stir(VisionTransformer(img_size=224, patch_size=16, embed_dim=128, depth=2, num_heads=2, **options)).eval()
    nn.init.normal_(model.pos_embed, std=0.5)
    return model


@pytest.fixture
def dino_file(tmp_path):
    torch.save(vit(num_classes=0).state_dict(), tmp_path / "dino.pth")
    return tmp_path / "dino.pth"


@torch.no_grad()
def test_dino(dino_file):
    model, imgs = vit(num_classes=0), torch.randn(2, 3, 224, 224)
    teacher = targets.dino(dino_file)
    torch.testing.assert_close(teacher(imgs, (14, 14)), model.forward_features(imgs)[:, 1:], atol=2e-5, rtol=1e-4)
    attention = teacher.tokens(imgs, (14, 14))[1]
    x = model.blocks[0](model._pos_embed(model.patch_embed(imgs)))
    q, k, _ = model.blocks[1].attn.qkv(model.blocks[1].norm1(x)).view(2, 197, 3, 2, 64).permute(2, 0, 3, 1, 4)
    want = (q @ k.transpose(2, 3) / 8).softmax(-1).mean(1)[:, 0, 1:]  # the head-averaged row of [CLS]
    torch.testing.assert_close(attention, want, atol=1e-6, rtol=1e-4)
    small = torch.randn(2, 3, 32, 32)  # the student's 8 x 8 patches: pixels and position table are resized
    assert teacher(small, (8, 8)).shape == (2, 64, 128)
    assert not list(teacher.parameters()) and not teacher.state_dict()


def clip_weights():
    g = torch.Generator().manual_seed(4)
    def r(*shape):
        return torch.randn(shape, generator=g) * 0.08
    w = {"visual.class_embedding": r(128), "visual.positional_embedding": r(197, 128), "visual.proj": r(128, 32),
         "visual.conv1.weight": r(128, 3, 16, 16), "token_embedding.weight": r(7, 9), "logit_scale": r()}
    for name in ("ln_pre", "ln_post"):
        w |= {f"visual.{name}.weight": 1 + r(128), f"visual.{name}.bias": r(128)}
    for i in range(2):
        block = f"visual.transformer.resblocks.{i}."
        for name in ("ln_1", "ln_2"):
            w |= {f"{block}{name}.weight": 1 + r(128), f"{block}{name}.bias": r(128)}
        w |= {f"{block}attn.in_proj_weight": r(384, 128), f"{block}attn.in_proj_bias": r(384),
              f"{block}attn.out_proj.weight": r(128, 128), f"{block}attn.out_proj.bias": r(128),
              f"{block}mlp.c_fc.weight": r(512, 128), f"{block}mlp.c_fc.bias": r(512),
              f"{block}mlp.c_proj.weight": r(128, 512), f"{block}mlp.c_proj.bias": r(128)}
    return w


class Tree(nn.Module):
    """Nested modules with the tensors of a state dict, to be scripted."""

    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            if "." not in name:
                self.register_parameter(name, nn.Parameter(value))
        for part in dict.fromkeys(n.split(".")[0] for n in weights if "." in n):
            self.add_module(part, Tree({n.split(".", 1)[1]: v for n, v in weights.items() if n.startswith(part + ".")}))

    def forward(self):
        return 0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("archive", [False, True])
def test_clip(archive, tmp_path):
    weights, path = clip_weights(), tmp_path / "ViT-B-16.pt"
    if archive:
        torch.jit.save(torch.jit.script(Tree(weights)), path)
    else:
        torch.save(weights, path)
    from timm.layers import QuickGELU
    model = vit(num_classes=32, pre_norm=True, norm_layer=lambda d, **k: nn.LayerNorm(d, eps=1e-5), act_layer=QuickGELU,
                global_pool="token")
    model.load_state_dict(_convert_openai_clip(weights, model))
    imgs, teacher = torch.randn(2, 3, 224, 224), targets.clip(path)
    want = model.head(model.forward_features(renormalised(imgs, targets.CLIP_MEAN, targets.CLIP_STD)))[:, 1:]
    torch.testing.assert_close(teacher(imgs, (14, 14)), want, atol=2e-5, rtol=1e-4)
    assert teacher.out_dim == 32


def codebook_file(path):
    model = vit(num_classes=0, global_pool="avg")
    weights = {"encoder." + k: v for k, v in model.state_dict().items()}
    for k in [k for k in weights if k.endswith("qkv.bias")]:
        q, zero, v = weights.pop(k).chunk(3)
        weights |= {k.replace("qkv.bias", "q_bias"): q, k.replace("qkv.bias", "v_bias"): v}
    g = torch.Generator().manual_seed(5)
    for name, shape in (("encode_task_layer.0.weight", (128, 128)), ("encode_task_layer.0.bias", (128,)),
                        ("encode_task_layer.2.weight", (32, 128)), ("encode_task_layer.2.bias", (32,)),
                        ("quantize.embedding.weight", (500, 32)), ("decoder.cls_token", (1, 1, 128))):
        weights[name] = torch.randn(shape, generator=g)
    weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"], dim=-1)
    torch.save({"model": weights}, path)
    return weights, model


@torch.no_grad()
def test_codebook(tmp_path):
    weights, model = codebook_file(tmp_path / "vqkd.pth")
    for block in model.blocks:
        block.attn.qkv.bias[128:256] = 0  # BEiT has none on keys
    imgs = torch.randn(2, 3, 224, 224)
    got = targets.codebook(tmp_path / "vqkd.pth")
    x = model.fc_norm(model.forward_features(renormalised(imgs, (0.5,) * 3, (0.5,) * 3)))[:, 1:]
    x = x @ weights["encode_task_layer.0.weight"].T + weights["encode_task_layer.0.bias"]
    x = F.normalize(x.tanh() @ weights["encode_task_layer.2.weight"].T + weights["encode_task_layer.2.bias"], dim=-1)
    want = torch.stack([torch.cdist(row, weights["quantize.embedding.weight"]).argmin(-1) for row in x])
    assert (got(imgs, (14, 14)) == want).float().mean() > 0.995 and len(want.unique()) > 20 and got.out_dim == 500


def test_errors_of_feature_and_token_targets():
    model = make()
    pred, target = torch.randn(4, 2, 5, 7), torch.randn(1, 2, 5, 7)
    model.target = "clip"
    a, b = F.normalize(pred, dim=-1), F.normalize(target, dim=-1)
    torch.testing.assert_close(model.compare(pred, target), ((a - b) ** 2).sum(-1).mean((1, 2)))  # l2, as the paper says
    model.target = "codebook"
    ids = torch.randint(7, (1, 2, 5))
    want = [-np.mean([x.log_softmax(0)[i].item() for x, i in zip(p.reshape(-1, 7), ids.flatten())]) for p in pred]
    torch.testing.assert_close(model.compare(pred, ids), torch.tensor(want, dtype=torch.float32), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["dino", "clip", "hog", "codebook"])
def test_targets_are_of_the_masked_patches(target, dino_file, tmp_path):
    imgs, ids = batch()
    torch.save(clip_weights(), tmp_path / "clip.pt")
    codebook_file(tmp_path / "codebook.pt")
    file = dict(dino=dino_file, clip=tmp_path / "clip.pt", hog="", codebook=tmp_path / "codebook.pt")[target]
    model = make(target=target, target_file=str(file))
    whole = targets.hog(imgs, 4) if target == "hog" else getattr(targets, target)(file)(imgs, (8, 8))
    got = model.teach(imgs, ids)[0]
    assert all(torch.equal(got[b, j], whole[b, ids[b, 16 + j]]) for b in range(3) for j in range(48))


def test_masks_come_from_the_mask_teacher(dino_file, tmp_path):
    imgs, ids = batch()
    torch.save(clip_weights(), tmp_path / "clip.pt")
    guided = make(mask="semantic_guided", mask_file=str(dino_file))
    tokens, _ = targets.dino(dino_file).tokens(imgs, (8, 8))
    assert torch.equal(guided.reorder(imgs, ids), deepmim.semantic_guided(tokens[:, 1:], ids, 0.75, torch.zeros(())))
    aware = make(mask="semantic_aware", mask_file=str(tmp_path / "clip.pt"))
    _, attention = targets.clip(tmp_path / "clip.pt").tokens(imgs, (8, 8))
    assert torch.equal(aware.reorder(imgs, ids), deepmim.semantic_aware(attention, ids))
    assert not torch.equal(aware.reorder(imgs, ids), ids)
    tokens = torch.randn(3, 64, 24).cumsum(1)
    with torch.autocast("cpu", torch.bfloat16):
        low = deepmim.kmeans(tokens, ids[:, :6])
    assert torch.equal(low, deepmim.kmeans(tokens, ids[:, :6]))


@torch.no_grad()
def test_preview_of_a_perfect_student_is_the_image(monkeypatch):
    model, (imgs, ids) = make().eval(), batch()
    perfect = deepmim.normalise_patches(deepmim.take(deepmim.patchify(imgs, 4), ids[:, 16:]))[0]
    monkeypatch.setattr(model, "decode", lambda latent, ids: perfect.expand(len(latent), -1, -1, -1))
    panels = model.preview(imgs, ids)
    blocks = [title for title in panels if title.startswith("block")]
    assert len(blocks) == len(model.taps) and list(panels)[:2] == ["input", "masked"]
    for title in blocks:
        torch.testing.assert_close(panels[title], imgs, atol=1e-4, rtol=1e-4)
    for b in range(3):
        for place, n in enumerate(ids[b].tolist()):
            patch = (b, slice(None), slice(n // 8 * 4, n // 8 * 4 + 4), slice(n % 8 * 4, n % 8 * 4 + 4))
            assert torch.equal(panels["masked"][patch], imgs[patch]) == (place < 16)


# --- as a user runs it --------------------------------------------------------------------------------------------------

QUICK = "--img_size 32 --patch_size 4 --embed_dim 48 --depth 4 --num_heads 2 --decoder_dim 32 --decoder_heads 2 " \
        "--decoder_depth 1 --batch_size 32 --base_lr 2e-2 --warmup_epochs 0.01 --log_every 1 --device cpu " \
        "--num_workers 0 --epochs 2"


def main(monkeypatch, flags, base=QUICK):
    monkeypatch.setattr(sys, "argv", ["deepmim.py", *base.split(), *flags.split()])
    deepmim.main()


@pytest.mark.parametrize("flags", [
    "", "--shared_decoder", "--taps 4", "--target hog", "--target dino --target_file {tmp}/dino.pth",
    "--target clip --target_file {tmp}/clip.pt", "--target codebook --target_file {tmp}/vqkd.pth",
    "--hybrid {tmp}/run/last.pt", "--hybrid {tmp}/run/last.pt --hybrid_space raw --alpha 0.5 0.5 0.5",
    "--mask semantic_guided --mask_file {tmp}/dino.pth", "--mask semantic_aware --mask_file {tmp}/clip.pt"])
def test_every_target_and_mask_trains_and_resumes(flags, tmp_path, dino_file, monkeypatch):
    torch.save(clip_weights(), tmp_path / "clip.pt")
    codebook_file(tmp_path / "vqkd.pth")
    if "run" in flags:
        main(monkeypatch, f"--taps 4 --max_steps 2 --out_dir {tmp_path / 'run'}")
    flags = flags.format(tmp=tmp_path)
    main(monkeypatch, f"{flags} --out_dir {tmp_path / 'whole'} --max_steps 16")
    main(monkeypatch, f"{flags} --out_dir {tmp_path / 'cut'} --max_steps 3")
    main(monkeypatch, f"{flags} --out_dir {tmp_path / 'cut'} --max_steps 16")
    main(monkeypatch, f"{flags} --out_dir {tmp_path / 'bf16'} --max_steps 2 --precision bf16")
    assert np.isfinite(soak.log(tmp_path / "bf16")[-1]["loss"])
    assert soak.differences(tmp_path / "whole", tmp_path / "cut") == []
    lines = soak.log(tmp_path / "whole")
    taps = [k for k in lines[0] if "/" in k]
    assert len(taps) == (1 if "--taps 4" in flags else 3)
    for tap in taps:
        assert np.mean([x[tap] for x in lines[-3:]]) < np.mean([x[tap] for x in lines[:3]]), tap
    assert (tmp_path / "whole" / "preview.png").stat().st_size > 10_000


BAD = {
    "--taps 2 5": "--taps must be between 1 and --depth 4 and end with it",
    "--taps 0 4": "--taps must be between 1 and --depth 4",
    "--taps 3 2 4": "--taps must rise",
    "--taps 2 3": "end with it",
    "--alpha 0 0.5 1": "--alpha needs --hybrid",
    "--hybrid {tmp}/run/last.pt --alpha 0 0.5 1.5": "--alpha must be in [0, 1]",
    "--hybrid {tmp}/run/last.pt --alpha 0 1": "--alpha takes none or 3 values, got 2",
    "--hybrid {tmp}/run/last.pt --target hog": "--hybrid is for --target pixel",
    "--hybrid {tmp}/run/last.pt --patch_size 8": "has 64 patches of 4 px, this run 16 of 8 px",
    "--hybrid {tmp}/run/encoder.pt": "lacks decoder_embed.weight",
    "--hybrid {tmp}/nothing.pt": "nothing.pt does not exist",
    "--target dino": "--target dino needs --target_file dino_vitbase16_pretrain.pth",
    "--target clip": "--target clip needs --target_file ViT-B-16.pt",
    "--target codebook": "needs --target_file vqkd_encoder_base",
    "--target hog --target_file {tmp}/dino.pth": "--target hog takes no --target_file",
    "--mask semantic_aware": "--mask semantic_aware needs --mask_file",
    "--mask random --mask_file x": "--mask random takes no --mask_file",
    "--target clip --target_file {tmp}/dino.pth": "dino.pth is no such teacher (20 of 20 tensors do not fit): cls_token is missing",
    "--target dino --target_file {tmp}/run/last.pt": "last.pt is no such teacher",
    "--target codebook --target_file {tmp}/clip.pt": "clip.pt is no such teacher",
    "--target dino --target_file {tmp}/wide.pth": "blocks.0.attn.qkv.weight is (384, 100), not (384, 128)",
    "--target dino --target_file {tmp}/odd.pth": "odd.pth is no such teacher",
    "--target codebook --target_file {tmp}/odd.pth": "odd.pth is no such teacher",
    "--hybrid {tmp}/odd.pth": "odd.pth lacks pos_embed",
    "--hybrid {tmp}/list.pth": "list.pth holds no state dict",
    "--target dino --target_file {tmp}/text.pth": "text.pth is damaged or not a checkpoint",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input(flags, tmp_path, dino_file, monkeypatch, capsys):
    torch.save(clip_weights(), tmp_path / "clip.pt")
    weights = torch.load(dino_file)
    weights["blocks.0.attn.qkv.weight"] = torch.zeros(384, 100)
    torch.save(weights, tmp_path / "wide.pth")
    torch.save({"cls_token": [1], "encoder.blocks.0.attn.q_bias": torch.zeros(3)}, tmp_path / "odd.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    if "run/" in flags:
        main(monkeypatch, f"--taps 4 --max_steps 1 --out_dir {tmp_path / 'run'}")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"{flags.format(tmp=tmp_path)} --out_dir {tmp_path / 'new'}")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and BAD[flags] in err, err
    assert err.startswith("deepmim.py: error: ") and len(err.splitlines()) == 1
    assert err.count("blocks.") <= 5 and not (tmp_path / "new").exists()


def test_recipe_and_text():
    cfg = common.parse(deepmim.Config, deepmim.PRESETS, argv=[])
    paper = dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mask="random", mask_ratio=0.75,
                 taps=(), shared_decoder=False, target="pixel", norm_pix=True, hybrid="", hybrid_norm_pix="file", alpha=(), decoder_depth=4,
                 decoder_dim=512, decoder_heads=16, epochs=300, warmup_epochs=40, batch_size=4096, base_lr=1.5e-4, min_lr=0,
                 weight_decay=0.05, adam_betas=(0.9, 0.95), crop_min=0.2, hybrid_space="normalised", target_file="",
                 mask_file="")
    assert {k: getattr(cfg, k) for k in deepmim.Config.__annotations__} == paper
    for name, p in inspect.signature(deepmim.DeepMIM).parameters.items():
        assert p.default == getattr(cfg, name), name
    text = inspect.getsource(deepmim)
    source = inspect.getsource(deepmim.Config)
    for name in deepmim.Config.__annotations__:
        assert re.search(rf"^    {name}: .*  # \[(paper|code|ours)", source, re.M), name
        assert re.search(rf"\b{name}\b", text.replace(source, "") + inspect.getsource(common)), name
    body = text.replace(deepmim.__doc__, "")
    assert set(re.findall(r"Eq\. \d", deepmim.__doc__)) == set(re.findall(r"Eq\. \d", body[body.index("# --- masking"):]))
