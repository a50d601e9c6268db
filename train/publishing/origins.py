"""Where the weights in a model folder come from: the training run that left them, and what was trained on or averaged."""

import dataclasses
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from httpx import HTTPError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from .cards import binding, licence_of
from .records import LOG, RECORD, RUN, Training, log_up_to, parse_object, read_text, shortened
from imtx.checkpoint import Origin, find, load_origin

PROGRESS = "custom_checkpoint_0.pkl"  # in a checkpoint: accelerate's name for the run's Progress


def run_of(folder: Path) -> Path | None:
    """OUTPUT of the training run whose OUTPUT/model or OUTPUT/checkpoints/NAME/raw or ema a folder is."""
    folder = folder.resolve()
    above = folder.parent.parent.parent if folder.name in ("raw", "ema") else folder.parent
    return above if folder.name in ("model", "raw", "ema") and (above / RUN).exists() else None


def training(folder: Path) -> Training | None:
    """The record of the run that left the weights in a model folder, of a checkpoint up to its step; None: not recorded.

    Raises SystemExit with a sentence if there is a record that cannot be read.
    """
    folder = folder.resolve()
    if (record := folder / RECORD).exists():
        return Training.load(record)
    if (run := run_of(folder)) is None:
        return None
    if not (run / RECORD).exists():
        print(f"{run} has no {RECORD}, which a run leaves at its end: the card lacks command, data and curve.", file=sys.stderr)
        return None
    whole = Training.load(run / RECORD)
    if folder.name == "model":
        return whole
    try:
        progress = torch.load(folder.parent / PROGRESS, weights_only=True)
        step, seconds, told = progress["step"], progress["seconds"], progress.get("told", {})  # older ones have none
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError) as error:
        raise SystemExit(
            f"{folder.parent / PROGRESS} cannot be read, which tells how far the run had come ({error}). Publish another "
            f"checkpoint, or {run / 'model'}."
        ) from error
    if step == whole.steps and folder.name == "ema":
        return whole  # OUTPUT/model is the same
    return dataclasses.replace(
        whole, steps=step, images_seen=step * whole.batch_size, minutes=seconds / 60, validation_bits_per_dim=None,
        curve=tuple(point for point in whole.curve if point[0] <= step), checkpoint=f"{folder.parent.name}/{folder.name}", **told,
    )


def log(folder: Path, found: Training | None) -> str | None:
    """What the run has told that left the weights in a model folder, up to the step of its record `found`; None: not kept."""
    folder = folder.resolve()
    path = folder / LOG if (folder / LOG).exists() or not (run := run_of(folder)) else run / LOG
    return log_up_to(path, found.steps) if found and path.exists() else None


def origin(folder: Path) -> Origin | None:
    """What the weights in a model folder were made from; None: nothing is recorded, not even that it was nothing.

    They tell it themselves, or else the record of the run that trained them, or what that run noted when it began.
    """
    if (own := load_origin(folder)) is not None:
        return own
    if (folder / RECORD).exists():
        where, noted = folder / RECORD, vars(Training.load(folder / RECORD))
    elif run := run_of(folder):
        where, noted = run / RUN, parse_object(run / RUN, read_text(run / RUN))
    else:
        return None
    try:
        init = noted.get("init")  # older notes lack both
        return Origin(init=init and shortened(init), licence=noted.get("init_licence"))
    except (ValueError, AttributeError) as error:
        raise SystemExit(f"{where}: what the weights were trained on from cannot be read: {error}") from error


def licence(name: str) -> dict[str, str | None] | None:
    """Of the weights of a model folder, bundled name or Hub id: one that binds them by their origin, or else their card's."""
    folder = find(name)
    inherited = found.licence if (found := origin(folder)) else None
    if binding(inherited):
        return inherited
    card = folder / "README.md"
    if not Path(name).is_dir() and folder.parent.name == "snapshots":  # of a Hub id, whose weights came without the card
        try:
            card = Path(hf_hub_download(name, "README.md", revision=folder.name))
        except (EntryNotFoundError, HfHubHTTPError, HTTPError, OSError) as error:
            cause = str(error).partition("\n")[0] or type(error).__name__
            print(f"The card of {name} cannot be read, nor its licence: {cause}", file=sys.stderr)
    return licence_of(card) if card.exists() else inherited


def mean(names: Sequence[str]) -> Origin:
    """The origin of these models' mean. Raises SystemExit with a sentence if no licence fits it."""
    licences = {name: licence(name) for name in names}
    bound = {name: asked for name, found in licences.items() if (asked := binding(found))}
    if len({(asked.id, asked.name) for asked in bound.values()}) > 1:
        all_asked = ", and ".join(f"{name} asks for `{asked.name or asked.id}`" for name, asked in bound.items())
        raise SystemExit(f"No licence fits the mean of these weights: {all_asked}. Leave --save out, or average others.")
    strictest = next(iter(bound.values())).named if bound else next(filter(None, licences.values()), None)
    inits = dict.fromkeys(found.init for name in names if (found := origin(find(name))) and found.init)
    return Origin(init=", ".join(inits) or None, average_of=tuple(map(told, names)), licence=strictest)


def told(name: str) -> str:
    """A model's name for others to read: of an absolute path the end, from the run's folder on if it is in one."""
    run = run_of(Path(name))
    return f".../{Path(name).resolve().relative_to(run.parent)}" if run and Path(name).is_absolute() else shortened(name)
