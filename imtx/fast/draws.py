"""One draw from the output distribution, as imtx/dmol.py and imtx/categorical.py draw it, in compiled code."""

import numpy as np

from .arithmetic import kernel

# As in imtx/dmol.py. Written out here, as compiled code is kept by the text of this folder's files.
PARAMETERS, MIN_LOG_SCALE = 10, np.float32(-7)


@kernel
def pick(probabilities, count, uniform):
    """Inverts the distribution function of `count` unnormalised probabilities; uniform: float64 in [0, 1)."""
    total = 0.0
    for i in range(count):
        total += np.float64(probabilities[i])
    threshold, reached = uniform * total, 0.0
    for i in range(count):
        reached += np.float64(probabilities[i])
        if reached > threshold:
            return i
    return count - 1


@kernel
def guide(labelled, unlabelled, guidance):
    """imtx/outputs.py has it, too; in place, in `labelled`."""
    for i in range(len(labelled)):
        labelled[i] = unlabelled[i] + np.float32(guidance) * (labelled[i] - unlabelled[i])


@kernel
def tempered(logits, count, temperature, probabilities):
    """probabilities = exp((logits - their maximum) / temperature)."""
    highest = logits[0] / temperature
    for i in range(count):
        highest = max(highest, logits[i] / temperature)
    for i in range(count):
        probabilities[i] = np.exp(logits[i] / temperature - highest)


@kernel
def draw_level(logits, uniforms, temperature, probabilities, colours):
    """colours (1,) uint8 = a level, from logits (levels,)."""
    tempered(logits, len(logits), temperature, probabilities)
    colours[0] = pick(probabilities, len(logits), uniforms[0])


@kernel
def draw_pixel(params, guess, levels, uniforms, temperature, probabilities, colours):
    """colours (3,) uint8 = a pixel, from the mixture's params (PARAMETERS K,), whose means are relative to `guess` (3,).

    uniforms (4,) float64: the component, R, G, B. Each colour is rounded to its level before the next mean is formed.
    """
    k = len(params) // PARAMETERS
    tempered(params, k, temperature, probabilities)
    chosen = pick(probabilities, k, uniforms[0])
    half = np.float32((levels - 1) / 2)
    c0, c1, c2 = np.tanh(params[7 * k + chosen]), np.tanh(params[8 * k + chosen]), np.tanh(params[9 * k + chosen])
    coupled = np.float32(0)  # what the earlier colours add to the mean, beyond their guess
    red, green = np.float32(0), np.float32(0)
    for colour in range(3):
        scale = np.exp(max(params[(4 + colour) * k + chosen], MIN_LOG_SCALE) + np.float32(np.log(temperature)))
        noise = scale * np.float32(np.log(uniforms[1 + colour] / (1 - uniforms[1 + colour])))
        if colour == 1:
            coupled = c0 * (red - guess[0])
        elif colour == 2:
            coupled = c1 * (red - guess[0]) + c2 * (green - guess[1])
        value = params[(1 + colour) * k + chosen] + guess[colour] + coupled + noise
        level = min(max(np.rint((value + np.float32(1)) * half), np.float32(0)), np.float32(levels - 1))
        colours[colour] = np.uint8(level)
        red, green = (level / half - np.float32(1), green) if colour == 0 else (red, level / half - np.float32(1))
