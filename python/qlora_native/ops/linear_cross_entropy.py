"""linear_cross_entropy: mean cross entropy of z = h W^T [tokens, V] without ever holding the full logits z.

A token's loss is log(sum(exp(z))) - z[label], and its gradient to z is softmax(z) - onehot(label), so to h that times W
and to W its transpose times h. The logits exist for a chunk of tokens at a time, become their own gradients in place,
and are multiplied at once: forward computes the gradients of the *sum* of the losses, and backward scales them by
dL/dloss / count. Nothing of size [tokens, V] is kept.

On a CPU ignored tokens cost nothing. A device computes them too, and masks their results: to gather the others, the
host would have to wait for their number.

``rows`` [R, K] stand in the place of those of W with the numbers ``row_ids``; then they have the gradient, and W none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._buffers import empty_like
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._engine import ANY, without_autocast
from qlora_native.ops._library import Function, Values, autograd, cuda_kernels, fake, implement, plain
from qlora_native.ops._operands import WIDE, Weight
from qlora_native.ops.linear_4bit import CPU

LOGIT_BYTES = 24 << 20  # of the logits of one chunk
# Of a chunk, at least: the head is read and decoded twice a chunk, which so many tokens hide behind their products. On
# a CPU 512 would take 16 % less time and twice the memory.
CPU_TOKENS = 256
DEVICE_TOKENS = 1024

Outputs = tuple[Tensor, Tensor, Tensor]


def chunk_tokens(device: str, vocabulary: int, itemsize: int, tokens: int) -> int:
    """Tokens whose logits exist at a time."""
    fits = LOGIT_BYTES // (itemsize * max(1, vocabulary))
    return min(max(CPU_TOKENS if device == "cpu" else DEVICE_TOKENS, fits), max(1, tokens))


def read(*arguments: Any) -> Values:
    """The arguments, those of the weight as one; refuses to derive a quantized weight.

    A weight without absmax is dense: it stands in ``packed``, [V, K].
    """
    h, labels, ignore_index, need_grad_h, need_grad_weight, rows, row_ids = arguments[:7]
    weight = Weight(*arguments[7:])
    if need_grad_weight and rows is None and weight.absmax is not None:
        raise ValueError("linear_cross_entropy: a quantized weight is frozen and has no gradient.")
    if (rows is None) != (row_ids is None):
        raise ValueError(
            "linear_cross_entropy: only one of rows and row_ids is given: expected an id a row."
        )
    return h, labels.contiguous(), ignore_index, need_grad_h, need_grad_weight, rows, row_ids, weight


def _product(is_forward: bool, x: Tensor, weight: Weight, out: Tensor | None) -> Tensor:
    """x W^T or x W; in ``out``, if one is given, for a dense weight."""
    if weight.absmax is not None:
        return ANY.product(is_forward, x, weight)
    engine = CPU if x.device.type == "cpu" else ANY
    return engine.dense(is_forward, x, weight.packed, out=out)


def empty_gradients(call: Values) -> tuple[Tensor, Tensor]:
    """Of h, uninitialized, and of the weight or the rows, zeros; empty tensors where none is asked for."""
    h, _, _, need_grad_h, need_grad_weight, rows, _, weight = call
    grad_h = empty_like(h) if need_grad_h else h.new_empty(0)
    if not need_grad_weight:
        return grad_h, h.new_empty(0)
    return grad_h, torch.zeros_like(weight.packed if rows is None else rows, dtype=WIDE[h.dtype])


# A function of logits [M, V], labels and losses [M], and whether it puts the gradient in the place of the logits.
Loss = Callable[[Tensor, Tensor, Tensor, bool], None]


def _torch_loss(
    ignore_index: int, logits: Tensor, labels: Tensor, losses: Tensor, need_gradient: bool
) -> None:
    """The losses, and with ``need_gradient`` their own gradients in place of the logits.

    0 where a label is to be ignored; NaN where it is no word otherwise.
    """
    ignored = labels == ignore_index
    strange = (labels < 0) | (labels >= logits.shape[1])
    target = labels.masked_fill(ignored | strange, 0)[:, None]
    wide = logits.to(losses.dtype)
    log_sum = torch.logsumexp(wide, 1, keepdim=True)
    found = (log_sum - wide.gather(1, target))[:, 0]
    losses.copy_(found.masked_fill_(strange, torch.nan).masked_fill_(ignored, 0.0))
    if need_gradient:
        softmax = (wide - log_sum).exp_().scatter_add_(1, target, torch.full_like(log_sum, -1.0))
        logits.copy_(
            softmax.masked_fill_(strange[:, None], torch.nan).masked_fill_(ignored[:, None], 0.0)
        )


def _native_loss(
    run: Function,
    ignored: Values,
    stream: Values,
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    need_gradient: bool,
) -> None:
    """The same in one sweep; on a CPU, where nothing is ``ignored``, of labels that are words."""
    run(
        *plain((logits.dtype, logits, labels, *ignored, *logits.shape, need_gradient, losses)), *stream
    )


@implement("linear_cross_entropy", "CPU")
def cpu(*arguments: Any) -> Outputs:
    call = read(*arguments)
    h, labels, ignore_index, *_, weight = call
    native = partial(_native_loss, _C.softmax_loss, (), ())
    loss_of = native if h.dtype in DTYPE_NUMBER else partial(_torch_loss, ignore_index)
    return _chunked(loss_of, call, "cpu", _kept(labels, ignore_index, weight.shape[0]))


@implement("linear_cross_entropy", "CompositeExplicitAutograd")
def anywhere(*arguments: Any) -> Outputs:
    call = read(*arguments)
    return _chunked(partial(_torch_loss, call[2]), call, call[0].device.type)


@implement("linear_cross_entropy", "CUDA")
def cuda(*arguments: Any) -> Outputs:
    call = read(*arguments)
    h, _, ignore_index, *_ = call
    kernels = cuda_kernels()
    module = kernels.native(h.device)
    if module is None or h.dtype not in DTYPE_NUMBER:
        return anywhere(*arguments)
    with kernels.launching(h.device) as stream:
        loss_of = partial(_native_loss, module.softmax_loss, (ignore_index,), (stream,))
        return _chunked(loss_of, call, "cuda")


def _kept(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor | None:
    """Positions whose label counts, None if all do; refuses labels that are no word."""
    targets = labels.reshape(-1)
    kept = (targets != ignore_index).nonzero().squeeze(1)
    if kept.numel():
        low, high = map(int, targets[kept].aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"linear_cross_entropy: labels run from {low} to {high}: expected 0 to {vocabulary - 1}, or "
                f"{ignore_index} for tokens to ignore."
            )
    return None if kept.numel() == targets.numel() else kept


def _chunked(loss_of: Loss, call: Values, device: str, kept: Tensor | None = None) -> Outputs:
    """Loss (mean) and the gradients of the *sum* of the losses: their scale fits 16-bit formats whatever the count.

    Of the tokens ``kept`` alone, if they are given; else nothing waits for a device.
    """
    h, labels, ignore_index, need_grad_h, need_grad_weight, rows, row_ids, weight = call
    vocabulary = weight.shape[0]
    states = h.reshape(-1, h.shape[-1])
    targets = labels.reshape(-1)
    tokens = states.shape[0] if kept is None else kept.numel()
    grad_h, grad_weight = empty_gradients(call)
    if kept is not None:
        grad_h.zero_()
    losses = h.new_empty(tokens, dtype=WIDE[h.dtype])
    chunk = chunk_tokens(device, vocabulary, h.dtype.itemsize, tokens)
    buffer = empty_like(h, (chunk if weight.absmax is None else 0, vocabulary))
    narrow = None if rows is None else rows.to(h.dtype)
    with without_autocast(h):
        for first in range(0, tokens, chunk):
            last = min(first + chunk, tokens)
            where = slice(first, last) if kept is None else kept[first:last]
            part = states[where]
            logits = _product(True, part, weight, buffer[: last - first])
            # Rows in the place of some of W's have logits and gradients of their own, and W's stand aside with zeros.
            if narrow is not None:
                logits.index_copy_(1, row_ids, part @ narrow.t())
            loss_of(logits, targets[where], losses[first:last], need_grad_h or need_grad_weight)
            grad_derived = logits
            if narrow is not None:
                grad_derived = logits[:, row_ids]
                logits.index_fill_(1, row_ids, 0.0)
            if need_grad_h:
                target = grad_h.view(-1, h.shape[-1])
                out = target[where] if kept is None else None
                part_grad = _product(False, logits, weight, out)
                if narrow is not None:
                    part_grad.addmm_(grad_derived, narrow)
                if part_grad is not out:
                    target[where] = part_grad
            if need_grad_weight:
                grad_weight.addmm_(grad_derived.t().to(grad_weight.dtype), part.to(grad_weight.dtype))
            del logits, grad_derived  # before the next chunk's are allocated
    # Not every device has float64.
    wide = torch.float64 if h.device.type in ("cpu", "cuda") else losses.dtype
    count = (targets != ignore_index).sum()
    return (losses.sum(dtype=wide) / count).to(losses.dtype), grad_h, grad_weight


@fake("linear_cross_entropy")
def shapes(*arguments: Any) -> Outputs:
    call = read(*arguments)
    return call[0].new_empty((), dtype=WIDE[call[0].dtype]), *empty_gradients(call)


def _setup(ctx: Any, inputs: Values, output: Outputs) -> None:
    _, labels, ctx.ignore_index, *_ = inputs
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.save_for_backward(labels, *grads)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Values:
    labels, sum_grad_h, sum_grad_weight = ctx.saved_tensors
    needs_h, _, _, _, _, needs_rows, _, needs_weight, *_ = ctx.needs_input_grad
    factor = grad_loss / (labels != ctx.ignore_index).sum()
    grad_h = sum_grad_h * factor.to(sum_grad_h.dtype) if needs_h else None
    grad_weight = sum_grad_weight * factor if needs_rows or needs_weight else None
    of_rows, of_packed = (grad_weight, None) if needs_rows else (None, grad_weight)
    return (
        grad_h,
        None,
        None,
        None,
        None,
        of_rows,
        None,
        of_packed,
        *[None] * (len(Weight._fields) - 1),
    )


autograd("linear_cross_entropy", _backward, _setup)
