"""
What training shows of a model besides its loss: kNN accuracy and validation loss (--eval_every), and preview.png.
The reading of images for evaluation, which finetune.py, transfer/, and analyze.py share, is here as well.
"""
import functools
import sys
from collections import ChainMap
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import InterpolationMode, v2

import common


# --- reading images ---------------------------------------------------------------------------------------------------

def read_center(source, cfg, i):
    """Resize the shorter side to img_size / crop_pct and cut out the center -> uint8 (3, S, S), label, i."""
    image, label = source[i]
    side = [round(cfg.img_size / getattr(cfg, "crop_pct", 1.0))]  # pretraining does not crop
    image = v2.functional.resize(common.to_rgb(image), side, InterpolationMode.BICUBIC)
    return v2.functional.center_crop(image, [cfg.img_size]), label, i


class Attempt(Dataset):
    """[i] -> read(i) and {}, or None and {file: reason}."""

    def __init__(self, read, source):
        self.read, self.source = read, source

    def __getitem__(self, i):
        try:
            return self.read(i), {}
        except Exception as error:  # broken files raise nearly anything
            return None, {common.name_of(self.source, i): f"{type(error).__name__}: {error}"}


def read_each(read, source, ids, cfg, batch_size=100, collate=list, bad=None):
    """Yield collate([read(i), ...]) for this process's share of `ids`; all must exhaust it.

    bad: gets broken files, name -> reason; None: they are named and limited at the end, in all processes together.
    """
    def stack(pairs):  # in the worker: a batch is one tensor to send, not a hundred
        items = [item for item, broken in pairs if not broken]
        return collate(items) if items else None, dict(ChainMap(*(broken for _, broken in pairs)))

    found, mine = {} if bad is None else bad, ids[common.RANK::common.WORLD]
    for batch, broken in common.make_loader(Attempt(read, source), cfg, stack, batch_size=batch_size, sampler=mine):
        found |= broken
        if batch is not None:
            yield batch
    if bad is None:
        common.note_bad({}, found, len(ids), cfg)


def read_images(cfg, size, count):
    """The files --image, or --images (0: `count`) of val/ -> uint8 (B, 3, size, size)."""
    cfg, source = replace(cfg, img_size=size), []
    for path in cfg.image:
        try:
            source.append((ImageOps.exif_transpose(Image.open(path)), 0))
        except Exception as error:  # broken files raise nearly anything
            sys.exit(f"--image {path}: {error}")
    source = source or common.open_data(cfg, "val")
    ids = range(len(source)) if cfg.image else choose(len(source), cfg.images or count)
    read = functools.partial(read_center, source, cfg)
    return torch.cat([imgs for imgs, *_ in read_each(read, source, ids, cfg, collate=default_collate)])


def sync_buffers(model):
    """Give all processes the first one's buffers: each has its own batch statistics."""
    if common.WORLD > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


# --- encoders ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def embed(encoder, source, ids, cfg, device, autocast, bad=None):
    """Mean patch features of the last block, of length 1, for this process's share of `ids` -> (n, D), labels (n,)."""
    parts = [(torch.empty(0, cfg.embed_dim), torch.empty(0, dtype=torch.long))]
    read = functools.partial(read_center, source, cfg)
    for imgs, labels, _ in read_each(read, source, ids, cfg, collate=default_collate, bad=bad):
        with autocast:
            tokens = encoder.norm(encoder(common.to_device(imgs, labels, device)[0])[-1])  # (B, 1 + N, D)
        parts.append((F.normalize(tokens[:, 1:].float().mean(1)).cpu(), labels))
    return [torch.cat(x) for x in zip(*parts)]


