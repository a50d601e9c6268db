"""What an Image Transformer is made of: one dataclass, saved as config.json. `presets.py` has the named ones."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Config:
    """Shape of a model. The sequence is made of positions, and a position is

    * one pixel for `output="dmol"` (discretized mixture of logistics, paper section 3.4), or
    * one sub-pixel (a colour of a pixel) for `output="categorical"` (256-way softmax).

    Raises ValueError, naming the two numbers at odds, for a shape that cannot be built.
    """

    family: str = "modern"  # "modern" or "paper": the block and what it reads (imtx/blocks.py, imtx/embedding.py)
    output: str = "dmol"  # "dmol" or "categorical"
    levels: int = 256  # of a colour, 0..levels-1
    image_size: int = 32  # height and width, in pixels
    source_size: int = 0  # super-resolution: height and width of the source; 0 = no source, no encoder
    classes: tuple[str, ...] = ()  # names, in label order; () = unconditional only
    layout: str = "1d"  # generation order and memory blocks: "1d" or "2d" (imtx/layout.py)
    # "1d": l_q positions; "2d": h_q rows and w_q columns of pixels
    query_block: int | tuple[int, int] = 256
    # "1d": l_m positions generated before the query block; "2d": the flange, h_m rows above and w_m columns on both sides
    memory_block: int | tuple[int, int] = 256
    # "paper": "sinusoid" or "learned", added to the input; "modern": "rotary", in every attention
    position_encoding: str = "rotary"
    width: int = 128  # d, the model's width
    layers: int = 6  # decoder blocks
    encoder_layers: int = 0  # encoder blocks, over the source; super-resolution only
    heads: int = 4
    attention_width: int = 0  # features of the queries of all heads together, likewise keys and values; 0 = width
    ffn: int = 384  # inner width of the feed-forward layer
    mixtures: int = 10  # logistics in the mixture; "dmol" only
    dropout: float = 0.0

    def __post_init__(self):
        names = self.classes
        if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"classes must be a list of names, got {names!r}.")
        if len(set(names)) < len(names):
            raise ValueError(f"classes must differ from each other, got {list(names)}.")
        object.__setattr__(self, "classes", tuple(self.classes))  # json gives a list
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = {"source_size": 0, "encoder_layers": 0, "attention_width": 0, "levels": 2}.get(field.name, 1)
            if field.type is int and (type(value) is not int or value < least):
                raise ValueError(f"{field.name} must be a whole number of at least {least}, got {value}.")
        choices = {"family": ("modern", "paper"), "output": ("dmol", "categorical"), "layout": ("1d", "2d")}
        choices["position_encoding"] = ("rotary",) if self.family == "modern" else ("sinusoid", "learned")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                of = f" of the {self.family} family" if name == "position_encoding" else ""
                raise ValueError(f"{name}{of} must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}.")
        if self.levels > 256:
            raise ValueError(f"levels must be at most 256, which a byte holds, got {self.levels}.")
        self._check_blocks()
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}.")
        inner = self.attention_width or self.width
        if inner % self.heads:
            raise ValueError(f"heads {self.heads} must divide the {inner} features of attention.")
        if self.family == "modern" and inner % (4 * self.heads):
            raise ValueError(
                f"The {inner} features of attention must be a multiple of 4 x heads = {4 * self.heads}: rotary positions "
                "pair up the features of a head, for rows and for columns."
            )
        if self.position_encoding == "sinusoid" and self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4: sine and cosine, for rows and for columns.")
        if self.source_size and self.image_size % self.source_size:
            raise ValueError(f"source_size {self.source_size} must divide image_size {self.image_size}.")
        if (self.encoder_layers > 0) != (self.source_size > 0):
            raise ValueError(
                f"encoder_layers {self.encoder_layers} and source_size {self.source_size} go together: "
                "both above 0 for super-resolution, both 0 otherwise."
            )
        if self.source_size and self.classes:
            raise ValueError(f"A super-resolution model takes no classes, got {len(self.classes)} of them.")

    def _check_blocks(self) -> None:
        for name, least in (("query_block", 1), ("memory_block", 0)):
            value = getattr(self, name)
            if self.layout == "1d":
                if type(value) is not int or value < least:
                    raise ValueError(f"{name} of a 1d layout must be a whole number of at least {least}, got {value}.")
                continue
            pair = tuple(value) if isinstance(value, (tuple, list)) else ()  # json gives a list
            if len(pair) != 2 or any(type(n) is not int or n < least for n in pair):
                raise ValueError(f"{name} of a 2d layout must be (rows, columns) of at least {least}, got {value}.")
            object.__setattr__(self, name, pair)
        if self.layout == "1d":
            if self.positions % self.query_block:
                raise ValueError(f"query_block {self.query_block} must divide the {self.positions} positions of an image.")
            if self.memory_block > self.positions:
                raise ValueError(f"memory_block {self.memory_block} exceeds the {self.positions} positions of an image.")
            return
        for side, block, flange in zip(("rows", "columns"), self.query_block, self.memory_block):
            if self.image_size % block:
                raise ValueError(f"query_block: {block} must divide the {self.image_size} {side} of an image.")
            if flange > self.image_size:
                raise ValueError(f"memory_block: {flange} exceeds the {self.image_size} {side} of an image.")

    @property
    def channels(self) -> int:
        """Positions a pixel."""
        return 1 if self.output == "dmol" else 3

    @property
    def head_width(self) -> int:
        """Features of a head."""
        return (self.attention_width or self.width) // self.heads

    @property
    def positions(self) -> int:
        """Positions an image, which is the length of the sequence."""
        return self.image_size**2 * self.channels

    @property
    def sub_pixels(self) -> int:
        """Dimensions an image: the divisor of bits/dim."""
        return self.image_size**2 * 3

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Raises OSError, and ValueError if the file is not JSON, lacks a field, names an unknown one or describes an
        impossible shape."""
        try:
            fields = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path} holds no JSON object.")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := fields.keys() - known:
            raise ValueError(f"{path} is not of an imtx model: it names {', '.join(sorted(unknown))}.")
        if missing := known - fields.keys():  # a default in its place might be another model
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}. Download it again.")
        return cls(**fields)
