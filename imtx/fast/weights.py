"""A model's weights and tables as arrays for the compiled step, and the memory that it works in.

N images, P positions, d width, L decoder blocks, H heads of D features, B query blocks with memory blocks of up to M steps,
a window of W = M + query_block steps, S source pixels. Matrices are (in, out). Those of the blocks are uint16 (the upper half
of a float32, which is a bfloat16) if no weight loses anything by it, and float32 otherwise.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..inputs import before_table
from ..model import Context, ImageTransformer

MODERN, PAPER_PIXELS, PAPER_LEVELS = range(3)  # how a step's input is embedded (imtx/embedding.py)


class Shape(NamedTuple):
    """Whole numbers that loops run over."""

    embedding: int  # MODERN, PAPER_PIXELS or PAPER_LEVELS
    dmol: bool
    levels: int
    channels: int  # positions a pixel
    heads: int
    query_block: int


class Weights(NamedTuple):
    order: np.ndarray  # (P,) int64: generation order
    memory: np.ndarray  # (B, M) int64: steps of each memory block, in increasing order
    memory_length: np.ndarray  # (B,) int64: how many of them there are
    cos: np.ndarray  # (P, D / 2) rotary positions; (P, 0) without
    sin: np.ndarray
    seen: np.ndarray  # (P, F) int64: sub-pixels that a step's input reads; -1 = nothing
    cells: np.ndarray  # (P, 3, f f) int64: those under the same source pixel, drawn already; (P, 3, 0) without a source
    place: np.ndarray  # (P, d): the input's position encoding
    stem: np.ndarray  # (F, d); PAPER_LEVELS: a table (3 levels, d) of channel and level
    stem_bias: np.ndarray  # (d,)
    predictor: np.ndarray  # (F, 3) first guess of a pixel; (0, 3) without
    predictor_bias: np.ndarray  # (3,)
    qkv: np.ndarray  # (L, d, 3 H D)
    out: np.ndarray  # (L, H D, d)
    source_q: np.ndarray  # (L, d, H D); L = 0 without a source, as in the next
    source_out: np.ndarray  # (L, H D, d)
    up: np.ndarray  # (L, d, 2 ffn) SwiGLU, or (L, d, ffn)
    up_bias: np.ndarray
    down: np.ndarray  # (L, ffn, d)
    down_bias: np.ndarray
    norms: np.ndarray  # (L, 3, 2, d): attention, source attention, feed-forward; gain, bias
    qk_gains: np.ndarray  # (L, 3, D): query, key, query of the source attention
    last_gain: np.ndarray  # (d,)
    head: np.ndarray  # (d, output parameters)
    head_bias: np.ndarray


class State(NamedTuple):
    """A group of images that grow together, and scratch memory."""

    pixels: np.ndarray  # (N, sub-pixels) uint8, raster order
    uniforms: np.ndarray  # (N, P, draws) float64
    label: np.ndarray  # (N, d): class embedding, zeros without
    around: np.ndarray  # (N, P, 15): what the source says of a pixel; (N, P, 0) without
    sums: np.ndarray  # (N, P, 3): what the pixels under a source pixel add up to
    source_keys: np.ndarray  # (L, N, H, D, S), L = 0 without a source
    source_values: np.ndarray  # (L, N, H, S, D)
    keys: np.ndarray  # (L, N, P, H D): all steps
    values: np.ndarray
    window_keys: np.ndarray  # (L, N, H, D, W): what the query block at work sees, laid out for products along steps
    window_values: np.ndarray  # (L, N, H, W, D)
    x: np.ndarray  # (N, d)
    normed: np.ndarray  # (N, d)
    inputs: np.ndarray  # (N, F)
    guess: np.ndarray  # (N, 3)
    projected: np.ndarray  # (N, 3 H D)
    queries: np.ndarray  # (N, H D): of the source attention
    attended: np.ndarray  # (N, H D)
    inner: np.ndarray  # (N, 2 ffn) or (N, ffn)
    scores: np.ndarray  # (W, S or output parameters,): of a head, or the probabilities of a draw
    params: np.ndarray  # (N, output parameters) of the last step, before the temperature


def pack(model: ImageTransformer) -> tuple[Shape, Weights]:
    """Copies a float32 model on the CPU into arrays."""
    config, layout, embedding = model.config, model.layout, model.embedding
    modern, dmol = config.family == "modern", config.output == "dmol"
    d, positions, blocks = config.width, config.positions, list(model.decoder)
    memory = layout.memory.clone()
    lengths = (memory >= 0).sum(dim=1)
    for block in range(layout.blocks):  # -1 to the end; 1D layouts fill up at the front
        memory[block, : lengths[block]] = layout.memory_steps(block)

    narrow = _fits_bfloat16(model)

    def matrix(weight: Tensor) -> np.ndarray:
        """(..., out, in) -> (..., in, out)"""
        weight = weight.detach().float().transpose(-2, -1).contiguous()
        if not narrow:
            return weight.numpy().copy()
        return weight.bfloat16().view(torch.int16).numpy().view(np.uint16).copy()

    def numbers(tensor: Tensor) -> np.ndarray:
        return tensor.detach().float().contiguous().numpy().copy()

    def each(pick, shape: tuple[int, ...]) -> Tensor:
        """(L, ...), of every decoder block; (0, ...) of none, where `pick` gives nothing."""
        picked = [pick(block) for block in blocks]
        return torch.empty(0, *shape) if picked[0] is None else torch.stack([t.detach() for t in picked])

    def norm(layer: nn.Module) -> Tensor:
        bias = layer.bias if isinstance(layer, nn.LayerNorm) else torch.zeros(d)
        return torch.stack([layer.weight.detach(), bias.detach()])  # (2, d)

    source = bool(config.source_size)
    inner = config.heads * config.head_width
    if modern:
        place = embedding.row(embedding.step_row) + embedding.column(embedding.step_column)
        if embedding.channel is not None:
            place = place + embedding.channel(embedding.step_channel)
        stem, stem_bias, seen, kind = embedding.stem.weight.T, embedding.stem.bias, embedding.neighbours, MODERN
    else:
        place, seen = embedding.place(slice(None)), before_table(config, layout)
        if dmol:
            pixel = embedding.colour.pixel
            stem, stem_bias, kind = pixel.weight.T, pixel.bias, PAPER_PIXELS
        else:
            stem, stem_bias, kind = embedding.colour.value.weight * d**0.5, torch.zeros(d), PAPER_LEVELS
    guessed = modern and dmol
    return Shape(kind, dmol, config.levels, config.channels, config.heads, layout.query_block), Weights(
        order=layout.order.numpy().copy(), memory=memory.numpy(), memory_length=lengths.numpy(),
        cos=numbers(model.cos) if modern else np.zeros((positions, 0), np.float32),
        sin=numbers(model.sin) if modern else np.zeros((positions, 0), np.float32),
        seen=seen.numpy().copy(),
        cells=embedding.cells.numpy().copy() if modern and source else np.zeros((positions, 3, 0), np.int64),
        place=numbers(place), stem=numbers(stem), stem_bias=numbers(stem_bias),
        predictor=numbers(embedding.predictor.weight.T) if guessed else np.zeros((0, 3), np.float32),
        predictor_bias=numbers(embedding.predictor.bias) if guessed else np.zeros(3, np.float32),
        qkv=matrix(each(lambda b: b.attention.qkv.weight, ())),
        out=matrix(each(lambda b: b.attention.out.weight, ())),
        source_q=matrix(each(lambda b: b.source_attention.q.weight if source else None, (inner, d))),
        source_out=matrix(each(lambda b: b.source_attention.out.weight if source else None, (d, inner))),
        up=matrix(each(lambda b: b.ffn.up.weight, ())),
        up_bias=numbers(each(lambda b: b.ffn.up.bias if not modern else torch.zeros(2 * config.ffn), ())),
        down=matrix(each(lambda b: b.ffn.down.weight, ())),
        down_bias=numbers(each(lambda b: b.ffn.down.bias if not modern else torch.zeros(d), ())),
        norms=numbers(
            each(lambda b: torch.stack([norm(b.attention_norm), norm(b.source_norm if source else b.ffn_norm), norm(b.ffn_norm)]), ())
        ),
        qk_gains=numbers(each(lambda b: _qk_gains(b, source) if modern else torch.ones(3, config.head_width), ())),
        last_gain=numbers(model.norm.weight) if modern else np.zeros(0, np.float32),
        head=numbers(model.head.weight.T),
        head_bias=numbers(model.head.bias) if model.head.bias is not None else np.zeros(model.output.parameters, np.float32),
    )


def _qk_gains(block: nn.Module, source: bool) -> Tensor:
    norms = [block.attention.query_norm, block.attention.key_norm, (block.source_attention if source else block.attention).query_norm]
    return torch.stack([norm.weight.detach() for norm in norms])  # (3, D); the last is not read without a source


def _fits_bfloat16(model: ImageTransformer) -> bool:
    """Whether the matrices in the decoder's blocks are made of bfloat16 numbers, as they are when stored in them."""
    matrices = (weight for weight in model.decoder.parameters() if weight.ndim == 2)
    return all(torch.equal(weight, weight.bfloat16().float()) for weight in matrices)


