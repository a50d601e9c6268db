"""Training on from other weights, --init: what is taken over, and what a resumed run must keep."""

import json
import shutil

import pytest
import torch
from conftest import CLASSES, SIZE, pictures, small, small_config
from init_fixtures import NC, OWN, ROOT, draw_pictures, files, start  # noqa: F401, some are fixtures
from PIL import Image

from imtx import PRESETS, ImageTransformer, draw

import data
import evaluate
import publish
import sample
from averaging import open_model
from publishing.records import Training
from start import relabelled


# ---- the weights -------------------------------------------------------------------------------------------


def rows(model: ImageTransformer, *classes: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Label rows (classes + 1, d) of the model, and of one made from it for these classes."""
    config = small_config("dmol", "class", classes=classes)
    return model.state_dict()["label.weight"], relabelled(model, config)["label.weight"]


def test_label_rows_follow_the_names_and_new_names_start_as_no_class():
    (cat, dog, none), new = rows(small("dmol", "class"), "dog", "owl", "cat")
    assert torch.equal(new, torch.stack([dog, none, cat, none]))


@pytest.mark.parametrize("classes", [("dog", "cat"), ("owl", "dog", "emu")])
def test_a_class_that_stays_and_no_class_keep_their_likelihoods(classes):
    old, images = small("dmol", "class"), pictures(3)
    config = small_config("dmol", "class", classes=classes)
    new = ImageTransformer(config).double().eval()
    new.load_state_dict(relabelled(old, config))
    dogs = [torch.full((3,), names.index("dog")) for names in (CLASSES, classes)]
    assert torch.equal(new.log_prob(images, dogs[1]), old.log_prob(images, dogs[0]))
    assert torch.equal(new.log_prob(images), old.log_prob(images))
    assert not torch.equal(new.log_prob(images, dogs[1]), new.log_prob(images))


@pytest.mark.parametrize("output", ["dmol", "categorical"])
@pytest.mark.parametrize("form", [{}, {"layout": "2d", "query_block": (4, 4), "memory_block": (2, 2)},
                                  {"family": "paper", "position_encoding": "learned"}])
def test_without_classes_a_model_says_what_it_said_of_no_class(output, form):
    old, images = small(output, "class", **form), pictures(3)
    config = small_config(output, "unconditional", **form)
    new = ImageTransformer(config).double().eval()
    new.load_state_dict(relabelled(old, config))
    assert new.label is None and new.config.classes == ()
    torch.testing.assert_close(new.log_prob(images), old.log_prob(images), rtol=0, atol=1e-10)
    cats = old.log_prob(images, torch.zeros(3, dtype=torch.int64))
    assert (new.log_prob(images) - cats).abs().max() > 1e-3
    assert torch.equal(draw(new.float(), [1]), draw(old.float(), [1]))


def test_sinusoids_cannot_take_it_up(refusal):
    form = dict(family="paper", position_encoding="sinusoid")
    said = refusal(relabelled, small("dmol", "class", **form), small_config("dmol", "unconditional", **form))
    assert "sinusoids" in said and "folders by class" in said


def test_weights_of_the_same_classes_are_copied_and_the_model_stays_as_it_was():
    model = small("dmol", "class")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for config in (model.config, small_config("dmol", "unconditional")):
        for weight in relabelled(model, config).values():
            weight += 1
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# ---- a run -------------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_and_their_average_and_ends_with_the_classes_of_the_data(start, here, tmp_path):
    result = start("--data", "photos", "--learning-rate", 1e-30, "--weight-decay", 0)
    expected = relabelled(open_model("base"), small_config("dmol", "class", classes=("cat", "owl")))
    for name in ("raw", "ema"):
        model = ImageTransformer.from_pretrained(tmp_path / "run/checkpoints/step-00000002" / name)
        assert model.config == small_config("dmol", "class", classes=("cat", "owl"))
        for weight, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[weight], rtol=0, atol=1e-6)
    assert result["steps"] == 2 and 0 < result["bits_per_dim"] < 20
    record = Training.load(tmp_path / "run/training.json")
    assert (record.preset, record.init, record.init_licence) == (None, "base", None)
    assert (record.images, record.validation_images) == (18, 2)  # a tenth


def test_a_few_hundred_steps_leave_nothing_of_the_start_in_the_average():
    from optimization import Average

    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    average = Average(model, 0.999)
    torch.nn.init.zeros_(model.weight)
    for step in range(50):
        average.update(model, step)
    assert average.model.weight.item() < 1e-6


def test_the_rest_of_the_tools_take_a_model_trained_without_labels(start, here, tmp_path, capsys):
    start("--data", "flat")
    model = tmp_path / "run/model"
    assert open_model(model).config == small_config("dmol", "unconditional")
    evaluate.main(["--checkpoint", str(model), "--data", "tested"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["likelihood"] == "p(image)"
    sample.main(["--checkpoint", str(model), "--count", "3", "--output", str(tmp_path / "many")])
    assert list((tmp_path / "many").glob("*.parquet"))
    publish.main([str(model), "me/mine", *OWN, "--licence", "mit", "--data", "tested",
                  "--dry-run", "--output", str(tmp_path / "out")])
    assert "pictures of no class" in (tmp_path / "out/README.md").read_text()


def test_a_preset_with_classes_trains_without_them_on_data_without_labels(tmp_path, capsys):
    config = data.with_classes(PRESETS["tiny"], data.Images(pictures(3, 32), None), True)
    assert config.classes == () and "without classes" in capsys.readouterr().err


def test_a_model_without_classes_stays_so_and_a_batch_may_be_larger_than_the_data(start, files, tmp_path):
    small("categorical", "unconditional").float().save_pretrained(tmp_path / "plain")
    start("--data", "photos", "--batch-size", 32, init=tmp_path / "plain", steps=1)
    assert open_model(tmp_path / "run/model").config == small_config("categorical", "unconditional")


def test_how_many_are_held_out_unless_told():
    assert [data.validation_size(n, 2000) for n in (1, 9, 20, 199, 19_999, 20_000, 50_000)] == [1, 1, 2, 19, 1999, 2000, 2000]


# ---- resuming ----------------------------------------------------------------------------------------------


def test_a_resumed_run_needs_no_start_weights_and_ends_where_an_uninterrupted_one_does(start, here, tmp_path):
    shutil.copytree(here / "upscaler", tmp_path / "other")
    words = ("--data", "flat", "--validation", 2)
    start(*words, init=tmp_path / "other", output="whole", steps=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("step-00000003", "model"))
    shutil.rmtree(tmp_path / "other")
    start(*words, "--resume", "latest", init=tmp_path / "other", output="cut", steps=3)
    for name in ("raw", "ema"):
        two = [open_model(tmp_path / run / "checkpoints/step-00000003" / name).state_dict() for run in ("whole", "cut")]
        assert all(torch.equal(weight, two[1][key]) for key, weight in two[0].items())
    assert Training.load(tmp_path / "cut/training.json").init_licence == NC


def test_a_run_is_resumed_with_what_it_began_with(start, here, tmp_path, refusal):
    start("--data", "photos", steps=1)
    again = ("--resume", "latest", "--data")
    small("dmol", "class").float().save_pretrained(tmp_path / "second")
    said = refusal(start, *again, "photos", init=tmp_path / "second")
    assert said.startswith(f"--resume: this run has --init base, not --init {tmp_path / 'second'}. Go on with what it has")
    draw_pictures(tmp_path / "large", 20, ("cat", "owl"), seed=1)
    for path in tmp_path.glob("large/*/*.png"):
        Image.open(path).resize((40, 40)).save(path)
    said = refusal(start, *again, tmp_path / "large", "--preset", "tiny", init=None)
    assert said.startswith("--resume: this run has --init base, not --preset tiny. ")
    other = draw_pictures(tmp_path / "others", 20, ("emu", "owl"))
    said = refusal(start, *again, other)
    assert said.startswith(f"--resume: the labels of this run's data are cat, owl; those of {other} are emu, owl. Give what")
    assert "are cat, owl; those of flat are none." in refusal(start, *again, "flat")
    assert "--resume: this run has no --flip, not --flip. Go on with" in refusal(start, *again, "photos", "--flip")
    assert start(*again, "photos", init=here / "base")["steps"] == 2  # by another name


def test_a_run_is_not_resumed_on_other_pictures(start, here, tmp_path, refusal):
    pictures = tmp_path / "pictures"
    shutil.copytree(here / "flat", pictures)
    start("--data", pictures, steps=1)
    for i, change in enumerate((lambda: (pictures / "0.png").unlink(), lambda: draw_pictures(pictures, 21))):
        change()
        said = refusal(start, "--data", pictures, "--resume", "latest")
        assert f"They had 20 images when this run began, {pictures} has {(19, 21)[i]}. Give what it began with, or" in said
    (pictures / "20.png").unlink()
    picture = (pictures / "7.png").read_bytes()
    Image.open(pictures / "7.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(pictures / "7.png")
    said = refusal(start, "--data", pictures, "--resume", "latest")
    assert f"Some pictures or labels of {pictures} are others than when this run began, or another" in said
    (pictures / "7.png").write_bytes(picture)
    assert start("--data", pictures, "--resume", "latest")["steps"] == 2


def test_the_notes_of_older_runs_are_read(start, here, tmp_path, refusal):
    start("--data", "photos", steps=1)
    note = tmp_path / "run/run.json"
    told = json.loads(note.read_text())
    assert (told["init"], told["preset"], told["labels"]) == ("base", None, ["cat", "owl"])
    newer = ("init", "labels", "images", "data_checksum", "init_licence")
    old = {name: value for name, value in told.items() if name not in newer}
    note.write_text(json.dumps({name: value for name, value in told.items() if name != "data_checksum"}))
    for steps in (2, 3):  # what the first one notes is read by the second
        assert start("--resume", "latest", "--data", "photos", steps=steps)["steps"] == steps
    note.write_text(json.dumps(old | {"preset": "tiny"}))
    said = refusal(start, "--resume", "latest", "--data", "photos")
    assert said.startswith("--resume: this run has --preset tiny, not --init base. ")


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, init, sentence",
    [
        (("--data", "flat"), "nothing", "There is no folder nothing and no bundled model of that name"),
        (("--data", "flat"), "photos", "photos holds no config.json"),
        (("--data", "flat"), None, "one of the arguments --preset --init is required"),
        (("--data", "flat", "--preset", "tiny"), "base", "not allowed with argument"),
        (("--data", "flat", "--validation", 20), "base", "--validation 20 leaves none of the 20 images to train on: lower it"),
        (("--data", "base"), "base", "holds no train-*.parquet file and no picture"),
        (("--data", "tiny-pictures"), "base", "7x8, too small for the model's 8x8"),
        (("--data", "flat", "--preset", "cifar-dmol-1d"), None, "no --preset cifar-dmol-1d. Did you mean cifar10-dmol-1d?"),
        (("--data", "flat", "--preset", "?"), None, "there is no --preset ?. --help lists them."),
        (("--data", "flat", "--laerning-rate", 1), "base", "no option --laerning-rate. Did you mean --learning-rate?"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(words, init, sentence, start, here, tmp_path, refusal):
    if not (here / "tiny-pictures").exists():
        (here / "tiny-pictures").mkdir()
        Image.new("RGB", (SIZE - 1, SIZE)).save(here / "tiny-pictures/1.png")
    assert sentence in refusal(start, *words, init=init)
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_decoded(start, tmp_path, refusal):
    (tmp_path / "file").touch()
    said = refusal(start, "--data", "flat", "--cache", tmp_path / "cache", output="file/run")
    assert said == f"--output: {tmp_path}/file/run cannot be written to: Not a directory. Choose another folder."
    assert not (tmp_path / "cache").exists()


def test_a_runs_own_folder_is_no_model_and_those_inside_are_named(start, here, tmp_path, refusal):
    start("--data", "photos", steps=1)
    assert f"name {tmp_path / 'run/model'} for the moving average" in refusal(start, "--data", "photos", init=tmp_path / "run")
