"""Exactness, shown: every family x layout x output x task against slow versions and against code from elsewhere.

One table. Each row is a small model in float64 whose every weight matters, on which parallel forward, cached step and
sampler must agree with `references.py`, and with each other.
"""

import itertools

import numpy as np
import pytest
import torch
from local_attention import LocalMHA

from conftest import conditions, draw_naively, moved, pictures_for, select, small, stepwise
from imtx import dmol, draw, pixel_order
from imtx.attention import LocalSelfAttention
from imtx.layout import local_1d
from references import dense_attention, dmol_log_prob, generation_order, sees, torch_layer

EXACTLY = dict(rtol=1e-9, atol=1e-9)
SINUSOID, LEARNED = (dict(family="paper", position_encoding=encoding) for encoding in ("sinusoid", "learned"))


def rectangles(query_block, memory_block):
    return dict(layout="2d", query_block=query_block, memory_block=memory_block)


def strips(query_block, memory_block):
    return dict(layout="1d", query_block=query_block, memory_block=memory_block)


# ---- the table: output, task, and what else is not as in `small` --------------------------------------------

FAMILIES = {
    ("modern", "dmol"): {}, ("modern", "categorical"): {}, ("paper", "dmol"): LEARNED, ("paper", "categorical"): SINUSOID
}
BLOCKS = {  # of 4 x 4 pixels
    ("1d", "dmol"): strips(4, 4), ("1d", "categorical"): strips(12, 12),
    ("2d", "dmol"): rectangles((2, 2), (1, 1)), ("2d", "categorical"): rectangles((2, 2), (1, 1)),
}
LAYOUTS, OUTPUTS, TASKS = ("1d", "2d"), ("dmol", "categorical"), ("class", "unconditional", "sr")
EVERY = list(itertools.product(("modern", "paper"), LAYOUTS, OUTPUTS, TASKS))
TABLE = {
    f"{family}-{layout}-{output}-{task}": (output, task, FAMILIES[family, output] | BLOCKS[layout, output])
    for family, layout, output, task in EVERY
}
TABLE |= {
    # memory block from nothing to the whole image; query block from one position to the whole image
    "1d memory 0": ("dmol", "class", strips(8, 0)),
    "1d memory 0, categorical": ("categorical", "sr", SINUSOID | strips(16, 0)),
    "1d memory shorter than the query block": ("dmol", "sr", LEARNED | strips(8, 3)),
    "1d memory longer, both cut through pixels": ("categorical", "class", strips(16, 23)),
    "1d memory = the whole image": ("dmol", "sr", strips(4, 16)),
    "1d memory = the whole image, categorical": ("categorical", "class", SINUSOID | strips(6, 48)),
    "1d query block of one pixel": ("dmol", "unconditional", SINUSOID | strips(1, 7)),
    "1d query block of one sub-pixel": ("categorical", "unconditional", strips(1, 10)),
    "1d query block = the whole image": ("dmol", "class", strips(16, 16)),
    "2d flange 0": ("dmol", "class", rectangles((2, 2), (0, 0))),
    "2d flange 0, categorical": ("categorical", "sr", SINUSOID | rectangles((2, 4), (0, 0))),
    "2d flange of rows alone": ("categorical", "class", rectangles((1, 2), (2, 0))),
    "2d flange of columns alone": ("dmol", "sr", rectangles((2, 1), (0, 2))),
    "2d flange wider than the rest of the image": ("dmol", "class", LEARNED | rectangles((2, 2), (3, 3))),
    "2d flange = the whole image": ("categorical", "unconditional", SINUSOID | rectangles((2, 2), (4, 4))),
    "2d query block of one pixel": ("dmol", "unconditional", rectangles((1, 1), (1, 1))),
    "2d query block = the whole image": ("categorical", "class", SINUSOID | rectangles((4, 4), (2, 2))),
    # 6 x 6 pixels: more than two rectangles side by side
    "2d flange larger than a block": ("dmol", "sr", dict(image_size=6) | rectangles((2, 2), (3, 3))),
    "2d wide rectangles": ("dmol", "class", dict(image_size=6) | SINUSOID | rectangles((2, 3), (1, 2))),
    "2d tall rectangles": ("dmol", "sr", dict(image_size=6) | LEARNED | rectangles((3, 2), (2, 1))),
    "2d small rectangles, categorical": ("categorical", "sr", dict(image_size=6) | SINUSOID | rectangles((2, 1), (2, 3))),
    # other sizes
    "attention wider than the model": ("dmol", "class", dict(attention_width=64) | strips(4, 6)),
    "attention narrower than the model": ("categorical", "sr", LEARNED | dict(attention_width=16) | strips(12, 18)),
    "8 levels": ("dmol", "sr", dict(levels=8) | SINUSOID | rectangles((2, 2), (1, 2))),
    "8 levels, categorical": ("categorical", "sr", dict(levels=8) | strips(8, 12)),
    "3 levels, categorical": ("categorical", "class", dict(levels=3) | LEARNED | rectangles((1, 4), (1, 1))),
}


