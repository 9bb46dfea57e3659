"""Ops bound by memory on a GPU, each against the time that its bytes take; the loss; and what an op costs the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from cases import GGUF_TYPES
from common import relative_error, timings
from gpu_models import LLAMA, VOCABULARY, linears, made_up_blocks
from gpu_products import Weights
from gpu_timing import (
    HOST_CALLS,
    Case,
    Context,
    copies_of,
    device,
    floor,
    half,
    host_us,
    importable,
    interleaved_calls,
    interleaved_replays,
    launches,
    of_floor,
    on_gpu,
)
from replay import Call
from torch import Tensor

import qlora_native as qn
from qlora_native.ops import _library

OPS = torch.ops.qlora_native
NORMS = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotary")
LORA_PARAMETERS = tuple(  # of rank-16 adapters on every layer of an 8B model: A [16, K] and B [N, 16]
    (r, c) for n, k in LLAMA["8B"]["num_hidden_layers"] * linears("8B") for r, c in ((16, k), (n, 16))
)
TINY_PARAMETERS = ((16, 40), (24, 16), (1, 7))


def cases(dry: bool) -> list[Case]:
    """The rows of ``passes``; k of the optimizer and of the norm is the number of parameters."""
    shapes = ((64, 128),) if dry else ((4096, 4096), (14336, 4096), (1024, 4096))
    count = sum(r * c for r, c in (TINY_PARAMETERS if dry else LORA_PARAMETERS))
    return [
        *(Case("dequantize_4bit", n=n, k=k, form=form) for n, k in shapes for form in ("", "fp32")),
        *(Case("dequantize_4bit", n=shapes[len(shapes) // 2][0], k=shapes[0][1], form=form) for form in GGUF_TYPES),
        *(Case("quantize_4bit", n=n, k=k) for n, k in shapes),
        *(Case("adamw_step", k=count, form=form) for form in ("32 bits", "8 bits")),
        Case("gradient_norm", k=count),
    ]


def norm_cases(dry: bool) -> list[Case]:
    """The rows of ``norms``: n and k are the columns of the MLP and of the model; rotary has heads of 128."""
    m, n, k = (40, 96, 256) if dry else (4096, 14336, 4096)
    return [Case(op, m, n=n if op.startswith("swiglu") else 0, k=0 if op.startswith("swiglu") else k) for op in NORMS]


def loss_cases(dry: bool) -> list[Case]:
    """The rows of ``loss``: forward and gradient of the hidden states."""
    m, n, k = (24, 101, 64) if dry else (4096, VOCABULARY, 4096)
    return [Case("linear_cross_entropy", m, n, k, form=form) for form in ("", "4-bit head")]


def host_cases(dry: bool) -> list[Case]:
    """The rows of ``host``: so few tokens that the device does not hold the host up."""
    n, k = (64, 128) if dry else (1024, 4096)
    products = (Case(f"host {op}", 1, n, k, 0 if op == "linear" else 16) for op in ("linear", "lora", "lora step"))
    return [*products, Case("host adamw_step", k=sum(r * c for r, c in TINY_PARAMETERS))]


@torch.no_grad()
def run_passes(context: Context) -> None:
    """Dequantize, quantize, optimizer steps, the gradient's norm."""
    rows: dict[str, Callable[[Case, Context], dict[str, Any]]] = {
        "dequantize_4bit": dequantize_row,
        "quantize_4bit": quantize_row,
        "adamw_step": adamw_row,
        "gradient_norm": gradient_norm_row,
    }
    for case in cases(context.dry):
        context.row(case, lambda case=case: rows[case.op](case, context))  # type: ignore[misc]


def dequantize_row(case: Case, context: Context) -> dict[str, Any]:
    """A whole weight to a dense buffer; the goal is 85 % of the bandwidth of a copy."""
    dtype = torch.float32 if case.form == "fp32" else half()
    if case.form in GGUF_TYPES:
        first = made_up_blocks(case.form, case.n, case.k)
    else:
        first = qn.quantize(torch.randn(case.n, case.k, device=device()))
    num_bytes = first.nbytes + case.n * case.k * dtype.itemsize
    outs = [torch.empty(case.n, case.k, dtype=dtype, device=device()) for _ in range(copies_of(num_bytes))]
    calls: list[Call] = [
        lambda out=out: OPS.dequantize_4bit.out(out, *first.op_args())  # type: ignore[misc]
        for out in outs
    ]
    seconds = interleaved_replays({"ours": calls, "ours_warm": calls[:1] * len(calls)}, context)
    least = floor(context.measured, num_bytes)
    exact = qn.reference.dequantize(dtype, *first.to("cpu").op_args())
    bars = (of_floor(0.85),) if case.n * case.k >= 1 << 24 else ()
    return {"match": torch.equal(outs[0].cpu(), exact)} | timings(seconds, bars, least)


