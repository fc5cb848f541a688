"""Mask R-CNN against independent oracles: published counts, closed forms, loops, pycocotools, tiny folders in COCO's layout."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle
from torchvision.ops import box_iou, masks_to_boxes

import common
import ddae
from transfer import detect

ROOT = Path(__file__).parent.parent
COCO100 = Path(os.environ.get("COCO100", "data/coco100"))
SIZES = dict(patch_size=8, embed_dim=24, depth=4, num_heads=2, channels=8, regions=32, proposals=(100, 50))
TINY = "--img_size 64 --patch_size 8 --embed_dim 24 --depth 4 --num_heads 2 --channels 8 --regions 32 --proposals 100 50 " \
       "--table 8 8 --batch_size 2 --warmup 2 --num_workers 0 --preview_every 0 --device cpu --epochs 1 --drops " \
       "--log_every 1 --eval_every 99"
FP32 = torch.autocast("cpu", enabled=False)
IDS = (3, 7, 90)  # category ids with gaps


def config(flags=""):
    return common.parse(detect.Config, detect.RECIPES, argv=f"{TINY} {flags}".split(), flag="recipe")


def main(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["detect.py", *TINY.split(), *flags.split()])
    detect.main()


def model(style="taps", **options):
    torch.manual_seed(0)
    sizes = dict(img_size=64, table=(8, 8), num_classes=3, style=style, drop_path=0.0)
    return detect.MaskRCNN(**SIZES | sizes | options)


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with today's NumPy


def coco(root, counts=(6, 5), seed=0, crowd=True):
    """A folder in COCO's layout: rectangles whose colour tells the category, masks in all three encodings -> its path."""
    rng = np.random.default_rng(seed)
    for split, n in zip(("train", "val"), counts):
        images, annotations = [], []
        (root / f"{split}2017").mkdir(parents=True)
        for i in range(n):
            H, W = rng.integers(48, 80, 2).tolist()
            picture = np.full((H, W, 3), 128, np.uint8)
            images.append(dict(id=100 + i, file_name=f"{i}.png", height=H, width=W))
            for j in range(2):
                w, h = rng.integers(12, 24, 2).tolist()
                x, y, k = int(rng.integers(W // 2 - w)) + j * W // 2, int(rng.integers(H - h)), int(rng.integers(3))
                picture[y:y + h, x:x + w] = np.eye(3)[k] * 255
                mask = np.zeros((H, W), np.uint8)
                mask[y:y + h, x:x + w] = 1
                code = rle.encode(np.asfortranarray(mask))
                runs = np.flatnonzero(np.diff(np.concatenate(([0], mask.ravel("F"), [1 - mask[-1, -1]]))))
                segmentation = [[[x, y, x + w, y, x + w, y + h, x, y + h]], dict(size=[H, W], counts=code["counts"].decode()),
                                dict(size=[H, W], counts=np.diff(np.concatenate(([0], runs))).tolist())][(2 * i + j) % 3]
                annotations.append(dict(id=len(annotations), image_id=100 + i, category_id=IDS[k], bbox=[x, y, w, h],
                                        area=w * h, iscrowd=0, segmentation=segmentation))
            if crowd and i == 0:
                annotations.append(dict(annotations[-1], id=len(annotations), iscrowd=1, bbox=[0, 0, W, H], area=H * W,
                                        segmentation=dict(size=[H, W], counts=[0, H * W])))
            Image.fromarray(picture).save(root / f"{split}2017/{i}.png")
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(dict(
            images=images, annotations=annotations, categories=[dict(id=i, name=f"c{i}") for i in reversed(IDS)])))
    return root


def edit(root, change, split="train"):
    """Apply change(file) to the annotations."""
    path = root / f"annotations/instances_{split}2017.json"
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))


def encoder_file(path, **sizes):
    """An encoder.pt as the method scripts write it."""
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2) | sizes
    vit = ddae.ViT(**sizes)
    torch.save(dict(model=vit.state_dict(), config=dict(sizes, method="ddae")), path)
    return vit


def numel(module):
    return sum(p.numel() for p in module.parameters())


def truth_as_found(record, ids, code=lambda masks, boxes: masks):
    t = detect.targets(record, ids)
    boxes, masks = (t[k].as_subclass(torch.Tensor) for k in ("boxes", "masks"))
    return dict(boxes=boxes, labels=t["labels"], scores=torch.ones(len(boxes)), masks=code(masks, boxes))


def codec(masks, boxes):
    return detect.paste(detect.mask_targets(masks, boxes), boxes, masks.shape[1:])


def precision(source, code=lambda masks, boxes: masks):
    """AP of boxes and masks of the truth given as predictions."""
    records = [source.record(i) for i in range(min(100, len(source)))]
    pairs = [detect.results(truth_as_found(r, source.ids, code), r, source.ids) for r in records]
    return [detect.average_precision(records, source, sum((p[j] for p in pairs), []), kind)[0]
            for j, kind in enumerate(("bbox", "segm"))]


# --- model ------------------------------------------------------------------------------------------------------------

def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        taps, vitdet = detect.MaskRCNN(layer_scale=True), detect.MaskRCNN("vitdet", 1024, (14, 14))
        plain, base = detect.MaskRCNN(), detect.MaskRCNN(box_head="2fc")
    assert numel(taps) == 116_947_957 and numel(plain) == 116_947_957 - 12 * 2 * 768
    assert [numel(m) for m in (taps.backbone, taps.pyramid.scales, taps.pyramid.fpn, taps.rpn, taps.heads.box_head)] == [
        87_858_432, 7_081_728, 3_147_776, 593_935, 15_207_424]
    assert numel(vitdet) == 110_900_149
    assert [numel(m) for m in (vitdet.backbone, vitdet.pyramid, vitdet.rpn, vitdet.heads.box_head, vitdet.heads.mask_head)] \
        == [85_889_024, 5_560_000, 1_184_015, 15_207_424, 2_361_344]
    assert numel(base.heads.box_head) == 256 * 49 * 1024 + 1024 + 1024 * 1024 + 1024
    assert [i for i, block in enumerate(vitdet.backbone.blocks) if block.window == 64] == [2, 5, 8, 11]
    assert all(block.window == 14 for i, block in enumerate(vitdet.backbone.blocks) if i not in (2, 5, 8, 11))


