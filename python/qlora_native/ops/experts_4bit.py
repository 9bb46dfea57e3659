"""experts_4bit: products with a stack of experts W [E, N, K], frozen in 4 bits, each with rows of its own.

Rows lie sorted: expert e has those from offsets[e] to offsets[e + 1], of x [S, K] or of x [T, K] as token [S] picks
them. With A [E, r, K] and B [E, N, r], of rank 0 where there is no adapter,

    y = x W[e]^T + s * (x A[e]^T) B[e]^T

has the bits of ``lora_linear_4bit`` on these rows alone. Rows behind the last offset are of no expert and become zeros.
The op returns y [S, N] and xa = x A[e]^T [S, r], which backward needs. On a CPU a kernel takes all experts at once;
elsewhere W is decoded as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._buffers import buffer, empty_like
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._direct import call, call_in_derivative
from qlora_native.ops._engine import ANY, autocast, save_weight, saved_weight
from qlora_native.ops._library import Function, Values, autograd, define
from qlora_native.ops._operands import WIDE, Weight

Pair = tuple[Tensor, Tensor]


def _rows(x: Tensor, token: Tensor | None) -> Tensor:
    return x if token is None else x.index_select(0, token)


def _run(run: Function, *operands: Any) -> None:
    """Calls a native function with the scratch that it asks for."""
    room = buffer(0)
    while needed := run(*operands, *room):
        room = buffer(needed)


def _each(offsets: Tensor, weight: Weight, a: Tensor, b: Tensor, *tensors: Tensor) -> Iterator[Values]:
    """Of each expert its rows of the tensors, its matrix, A and B in their dtype, for plain torch."""
    dtype = tensors[0].dtype
    stored = torch.float32 if dtype == torch.float64 else dtype
    cuts = offsets.tolist()
    rows = [t.tensor_split(cuts)[1:-1] for t in tensors]
    stacks = call("dequantize_4bit", stored, weight), a, b
    return zip(*rows, *(t.to(dtype) for t in stacks), strict=True)


def outputs(x: Tensor, token: Tensor | None, offsets: Tensor, a: Tensor, b: Tensor, *_: Any) -> Pair:
    rows = (x if token is None else token).shape[0]
    return empty_like(x, (rows, b.shape[1])), x.new_empty(rows, a.shape[1])


def values(x: Tensor, token: Tensor | None, *others: Any) -> Pair:
    offsets, a, b, scale, weight = others
    y, xa = (t.zero_() for t in outputs(x, token, *others))
    for rows, out, low, w, down, up in _each(offsets, weight, a, b, _rows(x, token), y, xa):
        low.copy_(rows @ down.t())
        out.copy_(rows @ w.t() + scale * (low @ up.t()))
    return y, xa


def native(run: Function, results: Pair, x: Tensor, token: Tensor | None, *others: Any) -> None:
    offsets, a, b, scale, weight = others
    # Few rows take A and B as they are stored, more of them in x's dtype, as lora_linear_4bit does.
    stored = down, up = a.float().contiguous(), b.float().contiguous()
    if max(offsets.diff().tolist(), default=0) > _C.few_rows(DTYPE_NUMBER[x.dtype]):
        down, up = ANY.narrow(a, x.dtype), ANY.narrow(b, x.dtype, scale)
    rows = _rows(x, token).contiguous()
    given = x.dtype, rows, offsets.contiguous(), offsets.numel(), *stored, down, up, a.shape[1], scale
    _run(run, *given, *results, rows.shape[0], *weight.shape[1:], weight.pointers())


define("experts_4bit", outputs, values, native, on_cuda=False)


def gradients(grad_y: Tensor, x: Tensor, *others: Any) -> Values:
    _, _, a, b, *_ = others
    return empty_like(grad_y, x.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def gradient_values(grad_y: Tensor, x: Tensor, *others: Any) -> Values:
    """From the inputs alone, so that they have derivatives in turn."""
    offsets, _, a, b, scale, weight = others
    found = []
    for g, rows, w, down, up in _each(offsets, weight, a, b, grad_y, x):
        low = scale * (g @ up)
        found.append((g @ w + low @ down, low.t() @ rows, scale * g.t() @ (rows @ down.t())))
    grads_x, grads_a, grads_b = zip(*found, strict=True)
    of_none = x.new_zeros(x.shape[0] - int(offsets[-1]), x.shape[1])
    return torch.cat([*grads_x, of_none]), torch.stack(grads_a), torch.stack(grads_b)


def native_gradients(run: Function, results: Values, *arguments: Any) -> None:
    grad_y, x, offsets, xa, a, b, scale, weight = arguments
    dtype = grad_y.dtype
    experts, rank, k = a.shape
    n = b.shape[1]
    rows = x.shape[0]
    operands = [t.contiguous() for t in (grad_y, x, offsets)]
    factors = ANY.narrow(b, dtype), ANY.narrow(a, dtype), rank, scale
    grad_x, *others = results
    wide = torch.empty(experts, rank, k), torch.empty(experts, rank, n)
    written = x.new_empty(rows, rank), grad_x, *wide
    sizes = rows, n, k, weight.pointers()
    _run(run, dtype, *operands, offsets.numel(), xa.contiguous(), *factors, *written, *sizes)
    others[0].copy_(wide[0])
    others[1].copy_(wide[1].transpose(1, 2))


define("experts_4bit_backward", gradients, gradient_values, native_gradients, on_cuda=False)


def experts_4bit(
    x: Tensor,
    token: Tensor | None,
    offsets: Tensor,
    weight: Weight,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The op's y, under autocast as torch's own linear layer; without A and B that of the stack alone."""
    (x,) = autocast(x)  # type: ignore[assignment]
    if a is None or b is None:
        experts, n, k = weight.shape
        a, b = x.new_empty(experts, 0, k), x.new_empty(experts, n, 0)
    y, _ = call("experts_4bit", x, token, offsets, a, b, scale, weight)
    return y


def _setup(ctx: Any, inputs: Values, output: Pair) -> None:
    x, token, offsets, a, b, ctx.scale, weight = inputs
    _, xa = output
    ctx.mark_non_differentiable(xa)
    ctx.set_materialize_grads(False)
    ctx.x_shape = x.shape
    save_weight(ctx, weight, x if a.shape[1] else None, token, offsets, xa, a, b)


def _backward(ctx: Any, grad_y: Tensor | None, _: Any) -> Values:
    if grad_y is None:
        return (None,) * 6
    weight, (x, token, *others) = saved_weight(ctx)
    tokens, k = ctx.x_shape
    # Without an adapter nothing reads it.
    rows = grad_y.new_empty(grad_y.shape[0], k) if x is None else _rows(x, token)
    arguments = grad_y, rows, *others, ctx.scale, weight
    if torch.is_grad_enabled():  # these gradients are differentiated in turn
        grad_x, grad_a, grad_b = gradient_values(*arguments)
    else:
        grad_x, grad_a, grad_b = call_in_derivative("experts_4bit_backward", *arguments)
    if token is not None:  # rows of a token are added in their order, in fp32 or wider
        wide = WIDE[grad_x.dtype]
        sums = torch.zeros(tokens, k, dtype=wide, device=grad_x.device)
        grad_x = sums.index_add(0, token, grad_x.to(wide)).to(grad_x.dtype)
    return grad_x, None, None, grad_a, grad_b, None


autograd("experts_4bit", _backward, _setup)
