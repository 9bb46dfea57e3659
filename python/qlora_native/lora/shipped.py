"""The 4-bit weight that an adapted layer ships as, and training through it.

A block keeps its scale, and its codes become those nearest to W + gain * scale * B A. An adapter changes most elements
by less than half the distance of two levels, so with a gain of 1 almost all codes would stay. With that of
:func:`gain_of` some elements change, each by a whole distance, and along the adapter's own direction the weight moves
as far as the adapter says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qlora_native import _native
from qlora_native.functional import dense_linear
from qlora_native.lora.layer import LoRALinear
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.ops._direct import call, call_in_derivative
from qlora_native.ops._library import Weight
from qlora_native.weight import QuantizedWeight

SAMPLED_ROWS, SAMPLED_TOKENS = 256, 512  # of a weight and of its inputs, from which its gain is found


def shipped_weight(layer: LoRALinear) -> QuantizedWeight:
    """What the layer ships as: new codes [N, K] under the scales of its 4-bit base."""
    value = _base_of(layer).quantized
    return value._with(_requantized(layer.lora_A, layer.lora_B, layer.scale * _gain(layer), value.op_args()))


def shipped_linear(layer: LoRALinear, x: Tensor) -> Tensor:
    """x W'^T + bias with the weight W' that the layer ships as, [..., K] to [..., N].

    Gradients go straight through the rounding: those of A and B are a merged layer's, s B^T dY^T X and s dY^T X A^T,
    and x's is dY W'. W' is a layer's codes, never 16-bit, and is made again in the backward pass.
    """
    base = _base_of(layer)
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
    <W' - W, D> = <D, D>. An element changes once the gain takes it past the middle between its level and the next one,
    and then moves by their distance. So the gain is found by going through the elements, of rows spread over the
    weight, in the order in which they change.
    """
    weight = _base_of(layer).quantized
    n, k = weight.shape
    rows = torch.arange(0, n, -(-n // SAMPLED_ROWS), device=weight.device)
    elements = rows[:, None] * k + torch.arange(k, device=weight.device)
    codes = (weight.packed[elements // 2] >> torch.where(elements % 2 == 0, 4, 0) & 15).long()
    scales = weight.scales()[elements // weight.block_size]
    a, b = (matrix.to(weight.device, torch.float32) for matrix in (layer.lora_A, layer.lora_B))
    change = layer.scale * b[rows] @ a
    pull = change
    if x is not None:
        x = x.reshape(-1, k)[:SAMPLED_TOKENS].to(weight.device, torch.float32)
        pull = (x @ change.t()).t() @ x
    levels = _native.levels(0).to(weight.device)
    upward = (change > 0) == (scales > 0)
    move = (levels[(codes + torch.where(upward, 1, -1)).clamp(0, 15)] - levels[codes]) * scales
    moves = (move != 0) & (change != 0)
    move, wanted, pull = move[moves], (change * pull).sum(dtype=torch.float64), pull[moves]
    gains, order = (move / (2 * change[moves])).sort()
    reached = (move * pull).double()[order].cumsum(0)
    if not len(reached):
        return 1.0
    return max(1.0, float(gains[torch.where(reached >= wanted, math.inf, reached).argmax()]))
