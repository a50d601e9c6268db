"""From colours to the transformer's first layer: what a position sees before any attention, and where it lies.

Two families. The paper's embedding (section 3.1) is the previous position's colours and a position encoding, nothing
else. The modern one also sees a neighbourhood of earlier pixels and, for super-resolution, what the source says about
the pixel at hand; and it makes a first guess of the pixel that the mixture's means start from.

N images, P positions in generation order, d width, S source pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .dmol import to_unit
from .inputs import (
    SOURCE_NEIGHBOURS, before_table, cell_sums, cell_table, nearby, neighbour_table, source_values, table_values,
)
from .layout import Layout


class PaperEmbedding(nn.Module):
    """The sequence shifted right by one position, plus a position encoding: (N, sub-pixels) -> (N, P, d).

    A sub-pixel is looked up in a table of (channel, level), a pixel goes through a linear layer and ReLU, as in T2T.
    """

    def __init__(self, config: Config, layout: Layout):
        super().__init__()
        self.config = config
        self.colour = PaperColour(config)
        columns = config.image_size * config.channels
        self.place = PaperPlace(config, layout.order // columns, layout.order % columns, config.image_size, columns)
        self.register_buffer("before", before_table(config, layout), persistent=False)  # (P, 3) or (P, 1)

    def condition(self, sources: Tensor) -> None:
        """A paper model learns of its source through the encoder alone."""

    def forward(self, pixels: Tensor, condition: None, steps: slice) -> tuple[Tensor, None]:
        before = self.before[steps]
        x = self.colour(pixels[:, before.clamp(min=0)], before % 3)  # (N, P, 3 or 1) -> (N, P, d)
        x = x * (before[:, :1] >= 0)  # the first step has nothing before it
        return x + self.place(steps), None


class PaperColour(nn.Module):
    """(N, P, n) uint8 -> (N, P, d): n sub-pixels, of `channel` (P, n), that make up a position."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        if config.output == "dmol":
            self.pixel = nn.Linear(3, config.width)
        else:
            self.value = nn.Embedding(3 * config.levels, config.width)

    def forward(self, colours: Tensor, channel: Tensor) -> Tensor:
        if self.config.output == "dmol":
            return F.relu(self.pixel(to_unit(colours.to(self.pixel.weight.dtype), self.config.levels)))
        # (N, P, n, d), summed over the sub-pixels: one in the decoder, the three of a source pixel in the encoder
        return self.value(colours.long() + self.config.levels * channel).sum(dim=-2) * math.sqrt(self.config.width)


