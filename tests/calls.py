"""A sound call of every op, in each of its forms: the operands of what is tested for all ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from helpers import gguf_weight
from torch import Tensor

import qlora_native as qn
from qlora_native.ops._library import FROZEN

OPS = torch.ops.qlora_native


class Sizes(NamedTuple):
    m: int = 3  # rows
    n: int = 48  # outputs
    k: int = 64  # inputs
    r: int = 4  # rank
    t: int = 5  # positions
    parameters: tuple[tuple[int, int], ...] = ((20, 15),)


SMALL = Sizes()


def calls(sizes: Sizes = SMALL, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], list[Any]]]:
    """Arguments, made anew at each call, by the name of an op and a word on its form."""
    m, n, k, r, t, parameters = sizes
    native = torch.float16 if dtype == torch.float32 else dtype  # dense products of fp32 are torch's
    blocks = -(-m * k // 64)
    a, b, bias = partial(torch.randn, r, k), partial(torch.randn, n, r), partial(torch.randn, n)

    def of(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(to)

    def four_bit(double_quant: bool = True) -> list[Any]:
        return list(qn.quantize(torch.randn(n, k), double_quant=double_quant).op_args())

    def experts(double_quant: bool = True) -> list[Any]:
        return list(qn.quantize(torch.randn(3, n, k), double_quant=double_quant).op_args())

    def factors(rank: int = r) -> list[Tensor]:
        return [torch.randn(3, rank, k), torch.randn(3, n, rank)]

    def offsets(behind: int = 0) -> Tensor:
        return torch.tensor([0, m // 3, m // 3, m - behind])

    def gguf(quant_type: str) -> list[Any]:
        return list(gguf_weight(quant_type, (n, k)).op_args())

    def loss_of(h: Tensor, *after: Any) -> list[Any]:
        return [h, torch.arange(m) % n, -100, True, *after]

    def trained(*states: torch.dtype) -> list[list[Tensor]]:
        moved = [[of(*shape) for shape in parameters] for _ in range(2)]
        return [*moved, *([torch.zeros(shape, dtype=state) for shape in parameters] for state in states)]

    def absmaxes() -> list[Tensor]:
        return [torch.zeros(-(-math.prod(shape) // 256)) for shape in parameters]

    def adamw(*states: torch.dtype, coded: bool) -> list[Any]:
        scales = [absmaxes() if coded else [] for _ in range(2)]
        steps = [torch.zeros(()) for _ in parameters]
        return [*trained(*states), *scales, steps, 0.1, 0.9, 0.99, 1e-8, 0.0, True, 1.0]

    x, y, low = partial(of, m, k), partial(of, m, n), partial(of, m, r)
    q, kv, angles = partial(of, 2, 4, t, 16), partial(of, 2, 2, t, 16), partial(of, 1, t, 16)
    fp32, wanted = torch.float32, [True, False, True, True]
    return {
        "quantize_4bit": lambda: [x(), 0, 64, True],
        "quantize_4bit fp4": lambda: [x(), 1, 32, False],
        "search_scales_4bit": lambda: [
            *(x(), torch.rand(k), torch.rand(8), torch.rand(blocks), torch.zeros(1)),
            *(torch.zeros(blocks, dtype=torch.uint8), 1, 0.5, 1.5, 0, 64),
        ],
        "gptq_4bit": lambda: [x(), torch.randn(k, k) / k, torch.randperm(k), 2 * torch.randn(blocks), 0, 64],
        "dequantize_4bit": lambda: [torch.bfloat16, *four_bit()],
        "dequantize_4bit plain": lambda: [torch.bfloat16, *four_bit(False)],
        "dequantize_4bit.out": lambda: [torch.zeros(n, k), *four_bit()],
        "linear_4bit": lambda: [x(), bias(), *four_bit()],
        "linear_4bit plain": lambda: [x(), None, *four_bit(False)],
        "linear_4bit_grad_input": lambda: [y(), *four_bit(False)],
        "lora_linear_4bit": lambda: [x(), x(), a(), b(), 2.0, bias(), *four_bit()],
        "lora_linear_4bit plain": lambda: [x(), None, a(), b(), 2.0, None, *four_bit()],
        "lora_linear_4bit_backward": lambda: [y(), x(), low(), a(), b(), 2.0, False, wanted, *four_bit()],
        "experts_4bit": lambda: [x(), torch.randint(m, (m,)), offsets(), *factors(), 2.0, *experts()],
        "experts_4bit plain": lambda: [x(), None, offsets(1), *factors(0), 1.0, *experts(False)],
        "experts_4bit_backward": lambda: [y(), x(), offsets(1), low(), *factors(), 2.0, *experts()],
        "dense_linear": lambda: [of(m, k, to=native), of(n, k, to=native), bias()],
        "dense_linear_grad_input": lambda: [of(m, n, to=native), of(n, k, to=native)],
        "dense_linear_grad_weight": lambda: [of(m, n, to=native), of(m, k, to=native)],
        "linear_cross_entropy": lambda: loss_of(x(), False, None, None, *four_bit()),
        "linear_cross_entropy rows": lambda: loss_of(x(), True, a(), torch.arange(r), *four_bit()),
        "linear_cross_entropy dense": lambda: [
            *loss_of(of(m, k, to=native), True, None, None),
            *(of(n, k, to=native), None, None, None, None, None, [n, k], 0, 64),
        ],
        "dequantize_4bit q4_0": lambda: [torch.bfloat16, *gguf("q4_0")],
        "dequantize_4bit.out q4_k": lambda: [torch.zeros(n, k), *gguf("q4_k")],
        "linear_4bit q8_0": lambda: [x(), bias(), *gguf("q8_0")],
        "linear_4bit q4_1": lambda: [x().bfloat16(), bias(), *gguf("q4_1")],
        "linear_4bit_grad_input q5_k": lambda: [y(), *gguf("q5_k")],
        "lora_linear_4bit q5_1": lambda: [x(), x(), a(), b(), 2.0, bias(), *gguf("q5_1")],
        "lora_linear_4bit_backward q5_0": lambda: [y(), x(), low(), a(), b(), 2.0, False, wanted, *gguf("q5_0")],
        "linear_cross_entropy q6_k": lambda: loss_of(x(), False, None, None, *gguf("q6_k")),
        "linear_cross_entropy iq4_nl": lambda: loss_of(x(), True, a(), torch.arange(r), *gguf("iq4_nl")),
        "adamw_step": lambda: adamw(torch.int8, torch.uint8, coded=True),
        "adamw_step plain": lambda: adamw(fp32, fp32, coded=False),
        "lion_step": lambda: [*trained(torch.int8), absmaxes(), 0.1, 0.9, 0.99, 0.0, 1.0],
        "lion_step plain": lambda: [*trained(fp32), [], 0.1, 0.9, 0.99, 0.0, 1.0],
        "gradient_norm": lambda: [[x(), y()]],
        "causal_attention": lambda: [q(), kv(), kv(), 0.25],
        "causal_attention_backward": lambda: [q(), q(), kv(), kv(), q(), torch.randn(2, 4, t), 0.25],
        "rms_norm": lambda: [x(), of(k), 1e-5],
        "rms_norm_backward": lambda: [x(), x(), of(k), torch.rand(m), 1e-5],
        "rotary": lambda: [q(), angles(), angles(), False],
        "swiglu": lambda: [x(), x()],
        "swiglu_backward": lambda: [x(), x(), x()],
    }


CALLS = calls()


def op_of(call: str) -> str:
    return call.split()[0]


def overload_of(call: str) -> Any:
    packet, _, overload = op_of(call).partition(".")
    return getattr(getattr(OPS, packet), overload or "default")


def places(arguments: list[Any]) -> Iterator[tuple[int, int | None, Tensor]]:
    """Where the tensors of a call stand: the argument's number, and the number in its list."""
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            yield i, None, value
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            yield i, 0, value[0]


def with_other(arguments: list[Any], i: int, inner: int | None, other: Any) -> list[Any]:
    """The arguments with another tensor at one of the places."""
    return [*arguments[:i], other if inner is None else [other, *arguments[i][1:]], *arguments[i + 1 :]]


def is_of_weight(call: str, arguments: list[Any], i: int) -> bool:
    """Whether a tensor belongs to a frozen weight, whose parts have to be contiguous."""
    is_frozen = op_of(call) in FROZEN or (op_of(call) == "linear_cross_entropy" and arguments[-8] is not None)
    return is_frozen and i >= len(arguments) - 9


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values with other strides, or at another address."""
    for d in range(1, t.dim()):
        yield f"dimension {d} slowest", t.transpose(0, d).contiguous().transpose(0, d)
    yield "every other", torch.stack([t, t], -1)[..., 0]
    if t.dim():
        yield "rows apart", torch.cat([t, t], -1)[..., : t.shape[-1]]
    yield "at an odd place", torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape)
