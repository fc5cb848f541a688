"""
Plot metrics of several runs against the epoch, and print them as a table.

    python results/compare.py out/a out/b --key val_pixel/6 knn --save picture.png
"""
import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders")
    parser.add_argument("--key", nargs="+", required=True, help="names in log.jsonl")
    parser.add_argument("--save", type=Path, help="picture to write")
    args = parser.parse_args()
    figure = Figure((5 * len(args.key), 3.5), layout="constrained")
    axes = figure.subplots(1, len(args.key), squeeze=False)[0]
    for key, ax in zip(args.key, axes):
        for run in args.runs:
            lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            if not points:
                sys.exit(f"{run / 'log.jsonl'} has no {key}")
            print(f"{run.name:12} {key:14}", *(f"{epoch:.2f}:{value:.4g}" for epoch, value in points))
            drawn = [point for point in points if point[0] > 0]  # the untrained model would stretch the axis
            ax.plot(*zip(*drawn), label=run.name, marker=".")
        errors = any(word in key for word in ("loss", "pixel", "feature"))
        ax.set(xlabel="epoch", title=key, yscale="log" if errors else "linear")
        ax.legend()
    if args.save:
        with common.replacing(args.save) as path:
            figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
