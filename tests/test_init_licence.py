"""What binds the weights that others were trained on to, --init: by record, by card, and in the card of the result."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from init_fixtures import NC, OWN, files, start  # noqa: F401, some are fixtures

from imtx.checkpoint import BUNDLED, Origin

import publish
from averaging import open_model
from publishing import origins
from publishing.cards import Entry, binding, licence_of
from publishing.origins import licence as init_licence, origin
from publishing.records import Training


def test_older_records_are_read_and_new_ones_come_back(tmp_path):
    record = json.loads((BUNDLED / "cifar10-sr-1d/training.json").read_text())
    record = {name: value for name, value in record.items() if not name.startswith("init")}  # as before --init
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert Training.load(tmp_path / "old.json").init is None
    new = Training(**record | {"preset": None, "init": "/home/someone/faces", "init_licence": NC})
    new.save(tmp_path / "training.json")
    assert Training.load(tmp_path / "training.json") == new and new.init == ".../faces"


def test_a_licence_is_found_by_card_by_record_and_through_a_run(start, here, tmp_path):
    assert init_licence("upscaler") == init_licence("faces-sr-1d") == NC and init_licence("base") is None
    start("--data", "flat", init="upscaler", steps=1)
    assert json.loads((tmp_path / "run/run.json").read_text())["init_licence"] == NC
    for folder in ("model", "checkpoints/step-00000001/raw", "checkpoints/step-00000001/ema"):
        assert open_model(tmp_path / "run" / folder).origin == origin(tmp_path / "run" / folder) == Origin("upscaler", licence=NC)
        assert init_licence(str(tmp_path / "run" / folder)) == NC
    start("--data", "flat", init=tmp_path / "run/model", output="second", steps=1)  # and on
    assert Training.load(tmp_path / "second/training.json").init_licence == NC
    assert origin(here / "upscaler") is None


def test_the_card_of_a_hub_model_is_fetched_with_its_weights(here, monkeypatch, capsys):
    from huggingface_hub.errors import LocalEntryNotFoundError

    snapshot = here / "snapshots" / "abc"
    shutil.copytree(here / "base", snapshot, dirs_exist_ok=True)
    asked = []
    monkeypatch.setattr(origins, "find", lambda name: snapshot)
    fetch = lambda *a, **k: asked.append((a, k)) or str(here / "upscaler/README.md")  # noqa: E731
    monkeypatch.setattr(origins, "hf_hub_download", fetch)
    assert init_licence("they/faces") == NC and asked == [(("they/faces", "README.md"), {"revision": "abc"})]

    def fail(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(origins, "hf_hub_download", fail)
    assert init_licence("they/faces") is None and "they/faces cannot be read, nor its licence" in capsys.readouterr().err


def test_cards_in_others_words(tmp_path):
    card = tmp_path / "README.md"
    for front, found, bound in (
        ("license: mit", "mit", None), ("license: cc-by-nc-4.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("license: [mit, gpl-3.0]", "mit, gpl-3.0", "mit, gpl-3.0"),
    ):
        card.write_text(f"---\n{front}\n---\n# hello\n")
        licence = licence_of(card)
        assert licence["id"] == found and (binding(licence) and binding(licence).id) == bound
    card.write_text("# no front matter\n")
    assert licence_of(card) is None and binding(None) is None


@pytest.fixture
def tuned(start, tmp_path):
    """tuned("upscaler"): the model folder of a run that began with it."""

    def tuned(init: str, folder: str = "model") -> Path:
        start("--data", "flat", init=init, steps=1)
        return tmp_path / "run" / folder

    return tuned


def dry(model: Path, output: Path, *words) -> str:
    publish.main([str(model), "me/mine", *OWN, *words, "--data", "tested", "--dry-run", "--output", str(output)])
    return (output / "README.md").read_text()


def test_a_copy_of_what_was_trained_on_from_a_non_commercial_start_stays_bound(start, tmp_path, refusal):
    start("--data", "flat", init="upscaler", steps=1)
    start("--data", "flat", "--resume", "latest", init="upscaler", steps=2)
    for name in ("model", "checkpoints/step-00000002/raw"):
        copy = tmp_path / Path(name).name
        copy.mkdir()
        for path in (tmp_path / "run" / name).iterdir():
            if path.suffix == ".safetensors" or path.name == "config.json":
                shutil.copy(path, copy)
        assert "--licence: upscaler leaves no choice" in refusal(dry, copy, tmp_path / "out", "--licence", "apache-2.0")


@pytest.mark.parametrize("folder", ["model", "checkpoints/step-00000001/ema"])
def test_a_non_commercial_start_binds_the_result(folder, tuned, here, tmp_path, refusal):
    model = tuned("upscaler", folder)
    said = refusal(dry, model, tmp_path / "out", "--licence", "apache-2.0")
    assert "--licence: upscaler leaves no choice" in said and "non-commercial research" in said
    card = dry(model, tmp_path / "out")
    entry = Entry.read(tmp_path / "out/README.md")
    assert (entry.licence, entry.licence_name, entry.licence_link) == tuple(NC.values())
    assert (entry.init, entry.preset) == ("upscaler", None)
    assert "# mine: 2x2 to 8x8, fine-tuned from upscaler on My photos" in card and "What it started from shows in it too" in card
    assert "| Started from | fine-tuned from `upscaler`, whose licence is `celeba-non-commercial-research`" in card
    assert "| Licence | weights: for **non-commercial research** only" in card


def test_a_start_whose_licence_is_not_recorded_is_said_to_be_so(tuned, tmp_path):
    card = dry(tuned("base"), tmp_path / "out", "--licence", "mit")
    assert "fine-tuned from `base`, whose licence is not recorded: it may bind these weights too" in card
    assert Entry.read(tmp_path / "out/README.md").licence == "mit"


def test_licences_at_odds_are_refused(refusal):
    args = SimpleNamespace(data_name="celeba", data_licence=None, licence=None, show_data=False)
    gpl = dict(id="gpl-3.0", name=None, link=None)
    said = refusal(publish.described, args, "theirs", gpl)
    assert said.startswith("No licence fits these weights: CelebA asks for") and "theirs asks for `gpl-3.0`" in said
    assert publish.described(args, "faces-sr-1d", NC)[1].name == NC["name"]
