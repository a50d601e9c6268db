"""What a model costs: FLOPs and memory, counted rather than estimated, and the matmul rate that FLOPs are held against."""

import time

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .model import ImageTransformer


def example(model: ImageTransformer) -> tuple[Tensor, dict[str, Tensor]]:
    """A picture of noise, (1, h, w, 3) uint8, and the keyword arguments that go with it: a source if the model wants one."""
    config, device, generator = model.config, model.order.device, torch.Generator().manual_seed(0)

    def noise(size: int) -> Tensor:
        picture = torch.randint(0, config.levels, (1, size, size, 3), generator=generator, dtype=torch.uint8)
        return picture.to(device)

    return noise(config.image_size), {"sources": noise(config.source_size)} if config.source_size else {}


@torch.no_grad()
def forward_flops(model: ImageTransformer) -> int:
    """FLOPs of the matrix products in one parallel forward over an image, two for a multiply and an add.

    All keys of a memory block count, the masked ones too, as they are worked out. A training step takes three times as
    many. Runs one forward.
    """
    pixels, condition = example(model)
    # The fused attention kernel is opaque to the counter, the plain one is made of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixels, **condition)
    return counter.get_total_flops()


def cache_bytes(model: ImageTransformer) -> int:
    """Memory of the keys and values of all layers while one image is drawn."""
    return sum(t.nbytes for cache in model.caches(1) for t in (cache.all, cache.window))


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of square matrix products on this device in this dtype: the best of those that fit into `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        begin = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best
