"""In which order an image is generated, and what each query block may look at (paper section 3.3).

This is all that tells 1D from 2D local attention. A layout is a permutation of the positions, cut into query
blocks of equal length, and for each query block the list of earlier positions that form its memory block.
Attention, likelihood and sampler know nothing else about space.
"""

from dataclasses import dataclass

import torch
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
    memory: Tensor  # (B, M) int64: steps of each memory block, in increasing order; -1 fills up

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


def local_1d(positions: int, query_block: int, memory_block: int) -> Layout:
    """1D local attention: raster order, and the `memory_block` positions before each query block."""
    starts = torch.arange(0, positions, query_block)  # (B,)
    memory = starts[:, None] - memory_block + torch.arange(memory_block)  # (B, M); below 0 = before the image
    return Layout(torch.arange(positions), query_block, memory.clamp(min=-1))


LAYOUTS = {"1d": lambda config: local_1d(config.positions, config.query_block, config.memory_block)}


def build_layout(config: Config) -> Layout:
    return LAYOUTS[config.layout](config)
