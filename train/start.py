"""What a training run starts from: fresh weights of a preset, or the weights of another model (--init).

A model that is trained on keeps its configuration, except for its classes, which become those of the data.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from torch import Tensor

from averaging import open_model
from imtx import PRESETS, Config, ImageTransformer
from imtx.checkpoint import find
from publishing.cards import licence_of
from publishing.records import RUN, origin, parse_object, read_text


@dataclass(frozen=True)
class Start:
    config: Config  # before the data's classes
    model: ImageTransformer | None = None  # whose weights are trained on; None: a preset, or a resumed run
    licence: dict | None = None  # of these weights: see `licence_of`; None: a preset, or not known

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Start":
        """Raises SystemExit with a sentence if the model cannot be opened.

        A resumed run has all of it in its own folder: the other model may have changed, or be gone.
        """
        if args.preset is not None:
            return cls(PRESETS[args.preset])
        if args.resume is not None and (saved := sorted(args.output.glob("checkpoints/*/raw/config.json"))):
            note = args.output / RUN
            known = parse_object(note, read_text(note)) if note.exists() else {}
            return cls(Config.load(saved[0]), licence=known.get("init_licence"))
        model = open_model(args.init)
        return cls(model.config, model, init_licence(args.init))

    def into(self, model: ImageTransformer) -> None:
        """Gives `model`, of the same configuration but for its classes, the weights to start from, if there are any."""
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
        kept = [old.index(name) if name in old else len(old) for name in config.classes]
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


def init_licence(name: str) -> dict | None:
    """Of a model folder, bundled name or Hub id: by its card or, without one, by what it was trained on from itself."""
    folder = find(name)
    card = folder / "README.md"
    if not Path(name).is_dir() and folder.parent.name == "snapshots":  # of a Hub id, whose weights came without the card
        try:
            card = Path(hf_hub_download(name, "README.md", revision=folder.name))
        except (EntryNotFoundError, HfHubHTTPError) as error:
            print(f"The card of {name} cannot be read, nor its licence: {str(error).splitlines()[0]}", file=sys.stderr)
    if card.exists():
        return licence_of(card)
    return (origin(folder) or (None, None))[1]
