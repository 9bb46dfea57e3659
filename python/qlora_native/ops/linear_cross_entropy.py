"""linear_cross_entropy: mean cross entropy of h W^T without ever holding the full logits.

The logits exist for a few tokens at a time. Their gradients are formed while they are there, so backward is one
multiplication and nothing of size [tokens, vocabulary] is kept. Ignored tokens cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qlora_native import _C
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops import _cuda_kernels, _products
from qlora_native.ops._library import Weight, autograd, fake, implement, weight_of
from qlora_native.ops.linear_4bit import NO_WEIGHT_GRADIENT, without_autocast

LOGIT_BYTES = 24 << 20  # of the logits of one chunk: 256 tokens over 49,152 words in bf16, where both products are fast

Pair = tuple[torch.Tensor, torch.Tensor]
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def is_dense(weight: Weight) -> bool:
    """A dense [V, K] weight stands in ``packed``, without scales."""
    return weight.absmax is None


def check(h: torch.Tensor, labels: torch.Tensor, weight: Weight, need_grad_weight: bool) -> None:
    """Refuses operands that do not fit each other."""
    vocabulary, width = weight.shape
    if h.shape[-1] != width or h.shape[:-1] != labels.shape:
        raise ValueError(
            f"linear_cross_entropy: weight is [{vocabulary}, {width}], h is {list(h.shape)}, labels are "
            f"{list(labels.shape)}: expected h [..., {width}] and labels of its leading dimensions."
        )
    if is_dense(weight) and weight.packed.dtype != h.dtype:
        raise ValueError(f"linear_cross_entropy: h is {h.dtype}, weight is {weight.packed.dtype}: cast one of them.")
    if need_grad_weight and not is_dense(weight):
        raise ValueError("linear_cross_entropy: a quantized weight is frozen and has no gradient.")


def _logits(h: torch.Tensor, weight: Weight, out: torch.Tensor | None = None) -> torch.Tensor:
    """h W^T, [M, V]; in ``out`` where the product can be put there."""
    if is_dense(weight):
        if h.device.type == "cpu":
            return _products.dense_forward(h, weight.packed, out=out)
        return torch.mm(h, weight.packed.t(), out=out)
    logits: torch.Tensor = torch.ops.qlora_native.linear_4bit(h, None, False, *weight)
    return logits


def _grad_h(grad_logits: torch.Tensor, weight: Weight, out: torch.Tensor | None = None) -> torch.Tensor:
    """grad_logits W, [M, K]; in ``out`` where the product can be put there."""
    if is_dense(weight):
        if grad_logits.device.type == "cpu":
            return _products.dense_grad_input(grad_logits, weight.packed, out=out)
        return torch.mm(grad_logits, weight.packed, out=out)
    grad_h: torch.Tensor = torch.ops.qlora_native.linear_4bit_grad_input(grad_logits, False, *weight)
    return grad_h


def empty_gradients(h: torch.Tensor, weight: Weight, need_grad_h: bool, need_grad_weight: bool) -> Pair:
    """Zeros where a gradient is asked for, empty tensors where not."""
    grad_h = torch.zeros_like(h, memory_format=torch.contiguous_format) if need_grad_h else h.new_empty(0)
    grad_weight = torch.zeros_like(weight.packed, dtype=torch.float32) if need_grad_weight else h.new_empty(0)
    return grad_h, grad_weight


@implement("linear_cross_entropy", "CompositeExplicitAutograd")
def anywhere(
    h: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    need_grad_h: bool,
    need_grad_weight: bool,
    *arguments: Any,
) -> Outputs:
    weight = weight_of(arguments)
    check(h, labels, weight, need_grad_weight)
    call = (h, labels, ignore_index, need_grad_h, need_grad_weight, weight)
    with without_autocast(h):
        if h.device.type == "cpu" and h.dtype in DTYPE_NUMBER:
            return _fused(_C.softmax_loss, *call)
        return _chunked(*call)


@implement("linear_cross_entropy", "CUDA")
def cuda(
    h: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    need_grad_h: bool,
    need_grad_weight: bool,
    *arguments: Any,
) -> Outputs:
    module = _cuda_kernels.native()
    if module is None or h.dtype not in DTYPE_NUMBER:
        return anywhere(h, labels, ignore_index, need_grad_h, need_grad_weight, *arguments)
    weight = weight_of(arguments)
    check(h, labels, weight, need_grad_weight)
    with without_autocast(h), _cuda_kernels.launching(h.device) as stream:

        def softmax_loss(*numbers: int) -> None:
            module.softmax_loss(*numbers, stream)

        return _fused(softmax_loss, h, labels, ignore_index, need_grad_h, need_grad_weight, weight)


def _kept(labels: torch.Tensor, ignore_index: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose label counts, and those labels; refuses labels that are no word."""
    targets = labels.reshape(-1)
    kept = (targets != ignore_index).nonzero().squeeze(1)
    chosen = targets[kept]
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= vocabulary):
        raise ValueError(
            f"linear_cross_entropy: labels run from {int(chosen.min())} to {int(chosen.max())}: expected 0 to "
            f"{vocabulary - 1}, or {ignore_index} for tokens to ignore."
        )
    return kept, chosen


