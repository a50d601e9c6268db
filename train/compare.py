"""What is worth a long run: python train/compare.py --data FOLDER --output DIR --init MODEL --max-steps 300 ...

Trains a model as it is and with one thing changed at a time (memory block, rate, optimizer, average, dropout, flips), each for
as many FLOPs as --max-steps of the model as it is take, with train/train.py, whose other options can be given. All start from
the weights of MODEL, or with --preset from the same fresh ones. Bits/dim are those of the averaged weights on the held-out
images, never on test images. DIR/compare.md is the table. Interrupted, with a checkpoint, the same command goes on where it was.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import torch

import trainings
from averaging import open_model
from files import check_writable, write_whole
from imtx import PRESETS, Config, ImageTransformer
from imtx.checkpoint import Origin
from imtx.costs import forward_flops
from publishing import origins
from publishing.records import RUN, Training, parse_object, read_text, shortened
from train import WARMUPS


@dataclass(frozen=True)
class Variant:
    """A model with one thing changed: in the model's configuration, or among the options of train.py."""

    config: dict = field(default_factory=dict)
    options: tuple[str, ...] = ()


def variants(config: Config, rate: float) -> dict[str, Variant]:
    """By what differs. rate: that of the run as it is."""
    found = {"as it is": Variant()}
    if config.layout == "1d":
        found |= {
            f"memory block {config.memory_block} -> {length}": Variant({"memory_block": length})
            for length in (config.memory_block // 2, 2 * config.memory_block, 4 * config.memory_block)
            if length <= config.positions
        }
    found |= {f"rate {rate:g} -> {other:g}": Variant(options=("--learning-rate", f"{other:g}")) for other in (rate / 2, 2 * rate)}
    found |= {
        "Muon -> AdamW": Variant(options=("--optimizer", "adamw")),
        "average 0.999 -> 0.9": Variant(options=("--ema", "0.9")),  # which counts within a hundred steps: the horizon grows
        f"dropout {config.dropout:g} -> 0.1": Variant({"dropout": 0.1}),
        "flips": Variant(options=("--flip",)),
    }
    same = [told for told, variant in found.items() if variant.config and replace(config, **variant.config) == config]
    return {told: variant for told, variant in found.items() if told not in same}


def start(config: Config, args: argparse.Namespace, folder: Path) -> int:
    """Makes a model folder with the weights that a variant starts from; the FLOPs of a forward over one image."""
    torch.manual_seed(0)
    model = ImageTransformer(config)
    if args.init:
        model.load_state_dict(open_model(args.init).state_dict())  # no weight depends on what variants change
        model.origin = Origin(shortened(args.init), licence=origins.licence(args.init))
    model.save_pretrained(folder)
    return forward_flops(model)


def table(name: str, found: dict[str, Training]) -> str:
    base = found["as it is"].validation_bits_per_dim
    lines = [f"| `{name}` | steps | validation bits/dim | |", "|---|---|---|---|"]
    for variant, training in found.items():
        difference = training.validation_bits_per_dim - base
        told = "" if variant == "as it is" else f"{difference:+.4f}"
        lines.append(f"| {variant} | {training.steps:,} | {training.validation_bits_per_dim:.4f} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="All other options are train.py's, --data among them, which it needs.",
    )
    parser.add_argument("--output", required=True, type=Path)
    beginning = parser.add_mutually_exclusive_group(required=True)
    beginning.add_argument("--preset", choices=sorted(PRESETS), metavar="NAME", help="from fresh weights")
    beginning.add_argument("--init", metavar="MODEL", help="from those of a model folder, bundled name or Hub id")
    parser.add_argument("--max-steps", required=True, type=int, help="of the model as it is; it sets the FLOPs of all")
    parser.add_argument("--learning-rate", required=True, type=float, help="of the model as it is")
    args, options = parser.parse_known_args()  # train.py looks at the rest, and refuses what it does not know
    if args.max_steps < 1:
        parser.error(f"--max-steps must be above 0, got {args.max_steps}.")
    chosen_here = ("--resume", "--optimizer", "--ema", "--flip", "--max-minutes")
    if any(option.split("=")[0] in chosen_here for option in options):
        parser.error(f"{', '.join(chosen_here)} are chosen here: leave them out.")
    check_writable(args.output)
    args.output.mkdir(parents=True, exist_ok=True)

    name = args.preset or args.init
    config = PRESETS[args.preset] if args.preset else open_model(args.init).config
    chosen = variants(config, args.learning_rate)
    asked = {"begin": name, "max_steps": args.max_steps, "learning_rate": args.learning_rate, "options": options}
    asked["variants"] = list(chosen)  # a folder is named after its place among them
    record, found, budget = args.output / "compare.json", {}, 0
    if record.exists() and parse_object(record, read_text(record)) != asked:
        raise SystemExit(f"{record} is of other options. Choose another folder for --output.")
    warmup = str(WARMUPS[args.init is not None])  # each begins with --init: of fresh weights, too
    for number, (told, variant) in enumerate(chosen.items()):
        beginning = args.output / f"{number}-start"
        flops = start(replace(config, **variant.config), args, beginning)
        budget = budget or flops * args.max_steps
        steps = max(round(budget / flops), 1)
        print(f"{told}: {steps:,} steps", file=sys.stderr, flush=True)
        begin = ["--init", str(beginning), "--max-steps", str(steps), "--learning-rate", str(args.learning_rate)]
        # What a variant says comes last, and counts.
        folder = args.output / str(number)
        try:
            found[told] = trainings.train(folder, [*begin, "--warmup", warmup, *options, *variant.options])
        finally:
            if (folder / RUN).exists():  # from now on all have these options; a refusal binds nobody
                write_whole(record, json.dumps(asked, indent=2) + "\n")
        write_whole(args.output / "compare.md", table(name, found))
    print(table(name, found), end="")


if __name__ == "__main__":
    main()
