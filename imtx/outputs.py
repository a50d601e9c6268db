"""The output distribution of a position (paper section 3.4), chosen by the configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from . import categorical, dmol
from .config import Config


@dataclass(frozen=True)
class Output:
    """One interface to `imtx/dmol.py` (a position is a pixel) and `imtx/categorical.py` (a position is a sub-pixel)."""

    parameters: int  # numbers that describe the distribution of a position
    draws: int  # uniform numbers that a draw uses up
    log_prob: Callable[[Tensor, Tensor], Tensor]  # parameters (..., n), colours (..., 3 or 1) -> nats (...)
    temper: Callable[[Tensor, float], Tensor]  # parameters, temperature -> parameters
    draw: Callable[[Tensor, Tensor], Tensor]  # parameters, uniforms (..., draws) float64 -> colours (..., 3 or 1) uint8


def build_output(config: Config) -> Output:
    if config.output == "dmol":
        return Output(
            config.mixtures * dmol.PARAMETERS, dmol.DRAWS, partial(dmol.log_prob, levels=config.levels),
            dmol.temper, partial(dmol.draw, levels=config.levels),
        )
    return Output(config.levels, categorical.DRAWS, categorical.log_prob, categorical.temper, categorical.draw)
