"""Products with 4-bit weights on a GPU against dense ones and other libraries', plain and with a LoRA adapter.

``dense`` is the bare product with the decoded 16-bit weight, ``dense_lora`` the same with the adapter's products and
gradients as torch's own operations; ``ours_warm`` finds one weight in the L2 cache, if it fits. Of another library that
multiplies with a weight of its own (Marlin, FLUTE) no error is recorded. All are timed as CUDA graphs.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from cases import GGUF_TYPES
from common import Bar, relative_error, timings
from gpu_models import linears, made_up_blocks
from gpu_timing import (
    Case,
    Context,
    brief,
    copies_of,
    device,
    floor,
    half,
    importable,
    interleaved_replays,
    of_floor,
    on_gpu,
    peak_bytes,
)
from replay import Call

import qlora_native as qn

OPS = torch.ops.qlora_native
SCALE = 2.0
TOLERANCE = 1e-2  # of 16 bits against fp32 on the same decoded weight
DIRECTIONS = ("forward", "grad_input", "lora_forward", "lora_backward")
FEW = 256  # tokens up to which kernels for decoding are rivals

SHAPES_8B, SHAPES_70B = (list(dict.fromkeys(linears(name))) for name in ("8B", "70B"))
SHAPES = ((4096, 4096), (14336, 4096))  # of variants
TINY = ((64, 128), (128, 64))


def _cases(n: int, k: int, tokens: tuple[int, ...], r: int = 16, form: str = "") -> list[Case]:
    return [
        Case(direction, m, n, k, r if direction.startswith("lora") else 0, form)
        for m in tokens
        for direction in DIRECTIONS
    ]


def cases(which: str, dry: bool) -> list[Case]:
    """The rows of one of the groups ``many``, ``few``, ``variants``, ``long`` and ``70b``, by weight."""
    if dry:
        tiny = {"many": (40,), "few": (1, 16), "variants": (3,), "long": (70,), "70b": (5,)}[which]
        found = [case for n, k in TINY for case in _cases(n, k, tiny)]
        return found + ([*_variants(64, 128, (3,)), *_blocks(64, 256, (3,))] if which == "variants" else [])
    if which == "many":
        return [case for n, k in SHAPES_8B for case in _cases(n, k, (1024, 4096))]
    if which == "few":
        return [case for n, k in SHAPES_8B for case in _cases(n, k, (1, 4, 16, 64, 256))]
    if which == "variants":
        return [case for n, k in SHAPES for case in _variants(n, k, (16, 4096))] + _blocks(*SHAPES[1], (1, 16))
    if which == "long":
        return [case for n, k in SHAPES_8B[:2] for case in _cases(n, k, (2048, 8192, 16384))]
    return [case for n, k in SHAPES_70B for case in _cases(n, k, (1, 16, 256, 4096))]


def _variants(n: int, k: int, tokens: tuple[int, ...]) -> list[Case]:
    kinds = [
        *_cases(n, k, tokens, r=64)[2:],
        *(case for form in ("fp16", "plain scales") for case in _cases(n, k, tokens, 16, form)),
        *(Case("forward", m, n, k, 0, "bias") for m in tokens),
    ]
    kinds = [case for case in kinds if case.form or case.r]
    return sorted(dict.fromkeys(kinds), key=lambda case: case.form)


def _blocks(n: int, k: int, tokens: tuple[int, ...]) -> list[Case]:
    return [Case("forward", m, n, k, 0, form) for form in GGUF_TYPES for m in tokens]


def bars(case: Case) -> tuple[Bar, ...]:
    """The goals of these kernels."""
    if case.op == "forward" and case.m <= 16 and case.n * case.k >= 1 << 24:
        return (of_floor(0.65 if case.n * case.k > 1 << 24 else 0.45),)
    if case.op in ("forward", "grad_input") and 64 <= case.m <= FEW:
        return (Bar("dequantize_then_mm", 1.0), Bar("bitsandbytes", 1.0))
    return (Bar("dense_lora", 1.08),) if case.op.startswith("lora") and case.m >= 1024 else ()


def _copied(w: qn.QuantizedWeight) -> qn.QuantizedWeight:
    tensors = {"absmax": w.absmax, "nested_absmax": w.nested_absmax, "nested_offset": w.nested_offset}
    fresh: dict[str, Any] = {name: None if t is None else t.clone() for name, t in tensors.items()}
    kept: dict[str, Any] = {"shape": w.shape, "dtype": w.dtype, "quant_type": w.quant_type, "block_size": w.block_size}
    return qn.QuantizedWeight(w.packed.clone(), **kept, **fresh)


class Weights:
    """A weight [N, K] in the form of each contender, in enough copies, and what goes with it."""

    def __init__(self, context: Context, n: int, k: int, form: str = "") -> None:
        self.dtype = torch.float16 if form == "fp16" else half()
        dense = (torch.randn(n, k, device=device()) / k**0.5).to(self.dtype)
        has_blocks = form in GGUF_TYPES
        first = made_up_blocks(form, n, k) if has_blocks else qn.quantize(dense, double_quant=form != "plain scales")
        self.dense = first.dequantize(self.dtype)  # what everyone multiplies with
        self.scratch = torch.empty_like(self.dense)
        self.ours = [first, *(_copied(first) for _ in range(copies_of(first.nbytes) - 1))]
        self.copies = [self.dense, *(self.dense.clone() for _ in range(copies_of(self.dense.nbytes) - 1))]
        self.bias = torch.randn(n, device=device(), dtype=self.dtype) if form == "bias" else None
        self.bnb: list[tuple[Any, Any]] = []
        self.context = context
        is_rival = on_gpu() and not has_blocks and "bitsandbytes" not in context.without
        self.module = importable("bitsandbytes", context) if is_rival else None
        if self.module is not None:
            try:
                quantized = self.module.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
                self.bnb = [(quantized[0].clone(), quantized[1]) for _ in self.ours]
            except Exception as error:
                context.drop("bitsandbytes", brief(error))


def _adapter(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A [r, K] and B [N, r] in fp32, and A and scale * B in 16 bits."""
    a = torch.randn(case.r, case.k, device=device()) / case.k**0.5
    b = torch.randn(case.n, case.r, device=device()) / 4
    return a, b, a.to(dtype), (SCALE * b).to(dtype)


