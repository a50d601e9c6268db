"""Trains a preset, or trains a model on: python train/train.py --preset tiny --data FOLDER --output DIR --max-steps 200.

Runs on a CPU or on one GPU as it is. OUTPUT/model is the moving average of the weights, which
`ImageTransformer.from_pretrained` reads; OUTPUT/checkpoints holds what a resumed run needs (and, in each, the model folders
raw and ema), OUTPUT/log.jsonl what happened.
"""

if __name__ == "__main__":
    import ctrl_c

    ctrl_c.ends_quietly()

import argparse
import difflib
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import data
from imtx import PRESETS
from processes import told_by_the_launcher
from run import Run
from start import noted

# Of fresh weights, and of others that are trained on: these have little to lose to a gradient's first steps, and few to take.
RATES, WARMUPS = (2e-3, 1e-3), (100, 20)
DEFAULTS = {"weight_decay": 0.01, "clip": 1.0, "ema": 0.999, "mixed_precision": "no"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    begin = parser.add_mutually_exclusive_group(required=True)
    presets = sorted(PRESETS)
    begin.add_argument("--preset", metavar="NAME", help=f"begin with fresh weights, in this configuration: {', '.join(presets)}")
    begin.add_argument(
        "--init", metavar="MODEL", help="begin with the weights of a model folder, bundled name or Hub id. It gets the "
        "classes of the data, none if those have none; one that has none already stays so",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="with --init: deepen the model to N decoder layers, a multiple of what it "
        "has; it begins with the same outputs"
    )
    data.add_options(parser, split="train")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--max-steps", type=int, help="the budget, in optimizer steps")
    parser.add_argument("--max-minutes", type=float, help="the budget, in minutes of training; whichever ends first")
    parser.add_argument(
        "--validation", type=int, metavar="N",
        help="hold out the last N training images (a tenth, at most 2000; faces presets at most 1000)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images a step, over all processes")
    parser.add_argument("--accumulate", type=int, default=1, help="parts that a process does its share of a step in")
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw", "paper"), help="paper: Adam as in T2T")
    peak = "peak rate ({:g}; with --init {:g})".format(*RATES)
    parser.add_argument("--learning-rate", type=float, metavar="RATE", help=peak)
    parser.add_argument(
        "--schedule", default="constant", choices=("constant", "cosine", "paper"),
        help="of the rate after warm-up: constant, then to zero over the last 15 %% of the budget; cosine to zero; 1/sqrt(step)",
    )
    parser.add_argument("--warmup", type=int, metavar="N", help="steps ({}; with --init {})".format(*WARMUPS))
    parser.add_argument("--weight-decay", type=float, metavar="X", help="({weight_decay})".format(**DEFAULTS))
    parser.add_argument("--clip", type=float, metavar="X", help="largest norm of the gradient ({clip})".format(**DEFAULTS))
    parser.add_argument("--ema", type=float, metavar="X", help="decay of the weights' moving average ({ema})".format(**DEFAULTS))
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="({mixed_precision})".format(**DEFAULTS))
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1000, help="steps between checkpoint, validation and sample sheet")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints kept, the last ones; for evaluate.py --average")
    parser.add_argument("--validate-on", type=int, default=200, help="held-out images at each of these (all at the end)")
    parser.add_argument("--track", choices=("tensorboard",), help="log to this as well, in OUTPUT/tensorboard")
    parser.add_argument("--resume", metavar="NAME", help='"latest", or the name of a folder in OUTPUT/checkpoints; what the run '
                        "had after that one is kept in OUTPUT/former-1, -2, ...")
    args, unknown = parser.parse_known_args()
    if unknown:
        options = [f"--{name.replace('_', '-')}" for name in vars(args)]
        parser.error(f"there is no option {unknown[0]}. {nearest(unknown[0].split('=')[0], options)}")
    if args.preset is not None and args.preset not in PRESETS:
        parser.error(f"there is no --preset {args.preset}. {nearest(args.preset, presets)}")
    if args.max_steps is None and args.max_minutes is None:
        parser.error("Give a budget: --max-steps, --max-minutes or both.")
    if args.layers is not None and args.init is None:
        parser.error("--layers goes with --init; a preset has its layers.")
    if args.init == "":
        parser.error("--init is empty. It takes a model folder, a bundled name or a Hub id.")
    given = args.init is not None
    before = noted(args.output) if args.resume is not None else {}  # a resumed run goes on with what it had
    for name, value in (DEFAULTS | {"learning_rate": RATES[given], "warmup": WARMUPS[given]}).items():
        if getattr(args, name) is None:
            setattr(args, name, before.get(name, value))
    above_0 = "max_steps max_minutes batch_size accumulate validation learning_rate warmup clip every keep validate_on"
    for name in above_0.split():
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}.")
    if args.learning_rate > 1e30:  # it has to stay within float32, or AdamW itself raises
        parser.error(f"--learning-rate must be at most 1e30, got {args.learning_rate:g}; {RATES[given]:g} is the default.")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be in 0..{2**32 - 1}, got {args.seed}.")
    if not 0 <= args.ema < 1 or not 0 <= args.weight_decay < math.inf:
        parser.error(f"--ema must be in [0, 1) and --weight-decay at least 0, got {args.ema} and {args.weight_decay}.")
    return args


def nearest(word: str, names: list[str]) -> str:
    """A sentence that says what may have been meant."""
    bare = {name.lstrip("-"): name for name in names}
    found = [bare[name] for name in difflib.get_close_matches(word.lstrip("-"), bare, n=1)]
    return f"Did you mean {found[0]}?" if found else "--help lists them."


@told_by_the_launcher
def main() -> None:
    run = Run(arguments())
    run.train()
    result = run.finish()
    if run.accelerator.is_main_process:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
