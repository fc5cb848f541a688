"""Videos against independent oracles: loops over tubes and views, timm's blocks, frames that show their own numbers."""
import argparse
import math
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, Run, differences, log, steps
from PIL import Image

import common
import videomae
import videos
from transfer import video

SMALL = dict(img_size=16, patch_size=4, num_frames=6, stride=2, embed_dim=24, depth=6, num_heads=2, decoder_dim=16,
             decoder_heads=2, decoder_depth=1, mask_ratio=0.7, device="cpu", num_workers=0)


def make(**options):
    torch.manual_seed(0)
    model = videomae.VideoMAE(videomae.Config(**SMALL | options))
    with torch.no_grad():
        for p in model.parameters():  # zero biases and unit norms would hide mistakes
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    ids = [torch.from_numpy(videomae.draw_mask(np.random.default_rng(i), model.cfg)) for i in range(2)]
    return model, torch.randn(2, 6, 3, 16, 16), torch.stack(ids)


# --- the method -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_equals_a_loop_over_tubes(norm_pix):
    model, clips, ids = make(norm_pix=norm_pix)
    loss, metrics = model(clips, ids)
    outputs, total = model.encoder(clips, ids[:, :15]), 0  # 16 - int(11.2) = 5 places at 3 times
    assert outputs[-1].shape == (2, 15, 24)
    for g, decoder in zip((3, 4, 5, 6), model.decoders, strict=True):
        latent, errors = model.encoder.norm(outputs[5]) if g == 6 else outputs[g - 1], []
        for b in range(2):
            order = {n: i for i, n in enumerate(ids[b].tolist())}
            tokens = torch.empty(48, 16)  # in the clip's order
            for n in range(48):
                visible = order[n] < 15
                tokens[n] = decoder.encoder_to_decoder(latent[b, order[n]]) if visible else decoder.mask_token[0, 0]
            pred = decoder.head(decoder.norm(decoder.blocks[0]((tokens + decoder.pos_embed[0]).unsqueeze(0))))[0]
            for n in ids[b, 15:].tolist():
                t, y, x = n // 16 * 2, n % 16 // 4 * 4, n % 4 * 4
                for c in range(3):
                    values = clips[b, t:t + 2, c, y:y + 4, x:x + 4].flatten()  # by frame, row, column
                    target = values * common.STD[c] + common.MEAN[c]  # between 0 and 1
                    if norm_pix:
                        target = (target - target.mean()) / (target.std() + 1e-6)
                    errors.append((pred[n].view(32, 3)[:, c] - target).square().mean())
        error = torch.stack(errors).mean()
        assert metrics[f"pixel/{g}"].item() == pytest.approx(error.item(), rel=1e-5)
        total += error.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_vit_is_a_convolution_and_timms_blocks():
    model, clips, _ = make()
    encoder = model.encoder
    x = encoder.patch_embed.proj(clips.transpose(1, 2)).flatten(2).transpose(1, 2) + encoder.pos_embed
    for block, output in zip(encoder.blocks, encoder(clips), strict=True):
        weights = {k: v for k, v in block.state_dict().items() if not k.endswith(("q_bias", "v_bias"))}
        q, v = block.attn.q_bias, block.attn.v_bias
        other = timm.models.vision_transformer.Block(24, 2, qkv_bias=True)
        other.norm1.eps = other.norm2.eps = 1e-6
        other.load_state_dict(weights | {"attn.qkv.bias": torch.cat((q, torch.zeros(24), v))})
        x = other(x)
        torch.testing.assert_close(output, x, atol=1e-5, rtol=1e-5)
    tubes = videomae.patchify(clips, 2, 4)
    torch.testing.assert_close(videomae.unpatchify(tubes, 2, 4, encoder.grid), clips)


