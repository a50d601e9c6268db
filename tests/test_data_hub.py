"""Data sets of the Hugging Face Hub, through a stand-in for `datasets`."""

import errno
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from data_fixtures import picture, pictures, encode, files, load, refusal, decoded, assert_images  # noqa: F401, some are fixtures


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))



# ---- the Hub -----------------------------------------------------------------------------------------------


class FakeDataset:
    """As much of `datasets.Dataset` as is used, over an Arrow table."""

    def __init__(self, rows: pa.Table, fingerprint: str = "0123"):
        self.table, self._fingerprint = rows, fingerprint
        self.features = SimpleNamespace(arrow_schema=rows.schema)

    def __len__(self) -> int:
        return len(self.table)

    def select_columns(self, names: list[str]) -> "FakeDataset":
        return FakeDataset(self.table.select(names))

    def with_format(self, form: str) -> "FakeDataset":
        assert form == "arrow"
        return self

    def iter(self, batch_size: int):
        return (pa.Table.from_batches([batch]) for batch in self.table.to_batches(batch_size))


@pytest.fixture
def hub(monkeypatch):
    """hub({"owner/name": {"train": [table], ...} or an error}): what `datasets` then gives; the fake module."""

    def hub(sets: dict) -> SimpleNamespace:
        def load_dataset(name):
            if isinstance(sets[name], Exception):
                raise sets[name]
            return {split: FakeDataset(*rows) for split, rows in sets[name].items()}

        DatasetsError = type("DatasetsError", (Exception,), {})
        generation = type("DatasetGenerationError", (DatasetsError,), {})
        exceptions = SimpleNamespace(DatasetsError=DatasetsError, DatasetGenerationError=generation)
        fake = SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        return fake

    return hub


def hub_table(count: int, first: int, names: list[str]) -> pa.Table:
    """As uoft-cs/cifar10 has them."""
    cells = [{"bytes": encode(pixels), "path": None} for pixels in pictures(count, first)]
    note = json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}})
    labels = [i % len(names) for i in range(count)]
    return pa.table({"img": cells, "label": labels, "id": ["x"] * count}).replace_schema_metadata({"huggingface": note})


def test_a_hub_data_set_is_read_with_datasets(hub, load, refusal, decoded):
    names = ["dog", "cat"]
    sets = {"uoft-cs/cifar10": {"train": [hub_table(70, 0, names)], "valid": [hub_table(3, 90, names)]}}
    hub(sets)
    assert_images(load("uoft-cs/cifar10"), pictures(70), [i % 2 for i in range(70)], ("dog", "cat"))
    assert_images(load("uoft-cs/cifar10", "--split", "valid"), pictures(3, 90), [0, 1, 0], ("dog", "cat"))
    assert refusal("uoft-cs/cifar10", split="test") == (
        "uoft-cs/cifar10 has no split `test`; it has train, valid. --split names another."
    )
    refused = refusal("uoft-cs/cifar10", "--image-column", "image")
    assert refused == "uoft-cs/cifar10 has no column `image`; it has img, label, id."
    load("uoft-cs/cifar10")
    assert len(decoded) == 73
    sets["uoft-cs/cifar10"]["train"] = [hub_table(70, 100, names), "4567"]  # a new revision
    assert_images(load("uoft-cs/cifar10"), pictures(70, 100), [i % 2 for i in range(70)], ("dog", "cat"))


def test_a_folder_of_that_name_comes_first(hub, load, tmp_path, monkeypatch):
    hub({"owner/name": {"train": [hub_table(2, 50, ["cat"])]}})
    files(tmp_path / "owner/name", {"0.png": picture(0)})
    monkeypatch.chdir(tmp_path)
    assert_images(load("owner/name"), pictures(1))


def test_a_damaged_picture_of_the_hub_is_named(hub, load, refusal, capfd):
    cells = [{"bytes": encode(picture(0)), "path": None}, {"bytes": b"hello", "path": None}]
    hub({"some/faces": {"train": [pa.table({"image": cells})]}})
    assert_images(load("some/faces"), pictures(1))
    assert "Skipped 1 of 2 pictures:\n  some/faces, split train, row 1: this is no PNG" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["offline", "unknown", "several configurations", "full disk"])
def test_a_hub_that_gives_nothing_is_a_sentence(kind, hub, refusal):
    sets = {}
    exceptions = hub(sets).exceptions
    generation = exceptions.DatasetGenerationError("An error occurred while generating the dataset")
    generation.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    sets["owner/name"], reason = {
        "offline": (ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"), "Couldn't reach"),
        "unknown": (exceptions.DatasetsError("Dataset 'owner/name' doesn't exist on the Hub."), "doesn't exist on the Hub"),
        "several configurations": (ValueError("Config name is missing."), "Config name is missing"),
        "full disk": (generation, "No space left on device"),
    }[kind]
    refused = refusal("owner/name")
    assert refused.startswith("There is no file or folder owner/name, and from the Hugging Face Hub it cannot be had: ")
    assert reason in refused and ".." not in refused
    assert refused.endswith(". A copy of its parquet files on this machine can be named instead.")


def test_without_datasets_a_sentence_says_what_to_install(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "There is no file or folder uoft-cs/cifar10. " in (refused := refusal("uoft-cs/cifar10"))
    assert refused.endswith("pip install datasets")