class PaperPlace(nn.Module):
    """Position encoding (P, d): sinusoids, half of the features for the row and half for the column, or two tables.

    row, column: (P,) int64. With a sub-pixel a position, a column is a sub-pixel.
    """

    def __init__(self, config: Config, row: Tensor, column: Tensor, rows: int, columns: int):
        super().__init__()
        self.config, d = config, config.width
        if config.position_encoding == "learned":
            self.row, self.column = nn.Embedding(rows, d), nn.Embedding(columns, d)
            self.register_buffer("places", torch.stack([row, column]), persistent=False)  # (2, P)
        else:
            timescale = torch.logspace(0, -4, d // 4, base=10.0, dtype=torch.float64)  # radians a row: 1 down to 1e-4
            angles = [place[:, None] * timescale for place in (row, column)]  # (P, d / 4) each
            sinusoid = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
            self.register_buffer("sinusoid", sinusoid.float(), persistent=False)  # (P, d)

    def forward(self, steps: slice) -> Tensor:
        if self.config.position_encoding == "sinusoid":
            return self.sinusoid[steps]
        row, column = self.places[:, steps]
        return (self.row(row) + self.column(column)) * math.sqrt(self.config.width)


class PaperSourceEmbedding(nn.Module):
    """(N, s, s, 3) uint8 -> (N, S, d), a position a source pixel. The paper and T2T have one a sub-pixel."""

    def __init__(self, config: Config):
        super().__init__()
        self.colour = PaperColour(config)
        side, pixel = config.source_size, torch.arange(config.source_size**2)
        self.place = PaperPlace(config, pixel // side, pixel % side, side, side)

    def forward(self, sources: Tensor) -> Tensor:
        channel = torch.arange(3, device=sources.device)
        return self.colour(sources.flatten(1, 2), channel) + self.place(slice(None))


class ModernEmbedding(nn.Module):
    """A linear view of the colours nearby, plus learned tables of row, column and channel: (N, P, d)."""

    def __init__(self, config: Config, layout: Layout):
        super().__init__()
        self.config, self.layout = config, layout
        d, size, channels = config.width, config.image_size, config.channels
        self.inputs_wide = nearby(config) + (3 * len(SOURCE_NEIGHBOURS) + 3 if config.source_size else 0)  # F
        self.stem = nn.Linear(self.inputs_wide, d)
        self.row, self.column = nn.Embedding(size, d), nn.Embedding(size, d)
        self.channel = nn.Embedding(channels, d) if channels > 1 else None
        if config.output == "dmol":
            self.predictor = nn.Linear(self.inputs_wide, 3)
        pixel = layout.order // channels
        tables = {"neighbours": neighbour_table(config, layout), "step_channel": layout.order % channels}
        tables |= {"step_row": pixel // size, "step_column": pixel % size}
        if config.source_size:
            tables["cells"] = cell_table(config, layout)
        for name, table in tables.items():  # in generation order, derived from the layout and not saved
            self.register_buffer(name, table, persistent=False)

    def condition(self, sources: Tensor) -> tuple[Tensor, Tensor]:
        """(N, s, s, 3) uint8 -> (N, P, 15): the source around each step's pixel; (N, P, 3): sums under its source pixel."""
        config, layout, dtype = self.config, self.layout, self.stem.weight.dtype
        return source_values(sources, config, layout, dtype), cell_sums(sources, config, layout, dtype)

    def forward(self, pixels: Tensor, condition: tuple[Tensor, Tensor] | None, steps: slice) -> tuple[Tensor, Tensor | None]:
        """Returns the embedding (N, P, d) and, for the mixture, a first guess of each pixel (N, P, 3) on [-1, 1]."""
        inputs = self.inputs(pixels, condition, steps)
        x = self.row(self.step_row[steps]) + self.column(self.step_column[steps])  # (P, d)
        if self.channel is not None:
            x = x + self.channel(self.step_channel[steps])
        x = x + self.stem(inputs)
        if self.config.output != "dmol":
            return x, None
        # float32 also under autocast: in bfloat16 a mean is off by a level.
        with torch.autocast(x.device.type, enabled=False):
            return x, self.predictor(inputs)

    def inputs(self, pixels: Tensor, condition: tuple[Tensor, Tensor] | None, steps: slice) -> Tensor:
        """(N, sub-pixels) uint8 -> (N, P, F): colours nearby and, with a source, what it says of this pixel."""
        levels, dtype = self.config.levels, self.stem.weight.dtype
        near = table_values(pixels, self.neighbours[steps], levels, dtype)
        if condition is None:
            return near
        around, sums = (t[:, steps] for t in condition)
        cells = self.cells[steps]  # (P, 3, f f)
        known = table_values(pixels, cells, levels, dtype).sum(dim=-1)  # (N, P, 3)
        left = (cells < 0).sum(dim=-1).clamp(min=1)
        rest = (sums - known) / left  # the mean of what is still to come under the source pixel
        return torch.cat([near, around, rest], dim=-1)


class ModernSourceEmbedding(nn.Module):
    """(N, s, s, 3) uint8 -> (N, S, d), a position a source pixel."""

    def __init__(self, config: Config):
        super().__init__()
        self.levels = config.levels
        self.stem = nn.Linear(3, config.width)
        self.row = nn.Embedding(config.source_size, config.width)
        self.column = nn.Embedding(config.source_size, config.width)

    def forward(self, sources: Tensor) -> Tensor:
        colours = to_unit(sources.to(self.stem.weight.dtype), self.levels).flatten(1, 2)  # (N, S, 3)
        return self.stem(colours) + (self.row.weight[:, None] + self.column.weight[None]).flatten(0, 1)  # (S, d)