def quantize_row(case: Case, context: Context) -> dict[str, Any]:
    """16 to 4 bits with double quantization. It waits for the device, so no graph can hold it."""
    dense = torch.randn(case.n, case.k, device=device(), dtype=half())
    w = qn.quantize(dense)
    seconds = interleaved_calls({"ours": lambda: qn.quantize(dense)}, context.rounds)
    there = qn.quantize(dense.cpu())
    match = torch.equal(w.packed.cpu(), there.packed) and torch.equal(w.absmax.cpu(), there.absmax)
    return {"match": match} | timings(seconds, (), floor(context.measured, dense.nbytes + w.nbytes))


def _parameters(shapes: tuple[tuple[int, int], ...]) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(shape, device=device())) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def adamw_row(case: Case, context: Context) -> dict[str, Any]:
    """A step over all adapters, with clipping, beside torch's fused AdamW (32 bits, without clipping)."""
    shapes = TINY_PARAMETERS if context.dry else LORA_PARAMETERS
    bits: Literal[8, 32] = 8 if case.form == "8 bits" else 32
    ours = qn.optim.AdamW(_parameters(shapes), lr=1e-3, bits=bits, max_norm=1.0)
    rival = torch.optim.AdamW(_parameters(shapes), lr=1e-3, fused=on_gpu(), capturable=on_gpu())
    seconds = interleaved_replays({"ours": [ours.step], "torch_fused": [rival.step]}, context)
    least = floor(context.measured, case.k * (28 if bits == 32 else 16 + 4 * 2 / 256 * 2))
    check = _parameters(((64, 64),))
    copy = [torch.nn.Parameter(p.detach().cpu().clone()) for p in check]
    for p, q in zip(check, copy, strict=True):
        q.grad = p.grad.cpu() if p.grad is not None else None
    for each in (check, copy):
        qn.optim.AdamW(each, lr=1e-3, bits=bits, max_norm=1.0).step()
    match = all(torch.equal(p.detach().cpu(), q.detach()) for p, q in zip(check, copy, strict=True))
    return {"match": match} | timings(seconds, (of_floor(1 / 1.5),), least)


def gradient_norm_row(case: Case, context: Context) -> dict[str, Any]:
    """Over the gradients of all adapters, beside torch's foreach norms."""
    grads = [torch.randn(shape, device=device()) for shape in (TINY_PARAMETERS if context.dry else LORA_PARAMETERS)]
    calls: dict[str, list[Call]] = {
        "ours": [lambda: OPS.gradient_norm(grads)],
        "torch_foreach": [lambda: torch.stack(torch._foreach_norm(grads)).norm()],
    }
    seconds = interleaved_replays(calls, context)
    exact = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
    match = abs(float(OPS.gradient_norm(grads)) - exact) < 1e-9 * exact
    return {"match": match} | timings(seconds, (), floor(context.measured, 4 * case.k))


def run_norms(context: Context) -> None:
    """RMSNorm, SwiGLU and rotation, where this build has kernels for them."""
    for case in norm_cases(context.dry):
        if on_gpu() and (case.op, "CUDA") not in _library.IMPLEMENTATIONS:
            context.note("absent", f"a CUDA kernel of {case.op}")
            continue
        context.row(case, lambda case=case: norm_row(case, context))  # type: ignore[misc]


def norm_row(case: Case, context: Context) -> dict[str, Any]:
    """An op beside what transformers' modules do for it; a backward op is checked by autograd and has no rival."""
    x, other, grad = (
        torch.randn(case.m, case.n or case.k, device=device(), dtype=half(), requires_grad=number < 2)
        for number in range(3)
    )
    if case.op == "rotary":
        heads = x.view(1, case.m, -1, 128).transpose(1, 2)
        angles = torch.randn(2, 1, case.m, 128, device=device(), dtype=half())
        calls = {"ours": lambda: OPS.rotary(heads, *angles, False), "torch": lambda: _eager_rotary(heads, *angles)}
        num_arrays = 2.0 + 2 * 128 / case.k
    elif case.op.startswith("swiglu"):
        calls = {"ours": lambda: OPS.swiglu(x, other), "torch": lambda: F.silu(x) * other}
        num_arrays = 3.0
    else:
        weight = torch.randn(case.k, device=device(), dtype=half())
        rstd = OPS.rms_norm(x, weight, 1e-6)[1].detach()
        calls = {"ours": lambda: OPS.rms_norm(x, weight, 1e-6)[0], "torch": lambda: _eager_rms_norm(x, weight)}
        num_arrays = 2.0
    if case.op.endswith("backward"):
        inputs = [x, other] if case.op.startswith("swiglu") else [x]
        (exact, *_) = torch.autograd.grad(calls["torch"](), inputs, grad)
        num_arrays = 5.0 if case.op.startswith("swiglu") else 3.0
        backward: dict[str, Call] = {
            "swiglu_backward": lambda: OPS.swiglu_backward(grad, x, other)[0],
            "rms_norm_backward": lambda: OPS.rms_norm_backward(grad, x, weight, rstd, 1e-6),
        }
        calls = {"ours": backward[case.op]}
    else:
        exact = calls["torch"]()
    with torch.no_grad():
        error = relative_error(calls["ours"](), exact)
        seconds = interleaved_replays({name: [call] for name, call in calls.items()}, context)
    least = floor(context.measured, num_arrays * x.nbytes)
    return {"match": error < 1e-2, "relative_error": {"ours": float(f"{error:.2g}")}} | timings(seconds, (), least)


