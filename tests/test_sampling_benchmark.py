"""tests/benchmarks/sampling.py runs, says what it promises and counts right; figures themselves are the machine's."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imtx import Config, ImageTransformer

ROOT = Path(__file__).resolve().parents[1]
ALONE = {"roofline_fraction_batch1", "roofline_fraction_batch1_all_threads", "images_per_second_batch1", "two_visitors_over_one",
         "images_per_second_batch16", "batch16_over_batch1"}


@pytest.fixture(scope="module")
def roofline():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests/benchmarks")
        import roofline

        yield roofline


def tiny(**changes) -> ImageTransformer:
    """4 x 4 pixels in 2 query blocks of 8, of which the second sees the first: (0 + 8) / 2 + 4.5 = 8.5 keys a step."""
    fields = dict(image_size=4, query_block=8, memory_block=8, width=16, layers=2, heads=2, ffn=24, mixtures=3)
    return ImageTransformer(Config(**(fields | changes))).eval()


MATRICES = 2 * (3 * 16 * 16 + 16 * 16 + 16 * 2 * 24 + 24 * 16)  # q k v, out, up and gate, down, of two layers


@pytest.mark.parametrize("dtype, bytes_each", [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_step_counts_as_by_hand(roofline, dtype, bytes_each):
    model = tiny()
    with torch.no_grad():
        for weight in model.decoder.parameters():
            weight.fill_(1.0 if dtype == torch.bfloat16 else 1.0 + 2**-12)
    step = roofline.step_of(model, 3)
    inputs = model.embedding.neighbours.shape[1]
    ends = inputs * 16 + inputs * 3 + 16 * 30  # into the model's width, the first guess of a pixel, the mixture
    assert step.flops == 3 * (2 * (MATRICES + ends) + 4 * 2 * 16 * 8.5)
    assert step.cache_bytes == 3 * 4 * 2 * 2 * 16 * 8.5  # float32 keys and values of 16 features in 2 layers
    vectors = 16 + 3 + 2 * (48 + 16) + 2 * 3 * 2 * 16 + 2 * 3 * 8 + 16 + 30  # biases, norms, gains of queries and keys
    assert step.weight_bytes == bytes_each * MATRICES + 4 * (ends + vectors)
    assert step.dtype == {2: "bf16", 4: "fp32"}[bytes_each]


def test_a_source_adds_its_keys_and_its_matrices(roofline):
    without, source = roofline.step_of(tiny(), 1), roofline.step_of(tiny(source_size=2, encoder_layers=1), 1)
    assert source.cache_bytes - without.cache_bytes == 4 * 2 * 2 * 16 * 4  # of 4 source pixels
    inputs = 18  # what the source says of a pixel: 15 and 3 numbers
    extra = 2 * 2 * 16 * 16 + inputs * (16 + 3)
    assert source.flops - without.flops == 2 * extra + 4 * 2 * 16 * 4


def test_a_floor_is_reading_or_multiplying_whichever_is_slower(roofline):
    machine = roofline.Machine({(100, 1): 50.0, (200, 1): 80.0, (100, 2): 60.0}, {1: 10.0, 2: 8.0})
    step = roofline.Step(weight_bytes=60, cache_bytes=40.0, flops=5.0, dtype="fp32")
    assert machine.floor(step, 1) == machine.floor(step, 2) == 100 / 80  # the better turn of a larger set
    assert machine.floor(roofline.Step(60, 40.0, 50.0, "fp32"), 2) == 50 / 10


def test_the_command_prints_a_table_and_one_json_object():
    command = [sys.executable, "tests/benchmarks/sampling.py", "--preset", "tiny", "--batch", "16", "--turns", "1", "--no-peers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    found = json.loads(lines[-1])
    assert found.keys() >= ALONE and found["peers"] == []
    assert {(r["images"], r["engine"], r["matrices"]) for r in found["rows"]} == {
        (n, *kind) for n in (1, 16) for kind in (("compiled", "bf16"), ("compiled", "fp32"), ("eager", "fp32"))
    }
    figures = [found[name] for name in ALONE]
    figures += [value for row in found["rows"] + found["machine"] for value in row.values() if not isinstance(value, str)]
    assert all(math.isfinite(value) and value > 0 for value in figures)
    rows = [line for line in lines if line.startswith("| preset tiny |")]
    assert len(rows) == len(found["rows"])
