"""Images for training and evaluation: what --data names, decoded once and mapped into memory."""

import argparse
import hashlib
import os
import re
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from imtx import Config

from .cache import arrays, listed
from .folders import composed, pictures, walk
from .source import Source
from .tables import hub, parquet, parquet_files


@dataclass
class Images:
    """As a tensor, an index or a mask copies, a slice does not. The pixels that `load` gives must not be written to."""

    pixels: Tensor  # (N, size, size, 3) uint8
    labels: Tensor | None  # (N,) int64
    classes: tuple[str, ...] | None = None  # names of the labels 0, 1, ..., if the data has them

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index) -> "Images":
        return Images(self.pixels[index], None if self.labels is None else self.labels[index], self.classes)

    def checksum(self) -> str:
        """SHA-256 of the pixels and then, if there are any, the labels, in order: 64 hexadecimal digits."""
        digest = hashlib.sha256(self.pixels.numpy())
        if self.labels is not None:
            digest.update(self.labels.numpy())
        return digest.hexdigest()


def add_options(parser: argparse.ArgumentParser, split: str) -> None:
    """The options that say which images are meant; `split` is the one taken unless told."""
    parser.add_argument(
        "--data", required=True,
        help="parquet file; folder of SPLIT-*.parquet files; folder of pictures, in folders by class or not, all in "
        "train/ and test/ or not; or a data set on the Hugging Face Hub, OWNER/NAME",
    )
    add_reading_options(parser, split)


def add_reading_options(parser: argparse.ArgumentParser, split: str) -> None:
    """Those that say how images are read, of a script where they need not be given."""
    parser.add_argument("--split", default=split, help="part of the data (%(default)s)")
    parser.add_argument("--image-column", metavar="NAME", help="of a table (image, or img)")
    parser.add_argument("--label-column", metavar="NAME", help="of a table (label, if there is one)")
    parser.add_argument(
        "--celeba-crop", action="store_true", help="the paper's middle 138x138 of CelebA's aligned 178x218 pictures"
    )
    parser.add_argument("--strict", action="store_true", help="end at the first picture that cannot be used; else skip it")
    parser.add_argument(
        "--cache", metavar="FOLDER", type=Path, default=default_cache(),
        help="where decoded images are kept, to be mapped into memory; can be deleted (%(default)s)",
    )


def options(args: argparse.Namespace) -> dict:
    """Of the parsed options, those that `load` takes by name."""
    return {name: getattr(args, name) for name in ("image_column", "label_column", "celeba_crop", "strict", "cache")}


def words(args: argparse.Namespace, split: str) -> list[str]:
    """Of the parsed options of reading, those that were given and are not about the cache: as they stand on a command line."""
    told = [] if args.split == split else ["--split", args.split]
    for name in ("image_column", "label_column"):
        told += [] if getattr(args, name) is None else [f"--{name.replace('_', '-')}", getattr(args, name)]
    return told + ["--celeba-crop"] * args.celeba_crop + ["--strict"] * args.strict


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imtx"


def load(
    data: str, split: str, config: Config, limit: int | None = None, *, image_column: str | None = None,
    label_column: str | None = None, celeba_crop: bool = False, strict: bool = False, cache: Path | None = None,
) -> Images:
    """The images that `data` names (see `add_options`), of the size of this configuration's model; the first `limit`.

    Larger pictures are cut to the square in their middle and reduced by means over areas. Those that are smaller than the
    model's, or cannot be decoded, are skipped, and lines say how many, and which the first are. Raises SystemExit with a
    sentence for data that a model of this configuration cannot use: this is what the command line shows.
    """
    source = find(data, split, image_column, label_column)
    size, levels = config.image_size, config.levels
    pixels, labels, about = arrays(data, source, size, celeba_crop, strict, cache or default_cache())
    if skipped := about["skipped"]:
        tell(f"Skipped {skipped:,} of {skipped + about['images']:,} pictures{listed(about['first_skipped'], skipped)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is the tensor: see Images
        images = Images(torch.from_numpy(pixels), None if labels is None else torch.from_numpy(labels), source.classes)
    images = images[:limit]
    if levels < 256 and (highest := images.pixels.flatten(1).amax(dim=1)).max() >= levels:  # a compiled step does not look
        number = int((highest >= levels).nonzero()[0])
        raise SystemExit(f"{data}, image {number}: level {highest[number]} is not one of the model's, 0..{levels - 1}.")
    return images


def lies_among_pictures(output: Path, data: str) -> bool:
    """Whether pictures in this folder would be taken for some of --data, as it is a folder of pictures above."""
    folder, output = Path(data).resolve(), output.resolve()
    if not folder.is_dir() or not output.is_relative_to(folder):
        return False
    hidden = any(part.startswith(".") for part in output.relative_to(folder).parts)
    tables = any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))
    return not hidden and not tables and bool(walk(folder))


