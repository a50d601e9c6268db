"""The two output distributions, against their formulas, and what they draw against what they promise."""

import decimal
import math
from decimal import Decimal

import numpy as np
import pytest
import torch

from imtx import categorical, dmol

DRAWS = 200_000
FLOOR = -7.0  # the least log-scale


def mixture(logits, means, log_scales, couplings):
    """Parameters (10 K,) of a mixture, float64; the last three are K rows of three. Couplings are given before tanh."""
    columns = [torch.tensor(t, dtype=torch.float64).T.flatten() for t in (means, log_scales, couplings)]
    return torch.cat([torch.tensor(logits, dtype=torch.float64), *columns])


def log_masses(params, levels):
    """log_prob of many pixels (..., 3) under one mixture (10 K,)."""
    return dmol.log_prob(params.expand(*levels.shape[:-1], -1), levels)


def cube(red, green, blue):
    """All pixels of three lists of levels: (R, G, B, 3)."""
    return torch.stack(torch.meshgrid(*map(torch.as_tensor, (red, green, blue)), indexing="ij"), dim=-1)


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_frequencies(counts, masses):
    """Pearson's chi-square, over the cells where enough is expected: within 5 standard deviations."""
    counts, expected = counts.flatten().double(), masses.flatten().double() * counts.sum()
    assert not counts[masses.flatten() < 1e-12].any(), "something impossible was drawn"
    usual = expected >= 10
    chi_square = ((counts - expected).square() / expected)[usual].sum().item()
    cells = usual.sum().item()
    assert cells > 20 and abs(chi_square - cells) < 5 * math.sqrt(2 * cells), (chi_square, cells)


# ---- the mixture's formula, in decimals, so that nothing underflows and nothing cancels ---------------------


def exact_log_prob(params, pixel):
    """ln sum_k pi_k prod_c (sigmoid(upper) - sigmoid(lower)), straight from PixelCNN++, to 60 digits."""
    with decimal.localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, decimal.MAX_EMAX, decimal.MIN_EMIN
        p = [Decimal(value) for value in params.tolist()]
        k = len(p) // 10
        x = [Decimal(level) / Decimal("127.5") - 1 for level in pixel]
        weights = [p[j].exp() for j in range(k)]
        total = Decimal(0)
        for j in range(k):
            mean, log_scale, coupling = ([p[k * (1 + 3 * part + c) + j] for c in range(3)] for part in range(3))
            c = [((2 * value).exp() - 1) / ((2 * value).exp() + 1) for value in coupling]  # tanh
            mean = [mean[0], mean[1] + c[0] * x[0], mean[2] + c[1] * x[0] + c[2] * x[1]]
            mass = weights[j] / sum(weights)
            for channel in range(3):
                scale = max(log_scale[channel], Decimal(FLOOR)).exp()
                upper = (x[channel] + 1 / Decimal(255) - mean[channel]) / scale
                lower = (x[channel] - 1 / Decimal(255) - mean[channel]) / scale
                mass *= exact_bin(lower, upper, pixel[channel])
            total += mass
        return float(total.ln())


def exact_bin(lower, upper, level):
    """A logistic's mass between two places; the bins of 0 and 255 are open."""
    if lower > 0:  # mirrored, as 1 - tiny would lose its digits
        lower, upper, level = -upper, -lower, 255 - level
    high = Decimal(1) if level == 255 else sigmoid(upper)
    return high if level == 0 else high - sigmoid(lower)


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def random_params(generator, spread, scales, k=3):
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    low, high = scales
    log_scales = low + (high - low) * torch.rand(3 * k, generator=generator, dtype=torch.float64)
    return torch.cat([2 * randn(k), spread * randn(3 * k), log_scales, randn(3 * k)])


