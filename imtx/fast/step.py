"""The whole step as one compiled function: embedding, blocks through the cache, output, draw. It follows imtx/model.py.

The arrays are those of `weights.py`; P positions, D features of a head.
"""

import numpy as np

from .arithmetic import (
    add_product, add_products, exponentials, kernel, layer_norm, relu, rms_norm, swiglu,
)
from .draws import draw_level, draw_pixel
from .weights import MODERN, PAPER_LEVELS, PAPER_PIXELS


@kernel
def advance(shape, weights, state, start, stop, known, temperature):
    """Draws the positions of the steps start..stop-1 of all images; those of steps before `known` are given already."""
    images = len(state.pixels)
    for step in range(start, stop):
        embed(shape, weights, state, step)
        for layer in range(len(weights.qkv)):
            attend_to_window(shape, weights, state, layer, step)
            if len(weights.source_q):
                attend_to_source(shape, weights, state, layer, step)
            feed_forward(shape, weights, state, layer)
        if step < known:
            continue
        output(shape, weights, state)
        place, wide = weights.order[step], 3 // shape.channels
        for n in range(images):
            colours = state.pixels[n, place * wide : (place + 1) * wide]
            if shape.dmol:
                draw_pixel(state.params[n], state.guess[n], shape.levels, state.uniforms[n, step], temperature, state.scores, colours)
            else:
                draw_level(state.params[n], state.uniforms[n, step], temperature, state.scores, colours)


# ---- the first layer's input ------------------------------------------------------------------------------------


@kernel
def embed(shape, weights, state, step):
    half, wide = np.float32((shape.levels - 1) / 2), len(state.x[0])
    seen = weights.seen[step]
    for n in range(len(state.pixels)):
        pixels, x, inputs = state.pixels[n], state.x[n], state.inputs[n]
        x[:] = weights.stem_bias
        if shape.embedding == PAPER_LEVELS:
            row = weights.stem[pixels[seen[0]] + shape.levels * (seen[0] % 3)]
            for i in range(wide):
                x[i] = row[i]
        else:
            for i in range(len(seen)):
                inputs[i] = np.float32(pixels[seen[i]]) / half - np.float32(1) if seen[i] >= 0 else np.float32(0)
        if shape.embedding == MODERN and weights.cells.shape[2]:
            add_source_inputs(weights, state, n, step, half)
    if shape.embedding != PAPER_LEVELS:
        add_products(state.inputs, weights.stem, state.x)
    for n in range(len(state.pixels)):
        x = state.x[n]
        if shape.embedding == PAPER_PIXELS:
            relu(x, wide)
        if shape.embedding != MODERN and seen[0] < 0:  # the paper's first step has nothing before it
            x[:] = 0
        for i in range(wide):
            x[i] += weights.place[step, i] + state.label[n, i]
        if len(weights.predictor):
            state.guess[n, :] = weights.predictor_bias
            add_product(state.inputs[n], weights.predictor, state.guess[n], *weights.predictor.shape)


@kernel
def add_source_inputs(weights, state, n, step, half):
    """What the source says of this step's pixel, behind the colours nearby: itself, and what is left to draw under it."""
    inputs, first = state.inputs[n], weights.seen.shape[1]
    around = state.around[n, step]
    for i in range(len(around)):
        inputs[first + i] = around[i]
    cells = weights.cells[step]  # (3, f f)
    for colour in range(3):
        known, left = np.float32(0), 0
        for i in range(cells.shape[1]):
            if cells[colour, i] >= 0:
                known += np.float32(state.pixels[n, cells[colour, i]]) / half - np.float32(1)
            else:
                left += 1
        inputs[first + len(around) + colour] = (state.sums[n, step, colour] - known) / np.float32(max(left, 1))


# ---- blocks -----------------------------------------------------------------------------------------------------


@kernel
def before_layer(shape, weights, state, layer, which):
    """state.normed = the input of a layer: normalised before it in a modern block, as it is in the paper's."""
    for n in range(len(state.x)):
        if shape.embedding == MODERN:
            rms_norm(state.x[n], weights.norms[layer, which, 0], state.normed[n], 0, len(state.x[n]))
        else:
            state.normed[n, :] = state.x[n]


@kernel
def after_layer(shape, weights, state, layer, which):
    """The paper's block normalises after the sum."""
    if shape.embedding != MODERN:
        for n in range(len(state.x)):
            layer_norm(state.x[n], weights.norms[layer, which, 0], weights.norms[layer, which, 1], len(state.x[n]))


@kernel
def turn(shape, weights, x, start, gain, step):
    """A head's query or key, x[start : start + D]: normalised and rotated, where the family does so."""
    if shape.embedding != MODERN:
        return
    half = weights.cos.shape[1]
    rms_norm(x, gain, x, start, 2 * half)
    for i in range(half):
        a, b, cos, sin = x[start + i], x[start + half + i], weights.cos[step, i], weights.sin[step, i]
        x[start + i] = a * cos - b * sin
        x[start + half + i] = a * sin + b * cos


