"""What a data set is before anything is decoded: encoded pictures in a fixed order, and how to tell it from another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Encoded(NamedTuple):
    """One picture, not decoded yet."""

    name: str  # for messages
    file: bytes | Path | None  # its contents, or where they are; None: the data set has none here
    label: int | None


@dataclass(frozen=True)
class Source:
    """The pictures of one split."""

    count: int
    identity: list  # ready for JSON; a different one as soon as different pictures may come out
    classes: tuple[str, ...] | None  # names of the labels 0, 1, ...; None if the data does not name them
    read: Callable[[], Iterator[Encoded]]  # all of them, in the same order each time


def stamps(files: list[Path]) -> list[tuple[str, int, int]]:
    """Path, bytes and time of the last change (ns) of each file: what tells that one has been replaced."""
    stats = [file.stat() for file in files]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats)]
