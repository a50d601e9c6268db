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
TEMPERATURES = (0.9, 1.0)  # below, most samples are even in colour; the figures show them
CLASSES, ENDINGS = 4, 4  # the canvas has four columns


def main() -> None:
    generator, upscaler = map(ImageTransformer.from_pretrained, (GENERATOR, UPSCALER))
    size, labels = generator.config.image_size, list(range(CLASSES))
    options = {"labels": labels, "guidance": GUIDANCE}
    pictures = np.concatenate([draw(generator, labels, temperature=t, **options).numpy() for t in TEMPERATURES])
    text = f"Drawn earlier: {', '.join(generator.config.classes[:CLASSES])}, at temperature {TEMPERATURES[0]}, then at "
    write(GALLERY, "generate", pictures, f"{text}{TEMPERATURES[1]}, with guidance {GUIDANCE:g}. Press Run for your own.")

    name, truth = next(iter(examples("objects", size).items()))  # what the page begins with
    options = {"given": torch.from_numpy(truth), "given_pixels": size * size // 2, "temperature": COMPLETION_TEMPERATURE}
    label = generator.config.classes.index(name)
    pictures = draw(generator, range(ENDINGS), labels=[label] * ENDINGS, guidance=GUIDANCE, **options).numpy()
    text = f"Drawn earlier: four endings for one picture of the class {name}, with guidance {GUIDANCE:g}."
    write(GALLERY, "complete", np.stack([truth, *pictures]), text)

    truth = next(iter(examples("faces", upscaler.config.image_size).values()))
    source = torch.from_numpy(area_means(truth, upscaler.config.image_size // upscaler.config.source_size))
    pictures = [draw(upscaler, [0], sources=source, temperature=t)[0].numpy() for t in UPSCALING_TEMPERATURES]
    text = f"Drawn earlier: faces that fit the 8x8 input, at temperatures {', '.join(map(str, UPSCALING_TEMPERATURES))}."
    write(GALLERY, "super-resolve", np.stack([truth, *pictures]), text)


if __name__ == "__main__":
    main()
