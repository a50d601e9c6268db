"""The Image Transformer (Parmar et al., ICML 2018), with a modern block.

Read it from top to bottom: blocks, then the model. N images, P positions, d width, all in generation order.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from . import categorical, checkpoint, dmol
from .attention import Cache, FullAttention, LocalSelfAttention, Norm, rotary_table
from .config import Config
from .inputs import (
    SOURCE_NEIGHBOURS, cell_sums, cell_table, nearby, neighbour_table, source_values, table_values,
)
from .layout import Layout, build_layout

OUTPUTS = {"dmol": dmol, "categorical": categorical}


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020), position by position: (N, P, d) -> (N, P, d)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class EncoderBlock(nn.Module):
    """Unmasked self-attention over the source, then feed-forward; pre-norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(config.width), Norm(config.width)
        self.attention = FullAttention(config.width, config.heads, config.dropout)
        self.ffn = FeedForward(config.width, config.ffn)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, rotary, self.attention.keys_values(normed, rotary)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class DecoderBlock(nn.Module):
    """Local self-attention, attention to the encoder's output if there is one, feed-forward; pre-norm."""

    def __init__(self, config: Config, layout: Layout):
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(config.width), Norm(config.width)
        self.attention = LocalSelfAttention(config.width, config.heads, layout, config.dropout)
        if config.source_size:
            self.source_norm = Norm(config.width)
            self.source_attention = FullAttention(config.width, config.heads, config.dropout)
        self.ffn = FeedForward(config.width, config.ffn)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, source_kv=None, cache: Cache | None = None, step: int | None = None) -> Tensor:
        """(N, P, d) -> (N, P, d), in parallel; with `step`, (N, 1, d) -> (N, 1, d), through the cache."""
        normed = self.attention_norm(x)
        if step is None:
            x = x + self.dropout(self.attention(normed, rotary, cache))
        else:
            x = x + self.attention.step(normed, rotary, cache, step)
        if source_kv is not None:
            x = x + self.dropout(self.source_attention(self.source_norm(x), rotary, source_kv))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


@dataclass(frozen=True)
class Context:
    """What an image is generated from, fixed while it is."""

    label: Tensor | None  # (N, 1, d): class embedding
    source_inputs: Tensor | None = None  # (N, P, 15): colours of the source around each step's pixel
    cell_sums: Tensor | None = None  # (N, P, 3): what the pixels under a step's source pixel add up to
    source_kv: list[tuple[Tensor, Tensor]] | None = None  # a decoder block: keys and values of the source


