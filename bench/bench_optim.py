"""An optimizer step, interleaved with torch's fused AdamW and, when importable, bitsandbytes and torchao.

    python bench/bench_optim.py --json

Every row shows whether ours gives the bytes of the plain-torch rule, and how much of the floor it reaches: the bytes
that a step must move (gradients and parameters read, states read and written, parameters written) at the best rate that
the memory shows in the same run, over tensors of the parameters' size. Above 1 the last-level cache helped. Rows with
clipping, too, are compared with torch's step without it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from common import Bar, Bench, Functions, Seconds, interleaved_sparing, timings

import qlora_native as qn
from qlora_native import reference

# (tensors, elements of each): 50 M parameters in 400 tensors, and the adapters of SmolLM2-135M at r=16.
CASES = {"50M": (400, 125_000), "SmolLM2 r=16": (420, 11_630)}
LR, DECAY = 1e-4, 0.01
FUSED = "torch fused"  # 32-bit states, no clipping
# For AdamW over 50 M parameters; without clipping, with it.
BAR_CASE, BARS, CLIPPED_BARS = "50M", (Bar(FUSED, 1.0),), (Bar(FUSED, 1.25),)


def memory_probes(numel: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """What shows the memory's rate, and the bytes that it moves: a sum, a copy, and torch's addcmul_, which like a step
    reads several streams and writes one of them back. Over tensors of all the parameters' size."""
    a, b, c = (torch.ones(numel) for _ in range(3))
    return {
        "read": (a.sum, 4 * numel),
        "copy": (lambda: a.copy_(b), 8 * numel),
        "addcmul": (lambda: a.addcmul_(b, c), 16 * numel),
    }


def parameters(count: int, numel: int, grads: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Parameters of their own, with shared gradients."""
    made = [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]
    for parameter, grad in zip(made, grads, strict=True):
        parameter.grad = grad
    return made


def matches(make: Callable[[Any], torch.optim.Optimizer]) -> bool:
    """Whether two steps of ours, on three tensors, have the bytes of the rule in plain torch."""
    grads = [torch.randn(n) for n in (5000, 4096, 70)]
    params = [torch.nn.Parameter(torch.randn(grad.shape)) for grad in grads]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours, rule = make(params), make(twins)
    for _ in range(2):
        for p, q, grad in zip(params, twins, grads, strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        reference_step(rule)
    return all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@torch.no_grad()
def reference_step(optimizer: Any) -> None:
    """One step of ours by way of reference.py."""
    (group,) = optimizer.param_groups
    grads = [p.grad for p in group["params"]]
    factor = 1.0
    if optimizer.max_norm is not None:
        # Of the same order of summation: the reference's own differs in the last bits of the double.
        factor = min(1.0, optimizer.max_norm / (float(torch.ops.qlora_native.gradient_norm(grads)) + 1e-6))
    for p in group["params"]:
        if not optimizer.state[p]:
            optimizer.state[p] = optimizer._new_state(p, group)
        state = optimizer.state[p]
        common = {"lr": group["lr"], "weight_decay": group["weight_decay"], "grad_factor": factor}
        common |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        if isinstance(optimizer, qn.optim.Lion):
            reference.lion_step(p, p.grad, state["exp_avg"], state.get("exp_avg_absmax"), **common)
            continue
        absmaxes = state.get("exp_avg_absmax"), state.get("exp_avg_sq_absmax")
        moments = state["exp_avg"], state["exp_avg_sq"], *absmaxes, state["step"]
        reference.adamw_step(p, p.grad, *moments, eps=group["eps"], decoupled=True, **common)


def ours() -> dict[str, tuple[Callable[[Any], Any], float]]:
    """Name -> how it is made, and the bytes a parameter that a step moves."""
    adamw: Any = qn.optim.AdamW
    lion: Any = qn.optim.Lion
    coded = 2 * (1 + 4 / 256)  # a code and its share of an absmax, read and written
    rows: dict[str, tuple[Callable[[Any], Any], float]] = {}
    for bits, state in ((32, 8.0), (8, coded)):
        for clip in (None, 1.0):
            name = f"{bits}-bit" + ("" if clip is None else " clipped")
            options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "bits": bits, "max_norm": clip}
            sweep = 0 if clip is None else 4
            rows[f"AdamW {name}"] = partial(adamw, **options), 12 + 2 * state + sweep
            if clip is None:
                rows[f"Lion {name}"] = partial(lion, **options), 12 + state
    return rows


def peers() -> dict[str, Callable[[Any], Any]]:
    """torch's fused AdamW, and what else can be imported."""
    found: dict[str, Callable[..., Any]] = {FUSED: partial(torch.optim.AdamW, fused=True)}
    for package in ("bitsandbytes", "torchao"):
        with suppress(ImportError):
            module = importlib.import_module(f"{package}.optim")
            for name in ("AdamW", "AdamW8bit") if package == "bitsandbytes" else ("AdamW8bit",):
                found[f"{package} {name}"] = getattr(module, name)
    return {name: partial(make, lr=LR, weight_decay=DECAY) for name, make in found.items()}


def clipped_by_torch(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> Callable[[], None]:
    """clip_grad_norm_ and the fused step, as a training loop has them. With no bound: gradients
    are shared here, and must stay as they are."""

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, math.inf)
        optimizer.step()

    return step


def measure(count: int, numel: int, grads: list[torch.Tensor], repeats: int) -> tuple[Seconds, dict[str, float]]:
    """Seconds of every optimizer, and the memory's rates in GB/s."""
    functions: Functions = {name: make(parameters(count, numel, grads)).step for name, (make, _) in ours().items()}
    for name, make in peers().items():
        params = parameters(count, numel, grads)
        optimizer = make(params)
        functions[name] = optimizer.step
        if name == FUSED:
            functions[f"{FUSED} + clip_grad_norm_"] = clipped_by_torch(optimizer, params)
    probes = memory_probes(count * numel)
    functions |= {n: f for n, (f, _) in probes.items()}
    # The other peers are an order of magnitude slower: a few rounds tell, and the others need not wait.
    seconds = interleaved_sparing(functions, repeats, keep=functions.keys() - (peers().keys() - {FUSED}), slow=0)
    rates = {f"{n}_gb_per_s": round(moved / min(seconds.pop(n)) / 1e9, 1) for n, (_, moved) in probes.items()}
    return seconds, rates


def main() -> None:
    bench = Bench("optim", __doc__, repeats=21, cases=tuple(CASES))
    bench.begin(ceilings={})
    for case in bench.options.cases:
        count, numel = CASES[case]
        grads = [torch.randn(numel) * 1e-2 for _ in range(count)]
        seconds, rates = measure(count, numel, grads, bench.options.repeats)
        bench.result["ceilings"][case] = rates
        rivals = {name: values for name, values in seconds.items() if name not in ours()}
        for name, (make, bytes_each) in ours().items():
            bars: tuple[Bar, ...] = ()
            if case == BAR_CASE and name.startswith("AdamW"):
                bars = CLIPPED_BARS if name.endswith("clipped") else BARS
            floor = bytes_each * count * numel / max(rates.values()) / 1e9
            row = {"case": case, "tensors": count, "parameters": count * numel, "optimizer": name}
            row |= {"match": matches(make)} | timings({"ours": seconds[name], **rivals}, bars, floor)
            bench.add(row, "case", "optimizer")
    bench.write()


if __name__ == "__main__":
    main()