def contenders(w: Weights, case: Case, t: torch.Tensor) -> dict[str, list[Call]]:
    """Of one row; ``t`` is x [M, K], or the gradient of y [M, N]."""
    if case.op.startswith("lora"):
        return (_lora_forward if case.op == "lora_forward" else _lora_backward)(w, case, t)
    is_forward = case.op == "forward"

    def ours(weight: qn.QuantizedWeight) -> Any:
        if is_forward:
            return OPS.linear_4bit(t, w.bias, *weight.op_args())
        return OPS.linear_4bit_grad_input(t, *weight.op_args())

    def dense(weight: torch.Tensor) -> torch.Tensor:
        if is_forward:
            return torch.nn.functional.linear(t, weight, w.bias)
        return torch.mm(t, weight)

    def two_step(weight: qn.QuantizedWeight) -> torch.Tensor:
        OPS.dequantize_4bit.out(w.scratch, *weight.op_args())
        return dense(w.scratch)

    def bitsandbytes(packed: Any, state: Any) -> Any:  # the gradient as their autograd runs it
        if is_forward:
            return w.module.matmul_4bit(t, packed.t(), quant_state=state, bias=w.bias)  # type: ignore[union-attr]
        return torch.mm(t, w.module.functional.dequantize_4bit(packed, state).to(t.dtype))  # type: ignore[union-attr]

    found: dict[str, list[Call]] = {
        "ours": [lambda one=one: ours(one) for one in w.ours],  # type: ignore[misc]
        "dense": [lambda one=one: dense(one) for one in w.copies],  # type: ignore[misc]
        "dequantize_then_mm": [lambda one=one: two_step(one) for one in w.ours],  # type: ignore[misc]
        "bitsandbytes": [lambda p=p, s=s: bitsandbytes(p, s) for p, s in w.bnb],  # type: ignore[misc]
    }
    return found | (
        _decoders(w.context, case, t) if is_forward and case.m <= FEW and on_gpu() and not case.form else {}
    )


def _decoders(context: Context, case: Case, x: torch.Tensor) -> dict[str, list[Call]]:
    """Kernels of other libraries for few tokens, with random weights of their own formats, fp16."""
    found: dict[str, list[Call]] = {}
    x16 = x.to(torch.float16)
    for name, make in (("marlin", _marlin), ("flute.integrations.base", _flute)):
        module = importable(name, context) if name not in context.without else None
        if module is not None:
            try:
                layers = [make(module, case) for _ in range(8)]
                found[name.partition(".")[0]] = [lambda layer=layer: layer(x16) for layer in layers]  # type: ignore[misc]
            except Exception as error:
                context.drop(name, brief(error))
    return found


def _marlin(module: Any, case: Case) -> Any:
    return module.Layer(case.k, case.n, groupsize=128).half().to(device())


def _flute(module: Any, case: Case) -> Any:
    linear = torch.nn.Linear(case.k, case.n, bias=False, device=device(), dtype=torch.float16)
    holder = torch.nn.Sequential(linear)
    module.prepare_model_flute(name="bench", module=holder, num_bits=4, group_size=64, fake=False)
    return holder


