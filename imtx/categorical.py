"""Categorical output: a 256-way softmax over the levels of one sub-pixel (paper section 3.2)."""

import torch.nn.functional as F
from torch import Tensor

from .dmol import pick

PARAMETERS = 256
DRAWS = 1  # uniform numbers a sub-pixel


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature."""
    return logits / temperature


def log_prob(logits: Tensor, levels: Tensor) -> Tensor:
    """Log-probability in nats: logits (..., 256) float, levels (..., 1) integers 0..255 -> (...)."""
    return F.log_softmax(logits, dim=-1).gather(-1, levels.long()).squeeze(-1)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverts the distribution function: logits (..., 256), uniforms (..., 1) float64 in [0, 1) -> (..., 1) uint8."""
    return pick(logits.softmax(dim=-1), uniforms[..., 0]).unsqueeze(-1).byte()
