"""Tables of what a step may look at directly: colours of earlier pixels, and what the source says about them.

The paper shifts the sequence by one, so that a step's input is what was generated just before it (`before_table`).
The modern embedding also sees a fixed neighbourhood (`neighbour_table`). No step sees itself or anything later,
whatever the layout; the same tables serve the parallel forward and the sampler.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Config
from .dmol import to_unit
from .layout import Layout

# (rows, columns) from the pixel at hand.
NEIGHBOURS = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-1, -2), (-1, 2), (-2, -1), (-2, 1))
SOURCE_NEIGHBOURS = ((0, 0), (0, -1), (-1, 0), (0, 1), (1, 0))


def nearby(config: Config) -> int:
    """Colours that a step sees directly."""
    return 3 * len(NEIGHBOURS) + 3 + (3 if config.channels == 3 else 0)


def before_table(config: Config, layout: Layout) -> Tensor:
    """(P, 3) for pixels, (P, 1) for sub-pixels, int64 in generation order: what was generated one step before.

    In sub-pixels; -1 at the first step. One shift in generation order, across the borders of rows and blocks: T2T
    shifts inside each 2D block, and so each block's last position is never anybody's input.
    """
    width = 3 // config.channels
    before = torch.cat([torch.tensor([-1]), layout.order[:-1]])[:, None]  # (P, 1)
    return torch.where(before >= 0, before * width + torch.arange(width), -1)


def neighbour_table(config: Config, layout: Layout) -> Tensor:
    """(P, F) int64 in generation order: the sub-pixels that are the input of each step; -1 = nothing.

    F = `nearby(config)`: the neighbours' colours, those of the pixel generated before, and for categorical output the
    earlier colours of the pixel itself. A neighbour outside the image, or not generated yet, is replaced by the
    visible one that lies nearest to it.
    """
    size, channels = config.image_size, config.channels
    pixel = layout.order // channels  # (P,)
    first_rank = layout.rank.view(-1, channels).min(dim=1).values  # (pixels,): when its first colour is generated
    last_rank = layout.rank.view(-1, channels).max(dim=1).values
    offsets = torch.tensor(NEIGHBOURS)  # (K, 2)
    rows, columns = (pixel // size)[:, None] + offsets[:, 0], (pixel % size)[:, None] + offsets[:, 1]  # (P, K)
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    neighbour = torch.where(inside, rows * size + columns, 0)  # (P, K): pixel
    visible = inside & (last_rank[neighbour] < first_rank[pixel][:, None])
    distance = (offsets[:, None] - offsets[None]).square().sum(-1).float()  # (K, K)
    # (P, K, K) -> (P, K): of the visible neighbours, the one nearest to where neighbour k should be
    nearest = torch.where(visible[:, None, :], distance, torch.inf).argmin(dim=2)
    neighbour = torch.where(visible.any(dim=1, keepdim=True), neighbour.gather(1, nearest), -1)
    drawn = pixel.view(-1, channels)[:, 0]  # (pixels,): the order in which pixels are generated
    before = torch.cat([torch.tensor([-1]), drawn[:-1]]).repeat_interleave(channels)  # (P,)
    neighbour = torch.cat([neighbour, before[:, None]], dim=1)  # (P, K + 1)
    table = neighbour[:, :, None] * 3 + torch.arange(3)  # (P, K, 3)
    table = torch.where(neighbour[:, :, None] >= 0, table, -1).flatten(1)  # (P, 3 K + 3)
    if channels == 3:
        colour = torch.arange(3)
        own = torch.where(colour < (layout.order % 3)[:, None], pixel[:, None] * 3 + colour, -1)  # (P, 3)
        table = torch.cat([table, own], dim=1)
    return table


def cell_table(config: Config, layout: Layout) -> Tensor:
    """(P, 3, f f) int64 in generation order, f = image_size / source_size; -1 = nothing.

    For each step and colour: the sub-pixels of that colour that are generated already and lie under the same pixel of
    the source. Their sum says what is left for the others, as the source is the mean of all f f of them.
    """
    size, factor = config.image_size, config.image_size // config.source_size
    pixel = layout.order // config.channels  # (P,)
    top, left = pixel // size // factor * factor, pixel % size // factor * factor
    inside = torch.arange(factor)
    rows, columns = top[:, None] + inside, left[:, None] + inside  # (P, f)
    cell = (rows[:, :, None] * size + columns[:, None, :]).flatten(1)  # (P, f f): pixels
    sub_pixel = cell[:, None, :] * 3 + torch.arange(3)[:, None]  # (P, 3, f f)
    rank = layout.rank[sub_pixel // (3 // config.channels)]
    return torch.where(rank < torch.arange(config.positions)[:, None, None], sub_pixel, -1)


def table_values(pixels: Tensor, table: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """pixels: (N, sub-pixels) uint8; table: (..., F). Returns (N, ..., F) on [-1, 1], 0 where there is nothing."""
    return to_unit(pixels[:, table.clamp(min=0)].to(dtype), levels) * (table >= 0)


def cell_sums(sources: Tensor, config: Config, layout: Layout, dtype: torch.dtype) -> Tensor:
    """(N, s, s, 3) uint8 -> (N, P, 3): what the f f pixels under a step's source pixel add up to, on [-1, 1] each."""
    factor = config.image_size // config.source_size
    sums = to_unit(sources.to(dtype), config.levels) * factor**2
    large = sums.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1, 2)  # (N, pixels, 3)
    return large[:, (layout.order // config.channels).to(large.device)]


def source_values(sources: Tensor, config: Config, layout: Layout, dtype: torch.dtype) -> Tensor:
    """(N, s, s, 3) uint8 -> (N, P, 15): the source, enlarged bilinearly, at each step's pixel and beside it."""
    size = config.image_size
    small = to_unit(sources.to(dtype), config.levels).permute(0, 3, 1, 2)  # (N, 3, s, s)
    large = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    padded = F.pad(large, (1, 1, 1, 1), mode="replicate")
    shifted = [padded[:, :, 1 + y : 1 + y + size, 1 + x : 1 + x + size] for y, x in SOURCE_NEIGHBOURS]
    pixels = torch.cat(shifted, dim=1).flatten(2).transpose(1, 2)  # (N, 15, h, w) -> (N, pixels, 15)
    return pixels[:, (layout.order // config.channels).to(pixels.device)]
