"""The real command lines of train/, on small data made here: what they print and what they leave behind.

They run in forks (tests/forks.py). So that it takes little time, `tiny` is a model of 8x8 pictures here unless a test says
otherwise. Resuming is in test_resume.py, several processes are in test_processes.py.
"""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import forks
from imtx import PRESETS, ImageTransformer, draw
from imtx.images import sheet

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import data as data_module
from likelihood import bits_per_dim

SMALL = dict(image_size=8, layers=1, query_block=16, memory_block=16)  # of `tiny`, in place of its own


def pictures(count: int, seed: int) -> np.ndarray:
    """Smooth colour ramps, (count, 32, 32, 3) uint8: something that can be learned in a few steps."""
    generator = np.random.default_rng(seed)
    corner = generator.integers(0, 128, (count, 1, 1, 3))
    slope = generator.integers(0, 3, (count, 2, 1, 1, 3))
    across, down = np.arange(32)[None, :, None], np.arange(32)[:, None, None]
    return (corner + slope[:, 0] * across + slope[:, 1] * down).clip(0, 255).astype(np.uint8)


def write(path: Path, images: np.ndarray, column: str = "image", labels: bool | list[int] = True) -> None:
    """A parquet file of images (N, h, w, 3) uint8 with the given labels, 0 to 9 in turn (True) or none (False)."""
    cells = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        cells.append({"bytes": file.getvalue(), "path": None})
    if labels is True:
        labels = [i % 10 for i in range(len(images))]
    columns = {column: cells} | ({"label": labels} if labels else {})
    pq.write_table(pa.table(columns), path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of images; beside it, small.py: train.py with a small `tiny`."""
    folder = tmp_path_factory.mktemp("files") / "data"
    folder.mkdir()
    altered(folder.with_name("small.py"), "")
    write(folder / "train-00000-of-00002.parquet", pictures(20, 0))
    write(folder / "train-00001-of-00002.parquet", pictures(12, 1))
    write(folder / "test-00000-of-00001.parquet", pictures(6, 2))
    return folder


def run(script: str | Path, *arguments, interpreter=(sys.executable,)) -> subprocess.CompletedProcess:
    """A script of train/, or one with an absolute path; by another interpreter, a launcher say, from its very beginning."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if interpreter == (sys.executable,) and hasattr(os, "fork"):
        return forks.run(ROOT / "train" / script, list(map(str, arguments)), environment)
    command = [*interpreter, str(ROOT / "train" / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def altered(path: Path, change: str, **small) -> Path:
    """A script that is train.py with a small `tiny`, after a change: lines of Python that run first, with `imtx` at hand."""
    first = f"""
import os, runpy, sys
from dataclasses import replace
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'train')!r}]
import imtx
imtx.PRESETS["tiny"] = replace(imtx.PRESETS["tiny"], **{SMALL | small})
"""
    path.write_text(first + change + f"\nrunpy.run_path({str(ROOT / 'train/train.py')!r}, run_name='__main__')\n")
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the two models in a checkpoint."""
    models = {name: ImageTransformer.from_pretrained(folder / name).state_dict() for name in ("raw", "ema")}
    return {f"{name} {key}": weight for name, state in models.items() for key, weight in state.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, weight in expected.items() if not torch.equal(found[name], weight)] == []


def last_line(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def train(data: Path, output: Path, *arguments, preset: str = "tiny") -> dict:
    options = ("--validation", 4, "--batch-size", 4, "--warmup", 2, "--every", 4)
    script = data.with_name("small.py") if preset == "tiny" else "train.py"
    return last_line(run(script, "--preset", preset, "--data", data, "--output", output, *options, *arguments))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    result = train(data, output, "--max-steps", 8)
    assert result["num_processes"] == 1 and result["steps"] == 8 and math.isfinite(result["bits_per_dim"])
    assert Path(result["output"]) == output / "model"
    return output


def test_a_run_leaves_a_model_a_log_and_sample_sheets(trained):
    model = ImageTransformer.from_pretrained(trained / "model")
    assert model.config == replace(PRESETS["tiny"], **SMALL)
    entries = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "validation_bits_per_dim" in e] == [4, 8]
    assert {p.name for p in (trained / "samples").iterdir()} == {"00000004.png", "00000008.png"}
    labels = [i % len(model.config.classes) for i in range(8)]
    drawn = sheet(draw(model, range(8), labels=labels).numpy(), columns=8, scale=3)
    assert np.array_equal(Image.open(trained / "samples/00000008.png"), drawn)
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"step-00000004", "step-00000008", "before-decay"}
    record = json.loads((trained / "training.json").read_text())
    assert record == json.loads((trained / "model/training.json").read_text())
    assert (record["steps"], record["images_seen"], record["images"], record["validation_images"]) == (8, 32, 28, 4)
    assert record["command"].startswith("python train/train.py --preset tiny") and record["curve"][0][0] == 4


def test_a_checkpoint_holds_the_trained_weights_and_their_average_as_models_and_nothing_twice(trained):
    folder = trained / "checkpoints/step-00000008"
    assert {path.name for path in folder.iterdir()} == {
        "raw", "ema", "optimizer.bin", "optimizer_1.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "files.json"
    }
    assert (folder / "custom_checkpoint_0.pkl").stat().st_size < 10_000  # progress, no weights
    for name in ("raw", "ema"):
        assert {path.name for path in (folder / name).iterdir()} == {"config.json", "model.safetensors"}
        with safe_open(folder / name / "model.safetensors", framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F32"}
    raw, ema = (ImageTransformer.from_pretrained(folder / name).state_dict() for name in ("raw", "ema"))
    assert not torch.equal(raw["head.weight"], ema["head.weight"])
    assert_equal(ImageTransformer.from_pretrained(trained / "model").state_dict(), ema)


def test_a_folder_with_a_run_in_it_is_not_overwritten(data, trained):
    before = sorted(trained.rglob("*"))
    done = run("train.py", "--preset", "tiny", "--data", data, "--output", trained, "--max-steps", 2, "--validation", 4)
    assert done.returncode != 0 and "holds a run already" in done.stderr and "Traceback" not in done.stderr
    other = run("train.py", "--preset", "tiny-sr", "--data", data, "--output", trained, "--max-steps", 9,
                "--validation", 4, "--batch-size", 4, "--resume", "latest")
    assert other.returncode != 0 and "--preset tiny, not --preset tiny-sr" in other.stderr
    assert sorted(trained.rglob("*")) == before


@pytest.mark.parametrize("options, told", [
    (("--max-steps", 40), "The loss of step 3 is no number."),  # it looks at step 34, before the rate falls
    (("--max-steps", 40, "--every", 2), "After step 2 validation gives nan."),  # though that step's loss was a number
    (("--max-steps", 2, "--schedule", "cosine"), "After step 2 the model has no likelihood that is a number."),
])
def test_a_loss_that_is_no_number_ends_the_run_before_anything_is_saved(options, told, data, tmp_path):
    done = run(data.with_name("small.py"), "--preset", "tiny", "--data", data, "--output", tmp_path, *options,
               "--validation", 4, "--batch-size", 4, "--warmup", 1, "--learning-rate", 1e30)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]  # on a line of its own, below the bar
    assert last == f"{told} There is no checkpoint yet: begin anew with a lower --learning-rate."
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("checkpoints/[!.]*"))


def test_a_run_that_diverges_names_its_last_good_checkpoint(data, trained, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    spoilt = run(data.with_name("small.py"), "--preset", "tiny", "--data", data, "--output", output, "--max-steps", 20,
                 "--batch-size", 4, "--every", 1, "--keep", 3, "--resume", "latest", "--learning-rate", 1e30)
    assert spoilt.returncode == 1 and "The last good checkpoint is step-00000009: go on from it" in spoilt.stderr
    assert {int(path.name[-2:]) for path in output.glob("checkpoints/step-*")} == {4, 8, 9}  # 10 is not good


def test_training_learns(data, tmp_path):
    found = train(data, tmp_path, "--max-steps", 30, "--every", 100, "--learning-rate", 1e-3)["bits_per_dim"]
    torch.manual_seed(0)
    untrained = ImageTransformer(replace(PRESETS["tiny"], **SMALL)).eval()
    images = data_module.load(str(data), "train", untrained.config)
    assert found < bits_per_dim(untrained, images[-4:]) - 0.3


def test_time_is_a_budget_too(data, tmp_path):
    assert 1 <= train(data, tmp_path, "--max-minutes", 0.02)["steps"] < 1000


def test_compiling_is_not_charged_to_the_budget(data, tmp_path):
    slow = altered(tmp_path / "slow.py", """
import time, torch
def compile(module):
    calls = []
    def compiled(*arguments):
        if not calls:
            time.sleep(3.0)
        calls.append(1)
        return module(*arguments)
    return compiled
torch.compile = compile
""")
    output = tmp_path / "run"
    done = run(slow, "--preset", "tiny", "--data", data, "--output", output, "--max-minutes", 0.03, "--validation", 4,
               "--batch-size", 4, "--compile")
    assert last_line(done)["steps"] > 1
    first, *rest = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert first["step"] == 1 and first["seconds"] == 0 and "images_per_second" not in first
    assert rest[-1]["seconds"] < 3.0


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "sample.py", "publish.py"])
def test_ctrl_c_during_the_imports_is_no_traceback(script, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")  # in place of the real one
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / "train" / script], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGINT and done.stderr == ""


@pytest.mark.parametrize("preset", ["tiny-sr", "tiny-categorical"])  # as they are
def test_the_other_presets_train_and_evaluate(preset, data, tmp_path):
    train(data, tmp_path, "--max-steps", 2, "--mixed-precision", "bf16", "--flip", preset=preset)
    result = last_line(run("evaluate.py", "--checkpoint", tmp_path / "model", "--data", data, "--limit", 3))
    assert result["images"] == 3 and 0 < result["bits_per_dim"] < 9
    shuffled = "shuffled_sources_bits_per_dim" if preset == "tiny-sr" else "shuffled_labels_bits_per_dim"
    assert result[shuffled] != result["bits_per_dim"]


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda folder: None, "holds no train-*.parquet file"),
        (lambda folder: write(folder / "train-0.parquet", pictures(4, 0)), "--validation 4 leaves none of the 4 images"),
    ],
)
def test_data_that_cannot_be_used_is_named(make, sentence, tmp_path):
    make(tmp_path)
    options = ("--preset", "tiny", "--data", tmp_path, "--output", tmp_path / "o", "--max-steps", 1, "--validation", 4)
    done = run("train.py", *options)
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr


def test_no_precision_is_pretended(data, tmp_path, monkeypatch):
    options = ("--preset", "tiny", "--data", data, "--output", tmp_path / "o", "--max-steps", 1)
    assert "fp16 is for GPUs: on a CPU it would be float32." in run("train.py", *options, "--mixed-precision", "fp16").stderr
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # by `accelerate launch --mixed_precision bf16`
    assert "The launcher was told the precision bf16, and --mixed-precision no" in run("train.py", *options).stderr
    assert not (tmp_path / "o").exists()


def test_output_among_the_pictures_to_train_on_is_refused(tmp_path):
    for i, image in enumerate(pictures(6, 0)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    done = run("train.py", "--preset", "tiny", "--data", tmp_path, "--output", tmp_path / "run", "--max-steps", 1)
    assert f"--output: {tmp_path}/run lies in --data" in done.stderr and not (tmp_path / "run").exists()


def test_a_rate_beyond_float32_is_refused(data, tmp_path):
    done = run("train.py", "--preset", "tiny", "--data", data, "--output", tmp_path, "--max-steps", 2, "--learning-rate", 1e38)
    assert done.returncode == 2 and "--learning-rate must be at most 1e30, got 1e+38; 0.002 is the default." in done.stderr


def test_a_budget_is_needed_and_a_checkpoint_to_resume(data, tmp_path):
    assert "--max-steps" in run("train.py", "--preset", "tiny", "--data", data, "--output", tmp_path).stderr
    done = run("train.py", "--preset", "tiny", "--data", data, "--output", tmp_path, "--max-steps", 2,
               "--validation", 4, "--resume", "latest")
    assert done.returncode != 0 and "holds no checkpoint yet" in done.stderr
