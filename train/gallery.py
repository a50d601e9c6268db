"""Draws the ready samples that the demo opens with: python train/gallery.py. Seeds 0, 1, 2, ... in order, none chosen."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, with nothing installed

import numpy as np
import torch

from figures import COMPLETION_TEMPERATURE, GUIDANCE, UPSCALING_TEMPERATURES, examples
from imtx import ImageTransformer, draw
from imtx.demo.gallery import write
from imtx.demo.models import GENERATOR, UPSCALER
from imtx.images import area_means

GALLERY = ROOT / "assets/gallery"
TEMPERATURE = 1.0  # where Generate starts; below, most samples are even in colour, which the figures show
ENDINGS = 4


def main() -> None:
    generator, upscaler = map(ImageTransformer.from_pretrained, (GENERATOR, UPSCALER))
    size, classes = generator.config.image_size, generator.config.classes
    labels = list(range(len(classes)))
    pictures = draw(generator, labels, labels=labels, temperature=TEMPERATURE, guidance=GUIDANCE).numpy()
    text = f"Drawn earlier: seeds 0 to {labels[-1]}, at temperature {TEMPERATURE}, with guidance {GUIDANCE:g}."
    write(GALLERY, "generate", pictures, f"{text} Press Run for your own.", list(classes))

    name, truth = next(iter(examples("objects", size).items()))  # what the page begins with
    options = {"given": torch.from_numpy(truth), "given_pixels": size * size // 2, "temperature": COMPLETION_TEMPERATURE}
    label = classes.index(name)
    pictures = draw(generator, range(ENDINGS), labels=[label] * ENDINGS, guidance=GUIDANCE, **options).numpy()
    text = f"Drawn earlier: endings for a picture of the class {name}, at temperature {COMPLETION_TEMPERATURE}, with guidance"
    write(GALLERY, "complete", np.stack([truth, *pictures]), f"{text} {GUIDANCE:g}.", [f"Seed {i}" for i in range(ENDINGS)])

    truth = next(iter(examples("faces", upscaler.config.image_size).values()))
    source = torch.from_numpy(area_means(truth, upscaler.config.image_size // upscaler.config.source_size))
    pictures = [draw(upscaler, [0], sources=source, temperature=t)[0].numpy() for t in UPSCALING_TEMPERATURES]
    text = f"Drawn earlier: faces that fit the 8x8 input, seed 0 by {UPSCALER}."
    write(GALLERY, "super-resolve", np.stack([truth, *pictures]), text, [f"Temperature {t}" for t in UPSCALING_TEMPERATURES])


if __name__ == "__main__":
    main()
