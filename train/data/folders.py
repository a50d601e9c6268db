"""Pictures as files in a folder, with the folders in it as classes.

What is wrong with a folder is raised as SystemExit with a sentence, for the command line.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from .source import Encoded, Source, stamps

READ = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
# Pictures that are not read, but counted and named: a folder of a phone's must not lose half of them without a word.
NOT_READ = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".ico", ".ppm", ".pgm", ".tga", ".raw", ".dng", ".cr2", ".nef"}
SUFFIXES = READ | NOT_READ
SPLITS = {"train", "test", "validation", "valid", "val"}


def pictures(folder: Path, split: str) -> Source:
    """folder/CLASS/*.png, in any depth, or folder/*.png without classes; or either inside folder/train, folder/test, ...

    A label is a class's place among the sorted names of the class folders. The order: see `mixed`. Raises OSError if
    something cannot be read.
    """
    root = split_folder(folder, split)
    paths = walk(root)
    if not paths:
        raise SystemExit(
            f"{root} holds no {split}-*.parquet file and no picture. Pictures belong into folders by class, {root}/CLASS/1.png, "
            f"or all into {root} itself."
        )
    if root == folder and split != "train":
        raise SystemExit(
            f"{folder} is not divided into `train` and `{split}`: keep pictures for `{split}` in a folder of that name, "
            "apart from those to train on. (--split train takes all that are there, as training does.)"
        )
    loose = [path for path in paths if "/" not in path]
    if loose and len(loose) < len(paths):
        deeper = next(path for path in paths if "/" in path)
        raise SystemExit(f"{root} holds a picture {loose[0]} beside folders with pictures, {deeper}: has it classes or not?")
    classes = () if loose else tuple(sorted({class_name(root, path) for path in paths}))
    paths = mixed(paths) if loose else mixed(paths, lambda path: class_name(root, path))
    numbers = {name: label for label, name in enumerate(classes)}
    labels = [None if loose else numbers[class_name(root, path)] for path in paths]

    def read() -> Iterator[Encoded]:
        for path, label in zip(paths, labels):
            yield Encoded(str(root / path), root / path, label)

    there = [path for path in paths if (root / path).exists()]  # others are links to nothing: skipped when they are read
    files = stamps([root.resolve() / path for path in there])
    gone = sorted(set(paths) - set(there))
    return Source(len(paths), ["pictures", files, gone, labels], classes or None, read)


def mixed(paths: list[str], class_of: Callable[[str], str] = lambda path: "") -> list[str]:
    """The paths in an order that is the same everywhere, as good as shuffled within a class, with the classes spread evenly.

    Picture i of the n of a class has its place i / (n + 1) of the way, so that the last pictures, which training holds out, are
    of all classes that have many, and of one or two pictures the first stays to train on.
    """
    paths = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
    classes = [class_of(path) for path in paths]
    sizes, so_far, places = Counter(classes), Counter(), {}
    for path, name in zip(paths, classes):
        so_far[name] += 1
        places[path] = Fraction(so_far[name], sizes[name] + 1)
    return sorted(paths, key=places.get)  # equal places: in the order of the checksums


def composed(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes, each written in one way: accents can be characters of their own, or not."""
    return tuple(unicodedata.normalize("NFC", name) for name in names)


def class_name(root: Path, path: str) -> str:
    """Of the picture root/path."""
    (name,) = composed([path.split("/")[0]])
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise SystemExit(f"{root} has a folder {name!r}, whose name is not in UTF-8: rename it.") from error
    return name


def split_folder(folder: Path, split: str) -> Path:
    """folder/SPLIT if the folder is divided into splits, itself if not. Raises SystemExit if that cannot be told."""
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    divisions = {"train", "test", split}.intersection(inside)
    if not divisions:
        return folder
    name, others = min(divisions), [name for name in inside if name not in SPLITS and name != split]
    if others:
        raise SystemExit(
            f"{folder} holds `{name}` and `{others[0]}`. If both are classes, rename `{name}`; if `{name}` is a part of "
            f"the data, keep other folders elsewhere."
        )
    if split not in inside:
        raise SystemExit(f"{folder} has no folder `{split}`; it has {', '.join(inside)}. --split names another.")
    return folder / split


def walk(root: Path) -> list[str]:
    """Paths of the pictures below root, relative to it, with slashes; nothing hidden. Raises OSError.

    Links are followed. Raises SystemExit with a sentence for one that leads back to a folder above it.
    """

    def fail(error: OSError) -> None:  # os.walk would pass over a folder that cannot be read
        raise error

    found = []
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (Path(folder) / name for name in folders):
            if link.is_symlink():
                here = Path(folder)
                way = [here, *(above for above in here.parents if above.is_relative_to(root))]  # each of which may be a link
                if any(step.resolve().is_relative_to(link.resolve()) for step in way):
                    raise SystemExit(f"{link} leads back to {link.resolve()}, which it lies in: remove that link.")
        for name in files:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                found.append((Path(folder) / name).relative_to(root).as_posix())
    return found
