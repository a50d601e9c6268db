"""What train/evaluate.py reports, held against sums worked out here; averages of weights; what it refuses."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE, SOURCE, pictures, small, small_config
from safetensors import safe_open
from test_train import write

from imtx import ImageTransformer, draw

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

import averaging
import evaluate

IMAGES = pictures(11)
LABELS = [1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 1]
CASES = {
    "dmol": ("dmol", "class", {}),
    "categorical": ("categorical", "class", {}),
    "dmol-2d": ("dmol", "class", dict(layout="2d", query_block=(4, 4), memory_block=(2, 4))),
    "categorical-2d": ("categorical", "class", dict(layout="2d", query_block=(2, 4), memory_block=(2, 2))),
    "sr": ("dmol", "sr", {}),
    "sr-2d": ("categorical", "sr", dict(layout="2d", query_block=(4, 4), memory_block=(4, 2))),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "test-00000-of-00002.parquet", IMAGES[:4].numpy(), labels=LABELS[:4])
    write(folder / "test-00001-of-00002.parquet", IMAGES[4:].numpy(), labels=LABELS[4:])
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, (output, task, changes) in CASES.items():
        small(output, task, **changes).save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(data, capsys):
    """Runs the command here, on the 11 images if no others are named: what it prints, and the object in its last line."""

    def run(*arguments) -> tuple[str, dict]:
        options = [] if "--data" in arguments else ["--data", data]
        evaluate.main([str(argument) for argument in (*options, *arguments)])
        printed = capsys.readouterr().out
        return printed, json.loads(printed.splitlines()[-1])

    return run


@pytest.fixture
def refusal(run, capsys):
    """The sentence with which a command ends."""

    def refusal(*arguments) -> str:
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code != 0
        return capsys.readouterr().err if isinstance(ended.value.code, int) else str(ended.value)

    return refusal


def reduced(images: torch.Tensor) -> torch.Tensor:
    """(N, 8, 8, 3) -> (N, 2, 2, 3) uint8: means of 4 x 4 pixels, halves rounded up; written without imtx.images."""
    side = SIZE // SOURCE
    means = images.double().unfold(1, side, side).unfold(2, side, side).mean(dim=(4, 5))  # (N, 2, 2, 3, 4, 4) before
    return (means + 0.5).floor().to(torch.uint8)


def no_samples(name: str) -> tuple:
    return ("--samples", 0) if name.startswith("sr") else ()


def condition(name: str) -> dict[str, torch.Tensor]:
    return {"sources": reduced(IMAGES)} if name.startswith("sr") else {"labels": torch.tensor(LABELS)}


def expected_nats(name: str, images: int = len(IMAGES)) -> torch.Tensor:
    """(N, P), in generation order, all images in one batch, in float64."""
    output, task, changes = CASES[name]
    given = {key: value[:images] for key, value in condition(name).items()}
    return -small(output, task, **changes).log_prob(IMAGES[:images], **given)


def in_bits(nats: torch.Tensor, images: int = len(IMAGES)) -> float:
    return nats.sum().item() / (math.log(2) * images * 3 * SIZE**2)


# ---- bits/dim ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_image_counts_once_at_any_batch_size(name, run, models):
    expected = in_bits(expected_nats(name))
    for batch_size in (1, 3, 7, 100):  # 3 and 7 leave a smaller last batch
        _, result = run("--checkpoint", models / name, "--batch-size", batch_size, *no_samples(name))
        assert result["images"] == 11
        assert result["bits_per_dim"] == pytest.approx(expected, abs=1e-5)
    assert result["parameters"] == sum(p.numel() for p in ImageTransformer.from_pretrained(models / name).parameters())
    assert result["images_per_second"] > 0


def test_compiled_it_finds_the_same(run, models, monkeypatch):
    """Traced as a whole, that is; what makes C++ of it is PyTorch's, and takes a minute."""
    traced = []

    def traced_only(function, **options):
        traced.append(options)
        return compile(function, backend="aot_eager", fullgraph=True, **options)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", traced_only)
    _, result = run("--checkpoint", models / "dmol", "--compile", "--batch-size", 4, "--limit", 4)  # compiled once
    assert traced and result["bits_per_dim"] == pytest.approx(in_bits(expected_nats("dmol", 4), 4), abs=1e-5)


