"""The Image Transformer: local attention over pixels, exact likelihoods, pictures that appear pixel by pixel."""

from .checkpoint import CheckpointError
from .config import CIFAR10_CLASSES, PRESETS, Config
from .model import ImageTransformer
from .sampling import Snapshot, draw, pixel_order, sample

__all__ = [
    "CIFAR10_CLASSES", "PRESETS", "CheckpointError", "Config", "ImageTransformer", "Snapshot",
    "draw", "pixel_order", "sample",
]
