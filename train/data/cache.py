"""Data sets decoded once: arrays in the cache folder, mapped into memory each time they are used.

An entry is a folder with pixels.npy (N, size, size, 3) uint8, labels.npy (N,) int64 if there are labels, and about.json.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from .pictures import NotAligned, Unreadable, Unusable, decode, fit
from .source import Source

FORMAT = 2  # to be raised when the same pictures would come out as other pixels, or about.json tells of them otherwise
NAMED = 5  # of the pictures that are skipped


def arrays(
    data: str, source: Source, size: int, celeba_crop: bool, strict: bool, cache: Path
) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """Pixels (read-only, mapped from the file), labels and what about.json tells, of the pictures that --data names.

    Decodes them first if `cache` has no entry for these pictures at this size. Several processes may ask at once: one
    decodes, the others wait. Raises SystemExit with a sentence for a cache that cannot be written or is damaged, if no
    picture can be used, and with `strict` if one cannot.
    """
    identity = json.dumps([FORMAT, source.identity, celeba_crop])
    checksum = hashlib.sha256(identity.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", f"{Path(data).resolve().name}-{size}-{checksum}")
    folder = cache / name
    if not folder.is_dir():  # it gets its name when it is complete
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f".{name}.lock"):
                if not folder.is_dir():
                    write(folder, data, source, size, celeba_crop, strict)
        except OSError as error:
            reason = error.strerror or error
            raise SystemExit(
                f"The cache folder {cache} cannot be written to: {reason}. --cache or XDG_CACHE_HOME names another."
            ) from error
    try:
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy") if (folder / "labels.npy").exists() else None
        about = json.loads((folder / "about.json").read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} cannot be read: {error}. Delete it, and it is made again.") from error
    if strict and about["skipped"]:
        raise SystemExit(f"{about['first_skipped'][0]}.")
    return pixels, labels, about


def write(folder: Path, data: str, source: Source, size: int, celeba_crop: bool, strict: bool) -> None:
    """Decodes everything into a new folder, complete under its name or not there. Raises OSError if it cannot be written."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # a killed process left it
    part.mkdir()
    kept, labels, skipped, first_skipped = 0, [], 0, []
    try:
        # Written as a file, not through a map: on a full disk a map ends the process with no word.
        with open(part / "pixels.npy", "wb") as pixels:
            write_header(pixels, (0, size, size, 3))
            for name, file, label in tqdm(source.read(), "decode", source.count, disable=None, leave=False):
                try:
                    picture = fit(decode(file), size, celeba_crop)
                except Unusable as error:
                    if strict or isinstance(error, (NotAligned, Unreadable)):  # skipped, it would stay so in the cache
                        raise SystemExit(f"{name}: {error}.") from error
                    skipped += 1
                    first_skipped += [f"{name}: {error}"] if skipped <= NAMED else []
                    continue
                pixels.write(picture)
                labels += [] if label is None else [label]
                kept += 1
            pixels.seek(0)
            write_header(pixels, (kept, size, size, 3))
        if not kept:
            unusable = f" that can be used{listed(first_skipped, skipped)}" if skipped else "."
            raise SystemExit(f"{data} holds no image{unusable}")
        if labels:
            np.save(part / "labels.npy", np.array(labels, np.int64))
        about = {"data": data, "images": kept, "skipped": skipped, "first_skipped": first_skipped}
        (part / "about.json").write_text(json.dumps(about) + "\n")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # a full disk gets its space back
    print(f"Decoded {kept:,} images into {folder}", file=sys.stderr)


def listed(first: list[str], count: int) -> str:
    """A line for each of the first, and one for how many more there are."""
    more = f"\n  and {count - len(first):,} more" * (count > len(first))
    return ":" + "".join(f"\n  {line}" for line in first) + more


def write_header(file, shape: tuple[int, ...]) -> None:
    """Of a .npy file of uint8; equally long for any number of images, as NumPy leaves room for the first side to grow."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
