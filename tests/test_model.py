"""The model: what a step reads, the likelihood, and the configuration. `test_exactness.py` has who sees whom."""

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import SIZE, SOURCE, conditions, moved, pictures, select, small, small_config, stepwise
from imtx import PRESETS, Config, ImageTransformer
from references import timing_signal


# ---- what reaches a step ------------------------------------------------------------------------------------


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


BLOCKS_2D = dict(layout="2d", query_block=(4, 2), memory_block=(2, 2))


@pytest.mark.parametrize("blocks", [{}, BLOCKS_2D], ids=["1d", "2d"])
def test_the_stem_knows_what_is_left_under_a_source_pixel(output, blocks):
    """The source is the mean of the pixels under it: the last of them is known from the others."""
    model, factor = small(output, "sr", **blocks), SIZE // SOURCE
    cells = torch.randint(16, 256, (SOURCE, SOURCE, 3, factor**2), generator=torch.Generator().manual_seed(0))
    cells[..., -1] -= cells.sum(dim=-1) % factor**2  # so that the mean is a whole number
    sources = cells.sum(dim=-1)[None] // factor**2  # (1, s, s, 3)
    pixels = cells.view(SOURCE, SOURCE, 3, factor, factor).permute(0, 3, 1, 4, 2).reshape(1, SIZE, SIZE, 3)
    values = pixels.double().flatten(1) / 127.5 - 1
    inputs = model.embedding.inputs(pixels.byte().flatten(1), model.context(1, None, sources.byte()).source, slice(None))
    rest = inputs[0, model.layout.rank, -3:].view(SIZE, SIZE, model.config.channels, 3)
    for row in range(factor - 1, SIZE, factor):
        for column in range(factor - 1, SIZE, factor):
            for channel in range(model.config.channels):
                colours = slice(channel, channel + 1) if output == "categorical" else slice(None)
                expected = values.view(SIZE, SIZE, 3)[row, column, colours]
                torch.testing.assert_close(rest[row, column, channel, colours], expected)
            first = rest[row - factor + 1, column - factor + 1, 0]
            mean = sources[0, row // factor, column // factor].double() / 127.5 - 1
            torch.testing.assert_close(first, mean)


def test_what_the_source_says_of_a_pixel_does_not_depend_on_the_layout(output):
    sources = pictures(2, SOURCE)
    one, other = (small(output, "sr", **blocks) for blocks in ({}, BLOCKS_2D))
    for raster, rectangles in zip(one.embedding.condition(sources), other.embedding.condition(sources)):
        assert torch.equal(raster, rectangles[:, other.layout.rank]) and not torch.equal(raster, rectangles)


def test_no_labels_mean_no_class():
    model, pixels = small("dmol", "class"), pictures(2)
    assert torch.equal(model(pixels), model(pixels, torch.tensor([2, 2])))
    assert not torch.equal(model(pixels), model(pixels, torch.tensor([0, 0])))


# ---- the paper's input: what was generated before, and where a position lies --------------------------------


def paper(output, encoding, **changes):
    return small(output, "sr", family="paper", position_encoding=encoding, **changes)


@pytest.mark.parametrize("blocks", [{}, BLOCKS_2D], ids=["1d", "2d"])
def test_sinusoids_are_those_of_tensor2tensor(output, blocks):
    model = paper(output, "sinusoid", **blocks)
    expected = timing_signal(SIZE, SIZE * model.config.channels, model.config.width)
    place = model.embedding.place(slice(None))[model.layout.rank].view(expected.shape)
    np.testing.assert_allclose(place.numpy(), expected, atol=1e-6)  # kept in float32
    source = model.source_embedding.place(slice(None)).view(SOURCE, SOURCE, -1)
    np.testing.assert_allclose(source.numpy(), timing_signal(SOURCE, SOURCE, model.config.width), atol=1e-6)


@pytest.mark.parametrize("blocks", [{}, BLOCKS_2D], ids=["1d", "2d"])
def test_learned_positions_are_a_table_of_rows_and_one_of_columns(output, blocks):
    model = paper(output, "learned", **blocks)
    embedding = model.embedding.place
    place = embedding(slice(None))[model.layout.rank].view(SIZE, SIZE * model.config.channels, -1)
    expected = (embedding.row.weight[:, None] + embedding.column.weight[None]) * math.sqrt(model.config.width)
    torch.testing.assert_close(place, expected)


@pytest.mark.parametrize("blocks", [{}, BLOCKS_2D], ids=["1d", "2d"])
def test_the_papers_input_is_the_position_generated_just_before(output, blocks):
    model, pixels = paper(output, "sinusoid", **blocks), pictures(2)
    context = model.context(2, None, pictures(2, SOURCE))
    x = model.embed(pixels.flatten(1), context, slice(None))[0] - model.embedding.place(slice(None))
    assert not x[:, 0].any()
    sequence, colour = model.targets(pixels).long(), model.embedding.colour
    for step in range(1, model.config.positions):
        levels = sequence[:, step - 1]  # (N, 3 or 1)
        if output == "dmol":
            expected = colour.pixel(levels.double() / 127.5 - 1).clamp(min=0)
        else:
            channel = int(model.layout.order[step - 1]) % 3
            expected = colour.value.weight[256 * channel + levels[:, 0]] * math.sqrt(model.config.width)
        torch.testing.assert_close(x[:, step], expected)


@pytest.mark.parametrize("blocks", [{}, BLOCKS_2D], ids=["1d", "2d"])
def test_rotary_angles_are_those_of_row_and_column(output, blocks):
    model = small(output, "sr", **blocks)
    quarter = model.config.head_width // 4
    frequencies = [32 ** (-i / (quarter - 1)) for i in range(quarter)]  # radians a pixel: 1 down to 1 / 32

    def angles(places):
        return np.array([[at * f for at in place for f in frequencies] for place in places])

    pixels = [divmod(position // model.config.channels, SIZE) for position in model.layout.order.tolist()]
    centres = [(at + 0.5) * SIZE / SOURCE - 0.5 for at in range(SOURCE)]  # of the source pixels
    sources = [(row, column) for row in centres for column in centres]
    for places, (cos, sin) in ((pixels, model.rotary(slice(None))), (sources, model.source_rotary())):
        np.testing.assert_allclose(cos.numpy(), np.cos(angles(places)), atol=1e-5)  # kept in float32
        np.testing.assert_allclose(sin.numpy(), np.sin(angles(places)), atol=1e-5)


# ---- likelihood ---------------------------------------------------------------------------------------------


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


def test_a_fresh_model_is_not_far_from_uniform(output):
    """The start of training: 8 bits/dim is what ignorance costs; the mixture's plain guess may be off by some more."""
    torch.manual_seed(0)
    model = ImageTransformer(small_config(output, "class"))
    flat = torch.full((1, SIZE, SIZE, 3), 128, dtype=torch.uint8)
    bits = -model.log_prob(flat).sum().item() / math.log(2) / model.config.sub_pixels
    assert 0 < bits < 8.5


@pytest.mark.parametrize("output", ["dmol", "categorical"])
def test_the_papers_family_starts_like_t2t(output):
    """Uniform, variance 0.2 over the mean of a matrix's two sizes, as T2T counts its matrices and their sizes."""
    torch.manual_seed(0)
    config = replace(PRESETS["paper-sr-1d"], output=output, width=128, ffn=256, layers=1, encoder_layers=1, attention_width=64)
    model = ImageTransformer(config)
    block, pixel = model.decoder[0], {"dmol": (3, 3 * 128), "categorical": None}[output]
    sizes = {
        block.attention.qkv.weight[:64]: (128, 64), block.attention.qkv.weight[128:]: (128, 64),
        block.source_attention.kv.weight[:64]: (128, 64), block.attention.out.weight: (64, 128),
        block.ffn.up.weight: (128, 256), model.head.weight: model.head.weight.shape,
    }
    sizes |= {model.embedding.colour.pixel.weight: pixel} if pixel else {model.embedding.colour.value.weight: (768, 128)}
    for weight, (inputs, outputs) in sizes.items():
        bound = (3 * 0.2 * 2 / (inputs + outputs)) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.1)


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


def test_what_is_no_tensor_or_no_config_is_named():
    model = small("dmol", "class")
    with pytest.raises(ValueError, match="pixels must be a uint8 tensor.*ndarray"):
        model.log_prob(pictures(1).numpy())
    with pytest.raises(ValueError, match="labels must be a int64 tensor.*list"):
        model.log_prob(pictures(1), [0])
    with pytest.raises(ValueError, match="PRESETS.*'tiny'"):
        ImageTransformer("tiny")


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


@pytest.mark.parametrize("task", ["class", "sr"])
def test_levels_that_a_model_does_not_know_are_named(output, task):
    model = small(output, task, levels=8)
    pixels, condition = pictures(2, levels=8), conditions(model, 2)
    model.log_prob(pixels, **condition)
    pixels[1, 2, 3, 1] = 8
    with pytest.raises(ValueError, match=r"pixels must be in 0\.\.7, got 8"):
        model.log_prob(pixels, **condition)
    if task == "sr":
        condition["sources"][0, 0, 0, 0] = 255
        with pytest.raises(ValueError, match=r"sources must be in 0\.\.7, got 255"):
            model.log_prob(pictures(2, levels=8), **condition)


# ---- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"layers": 0}, ["layers", "0"]),
        ({"output": "gaussian"}, ["gaussian"]),
        ({"layout": "3d"}, ["3d"]),
        ({"dropout": "0.1"}, ["dropout", "0.1"]),
        ({"classes": 5}, ["classes", "5"]),
        ({"classes": (1, 2)}, ["classes", "1, 2"]),
        ({"classes": ("cat", "cat")}, ["classes", "differ"]),
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
        ({"family": "gpt"}, ["family", "gpt", "modern", "paper"]),
        ({"family": "paper"}, ["position_encoding", "rotary", "sinusoid", "learned"]),
        ({"position_encoding": "sinusoid"}, ["position_encoding", "sinusoid", "rotary"]),
        ({"family": "paper", "position_encoding": "sinusoid", "width": 34, "heads": 2}, ["width 34", "4"]),
        ({"family": "paper", "position_encoding": "learned", "attention_width": 100, "heads": 8}, ["heads 8", "100"]),
        ({"attention_width": 100, "heads": 8}, ["heads 8", "100"]),
        ({"attention_width": 24}, ["24", "16"]),
        ({"attention_width": -1}, ["attention_width", "-1"]),
        ({"levels": 1}, ["levels", "2", "1"]),
        ({"levels": 257}, ["levels", "256", "257"]),
        ({"levels": 8.0}, ["levels", "8.0"]),
        ({"query_block": 0}, ["query_block", "1", "0"]),
        ({"query_block": True}, ["query_block", "True"]),
        ({"query_block": (8, 8)}, ["query_block", "1d", "(8, 8)"]),
        ({"memory_block": [4, 8]}, ["memory_block", "1d", "[4, 8]"]),
        ({"layout": "2d"}, ["query_block", "2d", "256"]),
        ({"layout": "2d", "query_block": (8, 8), "memory_block": 8}, ["memory_block", "2d", "8"]),
        ({"layout": "2d", "query_block": (8, 8, 3), "memory_block": (4, 8)}, ["query_block", "(8, 8, 3)"]),
        ({"layout": "2d", "query_block": (8, 4.0), "memory_block": (4, 8)}, ["query_block", "(8, 4.0)"]),
        ({"layout": "2d", "query_block": (0, 8), "memory_block": (4, 8)}, ["query_block", "1", "(0, 8)"]),
        ({"layout": "2d", "query_block": "88", "memory_block": (4, 8)}, ["query_block", "88"]),
        ({"layout": "2d", "query_block": (5, 8), "memory_block": (4, 8)}, ["query_block", "5", "32 rows"]),
        ({"layout": "2d", "query_block": (8, 5), "memory_block": (4, 8)}, ["query_block", "5", "32 columns"]),
        # whole pixels, also where a position is a sub-pixel
        ({"layout": "2d", "output": "categorical", "query_block": (8, 48), "memory_block": (4, 8)}, ["48", "32 columns"]),
        ({"layout": "2d", "query_block": (8, 8), "memory_block": (33, 0)}, ["memory_block", "33", "32 rows"]),
        ({"layout": "2d", "query_block": (8, 8), "memory_block": (0, 33)}, ["memory_block", "33", "32 columns"]),
        ({"layout": "2d", "query_block": (8, 8), "memory_block": (-1, 8)}, ["memory_block", "0", "(-1, 8)"]),
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
