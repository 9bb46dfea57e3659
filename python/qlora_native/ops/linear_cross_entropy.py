"""linear_cross_entropy: mean cross entropy of h W^T without ever holding the full logits.

The logits exist for a few tokens at a time, and become their own gradients, so backward is one multiplication and
nothing of size [tokens, vocabulary] is kept. Ignored tokens cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._library import Weight, autograd, fake, implement
from qlora_native.ops.linear_4bit import ANY, CPU, NO_WEIGHT_GRADIENT, without_autocast

LOGIT_BYTES = 24 << 20  # of the logits of one chunk: 256 tokens over 49,152 words in bf16, where both products are fast

Pair = tuple[Tensor, Tensor]
Outputs = tuple[Tensor, Tensor, Tensor]


Call = tuple[Tensor, Tensor, int, bool, bool, Weight]  # the op's arguments, those of the weight as one


def is_dense(weight: Weight) -> bool:
    """A dense [V, K] weight stands in ``packed``, without scales."""
    return weight.absmax is None


def read(*arguments: Any) -> Call:
    """Refuses operands that do not fit each other."""
    h, labels, ignore_index, need_grad_h, need_grad_weight = arguments[:5]
    weight = Weight(*arguments[5:])
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
    return h, labels, ignore_index, need_grad_h, need_grad_weight, weight


def _logits(h: Tensor, weight: Weight, out: Tensor | None = None) -> Tensor:
    """h W^T, [M, V]; in ``out`` where the product can be put there."""
    if is_dense(weight):
        return (CPU if h.device.type == "cpu" else ANY).dense_forward(h, weight.packed, out=out)
    logits: Tensor = torch.ops.qlora_native.linear_4bit(h, None, False, *weight)
    return logits


def _grad_h(grad_logits: Tensor, weight: Weight, out: Tensor | None = None) -> Tensor:
    """grad_logits W, [M, K]; in ``out`` where the product can be put there."""
    if is_dense(weight):
        return (CPU if grad_logits.device.type == "cpu" else ANY).dense_grad_input(grad_logits, weight.packed, out=out)
    grad_h: Tensor = torch.ops.qlora_native.linear_4bit_grad_input(grad_logits, False, *weight)
    return grad_h


def empty_gradients(h: Tensor, weight: Weight, need_grad_h: bool, need_grad_weight: bool) -> Pair:
    """Zeros where a gradient is asked for, empty tensors where not."""
    grad_h = torch.zeros_like(h, memory_format=torch.contiguous_format) if need_grad_h else h.new_empty(0)
    wide = torch.promote_types(torch.float32, h.dtype)
    grad_weight = torch.zeros_like(weight.packed, dtype=wide) if need_grad_weight else h.new_empty(0)
    return grad_h, grad_weight


def _native_loss(run: Callable[..., None], logits: Tensor, labels: Tensor, losses: Tensor, gradients: bool) -> None:
    """One native sweep over the logits [M, V]: the losses, and with ``gradients`` their own in place of the logits."""
    sizes = logits.shape[0], logits.shape[1], gradients
    run(DTYPE_NUMBER[logits.dtype], logits.data_ptr(), labels.data_ptr(), *sizes, losses.data_ptr())


def _torch_loss(logits: Tensor, labels: Tensor, losses: Tensor, gradients: bool) -> None:
    """The same in plain torch."""
    wide, target = logits.to(losses.dtype), labels[:, None]
    log_sum = torch.logsumexp(wide, 1, keepdim=True)
    losses.copy_((log_sum - wide.gather(1, target))[:, 0])
    if gradients:
        softmax = (wide - log_sum).exp_()
        logits.copy_(softmax.scatter_add_(1, target, torch.full_like(log_sum, -1.0)))


@implement("linear_cross_entropy", "CompositeExplicitAutograd")
def anywhere(*arguments: Any) -> Outputs:
    call = read(*arguments)
    h = call[0]
    is_native = h.device.type == "cpu" and h.dtype in DTYPE_NUMBER
    with without_autocast(h):
        return _chunked(partial(_native_loss, _C.softmax_loss) if is_native else _torch_loss, call)


@implement("linear_cross_entropy", "CUDA")
def cuda(*arguments: Any) -> Outputs:
    from qlora_native.ops import _cuda_kernels

    call, module = read(*arguments), _cuda_kernels.native()
    h = call[0]
    if module is None or h.dtype not in DTYPE_NUMBER:
        return anywhere(*arguments)
    with without_autocast(h), _cuda_kernels.launching(h.device) as stream:
        return _chunked(partial(_native_loss, lambda *numbers: module.softmax_loss(*numbers, stream)), call)


def _kept(labels: Tensor, ignore_index: int, vocabulary: int) -> Pair:
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


def _chunked(loss_of: Callable[[Tensor, Tensor, Tensor, bool], None], call: Call) -> Outputs:
    """Loss (mean) and the gradients of the *sum* of the losses: their scale fits 16-bit formats whatever the count."""
    h, labels, ignore_index, need_grad_h, need_grad_weight, weight = call
    vocabulary = weight.shape[0]
    rows = h.reshape(-1, h.shape[-1])
    kept, chosen = _kept(labels, ignore_index, vocabulary)
    everything = kept.numel() == rows.shape[0]
    grad_h, grad_weight = empty_gradients(h, weight, need_grad_h and not everything, need_grad_weight)
    if need_grad_h and everything:
        grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    losses = h.new_empty(kept.numel(), dtype=torch.promote_types(torch.float32, h.dtype))
    chunk = min(max(1, LOGIT_BYTES // (h.dtype.itemsize * max(1, vocabulary))), max(1, kept.numel()))
    buffer = torch.empty(chunk if is_dense(weight) else 0, vocabulary, dtype=h.dtype, device=h.device)
    for first in range(0, kept.numel(), chunk):
        last = min(first + chunk, kept.numel())
        part = rows[first:last] if everything else rows[kept[first:last]]
        logits = _logits(part, weight, buffer[: last - first])
        loss_of(logits, chosen[first:last], losses[first:last], need_grad_h or need_grad_weight)
        if need_grad_h:
            target = grad_h.view(-1, h.shape[-1])
            out = target[first:last] if everything and is_dense(weight) else None
            part_grad = _grad_h(logits, weight, out)
            if out is None:
                target[slice(first, last) if everything else kept[first:last]] = part_grad
        if need_grad_weight:
            grad_weight.addmm_(logits.t().to(grad_weight.dtype), part.to(grad_weight.dtype))
    wide = torch.float64 if h.device.type in ("cpu", "cuda") else losses.dtype  # which not every device has
    loss = losses.sum(dtype=wide) / kept.numel()
    return loss.to(losses.dtype), grad_h, grad_weight


@fake("linear_cross_entropy")
def shapes(*arguments: Any) -> Outputs:
    h, _, _, need_grad_h, need_grad_weight, weight = read(*arguments)
    loss = h.new_empty((), dtype=torch.promote_types(torch.float32, h.dtype))
    return loss, *empty_gradients(h, weight, need_grad_h, need_grad_weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    h, labels, ignore_index, _, _, packed, *_ = inputs
    _, grad_h, grad_weight = output
    ctx.mark_non_differentiable(grad_h, grad_weight)
    ctx.save_for_backward(labels, grad_h, grad_weight)
    ctx.ignore_index, ctx.h_dtype, ctx.weight_dtype = ignore_index, h.dtype, packed.dtype


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    labels, sum_grad_h, sum_grad_weight = ctx.saved_tensors
    factor = grad_loss / (labels != ctx.ignore_index).sum()
    grad_h = grad_packed = None
    if ctx.needs_input_grad[0]:
        grad_h = sum_grad_h * factor.to(ctx.h_dtype)
    if ctx.needs_input_grad[5]:
        grad_packed = (sum_grad_weight * factor).to(ctx.weight_dtype)
    return grad_h, None, None, None, None, grad_packed, *NO_WEIGHT_GRADIENT[1:]


autograd("linear_cross_entropy", _backward, _setup)