def test_taps_are_those_of_the_vit_on_any_grid():
    for depth, taps in ((12, [4, 6, 8, 12]), (24, [8, 12, 16, 24]), (4, [1, 2, 3, 4])):
        assert detect.Backbone("taps", 64, (4, 4), 8, 8, depth, 1).taps == taps
    vit, backbone = ddae.ViT(32, 8, 24, 6, 2), detect.Backbone("taps", 32, (4, 4), 8, 24, 6, 2, layer_scale=True)
    rest = backbone.load_state_dict({k: v for k, v in vit.state_dict().items() if not k.startswith("norm.")}, strict=False)
    assert not rest.unexpected_keys and {k.split(".")[-1] for k in rest.missing_keys} == {"gamma_1", "gamma_2"}
    imgs = torch.randn(2, 3, 32, 32)
    outputs = vit(imgs)
    for tap, found in zip((2, 3, 4, 6), backbone(imgs)):
        assert torch.allclose(found[1, :, 2, 3], outputs[tap - 1][1, 1 + 2 * 4 + 3], atol=1e-5)  # row 2, column 3
    assert [x.shape for x in backbone(torch.randn(1, 3, 40, 64))] == [(1, 24, 5, 8)] * 4


@pytest.mark.parametrize("style, options", [("taps", dict(layer_scale=True)), ("vitdet", {})])
def test_own_blocks_begin_as_the_shared_ones_do(style, options):
    attn = detect.Backbone(style, 32, (4, 4), 8, 24, 4, 2, **options).blocks[3].attn
    assert not attn.qkv.bias.any() and 0.9 < attn.qkv.weight.max() / (6 / 96) ** 0.5 <= 1


def test_table_of_any_grid_is_resized_as_the_common_one():
    square = ddae.sincos_pos_embed(16, (6, 6))
    for new in ((6, 6), (3, 9), (7, 12)):
        assert torch.equal(detect.resize_table(square, (6, 6), new), common.resize_pos_embed(square, new))
    ramp = torch.cat((torch.zeros(1, 1, 1), torch.arange(8.0).repeat(4).view(1, 32, 1)), 1)  # 4 rows, 8 columns
    found = detect.resize_table(ramp, (4, 8), (4, 16))[0, 1:].view(4, 16)
    assert torch.allclose(found[:, 4:12], ((torch.arange(16) + 0.5) / 2 - 0.5)[4:12].expand(4, -1), atol=0.06)


