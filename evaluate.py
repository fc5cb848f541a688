"""
What training shows of a model besides its loss: kNN accuracy and validation loss (--eval_every), and preview.png.
Also what finetune.py, transfer/, and analyze.py share: reading images for evaluation, nearest neighbors and logistic
regression, what a model says of photos; and --micro_batch auto.
"""
import contextlib
import copy
import csv
import functools
import sys
from collections import ChainMap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.utils.data import Dataset, default_collate
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import InterpolationMode, v2

import common


# --- reading images ---------------------------------------------------------------------------------------------------

def read_center(source, cfg, i):
    """Resize the shorter side to img_size / crop_pct and cut out the center -> uint8 (3, S, S), label, i."""
    image, label = source[i]
    side = round(cfg.img_size / getattr(cfg, "crop_pct", 1.0))  # pretraining does not crop
    common.draft(image, 2 * side / min(image.size))  # twice as large: a crop in training may be blurred, but not this
    image = v2.functional.resize(common.to_rgb(image), [side], InterpolationMode.BICUBIC)
    return common.planar(v2.functional.center_crop(image, [cfg.img_size])), label, i


class Photos(Dataset):
    """An image file, or those in a folder and below, sorted; turned as their EXIF says: [i] -> PIL image, 0."""

    def __init__(self, path):
        files = [f for f in Path(path).rglob("*") if is_image_file(f.name) and f.name[0] != "."]
        self.samples = [(str(f), 0) for f in sorted(files) or [path]]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return ImageOps.exif_transpose(Image.open(self.samples[i][0])), 0


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
def outputs(f, cfg, device, autocast, *sets):
    """f of the center crops of images, in all processes; sets: (source, ids) -> for each, f's rows, labels, numbers.

    All sets are read before processes talk: a fork beside busy threads may hang. In order of the images' numbers.
    """
    bad, parts = {}, []
    for source, ids in sets:
        parts.append([])
        read = functools.partial(read_center, source, cfg)
        for imgs, labels, numbers in read_each(read, source, ids, cfg, collate=default_collate, bad=bad):
            with autocast:
                rows = f(common.to_device(imgs, labels, device)[0]).float()
            if not rows.isfinite().all():
                sys.exit(f"{cfg.init or cfg.out_dir}: outputs of the model are not finite; try --precision fp32")
            parts[-1].append((rows.cpu(), labels, numbers))
    common.note_bad({}, bad, sum(len(ids) for _, ids in sets), cfg)
    found = []
    for batches in zip(*common.gather(parts)):  # of one set, by process
        if not any(batches):
            sys.exit("no image is readable")
        rows, labels, numbers = (torch.cat(x) for x in zip(*sum(batches, [])))
        order = numbers.argsort()
        found.append((rows[order], labels[order], numbers[order]))
    return found


def embed(encoder, imgs):
    """imgs (B, 3, H, W) -> mean patch feature and [CLS] of the last block, after `norm` (B, 2, D)."""
    tokens = encoder.norm(encoder(imgs)[-1]).float()  # (B, 1 + N, D)
    return torch.stack((tokens[:, 1:].mean(1), tokens[:, 0]), 1)


def standard_error(percent, n):
    """Of a fraction of n images, in percent like the fraction itself."""
    return (percent * (100 - percent) / n) ** 0.5


def knn(encoder, cfg, device, autocast, *sets):
    """Accuracy by mean patch features, in all processes; sets: (source, ids) of train/, then of val/. -> by name

    Weighted vote of the nearest neighbors as in DINO, k = 20.
    """
    parts = outputs(lambda imgs: embed(encoder, imgs)[:, :1], cfg, device, autocast, *sets)  # [CLS] would be as large
    bank, queries = ((F.normalize(x[:, 0]).to(device), labels.to(device)) for x, labels, _ in parts)
    found, n = knn_accuracy(*bank, *queries), len(queries[0])
    return dict(knn=found, knn_se=standard_error(found, n), val_images=n, train_images=len(bank[0]))


