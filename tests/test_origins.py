"""What weights were made from stays with them, in copies and averages too, and binds whoever publishes them
(train/publishing/origins.py); cards of a run's checkpoints."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small
from huggingface_hub import ModelCard
from publish_fixtures import OWN, cell, dry, files, refusal  # noqa: F401, some are fixtures
from test_records import RUN

from imtx import ImageTransformer
from imtx.checkpoint import BUNDLED, Origin

import evaluate
from publishing import origins
from publishing.cards import Entry
from publishing.records import Training

NC = {"id": "other", "name": "celeba-non-commercial-research", "link": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"}
GPL = {"id": "gpl-3.0", "name": None, "link": None}
UNLICENSED = OWN[:4]  # data, but no licence of the weights


def write_model(folder: Path, origin: Origin | None = None) -> Path:
    model = small("dmol", "class").float()
    model.origin = origin
    model.save_pretrained(folder)
    return folder


def copy_of(model: Path, folder: Path) -> Path:
    """With no more than an upload by hand may have: configuration and weights."""
    folder.mkdir()
    for path in (model / "config.json", *model.glob("*.safetensors")):
        shutil.copy(path, folder)
    return folder


def licence_on(card: Path) -> dict:
    found = ModelCard((card / "README.md").read_text()).data.to_dict()
    return {"id": found["license"], "name": found.get("license_name"), "link": found.get("license_link")}


@pytest.fixture
def mean(here, tmp_path):
    """evaluate.py --average: the folder that it saves."""

    def mean(*models, name: str = "mean") -> Path:
        command = ["--average", *map(str, models), "--data", "images.parquet", "--limit", "1", "--save", str(tmp_path / name)]
        evaluate.main(command)
        return tmp_path / name

    return mean


# ---- licences ----------------------------------------------------------------------------------------------


def by_hand(model: Path, folder: Path) -> Path:
    return copy_of(model, folder)


def in_python(model: Path, folder: Path) -> Path:
    ImageTransformer.from_pretrained(model).save_pretrained(folder, dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize("copied", [by_hand, in_python])
def test_a_copy_of_weights_is_bound_as_they_are(copied, dry, refusal, tmp_path):
    bound = write_model(tmp_path / "bound", Origin(init="faces-sr-1d", licence=NC))
    copy = copied(bound, tmp_path / "copy")
    said = refusal(copy, "me/x", *OWN, "--dry-run", "--output", tmp_path / "no")
    assert said.startswith("--licence: faces-sr-1d leaves no choice, weights are for non-commercial research only")
    card = dry(copy, *UNLICENSED)
    assert licence_on(card) == NC and "fine-tuned from `faces-sr-1d`, whose licence" in cell(card, "Started from")
    again = copied(card, tmp_path / "again")  # what is published binds likewise
    assert origins.origin(again) == Origin(init="faces-sr-1d", licence=NC)
    assert "faces-sr-1d leaves no choice" in refusal(again, "me/x", *OWN, "--dry-run", "--output", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_published_weights_keep_what_their_data_ask_for_and_not_what_their_author_chose(dry, refusal, tmp_path):
    faces = dry("upscaler", "--data-name", "celeba", "--data", "images.parquet", name="faces")
    assert ImageTransformer.from_pretrained(faces).origin == Origin(licence=NC) and origins.licence(str(faces)) == NC
    copy = copy_of(faces, tmp_path / "copy")
    said = refusal(copy, "me/x", *OWN, "--data", "images.parquet", "--dry-run", "--output", tmp_path / "no")
    assert said.startswith("--licence: what these weights were made from leaves no choice")
    own = dry("generator", *UNLICENSED, "--licence", "cc-by-nc-4.0", name="own")
    assert ImageTransformer.from_pretrained(own).origin is None and origins.licence(str(own))["id"] == "cc-by-nc-4.0"
    assert licence_on(dry(copy_of(own, tmp_path / "second"), *OWN))["id"] == "cc0-1.0"


def test_what_data_ask_for_is_not_taken_for_the_licence_of_the_start(dry, tmp_path):
    card = dry(write_model(tmp_path / "tuned", Origin(init="base")), "--data-name", "celeba")
    assert licence_on(card) == NC and origins.origin(card) == Origin(init="base", licence=NC)
    assert cell(card, "Started from") == "fine-tuned from `base`, whose licence is not recorded: it may bind these weights too"


def test_weights_that_bind_do_so_under_another_card_too(tmp_path):
    bound = write_model(tmp_path / "bound", Origin(licence=NC))
    (bound / "README.md").write_text("---\nlicense: mit\n---\n# hello\n")
    assert origins.licence(str(bound)) == NC
    free = write_model(tmp_path / "free", Origin(licence={**GPL, "id": "apache-2.0"}))
    (free / "README.md").write_text("---\nlicense: gpl-3.0\n---\n# hello\n")
    assert origins.licence(str(free)) == GPL


# ---- averages ----------------------------------------------------------------------------------------------


def test_an_average_tells_its_parts_and_keeps_the_strictest_licence(mean, dry, refusal, tmp_path, capsys):
    free = write_model(tmp_path / "free", Origin(init="base", licence={**GPL, "id": "mit"}))
    tuned = write_model(tmp_path / "tuned", Origin(init="faces-sr-1d", licence=NC))
    saved = mean(free, "generator", tuned)
    expected = Origin(init="base, faces-sr-1d", average_of=(".../free", "generator", ".../tuned"), licence=NC)
    assert ImageTransformer.from_pretrained(saved).origin == origins.origin(saved) == expected
    assert "faces-sr-1d leaves no choice" in refusal(saved, "me/x", *OWN, "--dry-run", "--output", tmp_path / "no")
    capsys.readouterr()
    card = dry(saved, *UNLICENSED)
    assert licence_on(card) == NC
    assert cell(card, "Average") == "the mean of the weights of `.../free`, `generator`, `.../tuned`"
    assert "nothing here tells" not in capsys.readouterr().err


def test_a_part_that_is_bound_by_its_card_alone_binds_an_average(mean, here, tmp_path, dry):
    carded = write_model(tmp_path / "carded")
    shutil.copy(BUNDLED / "faces-sr-1d/README.md", carded)
    saved = mean("generator", carded)
    assert origins.origin(saved) == Origin(average_of=("generator", ".../carded"), licence=NC)
    card = dry(saved, *UNLICENSED)
    assert licence_on(card) == NC and "Started from" not in (card / "README.md").read_text()


def test_an_average_of_free_models_can_have_any_licence(mean, here, dry, tmp_path):
    free = write_model(tmp_path / "free", Origin(init="base", licence={**GPL, "id": "mit"}))
    card = dry(mean(free, "generator"), *OWN)
    assert licence_on(card)["id"] == "cc0-1.0" and "whose licence is `mit`" in cell(card, "Started from")


def test_licences_at_odds_have_no_average_to_save(mean, here, tmp_path, capsys):
    one = write_model(tmp_path / "one", Origin(licence=NC))
    other = write_model(tmp_path / "other", Origin(licence=GPL))
    with pytest.raises(SystemExit) as refused:
        mean(one, other)
    said = f"{one} asks for `celeba-non-commercial-research`, and {other} asks for `gpl-3.0`. Leave --save out"
    assert str(refused.value).startswith(f"No licence fits the mean of these weights: {said}")
    assert not (tmp_path / "mean").exists()
    evaluate.main(["--average", str(one), str(other), "--data", "images.parquet", "--limit", "1"])
    assert '"averaged_models": 2' in capsys.readouterr().out


# ---- checkpoints -------------------------------------------------------------------------------------------

RECORD = Training(**RUN | {"preset": None, "init": "faces-sr-1d", "init_licence": NC})
CHECKPOINTS = {"before-decay": (180, 1500.0), "step-00000100": (100, 900.0), "step-00000250": (250, 3684.0)}


@pytest.fixture
def run(tmp_path) -> Path:
    """What a finished run leaves, but for what only a resumed one needs."""
    folder = tmp_path / "mine"
    write_model(folder / "model")
    for name, (step, seconds) in CHECKPOINTS.items():
        for kind in ("raw", "ema"):
            write_model(folder / "checkpoints" / name / kind)
        progress = {"step": step, "seconds": seconds, "decaying": True, "curve": []}
        torch.save(progress, folder / "checkpoints" / name / "custom_checkpoint_0.pkl")
    for record in (folder, folder / "model"):
        RECORD.save(record / "training.json")
    (folder / "run.json").write_text(json.dumps({"init": "faces-sr-1d", "init_licence": NC, "preset": None}))
    lines = [json.dumps({"step": step, "bits_per_dim": 5.0}) for step in range(50, 251, 50)]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"step": 30']))  # whoever wrote the last line was killed
    return folder


def test_the_card_of_a_checkpoint_tells_the_run_up_to_its_step(run, dry):
    card = dry(run / "checkpoints/step-00000100/ema", *UNLICENSED)
    text = (card / "README.md").read_text()
    assert cell(card, "Command") == f"`{RECORD.command}`" and cell(card, "Commit") == "`694299f`"
    assert cell(card, "Steps") == (
        "100 of 8 images (800 images seen), seed 5; checkpoint `step-00000100/ema` of that run, the moving average of the "
        "weights"
    )
    assert cell(card, "Hardware").endswith("bfloat16 autocast, 15 minutes of training")
    assert "on the first held-out images, by step: 4.25 at 100.\n" in text
    assert "at the end" not in text and "3.456" not in text and "not recorded" not in text
    assert licence_on(card) == NC and cell(card, "Started from").startswith("fine-tuned from `faces-sr-1d`")
    told = dict(steps=100, images_seen=800, minutes=15.0, curve=((100, 4.25),), validation_bits_per_dim=None)
    record = Training.load(card / "training.json")
    assert record == replace(RECORD, checkpoint="step-00000100/ema", **told)
    file = run / "checkpoints/step-00000100/custom_checkpoint_0.pkl"  # newer ones tell what the run was up to there
    facts = {"command": "python train/train.py --first", "precision": "no", "commit": "1234567", "hardware": "a laptop"}
    torch.save(torch.load(file) | {"told": facts}, file)
    card = dry(run / "checkpoints/step-00000100/ema", *UNLICENSED, name="newer")
    assert Training.load(card / "training.json") == replace(record, **facts)


@pytest.mark.parametrize(
    "folder, steps, said",
    [
        ("before-decay/raw", 180, "180 of 8 images (1,440 images seen), seed 5; checkpoint `before-decay/raw` of that run, the "
                                  "weights themselves"),
        ("step-00000250/raw", 250, "250 of 8 images (2,000 images seen), seed 5; checkpoint `step-00000250/raw` of that run, the "
                                   "weights themselves"),
        ("step-00000250/ema", 250, "250 of 8 images (2,000 images seen), seed 5"),
    ],
)
def test_a_checkpoint_is_called_what_it_is(folder, steps, said, run, dry):
    card = dry(run / "checkpoints" / folder, *UNLICENSED)
    assert cell(card, "Steps") == said and Training.load(card / "training.json").steps == steps
    assert ("at the end: 3.456" in (card / "README.md").read_text()) == (folder == "step-00000250/ema")


@pytest.mark.parametrize("folder, last", [("checkpoints/step-00000100/ema", 100), ("checkpoints/before-decay/raw", 150), ("model", 250)])
def test_the_log_up_to_its_step_goes_with_a_model(folder, last, run, dry):
    card = dry(run / folder, *UNLICENSED)
    steps = [json.loads(line)["step"] for line in (card / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(50, last + 1, 50)) and cell(card, "Log").startswith("[log.jsonl](log.jsonl)")
    again = dry(card, *UNLICENSED, name="again")  # of the published folder, which is no run's
    assert (again / "log.jsonl").read_text() == (card / "log.jsonl").read_text()


def test_a_run_that_has_not_ended_has_no_record_but_binds(run, dry, refusal, tmp_path, capsys):
    for record in (run, run / "model"):
        (record / "training.json").unlink()
    for name in ("checkpoints/step-00000100/ema", "model"):
        assert "faces-sr-1d leaves no choice" in refusal(run / name, "me/x", *OWN, "--dry-run", "--output", tmp_path / "no")
        card = dry(run / name, *UNLICENSED, name=f"card-{Path(name).name}")
        said = capsys.readouterr().err
        assert f"{run} has no training.json, which a run leaves at its end" in said and "nothing here tells" not in said
        assert cell(card, "Command") == "not recorded" and Entry.read(card / "README.md").init == "faces-sr-1d"


def test_a_checkpoint_whose_step_is_not_known_is_not_passed_off_as_the_end(run, refusal, tmp_path):
    folder = run / "checkpoints/step-00000100/ema"
    file = folder.parent / "custom_checkpoint_0.pkl"
    for content in (b"", b"nothing", None):
        file.unlink() if content is None else file.write_bytes(content)
        said = refusal(folder, "me/x", *UNLICENSED, "--dry-run", "--output", tmp_path / "no")
        assert f"{file} cannot be read" in said and f"Publish another checkpoint, or {run / 'model'}." in said


def test_notes_that_are_damaged_are_named(run, refusal, tmp_path):
    for record in (run, run / "model"):
        (record / "training.json").unlink()
    (run / "run.json").write_text(json.dumps({"init": "base", "init_licence": "mit"}))
    said = refusal(run / "model", "me/x", *OWN, "--dry-run", "--output", tmp_path / "no")
    assert said.startswith(f"{run / 'run.json'}: what the weights were trained on from cannot be read")


def test_an_average_of_checkpoints_is_named_by_them(run, mean):
    saved = mean(run / "checkpoints/step-00000100/raw", run / "checkpoints/step-00000250/raw")
    parts = tuple(f".../mine/checkpoints/step-00000{step}/raw" for step in (100, 250))
    assert origins.origin(saved) == Origin(init="faces-sr-1d", average_of=parts, licence=NC)
