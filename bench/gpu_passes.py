"""Ops bound by memory, each against the time that its bytes take; the loss; what an op costs the host; paging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from cases import GGUF_TYPES
from common import Bar, interleaved, relative_error, timings
from gpu_basics import optimizer
from gpu_timing import LLAMA, VOCABULARY, Case, Context, Row, brief, device, half, linears, made_up, on_gpu, wait
from replay import Call, copies
from torch import Tensor

import qlora_native as qn

OPS = torch.ops.qlora_native
LORA_PARAMETERS = tuple(  # of rank-16 adapters on every layer of an 8B model: A [16, K] and B [N, 16]
    (r, c) for n, k in LLAMA["8B"]["num_hidden_layers"] * linears("8B") for r, c in ((16, k), (n, 16))
)
TINY_PARAMETERS = ((16, 40), (24, 16), (1, 7))
SHAPES = ((4096, 4096), (14336, 4096), (1024, 4096))
COUNT, TINY_COUNT = (sum(r * c for r, c in shapes) for shapes in (LORA_PARAMETERS, TINY_PARAMETERS))
STATE_BYTES, BUDGET = 192 << 20, 48 << 20  # of paged states; of them, on the device at a time

CASES = {
    "passes": (  # k of the optimizers and of the norm is the number of parameters
        *(Case("dequantize_4bit", n=n, k=k, form=form) for n, k in SHAPES for form in ("", "fp32")),
        *(Case("dequantize_4bit", n=14336, k=4096, form=form) for form in GGUF_TYPES),
        *(Case("quantize_4bit", n=n, k=k) for n, k in SHAPES),
        *(Case("adamw_step", k=COUNT, form=form) for form in ("32 bits", "8 bits")),
        Case("gradient_norm", k=COUNT),
    ),
    "paging": (Case("paged_adamw_step", k=STATE_BYTES // 8, form="32 bits"),),
    "norms": (  # n and k are the columns of the MLP and of the model; rotary has heads of 128
        *(Case(op, 4096, k=4096) for op in ("rms_norm", "rms_norm_backward", "rotary")),
        *(Case(op, 4096, n=14336) for op in ("swiglu", "swiglu_backward")),
    ),
    "loss": tuple(Case("linear_cross_entropy", 4096, VOCABULARY, 4096, form=form) for form in ("", "4-bit head")),
    "host": (  # so few tokens that the device does not hold the host up
        *(Case(f"host {op}", 1, 1024, 4096, r) for op, r in (("linear", 0), ("lora", 16), ("lora step", 16))),
        Case("host adamw_step", k=TINY_COUNT),
    ),
}


def run(context: Context, which: str) -> None:
    """The rows of one of the tables."""
    context.rows(CASES[which], lambda case: ROWS[case.op.partition(" ")[0]](context, case))


def dequantize_row(context: Context, case: Case) -> Row:
    """A whole weight to a dense buffer; the goal is 85 % of the bandwidth of a copy."""
    dtype = torch.float32 if case.form == "fp32" else half()
    first = made_up(case.n, case.k, case.form if case.form in GGUF_TYPES else "nf4")
    num_bytes = first.nbytes + case.n * case.k * dtype.itemsize
    outs = [torch.empty(case.n, case.k, dtype=dtype, device=device()) for _ in range(copies(num_bytes, device()))]
    calls: list[Call] = [partial(first.dequantize, out=out) for out in outs]
    seconds = context.replays({"ours": calls, "ours_warm": calls[:1] * len(calls)})
    exact = qn.reference.dequantize(dtype, *first.to("cpu").op_args())
    bars = (Bar("floor", 1 / 0.85),) if case.n * case.k >= 1 << 24 else ()
    return {"match": torch.equal(outs[0].cpu(), exact)} | timings(seconds, bars, context.floor(num_bytes))


def quantize_row(context: Context, case: Case) -> Row:
    """16 to 4 bits with double quantization. It waits for the device, so no graph can hold it."""
    dense = torch.randn(case.n, case.k, device=device(), dtype=half())
    w, there = qn.quantize(dense), qn.quantize(dense.cpu())
    match = torch.equal(w.packed.cpu(), there.packed) and torch.equal(w.absmax.cpu(), there.absmax)
    seconds = context.calls({"ours": lambda: qn.quantize(dense)})
    return {"match": match} | timings(seconds, (), context.floor(dense.nbytes + w.nbytes))


def _parameters(shapes: Sequence[tuple[int, int]]) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(shape, device=device())) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def adamw_row(context: Context, case: Case) -> Row:
    """A step over all adapters, with clipping, beside torch's fused AdamW (32 bits, without clipping)."""
    shapes = LORA_PARAMETERS if on_gpu() else TINY_PARAMETERS
    bits: Literal[8, 32] = 8 if case.form == "8 bits" else 32
    ours = qn.optim.AdamW(_parameters(shapes), lr=1e-3, bits=bits, max_norm=1.0)
    rival = torch.optim.AdamW(_parameters(shapes), lr=1e-3, fused=on_gpu(), capturable=on_gpu())
    seconds = context.replays({"ours": [ours.step], "torch_fused": [rival.step]})
    least = context.floor(case.k * (28 if bits == 32 else 16 + 4 * 2 / 256 * 2))
    return {"match": optimizer("AdamW", bits)} | timings(seconds, (Bar("floor", 1.5),), least)


