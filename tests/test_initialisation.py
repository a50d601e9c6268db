"""Fresh weights: the first guess of a mixture, blocks that do nothing yet; and where dropout is."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZE, conditions, pictures, small, small_config
from torch import nn

from imtx import ImageTransformer


@pytest.mark.parametrize("task", ["class", "sr"])
def test_a_fresh_mixture_starts_from_a_plain_guess_also_under_autocast(task):
    torch.manual_seed(0)
    model = ImageTransformer(small_config("dmol", task)).eval()
    pixels, condition = pictures(1), conditions(model, 1)
    context = model.context(1, condition.get("labels"), condition.get("sources"))
    _, guess = model.embed(pixels.flatten(1), context, slice(None))
    unit = pixels[0].float() / 127.5 - 1
    expected = (unit[1:, :-1] + unit[:-1, 1:]) / 2  # left and up
    if task == "sr":
        large = F.interpolate(condition["sources"].permute(0, 3, 1, 2).float() / 127.5 - 1, (SIZE, SIZE), mode="bilinear")
        expected = expected / 2 + large[0].permute(1, 2, 0)[1:, 1:] / 2
    torch.testing.assert_close(guess.view(SIZE, SIZE, 3)[1:, 1:], expected)
    with torch.autocast("cpu", torch.bfloat16):  # in which a mean would be off by a level
        _, same = model.embed(pixels.flatten(1), context, slice(None))
    assert torch.equal(same, guess)


def test_a_fresh_block_is_the_identity():
    model = ImageTransformer(small_config("dmol", "class"))
    x = torch.randn(2, SIZE * SIZE, model.config.width)
    assert all(torch.equal(block(x, model.rotary(slice(None))), x) for block in model.decoder)


@pytest.mark.parametrize("family, places", [
    ({}, {"attention", "residual"}), (dict(family="paper", position_encoding="sinusoid"), {"residual", "input"}),
])
def test_dropout_is_where_each_family_has_it(family, places):
    for place in ("attention", "residual", "input", None):
        model = small("dmol", "sr", dropout=0.5, **family).train()
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and place != ("input" if name == "input_dropout" else "residual"):
                module.p = 0.0
            elif name.endswith("attention") and place != "attention":
                module.dropout = 0.0
        images, condition = pictures(2), conditions(model, 2)
        differs = not torch.equal(model(images, **condition), model(images, **condition))
        assert differs == (place in places), place