def build(name, **changes):
    output, task, fields = TABLE[name]
    return small(output, task, **(dict(image_size=4) | fields | changes))


@pytest.fixture(params=TABLE)
def model(request):
    return build(request.param)


def inside_a_block(model):
    """Pixels about half of the image that end inside a query block, where a query block is longer than a pixel."""
    block, channels, half = model.layout.query_block, model.config.channels, model.config.image_size**2 // 2
    return next((n for n in range(half, 0, -1) if n * channels % block), half)


def test_the_generation_order_is_the_definition(model):
    size, channels = model.config.image_size, model.config.channels
    places = generation_order(model.config)
    assert model.layout.order.tolist() == [(row * size + column) * channels + channel for row, column, channel in places]
    assert pixel_order(model).tolist() == [row * size + column for row, column, channel in places if channel == 0]


def test_the_parallel_forward_is_dense_attention_with_a_mask(model, monkeypatch):
    pixels, condition, mask = pictures_for(model, 3), conditions(model, 3), sees(model.config)
    parallel = model(pixels, **condition)
    dense = lambda layer, x, rotary, cache: dense_attention(layer, x, rotary, mask)
    monkeypatch.setattr(LocalSelfAttention, "forward", dense)
    torch.testing.assert_close(parallel, model(pixels, **condition), **EXACTLY)


def test_a_cached_step_is_the_parallel_forward(model):
    pixels, condition = pictures_for(model, 2), conditions(model, 2)
    parallel, steps = model(pixels, **condition), stepwise(model, pixels, **condition)
    torch.testing.assert_close(steps, parallel, **EXACTLY)
    start = inside_a_block(model) * model.config.channels
    torch.testing.assert_close(stepwise(model, pixels, start, **condition), parallel[:, start:], **EXACTLY)

    total = torch.zeros(2, dtype=torch.float64)
    for step, position in enumerate(model.layout.order.tolist()):
        total += model.output.log_prob(steps[:, step], pixels.view(2, model.config.positions, -1)[:, position])
    torch.testing.assert_close(model.log_prob(pixels, **condition).sum(dim=1), total, **EXACTLY)


def test_sampling_through_the_cache_changes_no_pixel(model):
    condition = conditions(model, 2)
    assert torch.equal(draw(model, [0, 2**32 - 1], **condition), draw_naively(model, [0, 2**32 - 1], **condition))
    options = dict(given=pictures_for(model, 2), given_pixels=inside_a_block(model), temperature=0.6)
    assert torch.equal(draw(model, [1, 2], **options, **condition), draw_naively(model, [1, 2], **options, **condition))


def test_a_step_sees_the_one_just_before_it_and_neither_itself_nor_a_later_one(model):
    """Across rows and query blocks too: no position is a blind spot."""
    steps = torch.arange(model.config.positions)
    changes = moved(model, steps)  # (changed step, step)
    assert not changes.tril().any(), f"steps that see too much: {changes.tril().nonzero()[:, 1].tolist()}"
    assert changes[steps[:-1], steps[1:]].all(), f"blind spots: {(~changes[steps[:-1], steps[1:]]).nonzero().tolist()}"


def test_gradients_reach_every_weight(model):
    (-model.requires_grad_(True).log_prob(pictures_for(model, 3), **conditions(model, 3)).mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


# ---- probabilities ------------------------------------------------------------------------------------------

TOYS = [(name, 2, 2) for name in list(TABLE)[: len(EVERY)]]  # 2 x 2 pixels of 2 levels
TOYS += [(name, 1, 16) for name in ("modern-2d-dmol-class", "paper-1d-categorical-unconditional")]
TOY_BLOCKS = {  # by layout and positions: strips that cut through pixels, rectangles one above the other
    ("1d", 4): (2, 1), ("1d", 12): (4, 3), ("1d", 3): (1, 1), ("2d", 4): ((2, 1), (1, 1)), ("2d", 12): ((2, 1), (1, 1)),
    ("2d", 1): ((1, 1), (0, 0)),
}


@pytest.mark.parametrize("name, size, levels", TOYS)
def test_the_probabilities_of_all_4096_images_sum_to_one(name, size, levels):
    output, task, fields = TABLE[name]
    positions = size**2 * (1 if output == "dmol" else 3)
    query_block, memory_block = TOY_BLOCKS[fields["layout"], positions]
    toy = dict(image_size=size, levels=levels, query_block=query_block, memory_block=memory_block, width=16)
    model = build(name, **toy, **(dict(source_size=1) if task == "sr" else {}))
    images = torch.tensor(list(itertools.product(range(levels), repeat=3 * size**2)), dtype=torch.uint8)
    assert len(images) == 4096
    for i in range(2):  # a label or source each
        condition = select(conditions(model, 2), [i] * 4096)
        log_prob = model.log_prob(images.view(-1, size, size, 3), **condition).sum(dim=1)
        assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-9)
        assert log_prob.std() > 0.1  # not the uniform distribution, which would sum to 1 for no merit


