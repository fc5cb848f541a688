"""
Can the transfer models learn a few real images by heart? A fault in the wiring would show here.

    python tests/overfit.py COCO --out_dir out/overfit        # ten minutes on two cores

COCO holds train2017/ and annotations/instances_train2017.json, and ade/ in ADE20K's layout. Segmentation learns the middle
squares of the first eight images of ade/, detection the first four images with two to six instances and no crowd; both are
evaluated on what they learn. Prints the commands and their curves.
"""
import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).parent.parent
SEGMENT = "transfer.segment --img_size 128 --patch_size 8 --embed_dim 64 --depth 4 --num_heads 2 --channels 48 --drop_path 0 " \
    "--scale 1 1 --no-distort --iterations 500 --warmup 20 --batch_size 8 --lr 4e-3 --layer_decay 1 --eval_every 50 " \
    "--log_every 50 --preview_every 0 --save_every 500"
DETECT = "transfer.detect --img_size 192 --scale 1 1 --patch_size 16 --embed_dim 64 --depth 4 --num_heads 2 --table 12 12 " \
    "--drop_path 0 --channels 64 --regions 64 --proposals 300 200 --batch_size 4 --epochs 240 --drops 200 --warmup 20 " \
    "--lr 2e-3 --layer_decay 1 --box_head 2fc --box_loss l1 --eval_every 40 --log_every 40 --preview_every 0 --save_every 240"


def squares(ade, out):
    """The middle of the first eight images and labels, 128 px, for training and for validation."""
    for image in sorted((ade / "images/training").iterdir())[:8]:
        label = ade / "annotations/training" / f"{image.stem}.png"
        for kind, path, how in (("images", image, Image.BICUBIC), ("annotations", label, Image.NEAREST)):
            cut = ImageOps.fit(Image.open(path), (128, 128), method=how)
            for part in ("training", "validation"):
                (out / kind / part).mkdir(parents=True, exist_ok=True)
                cut.save(out / kind / part / f"{image.stem}.png")
    shutil.copy(ade / "classes.json", out)


def few(coco, out):
    """The first four images with two to six instances and no crowd, for training and for validation."""
    file = json.loads((coco / "annotations/instances_train2017.json").read_text())
    of = {im["id"]: [a for a in file["annotations"] if a["image_id"] == im["id"]] for im in file["images"]}
    images = [im for im in sorted(file["images"], key=lambda im: im["id"])
              if 2 <= len(of[im["id"]]) <= 6 and not any(a["iscrowd"] for a in of[im["id"]])][:4]
    file |= dict(images=images, annotations=[a for im in images for a in of[im["id"]]])
    for split in ("train", "val"):
        (out / f"{split}2017").mkdir(parents=True, exist_ok=True)
        (out / "annotations").mkdir(exist_ok=True)
        for im in images:
            shutil.copy(coco / "train2017" / im["file_name"], out / f"{split}2017")
        (out / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(file))


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
        subprocess.run([sys.executable, "-m", *command.split(), "--data", data.resolve(), "--out_dir", out_dir.resolve()],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for key in keys:
            lines = map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
            print(f"{key:6}", *(f"{line['step']}:{line[key]:.1f}" for line in lines if key in line), flush=True)


if __name__ == "__main__":
    main()