def _lora_forward(w: Weights, case: Case, x: torch.Tensor) -> dict[str, list[Call]]:
    a, b, low, up = _adapter(case, x.dtype)

    def ours(weight: qn.QuantizedWeight) -> Any:
        return OPS.lora_linear_4bit(x, None, a, b, SCALE, None, *weight.op_args())[0]

    def dense_lora(weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight.t()).addmm_(torch.mm(x, low.t()), up.t())

    found: dict[str, list[Call]] = {
        "ours": [lambda one=one: ours(one) for one in w.ours],  # type: ignore[misc]
        "dense": [lambda one=one: torch.mm(x, one.t()) for one in w.copies],  # type: ignore[misc]
        "dense_lora": [lambda one=one: dense_lora(one) for one in w.copies],  # type: ignore[misc]
    }
    unsloth = importable("unsloth.kernels.utils", w.context) if on_gpu() else None
    if unsloth is not None:
        found["unsloth"] = [
            lambda p=p, s=s: unsloth.matmul_lora(x, p.t(), s, low, b.to(x.dtype), SCALE)  # type: ignore[misc]
            for p, s in w.bnb
        ]
    w.truth = (a, b)  # type: ignore[attr-defined]
    return found


def _lora_backward(w: Weights, case: Case, grad_y: torch.Tensor) -> dict[str, list[Call]]:
    a, b, low, up = _adapter(case, grad_y.dtype)
    x = torch.randn(case.m, case.k, device=device(), dtype=grad_y.dtype)
    xa = torch.mm(x, low.t())

    def ours(weight: qn.QuantizedWeight) -> Any:
        needed = [True, False, True, True]  # x, x_lora, A, B
        return OPS.lora_linear_4bit_backward(grad_y, x, xa, a, b, SCALE, False, needed, *weight.op_args())[0]

    def dense_lora(weight: torch.Tensor) -> torch.Tensor:
        through = torch.mm(grad_y, up)
        torch.mm(through.t(), x), torch.mm(grad_y.t(), xa)
        return torch.mm(grad_y, weight).addmm_(through, low)

    w.truth = (a, b)  # type: ignore[attr-defined]
    return {
        "ours": [lambda one=one: ours(one) for one in w.ours],  # type: ignore[misc]
        "dense": [lambda one=one: torch.mm(grad_y, one) for one in w.copies],  # type: ignore[misc]
        "dense_lora": [lambda one=one: dense_lora(one) for one in w.copies],  # type: ignore[misc]
    }


def truth(w: Weights, case: Case, t: torch.Tensor) -> torch.Tensor:
    """fp32 products on the decoded weight."""
    wide, dense = t.float(), w.dense.float()
    y = wide @ dense.t() if case.op.endswith("forward") else wide @ dense
    if case.op.startswith("lora"):
        a, b = (m.to(t.dtype).float() for m in w.truth)  # type: ignore[attr-defined]
        y += SCALE * ((wide @ a.t()) @ b.t() if case.op.endswith("forward") else (wide @ b) @ a)
    return y if w.bias is None else y + w.bias.float()


def row(w: Weights, case: Case, context: Context) -> dict[str, Any]:
    """One row: errors, samples, floor, bars, memory."""
    t = torch.randn(case.m, case.k if case.op.endswith("forward") else case.n, device=device(), dtype=w.dtype)
    functions = {name: calls for name, calls in contenders(w, case, t).items() if calls and name not in context.without}
    exact = truth(w, case, t)
    errors = {}
    for name, calls in list(functions.items()):
        try:
            got = calls[0]()
            if name not in ("marlin", "flute") and not (name == "dense" and case.r):  # those multiply with the same
                errors[name] = float(f"{relative_error(got, exact):.2g}")
        except Exception as error:
            if name == "ours":
                raise
            del functions[name]
            context.drop(name, brief(error))
    del exact
    peak = peak_bytes(functions["ours"][0])
    functions["ours_warm"] = functions["ours"][:1] * len(functions["ours"])
    num_bytes = w.ours[0].nbytes + 2 * case.m * (case.n + case.k)
    least = floor(context.measured, num_bytes, 2 * case.m * case.n * case.k)
    seconds = interleaved_replays(functions, context)
    found: dict[str, Any] = {"match": errors["ours"] < TOLERANCE, "relative_error": errors}
    return found | {"peak_mib": None if peak is None else peak / 2**20} | timings(seconds, bars(case), least)


@torch.no_grad()
def run(context: Context, which: str) -> None:
    """The rows of a group; each weight is made once and freed before the next."""
    for (n, k, form), rows in groupby(cases(which, context.dry), key=lambda case: (case.n, case.k, case.form)):
        weights: list[Weights] = []

        def measure(case: Case, key: tuple[int, int, str] = (n, k, form), kept: list[Weights] = weights) -> Any:
            kept[:] = kept or [Weights(context, *key)]
            return row(kept[0], case, context)

        for case in rows:
            context.row(case, lambda case=case, measure=measure: measure(case))  # type: ignore[misc]
        weights.clear()
        if on_gpu():
            torch.cuda.empty_cache()