@pytest.mark.parametrize("scales", [(-4, 0), (-20, -6), (0, 15)], ids=["usual", "narrow", "wide"])
@pytest.mark.parametrize("spread", [0.5, 50.0], ids=["near", "far"])
def test_dmol_is_the_formula(scales, spread):
    generator = torch.Generator().manual_seed(0)
    params = torch.stack([random_params(generator, spread, scales) for _ in range(60)])
    levels = torch.randint(0, 256, (60, 3), generator=generator)
    levels[::3, 0], levels[1::3, 1], levels[2::3, 2], levels[::7] = 0, 255, 0, 255
    expected = torch.tensor([exact_log_prob(p, x) for p, x in zip(params, levels.tolist())], dtype=torch.float64)
    torch.testing.assert_close(dmol.log_prob(params, levels), expected, rtol=1e-9, atol=1e-9)
    # The parameters are the same to float32's precision only: what is far away is off in proportion.
    expected = torch.tensor([exact_log_prob(p, x) for p, x in zip(params.float(), levels.tolist())])
    torch.testing.assert_close(dmol.log_prob(params.float(), levels), expected, rtol=2e-5, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, -1.0, 1.0, 1e3, -1e3])
@pytest.mark.parametrize("log_scale", [-30.0, -7.0, 0.0, 20.0])
def test_dmol_and_its_gradient_are_finite(dtype, mean, log_scale):
    params = mixture([0.0, -50.0], [[mean] * 3] * 2, [[log_scale] * 3] * 2, [[1.0] * 3] * 2).to(dtype)
    levels = cube([0, 1, 128, 254, 255], [0, 255], [0, 77, 255]).flatten(0, 2)
    params = params.repeat(len(levels), 1).requires_grad_(True)
    log_prob = dmol.log_prob(params, levels)
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and (log_prob <= 1e-6).all()
    assert params.grad.isfinite().all()


# ---- masses sum to 1 ----------------------------------------------------------------------------------------


def test_dmol_masses_of_all_colours_sum_to_one():
    """All 16.7 million of them, for a mixture of two that leans on both ends and on the couplings."""
    params = mixture(
        [0.3, -0.2],
        [[-0.9, 0.4, 0.1], [0.5, 0.8, -1.2]],
        [[-2.0, -1.0, -3.0], [-1.0, -2.5, 0.0]],
        [[0.9, -0.5, 2.0], [-1.0, 0.3, 1.0]],
    ).float()
    total = sum(log_masses(params, cube([r], range(256), range(256))).exp().double().sum().item() for r in range(256))
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [-7.0, -3.0, 0.5])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_dmol_masses_of_one_colour_sum_to_one(channel, scale):
    """The 256 masses of a colour, given the colours before it. The other two are so narrow that a few levels around
    their means hold all their mass."""
    means, couplings, log_scales = [0.1, -0.2, 0.3], [0.4, -0.3, 0.5], [FLOOR] * 3
    log_scales[channel] = scale
    params = mixture([0.0], [means], [log_scales], [couplings])

    def levels(of, mean):
        middle = round((mean + 1) * 127.5)
        return range(256) if of == channel else range(max(0, middle - 8), min(255, middle + 8) + 1)

    total = 0.0
    for red in levels(0, means[0]):
        greens = levels(1, means[1] + math.tanh(couplings[0]) * (red / 127.5 - 1))
        total += log_masses(params, cube([red], greens, range(256))).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-6)


