"""The whole step as one compiled function: embedding, blocks through the cache, output, draw. It follows imtx/model.py.

One thread calls it or, for a few pictures, several at once. They share out the parts of each block and do the little rest each
for itself, so that all have the same x and come to the same pixels. What the parts make is added up in one order, whoever
made it: a picture is the same, to the last bit, with any number of threads.

The arrays are those of `weights.py`; P positions, D features of a head. `own` is the scratch memory of the thread.
"""

import numpy as np

from .arithmetic import (
    add_product, add_products, copy, exponentials, inlined, kernel, layer_norm, over_rms, relu, rms_norm, swiglu,
)
from .draws import draw_level, draw_pixel, guide
from .meeting import meet
from .weights import MODERN, PAPER_LEVELS, PAPER_PIXELS


@kernel
def advance(shape, weights, state, own, lane, lanes, start, stop, known, temperature, guidance):
    """Draws the positions of the steps start..stop-1 of all images; those of steps before `known` are given already.

    lane: this thread's number among the `lanes` that make the same call.
    """
    layers, source = len(weights.qkv), len(weights.source_q) > 0
    phase = start * layers * (3 if source else 2)  # of the meetings
    for step in range(start, stop):
        embed(shape, weights, state, own, step)
        for layer in range(layers):
            before_layer(shape, own, weights.norms[layer, 0])
            for part in range(lane, weights.qkv.shape[1], lanes):
                attend_to_window(shape, weights, state, own, layer, part, step, state.made[phase % 2, part])
            phase += 1
            after_layer(shape, state, own, weights.norms[layer, 0], lane, lanes, phase)
            if source:
                before_layer(shape, own, weights.norms[layer, 1])
                for part in range(lane, weights.qkv.shape[1], lanes):
                    attend_to_source(shape, weights, state, own, layer, part, step, state.made[phase % 2, part])
                phase += 1
                after_layer(shape, state, own, weights.norms[layer, 1], lane, lanes, phase)
            before_layer(shape, own, weights.norms[layer, 2])
            for part in range(lane, weights.qkv.shape[1], lanes):
                feed_forward(shape, weights, own, layer, part, state.made[phase % 2, part])
            phase += 1
            add_bias(weights.down_bias[layer], own.x)
            after_layer(shape, state, own, weights.norms[layer, 2], lane, lanes, phase)
        if step >= known:
            output(shape, weights, own)
            draw(shape, weights, state, own, step, temperature, guidance)


# ---- the first layer's input ------------------------------------------------------------------------------------


@inlined
def embed(shape, weights, state, own, step):
    half, wide = np.float32((shape.levels - 1) / 2), len(own.x[0])
    seen = weights.seen[step]
    for n in range(len(state.pixels)):
        pixels, x, inputs = state.pixels[n], own.x[n], own.inputs[n]
        copy(weights.stem_bias, x)
        if shape.embedding == PAPER_LEVELS:
            row = weights.stem[pixels[seen[0]] + shape.levels * (seen[0] % 3)]  # seen -1, the first step's: set to 0 below
            for i in range(wide):
                x[i] = row[i]
        else:
            for i in range(len(seen)):
                inputs[i] = np.float32(pixels[seen[i]]) / half - np.float32(1) if seen[i] >= 0 else np.float32(0)
        if shape.embedding == MODERN and weights.cells.shape[2]:
            add_source_inputs(weights, state, own, n, step, half)
    if shape.embedding != PAPER_LEVELS:
        add_products(own.inputs, weights.stem, own.x)
    for n in range(len(state.pixels)):
        x = own.x[n]
        if shape.embedding == PAPER_PIXELS:
            relu(x, wide)
        if shape.embedding != MODERN and seen[0] < 0:  # the paper's first step has nothing before it
            x[:] = 0
        for i in range(wide):
            x[i] += weights.place[step, i] + state.label[n, i]
        if len(weights.predictor):
            guess_pixel(weights, own.inputs[n], own.guess[n])


@kernel
def guess_pixel(weights, inputs, guess):
    """guess (3,) = where the mixture's means start from; inputs: what the step has seen.

    In float64: where a mixture's scales are at their floor, the last bit of a mean is 1e-4 nats.
    """
    for colour in range(3):
        total = np.float64(weights.predictor_bias[colour])
        for i in range(len(weights.predictor)):
            total += np.float64(inputs[i]) * np.float64(weights.predictor[i, colour])
        guess[colour] = total


@inlined
def add_source_inputs(weights, state, own, n, step, half):
    """What the source says of this step's pixel, behind the colours nearby: itself, and what is left to draw under it."""
    inputs, first = own.inputs[n], weights.seen.shape[1]
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


@inlined
def before_layer(shape, own, norm):
    """own.normed = the input of a sub-layer: a modern block normalises before it; norm: (2, d)."""
    for n in range(len(own.x)):
        if shape.embedding == MODERN:
            rms_norm(own.x[n], norm[0], own.normed[n])
        else:
            copy(own.x[n], own.normed[n])


@inlined
def after_layer(shape, state, own, norm, lane, lanes, phase):
    """x += what the parts have made, once all have; the paper's block normalises after the sum."""
    meet(state.arrived, lane, lanes, phase)
    made = state.made[(phase - 1) % 2]
    for n in range(len(own.x)):
        for part in range(len(made)):
            add(made[part, n], own.x[n])
        if shape.embedding != MODERN:
            layer_norm(own.x[n], norm[0], norm[1], len(own.x[n]))


@kernel
def add(x, y):
    """y += x"""
    for i in range(len(y)):
        y[i] += x[i]