def gradient_norm_row(context: Context, case: Case) -> Row:
    """Over the gradients of all adapters, beside torch's foreach norms. It makes a table, so no graph can hold it."""
    grads = [torch.randn(shape, device=device()) for shape in (LORA_PARAMETERS if on_gpu() else TINY_PARAMETERS)]
    ours = partial(OPS.gradient_norm, grads)
    seconds = context.calls({"ours": ours, "torch_foreach": lambda: torch.stack(torch._foreach_norm(grads)).norm()})
    exact = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
    match = abs(float(ours()) - exact) < 1e-9 * exact
    return {"match": match} | timings(seconds, (), context.floor(4 * case.k))


def norm_row(context: Context, case: Case) -> Row:
    """An op beside what transformers' modules do for it; a backward op is checked by autograd and has no rival."""
    columns = case.n or case.k
    x, other, grad, weight = (
        torch.randn(shape, device=device(), dtype=half(), requires_grad=number < 2)
        for number, shape in enumerate([(case.m, columns)] * 3 + [(columns,)])
    )
    angles = torch.randn(2, 1, case.m, 128, device=device(), dtype=half())
    rstd = OPS.rms_norm(x, weight, 1e-6)[1].detach()
    ours: dict[str, Call] = {
        "rms_norm": lambda: OPS.rms_norm(x, weight, 1e-6)[0],
        "rms_norm_backward": lambda: OPS.rms_norm_backward(grad, x, weight, rstd, 1e-6),
        "rotary": lambda: OPS.rotary(_heads(x), *angles, False),
        "swiglu": lambda: OPS.swiglu(x, other),
        "swiglu_backward": lambda: OPS.swiglu_backward(grad, x, other)[0],
    }
    theirs: dict[str, Call] = {
        "rms_norm": lambda: _eager_rms_norm(x, weight),
        "rotary": lambda: _eager_rotary(_heads(x), *angles),
        "swiglu": lambda: F.silu(x) * other,
    }
    inputs = [x, other] if case.op.startswith("swiglu") else [x]
    is_backward = case.op.endswith("_backward")
    exact = theirs[case.op.removesuffix("_backward")]()
    if is_backward:
        exact = torch.autograd.grad(exact, inputs, grad)[0]
    with torch.no_grad():
        error = relative_error(ours[case.op](), exact)
        rivals = {} if is_backward else {"torch": [theirs[case.op]]}
        seconds = context.replays({"ours": [ours[case.op]], **rivals})
    num_arrays = 1 + len(inputs) * (1 + is_backward) + (2 * 128 / columns if case.op == "rotary" else 0)
    least = context.floor(num_arrays * x.nbytes)
    return {"match": error < 1e-2, "relative_error": {"ours": float(f"{error:.2g}")}} | timings(seconds, (), least)


def _heads(x: Tensor) -> Tensor:
    return x.view(1, len(x), -1, 128).transpose(1, 2)