def _eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:  # LlamaRMSNorm
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _eager_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # apply_rotary_pos_emb of Llama
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def run_loss(context: Context) -> None:
    """The loss over a large vocabulary, with the gradient of the hidden states."""
    for case in loss_cases(context.dry):
        context.row(case, lambda case=case: loss_row(case, context))  # type: ignore[misc]


def loss_row(case: Case, context: Context) -> dict[str, Any]:
    """Beside torch's cross entropy of whole logits, and Liger's fused one where it can be imported."""
    head = (torch.randn(case.n, case.k, device=device()) / case.k**0.5).to(half())
    weight = qn.quantize(head) if case.form else head
    head = weight.dequantize(half()) if isinstance(weight, qn.QuantizedWeight) else head
    h = torch.randn(case.m, case.k, device=device(), dtype=half(), requires_grad=True)
    labels = torch.randint(case.n, (case.m,), device=device())

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, h)[0]

    calls: dict[str, Call] = {
        "ours": lambda: gradient(qn.linear_cross_entropy(h, weight, labels)),
        "dense": lambda: gradient(F.cross_entropy((h @ head.t()).float(), labels)),
    }
    liger = importable("liger_kernel.transformers", context) if on_gpu() else None
    if liger is not None:
        calls["liger"] = lambda: gradient(liger.LigerFusedLinearCrossEntropyLoss()(head, h, labels))
    error = relative_error(calls["ours"](), calls["dense"]())
    seconds = interleaved_calls(calls, context.rounds)
    least = floor(context.measured, weight.nbytes + 2 * h.nbytes, 4 * case.m * case.n * case.k)
    return {"match": error < 2e-2, "relative_error": {"ours": float(f"{error:.2g}")}} | timings(seconds, (), least)


def run_host(context: Context) -> None:
    """Microseconds of the host and launches a call, which graphs hide."""
    for case in host_cases(context.dry):
        context.row(case, lambda case=case: host_row(case, context))  # type: ignore[misc]


def host_calls(w: qn.QuantizedWeight, dense: Tensor, m: int, r: int) -> dict[str, dict[str, Call]]:
    """By row: an adapted layer by our public functions, and by torch's own operations."""
    n, k = dense.shape
    x = torch.randn(m, k, device=dense.device, dtype=dense.dtype, requires_grad=True)
    a, b = (torch.randn(s, device=dense.device, requires_grad=True) for s in ((r, k), (n, r)))
    torch.optim.SGD([a, b]).step()  # changes nothing; copies are kept of what an optimizer steps
    grad_y = torch.randn(m, n, device=dense.device, dtype=dense.dtype)

    def ours() -> Tensor:
        return qn.lora_linear(x, w, a, b, 2.0)

    def theirs() -> Tensor:
        return F.linear(x, dense) + 2.0 * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def step(forward: Callable[[], Tensor]) -> None:
        torch.autograd.grad(forward(), (x, a, b), grad_y)

    return {
        "host linear": {"ours": lambda: qn.linear(x, w), "torch": lambda: F.linear(x, dense)},
        "host lora": {"ours": ours, "torch": theirs},
        "host lora step": {"ours": lambda: step(ours), "torch": lambda: step(theirs)},
    }


def host_row(case: Case, context: Context) -> dict[str, Any]:
    """An op by its public function beside torch's own operations for the same."""
    if case.op == "host adamw_step":
        ours, theirs = _parameters(TINY_PARAMETERS), _parameters(TINY_PARAMETERS)
        calls: dict[str, Call] = {
            "ours": qn.optim.AdamW(ours, lr=1e-3, max_norm=1.0).step,
            "torch": torch.optim.AdamW(theirs, lr=1e-3, fused=on_gpu()).step,
        }
    else:
        w = Weights(context, case.n, case.k)
        calls = host_calls(w.ours[0], w.dense, case.m, 16)[case.op]
    microseconds = {name: host_us(call, 3 if context.dry else HOST_CALLS) for name, call in calls.items()}
    return {
        "match": True,
        "host_us": microseconds,
        "launches": {name: launches(call) for name, call in calls.items()},
        "ms": {name: [value / 1e3] * 3 for name, value in microseconds.items()},
        "bars": [],
    }
