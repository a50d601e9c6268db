"""The bundled weights: small enough for a Space, told in full by their cards, and as good as they must be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imtx import PRESETS, ImageTransformer
from imtx.checkpoint import BUNDLED

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import zoo
from publishing.card_text import SAMPLING
from publishing.cards import Entry, task_of
from publishing.known_data import KNOWN
from publishing.records import LOG, RECORD, Training

DATA = Path(os.environ.get("IMTX_DATA", ROOT.parent / "shared" / "data"))
FLOORS = {"cifar10": ("cifar10", 4.4), "faces": ("faces32", 3.8)}  # by the name's first word: data folder, most bits/dim
IMAGES = "24"  # of the test images: enough to tell, in seconds
MODELS = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def test_files_are_small_enough_for_a_plain_push_to_a_space():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert {"cifar10-dmol-1d", "faces-sr-1d"} <= set(MODELS) == {path.parent.name for path in files}
    assert max(path.stat().st_size for path in files) < 10_000_000
    assert sum(path.stat().st_size for path in files) < 40_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md", ".png"}


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_name_and_its_folder_load_the_same_model(name):
    model = ImageTransformer.from_pretrained(name)
    assert not model.training
    other = ImageTransformer.from_pretrained(BUNDLED / name)
    assert model.config == other.config
    assert bool(model.config.source_size) == ("-sr-" in name)


@pytest.mark.parametrize("name", MODELS)
def test_a_card_tells_what_one_must_know(name):
    card = (BUNDLED / name / "README.md").read_text()
    for heading in ("Data", "Licence", "Command", "Steps", "Hardware", "Bits/dim", "Commit"):
        assert f"| {heading} |" in card
    assert "python train/train.py --preset" in card and "python train/evaluate.py --checkpoint" in card
    if name.startswith("faces"):
        assert "non-commercial research" in card


LOGGED = [name for name in MODELS if name != "faces-sr-1d"]  # whose log was not kept, as its card says


@pytest.mark.parametrize("name", LOGGED)
def test_the_log_is_of_the_run_that_the_card_tells(name):
    training = Training.load(BUNDLED / name / RECORD)
    lines = list(map(json.loads, (BUNDLED / name / LOG).read_text().splitlines()))
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    last = lines[-1]
    assert (last["step"], last["validation_bits_per_dim"]) == (training.steps, training.validation_bits_per_dim)
    on_the_way = [(line["step"], line["validation_bits_per_dim"]) for line in lines if "validation_bits_per_dim" in line]
    assert set(training.curve) <= set(on_the_way)
    assert sum("images_per_second" in line for line in lines) > 50
    assert "| Log | [log.jsonl](log.jsonl)" in (BUNDLED / name / "README.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_the_front_matter_of_a_card_is_true(name):
    card, model = (BUNDLED / name / "README.md").read_text(), ImageTransformer.from_pretrained(name)
    entry = Entry.read(BUNDLED / name / "README.md")
    assert card.startswith(entry.front_matter() + "\n# ")  # the Hub's fields say what `imtx` says
    assert (entry.name, entry.task) == (name, task_of(model.config)) and PRESETS[entry.preset] == model.config
    assert entry.parameters == sum(p.numel() for p in model.parameters())
    (data,) = (data for data in KNOWN.values() if data.name == entry.data)
    assert entry.dataset == data.hub_id
    if data.weights:
        assert (entry.licence, entry.licence_name) == (data.weights.id, data.weights.name)
        assert model.origin.licence == data.weights.named  # a copy of the weights alone keeps it
    figures = entry.evaluation
    (row,) = (line for line in card.splitlines() if line.startswith("| Bits/dim |"))  # the text says the same
    assert f"**{figures.bits_per_dim:.3f}**" in row and f"on {figures.images:,} test images" in row
    condition, shuffled = figures.shuffled
    assert f"with {condition} shuffled {shuffled:.3f}" in row
    stored = {"float32": "float32", "bfloat16": "bfloat16 (matrices of the blocks) and float32"}[entry.dtype]
    assert f"| Parameters | {entry.parameters:,}, stored as {stored} |" in card and f"| Sampling | {SAMPLING} |" in card


def test_the_table_in_readme_is_that_of_the_cards():
    readme = (ROOT / "README.md").read_text()
    assert readme == zoo.renewed(readme, zoo.table()), "run python train/zoo.py"


@pytest.mark.parametrize("name", MODELS)
def test_bits_per_dim_are_below_the_floor_and_true_conditions_cost_less(name):
    folder, floor = FLOORS[name.partition("-")[0]]
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs the test images: {folder} in IMTX_DATA")
    command = [sys.executable, "train/evaluate.py", "--checkpoint", name, "--data", DATA / folder, "--limit", IMAGES]
    if "-sr-" in name:
        command += ["--samples", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # tests run side by side, and threads that wait for one another are slow
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["images"] == int(IMAGES) and result["bits_per_dim"] < floor
    (shuffled,) = (value for key, value in result.items() if key.startswith("shuffled"))
    assert result["bits_per_dim"] < shuffled
    assert result.get("consistency_rmse", 0) < 3  # levels: samples keep to their sources