@kernel
def turn(x, start, heads, gain, cos, sin):
    """Queries or keys of all heads, which lie in `x` from `start` on, normalised and rotated; cos, sin: (D / 2,)."""
    half = len(cos)
    for first in range(start, start + heads * 2 * half, 2 * half):
        scale = over_rms(x, first, 2 * half)
        for i in range(half):
            a, b = x[first + i] * scale * gain[i], x[first + half + i] * scale * gain[half + i]
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


@inlined
def attend_to_window(shape, weights, state, own, layer, part, step, made):
    """Local self-attention of one step (imtx/attention.py: LocalSelfAttention.step and Cache), of a part's heads."""
    projected, heads, width = own.projected, shape.heads, state.window_keys.shape[4]
    inner = heads * width
    projected[:] = 0
    add_products(own.normed, weights.qkv[layer, part], projected)
    block, inside = step // shape.query_block, step % shape.query_block
    last = weights.memory_length[block] + inside  # this step's place in the window
    gains, cos, sin = weights.qk_gains[layer], weights.cos[step], weights.sin[step]
    for n in range(len(projected)):
        if inside == 0:
            gather_memory(weights, state, layer, n, part, block)
        new, seen = projected[n], own.attended[n]
        if shape.embedding == MODERN:
            turn(new, 0, heads, gains[0], cos, sin)
            turn(new, inner, heads, gains[1], cos, sin)
        keys, values = state.keys[layer, n, part, step], state.values[layer, n, part, step]
        for i in range(inner):
            keys[i], values[i] = new[inner + i], new[2 * inner + i]
        window_keys, window_values = state.window_keys[layer, n, part], state.window_values[layer, n, part]
        for head in range(heads):
            first = head * width
            for i in range(width):
                window_keys[head, i, last] = keys[first + i]
                window_values[head, last, i] = values[first + i]
            mine = slice(first, first + width)
            attend(new[mine], window_keys[head], window_values[head], last + 1, own.scores, seen[mine])
    made[:] = 0
    add_products(own.attended, weights.out[layer, part], made)


@inlined
def gather_memory(weights, state, layer, n, part, block):
    """The memory block of a query block that begins: its steps' keys and values, to the front of the window."""
    steps = weights.memory[block, : weights.memory_length[block]]
    keys, values = state.keys[layer, n, part], state.values[layer, n, part]  # (P, H D)
    heads, width = state.window_keys.shape[3:5]
    for head in range(heads):
        window_keys, window_values = state.window_keys[layer, n, part, head], state.window_values[layer, n, part, head]
        for place in range(len(steps)):
            for i in range(width):
                window_keys[i, place] = keys[steps[place], head * width + i]
                window_values[place, i] = values[steps[place], head * width + i]


@inlined
def attend_to_source(shape, weights, state, own, layer, part, step, made):
    """Attention to the encoded source, whose keys and values are fixed, of a part's heads."""
    queries, heads, width = own.queries, shape.heads, state.source_keys.shape[4]
    queries[:] = 0
    add_products(own.normed, weights.source_q[layer, part], queries)
    gain, cos, sin = weights.qk_gains[layer, 2], weights.cos[step], weights.sin[step]
    for n in range(len(queries)):
        if shape.embedding == MODERN:
            turn(queries[n], 0, heads, gain, cos, sin)
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            keys, values = state.source_keys[layer, n, part, head], state.source_values[layer, n, part, head]
            attend(queries[n, mine], keys, values, keys.shape[1], own.scores, own.attended[n, mine])
    made[:] = 0
    add_products(own.attended, weights.source_out[layer, part], made)


@inlined
def feed_forward(shape, weights, own, layer, part, made):
    """Of a part's hidden features."""
    inner, up, up_bias, down = own.inner, weights.up[layer, part], weights.up_bias[layer, part], weights.down[layer, part]
    for n in range(len(inner)):
        copy(up_bias, inner[n])
    add_products(own.normed, up, inner)
    for n in range(len(inner)):
        if shape.embedding == MODERN:
            swiglu(inner[n], len(down))
        else:
            relu(inner[n], len(down))
    made[:] = 0
    add_products(inner, down, made)


@kernel
def add_bias(bias, x):
    for n in range(len(x)):
        add(bias, x[n])


# ---- the output -------------------------------------------------------------------------------------------------


@inlined
def output(shape, weights, own):
    """own.params of the step. The modern family normalises once more, the paper's blocks end in a norm."""
    for n in range(len(own.x)):
        if shape.embedding == MODERN:
            rms_norm(own.x[n], weights.last_gain, own.normed[n])
        else:
            copy(own.x[n], own.normed[n])
        copy(weights.head_bias, own.params[n])
    add_products(own.normed, weights.head, own.params)


@inlined
def draw(shape, weights, state, own, step, temperature, guidance):
    """The step's colours, into state.pixels; with guidance, of images that are there twice."""
    place, wide, images = weights.order[step], 3 // shape.channels, len(state.uniforms)
    guided = len(own.params) > images
    for n in range(images):
        if guided:
            guide(own.params[n], own.params[images + n], guidance)
        colours = state.pixels[n, place * wide : (place + 1) * wide]
        if shape.dmol:
            draw_pixel(own.params[n], own.guess[n], shape.levels, state.uniforms[n, step], temperature, own.scores, colours)
        else:
            draw_level(own.params[n], state.uniforms[n, step], temperature, own.scores, colours)
        if guided:
            copy(colours, state.pixels[images + n, place * wide : (place + 1) * wide])
