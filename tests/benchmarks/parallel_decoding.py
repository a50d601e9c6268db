"""Would drawing several pixels at once pay? python tests/benchmarks/parallel_decoding.py [--window 16] [MODEL ...]

With the noise held fixed a picture is a fixed point: each pixel is drawn from what those before it are (predictive sampling,
Wiggers and Hoogeboom, 2020; Jacobi decoding). So the next `--window` pixels can be guessed, and drawn at once from the guess,
again and again: of the first one that came out otherwise and of all before it one knows that they are right. This counts the
rounds that two pictures of each model take, with seeds 0 and 1, and checks that they are the pictures of `imtx.draw`. A round
costs at least what one step costs for as many pictures as the window has pixels, see tests/benchmarks/sampling.py, and so it
pays only where rounds are fewer than steps by more than that. Every round works out the whole picture here, in minutes: it
counts, and is no sampler. The last line is one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from imtx import ImageTransformer, draw
from imtx.images import area_means, open_image, square_crop
from imtx.sampling import noise

ROOT = Path(__file__).resolve().parents[2]
FACES = sorted((ROOT / "assets/examples/faces").iterdir())
SEEDS = (0, 1)


def conditions(model: ImageTransformer) -> dict[str, Tensor]:
    """Labels 0 and 1, or the sources of two portraits."""
    config = model.config
    if config.source_size:
        truths = np.stack([square_crop(open_image(file), config.image_size) for file in FACES[: len(SEEDS)]])
        return {"sources": torch.from_numpy(area_means(truths, config.image_size // config.source_size))}
    return {"labels": torch.tensor(SEEDS)} if config.classes else {}


@torch.inference_mode()
def rounds(model: ImageTransformer, window: int) -> list[int]:
    """How many a picture takes, for each seed."""
    config, given = model.config, conditions(model)
    context, uniforms = model.context(len(SEEDS), given.get("labels"), given.get("sources")), noise(model, SEEDS)
    colours = torch.zeros(len(SEEDS), config.positions, 3 // config.channels, dtype=torch.uint8)  # in generation order
    right, count = [0] * len(SEEDS), [0] * len(SEEDS)
    while min(right) < config.positions:
        flat = torch.zeros_like(colours)
        flat[:, model.order] = colours
        params = model.parallel(flat.view(len(SEEDS), config.image_size, config.image_size, 3), context)
        drawn = model.output.draw(params, uniforms)
        for n, first in enumerate(right):
            if first < config.positions:
                ahead = slice(first, min(first + window, config.positions))
                changed = (drawn[n, ahead] != colours[n, ahead]).any(dim=-1).tolist()
                colours[n, ahead] = drawn[n, ahead]
                right[n] += changed.index(True) + 1 if True in changed else len(changed)
                count[n] += 1
    labels = given["labels"].tolist() if "labels" in given else None
    assert torch.equal(colours, model.targets(draw(model, SEEDS, labels=labels, sources=given.get("sources"))))
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["cifar10-dmol-1d", "faces-sr-1d"])
    parser.add_argument("--window", type=int, default=16, help="pixels at once (16)")
    args = parser.parse_args()
    result = {}
    for name in args.models:
        model = ImageTransformer.from_pretrained(name)
        result[name] = rounds(model, args.window)
        print(f"{name}: {result[name]} rounds of {args.window} for {model.config.positions} steps", flush=True)
    print(json.dumps({"window": args.window, "rounds": result}))


if __name__ == "__main__":
    main()