def _eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:  # LlamaRMSNorm
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _eager_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # apply_rotary_pos_emb of Llama
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def loss_row(context: Context, case: Case) -> Row:
    """Beside torch's cross entropy of whole logits, and Liger's fused one where it can be imported."""
    head = (torch.randn(case.n, case.k, device=device()) / case.k**0.5).to(half())
    weight: Any = qn.quantize(head) if case.form else head
    head = weight.dequantize(half()) if case.form else head
    h = torch.randn(case.m, case.k, device=device(), dtype=half(), requires_grad=True)
    labels = torch.randint(case.n, (case.m,), device=device())

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, h)[0]

    calls: dict[str, Call] = {
        "ours": lambda: gradient(qn.linear_cross_entropy(h, weight, labels)),
        "dense": lambda: gradient(F.cross_entropy((h @ head.t()).float(), labels)),
    }
    liger = context.importable("liger_kernel.transformers") if on_gpu() else None
    if liger is not None:
        calls["liger"] = lambda: gradient(liger.LigerFusedLinearCrossEntropyLoss()(head, h, labels))
    error = relative_error(calls["ours"](), calls["dense"]())
    seconds = context.calls(calls)
    least = context.floor(weight.nbytes + 2 * h.nbytes, 4 * case.m * case.n * case.k)
    return {"match": error < 2e-2, "relative_error": {"ours": float(f"{error:.2g}")}} | timings(seconds, (), least)


def launches(call: Call) -> int | None:
    """Kernels, copies and fills that a call launches; None where the profiler sees no device."""
    if not on_gpu():
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    wait()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            wait()
    except RuntimeError as error:  # a machine that does not give its counters away
        print(f"launches are not counted: {brief(error)}")
        return None
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events()) or None


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
        "host lora step": {"ours": partial(step, ours), "torch": partial(step, theirs)},
    }


def host_row(context: Context, case: Case) -> Row:
    """The host's time, which graphs hide, and launches of an op by its public function beside torch's own operations
    for the same; no call waits for the device."""
    if case.op == "host adamw_step":
        calls: dict[str, Call] = {
            "ours": qn.optim.AdamW(_parameters(TINY_PARAMETERS), lr=1e-3, max_norm=1.0).step,
            "torch": torch.optim.AdamW(_parameters(TINY_PARAMETERS), lr=1e-3, fused=on_gpu()).step,
        }
    else:
        w = made_up(case.n, case.k)
        calls = host_calls(w, w.dequantize(half()), case.m, 16)[case.op]
    seconds = interleaved(calls, 100 if on_gpu() else 3)
    return {"match": True, "launches": {name: launches(call) for name, call in calls.items()}} | timings(seconds)


def paging_row(context: Context, case: Case) -> Row:
    """Steps in turns: three quarters of the states are paged out, or none. The same bytes; which store was taken, and
    whether torch's view of managed memory is that memory."""
    state_bytes, budget = (size // (1 if on_gpu() else 48) for size in (STATE_BYTES, BUDGET))

    def started(**options: Any) -> qn.optim.AdamW:
        torch.manual_seed(0)
        return qn.optim.AdamW(_parameters([(state_bytes // 8 // 16, 1)] * 16), lr=1e-3, max_norm=1.0, **options)

    paged, plain = started(paged=True, page_budget=budget), started(paged=False)
    seconds = context.calls({"ours": paged.step, "unpaged": plain.step})
    before = paged.paging_statistics()["bytes_in"]
    paged.step(), plain.step()
    statistics = paged.paging_statistics()
    moved = statistics["bytes_in"] - before
    params, others = (each.param_groups[0]["params"] for each in (paged, plain))
    match = all(map(torch.equal, params, others))
    pages = next(iter(paged._pages.values()))
    managed = getattr(pages, "managed", False)
    if managed:
        places = [(store.address, store.address + store.num_bytes) for store in pages.stores]
        views = [paged.state[param]["exp_avg"].data_ptr() for param in params]
        match = match and all(any(low <= view < high for low, high in places) for view in views)
    return {
        "match": match and moved > 0 and statistics["resident_bytes"] <= budget,
        "store": type(pages).__name__ + (" managed" if managed else ""),
        "state_mib": statistics["state_bytes"] >> 20,
        "resident_mib": statistics["resident_bytes"] >> 20,
        "moved_in_mib_a_step": moved >> 20,
    } | timings(seconds)


ROWS: dict[str, Callable[[Context, Case], Row]] = {
    "dequantize_4bit": dequantize_row,
    "quantize_4bit": quantize_row,
    "adamw_step": adamw_row,
    "gradient_norm": gradient_norm_row,
    "paged_adamw_step": paging_row,
    **dict.fromkeys((case.op for case in CASES["norms"]), norm_row),
    "linear_cross_entropy": loss_row,
    "host": host_row,
}
