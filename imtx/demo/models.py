"""Which models are installed, under which names, and their weights from the moment that somebody asks for them."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from .. import fast
from ..checkpoint import BUNDLED, CheckpointError, find
from ..config import Config
from ..model import ImageTransformer
from ..sampling import whole_rows
from . import requests

GENERATOR, UPSCALER = "cifar10-dmol-1d", "faces-sr-2d"  # the bundled models that come first, and drew the gallery


class Installed:
    """A model folder under the name that visitors choose it by.

    What it is (`config`) is read at once, its weights when they are first asked for; whatever cannot be read is not
    tried again, and the rest of the demo goes on without it.
    """

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.config: Config | None = None  # None: config.json cannot be read
        self.error = ""  # why it cannot be used, for the log
        self._model: ImageTransformer | None = None
        self._warming = False
        self._reading = threading.Lock()  # two visitors may ask for the same weights at once
        try:
            self.config = Config.load(folder / "config.json")
        except (OSError, ValueError, TypeError):
            self.load(quietly=True)  # fails for the same reason, and says it in a sentence
        if self.config is not None and self.config.levels != 256:  # canvas and PNG files show levels as they are
            self.error = f"{folder / 'config.json'}: a colour has {self.config.levels} levels, and the demo shows 256."

    def load(self, quietly: bool = False) -> bool:
        """Whether the weights are there. Read now, with a line in the log unless `quietly`, if nobody has asked before."""
        with self._reading:
            if self._model is None and not self.error:
                try:
                    self._model = ImageTransformer.from_pretrained(self.folder)
                    self.config = self._model.config
                except CheckpointError as error:
                    self.error = str(error)
                if not quietly:
                    print(self, flush=True)
            return self._model is not None

    @property
    def drew_the_gallery(self) -> bool:
        return self.folder in (BUNDLED / GENERATOR, BUNDLED / UPSCALER)

    @property
    def classes(self) -> tuple[str, ...]:
        return () if self.config is None else self.config.classes

    @property
    def model(self) -> ImageTransformer:
        """Refuses a visitor whose model cannot be loaded."""
        if not self.load():
            raise requests.refusal(f"The weights of {self.name} are not loaded. {self.public_error}")
        return self._model

    @property
    def engine(self) -> str | None:
        """What draws the next picture. No visitor waits for a compiler: until it is done, PyTorch draws."""
        model = self.model
        self.warm_up()
        return "eager" if fast.obstacle(model) is None and not fast.is_warm(model) else None

    def warm_up(self) -> None:
        """Has the model's sampler compiled in the background, if nobody did before."""
        with self._reading:
            if self._model is None or self._warming or fast.obstacle(self._model) is not None:  # sampling says why, once
                return
            self._warming = True
        threading.Thread(target=fast.warm, args=[self._model], daemon=True).start()

    @property
    def public_error(self) -> str:
        """Visitors need not know where files lie."""
        return self.error.replace(f"{self.folder}/", "").replace(str(self.folder), self.name)

    @property
    def about(self) -> str:
        """A line for visitors: what the model is, or why it cannot be used."""
        if not self.load():
            return f"Cannot be used. {self.public_error}"
        config = self.config
        side, parts = config.image_size, "row by row"
        if config.layout == "2d":
            rows, columns = config.query_block
            parts = f"in blocks {columns} pixels wide and {rows} high"
        output = "DMOL" if config.output == "dmol" else config.output
        return f"Draws {side}x{side} pictures {parts}. {config.layout.upper()} layout, {output} output, {self._size}."

    @property
    def about_completing(self) -> str:
        """How much of a picture a completion keeps, in a sentence for visitors; none for a model that cannot be used."""
        if not self.load():
            return ""
        config, rows = self.config, kept_rows(self._model)
        if config.layout == "1d":
            return f"The top {rows} of {config.image_size} rows are kept."
        blocks = f"This model draws blocks of {config.query_block[0]} rows"
        if rows:
            return f"{blocks}: the top {rows} rows are kept."
        return f"{blocks} and cannot keep a top half: choose another model."

    @property
    def _size(self) -> str:
        return f"{sum(p.numel() for p in self._model.parameters()):,} parameters"

    def __str__(self) -> str:
        """For the log."""
        if self.error:
            return f"{self.name}: not loaded. {self.error}"
        return f"{self.name} ({self.folder})" + (f", {self._size}" if self._model is not None else "")


def kept_rows(model: ImageTransformer) -> int:
    """How many rows of a picture a completion keeps: the top half, or what of it is drawn first. 0 = it cannot keep any."""
    return whole_rows(model, model.config.image_size // 2)


def installed(named: Sequence[str] = ()) -> tuple[dict[str, Installed], dict[str, Installed]]:
    """By name, the models that draw from nothing or go on with a part; and those that enlarge. The first of each is loaded.

    `named` come first: folders, bundled names or Hub ids from the command line. One whose config.json cannot be used, or that
    the page would start with and whose weights cannot be read, is a CheckpointError; other weights are read when asked for.
    A bundled model that cannot be read is left out, with a line in the log; the first of a task stays in, so that visitors
    are told why there is none.
    """
    folders: dict[str, Path] = {}  # in the order of the lists
    bundled = [GENERATOR, UPSCALER]
    bundled += sorted({f.name for f in BUNDLED.glob("*") if f.is_dir() and not f.name.startswith(".")} - {*bundled})
    for name in named:
        folder = find(name).resolve()
        if folder not in folders.values():
            folders[_shown(name, folder, {*bundled, *folders})] = folder
    own = tuple(folders)
    folders |= {name: BUNDLED / name for name in bundled}

    generators, upscalers = {}, {}
    for name, folder in folders.items():
        model = Installed(name, folder)
        if name in own and model.error:
            raise CheckpointError(model.error)
        if model.config is not None:
            task = upscalers if model.config.source_size else generators
        elif name in (GENERATOR, UPSCALER):
            task = upscalers if name == UPSCALER else generators
        else:
            print(f"{model} It is left out.", flush=True)
            continue
        task[name] = model
    for models in (generators, upscalers):
        first = next(iter(models.values()))
        if not first.load(quietly=True) and first.name in own:
            raise CheckpointError(first.error)
    return generators, upscalers


def _shown(name: str, folder: Path, taken: set[str]) -> str:
    """What visitors call a model of the command line: a bundled name, a Hub id, or the part of a path that tells it apart.

    No two models are called the same.
    """
    if folder.parent == BUNDLED:
        return folder.name
    shown = name
    if Path(name).is_dir():
        parts = Path(os.path.abspath(name)).parts
        # Every run's model is called runs/NAME/model, and NAME/checkpoints/step-.../raw or ema.
        shown = parts[-2] if parts[-1] == "model" else "/".join(parts[-2:]) if parts[-1] in ("raw", "ema") else parts[-1]
    unique = shown
    number = 2
    while unique in taken:
        unique = f"{shown} ({number})"
        number += 1
    return unique