def test_position_table_has_the_closed_form():
    table = videomae.sine_pos_embed(768, 1568)[0]
    for n, j in [(0, 0), (1, 0), (1567, 1), (700, 2), (700, 3), (1200, 766), (1200, 767)]:
        wave = (math.cos if j % 2 else math.sin)(n / 10000 ** (j // 2 * 2 / 768))
        assert table[n, j].item() == pytest.approx(wave, abs=1e-6)


def test_parameter_counts():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        one, four = (videomae.VideoMAE(videomae.Config(taps=taps)) for taps in ((12,), ()))
    assert (count(one), count(one.encoder), four.taps) == (94_210_944, 86_227_200, [6, 8, 10, 12])  # the official model
    assert count(four) == 94_210_944 + 3 * (94_210_944 - 86_227_200)
    names = set(one.encoder.state_dict())
    assert {"patch_embed.proj.weight", "blocks.11.attn.q_bias", "blocks.0.attn.v_bias", "norm.bias"} < names
    assert not any("pos_embed" in name or "qkv.bias" in name for name in one.state_dict())


def test_masks_are_tubes():
    cfg = videomae.Config()
    masks = [videomae.draw_mask(np.random.default_rng(seed), cfg) for seed in range(3)]
    for ids in masks:
        hidden = np.ones(1568, bool)
        hidden[ids[:160]] = False
        hidden = hidden.reshape(8, 196)
        assert (hidden == hidden[0]).all() and hidden[0].sum() == 176 and (np.sort(ids) == np.arange(1568)).all()
    assert cfg.num_keep == 160 and (masks[0] != masks[1]).any()


def test_crops_are_those_of_the_code(monkeypatch):
    cfg, boxes = videomae.Config(img_size=8, patch_size=4), []
    crop = videomae.v2.functional.resized_crop
    monkeypatch.setattr(videomae.v2.functional, "resized_crop",
                        lambda clip, *box: boxes.append(tuple(map(int, box[:4]))) or crop(clip, *box))
    for seed in range(2000):
        clip = videomae.multi_scale_crop(torch.zeros(2, 3, 32, 44, dtype=torch.uint8), cfg, np.random.default_rng(seed))
        assert clip.shape == (2, 3, 8, 8)
    expected = set()
    for i, h in enumerate((32, 28, 24, 21)):
        for j, w in enumerate((32, 28, 24, 21)):
            if abs(i - j) <= 1:
                dy, dx = (32 - h) // 4, (44 - w) // 4
                for y, x in ((0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4), (4, 0), (4, 2), (4, 4), (1, 1), (1, 3),
                             (3, 1), (3, 3)):
                    expected.add((y * dy, x * dx, h, w))
    assert set(boxes) == expected


# --- reading ----------------------------------------------------------------------------------------------------------

def write(path, n, codec="libx264", gop=12):
    """A video of n frames that show their own number in eight vertical bars, black or white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, 2
        for i in range(n):
            bars = np.repeat([255 * (i >> b & 1) for b in range(8)], 8).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.broadcast_to(bars[:, None], (48, 64, 3)).copy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def numbers(clip):
    means = clip.float().mean((1, 2)).unflatten(1, (8, 8))[:, :, 2:6].mean(2)  # (T, 8)
    return ((means > 127) * 2 ** torch.arange(8)).sum(1).tolist()


FORMATS = [("a.mp4", "libx264", 12), ("one.mp4", "libx264", 250), ("b.webm", "libvpx-vp9", 20), ("c.avi", "mpeg4", 12),
           ("d.avi", "libx264", 12), ("e.mkv", "libx264", 12), ("f.ts", "libx264", 12), ("g.mpg", "mpeg2video", 12)]


@pytest.mark.parametrize("name, codec, gop", FORMATS)
def test_frames_come_back_right(name, codec, gop, tmp_path):
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV is without {codec}")
    write(tmp_path / name, 100, codec, gop)
    for stride in (1, 2, 4):
        for start in (0, 13, 37, 99 - 15 * stride):
            clip = videos.decode(str(tmp_path / name), lambda n: videos.clip_ids(n, start, 16, stride))
            assert clip.dtype == torch.uint8 and numbers(clip) == list(range(start, start + 16 * stride, stride))
    assert numbers(videos.decode(str(tmp_path / name), lambda n: [n - 1, 5, 5, 60])) == [99, 5, 5, 60]


def test_a_short_video_repeats_its_last_frame(tmp_path):
    write(tmp_path / "short.mp4", 10)
    clip = videos.decode(str(tmp_path / "short.mp4"), lambda n: videos.clip_ids(n, 0, 6, 4))
    assert numbers(clip) == [0, 4, 8, 8, 8, 8]
    write(tmp_path / "one.mp4", 1)
    assert numbers(videos.decode(str(tmp_path / "one.mp4"), lambda n: videos.clip_ids(n, 0, 4, 2))) == [0] * 4


def test_only_what_is_near_is_decoded(tmp_path, monkeypatch):
    write(tmp_path / "long.mp4", 240, gop=12)
    decoded, plain = [], enumerate
    counting = lambda frames: plain(decoded.append(0) or frame for frame in frames)
    monkeypatch.setattr(videos, "enumerate", counting, raising=False)
    videos.decode(str(tmp_path / "long.mp4"), lambda n: [100, 104, 230])
    assert len(decoded) <= 5 + 4 + 12


@pytest.fixture
def folder(tmp_path):
    """Two classes of videos and of folders of frames, in train/ and val/, and things that are none."""
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label / "frames").mkdir(parents=True)
            for i in range(12):
                shade = Image.new("RGB", (24, 18), (20 * i, 0, 0))
                shade.save(tmp_path / split / label / "frames" / f"{i + 1}.png")
            for i in range(3):
                write(tmp_path / split / label / f"{i}.mp4", 20 + i)
        (tmp_path / split / ".hidden").mkdir()
        write(tmp_path / split / ".hidden" / "no.mp4", 2)
        (tmp_path / split / "readme.txt").write_text("no")
    return tmp_path


def test_folders(folder):
    source = videos.Videos(folder / "train")
    assert source.classes == ["cat", "dog"] and len(source) == 8
    assert [label for _, label in source.samples] == [0] * 4 + [1] * 4
    clip, label = source.read(3, lambda n: [0, 8, n - 1])  # names 1, 9, 12: by number, not by letter
    assert clip.shape == (3, 3, 18, 24) and clip[:, 0, 0, 0].tolist() == [0, 160, 220] and label == 0
    assert videos.Videos(folder / "train" / "cat").classes == [""]
    assert len(videos.Videos(folder / "train" / "cat")) == 4


def test_one_frame_does_not_tell_the_motion():
    source, frames = videos.Motions("train", 16), [[] for _ in range(8)]
    for i in range(1600):
        clip, label = source.read(i, lambda n: [0, 30])
        assert label == i % 8
        frames[label].append(clip.float().flatten(1))
    means = torch.stack([torch.stack(f).mean(0) for f in frames])  # (8, 2, P)
    noise = torch.stack([torch.stack(f).std(0) for f in frames]).mean() / 200 ** 0.5
    assert (means - means.mean(0)).std() < 1.3 * noise
    assert torch.equal(source.read(7, lambda n: [30])[0][0].float().flatten(), frames[7][0][1])


# --- runs -------------------------------------------------------------------------------------------------------------

def run(main, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *flags.split()])
    main()
    return capsys.readouterr().out


TUNE = "--preset quick --device cpu --num_workers 0 --log_every 1 --save_every 0 --epochs 2 --batch_size 4 " \
       "--base_lr 1 --img_size 16 --patch_size 4 --num_frames 4 --stride 2 --embed_dim 16 --depth 2 --num_heads 2 " \
       "--mixup 0.8 --cutmix 1 --rand_augment 7 --erase 0.5 --repeats 2 --drop_path 0.1"


def test_tuning_resumes_bitwise_and_counts_broken_videos(folder, tmp_path, monkeypatch, capsys):
    (folder / "train" / "cat" / "1.mp4").write_bytes((folder / "train" / "cat" / "1.mp4").read_bytes()[:700])
    flags = f"{TUNE} --data {folder} --max_bad 0.2 --out_dir {tmp_path}"
    out = run(video.main, f"{flags}/whole", monkeypatch, capsys)
    assert "unreadable" in out and "1.mp4: InvalidDataError" in out
    for stop in (1, 3, 4):
        run(video.main, f"{flags}/cut --max_steps {stop}", monkeypatch, capsys)
    assert differences(tmp_path / "whole", tmp_path / "cut") == [] and steps(tmp_path / "cut") == [1, 2, 3, 4]
    assert log(tmp_path / "cut")[-1]["val_videos"] == 8 and log(tmp_path / "cut")[-2]["unreadable"] == 1


def test_all_frames_are_augmented_alike():
    frame = torch.randint(0, 256, (3, 24, 30), dtype=torch.uint8)
    cfg = video.Config(img_size=16, rand_augment=7, erase=0.5, repeats=8)
    copies, labels = video.Samples(None, cfg).sample((frame.expand(4, -1, -1, -1), 2), None)
    assert copies.shape == (8, 4, 3, 16, 16) and (copies == copies[:, :1]).all() and labels.tolist() == [2] * 8
    assert len({copy.numpy().tobytes() for copy in copies}) == 8


def test_processes_change_nothing(folder, tmp_path):
    def start(script, flags, processes, out):
        job = Run(f"{flags} --data {folder} --out_dir {tmp_path / out}", processes, path=ROOT / script)
        assert not any(job.wait()), job.output()
        return job.output().splitlines()[-1]

    tune = f"{TUNE} --mixup 0 --cutmix 0 --drop_path 0"  # which are random by process
    pretrain = f"{TUNE.split('--mixup')[0]} --epochs 1 --warmup_epochs 0 --decoder_dim 16 --eval_every 1"
    test = f"--eval --init {tmp_path}/1video/model.pt --device cpu --num_workers 0 --clips 2"
    for script, flags in (("transfer/video.py", tune), ("videomae.py", pretrain)):
        for n in (1, 2):
            start(script, flags, n, f"{n}{Path(script).stem}")
        for a, b in zip(*(log(tmp_path / f"{n}{Path(script).stem}") for n in (1, 2)), strict=True):
            assert a == pytest.approx(b, rel=1e-3)
    one, two = (start("transfer/video.py", test, n, "eval").split() for n in (1, 2))
    assert one[:4] == two[:4] and one[6:] == two[6:] == ["val_videos", "8"]
    assert float(one[5]) == pytest.approx(float(two[5]), rel=1e-5)


@torch.no_grad()
def test_views_and_their_average_equal_a_loop(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        for k, length in enumerate((50, 9, 21)):
            (tmp_path / "val" / label / str(k)).mkdir(parents=True)
            for i in range(length):
                pixels = rng.integers(0, 256, (16, 23, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "val" / label / str(k) / f"{i:03}.png")
    cfg = video.Config(data=str(tmp_path), device="cpu", num_workers=0, img_size=16, patch_size=4, num_frames=4,
                       tubelet_size=2, stride=3, embed_dim=16, depth=2, num_heads=2)
    torch.manual_seed(0)
    model = video.VideoClassifier(cfg, 2).eval()
    torch.nn.init.normal_(model.head.weight)
    source, right, loss = videos.open_data(cfg, "val"), 0, 0
    found = video.evaluate(model, cfg, torch.device("cpu"), torch.autocast("cpu", enabled=False), None, 5, 3)
    for path, label in source.samples:
        frames = [np.asarray(Image.open(file)) for file in sorted(Path(path).iterdir())][::3]
        frames += [frames[-1]] * (4 - len(frames))
        total = 0
        for k in range(5):
            first = int(k * (len(frames) - 4) / 4)
            for left in (0, 3, 7):
                clip = torch.from_numpy(np.stack(frames[first:first + 4])[:, :, left:left + 16]).permute(0, 3, 1, 2)
                clip = (clip / 255 - torch.tensor(common.MEAN).view(3, 1, 1)) / torch.tensor(common.STD).view(3, 1, 1)
                total = total + model.logits(clip.unsqueeze(0))[0].softmax(0) / 15
        right, loss = right + (total.argmax() == label).item(), loss - total[label].log().item()
    assert found["acc1"] == pytest.approx(100 * right / 6) and found["val_videos"] == 6
    assert found["val_loss"] == pytest.approx(loss / 6, rel=1e-5)


def test_files_of_videomae_load(tmp_path, monkeypatch, capsys):
    model, clips, _ = make()
    weights = {f"encoder.{k}": v for k, v in model.encoder.state_dict().items()} | {"mask_token": torch.zeros(1)}
    torch.save(dict(model=weights, args=argparse.Namespace(lr=1.0), epoch=799), tmp_path / "pretrained.pth")
    sizes = dict(img_size=16, num_frames=6, num_heads=2, device="cpu", num_workers=0)
    cfg, found, classes = video.settle(video.Config(init=str(tmp_path / "pretrained.pth"), **sizes))
    assert (cfg.patch_size, cfg.tubelet_size, cfg.embed_dim, cfg.depth, classes) == (4, 2, 24, 6, [])
    tuned = video.build(cfg, found, 5).eval()
    tokens = model.encoder(clips)[-1].mean(1)
    torch.testing.assert_close(tuned.logits(clips), tuned.head(tuned.fc_norm(tokens)))
    torch.save(dict(module=tuned.state_dict()), tmp_path / "tuned.pth")
    cfg, found, _ = video.settle(video.Config(init=str(tmp_path / "tuned.pth"), eval=True, **sizes))
    torch.testing.assert_close(video.build(cfg, found, 5).eval().logits(clips), tuned.logits(clips))
    torch.save(dict(model={"cls_token": torch.zeros(1, 1, 8)}), tmp_path / "images.pth")
    with pytest.raises(SystemExit, match="holds no encoder of videos"):
        video.settle(video.Config(init=str(tmp_path / "images.pth")))
