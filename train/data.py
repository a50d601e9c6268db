"""Images for training and evaluation, read from parquet into memory."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from imtx import Config


@dataclass
class Images:
    pixels: Tensor  # (N, size, size, 3) uint8
    labels: Tensor | None  # (N,) int64

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index) -> "Images":
        return Images(self.pixels[index], None if self.labels is None else self.labels[index])


def load(data: str, split: str, config: Config, limit: int | None = None) -> Images:
    """The images of a parquet file, or of a folder's `split`-*.parquet files in order; the first `limit` if given.

    Columns: `image` (an encoded picture) and, optionally, `label`. Raises SystemExit with a sentence for data that a
    model of this configuration cannot use: this is what the command line shows.
    """
    size, levels = config.image_size, config.levels
    path = Path(data)
    files = sorted(path.glob(f"{split}-*.parquet")) if path.is_dir() else [path]
    if not files:
        raise SystemExit(f"{path} holds no {split}-*.parquet file.")
    pixels, labels = [], []
    for file in files:
        if not file.is_file():
            raise SystemExit(f"There is no file or folder {file}.")
        try:
            table = pq.read_table(file)
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            raise SystemExit(f"{file} is not a parquet file: {error}") from error
        if "image" not in table.column_names:
            raise SystemExit(f"{file} has no column `image`; it has {', '.join(table.column_names)}.")
        room = len(table) if limit is None else limit - len(pixels)
        rows = table.slice(0, room)
        for number, cell in enumerate(rows["image"].to_pylist()):
            try:
                picture = np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
            except (OSError, TypeError, KeyError) as error:  # UnidentifiedImageError is an OSError; no bytes, no `bytes`
                raise SystemExit(f"{file}, row {number}: the cell holds no picture that can be decoded: {error}") from error
            if picture.shape != (size, size, 3):
                raise SystemExit(
                    f"{file}, row {number}: the picture is {picture.shape[1]}x{picture.shape[0]}, "
                    f"the model's are {size}x{size}."
                )
            if picture.max() >= levels:  # a compiled training step does not look
                raise SystemExit(f"{file}, row {number}: level {picture.max()} is not one of the model's, 0..{levels - 1}.")
            pixels.append(picture)
        if "label" in rows.column_names:
            if not pa.types.is_integer(rows["label"].type) or rows["label"].null_count:
                raise SystemExit(f"{file}: the column `label` must hold whole numbers, and none missing.")
            labels += rows["label"].to_pylist()
        if limit is not None and len(pixels) >= limit:
            break
    if not pixels:
        raise SystemExit(f"{path} holds no image.")
    if labels and len(labels) < len(pixels):
        raise SystemExit(f"{path}: some of its files have a column `label` and some have none.")
    return Images(torch.from_numpy(np.stack(pixels)), torch.tensor(labels) if labels else None)


def check_labels(images: Images, classes: tuple[str, ...], data: str) -> None:
    """Raises SystemExit with a sentence if a model with classes cannot be trained or evaluated on these images."""
    if not classes:
        return
    if images.labels is None:
        raise SystemExit(f"The model has {len(classes)} classes, and {data} has no column `label`.")
    low, high = images.labels.min().item(), images.labels.max().item()
    if low < 0 or high >= len(classes):
        raise SystemExit(f"{data} has labels {low} to {high}; the model's {len(classes)} classes are 0..{len(classes) - 1}.")
