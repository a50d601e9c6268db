"""Categorical output: a softmax over the L levels (256, unless the model has fewer) of one sub-pixel (paper section 3.4)."""

import torch.nn.functional as F
from torch import Tensor

from .dmol import pick

DRAWS = 1  # uniform numbers a sub-pixel


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature (paper section 4)."""
    return logits / temperature


def log_prob(logits: Tensor, colours: Tensor) -> Tensor:
    """Log-probability in nats: logits (..., L) float, colours (..., 1) integers 0..L-1 -> (...)."""
    return F.log_softmax(logits, dim=-1).gather(-1, colours.long()).squeeze(-1)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverts the distribution function: logits (..., L), uniforms (..., 1) float64 in [0, 1) -> (..., 1) uint8."""
    return pick(logits.softmax(dim=-1), uniforms[..., 0]).unsqueeze(-1).byte()
