"""The layers that repeat: attention and feed-forward with their residual connections, in both families.

The paper's block (section 3.2, equations 1 and 2): layer, dropout, residual, LayerNorm; a feed-forward layer with ReLU.
The modern block: RMSNorm, layer, dropout, residual; SwiGLU, QK-norm and rotary positions. N images, P positions, d width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Cache, FullAttention, LocalSelfAttention, Norm
from .config import Config
from .layout import Layout


class SwiGLU(nn.Module):
    """Feed-forward layer of the modern block (Shazeer, 2020), position by position: (N, P, d) -> (N, P, d)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class ReLUFeedForward(nn.Module):
    """Feed-forward layer of the paper (section 3.2, equation 2), position by position: (N, P, d) -> (N, P, d)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Block(nn.Module):
    """What encoder and decoder blocks share: their parts by family, and where the normalisation stands."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.modern = config.family == "modern"
        self.attention_norm, self.ffn_norm = self.norm(), self.norm()
        self.ffn = (SwiGLU if self.modern else ReLUFeedForward)(config.width, config.ffn)
        self.dropout = nn.Dropout(config.dropout)

    def norm(self) -> nn.Module:
        return Norm(self.config.width) if self.modern else nn.LayerNorm(self.config.width, eps=1e-6)

    def attention_options(self) -> dict:
        """The paper drops out a layer's output alone, the modern block attention weights too."""
        config = self.config
        return dict(
            width=config.width, inner=config.attention_width or config.width, heads=config.heads,
            dropout=config.dropout if self.modern else 0.0, qk_norm=self.modern,
        )

    def residual(self, x: Tensor, norm: nn.Module, layer) -> Tensor:
        """A layer's output added to its input, normalised after the sum (paper) or before the layer (modern)."""
        if self.modern:
            return x + self.dropout(layer(norm(x)))
        return norm(x + self.dropout(layer(x)))


class EncoderBlock(Block):
    """Unmasked self-attention over the source, then feed-forward."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.attention = FullAttention(**self.attention_options())

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """(N, S, d) -> (N, S, d), S source positions."""

        def attention(x):
            return self.attention(x, rotary, self.attention.keys_values(x, rotary))

        x = self.residual(x, self.attention_norm, attention)
        return self.residual(x, self.ffn_norm, self.ffn)


class DecoderBlock(Block):
    """Local self-attention, attention to the encoder's output if there is one, then feed-forward."""

    def __init__(self, config: Config, layout: Layout):
        super().__init__(config)
        self.attention = LocalSelfAttention(layout=layout, **self.attention_options())
        if config.source_size:
            self.source_norm = self.norm()
            self.source_attention = FullAttention(**self.attention_options())

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, source_kv: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None, step: int | None = None,
    ) -> Tensor:
        """(N, P, d) -> (N, P, d), in parallel; with `step`, (N, 1, d) -> (N, 1, d), through the cache.

        rotary: cosines and sines of the positions, (P, D / 2) each; source_kv: keys and values of the source, (N, H, S, D) each.
        """

        def attention(x):
            return self.attention(x, rotary, cache) if step is None else self.attention.step(x, rotary, cache, step)

        x = self.residual(x, self.attention_norm, attention)
        if source_kv is not None:
            x = self.residual(x, self.source_norm, lambda x: self.source_attention(x, rotary, source_kv))
        return self.residual(x, self.ffn_norm, self.ffn)
