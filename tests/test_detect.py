"""Mask R-CNN against independent oracles: published counts, closed forms, loops, pycocotools, tiny COCO folders."""
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, differences, log
from PIL import Image
from pycocotools import mask as rle
from torchvision import ops
from torchvision.models.detection import roi_heads

import common
import ddae
from transfer import detect

TINY = "--img_size 64 --patch_size 8 --embed_dim 24 --depth 4 --num_heads 2 --channels 8 --regions 32 --table 8 8 " \
       "--proposals 100 50 --batch_size 2 --warmup 2 --num_workers 0 --device cpu --epochs 1 --drops --log_every 1"
IDS = (3, 7, 90)  # category ids with gaps
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools, new NumPy


def config(flags=""):
    return common.parse(detect.Config, detect.PRESETS, argv=f"{TINY} --num_classes 8 --drop_path 0 {flags}".split())


def main(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["detect.py", *TINY.split(), *flags.split()])
    detect.main()


def model(flags=""):
    torch.manual_seed(0)
    return detect.MaskRCNN(config(flags))


def coco(root):
    """A folder in COCO's layout: rectangles whose color tells the category, a crowd in the last image -> path."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, n in (("train", 6), ("val", 5)):
        images, annotations = [], []
        (root / f"{split}2017").mkdir()
        for i in range(n):
            H, W = rng.integers(48, 80, 2).tolist()
            picture = np.full((H, W, 3), 128, np.uint8)
            for left in (0, W // 2):
                w, h, k = *rng.integers(12, 22, 2).tolist(), int(rng.integers(3))
                x, y = left + int(rng.integers(1, W // 2 - w)), int(rng.integers(1, H - h))
                picture[y:y + h, x:x + w] = np.eye(3)[k] * 255
                annotations.append(dict(id=len(annotations), image_id=100 + i, category_id=IDS[k], bbox=[x, y, w, h],
                                        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]]))
            Image.fromarray(picture).save(root / f"{split}2017/{i}.png")
            images.append(dict(id=100 + i, file_name=f"{i}.png", height=H, width=W))
        annotations.append(dict(annotations[-1], id=99, iscrowd=1, segmentation=dict(size=[H, W], counts=[0, H * W])))
        file = dict(images=images, annotations=annotations, categories=[dict(id=i, name=f"c{i}") for i in IDS[::-1]])
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(file))
    return root


def edit(root, change, split="train"):
    path = root / f"annotations/instances_{split}2017.json"
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))


def example():
    """-> image (3, 64, 64), its target, and one without instances."""
    img, target = detect.Scenes(detect.Stars("train", 64), config("--scale 1 1"))[0, 0][0]
    return img / 255 - 0.5, target, {k: v[:0] for k, v in target.items()}


def test_parameter_counts_are_the_published_ones():
    def numel(*modules):
        return [sum(p.numel() for p in m.parameters()) for m in modules]

    sizes = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, num_classes=80)
    with torch.device("meta"):
        taps = detect.MaskRCNN(detect.Config(**sizes))
        vitdet = detect.MaskRCNN(detect.Config(**sizes | detect.PRESETS["deepmim"]))
    layer_scale = 12 * 2 * 768  # CAE's, left out here
    assert numel(taps, taps.backbone, taps.pyramid.scales, taps.pyramid.fpn, taps.rpn, taps.heads.box_head) == [
        116_947_957 - layer_scale, 87_858_432 - layer_scale, 7_081_728, 3_147_776, 593_935, 15_207_424]
    assert numel(vitdet, vitdet.backbone, vitdet.pyramid, vitdet.rpn, vitdet.heads.mask_head) == [
        110_900_149, 85_889_024, 5_560_000, 1_184_015, 2_361_344]
    assert [i for i, block in enumerate(vitdet.backbone.blocks) if block.window == 64] == [2, 5, 8, 11]


@pytest.mark.parametrize("side, window", [(4, 0), (6, 3), (7, 3)])
def test_windows_and_relative_positions_are_what_a_loop_over_queries_gives(side, window):
    torch.manual_seed(0)
    block, D, heads = detect.WindowedBlock(8, 2, 0.0, side, window), 8, 2
    x = torch.randn(2, side * side, D)
    for table in (block.rel_pos_h, block.rel_pos_w):
        torch.nn.init.normal_(table)
    n = window if 0 < window < side else side
    y = torch.zeros(2, 9, 9, D)  # room for the zeros beyond the edge
    y[:, :side, :side] = block.norm1(x).view(2, side, side, D)
    q, k, v = block.attn.qkv(y).view(2, 9, 9, 3, heads, 4).unbind(3)
    expected = torch.zeros(2, side, side, D)
    for row, col in itertools.product(range(side), repeat=2):
        top, left = row // n * n, col // n * n
        cells = list(itertools.product(range(top, top + n), range(left, left + n)))
        logits = torch.stack([(q[:, row, col] * (
            k[:, r, c] / 2 + block.rel_pos_h[row - r + n - 1] + block.rel_pos_w[col - c + n - 1])).sum(-1)
            for r, c in cells], -1)
        values = torch.stack([v[:, r, c] for r, c in cells], 2)  # (2, heads, cells, 4)
        expected[:, row, col] = block.attn.proj((logits.softmax(-1)[..., None] * values).sum(2).flatten(1))
    z = x + expected.view(x.shape)
    assert torch.allclose(block(x), z + block.mlp(block.norm2(z)), atol=1e-4)


@pytest.mark.parametrize("style", ["taps", "vitdet"])
def test_strides_are_whole_and_regions_are_read_where_they_lie(style):
    """Maps that hold the position of each of their pixels, in a padded image: a box's mean is then its center."""
    net = model(f"--style {style} --patch_size 16 --depth 1 --img_size {1024 if style == 'vitdet' else 800}")
    imgs, _ = net.eval().transform([torch.zeros(3, 800, 700)])
    maps = net.pyramid(net.backbone(imgs.tensors))
    H, W = imgs.tensors.shape[2:]
    assert (H, W) == ((1024, 1024) if style == "vitdet" else (960, 832))  # 800 x 700 becomes 914 x 800
    assert [(H / x.shape[2], W / x.shape[3]) for x in maps.values()] == [(s, s) for s in (4, 8, 16, 32, 64)]
    places = {name: torch.stack(torch.meshgrid(*((torch.arange(n) + 0.5) * stride for n in maps[name].shape[2:]),
                                               indexing="ij"))[None] for name, stride in zip(maps, (4, 8, 16, 32))}
    boxes = torch.tensor([[40, 60, 60, 90], [100, 200, 260, 300], [133, 71, 430, 411], [65.5, 80.25, 600, 700]])
    found = net.heads.box_roi_pool(places, [boxes], imgs.image_sizes).mean((2, 3))  # (4, 2): y, x
    assert torch.allclose(found, (boxes[:, :2] + boxes[:, 2:]).flip(1) / 2, atol=1e-2)
    numbers = {name: torch.full((1, 1, 300, 300), int(name)) * 1.0 for name in places}
    squares = torch.tensor([[0, 0, side, side] for side in (20.0, 111, 113, 223, 225, 447, 449, 700)])
    assert net.heads.mask_roi_pool(numbers, [squares], None)[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("flags", ["", "--style vitdet --window 3", "--box_head 2fc --box_loss l1"])
def test_first_loss_is_that_of_a_guess_and_gradients_reach_everything(flags):
    net, (img, target, nothing), vitdet = model(flags), example(), "vitdet" in flags
    loss, metrics = net([img, img], [target, nothing])
    assert set(metrics) == {f"loss/{k}" for k in ("objectness", "rpn_box_reg", "class", "box", "mask")}
    assert all(v.isfinite() and v > 0 for v in metrics.values())
    assert metrics["loss/objectness"].item() == pytest.approx(math.log(2), rel=0.1)
    assert metrics["loss/class"].item() == pytest.approx(math.log(9), rel=0.1)
    assert loss.item() == pytest.approx(sum(metrics.values()).item(), rel=1e-6)
    if vitdet:  # detectron2's deviations: 0.001 of the last layer, 1 / sqrt(inputs) of fully connected ones
        assert net.heads.mask_predictor.mask_fcn_logits.weight.std().item() == pytest.approx(0.001, rel=0.2)
        assert net.heads.box_head[-2].weight.std().item() == pytest.approx((49 * 8) ** -0.5, rel=0.05)
    loss.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == ["backbone.pos_embed"][vitdet:]
    loss, metrics = net([img, img], [nothing, nothing])
    assert loss.isfinite() and metrics["loss/mask"] == metrics["loss/box"] == metrics["loss/rpn_box_reg"] == 0


def test_anchors_are_matched_as_in_mmdetection():
    iou = torch.tensor([[0.8, 0.65, 0.1, 0.10, 0.0], [0.1, 0.20, 0.4, 0.35, 0.4], [0.1, 0.10, 0.1, 0.25, 0.1],
                        [0.5, 0.60, 0.1, 0.10, 0.0]])  # instances x anchors; none is good enough for the third instance
    assert model().rpn.proposal_matcher(iou).tolist() == [0, 3, 1, -2, 1]  # -2: neither an instance's nor background
    assert model("--style vitdet").rpn.proposal_matcher(iou).tolist() == [0, 0, 1, 1, 1]  # as in detectron2


def test_box_losses_are_loops_and_the_others_torchvisions():
    torch.manual_seed(0)
    net, (img, target, _), labels, n = model(), example(), torch.tensor([0, 1, 0, 3, 2, 0, 1, 3, 0]), 9
    boxes = torch.cat((30 * torch.rand(n, 2), 40 + 20 * torch.rand(n, 2)), 1)
    true, logits, regressed = boxes + 3 * torch.randn(n, 4), torch.randn(n, 9), torch.randn(n, 36)
    offsets = net.heads.box_coder.encode_single(true, boxes)
    l1 = giou = 0
    for i in labels.nonzero()[:, 0]:
        d = regressed[i, 4 * labels[i]:4 * labels[i] + 4]
        l1 += (d - offsets[i]).abs().sum().item() / n
        moved = net.heads.box_coder.decode_single(d[None], boxes[i, None])
        giou += 10 * (1 - ops.generalized_box_iou(moved, true[i, None]).item()) / n
    for net.heads.box_loss, expected in (("l1", l1), ("giou", giou)):
        found = net.heads.box_losses(logits, regressed, boxes, labels, offsets)["box"]
        assert found.item() == pytest.approx(expected, rel=1e-4)
    args, losses = (net.pyramid(net.backbone(img[None])), [boxes], [(64, 64)], [target]), []
    for forward in (net.heads.forward, super(detect.Heads, net.heads).forward):
        torch.manual_seed(0)  # for the choice of proposals
        losses.append(forward(*args)[1])
    assert losses[0]["class"] == losses[1]["loss_classifier"] and losses[0]["mask"] == losses[1]["loss_mask"]


def test_truth_as_predictions_is_perfect_whatever_the_ids(tmp_path):
    def perfect(imgs):
        t = next(truths)
        masks = roi_heads.project_masks_on_boxes(t["masks"], t["boxes"], torch.arange(len(t["boxes"])), 28)
        return [dict(t, scores=torch.ones(len(masks)), masks=masks[:, None])]

    cfg = config(f"--scale 1 1 --eval_images 5 --out_dir {tmp_path}")
    for source in (detect.Stars("val", 64), detect.Coco(coco(tmp_path / "data"), "val")):
        truths = (dict(detect.instances(source[i][1], source.ids)) for i in range(5))
        metrics = detect.evaluate(perfect, cfg, torch.device("cpu"), torch.autocast("cpu", enabled=False), source)
        assert metrics["APb"] == pytest.approx(100) and metrics["APm"] > 60 and metrics["val_images"] == 5
    assert source.ids == [3, 7, 90] and source.classes == ["3 c3", "7 c7", "90 c90"]
    entries = json.loads((tmp_path / "results.json").read_text())
    things = json.loads((tmp_path / "data/annotations/instances_val2017.json").read_text())["annotations"][:-1]
    for a, e in zip(things, entries, strict=True):
        assert int(rle.area(e.pop("segmentation"))) == pytest.approx(a["bbox"][2] * a["bbox"][3], rel=0.2)
        assert e == dict(image_id=a["image_id"], category_id=a["category_id"], score=1, bbox=a["bbox"])
    assert len(source[4][1]["annotations"]) == 3  # with the crowd


def test_annotations_are_the_same_in_all_encodings_and_wrong_ones_are_refused():
    def read(segmentation, **change):
        good = dict(category_id=3, bbox=[1, 1, 2, 2], segmentation=segmentation)
        found = detect.usable(good | change, dict(height=9, width=301), IDS)
        return found and rle.decode(found["segmentation"])

    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.asfortranarray(rng.random((9, 301)) < rng.uniform(0.01, 0.99), np.uint8)
        runs = [0] * int(mask[0, 0]) + [len(list(run)) for _, run in itertools.groupby(mask.ravel("F"))]
        counts = rle.encode(mask)["counts"].decode()
        for form in (counts, runs):
            assert (read(dict(size=[9, 301], counts=form)) == mask).all()
        longer = rle.frPyObjects(dict(size=[9, 301], counts=[*runs, 1]), 9, 301)["counts"].decode()
        for wrong in (runs[:-1], [*runs, 1], [*runs, 9, -9], longer, counts[:-1], counts + "P"):
            assert read(dict(size=[9, 301], counts=wrong)) is None
    good = [[1, 1, 2, 2], [3, 2, 8, 2, 8, 4, 3, 4], [3, 4, 8, 4, 8, 6, 3, 6]]
    assert read(good).sum() == read(good)[2:6, 3:8].sum() == 20
    for wrong in (dict(segmentation=[[1e9, 2, 8, -1e9, 8, 4]]), dict(segmentation=[[1, 2, 3, 4]]), dict(bbox=None),
                  dict(segmentation=[["a"] * 6]), dict(bbox=[5, 5, 0, 9]), dict(bbox=[math.nan, 5, 9, 9]),
                  dict(category_id=4), dict(segmentation=dict(size=[301, 9], counts=[2709]))):
        assert read(**dict(segmentation=good) | wrong) is None


@pytest.mark.parametrize("style", ["taps", "vitdet"])
def test_samples_depend_on_their_key_alone_and_boxes_and_masks_stay_on_their_pixels(style, tmp_path):
    cfg = config(f"--style {style} --scale {'0.6 1' if style == 'taps' else '0.4 2'}")
    samples, flips, sizes, shift = detect.Scenes(detect.Coco(coco(tmp_path), "train"), cfg), set(), set(), []
    for key in itertools.product(range(12), range(6)):
        (img, target), _ = samples[key]
        (again, same), _ = samples[key]
        assert torch.equal(img, again) and all(torch.equal(target[k], same[k]) for k in target)
        sizes.add(min(img.shape[1:]))
        assert max(img.shape[1:]) <= (64 if style == "vitdet" else 106)
        for box, mask, label in zip(target["boxes"], target["masks"].bool(), target["labels"]):
            color = img[:, mask].float().mean(1)
            assert color.argmax() == label - 1 and color.max() > 150
            tight = ops.masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
            assert (box - tight).abs().max() <= (0 if style == "vitdet" else 1.01)
            shift.append((box - tight).view(2, 2).mean(0))
            flips.add((key[1], bool(target["boxes"][0, 0] > img.shape[2] / 3)))
    assert len(flips) > 6 and len(sizes) > 5
    assert torch.stack(shift).mean(0).abs().max() < 0.1  # torchvision's nearest has a quarter of a pixel
    imgs, targets, bad = samples.collate([samples[0, 0], samples[0, 1]])  # what goes through shared memory
    assert {type(x) for x in (*imgs, *targets[0].values(), *targets[1].values())} == {torch.Tensor} and bad == {}


def test_vitdet_resizes_as_pillow_does():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    source, net = detect.Stars("train", 200), model("--style vitdet")
    samples = detect.Scenes(source, config("--style vitdet --scale 0.5 1"))
    resized = [samples.sample((common.to_rgb(noise), source[0][1]), None)[0]]
    net.transform.register_forward_pre_hook(lambda module, args: resized.extend(args[0]))
    net.eval()([common.to_rgb(noise).float()])
    for x in resized:
        small = common.to_rgb(noise.resize(x.shape[1:], Image.Resampling.BILINEAR)).float()
        assert x.shape[1] < 100 and min((x - y).abs().max() for y in (small, small.flip(2))) <= 1


def test_learning_rates():
    ddae, mae, huge = (detect.Config(**detect.PRESETS[k]) for k in ("ddae", "mae", "mae_huge"))
    n = 117266 // 32  # steps of an epoch: images with instances
    for step, expected in ((0, 3e-7), (250, 1.5015e-4), (500, 3e-4), (9 * n - 1, 3e-4), (9 * n, 3e-5), (11 * n, 3e-6)):
        assert detect.learning_rate(step, n, ddae) == pytest.approx(expected, rel=1e-6)
    # 184,375 steps are 100 epochs in MAE's published run; its drops are at 163,889 and 177,546, for ViT-H at 3/4.
    for step, expected in ((163_880, 1e-4), (163_895, 1e-5), (177_535, 1e-5), (177_550, 1e-6)):
        assert detect.learning_rate(step, 1843.75, mae) == pytest.approx(expected, rel=1e-6)
        assert detect.learning_rate(step * 3 // 4, 1843.75, huge) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("style, decay", [("taps", 0.0), ("vitdet", 0.1)])  # of biases
def test_layers_and_decays_of_parameters(style, decay):
    net = model(f"--style {style} --layer_decay 0.75 --depth 12 --weight_decay 0.1 --window 3")
    groups, vit = detect.make_optimizer(net, net.cfg).param_groups, net.backbone
    found = {p: (round(math.log(g["lr_scale"], 0.75)), g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(net.parameters())) - (style == "taps") == sum(len(g["params"]) for g in groups)
    for p, expected in ((vit.patch_embed.proj.weight, (13, 0.1)), (vit.patch_embed.proj.bias, (13, decay)),
                        (vit.blocks[11].norm1.weight, (1, 0.0)), (vit.blocks[3].attn.qkv.bias, (9, decay)),
                        (net.heads.box_predictor.cls_score.bias, (0, decay))):
        assert found[p] == expected
    assert found[vit.cls_token] == (13, 0.1) if style == "taps" else found[vit.pos_embed] == (13, 0.0)


@pytest.mark.parametrize("style", ["taps", "vitdet"])
def test_resumes_bitwise_and_then_evaluates_and_predicts(style, tmp_path, monkeypatch, capsys):
    data, encoder, whole, cut = coco(tmp_path / "data"), tmp_path / "encoder.pt", tmp_path / "whole", tmp_path / "cut"
    torch.save(dict(model=ddae.ViT(32, 8, 24, 4, 2).state_dict(), config=dict(num_heads=2)), encoder)
    flags = f"--data {data} --init {encoder} --style {style} --window 3 --drop_path 0.2 --epochs 2 --lr 1e-2 --out_dir "
    main(monkeypatch, f"{flags} {whole}")
    assert "16 -> 64 patches" in capsys.readouterr().out and not torch.backends.cuda.cudnn_sdp_enabled()
    main(monkeypatch, f"{flags} {cut} --max_steps 3")
    encoder.unlink()  # resuming does not need it
    main(monkeypatch, f"{flags} {cut}")
    assert not differences(whole, cut) and log(whole)[-1]["step"] == 6 and log(whole)[-1]["val_images"] == 5
    capsys.readouterr()
    main(monkeypatch, f"--data {data} --out_dir {whole} --eval --img_size 640 --embed_dim 40")
    assert f"APb {log(whole)[-1]['APb']:.6g}" in capsys.readouterr().out
    Image.new("RGB", (70, 45), (200, 30, 30)).save(tmp_path / "photo.jpg")
    main(monkeypatch, f"--predict {tmp_path}/photo.jpg --init {whole}/model.pt")
    assert Image.open(whole / "photo_detected.png").size == (1244, 800)
    edit(data, lambda f: f["categories"][0].update(id=4), "val")
    with pytest.raises(SystemExit, match="4 c90"):  # another category id under the same name
        main(monkeypatch, f"--data {data} --out_dir {whole} --eval")


def test_two_processes_evaluate_like_one_on_an_odd_number_of_images(tmp_path, monkeypatch):
    data, out = coco(tmp_path / "data"), tmp_path / "out"
    assert Run(f"{TINY} --data {data} --out_dir {out} --lr 1e-2", 2, path=ROOT / "transfer/detect.py").wait() == [0, 0]
    trained = (out / "results.json").read_text()
    main(monkeypatch, f"--data {data} --out_dir {out} --eval")
    assert trained == (out / "results.json").read_text() and len(json.loads(trained)) > 9


def test_bad_images_are_skipped_counted_and_limited_and_bad_files_refused(tmp_path, monkeypatch, capfd):
    root = coco(tmp_path / "data")
    (root / "val2017/2.png").write_bytes((root / "val2017/2.png").read_bytes()[:60])
    (root / "train2017/0.png").unlink()
    Image.new("RGB", (9, 9)).save(root / "train2017/1.png")
    Image.new("RGB", (5000, 1)).save(root / "train2017/2.png")
    edit(root, lambda f: f["images"][2].update(height=1, width=5000))
    edit(root, lambda f: f["annotations"][4].update(bbox=[0, 0, 9, 1], segmentation=[[0, 0, 9, 0, 9, 1, 0, 1]]))
    edit(root, lambda f: f["annotations"].extend(dict(f["annotations"][12], image_id=i) for i in (5, 103)))
    flags = f"--data {root} --out_dir {tmp_path / 'out'}"
    main(monkeypatch, f"{flags} --max_bad 0.5")
    out = capfd.readouterr().out
    for name in ("val2017/2.png: OSError", "train2017/0.png: FileNotFoundError", "train2017/1.png: ValueError: (9, 9)",
                 "train2017/2.png: ValueError: (5000, 1)", "val_images 4", "warning: 2 of 15 annotations"):
        assert name in out
    with pytest.raises(SystemExit, match="1 of 5 images are unreadable"):
        main(monkeypatch, f"{flags} --eval")
    edit(root, lambda f: [a.update(iscrowd=1) for a in f["annotations"] if a["image_id"] == 104])
    assert len(detect.Coco(root, "train")) == 5  # nothing but crowds is nothing to train on
    for split, says, change in (("train", "different classes", lambda f: f["categories"][0].update(name="other")),
                                ("train", "KeyError: 'id'", lambda f: f["images"][0].pop("id")),
                                ("val", "no image has a usable instance", lambda f: f["annotations"].clear())):
        edit(root, change, split)
        with pytest.raises(SystemExit, match=f"^[^\n]*{says}[^\n]*$"):
            main(monkeypatch, f"{flags} --eval_every 0")
