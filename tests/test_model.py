"""The model: who sees whom, the likelihood, and the configuration."""

import dataclasses
import math

import pytest
import torch

from conftest import SIZE, SOURCE, conditions, pictures, select, small, small_config, stepwise
from imtx import PRESETS, Config, ImageTransformer


def changed_positions(model, steps):
    """Two batches, a row for each step t: the same pictures, but for the position generated at t."""
    before = pictures(1).repeat(len(steps), 1, 1, 1)
    after = before.clone()
    positions = after.view(len(steps), model.config.positions, -1)
    for row, step in enumerate(steps):
        positions[row, model.layout.order[step]] += 100  # wraps around at 256
    return before, after


def moved(model, steps):
    """(steps, P) bool: whether the parameters of each step differ at all when the position of a step t does."""
    before, after = changed_positions(model, steps)
    condition = select(conditions(model, 1), [0] * len(steps))
    return (model(before, **condition) != model(after, **condition)).any(dim=2)


# ---- causality ----------------------------------------------------------------------------------------------


def test_no_step_sees_itself_or_a_later_one(model):
    steps = range(0, model.config.positions, 1 if model.config.output == "dmol" else 4)
    for step, row in zip(steps, moved(model, steps)):
        assert not row[: step + 1].any(), f"step {step} is seen too early, at {row.nonzero()[0].item()}"
        assert row[step + 1 :].any() or step + 1 == model.config.positions, f"nothing sees step {step}"


@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_does_not_see_beyond_its_memory_block(case, layers):
    """With blocks and memory of one row, each layer carries one row further than the stem reaches."""
    config = case.model.config
    row = SIZE * config.channels
    model = case.rebuilt(query_block=row, memory_block=row, layers=layers)
    # The neighbourhood is two rows high; under a pixel of the source lie the rows 0..3.
    reach = (3 if config.source_size else 2) + layers
    by_row = moved(model, [0])[0].view(SIZE, row).any(dim=1)
    assert by_row[: reach + 1].all() and not by_row[reach + 1 :].any()


def test_the_condition_reaches_every_step(model):
    pixels, two = pictures(1).repeat(2, 1, 1, 1), conditions(model, 2)
    params = model(pixels, **two)
    assert (params[0] != params[1]).any(dim=1).all()