# ---- one shift, in generation order -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"paper-{layout}-{output}-class" for layout in LAYOUTS for output in OUTPUTS])
def test_a_shift_inside_query_blocks_would_lose_the_last_position_of_each(name):
    """tensor2tensor's 2D layout shifts each query block on its own; ours is one shift across all of them."""
    model = build(name)
    layout, width = model.layout, 3 // model.config.channels
    before = model.embedding.before  # (P, sub-pixels a position)
    everything = [position * width + colour for position in layout.order.tolist() for colour in range(width)]
    assert before.flatten().tolist() == [-1] * width + everything[:-width]  # each position but the last exactly once

    last = torch.arange(layout.query_block - 1, len(layout.order) - 1, layout.query_block)  # of each block but the last
    assert moved(model, last).any(dim=1).all()
    inside = before.clone()
    inside[:: layout.query_block] = -1
    lost = set(everything[:-width]) - set(inside.flatten().tolist())
    assert lost == {position * width + colour for position in layout.order[last].tolist() for colour in range(width)}
    model.embedding.before = inside
    assert not moved(model, last).any()  # whatever they are, nothing that follows depends on them


# ---- code from elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("l_q, blocks_back", [(8, 1), (16, 1), (48, 1), (8, 0), (4, 3)])
def test_1d_attention_is_that_of_lucidrains_local_attention(l_q, blocks_back):
    width, heads, head_width, positions = 24, 3, 16, 48
    theirs = LocalMHA(
        dim=width, window_size=l_q, heads=heads, dim_head=head_width, causal=True, look_backward=blocks_back,
        exact_windowsize=False, use_rotary_pos_emb=False,
    ).double().eval()
    layout = local_1d(positions, l_q, blocks_back * l_q)
    ours = LocalSelfAttention(width, heads * head_width, heads, layout, dropout=0.0, qk_norm=False).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mine, other in ((ours.qkv, theirs.to_qkv), (ours.out, theirs.to_out)):
            mine.weight.copy_(0.3 * torch.randn(mine.weight.shape, generator=generator))
            other.weight.copy_(mine.weight)
        x = torch.randn(2, positions, width, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(ours(x, None), theirs(x), **EXACTLY)


@pytest.mark.parametrize("name", [name for name in TABLE if name.startswith("paper") and name.endswith("-sr")])
def test_the_papers_model_is_made_of_torchs_transformer_layers(name):
    """Between the embedding and the output layer, and with the mask of local attention."""
    model = build(name)
    pixels, condition = pictures_for(model, 2), conditions(model, 2)
    source = model.source_embedding(condition["sources"])
    for block in model.encoder:
        source = torch_layer(block, model.config)(source)
    x, _ = model.embed(pixels.flatten(1), model.context(2, None, **condition), slice(None))
    for block in model.decoder:
        x = torch_layer(block, model.config)(x, source, tgt_mask=~sees(model.config))
    torch.testing.assert_close(model(pixels, **condition), model.head(x), **EXACTLY)


@pytest.mark.parametrize("levels", [256, 8])
def test_the_mixture_is_the_formula_in_numpy(levels):
    """10 logistics, half of them narrow, some below the least scale; half of the colours lie where the mixture does."""
    k, pixels, generator = 10, 2000, np.random.default_rng(0)
    logits, means = generator.normal(0, 2, (pixels, k)), generator.normal(0, 0.5, (pixels, 3 * k))
    wide, narrow = (generator.uniform(*range_, (pixels, 3 * k)) for range_ in ((-3, 1), (-9, -4)))
    log_scales = np.where(np.arange(3 * k) % 2, wide, narrow)  # every second component, in all three colours
    params = np.concatenate([logits, means, log_scales, generator.normal(0, 1, (pixels, 3 * k))], axis=1)
    colours = generator.integers(0, levels, (pixels, 3))
    uniforms = torch.from_numpy(generator.random((pixels // 2, 4)))
    colours[::2] = dmol.draw(torch.from_numpy(params[::2]), uniforms, levels).numpy()
    for channel, end in itertools.product(range(3), (0, levels - 1)):
        colours[10 * channel + (5 if end else 0) :: 50, channel] = end
    ours = dmol.log_prob(torch.from_numpy(params), torch.from_numpy(colours), levels).numpy()
    np.testing.assert_allclose(ours, dmol_log_prob(params, colours, levels), **EXACTLY)


@pytest.mark.parametrize("name", ["modern-2d-dmol-class", "paper-1d-dmol-sr"])
def test_the_likelihood_of_an_image_is_the_formula_on_its_pixels(name):
    model = build(name, mixtures=10)
    pixels, condition = pictures_for(model, 2), conditions(model, 2)
    params, log_prob = model(pixels, **condition).flatten(0, 1), model.log_prob(pixels, **condition).flatten()
    colours = [image[row, column].tolist() for image in pixels for row, column, _ in generation_order(model.config)]
    np.testing.assert_allclose(log_prob.numpy(), dmol_log_prob(params.numpy(), np.array(colours)), **EXACTLY)
