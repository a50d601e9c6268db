"""What turns gradients into weights: optimizers, the rate's schedule, and the average of the weights."""

import copy

import torch
from torch import nn

DECAY_SHARE = 0.15  # of the budget, at its end


def optimizers(model: nn.Module, rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else (embeddings, stem, head, gains).

    Muon (Jordan et al., 2024) orthogonalises a matrix's update; with updates scaled to AdamW's size
    ("match_rms_adamw") one rate serves both.
    """
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and ("decoder." in n or "encoder." in n)]
    chosen = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, warmup: int, progress: float) -> float:
    """The rate's share of its peak: linear warm-up, constant, then linearly to zero over the budget's last 15 %.

    progress: the share of the budget, of steps or of minutes, that is used up.
    """
    return min((step + 1) / warmup, 1.0) * min(1.0, max(0.0, (1 - progress) / DECAY_SHARE))


class Average:
    """Exponential moving average of the weights, with a horizon that grows from the start up to 1 / (1 - decay)."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


def batch_indices(step: int, batch_size: int, images: int, seed: int) -> torch.Tensor:
    """(batch_size,) int64: the images of a step. Every epoch is a new permutation.

    A function of its arguments alone, so that a resumed run sees what an uninterrupted one would have seen.
    """
    place = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = place // images
    chosen = torch.empty_like(place)
    for epoch in epochs.unique().tolist():
        generator = torch.Generator().manual_seed(seed + epoch)
        permutation = torch.randperm(images, generator=generator)
        chosen[epochs == epoch] = permutation[place[epochs == epoch] % images]
    return chosen
