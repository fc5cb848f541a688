"""
Clips of videos: from files that PyAV decodes, from folders of frames, or generated, with the kind of motion as label.

Clips are uint8 (T, 3, H, W), torchvision's layout, whose transforms treat all frames alike. A data set here has
read(i, pick) -> clip, label; pick(n) -> numbers of the wanted frames, of n that the video has.
"""
import bisect
import math
import os
import sys
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import has_file_allowed_extension, is_image_file
from torchvision.transforms import v2

import common

ENDINGS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")


# --- data sets --------------------------------------------------------------------------------------------------------

class Motions:
    """Generated videos of a wallpaper of discs. The label is the kind of motion, which no single frame tells.

    Height, place across, and size are cyclic, with a random phase: all frames and classes are alike in them.
    """
    kinds = {"still": (0, 0, 0), "up": (-1, 0, 0), "down": (1, 0, 0), "sideways": (0, 1, 0), "rise": (-1, 1, 0),
             "fall": (1, 1, 0), "grow": (0, 0, 1), "shrink": (0, 0, -1)}  # direction of height, place across, and size
    classes, frames = list(kinds), 48  # frames of each video

    def __init__(self, split, size):
        self.split, self.size = split, size

    def __len__(self):
        return 4000 if self.split == "train" else 1000

    def read(self, i, pick):
        rng, S, label = np.random.default_rng((self.split == "val", i)), self.size, i % len(self.classes)
        speed = rng.uniform(0.03, 0.05, 3) * (1, rng.choice((-1, 1)), 1)  # cycles per frame; sideways is either way
        motion = np.asarray(pick(self.frames))[:, None] * speed * self.kinds[self.classes[label]]
        y, x, size = (rng.uniform(0, 1, 3) + motion).T[:, :, None, None]  # (T, 1, 1) each
        pixels = 2 * (np.arange(S) + 0.5) / S  # 2 x 2 discs
        away = np.hypot((pixels[:, None] - y) % 1 - 0.5, (pixels - x) % 1 - 0.5)  # (T, S, S), from the disc's center
        disc = ((0.2 + 0.2 * (size % 1) - away) * 4 + 0.5).clip(0, 1)  # blurred
        ground, color = rng.uniform(0, 0.5, 3), rng.uniform(0.5, 1, 3)
        clip = (255 * (ground + (color - ground) * disc[..., None])).round().astype(np.uint8)
        return torch.from_numpy(clip).permute(0, 3, 1, 2), label


class Videos:
    """Video files and folders of frames, in class folders; without class folders unlabeled, with `classes` [""]."""

    def __init__(self, root):
        found = []
        for folder, folders, files in os.walk(root, followlinks=True):
            folders[:], files = ([name for name in names if name[0] != "."] for names in (folders, files))
            if any(is_image_file(name) for name in files):
                found.append(folder)
            found += [os.path.join(folder, name) for name in files if has_file_allowed_extension(name, ENDINGS)]
        parts = {path: Path(path).relative_to(root).parts for path in sorted(found)}
        self.classes = sorted({p[0] for p in parts.values() if len(p) > 1}) or [""]
        self.samples = [(path, self.classes.index(p[0]) if len(p) > 1 else 0) for path, p in parts.items()
                        if len(p) > 1 or self.classes == [""]]

    def __len__(self):
        return len(self.samples)

    def read(self, i, pick):
        path, label = self.samples[i]
        return (read_folder if os.path.isdir(path) else decode)(path, pick), label


def open_data(cfg, split):
    """Data set for `split`, "train" or "val"."""
    if cfg.data == "motions":
        return Motions(split, cfg.img_size)
    path = Path(cfg.data)
    path = path / split if split == "val" or (path / split).is_dir() else path
    source = Videos(path)
    if not len(source):
        sys.exit(f"--data {path.absolute()} holds no videos (.mp4, .webm, .avi, ...) and no folders of frames")
    return source


# --- reading ----------------------------------------------------------------------------------------------------------

def read_folder(path, pick):
    """Frames are in the order of their names; shorter names come first, so that 9.jpg is before 10.jpg."""
    names = [name for name in os.listdir(path) if is_image_file(name) and name[0] != "."]
    names.sort(key=lambda name: (len(name), name))
    return torch.stack([common.to_rgb(Image.open(os.path.join(path, names[n]))) for n in pick(len(names))])


def decode(path, pick, seek=True):
    """Frames of a video file. Reads the times of all frames, then decodes from the keyframe before a wanted one."""
    with av.open(path) as container:
        packets = container.demux(container.streams.video[0])
        packets = [(p.pts, p.is_keyframe) for p in packets if p.size and not p.is_discard]
        timed = container.format.name != "avi" and all(time is not None for time, _ in packets)  # AVI has wrong times
    times = sorted(time for time, _ in packets) if timed else range(len(packets))
    keys = sorted(time for time, key in packets if key) if timed else [0]
    ids, images, at = list(pick(len(times))), {}, -math.inf
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # there are data workers enough
        frames = enumerate(container.decode(stream))
        for n in sorted(set(ids)):
            key = keys[bisect.bisect(keys, times[n]) - 1]
            if seek and key > max(at, keys[0]):
                container.seek(key, stream=stream)
                frames = enumerate(container.decode(stream))
            for count, frame in frames:
                at = frame.pts if timed else count
                if at >= times[n]:
                    break
            if timed and at != times[n]:
                if seek:  # some formats do not seek exactly
                    return decode(path, lambda n: ids, seek=False)
                raise ValueError(f"frame {n} of {len(times)} is missing")
            images[n] = frame.to_ndarray(format="rgb24")
    return torch.from_numpy(np.stack([images[n] for n in ids])).permute(0, 3, 1, 2)


# --- clips and views --------------------------------------------------------------------------------------------------

def clip_ids(n, start, num_frames, stride):
    """Numbers of a clip's frames in a video of n. The last of them that the video has is repeated if it ends early."""
    return [start + stride * min(t, (n - 1 - start) // stride) for t in range(num_frames)]


def read_views(source, cfg, clips, crops, i):
    """Evenly spread clips and, along the longer side, square crops; one is from the middle -> (clips * crops, T, 3, S,
    S) with all crops of a clip in a row, label, i."""
    def starts(length, count):
        return [length // 2] if count == 1 else [int(k * length / (count - 1)) for k in range(count)]

    def pick(n):
        sampled = -(-n // cfg.stride)  # frames 0, stride, 2 * stride, ...
        first = starts(max(0, sampled - cfg.num_frames), clips)
        return [number for k in first for number in clip_ids(n, k * cfg.stride, cfg.num_frames, cfg.stride)]

    frames, label = source.read(i, pick)
    S = cfg.img_size
    frames = v2.functional.resize(frames, S, v2.InterpolationMode.BILINEAR)  # the shorter side
    H, W = frames.shape[-2:]
    places = zip(starts(H - S, crops), starts(W - S, crops))
    views = torch.stack([frames[..., top:top + S, left:left + S] for top, left in places], 1)  # (clips * T, crops, ...)
    return views.unflatten(0, (clips, -1)).transpose(1, 2).flatten(0, 1), label, i
