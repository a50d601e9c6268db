"""Models and pictures to train on from, and train.py in this process."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import SIZE, pictures, small
from PIL import Image

from imtx.checkpoint import BUNDLED

NC = dict(id="other", name="celeba-non-commercial-research", link="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html")
OWN = ("--data-name", "My photos", "--data-licence", "they are mine")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import train


def draw_pictures(folder: Path, count: int, classes: tuple[str, ...] = (), seed: int = 0) -> Path:
    """A folder of pictures a little larger than the model's, in folders of these classes in turn, if any."""
    for i, picture in enumerate(pictures(count, SIZE + 3, seed).numpy()):
        home = folder / classes[i % len(classes)] if classes else folder
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(home / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """base: a model of cats and dogs; upscaler: one with a non-commercial card; photos of cats and owls; flat ones."""
    folder = tmp_path_factory.mktemp("files")
    small("dmol", "class").float().save_pretrained(folder / "base")
    small("dmol", "sr").float().save_pretrained(folder / "upscaler")
    shutil.copy(BUNDLED / "faces-sr-1d" / "README.md", folder / "upscaler")
    draw_pictures(folder / "photos", 20, ("cat", "owl"))
    draw_pictures(folder / "flat", 20)
    draw_pictures(folder / "tested" / "test", 4)
    return folder


@pytest.fixture
def start(here, tmp_path, monkeypatch, capsys):
    """train.py in this process: start("--data", ...) returns the printed result; refusals are raised."""

    def start(*words, output="run", init="base", steps=2) -> dict:
        begin = () if init is None else ("--init", init)
        budget = ("--max-steps", steps, "--every", 1, "--batch-size", 2, "--warmup", 1)
        argv = ["train/train.py", *begin, "--output", tmp_path / output, *budget, *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        capsys.readouterr()
        train.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}  # a run takes them over
    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)
