"""Local attention against its definition, and layouts."""

import math

import pytest
import torch

from conftest import SIZE, conditions, draw_naively, pictures, select, small, small_config, stepwise
from imtx import pixel_order, sample
from imtx.attention import Cache, LocalSelfAttention
from imtx.inputs import NEIGHBOURS, neighbour_table
from imtx.layout import Layout, build_layout, local_1d

HEADS, HEAD_WIDTH = 2, 4


def attention_layer(layout):
    torch.manual_seed(0)
    layer = LocalSelfAttention(HEADS * HEAD_WIDTH, HEADS * HEAD_WIDTH, HEADS, layout, dropout=0.0, qk_norm=True).double().eval()
    for norm in (layer.query_norm, layer.key_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    angles = 6 * torch.rand(len(layout.order), HEAD_WIDTH // 2, dtype=torch.float64)
    x = torch.randn(3, len(layout.order), HEADS * HEAD_WIDTH, dtype=torch.float64)
    return layer.requires_grad_(False), x, (angles.cos(), angles.sin())


def dense(layer, x, rotary, sees):
    """The same layer as one big softmax: `sees` is (P, P) bool, query by key."""
    q, k, v = layer.project(x, rotary)  # (N, P, H, D)
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(HEAD_WIDTH)
    weights = scores.masked_fill(~sees, -math.inf).softmax(dim=-1)
    return layer.out(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))


def through_cache(layer, x, rotary, prefix=0):
    """The same layer step by step; the first `prefix` steps come from a parallel forward."""
    cache = Cache(layer.layout, len(x), HEADS, HEAD_WIDTH, like=x)
    if prefix:
        known = torch.cat([x[:, :prefix], torch.zeros_like(x[:, prefix:])], dim=1)
        layer(known, rotary, cache)
    steps = range(prefix, x.shape[1])
    out = [layer.step(x[:, t : t + 1], tuple(r[t : t + 1] for r in rotary), cache, t) for t in steps]
    return torch.cat(out, dim=1)


def blocks_2d(size=SIZE, block=4, reach=2):
    """A 2D layout made by hand: blocks in raster order, raster order inside; a block's memory is what is generated of
    the frame `reach` pixels wide around it. Returns it with (P, P) bool, step by step: who sees whom."""
    order = torch.arange(size * size).view(size // block, block, size // block, block).transpose(1, 2).flatten()
    place = [divmod(pixel, size) for pixel in order.tolist()]

    def near(step, corner):
        return all(c - reach <= p < c + block + reach for p, c in zip(place[step], corner))

    memory = []
    for start in range(0, size * size, block * block):
        memory.append([step for step in range(start) if near(step, place[start])])
    longest = max(map(len, memory))
    table = torch.tensor([row + [-1] * (longest - len(row)) for row in memory])

    sees = torch.zeros(size * size, size * size, dtype=torch.bool)
    for query in range(size * size):
        corner = [p // block * block for p in place[query]]
        for key in range(query + 1):
            same_block = corner == [p // block * block for p in place[key]]
            sees[query, key] = same_block or near(key, corner)
    return Layout(order, block * block, table), sees


# ---- the layer ----------------------------------------------------------------------------------------------

SHAPES = pytest.mark.parametrize(
    "l_q, l_m", [(8, 8), (8, 0), (8, 5), (8, 12), (8, 48), (4, 9), (16, 3), (48, 0), (48, 48), (1, 1), (1, 7), (1, 0)]
)


def sees_1d(positions, l_q, l_m):
    """The definition: a query sees its own block, causally, and the l_m positions before its block."""
    sees = torch.zeros(positions, positions, dtype=torch.bool)
    for query in range(positions):
        start = query // l_q * l_q
        for key in range(query + 1):
            sees[query, key] = key >= start or start - l_m <= key < start
    return sees


@SHAPES
def test_local_attention_is_dense_attention_with_a_mask(l_q, l_m):
    layer, x, rotary = attention_layer(local_1d(48, l_q, l_m))
    torch.testing.assert_close(layer(x, rotary), dense(layer, x, rotary, sees_1d(48, l_q, l_m)), rtol=1e-9, atol=1e-9)


@SHAPES
@pytest.mark.parametrize("prefix", [0, 16, 21])
def test_the_cache_is_dense_attention_with_a_mask(l_q, l_m, prefix):
    layer, x, rotary = attention_layer(local_1d(48, l_q, l_m))
    expected = dense(layer, x, rotary, sees_1d(48, l_q, l_m))[:, prefix:]
    torch.testing.assert_close(through_cache(layer, x, rotary, prefix), expected, rtol=1e-9, atol=1e-9)


def test_memory_of_all_positions_is_ordinary_causal_attention():
    layer, x, rotary = attention_layer(local_1d(48, 8, 48))
    causal = torch.ones(48, 48, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, rotary), dense(layer, x, rotary, causal), rtol=1e-9, atol=1e-9)


# ---- layouts ------------------------------------------------------------------------------------------------


@SHAPES
def test_layout_tables_say_what_the_definition_says(l_q, l_m):
    layout = local_1d(48, l_q, l_m)
    assert torch.equal(layout.order, torch.arange(48))
    for block in range(layout.blocks):
        start = block * l_q
        expected = list(range(max(0, start - l_m), start))
        assert layout.memory_steps(block).tolist() == expected
        assert layout.memory[block].tolist() == [-1] * (l_m - len(expected)) + expected


def test_a_memory_block_may_not_hold_what_comes_later():
    with pytest.raises(ValueError, match="not generated before"):
        Layout(torch.arange(4), 2, torch.tensor([[-1], [2]]))
    with pytest.raises(ValueError, match="not generated before"):
        Layout(torch.arange(4), 2, torch.tensor([[0], [1]]))


def test_the_layer_carries_a_2d_layout():
    layout, sees = blocks_2d()
    layer, x, rotary = attention_layer(layout)
    expected = dense(layer, x, rotary, sees)
    torch.testing.assert_close(layer(x, rotary), expected, rtol=1e-9, atol=1e-9)
    for prefix in (0, 16, 37):
        actual = through_cache(layer, x, rotary, prefix)
        torch.testing.assert_close(actual, expected[:, prefix:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("task", ["class", "sr"])
def test_the_model_carries_a_2d_layout(monkeypatch, task):
    layout, _ = blocks_2d()
    monkeypatch.setattr("imtx.model.build_layout", lambda config: layout)
    model = small("dmol", task)
    assert torch.equal(pixel_order(model), layout.order) and layout.order[4] == SIZE

    pixels, condition = pictures(2), conditions(model, 2)
    torch.testing.assert_close(stepwise(model, pixels, **condition), model(pixels, **condition), rtol=1e-9, atol=1e-9)
    *_, last = sample(model, [1, 2], **condition, given=pixels, given_pixels=20)
    assert torch.equal(last.pixels, draw_naively(model, [1, 2], given=pixels, given_pixels=20, **condition))

    before = pictures(1).repeat(64, 1, 1, 1)
    after = before.clone()
    after.view(64, 64, 3)[torch.arange(64), layout.order] += 100
    same = select(condition, [0] * 64)
    moved = (model(before, **same) != model(after, **same)).any(dim=2)  # (changed step, step)
    assert not moved.tril().any()
    assert moved[:-1].any(dim=1).all()


# ---- the stem's neighbourhood -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raster", "2d"])
def test_neighbours_are_generated_before_and_lie_near(output, kind):
    config = small_config(output, "class")
    layout = build_layout(config) if kind == "raster" else blocks_2d()[0]
    if kind == "2d" and output == "categorical":
        colours = (layout.order[:, None] * 3 + torch.arange(3)).flatten()
        layout = Layout(colours, 3 * layout.query_block, torch.full((4, 0), -1))
    table, rank = neighbour_table(config, layout), layout.rank
    near, before = 3 * len(NEIGHBOURS), 3 * len(NEIGHBOURS) + 3
    assert table.shape == (config.positions, before + (3 if output == "categorical" else 0))
    for step, row in enumerate(table.tolist()):
        here = int(layout.order[step]) // config.channels
        for place, sub_pixel in enumerate(row):
            if sub_pixel < 0:
                continue
            position = sub_pixel if output == "categorical" else sub_pixel // 3
            assert rank[position] < step
            if near <= place < before:  # the pixel generated last, wherever it lies
                last = int(layout.order[(step // config.channels - 1) * config.channels]) // config.channels
                assert sub_pixel == last * 3 + place % 3
                continue
            (row_there, column_there), (row_here, column_here) = divmod(sub_pixel // 3, SIZE), divmod(here, SIZE)
            assert abs(row_there - row_here) <= 2 and abs(column_there - column_here) <= 2
            wanted = NEIGHBOURS[place // 3] if place < near else (0, 0)
            target = row_here + wanted[0], column_here + wanted[1]
            there = target[0] * SIZE + target[1]
            if all(0 <= t < SIZE for t in target) and rank[there * config.channels] < step:
                assert sub_pixel == there * 3 + place % 3  # a neighbour that exists stands in its own place


def test_the_first_step_has_no_neighbours(output):
    config = small_config(output, "class")
    assert (neighbour_table(config, build_layout(config))[0] == -1).all()
