"""What the tests of --data share: small pictures, files of them, and `load` through a cache of the test's own."""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import small_config
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

from data import cache
import data
from data.pictures import decode

SIZE = 8  # of the model's images


def picture(seed: int, width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """(height, width, 3) uint8 of noise: any wrong pixel shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures(count: int, first: int = 0) -> np.ndarray:
    return np.stack([picture(seed) for seed in range(first, first + count)])


def encode(pixels: np.ndarray, form: str = "png", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def files(folder: Path, contents: dict[str, bytes | np.ndarray]) -> Path:
    """Writes files, and the folders they are in."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else encode(content))
    return folder


@pytest.fixture
def load(tmp_path):
    """load(data, "--option", ...): the images for a model of 8x8, through a cache of the test's own."""

    def load(name, *options, split="train", **config) -> data.Images:
        parser = argparse.ArgumentParser()
        data.add_options(parser, split)
        args = parser.parse_args([*map(str, ("--data", name, "--cache", tmp_path / "cache", *options))])
        return data.load(args.data, args.split, small_config("dmol", "class", **config), **data.options(args))

    return load


@pytest.fixture
def refusal(load):
    def refusal(*arguments, **options) -> str:
        with pytest.raises(SystemExit) as ended:
            load(*arguments, **options)
        return str(ended.value)

    return refusal


@pytest.fixture
def decoded(monkeypatch) -> list:
    """The pictures that are decoded from now on: what an entry of the cache spares."""
    calls = []
    monkeypatch.setattr(cache, "decode", lambda file: calls.append(file) or decode(file))
    return calls


def assert_images(images: data.Images, pixels, labels=None, classes=None) -> None:
    assert images.pixels.dtype == torch.uint8 and np.array_equal(images.pixels.numpy(), pixels)
    assert images.labels is None if labels is None else images.labels.tolist() == list(labels)
    assert images.labels is None or images.labels.dtype == torch.int64
    assert images.classes == classes


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def table(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path
