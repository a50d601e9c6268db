"""In which order an image is generated, and what each query block may look at (paper section 3.3).

This is all that tells 1D from 2D local attention. A layout is a permutation of the positions, cut into query
blocks of equal length, and for each query block the list of earlier positions that form its memory block.
Attention, likelihood and sampler know nothing else about space.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Config


@dataclass(frozen=True)
class Layout:
    """Generation order and memory blocks of an image of P positions, B = P / query_block query blocks.

    A *position* is numbered in raster order (row, column, channel); a *step* is its place in the generation
    order. Step t belongs to query block t // query_block and sees every step of that block up to itself, and
    its memory block. The colours of a pixel, where they are positions of their own, are generated one after another.
    """

    order: Tensor  # (P,) int64: the position generated at each step
    query_block: int  # steps a query block
    memory: Tensor  # (B, M) int64: steps of each memory block, in increasing order; -1 fills up, in front (1D) or behind (2D)

    def __post_init__(self):
        if not torch.equal(self.order.sort().values, torch.arange(len(self.order))):
            raise ValueError(f"order does not hold each of the {len(self.order)} positions once.")
        if len(self.order) % self.query_block:
            raise ValueError(f"query_block {self.query_block} must divide the {len(self.order)} positions.")
        starts = torch.arange(self.blocks) * self.query_block
        if (self.memory >= starts[:, None]).any():
            raise ValueError("A memory block holds a step that is not generated before its query block.")

    @property
    def blocks(self) -> int:
        return len(self.order) // self.query_block

    @property
    def rank(self) -> Tensor:
        """(P,) int64: the step at which each position is generated, the inverse of `order`."""
        return torch.argsort(self.order)

    def memory_steps(self, block: int) -> Tensor:
        """(m,) int64, m <= M: the steps in the memory block of one query block."""
        row = self.memory[block]
        return row[row >= 0]

    def mask(self) -> Tensor:
        """(B, query_block, M + query_block) bool: True where a query sees a key of [memory block, query block]."""
        seen_memory = (self.memory >= 0)[:, None, :].expand(-1, self.query_block, -1)  # (B, Q, M)
        causal = torch.ones(self.query_block, self.query_block, dtype=torch.bool).tril()
        return torch.cat([seen_memory, causal.expand(self.blocks, -1, -1)], dim=2)

    def windows(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What attention over all positions at once works off, part by part: groups of queries, their keys, who sees whom.

        A *group* is one query block, or 2, 4, ... neighbours, where one window of keys for all of them, which holds their
        memory blocks and themselves, makes at most a fifth more pairs of a query and a key: fewer keys are gathered so, for
        larger products. A part has the windows of about one length, by quarters of the longest, as a key that only fills a
        window up costs as much as any: half as much again in `paper-sr-2d`, whose memory blocks are shorter at the border.

        Returns for each part the groups (n,), counted in generation order; the steps of their keys (n, S), in increasing
        order, with -1 in front where a window is shorter; and a mask (n, q, S), True where one of a group's q steps sees a key.
        """
        steps = torch.arange(len(self.order))
        block = steps // self.query_block
        memory = torch.zeros(self.blocks, len(steps) + 1, dtype=torch.bool)  # (B, P + 1): what only fills up goes to a step P
        memory = memory.scatter(1, self.memory.where(self.memory >= 0, len(steps)), True)[:, :-1]  # (B, P)
        window = memory | (block == torch.arange(self.blocks)[:, None])  # (groups, P), a group being one query block as yet
        most = 1.2 * window.sum() * self.query_block
        while len(window) % 2 == 0:
            wider = window.unflatten(0, (-1, 2)).any(dim=1)  # (groups / 2, P)
            if wider.sum() * (len(steps) // len(wider)) > most:
                break
            window = wider
        group_steps = steps.view(len(window), -1)  # (groups, q)

        lengths = window.sum(dim=1)
        quarter = (4 * lengths + lengths.max() - 1) // lengths.max()  # 1..4
        parts = []
        for groups in (torch.nonzero(quarter == i).flatten() for i in range(1, 5)):
            if len(groups):
                keys = torch.where(window[groups], steps, -1).sort(dim=1).values[:, -int(lengths[groups].max()) :]  # (n, S)
                key, query = keys[:, None, :], group_steps[groups][:, :, None]  # (n, 1, S), (n, q, 1)
                own = (block[key] == block[query]) & (key <= query)  # (n, q, S)
                parts.append((groups, keys, (key >= 0) & (own | memory[block[query], key])))
        return parts


def run_length(keys: Sequence[Tensor]) -> int:
    """The longest r such that all windows consist of runs of r steps, each beginning at a multiple of r.

    keys: (n, S) each, as `Layout.windows` has them, where -1 in front belongs to no step. So few long pieces can be
    gathered in place of many single keys.
    """
    length = 0
    for steps in keys:
        before = F.pad(steps[:, :-1], (1, 0), value=-1)  # (n, S): the step of the key before
        window, place = torch.nonzero((steps >= 0) & ((before < 0) | (steps != before + 1))).unbind(1)  # where a run begins
        length = math.gcd(length, steps.shape[1], *place.tolist(), *steps[window, place].tolist())
    return length


def local_1d(positions: int, query_block: int, memory_block: int) -> Layout:
    """1D local attention: raster order, and the `memory_block` positions before each query block."""
    starts = torch.arange(0, positions, query_block)  # (B,)
    memory = starts[:, None] - memory_block + torch.arange(memory_block)  # (B, M); below 0 = before the image
    return Layout(torch.arange(positions), query_block, memory.clamp(min=-1))


def local_2d(size: int, channels: int, query_block: tuple[int, int], flange: tuple[int, int]) -> Layout:
    """2D local attention: the image in rectangles of h_q x w_q pixels, one after another in raster order of the
    rectangles, raster order inside each. A memory block is what is generated already of the frame around a rectangle:
    `flange` rows above it and columns on both sides, in whole pixels, with all their colours.
    """
    (h_q, w_q), (h_m, w_m) = query_block, flange
    pixels = torch.arange(size * size).view(size // h_q, h_q, size // w_q, w_q)
    pixels = pixels.transpose(1, 2).reshape(-1, h_q * w_q)  # (block rows, block columns, h_q, w_q) -> (B, h_q w_q)
    row, column = pixels // size, pixels % size
    top, left = row[:, :1, None], column[:, :1, None]  # (B, 1, 1): corner of each rectangle
    # (B, B, h_q w_q), query block by pixel in generation order: within reach, and of an earlier block
    near = (row >= top - h_m) & (column >= left - w_m) & (column < left + w_q + w_m)
    near = (near & torch.ones(len(pixels), len(pixels), dtype=torch.bool).tril(-1)[:, :, None]).flatten(1)  # (B, pixels)
    longest = int(near.sum(dim=1).max())
    steps = torch.where(near, torch.arange(size * size), size * size).sort(dim=1).values[:, :longest]  # -> (B, M / channels)
    steps = torch.where(steps < size * size, steps, -1)

    def colours(pixel: Tensor) -> Tensor:  # (..., n) pixels or their steps -> (..., n channels), -1 stays
        each = pixel.unsqueeze(-1) * channels + torch.arange(channels)
        return torch.where(pixel.unsqueeze(-1) >= 0, each, -1).flatten(-2)

    return Layout(colours(pixels.flatten()), h_q * w_q * channels, colours(steps))


def build_layout(config: Config) -> Layout:
    if config.layout == "2d":
        return local_2d(config.image_size, config.channels, config.query_block, config.memory_block)
    return local_1d(config.positions, config.query_block, config.memory_block)
