"""Pictures in tables: parquet files, and data sets of the Hugging Face Hub, which are Arrow tables too.

What is wrong with a data set is raised as SystemExit with a sentence, for the command line.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .source import Encoded, Source, stamps

ROWS = 64  # in memory at a time; a picture can have any size


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold the pictures and the labels, and the names of the labels if the table has them."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None

    @classmethod
    def of(cls, schema: pa.Schema, where: str, image: str | None, label: str | None) -> "Columns":
        """The columns so named or, for None, `image` or `img`, and `label` if there is one. Raises SystemExit."""
        there = f"it has {', '.join(schema.names)}"
        if image is None:
            image = next((name for name in ("image", "img") if name in schema.names), None)
            if image is None:
                raise SystemExit(f"{where} has no column `image` or `img`; {there}. --image-column names another.")
        if label is None and "label" in schema.names:
            label = "label"
        for column in (image, label):
            if column is not None and column not in schema.names:
                raise SystemExit(f"{where} has no column `{column}`; {there}.")
        kind = schema.field(image).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # {"bytes", "path"}, the Hub's way
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise SystemExit(f"{where}: the column `{image}` holds {kind}, not encoded pictures.")
        if label is not None and not pa.types.is_integer(schema.field(label).type):
            raise SystemExit(f"{where}: the column `{label}` must hold whole numbers, and none missing.")
        return cls(image, label, class_names(schema, where, label))

    @property
    def names(self) -> list[str]:
        return [self.image] if self.label is None else [self.image, self.label]

    def rows(self, tables: Iterator[pa.Table | pa.RecordBatch], where: str) -> Iterator[Encoded]:
        """The pictures of these pieces of one table, in order."""
        number = 0
        for table in tables:
            labels = [None] * table.num_rows
            if self.label is not None:
                if table[self.label].null_count:
                    raise SystemExit(f"{where}: the column `{self.label}` must hold whole numbers, and none missing.")
                try:
                    labels = table[self.label].cast(pa.int64()).to_pylist()
                except pa.ArrowInvalid as error:
                    raise SystemExit(f"{where}: the column `{self.label}` holds no labels: {error}.") from error
            for cell, label in zip(table[self.image].to_pylist(), labels):
                yield Encoded(f"{where}, row {number}", contents(cell), label)
                number += 1


def class_names(schema: pa.Schema, where: str, label: str | None) -> tuple[str, ...] | None:
    """As `datasets` notes them in the schema, beside all that it knows of the columns; None if it does not. Raises SystemExit."""
    try:
        note = json.loads((schema.metadata or {}).get(b"huggingface", b"null"))
    except ValueError as error:
        raise SystemExit(f"{where}: its metadata `huggingface`, which may name the classes, are no JSON. Leave them out.") from error
    for key in ("info", "features", label, "names"):
        note = note.get(key) if isinstance(note, dict) else None
    return tuple(note) if note else None


def contents(cell: dict | bytes | None) -> bytes | Path | None:
    """Of {"bytes", "path"}, the bytes. A Hub data set made of loose files has none, but the paths to them."""
    if not isinstance(cell, dict):
        return cell
    path = cell.get("path")
    return Path(path) if cell["bytes"] is None and path and os.path.isabs(path) else cell["bytes"]


# ---- parquet -----------------------------------------------------------------------------------------------


def parquet_files(folder: Path, split: str) -> list[Path]:
    """SPLIT-*.parquet or SPLIT.parquet, in the folder or in one inside it, as in a copy of a Hub repository; sorted.

    None at all if the folder holds no parquet file of any name.
    """
    files = sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])
    chosen = [file for file in files if file.stem.split("-")[0] == split]
    if files and not chosen:
        splits = ", ".join(sorted({file.stem.split("-")[0] for file in files}))
        raise SystemExit(f"{folder} holds no {split}-*.parquet file; it has {splits}. --split names another.")
    folders = sorted({str(file.parent) for file in chosen})
    if len(folders) > 1:
        raise SystemExit(f"{folder} has {split}-*.parquet files in several folders: name one of {', '.join(folders)}.")
    return chosen


def parquet(files: list[Path], image: str | None = None, label: str | None = None) -> Source:
    """The rows of these files, in order. image, label: names of columns, as in `Columns.of`."""
    found, count = [], 0
    for file in files:
        try:
            footer = pq.read_metadata(file)
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            raise SystemExit(f"{file} is not a parquet file: {error}") from error
        found.append(Columns.of(footer.schema.to_arrow_schema(), str(file), image, label))
        count += footer.num_rows
    columns = next((one for one in found if one.classes), found[0])  # older files of sample.py had no names
    for file, other in zip(files, found):
        if (other.label is None) != (columns.label is None):
            raise SystemExit(f"{file.parent}: some of its files have a column `label` and some have none.")
        if other not in (columns, replace(columns, classes=None)):
            raise SystemExit(f"{files[0]} and {file} differ in the names of their columns or classes.")

    def pieces(file: Path) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(file) as opened:
                yield from opened.iter_batches(ROWS, columns=columns.names)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{file} cannot be read to its end: {error}") from error

    def read() -> Iterator[Encoded]:
        for file in files:
            yield from columns.rows(pieces(file), str(file))

    return Source(count, ["parquet", columns.names, stamps([file.resolve() for file in files])], columns.classes, read)


# ---- the Hub -----------------------------------------------------------------------------------------------


def hub(name: str, split: str, image: str | None = None, label: str | None = None) -> Source:
    """A data set of the Hugging Face Hub, which `datasets` downloads into its own cache."""
    try:
        import datasets  # nothing else needs it
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"There is no file or folder {name}. If it is the id of a data set on the Hugging Face Hub: "
            f"pip install {error.name}"
        ) from error
    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # Of a set that came, but could not be unpacked (the disk is full), only the cause tells what happened.
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        raise SystemExit(
            f"There is no file or folder {name}, and from the Hugging Face Hub it cannot be had: {str(reason).rstrip('.')}. "
            "A copy of its parquet files on this machine can be named instead."
        ) from error
    if split not in splits:
        raise SystemExit(f"{name} has no split `{split}`; it has {', '.join(splits)}. --split names another.")
    rows = splits[split]
    columns = Columns.of(rows.features.arrow_schema, name, image, label)
    # As Arrow tables, pictures stay encoded: a damaged one is then ours to name, and all are decoded in one way.
    tables = rows.select_columns(columns.names).with_format("arrow")

    def read() -> Iterator[Encoded]:
        return columns.rows(tables.iter(ROWS), f"{name}, split {split}")

    # The fingerprint changes with the revision. Nothing public tells as much: a set in memory has no files.
    return Source(len(rows), ["hub", name, split, columns.names, rows._fingerprint], columns.classes, read)
