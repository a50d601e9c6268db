"""What is worth a long run: python train/compare.py --data FOLDER --output DIR --preset NAME --max-steps 800 ...

Trains a preset as it is and with one thing changed at a time (memory block, rate, optimizer, average, dropout, flips), each for
as many FLOPs as --max-steps of the preset take, from fresh weights of one seed, with train/train.py, whose other options can be
given. Bits/dim are those of the averaged weights on the held-out images, never of test images. DIR/compare.md is the table.
Interrupted, with a checkpoint, the same command goes on where it was.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import torch

import trainings
from files import check_writable, write_whole
from imtx import PRESETS, Config, ImageTransformer
from imtx.costs import forward_flops
from publishing.records import Training


@dataclass(frozen=True)
class Variant:
    """A preset with one thing changed: in the model's configuration, or among the options of train.py."""

    config: dict = field(default_factory=dict)
    options: tuple[str, ...] = ()


def variants(config: Config, rate: float) -> dict[str, Variant]:
    """By what differs. rate: that of the run as it is."""
    found = {"as it is": Variant()}
    if config.layout == "1d":
        found |= {
            f"memory block {config.memory_block} -> {length}": Variant({"memory_block": length})
            for length in (config.memory_block // 2, 2 * config.memory_block, 4 * config.memory_block)
        }
    found |= {f"rate {rate:g} -> {other:g}": Variant(options=("--learning-rate", f"{other:g}")) for other in (rate / 2, 2 * rate)}
    return found | {
        "Muon -> AdamW": Variant(options=("--optimizer", "adamw")),
        "average 0.999 -> 0.99": Variant(options=("--ema", "0.99")),
        f"dropout {config.dropout:g} -> 0.1": Variant({"dropout": 0.1}),
        "flips": Variant(options=("--flip",)),
    }


def fresh(config: Config, folder: Path) -> tuple[Path, int]:
    """A model folder with weights of seed 0, and the FLOPs of a forward over one image."""
    torch.manual_seed(0)
    model = ImageTransformer(config)
    model.save_pretrained(folder)
    return folder, forward_flops(model)


def table(preset: str, found: dict[str, Training]) -> str:
    base = found["as it is"].validation_bits_per_dim
    lines = [f"| `{preset}` | steps | validation bits/dim | |", "|---|---|---|---|"]
    for name, training in found.items():
        difference = training.validation_bits_per_dim - base
        told = "" if name == "as it is" else f"{difference:+.3f}"
        lines.append(f"| {name} | {training.steps:,} | {training.validation_bits_per_dim:.3f} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--preset", required=True, choices=sorted(PRESETS), metavar="NAME")
    parser.add_argument("--max-steps", required=True, type=int, help="of the preset as it is; it sets the FLOPs of all")
    parser.add_argument("--learning-rate", required=True, type=float, help="of the preset as it is")
    args, options = parser.parse_known_args()  # train.py looks at the rest, and refuses what it does not know
    if args.max_steps < 1:
        parser.error(f"--max-steps must be above 0, got {args.max_steps}.")
    chosen_here = ("--init", "--resume", "--optimizer", "--ema", "--flip", "--max-minutes")
    if any(option.split("=")[0] in chosen_here for option in options):
        parser.error(f"{', '.join(chosen_here)} are chosen here.")
    check_writable(args.output)
    args.output.mkdir(parents=True, exist_ok=True)

    asked = {"preset": args.preset, "max_steps": args.max_steps, "learning_rate": args.learning_rate, "options": options}
    record, found, budget = args.output / "compare.json", {}, 0
    if record.exists() and json.loads(record.read_text()) != asked:
        raise SystemExit(f"{record} is of other options. Choose another folder for --output.")
    write_whole(record, json.dumps(asked, indent=2) + "\n")
    for number, (name, variant) in enumerate(variants(PRESETS[args.preset], args.learning_rate).items()):
        start, flops = fresh(replace(PRESETS[args.preset], **variant.config), args.output / f"{number}-start")
        budget = budget or flops * args.max_steps
        # The rate, and the warm-up of fresh weights; what a variant says comes last, and counts.
        told = ["--init", str(start), "--max-steps", str(round(budget / flops)), "--learning-rate", str(args.learning_rate)]
        print(f"{name}: {round(budget / flops):,} steps", file=sys.stderr, flush=True)
        found[name] = trainings.train(args.output / str(number), [*told, "--warmup", "100", *options, *variant.options])
        write_whole(args.output / "compare.md", table(args.preset, found))
    print(table(args.preset, found), end="")


if __name__ == "__main__":
    main()
