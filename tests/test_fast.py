"""The compiled step (imtx/fast) against the PyTorch step that it stands in for: log-probabilities and pixels, for all kinds."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import FAMILIES, KINDS, LAYOUTS, SIZE, conditions, pictures, pictures_for, select, small
from imtx import ImageTransformer, dmol, draw, sample, sampling
from imtx.checkpoint import BUNDLED
from imtx.fast.step import advance
from imtx.fast.weights import allocate, cache_size, pack
from imtx.sampling import noise

MARGIN = 1e-4  # of log-probabilities, and so of the parameters that a draw is made from
PIXELS = SIZE * SIZE
ROOT = Path(__file__).resolve().parents[1]


def build(family: str, output: str, layout: str, task: str, bfloat16: bool = False) -> ImageTransformer:
    """In float32; `bfloat16`: the blocks' matrices hold bfloat16 numbers, and are kept in 16 bits.

    Random weights make scales down to their floor of e^-7, where a rounding error counts a thousandfold: a bias widens them.
    """
    model = small(output, task, **FAMILIES[family], **LAYOUTS[layout]).float()
    if output == "dmol":
        wider = torch.zeros(model.output.parameters)
        wider[4 * model.config.mixtures : 7 * model.config.mixtures] = 4.0
        head = torch.nn.Linear(model.config.width, model.output.parameters).requires_grad_(False)
        head.weight.copy_(model.head.weight)
        head.bias.copy_(wider if model.head.bias is None else wider + model.head.bias)
        model.head = head
    if bfloat16:
        for weight in model.decoder.parameters():
            if weight.ndim == 2:
                weight.copy_(weight.bfloat16())
    return model


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request) -> tuple[str, ...]:
    return request.param


@torch.inference_mode()
def parameters(model: ImageTransformer, pixels: torch.Tensor, **condition) -> torch.Tensor:
    """(N, P, output parameters) of given pictures, step by step in compiled code."""
    images, config = len(pixels), model.config
    context = model.context(images, condition.get("labels"), condition.get("sources"))
    shape, weights = pack(model)
    uniforms = noise(model, range(images))
    buffer = np.full(cache_size(model, weights, images), 255, np.uint8)  # NaN is what others have left
    state, (scratch, *_) = allocate(model, weights, context, uniforms, pixels.flatten(1).numpy(), slice(0, images), buffer)
    found = []
    for step in range(config.positions):
        state.pixels[:] = pixels.flatten(1).numpy()  # what this step has drawn is not what the next one is to see
        advance(shape, weights, state, scratch, 0, 1, step, step + 1, 0, 1.0, 1.0)
        params = torch.from_numpy(scratch.params.copy())
        guessed = config.output == "dmol" and config.family == "modern"
        found.append(dmol.shift_means(params, torch.from_numpy(scratch.guess.copy())) if guessed else params)
    return torch.stack(found, dim=1)


def assert_same_pictures(model: ImageTransformer, seeds: list[int], temperature: float = 1.0, start: int = 0, **condition):
    """Compiled and eager pictures are equal, but for draws that lie within MARGIN of another colour."""
    options = dict(temperature=temperature, **condition)
    fastly, slowly = (draw(model, seeds, engine=engine, **options) for engine in ("compiled", "eager"))
    order = model.layout.order
    for image, seed in enumerate(seeds):
        sequences = [p[image].view(model.config.positions, -1)[order] for p in (fastly, slowly)]
        differs = (sequences[0] != sequences[1]).any(dim=1).nonzero().flatten()
        if len(differs):
            step = int(differs[0])
            print(f"seed {seed}: a draw within {MARGIN} of another colour at step {step}")
            own = {name: t[image : image + 1] for name, t in condition.items() if name in ("labels", "sources")}
            params = model(slowly[image : image + 1], **own)[0, step]
            assert tuple(sequences[0][step].tolist()) in neighbours(model, params, noise(model, [seed])[0, step], temperature)


def neighbours(model: ImageTransformer, params: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> set:
    """The colours that are drawn from parameters up to MARGIN away, or with uniforms up to MARGIN away."""
    found, k = set(), model.config.mixtures
    for shift, nudge in itertools.product((-MARGIN, 0, MARGIN), repeat=2):
        moved = params.clone()
        if model.config.output == "dmol":
            moved[k : 4 * k] += shift
        colours = model.output.draw(model.output.temper(moved, temperature), (uniforms + nudge).clamp(0, 1 - 1e-9))
        found.add(tuple(colours.tolist()))
    return found


# ---- the same distribution, the same pictures ---------------------------------------------------------------


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_log_probabilities_agree_over_whole_pictures(kind, bfloat16):
    model = build(*kind, bfloat16)
    assert pack(model)[1].qkv.dtype == (np.uint16 if bfloat16 else np.float32)
    condition = conditions(model, 5)
    pixels = draw(model, range(5), engine="eager", **condition)  # of noise, scales at their floor make nats in the hundreds
    params = parameters(model, pixels, **condition)
    found = model.output.log_prob(params, model.targets(pixels))
    torch.testing.assert_close(found, model.log_prob(pixels, **condition), rtol=0, atol=MARGIN)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in BUNDLED.glob("*/config.json")))
def test_the_bundled_weights_agree(name):
    model = ImageTransformer.from_pretrained(name)
    assert pack(model)[1].qkv.dtype == np.uint16  # they are stored so that they take the fastest way
    condition = conditions(model, 2)
    assert_same_pictures(model, [0, 1], **condition)
    pixels = draw(model, [0, 1], **condition)
    found = model.output.log_prob(parameters(model, pixels, **condition), model.targets(pixels))
    # Trained scales are narrow and these models deep: in float32 PyTorch's own rounding is up to 1e-4, and not the step's fault.
    exact = ImageTransformer.from_pretrained(name).double()
    condition = {name: value.double() if value.is_floating_point() else value for name, value in condition.items()}
    with torch.no_grad():
        difference = (found - exact.log_prob(pixels, **condition)).abs()
    assert difference.max() <= MARGIN


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_pictures_agree(kind, temperature):
    model = build(*kind, bfloat16=temperature == 1.0)
    assert_same_pictures(model, [0, 1, 2, 3, 4], temperature, **conditions(model, 5))


@pytest.mark.parametrize("temperature", [1e-30, 0.05, 2.0, 1e30])
@pytest.mark.parametrize("output", ["dmol", "categorical"])
def test_pictures_agree_at_the_ends_of_the_temperatures(output, temperature):
    model = build("modern", output, "1d", "class")
    assert_same_pictures(model, [0, 1], temperature, **conditions(model, 2))


@pytest.mark.parametrize("given_pixels", [1, 37, PIXELS - 1, PIXELS])
def test_completions_agree(kind, given_pixels):
    model = build(*kind)
    condition = conditions(model, 2) | dict(given=pictures(2, seed=5), given_pixels=given_pixels)
    fastly, slowly = (list(sample(model, [3, 4], engine=e, **condition)) for e in ("compiled", "eager"))
    assert [s.done for s in fastly] == [s.done for s in slowly] == list(range(given_pixels, PIXELS + 1))
    assert torch.equal(fastly[0].pixels, slowly[0].pixels) and torch.equal(fastly[-1].pixels, slowly[-1].pixels)


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_an_image_is_the_same_to_the_last_bit_in_any_batch(kind, threads, monkeypatch):
    """Parameters in the hundreds and a temperature far from 1 would show a sum in another order."""
    model, condition = build(*kind), conditions(build(*kind), 7)
    pixels = pictures_for(model, 7)
    together = parameters(model, pixels, **condition)  # four images, then three one by one
    alone = torch.cat([parameters(model, pixels[i : i + 1], **select(condition, slice(i, i + 1))) for i in range(7)])
    assert torch.equal(together, alone)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    drawn = draw(model, range(7), **condition)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert torch.equal(drawn, draw(model, range(7), **condition))


def test_few_levels():
    model = small("dmol", "class", levels=4).float()
    assert_same_pictures(model, [0, 1, 2], **conditions(model, 3))
    assert draw(model, [0]).max() < 4


def test_weights_that_change_are_seen():
    model = build("modern", "dmol", "1d", "class")
    before = draw(model, [0])
    model.head.bias += 0.5
    assert_same_pictures(model, [0])
    assert not torch.equal(before, draw(model, [0]))
    model.load_state_dict(build("modern", "dmol", "1d", "class", bfloat16=True).state_dict())
    assert_same_pictures(model, [0])
    for weight in model.parameters():
        weight.data.mul_(0.9)  # which leaves its version as it was
    assert_same_pictures(model, [0])
    down = model.decoder[0].ffn.down.weight
    for other_order in (down.flip(0), down.flip(1)):  # whose sum is the same
        before = draw(model, [0])
        down.data.copy_(other_order)
        assert_same_pictures(model, [0])
        assert not torch.equal(before, draw(model, [0]))


def test_a_model_that_was_made_in_inference_mode():
    with torch.inference_mode():
        model = build("modern", "dmol", "1d", "class")
    assert torch.equal(draw(model, [0], engine="compiled"), draw(build("modern", "dmol", "1d", "class"), [0]))


# ---- engines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["compiled", "eager"])
@pytest.mark.parametrize("every, dones", [(1, range(11, PIXELS + 1)), (20, [30, 50, PIXELS]), (PIXELS, [PIXELS])])
def test_snapshots_come_as_often_as_asked(engine, every, dones):
    model = build("modern", "categorical", "1d", "class")
    snapshots = list(sample(model, [0, 1], given=pictures(1)[0], given_pixels=10, every=every, engine=engine))
    assert [s.done for s in snapshots] == [10, *dones]
    final, order = snapshots[-1].pixels.view(2, PIXELS, 3), sampling.pixel_order(model)
    for snapshot in snapshots:
        flat = snapshot.pixels.view(2, PIXELS, 3)
        assert torch.equal(flat[:, order[: snapshot.done]], final[:, order[: snapshot.done]])
        assert not flat[:, order[snapshot.done :]].any()


@pytest.mark.parametrize("arguments, message", [
    (dict(every=0), "every must be a whole number in 1..64, got 0."),
    (dict(every=65), "every must be a whole number in 1..64, got 65."),
    (dict(engine="quick"), "engine must be 'compiled' or 'graph' or 'eager' or None, got 'quick'."),
])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        sample(build("modern", "dmol", "1d", "class"), [0], **arguments)
    assert str(error.value) == message


def test_closing_stops_the_work(monkeypatch):
    calls, model = [], build("modern", "categorical", "1d", "class")
    monkeypatch.setattr("imtx.fast.step.advance", lambda *args: calls.append(args[6:8]) or advance(*args))
    generator = sample(model, [0], every=2)
    next(generator), next(generator)
    generator.close()
    assert calls[0] == (0, 6) and set(calls[1:]) == {(6, 12)}  # the second by one thread or by two


@pytest.mark.parametrize("images", [1, 3])
def test_two_visitors_at_once_get_what_each_gets_alone(images, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # one image by two threads, or the images of a batch
    models = [build("modern", "dmol", "1d", "class", bfloat16=True), build("learned", "categorical", "2d", "sr")]
    wanted = [draw(model, range(images), **conditions(model, images)) for model in models]
    drawn = {}

    def visit(number: int):
        for turn in range(5):
            model = models[(number + turn) % 2]
            drawn[number, turn] = draw(model, range(images), **conditions(model, images))

    visitors = [threading.Thread(target=visit, args=[number]) for number in range(2)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert len(drawn) == 10
    for (number, turn), pixels in drawn.items():
        assert torch.equal(pixels, wanted[(number + turn) % 2])
