"""
Copy a folder of images with the shorter side reduced to --size pixels. Training on the copy waits less for data.

    python -m results.shrink IMAGENET IMAGENET_320 --size 320

Names and subfolders stay, as do images that are small already and all other files. JPEGs get quality 90. Unreadable
images are named and left out. The same command continues a copy that was stopped. Not for label maps.
"""
import argparse
import os
import shutil
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import is_image_file
from tqdm import tqdm


def shrink(path, src, dst, size):
    """Write the copy of one file -> error, or None."""
    new = dst / path.relative_to(src)
    part = new.with_name(f".{new.name}.part")
    if new.exists():
        return None
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        if is_image_file(path.name) and min((image := Image.open(path)).size) > size:
            shape = [round(n * size / min(image.size)) for n in image.size]
            pixels = image.convert("RGB") if image.mode == "P" else image  # Pillow does not interpolate palettes
            pixels.resize(shape, Image.Resampling.BICUBIC, reducing_gap=3).save(part, image.format, quality=90)
        else:
            shutil.copyfile(path, part)
        os.replace(part, new)
    except Exception as error:  # broken files raise nearly anything
        return f"{path}: {type(error).__name__}: {error}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    parser.add_argument("--size", type=int, default=256, help="pixels; crops cover as little as a fifth of an image")
    args = parser.parse_args()
    files = [Path(folder, name) for folder, _, names in os.walk(args.src) for name in names if name[0] != "."]
    with Pool() as pool:
        found = pool.imap_unordered(partial(shrink, src=args.src, dst=args.dst, size=args.size), files, chunksize=16)
        for error in filter(None, tqdm(found, total=len(files), unit=" files")):
            tqdm.write(error)


if __name__ == "__main__":
    main()
