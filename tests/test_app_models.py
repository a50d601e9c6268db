"""Which models the running demo starts with, lists and draws with; which it refuses, and how."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image
from safetensors.torch import save_file

from app_client import CAT, FACE, PIXELS, assert_sentence, assert_whole_run, opened, refusal, run
from imtx import PRESETS, CheckpointError, Config, ImageTransformer, checkpoint, draw, pixel_order, whole_rows
from imtx.demo import models
from imtx.demo.tasks import Tasks
from imtx.images import area_means, square_crop
from server import ROOT, Listener, Server, reference, upload

pytest_plugins = "app_fixtures"

KINDS = ["rows-dmol", "blocks-dmol", "rows-categorical", "blocks-categorical"]  # in app_fixtures.py


# ---- what it starts with ------------------------------------------------------------------------------------


def test_nothing_beyond_this_machine_was_asked(app, outside):
    """Neither at the start nor by any run since; the Hub and every proxy lead to `outside`."""
    assert app.process.poll() is None
    assert outside.connections == 0


def test_log(app):
    assert "Generate, Complete:\n    cifar10-dmol-1d (" in app.log and "Super-resolve:\n    faces-sr-2d (" in app.log
    assert "Warning" not in app.log


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    """What cannot be used as `--model`, by what is wrong with it."""
    folder = tmp_path_factory.mktemp("unusable")
    damaged, foreign, other = folder / "damaged", folder / "foreign", folder / "other"
    for model in (damaged, other):
        ImageTransformer(PRESETS["tiny"]).save_pretrained(model)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert", "hidden_size": 768}')
    for model in (foreign, other):
        save_file({"bert.weight": torch.zeros(2, 2)}, model / "model.safetensors")
    missing = folder / "nowhere" / "model"
    paths = {"missing": missing, "damaged": damaged, "foreign": foreign, "other": other, "hub": "owner/name"}
    return {name: str(path) for name, path in paths.items()}


def test_models_that_cannot_be_used_say_why(unusable, tmp_path):
    """One real start; the rest one after another in one process, because each start imports for seconds."""
    says = {
        "missing": "There is no folder",
        "damaged": "model.safetensors is damaged",
        "foreign": "config.json describes no model",
        "other": "lacks",
        "hub": "cannot be reached",
    }
    script = """if True:
        import sys
        import app
        for model in sys.argv[1:]:
            sys.argv = ["app.py", "--model", model]
            try:
                app.main()
            except SystemExit as end:
                print(repr(end.code))
        """
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    server = Server(tmp_path / "server", "--model", unusable["damaged"], **environment)
    try:
        output = subprocess.run(
            [sys.executable, "-c", script, *unusable.values()], cwd=ROOT, capture_output=True, text=True, timeout=120,
            env={**os.environ, "HF_HOME": str(tmp_path / "hub"), **environment}, check=True,
        )
        log = server.refused()
    finally:
        server.stop()
    assert log.count("\n") == 1 and f"{unusable['damaged']}/model.safetensors is damaged" in log
    assert not output.stderr
    for (name, model), line in zip(unusable.items(), output.stdout.splitlines(), strict=True):
        assert model in line and says[name] in line, line  # SystemExit of a text: printed, and the exit code is 1


def test_an_unreachable_hub_is_given_up_at_once(tmp_path):
    """huggingface_hub alone would go on trying for 23 seconds, whether nobody is there or somebody never answers."""
    script = """if True:
        import time
        from imtx import CheckpointError, checkpoint
        start = time.monotonic()
        try:
            checkpoint.find("owner/name")
        except CheckpointError as error:
            print(time.monotonic() - start, error)
        """
    with Listener(silent=True) as silent:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / str(i))},
            )
            for i, endpoint in enumerate(["http://127.0.0.1:9", silent.url])
        ]
        for process in processes:
            output, _ = process.communicate(timeout=90)
            seconds, _, sentence = output.strip().partition(" ")
            assert float(seconds) < 5
            assert "owner/name" in sentence and sentence.endswith(".") and "\n" not in sentence
    assert silent.connections


def assert_runs(server, task: str, given, new: int) -> None:
    assert_whole_run(run(Client(server.url, verbose=False), task, given, 1.0, 1, 1), 1, new)


def assert_no_weights(server, task: str, given, cause: str, model: str | None = None) -> None:
    """The visitor reads which file is amiss and why, but not where it lies."""
    message = refusal(server.url, task, [given, 1.0, 1, 1, model])
    assert "weights" in message and cause in message
    assert not any(word in message for word in ("/", "\n", "Traceback"))


def parameters(folder) -> str:
    return f"{sum(p.numel() for p in ImageTransformer.from_pretrained(folder).parameters()):,} parameters"


def ready(server) -> dict[str, str]:
    """The text under each canvas before the first click."""
    with urllib.request.urlopen(f"{server.url}/config") as answer:
        properties = [component["props"] for component in json.load(answer)["components"]]
    return {p["elem_id"]: p["value"]["msg"] for p in properties if str(p.get("elem_id")).startswith("canvas-")}


def test_other_generators_and_no_faces(small_servers, small_models):
    server, folder = small_servers["generators"], small_models["tiny"]
    assert f"Generate, Complete:\n    tiny ({folder}), {parameters(folder)}\n    rows-dmol (" in server.log
    assert "Super-resolve:\n    faces-sr-2d: not loaded." in server.log
    assert_no_weights(server, "super_resolve", upload(server.url, "cat.png", CAT.read_bytes()), "no folder faces-sr-2d")
    assert_runs(server, "generate", "cat", PIXELS)
    assert_runs(server, "complete", handle_file(CAT), PIXELS // 2)


def test_other_faces_and_a_damaged_generator(small_servers, small_models):
    server, folder = small_servers["upscalers"], small_models["tiny-sr"]
    assert "Generate, Complete:\n    cifar10-dmol-1d: not loaded." in server.log
    assert "model.safetensors is damaged" in server.log
    assert f"Super-resolve:\n    tiny-sr ({folder}), {parameters(folder)}\n    sr-rows-dmol (" in server.log
    assert_no_weights(server, "generate", "surprise me", "model.safetensors is damaged")
    assert_no_weights(
        server, "complete", upload(server.url, "cat.png", CAT.read_bytes()), "model.safetensors is damaged"
    )
    assert_runs(server, "super_resolve", handle_file(FACE), PIXELS)


def test_the_gallery_is_shown_only_of_the_model_that_drew_it(app, small_servers):
    assert all(text.startswith("Drawn earlier") for text in ready(app).values())
    for server in small_servers.values():
        assert ready(server) == dict.fromkeys(("canvas-generate", "canvas-complete", "canvas-super-resolve"), "Ready.")


# ---- what it draws with a model of the list -----------------------------------------------------------------


@pytest.fixture(scope="session")
def clients(small_servers, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("downloads"))
    return {name: Client(server.url, verbose=False, download_files=folder) for name, server in small_servers.items()}


def assert_drawn(outputs, model: ImageTransformer, given_pixels: int = 0, **conditions) -> None:
    """A run with count 2, temperature 0.8 and seed 5: in the model's own order, and what the library draws."""
    size, order = model.config.image_size, pixel_order(model).tolist()
    pictures = assert_whole_run(outputs, 2, size**2 - given_pixels, seed=5, size=size)
    assert outputs[0][0]["order"] == ([] if model.config.layout == "1d" else order)
    assert outputs[0][0]["given"] == given_pixels
    conditions["given_pixels"] = given_pixels
    assert np.array_equal(pictures, draw(model, [5, 6], temperature=0.8, **conditions).numpy())


