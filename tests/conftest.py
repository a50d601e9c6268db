"""Small models for the tests, and the plain sampler that the cached one is held against."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from imtx import Config, ImageTransformer
from imtx.sampling import noise


if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, a processor each
    torch.set_num_threads(1)


def pytest_configure(config):
    """A process that a hanging test has ended is not started again: the run fails, and what was left for it is not run."""
    if config.pluginmanager.hasplugin("xdist"):
        config.option.maxworkerrestart = "0"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With CI=true a skipped test is a failure: there, everything that a test needs is present."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped, with CI=true: {call.excinfo.value}"
    return report


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """What is decoded here goes into a folder of the tests, not into the user's cache; compiled code stays there."""
    users = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", os.environ.get("NUMBA_CACHE_DIR") or users)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def here(files, monkeypatch) -> Path:
    """The folder that a test file's own fixture `files` has made, as the working directory."""
    monkeypatch.chdir(files)
    return files


@pytest.fixture
def refusal(capsys):
    """The sentence with which a call ends."""

    def refusal(call, *arguments, **options) -> str:
        with pytest.raises(SystemExit) as ended:
            call(*arguments, **options)
        assert ended.value.code != 0
        return capsys.readouterr().err if isinstance(ended.value.code, int) else str(ended.value)

    return refusal


SIZE, SOURCE = 8, 2  # pixels
CLASSES = ("cat", "dog")
# Every kind of model that the engines of imtx/sampling.py draw with: family, output, layout, task.
FAMILIES = {
    "modern": {},
    "sinusoid": dict(family="paper", position_encoding="sinusoid"),
    "learned": dict(family="paper", position_encoding="learned", attention_width=24),
}
LAYOUTS = {"1d": {}, "2d": dict(layout="2d", query_block=(4, 4), memory_block=(3, 2))}
KINDS = list(itertools.product(FAMILIES, ("dmol", "categorical"), LAYOUTS, ("class", "sr")))


def small_config(output: str, task: str, **changes) -> Config:
    block = 16 if output == "dmol" else 48  # two rows of pixels
    fields = dict(output=output, image_size=SIZE, query_block=block, memory_block=block, width=32, layers=2, heads=2)
    fields |= dict(ffn=48, mixtures=3)
    fields |= {
        "class": dict(classes=CLASSES), "unconditional": {}, "sr": dict(source_size=SOURCE, encoder_layers=1)
    }[task]
    return Config(**(fields | changes))


def small(output: str, task: str, **changes) -> ImageTransformer:
    """A model in float64 whose every weight matters; the same one for the same arguments.

    (Fresh blocks are the identity, and would hide most errors.)
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = ImageTransformer(small_config(output, task, **changes)).double().eval()
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def pictures(images: int, size: int = SIZE, seed: int = 0, levels: int = 256) -> Tensor:
    """(N, size, size, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (images, size, size, 3), generator=generator, dtype=torch.uint8)


def pictures_for(model: ImageTransformer, images: int) -> Tensor:
    """Pictures of the model's size and levels."""
    return pictures(images, model.config.image_size, levels=model.config.levels)


def conditions(model: ImageTransformer, images: int) -> dict[str, Tensor]:
    """A condition for each image, no two alike side by side: labels ("no class" among them) or sources."""
    config = model.config
    if config.source_size:
        return {"sources": pictures(images, config.source_size, seed=1, levels=config.levels)}
    return {"labels": torch.arange(images) % (len(config.classes) + 1)} if config.classes else {}


def select(conditions: dict[str, Tensor], index: slice) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in conditions.items()}


def stepwise(model: ImageTransformer, pixels: Tensor, start: int = 0, **conditions) -> Tensor:
    """What `model(pixels, ...)` returns, worked out step by step through the cache: (N, P - start, output parameters).

    The steps before `start` go through the cache all at once, while the positions after them are still empty.
    """
    context = model.context(len(pixels), conditions.get("labels"), conditions.get("sources"))
    caches = model.caches(len(pixels))
    if start:
        given = torch.zeros_like(pixels)
        known = model.layout.order[:start]
        positions = (len(pixels), model.config.positions, -1)
        given.view(positions)[:, known] = pixels.reshape(positions)[:, known]
        model.parallel(given, context, caches)
    steps = range(start, model.config.positions)
    return torch.stack([model.step(pixels.flatten(1), context, caches, t) for t in steps], dim=1)


def moved(model: ImageTransformer, steps) -> Tensor:
    """(steps, P) bool: whether the parameters of each step differ at all when the position of a step t does."""
    config, steps = model.config, list(steps)
    before = pictures_for(model, 1).repeat(len(steps), 1, 1, 1)
    after = before.clone()
    positions = after.view(len(steps), config.positions, -1)
    for row, step in enumerate(steps):
        here = model.layout.order[step]
        positions[row, here] = ((positions[row, here].int() + config.levels // 2) % config.levels).byte()
    condition = select(conditions(model, 1), [0] * len(steps))
    return (model(before, **condition) != model(after, **condition)).any(dim=2)


def draw_naively(
    model: ImageTransformer, seeds, temperature: float = 1.0, given: Tensor | None = None, given_pixels: int = 0,
    **conditions,
) -> Tensor:
    """Images drawn with no cache: for each position, the parallel forward over the picture so far."""
    config, order = model.config, model.layout.order
    start = given_pixels * config.channels
    sequence = torch.zeros(len(seeds), config.positions, 3 // config.channels, dtype=torch.uint8)  # raster order
    if given is not None:
        known = order[:start]
        sequence[:, known] = given.reshape(len(seeds), config.positions, -1)[:, known]
    uniforms = noise(model, seeds)
    for step in range(start, config.positions):
        params = model(sequence.view(-1, config.image_size, config.image_size, 3), **conditions)[:, step]
        params = model.output.temper(params, temperature)
        sequence[:, order[step]] = model.output.draw(params, uniforms[:, step])
    return sequence.view(-1, config.image_size, config.image_size, 3)


@dataclass
class Case:
    """One small model and how to build it again with changes."""

    output: str
    task: str
    model: ImageTransformer

    def rebuilt(self, **changes) -> ImageTransformer:
        return small(self.output, self.task, **changes)


@pytest.fixture(params=["dmol", "categorical"])
def output(request) -> str:
    return request.param


@pytest.fixture(params=["class", "sr"])
def task(request) -> str:
    return request.param


@pytest.fixture
def case(output, task) -> Case:
    return Case(output, task, small(output, task))


@pytest.fixture
def model(case) -> ImageTransformer:
    return case.model
