"""Files that are complete under their names, or not there."""

import os
from pathlib import Path


def part(path: Path) -> Path:
    """Where `path` is written first."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file under another name, then gives it its own. Raises OSError."""
    part(path).write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part(path), path)
