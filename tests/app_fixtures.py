"""The running demo, one for all tests of it, and three with small models. Test modules load this with
`pytest_plugins = "app_fixtures"`."""

import pytest
import torch
from gradio_client import Client

from imtx import PRESETS, Config, ImageTransformer
from server import ROOT, Listener, Server, copy_of_app
from test_presets import shrunken

SMALL = dict(width=32, layers=2, heads=2, ffn=48, mixtures=3)
ROWS, SUB_PIXEL_ROWS = dict(query_block=64, memory_block=64), dict(query_block=96, memory_block=96)
CATEGORICAL, SR = dict(output="categorical"), dict(encoder_layers=1)


def blocks(rows: int, columns: int) -> dict:
    return dict(layout="2d", query_block=(rows, columns), memory_block=(4, 4))


# By name: of each layout and output one, and odd ones. The first is what the server starts with.
GENERATORS = {
    "tiny": PRESETS["tiny"],
    "rows-dmol": Config(image_size=16, classes=("rose", "tulip", "cat"), **ROWS, **SMALL),
    "blocks-dmol": Config(image_size=24, classes=("cat", "sparrow"), **blocks(8, 12), **SMALL),  # keeps 8 rows of its 12
    "rows-categorical": Config(image_size=16, **CATEGORICAL, **SUB_PIXEL_ROWS, **SMALL),
    "blocks-categorical": Config(image_size=16, **CATEGORICAL, **blocks(4, 8), **SMALL),
    "tall-blocks": Config(image_size=16, **blocks(16, 8), **SMALL),  # keeps no row
    "broken": Config(image_size=16, **ROWS, **SMALL),
}
UPSCALERS = {
    "tiny-sr": PRESETS["tiny-sr"],
    "sr-rows-dmol": Config(image_size=16, source_size=4, **SR, **ROWS, **SMALL),
    "sr-blocks-dmol": Config(image_size=24, source_size=6, **SR, **blocks(8, 12), **SMALL),
    "sr-rows-categorical": Config(image_size=16, source_size=8, **SR, **CATEGORICAL, **SUB_PIXEL_ROWS, **SMALL),
    "sr-blocks-categorical": Config(image_size=16, source_size=4, **SR, **CATEGORICAL, **blocks(4, 8), **SMALL),
}
TWINS = {f"twin-{name}": shrunken(config) for name, config in PRESETS.items()}


@pytest.fixture(scope="session")
def outside():
    """Stands for everything beyond this machine: `app` reaches the Hub and other hosts through it alone."""
    with Listener() as listener:
        yield listener


@pytest.fixture(scope="session")
def app(outside, tmp_path_factory):
    """The demo with its bundled weights."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), outside.url)
    proxies |= {"no_proxy": "127.0.0.1,localhost"}
    proxies |= {name.upper(): value for name, value in proxies.items()}
    with Server(tmp_path_factory.mktemp("app"), HF_ENDPOINT=outside.url, **proxies) as server:
        assert "not loaded" not in server.log, server.log
        yield server


@pytest.fixture(scope="session")
def client(app, tmp_path_factory):
    return Client(app.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """The folders of GENERATORS, UPSCALERS and TWINS, by name; the weights of "broken" are cut short."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(), torch.no_grad():
        for name, config in (GENERATORS | UPSCALERS | TWINS).items():
            torch.manual_seed(0)
            model = ImageTransformer(config)
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)  # fresh blocks do nothing, and would hide most errors
            model.save_pretrained(folder / name)
    cut_short(folder / "broken")
    return {name: folder / name for name in GENERATORS | UPSCALERS | TWINS}


def cut_short(model) -> None:
    for shard in model.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1000])


@pytest.fixture(scope="session")
def small_servers(small_models, tmp_path_factory):
    """Three servers started at once: with all GENERATORS, and no bundled faces; with all UPSCALERS, and the bundled
    generator damaged; with all TWINS."""
    folder = tmp_path_factory.mktemp("servers")
    no_faces, no_generator = copy_of_app(folder / "no-faces"), copy_of_app(folder / "no-generator")
    (no_faces / "assets" / "weights" / "faces-sr-2d").rename(folder / "gone")
    cut_short(no_generator / "assets" / "weights" / "cifar10-dmol-1d")
    started = {
        task: Server(folder / task, *(f"--model={small_models[name]}" for name in models), root=root)
        for task, models, root in (
            ("generators", GENERATORS, no_faces), ("upscalers", UPSCALERS, no_generator), ("twins", TWINS, ROOT)
        )
    }
    try:
        yield {task: server.wait() for task, server in started.items()}
    finally:
        for server in started.values():
            server.stop()