def find(data: str, split: str, image_column: str | None = None, label_column: str | None = None) -> Source:
    """A parquet file or a folder of that name or, if there is neither, a data set on the Hub. Raises SystemExit."""
    path = Path(data)
    if path.is_file():
        return parquet([path], image_column, label_column)
    if path.is_dir():
        try:
            files = parquet_files(path, split)
            if files:
                return parquet(files, image_column, label_column)
            if column := image_column or label_column:
                raise SystemExit(f"{path} is a folder of pictures, which has no column {column}: leave that option out.")
            return pictures(path, split)
        except OSError as error:
            raise SystemExit(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        return hub(data, split, image_column, label_column)
    raise SystemExit(f"There is no file or folder {path}. (A data set on the Hugging Face Hub is named OWNER/NAME.)")


def with_classes(config: Config, images: Images, fresh: bool) -> Config:
    """The configuration of a model to train on the images: with their class names, if it has classes and they name any.

    On images without labels no class would be learned: there it has none, and a line says so. More labels than it has
    classes, 0, 1, 2, ... without names, are called by their numbers if the weights are fresh.
    """
    if config.classes and images.labels is None:
        tell("The data have no labels, by column or by folder: the model is trained without classes.")
        return replace(config, classes=())
    if not config.classes:
        return config
    if images.classes is None:
        found = images.labels.unique()  # sorted
        count = len(found)
        if not fresh or count <= len(config.classes) or not torch.equal(found, torch.arange(count)):
            return config
        tell(f"The data do not name their {count} classes: they are called 0 to {count - 1}.")
        return replace(config, classes=tuple(map(str, range(count))))
    try:
        return replace(config, classes=images.classes)
    except ValueError as error:  # names that are not unique
        raise SystemExit(f"The data's classes cannot be a model's: {error}") from error


def tell(line: str) -> None:
    """A line a machine, not one a process."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)


def check_labels(images: Images, classes: tuple[str, ...], data: str) -> None:
    """Raises SystemExit with a sentence unless each image has a label that numbers one of the classes."""
    if not classes:
        return
    if images.labels is None:
        raise SystemExit(f"The model has {len(classes)} classes, and {data} has no column `label`, or no folder a class.")
    low, high = images.labels.min().item(), images.labels.max().item()
    if low < 0 or high >= len(classes):
        raise SystemExit(f"{data} has labels {low} to {high}; the {len(classes)} classes are 0..{len(classes) - 1}.")


def match_labels(images: Images, classes: tuple[str, ...], data: str) -> Images:
    """The images with labels that number the model's `classes`; as they are for a model without classes.

    Data that name their classes may have others in number or order: names decide. Of others a line says what their labels
    are taken for. Raises SystemExit with a sentence if a model with these classes cannot be trained or evaluated on the images.
    """
    if not classes:
        return images
    own = images.classes or classes
    check_labels(images, own, data)
    if images.classes is None and classes != tuple(map(str, range(len(classes)))):
        first = ", ".join(f"{label} for {name}" for label, name in enumerate(classes[:3])) + ", ..." * (len(classes) > 3)
        tell(f"The data do not name their classes: their labels are taken for the model's, {first}.")
    own, names = composed(own), composed(classes)
    if own == names:
        return images
    if unknown := [name for name in own if name not in names]:
        theirs = f"{', '.join(classes[:20])}{', ...' * (len(classes) > 20)}"
        raise SystemExit(
            f"{data} has a class {unknown[0]!r}, which the model has not; its classes are {theirs}. "
            "(evaluate.py --no-class does without.)"
        )
    numbers = torch.tensor([names.index(name) for name in own])
    return Images(images.pixels, numbers[images.labels], classes)


def validation_size(images: int, most: int) -> int:
    """How many images to hold out unless told: `most`, or a tenth where that is less; at least 1."""
    return max(1, min(most, images // 10))


def hold_out(images: Images, count: int) -> tuple[Images, Images]:
    """All but the last `count` images, and these. Raises SystemExit if that leaves none, or if labels are sorted.

    A line tells of classes that are held out whole.
    """
    if len(images) == 1:
        raise SystemExit("There is one image alone, and one is held out for validation: give two at least.")
    if count >= len(images):
        raise SystemExit(f"--validation {count} leaves none of the {len(images)} images to train on: lower it, or give more.")
    if images.labels is not None:
        classes, runs = len(images.labels.unique()), 1 + int(images.labels.diff().count_nonzero())
        if runs == classes and 1 < classes < len(images):
            raise SystemExit(
                f"The images lie class after class: the last {count}, held out for validation, are no sample of them. "
                "Shuffle the data, or make it a folder with a folder a class: these are taken in a mixed order."
            )
        trained = set(images.labels[:-count].tolist())
        if lost := sorted(set(images.labels[-count:].tolist()) - trained):
            names = ", ".join(images.classes[label] if images.classes else str(label) for label in lost)
            tell(
                f"All pictures of {names} are among the last {count}, which are held out: the model will not learn of them. "
                "Give more of them, or lower --validation."
            )
    return images[:-count], images[-count:]
