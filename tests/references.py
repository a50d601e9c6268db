"""What the model computes, once more: slow, plain, written from the definitions, with no table or formula of imtx."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from imtx import Config

# ---- local attention (paper section 3.3) --------------------------------------------------------------------


def generation_order(config: Config) -> list[tuple[int, int, int]]:
    """(row, column, channel) of each position, in the order in which they are generated."""
    size = range(config.image_size)
    raster = [(row, column, channel) for row in size for column in size for channel in range(config.channels)]
    if config.layout == "1d":
        return raster
    h_q, w_q = config.query_block  # rectangles in raster order, raster order inside each
    return sorted(raster, key=lambda place: (place[0] // h_q, place[1] // w_q, place))


def sees(config: Config) -> Tensor:
    """(P, P) bool: whether the query at one step sees the key of another."""
    places = generation_order(config)

    def visible(query: int, key: int) -> bool:
        if key > query:
            return False
        if config.layout == "1d":
            return key >= query // config.query_block * config.query_block - config.memory_block
        (h_q, w_q), (h_m, w_m) = config.query_block, config.memory_block
        row, column, _ = places[query]
        top, left = row // h_q * h_q, column // w_q * w_q  # corner of the query's rectangle
        row, column, _ = places[key]
        return top - h_m <= row < top + h_q and left - w_m <= column < left + w_q + w_m

    steps = range(len(places))
    return torch.tensor([[visible(query, key) for key in steps] for query in steps])


def dense_attention(layer, x: Tensor, rotary: tuple[Tensor, Tensor] | None, sees: Tensor) -> Tensor:
    """The weights of a LocalSelfAttention in one softmax over all positions: (N, P, d) -> (N, P, d)."""
    q, k, v = (torch.einsum("npd,ed->npe", x, weight) for weight in layer.qkv.weight.chunk(3))
    q, k, v = (t.unflatten(-1, (layer.heads, -1)) for t in (q, k, v))  # (N, P, H, D)
    if rotary is not None:  # the modern family, whose queries and keys are normalised and turned
        q, k = (root_mean_square_is(norm.weight, t) for t, norm in ((q, layer.query_norm), (k, layer.key_norm)))
        q, k = turned(q, *rotary), turned(k, *rotary)
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~sees, -math.inf).softmax(dim=-1)
    return torch.einsum("nhqk,nkhd,ehd->nqe", weights, v, layer.out.weight.unflatten(1, (layer.heads, -1)))


def root_mean_square_is(weight: Tensor, x: Tensor) -> Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).sqrt() * weight


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(N, P, H, D): feature i and feature i + D / 2 as one complex number, times e^(i angle); cos, sin: (P, D / 2)."""
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


# ---- the paper's blocks (section 3.2) -----------------------------------------------------------------------


def torch_layer(block, config: Config) -> nn.Module:
    """The weights of an encoder or decoder block of the paper's family in torch's own post-norm layer with ReLU."""
    decoder = hasattr(block, "source_attention")
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    layer = kind(config.width, config.heads, config.ffn, dropout=0.0, layer_norm_eps=1e-6, batch_first=True)
    layer = layer.double().eval().requires_grad_(False)
    in_order = [("self_attn", block.attention, block.attention_norm)]
    if decoder:
        in_order.append(("multihead_attn", block.source_attention, block.source_norm))
    norms = [norm for _, _, norm in in_order] + [block.ffn_norm]
    for name, ours, _ in in_order:  # torch has biases here, and starts them at 0
        theirs = getattr(layer, name)
        theirs.in_proj_weight.copy_(ours.qkv.weight if hasattr(ours, "qkv") else torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.out_proj.weight.copy_(ours.out.weight)
    for number, norm in enumerate(norms, start=1):
        getattr(layer, f"norm{number}").load_state_dict(norm.state_dict())
    layer.linear1.load_state_dict(block.ffn.up.state_dict())
    layer.linear2.load_state_dict(block.ffn.down.state_dict())
    return layer


# ---- positions ----------------------------------------------------------------------------------------------


def timing_signal(height: int, width: int, features: int) -> np.ndarray:
    """(height, width, features): tensor2tensor's `add_timing_signal_nd` on an image of zeros, term by term."""
    timescales = features // 4
    increment = math.log(1e4) / max(timescales - 1, 1)
    signal = np.zeros((height, width, features))
    for dimension, length in enumerate((height, width)):
        time = np.arange(length)[:, None] * np.exp(-increment * np.arange(timescales))
        wave = np.concatenate([np.sin(time), np.cos(time)], axis=1)  # (length, features / 2)
        start = dimension * 2 * timescales
        signal[:, :, start : start + 2 * timescales] += wave[:, None] if dimension == 0 else wave[None]
    return signal


# ---- discretized mixture of logistics (PixelCNN++) ----------------------------------------------------------


def dmol_log_prob(params: np.ndarray, colours: np.ndarray, levels: int = 256) -> np.ndarray:
    """(n, 10 K) and (n, 3) -> (n,): ln sum_k pi_k prod_c (sigmoid(upper) - sigmoid(lower)), in float64."""
    k = params.shape[1] // 10
    # 1 logit, 3 means, 3 log-scales, 3 couplings a component, each part colour by colour
    logits, (means, log_scales, couplings) = params[:, :k], params[:, k:].reshape(-1, 3, 3, k).swapaxes(0, 1)
    x, couplings = 2.0 * colours[..., None] / (levels - 1) - 1, np.tanh(couplings)  # (n, 3, 1)
    means = [
        means[:, 0],
        means[:, 1] + couplings[:, 0] * x[:, 0],
        means[:, 2] + couplings[:, 1] * x[:, 0] + couplings[:, 2] * x[:, 1],
    ]
    log_mass = logits - log_sum_exp(logits)[:, None]
    for c in range(3):
        scale = np.exp(np.maximum(log_scales[:, c], -7.0))
        upper = np.where(colours[:, c, None] == levels - 1, np.inf, (x[:, c] + 1 / (levels - 1) - means[c]) / scale)
        lower = np.where(colours[:, c, None] == 0, -np.inf, (x[:, c] - 1 / (levels - 1) - means[c]) / scale)
        # The difference of two numbers next to 1 has no digits left; mirrored, they are next to 0.
        lower, upper = np.where(lower > 0, -upper, lower), np.where(lower > 0, -lower, upper)
        with np.errstate(divide="ignore"):  # so far from a mean that nothing is left: the logarithm is -inf
            log_mass = log_mass + np.log(sigmoid(upper) - sigmoid(lower))
    return log_sum_exp(log_mass)


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # 1 / inf is what is meant
        return 1 / (1 + np.exp(-x))


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    highest = x.max(axis=1, keepdims=True)
    return (highest + np.log(np.exp(x - highest).sum(axis=1, keepdims=True)))[:, 0]
