"""What a training run starts from: fresh weights of a preset, or the weights of another model (--init); when it is resumed,
what it noted when it began.

A model that is trained on keeps its configuration, except for its classes, which become those of the data, and its layers
where --layers asks for more.
"""

import argparse
import math
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from averaging import open_model
from data.folders import composed
from growth import deepened
from imtx import PRESETS, Config, ImageTransformer
from imtx.checkpoint import Origin
from publishing import origins
from publishing.records import RUN, parse_object, read_text, shortened

# What a resumed run must have as it was, and notes in OUTPUT/run.json.
SETTINGS = ("preset", "init", "layers", "seed", "batch_size", "validation", "flip", "optimizer", "schedule")
# What it notes too, goes on with unless told otherwise, and may change; so may its budget.
CHANGEABLE = ("learning_rate", "warmup", "weight_decay", "clip", "ema", "mixed_precision")


def noted(output: Path) -> dict:
    """What the run in this folder noted when it began; nothing if all that there is are its checkpoints."""
    note = output / RUN
    return parse_object(note, read_text(note)) if note.exists() else {}


def check_settings(args: argparse.Namespace, before: dict) -> None:
    """Refuses to resume a run with settings that change what it computes. before: what it noted."""
    now = {name: getattr(args, name) for name in SETTINGS}
    before = now | {"init": None, "layers": None} | before if before else now  # which older runs did not note
    for name in SETTINGS:
        there, here = given(name, before[name]), given(name, now[name])
        if name in ("preset", "init") and None in (before[name], now[name]):  # one of them stands in for the other
            there, here = (given(n, s[n]) for s in (before, now) for n in ("preset", "init") if s[n])
        if before[name] != now[name] and not (name == "init" and same_folder(before[name], now[name])):
            raise SystemExit(
                f"--resume: this run has {there}, not {here}. Go on with what it has, or choose another folder for --output."
            )


def given(name: str, value) -> str:
    """How it was told on the command line."""
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"no {option}"
    return option if value is True else f"{option} {value}"


def changes(args: argparse.Namespace, before: dict) -> list[str]:
    """What a resumed run does otherwise than before, a sentence each."""
    return [
        f"This run goes on with --{name.replace('_', '-')} {getattr(args, name)}; it had {before[name]}."
        for name in CHANGEABLE if before.get(name, getattr(args, name)) != getattr(args, name)
    ]


def commands(before: dict) -> list[str]:
    """Those that the run was made with so far, this one last; not again where it was interrupted and went on as it was."""
    own, noted_ones = shlex.join(["python", *sys.argv]), before.get("commands", [])
    if noted_ones and _to_resume(noted_ones[-1]) == _to_resume(own):
        return noted_ones
    return [*noted_ones, own]


def _to_resume(command: str) -> str:
    """A command without the option that alone tells going on from beginning."""
    return re.sub(r" --resume[ =]\S+", "", command)


def same_folder(one: str | None, other: str | None) -> bool:
    return None not in (one, other) and Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other)


def check_data(args: argparse.Namespace, before: dict, labels: list[str] | None, images: int, checksum: str | None) -> None:
    """Refuses to resume a run on data that are not what they were: other images would come in each step."""
    model = args.output / "model"
    way_out = f"Give what it began with, or train {model} on: --init {model}, and another folder for --output."
    named = before.get("labels", labels)
    if named != labels and (None in (named, labels) or composed(named) != composed(labels)):
        there, here = ("none" if names is None else ", ".join(names) or "unnamed" for names in (named, labels))
        raise SystemExit(f"--resume: the labels of this run's data are {there}; those of {args.data} are {here}. {way_out}")
    if (counted := before.get("images", images)) != images:
        raise SystemExit(
            f"--resume: the data have changed. They had {counted:,} images when this run began, {args.data} has {images:,}. "
            f"{way_out}"
        )
    if before.get("data_checksum", checksum) != checksum:
        raise SystemExit(
            f"--resume: the data have changed. Some pictures or labels of {args.data} are others than when this run "
            f"began, or another version of Pillow decodes them otherwise. {way_out}"
        )


@dataclass(frozen=True)
class Start:
    config: Config  # before the data's classes
    model: ImageTransformer | None = None  # whose weights are trained on; None: a preset, or a resumed run
    origin: Origin | None = None  # what the trained weights are made from, and keep with them; None: a preset

    @property
    def licence(self) -> dict | None:
        """Of the weights to start from: see cards.licence_of; None: a preset, or not known."""
        return self.origin and self.origin.licence

    @classmethod
    def of(cls, args: argparse.Namespace, before: dict) -> "Start":
        """Raises SystemExit with a sentence if the model cannot be opened.

        A resumed run has all of it in its own folder: the other model may have changed, or be gone. before: what it noted.
        """
        if args.preset is not None:
            return cls(PRESETS[args.preset])
        if args.resume is not None and (saved := sorted(args.output.glob("checkpoints/*/raw/config.json"))):
            config = Config.load(saved[0])
            if args.layers not in (None, config.layers):
                raise SystemExit(
                    f"--resume: this run has {config.layers} decoder layers, not {args.layers}. Go on with what it has, or "
                    "choose another folder for --output."
                )
            return cls(config, origin=Origin(shortened(args.init), licence=before.get("init_licence")))
        model = open_model(args.init)
        if args.layers is not None:
            model = deepened(model, args.layers)
        return cls(model.config, model, Origin(shortened(args.init), licence=origins.licence(args.init)))

    def into(self, model: ImageTransformer) -> None:
        """Gives `model`, of the same configuration but for its classes, the weights to start from, if there are any.

        The model, and copies of it, tell from then on what they were made from.
        """
        model.origin = self.origin
        if self.model is not None:
            model.load_state_dict(relabelled(self.model, model.config))


def relabelled(model: ImageTransformer, config: Config) -> dict[str, Tensor]:
    """The model's weights for `config`, which is its own but for the classes.

    Rows of labels follow the names; a new name starts as "no class" does. Without classes, what "no class" adds to every
    position goes into a table that is added there as well, so that the likelihoods stay what they were. Raises SystemExit
    with a sentence if there is no such table: sinusoids are no weights.
    """
    weights, old = {name: weight.clone() for name, weight in model.state_dict().items()}, model.config.classes
    if old == config.classes:
        return weights
    rows = weights.pop("label.weight")  # (classes + 1, d), the last for "no class"
    if config.classes:
        old = composed(old)
        kept = [old.index(name) if name in old else len(old) for name in composed(config.classes)]
        return weights | {"label.weight": rows[kept + [len(old)]]}
    tables = {"embedding.row.weight": 1.0, "embedding.place.row.weight": math.sqrt(config.width)}  # modern, paper
    for name, factor in tables.items():
        if name in weights:
            weights[name] += rows[-1] / factor
            return weights
    raise SystemExit(
        "--init: this model's positions are sinusoids, and without classes it cannot stay what it is. Put the pictures "
        "into folders by class, be it one, or start from a model with learned positions."
    )
