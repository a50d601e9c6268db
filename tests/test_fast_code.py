"""Compiled code: when there can be none PyTorch draws, and where it is kept."""

import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import small
from imtx import draw, fast, sampling
from test_fast import ROOT, build


def test_a_model_that_cannot_be_compiled_is_drawn_by_pytorch_and_the_log_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(sampling, "_told", set())
    model = small("dmol", "class")
    with caplog.at_level(logging.WARNING, "imtx"):
        assert torch.equal(draw(model, [0]), draw(model, [0], engine="eager"))
        draw(model, [1])
    assert [record.getMessage() for record in caplog.records] == [
        "Drawing with PyTorch, which takes longer: the model is in float64, and compiled code works in float32."
    ]
    with pytest.raises(ValueError, match="The compiled engine cannot draw: the model is in float64"):
        draw(model, [0], engine="compiled")


def test_without_numba_pytorch_draws(caplog, monkeypatch):
    model = build("modern", "dmol", "1d", "class")
    before = draw(model, [0])
    monkeypatch.setattr(sampling, "_told", set())
    monkeypatch.delattr(fast, "step")
    monkeypatch.setitem(sys.modules, "imtx.fast.step", None)
    with caplog.at_level(logging.WARNING, "imtx"):
        assert torch.equal(draw(model, [0]), before)
    assert "Numba cannot be imported" in caplog.text and "pip install numba" in caplog.text
    assert not fast.is_warm(model)


def test_where_numba_cannot_keep_its_code_pytorch_draws(caplog, monkeypatch):
    from imtx.fast import compiling

    def njit(**options):
        return refuse

    def refuse(function):
        raise RuntimeError("cannot cache function 'advance': no locator available for file 'step.py'")

    model = build("modern", "dmol", "1d", "class")
    before = draw(model, [0])
    monkeypatch.setattr(sampling, "_told", set())
    monkeypatch.delattr(fast, "step")
    monkeypatch.delitem(sys.modules, "imtx.fast.step")
    monkeypatch.setattr(compiling, "njit", njit)
    with caplog.at_level(logging.WARNING, "imtx"):
        assert torch.equal(draw(model, [0]), before)
    assert "no locator available" in caplog.text and "NUMBA_CACHE_DIR" in caplog.text


CROWDED = """
import resource, sys
import torch
sys.path.insert(0, "tests")
from conftest import small
from imtx import draw
model = small("dmol", "class").float()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as on a full disk: a file is opened, and cannot be written to its end
assert torch.equal(draw(model, [0]), draw(model, [0], engine="eager"))
draw(model, [1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_where_compiled_code_does_not_fit_on_the_disk_pytorch_draws(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CROWDED], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Drawing with PyTorch") == 1
    assert "Numba cannot keep what it compiles ([Errno 27] File too large); NUMBA_CACHE_DIR names a folder with" in done.stderr


def test_where_numba_is_told_not_to_compile_pytorch_draws(caplog, monkeypatch):
    model = build("modern", "dmol", "1d", "class")
    before = draw(model, [0])
    monkeypatch.setattr(sampling, "_told", set())
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    with caplog.at_level(logging.WARNING, "imtx"):
        assert torch.equal(draw(model, [0]), before)
    assert "unset NUMBA_DISABLE_JIT" in caplog.text


def test_an_error_without_words_is_named_by_its_kind(monkeypatch):
    model = build("modern", "dmol", "1d", "class")
    monkeypatch.setattr(fast, "_unkept", [OSError()])
    monkeypatch.setattr(fast, "_compiled", set())
    assert "Numba cannot keep what it compiles (OSError);" in fast.obstacle(model)
    monkeypatch.setattr(fast, "_compiled", {np.dtype(np.float32)})  # this model's had been kept before the disk was full
    assert fast.obstacle(model) is None


@pytest.mark.parametrize("error", [EOFError(), pickle.UnpicklingError("pickle data was truncated")])
def test_code_that_came_to_harm_on_the_disk_is_compiled_anew(error, monkeypatch, tmp_path, caplog):
    from imtx.fast import compiling

    (tmp_path / "fast_0").mkdir()
    for name in ("step.advance-1.nbi", "step.advance-1.1.nbc", "other"):
        (tmp_path / "fast_0" / name).touch()
    monkeypatch.setattr(compiling, "_FOLDER", str(tmp_path))
    first_pixel = fast._first_pixel

    def damaged(model):
        if len(list(tmp_path.rglob("*.nb*"))):
            raise error
        first_pixel(model)

    monkeypatch.setattr(fast, "_first_pixel", damaged)
    model = build("modern", "dmol", "1d", "class")
    fast.warm(model)
    assert fast.is_warm(model) and [path.name for path in tmp_path.rglob("*.*")] == [] and (tmp_path / "fast_0/other").exists()
    assert "Compiled code in the cache was damaged. It is compiled anew." in caplog.text


def test_a_model_is_warm_when_one_of_its_kind_has_been_compiled(monkeypatch):
    monkeypatch.setattr(fast, "_compiled", set())
    one, other = build("modern", "dmol", "1d", "class"), build("sinusoid", "categorical", "2d", "sr")
    assert not fast.is_warm(one)
    fast.warm(one)
    assert fast.is_warm(one) and fast.is_warm(other) and not fast.is_warm(build("modern", "dmol", "1d", "class", bfloat16=True))


def test_code_of_another_version_lies_in_another_folder(monkeypatch, tmp_path):
    from imtx.fast import compiling

    for name, text in (("compiling.py", ""), ("arithmetic.py", "one = 1")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "compiling.py"))
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "cache"))
    before = compiling.code_folder()
    assert compiling.code_folder() == before
    (tmp_path / "arithmetic.py").write_text("one = 2")
    assert compiling.code_folder() != before
    assert compiling.code_folder().parent == before.parent == tmp_path / "cache/imtx"
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").touch()  # where no folder can be made: then beside the sources, and a folder a version there, too
    beside = compiling.code_folder()
    assert beside.is_dir() and beside.parent == tmp_path / "__pycache__"
    (tmp_path / "arithmetic.py").write_text("one = 1")
    assert compiling.code_folder() == beside.with_name(before.name) != beside
