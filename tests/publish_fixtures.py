"""What the tests of train/publish.py share: two small models, the command with and without --dry-run, and a fake Hub."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import pictures, small
from test_records import RUN
from test_train import write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

from publishing import hub
from publishing.records import Training
import publish

IMAGES = pictures(11)
OWN = ("--data-name", "My photos", "--data-licence", "they are mine", "--licence", "cc0-1.0")
DRY = ("--dry-run", "--output", "no")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two models, the super-resolution one with a record of its training, and images to measure them on."""
    folder = tmp_path_factory.mktemp("files")
    small("dmol", "class").float().save_pretrained(folder / "generator")
    small("categorical", "sr").float().save_pretrained(folder / "upscaler")
    Training(**RUN).save(folder / "upscaler/training.json")
    write(folder / "images.parquet", IMAGES.numpy(), labels=[i % 2 for i in range(11)])
    return folder


@pytest.fixture
def dry(here, tmp_path):
    """Writes the folder of a model and returns it."""

    def dry(checkpoint: str | Path, *options, repo: str = "me/mine", name: str = "out") -> Path:
        publish.main([str(checkpoint), repo, *map(str, options), "--dry-run", "--output", str(tmp_path / name)])
        return tmp_path / name

    return dry


@pytest.fixture
def refusal(refusal):
    """The sentence with which publish.py ends."""
    return lambda *arguments: refusal(publish.main, [str(argument) for argument in arguments])


@pytest.fixture
def fake(monkeypatch):
    """In place of HfApi: its calls, the files of the last upload, and what it should raise at which call."""
    fake = SimpleNamespace(calls=[], uploaded={}, fails={}, private=True)

    class Api:
        def __getattr__(self, name):
            def call(*positional, **named):
                fake.calls.append((name, positional, named))
                if name in fake.fails:
                    raise fake.fails[name]
                if name == "upload_folder":
                    fake.uploaded = contents(Path(named["folder_path"]))
                return SimpleNamespace(commit_url="https://hub/commit/1", private=fake.private)

            return call

    monkeypatch.setattr(hub, "HfApi", Api)
    return fake


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cell(folder: Path, row: str) -> str:
    (line,) = (line for line in (folder / "README.md").read_text().splitlines() if line.startswith(f"| {row} |"))
    return line.removeprefix(f"| {row} | ").removesuffix(" |")