def test_categorical_is_a_softmax():
    logits = 5 * torch.randn(4, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masses = torch.stack([categorical.log_prob(logits, torch.full((4, 1), v)) for v in range(256)], dim=1).exp()
    expected = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(masses.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(masses.sum(dim=1).numpy(), 1, rtol=1e-12)


def test_categorical_and_its_gradient_are_finite():
    logits = torch.zeros(3, 256)
    logits[0, 0], logits[1, 255], logits[2, 7] = 1e4, -1e4, 1e4
    logits.requires_grad_(True)
    log_prob = categorical.log_prob(logits, torch.tensor([[255], [255], [7]], dtype=torch.uint8))
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and logits.grad.isfinite().all()


# ---- what is drawn follows the masses -----------------------------------------------------------------------


def test_dmol_draws_follow_the_joint_masses():
    """Components a few levels wide, so that one corner of the colour cube, which can be enumerated, holds all mass."""
    unit = lambda *levels: [v / 127.5 - 1 for v in levels]
    params = mixture(
        [0.5, -0.5],
        # the second and third mean are what is left after the couplings' pull of the colours before
        [[unit(20)[0], unit(30)[0] + 0.6 * 0.84, unit(25)[0] - 0.3 * 0.84 + 0.5 * 0.76], [*unit(40, 10, 45)]],
        [[-4.6, -4.2, -4.6], [-4.0, -4.6, -4.4]],
        [[math.atanh(0.6), math.atanh(-0.3), math.atanh(0.5)], [0.0, 0.0, 0.0]],
    )
    corner = 128
    masses = log_masses(params, cube(range(corner), range(corner), range(corner))).exp()
    assert masses.sum().item() == pytest.approx(1, abs=1e-4)
    drawn = dmol.draw(params.expand(DRAWS, -1), uniforms(DRAWS, 4)).long()
    assert (drawn < corner).float().mean().item() > 0.9999

    drawn = drawn[(drawn < corner).all(dim=1)]
    coarse = lambda t: t.view(32, 4, 32, 4, 32, 4).sum(dim=(1, 3, 5))
    counts = torch.zeros(corner, corner, corner).index_put((*drawn.T,), torch.tensor(1.0), accumulate=True)
    assert_frequencies(coarse(counts), coarse(masses))
    for pair in ((0,), (1,), (2,)):  # finer, and two colours at a time
        assert_frequencies(counts.sum(dim=pair), masses.sum(dim=pair))


def test_dmol_draws_follow_the_masses_of_fewer_levels():
    generator = torch.Generator().manual_seed(0)
    params = random_params(generator, 0.6, (-2, -0.5))
    masses = dmol.log_prob(params.expand(4, 4, 4, -1), cube(range(4), range(4), range(4)), levels=4).exp()
    assert masses.sum().item() == pytest.approx(1, abs=1e-9)
    drawn = dmol.draw(params.expand(DRAWS, -1), uniforms(DRAWS, 4), levels=4).long()
    counts = torch.zeros(4, 4, 4).index_put((*drawn.T,), torch.tensor(1.0), accumulate=True)
    assert_frequencies(counts, masses)


@pytest.mark.parametrize("scale", [-3.0, 0.0])
def test_dmol_draws_reach_both_ends(scale):
    params = mixture([0.0, 0.0], [[-0.9, 0, 0], [1.1, 0, 0]], [[scale, -7, -7]] * 2, [[0.0] * 3] * 2)
    blues = greens = range(120, 136)
    masses = log_masses(params, cube(range(256), greens, blues)).exp().sum(dim=(1, 2))
    assert masses.sum().item() == pytest.approx(1, abs=1e-6) and masses[0] > 0.01 and masses[255] > 0.2
    drawn = dmol.draw(params.expand(DRAWS, -1), uniforms(DRAWS, 4))
    assert drawn.dtype == torch.uint8 and drawn.shape == (DRAWS, 3)
    assert_frequencies(torch.bincount(drawn[:, 0].long(), minlength=256), masses)


def test_dmol_colours_follow_the_level_before_not_the_draw_before():
    """R is rounded to 8 bits before G leans on it, and G before B: with no width they follow exactly."""
    c = 0.9
    params = mixture([0.0], [[0.0] * 3], [[FLOOR] * 3], [[math.atanh(c), 0.0, math.atanh(c)]])
    params = dmol.temper(params, 1e-6).repeat(1000, 1)  # narrower than a model can be
    params[:, 4] = -1.0  # but for R
    drawn = dmol.draw(params, uniforms(1000, 4)).double()
    follower = torch.round((c * (drawn[:, :2] / 127.5 - 1) + 1) * 127.5)
    assert torch.equal(drawn[:, 1:], follower)
    assert drawn[:, 0].unique().numel() > 100


def test_shifted_means_are_relative_to_the_guess():
    """Where the colours before are as guessed, a mean is the guess plus what the head says."""
    generator = torch.Generator().manual_seed(0)
    params, base = random_params(generator, 0.1, (-4, -2)), torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    before, after = dmol.unpack(params), dmol.unpack(dmol.shift_means(params, base))
    for i in (0, 2, 3):
        torch.testing.assert_close(after[i], before[i])
    c, mean = after[3], after[1]  # (3, K)
    conditional = [mean[0], mean[1] + c[0] * base[0], mean[2] + c[1] * base[0] + c[2] * base[1]]
    torch.testing.assert_close(torch.stack(conditional), before[1] + base[:, None])


def test_categorical_draws_follow_the_masses():
    logits = 2 * torch.randn(256, generator=torch.Generator().manual_seed(0))
    drawn = categorical.draw(logits.expand(DRAWS, -1), uniforms(DRAWS, 1))
    assert drawn.dtype == torch.uint8 and drawn.shape == (DRAWS, 1)
    assert_frequencies(torch.bincount(drawn[:, 0].long(), minlength=256), logits.double().softmax(dim=0))


# ---- the ends of the uniform numbers ------------------------------------------------------------------------

ENDS = [0.0, 2.0**-53, 0.5, 1 - 2.0**-53]
PRECISIONS = [
    torch.float64,
    torch.float32,
]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_what_has_no_mass_is_never_drawn(dtype):
    masses = torch.zeros(256, dtype=dtype)
    masses[[3, 4, 200]] = torch.tensor([0.1, 0.2, 0.7], dtype=dtype)
    ends = torch.tensor(ENDS, dtype=torch.float64)
    drawn = categorical.draw(masses.log().expand(len(ENDS), -1), ends[:, None])[:, 0].tolist()
    assert drawn == [3, 3, 200, 200]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_dmol_draws_at_the_ends_have_mass(dtype):
    """A uniform number next to 1 lies some 37 scales off the mean, not at the end of the colours."""
    params = mixture([0.0], [[0.0] * 3], [[-6.0] * 3], [[0.0] * 3]).to(dtype)
    for end in ENDS[1:]:
        drawn = dmol.draw(params[None], torch.full((1, 4), end, dtype=torch.float64))
        assert (drawn.float() - 127.5).abs().max() < 20
    # the chance that a number is 0 itself is 2^-53
    assert torch.equal(dmol.draw(params[None], torch.zeros(1, 4)), torch.zeros(1, 3, dtype=torch.uint8))


def test_pick_inverts_the_distribution_function():
    masses = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    u = torch.tensor([0, 0.2499, 0.25, 0.74, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert dmol.pick(masses.expand(6, -1), u).tolist() == [1, 1, 3, 3, 4, 4]
    # Masses whose sum is rounded to a little below or above 1.
    for total in (1 - 1e-12, 1 + 1e-12):
        assert dmol.pick(masses.expand(6, -1) * total, u)[-1] == 4


# ---- temperature --------------------------------------------------------------------------------------------


def entropy(levels):
    """Of the observed levels, in bits."""
    share = torch.bincount(levels.long().flatten(), minlength=256) / levels.numel()
    return -(share * share.clamp(min=1e-12).log2()).sum().item()


@pytest.mark.parametrize("module", [dmol, categorical])
def test_a_higher_temperature_has_more_entropy(module):
    generator = torch.Generator().manual_seed(0)
    params = random_params(generator, 0.3, (-4, -2)) if module is dmol else 2 * torch.randn(256, generator=generator)
    params = params.expand(20_000, -1)
    drawn = [module.draw(module.temper(params, t), uniforms(20_000, module.DRAWS)) for t in (1e-4, 0.3, 1.0, 2.0)]
    bits = [entropy(levels[:, 0]) for levels in drawn]
    assert bits[0] < 0.01 and all(low + 0.02 < high for low, high in zip(bits, bits[1:])), bits


@pytest.mark.parametrize("module", [dmol, categorical])
def test_temperature_one_changes_nothing(module):
    generator = torch.Generator().manual_seed(0)
    params = random_params(generator, 1.0, (-12, 0)) if module is dmol else torch.randn(256, generator=generator)
    params = params.expand(100, -1)
    levels = torch.randint(0, 256, (100, 3 if module is dmol else 1), generator=generator)
    torch.testing.assert_close(module.log_prob(module.temper(params, 1.0), levels), module.log_prob(params, levels))


def test_tempering_starts_at_the_least_scale():
    """A scale below the floor draws as wide as the floor at temperature 1, and half as wide at 1/2."""
    below, floor = (mixture([0.0], [[0.0] * 3], [[s] * 3], [[0.0] * 3])[None] for s in (-30.0, FLOOR))
    for temperature in (1.0, 0.5):
        torch.testing.assert_close(dmol.temper(below, temperature), dmol.temper(floor, temperature))
    assert dmol.temper(below, 0.5)[0, 4].item() == pytest.approx(FLOOR + math.log(0.5))
