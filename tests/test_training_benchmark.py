"""tests/benchmarks/training.py runs and says what it promises; figures themselves are the machine's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {"hardware", "torch", "precision", "batch_size", "compile", "optimizer", "steps"}


def benchmark(*words):
    """The lines of its table, and the last line as JSON."""
    command = [sys.executable, "tests/benchmarks/training.py", *words, "--batch-size", "1", "--steps", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    return [line for line in lines if line.startswith("|")], json.loads(lines[-1])


def test_training_tells_speed_utilisation_and_shares_of_a_step():
    table, result = benchmark("tiny-sr", "--precision", "bf16")
    assert result.keys() == ABOUT | {"training"} and result["precision"] == "bf16"
    (row,) = result["training"]
    assert row.keys() == {"preset", "width", "step_seconds", "images_per_second", "matmul_tflops", "mfu", "shares"}
    assert row["shares"].keys() == {"data", "attention", "likelihood", "optimizer", "rest"}
    assert row["preset"] == "tiny-sr" and row["images_per_second"] == pytest.approx(1 / row["step_seconds"])
    assert sum(row["shares"].values()) == pytest.approx(1) and min(row["matmul_tflops"], row["mfu"]) > 0
    head, _, cells = table
    assert len(cells.split("|")) == len(head.split("|")) and "`tiny-sr`" in cells


def test_local_attention_stands_beside_dense_attention():
    table, result = benchmark("--attention", "tiny", "tiny-sr", "tiny-2d")
    assert result.keys() == ABOUT | {"attention"} and len(table) == 2 + 2  # two of them share a shape
    for row, layout in zip(result["attention"], ("1d", "2d"), strict=True):
        assert row["positions"] == 1024 and row["layout"] == layout
        assert min(row["local_seconds"], row["dense_seconds"], row["ratio"]) > 0
