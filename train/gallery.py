"""Draws the ready samples that the demo opens with: python train/gallery.py. Seeds 0, 1, 2, ... in order, none chosen."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, with nothing installed

import numpy as np
import torch

from imtx import ImageTransformer, draw
from imtx.demo.gallery import write
from imtx.images import open_image, source_and_truth, square_crop

TEMPERATURE = 0.9
GALLERY, EXAMPLES = ROOT / "assets/gallery", ROOT / "assets/examples"


def main() -> None:
    generator = ImageTransformer.from_pretrained("cifar10-dmol-1d")
    classes = generator.config.classes
    pictures = draw(generator, range(8), labels=[i % len(classes) for i in range(8)], temperature=TEMPERATURE)
    names = ", ".join(classes[i % len(classes)] for i in range(8))
    write(GALLERY, "generate", pictures.numpy(), f"Drawn earlier: {names}. Press Run for your own.")

    truth = square_crop(open_image(sorted((EXAMPLES / "objects").glob("*.png"))[0]), 32)
    options = {"given": torch.from_numpy(truth), "given_pixels": 512, "temperature": TEMPERATURE}
    pictures = draw(generator, range(4), **options).numpy()
    write(GALLERY, "complete", np.stack([truth, *pictures]), "Drawn earlier: four endings for one picture.")

    upscaler = ImageTransformer.from_pretrained("faces-sr-1d")
    faces = sorted((EXAMPLES / "faces").iterdir())
    source, truth = source_and_truth(open_image(faces[0]))
    pictures = draw(upscaler, range(4), sources=torch.from_numpy(source), temperature=TEMPERATURE).numpy()
    write(GALLERY, "super-resolve", np.stack([truth, *pictures]), "Drawn earlier: four faces that fit the 8x8 input.")


if __name__ == "__main__":
    main()
