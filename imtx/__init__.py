"""The Image Transformer: local attention over pixels, exact likelihoods, pictures that appear pixel by pixel."""

from .checkpoint import CheckpointError
from .config import Config
from .model import ImageTransformer
from .presets import CIFAR10_CLASSES, PRESETS
from .sampling import Snapshot, draw, pixel_order, sample, whole_rows

__all__ = [
    "CIFAR10_CLASSES", "PRESETS", "CheckpointError", "Config", "ImageTransformer", "Snapshot",
    "draw", "pixel_order", "sample", "whole_rows",
]
