"""What `qlora bench` measures, ops of this library against torch's own, and the timing that it and bench/ use."""

from __future__ import annotations

import itertools
import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_native.cases import TOLERANCE
from qlora_native.functional import linear, linear_cross_entropy, lora_linear
from qlora_native.optim import AdamW
from qlora_native.weight import QuantizedWeight, quantize

Functions = dict[str, Callable[[], Any]]
Seconds = dict[str, list[float]]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def ratios(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of a / b round by round; where one was timed in the first rounds only, over those."""
    return quartiles([x / y for x, y in zip(a, b, strict=False)])


def rounded(values: Iterable[float], factor: float = 1.0) -> list[float]:
    """For JSON: four significant digits."""
    return [float(f"{factor * value:.4g}") for value in values]


def interleaved(functions: Functions, repeats: int, warmup: int = 2) -> Seconds:
    """Seconds of each function, called in turn, so that noise between runs falls on all of them alike.

    The order changes with every round: what ran before decides what the caches hold.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: Seconds = {name: [] for name in functions}
    order = random.Random(0)
    for _ in range(repeats):
        for name, function in order.sample(list(functions.items()), len(functions)):
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over the truth's."""
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def cpu_name() -> str:
    """The model name in /proc/cpuinfo, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def cache_bytes(root: str = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """The size of the last-level cache in sysfs; 32 MiB where there is none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = (file.read_text(encoding="utf-8").strip() for file in Path(root).glob("index*/size"))
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 << 20)


RANK = 16


class Shape(NamedTuple):
    """x [m, k] and a weight [n, k]."""

    m: int
    n: int
    k: int


class Contest(NamedTuple):
    """One row of the bench."""

    functions: Functions
    error: float
    tolerance: float
    rival: str  # in words


def _bits(dtype: torch.dtype) -> str:
    return f"{8 * dtype.itemsize}-bit"


Weights = tuple[Tensor, list[QuantizedWeight], list[Tensor]]


def _weights(shape: Shape, dtype: torch.dtype, device: torch.device) -> Weights:
    """fp64 values; enough copies of the weight in 4 and in 16 bits that no product finds its own in the cache."""
    dense = torch.randn(shape.n, shape.k, dtype=dtype, device=device) / shape.k**0.5
    weight = quantize(dense)
    count = min(max(1, -(-2 * cache_bytes() // weight.nbytes)), 16) if shape.m <= 16 and device.type == "cpu" else 1
    packed = [weight, *(quantize(dense) for _ in range(count - 1))]
    return weight.dequantize(torch.float32).double(), packed, [weight.dequantize(dtype) for _ in range(count)]


def _backward(output: Tensor, grad: Tensor | None, *leaves: Tensor) -> Tensor:
    """The gradient of the first leaf."""
    for leaf in leaves:
        leaf.grad = None
    output.backward(grad)
    assert leaves[0].grad is not None
    return leaves[0].grad


def linear_4bit(shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    """The forward product."""
    exact, packed, dense = _weights(shape, dtype, device)
    x = torch.randn(shape.m, shape.k, dtype=dtype, device=device)
    ours, theirs = itertools.cycle(packed), itertools.cycle(dense)

    @torch.no_grad()
    def run_ours() -> Tensor:
        return linear(x, next(ours))

    functions: Functions = {"ours": run_ours, "torch": lambda: F.linear(x, next(theirs))}
    error = relative_error(run_ours(), x.double() @ exact.t())
    return Contest(functions, error, TOLERANCE[dtype], f"F.linear with the {_bits(dtype)} weight")


def lora_linear_4bit(shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    """A layer with an adapter, forward and backward."""
    exact, packed, dense = _weights(shape, dtype, device)
    x = torch.randn(shape.m, shape.k, dtype=dtype, device=device, requires_grad=True)
    a = (torch.randn(RANK, shape.k, device=device) / shape.k**0.5).requires_grad_()
    b = torch.randn(shape.n, RANK, device=device).mul_(0.1).requires_grad_()
    grad = torch.randn(shape.m, shape.n, dtype=dtype, device=device)

    def ours() -> Tensor:
        return _backward(lora_linear(x, packed[0], a, b, 2.0), grad, x, a, b)

    def theirs() -> Tensor:
        y = F.linear(x, dense[0]) + F.linear(F.linear(x, a.to(dtype)), b.to(dtype)) * 2.0
        return _backward(y, grad, x, a, b)

    error = relative_error(ours(), grad.double() @ (exact + 2.0 * b.detach().double() @ a.detach().double()))
    rival = f"the same layer of F.linear with the {_bits(dtype)} weight"
    return Contest({"ours": ours, "torch": theirs}, error, 2 * TOLERANCE[dtype], rival)


@torch.no_grad()
def quantize_4bit(shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    """16 or 32 bits to 4, double quantization and all."""
    dense = torch.randn(shape.n, shape.k, dtype=dtype, device=device)
    error = relative_error(quantize(dense).dequantize(torch.float32), dense.float())
    functions: Functions = {"ours": lambda: quantize(dense), "torch": dense.clone}
    # Of normal numbers 0.12 is the levels' own error.
    return Contest(functions, error, 0.12, f"a copy of the {_bits(dtype)} weight")


@torch.no_grad()
def dequantize_4bit(shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    """4 bits to 16 or 32."""
    dense = torch.randn(shape.n, shape.k, dtype=dtype, device=device)
    weight, out = quantize(dense), torch.empty_like(dense)
    error = relative_error(weight.dequantize(dtype), weight.dequantize(torch.float32))
    functions: Functions = {"ours": lambda: weight.dequantize(dtype, out=out), "torch": lambda: out.copy_(dense)}
    return Contest(functions, error, TOLERANCE[dtype], f"a copy of the {_bits(dtype)} weight")


def cross_entropy(shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    """The loss of m tokens over a vocabulary of n, forward and backward."""
    weight = torch.randn(shape.n, shape.k, dtype=dtype, device=device) / shape.k**0.5
    labels = torch.randint(shape.n, (shape.m,), device=device)
    h = torch.randn(shape.m, shape.k, dtype=dtype, device=device, requires_grad=True)
    functions: Functions = {
        "ours": lambda: _backward(linear_cross_entropy(h, weight, labels), None, h),
        "torch": lambda: _backward(F.cross_entropy(F.linear(h, weight).float(), labels), None, h),
    }
    error = relative_error(functions["ours"]().clone(), functions["torch"]())
    return Contest(functions, error, 4 * TOLERANCE[dtype], "F.cross_entropy over the whole logits")


def adamw_step(shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    """One optimizer step of an adapter's n x k fp32 parameters."""
    start = torch.randn(shape.n, shape.k, device=device)
    mine, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine.grad = torch.randn_like(start)
    other.grad = mine.grad.clone()
    ours, theirs = (
        made([p], lr=1e-3, weight_decay=0.01).step for made, p in ((AdamW, mine), (torch.optim.AdamW, other))
    )
    ours(), theirs()
    error = relative_error(mine.detach() - start, other.detach() - start)
    return Contest({"ours": ours, "torch": theirs}, error, 1e-4, "torch.optim.AdamW")


CONTESTS: dict[str, Callable[[Shape, torch.dtype, torch.device], Contest]] = {
    "linear_4bit": linear_4bit,
    "lora_linear_4bit": lora_linear_4bit,
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "linear_cross_entropy": cross_entropy,
    "adamw_step": adamw_step,
}
WITHOUT_TOKENS = ("quantize_4bit", "dequantize_4bit", "adamw_step")  # once a weight
