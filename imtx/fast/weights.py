"""A model's weights and tables as arrays for the compiled step, and the memory that it works in.

N images, P positions, d width, L decoder blocks, B query blocks with memory blocks of up to M steps, a window of
W = M + query_block steps, S source pixels. Each block is cut into C parts, of H heads with D features and F hidden features
each, whose sums make up what the block adds to x: two threads can take a part each, and one thread both. Matrices are
(in, out). Those of the blocks are uint16 (the upper half of a float32, which is a bfloat16) if no weight loses anything by it,
and float32 otherwise.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..inputs import before_table
from ..model import Context, ImageTransformer
from .buffers import LINE, carve, size_of, together

MOST_PARTS = 2
MODERN, PAPER_PIXELS, PAPER_LEVELS = range(3)  # how a step's input is embedded (imtx/embedding.py)


class Shape(NamedTuple):
    """Whole numbers that loops run over."""

    embedding: int  # MODERN, PAPER_PIXELS or PAPER_LEVELS
    dmol: bool
    levels: int
    channels: int  # positions a pixel
    heads: int  # of a part
    query_block: int


class Weights(NamedTuple):
    order: np.ndarray  # (P,) int64: generation order
    memory: np.ndarray  # (B, M) int64: steps of each memory block, in increasing order
    memory_length: np.ndarray  # (B,) int64: how many of them there are
    cos: np.ndarray  # (P, D / 2) rotary positions; (P, 0) without
    sin: np.ndarray
    seen: np.ndarray  # (P, inputs) int64: sub-pixels that a step's input reads; -1 = nothing
    cells: np.ndarray  # (P, 3, f f) int64: those under the same source pixel, drawn already; (P, 3, 0) without a source
    place: np.ndarray  # (P, d): the input's position encoding
    stem: np.ndarray  # (inputs, d); PAPER_LEVELS: a table (3 levels, d) of channel and level
    stem_bias: np.ndarray  # (d,)
    predictor: np.ndarray  # (inputs, 3) first guess of a pixel; (0, 3) without
    predictor_bias: np.ndarray  # (3,)
    qkv: np.ndarray  # (L, C, d, 3 H D)
    out: np.ndarray  # (L, C, H D, d)
    source_q: np.ndarray  # (L, C, d, H D); L = 0 without a source, as in the next
    source_out: np.ndarray  # (L, C, H D, d)
    up: np.ndarray  # (L, C, d, 2 F) SwiGLU, or (L, C, d, F)
    up_bias: np.ndarray  # (L, C, 2 F) or (L, C, F)
    down: np.ndarray  # (L, C, F, d)
    down_bias: np.ndarray  # (L, d)
    norms: np.ndarray  # (L, 3, 2, d): attention, source attention, feed-forward; gain, bias
    qk_gains: np.ndarray  # (L, 3, D): query, key, query of the source attention
    last_gain: np.ndarray  # (d,)
    head: np.ndarray  # (d, output parameters)
    head_bias: np.ndarray


class State(NamedTuple):
    """A group of images that grow together. With guidance N / 2 are drawn, and there twice: with their labels, then without."""

    pixels: np.ndarray  # (N, sub-pixels) uint8, raster order
    uniforms: np.ndarray  # (N or N / 2, P, draws) float64
    label: np.ndarray  # (N, d): class embedding, zeros without
    around: np.ndarray  # (N, P, 15): what the source says of a pixel; (N, P, 0) without
    sums: np.ndarray  # (N, P, 3): what the pixels under a source pixel add up to
    source_keys: np.ndarray  # (L, N, C, H, D, S), L = 0 without a source
    source_values: np.ndarray  # (L, N, C, H, S, D)
    keys: np.ndarray  # (L, N, C, P, H D): all steps
    values: np.ndarray
    window_keys: np.ndarray  # (L, N, C, H, D, W + 16): what the query block at work sees, laid out for products along steps
    window_values: np.ndarray  # (L, N, C, H, W, D)
    made: np.ndarray  # (2, C, N, d): what the parts of a sub-layer add to x; two, as the next one is made while this is read
    arrived: np.ndarray  # (C, LINE / 8) int64: how far each lane is


class Scratch(NamedTuple):
    """What a thread works in, for as many images."""

    x: np.ndarray  # (N, d)
    normed: np.ndarray  # (N, d)
    inputs: np.ndarray  # (N, inputs)
    guess: np.ndarray  # (N, 3)
    projected: np.ndarray  # (N, 3 H D)
    queries: np.ndarray  # (N, H D): of the source attention
    attended: np.ndarray  # (N, H D)
    inner: np.ndarray  # (N, 2 F) or (N, F)
    scores: np.ndarray  # (W, S or output parameters,): of a head, or the probabilities of a draw
    params: np.ndarray  # (N, output parameters) of the last step, before the temperature; guided in the first half


def pack(model: ImageTransformer) -> tuple[Shape, Weights]:
    """Copies a float32 model on the CPU into arrays, all in one place."""
    config, layout = model.config, model.layout
    halves = config.heads % MOST_PARTS == 0 and config.ffn % MOST_PARTS == 0
    parts = MOST_PARTS if halves else 1
    kind = MODERN if config.family == "modern" else PAPER_PIXELS if config.output == "dmol" else PAPER_LEVELS
    shape = Shape(kind, config.output == "dmol", config.levels, config.channels, config.heads // parts, layout.query_block)
    weights = Weights(**_tables(model), **_embedding(model, kind), **_blocks(model, parts), **_output(model))
    return shape, Weights(*together(weights))


def _tables(model: ImageTransformer) -> dict[str, np.ndarray]:
    layout, positions = model.layout, model.config.positions
    memory = layout.memory.clone()
    lengths = (memory >= 0).sum(dim=1)
    for block in range(layout.blocks):  # -1 to the end; 1D layouts fill up at the front
        memory[block, : lengths[block]] = layout.memory_steps(block)
    rotary = model.rotary(slice(None))
    cos, sin = (np.zeros((positions, 0), np.float32),) * 2 if rotary is None else map(numbers, rotary)
    return dict(order=layout.order.numpy().copy(), memory=memory.numpy(), memory_length=lengths.numpy(), cos=cos, sin=sin)


def _embedding(model: ImageTransformer, kind: int) -> dict[str, np.ndarray]:
    config, embedding = model.config, model.embedding
    found = dict(
        cells=np.zeros((config.positions, 3, 0), np.int64),
        predictor=np.zeros((0, 3), np.float32), predictor_bias=np.zeros(3, np.float32),
    )
    if kind == MODERN:
        place, seen = embedding.row(embedding.step_row) + embedding.column(embedding.step_column), embedding.neighbours
        if embedding.channel is not None:
            place = place + embedding.channel(embedding.step_channel)
        stem, bias = embedding.stem.weight.T, embedding.stem.bias
        if config.source_size:
            found["cells"] = embedding.cells.numpy().copy()
        if config.output == "dmol":
            found |= dict(predictor=numbers(embedding.predictor.weight.T), predictor_bias=numbers(embedding.predictor.bias))
    else:
        place, seen = embedding.place(slice(None)), before_table(config, model.layout)
        if kind == PAPER_PIXELS:
            stem, bias = embedding.colour.pixel.weight.T, embedding.colour.pixel.bias
        else:
            stem, bias = embedding.colour.value.weight * config.width**0.5, torch.zeros(config.width)
    return found | dict(seen=seen.numpy().copy(), place=numbers(place), stem=numbers(stem), stem_bias=numbers(bias))


def _blocks(model: ImageTransformer, parts: int) -> dict[str, np.ndarray]:
    config, blocks, narrow = model.config, list(model.decoder), _fits_bfloat16(model)
    modern, source = config.family == "modern", bool(config.source_size)
    d, inner, gated = config.width, config.heads * config.head_width, 2 if modern else 1  # SwiGLU: a gate and a value

    def matrix(weight: Tensor) -> np.ndarray:
        """(..., out, in) -> (..., in, out)"""
        weight = weight.detach().float().transpose(-2, -1).contiguous()
        return weight.bfloat16().view(torch.int16).numpy().view(np.uint16) if narrow else weight.numpy()

    def by_out(weight: Tensor, kinds: int) -> Tensor:
        """(L, kinds n, in) -> (L, C, kinds n / C, in): a part has its share of each kind, of queries, keys and values say."""
        return weight.unflatten(1, (kinds, parts, -1)).transpose(1, 2).flatten(2, 3)

    def by_in(weight: Tensor) -> Tensor:
        """(L, out, n) -> (L, C, out, n / C)"""
        return weight.unflatten(2, (parts, -1)).transpose(1, 2)

    def each(pick) -> Tensor:
        """(L, ...), of every decoder block."""
        return torch.stack([pick(block).detach() for block in blocks])

    queries, back = torch.empty(0, inner, d), torch.empty(0, d, inner)  # of the source attention: none
    if source:
        queries, back = each(lambda b: b.source_attention.q.weight), each(lambda b: b.source_attention.out.weight)
    if modern:  # whose feed-forward layers have no biases, and whose queries and keys have gains
        up_bias, down_bias = torch.zeros(len(blocks), gated * config.ffn), torch.zeros(len(blocks), d)
        gains = each(lambda b: _qk_gains(b, source))
    else:
        up_bias, down_bias = each(lambda b: b.ffn.up.bias), each(lambda b: b.ffn.down.bias)
        gains = torch.ones(len(blocks), 3, config.head_width)
    return dict(
        qkv=matrix(by_out(each(lambda b: b.attention.qkv.weight), 3)), out=matrix(by_in(each(lambda b: b.attention.out.weight))),
        source_q=matrix(by_out(queries, 1)), source_out=matrix(by_in(back)),
        up=matrix(by_out(each(lambda b: b.ffn.up.weight), gated)),
        up_bias=numbers(by_out(up_bias.unsqueeze(-1), gated).squeeze(-1)),  # (L, gated F) -> (L, C, gated F / C)
        down=matrix(by_in(each(lambda b: b.ffn.down.weight))), down_bias=numbers(down_bias),
        norms=numbers(each(lambda b: _norms(b, source))), qk_gains=numbers(gains),
    )


def _norms(block: nn.Module, source: bool) -> Tensor:
    """(3, 2, d): gain and bias of the norms of attention, source attention (without a source not read) and feed-forward."""
    norms = (block.attention_norm, block.source_norm if source else block.ffn_norm, block.ffn_norm)
    biases = [norm.bias if isinstance(norm, nn.LayerNorm) else torch.zeros_like(norm.weight) for norm in norms]
    return torch.stack([torch.stack([norm.weight, bias]) for norm, bias in zip(norms, biases)])


def _qk_gains(block: nn.Module, source: bool) -> Tensor:
    """(3, D): of queries, of keys, and of the source attention's queries (without a source not read)."""
    last = block.source_attention if source else block.attention
    return torch.stack([norm.weight for norm in (block.attention.query_norm, block.attention.key_norm, last.query_norm)])


