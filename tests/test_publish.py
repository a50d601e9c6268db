"""train/publish.py: the folder that it writes, tells the truth and uploads; train/zoo.py."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE, SOURCE, pictures, small
from huggingface_hub import ModelCard, errors
from PIL import Image
from safetensors import safe_open
from test_evaluate import reduced
from test_records import RUN
from test_train import write

from imtx import ImageTransformer, draw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import evaluate
from publishing import hub
import data
import publish
import zoo
from publishing.cards import Entry
from publishing.records import Evaluation, Training

IMAGES = pictures(11)
OWN = ("--data-name", "My photos", "--data-licence", "they are mine", "--licence", "cc0-1.0")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two models, the super-resolution one with a record of its training, and images to measure them on."""
    folder = tmp_path_factory.mktemp("files")
    small("dmol", "class").float().save_pretrained(folder / "generator")
    small("categorical", "sr").float().save_pretrained(folder / "upscaler")
    Training(**RUN).save(folder / "upscaler/training.json")
    write(folder / "images.parquet", IMAGES.numpy(), labels=[i % 2 for i in range(11)])
    return folder


@pytest.fixture
def here(files, monkeypatch) -> Path:
    monkeypatch.chdir(files)
    return files


@pytest.fixture
def dry(here, tmp_path):
    """Writes the folder of a model and returns it."""

    def dry(checkpoint: str, *options, repo: str = "me/mine", name: str = "out") -> Path:
        publish.main([checkpoint, repo, *map(str, options), "--dry-run", "--output", str(tmp_path / name)])
        return tmp_path / name

    return dry


@pytest.fixture
def refusal(capsys):
    """The sentence with which a command ends."""

    def refusal(*arguments) -> str:
        with pytest.raises(SystemExit) as ended:
            publish.main([str(argument) for argument in arguments])
        assert ended.value.code != 0
        return capsys.readouterr().err if isinstance(ended.value.code, int) else str(ended.value)

    return refusal


@pytest.fixture
def fake(monkeypatch):
    """In place of HfApi: its calls, the files of the last upload, and what it should raise at which call."""
    fake = SimpleNamespace(calls=[], uploaded={}, fails={}, private=True)

    class Api:
        def __getattr__(self, name):
            def call(*positional, **named):
                fake.calls.append((name, positional, named))
                if name in fake.fails:
                    raise fake.fails[name]
                if name == "upload_folder":
                    fake.uploaded = contents(Path(named["folder_path"]))
                return SimpleNamespace(commit_url="https://hub/commit/1", private=fake.private)

            return call

    monkeypatch.setattr(hub, "HfApi", Api)
    return fake


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cell(folder: Path, row: str) -> str:
    (line,) = (line for line in (folder / "README.md").read_text().splitlines() if line.startswith(f"| {row} |"))
    return line.removeprefix(f"| {row} | ").removesuffix(" |")


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


def test_weights_of_unknown_origin_are_told_to_whoever_chooses_a_licence(dry, here, capsys):
    dry("generator", *OWN, "--data", "images.parquet", name="known")
    told = "has no training.json: nothing here tells what its weights were trained on from." in capsys.readouterr().err
    assert told == (not (here / "generator/training.json").exists())
    (here / "generator/training.json").unlink(missing_ok=True)
    dry("generator", *OWN, "--data", "images.parquet", name="unknown")
    assert "has no training.json: nothing here tells" in capsys.readouterr().err


# ---- the sheet ---------------------------------------------------------------------------------------------


def test_samples_are_drawn_in_order_of_their_seeds_with_the_classes_in_turn(dry):
    shown = tiles(dry("generator", *OWN, "--temperature", "0.8"), columns=8)
    labels = [i % len(CLASSES) for i in range(32)]
    expected = draw(small("dmol", "class").float(), range(32), labels=labels, temperature=0.8)
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
    shown = tiles(dry("upscaler", *OWN, "--data", "images.parquet", "--show-data"), columns=8)
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


