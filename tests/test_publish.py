"""train/publish.py: the folder that it writes, and whether it tells the truth; train/zoo.py."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, SIZE, SOURCE, small
from huggingface_hub import ModelCard
from PIL import Image
from publish_fixtures import (  # noqa: F401, some are fixtures
    DRY, IMAGES, OWN, ROOT, cell, contents, dry, fake, files, refusal,
)
from safetensors import safe_open
from test_evaluate import reduced
from test_records import RUN
from test_train import write

from imtx import ImageTransformer, draw

import data
import evaluate
import publish
import zoo
from publishing import licences
from publishing.cards import FREE, Entry
from publishing.known_data import KNOWN
from publishing.records import Evaluation, Training


def tiles(folder: Path, columns: int) -> list[np.ndarray]:
    """The pictures of samples.png, (h, w, 3) each, taken apart with no help from imtx."""
    page = np.asarray(Image.open(folder / "samples.png"))[::3, ::3]
    rows, side = (len(page) - 2) // (SIZE + 2), SIZE + 2
    assert page.shape == (rows * side + 2, columns * side + 2, 3)
    corners = [(2 + r * side, 2 + c * side) for r in range(rows) for c in range(columns)]
    return [page[top : top + SIZE, left : left + SIZE] for top, left in corners]


# ---- the folder --------------------------------------------------------------------------------------------


def test_the_folder_holds_the_model_its_card_and_nothing_else(dry, here, tmp_path):
    folder = dry("generator", *OWN)
    assert contents(folder).keys() == {"config.json", "model.safetensors", "README.md", "samples.png"}
    assert list(tmp_path.iterdir()) == [folder]
    model, loaded = small("dmol", "class").float(), ImageTransformer.from_pretrained(folder)
    assert loaded.config == model.config
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_the_figures_are_those_of_evaluate(dry, here, capsys):
    evaluate.main(["--checkpoint", "upscaler", "--data", "images.parquet", "--samples", "11"])
    printed = capsys.readouterr().out
    (here / "printed.txt").write_text(printed)
    expected = json.loads(printed.splitlines()[-1])
    measured = dry("upscaler", *OWN, "--data", "images.parquet")
    read = dry("upscaler", *OWN, "--data", "images.parquet", "--evaluation", "printed.txt", name="read")
    assert contents(measured) == contents(read)
    assert cell(measured, "Bits/dim") == (
        rf"**{expected['bits_per_dim']:.3f}** for p(high \| low) on 11 test images, each counted once; with sources "
        f"shuffled {expected['shuffled_sources_bits_per_dim']:.3f}"
    )
    assert cell(measured, "Consistency").startswith(f"{expected['consistency_rmse']:.2f} levels")
    assert "python train/evaluate.py --checkpoint me/mine --data DATA`, float32" in cell(measured, "Measured with")
    found = ModelCard((measured / "README.md").read_text()).data
    figures = {result.metric_type: result.metric_value for result in found.eval_results}
    assert figures == {name: expected[name] for name in ("bits_per_dim", "shuffled_sources_bits_per_dim")}


def test_figures_of_other_pictures_or_options_are_called_so(dry, here, capsys):
    options = ["--split", "train", "--limit", "3", "--no-class"]
    (here / "set").mkdir(exist_ok=True)
    write(here / "set/train-0.parquet", IMAGES.numpy(), labels=[i % 2 for i in range(11)])
    evaluate.main(["--checkpoint", "generator", "--data", "set", *options])
    (here / "printed.txt").write_text(capsys.readouterr().out)
    folder = dry("generator", *OWN, "--evaluation", "printed.txt")
    assert "for p(image) on 3 train images, each counted once" in cell(folder, "Bits/dim").replace("\\", "")
    assert "--data DATA --split train --limit 3 --no-class`, float32" in cell(folder, "Measured with")
    (result,) = ModelCard((folder / "README.md").read_text()).data.eval_results
    assert result.dataset_split == "train" and "(3 train images)" in zoo.row(folder)


def test_pictures_are_read_with_evaluate_s_options(dry, here, refusal):
    pq.write_table(pq.read_table("images.parquet").rename_columns(["photo", "label"]), here / "odd.parquet")
    assert "--image-column names another" in refusal("upscaler", "me/x", *OWN, *DRY, "--data", "odd.parquet")
    folder = dry("upscaler", *OWN, "--data", "odd.parquet", "--image-column", "photo")
    usual = dry("upscaler", *OWN, "--data", "images.parquet", name="usual")
    assert contents(folder)["samples.png"] == contents(usual)["samples.png"]
    assert cell(folder, "Bits/dim") == cell(usual, "Bits/dim")
    assert "--data DATA --image-column photo`" in cell(folder, "Measured with")
    assert "--celeba-crop goes with --data" in refusal("upscaler", "me/x", *OWN, *DRY, "--celeba-crop")
    assert "leave --celeba-crop out" in refusal("upscaler", "me/x", "--as-is", "--celeba-crop")
    for option in ("--data-name", "--data-note"):
        assert f"{option} is a line of the card, and is empty" in refusal("upscaler", "me/x", *OWN, *DRY, option, " ")


def test_the_training_run_is_told_without_paths_of_the_machine(dry):
    folder = dry("upscaler", *OWN, "--data", "images.parquet", "--data-note", "all of 2025", "--title", "Tiny to small")
    text = (folder / "README.md").read_text()
    assert cell(folder, "Command") == "`python train/train.py --preset tiny --data .../photos --output=.../mine`"
    assert cell(folder, "Steps") == "250 of 8 images (2,000 images seen), seed 5"
    assert cell(folder, "Hardware") == "8 x NVIDIA H200, bfloat16 autocast, 61 minutes of training"
    assert cell(folder, "Commit") == "`694299f`"
    assert cell(folder, "Data") == "My photos, all of 2025: 4,321 training images, 77 held out for validation"
    assert cell(folder, "Licence") == "weights: `cc0-1.0`; data: they are mine"
    assert "4.25 at 100, 3.75 at 200;\non all 77 held-out images at the end: 3.456." in text
    assert "# mine: Tiny to small" in text and "not measured" not in text and "not recorded" not in text
    assert Training.load(folder / "training.json") == Training(**RUN)
    assert cell(folder, "Checksum").startswith(f"`{RUN['data_checksum']}`, SHA-256 of all training images")
    for name in ("README.md", "training.json"):
        assert not any(path in (folder / name).read_text() for path in ("/home", "/tmp", str(ROOT), str(folder)))


def test_what_is_not_known_is_said_to_be_so_and_not_invented(dry):
    folder = dry("generator", *OWN)
    rows = {row: cell(folder, row) for row in ("Command", "Steps", "Hardware", "Commit", "Bits/dim")}
    assert rows.pop("Bits/dim") == "not measured" and set(rows.values()) == {"not recorded"}
    assert "Measured with" not in (folder / "README.md").read_text()
    found = ModelCard((folder / "README.md").read_text()).data.to_dict()
    assert not {"model-index", "model_name"} & found.keys()
    assert found["imtx"]["evaluation"] is None and found["imtx"]["preset"] is None
    assert zoo.row(folder).count("not measured") == 1 and "not recorded" in zoo.row(folder)


def test_the_front_matter_is_what_the_hub_reads_and_reads_back_the_same(dry):
    folder = dry("generator", "--data-name", "CIFAR-10", "--licence", "apache-2.0", "--data", "images.parquet")
    found = ModelCard((folder / "README.md").read_text()).data
    assert (found.license, found.library_name, found.pipeline_tag, found.datasets) == (
        "apache-2.0", "imtx", "unconditional-image-generation", ["uoft-cs/cifar10"]
    )
    entry = Entry.read(folder / "README.md")
    text = (folder / "README.md").read_text()
    assert text.startswith(entry.front_matter() + "\n# mine: 8x8 pictures, trained on CIFAR-10\n")
    assert (entry.hub_id, entry.task, entry.dtype, entry.parameters) == ("me/mine", "generation", "float32", 20420)
    assert entry.evaluation.images == 11 and entry.evaluation.shuffled[0] == "labels"
    assert "the page of CIFAR-10 names no licence" in cell(folder, "Licence")


def test_own_words_stand_at_the_end_and_the_usage_runs(dry, here, monkeypatch):
    (here / "about.md").write_text("\n**Beware.** Drawn by hand.\n\n")
    folder = dry("generator", *OWN, "--about", "about.md", repo=str(here.relative_to(here.parent)) + "/generator")
    text = (folder / "README.md").read_text()
    assert text.endswith("nothing else.\n\n**Beware.** Drawn by hand.\n")
    (code,) = (part.partition("```")[0] for part in text.split("```python\n")[1:])
    monkeypatch.chdir(here.parent)
    exec(code, drawn := {})
    assert drawn["pictures"].shape == (4, 8, 8, 3)


def test_weights_stored_as_bfloat16_are_the_ones_measured(dry, here, refusal, tmp_path):
    folder = dry("generator", *OWN, "--data", "images.parquet", "--dtype", "bf16")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}
    assert kinds["decoder.0.ffn.up.weight"] == "BF16" and kinds["head.weight"] == "F32"
    assert cell(folder, "Parameters") == "20,420, stored as bfloat16 (matrices of the blocks) and float32"
    full = dry("generator", *OWN, "--data", "images.parquet", name="full")
    assert Entry.read(folder / "README.md").evaluation != Entry.read(full / "README.md").evaluation
    evaluation = {"bits_per_dim": 3.0, "likelihood": "p(image)", "images": 9, "parameters": 20420}
    (tmp_path / "e.json").write_text(json.dumps(evaluation))
    options = (*OWN, "--evaluation", tmp_path / "e.json", "--dtype", "bf16")
    assert "rounds the weights" in refusal("generator", "me/mine", *options, "--dry-run", "--output", tmp_path / "no")
    assert "3.000" in cell(dry(str(folder), *options, name="again"), "Bits/dim")  # nothing left to round


def test_weights_of_unknown_origin_are_told_to_whoever_chooses_a_licence(dry, capsys):
    dry("upscaler", *OWN, "--data", "images.parquet", name="known")
    assert capsys.readouterr().err == ""
    dry("generator", *OWN, name="unknown")
    assert "has no training.json: nothing here tells what its weights were trained on from." in capsys.readouterr().err


def test_a_licence_that_the_hub_does_not_know_has_a_name_and_a_text(dry):
    link = "https://example.org/mine.txt"
    words = ("--licence", "other", "--licence-name", "my-licence-1.0", "--licence-link", link)
    folder = dry("generator", *OWN[:4], *words)
    found = ModelCard((folder / "README.md").read_text()).data
    assert (found.license, found.license_name, found.license_link) == ("other", "my-licence-1.0", link)
    assert cell(folder, "Licence") == f"weights: `my-licence-1.0` ({link}); data: they are mine"
    assert ImageTransformer.from_pretrained(folder).origin is None  # a choice, which does not bind


@pytest.mark.parametrize(
    "licence, sentence",
    [
        (["Apache-2.0"], "the Hub knows no Apache-2.0, did you mean apache-2.0?"),
        (["apache2"], "the Hub knows no apache2, did you mean apache-2.0?"),
        (["CC BY 4.0"], "the Hub knows no CC BY 4.0, did you mean cc-by-4.0?"),
        (["proprietary"], "the Hub knows no proprietary, take one of these, or other with a name and a link of its own: https://"),
        (["other"], "--licence other needs --licence-name"),
        (["other", "--licence-name", "mine"], "and --licence-link, the http(s) address"),
        (["other", "--licence-name", "My own", "--licence-link", "https://example.org"], "--licence other needs --licence-name"),
        (["other", "--licence-name", "mine", "--licence-link", "LICENSE"], "the http(s) address of its text"),
        (["mit", "--licence-name", "mine"], "--licence-name and --licence-link go with --licence other"),
    ],
)
def test_a_licence_is_one_that_the_hub_takes(licence, sentence, here, refusal):
    assert sentence in refusal("generator", "me/x", *OWN[:4], "--licence", *licence, *DRY)


def test_the_licences_that_leave_a_choice_are_the_hubs():
    assert FREE < licences.HUB and {data.weights.id for data in KNOWN.values() if data.weights} <= licences.HUB


# ---- the sheet ---------------------------------------------------------------------------------------------


def test_samples_are_drawn_in_order_of_their_seeds_with_the_classes_in_turn(dry):
    folder = dry("generator", *OWN, "--temperature", "0.8", "--guidance", "2.5")
    shown = tiles(folder, columns=8)
    assert "at temperature 0.8 and guidance 2.5: drawn in order, none chosen" in (folder / "README.md").read_text()
    labels = [i % len(CLASSES) for i in range(32)]
    expected = draw(small("dmol", "class").float(), range(32), labels=labels, temperature=0.8, guidance=2.5)
    assert np.array_equal(shown, expected)


def test_a_sheet_of_super_resolution_shows_neither_sources_nor_truths(dry):
    shown = tiles(dry("upscaler", *OWN, "--data", "images.parquet"), columns=8)
    sources = reduced(IMAGES)[[i % 8 for i in range(32)]]
    assert np.array_equal(shown, draw(small("categorical", "sr").float(), range(32), sources=sources))


def test_a_sheet_of_a_celeba_model_is_of_portraits_that_anyone_may_publish(dry):
    """A sample shows what its source was: nothing on the card comes from a picture of CelebA."""
    folder = dry("upscaler", "--data-name", "celeba", "--data", "images.parquet")
    portraits = data.load(str(publish.PORTRAITS), "train", small("categorical", "sr").config)
    sources = reduced(portraits.pixels)[[i % len(portraits) for i in range(32)]]
    assert np.array_equal(tiles(folder, columns=8), draw(small("categorical", "sr").float(), range(32), sources=sources))
    assert "portraits in assets/examples/faces" in (folder / "README.md").read_text()


def test_they_are_shown_when_asked_for_and_never_those_of_celeba(dry, refusal):
    folder = dry("upscaler", *OWN, "--data", "images.parquet", "--show-data")
    assert "Columns, in turn: the first 8 test pictures, above the samples as sources and below" in (folder / "README.md").read_text()
    shown = tiles(folder, columns=8)
    assert len(shown) == 48 and np.array_equal(shown[40:], IMAGES[:8])
    factor = SIZE // SOURCE
    assert np.array_equal(shown[:8], reduced(IMAGES[:8]).repeat_interleave(factor, 1).repeat_interleave(factor, 2))
    refused = refusal("upscaler", "me/x", "--data-name", "CelebA", "--data", "images.parquet", "--show-data", "--dry-run",
                      "--output", "no")
    assert "of people" in refused and not Path("no").exists()


def test_a_card_of_celeba_keeps_to_its_terms(dry):
    folder = dry("upscaler", "--data-name", "celeba", "--data", "images.parquet")
    assert "non-commercial research" in cell(folder, "Licence")
    assert "do not use it to recognise people" in (folder / "README.md").read_text().replace("\n", " ")
    found = ModelCard((folder / "README.md").read_text()).data
    assert found.license == "other" and found.license_name and found.license_link.startswith("https://")


# ---- what is refused ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("generator", "me/x", *OWN, "--dry-run"), "--dry-run and --output FOLDER go together"),
        (("generator", "me/x", *OWN, "--output", "no"), "--dry-run and --output FOLDER go together"),
        (("generator", "me/x", *OWN, *DRY, "--private"), "--private and --revision are for an upload"),
        (("generator", "mine", *OWN, *DRY), "mine names no owner"),
        (("generator", "me/mine/x", *OWN, *DRY), "cannot be a Hub id"),
        (("generator", "me/x", *DRY), "--data-name: say what"),
        (("generator", "me/x", *OWN[:2], *OWN[4:], *DRY), "--data-licence: say in a sentence"),
        (("generator", "me/x", *OWN[:4], *DRY), "--licence: choose one"),
        (("generator", "me/x", "--data-name", "cifar10", *OWN[2:], *DRY), "--data-licence: that of CIFAR-10 is known"),
        (("generator", "me/x", "--data-name", "celeba", "--licence", "mit", *DRY), "CelebA leaves no choice"),
        (("generator", "me/x", *OWN[:3], "no\nline", *DRY), "--data-licence is a line of the card"),
        (("generator", "me/x", *OWN, *DRY, "--temperature", 0), "--temperature must be from 1e-30 to 1e+30"),
        (("generator", "me/x", *OWN, *DRY, "--guidance", 21), "--guidance must be from 0 to 20"),
        (("upscaler", "me/x", *OWN, *DRY, "--guidance", 2), "no class that could be followed"),
        (("generator", "me/x", *OWN, *DRY, "--show-data"), "--show-data is for super-resolution"),
        (("generator", "me/x", *OWN, *DRY, "--about", "none.md"), "none.md cannot be read: No such file"),
        (("generator", "me/x", *OWN, *DRY, "--evaluation", "images.parquet"), "images.parquet is no text file"),
        (("upscaler", "me/x", *OWN, *DRY), "--data: a super-resolution model needs sources"),
        (("upscaler", "me/x", *OWN, *DRY, "--data", "none"), "There is no file or folder none"),
        (("none", "me/x", *OWN, *DRY), "There is no folder none"),
        ((".", "me/x", *OWN, *DRY), ". holds no config.json: it is no model folder"),
        (("images.parquet", "me/x", *OWN, *DRY), "images.parquet is a file. Name the folder"),
        (("generator", "me/x", *OWN, "--dry-run", "--output", "upscaler"), "upscaler exists already"),
        (("generator", "me/x", *OWN, "--dry-run", "--output", "images.parquet/x"), "--output: images.parquet/x cannot be"),
        (("generator", "me/x", *OWN, "--dry-run", "--output", "/proc/x"), "--output: /proc/x cannot be written"),
    ],
)
def test_refusals_name_the_cause_and_write_nothing(arguments, sentence, here, fake, refusal):
    before = sorted(here.rglob("*"))
    assert sentence in refusal(*arguments)
    assert sorted(here.rglob("*")) == before and fake.calls == []


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("nothing", "is not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"bits_per_dim": 3.0}', "lacks images, likelihood, parameters"),
        ('{"bits_per_dim": 3.0, "likelihood": "p", "images": 5, "parameters": 7}', "is of another model, of 7 parameters"),
        ('{"bits_per_dim": "3", "likelihood": "p", "images": 5, "parameters": 20420}', "bits_per_dim must be a finite"),
        ('{"bits_per_dim": NaN, "likelihood": "p", "images": 5, "parameters": 20420}', "bits_per_dim must be a finite"),
    ],
)
def test_an_evaluation_that_is_none_is_not_published(text, sentence, here, refusal, tmp_path):
    (tmp_path / "e.json").write_text(f"what evaluate.py prints\n{text}\n")
    refused = refusal("generator", "me/x", *OWN, *DRY, "--evaluation", tmp_path / "e.json")
    assert sentence in refused and "e.json" in refused and not Path("no").exists()


def test_a_folder_that_cannot_be_finished_leaves_nothing(here, tmp_path, refusal, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "save_png", full)
    output = tmp_path / "out"
    assert "cannot be written: No space left" in refusal("generator", "me/x", *OWN, "--dry-run", "--output", output)
    assert list(tmp_path.iterdir()) == []


# ---- the zoo -----------------------------------------------------------------------------------------------


def test_the_table_is_made_from_the_cards(dry, tmp_path):
    evaluation = Evaluation(
        2.5, "p(high | low)", 1500, shuffled_sources_bits_per_dim=9.25, consistency_rmse=0.617, consistency_samples=64
    )
    folder = dry("upscaler", "--data-name", "celeba", "--data", "images.parquet", name="zoo/faces")
    entry = dataclasses.replace(Entry.read(folder / "README.md"), evaluation=evaluation)
    (folder / "README.md").write_text(entry.front_matter() + "\n# faces\n")
    (folder / "model.safetensors").write_bytes(bytes(1_260_000))
    assert zoo.table(tmp_path / "zoo") == zoo.HEADER + (
        f"| [`faces`](assets/weights/faces) | Super-resolve | `tiny` | {entry.parameters:,} | 1.3 | "
        r"**2.500** p(high \| low) (1,500 images) | sources: 9.250 | 0.62 | `me/mine`, not yet published |"
        "\n"
    )


def test_the_table_stands_between_its_marks():
    readme = "before\n<!-- zoo -->\nold\n<!-- /zoo -->\nafter\n"
    once = zoo.renewed(readme, "new\n")
    assert once == "before\n<!-- zoo -->\nnew\n<!-- /zoo -->\nafter\n" == zoo.renewed(once, "new\n")
    for lost in ("before", "<!-- zoo -->", "<!-- /zoo -->\n<!-- zoo -->"):
        with pytest.raises(SystemExit, match="lost the marks"):
            zoo.renewed(lost, "new\n")
