"""Ready samples that a visitor sees before the first click. `train/gallery.py` draws them and writes `write`'s files."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..images import save_png

SHEETS = {  # how the names of train/figures.py end -> what is on the sheet
    "classes": "by class and temperature", "guidance": "by class and guidance", "completions": "endings for halves of pictures",
    "super-resolution": "from 8x8, at three temperatures",
}


def write(folder: Path, name: str, pictures: np.ndarray, text: str, captions: list[str]) -> None:
    """(N, h, w, 3) uint8 -> name.png, the pictures side by side with nothing between, and name.json.

    text stands under all of them; captions, those of the samples, which are the last of the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_png(np.concatenate(list(pictures), axis=1), folder / f"{name}.png")  # (h, N w, 3)
    about = {"count": len(pictures), "text": text, "captions": captions}
    (folder / f"{name}.json").write_text(json.dumps(about, indent=2) + "\n")


def sheets(folder: Path, first: Sequence[str]) -> list[tuple[str, str]]:
    """Each sheet of samples in `folder`, its path and a caption; those of the models named `first` come before the others."""
    found = {path: kind for path in sorted(folder.glob("*.png")) for kind in SHEETS if path.stem.endswith(f"-{kind}")}
    names = {path: path.stem.removesuffix(f"-{kind}") for path, kind in found.items()}
    ordered = sorted(names, key=lambda path: [*first, names[path]].index(names[path]))
    return [(str(path), f"{names[path]}: {SHEETS[found[path]]}") for path in ordered]


def read(folder: Path, name: str) -> tuple[np.ndarray, str, list[str]]:
    """The pictures (N, h, w, 3) uint8, the text and the captions that `write` was given."""
    about = json.loads((folder / f"{name}.json").read_text())
    row = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
    return np.stack(np.split(row, about["count"], axis=1)), about["text"], about["captions"]