# ---- the upload --------------------------------------------------------------------------------------------


def test_what_is_uploaded_is_the_folder_of_the_dry_run_byte_for_byte(dry, here, fake):
    options = [*OWN, "--data", "images.parquet"]
    folder = dry("upscaler", *options)
    assert fake.calls == []
    publish.main(["upscaler", "me/mine", *options])
    assert fake.uploaded == contents(folder) and "training.json" in fake.uploaded
    assert [name for name, *_ in fake.calls] == ["whoami", "create_repo", "upload_folder"]
    _, (repo,), named = fake.calls[1]
    assert repo == "me/mine" and named == {"repo_type": "model", "private": None, "exist_ok": True}
    named = fake.calls[2][2]
    assert (named["repo_id"], named["revision"], named["repo_type"]) == ("me/mine", None, "model")
    assert {"*.safetensors", "*.safetensors.index.json", "training.json"} <= set(named["delete_patterns"])  # of before


def test_a_branch_and_a_private_repo_are_made(here, fake):
    publish.main(["generator", "me/mine", *OWN, "--private", "--revision", "v1"])
    assert [name for name, *_ in fake.calls] == ["whoami", "create_repo", "model_info", "create_branch", "upload_folder"]
    assert fake.calls[1][2]["private"] is True
    assert fake.calls[3][2] == {"branch": "v1", "exist_ok": True} and fake.calls[4][2]["revision"] == "v1"


def test_nothing_goes_to_a_public_repo_that_should_be_private(here, fake, refusal):
    fake.private = False
    assert "me/mine exists and is public" in refusal("generator", "me/mine", *OWN, "--private")
    assert fake.uploaded == {}


def test_from_pretrained_reads_back_what_was_uploaded_at_its_revision(here, fake, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for digit, checkpoint, branch in (("a", "generator", "main"), ("b", "upscaler", "v1")):
        publish.main([checkpoint, "me/mine", *OWN, "--data", "images.parquet", "--revision", branch])
        cache = tmp_path / "models--me--mine"
        for path, content in {f"refs/{branch}": (digit * 40).encode()}.items() | {
            (f"snapshots/{digit * 40}/{name}", content) for name, content in fake.uploaded.items()
        }:
            (cache / path).parent.mkdir(parents=True, exist_ok=True)
            (cache / path).write_bytes(content)
    for revision, checkpoint in (("v1", "upscaler"), ("main", "generator"), (None, "generator"), ("b" * 40, "upscaler")):
        found = ImageTransformer.from_pretrained("me/mine", revision=revision)
        expected = ImageTransformer.from_pretrained(checkpoint)
        assert found.config == expected.config
        assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in found.state_dict().items())


def answer(status: int) -> errors.HfHubHTTPError:
    request = SimpleNamespace(method="POST", url="https://hub/api")
    return errors.HfHubHTTPError(
        "Server says no\nand more", response=SimpleNamespace(status_code=status, headers={}, request=request)
    )


