"""
Augmentation of images for fine-tuning: RandAugment and random erasing as in timm, and the crop of MAE's linear probe.
"""
import math

import torch
import torch.nn as nn
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import v2

import common


class FirstCrop(common.Crop):
    """Takes the first draw, cut to the image; torchvision draws again until one fits. [code: MAE, BYOL]"""

    def make_params(self, inputs):
        H, W = v2.query_size(inputs)
        area = H * W * torch.empty(()).uniform_(*self.scale).item()
        ratio = math.exp(torch.empty(()).uniform_(*map(math.log, self.ratio)).item())
        h, w = min(H, round(math.sqrt(area / ratio))), min(W, round(math.sqrt(area * ratio)))
        return dict(top=int(torch.randint(H - h + 1, ())), left=int(torch.randint(W - w + 1, ())), height=h, width=w)


FILL = tuple(round(255 * m) for m in common.MEAN)


def affine(img, *matrix):
    return img.transform(img.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


OPERATIONS = {  # on a PIL image, at level x in [0, 1]; s is x or -x
    "AutoContrast": lambda img, x, s: ImageOps.autocontrast(img),
    "Equalize": lambda img, x, s: ImageOps.equalize(img),
    "Invert": lambda img, x, s: ImageOps.invert(img),
    "Rotate": lambda img, x, s: img.rotate(30 * s, Image.Resampling.BICUBIC, fillcolor=FILL),
    "Posterize": lambda img, x, s: img.point(3 * [v & -(16 << int(4 * x)) for v in range(256)]),  # at x = 1 black
    "Solarize": lambda img, x, s: ImageOps.solarize(img, 256 - int(256 * x)),
    "SolarizeAdd": lambda img, x, s: img.point(3 * [min(255, v + int(110 * x)) if v < 128 else v for v in range(256)]),
    "Color": lambda img, x, s: ImageEnhance.Color(img).enhance(1 + 0.9 * s),
    "Contrast": lambda img, x, s: ImageEnhance.Contrast(img).enhance(1 + 0.9 * s),
    "Brightness": lambda img, x, s: ImageEnhance.Brightness(img).enhance(1 + 0.9 * s),
    "Sharpness": lambda img, x, s: ImageEnhance.Sharpness(img).enhance(1 + 0.9 * s),
    "ShearX": lambda img, x, s: affine(img, 1, 0.3 * s, 0, 0, 1, 0),
    "ShearY": lambda img, x, s: affine(img, 1, 0, 0, 0.3 * s, 1, 0),
    "TranslateX": lambda img, x, s: affine(img, 1, 0, 0.45 * s * img.width, 0, 1, 0),
    "TranslateY": lambda img, x, s: affine(img, 1, 0, 0, 0, 1, 0.45 * s * img.height),
}


class RandAugment(nn.Module):
    """timm's rand-m9-mstd0.5-inc1: twice, with probability 1/2, a random operation at magnitude 9 +- 0.5 of 10.

    torchvision's has weaker operations and no noise on the magnitude.
    """

    def __init__(self, magnitude):
        super().__init__()
        self.magnitude = magnitude

    def forward(self, img):  # uint8 (3, H, W)
        img = v2.functional.to_pil_image(img)
        for name in torch.randint(len(OPERATIONS), (2,)).tolist():
            applied, negative = (torch.rand(2) < 0.5).tolist()
            x = torch.normal(self.magnitude, 0.5, ()).clamp(0, 10).item() / 10
            if applied:
                img = list(OPERATIONS.values())[name](img, x, -x if negative else x)
        return v2.functional.pil_to_tensor(img)


class Erase(nn.Module):
    """Random erasing of uint8 images. Noise as in MAE, of deviation 1 after normalization, but clipped to 0 and 255."""

    def __init__(self, p):
        super().__init__()
        self.erase = v2.RandomErasing(p, value="random")

    def forward(self, img):  # (3, H, W)
        mean, std = common.mean_std(img.device)
        x = (img.float() / 255 - mean) / std
        erased = self.erase(x)
        if erased is x:
            return img
        return ((erased * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