def knn(encoder, cfg, device, autocast, *sets):
    """kNN accuracy in percent and numbers of images, in all processes; sets: (source, ids) of train/, then of val/.

    Weighted as in DINO, k = 20. Both sets are read before processes talk: a fork beside busy threads may hang.
    """
    bad = {}
    parts = [embed(encoder, source, ids, cfg, device, autocast, bad) for source, ids in sets]
    common.note_bad({}, bad, sum(len(ids) for _, ids in sets), cfg)
    bank, queries = ([torch.cat(x).to(device) for x in zip(*part)] for part in zip(*common.gather(parts)))
    return dict(knn=knn_accuracy(*bank, *queries), val_images=len(queries[0]), train_images=len(bank[0]))


def knn_accuracy(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Percent of queries (n, D) whose weighted vote of the k nearest in bank (m, D) is right; all are of length 1."""
    right, C = 0, 1 + int(max(labels.max(), bank_labels.max()))
    for part, truth in zip(queries.split(500), labels.split(500)):
        similarity, ids = (part @ bank.T).topk(min(k, len(bank)))  # (500, k)
        votes = torch.zeros(len(part), C, device=bank.device)
        votes.scatter_add_(1, bank_labels[ids], (similarity / temperature).exp())
        right += (votes.argmax(1) == truth).sum().item()
    return 100 * right / len(queries)


def choose(n, limit):
    """`limit` of n numbers, always the same; 0: all."""
    return np.random.default_rng(0).permutation(n)[:limit or n].tolist()


@torch.no_grad()
def evaluate_encoder(model, cfg, device, autocast, samples):
    """For pretraining: loss and metrics on val/, always with the same masks; with labels also kNN accuracy -> by name.

    Exact for any number of processes.
    """
    train, val, found, rows = samples.source, common.open_data(cfg, "val"), {}, []
    ids = choose(len(val), max(1, cfg.eval_images // 5))
    if getattr(train, "classes", []) != [""]:
        encoder = getattr(model, "exported", model.encoder)
        sets = (train, choose(len(train), cfg.eval_images)), (val, ids)
        found["knn"] = knn(encoder, cfg, device, autocast, *sets)["knn"]
    read = functools.partial(read_center, val, cfg)
    for imgs, _, numbers in read_each(read, val, ids, cfg, collate=default_collate):
        draws = [samples.draw(np.random.default_rng((0, int(i))), cfg) for i in numbers]  # the same for every seed
        with autocast:
            loss, metrics = model(*common.to_device(imgs, default_collate(draws), device))
        rows.append((len(imgs), {k: v.item() for k, v in dict(loss=loss, **metrics).items()}))
    rows = sum(common.gather(rows), [])  # the batches of all processes
    n = sum(count for count, _ in rows)
    return found | {f"val_{k}": sum(count * row[k] for count, row in rows) / n for k in rows[0][1]}


# --- preview.png ------------------------------------------------------------------------------------------------------

def save_preview(model, samples, device, autocast, path):
    """Draw what `model.preview` says of six images spread over the training set."""
    imgs, draws, _ = samples.collate([samples[0, i * len(samples.source) // 6] for i in range(6)])
    model.eval()
    try:
        with torch.no_grad(), autocast:
            panels = model.preview(*common.to_device(imgs, draws, device))
        with common.replacing(path) as temporary:
            draw_panels(panels, temporary)
    except Exception as error:  # a picture is not worth a run
        common.print0(f"warning: no {path}: {type(error).__name__}: {error}")
    model.train()


def draw_panels(panels, path, names=()):
    """Table of pictures, a row per image and a column per panel. Panels are as in the contract of common.py.

    Features become colors by the first three principal components of the first panel that has as many features.
    names: of the rows.
    """
    rows, colors = len(next(iter(panels.values()))), {}
    figure = Figure((1.5 * len(panels), 1.5 * rows + 0.5), layout="compressed")
    table = figure.subplots(rows, len(panels), squeeze=False)
    for ax, name in zip(table[:, 0], names):
        ax.text(-0.05, 0.5, name, rotation=90, va="center", ha="right", transform=ax.transAxes)
    for axes, (title, panel) in zip(table.T, panels.items()):
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
