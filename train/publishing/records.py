"""What a training run and an evaluation leave behind for the model card: `Training` and `Evaluation`."""

import dataclasses
import json
import math
import shlex
import types
import typing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from files import write_whole

ROOT = Path(__file__).resolve().parents[2]
RUN = "run.json"  # in a run's folder: what it began with, for --resume and for origins.py
RECORD = "training.json"  # in it and in its model folder: `Training`
LOG = "log.jsonl"  # in it: what the run has told, a JSON object a line (`Report.log`)


@dataclass(frozen=True)
class Training:
    """A training run: OUTPUT/training.json, with a copy in the model folder.

    Paths in `command` and `data` that lie in the checkout become relative to it; of other absolute ones, and of those that
    begin with "..", only the last name stays, as the file is published. Raises ValueError, naming the field, for a value
    that cannot be.
    """

    command: str  # shlex.join(["python", *sys.argv]); of a resumed run those that differ, in order, with " && " between them
    preset: str | None  # None: it began with other weights, `init`
    data: str  # as given on the command line
    images: int  # trained on
    steps: int
    batch_size: int  # images a step, over all processes
    images_seen: int
    seed: int
    minutes: float  # of training: validation and sample sheets are not counted
    hardware: str
    precision: str  # accelerate's "no", "bf16" or "fp16", or other words
    commit: str | None  # of the checkout; None if it is none
    validation_bits_per_dim: float | None  # of the average, on all held-out images, at the end; None: a checkpoint
    validation_images: int
    curve: tuple[tuple[int, float], ...]  # (step, bits/dim) on the first held-out images, on the way
    data_checksum: str | None = None  # data.Images.checksum of all, held out or not; None: an older record
    init: str | None = None  # the model that was trained on, as given on the command line; None: none, or an older record
    init_licence: dict[str, str | None] | None = None  # of that model: see cards.licence_of; None: not known
    checkpoint: str | None = None  # "step-00001000/ema": that one of the run, up to whose step all else goes; None: the end

    def __post_init__(self):
        check_types(self)
        least = dict(images=1, steps=1, batch_size=1, images_seen=1, seed=0, minutes=0, validation_images=1)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if self.checkpoint and not self.checkpoint.endswith(("/raw", "/ema")):
            raise ValueError(f"checkpoint must be a name and raw or ema, got {self.checkpoint!r}.")
        curve = []
        for point in self.curve:
            if not isinstance(point, (tuple, list)) or len(point) != 2 or not all(map(is_number, point)):
                raise ValueError(f"curve must hold pairs of a step and its bits/dim, got {point!r}.")
            curve.append((int(point[0]), float(point[1])))
        words = (word if word == "&&" else shlex.quote(shortened(word)) for word in shlex.split(self.command))
        told = {"curve": tuple(curve), "command": " ".join(words), "data": shortened(self.data)}
        for name, value in (told | {"init": self.init and shortened(self.init)}).items():
            object.__setattr__(self, name, value)

    def save(self, path: Path) -> None:
        """One field a line, complete under its name or not there. Raises OSError."""
        lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in dataclasses.asdict(self).items())
        write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> "Training":
        """Raises SystemExit with a sentence for a file that `save` would not have written."""
        found, names = parse_object(path, read_text(path)), field_names(cls)
        optional = {field.name for field in dataclasses.fields(cls) if field.default is None}  # which older records lack
        if lacking := sorted(names - optional - found.keys()):
            raise SystemExit(f"{path} lacks {', '.join(lacking)}.")
        if unknown := sorted(found.keys() - names):
            raise SystemExit(f"{path} has fields that no training run writes: {', '.join(unknown)}.")
        try:
            return cls(**found)
        except ValueError as error:
            raise SystemExit(f"{path}: {error}") from error