@pytest.mark.parametrize("name", KINDS)
def test_generate(clients, small_models, name):
    model = ImageTransformer.from_pretrained(small_models[name])
    classes = model.config.classes
    outputs = run(clients["generators"], "generate", classes[1] if classes else "no class", 0.8, 2, 5, name)
    assert_drawn(outputs, model, **(dict(labels=[1, 1], guidance=5) if classes else {}))


@pytest.mark.parametrize("name", KINDS)
def test_complete(clients, small_models, name):
    rows = 8  # half of 16; blocks-dmol: of 24 pixels 12, which cuts through a block of 8
    model = ImageTransformer.from_pretrained(small_models[name])
    outputs = run(clients["generators"], "complete", handle_file(CAT), 0.8, 2, 5, name)
    with Image.open(CAT) as image:
        truth = square_crop(image.convert("RGB"), model.config.image_size)
    assert np.array_equal(reference(outputs[0][0], "Given"), truth[:rows])
    given_pixels = rows * model.config.image_size
    assert_drawn(outputs, model, given=torch.from_numpy(truth), given_pixels=given_pixels)


@pytest.mark.parametrize("name", [f"sr-{kind}" for kind in KINDS])
def test_super_resolve(clients, small_models, name):
    model = ImageTransformer.from_pretrained(small_models[name])
    outputs = run(clients["upscalers"], "super_resolve", handle_file(FACE), 0.8, 2, 5, name)
    side, value = model.config.source_size, outputs[0][0]
    source = reference(value, f"{side}x{side} input")
    assert np.array_equal(source, area_means(reference(value, "Truth"), model.config.image_size // side))
    assert_drawn(outputs, model, sources=torch.tensor(source))


@pytest.mark.parametrize("name", [f"twin-{name}" for name in PRESETS])
def test_a_shrunken_twin_of_every_preset_streams(clients, small_models, name):
    model = ImageTransformer.from_pretrained(small_models[name])
    config = model.config
    if config.source_size:
        outputs = run(clients["twins"], "super_resolve", handle_file(FACE), 0.8, 2, 5, name)
        source = reference(outputs[0][0], f"{config.source_size}x{config.source_size} input")
        assert_drawn(outputs, model, sources=torch.tensor(source))
    else:
        label = config.classes[1] if config.classes else "no class"
        outputs = run(clients["twins"], "generate", label, 0.8, 2, 5, name)
        assert_drawn(outputs, model, **(dict(labels=[1, 1], guidance=5) if config.classes else {}))


def test_a_model_that_can_keep_no_top_half(small_servers):
    server = small_servers["generators"]
    picture = upload(server.url, "cat.png", CAT.read_bytes())
    message = refusal(server.url, "complete", [picture, 1.0, 1, 1, "tall-blocks"])
    assert_sentence(message)
    assert "blocks of 16 rows" in message and "another model" in message


def test_a_model_that_cannot_be_loaded(small_servers, clients, small_models):
    server = small_servers["generators"]
    for _ in range(2):
        assert_no_weights(server, "generate", "no class", "model.safetensors is damaged", model="broken")
    broken = [line for line in server.log.splitlines() if line.startswith("broken: not loaded.")]
    assert len(broken) == 1 and f"{small_models['broken']}/model.safetensors is damaged" in broken[0]
    run(clients["generators"], "generate", "rose", 1.0, 1, 1, "rows-dmol")  # the others go on


@pytest.mark.parametrize("name", ["nowhere", "", "..", "owner/name", "Tiny", "a\0b", 3, True, ["tiny"], {"tiny": 1}])
def test_unknown_models(small_servers, name):
    server = small_servers["generators"]
    picture = upload(server.url, "cat.png", CAT.read_bytes())
    for task, given in (("generate", "cat"), ("complete", picture)):
        message = refusal(server.url, task, [given, 1.0, 1, 1, name])
        assert_sentence(message)
        assert "no such model" in message and "tiny, rows-dmol, blocks-dmol" in message
    message = refusal(server.url, "super_resolve", [picture, 1.0, 1, 1, name])
    assert "no such model" in message and "faces-sr-1d" in message


def test_a_model_outside_the_list_is_not_opened(small_servers, small_models, tmp_path):
    ImageTransformer(PRESETS["tiny"]).save_pretrained(tmp_path / "secret")
    upscaler = small_models["tiny-sr"]  # of another task, on another server
    for folder in (tmp_path / "secret", upscaler):
        with opened(folder / "config.json") as heard:
            for name in (str(folder), os.path.relpath(folder, ROOT), f"{folder.name}", f"../{folder.name}"):
                assert "no such model" in refusal(small_servers["generators"].url, "generate", ["cat", 1.0, 1, 1, name])
            assert not heard()


# ---- the list -----------------------------------------------------------------------------------------------


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A folder of bundled models in place of the real one, still empty."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for module in (models, checkpoint):
        monkeypatch.setattr(module, "BUNDLED", folder)
    return folder


def save(folder: Path, **changes) -> Path:
    config = dict(image_size=8, width=16, heads=2, layers=1, ffn=16, query_block=16, memory_block=16) | changes
    ImageTransformer(Config(**config)).save_pretrained(folder)
    return folder


SR = dict(source_size=2, encoder_layers=1)


def test_the_list(bundled, tmp_path, capsys):
    for name in (models.GENERATOR, "b-generator", "a-generator"):
        save(bundled / name)
    for name in (models.UPSCALER, "b-faces"):
        save(bundled / name, **SR)
    (bundled / "no-json").mkdir()
    (bundled / "no-json" / "config.json").write_text("{")
    (bundled / ".b-generator-half-written").mkdir()
    own = [save(tmp_path / "runs" / "one" / "model"), save(tmp_path / "runs" / "two" / "model", **SR)]
    own.append(save(tmp_path / "runs" / "two" / "checkpoints" / "step-00000001" / "raw", **SR))
    own += [save(tmp_path / "elsewhere" / "b-generator"), own[0], f"{own[1]}/", "a-generator", bundled / "b-faces"]
    generators, upscalers = models.installed([str(name) for name in own])
    assert list(generators) == ["one", "b-generator (2)", "a-generator", models.GENERATOR, "b-generator"]
    assert list(upscalers) == ["two", "step-00000001/raw", "b-faces", models.UPSCALER]
    assert generators["b-generator"].folder == bundled / "b-generator"
    log = capsys.readouterr().out
    assert log.startswith("no-json: not loaded.") and log.endswith("left out.\n") and log.count("\n") == 1
    assert not Tasks(generators, upscalers, tmp_path).ready(tmp_path)["generate"]  # another model drew the gallery


def test_a_bundled_name_on_the_command_line_keeps_the_gallery(monkeypatch, tmp_path):
    generators, upscalers = models.installed([models.GENERATOR])
    assert next(iter(generators)) == models.GENERATOR and len(generators) == len(set(generators))
    assert all(Tasks(generators, upscalers, tmp_path).ready(ROOT / "assets" / "gallery").values())


def test_a_picture_that_is_refused_takes_the_crop_before_it_away(tmp_path):
    upscalers = models.installed([])[1]
    (tmp_path / "bad.png").write_text("This is no picture.")
    frames = Tasks({}, upscalers, tmp_path).frame(str(tmp_path / "bad.png"), 1, 0.5, 0.5, None)
    assert next(frames)["value"] is None
    with pytest.raises(gr.Error, match="not a picture"):
        next(frames)


def test_weights_are_read_once_and_only_when_asked_for(bundled, monkeypatch, capsys):
    for name in (models.GENERATOR, "late", "other"):
        save(bundled / name)
    (bundled / "other" / "model.safetensors").write_bytes(b"")
    read, original = [], ImageTransformer.from_pretrained

    def slowly(folder):
        read.append(folder.name)
        time.sleep(0.2)
        return original(folder)

    monkeypatch.setattr(ImageTransformer, "from_pretrained", slowly)
    generators, upscalers = models.installed()
    assert sorted(read) == [models.GENERATOR, models.UPSCALER]  # what the page starts with, were it there
    assert "no folder" in upscalers[models.UPSCALER].about
    with ThreadPoolExecutor(8) as pool:
        loaded = set(pool.map(lambda _: generators["late"].model, range(8)))
        abouts = set(pool.map(lambda _: generators["other"].about, range(8)))
    assert read[2:] == ["late", "other"] and len(loaded) == len(abouts) == 1
    assert abouts.pop().startswith("Cannot be used. model.safetensors is damaged")
    late, other = capsys.readouterr().out.splitlines()  # each left one line in the log
    assert late.startswith(f"late ({bundled / 'late'}), ") and other.startswith("other: not loaded. ")


def test_one_that_cannot_be_used_ends_the_start(bundled, tmp_path):
    save(bundled / models.GENERATOR)
    save(bundled / models.UPSCALER, **SR)
    good, bad = save(tmp_path / "good"), save(tmp_path / "bad")
    (bad / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="bad/model.safetensors is damaged"):
        models.installed([str(bad), str(good)])
    generators, _ = models.installed([str(good), str(bad)])  # not what the page starts with: read when asked for
    assert generators["bad"].about.startswith("Cannot be used.")
    save(bad, levels=4)
    with pytest.raises(CheckpointError, match="4 levels"):
        models.installed([str(good), str(bad)])
    (bad / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json"):
        models.installed([str(good), str(bad)])


@pytest.mark.parametrize("block, kept", [((2, 4), [0, 0, 2, 2, 4]), ((4, 2), [0, 0, 0, 0, 4]), ((8, 2), [0] * 5)])
@pytest.mark.parametrize("output", ["dmol", "categorical"])
def test_whole_rows(block, kept, output):
    config = dict(image_size=8, width=16, heads=2, layers=1, ffn=16, output=output)
    model = ImageTransformer(Config(layout="2d", query_block=block, memory_block=(1, 1), **config))
    assert [whole_rows(model, rows) for rows in range(5)] == kept
    assert whole_rows(model, 8) == whole_rows(model, 9) == 8
    assert whole_rows(ImageTransformer(Config(query_block=16, memory_block=16, **config)), 3) == 3
