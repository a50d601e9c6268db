"""Exact likelihoods of a model: the nats of every image and of every step, from one pass in which each image counts once.

Several processes share the pass, if the script was launched so: all of them call, and all get the same figures.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import Images
from imtx import ImageTransformer
from imtx.images import area_means
from processes import our_share, rank, summed


@dataclass(frozen=True)
class Nats:
    """-log p of N images, float32 log-probabilities summed in float64. Both parts sum to the same total."""

    images: Tensor  # (N,) float64
    steps: Tensor  # (P,) float64: summed over the images, in generation order


class Likelihood(nn.Module):
    """-log p of a batch in nats, (N, P): one module, so that it is compiled and wrapped as a whole."""

    def __init__(self, model: ImageTransformer):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, labels: Tensor | None, sources: Tensor | None) -> Tensor:
        return -self.model.log_prob(pixels, labels, sources)


def sources_of(images: Images, source_size: int) -> Tensor | None:
    """(N, h, w, 3) uint8 -> (N, s, s, 3) uint8: rounded area means; None for a model without sources."""
    if not source_size:
        return None
    return torch.from_numpy(area_means(images.pixels.numpy(), images.pixels.shape[1] // source_size))


@torch.inference_mode()
def measure(
    model: ImageTransformer, images: Images, batch_size: int | None = None, shuffle: bool = False, compile: bool = False
) -> Nats:
    """The nats of all images, with their labels or sources if the model takes any.

    batch_size: images at a time; None: one on a CPU, where its activations just fit into the cache, and 16 elsewhere.
    compile: by torch.compile, which rounds a sum here and there otherwise.
    With `shuffle`, each image gets the label or source of the image before it in a fixed random order. Processes share
    batches, not images: a batch of other images would round otherwise in float32.
    """
    config, device = model.config, model.order.device
    batch_size = batch_size or (1 if device.type == "cpu" else 16)
    sources, labels = sources_of(images, config.source_size), images.labels if config.classes else None
    if shuffle:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        sources, labels = (None if t is None else t[other] for t in (sources, labels))
    log_prob = torch.compile(model.log_prob, dynamic=False) if compile else model.log_prob
    of_images = torch.zeros(len(images), dtype=torch.float64)
    of_steps = torch.zeros(config.positions, dtype=torch.float64)
    batches = our_share(torch.arange(len(images)).split(batch_size))
    for batch in tqdm(batches, desc="evaluate", disable=True if rank() else None, leave=False):
        label, source = (None if t is None else t[batch].to(device) for t in (labels, sources))
        nats = -log_prob(images.pixels[batch].to(device), label, source).cpu().double()  # (n, P)
        of_images[batch] = nats.sum(dim=1)
        of_steps += nats.sum(dim=0)
    return Nats(summed(of_images, device), summed(of_steps, device))


def bits_per_dim(model: ImageTransformer, images: Images, **options) -> float:
    """Total nats / (ln 2 x sub-pixels), every image counted once (paper section 5). options: those of `measure`."""
    return bits(measure(model, images, **options).images, model.config.sub_pixels)


def bits(nats: Tensor, sub_pixels: int) -> float:
    """(n,) nats of n images, or of one place in n images, which have so many sub-pixels each -> bits/dim."""
    return nats.sum().item() / (math.log(2) * sub_pixels * len(nats))


def breakdown(model: ImageTransformer, images: Images, nats: Nats) -> dict:
    """Where the bits lie, ready for JSON; `nats` is what `measure` found for these images. All figures are bits/dim.

    per_class: {name: {"bits_per_dim", "images"}}, if the model has classes and the images labels; only classes with images.
    per_position: height x width lists, a pixel's nats / (3 ln 2).
    per_channel: height x width x 3 lists, a sub-pixel's nats / ln 2; only if sub-pixels are positions of their own, as
    the mixture has no nats of a single colour.

    Maps are means over the images, in raster order whatever the order of generation. Their plain means, and the mean of
    the classes weighted by images, are the total.
    """
    config = model.config
    result = {"bits_per_dim": bits(nats.images, config.sub_pixels), "images": len(images)}
    if config.classes and images.labels is not None:
        result["per_class"] = {}
        for label in images.labels.unique().tolist():  # in order
            chosen = nats.images[images.labels == label]
            of_class = {"bits_per_dim": bits(chosen, config.sub_pixels), "images": len(chosen)}
            result["per_class"][config.classes[label]] = of_class
    raster = torch.empty_like(nats.steps)
    raster[model.layout.order] = nats.steps / (math.log(2) * len(images))
    raster = raster.view(config.image_size, config.image_size, config.channels)  # bits an image
    result["per_position"] = (raster.sum(dim=2) / 3).tolist()
    if config.channels == 3:
        result["per_channel"] = raster.tolist()
    return result
