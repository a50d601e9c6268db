"""Model folders: what is saved is what is loaded, and what cannot be loaded says why."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from httpx import ReadTimeout
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from conftest import conditions, pictures, small, small_config
from imtx import CheckpointError, Config, ImageTransformer, checkpoint
from imtx.checkpoint import Origin


@pytest.fixture
def saved(tmp_path):
    """A folder with a model in one shard."""
    folder = tmp_path / "model"
    small("dmol", "class").save_pretrained(folder)
    return folder


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """A folder with a model in several shards."""
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", 20_000)
    folder = tmp_path / "sharded"
    small("dmol", "class").save_pretrained(folder)
    assert len(shards(folder)) > 2
    return folder


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def assert_same_weights(model, other):
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].float()), name


def assert_refused(folder, *named):
    with pytest.raises(CheckpointError) as error:
        ImageTransformer.from_pretrained(folder)
    for word in named:
        assert str(word) in str(error.value), error.value


# ---- round trips --------------------------------------------------------------------------------------------


def test_round_trip(case, tmp_path):
    model = case.model.float()
    model.save_pretrained(tmp_path / "model")
    loaded = ImageTransformer.from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    pixels, condition = pictures(2), conditions(model, 2)
    assert torch.equal(loaded.log_prob(pixels, **condition), model.log_prob(pixels, **condition))


def test_loading_leaves_the_global_generator_alone(saved):
    before = torch.get_rng_state()
    ImageTransformer.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_round_trip_as_bfloat16(tmp_path):
    model = small("categorical", "sr").float()
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "full")
    loaded = ImageTransformer.from_pretrained(tmp_path / "half")
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32
        rounded = name.startswith(("decoder.", "encoder.")) and weight.ndim == 2
        as_it_was = model.state_dict()[name]
        assert torch.equal(weight, as_it_was.bfloat16().float() if rounded else as_it_was), name
    half, full = (sum(path.stat().st_size for path in shards(tmp_path / n)) for n in ("half", "full"))
    matrices = sum(p.numel() for blocks in (model.decoder, model.encoder) for p in blocks.parameters() if p.ndim == 2)
    assert full - half == pytest.approx(2 * matrices, abs=200)  # headers differ by a few letters


def test_round_trip_in_shards(sharded):
    assert_same_weights(ImageTransformer.from_pretrained(str(sharded)), small("dmol", "class"))
    assert all(path.stat().st_size < 30_000 for path in shards(sharded))


def test_a_saved_folder_holds_no_code_and_no_leftovers(sharded):
    assert {path.name for path in sharded.iterdir()} == {
        "config.json", "model.safetensors.index.json", *(path.name for path in shards(sharded))
    }
    assert list(sharded.parent.iterdir()) == [sharded]
    assert Config.load(sharded / "config.json") == small_config("dmol", "class")


def test_the_folders_above_are_made(tmp_path):
    small("dmol", "class").save_pretrained(str(tmp_path / "a" / "b"))
    assert shards(tmp_path / "a" / "b")


def test_weights_are_float32_or_bfloat16(tmp_path):
    for wrong in ("bf16", torch.float16, None):
        with pytest.raises(ValueError, match=f"dtype must be torch.float32 or torch.bfloat16, got {wrong!r}"):
            small("dmol", "class").save_pretrained(tmp_path / "model", dtype=wrong)
    assert not list(tmp_path.iterdir())


# ---- where weights come from ---------------------------------------------------------------------------------

LICENCE = {"id": "other", "name": "my-own", "link": None}


@pytest.mark.parametrize("shard_size", [9_000_000, 20_000])
def test_what_weights_were_made_from_stays_with_each_shard(shard_size, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", shard_size)
    model = small("dmol", "class")
    model.origin = Origin("they/theirs", ("a", "b"), LICENCE)
    model.save_pretrained(tmp_path / "one")
    again = ImageTransformer.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two", dtype=torch.bfloat16)
    copy.deepcopy(again).save_pretrained(tmp_path / "three")  # as a run does with its average
    assert_same_weights(again, model)
    for folder in (tmp_path / "one", tmp_path / "two", tmp_path / "three"):
        assert ImageTransformer.from_pretrained(folder).origin == model.origin
        for shard in shards(folder):
            alone = tmp_path / "alone"
            alone.mkdir()
            (alone / "model.safetensors").write_bytes(shard.read_bytes())
            assert checkpoint.load_origin(alone) == model.origin
            shutil.rmtree(alone)


def test_weights_that_were_made_from_nothing_say_nothing(saved):
    assert ImageTransformer.from_pretrained(saved).origin is None
    with safe_open(shards(saved)[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "noted", ["{", "[]", "7", '{"made_of": 1}', '{"init": 7}', '{"licence": "mit"}', '{"licence": {"id": "mit"}}']
)
def test_an_origin_that_cannot_be_read_is_not_passed_over(noted, saved):
    shard = shards(saved)[0]
    save_file(load_file(shard), shard, {"format": "pt", "origin": noted})
    assert_refused(saved, shard, "does not tell what it was made from")


# ---- saving over something ----------------------------------------------------------------------------------


def test_saving_over_a_model_keeps_other_files_and_no_old_shards(sharded, monkeypatch):
    (sharded / "README.md").write_text("mine")
    (sharded / "samples").mkdir()
    (sharded / "samples" / "1.png").write_bytes(b"png")
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", 9_000_000)
    new = small("categorical", "sr")
    new.save_pretrained(sharded)
    assert (sharded / "README.md").read_text() == "mine"
    assert (sharded / "samples" / "1.png").read_bytes() == b"png"
    assert {path.name for path in sharded.iterdir()} == {"README.md", "config.json", "model.safetensors", "samples"}
    assert_same_weights(ImageTransformer.from_pretrained(sharded), new)


@pytest.mark.parametrize("victim", ["imtx.config.Config.save", "imtx.checkpoint.save_file"])
def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch, victim):
    def fail(*_, **__):
        raise OSError("No space left on device")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(victim, fail)
    with pytest.raises(OSError, match="No space"):
        small("categorical", "sr").save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_disk_that_is_full_is_an_oserror(saved, monkeypatch):
    def fail(*_):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        small("categorical", "sr").save_pretrained(saved)
    monkeypatch.undo()
    assert_same_weights(ImageTransformer.from_pretrained(saved), small("dmol", "class"))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_at_the_very_end_leaves_the_old_model(saved, monkeypatch, error):
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise error("refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error, match="refused"):
        small("categorical", "sr").save_pretrained(saved)
    monkeypatch.undo()
    assert_same_weights(ImageTransformer.from_pretrained(saved), small("dmol", "class"))


# ---- folders that are refused -------------------------------------------------------------------------------


def test_no_config(saved):
    (saved / "config.json").unlink()
    assert_refused(saved, saved, "config.json")


@pytest.mark.parametrize(
    "text, cause",
    [
        ("{", "not JSON"),
        ("[]", "object"),
        ('{"n_embd": 8}', "n_embd"),
        ("{}", "lacks attention_width, classes, "),
    ],
)
def test_a_broken_config(saved, text, cause):
    (saved / "config.json").write_text(text)
    assert_refused(saved, saved / "config.json", cause)


@pytest.mark.parametrize(
    "field, value, cause",
    [
        ("width", 33, "33"), ("width", "wide", "wide"), ("classes", 3, "3"), ("memory_block", None, "memory_block"),
        ("width", 2**40, "cannot be made here"),
    ],
)
def test_a_field_that_fits_no_model(saved, field, value, cause):
    fields = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(fields | {field: value}))
    assert_refused(saved, saved / "config.json", cause)


def test_a_field_that_is_lost_is_not_made_up(saved):
    fields = json.loads((saved / "config.json").read_text())
    del fields["memory_block"]  # which no weight's shape depends on
    (saved / "config.json").write_text(json.dumps(fields))
    assert_refused(saved, "config.json lacks memory_block")


def test_no_weights(saved):
    shards(saved)[0].unlink()
    assert_refused(saved, saved, "no .safetensors")


def test_pickles_are_not_read(saved):
    shards(saved)[0].unlink()
    torch.save(small("dmol", "class").state_dict(), saved / "pytorch_model.bin")
    assert_refused(saved, saved, "no .safetensors", "other formats")


@pytest.mark.parametrize("keep", [0, 4, 1000, -10])
def test_a_truncated_shard(sharded, keep):
    shard = shards(sharded)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    assert_refused(sharded, shard, "damaged")


def test_a_shard_that_is_something_else(sharded):
    shard = shards(sharded)[1]
    shard.write_bytes(b"<html>not found</html>" * 100)
    assert_refused(sharded, shard, "damaged")


def test_a_missing_shard_is_named(sharded):
    shard = shards(sharded)[1]
    shard.unlink()
    assert_refused(sharded, shard.name)


def test_a_weight_in_two_files(saved):
    weights = load_file(shards(saved)[0])
    save_file({"head.bias": weights["head.bias"] + 1}, saved / "model-00001-of-00002.safetensors")
    assert_refused(saved, "head.bias")


def test_weights_of_another_preset(saved, tmp_path):
    other = tmp_path / "other"
    small("categorical", "sr").save_pretrained(other)
    (saved / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert_refused(saved, saved, "lacks", "embedding.predictor.bias")


def test_weights_that_the_config_does_not_ask_for(saved):
    dataclasses.replace(small_config("dmol", "class"), layers=1).save(saved / "config.json")
    assert_refused(saved, saved / "model.safetensors", "another model", "decoder.1")


def test_weights_of_another_shape(saved):
    dataclasses.replace(small_config("dmol", "class"), ffn=40).save(saved / "config.json")
    assert_refused(saved, saved / "model.safetensors", "ffn", "48", "40")


# ---- names --------------------------------------------------------------------------------------------------


def test_a_file_is_no_folder(saved):
    assert_refused(saved / "config.json", saved / "config.json", "is a file")


def test_an_unknown_name():
    assert_refused("no-such-model", "no-such-model", "no bundled model")
    assert_refused("/no/such/folder", "/no/such/folder")


def test_an_installed_package_has_no_weights_and_says_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "assets" / "weights")
    name = "cifar10-dmol-1d"
    assert_refused(name, f"There is no folder {name}", "not with the package", "Name a Hub id", "assets/weights of a checkout")


def test_a_folder_has_no_revisions(saved):
    for name in (saved, "cifar10-dmol-1d"):
        with pytest.raises(CheckpointError, match="which has no revision v2: leave it out"):
            ImageTransformer.from_pretrained(name, revision="v2")


def test_a_hub_that_falls_silent(monkeypatch, tmp_path):
    def silent(*_, local_files_only=False, **__):
        raise LocalEntryNotFoundError("") if local_files_only else ReadTimeout("")

    monkeypatch.setattr(checkpoint, "snapshot_download", silent)
    monkeypatch.setattr(checkpoint, "_reachable", lambda endpoint: True)
    assert_refused("nobody/nothing", "nobody/nothing cannot be downloaded: ReadTimeout")


def test_a_hub_id_without_a_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoint, "_reachable", lambda endpoint: False)
    assert_refused("nobody/nothing", "nobody/nothing", "cannot be reached")
    assert_refused("no body/nothing?", "no body/nothing?")


def test_a_bundled_name(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "BUNDLED", saved.parent)
    assert_same_weights(ImageTransformer.from_pretrained("model"), small("dmol", "class"))
    assert_refused("other", "bundled: model")


LICENCE = {"id": "other", "name": "for-research", "link": "https://example.org/licence"}


@pytest.mark.parametrize("origin, told", [(Origin(licence=LICENCE), LICENCE), (None, dict.fromkeys(LICENCE))])
def test_a_card_made_on_the_way_to_the_hub_has_the_licence_of_the_weights_or_none(origin, told, tmp_path):
    model = small("dmol", "class")
    model.origin = origin
    model.save_pretrained(tmp_path / "model", repo_id="nobody/nothing")
    data = ModelCard.load(tmp_path / "model" / "README.md").data
    assert {"id": data.license, "name": data.license_name, "link": data.license_link} == told
    assert data.library_name == "imtx"


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, **_): ...

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **_):
            uploaded.update({path.name: path.read_bytes() for path in folder_path.iterdir()})

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    small("dmol", "class").push_to_hub("nobody/nothing")
    assert {"config.json", "model.safetensors"} <= uploaded.keys()
    assert Config(**json.loads(uploaded["config.json"])) == small_config("dmol", "class")
