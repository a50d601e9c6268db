"""The sampler: seeds, temperature, completion, and stopping. `test_exactness.py` holds its cache against none."""

import math

import pytest
import torch

from conftest import SIZE, SOURCE, conditions, draw_naively, pictures, select, small
from imtx import ImageTransformer, draw, pixel_order, sample

SEEDS = [0, 7, 2**32 - 1]
PIXELS = SIZE * SIZE


def count_steps(monkeypatch):
    """Counts what the model does from now on."""
    calls = []
    step = ImageTransformer.step
    monkeypatch.setattr(ImageTransformer, "step", lambda self, *args: calls.append(args[-1]) or step(self, *args))
    return calls


# ---- seeds --------------------------------------------------------------------------------------------------


def test_a_seed_is_the_same_image_in_any_batch(model):
    condition = conditions(model, 3)
    together = draw(model, SEEDS, **condition)
    assert torch.equal(together, draw(model, SEEDS, **condition))
    for i, seed in enumerate(SEEDS):
        assert torch.equal(together[i : i + 1], draw(model, [seed], **select(condition, slice(i, i + 1))))
    assert not torch.equal(together[0], together[1])


def test_drawing_leaves_the_global_generator_alone():
    model = small("dmol", "class")
    before = torch.get_rng_state()
    draw(model, [0])
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_may_come_from_an_iterator():
    model = small("dmol", "class")
    assert torch.equal(draw(model, [0, 1], labels=iter([1, 0])), draw(model, [0, 1], labels=[1, 0]))


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_autocast_around_a_call_changes_nothing(task, engine):
    model = small("dmol", task).float()
    options = dict(given=pictures(1), given_pixels=20, engine=engine, **conditions(model, 1))
    expected = draw(model, [3], **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(draw(model, [3], **options), expected)


# ---- what is yielded ----------------------------------------------------------------------------------------


def test_a_snapshot_a_pixel(model):
    order = pixel_order(model)
    snapshots = list(sample(model, SEEDS[:2], **conditions(model, 2)))
    assert [s.done for s in snapshots] == list(range(1, PIXELS + 1))
    final = snapshots[-1].pixels.view(2, PIXELS, 3)
    for snapshot in snapshots:
        assert snapshot.total == PIXELS
        assert snapshot.pixels.dtype == torch.uint8 and snapshot.pixels.shape == (2, SIZE, SIZE, 3)
        flat, drawn = snapshot.pixels.view(2, PIXELS, 3), order[: snapshot.done]
        assert torch.equal(flat[:, drawn], final[:, drawn])
        assert not flat[:, order[snapshot.done :]].any()


def test_closing_stops_the_work(model, monkeypatch):
    calls = count_steps(monkeypatch)
    generator = sample(model, SEEDS, **conditions(model, 3))
    for _ in range(3):
        next(generator)
    generator.close()
    assert calls == list(range(3 * model.config.channels))
    with pytest.raises(StopIteration):
        next(generator)
    assert len(calls) == 3 * model.config.channels


# ---- temperature --------------------------------------------------------------------------------------------


def test_near_temperature_zero_the_seed_does_not_matter(model):
    condition = select(conditions(model, 1), [0, 0])
    # So low, because the mixture's scales of this random model are far wider than a trained one's.
    first, second = draw(model, [1, 2], temperature=1e-9, **condition)
    assert torch.equal(first, second)
    first, second = draw(model, [1, 2], **condition)
    assert not torch.equal(first, second)


# ---- completion ---------------------------------------------------------------------------------------------


BLOCKS_2D = dict(layout="2d", query_block=(4, 4), memory_block=(2, 3))


@pytest.mark.parametrize("blocks, given_pixels", [  # a query block is 16 pixels
    ({}, 1), ({}, 16), ({}, 21), ({}, PIXELS - 1), ({}, PIXELS), (BLOCKS_2D, 16), (BLOCKS_2D, 37)
])
def test_completion_keeps_what_is_given_and_draws_the_rest(case, monkeypatch, blocks, given_pixels):
    model = case.rebuilt(**blocks)
    order, given, condition = pixel_order(model), pictures(2, seed=3), conditions(model, 2)
    calls = count_steps(monkeypatch)
    snapshots = list(sample(model, [1, 2], given=given, given_pixels=given_pixels, **condition))
    assert len(calls) == (PIXELS - given_pixels) * model.config.channels
    assert [s.done for s in snapshots] == list(range(given_pixels, PIXELS + 1))
    # (N, pixels, 3) in the order in which they are drawn
    first, last, kept = (t.view(2, PIXELS, 3)[:, order] for t in (snapshots[0].pixels, snapshots[-1].pixels, given))
    assert torch.equal(first[:, :given_pixels], kept[:, :given_pixels]) and not first[:, given_pixels:].any()
    assert torch.equal(last[:, :given_pixels], kept[:, :given_pixels])
    expected = draw_naively(model, [1, 2], given=given, given_pixels=given_pixels, **condition)
    assert torch.equal(snapshots[-1].pixels, expected)


def test_what_is_not_given_is_not_looked_at(model):
    given, other, condition = pictures(2), pictures(2), conditions(model, 2)
    other.view(2, PIXELS, 3)[:, 21:] = 255
    expected = draw(model, [1, 2], given=given, given_pixels=21, **condition)
    assert torch.equal(draw(model, [1, 2], given=other, given_pixels=21, **condition), expected)


def test_one_picture_is_given_to_all(output):
    model, given = small(output, "sr"), pictures(1)
    sources = pictures(1, 2)
    one = draw(model, [1, 2], sources=sources[0], given=given[0], given_pixels=40)
    each = draw(model, [1, 2], sources=sources.repeat(2, 1, 1, 1), given=given.repeat(2, 1, 1, 1), given_pixels=40)
    assert torch.equal(one, each)


def test_completing_a_drawn_image_with_its_seed_gives_it_back(model):
    """The numbers behind a pixel belong to its place, not to when it is drawn."""
    condition = conditions(model, 1)
    image = draw(model, [5], **condition)
    assert torch.equal(draw(model, [5], given=image, given_pixels=30, **condition), image)


# ---- wrong arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, arguments, message",
    [
        ("class", {"seeds": []}, "seeds"),
        ("class", {"seeds": 3}, "seeds.*3"),
        ("class", {"temperature": "warm"}, "temperature.*warm"),
        ("class", {"temperature": 1e-45}, "temperature.*1e-45"),
        ("class", {"labels": ["cat"]}, "labels.*cat"),
        ("class", {"labels": [None]}, "labels.*None"),
        ("class", {"given": pictures(1), "given_pixels": 3.0}, "given_pixels.*3.0"),
        ("class", {"given": [[0]], "given_pixels": 3}, "given.*list"),
        ("class", {"seeds": [0, -1]}, "seeds.*-1"),
        ("class", {"seeds": [2**32]}, "seeds.*4294967296"),
        ("class", {"seeds": [1.5]}, "seeds.*1.5"),
        ("class", {"temperature": 0}, "temperature.*0"),
        ("class", {"temperature": -1.0}, "temperature.*-1.0"),
        ("class", {"temperature": math.nan}, "temperature.*nan"),
        ("class", {"temperature": math.inf}, "temperature.*inf"),
        ("class", {"labels": [0, 1]}, "labels must be one a seed, 1 of them, got 2"),
        ("class", {"labels": []}, "labels must be one a seed, 1 of them, got 0"),
        ("class", {"labels": [3]}, "label.*3"),
        ("class", {"labels": [-1]}, "label.*-1"),
        ("class", {"sources": pictures(1, 2)}, "takes no source"),
        ("sr", {}, "give it sources"),
        ("sr", {"sources": pictures(1, 2), "labels": [0]}, "no classes"),
        ("sr", {"sources": pictures(1, 3)}, r"sources.*\(2, 2, 3\).*\(1, 3, 3, 3\)"),
        ("sr", {"sources": pictures(2, 2)}, r"sources.*\(1, 2, 2, 3\).*\(2, 2, 2, 3\)"),
        ("sr", {"sources": pictures(1, 2) / 255}, "sources must be uint8.*float"),
        ("class", {"given_pixels": 3}, "given_pixels"),
        ("class", {"given": pictures(1)}, "given_pixels"),
        ("class", {"given": pictures(1), "given_pixels": 65}, "given_pixels.*64.*65"),
        ("class", {"given": pictures(1), "given_pixels": -1}, "given_pixels.*-1"),
        ("class", {"given": pictures(1, 9), "given_pixels": 3}, r"given.*\(8, 8, 3\).*\(1, 9, 9, 3\)"),
        ("class", {"given": pictures(1).float(), "given_pixels": 3}, "given must be uint8.*float"),
    ],
)
def test_wrong_arguments_are_named(task, arguments, message):
    model = small("dmol", task, layers=1)
    with pytest.raises(ValueError, match=message):
        sample(model, **({"seeds": [0]} | arguments))  # the call alone: nothing is drawn yet


@pytest.mark.parametrize("name, size", [("given", SIZE), ("sources", SOURCE)])
def test_levels_that_a_model_does_not_know_are_named(output, name, size):
    model = small(output, "sr" if name == "sources" else "class", layers=1, levels=8)
    picture = pictures(1, size, levels=8)
    options = {name: picture} | ({"given_pixels": 3} if name == "given" else {})
    sample(model, [0], **options)
    picture[0, -1, -1, 2] = 8
    with pytest.raises(ValueError, match=rf"{name} must be in 0\.\.7, got 8"):
        sample(model, [0], **options)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval"):
        sample(small("dmol", "class", dropout=0.5).train(), [0])
