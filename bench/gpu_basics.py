"""Each op once on tiny shapes against the CPU: bytes where the rule is exact.

The first thing to run on a card, and what compute-sanitizer looks at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from cases import GGUF_TYPES
from common import relative_error
from gpu_models import made_up_blocks
from gpu_timing import Case, Context, device, half, wait
from torch import Tensor

import qlora_native as qn
from qlora_native.ops import _cuda_products

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (0, 1, 3, 16, 20, 40, 130)  # of every tile: up to 16, 32, 64 and 128 rows
N, K = 192, 256
TOLERANCE = 1e-2


def run(context: Context) -> None:
    """One row an op and dtype; for products with every number of tokens, with and without an adapter."""
    checks: dict[str, Callable[[], bool]] = {"decode": decode, "loss": loss, "norms": norms}
    checks["products of blocks"] = products_of_blocks
    for rule, bits in itertools.product(("AdamW", "Lion"), (32, 8)):
        checks[f"{rule} {bits} bits"] = lambda rule=rule, bits=bits: optimizer(rule, bits)  # type: ignore[misc]
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        checks[f"quantize {name}"] = lambda dtype=dtype: quantize(dtype)  # type: ignore[misc]
        checks[f"products {name}"] = lambda dtype=dtype: products(dtype)  # type: ignore[misc]
    for name, check in checks.items():
        context.row(Case("basics", form=name), lambda check=check: {"match": check()})  # type: ignore[misc]
    wait()


def _same(here: Tensor, there: Tensor) -> bool:
    return torch.equal(here.detach().cpu(), there.detach())


def quantize(dtype: torch.dtype) -> bool:
    """Codes and scales, of whole blocks and of a tail, are the CPU's bytes."""
    same = []
    for shape, double in itertools.product(((N, K), (5, 127)), (True, False)):
        t = torch.randn(shape, device=device()).to(dtype)
        here, there = (qn.quantize(source, double_quant=double) for source in (t, t.cpu()))
        same += [_same(here.packed, there.packed), _same(here.absmax, there.absmax)]
    return all(same)


def decode() -> bool:
    """Dequantized weights are the CPU's bytes, in each dtype."""
    weights = [qn.quantize(torch.randn(n, k), double_quant=double) for n, k, double in ((N, K, True), (5, 127, False))]
    weights += [made_up_blocks(quant_type, N, K).to("cpu") for quant_type in GGUF_TYPES]
    return all(
        _same(w.to(device()).dequantize(dtype), w.dequantize(dtype)) for w, dtype in itertools.product(weights, DTYPES)
    )


def products(dtype: torch.dtype) -> bool:
    """Forward and all gradients against fp32 products on the CPU, by the fused kernels where there are some."""
    w = qn.quantize(torch.randn(N, K, device=device()) / K**0.5)
    dense = w.to("cpu").dequantize(torch.float32)
    errors = [0.0]
    for m, always_fused in itertools.product(TOKENS, (False, True)):
        made = [torch.randn(s) for s in ((m, K), (8, K), (N, 8), (N,), (m, N))]
        x, a, b, bias, grad = (t.to(dtype) if number in (0, 3, 4) else t for number, t in enumerate(made))
        ours = [t.to(device()).requires_grad_() for t in (x, a, b, bias)]
        with patch.object(_cuda_products, "plan_of", partial(_cuda_products.plan_of, always_fused=always_fused)):
            y = qn.lora_linear(ours[0], w, ours[1], ours[2], 2.0, bias=ours[3])
            z = qn.linear(ours[0], w)
            grads = torch.autograd.grad(y, ours, grad.to(device()), retain_graph=True)
            plain = torch.autograd.grad(z, ours[0], grad.to(device()))
        exact = [t.detach().float().requires_grad_() for t in (x, a.to(dtype), b.to(dtype), bias)]
        want_z = exact[0] @ dense.t()
        want_y = want_z + 2.0 * (exact[0] @ exact[1].t()) @ exact[2].t() + exact[3]
        want = torch.autograd.grad(want_y, exact, grad.float(), retain_graph=True)
        want_plain = torch.autograd.grad(want_z, exact[0], grad.float())
        pairs = zip((y, z, *grads, *plain), (want_y, want_z, *want, *want_plain), strict=True)
        errors += [relative_error(got.detach().cpu(), there.detach()) for got, there in pairs if m and there.numel()]
    return max(errors) < TOLERANCE


def products_of_blocks() -> bool:
    """Forward by the fused kernels of every GGUF format against fp32 products on the CPU."""
    errors = []
    for quant_type, m, dtype in itertools.product(GGUF_TYPES, (1, 9, 16), (half(), torch.float16)):
        w, x = made_up_blocks(quant_type, N, K), (torch.randn(m, K) / K).to(dtype)
        want = x.float() @ w.to("cpu").dequantize(torch.float32).t()
        errors.append(relative_error(qn.linear(x.to(device()), w).cpu(), want))
    return max(errors) < TOLERANCE


def loss() -> bool:
    """Loss and gradient for a dense and a 4-bit head, some labels ignored, against torch's on the CPU."""
    head, h = torch.randn(101, 64) / 8, torch.randn(33, 64)
    labels = torch.where(torch.arange(33) % 5 == 0, -100, torch.arange(33))
    errors = []
    for dtype, quantized in itertools.product((half(), torch.float16, torch.float32), (False, True)):
        here = h.to(device(), dtype).requires_grad_()
        weight: Any = qn.quantize(head.to(device())) if quantized else head.to(device(), dtype)
        got = qn.linear_cross_entropy(here, weight, labels.to(device()))
        wide = (weight.dequantize(dtype) if quantized else weight).float().cpu()
        there = h.to(dtype).float().requires_grad_()
        want = F.cross_entropy(there @ wide.t(), labels)
        grads = torch.autograd.grad(got, here)[0], torch.autograd.grad(want, there)[0]
        errors += [abs(float(got.detach()) - float(want.detach())), relative_error(grads[0].cpu(), grads[1])]
    return max(errors) < 2 * TOLERANCE


def norms() -> bool:
    """RMSNorm, SwiGLU and rotation, forward and backward, against the CPU's ops."""
    ops = torch.ops.qlora_native
    x, other, grad = (torch.randn(2, 3, 8, 64).to(half()) for _ in range(3))
    weight, angles = torch.randn(64).to(half()), torch.randn(2, 1, 8, 64).to(half())

    def every(place: torch.device) -> list[Tensor]:
        p, q, g = (t.to(place).requires_grad_() for t in (x, other, grad))
        made = [ops.rms_norm(p, weight.to(place), 1e-6)[0], ops.swiglu(p, q), ops.rotary(p, *angles.to(place), False)]
        grads = [torch.autograd.grad(y, p, g)[0] for y in made]
        return [t.detach().cpu() for t in (*made, *grads)]

    pairs = zip(every(device()), every(torch.device("cpu")), strict=True)
    return max(relative_error(here, there) for here, there in pairs) < TOLERANCE


def optimizer(rule: str, bits: int) -> bool:
    """Two clipped steps give the CPU's bytes."""
    start = [torch.randn(5000), torch.randn(40, 33)]
    grads = [torch.randn_like(t) for t in start]
    found = []
    for place in (device(), torch.device("cpu")):
        parameters = [torch.nn.Parameter(t.to(place)) for t in start]
        stepper = getattr(qn.optim, rule)(parameters, lr=1e-3, bits=bits, max_norm=1.0)
        for _ in range(2):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.to(place)
            stepper.step()
        found.append(parameters)
    return all(_same(here, there) for here, there in zip(*found, strict=True))
