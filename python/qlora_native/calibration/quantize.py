"""Quantize one weight by a calibrated method, from statistics of its inputs."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, local

import torch
from torch import Tensor

from qlora_native import _native, reference
from qlora_native._native import quant_type_number
from qlora_native.weight import METHODS, QuantizedWeight, quantize

# Scales are searched between these shares of a block's largest magnitude: below 1 large elements are clipped, above 1
# the largest comes to lie at an inner level. Trying all 256 stored scales gained 0.1 % at most (SmolLM2-135M).
SEARCH_LOW = 0.375
SEARCH_HIGH = 2.0
# The shares that are tried where any fp32 scale can be stored, exact in fp32, and coarser ones that span the range of
# the double quantization, within which the stored scales are then tried.
SHARES = tuple(i / 64 for i in range(24, 129))
COARSE_SHARES = SHARES[::8]
ERROR_PART = 1 << 18  # elements whose errors are in memory at once
# GPTQ's damping is raised tenfold up to here: a matrix that is no sum of squares stays indefinite beyond it.
LAST_DAMPING = 100.0
FIRST_RAISE = 1e-4
ROWS = 64  # of a hessian, copied at a time

_one_at_a_time = Lock()
# What this thread factorized last, while that hessian lives: q, k and v share their inputs.
_last = local()

Factor = tuple[Tensor, Tensor, float]
Form = tuple[str, int, bool]  # quant_type, block_size, double_quant


@dataclass(frozen=True)
class CalibrationReport:
    """The method and the errors of a calibrated quantization.

    Attributes:
        method: the method whose codes were kept; "rtn" after a fallback.
        rtn_error: squared error of plain rounding, weighted as ``error`` is.
        error: the result's. With a hessian H: trace((W - W') H (W - W')^T); with channel moments m alone:
            sum m_k (w - w')^2; without either, sum (w - w')^2.
        damping: share of the mean of H's diagonal that was added to it ("gptq"), else None.
        fallback: why the weight was rounded plainly instead, else None.
    """

    method: str
    rtn_error: float
    error: float
    damping: float | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class CalibratedWeight:
    """A quantized weight and its report."""

    weight: QuantizedWeight
    report: CalibrationReport


@torch.no_grad()
def quantize_calibrated(
    weight: Tensor,
    method: str,
    *,
    moment: Tensor | None = None,
    hessian: Tensor | None = None,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    damping: float = 0.01,
) -> CalibratedWeight:
    """Quantize a matrix to 4 bits with a small error of its products with its inputs.

    Methods: ``rtn`` rounds to the nearest level (:func:`qlora_native.quantize`: bitsandbytes' codes); ``wmse`` chooses
    each block's scale, sign included, among those that the format can store by the squared error weighted with the
    inputs' second moments; ``gptq`` keeps the scales of ``wmse`` and compensates each column's error in the later ones,
    largest moment first.

    The format is the same for all, that of bitsandbytes' checkpoints. On CPU the bytes do not depend on the number of
    threads or the instruction set. CUDA tensors stay on their device (plain torch, slower).

    A result that is no better than plain rounding in the error it minimizes, or statistics of no input at all, fall
    back to ``rtn``; the report has the reason.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        method: one of :data:`METHODS`.
        moment: fp32 [K], E[x_k^2] of the inputs, to a common factor. ``wmse`` needs it or ``hessian``; where there is
            a hessian, its diagonal is used.
        hessian: fp32 or fp64 [K, K], sum or mean of x x^T over the tokens. ``gptq`` needs it.
        quant_type: "nf4" or "fp4". The levels of FP4 are symmetric: its scales stay positive.
        block_size: elements a scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        damping: share of the mean of the hessian's diagonal that is added to it; raised tenfold until the matrix is
            positive definite.

    Raises:
        ValueError: a wrong shape, dtype, method or device; statistics that are missing, negative, asymmetric or not
            finite; a non-finite weight.

    Source: Dettmers et al., "QLoRA", 2023 (format); Frantar et al., "GPTQ", 2022.
    """
    _check(weight, method, moment, hessian, damping)
    form = quant_type, block_size, double_quant
    plain = quantize(weight, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    measure = moment if hessian is None else hessian
    rtn_error = weighted_error(weight, plain, measure)

    def fall_back(reason: str, used: float | None = None) -> CalibratedWeight:
        return CalibratedWeight(plain, CalibrationReport("rtn", rtn_error, rtn_error, used, reason))

    if method == "rtn" or weight.numel() == 0:
        return CalibratedWeight(plain, CalibrationReport("rtn", rtn_error, rtn_error))
    # This is the metric in which the method is to be better than rtn.
    metric = measure if hessian is None else torch.diagonal(hessian)
    assert metric is not None  # as _check made sure
    if not bool((metric > 0).any()):
        return fall_back("the inputs' second moments are all zero: no token reached this weight")
    result = _searched(weight, _near_one(metric), form)
    used = None
    if method == "gptq" and hessian is not None:
        found = feedback_factor(hessian, damping)
        if found is None:
            return fall_back(
                f"the hessian is not positive definite, not even with {LAST_DAMPING:g} of its mean added"
            )
        factor, order, used = found
        number = quant_type_number(quant_type)
        packed = torch.ops.qlora_native.gptq_4bit(
            weight, factor, order, result.scales(), number, block_size
        )
        result = _replaced(result, packed, result.absmax)
        metric = hessian
    error = weighted_error(weight, result, metric)
    of_rtn = rtn_error if metric is measure else weighted_error(weight, plain, metric)
    if not error <= of_rtn:  # NaN too, where the errors overflow
        return fall_back(
            f"{method} has a weighted squared error of {error:.4g}, rtn of {of_rtn:.4g}", used
        )
    error = error if metric is measure else weighted_error(weight, result, measure)
    return CalibratedWeight(result, CalibrationReport(method, rtn_error, error, used))


def weighted_error(weight: Tensor, result: QuantizedWeight, measure: Tensor | None) -> float:
    """Squared error of a quantized matrix [N, K], summed in fp64: plain (``measure`` is None), or weighted with the
    second moments [K] or the hessian [K, K] of the inputs."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    block = result.block_size
    width = max(weight.shape[1], 1)
    count = len(weight)
    metric = None if measure is None else measure.float()
    aligned = block // math.gcd(block, width)  # rows that fill whole blocks
    rows = aligned * max(1, ERROR_PART // (width * aligned))
    with on_one_thread():  # which method is kept depends on the sum
        for begin in range(0, count, rows):
            part = result.slice(begin, min(begin + rows, count))
            error = weight[begin : begin + rows].float() - part.dequantize(torch.float32)
            weighted = (
                error if metric is None else error * metric if metric.dim() == 1 else error @ metric
            )
            total += (error * weighted).sum(dtype=torch.float64)
    return float(total)


def _check(
    weight: Tensor, method: str, moment: Tensor | None, hessian: Tensor | None, damping: float
) -> None:
    def error(problem: str) -> ValueError:
        return ValueError(f"quantize_calibrated: {problem}.")

    if method not in METHODS:
        raise error(f"method is {method!r}: expected one of {', '.join(METHODS)}")
    if weight.dim() != 2:
        raise error(f"weight is {list(weight.shape)}: expected two dimensions, [N, K]")
    if not 0 <= damping < math.inf:
        raise error(f"damping is {damping}: expected a finite number, 0 or more")
    if method == "gptq" and hessian is None:
        raise error("method 'gptq' needs the hessian of the weight's inputs, [K, K]")
    if method == "wmse" and moment is None and hessian is None:
        raise error("method 'wmse' needs the second moments of the weight's inputs, [K]")
    k = weight.shape[1]
    for name, tensor, shape in (("moment", moment, [k]), ("hessian", hessian, [k, k])):
        if tensor is None:
            continue
        if list(tensor.shape) != shape or tensor.dtype not in (torch.float32, torch.float64):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise error(
                f"{name} is {found}: expected float32 {shape} for a weight {list(weight.shape)}"
            )
        if tensor.device != weight.device:
            raise error(
                f"{name} is on {tensor.device}, the weight on {weight.device}: move one of them"
            )
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            place = (~finite).nonzero()[0].tolist()
            raise error(
                f"element {place} of the {name} is {float(tensor[tuple(place)])}: the statistics of the inputs must be "
                "finite. Was the model run in float16? Use bfloat16 or float32"
            )
        diagonal = tensor if tensor.dim() == 1 else torch.diagonal(tensor)
        if bool((diagonal < 0).any()):
            at = int((diagonal < 0).nonzero()[0])
            raise error(
                f"the second moment of channel {at} is {float(diagonal[at])}: expected 0 or more"
            )
        if tensor.dim() == 2 and k:
            apart = float((tensor - tensor.t()).abs().max())
            largest = float(diagonal.max())
            if apart > 1e-3 * largest:
                raise error(
                    f"the hessian differs from its transpose by {apart:.3g}, its largest diagonal element is "
                    f"{largest:.3g}: expected a symmetric matrix, the sum or mean of x x^T"
                )


def _near_one(moment: Tensor) -> Tensor:
    """The moments over a power of two near the largest, fp32: exact, and their products do not overflow."""
    _, exponent = torch.frexp(moment.max().double())
    return torch.ldexp(moment.double(), -exponent).float().contiguous()


def _search(
    weight: Tensor, moment: Tensor, form: Form, table: Tensor, *scales: Tensor | int
) -> tuple[Tensor, Tensor]:
    settings = SEARCH_LOW, SEARCH_HIGH, quant_type_number(form[0]), form[1]
    found: tuple[Tensor, Tensor] = torch.ops.qlora_native.search_scales_4bit(
        weight, moment, table.to(weight.device), *scales, *settings
    )
    return found


def _searched(weight: Tensor, moment: Tensor, form: Form) -> QuantizedWeight:
    """The scales of the least weighted error among those that the format can store."""
    quant_type, block_size, double_quant = form
    # The code of a block's largest magnitude, in NF4 of either sign.
    shares = COARSE_SHARES if double_quant else SHARES
    plain = quantize(weight, quant_type=quant_type, block_size=block_size, double_quant=False)
    table = torch.tensor([*shares, *(-share for share in shares)] if quant_type == "nf4" else shares)
    whole = torch.full_like(plain.absmax, shares.index(1.0), dtype=torch.uint8)
    nothing = plain.absmax.new_zeros(())
    packed, chosen = _search(weight, moment, form, table, plain.absmax, nothing, whole, 1)
    result = _replaced(plain, packed, table.to(weight.device)[chosen.long()] * plain.absmax)
    if not double_quant:
        return result
    codes, nested_absmax, nested_offset = reference.quantize_scales(result.absmax)
    result.nested_absmax, result.nested_offset = nested_absmax, nested_offset
    place = nested_absmax, nested_offset, codes, reference.NESTED_BLOCK
    return _replaced(result, *_search(weight, moment, form, _native.nested_code(), *place))


def _replaced(w: QuantizedWeight, packed: Tensor, absmax: Tensor) -> QuantizedWeight:
    result = copy.copy(w)
    result.packed, result.absmax = packed, absmax
    return result


# ---- GPTQ's feedback


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for torch's ops."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """One thread for LAPACK and sums, whose rounding depends on their number; one caller at a time."""
    with _one_at_a_time, torch_threads(1):
        yield


def feedback_factor(hessian: Tensor, damping: float) -> Factor | None:
    """Arguments of the op ``gptq_4bit``: factor fp32 [K, K], order int64 [K], and the damping that was needed.

    Columns go by falling second moment, equal ones by index. In that order, damped by ``damping`` times the mean of
    its diagonal, H = R R^T with R upper triangular, and factor[i, j] = R[i, j] / R[j, j]. If there is no such R, the
    damping is raised tenfold until there is; None if that does not help. Factorized in fp64. The diagonal of the
    hessian, fp32 or fp64 [K, K], is not negative and not all zero.
    """
    if hessian.is_inference():  # has no version counter
        return _factorized(hessian, damping)
    memo = _last.__dict__
    source, *key = memo.get("key", (None,))
    if source is None or source() is not hessian or key != [hessian._version, damping]:
        memo.clear()
        memo["factor"] = _factorized(hessian, damping)
        memo["key"] = weakref.ref(hessian, lambda _: memo.clear()), hessian._version, damping
    factor: Factor | None = memo["factor"]
    return factor


def _factorized(hessian: Tensor, damping: float) -> Factor | None:
    diagonal = torch.diagonal(hessian).double()
    order = torch.argsort(diagonal, descending=True, stable=True)
    mean = math.fsum(diagonal.tolist()) / diagonal.numel()
    with on_one_thread():  # and one matrix at a time: it is the largest tensor of a calibration
        columns = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
        while damping <= LAST_DAMPING:
            # LAPACK's factor is lower triangular.
            _fill(columns, hessian, order.flip(0), mean, damping)
            transposed = columns.t()  # LAPACK's own layout, so that nothing is copied
            failed = torch.empty((), dtype=torch.int32, device=hessian.device)
            torch.linalg.cholesky_ex(transposed, upper=True, out=(transposed, failed))
            if int(failed) == 0 and bool(torch.isfinite(columns.sum())):
                return _over_diagonal(columns), order, damping
            damping = max(10 * damping, FIRST_RAISE)
    return None


def _fill(target: Tensor, hessian: Tensor, order: Tensor, mean: float, damping: float) -> None:
    """The damped hessian in that order over its mean, so that products of moments neither underflow nor overflow."""
    for begin in range(0, len(order), ROWS):
        rows = order[begin : begin + ROWS]
        target[begin : begin + ROWS] = hessian[rows].index_select(1, order)
    target.div_(mean)
    torch.diagonal(target).add_(damping)


def _over_diagonal(lower: Tensor) -> Tensor:
    """The factor, fp32 [K, K], of the reversed columns' one, fp64 [K, K], in the first half of whose memory it lies."""
    size = len(lower)
    factor = lower.view(-1).view(torch.float32)[: size * size].view(size, size)
    flat = lower.view(-1)
    count = len(flat)
    # Both axes reversed: elements from the two ends change places.
    for begin in range(0, count // 2, ROWS * size):
        end = min(begin + ROWS * size, count // 2)
        first = flat[begin:end].flip(0)
        flat[begin:end] = flat[count - end : count - begin].flip(0)
        flat[count - end : count - begin] = first
    diagonal = torch.diagonal(lower).clone()
    # A row of the factor never lies behind the row that it is made of.
    for begin in range(0, size, ROWS):
        factor[begin : begin + ROWS] = lower[begin : begin + ROWS] / diagonal
    return factor
