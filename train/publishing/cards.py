"""The front matter of model cards, from which the Hub fills its page and zoo.py its table."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .known_data import KNOWN, Licence
from .records import Evaluation, check_types, read_text
from imtx import Config

GENERATION, SUPER_RESOLUTION = "generation", "super-resolution"
PIPELINES = {GENERATION: "unconditional-image-generation", SUPER_RESOLUTION: "image-to-image"}  # the Hub's names of tasks

FREE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "cc-by-4.0", "unlicense"}  # as to what is made


def task_of(config: Config) -> str:
    return SUPER_RESOLUTION if config.source_size else GENERATION


def facts(card: Path) -> dict:
    """Of any model's card. Raises SystemExit with a sentence if it cannot be read."""
    try:
        return ModelCard(read_text(card)).data.to_dict()
    except (yaml.YAMLError, ValueError) as error:
        raise SystemExit(f"{card}: its front matter cannot be read: {error}") from error


def licence_of(card: Path) -> dict[str, str | None] | None:
    """"id", "name" and "link" of the weights that a card is about, in the Hub's words; None if it names no licence."""
    found = facts(card)
    named = {part: found.get(f"license{key}") for part, key in (("id", ""), ("name", "_name"), ("link", "_link"))}
    if isinstance(named["id"], list):  # which the Hub allows
        named["id"] = ", ".join(named["id"])
    return named if named["id"] else None


def binding(licence: dict[str, str | None] | None) -> Licence | None:
    """The licence of weights that were made from others with this one; None if it leaves their author the choice.

    What is not known to leave it is taken on as it is.
    """
    if licence is None or licence["id"] in FREE:
        return None
    for data in KNOWN.values():
        if data.weights and (data.weights.id, data.weights.name) == (licence["id"], licence["name"]):
            return data.weights
    named = licence["name"] or licence["id"]
    return Licence(id=licence["id"], text=f"`{named}`", name=licence["name"], link=licence["link"])


@dataclass(frozen=True)
class Entry:
    """What the front matter of a card says: `front_matter` writes it, `read` reads it back."""

    hub_id: str
    task: str  # GENERATION or SUPER_RESOLUTION
    preset: str | None  # None: not recorded
    parameters: int
    dtype: str  # of the stored weights: "float32" or "bfloat16"
    data: str  # its name
    data_note: str | None  # more about it
    dataset: str | None  # the Hub's data set of that name
    licence: str  # of the weights, as the Hub abbreviates it
    licence_name: str | None  # if that is "other"
    licence_link: str | None
    evaluation: Evaluation | None  # None: not measured
    init: str | None = None  # the model that was trained on; None: none, or not recorded

    def __post_init__(self):
        check_types(self)
        if self.task not in PIPELINES:
            raise ValueError(f"task must be {' or '.join(PIPELINES)}, got {self.task!r}.")

    @property
    def name(self) -> str:
        return self.hub_id.rpartition("/")[2]

    def front_matter(self) -> str:
        """YAML with the Hub's own fields and, under `imtx`, what it has none for; with the lines of dashes around it."""
        names = ("hub_id", "task", "preset", "parameters", "dtype", "data", "data_note")
        own = {name: getattr(self, name) for name in names} | ({"init": self.init} if self.init else {})
        figures = self.evaluation and dataclasses.asdict(self.evaluation)
        usual = {"split": "test"}
        own["evaluation"] = figures and {name: v for name, v in figures.items() if v is not None and usual.get(name) != v}
        data = ModelCardData(
            license=self.licence,
            license_name=self.licence_name,
            license_link=self.licence_link,
            library_name="imtx",
            pipeline_tag=PIPELINES[self.task],
            tags=["image-transformer", "autoregressive", "image-generation" if self.task == GENERATION else self.task],
            datasets=self.dataset and [self.dataset],
            model_name=self.name if self.evaluation else None,  # of the model-index
            eval_results=self._results(),
            imtx=own,
        )
        return f"---\n{data.to_yaml()}\n---\n"

    def _results(self) -> list[EvalResult] | None:
        figure = self.evaluation
        if figure is None:
            return None
        values = {"bits_per_dim": (figure.bits_per_dim, f"bits/dim of {figure.likelihood}, {figure.images} images")}
        if figure.shuffled:
            condition, value = figure.shuffled
            values[f"shuffled_{condition}_bits_per_dim"] = value, f"bits/dim with {condition} shuffled"
        # Not `dataset` for the type: the pictures measured on need not be the Hub's, as the note may tell.
        kind_of_data = re.sub(r"\W+", "-", self.data.lower()).strip("-")
        return [
            EvalResult(
                task_type=PIPELINES[self.task], task_name=self.task, dataset_split=figure.split, dataset_type=kind_of_data,
                dataset_name=", ".join(filter(None, (self.data, self.data_note))),
                metric_type=kind, metric_value=value, metric_name=name,
            )
            for kind, (value, name) in values.items()
        ]

    @classmethod
    def read(cls, card: Path) -> "Entry":
        """Raises SystemExit with a sentence for a file that is no card of publish.py."""
        found = facts(card)
        if not isinstance(own := found.get("imtx"), dict):
            raise SystemExit(f"{card} has no `imtx` in its front matter: it is no card of train/publish.py.")
        licence = {f"licence{part}": found.get(f"license{part}") for part in ("", "_name", "_link")}
        try:
            evaluation = None if own["evaluation"] is None else Evaluation(**own["evaluation"])
            dataset = (found.get("datasets") or [None])[0]
            return cls(**{**own, "evaluation": evaluation}, dataset=dataset, **licence)
        except (KeyError, TypeError, ValueError) as error:  # missing, unknown and impossible fields
            raise SystemExit(f"{card}: `imtx` in its front matter cannot be read: {error}") from error
