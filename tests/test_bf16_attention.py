"""Attention in bfloat16 on a CPU against PyTorch's own in float32, and memory that stays with the process."""

import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import KINDS, FAMILIES, LAYOUTS, conditions, pictures, small, small_config
from imtx import ImageTransformer
from imtx.attention import attend
from imtx.bf16_attention import Bf16Attention

# bfloat16 has 8 bits: what is rounded a few times is within some 2^-8 of the largest
TOLERANCE = 0.015


def tensors(queries: int, keys: int, masked: bool):
    """Queries, keys and values of 3 blocks and 2 heads of 16, what to see of them, and a gradient."""
    generator = torch.Generator().manual_seed(queries + keys)
    qkv = [torch.randn(3, 2, n, 16, generator=generator).bfloat16() for n in (queries, keys, keys)]
    mask = torch.ones(queries, keys).tril(keys - queries).bool().repeat(3, 1, 1, 1) if masked else None
    return qkv, mask, torch.randn(3, 2, queries, 16, generator=generator).bfloat16()


def output_and_gradients(function, qkv, gradient):
    leaves = [t.clone().requires_grad_() for t in qkv]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


@pytest.mark.parametrize("queries, keys, masked", [(8, 24, True), (1, 1, True), (5, 7, False), (12, 12, True)])
def test_outputs_and_gradients_are_those_of_float32(queries, keys, masked):
    qkv, mask, gradient = tensors(queries, keys, masked)
    bias = None if mask is None else torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf)
    found = output_and_gradients(lambda q, k, v: attend(q, k, v, bias, 0.0), qkv, gradient)
    exact = output_and_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), [t.float() for t in qkv], gradient
    )
    for ours, reference in zip(found, exact):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - reference).abs().max() <= TOLERANCE * max(reference.abs().max(), 1.0)


def test_what_is_masked_has_no_part_and_no_gradient():
    (q, k, v), mask, gradient = tensors(4, 12, True)
    bias = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf)
    bias[..., 5] = -torch.inf  # a key that no query sees
    output, _, of_k, of_v = output_and_gradients(lambda *x: Bf16Attention.apply(*x, bias), (q, k, v), gradient)
    assert (of_k[:, :, 5] == 0).all() and (of_v[:, :, 5] == 0).all()
    k[:, :, 5], v[:, :, 5] = 100.0, -100.0
    assert torch.equal(Bf16Attention.apply(q, k, v, bias), output)


@pytest.mark.parametrize("family, output, layout, task", KINDS)
def test_under_autocast_gradients_are_as_good_as_with_attention_in_float32(family, output, layout, task, monkeypatch):
    model = small(output, task, **FAMILIES[family], **LAYOUTS[layout]).float().requires_grad_(True).train()
    for block in model.decoder:
        block.attention.bias = block.attention.bias.bfloat16()  # as it is in a model that was never in float64
    pixels, condition = pictures(2), conditions(model, 2)
    weights = [p for name, p in model.named_parameters() if "attention" in name]
    with torch.no_grad():  # not the likelihood: a mixture's gradients at a colour it holds impossible are all that count
        weighing = torch.randn_like(model(pixels, **condition))
    calls, ours = [], Bf16Attention.apply

    def gradient(autocast: bool, attention=None):
        monkeypatch.setattr(Bf16Attention, "apply", lambda *x: calls.append(1) or attention(*x))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            parameters = model(pixels, **condition)
        return torch.cat([g.flatten() for g in torch.autograd.grad((parameters * weighing).sum(), weights)])

    def in_float32(q, k, v, bias):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias if bias is None else bias.float())

    exact = gradient(autocast=False)
    assert not calls
    error, usual = ((gradient(True, f) - exact).norm() / exact.norm() for f in (ours, in_float32))
    assert calls and error <= 3 * usual + 0.02  # without norms of queries and keys the rounding of scores tells


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_that_is_freed_is_used_again():
    code = """if True:
        import ctypes, resource, sys
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would count as one
        sys.path[:0] = ["train"]
        import torch
        from memory import keep_freed_memory

        def new_pages():  # that the system had to hand out for three times 64 MB
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensors = [torch.ones(2**24) for _ in range(3)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        print([new_pages() for _ in range(12)][-1])
        keep_freed_memory()
        print([new_pages() for _ in range(12)][-1])
    """
    root = Path(__file__).resolve().parents[1]
    told = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    usual, kept = map(int, told.split())
    assert usual > 10_000 > 100 > kept


def test_with_dropout_pytorch_attends_in_the_same_precision():
    qkv, mask, _ = tensors(4, 12, True)
    bias = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf)
    torch.manual_seed(0)
    with_dropout = attend(*qkv, bias, 0.5)
    assert with_dropout.dtype == torch.bfloat16 and not torch.equal(with_dropout, attend(*qkv, bias, 0.0))


def test_parts_of_the_bias_begin_where_a_gpu_can_read_them():
    model = ImageTransformer(small_config("categorical", "unconditional", query_block=3, memory_block=5))
    attention = model.decoder[0].attention
    sizes = [math.prod(shape) for shape in attention.parts]
    assert any(size % 8 for size in sizes[:-1])  # what would shift the next part
    assert len(attention.bias) == sum(math.ceil(size / 8) * 8 for size in sizes)


def test_second_derivatives_are_refused():
    (q, k, v), _, _ = tensors(4, 4, False)
    q.requires_grad_()
    (first,) = torch.autograd.grad(Bf16Attention.apply(q, k, v, None).float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        (first.float().sum() + q.float().sum() * 0 + first.float().square().sum()).backward()