@kernel
def attend(query, keys, values, count, scores, out):
    """out (D,) = softmax(query keys / sqrt(D)) values; keys (D, count or more), values (count or more, D)."""
    width = len(query)
    scale = np.float32(1) / np.sqrt(np.float32(width))
    for i in range(width):
        query[i] *= scale
    scores[:count] = 0
    add_product(query, keys, scores, width, count)
    share = np.float32(1) / exponentials(scores, count)
    out[:] = 0
    add_product(scores, values, out, count, width)
    for i in range(width):
        out[i] *= share


@kernel
def attend_to_window(shape, weights, state, layer, step):
    """Local self-attention of one step (imtx/attention.py: LocalSelfAttention.step and Cache)."""
    before_layer(shape, weights, state, layer, 0)
    projected, heads = state.projected, shape.heads
    width = state.window_keys.shape[3]
    inner = heads * width
    projected[:] = 0
    add_products(state.normed, weights.qkv[layer], projected)
    block, inside = step // shape.query_block, step % shape.query_block
    last = weights.memory_length[block] + inside  # this step's place in the window
    for n in range(len(projected)):
        if inside == 0:
            gather_memory(weights, state, layer, n, block)
        for head in range(heads):
            turn(shape, weights, projected[n], head * width, weights.qk_gains[layer, 0], step)
            turn(shape, weights, projected[n], inner + head * width, weights.qk_gains[layer, 1], step)
        state.keys[layer, n, step] = projected[n, inner : 2 * inner]
        state.values[layer, n, step] = projected[n, 2 * inner :]
        for head in range(heads):
            keys, values = state.window_keys[layer, n, head], state.window_values[layer, n, head]
            for i in range(width):
                keys[i, last] = projected[n, inner + head * width + i]
                values[last, i] = projected[n, 2 * inner + head * width + i]
            own = slice(head * width, (head + 1) * width)
            attend(projected[n, own], keys, values, last + 1, state.scores, state.attended[n, own])
    add_products(state.attended, weights.out[layer], state.x)
    after_layer(shape, weights, state, layer, 0)


@kernel
def gather_memory(weights, state, layer, n, block):
    """The memory block of a query block that begins: its steps' keys and values, to the front of the window."""
    steps = weights.memory[block, : weights.memory_length[block]]
    keys, values = state.keys[layer, n], state.values[layer, n]  # (P, H D)
    heads, width = state.window_keys.shape[2:4]
    for head in range(heads):
        window_keys, window_values = state.window_keys[layer, n, head], state.window_values[layer, n, head]
        for place in range(len(steps)):
            for i in range(width):
                window_keys[i, place] = keys[steps[place], head * width + i]
                window_values[place, i] = values[steps[place], head * width + i]


@kernel
def attend_to_source(shape, weights, state, layer, step):
    """Attention to the encoded source, whose keys and values are fixed."""
    before_layer(shape, weights, state, layer, 1)
    queries, heads, width = state.queries, shape.heads, state.source_keys.shape[3]
    queries[:] = 0
    add_products(state.normed, weights.source_q[layer], queries)
    for n in range(len(queries)):
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            turn(shape, weights, queries[n], head * width, weights.qk_gains[layer, 2], step)
            keys, values = state.source_keys[layer, n, head], state.source_values[layer, n, head]
            attend(queries[n, own], keys, values, keys.shape[1], state.scores, state.attended[n, own])
    add_products(state.attended, weights.source_out[layer], state.x)
    after_layer(shape, weights, state, layer, 1)


@kernel
def feed_forward(shape, weights, state, layer):
    before_layer(shape, weights, state, layer, 2)
    inner, wide = weights.down.shape[1], state.x.shape[1]
    for n in range(len(state.inner)):
        state.inner[n, :] = weights.up_bias[layer]
    add_products(state.normed, weights.up[layer], state.inner)
    for n in range(len(state.inner)):
        if shape.embedding == MODERN:
            swiglu(state.inner[n], inner)
        else:
            relu(state.inner[n], inner)
        for i in range(wide):
            state.x[n, i] += weights.down_bias[layer, i]
    add_products(state.inner, weights.down[layer], state.x)
    after_layer(shape, weights, state, layer, 2)


@kernel
def output(shape, weights, state):
    """state.params of the step. The modern family normalises once more, the paper's blocks end in a norm."""
    for n in range(len(state.x)):
        if shape.embedding == MODERN:
            rms_norm(state.x[n], weights.last_gain, state.normed[n], 0, len(state.x[n]))
        else:
            state.normed[n, :] = state.x[n]
        state.params[n, :] = weights.head_bias
    add_products(state.normed, weights.head, state.params)
