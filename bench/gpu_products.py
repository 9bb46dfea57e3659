"""Products with 4-bit weights on a GPU, against dequantize + torch's GEMM, bf16 and bitsandbytes.

The rows are the layers of an 8B model (design of the kernels: N x K) at M = 1 to 4096 tokens, forward and input
gradient, plain and with a LoRA adapter of rank 16 in the same op. With an adapter the rival is the bare bf16 product.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common import Bar, relative_error, timings
from gpu_timing import Ceilings, card, device, floor, interleaved_replays, on_gpu, peak_bytes
from replay import Call, copies

import qlora_native as qn

OPS = torch.ops.qlora_native
RANK, SCALE = 16, 2.0
TOLERANCE = 1e-2  # of bf16 against fp32 on the same decoded weight
DIRECTIONS = ("forward", "grad_input", "lora_forward", "lora_backward")


class Case(NamedTuple):
    """A product of m tokens with a weight [n, k]."""

    m: int
    n: int
    k: int


SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))  # q and o, gate and up, down, k and v
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
TINY = (Case(1, 64, 128), Case(16, 128, 64), Case(40, 64, 64))


def cases(dry: bool) -> tuple[Case, ...]:
    """The rows; what matters most comes first, in case time runs out."""
    return TINY if dry else tuple(Case(m, n, k) for n, k in SHAPES for m in TOKENS)


def of_floor(share: float) -> Bar:
    """At least this share of the floor."""
    return Bar("floor", round(1 / share, 4))


def bars(case: Case, direction: str) -> tuple[Bar, ...]:
    """What the issue of these kernels promises."""
    hopper = card().get("compute_capability", "").startswith("9.")
    if direction == "forward" and case.m <= 16 and case.n == 14336:
        return (of_floor(0.65),)
    if direction == "forward" and case.m <= 16 and (case.n, case.k) == (4096, 4096):
        return (of_floor(0.45),)
    if direction in ("forward", "grad_input") and 64 <= case.m <= 256:
        return (Bar("dequantize_then_mm", 1.0), Bar("bitsandbytes", 1.0))
    if direction.startswith("lora") and case.m >= 4096:
        return (Bar("bf16", 1.15 if hopper else 1.10),)
    if direction.startswith("lora") and case.m == 1024 and hopper:
        return (Bar("bf16", 1.35),)
    return ()


def bitsandbytes() -> Any | None:
    """The module, where it can be imported and there is a GPU for it."""
    try:
        return importlib.import_module("bitsandbytes") if on_gpu() else None
    except Exception as error:  # it fails in many ways where its binary does not fit
        print(f"bitsandbytes cannot be imported and is left out: {error}")
        return None


class Weights:
    """A weight [N, K] in the form of each contender, in enough copies."""

    def __init__(self, n: int, k: int) -> None:
        dense = (torch.randn(n, k, device=device()) / k**0.5).to(torch.bfloat16)
        first = qn.quantize(dense)
        self.dense = first.dequantize(torch.bfloat16)  # what everyone multiplies with
        self.scratch = torch.empty_like(self.dense)
        self.ours = [first, *(_copied(first) for _ in range(copies(first.nbytes, device()) - 1))]
        self.bf16 = [self.dense, *(self.dense.clone() for _ in range(copies(self.dense.nbytes, device()) - 1))]
        self.a = torch.randn(RANK, k, device=device()) / k**0.5
        self.b = torch.randn(n, RANK, device=device()) / 4
        module = bitsandbytes()
        self.bnb: list[tuple[Any, Any]] = []
        if module is not None:
            quantized = module.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
            self.bnb = [(quantized[0].clone(), quantized[1]) for _ in self.ours]
            self.bnb_module = module


def _copied(w: qn.QuantizedWeight) -> qn.QuantizedWeight:
    tensors = {"absmax": w.absmax, "nested_absmax": w.nested_absmax, "nested_offset": w.nested_offset}
    fresh = {name: None if t is None else t.clone() for name, t in tensors.items()}
    return qn.QuantizedWeight(w.packed.clone(), shape=w.shape, dtype=w.dtype, **fresh)  # type: ignore[arg-type]


def contenders(weights: Weights, case: Case, direction: str, t: torch.Tensor) -> dict[str, list[Call]]:
    """Of one row; ``t`` is x [M, K], or the gradient of y [M, N]."""
    makers: dict[str, Callable[[Weights, Case, torch.Tensor], dict[str, list[Call]]]] = {
        "forward": _forward,
        "grad_input": _grad_input,
        "lora_forward": _lora_forward,
        "lora_backward": _lora_backward,
    }
    return {name: calls for name, calls in makers[direction](weights, case, t).items() if calls}


def _forward(weights: Weights, case: Case, x: torch.Tensor) -> dict[str, list[Call]]:
    def two_step(w: qn.QuantizedWeight) -> torch.Tensor:
        OPS.dequantize_4bit.out(weights.scratch, *w.op_args())
        return torch.mm(x, weights.scratch.t())

    return {
        "ours": [lambda w=w: OPS.linear_4bit(x, None, False, *w.op_args()) for w in weights.ours],  # type: ignore[misc]
        "dequantize_then_mm": [lambda w=w: two_step(w) for w in weights.ours],  # type: ignore[misc]
        "bf16": [lambda w=w: torch.mm(x, w.t()) for w in weights.bf16],  # type: ignore[misc]
        "bitsandbytes": [
            lambda p=p, s=s: weights.bnb_module.matmul_4bit(x, p.t(), quant_state=s)  # type: ignore[misc]
            for p, s in weights.bnb
        ],
    }


def _grad_input(weights: Weights, case: Case, grad_y: torch.Tensor) -> dict[str, list[Call]]:
    def two_step(w: qn.QuantizedWeight) -> torch.Tensor:
        OPS.dequantize_4bit.out(weights.scratch, *w.op_args())
        return torch.mm(grad_y, weights.scratch)

    def theirs(packed: Any, state: Any) -> torch.Tensor:  # their backward, as autograd runs it
        return torch.mm(grad_y, weights.bnb_module.functional.dequantize_4bit(packed, state).to(grad_y.dtype))

    return {
        "ours": [lambda w=w: OPS.linear_4bit_grad_input(grad_y, False, *w.op_args()) for w in weights.ours],  # type: ignore[misc]
        "dequantize_then_mm": [lambda w=w: two_step(w) for w in weights.ours],  # type: ignore[misc]
        "bf16": [lambda w=w: torch.mm(grad_y, w) for w in weights.bf16],  # type: ignore[misc]
        "bitsandbytes": [lambda p=p, s=s: theirs(p, s) for p, s in weights.bnb],  # type: ignore[misc]
    }


def _lora_forward(weights: Weights, case: Case, x: torch.Tensor) -> dict[str, list[Call]]:
    def ours(w: qn.QuantizedWeight) -> torch.Tensor:
        y: torch.Tensor = OPS.lora_linear_4bit(x, None, weights.a, weights.b, SCALE, None, False, *w.op_args())[0]
        return y

    return {
        "ours": [lambda w=w: ours(w) for w in weights.ours],  # type: ignore[misc]
        "bf16": [lambda w=w: torch.mm(x, w.t()) for w in weights.bf16],  # type: ignore[misc]
    }


def _lora_backward(weights: Weights, case: Case, grad_y: torch.Tensor) -> dict[str, list[Call]]:
    x = torch.randn(case.m, case.k, device=device(), dtype=torch.bfloat16)
    xa = torch.mm(x, weights.a.to(x.dtype).t())

    def ours(w: qn.QuantizedWeight) -> torch.Tensor:
        needed = [True, False, True, True]
        grads = OPS.lora_linear_4bit_backward(
            grad_y, x, xa, weights.a, weights.b, SCALE, False, needed, False, *w.op_args()
        )
        grad_x: torch.Tensor = grads[0]
        return grad_x

    return {
        "ours": [lambda w=w: ours(w) for w in weights.ours],  # type: ignore[misc]
        "bf16": [lambda w=w: torch.mm(grad_y, w) for w in weights.bf16],  # type: ignore[misc]
    }


def truth(weights: Weights, direction: str, t: torch.Tensor) -> torch.Tensor:
    """fp32 products on the decoded weight."""
    wide, dense = t.float(), weights.dense.float()
    a, b = (m.to(torch.bfloat16).float() for m in (weights.a, weights.b))
    if direction.endswith("forward"):
        y = wide @ dense.t()
        return y + SCALE * (wide @ a.t()) @ b.t() if direction.startswith("lora") else y
    y = wide @ dense
    return y + SCALE * (wide @ b) @ a if direction.startswith("lora") else y


def row(weights: Weights, case: Case, direction: str, measured: Ceilings, rounds: int) -> dict[str, Any]:
    """One row: errors, samples, floor, bars, memory."""
    is_forward = direction.endswith("forward")
    t = torch.randn(case.m, case.k if is_forward else case.n, device=device(), dtype=torch.bfloat16)
    functions = contenders(weights, case, direction, t)
    exact = truth(weights, direction, t)
    errors = {name: float(f"{relative_error(calls[0](), exact):.2g}") for name, calls in functions.items()}
    del exact
    peak = peak_bytes(functions["ours"][0])
    num_bytes = weights.ours[0].nbytes + 2 * case.m * (case.n + case.k)
    least = floor(measured, num_bytes, 2 * case.m * case.n * case.k)
    seconds = interleaved_replays(functions, rounds)
    seconds["floor"] = [least] * rounds
    found: dict[str, Any] = {"match": errors["ours"] < TOLERANCE, "relative_error": errors}
    return found | {"peak_mib": None if peak is None else peak / 2**20} | timings(seconds, bars(case, direction), least)
