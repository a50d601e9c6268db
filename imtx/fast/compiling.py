"""How the functions of this folder are compiled, and where the code is kept from one start to the next."""

import hashlib
import os
import tempfile
from pathlib import Path

from numba import config, njit


def code_folder() -> Path:
    """In the user's cache or, where nothing can be written there, beside this file. Raises OSError if that cannot be either.

    Numba looks for changes in one file, and a function is made of several: so a folder a version.
    """
    home = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"  # the first is NUMBA_CACHE_DIR
    here = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    version = f"compiled-{hashlib.sha256(sources).hexdigest()[:12]}"
    folder = Path(home) / "imtx" / version
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = here / "__pycache__" / version
        folder.mkdir(parents=True, exist_ok=True)
    return folder


_FOLDER = str(code_folder())


def forget() -> None:
    """Removes the code that is kept, and leaves Numba its folders."""
    for file in Path(_FOLDER).rglob("*.nb[ci]"):
        file.unlink()


def compiled(*fastmath: str, **options):
    """numba.njit for code that runs without Python's lock and is cached; fastmath: what LLVM may do to floating point.

    _nrt=False: references to arrays are not counted. Nothing here makes an array, whoever calls holds on to them, and to count
    took a fifth of a step: each view of an array waited for all that was being written, and for the other lane's counting.
    """

    def decorate(function):
        before, config.CACHE_DIR = config.CACHE_DIR, _FOLDER  # read by njit, here and now
        try:
            return njit(fastmath=set(fastmath), nogil=True, cache=True, error_model="numpy", _nrt=False, **options)(function)
        finally:
            config.CACHE_DIR = before

    return decorate
