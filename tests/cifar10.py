"""
What each method's encoder is worth on CIFAR-10 at equal budgets: nearest neighbours, linear probe, fine-tuning.

    python tests/cifar10.py --data ./cifar10 --out_dir out/cifar10        # four hours on two cores; the same command goes on

Every run is a command of the README's kind, printed as it starts; finished ones are not made again. `--data` is CIFAR-10 as
train/ and val/ of class folders, or torchvision's name `cifar10`. The rows:
    untrained    a random encoder: linear probe and neighbours of what its features are by themselves
    scratch      fine-tuning's epochs without pretraining
    mae, deepmim, ddae, sdae
All pretrain for the same steps with the same encoder, crops, batch and learning rate; only MAE's decoder is deeper, to cost
about what DeepMIM's four do.
"""
import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import ddae  # noqa: E402

SIZES = "--img_size 32 --patch_size 4 --embed_dim 96 --num_heads 3 --depth 6"
PRETRAIN = SIZES + " --decoder_dim 96 --decoder_heads 3 --batch_size 64 --base_lr 6e-3 --epochs 4 --warmup_epochs 0.4 " \
    "--log_every 50 --knn_every 0.5 --knn_images 5000 --preview_every 0"
METHODS = {
    "mae": "deepmim.py --taps 6 --decoder_depth 4",
    "deepmim": "deepmim.py --decoder_depth 2",
    "ddae": "ddae.py --K 3 --momentum 0.99 --decoder_depth 2",
    "sdae": "sdae.py --drop_path 0 --decoder_depth 2",
}
TRAIN = "--preview_every 0 --log_every 50"
FINETUNE = f"--recipe quick --epochs 2 --warmup_epochs 0.4 {TRAIN}"
SCRATCH = f"--recipe quick_scratch {SIZES} --epochs 2 --warmup_epochs 0.4 {TRAIN}"
LINEAR = f"--recipe quick_linear --epochs 2 {TRAIN}"


def run(command, out_dir):
    """Run a command of the repository, unless its result is there -> what it printed."""
    done = out_dir / "done.txt"
    if not done.exists():
        print(f"python {command}", flush=True)
        script, *flags = shlex.split(command)
        job = subprocess.run([sys.executable, ROOT / script, *flags, "--out_dir", out_dir], stdout=subprocess.PIPE, text=True)
        if job.returncode:
            sys.exit(f"{command}: exit code {job.returncode}\n{job.stdout[-500:]}")
        out_dir.mkdir(parents=True, exist_ok=True)
        done.write_text(job.stdout)
    return done.read_text()


def last(out_dir, key):
    """The last figure of that name in a log."""
    return [line[key] for line in map(json.loads, (out_dir / "log.jsonl").read_text().splitlines()) if key in line][-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out_dir", type=Path, default=Path("out/cifar10"))
    parser.add_argument("--flags", default="", help="further flags of every run, such as '--num_workers 1'")
    args = parser.parse_args()
    end = f"--data {args.data} {args.flags}"
    untrained = args.out_dir / "untrained" / "encoder.pt"
    untrained.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3)
    common.save(dict(model=ddae.ViT(**sizes).state_dict(), config=sizes), untrained)
    rows = []
    for name in ("untrained", "scratch", *METHODS):
        out, row = args.out_dir / name, [name, "", "", ""]
        init = f"--init {out / 'encoder.pt'}"
        if name in METHODS:
            run(f"{METHODS[name]} {PRETRAIN} {end}", out)
            run(f"finetune.py {FINETUNE} {init} {end}", out / "finetune")
            row[3] = f"{last(out / 'finetune', 'acc1'):.1f}"
        if name == "scratch":
            run(f"finetune.py {SCRATCH} {end}", out)
            row[3] = f"{last(out, 'acc1'):.1f}"
        else:
            found = run(f"finetune.py --mode knn --knn_images 10000 {init} {end}", out / "knn")
            row[1] = f"{float(re.search(r'knn +([0-9.]+)%', found)[1]):.1f}"
            run(f"finetune.py {LINEAR} {init} {end}", out / "linear")
            row[2] = f"{last(out / 'linear', 'acc1'):.1f}"
        rows.append(row)
    print("| encoder | kNN | linear | fine-tuned |\n|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
