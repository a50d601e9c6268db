"""The real command lines of train/, on small data made here: what they print, what they leave behind, how they resume."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from imtx import PRESETS, ImageTransformer

ROOT = Path(__file__).resolve().parents[1]


def pictures(count: int, seed: int) -> np.ndarray:
    """Smooth colour ramps, (count, 32, 32, 3) uint8: something that can be learned in a few steps."""
    generator = np.random.default_rng(seed)
    corner = generator.integers(0, 128, (count, 1, 1, 3))
    slope = generator.integers(0, 3, (count, 2, 1, 1, 3))
    across, down = np.arange(32)[None, :, None], np.arange(32)[:, None, None]
    return (corner + slope[:, 0] * across + slope[:, 1] * down).clip(0, 255).astype(np.uint8)


def write(path: Path, images: np.ndarray, column: str = "image", labels: bool = True) -> None:
    cells = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        cells.append({"bytes": file.getvalue(), "path": None})
    columns = {column: cells} | ({"label": [i % 10 for i in range(len(images))]} if labels else {})
    pq.write_table(pa.table(columns), path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train-00000-of-00002.parquet", pictures(20, 0))
    write(folder / "train-00001-of-00002.parquet", pictures(12, 1))
    write(folder / "test-00000-of-00001.parquet", pictures(6, 2))
    return folder


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, f"train/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def last_line(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def train(data: Path, output: Path, *arguments, preset: str = "tiny") -> dict:
    options = ("--validation", 4, "--batch-size", 4, "--warmup", 2, "--every", 4)
    return last_line(run("train.py", "--preset", preset, "--data", data, "--output", output, *options, *arguments))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    result = train(data, output, "--max-steps", 8)
    assert result["num_processes"] == 1 and result["steps"] == 8 and math.isfinite(result["bits_per_dim"])
    assert Path(result["output"]) == output / "model"
    return output


def test_a_run_leaves_a_model_a_log_and_sample_sheets(trained):
    model = ImageTransformer.from_pretrained(trained / "model")
    assert model.config == PRESETS["tiny"]
    entries = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "validation_bits_per_dim" in e] == [4, 8]
    assert {p.name for p in (trained / "samples").iterdir()} == {"00000004.png", "00000008.png"}
    assert Image.open(trained / "samples/00000008.png").size == (3 * (8 * 34 + 2), 3 * 36)
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"step-00000004", "step-00000008", "before-decay"}


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(data, trained, tmp_path):
    interrupted = tmp_path / "run"
    shutil.copytree(trained / "checkpoints/step-00000004", interrupted / "checkpoints/step-00000004")
    assert train(data, interrupted, "--max-steps", 8, "--resume", "latest")["steps"] == 8
    expected = ImageTransformer.from_pretrained(trained / "model").state_dict()
    resumed = ImageTransformer.from_pretrained(interrupted / "model").state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())


def test_a_run_is_prolonged_from_before_its_decay(data, trained, tmp_path):
    longer = tmp_path / "run"
    shutil.copytree(trained / "checkpoints/before-decay", longer / "checkpoints/before-decay")
    assert train(data, longer, "--max-steps", 10, "--resume", "before-decay")["steps"] == 10
    assert (longer / "checkpoints/before-decay").is_dir()  # and it can be prolonged once more


def test_a_prolonged_run_leaves_no_checkpoint_of_its_old_future(data, trained, tmp_path):
    longer = tmp_path / "run"
    shutil.copytree(trained / "checkpoints", longer / "checkpoints")  # before-decay is of step 7, the last one of step 8
    train(data, longer, "--max-steps", 9, "--resume", "before-decay", "--every", 100)
    assert {p.name for p in longer.glob("checkpoints/step-*")} == {"step-00000004", "step-00000009"}


def test_ctrl_c_ends_with_a_checkpoint_and_the_run_goes_on(data, tmp_path):
    options = ["--preset", "tiny", "--data", data, "--output", tmp_path, "--validation", 4, "--batch-size", 4]
    command = [sys.executable, "train/train.py", *map(str, options), "--max-steps"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([*command, "100000"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while "1/100000" not in running.stderr.read(1) + running.stderr.readline():  # the bar's first step
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, rest = running.communicate(timeout=100)
    assert running.returncode != 0 and "Interrupted at step" in rest and "Traceback" not in rest
    (checkpoint,) = tmp_path.glob("checkpoints/step-*")
    steps = int(checkpoint.name.removeprefix("step-"))
    done = run("train.py", *options, "--max-steps", steps + 2, "--resume", "latest")
    assert last_line(done)["steps"] == steps + 2


def test_a_folder_with_a_run_in_it_is_not_overwritten(data, trained):
    before = sorted(trained.rglob("*"))
    done = run("train.py", "--preset", "tiny", "--data", data, "--output", trained, "--max-steps", 2, "--validation", 4)
    assert done.returncode != 0 and "holds a run already" in done.stderr and "Traceback" not in done.stderr
    other = run("train.py", "--preset", "tiny-sr", "--data", data, "--output", trained, "--max-steps", 9,
                "--validation", 4, "--batch-size", 4, "--resume", "latest")
    assert other.returncode != 0 and "--preset tiny, not tiny-sr" in other.stderr
    assert sorted(trained.rglob("*")) == before


def test_a_loss_that_is_no_number_ends_the_run_before_anything_is_saved(data, tmp_path):
    done = run("train.py", "--preset", "tiny", "--data", data, "--output", tmp_path, "--max-steps", 9,
               "--validation", 4, "--batch-size", 4, "--learning-rate", 1e30)
    assert done.returncode != 0 and "The loss is nan" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("checkpoints/*"))


def test_training_learns(data, tmp_path):
    short = train(data, tmp_path / "short", "--max-steps", 1)["bits_per_dim"]
    long = train(data, tmp_path / "long", "--max-steps", 30, "--every", 100, "--learning-rate", 1e-3)["bits_per_dim"]
    assert long < short - 0.3


def test_time_is_a_budget_too(data, tmp_path):
    assert 1 <= train(data, tmp_path, "--max-minutes", 0.02)["steps"] < 1000


@pytest.mark.parametrize("preset", ["tiny-sr", "tiny-categorical"])
def test_the_other_presets_train_and_evaluate(preset, data, tmp_path):
    train(data, tmp_path, "--max-steps", 2, "--mixed-precision", "bf16", "--flip", preset=preset)
    result = last_line(run("evaluate.py", "--checkpoint", tmp_path / "model", "--data", data, "--limit", 3))
    assert result["images"] == 3 and 0 < result["bits_per_dim"] < 9
    shuffled = "shuffled_sources_bits_per_dim" if preset == "tiny-sr" else "shuffled_labels_bits_per_dim"
    assert result[shuffled] != result["bits_per_dim"]


def test_evaluation_counts_every_image_once_at_any_batch_size(data, trained):
    def evaluate(batch_size: int) -> dict:
        return last_line(run("evaluate.py", "--checkpoint", trained / "model", "--data", data, "--batch-size", batch_size))

    one, four = evaluate(1), evaluate(4)  # 4 does not divide the 6 images
    assert one["images"] == four["images"] == 6
    assert one["bits_per_dim"] == pytest.approx(four["bits_per_dim"], abs=1e-5)
    model = ImageTransformer.from_pretrained(trained / "model")
    assert one["parameters"] == sum(p.numel() for p in model.parameters())
    images = torch.from_numpy(pictures(6, 2))
    with torch.no_grad():
        nats = -model.log_prob(images, torch.arange(6)).double().sum().item()
    assert one["bits_per_dim"] == pytest.approx(nats / (math.log(2) * 6 * 3072), abs=1e-5)


def test_labels_are_optional_for_evaluation(trained, tmp_path):
    write(tmp_path / "own.parquet", pictures(2, 5), labels=False)
    done = run("evaluate.py", "--checkpoint", trained / "model", "--data", tmp_path / "own.parquet")
    assert last_line(done)["images"] == 2 and "no class" in done.stdout


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda folder: None, "holds no train-*.parquet file"),
        (lambda folder: (folder / "train-0.parquet").write_text("hello"), "train-0.parquet is not a parquet file"),
        (lambda folder: write(folder / "train-0.parquet", pictures(9, 0), "img"), "no column `image`; it has img, label"),
        (lambda folder: write(folder / "train-0.parquet", pictures(4, 0)), "--validation 4 leaves none of the 4 images"),
        (lambda folder: write(folder / "train-0.parquet", pictures(9, 0)[:, :16]), "the picture is 32x16"),
        (lambda folder: write(folder / "train-0.parquet", pictures(9, 0), labels=False), "has no column `label`"),
    ],
)
def test_data_that_cannot_be_used_is_named(make, sentence, tmp_path):
    make(tmp_path)
    done = run("train.py", "--preset", "tiny", "--data", tmp_path, "--output", tmp_path / "o", "--max-steps", 1, "--validation", 4)
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr


def test_a_budget_is_needed_and_a_checkpoint_to_resume(data, tmp_path):
    assert "--max-steps" in run("train.py", "--preset", "tiny", "--data", data, "--output", tmp_path).stderr
    done = run("train.py", "--preset", "tiny", "--data", data, "--output", tmp_path, "--max-steps", 2,
               "--validation", 4, "--resume", "latest")
    assert done.returncode != 0 and "holds no checkpoint yet" in done.stderr


def test_a_missing_checkpoint_is_named(data, tmp_path):
    done = run("evaluate.py", "--checkpoint", tmp_path / "nowhere", "--data", data)
    assert done.returncode != 0 and "nowhere" in done.stderr and "Traceback" not in done.stderr
