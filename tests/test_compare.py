"""Comparisons at equal compute: one thing changed at a time, as many FLOPs for each, and work that is not lost."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from imtx import PRESETS, ImageTransformer
from imtx.checkpoint import Origin
from init_fixtures import NC
from test_train import ROOT, assert_equal, data  # noqa: F401, a fixture

sys.path.insert(0, str(ROOT / "train"))

import compare
import trainings


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(*options) -> None:
        monkeypatch.setattr(sys, "argv", ["compare.py", "--output", str(tmp_path / "out"), *map(str, options)])
        compare.main()

    return run


def begin(data) -> list:  # noqa: F811
    return ["--preset", "tiny", "--max-steps", 4, "--learning-rate", 1e-3, "--data", data, "--validation", 2, "--batch-size", 1]


def test_two_variants_take_as_many_flops(run, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    two = {"as it is": compare.Variant(), "longer": compare.Variant({"memory_block": 896}, ("--ema", "0.5"))}
    monkeypatch.setattr(compare, "variants", lambda *_: two)
    run(*begin(data))
    folder = tmp_path / "out"
    settings = [json.loads((folder / str(i) / "run.json").read_text()) for i in (0, 1)]
    assert [s["ema"] for s in settings] == [0.999, 0.5]
    assert settings[0]["learning_rate"] == settings[1]["learning_rate"] == 1e-3 and settings[0]["warmup"] == 100
    records = [json.loads((folder / str(i) / "training.json").read_text()) for i in (0, 1)]
    assert records[0]["steps"] == 4 > records[1]["steps"] >= 1
    memory = [json.loads((folder / str(i) / "model" / "config.json").read_text())["memory_block"] for i in (0, 1)]
    assert memory == [128, 896]
    starts = [ImageTransformer.from_pretrained(folder / f"{i}-start").state_dict() for i in (0, 1)]
    assert_equal(*starts)
    rows = (folder / "compare.md").read_text().splitlines()
    assert capsys.readouterr().out.splitlines()[-4:] == rows
    values = [float(row.split("|")[3]) for row in rows[2:]]
    assert values == [round(r["validation_bits_per_dim"], 4) for r in records] and values[0] != values[1]
    assert float(rows[3].split("|")[4]) == pytest.approx(values[1] - values[0], abs=0.00011)

    monkeypatch.setattr(trainings.subprocess, "Popen", lambda *_, **__: pytest.fail("trained again"))
    run(*begin(data))  # what is done is not done again
    with pytest.raises(SystemExit, match="other options"):
        run(*begin(data), "--clip", 2)


def test_a_trained_model_goes_on_with_one_thing_changed(run, data, tmp_path, monkeypatch):  # noqa: F811
    torch.manual_seed(5)
    model = ImageTransformer(replace(PRESETS["tiny"], classes=()))
    model.origin = Origin("theirs", licence=NC)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(compare, "variants", lambda *_: {"as it is": compare.Variant(), "x": compare.Variant({"dropout": 0.1})})
    begun = begin(data)
    run("--init", tmp_path / "model", *begun[2:])
    first = ImageTransformer.from_pretrained(tmp_path / "out" / "1-start")
    assert first.config.dropout == 0.1 and first.origin.licence == NC
    assert all(torch.equal(weight, first.state_dict()[name]) for name, weight in model.state_dict().items())
    assert json.loads((tmp_path / "out" / "1" / "run.json").read_text())["warmup"] == 20


def test_variants_change_one_thing_each():
    for config in PRESETS.values():
        found = compare.variants(config, 1e-3)
        assert all(len(v.config) + bool(v.options) == (told != "as it is") for told, v in found.items())
        assert all(v.options or replace(config, **v.config) != config for told, v in found.items() if told != "as it is")
    assert any("memory" in told for told in compare.variants(PRESETS["tiny"], 1e-3))
    longest = replace(PRESETS["tiny"], memory_block=512)
    assert {v.config["memory_block"] for v in compare.variants(longest, 1e-3).values() if "memory_block" in v.config} == {256, 1024}


def test_a_training_that_fails_ends_the_comparison(run, data, tmp_path, capfd):  # noqa: F811
    with pytest.raises(SystemExit, match="ended early"):
        run(*begin(data), "--fli")
    assert "there is no option --fli. Did you mean --flip?" in capfd.readouterr().err
    assert not (tmp_path / "out" / "compare.json").exists()  # the corrected command is free to begin


@pytest.mark.parametrize(
    "options, told",
    [(["--max-steps", 0], "must be above 0"), (["--resume=latest"], "are chosen here"), (["--ema", 0.9], "are chosen here"),
     (["--init", "faces-sr-1d"], "not allowed with")],
)
def test_bad_options(run, options, told, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--preset", "tiny", "--max-steps", 1, "--learning-rate", 1e-3, *options)
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
