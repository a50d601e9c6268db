"""The whole step as one compiled function: embedding, blocks through the cache, output, draw. It follows imtx/model.py.

The arrays are those of `weights.py`; P positions, D features of a head.
"""

import numpy as np

from .arithmetic import add_product, add_products, copy, exponentials, kernel, layer_norm, relu, rms_norm, swiglu
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
        copy(weights.stem_bias, x)
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
            copy(weights.predictor_bias, state.guess[n])
            add_product(state.inputs[n], weights.predictor, state.guess[n], len(weights.predictor), 3)


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
def before_layer(modern, x, norm, normed):
    """normed (N, d) = the input of a layer: a modern block normalises before it; norm: (2, d)."""
    for n in range(len(x)):
        if modern:
            rms_norm(x[n], norm[0], normed[n], 0, len(x[n]))
        else:
            copy(x[n], normed[n])


@kernel
def after_layer(modern, x, norm):
    """The paper's block normalises after the sum."""
    if not modern:
        for n in range(len(x)):
            layer_norm(x[n], norm[0], norm[1], len(x[n]))


@kernel
def turn(x, start, heads, gain, cos, sin):
    """Queries or keys of all heads, which lie in `x` from `start` on, normalised and rotated; cos, sin: (D / 2,)."""
    half = len(cos)
    for first in range(start, start + heads * 2 * half, 2 * half):
        rms_norm(x, gain, x, first, 2 * half)
        for i in range(half):
            a, b = x[first + i], x[first + half + i]
            x[first + i] = a * cos[i] - b * sin[i]
            x[first + half + i] = a * sin[i] + b * cos[i]


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
    x, normed, modern, norm = state.x, state.normed, shape.embedding == MODERN, weights.norms[layer, 0]
    before_layer(modern, x, norm, normed)
    projected, heads = state.projected, shape.heads
    width = state.window_keys.shape[3]
    inner = heads * width
    projected[:] = 0
    add_products(normed, weights.qkv[layer], projected)
    block, inside = step // shape.query_block, step % shape.query_block
    last = weights.memory_length[block] + inside  # this step's place in the window
    scores, gains, cos, sin = state.scores, weights.qk_gains[layer], weights.cos[step], weights.sin[step]
    for n in range(len(projected)):
        if inside == 0:
            gather_memory(weights, state, layer, n, block)
        new, seen = projected[n], state.attended[n]
        if modern:
            turn(new, 0, heads, gains[0], cos, sin)
            turn(new, inner, heads, gains[1], cos, sin)
        keys, values = state.keys[layer, n, step], state.values[layer, n, step]
        for i in range(inner):
            keys[i], values[i] = new[inner + i], new[2 * inner + i]
        window_keys, window_values = state.window_keys[layer, n], state.window_values[layer, n]
        for head in range(heads):
            first = head * width
            for i in range(width):
                window_keys[head, i, last] = keys[first + i]
                window_values[head, last, i] = values[first + i]
            own = slice(first, first + width)
            attend(new[own], window_keys[head], window_values[head], last + 1, scores, seen[own])
    add_products(state.attended, weights.out[layer], x)
    after_layer(modern, x, norm)


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
    x, normed, modern, norm = state.x, state.normed, shape.embedding == MODERN, weights.norms[layer, 1]
    before_layer(modern, x, norm, normed)
    queries, heads, width = state.queries, shape.heads, state.source_keys.shape[3]
    queries[:] = 0
    add_products(normed, weights.source_q[layer], queries)
    scores, gain, cos, sin = state.scores, weights.qk_gains[layer, 2], weights.cos[step], weights.sin[step]
    for n in range(len(queries)):
        if modern:
            turn(queries[n], 0, heads, gain, cos, sin)
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            keys, values = state.source_keys[layer, n, head], state.source_values[layer, n, head]
            attend(queries[n, own], keys, values, keys.shape[1], scores, state.attended[n, own])
    add_products(state.attended, weights.source_out[layer], x)
    after_layer(modern, x, norm)


@kernel
def feed_forward(shape, weights, state, layer):
    x, normed, modern, norm = state.x, state.normed, shape.embedding == MODERN, weights.norms[layer, 2]
    before_layer(modern, x, norm, normed)
    inner, up, up_bias, down_bias = state.inner, weights.up[layer], weights.up_bias[layer], weights.down_bias[layer]
    for n in range(len(x)):
        for i in range(len(up_bias)):
            inner[n, i] = up_bias[i]
    add_products(normed, up, inner)
    for n in range(len(x)):
        if modern:
            swiglu(inner[n], len(up_bias) // 2)
        else:
            relu(inner[n], len(up_bias))
        for i in range(len(down_bias)):
            x[n, i] += down_bias[i]
    add_products(inner, weights.down[layer], x)
    after_layer(modern, x, norm)


@kernel
def output(shape, weights, state):
    """state.params of the step. The modern family normalises once more, the paper's blocks end in a norm."""
    x, normed, params = state.x, state.normed, state.params
    for n in range(len(x)):
        if shape.embedding == MODERN:
            rms_norm(x[n], weights.last_gain, normed[n], 0, len(x[n]))
        else:
            copy(x[n], normed[n])
        copy(weights.head_bias, params[n])
    add_products(normed, weights.head, params)
