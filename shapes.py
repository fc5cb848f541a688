"""
Generated pictures for trying everything without data: one to three stars on a smooth ground, the same on every machine.

The label is the kind of the largest star, which is drawn first. Kinds differ in the number of spikes, color, and
stripes; sizes, places, angles, ground, and light are random. Segmentation and detection also get each star's mask.
"""
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import zoom


class Shapes:
    """Data set [i] -> PIL image, label; split: "train" or "val", size: pixels per side."""
    classes = [f"{spikes} spikes" for spikes in range(3, 11)]

    def __init__(self, split, size):
        self.split, self.size = split, size

    def __len__(self):
        return 10000 if self.split == "train" else 2000

    def __getitem__(self, i):
        image, _, labels = self.scene(i)
        return Image.fromarray(image), labels[0]

    def scene(self, i):
        """-> image uint8 (S, S, 3), visible part of each star bool (n, S, S), list of n labels."""
        rng, S, masks, labels = np.random.default_rng((self.split == "val", i)), self.size, [], []
        image = zoom(rng.uniform(0, 1, (4, 4, 3)), (S / 4, S / 4, 1), order=1)
        for radius in (rng.uniform(0.3, 0.45), *rng.uniform(0.1, 0.15, rng.integers(3))):
            label, center = int(rng.integers(8)), rng.uniform(radius, 1 - radius, 2)
            corners = 2 * (label + 3)
            angles = rng.uniform(0, 2 * math.pi) + 2 * math.pi * np.arange(corners) / corners
            radii = np.where(np.arange(corners) % 2, radius / 2, radius)
            points = S * (center + radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), 1))
            drawn = Image.new("1", (S, S))
            ImageDraw.Draw(drawn).polygon([*map(tuple, points)], fill=1)
            star = np.array(drawn)
            hue = label / 8 + rng.uniform(-0.04, 0.04) + np.arange(3) / 3
            stripes = 0.7 + 0.3 * np.sin((8 + 4 * label) * np.arange(S) / S)
            color = stripes[:, None, None] * (0.5 + 0.4 * np.cos(2 * math.pi * hue))  # (S, 1, 3)
            image = np.where(star[..., None], color, image)
            masks, labels = [m & ~star for m in masks] + [star], labels + [label]
        light = rng.uniform(0.5, 1.2) * rng.uniform(0.7, 1.3, 3)
        return (255 * light * image).clip(0, 255).astype(np.uint8), np.stack(masks), labels


class LabeledShapes(Shapes):
    """For segmentation: [i] -> PIL image, label uint8 (S, S). The ground is a class, so every pixel has a label."""
    classes = ["ground", *Shapes.classes]

    def __getitem__(self, i):
        image, masks, labels = self.scene(i)
        label = np.zeros(image.shape[:2], np.uint8)
        for mask, k in zip(masks, labels):
            label[mask] = 1 + k
        return Image.fromarray(image), torch.from_numpy(label)
