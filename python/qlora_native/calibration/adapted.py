"""An adapter added to 4-bit weights whose scales stay, with their products with their inputs in mind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

import torch
from torch import Tensor

from qlora_native import _native, gguf_blocks, reference
from qlora_native.calibration.data import LENGTH, ROWS
from qlora_native.calibration.quantize import feedback_factor
from qlora_native.calibration.statistics import tiles
from qlora_native.weight import QuantizedWeight

DAMPING = 0.01
TOKENS = ROWS["wmse"] * LENGTH  # of the training rows that calibrate what ships
ELEMENTS = 1 << 22  # of a weight, that are in fp32 at a time
COLUMNS = 64  # that hand on their errors at once, where there is no kernel
SAMPLED_ROWS, SAMPLED = 256, 1 << 19  # of a weight, and elements at most, on which its gain is found
MOST_GAIN, BISECTIONS = 2.0**20, 8  # each rounds the sampled rows


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

    # C (H + damping) = E[(wanted - given) given^T], some rows of C at a time.
    def solve(begin: int, end: int) -> None:
        products = lost[:, begin:end].t() @ given / len(given)
        found[begin:end] = torch.cholesky_solve(products.t().double(), factor).t()

    list(pool.map(solve, *zip(*tiles(k), strict=True)))
    return found


@torch.no_grad()
def adapted_codes(
    weight: QuantizedWeight,
    a: Tensor,
    b: Tensor,
    scale: float,
    hessian: Tensor,
    correction: Tensor | None = None,
) -> Tensor:
    """Packed codes of W + (W + D) C + gain * D, D = scale * B A, with the error feedback of GPTQ under W's scales.

    A column that is rounded back hands on what it lacks to the later ones, so a change below half a step is not lost.
    What stays behind even so is made good by the gain: it is the least from 1 on with which outputs move along those of
    D as far as D moves them, <(W' - W - (W + D) C) H, D> = <D H, D>, found on rows spread over the weight. Without
    inputs, H is the identity and codes are the nearest ones.

    Args:
        weight: [N, K], of any type; of a GGUF type with its scales in its blocks, which stay too.
        a, b: fp32 [r, K] and [N, r].
        hessian: fp32 [K, K], the mean of x x^T over the inputs.
        correction: C of the inputs, fp32 [K, K]; None: zero.
    """
    n, k = weight.shape
    found = feedback_factor(hessian, DAMPING)
    if found is None:
        hessian = torch.eye(k, device=weight.device)
        correction = None
        found = hessian, torch.arange(k, device=weight.device), 0.0
    factor, order, _ = found

    def parts_of(part: QuantizedWeight, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        base = part.dequantize(torch.float32)
        change = scale * b[rows] @ a
        return base if correction is None else base.addmm(base + change, correction), change

    rows = sampled_rows(n, k) if k % weight.block_size == 0 else torch.arange(n)
    sample = _rows_of(weight, rows.to(weight.device))
    base, change = parts_of(sample, rows)
    pull = change @ hessian
    wanted = float((pull * change).sum(dtype=torch.float64))

    def is_reached(gain: float) -> bool:
        packed = _fed_back(base + gain * change, sample, factor, order)
        got = sample.with_packed(packed).dequantize(torch.float32)
        moved = (got - base) * pull
        return float(moved.sum(dtype=torch.float64)) >= wanted

    gain = least_gain(is_reached)
    done = 0
    packed = torch.empty_like(weight.packed).view(-1)
    # These rows end where a block does.
    step = max(1, ELEMENTS // max(1, weight.block_size * k)) * weight.block_size
    for first in range(0, n, step):
        part = weight.slice(first, min(first + step, n))
        base, change = parts_of(part, slice(first, first + step))
        codes = _fed_back(base + gain * change, part, factor, order).view(-1)
        packed[done : done + len(codes)] = codes
        done += len(codes)
    return packed.view_as(weight.packed)


def sampled_rows(n: int, k: int) -> Tensor:
    """Numbers of rows spread over a weight [N, K], int64."""
    count = max(1, min(SAMPLED_ROWS, SAMPLED // max(k, 1)))
    return torch.arange(0, n, -(-n // count))


def least_gain(is_reached: Callable[[float], bool]) -> float:
    """The least gain from 1 on that moves the weight far enough, by bisection; 1 if none up to MOST_GAIN does, as for a
    change beyond the range of the blocks."""
    high = 1.0
    while not is_reached(high):
        high *= 2
        if high > MOST_GAIN:
            return 1.0
    low = high / 2
    for _ in range(BISECTIONS if high > 1 else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if is_reached(middle) else (middle, high)
    return high


def _rows_of(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """These rows as a weight of their own; if rows are no whole blocks, all of them."""
    n, k = weight.shape
    packed = weight.packed
    scales = weight.absmax if weight.is_gguf else weight.scales()
    if len(rows) < n:
        packed = packed.view(n, -1)[rows]
        scales = scales if weight.is_gguf else scales.view(n, -1)[rows].flatten()
    arguments = weight.op_args()._replace(
        packed=packed.reshape(-1), absmax=scales, shape=[len(rows), k]
    )
    return weight.with_arguments(arguments._replace(nested_absmax=None, nested_offset=None))


def _fed_back(target: Tensor, weight: QuantizedWeight, factor: Tensor, order: Tensor) -> Tensor:
    """Packed codes of ``target`` [n, K] under the scales of ``weight``, as the op ``gptq_4bit`` finds them; of other
    levels than the kernel's in plain torch, ``COLUMNS`` at a time."""
    number = weight.op_args().quant_type
    if not weight.is_gguf and weight.code is None:
        packed: Tensor = torch.ops.qlora_native.gptq_4bit(
            target, factor, order, weight.scales(), number, weight.block_size
        )
        return packed
    if weight.is_gguf:
        blocks = weight.packed.view(-1, _native.GGUF_BLOCKS[number][1])
        scales, added = gguf_blocks.scales(blocks, number)
        if added is not None:
            target = target - gguf_blocks.spread(added, number).view_as(target)
        scales = gguf_blocks.spread(scales, number).view_as(target)
        codes = _codes(target, scales, gguf_blocks.levels(number), factor, order)
        return gguf_blocks.with_codes(blocks, codes.view(len(blocks), -1), number).view(-1)
    assert weight.code is not None
    levels, numbers = weight.code.sort()
    scales = weight.scales().repeat_interleave(weight.block_size)[: target.numel()].view_as(target)
    codes = _codes(target, scales, levels, factor, order)
    return reference.pack(numbers.to(torch.uint8)[codes.int()], number)


def _codes(target: Tensor, scales: Tensor, levels: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """Numbers of levels, uint8 [n, K], for ``target`` and the ``scales`` of its elements, fp32 [n, K]."""
    weight = target.t()[order]
    scales = scales.t()[order]
    levels = levels.to(target.device)
    inverse = reference.reciprocals(scales)
    target = weight.clone()
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    for begin in range(0, len(target), COLUMNS):
        end = min(begin + COLUMNS, len(target))
        errors = torch.empty_like(target[begin:end])
        for i in range(begin, end):
            code = codes[order[i]] = gguf_blocks.nearest_codes(target[i] * inverse[i], levels)
            error = errors[i - begin] = weight[i] - levels[code.int()] * scales[i]
            target[i + 1 : end].addr_(factor[i, i + 1 : end], error)
        target[end:].addmm_(factor[begin:end, end:].t(), errors)
    return codes.t().contiguous()