class ImageTransformer(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="imtx",
    license="apache-2.0",
    tags=["image-generation", "autoregressive", "image-transformer"],
):
    """p(pixels | class) or, with a source, p(pixels | source), one position after another.

    pixels: (N, image_size, image_size, 3) uint8. labels: (N,) int64, index into `config.classes`;
    `len(config.classes)` is "no class". sources: (N, source_size, source_size, 3) uint8.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.layout = layout = build_layout(config)
        d, size, channels = config.width, config.image_size, config.channels

        inputs = nearby(config) + (3 * len(SOURCE_NEIGHBOURS) + 3 if config.source_size else 0)
        self.stem = nn.Linear(inputs, d)
        self.row, self.column = nn.Embedding(size, d), nn.Embedding(size, d)
        self.channel = nn.Embedding(channels, d) if channels > 1 else None
        self.label = nn.Embedding(len(config.classes) + 1, d) if config.classes else None

        if config.source_size:
            self.source_stem = nn.Linear(3, d)
            self.source_row, self.source_column = nn.Embedding(config.source_size, d), nn.Embedding(config.source_size, d)
            self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
            self.encoder_norm = Norm(d)
        self.decoder = nn.ModuleList(DecoderBlock(config, layout) for _ in range(config.layers))
        self.norm = Norm(d)
        if config.output == "dmol":
            self.predictor = nn.Linear(inputs, 3)
            self.head = nn.Linear(d, config.mixtures * dmol.PARAMETERS)
        else:
            self.head = nn.Linear(d, categorical.PARAMETERS)
        self._initialise()

        # Tables in generation order, derived from the layout and not saved.
        pixel = layout.order // channels
        tables = {"order": layout.order, "neighbours": neighbour_table(config, layout)}
        tables |= {"step_row": pixel // size, "step_column": pixel % size, "step_channel": layout.order % channels}
        tables["cos"], tables["sin"] = rotary_table(
            tables["step_row"].float(), tables["step_column"].float(), d // config.heads
        )
        if config.source_size:
            centre = (torch.arange(config.source_size) + 0.5) * (size / config.source_size) - 0.5  # in image pixels
            rows, columns = centre.repeat_interleave(config.source_size), centre.repeat(config.source_size)
            tables["cells"] = cell_table(config, layout)
            tables["source_cos"], tables["source_sin"] = rotary_table(rows, columns, d // config.heads)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):  # a block begins as the identity
                nn.init.zeros_(parameter)
        nn.init.normal_(self.head.weight, std=0.01)
        if self.config.output == "dmol":
            self._initialise_mixture()

    @torch.no_grad()
    def _initialise_mixture(self) -> None:
        """Means start at a plain guess of the pixel, scales at typical errors of it: 10 levels, give or take."""
        k = self.config.mixtures
        self.head.bias[4 * k : 7 * k] = torch.linspace(-5.0, -1.5, k).repeat(3)  # log-scales on [-1, 1]
        self.predictor.weight.zero_()
        left, up, source = 0, 1, nearby(self.config) // 3  # places among the input's pixels
        guess = {left: 0.5, up: 0.5} if not self.config.source_size else {left: 0.25, up: 0.25, source: 0.5}
        for place, share in guess.items():
            self.predictor.weight[:, 3 * place : 3 * place + 3] = share * torch.eye(3)

    @property
    def output(self):
        """The module of the output distribution: log_prob, temper, draw."""
        return OUTPUTS[self.config.output]

    # ---- parallel: training and likelihood ------------------------------------------------------------------

    def forward(self, pixels: Tensor, labels: Tensor | None = None, sources: Tensor | None = None) -> Tensor:
        """Parameters of the distribution of every position, given all before it: (N, P, output parameters).

        In generation order. float32 if the model is (also under autocast), float64 if the model is.
        """
        size = self.config.image_size
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (size, size, 3):
            raise ValueError(
                f"pixels must be uint8 of shape (N, {size}, {size}, 3), got {pixels.dtype} {tuple(pixels.shape)}."
            )
        return self.parallel(pixels, self.context(len(pixels), labels, sources))

    def log_prob(self, pixels: Tensor, labels: Tensor | None = None, sources: Tensor | None = None) -> Tensor:
        """Log-probability in nats of every position given all before it: (N, P), in generation order.

        bits/dim of an image = -sum / (ln 2 x sub-pixels) (paper section 5).
        """
        params = self(pixels, labels, sources)
        with torch.autocast(params.device.type, enabled=False):
            return self.output.log_prob(params, self.targets(pixels))

    def targets(self, pixels: Tensor) -> Tensor:
        """(N, h, w, 3) uint8 -> (N, P, 3) for pixels, (N, P, 1) for sub-pixels, in generation order."""
        return pixels.reshape(len(pixels), self.config.positions, -1)[:, self.order]

    def parallel(self, pixels: Tensor, context: Context, caches: list[Cache] | None = None) -> Tensor:
        values = dmol.to_unit(pixels.to(self.stem.weight.dtype)).flatten(1)  # (N, h, w, 3) -> (N, sub-pixels)
        inputs = self.inputs(values, context, slice(None))  # (N, P, F)
        x = self.embed(inputs, context, slice(None))
        for i, block in enumerate(self.decoder):
            source_kv = context.source_kv[i] if context.source_kv else None
            x = block(x, (self.cos, self.sin), source_kv, caches[i] if caches else None)
        return self.parameters_of(x, inputs)

    # ---- one step: sampling ---------------------------------------------------------------------------------

    def caches(self, images: int) -> list[Cache]:
        heads = self.config.heads
        return [
            Cache(self.layout, images, heads, self.config.width // heads, like=self.head.weight) for _ in self.decoder
        ]

    def step(self, values: Tensor, context: Context, caches: list[Cache], step: int) -> Tensor:
        """The distribution of one position: (N, output parameters).

        values: (N, sub-pixels) on [-1, 1], the growing image; what is not generated yet is not read.
        """
        now = slice(step, step + 1)
        inputs = self.inputs(values, context, now)  # (N, 1, F)
        x = self.embed(inputs, context, now)
        rotary = (self.cos[now], self.sin[now])
        for i, block in enumerate(self.decoder):
            source_kv = context.source_kv[i] if context.source_kv else None
            x = block(x, rotary, source_kv, caches[i], step)
        return self.parameters_of(x, inputs).squeeze(1)

    # ---- shared by both ------------------------------------------------------------------------------------

    def context(self, images: int, labels: Tensor | None, sources: Tensor | None) -> Context:
        """All that is fixed while an image is generated. Raises ValueError for the wrong kind of condition."""
        config = self.config
        if (sources is None) != (not config.source_size):
            raise ValueError(
                "This is a super-resolution model: give it sources." if config.source_size
                else "This model takes no source: leave sources out."
            )
        if labels is not None and self.label is None:
            raise ValueError("This model has no classes: leave labels out.")
        label = None
        if self.label is not None:
            if labels is None:
                labels = torch.full((images,), len(config.classes), device=self.order.device)
            if labels.shape != (images,) or labels.dtype != torch.int64:
                raise ValueError(f"labels must be int64 of shape ({images},), got {labels.dtype} {tuple(labels.shape)}.")
            # A compiled graph would break here; train.py looks at its labels once, when it reads them.
            if not torch.compiler.is_compiling() and not ((labels >= 0) & (labels <= len(config.classes))).all():
                raise ValueError(f"labels must be in 0..{len(config.classes)}, the last for no class; got {labels}.")
            label = self.label(labels).unsqueeze(1)  # (N, 1, d)
        if sources is None:
            return Context(label)
        expected = (images, config.source_size, config.source_size, 3)
        if sources.shape != expected or sources.dtype != torch.uint8:
            raise ValueError(f"sources must be uint8 of shape {expected}, got {sources.dtype} {tuple(sources.shape)}.")
        encoded = self.encode(sources)
        rotary = (self.source_cos, self.source_sin)
        return Context(
            label,
            source_values(sources, config, self.layout, self.stem.weight.dtype),
            cell_sums(sources, config, self.layout, self.stem.weight.dtype),
            [block.source_attention.keys_values(encoded, rotary) for block in self.decoder],
        )

    def encode(self, sources: Tensor) -> Tensor:
        """(N, s, s, 3) uint8 -> (N, s s, d): a representation of each source pixel in its context (section 3.1)."""
        values = dmol.to_unit(sources.to(self.stem.weight.dtype)).flatten(1, 2)  # (N, s s, 3)
        place = (self.source_row.weight[:, None] + self.source_column.weight[None]).flatten(0, 1)  # (s s, d)
        x = self.source_stem(values) + place
        for block in self.encoder:
            x = block(x, (self.source_cos, self.source_sin))
        return self.encoder_norm(x)

    def inputs(self, values: Tensor, context: Context, steps: slice) -> Tensor:
        """(N, sub-pixels) on [-1, 1] -> (N, P, F): colours nearby and, with a source, what it says of this pixel."""
        near = table_values(values, self.neighbours[steps])
        if context.source_inputs is None:
            return near
        cells = self.cells[steps]  # (P, 3, f f)
        known = table_values(values, cells).sum(dim=-1)  # (N, P, 3)
        left = (cells < 0).sum(dim=-1).clamp(min=1)
        rest = (context.cell_sums[:, steps] - known) / left  # the mean of what is still to come under the source pixel
        return torch.cat([near, context.source_inputs[:, steps], rest], dim=-1)

    def embed(self, inputs: Tensor, context: Context, steps: slice) -> Tensor:
        """(N, P, F) -> (N, P, d): colours nearby, where the position lies, and the class, at every position."""
        x = self.row(self.step_row[steps]) + self.column(self.step_column[steps])  # (P, d)
        if self.channel is not None:
            x = x + self.channel(self.step_channel[steps])
        x = x + self.stem(inputs)
        return x if context.label is None else x + context.label

    def parameters_of(self, x: Tensor, inputs: Tensor) -> Tensor:
        """(N, P, d) and (N, P, F) -> (N, P, output parameters)."""
        # The parameters are float32 also under autocast: in bfloat16 a mean is off by a level.
        with torch.autocast(x.device.type, enabled=False):
            params = self.head(self.norm(x.to(self.head.weight.dtype)))
            if self.config.output == "dmol":
                params = dmol.shift_means(params, self.predictor(inputs))
            return params

    # ---- files ---------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, *, dtype: torch.dtype = torch.float32, **hub_options):
        """Writes config.json and safetensors shards of at most 9 MB; see `imtx.checkpoint.save`.

        hub_options (`push_to_hub`, `repo_id`, ...) are those of `PyTorchModelHubMixin.save_pretrained`.
        """
        checkpoint.save(self, Path(save_directory), dtype)
        if hub_options:
            return super().save_pretrained(save_directory, **hub_options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """The mixin's hook. What `save_pretrained` has written stays; the mixin's config.json is put right."""
        self.config.save(save_directory / "config.json")

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> "ImageTransformer":
        """A model in float32 and eval mode, from a folder, a bundled name or a Hub id; see `imtx.checkpoint.find`."""
        folder = checkpoint.find(name, revision)
        return checkpoint.load(cls, folder)
