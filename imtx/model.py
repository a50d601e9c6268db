"""The Image Transformer (Parmar et al., ICML 2018).

Read it from top to bottom. What it is made of lies beside it: `config.py` (sizes), `layout.py` (generation order and
memory blocks, section 3.3 of the paper), `embedding.py` (3.1), `blocks.py` and `attention.py` (3.2, 3.3), `outputs.py`
(3.4); `sampling.py` draws (4). N images, P positions, d width, all in generation order.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from . import checkpoint, dmol, initialisation
from .attention import Cache, Norm, rotary_table
from .blocks import DecoderBlock, EncoderBlock
from .config import Config
from .embedding import ModernEmbedding, ModernSourceEmbedding, PaperEmbedding, PaperSourceEmbedding
from .layout import build_layout
from .outputs import build_output, guide


@dataclass(frozen=True)
class Context:
    """What an image is generated from, fixed while it is."""

    label: Tensor | None  # (copies N, 1, d): class embedding
    # What the embedding reads off the source at every step, (N, P, 15) and (N, P, 3) (imtx/embedding.py: condition).
    source: tuple[Tensor, ...] | None = None
    source_kv: list[tuple[Tensor, Tensor]] | None = None  # a decoder block: keys, values (N, H, S, D) of the encoded source
    guidance: float = 1.0  # not 1: the N images are there twice, with their labels and then without

    @property
    def copies(self) -> int:
        """Rows that an image takes, in pixels and caches too."""
        return 1 if self.guidance == 1 else 2


class ImageTransformer(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="imtx",
    tags=["image-generation", "autoregressive", "image-transformer"],
):
    """p(pixels | class) or, with a source, p(pixels | source), one position after another.

    pixels: (N, image_size, image_size, 3) uint8. labels: (N,) int64, index into `config.classes`;
    `len(config.classes)` is "no class". sources: (N, source_size, source_size, 3) uint8.
    """

    def __init__(self, config: Config):
        if not isinstance(config, Config):
            raise ValueError(f"config must be an imtx.Config, of a preset PRESETS[name]; got {config!r}.")
        super().__init__()
        self.config = config
        self.layout = layout = build_layout(config)
        self.output = build_output(config)
        d, modern = config.width, config.family == "modern"

        self.embedding = (ModernEmbedding if modern else PaperEmbedding)(config, layout)
        self.label = nn.Embedding(len(config.classes) + 1, d) if config.classes else None
        self.input_dropout = nn.Dropout(0.0 if modern else config.dropout)
        if config.source_size:
            self.source_embedding = (ModernSourceEmbedding if modern else PaperSourceEmbedding)(config)
            self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
            self.encoder_norm = Norm(d) if modern else nn.Identity()  # a post-norm block hands on what is normalised
        self.decoder = nn.ModuleList(DecoderBlock(config, layout) for _ in range(config.layers))
        self.norm = Norm(d) if modern else nn.Identity()
        # T2T's mixture has no bias; ours starts from one.
        self.head = nn.Linear(d, self.output.parameters, bias=modern or config.output == "categorical")
        initialisation.apply(self)
        self.register_buffer("order", layout.order, persistent=False)
        if modern:
            self._register_rotary_tables()

    def _register_rotary_tables(self) -> None:
        """Cosines and sines in generation order, and of the source pixels; derived, not saved."""
        config, size, head_width = self.config, self.config.image_size, self.config.head_width
        pixel = self.layout.order // config.channels
        tables = {"": rotary_table((pixel // size).float(), (pixel % size).float(), head_width)}
        if config.source_size:
            centre = (torch.arange(config.source_size) + 0.5) * (size / config.source_size) - 0.5  # in image pixels
            rows, columns = centre.repeat_interleave(config.source_size), centre.repeat(config.source_size)
            tables["source_"] = rotary_table(rows, columns, head_width)
        for name, (cos, sin) in tables.items():
            self.register_buffer(name + "cos", cos, persistent=False)
            self.register_buffer(name + "sin", sin, persistent=False)

    # ---- parallel: training and likelihood ------------------------------------------------------------------

    def forward(self, pixels: Tensor, labels: Tensor | None = None, sources: Tensor | None = None) -> Tensor:
        """Parameters of the distribution of every position, given all before it: (N, P, output parameters).

        In generation order. float32 if the model is (also under autocast), float64 if the model is.
        """
        size = self.config.image_size
        require("pixels", pixels, torch.uint8, (None, size, size, 3))
        self.check_levels("pixels", pixels)
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
        return pixels.reshape(len(pixels), self.config.positions, 3 // self.config.channels)[:, self.order]

    def parallel(self, pixels: Tensor, context: Context, caches: list[Cache] | None = None) -> Tensor:
        """(copies N, h, w, 3) uint8 -> (N, P, output parameters); caches, one a block, take all keys and values."""
        x, guess = self.embed(pixels.flatten(1), context, slice(None))
        rotary = self.rotary(slice(None))
        for i, block in enumerate(self.decoder):
            source_kv = context.source_kv[i] if context.source_kv else None
            x = block(x, rotary, source_kv, caches[i] if caches else None)
        return self.parameters_of(x, guess, context)

    # ---- one step: sampling ---------------------------------------------------------------------------------

    def caches(self, images: int) -> list[Cache]:
        """Empty ones, a decoder block each, for so many rows of pixels: copies N with guidance."""
        config = self.config
        return [Cache(self.layout, images, config.heads, config.head_width, like=self.head.weight) for _ in self.decoder]

    def step(self, pixels: Tensor, context: Context, caches: list[Cache], step: int) -> Tensor:
        """The distribution of one position: (N, output parameters).

        pixels: (copies N, sub-pixels) uint8, the growing image; what is not generated yet is not read.
        """
        now = slice(step, step + 1)
        x, guess = self.embed(pixels, context, now)
        for i, block in enumerate(self.decoder):
            source_kv = context.source_kv[i] if context.source_kv else None
            x = block(x, self.rotary(now), source_kv, caches[i], step)
        return self.parameters_of(x, guess, context).squeeze(1)

    # ---- shared by both ------------------------------------------------------------------------------------

    def context(self, images: int, labels: Tensor | None, sources: Tensor | None, guidance: float = 1.0) -> Context:
        """All that is fixed while an image is generated. Raises ValueError for the wrong kind of condition.

        labels: (N,) int64, None = no class; sources: (N, s, s, 3) uint8; N = images.
        guidance: how far the class is followed, see `imtx.sampling.sample`; other than 1 it needs labels.
        """
        config = self.config
        if (sources is None) != (not config.source_size):
            raise ValueError(
                "This is a super-resolution model: give it sources." if config.source_size
                else "This model takes no source: leave sources out."
            )
        if labels is not None and self.label is None:
            raise ValueError("This model has no classes: leave labels out.")
        if labels is None and guidance != 1:
            raise ValueError("Guidance is towards a class: give labels, or leave guidance at 1.")
        label = None
        if self.label is not None:
            if labels is None:
                labels = torch.full((images,), len(config.classes), device=self.head.weight.device)
            require("labels", labels, torch.int64, (images,))
            # A compiled graph would break here; train.py looks at its labels once, when it reads them.
            if not torch.compiler.is_compiling() and not ((labels >= 0) & (labels <= len(config.classes))).all():
                raise ValueError(f"labels must be in 0..{len(config.classes)}, the last for no class; got {labels}.")
            if guidance != 1:
                labels = torch.cat([labels, torch.full_like(labels, len(config.classes))])  # (2 N,)
            label = self.label(labels).unsqueeze(1)  # (copies N, 1, d)
        if sources is None:
            return Context(label, guidance=guidance)  # a model has classes or sources, not both
        require("sources", sources, torch.uint8, (images, config.source_size, config.source_size, 3))
        self.check_levels("sources", sources)
        encoded, rotary = self.encode(sources), self.source_rotary()
        source_kv = [block.source_attention.keys_values(encoded, rotary) for block in self.decoder]
        return Context(label, self.embedding.condition(sources), source_kv)

    def check_levels(self, name: str, pictures: Tensor) -> None:
        """Raises ValueError if a uint8 picture holds a level that the model does not know."""
        # uint8 keeps 256 levels in range by itself; a compiled graph would break at a look at the values.
        if self.config.levels < 256 and not torch.compiler.is_compiling() and (pictures >= self.config.levels).any():
            raise ValueError(f"{name} must be in 0..{self.config.levels - 1}, got {int(pictures.max())}.")

    def encode(self, sources: Tensor) -> Tensor:
        """(N, s, s, 3) uint8 -> (N, s s, d): a representation of each source pixel in its context (section 3.2)."""
        x, rotary = self.input_dropout(self.source_embedding(sources)), self.source_rotary()
        for block in self.encoder:
            x = block(x, rotary)
        return self.encoder_norm(x)

    def embed(self, pixels: Tensor, context: Context, steps: slice) -> tuple[Tensor, Tensor | None]:
        """(copies N, sub-pixels) uint8 -> the first layer's input (copies N, P, d), with the class at every position (section
        5.2); and the guess (copies N, P, 3) that the mixture's means are relative to, if the embedding makes one."""
        x, guess = self.embedding(pixels, context.source, steps)
        return self.input_dropout(x if context.label is None else x + context.label), guess

    def rotary(self, steps: slice) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (steps, D / 2) of these steps' positions; None in the paper's family."""
        return (self.cos[steps], self.sin[steps]) if self.config.family == "modern" else None

    def source_rotary(self) -> tuple[Tensor, Tensor] | None:
        """The same of the source's pixels, (S, D / 2)."""
        return (self.source_cos, self.source_sin) if self.config.family == "modern" else None

    def parameters_of(self, x: Tensor, guess: Tensor | None, context: Context) -> Tensor:
        """(copies N, P, d) -> (N, P, output parameters)."""
        # The parameters are float32 also under autocast: in bfloat16 a mean is off by a level.
        with torch.autocast(x.device.type, enabled=False):
            params = self.head(self.norm(x.to(self.head.weight.dtype)))
            if context.copies == 2:
                params, guess = guide(*params.chunk(2), context.guidance), None if guess is None else guess.chunk(2)[0]
            return params if guess is None else dmol.shift_means(params, guess)

    # ---- files ---------------------------------------------------------------------------------------------

    origin: checkpoint.Origin | None = None  # what the weights were made from, if that is known: saved and loaded with them

    def save_pretrained(self, save_directory: str | Path, *, dtype: torch.dtype = torch.float32, **hub_options):
        """Writes config.json and safetensors shards of at most 9 MB, matrices inside the blocks in `dtype`.

        That is torch.float32 or torch.bfloat16, with which the compiled sampler is faster. See `imtx.checkpoint.save`.

        hub_options (`push_to_hub`, `repo_id`, ...) are those of `PyTorchModelHubMixin.save_pretrained`.
        """
        checkpoint.save(self, Path(save_directory), dtype)
        if hub_options:
            return super().save_pretrained(save_directory, **hub_options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """The mixin's hook. It has removed the config.json that `save_pretrained` wrote, and keeps the weights."""
        self.config.save(save_directory / "config.json")

    def generate_model_card(self, *args, **kwargs):
        """The mixin's hook, for folders without a card: weights that are bound to a licence say so. See train/publish.py."""
        licence = (self.origin.licence if self.origin else None) or {"id": None, "name": None, "link": None}
        card = super().generate_model_card(*args, **kwargs)
        card.data.license, card.data.license_name, card.data.license_link = (licence[key] for key in ("id", "name", "link"))
        return card

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> "ImageTransformer":
        """A model in float32 and eval mode, from a folder, a bundled name or a Hub id; see `imtx.checkpoint.find`.

        revision: branch, tag or commit of a Hub id. Raises CheckpointError.
        """
        folder = checkpoint.find(name, revision)
        return checkpoint.load(cls, folder)


def require(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError, with both shapes and dtypes, for what is not such a tensor; a side of None may be of any length."""
    kind = str(dtype).removeprefix("torch.")
    expected = f"({', '.join('N' if n is None else str(n) for n in shape)}{',' if len(shape) == 1 else ''})"
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a {kind} tensor of shape {expected}, got {type(tensor).__name__}.")
    fits = tensor.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, tensor.shape))
    if tensor.dtype != dtype or not fits:
        raise ValueError(f"{name} must be {kind} of shape {expected}, got {tensor.dtype} {tuple(tensor.shape)}.")
