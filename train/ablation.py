"""The paper's memory-block ablation in small: python train/ablation.py --data FOLDER --output DIR --max-steps 2000 ...

Trains one small model of the paper's family at every block size for equal steps, each with train/train.py, whose other
options can be given, and draws bits/dim on the held-out images beside the paper's figures: DIR/ablation.json and .png.
Interrupted, with a checkpoint, the same command goes on where it was.
"""

import argparse
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen
from matplotlib import pyplot as plt

import trainings
from files import check_writable, write_whole
from imtx import PRESETS
from publishing.records import RUN, parse_object, read_text

# CIFAR-10 test bits/dim of the paper's categorical model with 8 layers, by block size in sub-pixels.
PAPER = {8: 4.06, 16: 3.47, 64: 3.13, 256: 2.99}


def train(block: int, output: Path, options: list[str]) -> float:
    """Bits/dim on the held-out images after training `ablation-<block>` to the end of its budget."""
    training = trainings.train(output / str(block), ["--preset", f"ablation-{block}", *options])
    return training.validation_bits_per_dim


def chart(ours: dict[int, float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    config = PRESETS["ablation-8"]
    curves = [(ours, "o-", f"ours: {config.layers} layers of width {config.width}, validation")]
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
    picture = io.BytesIO()
    figure.savefig(picture, dpi=160, format="png")
    write_whole(path, picture.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", required=True, type=Path)
    args, options = parser.parse_known_args()  # train.py looks at the rest, and refuses what it does not know
    if any(option.split("=")[0] in ("--preset", "--resume") for option in options):
        parser.error("--preset and --resume are chosen here, one model a block size.")
    record = args.output / "ablation.json"
    check_writable(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    found = {"options": options, "bits_per_dim": {}}
    if record.exists():
        found = parse_object(record, read_text(record))
    if found["options"] != options:
        raise SystemExit(f"{record} is of other options: {' '.join(found['options'])}. Choose another folder.")
    for block in PAPER:
        if str(block) not in found["bits_per_dim"]:
            try:
                found["bits_per_dim"][str(block)] = train(block, args.output, options)
            finally:
                if (args.output / str(block) / RUN).exists():  # from now on all have these options; a refusal binds nobody
                    write_whole(record, json.dumps(found, indent=2) + "\n")
    chart({int(block): value for block, value in found["bits_per_dim"].items()}, args.output / "ablation.png")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
