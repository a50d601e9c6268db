"""Presets: each builds in full size, the paper's have the paper's numbers of weights, and shrunken twins of all work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import conditions, draw_naively, pictures_for, stepwise
from imtx import PRESETS, ImageTransformer, draw


TABLE = (Path(__file__).resolve().parents[1] / "README.md").read_text().partition("\n## Presets\n")[2]


def linear(inputs, outputs, bias=True):
    return inputs * outputs + (outputs if bias else 0)


def paper_block(d, ffn, attention=None, sources=False):
    """Query, key and value, output, none with a bias; ReLU feed-forward; LayerNorm after each."""
    attends = linear(d, 3 * (attention or d), bias=False) + linear(attention or d, d, bias=False) + 2 * d
    return (2 if sources else 1) * attends + linear(d, ffn) + linear(ffn, d) + 2 * d


# As tensor2tensor's hyperparameter sets have them; sinusoids have no weights.
CATEGORICAL = 3 * 256 * 512 + linear(512, 256)  # in: a table of (channel, level); out: 256 logits a sub-pixel
PAPER_COUNTS = {
    "paper-cifar10-cat": CATEGORICAL + 12 * paper_block(512, 2048),  # "38.3M"
    # in: a linear layer from the colours of a pixel, tables of rows and of columns; out: 10 numbers a logistic, no bias
    "paper-cifar10-dmol": linear(3, 256) + 2 * 32 * 256 + 14 * paper_block(256, 512, 512) + linear(256, 100, bias=False),
    "paper-imagenet32-cat": CATEGORICAL + 12 * paper_block(512, 2048),
    # the source has a table of its own
    "paper-sr-1d": CATEGORICAL + 3 * 256 * 512 + 4 * paper_block(512, 2048) + 8 * paper_block(512, 2048, sources=True),
}
PAPER_COUNTS["paper-sr-2d"] = PAPER_COUNTS["paper-sr-1d"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds(name):
    model = ImageTransformer(PRESETS[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    if name.startswith("paper-"):
        assert count == PAPER_COUNTS[name]
    if not name.startswith("ablation-"):
        assert f"| `{name}` |" in TABLE and f" {count:,} |" in TABLE.split(f"| `{name}` |")[1].split("\n")[0]
    published = {"paper-cifar10-cat": (38.3e6, 0.05e6), "paper-cifar10-dmol": (11e6, 0.5e6)}  # and to how many digits
    assert name not in published or abs(count - published[name][0]) <= published[name][1]
    assert model.layout.blocks > 1  # the point of local attention


def shrunken(config):
    """8 x 8 pixels in the preset's own proportions: strips of a 16th of the positions, rectangles of a 4th of the sides."""
    assert config.image_size == 32
    if config.layout == "1d":
        strip = lambda steps: max(1, steps // 16)
        blocks = dict(query_block=strip(config.query_block), memory_block=strip(config.memory_block))
    else:
        rectangle = lambda sides: tuple(-(-n // 4) for n in sides)
        blocks = dict(query_block=rectangle(config.query_block), memory_block=rectangle(config.memory_block))
    return replace(
        config, **blocks, image_size=8, source_size=2 if config.source_size else 0, layers=2,
        encoder_layers=min(1, config.encoder_layers), width=32, attention_width=config.attention_width * 32 // config.width,
        heads=2, ffn=64,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_shrunken_preset_trains_evaluates_and_samples(name):
    torch.manual_seed(0)
    model = ImageTransformer(shrunken(PRESETS[name])).double()
    pixels, condition = pictures_for(model, 3), conditions(model, 3)
    nats = lambda: -model.log_prob(pixels, **condition).mean()

    with torch.no_grad():
        model.eval()
        before = nats()
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(6):
        optimiser.zero_grad()
        nats().backward()
        optimiser.step()
    for weight, parameter in model.named_parameters():  # after the first step, as a modern block starts as the identity
        assert parameter.grad.isfinite().all() and parameter.grad.any(), weight
    model.eval().requires_grad_(False)
    assert nats() < before

    params = stepwise(model, pixels, **condition)
    log_prob = model.output.log_prob(params, model.targets(pixels))
    torch.testing.assert_close(log_prob, model.log_prob(pixels, **condition), rtol=1e-9, atol=1e-9)
    options = dict(given=pixels[:2], given_pixels=43)  # the rest of a query block, and more
    two = {key: value[:2] for key, value in condition.items()}
    assert torch.equal(draw(model, [0, 1], **options, **two), draw_naively(model, [0, 1], **options, **two))
