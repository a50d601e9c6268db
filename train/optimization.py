"""What turns gradients into weights: optimizers, the rate's schedule, and the average of the weights."""

import copy
import math
from functools import lru_cache

import torch
from torch import nn

from imtx.checkpoint import in_a_block
from processes import whole

DECAY_SHARE = 0.15  # of the budget, at its end


def optimizers(model: nn.Module, kind: str, rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """kind: "muon", "adamw" or "paper".

    "muon": Muon for the matrices inside the blocks, AdamW for all else (embeddings, stem, head, gains). Muon (Jordan et
    al., 2024) orthogonalises a matrix's update; with updates scaled to AdamW's size ("match_rms_adamw") one rate serves
    both. "adamw": AdamW for all of it. "paper": Adam as T2T has it. Weight decay is for the matrices inside the blocks.
    """
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and in_a_block(n)]
    chosen = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in chosen]
    if kind == "paper":
        return [torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-9)]
    rest = {"params": others, "weight_decay": 0.0}
    if kind == "adamw":
        return [torch.optim.AdamW([{"params": inside, "weight_decay": weight_decay}, rest], lr=rate, betas=(0.9, 0.95))]
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([rest], lr=rate, betas=(0.9, 0.95)),
    ]


def rate_factor(schedule: str, step: int, warmup: int, progress: float) -> float:
    """The rate's share of its peak at a step, after linear warm-up.

    schedule: "constant", then linearly to zero over the budget's last 15 %; "cosine", down to zero over the whole budget;
    "paper", with 1/sqrt(step) and no end (T2T's "noam").
    progress: the share of the budget, of steps or of minutes, that is used up.
    """
    warm = min((step + 1) / warmup, 1.0)
    if schedule == "cosine":
        return warm * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    if schedule == "paper":
        return warm * min(1.0, (warmup / (step + 1)) ** 0.5)
    return warm * min(1.0, max(0.0, (1 - progress) / DECAY_SHARE))


class Average:
    """Exponential moving average of the weights, with a horizon that grows from the start up to 1 / (1 - decay)."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.model.parameters()), [whole(p) for p in model.parameters()], 1 - decay)


def batch_indices(step: int, batch_size: int, images: int, seed: int) -> torch.Tensor:
    """(batch_size,) int64: the images of a step. Every epoch is a new permutation.

    A function of its arguments alone, so that a resumed run sees what an uninterrupted one would have seen. Two seeds' epochs
    have no order in common.
    """
    place = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = place // images
    chosen = torch.empty_like(place)
    for epoch in epochs.unique().tolist():
        chosen[epochs == epoch] = _permutation(images, 1_000_003 * seed + epoch)[place[epochs == epoch] % images]
    return chosen


@lru_cache(maxsize=2)  # a step takes images of one epoch, or of two; a million images take longer to shuffle than a step
def _permutation(images: int, seed: int) -> torch.Tensor:
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed))