@dataclass(frozen=True)
class Evaluation:
    """Figures of evaluate.py, under its own names. Raises ValueError, naming the field, for a value that cannot be."""

    bits_per_dim: float
    likelihood: str  # of what: "p(image)", "p(image | class)" or "p(high | low)"
    images: int
    shuffled_labels_bits_per_dim: float | None = None
    shuffled_sources_bits_per_dim: float | None = None
    consistency_rmse: float | None = None  # levels, 0..255
    consistency_samples: int | None = None
    split: str = "test"  # of the data
    options: str | None = None  # other ones than --checkpoint and --data that the figures depend on

    def __post_init__(self):
        check_types(self)
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}.")

    @property
    def shuffled(self) -> tuple[str, float] | None:
        """What was shuffled ("labels" or "sources") and bits/dim with it; None if nothing was."""
        for condition in ("labels", "sources"):
            if (value := getattr(self, f"shuffled_{condition}_bits_per_dim")) is not None:
                return condition, value
        return None

    @classmethod
    def parse(cls, text: str, where: str | Path, parameters: int) -> "Evaluation":
        """The JSON object in the last line of what evaluate.py printed, of a model with so many parameters.

        Raises SystemExit with a sentence that begins with `where`.
        """
        found = parse_object(where, text.strip().rpartition("\n")[2])
        if lacking := sorted({"bits_per_dim", "likelihood", "images", "parameters"} - found.keys()):
            raise SystemExit(f"{where}: its last line is not evaluate.py's, as it lacks {', '.join(lacking)}.")
        if found["parameters"] != parameters:
            raise SystemExit(f"{where} is of another model, of {found['parameters']} parameters and not {parameters}.")
        try:
            return cls(**{name: value for name, value in found.items() if name in field_names(cls)})
        except ValueError as error:
            raise SystemExit(f"{where}: {error}") from error


def shortened(word: str) -> str:
    """A word of a command line, a path in it that leads elsewhere cut down to what can be told to others."""
    option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    if PurePosixPath(value).is_absolute() and Path(value).is_relative_to(ROOT):
        value = Path(value).relative_to(ROOT).as_posix()
    elif PurePosixPath(value).is_absolute() or value.startswith("../"):
        value = f".../{PurePosixPath(value).name}"
    elif PureWindowsPath(value).is_absolute():
        value = f".../{PureWindowsPath(value).name}"
    return f"{option}{equals}{value}"


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def field_names(of: type) -> set[str]:
    return {field.name for field in dataclasses.fields(of)}


def check_types(facts) -> None:
    """Raises ValueError, naming the field, unless the fields of a dataclass are what their annotations say."""
    checks = {
        str: ("words", lambda value: isinstance(value, str) and bool(value)),
        int: ("a whole number", lambda value: type(value) is int),
        float: ("a finite number", is_number),
        tuple: ("a list", lambda value: isinstance(value, (tuple, list))),
        types.NoneType: ("null", lambda value: value is None),
    }
    for field in dataclasses.fields(facts):
        value = getattr(facts, field.name)
        kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        kinds = [typing.get_origin(kind) or kind for kind in kinds]
        names, fits = zip(*(checks.get(kind, (kind.__name__, lambda v, kind=kind: isinstance(v, kind))) for kind in kinds))
        if not any(fit(value) for fit in fits):
            raise ValueError(f"{field.name} must be {' or '.join(names)}, got {value!r}.")


def read_text(path: Path) -> str:
    """Raises SystemExit with a sentence if the file cannot be read as text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is no text file.") from error
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error.strerror}.") from error


def parse_object(where: str | Path, text: str) -> dict:
    """Raises SystemExit with a sentence that begins with `where` unless the text is a JSON object."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise SystemExit(f"{where} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise SystemExit(f"{where} holds no JSON object.")
    return found


def log_up_to(path: Path, step: int) -> str:
    """The lines of a run's log up to a step, without one that the run died in.

    Raises OSError, and SystemExit with a sentence for a file that is no log.
    """
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    try:
        return "".join(line for line in lines if json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not the log of a training run ({error!r}): remove it, or put it right.") from error