@pytest.mark.parametrize("side, window", [(4, 0), (4, 14), (6, 3), (7, 3)])
def test_windows_and_relative_positions_are_what_a_loop_over_queries_gives(side, window):
    torch.manual_seed(0)
    block, D, heads = detect.WindowedBlock(8, 2, 0.0, side, window), 8, 2
    x = torch.randn(2, side * side, D)
    if window in (0, 14):  # no window, or a larger one: at first the block of the shared ViT
        plain = ddae.Block(8, 2)
        rest = plain.load_state_dict(block.state_dict(), strict=False)
        assert not rest.missing_keys and set(rest.unexpected_keys) == {"rel_pos_h", "rel_pos_w"}
        assert torch.allclose(block(x), plain(x), atol=1e-5)
    for table in (block.rel_pos_h, block.rel_pos_w):
        nn.init.normal_(table)
    n = window if 0 < window < side else side
    y = torch.zeros(2, 9, 9, D)  # room for the zeros beyond the edge
    y[:, :side, :side] = block.norm1(x).view(2, side, side, D)
    q, k, v = block.attn.qkv(y).view(2, 9, 9, 3, heads, 4).unbind(3)
    expected = torch.zeros(2, side, side, D)
    for row in range(side):
        for col in range(side):
            cells = [(r, c) for r in range(row // n * n, row // n * n + n) for c in range(col // n * n, col // n * n + n)]
            logits = torch.stack([(q[:, row, col] * (k[:, r, c] / 2 + block.rel_pos_h[row - r + n - 1]
                                                     + block.rel_pos_w[col - c + n - 1])).sum(-1) for r, c in cells], -1)
            values = torch.stack([v[:, r, c] for r, c in cells], 2)  # (2, heads, cells, 4)
            expected[:, row, col] = block.attn.proj((logits.softmax(-1)[..., None] * values).sum(2).flatten(1))
    z = x + expected.view(x.shape)
    assert torch.allclose(block(x), z + block.mlp(block.norm2(z)), atol=1e-4)


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = detect.Backbone("vitdet", 64, (4, 4), 8, 24, 4, 2, 0.5, window=3, checkpointing=checkpointing)
        torch.manual_seed(1)
        backbone(torch.randn(2, 3, 64, 64))[0].square().sum().backward()
        grads.append({k: p.grad for k, p in backbone.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("style", ["taps", "vitdet"])
def test_strides_are_whole_and_regions_are_read_where_they_lie(style):
    """Maps that hold the position of each of their pixels, in a padded image: the mean over a box is then its middle."""
    net = model(style, patch_size=16, img_size=1024 if style == "vitdet" else 800, depth=1)
    first, _ = net.eval().transform([torch.zeros(3, 300, 400)])  # torchvision would take its scales from this one
    imgs, _ = net.transform([torch.zeros(3, 800, 700)])
    with torch.no_grad():
        maps = net.pyramid(net.backbone(imgs.tensors))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    H, W = imgs.tensors.shape[2:]
    assert [(H // x.shape[2], W // x.shape[3], H % x.shape[2]) for x in maps.values()] == [
        (s, s, 0) for s in (4, 8, 16, 32, 64)]
    assert (H, W) == ((1024, 1024) if style == "vitdet" else (960, 832))  # 800 x 700 becomes 914 x 800
    anchors = net.rpn.anchor_generator(imgs, list(maps.values()))[0]
    size = torch.stack((anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]), 1)
    sides = size.prod(1).sqrt()
    assert {32, 64, 128, 256, 512} == {int(2 ** s.log2().round()) for s in sides} and \
        (sides / 2 ** sides.log2().round() - 1).abs().max() < 0.02
    places = {name: torch.stack([g.expand(x.shape[2:]) for g in torch.meshgrid(*(
        (torch.arange(n) + 0.5) * 2 ** (2 + i) for n in x.shape[2:]), indexing="ij")])[None]
        for i, (name, x) in enumerate(maps.items())}
    boxes = torch.tensor([[40, 60, 60, 90], [100, 200, 260, 300], [133, 71, 430, 411], [65.5, 80.25, 600, 700]])
    net.heads.box_roi_pool(places, [boxes], first.image_sizes)
    for pool in (net.heads.box_roi_pool, net.heads.mask_roi_pool):
        middle = pool(places, [boxes], imgs.image_sizes).mean((2, 3))  # (4, 2): y, x
        assert torch.allclose(middle, torch.stack((boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]), 1) / 2, atol=1e-2)
    constant = {str(i): torch.full_like(x[:, :1], i) for i, x in enumerate(list(maps.values())[:4])}
    sides = torch.tensor([20.0, 111, 113, 223, 225, 447, 449, 700])  # of squares; 224 goes to stride 16
    levels = net.heads.box_roi_pool(constant, [F.pad(sides[:, None].repeat(1, 2), (2, 0))], imgs.image_sizes)[:, 0, 0, 0]
    assert levels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_aligned_regions_are_those_of_the_published_code():
    grid = torch.arange(25.0).view(1, 1, 5, 5)
    pool = detect.RegionPool(4, 4)
    found = pool({"0": grid, "1": grid, "2": grid, "3": grid}, [torch.tensor([[1.0, 1, 3, 3]])], None)
    assert found[0, 0].tolist() == [[4.5 + 2.5 * i + 0.5 * j for j in range(4)] for i in range(4)]


@pytest.mark.parametrize("style", ["taps", "vitdet"])
def test_heads_stay_in_fp32_under_autocast(style):
    net, seen = model(style), {}
    net.rpn.register_forward_hook(lambda module, args, out: seen.update(maps={x.dtype for x in args[1].values()},
                                                                        proposals=out[0][0]))
    net.heads.box_predictor.register_forward_hook(lambda module, args, out: seen.update(offsets=out[1].dtype))
    net.backbone.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, out: seen.update(vit=out.dtype))
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = net.detect([torch.randn(3, 64, 64)])[0]
    assert seen["vit"] == torch.bfloat16 and seen["maps"] == {torch.float32} and seen["offsets"] == torch.float32
    boxes = torch.rand(200, 2).mul(40).repeat(1, 2) + F.pad(12 + 40 * torch.rand(200, 2), (2, 0))
    assert found["boxes"].dtype == torch.float32
    decoded = net.heads.box_coder.decode_single(net.heads.box_coder.encode_single(boxes, boxes + 3), boxes + 3)
    assert box_iou(decoded, boxes).diag().min() > 0.999


def example(n=2, size=(64, 64)):
    """Images and targets, random."""
    rng = np.random.default_rng(0)
    boxes = torch.tensor(rng.integers(0, 30, (n, 2)).repeat(2, 0).reshape(n, 4), dtype=torch.float32)
    boxes = torch.cat((boxes[:, :2], boxes[:, :2] + torch.tensor(rng.integers(10, 30, (n, 2)))), 1)
    masks = torch.zeros(n, *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = 1
    return torch.randn(3, *size), dict(boxes=boxes, masks=masks, labels=torch.tensor(rng.integers(1, 4, n)))


@pytest.mark.parametrize("style, options", [("taps", dict(box_loss="giou", layer_scale=True)), ("vitdet", dict(window=3)),
                                            ("taps", dict(box_head="2fc"))])
def test_first_loss_is_that_of_a_guess_and_gradients_reach_everything(style, options):
    net = model(style, **options)
    pairs = [example(), example(0, (64, 48))]  # the second image is background
    if style == "vitdet":
        pairs[1] = example(0)
    loss, metrics = net(*map(list, zip(*pairs)))
    assert list(metrics) == ["loss/objectness", "loss/proposal", "loss/class", "loss/box", "loss/mask"]
    assert all(v.isfinite() and v > 0 for v in metrics.values())
    assert metrics["loss/objectness"].item() == pytest.approx(math.log(2), rel=0.1)
    assert metrics["loss/class"].item() == pytest.approx(math.log(4), rel=0.1)
    assert loss.item() == pytest.approx(sum(metrics.values()).item(), rel=1e-6)
    loss.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == ["backbone.pos_embed"] * (style == "taps")
    assert style == "taps" or net.backbone.pos_embed.grad.abs().sum() > 0


def test_images_without_instances_train_as_background():
    net = model()
    loss, metrics = net([torch.randn(3, 64, 64)] * 2, [example(0)[1]] * 2)
    assert loss.isfinite() and metrics["loss/mask"] == metrics["loss/box"] == metrics["loss/proposal"] == 0
    loss.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == ["backbone.pos_embed"]  # not trained


@torch.no_grad()
def test_nothing_found_is_no_error():
    net = model().eval()
    net.heads.score_thresh = 1.0
    found = net.detect([torch.randn(3, 50, 70)])[0]
    assert {k: v.shape for k, v in found.items()} == dict(boxes=(0, 4), labels=(0,), scores=(0,), masks=(0, 28, 28))
    found["masks"] = detect.paste(found["masks"], found["boxes"], (50, 70))
    assert detect.results(found, dict(id=1), IDS) == ([], [])


def test_box_losses_are_loops():
    torch.manual_seed(0)
    net, n = model(), 9
    labels = torch.tensor([0, 1, 0, 3, 2, 0, 1, 3, 0])
    boxes = torch.rand(n, 2).mul(30).repeat(1, 2) + F.pad(10 + 20 * torch.rand(n, 2), (2, 0))
    true = boxes + 3 * torch.randn(n, 4)
    logits, regressed = torch.randn(n, 4), torch.randn(n, 16)
    offsets = net.heads.box_coder.encode_single(true, boxes)
    l1 = giou = 0
    for i in range(n):
        if labels[i]:
            d = regressed[i, 4 * labels[i]:4 * labels[i] + 4]
            l1 += (d - offsets[i]).abs().sum()
            (x0, y0, x1, y1), (a0, b0, a1, b1) = boxes[i], true[i]
            w, h = x1 - x0, y1 - y0
            cx, cy, w, h = x0 + w / 2 + d[0] / 10 * w, y0 + h / 2 + d[1] / 10 * h, w * (d[2] / 5).exp(), h * (d[3] / 5).exp()
            p0, q0, p1, q1 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
            inside = (min(p1, a1) - max(p0, a0)).clamp(0) * (min(q1, b1) - max(q0, b0)).clamp(0)
            union = w * h + (a1 - a0) * (b1 - b0) - inside
            hull = (max(p1, a1) - min(p0, a0)) * (max(q1, b1) - min(q0, b0))
            giou += 1 - inside / union + (hull - union) / hull
    for kind, expected in (("l1", l1 / n), ("giou", 10 * giou / n)):
        net.heads.box_loss = kind
        found = net.heads.box_losses(logits, regressed, boxes, labels, offsets)
        assert found["loss/box"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert found["loss/class"].item() == pytest.approx(-logits.log_softmax(1)[range(n), labels].mean().item(), rel=1e-5)


def test_masks_are_those_of_the_label_and_of_the_matched_instance(monkeypatch):
    """With boxes that are the true ones, mask logits of +-20 that say the truth cost nothing, of another class all."""
    net = model(regions=8)
    img, target = example(2)
    target["labels"] = torch.tensor([1, 3])
    true = detect.mask_targets(target["masks"], target["boxes"])
    assert true[:, 3:-3, 3:-3].min() > 0.999 and true.min() > 0.4  # half a pixel at the edge is mixed with what lies outside
    target["masks"][0, :, 30:] = 0
    monkeypatch.setattr(net.heads, "select_training_samples", lambda p, t: (
        [target["boxes"]], [torch.tensor([0, 1])], [target["labels"]], [torch.zeros(2, 4)]))
    losses = []
    for right in (0, 1):
        logits = torch.full((2, 4, 28, 28), 20.0)
        logits[[0, 1], [1, 3]] = 40 * detect.mask_targets(target["masks"], target["boxes"])[[0, 1] if right else [1, 0]] - 20
        monkeypatch.setattr(net.heads.mask_predictor, "forward", lambda x: logits)
        losses.append(net.run([img], [target])[1]["loss/mask"].item())
    assert losses[1] < 0.5 < losses[0]


def test_boxes_come_back_in_pixels_of_the_image_that_was_given(monkeypatch):
    net = model().eval()
    monkeypatch.setattr(net, "run", lambda imgs: (
        [dict(boxes=torch.tensor([[0.0, 8, 16, 32]])) for _ in imgs], {}, [(64, 32), (32, 64)]))
    found = net.detect([torch.zeros(3, 32, 16), torch.zeros(3, 64, 128)])
    assert [f["boxes"].tolist() for f in found] == [[[0, 4, 8, 16]], [[0, 16, 32, 64]]]


# --- masks and figures ------------------------------------------------------------------------------------------------

def test_pasted_masks_fill_their_boxes_to_the_pixel():
    boxes = torch.tensor([[3.0, 2, 9, 7], [-4, 5, 6, 30], [2.5, 1.5, 4.5, 3.5]])
    found = detect.paste(torch.ones(3, 28, 28), boxes, (20, 12))
    expected = torch.zeros(3, 20, 12, dtype=torch.bool)
    expected[0, 2:7, 3:9] = expected[1, 5:20, 0:6] = True
    assert torch.equal(found[:2], expected[:2])
    assert detect.paste(torch.ones(0, 28, 28), torch.zeros(0, 4), (5, 6)).shape == (0, 5, 6)
    half = torch.zeros(1, 28, 28)
    half[:, :, 14:] = 1
    found = detect.paste(half, torch.tensor([[10.0, 0, 66, 56]]), (60, 70))[0]
    assert found[:56, 38:66].all() and not found[:, :38].any()


def test_masks_survive_being_coded_and_pasted():
    class Few(detect.Figures):
        def __len__(self):
            return 25

    def unaligned(masks, boxes):
        return detect.paste(detect.mask_targets(masks, boxes + 0.5), boxes, masks.shape[1:])

    assert precision(Few("val", 32), codec)[1] > 0.99
    assert precision(Few("val", 32), unaligned)[1] < 0.8  # half a pixel shows


@pytest.mark.skipif(not COCO100.exists(), reason="needs 100 images of COCO val2017")
def test_truth_as_predictions_and_mask_codec_on_real_images():
    source = detect.Coco(COCO100, "val")
    assert precision(source) == pytest.approx([1, 1])
    assert precision(source, codec)[1] >= 0.99


def test_truth_as_predictions_is_perfect_whatever_the_ids(tmp_path):
    for name, source in (("tiny", detect.Coco(coco(tmp_path), "val")), ("shapes", detect.Figures("val", 48))):
        assert precision(source) == pytest.approx([1, 1]), name
    source = detect.Coco(tmp_path, "val")
    assert list(source.ids) == [3, 7, 90] and source.classes == ["c3", "c7", "c90"]
    record = source.record(0)
    assert len(record["annotations"]) == 3 and len(detect.targets(record, source.ids)["labels"]) == 2  # one is a crowd
    record = source.record(1)
    boxes, masks = detect.results(truth_as_found(record, source.ids), record, source.ids)
    raw = json.loads((tmp_path / "annotations/instances_val2017.json").read_text())["annotations"]
    raw = [a for a in raw if a["image_id"] == record["id"]]
    for a, b, m in zip(raw, boxes, masks):
        assert set(b) == {"image_id", "category_id", "score", "bbox"} and b["category_id"] == a["category_id"]
        assert b["bbox"] == a["bbox"] and rle.area(m["segmentation"]) == a["area"] and m["image_id"] == a["image_id"]
        json.dumps(m)


def test_pictures_show_every_instance_and_the_surest_on_top():
    img, masks = torch.full((3, 20, 30), 100, dtype=torch.uint8), torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 5:15, 5:20] = masks[1, 5:15, 12:28] = True
    boxes = torch.tensor([[5.0, 5, 20, 15], [12, 5, 28, 15]])
    picture = detect.paint(img, dict(boxes=boxes, masks=masks, labels=torch.tensor([1, 300])))
    first, both, second, none = (picture[:, 10, x].tolist() for x in (8, 16, 24, 2))
    assert none == [100] * 3 and len({tuple(c) for c in (none, first, both, second)}) == 4
    for lower, found in ((none, first), (second, both)):  # half what lies below, half the first one's colour
        assert abs(2 * np.array(found) - lower - detect.palette(254)[0]).max() <= 2
    assert detect.paint(img, dict(boxes=boxes[:0])) is img


def test_all_encodings_of_a_mask_are_the_same():
    mask = np.zeros((9, 11), np.uint8)
    mask[2:6, 3:8] = 1
    record = dict(height=9, width=11)
    code = rle.encode(np.asfortranarray(mask))
    parts = [[3, 2, 8, 2, 8, 4, 3, 4], [3, 4, 8, 4, 8, 6, 3, 6]]
    forms = (parts, [[3, 2, 8, 2, 8, 6, 3, 6]], code, dict(size=[9, 11], counts=code["counts"].decode()),
             dict(size=[9, 11], counts=[29, 4, 5, 4, 5, 4, 5, 4, 5, 4, 30]))
    for form in forms:
        assert (rle.decode(detect.to_rle(form, record)) == mask).all()
    assert (rle.decode(detect.encode(torch.from_numpy(mask)[None])[0]) == mask).all()


# --- data -------------------------------------------------------------------------------------------------------------

def test_generated_instances_are_the_visible_parts_of_figures():
    source, hidden = detect.Figures("train", 64), 0
    for i in range(30):
        item, record = source.item(i) if hasattr(source, "drawn") else common.Shapes("train", 64).item(i), source.record(i)
        masks = np.stack([rle.decode(a["segmentation"]) for a in record["annotations"]]).astype(bool)
        assert (masks.sum(0) == (item["mask"] > 0)).all()  # every figure's pixel is in one instance
        for a, mask in zip(record["annotations"], masks):
            assert (item["mask"][mask] == a["category_id"]).all()
        hidden += len(item["boxes"]) - len(masks)
        if len(masks) == 1:
            x, y, w, h = record["annotations"][0]["bbox"]
            assert [x, y, x + w, y + h] == item["boxes"][0].tolist()
        assert (np.array(source.image(i)) == item["image"]).all()
    assert 0 <= hidden < 5


@pytest.mark.parametrize("style", ["taps", "vitdet"])
def test_samples_depend_on_their_key_alone_and_boxes_stay_on_their_pixels(style, tmp_path):
    cfg = config(f"--style {style} --scale {'0.6 1' if style == 'taps' else '0.4 2'}")
    source = detect.Coco(coco(tmp_path), "train")
    samples, flips, sizes = detect.Scenes(source, cfg), set(), set()
    for epoch in range(12):
        for i in range(6):
            img, target, *_ = samples[epoch, i]
            torch.rand(3), np.random.rand(3)
            again, same, *_ = samples[epoch, i]
            assert torch.equal(img, again) and all(torch.equal(target[k], same[k]) for k in target)
            assert type(img) is torch.Tensor and img.dtype == torch.uint8 and target["boxes"].dtype == torch.float32
            sizes.add(min(img.shape[1:]))
            assert max(img.shape[1:]) <= (64 if style == "vitdet" else 106)
            for box, mask, label in zip(target["boxes"], target["masks"].bool(), target["labels"]):
                colour = img[:, mask].float().mean(1)
                assert colour.argmax() == label - 1 and colour.max() > 150
                limit = 0 if style == "vitdet" else 1.01
                assert (box - (masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1]))).abs().max() <= limit
            if len(target["boxes"]):
                flips.add((i, bool(target["boxes"][0, 0] > img.shape[2] / 3)))
    assert len(flips) > 6 and len(sizes) > 5
    if style == "taps":
        assert sizes <= set(range(37, 65))  # torchvision rounds down, sometimes below the side that was drawn
    loaders = [torch.utils.data.DataLoader(samples, batch_sampler=common.Batches(6, cfg, 0, 3), num_workers=n,
                                           collate_fn=common.collate) for n in (0, 2)]
    for one, two in zip(*loaders):
        assert all(map(torch.equal, one[0], two[0])) and torch.equal(one[1][1]["boxes"], two[1][1]["boxes"])


@pytest.mark.parametrize("style", ["taps", "vitdet"])
def test_resized_masks_stay_under_image_and_boxes(style):
    """A bright rectangle at any scale: the mask's middle is the picture's, and the box's."""
    class One:
        ids = [1]

        def image(self, i):
            pixels = np.zeros((200, 200, 3), np.uint8)
            pixels[60:120, 50:130] = 255
            return Image.fromarray(pixels)

        def record(self, i):
            mask = np.asarray(self.image(0))[..., 0] // 255
            return dict(height=200, width=200, annotations=[dict(bbox=[50, 60, 80, 60], category_id=1, iscrowd=0,
                                                                 segmentation=rle.encode(np.asfortranarray(mask)))])

    samples, offsets = detect.Scenes(One(), config(f"--style {style} --scale 0.3 0.9 --img_size 96")), []
    for epoch in range(60):
        img, target, *_ = samples[epoch, 0]
        rows = torch.arange(img.shape[1]) + 0.5
        bright, covered = img[0].double().sum(1), target["masks"][0].double().sum(1)
        middle = (rows * covered).sum() / covered.sum()
        offsets.append([middle - (rows * bright).sum() / bright.sum(), middle - target["boxes"][0, 1::2].mean()])
    assert torch.tensor(offsets).mean(0).abs().max() < 0.1


def test_default_sizes_are_the_published_ones():
    scenes = detect.Scenes(None, detect.Config())
    assert scenes.resize.min_size == list(range(480, 801, 32)) and scenes.resize.max_size == 1333
    scenes = detect.Scenes(None, detect.Config(**detect.RECIPES["deepmim"]))
    assert (scenes.resize.target_size, scenes.resize.scale_range) == ((1024, 1024), (0.1, 2.0))
    for options, size, expected in ((dict(), (480, 640), (800, 1066)), (dict(), (300, 900), (444, 1333)),
                                    (dict(style="vitdet", img_size=1024), (480, 640), (768, 1024))):
        with torch.device("meta"):
            net = detect.MaskRCNN(**options).eval()
        assert net.transform([torch.zeros(3, *size)])[0].image_sizes == [expected]


def test_odd_annotations(tmp_path, capsys):
    root = coco(tmp_path, crowd=False)

    def change(file):
        size = [file["images"][0][k] for k in ("height", "width")]
        a = file["annotations"]
        a[:] = [x for x in a if x["image_id"] not in (100, 101, 102)]
        one = dict(id=50, image_id=101, category_id=7, iscrowd=0, segmentation=[[5, 5, 6, 5, 6, 6, 5, 6]], bbox=[5, 5, 1, 1])
        a += [dict(one, image_id=100, iscrowd=1, segmentation=dict(size=size, counts=[0, size[0] * size[1]])),
              one, dict(one, id=51, bbox=[5, 5, 0, 9]), dict(one, id=52, bbox=[5, 5, 9, 0]), dict(one, id=53, segmentation=[]),
              dict(one, id=54, segmentation=[[1, 2, 3, 4]])]

    edit(root, change)
    source = detect.Coco(root, "train")
    out = capsys.readouterr().out
    assert "2 images without instances, or with crowds alone, are left out" in out
    assert "4 annotations" in out and "annotation 51" in out
    assert [source.record(i)["id"] for i in range(len(source))] == [101, 103, 104, 105]  # 100: a crowd, 102: nothing
    assert len(detect.Coco(root, "val")) == 5
    for style in ("taps", "vitdet"):
        samples = detect.Scenes(source, config(f"--style {style} --scale 1 1"))
        img, target, _, bad = samples[0, 0]  # one pixel
        assert len(target["boxes"]) == 1 and (target["boxes"][:, 2:] > target["boxes"][:, :2]).all() and not bad
        small = detect.mask_targets(target["masks"], target["boxes"])
        assert small.shape == (1, 28, 28) and small.isfinite().all()
    assert source.record(0)["annotations"][0]["area"] == 1  # was not given


# --- optimiser --------------------------------------------------------------------------------------------------------

def test_learning_rates():
    cfg = common.parse(detect.Config, detect.RECIPES, argv=["--recipe", "ddae"], flag="recipe")
    n = 117266 // 32  # steps of an epoch: images with instances
    for step, expected in ((0, 3e-7), (250, 3e-4 * 0.5005), (499, 3e-4 * (1 - 0.999 / 500)), (500, 3e-4), (9 * n - 1, 3e-4),
                           (9 * n, 3e-5), (11 * n - 1, 3e-5), (11 * n, 3e-6), (12 * n - 1, 3e-6)):
        assert detect.learning_rate(step, n, cfg) == pytest.approx(expected, rel=1e-6)
    cfg = common.parse(detect.Config, detect.RECIPES, argv=["--recipe", "mae"], flag="recipe")
    # 184,375 steps are 100 epochs in the published run; its drops are at 163,889 and 177,546.
    for step, expected in ((0, 1e-7), (125, 1e-4 * 0.5005), (250, 1e-4), (163_880, 1e-4), (163_895, 1e-5), (177_535, 1e-5),
                           (177_550, 1e-6)):
        assert detect.learning_rate(step, 1843.75, cfg) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("style", ["taps", "vitdet"])
def test_groups(style):
    cfg = config(f"--style {style} --layer_decay 0.75 --depth 12 --weight_decay 0.1")
    net = model(style, depth=12, window=3, layer_scale=style == "taps")
    groups = detect.make_optimizer(net, cfg).param_groups
    where = {p: (round(math.log(g["lr_scale"], 0.75)), g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(groups) == (28 if style == "taps" else 27)
    assert len(where) == len(list(net.parameters())) - (style == "taps") == sum(len(g["params"]) for g in groups)
    expected = {"backbone.patch_embed.proj.weight": (13, 0.1), "backbone.blocks.0.attn.qkv.weight": (12, 0.1),
                "backbone.blocks.11.norm1.weight": (1, 0.0), "heads.box_predictor.cls_score.weight": (0, 0.1)}
    expected |= {"backbone.cls_token": (13, 0.1), "backbone.patch_embed.proj.bias": (13, 0.0),
                 "backbone.blocks.11.gamma_1": (1, 0.0), "pyramid.fpn.inner_blocks.0.0.bias": (0, 0.0),
                 "pyramid.scales.1.weight": (0, 0.1)} if style == "taps" else {
                 "backbone.pos_embed": (13, 0.0), "backbone.patch_embed.proj.bias": (13, 0.1),
                 "backbone.blocks.3.attn.qkv.bias": (9, 0.1), "backbone.blocks.3.rel_pos_h": (9, 0.1),
                 "pyramid.levels.0.1.weight": (0, 0.1), "heads.box_head.0.1.weight": (0, 0.1)}
    for name, value in expected.items():
        assert where[net.get_parameter(name)] == value, name


def test_recipes():
    for recipe, lr, batch, epochs, wd, drop, style in (
            ("ddae", 3e-4, 32, 12, 0.05, 0.2, "taps"), ("sdae", 3e-4, 32, 12, 0.05, 0.2, "taps"),
            ("deepmim", 1e-4, 16, 100, 0.1, 0.1, "vitdet"), ("mae", 1e-4, 64, 100, 0.1, 0.1, "vitdet")):
        cfg = common.parse(detect.Config, detect.RECIPES, argv=["--recipe", recipe], flag="recipe")
        assert (cfg.lr, cfg.batch_size, cfg.epochs, cfg.weight_decay, cfg.drop_path, cfg.style) == (
            lr, batch, epochs, wd, drop, style)
        assert cfg.layer_decay == (0.7 if recipe == "mae" else 0.75) and cfg.box_head == "4conv1fc"
        assert cfg.micro_batch == (2 if style == "taps" else 0)


# --- runs -------------------------------------------------------------------------------------------------------------

def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_split(root):
    """Let the validation set be the training set."""
    for path in (root / "val2017").iterdir():
        path.unlink()
    (root / "val2017").rmdir()
    (root / "val2017").symlink_to(root / "train2017")
    (root / "annotations/instances_val2017.json").write_text((root / "annotations/instances_train2017.json").read_text())


def test_overfits(tmp_path, monkeypatch):
    root = coco(tmp_path / "data", counts=(4, 1), crowd=False)
    same_split(root)
    main(monkeypatch, f"--data {root} --out_dir {tmp_path / 'out'} --epochs 60 --batch_size 4 --scale 1 1 --channels 32 "
         "--box_head 2fc --box_loss l1 --drop_path 0 --warmup 5 --drops 45 --lr 3e-3 --layer_decay 1 --save_every 100 "
         "--log_every 10 --eval_every 30")
    lines = log(tmp_path / "out")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["APb50"] > 70 and lines[-1]["APm50"] > 60
    best = common.load(tmp_path / "out/best.pt")
    assert best["figures"]["APb"] == pytest.approx(max(x.get("APb", 0) for x in lines), rel=1e-5)


@pytest.mark.parametrize("style", ["taps", "vitdet"])
def test_resumes_bitwise_and_then_evaluates_and_predicts(style, tmp_path, monkeypatch, capsys):
    data = coco(tmp_path / "data")
    encoder_file(tmp_path / "encoder.pt")
    flags = f"--data {data} --init {tmp_path / 'encoder.pt'} --style {style} --window 3 --drop_path 0.2 --epochs 2 "
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(monkeypatch, flags + f"--out_dir {whole} --preview_every 1")
    said = capsys.readouterr().out
    assert "16 -> 64 patches" in said and "norm.weight" in said and "scratch" not in said
    main(monkeypatch, flags + f"--out_dir {cut} --max_steps 3 --eval_images 2 --checkpointing")  # these may change
    main(monkeypatch, flags + f"--out_dir {cut}")
    one, two = common.load(whole / "last.pt"), common.load(cut / "last.pt")
    assert one["step"] == two["step"] == 6
    for k in one["model"]:
        assert torch.equal(one["model"][k], two["model"][k]), k
    assert log(whole)[-1]["loss"] == log(cut)[-1]["loss"] and "APb" in log(cut)[-1]
    assert (whole / "preview.png").exists()
    capsys.readouterr()
    main(monkeypatch, f"--data {data} --out_dir {whole} --eval --img_size 640 --embed_dim 40")
    assert f"APb {common.load(whole / 'best.pt')['figures']['APb']:.6g}" in capsys.readouterr().out
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (70, 45), (200, 30, 30)).save(photo)
    main(monkeypatch, f"--predict {photo} --init {whole / 'best.pt'} --out_dir {tmp_path / 'pictures'}")
    with Image.open(tmp_path / "pictures/photo_detected.png") as picture:
        assert picture.size == (995, 640)


def test_weights_of_the_file_are_those_of_the_model(tmp_path):
    vit = encoder_file(tmp_path / "encoder.pt")
    for flags, left in (("--table 4 4", {"norm.weight", "norm.bias"}),
                        ("--table --style vitdet", {"norm.weight", "norm.bias", "cls_token"})):
        cfg, weights, classes = detect.fit(config(f"--init {tmp_path / 'encoder.pt'} --num_classes 3 --embed_dim 40 {flags}"))
        backbone = detect.make_model(detect.MaskRCNN, cfg, weights, classes, ["a"] * 3).backbone.state_dict()
        assert not classes and cfg.embed_dim == 24 and cfg.table == (4, 4)
        assert {k for k in vit.state_dict() if k not in backbone} == left
        for name, value in vit.state_dict().items():
            assert name in left or torch.equal(value, backbone[name]), name


def test_two_processes_find_the_same_figures_on_an_odd_number_of_images(tmp_path, monkeypatch, capfd):
    data, out = coco(tmp_path / "data"), tmp_path / "out"
    flags = f"{TINY} --data {data} --out_dir {out} --lr 1e-2".split()

    def two(*more):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run([*command, "-m", "transfer.detect", *flags, *more], cwd=ROOT, capture_output=True,
                              text=True, timeout=100, env=os.environ | dict(OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr
        return done.stdout, [(out / f"results_{kind}.json").read_text() for kind in ("bbox", "segm")]

    _, trained = two()
    evaluated = two("--eval")
    main(monkeypatch, " ".join([*flags, "--eval"]))
    assert evaluated == (capfd.readouterr().out, trained)
    found = json.loads(trained[0])
    assert {e["image_id"] for e in found} == set(range(100, 105)) and {e["category_id"] for e in found} <= set(IDS)
    assert "APb " in evaluated[0]


def test_evaluation_measures_what_the_model_says(tmp_path):
    """A model that knows the truth has an AP of 100, one that knows half of the images about half of it."""
    source = detect.Coco(coco(tmp_path / "data", counts=(1, 4)), "val")
    records = [source.record(i) for i in range(4)]

    class Knows(nn.Module):
        def __init__(self, images):
            super().__init__()
            self.calls, self.images = 0, images

        def detect(self, imgs):
            r, self.calls = records[self.calls], self.calls + 1
            assert imgs[0].shape == (3, r["height"], r["width"])
            found = truth_as_found(r, source.ids, detect.mask_targets)
            return [{k: v[:len(v) if self.calls <= self.images else 0] for k, v in found.items()}]

    figures = [detect.evaluation(config(f"--out_dir {tmp_path}"), source)(Knows(n), "cpu", FP32, lambda epochs: True)
               for n in (4, 2, 0)]
    assert figures[0]["APb"] == pytest.approx(100) and figures[0]["APm"] > 99
    assert 20 < figures[1]["APb"] < 80 and figures[2]["APb"] == figures[2]["APm50"] == 0
    assert list(figures[0])[:4] == ["APb", "APb50", "APm", "APm50"] and "APb/large" not in figures[0]


def test_shapes_train_and_warn_that_nothing_was_loaded(tmp_path, monkeypatch, capsys):
    main(monkeypatch, f"--out_dir {tmp_path} --max_steps 2 --eval_images 2")
    assert "from scratch" in capsys.readouterr().out
    assert common.load(tmp_path / "best.pt")["classes"][:2] == ["disc", "ring"]


# --- bad input --------------------------------------------------------------------------------------------------------

def tear(root):
    path = root / "annotations/instances_train2017.json"
    path.write_text(path.read_text()[:-40])


def other_weights(root):
    torch.save(dict(model=dict(x=torch.zeros(3))), root / "other.pt")


def unfinished(root):
    torch.save(dict(model=encoder_file(root / "e.pt").state_dict(), config=dict(method="maskrcnn")), root / "other.pt")


@pytest.mark.parametrize("damage, flags, says", [
    (tear, "", "instances_train2017.json is no readable JSON"),
    (lambda root: (root / "annotations/instances_val2017.json").unlink(), "", "instances_val2017.json is missing; "),
    (lambda root: (root / "train2017/3.png").unlink(), "", "1 of 6 images are not in"),
    (lambda root: edit(root, lambda f: f["annotations"][2].update(image_id=5)), "", "is of image 5, which is not under"),
    (lambda root: edit(root, lambda f: f["annotations"][2].update(category_id=4)), "", "is of category 4, which is not"),
    (lambda root: edit(root, lambda f: f["annotations"][2].pop("bbox")), "", "entry 2 of 'annotations' has no 'bbox'"),
    (lambda root: edit(root, lambda f: f["annotations"][2].update(segmentation=[["a"] * 6])), "", "no polygon and no RLE"),
    (lambda root: edit(root, lambda f: f["annotations"][2].update(bbox=None)), "", "is no COCO file: TypeError"),
    (None, "--num_classes 7", "--num_classes 7, but --data"),
    (None, "--style vitdet --layer_scale", "--layer_scale goes with --style taps"),
    (lambda root: edit(root, lambda f: f["annotations"][0].update(segmentation=dict(size=[5, 5], counts=[0, 25]))), "",
     "its size is [5, 5]"),
    (lambda root: edit(root, lambda f: f["images"].append(f["images"][0])), "", "two images have the same id"),
    (lambda root: edit(root, lambda f: f.pop("categories")), "", "there is no list under 'categories'"),
    (lambda root: edit(root, lambda f: f["categories"][0].update(name="other")), "", "have different categories"),
    (lambda root: edit(root, lambda f: f["annotations"].clear(), "val"), "", "nothing to train on or compare with"),
    (None, "--data nowhere", "nowhere is not a folder"),
    (None, "--data {root}/annotations", "instances_train2017.json is missing"),
    (other_weights, "--init {root}/other.pt", "holds no ViT: patch_embed.proj.weight is missing"),
    (lambda root: encoder_file(root / "other.pt", patch_size=14, img_size=28), "--init {root}/other.pt",
     "patches of 14 pixels are not divisible by 4"),
    (lambda root: encoder_file(root / "other.pt", patch_size=12, img_size=36), "--init {root}/other.pt --style vitdet",
     "--img_size 64 is not divisible by the coarsest stride, 4 patches of 12 pixels; use 48"),
    (None, "--init {root}/none.pt", "none.pt does not exist"),
    (unfinished, "--init {root}/other.pt", "--init takes best.pt"),
    (unfinished, "--eval --init {root}/e.pt", "e.pt is no detection model"),
    (None, "--eval --out_dir {root}/new", "new/best.pt does not exist"),
    (None, "--scale 2", "--scale takes low and high"),
    (None, "--table 8", "--table takes 2 positive values"),
    (None, "--embed_dim 26", "must be divisible by 4"),
])
def test_bad_input_is_answered_in_one_line(damage, flags, says, tmp_path, monkeypatch, capfd):
    root = coco(tmp_path / "coco")
    if damage:
        damage(root)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"--data {root} --out_dir {tmp_path / 'out'} {flags.format(root=root)}")
    assert stop.value.code == 2
    err = capfd.readouterr().err.strip()
    assert says in err and len(err.splitlines()) == 1


def test_a_file_that_breaks_later_is_named(tmp_path, monkeypatch, capfd):
    root = coco(tmp_path / "data")
    (root / "val2017/2.png").write_bytes((root / "val2017/2.png").read_bytes()[:60])
    Image.new("RGB", (9, 9)).save(root / "train2017/1.png")
    main(monkeypatch, f"--data {root} --out_dir {tmp_path / 'out'} --max_bad 0.5")
    out, err = capfd.readouterr()
    assert "val2017/2.png: OSError" in err and "the file has 9 x 9 pixels, the annotations" in err
    assert f"val_images {len(detect.Coco(root, 'val')) - 1}" in out
    for file in (root / "val2017").iterdir():
        file.write_text("no image")
    with pytest.raises(SystemExit):
        main(monkeypatch, f"--data {root} --eval --init {tmp_path / 'out'}/best.pt --device cpu")
    assert "images could be read, e.g. " in capfd.readouterr().err