@pytest.mark.parametrize(
    "call, error, sentence",
    [
        ("whoami", errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        ("whoami", errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        ("whoami", errors.HTTPError("Name or service not known"), "cannot be reached: Name or service not known"),
        ("whoami", answer(401), "the token is not valid"),
        ("create_repo", answer(403), "the token may not write there"),
        ("create_repo", answer(500), "refuses me/mine: Server says no. (HTTP 500)"),
        ("upload_folder", answer(404), "it does not exist, or the token may not see it"),
        ("upload_folder", ConnectionError("reset by peer"), "the upload broke off: reset by peer"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_sentence(call, error, sentence, here, fake, refusal):
    fake.fails[call] = error
    assert sentence in refusal("generator", "me/mine", *OWN)
    assert fake.calls[-1][0] == call and fake.uploaded == {}


# ---- as it is ----------------------------------------------------------------------------------------------


def test_a_card_that_was_changed_by_hand_is_uploaded_unchanged(dry, fake):
    folder = dry("generator", *OWN)
    with open(folder / "README.md", "a") as card:
        card.write("\nMy own last word.\n")
    publish.main([str(folder), "me/mine", "--as-is"])
    assert fake.uploaded == contents(folder) and fake.uploaded["README.md"].endswith(b"My own last word.\n")


def test_a_folder_that_is_not_all_there_is_not_uploaded(dry, here, fake, refusal):
    folder = dry("generator", *OWN)
    assert "is the card of me/mine, not of me/other" in refusal(folder, "me/other", "--as-is")
    assert "README.md cannot be read: No such file" in refusal("generator", "me/mine", "--as-is")
    assert "leave --licence out" in refusal(folder, "me/mine", "--as-is", "--licence", "mit")
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" in refusal(folder, "me/mine", "--as-is")
    (folder / "notes.txt").unlink()
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("parameters: 20420", "parameters: 20421"))
    assert "says 20421 parameters, the model has 20420" in refusal(folder, "me/mine", "--as-is")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# hello\n")
    assert "no card of train/publish.py" in refusal(folder, "me/mine", "--as-is")
    (folder / "README.md").write_text("---\nlicense: [\n---\n# hello\n")
    assert "front matter cannot be read" in refusal(folder, "me/mine", "--as-is")
    assert fake.uploaded == {}


# ---- what is refused ---------------------------------------------------------------------------------------

DRY = ("--dry-run", "--output", "no")


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
        (("generator", "me/x", *OWN, *DRY, "--temperature", 0), "--temperature must be above 0"),
        (("generator", "me/x", *OWN, *DRY, "--show-data"), "--show-data is for super-resolution"),
        (("generator", "me/x", *OWN, *DRY, "--about", "none.md"), "none.md cannot be read: No such file"),
        (("generator", "me/x", *OWN, *DRY, "--evaluation", "images.parquet"), "images.parquet is no text file"),
        (("upscaler", "me/x", *OWN, *DRY), "--data: a super-resolution model needs sources"),
        (("upscaler", "me/x", *OWN, *DRY, "--data", "none"), "There is no file or folder none"),
        (("none", "me/x", *OWN, *DRY), "There is no folder none"),
        (("generator", "me/x", *OWN, "--dry-run", "--output", "upscaler"), "upscaler exists already"),
        (("generator", "me/x", *OWN, "--dry-run", "--output", "images.parquet/x"), "cannot be written"),
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
    evaluation = Evaluation(2.5, "p(high | low)", 1500, shuffled_sources_bits_per_dim=9.25)
    folder = dry("upscaler", "--data-name", "celeba", "--data", "images.parquet", name="zoo/faces")
    entry = dataclasses.replace(Entry.read(folder / "README.md"), evaluation=evaluation)
    (folder / "README.md").write_text(entry.front_matter() + "\n# faces\n")
    assert zoo.table(tmp_path / "zoo") == zoo.HEADER + (
        "| [`faces`](assets/weights/faces) | Super-resolve | `tiny` | "
        rf"{entry.parameters:,} | **2.500** p(high \| low) (1,500 images) | sources: 9.250 | `me/mine`, not yet published |"
        "\n"
    )


def test_the_table_stands_between_its_marks():
    readme = "before\n<!-- zoo -->\nold\n<!-- /zoo -->\nafter\n"
    once = zoo.renewed(readme, "new\n")
    assert once == "before\n<!-- zoo -->\nnew\n<!-- /zoo -->\nafter\n" == zoo.renewed(once, "new\n")
    for lost in ("before", "<!-- zoo -->", "<!-- /zoo -->\n<!-- zoo -->"):
        with pytest.raises(SystemExit, match="lost the marks"):
            zoo.renewed(lost, "new\n")
