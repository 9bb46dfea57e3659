"""An adapter added to 4-bit weights whose scales stay, with their products with their inputs in mind."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

from qlora_native.calibration.data import LENGTH, ROWS
from qlora_native.calibration.quantize import feedback_factor
from qlora_native.calibration.statistics import tiles
from qlora_native.lora.shipped import least_gain, sampled_rows
from qlora_native.ops.requantize_4bit import ELEMENTS
from qlora_native.weight import QuantizedWeight, quant_type_number

DAMPING = 0.01
TOKENS = ROWS["wmse"] * LENGTH  # of the training rows that calibrate what ships
BISECTIONS = 8  # each rounds the sampled rows


def correction(hessian: Tensor, wanted: Tensor, given: Tensor, pool: Executor) -> Tensor | None:
    """C [K, K], fp32, with which W (I + C) makes of ``given`` [..., K] what W makes of ``wanted``, by least squares.

    Damped as error feedback is; None if the system cannot be solved.

    ``hessian`` is the mean of x x^T over what is given.
    """
    k = len(hessian)
    damped = hessian.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    given = given.reshape(-1, k).float()
    lost = wanted.reshape(-1, k).float() - given
    found = torch.empty_like(hessian)

    def solve(begin: int, end: int) -> None:
        products = lost[:, begin:end].t() @ given / len(given)
        found[begin:end] = torch.cholesky_solve(products.t().double(), factor).t()

    list(pool.map(solve, *zip(*tiles(k), strict=True)))
    return found


@torch.no_grad()
def adapted_codes(
    weight: QuantizedWeight, a: Tensor, b: Tensor, scale: float, hessian: Tensor, correction: Tensor | None = None
) -> Tensor:
    """Packed codes of W + (W + D) C + gain * D, D = scale * B A, with the error feedback of GPTQ under W's scales.

    A column that is rounded back hands on what it lacks to the later ones, so a change below half a step is not lost.
    What stays behind even so is made good by the gain: it is the least from 1 on with which outputs move along those of
    D as far as D moves them, <(W' - W - (W + D) C) H, D> = <D H, D>, found on rows spread over the weight.

    Args:
        weight: nf4 or fp4 [N, K].
        a, b: fp32 [r, K] and [N, r].
        hessian: fp32 [K, K], the mean of x x^T over the inputs.
        correction: C of the inputs, fp32 [K, K]; None: zero.
    """
    n, k = weight.shape
    found = feedback_factor(hessian, DAMPING)
    if found is None or weight.code is not None:  # no input, or other levels than the kernel's: to nearest
        nearest: Tensor = torch.ops.qlora_native.requantize_4bit(a, b, scale, *weight.op_args())
        return nearest
    factor, order, _ = found
    number, block = quant_type_number(weight.quant_type), weight.block_size
    kind: Any = {"dtype": torch.float32, "quant_type": weight.quant_type, "block_size": block}
    scales = weight.scales()

    def rounded(base: Tensor, change: Tensor, scales: Tensor, gain: float) -> Tensor:
        packed: Tensor = torch.ops.qlora_native.gptq_4bit(base + gain * change, factor, order, scales, number, block)
        return packed

    def parts_of(base: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        change = scale * b[rows] @ a
        return base if correction is None else base.addmm(base + change, correction), change

    rows = sampled_rows(n, k) if k % block == 0 else torch.arange(n)
    base, change = parts_of(weight.dequantize(torch.float32)[rows], rows)
    of_rows = scales.view(n, -1)[rows].flatten() if k % block == 0 else scales
    pull = change @ hessian
    wanted = float((pull * change).sum(dtype=torch.float64))

    def is_reached(gain: float) -> bool:
        packed = rounded(base, change, of_rows, gain)
        got = QuantizedWeight(packed, of_rows, shape=(len(rows), k), **kind)
        return float(((got.dequantize(torch.float32) - base) * pull).sum(dtype=torch.float64)) >= wanted

    gain = least_gain(is_reached, BISECTIONS)
    packed = torch.empty_like(weight.packed)
    step = max(1, ELEMENTS // max(1, block * k)) * block  # rows that end where a block does
    for first in range(0, n, step):
        part = weight.slice(first, min(first + step, n))
        target = parts_of(part.dequantize(torch.float32), slice(first, first + step))
        codes = rounded(*target, part.scales(), gain)
        packed.view(-1)[first * k // 2 : first * k // 2 + codes.numel()] = codes
    return packed