def allocate(
    model: ImageTransformer, weights: Weights, context: Context, uniforms: Tensor, pixels: np.ndarray, part: slice
) -> State:
    """Memory for the images of a batch that `part` takes. uniforms, pixels: those of the whole batch, see State."""
    images = part.stop - part.start
    config = model.config
    d, positions, heads, width = config.width, config.positions, config.heads, config.head_width
    layers, inner = len(weights.qkv), heads * width
    longest = weights.memory.shape[1] + model.layout.query_block

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def numbers(tensor: Tensor) -> np.ndarray:
        return tensor[part].float().contiguous().numpy().copy()

    around, sums = context.source if context.source is not None else (None, None)
    source_kv = context.source_kv or []
    return State(
        pixels=pixels[part].copy(),
        uniforms=uniforms[part].contiguous().numpy().copy(),
        label=zeros(images, d) if context.label is None else numbers(context.label.squeeze(1)),
        around=zeros(images, positions, 0) if around is None else numbers(around),
        sums=zeros(images, positions, 0) if sums is None else numbers(sums),
        source_keys=_stack([numbers(keys.transpose(2, 3)) for keys, _ in source_kv], (images, heads, width, 0)),
        source_values=_stack([numbers(values) for _, values in source_kv], (images, heads, 0, width)),
        keys=zeros(layers, images, positions, inner), values=zeros(layers, images, positions, inner),
        # 16 more than are used: rows whose distance is a power of two would fall on the same few cache lines.
        window_keys=zeros(layers, images, heads, width, longest + 16),
        window_values=zeros(layers, images, heads, longest, width),
        x=zeros(images, d), normed=zeros(images, d), inputs=zeros(images, len(weights.stem)), guess=zeros(images, 3),
        projected=zeros(images, 3 * inner), queries=zeros(images, inner), attended=zeros(images, inner), inner=zeros(images, weights.up.shape[2]),
        scores=zeros(max(longest, config.source_size**2, weights.head.shape[1])), params=zeros(images, weights.head.shape[1]),
    )


def _stack(arrays: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(arrays) if arrays else np.zeros((0, *shape), np.float32)