def _fused(
    softmax_loss: Callable[..., None],
    h: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    need_grad_h: bool,
    need_grad_weight: bool,
    weight: Weight,
) -> Outputs:
    """What lies between the two products is one native sweep over the logits, which become their own gradient."""
    vocabulary = weight.shape[0]
    rows = h.reshape(-1, h.shape[-1])
    kept, chosen = _kept(labels, ignore_index, vocabulary)
    everything = kept.numel() == rows.shape[0]
    grad_h, grad_weight = empty_gradients(h, weight, need_grad_h and not everything, need_grad_weight)
    if need_grad_h and everything:
        grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    losses = torch.empty(kept.numel(), dtype=torch.float32, device=h.device)
    chunk = min(max(1, LOGIT_BYTES // (h.dtype.itemsize * max(1, vocabulary))), max(1, kept.numel()))
    buffer = torch.empty(chunk if is_dense(weight) else 0, vocabulary, dtype=h.dtype, device=h.device)
    for first in range(0, kept.numel(), chunk):
        last = min(first + chunk, kept.numel())
        part = rows[first:last] if everything else rows[kept[first:last]]
        logits = _logits(part, weight, buffer[: last - first])
        softmax_loss(
            DTYPE_NUMBER[h.dtype],
            logits.data_ptr(),
            chosen[first:].data_ptr(),
            last - first,
            vocabulary,
            need_grad_h or need_grad_weight,
            losses[first:].data_ptr(),
        )
        if need_grad_h:
            target = grad_h.view(-1, h.shape[-1])
            if everything and is_dense(weight):
                _grad_h(logits, weight, target[first:last])
            elif everything:
                target[first:last] = _grad_h(logits, weight)
            else:
                target[kept[first:last]] = _grad_h(logits, weight)
        if need_grad_weight:
            grad_weight.addmm_(logits.t().float(), part.float())
    loss = losses.sum(dtype=torch.float64) / kept.numel()
    return loss.to(torch.float32), grad_h, grad_weight


def _chunked(
    h: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    need_grad_h: bool,
    need_grad_weight: bool,
    weight: Weight,
) -> Outputs:
    """Loss (mean) and the gradients of the *sum* of the losses: their scale fits 16-bit formats whatever the count."""
    grad_h, grad_weight = empty_gradients(h, weight, need_grad_h, need_grad_weight)
    rows, vocabulary = h.reshape(-1, h.shape[-1]), weight.shape[0]
    kept, chosen = _kept(labels, ignore_index, vocabulary)
    total = torch.zeros((), dtype=torch.float64 if h.dtype == torch.float64 else torch.float32, device=h.device)
    chunk = max(1, LOGIT_BYTES // (4 * max(1, vocabulary)))
    for first in range(0, kept.numel(), chunk):
        index, target = kept[first : first + chunk], chosen[first : first + chunk, None]
        part = rows[index]
        logits = _logits(part, weight).to(total.dtype)
        log_sum = torch.logsumexp(logits, 1, keepdim=True)
        total += (log_sum - logits.gather(1, target)).sum()
        if not (need_grad_h or need_grad_weight):
            continue
        gradient = logits.sub_(log_sum).exp_()  # softmax, in place
        gradient.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
        gradient = gradient.to(h.dtype)
        if need_grad_h:
            grad_h.view(-1, h.shape[-1])[index] = _grad_h(gradient, weight)
        if need_grad_weight:
            grad_weight += torch.mm(gradient.t(), part)
    return (total / kept.numel()).to(torch.promote_types(torch.float32, h.dtype)), grad_h, grad_weight


@fake("linear_cross_entropy")
def shapes(
    h: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    need_grad_h: bool,
    need_grad_weight: bool,
    *arguments: Any,
) -> Outputs:
    weight = weight_of(arguments)
    check(h, labels, weight, need_grad_weight)
    loss = h.new_empty((), dtype=torch.promote_types(torch.float32, h.dtype))
    return loss, *empty_gradients(h, weight, need_grad_h, need_grad_weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    h, labels, ignore_index, _, _, packed, *_ = inputs
    _, grad_h, grad_weight = output
    ctx.mark_non_differentiable(grad_h, grad_weight)
    ctx.save_for_backward(labels, grad_h, grad_weight)
    ctx.ignore_index, ctx.h_dtype, ctx.weight_dtype = ignore_index, h.dtype, packed.dtype


def _backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    labels, sum_grad_h, sum_grad_weight = ctx.saved_tensors
    factor = grad_loss / (labels != ctx.ignore_index).sum()
    grad_h = grad_packed = None
    if ctx.needs_input_grad[0]:
        grad_h = sum_grad_h * factor.to(ctx.h_dtype)
    if ctx.needs_input_grad[5]:
        grad_packed = (sum_grad_weight * factor).to(ctx.weight_dtype)
    return grad_h, None, None, None, None, grad_packed, *NO_WEIGHT_GRADIENT[1:]


autograd("linear_cross_entropy", _backward, _setup)
