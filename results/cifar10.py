"""
All methods on CIFAR-10 at equal budgets: nearest neighbors, logistic regression, and fine-tuning.

    python results/cifar10.py --data ./cifar10 [--no-finetune]        # four hours on two cores, or half of it

The same command resumes the study; finished runs are not repeated. Each run is one command of this repository, printed
when it starts. `--data` is CIFAR-10 as train/ and val/ of class folders, or torchvision's name CIFAR10. The rows:
    untrained    nearest neighbors and logistic regression with a random encoder
    scratch      the epochs of fine-tuning without pretraining
    mae, deepmim, ddae, sdae, beit2 without DDS, with its halves, and with DDS
All methods pretrain for the same steps with the same encoder, crops, batch size, and learning rate. Only MAE's decoder
is deeper, so that it costs about as much as DeepMIM's four.
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

SIZES = dict(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3)
SIZE_FLAGS = " ".join(f"--{name} {value}" for name, value in SIZES.items())
PRETRAIN = SIZE_FLAGS + " --batch_size 64 --base_lr 6e-3 --epochs 4 --warmup_epochs 0.4 --log_every 50 " \
    "--eval_every 0.5 --eval_images 5000"
DECODER = "--decoder_dim 96 --decoder_heads 3"
BEIT2 = "beit2.py --tokenizer pixels --K 3 --early_layers 4 --head_layers 1 --color_jitter 0"
METHODS = {
    "mae": f"deepmim.py --taps 6 {DECODER} --decoder_depth 4",
    "deepmim": f"deepmim.py {DECODER} --decoder_depth 2",
    "ddae": f"ddae.py --K 3 --momentum 0.99 {DECODER} --decoder_depth 2",
    "sdae": f"sdae.py --drop_path 0 {DECODER} --decoder_depth 2",
    **{f"beit2_{dds}": f"{BEIT2} --dds {dds}" for dds in ("none", "d", "ds", "dds")},
}
FINETUNE = "finetune.py --preset quick --epochs 2 --warmup_epochs 0.4 --log_every 50"
SCRATCH = f"finetune.py --preset quick_scratch {SIZE_FLAGS} --epochs 2 --warmup_epochs 0.4 --log_every 50"


def run(command, out_dir):
    """Run a command of the repository, unless it has finished before -> its output."""
    done = out_dir / "done.txt"
    if not done.exists():
        print(f"python {command} --out_dir {out_dir}", flush=True)
        script, *flags = shlex.split(command)
        job = subprocess.run([sys.executable, ROOT / script, *flags, "--out_dir", out_dir], stdout=subprocess.PIPE,
                             text=True)
        if job.returncode:
            sys.exit(f"{command}: exit code {job.returncode}\n{job.stdout[-500:]}")
        out_dir.mkdir(parents=True, exist_ok=True)
        with common.replacing(done) as path:
            path.write_text(job.stdout)
    return done.read_text()


def accuracy(command, out_dir):
    """Run a command of finetune.py -> accuracy of the last model on val/, percent."""
    run(command, out_dir)
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return f"{[line['acc1'] for line in lines if 'acc1' in line][-1]:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out_dir", type=Path, default=Path("out/cifar10"))
    parser.add_argument("--flags", default="", help="further flags of every run, such as '--num_workers 1'")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--finetune", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    end = f"--data {shlex.quote(args.data)} {args.flags}"

    untrained = args.out_dir / "untrained" / "encoder.pt"
    untrained.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with common.replacing(untrained) as path:
        torch.save(dict(model=ddae.ViT(**SIZES).state_dict(), config=SIZES), path)

    rows = [("scratch", "", "", accuracy(f"{SCRATCH} {end}", args.out_dir / "scratch"))] if args.finetune else []
    for name in ("untrained", *args.methods):
        out, tuned = args.out_dir / name, ""
        init = f"--init {shlex.quote(str(out / 'encoder.pt'))} {end}"
        if name in METHODS:
            run(f"{METHODS[name]} {PRETRAIN} {end}", out)
        if name in METHODS and args.finetune:
            tuned = accuracy(f"{FINETUNE} {init}", out / "finetune")
        found = [run(f"finetune.py --mode {mode} --eval_images 10000 {init}", out / mode) for mode in ("knn", "probe")]
        frozen = [f"{float(re.search(r'^(knn|probe) +([0-9.]+)', text, re.M)[2]):.1f}" for text in found]
        rows.append((name, *frozen, tuned))
    print("| encoder | kNN | probe | fine-tuned |\n|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
