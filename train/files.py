"""Files that are complete under their names, or not there."""

import os
import tempfile
from pathlib import Path


def part(path: Path) -> Path:
    """Where `path` is written first."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file under another name, then gives it its own. Raises OSError."""
    part(path).write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part(path), path)


def try_out(path: Path) -> None:
    """Raises OSError if `write_whole` could not write this file: better now than after hours. Leaves nothing behind."""
    if path.is_dir():
        raise IsADirectoryError(0, "it is a folder")
    part(path).touch()
    part(path).unlink()


def check_writable(output: Path) -> None:
    """Raises SystemExit with a sentence if nothing can be made in the folder, or where it is to be. Leaves nothing behind."""
    try:
        there = next(folder for folder in (output, *output.parents) if folder.exists())
        tempfile.TemporaryDirectory(prefix=".", dir=there).cleanup()
    except OSError as error:
        raise SystemExit(f"--output: {output} cannot be written to: {error.strerror}. Choose another folder.") from error
