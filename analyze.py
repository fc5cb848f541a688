"""
Pictures. So far the one that training draws, preview.png.
"""
import numpy as np
import torch
from matplotlib.figure import Figure

import common


def save_preview(model, samples, device, autocast, path):
    """Draw what `model.preview` says of six images spread over the training set."""
    imgs, draws, _ = samples.collate([samples[0, i * len(samples.source) // 6] for i in range(6)])
    model.eval()
    with torch.no_grad(), autocast:
        panels = model.preview(*common.to_device(imgs, draws, device))
    model.train()
    draw_panels(panels, path)


def draw_panels(panels, path):
    """Table of pictures, a row per image and a column per panel. Panels are as in the contract of common.py.

    Features become colors by the first three principal components of the first panel that has as many features.
    """
    rows, colors = len(next(iter(panels.values()))), {}
    figure = Figure((1.5 * len(panels), 1.5 * rows + 0.5), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(rows, len(panels), squeeze=False).T, panels.items()):
        panel = panel.double().cpu().numpy()
        if panel.ndim == 4 and panel.shape[1] == 3:
            panel = (panel.transpose(0, 2, 3, 1) * common.STD + common.MEAN).clip(0, 1)
        elif panel.ndim == 4:
            shown, D = panel.any(-1, keepdims=True), panel.shape[-1]
            if D not in colors:
                x = panel[shown[..., 0]]
                directions = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3].T  # (D, 3)
                colors[D] = x.mean(0), directions, *np.quantile((x - x.mean(0)) @ directions, (0.02, 0.98), axis=0)
            mean, directions, low, high = colors[D]
            panel = np.where(shown, (((panel - mean) @ directions - low) / (high - low + 1e-6)).clip(0, 1), 1)
        for ax, picture in zip(axes, panel):
            picture = picture if picture.ndim == 3 else np.ma.masked_equal(picture, 0)
            drawn = ax.imshow(picture, vmin=0, vmax=panel.max())
            ax.set_axis_off()
        axes[0].set_title(title, fontsize=9)
        if panel.ndim == 3:
            figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.9, aspect=12)
    figure.savefig(path, dpi=110)
