"""Models by name, and the mean of several: the checkpoint averaging behind the paper's ImageNet figure."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from imtx import CheckpointError, Config, ImageTransformer


def open_model(name: str | Path) -> ImageTransformer:
    """A model in float32 and eval mode, from a folder, a bundled name or a Hub id.

    Raises SystemExit with a sentence if there is none; for a training run's own folders it names the models inside.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        for inside in (".", "step-*", "checkpoints/step-*"):  # of a checkpoint, of all of them, of a run
            for raw in sorted(folder.glob(f"{inside}/raw"), reverse=True):
                ema = folder / "model" if (folder / "model" / "config.json").exists() else raw.with_name("ema")
                raise SystemExit(
                    f"{folder} is no model folder: name {ema} for the moving average of the weights, or {raw} for the "
                    "weights themselves."
                )
    try:
        return ImageTransformer.from_pretrained(name)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error


def difference(one: Config, other: Config) -> tuple[str, object, object] | None:
    """The first field in which two configurations differ, and its two values; None if they are equal."""
    for field in dataclasses.fields(Config):
        values = getattr(one, field.name), getattr(other, field.name)
        if values[0] != values[1]:
            return field.name, *values
    return None


def average(names: Sequence[str]) -> ImageTransformer:
    """The model whose weights are the arithmetic means of the named models' weights, taken in float64; eval mode.

    Its origin is left to whoever saves it.

    Raises SystemExit with a sentence if one cannot be opened or their configurations differ.
    """
    model = open_model(names[0])
    total = {weight: tensor.double() for weight, tensor in model.state_dict().items()}
    for name in names[1:]:
        other = open_model(name)
        if found := difference(model.config, other.config):
            field, one, two = found
            raise SystemExit(
                f"--average takes models of one configuration: {field} is {one!r} in {names[0]} and {two!r} in {name}."
            )
        for weight, tensor in other.state_dict().items():
            total[weight] += tensor
    model.origin = None
    model.load_state_dict({weight: (tensor / len(names)).to(torch.float32) for weight, tensor in total.items()})
    return model
