"""Discretized mixture of logistics: one distribution over the three 8-bit colours of a pixel.

Paper section 3.4 and Salimans et al., PixelCNN++ (2017). Colours live on [-1, 1], level v at v / 127.5 - 1; the
mass of a level is a logistic's mass on the bin of half width 1/255 around it, and the bins of 0 and 255 are open to
the outside, so that the 256 masses sum to 1. (With L levels instead of 256: v / ((L - 1) / 2) - 1 and 1 / (L - 1).)

The mixture is over whole pixels: channel log-probabilities are summed inside a component. Within a component, the
mean of G depends on R, and that of B on R and G.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LOG_SCALE = -7.0
PARAMETERS = 10  # a component: 1 logit, 3 means, 3 log-scales, 3 coupling coefficients
DRAWS = 4  # uniform numbers a pixel: the component, R, G, B


def to_unit(colours: Tensor, levels: int = 256) -> Tensor:
    """Levels 0..levels-1 -> float32 (or the colours' own floating dtype) on [-1, 1]."""
    colours = colours if colours.is_floating_point() else colours.float()
    return colours / ((levels - 1) / 2) - 1


def unpack(params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(..., 10 K) -> logits (..., K), means (..., 3, K), log-scales (..., 3, K), couplings (..., 3, K)."""
    k = params.shape[-1] // PARAMETERS
    logits, rest = params.split([k, 9 * k], dim=-1)
    means, log_scales, couplings = rest.unflatten(-1, (3, 3, k)).unbind(-3)  # (..., 9 K) -> 3 x (..., 3, K)
    return logits, means, log_scales, torch.tanh(couplings)


def shift_means(params: Tensor, base: Tensor) -> Tensor:
    """Turns means that are relative to `base` (..., 3), a first guess of the pixel, into absolute ones.

    The couplings act on what is left after the guess: mean_G = base_G + m_G + c_0 (R - base_R), and so on.
    """
    _, means, _, c = unpack(params)  # (..., 3, K) each
    k = means.shape[-1]
    r, g, b = base.unsqueeze(-1).unbind(-2)  # (..., 1) each
    shift = torch.stack([r.expand_as(c[..., 0, :]), g - c[..., 0, :] * r, b - c[..., 1, :] * r - c[..., 2, :] * g], -2)
    # (..., 3, K) -> (..., 3 K), which stand behind the K logits
    return torch.cat([params[..., :k], params[..., k : 4 * k] + shift.flatten(-2), params[..., 4 * k :]], dim=-1)


def temper(params: Tensor, temperature: float) -> Tensor:
    """Mixture logits divided by the temperature, scales multiplied by it (paper section 4).

    A mixture of logistics has no exact twin of a softmax's temperature; this is the natural choice: it sharpens
    both the choice of a component and the component itself.
    """
    k = params.shape[-1] // PARAMETERS
    # The floor belongs to the model, not to the temperature: it comes first, and draw() does not floor again.
    log_scales = params[..., 4 * k : 7 * k].clamp(min=MIN_LOG_SCALE) + math.log(temperature)
    return torch.cat([params[..., :k] / temperature, params[..., k : 4 * k], log_scales, params[..., 7 * k :]], dim=-1)


def log_prob(params: Tensor, colours: Tensor, levels: int = 256) -> Tensor:
    """Log-probability of whole pixels, in nats.

    params: (..., 10 K) float; colours: (..., 3) integers 0..levels-1, the leading shapes equal. Returns (...) in the
    params' dtype, which should be float32 at least.
    """
    logits, means, log_scales, couplings = unpack(params)
    log_scales = log_scales.clamp(min=MIN_LOG_SCALE)
    x, half_bin = to_unit(colours.to(params.dtype), levels).unsqueeze(-1), 1 / (levels - 1)  # (..., 3, 1)
    r, g = x[..., 0, :], x[..., 1, :]
    means = torch.stack(
        [
            means[..., 0, :],
            means[..., 1, :] + couplings[..., 0, :] * r,
            means[..., 2, :] + couplings[..., 1, :] * r + couplings[..., 2, :] * g,
        ],
        dim=-2,
    )  # (..., 3, K)
    inverse_scale = torch.exp(-log_scales)
    upper = inverse_scale * (x - means + half_bin)
    lower = inverse_scale * (x - means - half_bin)
    # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)) exactly. In logs this never underflows, so the
    # density that other code falls back to far from the mean is not needed. At both ends one factor is 1.
    width = torch.log(-torch.expm1(-2 * half_bin * inverse_scale))
    lowest, highest = colours.unsqueeze(-1) == 0, colours.unsqueeze(-1) == levels - 1
    log_mass = (
        torch.where(highest, 0, F.logsigmoid(upper))
        + torch.where(lowest, 0, F.logsigmoid(-lower))
        + torch.where(lowest | highest, 0, width)
    )  # (..., 3, K)
    return torch.logsumexp(F.log_softmax(logits, dim=-1) + log_mass.sum(dim=-2), dim=-1)


def draw(params: Tensor, uniforms: Tensor, levels: int = 256) -> Tensor:
    """Draws whole pixels by inverting the distribution functions.

    params: (..., 10 K) float, as `temper` returns them; uniforms: (..., 4) float64 in [0, 1). Returns (..., 3) uint8. Each
    colour is rounded to its level before the next one's mean is formed: samples follow `log_prob` exactly.
    """
    logits, means, log_scales, couplings = unpack(params)
    component = pick(torch.softmax(logits, dim=-1), uniforms[..., 0])  # (...)
    component = component[..., None, None].expand(*means.shape[:-1], 1)  # (..., 3, 1)
    means, log_scales, couplings = (t.gather(-1, component).squeeze(-1) for t in (means, log_scales, couplings))
    # In float64 up to here: in float32 a uniform close to 1 rounds to 1, and the noise to infinity.
    noise = torch.exp(log_scales) * torch.logit(uniforms[..., 1:]).to(params.dtype)  # (..., 3)
    r = _to_level(means[..., 0] + noise[..., 0], levels)
    red = to_unit(r, levels)
    g = _to_level(means[..., 1] + couplings[..., 0] * red + noise[..., 1], levels)
    green = to_unit(g, levels)
    b = _to_level(means[..., 2] + couplings[..., 1] * red + couplings[..., 2] * green + noise[..., 2], levels)
    return torch.stack([r, g, b], dim=-1).to(torch.uint8)


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverse distribution function of a categorical: (..., N) and (...) float64 in [0, 1) -> (...) int64."""
    cumulative = probabilities.double().cumsum(dim=-1)
    # Scaled by the total, which rounding keeps from being exactly 1.
    threshold = uniform.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


def _to_level(x: Tensor, levels: int) -> Tensor:
    """[-1, 1] -> the nearest level, still in floating point; what lies outside goes to the lowest or highest."""
    return torch.round((x + 1) * ((levels - 1) / 2)).clamp(0, levels - 1)
