"""linear_4bit: x W^T + bias with a quantized weight, and the gradient of its input."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch

from qlora_native.ops import _cuda_products, _products
from qlora_native.ops._direct import call
from qlora_native.ops._library import Weight, autograd, check_matrix, fake, implement, say_once, weight_of


def without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """Inside a kernel the operands already have their final dtype; autocast must not touch them again."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def dense_weight(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized weight, for devices without kernels."""
    say_once(
        f"qlora_native: no 4-bit matrix kernel on {weight.packed.device.type} in this build; "
        "dequantizing the whole weight for every product, which is slower and needs its memory."
    )
    stored = torch.float32 if dtype == torch.float64 else dtype
    return torch.ops.qlora_native.dequantize_4bit(stored, *weight).to(dtype)


Engine = ModuleType | _cuda_products.Products  # the module _products for CPU tensors, or what has the same functions


def forward_by(engine: Engine, x: torch.Tensor, bias: torch.Tensor | None, arguments: tuple[Any, ...]) -> torch.Tensor:
    """linear_4bit by the products of a device."""
    weight = weight_of(arguments)
    check_matrix("linear_4bit", x, weight, bias, features=1)
    with without_autocast(x):
        y: torch.Tensor = engine.forward(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def grad_input_by(engine: Engine, grad_y: torch.Tensor, arguments: tuple[Any, ...]) -> torch.Tensor:
    """linear_4bit_grad_input by the products of a device."""
    weight = weight_of(arguments)
    check_matrix("linear_4bit_grad_input", grad_y, weight, None, features=0)
    with without_autocast(grad_y):
        grad_x: torch.Tensor = engine.grad_input(grad_y.reshape(-1, grad_y.shape[-1]), weight)
    return grad_x.view(*grad_y.shape[:-1], weight.shape[1])


@implement("linear_4bit", "CPU")
def cpu(x: torch.Tensor, bias: torch.Tensor | None, low_memory: bool, *arguments: Any) -> torch.Tensor:
    return forward_by(_products, x, bias, arguments)


@implement("linear_4bit_grad_input", "CPU")
def cpu_grad_input(grad_y: torch.Tensor, low_memory: bool, *arguments: Any) -> torch.Tensor:
    return grad_input_by(_products, grad_y, arguments)


@implement("linear_4bit", "CUDA")
def cuda(x: torch.Tensor, bias: torch.Tensor | None, low_memory: bool, *arguments: Any) -> torch.Tensor:
    products = _cuda_products.products(low_memory)
    if products is None:
        return anywhere(x, bias, low_memory, *arguments)
    return forward_by(products, x, bias, arguments)


@implement("linear_4bit_grad_input", "CUDA")
def cuda_grad_input(grad_y: torch.Tensor, low_memory: bool, *arguments: Any) -> torch.Tensor:
    products = _cuda_products.products(low_memory)
    if products is None:
        return anywhere_grad_input(grad_y, low_memory, *arguments)
    return grad_input_by(products, grad_y, arguments)


@implement("linear_4bit", "CompositeExplicitAutograd")
def anywhere(x: torch.Tensor, bias: torch.Tensor | None, low_memory: bool, *arguments: Any) -> torch.Tensor:
    weight = weight_of(arguments)
    check_matrix("linear_4bit", x, weight, bias, features=1)
    with without_autocast(x):
        cast_bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, dense_weight(weight, x.dtype), cast_bias)


@implement("linear_4bit_grad_input", "CompositeExplicitAutograd")
def anywhere_grad_input(grad_y: torch.Tensor, low_memory: bool, *arguments: Any) -> torch.Tensor:
    weight = weight_of(arguments)
    check_matrix("linear_4bit_grad_input", grad_y, weight, None, features=0)
    with without_autocast(grad_y):
        return grad_y @ dense_weight(weight, grad_y.dtype)


@fake("linear_4bit")
def shapes(x: torch.Tensor, bias: torch.Tensor | None, low_memory: bool, *arguments: Any) -> torch.Tensor:
    weight = weight_of(arguments)
    check_matrix("linear_4bit", x, weight, bias, features=1)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@fake("linear_4bit_grad_input")
def grad_input_shapes(grad_y: torch.Tensor, low_memory: bool, *arguments: Any) -> torch.Tensor:
    weight = weight_of(arguments)
    check_matrix("linear_4bit_grad_input", grad_y, weight, None, features=0)
    return grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1])


def save_weight(ctx: Any, arguments: tuple[Any, ...], *tensors: torch.Tensor | None) -> None:
    """Keeps the packed weight and ``tensors`` for backward: never anything dequantized."""
    weight = weight_of(arguments)
    ctx.save_for_backward(*weight[:6], *tensors)
    ctx.weight_rest = weight[6:]


def saved_weight(ctx: Any) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]:
    """The weight arguments and the other saved tensors."""
    saved = ctx.saved_tensors
    return (*saved[:6], *ctx.weight_rest), saved[6:]


NO_WEIGHT_GRADIENT = (None,) * len(Weight._fields)


def sum_to_bias(grad_y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of a bias [N] from grad_y [..., N], summed in fp32 or wider."""
    wide = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
    return grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=wide).to(dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, bias, low_memory, *arguments = inputs
    save_weight(ctx, tuple(arguments))
    ctx.low_memory = low_memory
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
    arguments, _ = saved_weight(ctx)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = call("linear_4bit_grad_input", grad_y, ctx.low_memory, *arguments)
    if ctx.needs_input_grad[1]:
        grad_bias = sum_to_bias(grad_y, ctx.bias_dtype)
    return grad_x, grad_bias, None, *NO_WEIGHT_GRADIENT


def _setup_grad_input(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, low_memory, *arguments = inputs
    save_weight(ctx, tuple(arguments))
    ctx.low_memory = low_memory


def _backward_grad_input(ctx: Any, grad_grad_x: torch.Tensor) -> tuple[Any, ...]:
    arguments, _ = saved_weight(ctx)
    return torch.ops.qlora_native.linear_4bit(grad_grad_x, None, ctx.low_memory, *arguments), None, *NO_WEIGHT_GRADIENT


autograd("linear_4bit", _backward, _setup)
autograd("linear_4bit_grad_input", _backward_grad_input, _setup_grad_input)
