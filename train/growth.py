"""More layers for a trained model, which computes what it did before: training goes on from there with a larger one.

Each decoder block is followed by copies of itself whose output projections are zero, so that they add nothing to the
residual stream until they have learned to. (Net2Net, Chen et al., 2016, says why to keep the function; identity blocks
between the old ones are those of LLaMA Pro, Wu et al., 2024.)
"""

from dataclasses import replace

import torch

from imtx import ImageTransformer

MOST_LAYERS = 1000  # more is a slip of the finger, and would only fill the memory

# What a block adds to the stream comes out of these.
LAST = ("attention.out.weight", "source_attention.out.weight", "ffn.down.weight")


def deepened(model: ImageTransformer, layers: int) -> ImageTransformer:
    """A model of so many decoder blocks, with the same outputs to the last bit. Raises SystemExit with a sentence."""
    old = model.config
    if old.family != "modern":
        raise SystemExit("--layers: a block of the paper normalises what it hands on, so none adds nothing. Leave --layers out.")
    if not old.layers < layers <= MOST_LAYERS or layers % old.layers:
        raise SystemExit(
            f"--layers must be a multiple of the model's {old.layers} decoder layers, from {2 * old.layers} to "
            f"{MOST_LAYERS}, got {layers}."
        )
    times, new = layers // old.layers, ImageTransformer(replace(old, layers=layers)).to(model.head.weight.dtype)
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("decoder.")}
    for number, block in enumerate(model.decoder):
        for name, weight in block.state_dict().items():
            for copy in range(times):
                kept = copy == 0 or name not in LAST
                weights[f"decoder.{number * times + copy}.{name}"] = weight if kept else torch.zeros_like(weight)
    new.load_state_dict(weights)
    return new
