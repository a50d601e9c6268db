"""Attention of the Image Transformer: local self-attention (paper section 3.3) and attention to a source.

Shapes: N images, P positions, d width, H heads of D features; groups of q queries that share a window of S keys
(`Layout.windows`). Everything runs along the generation order (imtx/layout.py), never along raster order.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bf16_attention import Bf16Attention
from .layout import Layout, run_length


def rotary_table(rows: Tensor, columns: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (P, D / 2) each: half of a head's features turn with the row, half with the column.

    Rows and columns are float and in pixels of the image, so that a source pixel can stand between image pixels.
    Rotary positions (Su et al., 2021) make attention depend on the offset between two pixels.
    """
    quarter = head_width // 4
    frequencies = torch.logspace(0, -5, quarter, base=2)  # radians a pixel: 1 down to 1/32
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)  # (P, D / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
    """x: (N, P, H, D); table: cosines and sines (P, D / 2), or None for a model without rotary positions."""
    if table is None:
        return x
    cos, sin = (t.unsqueeze(-2).to(x.dtype) for t in table)  # (P, 1, D / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Norm(nn.RMSNorm):
    """RMSNorm over the last dimension, in float32 also under autocast; hands back the dtype that it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: queries (N, H, Q, D), keys and values (N, H, S, D) -> (N, H, Q, D).

    bias: 0 where a query sees a key, minus infinity where it does not, (N, 1, Q, S); None: each sees all.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and dropout == 0.0:
        return Bf16Attention.apply(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, bias if bias is None else bias.to(q.dtype), dropout_p=dropout)


class Cache:
    """Keys and values of one layer while images are drawn, for N images at once.

    All P steps are kept, and next to them the *window* of the query block at work: its memory block, gathered once
    when the block begins, then the block's own steps as they come. A step reads the window as it lies in memory.
    """

    def __init__(self, layout: Layout, images: int, heads: int, head_width: int, like: Tensor):
        self.layout = layout
        shape = (2, images, heads, len(layout.order), head_width)  # 2: keys, values
        self.all = like.new_zeros(shape)
        self.window = like.new_zeros((*shape[:3], layout.memory.shape[1] + layout.query_block, head_width))
        self.block = -1  # the query block that the window belongs to
        self.memory_length = 0

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Takes the keys and values (N, P, H, D) of a parallel forward; later steps overwrite what was not given."""
        self.all[0], self.all[1] = keys.transpose(1, 2), values.transpose(1, 2)

    def append(self, step: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts down one step's keys and values (N, 1, H, D); returns all that it sees, (N, H, S, D) each."""
        block, inside = divmod(step, self.layout.query_block)
        self.all[0, :, :, step], self.all[1, :, :, step] = keys.squeeze(1), values.squeeze(1)
        if block != self.block:
            start = step - inside  # a given prefix may end inside a block: its part of the block comes along
            steps = torch.cat([self.layout.memory_steps(block), torch.arange(start, step)]).to(self.all.device)
            self.window[:, :, :, : len(steps)] = self.all.index_select(3, steps)
            self.block, self.memory_length = block, len(steps) - inside
        last = self.memory_length + inside
        self.window[:, :, :, last] = self.all[:, :, :, step]
        keys, values = self.window[:, :, :, : last + 1]
        return keys, values


class LocalSelfAttention(nn.Module):
    """Multi-head self-attention in which a query block sees itself, causally, and its memory block.

    inner: features of all heads together, H D. qk_norm: RMSNorm of each query and key (Henry et al., 2020).
    """

    def __init__(self, width: int, inner: int, heads: int, layout: Layout, dropout: float, qk_norm: bool):
        super().__init__()
        self.heads, self.layout, self.dropout = heads, layout, dropout
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.query_norm, self.key_norm = (Norm(inner // heads) if qk_norm else nn.Identity() for _ in range(2))
        groups, keys, masks = zip(*layout.windows())  # a part each
        self.parts = [tuple(mask.shape) for mask in masks]  # (n, q, S) each
        self.register_buffer("groups", torch.cat(groups), persistent=False)
        self.register_buffer("places", self.groups.argsort(), persistent=False)
        self.in_order = bool((self.groups.diff() > 0).all())  # as in 1D, where nothing has to be moved
        self.run = run_length(keys)  # r
        runs = [part[:, :: self.run].clamp(min=0).flatten() // self.run for part in keys]  # -1 is masked
        self.register_buffer("runs", torch.cat(runs), persistent=False)
        # Added to the scores: a kernel given a bool would make this of it each time. bfloat16 has 0 and -inf, too.
        biases = [torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf) for mask in masks]
        biases = [F.pad(bias.flatten(), (0, -bias.numel() % 8)) for bias in biases]  # CUDA wants parts to begin at 16 bytes
        self.bias_lengths = [len(bias) for bias in biases]
        self.register_buffer("bias", torch.cat(biases), persistent=False)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(N, P, d) -> queries, keys, values (N, P, H, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return rotate(self.query_norm(q), rotary), rotate(self.key_norm(k), rotary), v

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None = None) -> Tensor:
        """All positions in parallel: (N, P, d) -> (N, P, d)."""
        q, k, v = self.project(x, rotary)
        if cache is not None:
            cache.fill(k, v)
        return self.out(self.local(q, k, v))

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys, values (N, P, H, D) -> what the heads have seen, (N, P, H D)."""
        images, steps = q.shape[:2]
        # (N, P, H, D) -> (N H, P, D): one bias does for all images and heads, and the rows of a head lie together.
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        q = q.unflatten(1, (len(self.groups), -1))  # (N H, groups, q, D)
        q = q if self.in_order else q.index_select(1, self.groups)
        # (N H, P, D) -> (N H, all n S, D), by runs
        k, v = (t.unflatten(1, (-1, self.run)).index_select(1, self.runs).flatten(1, 2) for t in (k, v))
        shapes, seen, dropout = self.parts, [], self.dropout if self.training else 0.0
        each = zip(
            q.split([n for n, _, _ in shapes], 1), *(t.split([n * window for n, _, window in shapes], 1) for t in (k, v)),
            self.bias.split(self.bias_lengths), shapes,
        )
        for q, k, v, bias, shape in each:
            k, v = (t.unflatten(1, (shape[0], -1)) for t in (k, v))  # (N H, n, S, D)
            bias = bias[: math.prod(shape)].view(shape).unsqueeze(1)  # (n, 1, q, S)
            found = attend(*(t.transpose(0, 1) for t in (q, k, v)), bias, dropout)  # (n, N H, q, D)
            seen.append(found.transpose(1, 2))  # (n, q, N H, D)
        seen = torch.cat(seen)
        seen = seen if self.in_order else seen.index_select(0, self.places)
        return seen.reshape(steps, images, -1).transpose(0, 1)  # (groups, q, N H, D) -> (P, N, H D) -> (N, P, H D)

    def step(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache, step: int) -> Tensor:
        """One position: (N, 1, d) -> (N, 1, d)."""
        q, k, v = self.project(x, rotary)
        k, v = cache.append(step, k, v)  # (N, H, S, D)
        return self.out(F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2))


class FullAttention(nn.Module):
    """Unmasked attention of positions to a sequence: the encoder's to itself, the decoder's to the encoder's output."""

    def __init__(self, width: int, inner: int, heads: int, dropout: float, qk_norm: bool):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.query_norm, self.key_norm = (Norm(inner // heads) if qk_norm else nn.Identity() for _ in range(2))

    def keys_values(self, source: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(N, S, d) -> keys, values (N, H, S, D); of a fixed source they are worked out once."""
        k, v = self.kv(source).unflatten(-1, (2, self.heads, -1)).unbind(-3)  # (N, S, H, D) each
        return rotate(self.key_norm(k), rotary).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """(N, P, d) -> (N, P, d)."""
        k, v = keys_values
        q = self.q(x).unflatten(-1, (self.heads, -1))  # (N, P, H, D)
        q = rotate(self.query_norm(q), rotary).transpose(1, 2)
        seen = attend(q, k, v, None, self.dropout if self.training else 0.0)
        return self.out(seen.transpose(1, 2).flatten(2))  # (N, H, P, D) -> (N, P, d)