@pytest.mark.parametrize("name", ["dmol", "sr"])
def test_the_shuffled_figure_is_that_of_other_images_conditions(name, run, models, tmp_path):
    two = slice(2, 4)  # of classes 0 and 1; shuffling two can only swap them
    write(tmp_path / "two.parquet", IMAGES[two].numpy(), labels=LABELS[two])
    options = ("--checkpoint", models / name, "--data", tmp_path / "two.parquet", *no_samples(name))
    _, result = run(*options)
    swapped = {key: value[two].flip(0) for key, value in condition(name).items()}
    expected = in_bits(-small(*CASES[name][:2]).log_prob(IMAGES[two], **swapped), 2)
    shuffled = result["shuffled_sources_bits_per_dim" if name == "sr" else "shuffled_labels_bits_per_dim"]
    assert shuffled == pytest.approx(expected, abs=1e-5) and abs(shuffled - result["bits_per_dim"]) > 1e-3
    _, alone = run(*options, "--limit", 1)
    assert alone["images"] == 1 and not [key for key in alone if key.startswith("shuffled")]


def test_the_likelihood_is_called_by_its_name(run, models, tmp_path):
    assert run("--checkpoint", models / "dmol", "--no-class")[1]["likelihood"] == "p(image)"
    assert run("--checkpoint", models / "dmol")[1]["likelihood"] == "p(image | class)"
    printed, result = run("--checkpoint", models / "sr", "--samples", 0)
    assert result["likelihood"] == "p(high | low)" and "likelihood  p(high | low)" in printed
    write(tmp_path / "own.parquet", IMAGES[:3].numpy(), labels=False)
    printed, result = run("--checkpoint", models / "dmol", "--data", tmp_path / "own.parquet")
    assert result["likelihood"] == "p(image)" and "no class" in printed and result["images"] == 3
    no_class = -small("dmol", "class").log_prob(IMAGES[:3])
    assert result["bits_per_dim"] == pytest.approx(in_bits(no_class, 3), abs=1e-5)
    assert not [key for key in result if key.startswith("shuffled")]


# ---- breakdown ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_breakdown_places_every_nat(name, run, models, tmp_path):
    file = tmp_path / "parts.json"
    options = ("--batch-size", 4, "--breakdown", file, "--limit", 10, *no_samples(name))
    printed, result = run("--checkpoint", models / name, *options)
    parts = json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["parts.json"]
    assert parts["images"] == 10 and parts["bits_per_dim"] == result["bits_per_dim"]

    nats = expected_nats(name, 10)
    output, task, changes = CASES[name]
    layout = small_config(output, task, **changes)
    expected = np.zeros((SIZE, SIZE, layout.channels))  # bits an image
    for step, position in enumerate(small(output, task, **changes).layout.order.tolist()):
        row, column, channel = np.unravel_index(position, expected.shape)
        expected[row, column, channel] = nats[:, step].sum().item() / (math.log(2) * 10)
    assert np.array(parts["per_position"]) == pytest.approx(expected.sum(axis=2) / 3, abs=1e-4)
    assert np.mean(parts["per_position"]) == pytest.approx(result["bits_per_dim"], abs=1e-9)
    assert ("per_channel" in parts) == (output == "categorical")
    if output == "categorical":
        assert np.array(parts["per_channel"]) == pytest.approx(expected, abs=1e-4)
        assert np.mean(parts["per_channel"]) == pytest.approx(result["bits_per_dim"], abs=1e-9)

    assert ("per_class" in parts) == (task == "class")
    if task == "class":
        assert list(parts["per_class"]) == list(CLASSES)
        for label, found in enumerate(parts["per_class"].values()):
            chosen = torch.tensor(LABELS[:10]) == label
            assert found["images"] == chosen.sum()
            assert found["bits_per_dim"] == pytest.approx(in_bits(nats[chosen], found["images"]), abs=1e-5)
        mean = sum(found["bits_per_dim"] * found["images"] for found in parts["per_class"].values()) / 10
        assert mean == pytest.approx(result["bits_per_dim"], abs=1e-9)
        assert f"cat  {parts['per_class']['cat']['bits_per_dim']:.4f}  of 4 images" in printed


