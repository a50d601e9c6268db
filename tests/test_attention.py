"""Layouts against the definition of local attention, for many sizes, and the tables of what a step looks at directly."""

import itertools

import pytest
import torch

from conftest import SIZE, small_config
from imtx import Config
from imtx.inputs import NEIGHBOURS, neighbour_table
from imtx.layout import Layout, build_layout, run_length
from references import generation_order, sees

# ---- layouts ------------------------------------------------------------------------------------------------

STRIPS = [(8, 8), (8, 0), (8, 5), (8, 12), (8, 48), (4, 9), (16, 3), (48, 0), (48, 48), (1, 1), (1, 7), (1, 0)]
# every rectangle of a 6 x 6 image, with flanges from none to the whole image
RECTANGLES = list(itertools.product((1, 2, 3, 6), repeat=2))
FLANGES = [(0, 0), (0, 2), (3, 0), (1, 1), (2, 5), (6, 6)]


def seen_by_tables(layout):
    """(P, P) bool, step by step: who sees whom, as memory blocks and masks of a layout have it."""
    steps, mask = len(layout.order), layout.mask()
    table = torch.zeros(steps, steps, dtype=torch.bool)
    for query in range(steps):
        block, inside = divmod(query, layout.query_block)
        window = torch.cat([layout.memory[block], torch.arange(layout.query_block) + block * layout.query_block])
        seen = window[mask[block, inside]]
        assert len(seen.unique()) == len(seen) and (seen.diff() > 0).all()  # in order, and none twice
        assert torch.equal(layout.memory_steps(block), seen[: len(seen) - inside - 1])
        table[query, seen] = True
    return table


def seen_by_windows(layout):
    """The same, as attention over all positions works it off."""
    steps, parts = len(layout.order), layout.windows()
    table = torch.zeros(steps, steps, dtype=torch.bool)
    group = torch.arange(steps).view(sum(len(groups) for groups, _, _ in parts), -1)
    for groups, keys, mask in parts:
        for queries, window, seen in zip(group[groups], keys, mask):
            real = window[window >= 0]
            assert (real.diff() > 0).all() and torch.equal(real, window[len(window) - len(real) :])  # fillers in front
            assert seen[:, window >= 0].any(dim=0).all() and not seen[:, window < 0].any()  # no key is there for nothing
            table[queries[:, None], real] = seen[:, window >= 0]
    return table


def assert_runs(layout):
    """Runs as long as `run_length` says make up all windows, and no longer ones do."""
    windows = [keys for _, keys, _ in layout.windows()]

    def made_up(length):
        whole = all(keys.shape[1] % length == 0 for keys in windows)
        runs = [keys[:, ::length, None] // length * length + torch.arange(length) for keys in windows]  # (n, S / r, r)
        return whole and all(torch.equal(run.flatten(1).where(keys >= 0, -1), keys) for run, keys in zip(runs, windows))

    longest = run_length(windows)
    assert made_up(longest) and not any(made_up(longest * times) for times in range(2, len(layout.order) // longest + 1))


def assert_definition(config):
    layout, size = build_layout(config), config.image_size
    order = [(row * size + column) * config.channels + channel for row, column, channel in generation_order(config)]
    assert layout.order.tolist() == order
    assert torch.equal(seen_by_tables(layout), sees(config)), (config.query_block, config.memory_block)
    assert torch.equal(seen_by_windows(layout), sees(config)), (config.query_block, config.memory_block)
    assert_runs(layout)


@pytest.mark.parametrize("query_block, memory_block, groups", [(8, 8, 6), (1, 1, 48), (1, 7, 24), (4, 48, 6)])
def test_query_blocks_share_a_window_where_that_adds_few_pairs(query_block, memory_block, groups):
    config = Config(output="categorical", image_size=4, query_block=query_block, memory_block=memory_block)
    assert sum(len(part) for part, _, _ in build_layout(config).windows()) == groups


@pytest.mark.parametrize("query_block, memory_block", STRIPS)
def test_1d_layout_tables_say_what_the_definition_says(query_block, memory_block):
    assert_definition(Config(output="categorical", image_size=4, query_block=query_block, memory_block=memory_block))


@pytest.mark.parametrize("flange", FLANGES)
def test_2d_layout_tables_say_what_the_definition_says(flange):
    for rectangle in RECTANGLES:
        assert_definition(Config(image_size=6, layout="2d", query_block=rectangle, memory_block=flange))


def test_colours_of_a_2d_layout_are_generated_pixel_by_pixel():
    assert_definition(Config(output="categorical", image_size=4, layout="2d", query_block=(2, 1), memory_block=(1, 2)))


def test_a_memory_block_of_the_whole_image_is_ordinary_causal_attention():
    strips = [dict(query_block=l_q, memory_block=48) for l_q in (1, 8, 48)]
    rectangles = [dict(layout="2d", query_block=block, memory_block=(4, 4)) for block in ((1, 1), (2, 2), (2, 4), (4, 4))]
    for blocks in strips + rectangles:
        layout = build_layout(Config(output="categorical", image_size=4, **blocks))
        assert torch.equal(seen_by_tables(layout), torch.ones(48, 48, dtype=torch.bool).tril()), blocks


def test_a_memory_block_may_not_hold_what_comes_later():
    with pytest.raises(ValueError, match="not generated before"):
        Layout(torch.arange(4), 2, torch.tensor([[-1], [2]]))
    with pytest.raises(ValueError, match="not generated before"):
        Layout(torch.arange(4), 2, torch.tensor([[0], [1]]))


# ---- the stem's neighbourhood -------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [{}, dict(layout="2d", query_block=(4, 4), memory_block=(2, 2))], ids=["1d", "2d"])
def test_neighbours_are_generated_before_and_lie_near(output, blocks):
    config = small_config(output, "class", **blocks)
    layout = build_layout(config)
    table, rank = neighbour_table(config, layout), layout.rank
    near, before = 3 * len(NEIGHBOURS), 3 * len(NEIGHBOURS) + 3
    assert table.shape == (config.positions, before + (3 if output == "categorical" else 0))
    for step, row in enumerate(table.tolist()):
        here = int(layout.order[step]) // config.channels
        for place, sub_pixel in enumerate(row):
            if sub_pixel < 0:  # nothing to see: the first pixel, or a colour of the pixel itself that is still to come
                assert step < config.channels or place - before >= layout.order[step] % 3
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
