"""
Overfit a few real images with the transfer models, which shows faults in their wiring.

    python results/overfit.py COCO --out_dir out/overfit        # ten minutes on two cores

COCO holds train2017/ and annotations/instances_train2017.json, and ade/ in ADE20K's layout with classes.json.
Segmentation trains on the central squares of the first eight images of ade/, detection on the first four images with
two to six instances and no crowd. Both are evaluated on their training images. Prints commands and metrics by step.
"""
import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

SEGMENT = "transfer.segment --img_size 128 --patch_size 8 --embed_dim 64 --depth 4 --num_heads 2 --channels 48 " \
    "--drop_path 0 --scale 1 1 --no-distort --iterations 500 --warmup 20 --batch_size 8 --lr 4e-3 --layer_decay 1 " \
    "--eval_every 50 --log_every 50 --save_every 500 --no-rel_pos_bias"
DETECT = "transfer.detect --img_size 192 --scale 1 1 --patch_size 16 --embed_dim 64 --depth 4 --num_heads 2 " \
    "--table 12 12 --drop_path 0 --channels 64 --regions 64 --proposals 300 200 --batch_size 4 --epochs 240 " \
    "--drops 200 --warmup 20 --lr 2e-3 --layer_decay 1 --box_head 2fc --box_loss l1 --eval_every 40 --log_every 40 " \
    "--save_every 240"


def squares(ade, out):
    """The central 128 x 128 pixels of the first eight images and labels, for training and for validation."""
    for image in sorted((ade / "images/training").iterdir())[:8]:
        label = ade / "annotations/training" / f"{image.stem}.png"
        for kind, source, method in (("images", image, Image.BICUBIC), ("annotations", label, Image.NEAREST)):
            cut = ImageOps.fit(Image.open(source), (128, 128), method=method)
            for part in ("training", "validation"):
                (out / kind / part).mkdir(parents=True, exist_ok=True)
                with common.replacing(out / kind / part / f"{image.stem}.png") as path:
                    cut.save(path)
    shutil.copy(ade / "classes.json", out)


def few(coco, out):
    """The first four images with two to six instances and no crowd, for training and for validation."""
    file = json.loads((coco / "annotations/instances_train2017.json").read_text())
    of = {im["id"]: [a for a in file["annotations"] if a["image_id"] == im["id"]] for im in file["images"]}
    images = [im for im in sorted(file["images"], key=lambda im: im["id"])
              if 2 <= len(of[im["id"]]) <= 6 and not any(a["iscrowd"] for a in of[im["id"]])][:4]
    file |= dict(images=images, annotations=[a for im in images for a in of[im["id"]]])
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        (out / f"{split}2017").mkdir(exist_ok=True)
        for im in images:
            shutil.copy(coco / "train2017" / im["file_name"], out / f"{split}2017")
        with common.replacing(out / "annotations" / f"instances_{split}2017.json") as path:
            path.write_text(json.dumps(file))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path)
    parser.add_argument("--out_dir", type=Path, default=Path("out/overfit"))
    args = parser.parse_args()
    for name, make, source, command, keys in (("segment", squares, args.coco / "ade", SEGMENT, ("mIoU",)),
                                              ("detect", few, args.coco, DETECT, ("APb50", "APm50", "APb", "APm"))):
        data, out_dir = args.out_dir / f"{name}_data", args.out_dir / name
        make(source, data)
        print(f"python -m {command} --data {data} --out_dir {out_dir}", flush=True)
        subprocess.run([sys.executable, "-m", *command.split(), "--data", data.resolve(), "--out_dir",
                        out_dir.resolve()], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
        for key in keys:
            print(f"{key:6}", *(f"{line['step']:.0f}:{line[key]:.1f}" for line in lines if key in line), flush=True)


if __name__ == "__main__":
    main()
