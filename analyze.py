"""
The papers' figures from checkpoints, with the numbers as JSON beside the picture.

    python analyze.py FIGURE --init FILE [FILE ...] --data DATA --out fig.png
    python analyze.py attention-map --init out/ddae/encoder.pt --block 3 --image photo.jpg

    attention-distance  how far each head looks, in pixels                                 [DDAE Fig. 3]
    head-similarity     how alike the heads of a block attend                              [DeepMIM Fig. 6]
    cka                 similarity of each block's features to the last block's, and
                        of all blocks of the first encoder to those of each other one      [DeepMIM Figs. 4, 5]
    attention-map       where [CLS] looks: mean of the heads; of one encoder, also each    [DDAE Fig. 6, SdAE Fig. 7]
    beta                DDAE's betas during training; --init takes log.jsonl               [DDAE Fig. 4]
    loss                error of the last supervised block; --init takes log.jsonl         [DeepMIM Fig. 3]
    mask                random and block-wise masks and their distance maps                [DDAE Eq. 2]
    reconstruction      what a method predicts, and its errors; --init takes last.pt       [MAE Fig. 2]

The first four take encoder.pt, model.pt of finetune.py, and ViTs of MAE and timm, several in one figure, and show them
whole images, of --data's val/ or your own. B images, N patches, T = 1 + N tokens with [CLS] first, L blocks, from 1.
"""
import importlib
import json
import re
import sys
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.data import default_collate
from tqdm import tqdm

import common
import ddae
import finetune
from evaluate import draw_panels, read_images

matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(marker=list("os^Dv*P"), color=(  # for the color-blind
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000"))  # [Okabe and Ito 2008]


@dataclass(frozen=True)
class Config:
    init: tuple[str, ...] = ()  # [ours] encoders, log.jsonl, or last.pt, as listed above
    data: str = "shapes"  # [ours] whose val/ is read: a folder, a torchvision data set, or shapes (generated)
    image: tuple[str, ...] = ()  # [ours] image files, which are read instead of --data
    images: int = 0  # [Dosovitskiy 2021] how many of --data; 0: 128 for measurements, 6 for pictures
    img_size: int = 0  # [ours] side of the center crop, pixels; 0: as in --init, for mask 224
    patch_size: int = 16  # [ours] mask: side of a patch, pixels
    ratios: tuple[float, ...] = (0.4, 0.6, 0.75, 0.9)  # [ours] mask: fractions of masked patches
    block: int = 0  # [DDAE Fig. 6] attention-map: which block, there 3; 0: the last, as in SdAE Fig. 7
    key: str = "pixel"  # [DeepMIM Fig. 3] loss: metric in log.jsonl, without the block's number
    out: str = ""  # [ours] picture to write; none: out/FIGURE.png. The numbers go to the same name with .json
    device: Literal["auto", "cpu", "cuda"] = "auto"  # [ours] auto: CUDA if there is a GPU
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # [ours] auto: bf16 autocast on GPUs that support it
    num_workers: int = common.RunConfig.num_workers  # [ours] data workers
    max_bad: float = 0.01  # [ours] fraction of unreadable images above which it stops


# --- encoders ---------------------------------------------------------------------------------------------------------

def labels(paths):
    """For legends: the folder's name for encoder.pt and the like, else the file's; whole paths if these coincide."""
    names = [p.parent.name if p.stem in ("encoder", "model", "last", "log") else p.stem for p in map(Path, paths)]
    return names if len({*names}) == len(names) else paths


def open_encoders(cfg, count):
    """Yield for each file of --init: label, ViT, its images in batches of up to 64, normalized, (B, 3, H, W)."""
    device, autocast = common.setup(cfg)
    for label, path in zip(labels(cfg.init), cfg.init):
        vit_cfg, weights, _ = finetune.settle(finetune.Config(mode="knn", init=path, img_size=cfg.img_size))
        vit = ddae.ViT(*(getattr(vit_cfg, k) for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")))
        vit.norm = torch.nn.Identity()  # no figure reads it, and fine-tuned files have another one
        common.load_weights(vit.to(device).eval(), weights, path)
        vit.forward = autocast(vit.forward)
        imgs = read_images(cfg, vit_cfg.img_size, count)
        batches = tqdm(imgs.chunk(1 + (len(imgs) - 1) // 64), label, leave=False, disable=None)
        yield label, vit, (common.to_device(x, x[:0], device)[0] for x in batches)


def attention(vit, imgs):
    """Attention of each block, (B, heads, T, T), whose rows sum to 1; the fused kernel does not return it."""
    found = []
    hooks = [b.attn.qkv.register_forward_hook(lambda _, inputs, qkv: found.append(qkv)) for b in vit.blocks]
    vit(imgs)
    for hook in hooks:
        hook.remove()
    for block, qkv in zip(vit.blocks, found):  # one at a time: all of them would fill the memory
        q, k, _ = qkv.float().unflatten(2, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, D/heads)
        yield (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def grid_distances(grid):
    """Euclidean distance between any two patches of a (h, w) grid -> (N, N), in patches."""
    cells = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid))  # (N, 2)
    return torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(A, vit):
    """sum_j A_ij d_ij, mean over queries i -> (2, B, heads): with rows rescaled to sum to 1, and as they are.

    Between patches alone: what goes to [CLS], much in MAE, has no distance. [Dosovitskiy 2021]
    """
    A, d = A[:, :, 1:, 1:], vit.patch_size * grid_distances(vit.grid).to(A)  # (B, heads, N, N), (N, N) in pixels
    total = (A * d).sum(-1)  # (B, heads, N)
    return torch.stack((total / A.sum(-1), total)).mean(-1)


def head_similarity(A, vit):
    """Cosine of two heads' attention, mean over queries and the other heads -> (1, B, heads); lower: more diverse."""
    if A.shape[1] == 1:
        sys.exit("head-similarity needs encoders with several heads")
    A = F.normalize(A, dim=-1)  # [CLS] included
    cosine = torch.einsum("bhij,bgij->bhg", A, A) / A.shape[2]  # (B, heads, heads)
    return (cosine.sum(-1) - 1).unsqueeze(0) / (A.shape[1] - 1)


def draw_heads(measure, names, cfg, path):
    """Draw the mean over images of measure(attention, vit)[0], (B, heads). Small dots: heads; large: their means."""
    figure, numbers = Figure((6, 4), layout="constrained"), {}
    ax = figure.subplots()
    for i, (label, vit, batches) in enumerate(open_encoders(cfg, 128)):
        found = [torch.stack([measure(A, vit) for A in attention(vit, imgs)], 1) for imgs in batches]
        found = torch.cat(found, 2).cpu().double().mean(2).numpy()  # (names, L, heads)
        x = np.arange(1, 1 + len(vit.blocks)) + 0.12 * i
        line, = ax.plot(x, found[0].mean(1), ms=7, lw=1, label=label)
        ax.plot(x, found[0], ls="", ms=3, alpha=0.5, color=line.get_color(), marker=line.get_marker())
        numbers[label] = dict(zip(names, found))
    ax.set(xlabel="block", ylabel=names[0], ylim=(0, None))
    ax.locator_params("x", integer=True)
    ax.legend()
    figure.savefig(path, dpi=110)
    return numbers


def hsic(K, L):
    """Unbiased HSIC_1 of Gram matrices (a, n, n) and (b, n, n) -> (a, b). [Nguyen 2021]

    The biased HSIC makes CKA of independent features nearly 1 if they have more channels than there are images.
    """
    n, off = K.shape[-1], 1 - torch.eye(K.shape[-1]).to(K)
    K, L = K * off, L * off  # diagonals are 0
    k, l = K.sum(-1), L.sum(-1)  # K 1, L 1: (a, n), (b, n)
    trace = torch.einsum("aij,bji->ab", K, L)
    return (trace + k.sum(-1).outer(l.sum(-1)) / ((n - 1) * (n - 2)) - 2 / (n - 2) * k @ l.T) / (n * (n - 3))


def cka_from(batches):
    """Gram matrices (a, n, n) of each batch -> CKA between any two of a features (a, a). [Nguyen 2021]"""
    found = sum(hsic(grams, grams) for grams in batches)
    return found / found.diagonal().outer(found.diagonal()).sqrt()


def cka(cfg, path):
    """CKA of blocks' outputs; an image is an example, all its patch tokens are the features. [DeepMIM Figs. 4, 5]"""
    grams = {}  # label -> Gram matrices (L, n, n) of each batch of n images
    for label, vit, batches in open_encoders(cfg, 128):
        grams[label] = []
        for imgs in batches:
            outputs = vit(imgs, taps=range(len(vit.blocks)))
            features = (x[:, 1:].flatten(1).cpu().double() for x in outputs)  # float32 would lose digits
            grams[label].append(torch.stack([x @ x.T for x in features]))
        if len(imgs) < 4:
            sys.exit("cka needs at least 4 images, better 100")
    found, depths = cka_from(map(torch.cat, zip(*grams.values()))), [len(x[0]) for x in grams.values()]
    numbers = {f"{a}, {b}": part.numpy() for a, rows in zip(grams, found.split(depths))
               for b, part in zip(grams, rows.split(depths, 1))}
    figure, first = Figure((4.5 * len(grams), 4), layout="constrained"), next(iter(grams))
    axes = figure.subplots(1, len(grams), squeeze=False)[0]
    for ax, label in zip(axes, grams):
        part = numbers[f"{first}, {label}"]  # (L of the first, L)
        y, x = (range(1, 1 + L) for L in part.shape)
        axes[0].plot(x, numbers[f"{label}, {label}"][:, -1], label=label)
        if label != first:
            figure.colorbar(ax.pcolormesh(x, y, part, vmin=found.min(), vmax=1), ax=ax, label="CKA")
            ax.plot(1 + part.argmax(1), y, "wo", mec="black")
            ax.set(xlabel=f"block of {label}", ylabel=f"block of {first}", title="white: largest in its row")
        ax.locator_params("x", integer=True)
    axes[0].set(xlabel="block", ylabel="CKA with the last block")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    return numbers


def attention_map(cfg, path):
    """Attention of [CLS] to the patches of six images. [DDAE Fig. 6, SdAE Fig. 7]"""
    panels, numbers = {}, {}
    for label, vit, batches in open_encoders(cfg, 6):
        imgs, block = torch.cat(list(batches)), cfg.block or len(vit.blocks)
        if not 0 < block <= len(vit.blocks):
            sys.exit(f"--block {block}, but {label} has {len(vit.blocks)} blocks")
        A = next(islice(attention(vit, imgs), block - 1, None))  # (B, heads, T, T)
        A = A[:, :, 0, 1:].unflatten(2, vit.grid)  # (B, heads, h, w)
        panels = {"input": imgs} | panels | {f"{label}, block {block},\nmean of {A.shape[1]} heads": A.mean(1)}
        if len(cfg.init) == 1:
            panels |= {f"head {i}": head for i, head in enumerate(A.unbind(1), 1)}
        numbers[label] = A.cpu().numpy()
    draw_panels(panels, path)
    return numbers


# --- figures of logs, masks, and last.pt ------------------------------------------------------------------------------

def read_curves(path, pattern):
    """log.jsonl -> name: [(epoch, value), ...] of the metrics whose whole name fits `pattern`."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"{path} is no log.jsonl: {error}")
    names = {name: None for line in lines for name in line}
    fit = [name for name in names if re.fullmatch(pattern, name)]
    if not fit:
        sys.exit(f"{path} has no {pattern}, only {', '.join(names)}")
    return {name: [(line["epoch"], line[name]) for line in lines if name in line] for name in fit}


def draw_curves(panels, ylabel, path):
    """panels: title -> label -> [(epoch, value), ...]"""
    figure = Figure((1 + 4 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (title, curves) in zip(axes, panels.items()):
        for label, points in curves.items():
            ax.plot(*zip(*points), label=label.replace("/", ", block "), markevery=1 + len(points) // 10)
        ax.set(xlabel="epoch", title=title)
        ax.legend(*ax.get_legend_handles_labels())  # also where there is no curve
    axes[0].set_ylabel(ylabel)
    figure.savefig(path, dpi=110)


def beta(cfg, path):
    """Beta of each supervised block, a panel for each run. [DDAE Fig. 4]"""
    panels = {label: read_curves(file, r"beta/\d+") for label, file in zip(labels(cfg.init), cfg.init)}
    draw_curves(panels, "beta; below 0: easy patches count more", path)
    return panels


def loss(cfg, path):
    """Unweighted error of the last supervised block; the first tenth, a steep fall, is left out. [DeepMIM Fig. 3]"""
    panels = dict(training={}, validation={})
    for label, file in zip(labels(cfg.init), cfg.init):
        curves = read_curves(file, rf"(val_)?{re.escape(cfg.key)}(/\d+)?")
        last = max(curves, key=lambda name: int(name.partition("/")[2] or 0)).removeprefix("val_")
        for title, name in dict(training=last, validation=f"val_{last}").items():
            if points := curves.get(name):
                panels[title][f"{label}, {name}"] = [point for point in points if point[0] >= points[-1][0] / 10]
    draw_curves(panels, f"{cfg.key} (mean squared error)" if cfg.key == "pixel" else cfg.key, path)
    return panels


def mask(cfg, path):
    """A picture under random and block-wise masks, and D(m) of DDAE's Eq. 2; numbers are its mean over 200 masks."""
    size, panels, numbers = cfg.img_size or 224, {}, {}
    imgs, grid = read_images(cfg, size, 1)[:1], (size // cfg.patch_size,) * 2
    imgs, _ = common.to_device(imgs, imgs[:0], "cpu")
    for ratio in cfg.ratios:
        runs = [ddae.Config(img_size=size, patch_size=cfg.patch_size, mask=kind, mask_ratio=ratio)
                for kind in ("random", "block")]
        ids = np.stack([ddae.draw_mask(np.random.default_rng(i), run) for run in runs for i in range(200)])  # (400, N)
        D = ddae.distance_map(torch.from_numpy(ids)[:, :runs[0].num_keep], grid_distances(grid))
        D = D.unflatten(1, grid).unflatten(0, (2, 200))  # (2, 200, h, w)
        numbers |= {f"{run.mask} {ratio:g}": x[x > 0].mean().item() for run, x in zip(runs, D)}
        visible = F.interpolate((D[:, :1] == 0).float(), (size, size))  # (2, 1, H, W)
        panels |= {f"{ratio:.0%} masked": imgs * visible, f"distance (patches),\n{ratio:.0%} masked": D[:, 0]}
    draw_panels(panels, path, ("random", "block-wise"))
    return numbers


def open_model(path):
    """last.pt -> model and its module, the file of this repository that has the method's name."""
    state = common.load(path)
    about = state.get("about", {}) if isinstance(state, dict) else {}
    if not Path(__file__).with_name(f"{about.get('method')}.py").exists():
        sys.exit(f"{path} is no last.pt of a pretraining method that is here")
    method = importlib.import_module(about["method"])
    run = {f.name: about[f.name] for f in fields(method.Config) if f.name in about}
    Model = next(x for name, x in vars(method).items() if name.lower() == about["method"])
    model = Model(method.Config(**run | dict(init="")))
    common.load_weights(model, state["model"], path)
    return model.eval(), method


def block_pictures(model, method, imgs, ids_shuffle):
    """DDAE's prediction of each supervised block; its `preview` has the last block's alone."""
    run, first, note = model.cfg, ddae.FIRST[model.cfg.pixel], "\n(true mean, std)" * model.cfg.norm_pix
    visible, true = ddae.take(ddae.patchify(imgs, run.patch_size), ids_shuffle).tensor_split([run.num_keep], 1)
    preds = model.pixel_decoder(model.encode(imgs, ids_shuffle[:, :run.num_keep])[first:], ids_shuffle).float()
    preds = [ddae.unshuffle(visible, method.pixel_picture(x, true, run.norm_pix), ids_shuffle) for x in preds]
    return {f"block {g}{note}": ddae.unpatchify(x, run.patch_size, model.encoder.grid)
            for g, x in zip(model.taps[first:], preds)}


def reconstruction(cfg, path):
    """Input, mask, targets, and each block's prediction with its error, by the panels of the method's `preview`.

    Error of pixels: squared, over the variance of the true patch; its mean color has 1. Of features: 1 - cosine.
    """
    (model, method), (device, autocast), panels, numbers = open_model(cfg.init[0]), common.setup(cfg), {}, {}
    imgs = read_images(cfg, model.cfg.img_size, 6)
    draws = default_collate([method.draw_mask(np.random.default_rng((0, i)), model.cfg) for i in range(len(imgs))])
    imgs, draws = common.to_device(imgs, draws, device)
    with autocast:
        shown = model.to(device).preview(imgs, draws)
        if hasattr(model, "pixel_decoder"):
            shown |= block_pictures(model, method, imgs, draws)
    for title, x in shown.items():
        if title.startswith(("input", "masked", "true", "target", "teacher")):
            panels[title] = target = x
        elif title.startswith(("block", "student")):
            panels[title], error = x, (1 - F.cosine_similarity(x, target, dim=-1)) * x.any(-1)  # (B, h, w)
            if x.shape == imgs.shape:
                pred, true = (ddae.patchify(y, model.cfg.patch_size) for y in (x, imgs))  # (B, N, P)
                error = ((pred - true).square().mean(-1) / (true.var(-1) + 1e-6)).unflatten(1, model.encoder.grid)
            panels[f"error, {title}"] = error
            numbers[title.replace("\n", " ")] = error[error > 0].mean().item()
    draw_panels(panels, path)
    return numbers


FIGURES = {  # (cfg, path of the picture) -> numbers
    "attention-distance": partial(draw_heads, attention_distance, ("mean attention distance (pixels)", "not rescaled")),
    "head-similarity": partial(draw_heads, head_similarity, ["cosine similarity to the other heads"]), "cka": cka,
    "attention-map": attention_map, "beta": beta, "loss": loss, "mask": mask, "reconstruction": reconstruction}


@common.explained()
@torch.no_grad()
def main():
    name = sys.argv[1] if sys.argv[1:] and not sys.argv[1].startswith("-") else ""
    cfg = common.parse(Config, {}, __doc__, sys.argv[2 if name else 1:])
    if name not in FIGURES or not cfg.init and name != "mask" or cfg.init[1:] and name == "reconstruction":
        sys.exit(f"give one of {', '.join(FIGURES)}, and --init with the file or files that it takes (--help)")
    path = Path(cfg.out or f"out/{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with common.replacing(path) as picture, common.replacing(path.with_suffix(".json")) as file:
        try:
            numbers = FIGURES[name](cfg, picture)
        except AssertionError as error:  # of the Config of a method or of finetune.py
            sys.exit(f"{name}: {error}")
        file.write_text(json.dumps(numbers, default=lambda x: x.astype(float).round(6).tolist()) + "\n")
    print(path, path.with_suffix(".json"))


if __name__ == "__main__":
    main()