def test_the_stem_knows_what_is_left_under_a_source_pixel(output):
    """The source is the mean of the pixels under it: the last of them is known from the others."""
    model, factor = small(output, "sr"), SIZE // SOURCE
    cells = torch.randint(16, 256, (SOURCE, SOURCE, 3, factor**2), generator=torch.Generator().manual_seed(0))
    cells[..., -1] -= cells.sum(dim=-1) % factor**2  # so that the mean is a whole number
    sources = cells.sum(dim=-1)[None] // factor**2  # (1, s, s, 3)
    pixels = cells.view(SOURCE, SOURCE, 3, factor, factor).permute(0, 3, 1, 4, 2).reshape(1, SIZE, SIZE, 3)
    values = pixels.double().flatten(1) / 127.5 - 1
    inputs = model.embedding.inputs(pixels.byte().flatten(1), model.context(1, None, sources.byte()).source, slice(None))
    rest = inputs[0, :, -3:].view(SIZE, SIZE, model.config.channels, 3)
    for row in range(factor - 1, SIZE, factor):
        for column in range(factor - 1, SIZE, factor):
            for channel in range(model.config.channels):
                colours = slice(channel, channel + 1) if output == "categorical" else slice(None)
                expected = values.view(SIZE, SIZE, 3)[row, column, colours]
                torch.testing.assert_close(rest[row, column, channel, colours], expected)
            first = rest[row - factor + 1, column - factor + 1, 0]
            mean = sources[0, row // factor, column // factor].double() / 127.5 - 1
            torch.testing.assert_close(first, mean)


def test_no_labels_mean_no_class():
    model, pixels = small("dmol", "class"), pictures(2)
    assert torch.equal(model(pixels), model(pixels, torch.tensor([2, 2])))
    assert not torch.equal(model(pixels), model(pixels, torch.tensor([0, 0])))


# ---- likelihood ---------------------------------------------------------------------------------------------


def test_the_likelihood_is_the_sum_of_the_steps(model):
    pixels, condition = pictures(2), conditions(model, 2)
    params = stepwise(model, pixels, **condition)
    torch.testing.assert_close(params, model(pixels, **condition), rtol=1e-9, atol=1e-9)

    total = torch.zeros(2, dtype=torch.float64)
    for step, position in enumerate(model.layout.order.tolist()):
        levels = pixels.view(2, model.config.positions, -1)[:, position]
        total += model.output.log_prob(params[:, step], levels)
    parallel = model.log_prob(pixels, **condition)
    assert parallel.shape == (2, model.config.positions)
    torch.testing.assert_close(parallel.sum(dim=1), total, rtol=1e-9, atol=1e-9)


def test_steps_and_parallel_agree_in_float32(case):
    model, pixels, condition = case.model.float(), pictures(2), conditions(case.model, 2)
    params, parallel = stepwise(model, pixels, **condition), model(pixels, **condition)
    torch.testing.assert_close(params, parallel, rtol=1e-4, atol=1e-4)
    log_prob = model.output.log_prob(params, model.targets(pixels))
    torch.testing.assert_close(log_prob, model.log_prob(pixels, **condition), rtol=1e-4, atol=1e-4)


def test_the_likelihood_of_an_image_does_not_depend_on_its_batch(model):
    pixels, condition = pictures(3), conditions(model, 3)
    alone = torch.cat([model.log_prob(pixels[i : i + 1], **select(condition, slice(i, i + 1))) for i in range(3)])
    torch.testing.assert_close(alone, model.log_prob(pixels, **condition), rtol=1e-9, atol=1e-9)


def test_parameters_and_likelihood_are_float32_under_autocast(case):
    model, pixels, condition = case.model.float(), pictures(1), conditions(case.model, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        params, log_prob = model(pixels, **condition), model.log_prob(pixels, **condition)
    assert params.dtype == log_prob.dtype == torch.float32
    exact = model.log_prob(pixels, **condition).mean()
    assert log_prob.mean().item() == pytest.approx(exact.item(), rel=0.05)


def test_gradients_reach_every_weight(case):
    model, condition = case.model.requires_grad_(True), conditions(case.model, 3)
    (-model.log_prob(pictures(3), **condition).mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_a_fresh_model_is_not_far_from_uniform(output):
    """The start of training: 8 bits/dim is what ignorance costs; the mixture's plain guess may be off by some more."""
    torch.manual_seed(0)
    model = ImageTransformer(small_config(output, "class"))
    flat = torch.full((1, SIZE, SIZE, 3), 128, dtype=torch.uint8)
    bits = -model.log_prob(flat).sum().item() / math.log(2) / model.config.sub_pixels
    assert 0 < bits < 8.5


# ---- wrong arguments ----------------------------------------------------------------------------------------


def test_wrong_conditions_are_named():
    plain, classes, sr = (small("dmol", t, **c) for t, c in (("class", {"classes": ()}), ("class", {}), ("sr", {})))
    pixels, sources = pictures(2), pictures(2, 2)
    with pytest.raises(ValueError, match="no classes"):
        plain(pixels, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="takes no source"):
        plain(pixels, sources=sources)
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\).*\(3,\)"):
        classes(pixels, labels=torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="give it sources"):
        sr(pixels)
    with pytest.raises(ValueError, match=r"sources must be uint8 of shape \(2, 2, 2, 3\).*\(2, 3, 3, 3\)"):
        sr(pixels, sources=pictures(2, 3))
    with pytest.raises(ValueError, match="sources must be uint8.*float"):
        sr(pixels, sources=sources.float())


@pytest.mark.parametrize("labels", [[3, 0], [-1, 0], [0.0, 1.0]])
def test_wrong_labels_are_named(labels):
    with pytest.raises(ValueError, match="label"):
        small("dmol", "class")(pictures(2), labels=torch.tensor(labels))


@pytest.mark.parametrize(
    "pixels",
    [pictures(1) / 255, pictures(1).permute(0, 3, 1, 2), pictures(1)[0], pictures(1, SIZE + 1)],
    ids=["float", "channels first", "no batch", "size"],
)
def test_wrong_pixels_are_named(pixels):
    model = small("dmol", "class")
    with pytest.raises(ValueError, match="pixels"):
        model.log_prob(pixels)


def test_each_step_sees_the_one_just_before_it(model):
    """Across rows and query blocks too: no position is a blind spot."""
    steps = torch.arange(model.config.positions - 1)
    assert moved(model, steps)[steps, steps + 1].all()


# ---- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"layers": 0}, ["layers", "0"]),
        ({"output": "gaussian"}, ["gaussian"]),
        ({"layout": "3d"}, ["3d"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"dropout": math.nan}, ["dropout", "nan"]),
        ({"width": 100, "heads": 8}, ["100", "8"]),
        ({"width": 104, "heads": 8}, ["104", "32"]),
        ({"query_block": 100}, ["100", "1024"]),
        ({"query_block": 100, "output": "categorical"}, ["100", "3072"]),
        ({"memory_block": 1025}, ["1025", "1024"]),
        ({"memory_block": -1}, ["memory_block", "-1"]),
        ({"source_size": 7, "encoder_layers": 1}, ["7", "32"]),
        ({"source_size": 8}, ["8", "0"]),
        ({"encoder_layers": 2}, ["2", "0"]),
        ({"source_size": 8, "encoder_layers": 1, "classes": ("cat", "dog", "bird")}, ["classes", "3"]),
        ({"source_size": -1}, ["-1"]),
        ({"width": 128.0}, ["width", "128.0"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_impossible_shapes_name_the_numbers(fields, named):
    with pytest.raises(ValueError) as error:
        Config(**fields)
    assert all(word in str(error.value) for word in named), error.value


def test_config_round_trip(tmp_path):
    for name, config in PRESETS.items():
        path = tmp_path / f"{name}.json"
        config.save(path)
        assert Config.load(path) == config and isinstance(Config.load(path).classes, tuple)


@pytest.mark.parametrize(
    "text, named",
    [('{"width": 128, "n_embd": 3, "bos": 1}', "bos, n_embd"), ("{", "not JSON"), ("[1]", "object")],
)
def test_a_foreign_config_is_refused(tmp_path, text, named):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=named) as error:
        Config.load(path)
    assert str(path) in str(error.value)


def test_sizes():
    dmol, categorical = Config(), Config(output="categorical")
    assert (dmol.channels, dmol.positions, dmol.sub_pixels) == (1, 1024, 3072)
    assert (categorical.channels, categorical.positions, categorical.sub_pixels) == (3, 3072, 3072)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dmol.width = 3
