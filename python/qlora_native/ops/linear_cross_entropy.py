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
from qlora_native._native import DTYPE_NUMBER
from qlora_native._pages import empty_like
from qlora_native.ops._engine import ANY, Engine, without_autocast
from qlora_native.ops._library import Values, autograd, cuda_kernels, fake, implement
from qlora_native.ops._operands import WIDE, Weight
from qlora_native.ops.linear_4bit import CPU

LOGIT_BYTES = 24 << 20  # of the logits of one chunk
# Of a chunk, at least: the head is read and decoded twice a chunk, which so many tokens hide behind their products. On
# a CPU 512 would take 16 % less time and twice the memory.
CPU_TOKENS = 256
DEVICE_TOKENS = 1024

Pair = tuple[Tensor, Tensor]
Outputs = tuple[Tensor, Tensor, Tensor]


# The op's arguments, those of the weight as one.
Call = tuple[Tensor, Tensor, int, bool, bool, Tensor | None, Tensor | None, Weight]


def chunk_tokens(device: str, vocabulary: int, itemsize: int, tokens: int) -> int:
    """Tokens whose logits exist at a time."""
    fits = LOGIT_BYTES // (itemsize * max(1, vocabulary))
    return min(max(CPU_TOKENS if device == "cpu" else DEVICE_TOKENS, fits), max(1, tokens))


def is_dense(weight: Weight) -> bool:
    """A dense [V, K] weight stands in ``packed``, without scales."""
    return weight.absmax is None


def read(*arguments: Any) -> Call:
    """The arguments, those of the weight as one; refuses to derive a quantized weight."""
    h, labels, ignore_index, need_grad_h, need_grad_weight, rows, row_ids = arguments[:7]
    weight = Weight(*arguments[7:])
    if need_grad_weight and rows is None and not is_dense(weight):
        raise ValueError("linear_cross_entropy: a quantized weight is frozen and has no gradient.")
    if (0 if rows is None else len(rows)) != (0 if row_ids is None else row_ids.numel()):
        raise ValueError("linear_cross_entropy: rows and row_ids are not of the same number: expected an id a row.")
    return h, labels.contiguous(), ignore_index, need_grad_h, need_grad_weight, rows, row_ids, weight


def _logits(h: Tensor, weight: Weight, out: Tensor | None = None) -> Tensor:
    """h W^T, [M, V]; in ``out`` where the product can be put there."""
    if is_dense(weight):
        return _dense_engine(h).dense(True, h, weight.packed, out=out)
    return ANY.product(True, h, weight)


def _grad_h(grad_logits: Tensor, weight: Weight, out: Tensor | None = None) -> Tensor:
    """grad_logits W, [M, K]; in ``out`` where the product can be put there."""
    if is_dense(weight):
        return _dense_engine(grad_logits).dense(False, grad_logits, weight.packed, out=out)
    return ANY.product(False, grad_logits, weight)


def _dense_engine(tensor: Tensor) -> Engine:
    return CPU if tensor.device.type == "cpu" else ANY


def empty_gradients(h: Tensor, weight: Tensor, need_grad_h: bool, need_grad_weight: bool) -> Pair:
    """Zeros where a gradient is asked for, empty tensors where not."""
    grad_h = torch.zeros_like(h, memory_format=torch.contiguous_format) if need_grad_h else h.new_empty(0)
    wide = WIDE[h.dtype]
    grad_weight = torch.zeros_like(weight, dtype=wide) if need_grad_weight else h.new_empty(0)
    return grad_h, grad_weight


Loss = Callable[[Tensor, Tensor, Tensor, bool], None]  # of logits [M, V], labels and losses [M], need_gradient


def _torch_loss(ignore_index: int, logits: Tensor, labels: Tensor, losses: Tensor, need_gradient: bool) -> None:
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
        logits.copy_(softmax.masked_fill_(strange[:, None], torch.nan).masked_fill_(ignored[:, None], 0.0))


def _native_loss(logits: Tensor, labels: Tensor, losses: Tensor, need_gradient: bool) -> None:
    """The same in one sweep over CPU memory, of labels that are words."""
    sizes = logits.shape[0], logits.shape[1], need_gradient
    _C.softmax_loss(DTYPE_NUMBER[logits.dtype], logits.data_ptr(), labels.data_ptr(), *sizes, losses.data_ptr())


@implement("linear_cross_entropy", "CPU")
def cpu(*arguments: Any) -> Outputs:
    call = read(*arguments)
    h, labels, ignore_index, *_, weight = call
    kept = _kept(labels, ignore_index, weight.shape[0])
    loss_of = _native_loss if h.dtype in DTYPE_NUMBER else partial(_torch_loss, ignore_index)
    with without_autocast(h):
        return _chunked(loss_of, call, "cpu", kept)


@implement("linear_cross_entropy", "CompositeExplicitAutograd")
def anywhere(*arguments: Any) -> Outputs:
    call = read(*arguments)
    with without_autocast(call[0]):
        return _chunked(partial(_torch_loss, call[2]), call, call[0].device.type)


