"""Classifier-free guidance: its parameters are worked out again from two plain forwards, and all engines draw from them."""

import pytest
import torch
from torch import Tensor

import test_fast
from conftest import FAMILIES, KINDS, LAYOUTS, SIZE, pictures, pictures_for, small
from imtx import ImageTransformer, dmol, draw, graph, sampling
from imtx.sampling import noise

LABELLED = [kind for kind in KINDS if kind[3] == "class"]
LABELS, GUIDANCE = [0, 1, 2], 2.5  # two classes and no class


@pytest.fixture(params=LABELLED, ids="-".join)
def model(request) -> ImageTransformer:
    family, output, layout, task = request.param
    return small(output, task, **FAMILIES[family], **LAYOUTS[layout])


@pytest.fixture
def plain() -> ImageTransformer:
    return small("dmol", "class")


def guided_slowly(model: ImageTransformer, pixels: Tensor, labels: list[int], guidance: float) -> Tensor:
    """(N, P, output parameters) from a forward with and one without labels. A mixture's means are relative to the guess."""
    found = []
    for given in (torch.tensor(labels), None):
        params, context = model(pixels, given), model.context(len(pixels), None, None)
        _, guess = model.embed(pixels.flatten(1), context, slice(None))
        found.append(params if guess is None else dmol.shift_means(params, -guess))
    labelled, unlabelled = found
    params = (1 - guidance) * unlabelled + guidance * labelled
    return params if guess is None else dmol.shift_means(params, guess)


def draw_slowly(model: ImageTransformer, seeds: range, labels: list[int], guidance: float, temperature: float) -> Tensor:
    config, order = model.config, model.layout.order
    sequence = torch.zeros(len(seeds), config.positions, 3 // config.channels, dtype=torch.uint8)  # raster order
    uniforms = noise(model, seeds)
    for step in range(config.positions):
        params = guided_slowly(model, sequence.view(-1, SIZE, SIZE, 3), labels, guidance)[:, step]
        sequence[:, order[step]] = model.output.draw(model.output.temper(params, temperature), uniforms[:, step])
    return sequence.view(-1, SIZE, SIZE, 3)


def test_the_step_and_the_parallel_forward_move_parameters_away_from_those_without_a_label(model):
    pixels = pictures_for(model, 3)
    context = model.context(3, torch.tensor(LABELS), None, GUIDANCE)
    expected = guided_slowly(model, pixels, LABELS, GUIDANCE)
    twice, caches = pixels.repeat(2, 1, 1, 1), model.caches(6)
    torch.testing.assert_close(model.parallel(twice, context), expected, rtol=0, atol=1e-9)
    steps = [model.step(twice.flatten(1), context, caches, step) for step in range(model.config.positions)]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=0, atol=1e-9)


def test_guidance_of_logits_is_a_power_of_what_the_label_says():
    """p(x) (p(x | label) / p(x))^guidance, normalised."""
    model = small("categorical", "class")
    pixels = pictures_for(model, 1)
    label, none = (model(pixels, given).softmax(dim=-1) for given in (torch.tensor([0]), None))
    expected = none * (label / none) ** GUIDANCE
    found = model.parallel(pixels.repeat(2, 1, 1, 1), model.context(1, torch.tensor([0]), None, GUIDANCE))
    torch.testing.assert_close(found.softmax(dim=-1), expected / expected.sum(dim=-1, keepdim=True))


def test_pictures_are_drawn_from_them(plain):
    options = dict(labels=LABELS, guidance=GUIDANCE, temperature=0.8)
    assert torch.equal(draw(plain, range(3), **options), draw_slowly(plain, range(3), **options))


def test_guidance_matters_one_is_none_and_zero_forgets_the_class(plain):
    pictures = {g: draw(plain, [3, 4], labels=[0, 1], guidance=g) for g in (0, 1, GUIDANCE)}
    assert torch.equal(pictures[1], draw(plain, [3, 4], labels=[0, 1]))
    assert torch.equal(pictures[0], draw(plain, [3, 4]))
    assert not torch.equal(pictures[GUIDANCE], pictures[1]) and not torch.equal(pictures[0], pictures[1])
    no_class = [len(plain.config.classes)] * 2
    assert torch.equal(draw(plain, [3, 4], labels=no_class, guidance=GUIDANCE), pictures[0])


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_an_image_is_the_same_in_any_batch(engine):
    model = test_fast.build("modern", "dmol", "1d", "class")
    seeds, labels = range(11), [i % 3 for i in range(11)]
    together = draw(model, seeds, labels=labels, guidance=GUIDANCE, engine=engine)
    for i in (0, 4, 10):
        assert torch.equal(draw(model, [i], labels=[labels[i]], guidance=GUIDANCE, engine=engine), together[i : i + 1])


@pytest.mark.parametrize("kind", LABELLED, ids="-".join)
@pytest.mark.parametrize("given_pixels", [0, 37])
def test_the_compiled_engine_draws_the_same(kind, given_pixels):
    model = test_fast.build(*kind)
    given = dict(given=pictures(3, seed=5), given_pixels=given_pixels) if given_pixels else {}
    options = dict(labels=LABELS, guidance=GUIDANCE, **given)
    fastly, slowly = (draw(model, [0, 1, 2], engine=engine, **options) for engine in ("compiled", "eager"))
    assert torch.equal(fastly, slowly)


@pytest.mark.parametrize("given_pixels", [0, 37])
def test_the_static_step_draws_the_same(model, given_pixels, monkeypatch):
    monkeypatch.setattr(sampling, "_engine", lambda model, asked: asked)
    monkeypatch.setattr(graph, "CudaStep", graph.StaticStep)
    given = dict(given=pictures(3, seed=5), given_pixels=given_pixels) if given_pixels else {}
    options = dict(labels=LABELS, guidance=GUIDANCE, **given)
    ours, theirs = (draw(model, [0, 1, 2], engine=engine, **options) for engine in ("graph", "eager"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("guidance", [-0.1, 20.5, float("nan"), float("inf"), "strong", None])
def test_bad_guidance_is_refused(plain, guidance):
    with pytest.raises(ValueError, match="guidance must be a number from 0 to 20, got"):
        draw(plain, [0], labels=[0], guidance=guidance)


@pytest.mark.parametrize("task", ["class", "unconditional", "sr"])
def test_guidance_without_a_class_is_refused(task):
    model = small("dmol", task)
    sources = {"sources": torch.zeros(2, 2, 3, dtype=torch.uint8)} if task == "sr" else {}
    with pytest.raises(ValueError, match="Guidance is towards a class: give labels, or leave guidance at 1"):
        draw(model, [0], guidance=2.0, **sources)