def knn_accuracy(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Percent of queries (n, D) whose weighted vote of the k nearest in bank (m, D) is right; all are of length 1."""
    right, C = 0, 1 + int(max(labels.max(), bank_labels.max()))
    for part, truth in zip(queries.split(500), labels.split(500)):
        similarity, ids = (part @ bank.T).topk(min(k, len(bank)))  # (500, k)
        votes = torch.zeros(len(part), C, device=bank.device)
        votes.scatter_add_(1, bank_labels[ids], (similarity / temperature).exp())
        right += (votes.argmax(1) == truth).sum().item()
    return 100 * right / len(queries)


def probe(encoder, cfg, device, autocast, *sets):
    """Accuracy of logistic regression on mean patch features and [CLS]; arguments and result as of `knn`.

    The L2 strength is the one of the lowest loss on a fifth of train/, which is then fitted as a whole.
    """
    (x, y), (queries, labels) = ((x.flatten(1).to(device), labels.to(device)) for x, labels, _ in outputs(
        functools.partial(embed, encoder), cfg, device, autocast, *sets))  # (n, 2D), (n,)
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x, queries = (x - mean) / std, (queries - mean) / std
    order, head = choose(len(x), 0), nn.Linear(x.shape[1], 1 + int(max(y.max(), labels.max()))).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    fit, held, losses = order[len(x) // 5:], order[:max(1, len(x) // 5)], {}
    for strength in (10.0 ** i for i in range(1, -7, -1)):  # each starts where the stronger one ended
        logistic_regression(head, x[fit], y[fit], strength, 100)
        losses[strength] = F.cross_entropy(head(x[held]), y[held]).item()
    strength = min(losses, key=losses.get)
    logistic_regression(head, x, y, strength, 2000)
    found, n = 100 * (head(queries).argmax(1) == labels).double().mean().item(), len(queries)
    return dict(probe=found, probe_se=standard_error(found, n), strength=strength, val_images=n, train_images=len(x))


def logistic_regression(head, x, labels, strength, steps):
    """Minimize mean cross-entropy + strength / 2 * |weight|^2 by at most `steps` of L-BFGS; x (n, D), labels (n,)."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=steps, max_eval=2 * steps, line_search_fn="strong_wolfe")

    def loss_and_gradient():
        optimizer.zero_grad()
        loss = strength / 2 * head.weight.square().sum()
        loss.backward()
        for part, truth in zip(x.split(2**16), labels.split(2**16)):  # the logits of all of ImageNet would not fit
            term = F.cross_entropy(head(part), truth, reduction="sum") / len(x)
            term.backward()
            loss = loss + term.detach()
        return loss

    optimizer.step(loss_and_gradient)


def choose(n, limit):
    """`limit` of n numbers, always the same; 0: all."""
    return np.random.default_rng(0).permutation(n)[:limit or n].tolist()


@torch.no_grad()
def evaluate_encoder(model, cfg, device, autocast, samples):
    """For pretraining: loss and metrics on val/, always with the same masks; with labels also kNN accuracy -> by name.

    Exact for any number of processes, but for deviations (target_std), which are of a batch.
    """
    train, val, found, rows = samples.source, common.open_data(cfg, "val"), {}, []
    ids = choose(len(val), max(1, cfg.eval_images // 5))
    if getattr(train, "classes", []) != [""]:
        encoder = getattr(model, "exported", model.encoder)
        sets = (train, choose(len(train), cfg.eval_images)), (val, ids)
        accuracy = knn(encoder, cfg, device, autocast, *sets)
        found = {name: accuracy[name] for name in ("knn", "knn_se")}
    read = functools.partial(read_center, val, cfg)
    for imgs, _, numbers in read_each(read, val, ids, cfg, collate=default_collate):
        draws = [samples.draw(np.random.default_rng((0, int(i))), cfg) for i in numbers]  # the same for every seed
        with autocast:
            loss, metrics = model(*common.to_device(imgs, default_collate(draws), device))
        rows.append((len(imgs), {k: v.item() for k, v in dict(loss=loss, **metrics).items()}))
    rows = sum(common.gather(rows), [])  # the batches of all processes
    n = sum(count for count, _ in rows)
    return found | {f"val_{k}": sum(count * row[k] for count, row in rows) / n for k in rows[0][1]}


# --- memory -----------------------------------------------------------------------------------------------------------

def largest_batch(model, cfg, device, autocast, samples, optimizer):
    """--micro_batch auto: the largest divisor of a process's images with which a step fits in memory, in all of them.

    Two steps of a copy, the second beside the optimizer's state: its weights take as much memory as DDP's buckets.
    """
    share = cfg.batch_size // common.WORLD
    for micro in (n for n in range(share, 0, -1) if share % n == 0):
        trial = updates = fits = None  # None also frees the last copy
        imgs, draws, _ = samples.collate([samples[0, 0]] * micro)
        with contextlib.suppress(torch.OutOfMemoryError), autocast:
            trial = copy.deepcopy(model)
            updates = optimizer(trial, cfg)
            for _ in range(2):
                trial(*common.to_device(imgs, draws, device))[0].backward()
                updates.step()
                updates.zero_grad()
            fits = True
        if all(common.gather(fits)):
            break
    trial = updates = None
    if device.type == "cuda":
        torch.cuda.empty_cache()  # NCCL and Triton take memory of their own
        torch.cuda.reset_peak_memory_stats()  # peak_gib is of training
    return micro


# --- what a model says of photos --------------------------------------------------------------------------------------

def outputs_of(photos, f, cfg, device, autocast):
    """f of an image file or of a folder's, as `outputs` gives it -> names of the files, rows."""
    source = Photos(photos)
    cfg = replace(cfg, max_bad=0.99)  # unreadable ones are named and left out
    [(rows, _, numbers)] = outputs(f, cfg, device, autocast, (source, range(len(source))))
    return [source.samples[i][0] for i in numbers], rows


def save_features(encoder, cfg, device, autocast):
    """--embed: features.npz with the files (n,), their mean patch features (n, D), and [CLS] (n, D)."""
    files, rows = outputs_of(cfg.embed, functools.partial(embed, encoder), cfg, device, autocast)
    write(cfg, "features.npz", lambda path: np.savez(path, files=files, mean=rows[:, 0], cls=rows[:, 1]))


def predict(model, classes, cfg, device, autocast):
    """--predict: predictions.csv, for each file the five most probable classes and their probabilities."""
    def write_table(path):
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["file", *(f"{name}{i}" for i in range(1, k + 1) for name in ("class", "probability"))])
            for name, values, ids in zip(files, *(x.tolist() for x in rows.topk(k))):
                table.writerow([name, *(x for p, i in zip(values, ids) for x in (classes[i], f"{p:.4g}"))])

    files, rows = outputs_of(cfg.predict, lambda imgs: model.logits(imgs).float().softmax(1), cfg, device, autocast)
    k = min(5, rows.shape[1])
    write(cfg, "predictions.csv", write_table)


def write(cfg, name, write_to):
    path = Path(cfg.out_dir) / name
    if common.RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with common.replacing(path) as temporary:
            write_to(temporary)
    common.print0(f"wrote {path}")


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
        panel = panel.cpu().double().numpy()
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
