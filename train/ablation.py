"""The paper's memory-block ablation in small: python train/ablation.py --data FOLDER --output DIR --max-steps 2000 ...

Trains one small model of the paper's family at every block size for equal steps, each with train/train.py (any option of
which can be given), and draws bits/dim on the held-out images beside the paper's figures: DIR/ablation.json and .png.
Interrupted, the same command goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen
from matplotlib import pyplot as plt

# CIFAR-10 test bits/dim of the paper's categorical model with 8 layers, by block size in sub-pixels.
PAPER = {8: 4.06, 16: 3.47, 64: 3.13, 256: 2.99}


def train(block: int, output: Path, options: list[str]) -> float:
    """Bits/dim on the held-out images after training `ablation-<block>` to the end of its budget."""
    folder = output / str(block)
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--preset", f"ablation-{block}"]
    command += ["--output", str(folder), *options]
    if any((folder / "checkpoints").glob("step-*")):
        command += ["--resume", "latest"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"Training with blocks of {block} has failed; what it said stands above.")
    return json.loads(done.stdout.splitlines()[-1])["bits_per_dim"]


def chart(ours: dict[int, float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    curves = [(ours, "o-", "ours: 3 layers of width 64, minutes on a CPU, validation")]
    curves.append((PAPER, "s--", "paper: 8 layers of width 512, test"))
    for figures, style, label in curves:
        axes.plot(list(figures), list(figures.values()), style, label=label)
        for block, value in figures.items():
            axes.annotate(f"{value:.2f}", (block, value), textcoords="offset points", xytext=(0, 7), ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(PAPER), labels=list(map(str, PAPER)))
    axes.set_xlabel("block size l_q = l_m, sub-pixels (a row of the image has 96)")
    axes.set_ylabel("bits/dim")
    axes.margins(x=0.08, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    temporary = path.with_suffix(".part.png")
    figure.savefig(temporary, dpi=160)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    args, options = parser.parse_known_args()  # train.py looks at the rest, and refuses what it does not know
    args.output.mkdir(parents=True, exist_ok=True)
    record = args.output / "ablation.json"
    found = json.loads(record.read_text()) if record.exists() else {"options": options, "bits_per_dim": {}}
    if found["options"] != options:
        raise SystemExit(f"{record} is of other options: {' '.join(found['options'])}. Choose another folder.")
    for block in PAPER:
        if str(block) not in found["bits_per_dim"]:
            found["bits_per_dim"][str(block)] = train(block, args.output, options)
            temporary = record.with_suffix(".part")
            temporary.write_text(json.dumps(found, indent=2) + "\n")
            os.replace(temporary, record)
    chart({int(block): value for block, value in found["bits_per_dim"].items()}, args.output / "ablation.png")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
