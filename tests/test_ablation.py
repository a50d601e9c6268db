"""The memory-block ablation: one command, equal options for all blocks, and work that is not lost."""

import json
import sys

import pytest
from PIL import Image

from test_train import ROOT, data  # noqa: F401, a fixture

sys.path.insert(0, str(ROOT / "train"))

import ablation


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(*options) -> None:
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--output", str(tmp_path / "out"), *map(str, options)])
        ablation.main()

    return run


def test_every_block_is_trained_with_the_same_options_and_drawn(run, data, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setattr(ablation, "PAPER", {8: 4.06, 256: 2.99})
    options = ["--data", data, "--max-steps", 1, "--validation", 2, "--batch-size", 1]
    run(*options)
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert found["options"] == [str(option) for option in options] and set(found["bits_per_dim"]) == {"8", "256"}
    for block, value in found["bits_per_dim"].items():
        config = json.loads((tmp_path / "out" / block / "model" / "config.json").read_text())
        assert config["query_block"] == config["memory_block"] == int(block) and 7 < value < 10
    with Image.open(tmp_path / "out" / "ablation.png") as chart:
        assert len(chart.convert("RGB").getcolors(1 << 20)) > 10  # not an empty sheet
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == found

    monkeypatch.setattr(ablation, "train", lambda *_: pytest.fail("trained again"))
    run(*options)  # what is done is not done again
    with pytest.raises(SystemExit, match="other options.*--max-steps 1"):
        run(*options[:2], "--max-steps", 2)


def test_a_refused_option_binds_nobody(run, data, tmp_path, capfd):  # noqa: F811
    with pytest.raises(SystemExit, match="ended early"):
        run("--data", data, "--max-step", 1)
    assert "Did you mean --max-steps?" in capfd.readouterr().err and not (tmp_path / "out" / "ablation.json").exists()


def test_a_damaged_record(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ablation.json").write_text("{")
    with pytest.raises(SystemExit, match="ablation.json is not JSON"):
        run("--max-steps", 1)


@pytest.mark.parametrize("option", ["--preset", "--resume=latest"])
def test_the_models_are_chosen_by_the_ablation(run, option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(option, "tiny")
    assert "one model a block size" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(run, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match="cannot be written to"):
        run("--max-steps", 1)
