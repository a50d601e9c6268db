"""Attention in bfloat16 on a CPU, for training: plain matrix products in place of PyTorch's fused kernel.

A fused kernel spares memory traffic, which is what a GPU lacks. On a CPU the windows of local attention fit into the
caches, and PyTorch's kernel for it calls float32 products of a few rows at a time. Batched products in bfloat16, where the
processor has them, and a softmax that torch.compile makes one loop, train about twice as fast.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Bf16Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + bias) v, products in bfloat16 and the softmax in float32.

    Scores are rounded to bfloat16 on their way out of the product, as everywhere under autocast. Their exponentials are
    kept for the backward pass, Q x S of two bytes a head and block: working them out again takes a tenth of the time more.
    What the softmax divides them by waits until they are summed up, as in FlashAttention (Dao et al., 2022): D features a
    query are divided in place of S probabilities, which so are written once, and never in float32.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """q: (N, H, Q, D), k and v: (N, H, S, D), bias: (N or 1, H or 1, Q, S) or None, all bfloat16 -> (N, H, Q, D)."""
        shape = q.shape[:2]
        q, k, v = (t.flatten(0, 1) for t in (q * q.shape[-1] ** -0.5, k, v))  # (N H, Q or S, D)
        scores = torch.bmm(q, k.transpose(1, 2)).unflatten(0, shape).float()  # (N, H, Q, S)
        scores = scores if bias is None else scores + bias
        weights = (scores - scores.amax(-1, keepdim=True)).exp().to(q.dtype).flatten(0, 1)  # (N H, Q, S), 1 at most
        total = weights.float().sum(-1, keepdim=True)  # (N H, Q, 1)
        seen = (torch.bmm(weights, v).float() / total).to(q.dtype)  # (N H, Q, D)
        ctx.save_for_backward(q, k, v, weights, total, seen)
        return seen.unflatten(0, shape)  # (N, H, Q, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights, total, seen = ctx.saved_tensors
        shape, width = gradient.shape[:2], q.shape[-1]
        gradient = gradient.flatten(0, 1).float() / total  # (N, H, Q, D) -> (N H, Q, D)
        mean = (gradient * seen).sum(-1, keepdim=True)  # (N H, Q, 1): of the gradients of all that a query sees
        gradient = gradient.to(q.dtype)
        of_v = torch.bmm(weights.transpose(1, 2), gradient)  # (N H, S, D)
        of_weights = torch.bmm(gradient, v.transpose(1, 2)).float()  # (N H, Q, S)
        of_scores = (weights * (of_weights - mean)).to(q.dtype)  # (N H, Q, S)
        of_q = torch.bmm(of_scores, k) * width**-0.5  # (N H, Q, D)
        of_k = torch.bmm(of_scores.transpose(1, 2), q)  # (N H, S, D): q is scaled already
        return *(t.unflatten(0, shape) for t in (of_q, of_k, of_v)), None
