"""What a training run leaves for its card (train/publishing/records.py), and where it says that it comes from."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

from publishing import provenance
from publishing.records import Training

RUN = dict(
    command=f"python {ROOT}/train/train.py --preset tiny --data /home/someone/photos --output=/tmp/runs/mine",
    preset="tiny", data="/home/someone/photos", images=4321, steps=250, batch_size=8, images_seen=2000, seed=5, minutes=61.4,
    hardware="8 x NVIDIA H200", precision="bf16", commit="694299f", validation_bits_per_dim=3.456, validation_images=77,
    curve=[[100, 4.25], [200, 3.75]], data_checksum="0123456789abcdef" * 4,
)


def test_a_training_record_reads_back_the_same_and_one_field_a_line(tmp_path):
    Training(**RUN).save(tmp_path / "training.json")
    assert Training.load(tmp_path / "training.json") == Training(**RUN)
    lines = (tmp_path / "training.json").read_text().splitlines()
    assert len(lines) == len(dataclasses.fields(Training)) + 2 and list(tmp_path.iterdir()) == [tmp_path / "training.json"]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"steps": None}, "steps must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"minutes": float("nan")}, "minutes must be a finite number"),
        ({"hardware": ""}, "hardware must be words"),
        ({"commit": 7}, "commit must be words or null"),
        ({"curve": 7}, "curve must be a list"),
        ({"checkpoint": "step-00000100"}, "checkpoint must be a name and raw or ema"),
        ({"init_licence": "mit"}, "init_licence must be dict or null"),
        ({"curve": [[1]]}, "curve must hold pairs"),
        ({"speed": 7}, "fields that no training run writes: speed"),
    ],
)
def test_a_training_record_is_strict(change, sentence, tmp_path):
    path = tmp_path / "training.json"
    path.write_text(json.dumps(RUN | change))
    with pytest.raises(SystemExit, match=sentence):
        Training.load(path)
    path.write_text(json.dumps({name: value for name, value in RUN.items() if name not in ("seed", "commit")}))
    with pytest.raises(SystemExit, match="lacks commit, seed"):
        Training.load(path)


def test_a_command_with_spaces_keeps_its_words():
    elsewhere = ["/home/me/my photos/a b", "--data=../../them/c", "--note", "it's", r"C:\me\x"]
    command = shlex.join(["python", "train/train.py", "--data", *elsewhere])
    told = Training(**RUN | {"command": command}).command
    assert shlex.split(told) == ["python", "train/train.py", "--data", ".../a b", "--data=.../c", "--note", "it's", ".../x"]


def test_where_a_run_comes_from_is_told(monkeypatch):
    head = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    head = head if (ROOT / ".git").exists() else ""  # of another repository
    assert provenance.commit() in (head, f"{head}-dirty") if head else provenance.commit() is None
    one, two = (provenance.hardware(torch.device("cpu"), processes) for processes in (1, 2))
    assert " on " in one and one.endswith(" cores") and two.startswith("2 processes of ")
    monkeypatch.setattr(provenance, "ROOT", Path("/"))
    assert provenance.commit() is None


def test_a_commit_that_was_changed_says_so(tmp_path, monkeypatch):
    def git(*words) -> None:
        who = ("-c", "user.name=x", "-c", "user.email=x@x")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-qm", "a")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    clean = provenance.commit()
    (tmp_path / "a").write_text("b")
    assert len(clean) == 7 and provenance.commit() == f"{clean}-dirty"
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "copy")
    assert provenance.commit() is None  # the repository around it is another one
