"""causal_attention against fp64 softmax attention, and its derivatives."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers import errors_in_fp64, refuses, relative_error, same_bytes_under_threads, same_values
from torch import Tensor

from qlora_native import _C, reference

pytestmark = [pytest.mark.isa, pytest.mark.usefixtures("device")]
attention = torch.ops.qlora_native.causal_attention
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How far results may lie from the truth, relative to its norm: output, gradients.
TOLERANCE = {torch.float32: (1e-6, 2e-6), torch.bfloat16: (3e-3, 7e-3), torch.float16: (5e-4, 8e-4)}
# batch, heads, key heads, length, head dimensions
SHAPES = (
    (1, 1, 1, 1, 8), (1, 1, 1, 2, 32), (2, 3, 1, 5, 40), (1, 2, 2, 64, 64), (3, 6, 3, 65, 64), (2, 4, 2, 100, 96),
    (1, 3, 3, 31, 128), (3, 2, 1, 130, 80), (1, 4, 1, 300, 128), (1, 9, 3, 257, 64),
)  # fmt: skip


def operands(b: int, heads: int, key_heads: int, t: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and a gradient, as projections make them: heads side by side."""
    counts = (heads, key_heads, key_heads, heads)
    return [torch.randn(b, t, count, d).to(dtype).transpose(1, 2) for count in counts]


def outputs(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    """The output and the gradients to q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, _ = attention(*leaves, q.shape[-1] ** -0.5)
    out.backward(grad_out)
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    *inputs, grad_out = operands(*shape, dtype)
    scale = shape[-1] ** -0.5
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = attention(*leaves, scale)
    out.backward(grad_out)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth, truth_lse = reference.causal_attention(wide[0], wide[1], wide[2], scale)
    truth.backward(grad_out.double())
    assert out.shape == inputs[0].shape and out.transpose(1, 2).is_contiguous()
    assert relative_error(out, truth) < TOLERANCE[dtype][0]
    assert relative_error(lse, truth_lse) < 1e-6
    for leaf, exact in zip(leaves, wide, strict=True):
        assert leaf.grad is not None and exact.grad is not None
        # One position sees itself alone: the gradients of q and k are zeros there.
        assert (leaf.grad.double() - exact.grad).norm() < TOLERANCE[dtype][1] * exact.grad.norm() + 1e-6


def test_as_near_the_truth_as_torch() -> None:
    *inputs, _ = operands(2, 6, 2, 200, 64)
    sdpa: Any = torch.nn.functional.scaled_dot_product_attention
    theirs = partial(sdpa, is_causal=True, scale=0.125, enable_gqa=True)

    def errors(function: Any) -> list[float]:
        return errors_in_fp64(function, lambda q, k, v: reference.causal_attention(q, k, v, 0.125)[0], *inputs)

    pairs = list(zip(errors(lambda *x: attention(*x, 0.125)[0]), errors(theirs), strict=True))
    assert all(a < 1.2 * b for a, b in pairs), pairs


def test_scores_that_would_overflow() -> None:
    """The largest score is taken out before the exponential, and hidden keys may score anything."""
    q, k, v, grad_out = (200 * x for x in operands(1, 2, 2, 70, 32))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = attention(*leaves, 1.0)
    out.backward(grad_out)
    assert out.isfinite().all()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert relative_error(out, reference.causal_attention(q.double(), k.double(), v.double(), 1.0)[0]) < 5e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 2, 77, 64), (1, 8, 1, 300, 40)], ids=str)
def test_layout_and_threads_do_not_matter(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    inputs = operands(*shape, dtype)
    expected = same_bytes_under_threads(lambda: outputs(*inputs), (1, 2, 3))
    for laid in ([x.contiguous() for x in inputs], [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]):
        assert all(same_values(a, b) for a, b in zip(expected, outputs(*laid), strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_turns_change_no_bit(threads: int) -> None:
    """Scratch does not grow with the heads, so they go in turns: groups a thread, or shared by all threads, and parts
    of groups where a head is large."""
    q, k, v, grad_out = operands(1, 16, 2, 600, 256, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = outputs(q, k, v, grad_out)
        assert len({_C.causal_attention_scratch_bytes(0, (1, 8 * n, n, 600, 256), True) for n in (4, 8, 16)}) < 3
        torch.set_num_threads(1)
        for head in range(2):
            heads, kept = slice(8 * head, 8 * head + 8), slice(head, head + 1)
            alone = outputs(q[:, heads], k[:, kept], v[:, kept], grad_out[:, heads])
            expected = (together[0][:, heads], together[1][:, heads], together[2][:, kept], together[3][:, kept])
            assert all(same_values(a, b) for a, b in zip(alone, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_other_dtypes_and_widths_are_computed_plainly(dtype: torch.dtype) -> None:
    q, k, v, _ = operands(1, 4, 2, 9, 20, dtype)
    truth = reference.causal_attention(q.double(), k.double(), v.double(), 0.3)[0]
    assert relative_error(attention(q, k, v, 0.3)[0], truth) < TOLERANCE.get(dtype, (1e-14,))[0]


def test_refuses_in_words() -> None:
    q, k, v, _ = operands(1, 4, 3, 5, 32)
    refuses(r"q is \[1, 4, 5, 32\], k is \[1, 3, 5, 32\]", attention, q, k, v, 1.0)
