"""Weights to start training from, for both families."""

import math

import torch
from torch import nn

from .inputs import nearby


def apply(model: nn.Module) -> None:
    """Draws all weights of an ImageTransformer anew."""
    (_modern if model.config.family == "modern" else _paper)(model)


@torch.no_grad()
def _paper(model: nn.Module) -> None:
    """T2T's: every matrix uniform with variance 0.2 / (mean of its two sizes), position tables of variance 1 / d.

    T2T has a matrix each for queries, keys and values; and its linear layer of a pixel is a convolution of one channel
    with a 1 x 3 window, whose sizes count as 3 and 3 d.
    """
    for name, parameter in model.named_parameters():
        if ".place." in name:
            nn.init.normal_(parameter, std=model.config.width**-0.5)
        elif name.endswith("colour.pixel.weight"):
            bound = math.sqrt(3 * 0.2 / ((3 + 3 * model.config.width) / 2))
            nn.init.uniform_(parameter, -bound, bound)
        elif parameter.ndim == 2:
            for matrix in parameter.chunk(3 if ".qkv." in name else 2 if ".kv." in name else 1):
                nn.init.xavier_uniform_(matrix, gain=math.sqrt(0.2))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


@torch.no_grad()
def _modern(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith(("out.weight", "down.weight")):  # a block begins as the identity
            nn.init.zeros_(parameter)
    nn.init.normal_(model.head.weight, std=0.01)
    if model.config.output == "dmol":
        _mixture(model)


def _mixture(model: nn.Module) -> None:
    """Means start at a plain guess of the pixel, scales at typical errors of it: 10 levels, give or take."""
    k = model.config.mixtures
    model.head.bias[4 * k : 7 * k] = torch.linspace(-5.0, -1.5, k).repeat(3)  # log-scales on [-1, 1]
    predictor = model.embedding.predictor
    predictor.weight.zero_()
    left, up, source = 0, 1, nearby(model.config) // 3  # places among the input's pixels
    guess = {left: 0.5, up: 0.5} if not model.config.source_size else {left: 0.25, up: 0.25, source: 0.5}
    for place, share in guess.items():
        predictor.weight[:, 3 * place : 3 * place + 3] = share * torch.eye(3)
