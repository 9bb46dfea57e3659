"""The 4-bit weight that an adapted layer ships as, and training through it.

A block keeps its scale, and its codes become those nearest to W + gain * scale * B A. An adapter changes most elements
by less than half the distance of two levels, so with a gain of 1 almost all codes would stay. With that of
:func:`gain_of` some elements change, each by a whole distance, and along the adapter's own direction the weight moves
as far as the adapter says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_native import _native, gguf_blocks
from qlora_native.functional import dense_linear
from qlora_native.lora.layer import LoRALinear
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.ops._direct import call, call_in_derivative
from qlora_native.ops._library import Weight
from qlora_native.weight import QuantizedWeight

SAMPLED_ROWS, SAMPLED_TOKENS = 256, 512  # of a weight and of its inputs, from which its gain is found
SAMPLED = 1 << 19  # elements at most
MOST_GAIN, BISECTIONS = 2.0**20, 16


def shipped_weight(layer: LoRALinear) -> QuantizedWeight:
    """What the layer ships as: new codes [N, K] under the scales of its 4-bit base."""
    if layer.shipped is not None:
        return layer.shipped
    return moved(_base_of(layer).quantized, layer.lora_A, layer.lora_B, layer.scale * _gain(layer))


def moved(weight: QuantizedWeight, a: Tensor, b: Tensor, scale: float) -> QuantizedWeight:
    """The weight [N, K] with the codes nearest to W + scale * B A, for a [r, K] and b [N, r]."""
    return weight._with(_requantized(a, b, scale, weight.op_args()))


def shipped_linear(layer: LoRALinear, x: Tensor) -> Tensor:
    """x W'^T + bias with the weight W' that the layer ships as, [..., K] to [..., N].

    Gradients go straight through the rounding: those of A and B are a merged layer's, s B^T dY^T X and s dY^T X A^T,
    and x's is dY W'. W' is a layer's codes, never 16-bit, and is made again in the backward pass.
    """
    base = _base_of(layer)
    if layer.shipped is not None:
        return QuantizedLinear.from_quantized(layer.shipped, base.bias)(x)
    arguments = layer.lora_A, layer.lora_B, layer.scale, _gain(layer), base.bias, base._arguments()
    y: Tensor = _StraightThrough.apply(x, *arguments)
    return y


def _base_of(layer: LoRALinear) -> QuantizedLinear:
    assert isinstance(layer.base_layer, QuantizedLinear)
    return layer.base_layer


def _gain(layer: LoRALinear) -> float:
    assert layer.gain is not None
    return layer.gain


def _requantized(a: Tensor, b: Tensor, scale: float, weight: Weight) -> Weight:
    a, b = (matrix.detach().to(weight.packed.device, torch.float32) for matrix in (a, b))
    packed = call("requantize_4bit", a, b, scale, *weight)
    return weight._replace(packed=packed)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, gain: float, bias: Tensor | None, weight: Weight
    ) -> Any:
        ctx.save_for_backward(x, a, b, *weight[:6])
        ctx.rest = scale, gain, weight[6:]
        return call("linear_4bit", x, bias, False, *_requantized(a, b, scale * gain, weight))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, a, b, *tensors = ctx.saved_tensors
        scale, gain, sizes = ctx.rest
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        weight = _requantized(a, b, scale * gain, Weight(*tensors, *sizes))
        low = dense_linear(x, a.to(x.dtype))
        needed = [need_x, False, need_a, need_b]
        grads = call_in_derivative(
            "lora_linear_4bit_backward", grad_y, x, low, a, b, scale, True, needed, False, *weight
        )
        grad_x, _, grad_a, grad_b = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        return grad_x, grad_a, grad_b, None, None, None, None


@torch.no_grad()
def gain_of(layer: LoRALinear, x: Tensor | None = None) -> float:
    """The gain with which the outputs move along those of the adapter's change D as far as D moves them.

    That is <X (W' - W)^T, X D^T> = <X D^T, X D^T> for inputs x [..., K], of which some tokens are taken; without any,
    <W' - W, D> = <D, D>. It is sought on rows spread over the weight.
    """
    weight = _base_of(layer).quantized
    n, k = weight.shape
    rows = sampled_rows(n, k).to(weight.device)
    levels, codes, scales = _levels_of(weight, rows)
    a, b = (matrix.to(weight.device, torch.float32) for matrix in (layer.lora_A, layer.lora_B))
    change = layer.scale * b[rows] @ a
    pull = change
    if x is not None:
        x = x.reshape(-1, k)[:SAMPLED_TOKENS].to(weight.device, torch.float32)
        pull = (x @ change.t()).t() @ x
    middles, old = (levels[1:] + levels[:-1]) / 2, levels[codes]
    in_scales = torch.where(scales != 0, change / scales, 0.0)
    pull, wanted = pull * scales, float((change * pull).sum(dtype=torch.float64))

    def is_reached(gain: float) -> bool:
        moves = levels[torch.bucketize(old + gain * in_scales, middles)] - old
        return float((moves * pull).sum(dtype=torch.float64)) >= wanted

    return least_gain(is_reached)


def sampled_rows(n: int, k: int) -> Tensor:
    """Numbers of rows spread over a weight [N, K], int64."""
    return torch.arange(0, n, -(-n // max(1, min(SAMPLED_ROWS, SAMPLED // max(k, 1)))))


def least_gain(is_reached: Callable[[float], bool], bisections: int = BISECTIONS) -> float:
    """The least gain from 1 on that moves the weight far enough, by bisection; 1 if none up to MOST_GAIN does, as for a
    change beyond the range of the blocks."""
    high = 1.0
    while not is_reached(high):
        high *= 2
        if high > MOST_GAIN:
            return 1.0
    low = high / 2
    for _ in range(bisections if high > 1 else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if is_reached(middle) else (middle, high)
    return high


def _levels_of(weight: QuantizedWeight, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The levels of a weight; of some rows the indices [rows, K] of their elements' levels, and what those are
    multiplied by."""
    (n, k), number = weight.shape, weight.op_args().quant_type
    if weight.is_gguf:
        blocks = weight.packed.view(n, -1)[rows].view(-1, _native.GGUF_BLOCKS[number][1])
        factors = gguf_blocks.spread(gguf_blocks.scales(blocks, number)[0], number)
        codes, scales = (values.view(-1, k) for values in (gguf_blocks.codes(blocks, number), factors))
        return gguf_blocks.levels(number).to(weight.device), codes.long(), scales
    elements = rows[:, None] * k + torch.arange(k, device=weight.device)
    codes = weight.packed[elements // 2] >> torch.where(elements % 2 == 0, 4, 0) & 15
    return _native.levels(number).to(weight.device), codes.long(), weight.scales()[elements // weight.block_size]
