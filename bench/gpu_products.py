"""Products with 4-bit weights on a GPU against dense ones and other libraries', plain and with a LoRA adapter.

``dense`` is the bare product with the decoded 16-bit weight, ``dense_lora`` the same with the adapter's products and
gradients as torch's own operations; ``ours_warm`` finds one weight in the L2 cache, if it fits. Of another library that
multiplies with a weight of its own (Marlin, FLUTE) no error is recorded. All are timed as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from cases import GGUF_TYPES
from common import Bar, relative_error, timings
from gpu_timing import Case, Context, Row, brief, device, half, linears, made_up, on_gpu, peak_bytes
from replay import Call, copies
from torch import Tensor

import qlora_native as qn
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops import _cuda_products, _library
from qlora_native.ops._operands import Weight

OPS = torch.ops.qlora_native
SCALE = 2.0
NEEDED = (True, False, True, True)  # gradients of x, x_lora, A, B
TOLERANCE = 1e-2  # of 16 bits against fp32 on the same decoded weight
DIRECTIONS = ("forward", "grad_input", "lora_forward", "lora_backward")
FEW = 256  # tokens up to which kernels for decoding are rivals
DECODERS = ("marlin", "flute.integrations.base")

Shapes = Iterable[tuple[int, int]]
Adapter = tuple[Tensor, Tensor, Tensor, Tensor]  # A [r, K] and B [N, r] in fp32; A and scale * B in 16 bits


def _cases(
    shapes: Shapes, tokens: Sequence[int], r: int = 16, forms: Sequence[str] = ("",), ops: Sequence[str] = DIRECTIONS
) -> list[Case]:
    sizes = product(shapes, forms, tokens, ops)
    return [Case(op, m, n, k, r if op.startswith("lora") else 0, form) for (n, k), form, m, op in sizes]


SHAPES_8B, SHAPES_70B = (list(dict.fromkeys(linears(name))) for name in ("8B", "70B"))
VARIED = ((4096, 4096), (14336, 4096))
CASES = {
    "crossovers": _cases(VARIED[::-1], (64, 128, 256, 512, 1024, 2048), ops=DIRECTIONS[:2]),
    "few": _cases(SHAPES_8B, (1, 4, 16, 64, 256)),
    "many": _cases(SHAPES_8B, (1024, 4096)),
    "variants": [
        *_cases(VARIED, (16, 4096), r=64, ops=DIRECTIONS[2:]),
        *_cases(VARIED, (16, 4096), forms=("fp16", "plain scales")),
        *_cases(VARIED, (16, 4096), forms=("bias",), ops=DIRECTIONS[:1]),
        *_cases(VARIED[1:], (1, 16), forms=GGUF_TYPES, ops=DIRECTIONS[:1]),
    ],
    "long": _cases(SHAPES_8B[:2], (2048, 8192, 16384)),
    "70b": _cases(SHAPES_70B, (1, 16, 256, 4096)),
}


def bars(case: Case) -> tuple[Bar, ...]:
    """The goals of these kernels."""
    if case.op == "forward" and case.m <= 16 and case.n * case.k >= 1 << 24:
        return (Bar("floor", 1 / (0.65 if case.n * case.k > 1 << 24 else 0.45)),)
    if case.op in ("forward", "grad_input") and 64 <= case.m <= FEW:
        return (Bar("dequantize_then_mm", 1.0), Bar("bitsandbytes", 1.0))
    return (Bar("dense_lora", 1.08),) if case.op.startswith("lora") and case.m >= 1024 else ()


class Weights:
    """A weight [N, K] in the form of each contender, in enough copies, and what goes with it."""

    def __init__(self, context: Context, n: int, k: int, form: str = "") -> None:
        self.context = context
        self.dtype = torch.float16 if form == "fp16" else half()
        dense = (torch.randn(n, k, device=device()) / k**0.5).to(self.dtype)
        has_blocks = form in GGUF_TYPES
        first = made_up(n, k, form) if has_blocks else qn.quantize(dense, double_quant=form != "plain scales")
        self.dense = first.dequantize(self.dtype)  # what everyone multiplies with
        self.scratch = torch.empty_like(self.dense)
        self.ours = [first, *(deepcopy(first) for _ in range(copies(first.nbytes, device()) - 1))]
        self.copies = [self.dense, *(self.dense.clone() for _ in range(copies(self.dense.nbytes, device()) - 1))]
        self.bias = torch.randn(n, device=device(), dtype=self.dtype) if form == "bias" else None
        self.bnb: list[tuple[Any, Any]] = []
        is_rival = on_gpu() and not has_blocks and "bitsandbytes" not in context.without
        self.module = context.importable("bitsandbytes") if is_rival else None
        if self.module is not None:
            try:
                quantized = self.module.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
                self.bnb = [(quantized[0].clone(), quantized[1]) for _ in self.ours]
            except Exception as error:
                context.drop("bitsandbytes", brief(error))


def _adapter(case: Case, dtype: torch.dtype) -> Adapter:
    a = torch.randn(case.r, case.k, device=device()) / case.k**0.5
    b = torch.randn(case.n, case.r, device=device()) / 4
    return a, b, a.to(dtype), (SCALE * b).to(dtype)


def contenders(w: Weights, case: Case, t: Tensor, adapter: Adapter) -> dict[str, list[Call]]:
    """Of one row; ``t`` is x [M, K], or the gradient of y [M, N]."""
    is_forward, (a, b, low, up) = case.op.endswith("forward"), adapter
    x = t if is_forward else torch.randn(case.m, case.k, device=device(), dtype=t.dtype)
    xa = torch.mm(x, low.t())
    ours = {
        "forward": partial(OPS.linear_4bit, t, w.bias),
        "grad_input": partial(OPS.linear_4bit_grad_input, t),
        "lora_forward": partial(OPS.lora_linear_4bit, t, None, a, b, SCALE, None),
        "lora_backward": partial(OPS.lora_linear_4bit_backward, t, x, xa, a, b, SCALE, False, NEEDED),
    }[case.op]

    def dense(weight: Tensor) -> Tensor:
        return F.linear(t, weight, w.bias) if is_forward else torch.mm(t, weight)

    def dense_lora(weight: Tensor) -> Tensor:
        through = torch.mm(t, low.t() if is_forward else up)
        if not is_forward:  # the gradients of A and B
            torch.mm(through.t(), x), torch.mm(t.t(), xa)
        return dense(weight).addmm_(through, up.t() if is_forward else low)

    def two_step(weight: qn.QuantizedWeight) -> Tensor:
        return dense(weight.dequantize(out=w.scratch))

    def bitsandbytes(packed: Tensor, state: Any) -> Any:  # the gradient as their autograd runs it
        module: Any = w.module
        if is_forward:
            return module.matmul_4bit(t, packed.t(), quant_state=state, bias=w.bias)
        return torch.mm(t, module.functional.dequantize_4bit(packed, state).to(t.dtype))

    found: dict[str, list[Call]] = {
        "ours": [partial(ours, *weight.op_args()) for weight in w.ours],
        "dense": [partial(dense, weight) for weight in w.copies],
    }
    if case.r:
        found["dense_lora"] = [partial(dense_lora, weight) for weight in w.copies]
        unsloth = w.context.importable("unsloth.kernels.utils") if on_gpu() and is_forward else None
        if unsloth is not None:
            half_b = b.to(t.dtype)
            found["unsloth"] = [partial(unsloth.matmul_lora, t, p.t(), s, low, half_b, SCALE) for p, s in w.bnb]
        return found
    found["dequantize_then_mm"] = [partial(two_step, weight) for weight in w.ours]
    found["bitsandbytes"] = [partial(bitsandbytes, *pair) for pair in w.bnb]
    return found | (_decoders(w.context, case, t) if is_forward and case.m <= FEW and not case.form else {})


def _decoders(context: Context, case: Case, x: Tensor) -> dict[str, list[Call]]:
    """Kernels of other libraries for few tokens, with random weights of their own formats, fp16."""
    found: dict[str, list[Call]] = {}
    for name in DECODERS if on_gpu() else ():
        module = context.importable(name) if name not in context.without else None
        if module is not None:
            try:
                layers = [_decoder(module, case) for _ in range(8)]
                found[name.partition(".")[0]] = [partial(layer, x.to(torch.float16)) for layer in layers]
            except Exception as error:
                context.drop(name, brief(error))
    return found


def _decoder(module: Any, case: Case) -> Any:
    if module.__name__ == "marlin":
        return module.Layer(case.k, case.n, groupsize=128).half().to(device())
    linear = torch.nn.Linear(case.k, case.n, bias=False, device=device(), dtype=torch.float16)
    holder = torch.nn.Sequential(linear)
    module.prepare_model_flute(name="bench", module=holder, num_bits=4, group_size=64, fake=False)
    return holder


def truth(w: Weights, case: Case, t: Tensor, adapter: Sequence[Tensor]) -> Tensor:
    """fp32 products on the decoded weight."""
    wide, dense, is_forward = t.float(), w.dense.float(), case.op.endswith("forward")
    y = wide @ dense.t() if is_forward else wide @ dense
    if case.r:
        a, b = (m.to(t.dtype).float() for m in adapter[:2])
        y += SCALE * ((wide @ a.t()) @ b.t() if is_forward else (wide @ b) @ a)
    return y if w.bias is None else y + w.bias.float()


def row(context: Context, w: Weights, case: Case) -> Row:
    """One row: errors, samples, floor, bars, memory."""
    t = torch.randn(case.m, case.k if case.op.endswith("forward") else case.n, device=device(), dtype=w.dtype)
    adapter = _adapter(case, w.dtype)
    found = contenders(w, case, t, adapter)
    functions = {name: calls for name, calls in found.items() if calls and name not in context.without}
    exact = truth(w, case, t, adapter)
    errors = {}
    for name, calls in list(functions.items()):
        try:
            got = calls[0]()
            got = got[0] if isinstance(got, tuple) else got
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
    least = context.floor(num_bytes, 2 * case.m * case.n * case.k)
    made: Row = {"match": errors["ours"] < TOLERANCE, "relative_error": errors}
    made["peak_mib"] = None if peak is None else peak / 2**20
    return made | timings(context.replays(functions), bars(case), least)


def crossover_row(context: Context, w: Weights, case: Case) -> Row:
    """A product by the fused kernel, which is ours here, and in two steps: what the choice between them rests on."""
    is_forward = case.op == "forward"
    t = torch.randn(case.m, case.k if is_forward else case.n, device=device(), dtype=w.dtype)
    module: Any = _library.module_for(device())
    sizes = _cuda_products.Sizes(case.m, case.n, case.k, 0, 64, DTYPE_NUMBER[w.dtype], is_forward)
    fused = _cuda_products.plan_of(module, sizes, device(), always_fused=True)
    product = partial(_cuda_products.Cuda(module).product, is_forward, t)
    plans = {"ours": fused, "two_steps": _cuda_products.TWO_STEPS}
    calls = {
        name: [partial(product, Weight(*weight.op_args()), plan=plan) for weight in w.ours]
        for name, plan in plans.items()
    }
    exact = truth(w, case, t, ())
    errors = {name: relative_error(call[0](), exact) for name, call in calls.items()}
    match = max(errors.values()) < TOLERANCE and fused != _cuda_products.TWO_STEPS
    return {"match": match, "plan": str(fused)} | timings(context.replays(calls))


@torch.no_grad()
def run(context: Context, which: str) -> None:
    """The rows of one of the tables of ``CASES``; a weight is made once for the rows that follow one another."""
    weights = lru_cache(maxsize=1)(partial(Weights, context))
    if which == "crossovers" and _library.module_for(device()) is None:
        context.record(absent="CUDA kernels")
        return
    measure = crossover_row if which == "crossovers" else row
    context.rows(CASES[which], lambda case: measure(context, weights(case.n, case.k, case.form), case))