def _fits_bfloat16(model: ImageTransformer) -> bool:
    """Whether the matrices in the decoder's blocks are made of bfloat16 numbers, as they are when stored in them."""
    matrices = (weight for weight in model.decoder.parameters() if weight.ndim == 2)
    return all(torch.equal(weight, weight.bfloat16().float()) for weight in matrices)


def _output(model: ImageTransformer) -> dict[str, np.ndarray]:
    bias = model.head.bias
    return dict(
        last_gain=numbers(model.norm.weight) if model.config.family == "modern" else np.zeros(0, np.float32),
        head=numbers(model.head.weight.T), head_bias=zeros(model.output.parameters) if bias is None else numbers(bias),
    )


def cache_shapes(model: ImageTransformer, weights: Weights, images: int) -> list[tuple[int, ...]]:
    """Of State's keys, values, window_keys, window_values, source_keys and source_values for so many images."""
    (layers, parts), source_layers, source = weights.qkv.shape[:2], len(weights.source_q), model.config.source_size**2
    heads, width = model.config.heads // parts, model.config.head_width
    longest = weights.memory.shape[1] + model.layout.query_block
    everything = (layers, images, parts, model.config.positions, heads * width)
    # 16 more than are used: rows whose distance is a power of two would fall on the same few cache lines.
    return [
        everything, everything,
        (layers, images, parts, heads, width, longest + 16), (layers, images, parts, heads, longest, width),
        (source_layers, images, parts, heads, width, source), (source_layers, images, parts, heads, source, width),
    ]