@implement("linear_cross_entropy", "CUDA")
def cuda(*arguments: Any) -> Outputs:
    kernels = cuda_kernels()
    call = read(*arguments)
    h, _, ignore_index, *_ = call
    module = kernels.native(h.device)
    if module is None or h.dtype not in DTYPE_NUMBER:
        return anywhere(*arguments)

    def loss_of(logits: Tensor, labels: Tensor, losses: Tensor, need_gradient: bool) -> None:
        sources = DTYPE_NUMBER[logits.dtype], logits.data_ptr(), labels.data_ptr(), ignore_index
        module.softmax_loss(*sources, *logits.shape, need_gradient, losses.data_ptr(), stream)

    with without_autocast(h), kernels.launching(h.device) as stream:
        return _chunked(loss_of, call, "cuda")


def _kept(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor | None:
    """Positions whose label counts, None if all do; refuses labels that are no word."""
    targets = labels.reshape(-1)
    kept = (targets != ignore_index).nonzero().squeeze(1)
    chosen = targets[kept]
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= vocabulary):
        raise ValueError(
            f"linear_cross_entropy: labels run from {int(chosen.min())} to {int(chosen.max())}: expected 0 to "
            f"{vocabulary - 1}, or {ignore_index} for tokens to ignore."
        )
    return None if kept.numel() == targets.numel() else kept


def _chunked(loss_of: Loss, call: Call, device: str, kept: Tensor | None = None) -> Outputs:
    """Loss (mean) and the gradients of the *sum* of the losses: their scale fits 16-bit formats whatever the count.

    Of the tokens ``kept`` alone, if they are given; else nothing waits for a device.
    """
    h, labels, ignore_index, need_grad_h, need_grad_weight, rows, row_ids, weight = call
    vocabulary = weight.shape[0]
    states = h.reshape(-1, h.shape[-1])
    targets = labels.reshape(-1)
    tokens = states.shape[0] if kept is None else kept.numel()
    derived = weight.packed if rows is None else rows
    grad_h, grad_weight = empty_gradients(h, derived, need_grad_h and kept is not None, need_grad_weight)
    narrow = None if rows is None else rows.to(h.dtype)
    if need_grad_h and kept is None:
        grad_h = empty_like(h)
    losses = h.new_empty(tokens, dtype=WIDE[h.dtype])
    chunk = chunk_tokens(device, vocabulary, h.dtype.itemsize, tokens)
    buffer = empty_like(h, (chunk if is_dense(weight) else 0, vocabulary))
    for first in range(0, tokens, chunk):
        last = min(first + chunk, tokens)
        where = slice(first, last) if kept is None else kept[first:last]
        part = states[where]
        logits = _logits(part, weight, buffer[: last - first])
        # Rows in the place of some of W's have logits and gradients of their own, and W's stand aside with zeros.
        if narrow is not None and row_ids is not None:
            logits.index_copy_(1, row_ids, part @ narrow.t())
        loss_of(logits, targets[where], losses[first:last], need_grad_h or need_grad_weight)
        grad_derived = logits
        if row_ids is not None:
            grad_derived = logits[:, row_ids]
            logits.index_fill_(1, row_ids, 0.0)
        if need_grad_h:
            target = grad_h.view(-1, h.shape[-1])
            out = target[where] if kept is None and is_dense(weight) else None
            part_grad = _grad_h(logits, weight, out)
            if narrow is not None:
                part_grad.addmm_(grad_derived, narrow)
            if out is None:
                target[where] = part_grad
        if need_grad_weight:
            grad_weight.addmm_(grad_derived.t().to(grad_weight.dtype), part.to(grad_weight.dtype))
        del logits, grad_derived  # before the next chunk's are allocated
    wide = torch.float64 if h.device.type in ("cpu", "cuda") else losses.dtype  # which not every device has
    count = (targets != ignore_index).sum()
    return (losses.sum(dtype=wide) / count).to(losses.dtype), grad_h, grad_weight


@fake("linear_cross_entropy")
def shapes(*arguments: Any) -> Outputs:
    h, _, _, need_grad_h, need_grad_weight, rows, _, weight = read(*arguments)
    loss = h.new_empty((), dtype=WIDE[h.dtype])
    return loss, *empty_gradients(h, weight.packed if rows is None else rows, need_grad_h, need_grad_weight)


def _setup(ctx: Any, inputs: Values, output: Outputs) -> None:
    h, labels, ignore_index, _, _, rows, _, packed, *_ = inputs
    _, grad_h, grad_weight = output
    ctx.mark_non_differentiable(grad_h, grad_weight)
    ctx.save_for_backward(labels, grad_h, grad_weight)
    ctx.ignore_index = ignore_index
    ctx.h_dtype = h.dtype
    ctx.weight_dtype = (packed if rows is None else rows).dtype


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Values:
    labels, sum_grad_h, sum_grad_weight = ctx.saved_tensors
    factor = grad_loss / (labels != ctx.ignore_index).sum()
    grad_h = sum_grad_h * factor.to(ctx.h_dtype) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[5] or ctx.needs_input_grad[7]:
        grad_weight = (sum_grad_weight * factor).to(ctx.weight_dtype)
    of_rows, of_packed = (grad_weight, None) if ctx.needs_input_grad[5] else (None, grad_weight)
    return grad_h, None, None, None, None, of_rows, None, of_packed, *[None] * (len(Weight._fields) - 1)


autograd("linear_cross_entropy", _backward, _setup)