def test_the_breakdown_holds_only_classes_that_the_data_have(run, models, tmp_path):
    run("--checkpoint", models / "dmol", "--breakdown", tmp_path / "parts.json", "--limit", 2)  # both of class 1
    assert list(json.loads((tmp_path / "parts.json").read_text())["per_class"]) == ["dog"]
    write(tmp_path / "own.parquet", IMAGES[:3].numpy(), labels=False)
    run("--checkpoint", models / "dmol", "--breakdown", tmp_path / "parts.json", "--data", tmp_path / "own.parquet")
    assert "per_class" not in json.loads((tmp_path / "parts.json").read_text())


def test_a_breakdown_is_complete_or_not_there(run, models, tmp_path, monkeypatch):
    file = tmp_path / "parts.json"
    file.write_text("an older one")

    def write_half(path, content):
        with open(path, "wb") as half:
            half.write(content[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(SystemExit, match="Interrupted"):
        run("--checkpoint", models / "dmol", "--limit", 1, "--breakdown", file)
    assert file.read_text() == "an older one"


# ---- consistency of super-resolution -----------------------------------------------------------------------


def test_consistency_is_that_of_one_sample_an_image(run, models):
    model = ImageTransformer.from_pretrained(models / "sr")
    sources = reduced(IMAGES)
    drawn = torch.cat([draw(model, [index], sources=sources[index]) for index in range(5)])
    expected = (reduced(drawn).double() - sources[:5].double()).square().mean().sqrt().item()
    for batch_size in (2, 5):
        printed, result = run("--checkpoint", models / "sr", "--samples", 5, "--batch-size", batch_size)
        # float32: another batch size may round a colour to the next level
        assert result["consistency_rmse"] == pytest.approx(expected, rel=1e-3) and expected > 10
        assert result["consistency_samples"] == 5 and "consistency_samples  5" in printed


def test_a_sample_is_reduced_as_sources_are(run, models, monkeypatch):
    calls, side = [], SIZE // SOURCE
    brighter = torch.zeros(side**2, 3, dtype=torch.uint8)
    brighter[:8, 0] = 1  # half of the 16 pixels under a source pixel: red's mean rounds up
    brighter[:7, 1] = 1  # less than half: green's rounds down

    def drawn(model, seeds, *, sources):
        calls.append((list(seeds), sources))
        enlarged = sources.repeat_interleave(side, 1).repeat_interleave(side, 2)
        return enlarged + brighter.view(side, side, 3).repeat(SOURCE, SOURCE, 1)

    monkeypatch.setattr(evaluate, "draw", drawn)
    _, result = run("--checkpoint", models / "sr", "--batch-size", 4)
    assert result["consistency_rmse"] == pytest.approx(math.sqrt(1 / 3), abs=1e-9)
    assert result["consistency_samples"] == 11  # 64 unless told, and all if there are fewer
    assert [seeds for seeds, _ in calls] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert torch.equal(torch.cat([sources for _, sources in calls]), reduced(IMAGES))
    _, result = run("--checkpoint", models / "sr", "--samples", 0)
    assert len(calls) == 3 and not [key for key in result if key.startswith("consistency")]


# ---- the mean of several models ----------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path) -> list[Path]:
    folders = []
    for number in range(3):
        model = small("dmol", "class")
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        folders.append(tmp_path / f"step-{number}")
        model.save_pretrained(folders[-1])
    return folders


def test_the_mean_of_several_models_is_evaluated_and_saved(run, three, tmp_path):
    _, result = run("--average", *three, "--save", tmp_path / "mean")
    states = [ImageTransformer.from_pretrained(folder).state_dict() for folder in three]
    saved = ImageTransformer.from_pretrained(tmp_path / "mean")
    for name, weight in saved.state_dict().items():
        mean = np.mean([state[name].double().numpy() for state in states], axis=0)
        assert np.array_equal(weight.numpy(), mean.astype(np.float32)), name
    assert saved.config == small_config("dmol", "class") and result["averaged_models"] == 3
    nats = -saved.double().log_prob(IMAGES, torch.tensor(LABELS))
    assert result["bits_per_dim"] == pytest.approx(in_bits(nats), abs=1e-5)
    _, again = run("--checkpoint", tmp_path / "mean")
    assert again["bits_per_dim"] == result["bits_per_dim"] and "averaged_models" not in again
    alone = [run("--checkpoint", folder)[1]["bits_per_dim"] for folder in three]
    assert min(abs(figure - result["bits_per_dim"]) for figure in alone) > 1e-3
    assert {path.name for path in tmp_path.iterdir()} == {"mean", *(folder.name for folder in three)}


def test_weights_are_summed_in_float64(three):
    for folder, value in zip(three, (2.0**24, 1.0, -(2.0**24))):  # in float32 the 1 is lost
        model = ImageTransformer.from_pretrained(folder)
        model.head.bias.data[0] = value
        model.save_pretrained(folder)
    assert averaging.average(three).head.bias[0].item() == np.float32(1 / 3)


def test_a_saved_mean_is_in_float32(run, three, tmp_path):
    run("--average", *three[:2], "--save", tmp_path / "mean", "--limit", 1)
    with safe_open(tmp_path / "mean/model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}


@pytest.mark.parametrize(
    "changes, sentence",
    [(dict(layers=1), "layers is 2 in {0} and 1 in {1}"), (dict(classes=("cat", "cow")), "classes is ('cat', 'dog') in")],
)
def test_models_of_different_configurations_have_no_mean(changes, sentence, refusal, three):
    small("dmol", "class", **changes).save_pretrained(three[2])
    refused = refusal("--average", *three, "--save", three[0].parent / "mean")
    assert "--average takes models of one configuration" in refused and sentence.format(three[0], three[2]) in refused
    assert not (three[0].parent / "mean").exists()


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--checkpoint", "{models}/dmol", "--limit", 0], "must be at least 1"),
        (["--checkpoint", "{models}/dmol", "--batch-size", 0], "must be at least 1"),
        (["--checkpoint", "{models}/sr", "--samples", -1], "--samples must be at least 0, got -1"),
        (["--checkpoint", "{models}/dmol", "--samples", 2], "--samples is for super-resolution models"),
        (["--checkpoint", "{models}/dmol", "--save", "{tmp}/new"], "--save goes with --average"),
        (["--average", "{models}/dmol"], "--average takes two or more models"),
        (["--average", "{models}/dmol", "{models}/dmol", "--checkpoint", "{models}/dmol"], "not allowed with"),
        (["--average", "{models}/dmol", "{models}/dmol", "--save", "{models}"], "exists already: name a new folder"),
        (["--average", "{models}/dmol", "{models}/dmol", "--save", "{models}/dmol/config.json"], "exists already"),
        (["--average", "{models}/dmol", "{models}/none"], "There is no folder {models}/none"),
        ([], "--checkpoint --average is required"),
        (["--checkpoint", "{models}/none"], "There is no folder {models}/none"),
        (["--checkpoint", "{models}/dmol", "--breakdown", "{tmp}/none/parts.json"], "No such file or directory"),
        (["--checkpoint", "{models}/dmol", "--breakdown", "{tmp}"], "--breakdown: {tmp} cannot be written: it is a folder"),
        (["--checkpoint", "{models}/dmol", "--data", "{tmp}"], "holds no test-*.parquet file"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(arguments, sentence, refusal, models, tmp_path):
    def fill(text) -> str:
        return str(text).format(models=models, tmp=tmp_path)

    before = sorted(models.rglob("*"))
    assert fill(sentence) in refusal(*map(fill, arguments))
    assert sorted(models.rglob("*")) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", ["", "checkpoints", "checkpoints/step-00000008", "checkpoints/before-decay"])
def test_a_training_run_names_the_models_inside(named, refusal, models, tmp_path):
    for name in ("before-decay", "step-00000004", "step-00000008"):
        (tmp_path / "checkpoints" / name / "raw").mkdir(parents=True)
    step = tmp_path / "checkpoints" / (Path(named).name if "/" in named else "step-00000008")
    for refused in (refusal("--checkpoint", tmp_path / named), refusal("--average", models / "dmol", tmp_path / named)):
        assert f"name {step}/ema for the moving average of the weights, or {step}/raw for the weights themselves" in refused


def test_data_that_the_model_cannot_take_are_refused(refusal, models, tmp_path):
    small("dmol", "class", levels=16).save_pretrained(tmp_path / "few")
    assert "level " in (refused := refusal("--checkpoint", tmp_path / "few")) and "the model's, 0..15" in refused
    write(tmp_path / "test-0.parquet", IMAGES.numpy(), labels=[0] * 10 + [2])
    assert "labels 0 to 2" in refusal("--checkpoint", models / "dmol", "--data", tmp_path)
    write(tmp_path / "test-1.parquet", IMAGES.numpy(), labels=False)
    assert "some of its files have a column `label`" in refusal("--checkpoint", models / "dmol", "--data", tmp_path)