def cache_size(model: ImageTransformer, weights: Weights, images: int) -> int:
    """Bytes of the buffer that `allocate` takes for so many images."""
    return size_of(*cache_shapes(model, weights, images))


def allocate(
    model: ImageTransformer, weights: Weights, context: Context, uniforms: Tensor, pixels: np.ndarray, part: slice,
    buffer: np.ndarray,
) -> tuple[State, list[Scratch]]:
    """Memory for the images of a batch that `part` takes, and for each thread that can work on them.

    uniforms, pixels: those of the whole batch, see State. buffer: (cache_size,) uint8 for keys and values.
    """
    copies = context.copies
    images = copies * (part.stop - part.start)
    config = model.config
    d, positions, width = config.width, config.positions, config.head_width
    parts = weights.qkv.shape[1]
    heads = config.heads // parts
    longest = weights.memory.shape[1] + model.layout.query_block
    around, sums = context.source if context.source is not None else (None, None)
    keys, values, window_keys, window_values, source_keys, source_values = carve(buffer, *cache_shapes(model, weights, images))
    for layer, (k, v) in enumerate(context.source_kv or []):
        # (N, C H, S, D) -> (N, C, H, D, S) and (N, C, H, S, D)
        source_keys[layer] = k[part].transpose(2, 3).unflatten(1, (parts, heads)).float().numpy()
        source_values[layer] = v[part].unflatten(1, (parts, heads)).float().numpy()

    def of_images(tensor: Tensor | None, *shape: int) -> np.ndarray:
        return zeros(images, *shape) if tensor is None else numbers(tensor[part])

    state = State(
        pixels=np.tile(pixels[part], (copies, 1)),
        uniforms=uniforms[part].contiguous().numpy().copy(),
        label=zeros(images, d) if context.label is None else numbers(context.label.view(copies, -1, d)[:, part].flatten(0, 1)),
        around=of_images(around, positions, 0), sums=of_images(sums, positions, 0),
        source_keys=source_keys, source_values=source_values,
        keys=keys, values=values, window_keys=window_keys, window_values=window_values,
        made=zeros(2, parts, images, d), arrived=zeros(parts, LINE // 8, dtype=np.int64),
    )
    scratch = [
        Scratch(
            x=zeros(images, d), normed=zeros(images, d), inputs=zeros(images, len(weights.stem)), guess=zeros(images, 3),
            projected=zeros(images, weights.qkv.shape[3]), queries=zeros(images, heads * width),
            attended=zeros(images, heads * width), inner=zeros(images, weights.up.shape[3]),
            scores=zeros(max(longest, config.source_size**2, weights.head.shape[1])), params=zeros(images, weights.head.shape[1]),
        )
        for _ in range(parts)
    ]
    return state, scratch


def zeros(*shape: int, dtype=np.float32) -> np.ndarray:
    """Begins, and ends, with a cache line: of its own, too, where two threads write to two arrays."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(count + 2 * LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + count].view(dtype).reshape(shape)


def numbers(tensor: Tensor) -> np.ndarray:
    """A float32 copy that begins with a cache line."""
    copy = zeros(*tensor.shape)
    copy[...] = tensor.detach().float().numpy()
    return copy
