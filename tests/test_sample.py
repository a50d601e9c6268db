"""train/sample.py: every sample is that of its seed and condition, however the work is cut; what is interrupted goes on."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from conftest import CLASSES, SIZE, pictures, small
from PIL import Image
from test_evaluate import reduced
from test_train import write

from imtx import draw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import data
import files as whole_files
import sample

TRUTHS = pictures(5, seed=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, task in (("generator", "class"), ("plain", "unconditional"), ("upscaler", "sr")):
        small("dmol", task).float().save_pretrained(folder / name)
    write(folder / "faces.parquet", TRUTHS.numpy(), labels=False)
    return folder


@pytest.fixture
def run(files, tmp_path, monkeypatch, capsys):
    """Runs the command here; the object in the last line that it prints."""
    monkeypatch.chdir(files)

    def run(model: str, *options, output: Path = tmp_path / "out") -> dict:
        sample.main(["--checkpoint", model, "--output", str(output), *map(str, options)])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def refusal(run, capsys):
    def refusal(*arguments, **options) -> str:
        with pytest.raises(SystemExit) as ended:
            run(*arguments, **options)
        assert ended.value.code != 0
        return capsys.readouterr().err if isinstance(ended.value.code, int) else str(ended.value)

    return refusal


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def column(folder: Path, name: str) -> list:
    return [value for file in shards(folder) for value in pq.read_table(file)[name].to_pylist()]


def images(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in column(folder, "image")])


def test_one_folder_is_written_to_by_one_command_at_a_time(run, refusal, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert "another process writes samples there" in refusal("plain", "--count", 1)
    assert run("plain", "--count", 1)["drawn"] == 1


# ---- what is drawn -----------------------------------------------------------------------------------------


def test_classes_come_in_turn_and_seeds_in_order(run, tmp_path):
    result = run("generator", "--count", 11, "--file-size", 4, "--batch-size", 3, "--seed", 100, "--temperature", 0.7)
    assert (result["samples"], result["drawn"], result["files"], result["num_processes"]) == (11, 11, 3, 1)
    folder, labels = tmp_path / "out", [i % 2 for i in range(11)]
    assert [path.name for path in shards(folder)] == [f"test-{i:05d}-of-00003.parquet" for i in range(3)]
    assert column(folder, "seed") == list(range(100, 111)) and column(folder, "label") == labels
    expected = draw(small("dmol", "class").float(), range(100, 111), labels=labels, temperature=0.7)
    assert np.array_equal(images(folder), expected)


def test_guidance_is_the_library_s(run, tmp_path):
    run("generator", "--count", 3, "--guidance", 2.5)
    expected = draw(small("dmol", "class").float(), range(3), labels=[0, 1, 0], guidance=2.5)
    assert np.array_equal(images(tmp_path / "out"), expected)


@pytest.mark.parametrize("options, label", [(("--class", "dog"), 1), (("--no-class",), None)])
def test_one_class_or_none_can_be_asked_for(options, label, run, tmp_path):
    run("generator", "--count", 3, *options)
    labels = None if label is None else [label] * 3
    assert np.array_equal(images(tmp_path / "out"), draw(small("dmol", "class").float(), range(3), labels=labels))
    names = pq.read_table(shards(tmp_path / "out")[0]).column_names
    assert names == (["image", "label", "seed"] if labels else ["image", "seed"])


def test_sources_come_in_turn(run, tmp_path):
    run("upscaler", "--count", 12, "--sources", "faces.parquet", "--file-size", 7, "--batch-size", 5)
    which = [i % 5 for i in range(12)]
    assert column(tmp_path / "out", "source") == which
    assert np.array_equal(
        images(tmp_path / "out"), draw(small("dmol", "sr").float(), range(12), sources=reduced(TRUTHS)[which])
    )


def test_no_sample_depends_on_how_the_work_is_cut(run, tmp_path):
    for name, options in {"a": (), "b": ("--batch-size", 1), "c": ("--batch-size", 5, "--file-size", 7)}.items():
        run("plain", "--count", 9, *options, output=tmp_path / name)
    assert np.array_equal(images(tmp_path / "a"), images(tmp_path / "b"))
    assert np.array_equal(images(tmp_path / "a"), images(tmp_path / "c"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_two_processes_share_the_work_and_write_what_one_does(run, files, tmp_path):
    options = ["--count", "10", "--file-size", "3", "--batch-size", "2"]
    run("generator", *options, output=tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(ROOT / "train/sample.py"), "--checkpoint", "generator", *options]
    command += ["--output", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=files, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["num_processes"] == 2
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_processes_that_do_not_know_of_each_other_are_refused(refusal, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "ACCELERATE_USE_CPU=true" in refusal("plain", "--count", 4)
    assert not (tmp_path / "out").exists()


def test_the_files_are_data_for_train_and_evaluate(run, tmp_path):
    run("generator", "--count", 5, "--file-size", 2)
    config = small("dmol", "class").config
    found = data.load(str(tmp_path / "out"), "test", config)
    assert np.array_equal(found.pixels, images(tmp_path / "out")) and found.labels.tolist() == [0, 1, 0, 1, 0]
    assert found.classes == CLASSES  # a label means the same to whoever reads the files
    run("upscaler", "--count", 2, "--sources", "faces.parquet", output=tmp_path / "up")
    features = json.loads(pq.read_schema(shards(tmp_path / "up")[0]).metadata[b"huggingface"])["info"]["features"]
    assert list(features) == ["image", "seed", "source"] and features["image"] == {"_type": "Image"}


def test_sources_are_read_as_evaluate_reads_pictures(run, refusal, tmp_path):
    pq.write_table(pq.read_table("faces.parquet").rename_columns(["photo"]), tmp_path / "odd.parquet")
    assert "--image-column names another" in refusal("upscaler", "--count", 3, "--sources", tmp_path / "odd.parquet")
    run("upscaler", "--count", 3, "--sources", tmp_path / "odd.parquet", "--image-column", "photo", output=tmp_path / "a")
    run("upscaler", "--count", 3, "--sources", "faces.parquet", output=tmp_path / "b")
    assert np.array_equal(images(tmp_path / "a"), images(tmp_path / "b"))


def test_the_contact_sheet_shows_the_first_64_and_no_more(run, tmp_path):
    run("plain", "--count", 70, "--file-size", 30)
    page, side = np.asarray(Image.open(tmp_path / "out/samples.png"))[::3, ::3], SIZE + 2
    assert page.shape == (8 * side + 2, 8 * side + 2, 3)
    shown = [page[2 + r * side : side * (r + 1), 2 + c * side : side * (c + 1)] for r in range(8) for c in range(8)]
    assert np.array_equal(shown, images(tmp_path / "out")[:64])


# ---- files -------------------------------------------------------------------------------------------------


def test_an_interrupted_command_goes_on_with_the_files_that_are_missing(run, refusal, tmp_path, monkeypatch):
    options = ("generator", "--count", 9, "--file-size", 3, "--batch-size", 2)
    run(*options, output=tmp_path / "whole")
    drawn = []

    def interrupted(model, seeds, **given):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(seeds)
        return draw(model, seeds, **given)

    monkeypatch.setattr(sample, "draw", interrupted)
    assert "The same command goes on" in refusal(*options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "samples.json", "test-00000-of-00003.parquet"}
    first = shards(tmp_path / "out")[0]
    (tmp_path / "out/.test-00001-of-00003.parquet.part").write_bytes(b"PAR1")  # killed while it wrote
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(sample, "draw", draw)
    assert run(*options)["drawn"] == 6 and first.stat().st_mtime_ns == before
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert run(*options)["drawn"] == 0
    assert run(*options[:-1], 9)["drawn"] == 0  # the batch size changes nothing


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("generator", "--count", 5), "samples with count 4, now it is 5"),
        (("generator", "--count", 4, "--seed", 1), "samples with seed 0, now it is 1"),
        (("generator", "--count", 4, "--temperature", 0.9), "samples with temperature 1.0, now it is 0.9"),
        (("generator", "--count", 4, "--guidance", 3), "samples with guidance 1.0, now it is 3.0"),
        (("generator", "--count", 4, "--file-size", 2), "samples with file_size 500, now it is 2"),
        (("generator", "--count", 4, "--class", "cat"), "samples with class None, now it is cat"),
        (("generator", "--count", 4, "--no-class"), "samples with no_class False, now it is True"),
        (("plain", "--count", 4), "samples with model"),
        (("upscaler", "--count", 4, "--sources", "faces.parquet"), "a model of another kind"),
    ],
)
def test_a_folder_with_samples_of_other_settings_is_not_written_to(options, sentence, run, refusal, tmp_path):
    run("generator", "--count", 4)
    before = contents(tmp_path / "out")
    assert sentence in refusal(*options)
    assert contents(tmp_path / "out") == before


def test_a_folder_from_before_guidance_goes_on_without(run, refusal, tmp_path):
    run("generator", "--count", 4)
    settings = json.loads((tmp_path / "out/samples.json").read_text())
    assert settings.pop("guidance") == 1
    (tmp_path / "out/samples.json").write_text(json.dumps(settings))
    assert "guidance 1.0, now it is 3.0" in refusal("generator", "--count", 4, "--guidance", 3)
    assert run("generator", "--count", 4)["drawn"] == 0


def test_other_weights_and_other_sources_are_other_settings(run, refusal, files, tmp_path):
    model = small("dmol", "sr").float()
    model.save_pretrained(tmp_path / "model")
    run(str(tmp_path / "model"), "--count", 2, "--sources", "faces.parquet")
    write(tmp_path / "others.parquet", pictures(5, seed=4).numpy(), labels=False)
    assert "with sources" in refusal(str(tmp_path / "model"), "--count", 2, "--sources", tmp_path / "others.parquet")
    with torch.no_grad():
        model.head.bias[0] += 1
    model.save_pretrained(tmp_path / "model")
    assert "with model" in refusal(str(tmp_path / "model"), "--count", 2, "--sources", "faces.parquet")
    assert not any(path in (tmp_path / "out/samples.json").read_text() for path in ("/", str(files)))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("generator", "--count", 0), "--count must be at least 1"),
        (("generator", "--count", 2, "--temperature", 1e31), "--temperature must be from 1e-30 to 1e+30"),
        (("generator", "--count", 2, "--guidance", "nan"), "--guidance must be from 0 to 20"),
        (("generator", "--count", 2, "--guidance", 3, "--no-class"), "no class that could be followed"),
        (("plain", "--count", 2, "--guidance", 3), "no class that could be followed"),
        (("upscaler", "--count", 2, "--sources", "faces.parquet", "--guidance", 3), "no class that could be followed"),
        (("generator", "--count", 2, "--seed", 2**32 - 1), "4294967295 to 4294967296 are asked for"),
        (("generator", "--count", 2, "--class", "cow"), "there is no cow; the model's classes are cat, dog"),
        (("plain", "--count", 2, "--class", "cat"), "has no classes"),
        (("plain", "--count", 2, "--no-class"), "has no classes"),
        (("plain", "--count", 2, "--sources", "faces.parquet"), "takes no source"),
        (("upscaler", "--count", 2), "say from which pictures"),
        (("upscaler", "--count", 2, "--sources", "none"), "There is no file or folder none"),
        (("none", "--count", 2), "There is no folder none"),
    ],
)
def test_refusals_name_the_cause_and_write_nothing(options, sentence, refusal, tmp_path):
    assert sentence in refusal(*options)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_and_a_full_disk_are_told(run, refusal, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.png").touch()
    assert "holds other files" in refusal("plain", "--count", 2, output=tmp_path / "photos")
    (tmp_path / "file").touch()
    assert "cannot be written to: Not a directory" in refusal("plain", "--count", 2, output=tmp_path / "file/x")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files.os, "replace", full)
    assert "cannot be written to: No space left on device" in refusal("plain", "--count", 2)


def test_a_damaged_note_is_named(run, refusal, tmp_path):
    run("plain", "--count", 2)
    (tmp_path / "out/samples.json").write_text("{")
    assert "samples.json is damaged" in refusal("plain", "--count", 2)
