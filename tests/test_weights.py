"""The bundled weights: small enough for a Space, told in full by their cards, and as good as they must be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imtx import ImageTransformer
from imtx.checkpoint import BUNDLED

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("IMTX_DATA", ROOT.parent / "shared" / "data"))
MODELS = {"cifar10-dmol-1d": ("cifar10", 4.4), "faces-sr-1d": ("faces32", 3.8)}  # data folder, most bits/dim


def test_files_are_small_enough_for_a_plain_push_to_a_space():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(MODELS)
    assert max(path.stat().st_size for path in files) < 10_000_000
    assert sum(path.stat().st_size for path in files) < 40_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_name_and_its_folder_load_the_same_model(name):
    model = ImageTransformer.from_pretrained(name)
    assert not model.training
    other = ImageTransformer.from_pretrained(BUNDLED / name)
    assert model.config == other.config
    assert bool(model.config.source_size) == name.startswith("faces")


@pytest.mark.parametrize("name", MODELS)
def test_a_card_tells_what_one_must_know(name):
    card = (BUNDLED / name / "README.md").read_text()
    for heading in ("Data", "Licence", "Command", "Steps", "Hardware", "Bits/dim", "Commit"):
        assert f"| {heading} |" in card
    assert "python train/train.py --preset" in card and "python train/evaluate.py --checkpoint" in card
    if name.startswith("faces"):
        assert "non-commercial research" in card


@pytest.mark.parametrize("name", MODELS)
def test_bits_per_dim_are_below_the_floor_and_true_conditions_cost_less(name):
    folder, floor = MODELS[name]
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs the test images: {folder} in IMTX_DATA")
    command = [sys.executable, "train/evaluate.py", "--checkpoint", name, "--data", DATA / folder, "--limit", "400"]
    if name.startswith("faces"):
        command += ["--samples", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["images"] == 400 and result["bits_per_dim"] < floor
    (shuffled,) = (value for key, value in result.items() if key.startswith("shuffled"))
    assert result["bits_per_dim"] < shuffled
    assert result.get("consistency_rmse", 0) < 3  # levels: samples keep to their sources
