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


def guide(labelled: Tensor, unlabelled: Tensor, guidance: float) -> Tensor:
    """Parameters (..., n) with a label go on in the direction in which it moved them: classifier-free guidance.

    Ho and Salimans, Classifier-Free Diffusion Guidance (2022). Of logits this is p(x) (p(x | label) / p(x))^guidance. A mixture
    to a power is no mixture, and has no exact twin of that: here all of its parameters, before `dmol.shift_means`, are moved.
    """
    return unlabelled + guidance * (labelled - unlabelled)


def build_output(config: Config) -> Output:
    if config.output == "dmol":
        return Output(
            config.mixtures * dmol.PARAMETERS, dmol.DRAWS, partial(dmol.log_prob, levels=config.levels),
            dmol.temper, partial(dmol.draw, levels=config.levels),
        )
    return Output(config.levels, categorical.DRAWS, categorical.log_prob, categorical.temper, categorical.draw)
