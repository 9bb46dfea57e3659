"""One weight by one of the calibrated methods: the arithmetic, without the model around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from qlora_native import _native, reference
from qlora_native.calibration.feedback import LAST_DAMPING, feedback_factor, on_one_thread
from qlora_native.weight import QuantizedWeight, quant_type_number, quantize

METHODS = ("rtn", "rtn_signed", "wmse", "gptq")

# Scales are looked for between these shares of a block's largest magnitude: below 1 large elements are clipped, above
# 1 the largest comes to lie at an inner level. Looking at all 256 stored scales gained 0.1 % at most (SmolLM2-135M).
SEARCH_LOW, SEARCH_HIGH = 0.375, 2.0
# The shares that are tried where any fp32 scale can be stored, exact in fp32, and coarser those that lay out the range
# of the double quantization, within which the stored scales are then tried.
SHARES = tuple(i / 64 for i in range(24, 129))
COARSE_SHARES = SHARES[::8]
ERROR_PART = 1 << 18  # elements whose errors are in memory at once


class Form(NamedTuple):
    """How a weight is stored."""

    quant_type: str
    block_size: int
    double_quant: bool


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibrated quantization did.

    Attributes:
        method: the method whose codes were kept; "rtn" after a fallback.
        rtn_error: squared error of plain rounding, weighted as ``error`` is.
        error: the result's. With a hessian H: trace((W - W') H (W - W')^T); with channel moments m alone:
            sum m_k (w - w')^2; without statistics: sum (w - w')^2.
        damping: share of the mean of H's diagonal that was added to it ("gptq"), else None.
        fallback: why the weight was rounded plainly although another method was asked for, else None.
    """

    method: str
    rtn_error: float
    error: float
    damping: float | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class CalibratedWeight:
    """A quantized weight, and the report on it."""

    weight: QuantizedWeight
    report: CalibrationReport


@torch.no_grad()
def quantize_calibrated(
    weight: torch.Tensor,
    method: str,
    *,
    moment: torch.Tensor | None = None,
    hessian: torch.Tensor | None = None,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    damping: float = 0.01,
) -> CalibratedWeight:
    """Quantize a matrix to 4 bits so that its products with the inputs it will meet lose little.

    Methods: ``rtn`` rounds to the nearest level (:func:`qlora_native.quantize`: bitsandbytes' codes); ``rtn_signed``
    also chooses the sign of each block's scale by the squared error; ``wmse`` chooses each block's scale, sign
    included, among those that the format can store by the squared error weighted with the inputs' second moments;
    ``gptq`` keeps the scales of ``wmse`` and hands each column's error on to the later ones, largest moment first.

    The format is the same for all: a reader of bitsandbytes' checkpoints decodes the result. On CPU the bytes do not
    depend on the number of threads or the instruction set. CUDA tensors stay on their device (plain torch, slower).

    A result that is no better than plain rounding in the error it minimizes, or statistics of no input at all, fall
    back to ``rtn``, and the report says so.

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
    form = Form(quant_type, block_size, double_quant)
    plain = quantize(weight, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    measure = moment if hessian is None else hessian
    rtn_error = weighted_error(weight, plain, measure)

    def fall_back(reason: str, used: float | None = None) -> CalibratedWeight:
        return CalibratedWeight(plain, CalibrationReport("rtn", rtn_error, rtn_error, used, reason))

    if method == "rtn" or weight.numel() == 0:
        return CalibratedWeight(plain, CalibrationReport("rtn", rtn_error, rtn_error))
    moments = measure if hessian is None else torch.diagonal(hessian)
    used, metric = None, None if method == "rtn_signed" else moments  # in which the method is to be better than rtn
    if metric is None or moments is None:
        result = _signed(weight, torch.ones(weight.shape[1], device=weight.device), form, (1.0,))
    elif not bool((moments > 0).any()):
        return fall_back("the inputs' second moments are all zero: no token reached this weight")
    else:
        result = _searched(weight, _near_one(moments), form)
    if method == "gptq" and hessian is not None:
        found = feedback_factor(hessian, damping)
        if found is None:
            return fall_back(f"the hessian is not positive definite, not even with {LAST_DAMPING:g} of its mean added")
        factor, order, used = found
        number = quant_type_number(quant_type)
        packed = torch.ops.qlora_native.gptq_4bit(weight, factor, order, result.scales(), number, block_size)
        result, metric = _replaced(result, packed), hessian
    error = weighted_error(weight, result, metric)
    of_rtn = rtn_error if metric is measure else weighted_error(weight, plain, metric)
    if not error <= of_rtn:  # NaN too, where the errors overflow
        return fall_back(f"{method} has a weighted squared error of {error:.4g}, rtn of {of_rtn:.4g}", used)
    error = error if metric is measure else weighted_error(weight, result, measure)
    return CalibratedWeight(result, CalibrationReport(method, rtn_error, error, used))


def weighted_error(weight: torch.Tensor, result: QuantizedWeight, measure: torch.Tensor | None) -> float:
    """Squared error of a quantized matrix [N, K], summed in fp64.

    ``measure`` is None (plain), [K] (second moments of the inputs) or [K, K] (their hessian).
    """
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    scales, block, width = result.scales(), result.block_size, max(weight.shape[1], 1)
    metric = None if measure is None else measure.float()
    aligned = block // math.gcd(block, width)  # rows that fill whole blocks
    rows = aligned * max(1, ERROR_PART // (width * aligned))
    with on_one_thread():  # what is kept depends on it
        for begin in range(0, weight.shape[0], rows):
            whole = weight[begin : begin + rows]
            first, last = begin * width, begin * width + whole.numel()
            part = QuantizedWeight(
                result.packed[first // 2 : (last + 1) // 2],
                scales[first // block : -(-last // block)],
                shape=whole.shape,
                dtype=torch.float32,
                quant_type=result.quant_type,
                block_size=block,
            )
            error = whole.float() - part.dequantize()
            if metric is None:
                other = error
            else:
                other = error * metric if metric.dim() == 1 else error @ metric
            total += (error * other).sum(dtype=torch.float64)
    return float(total)


def _check(
    weight: torch.Tensor, method: str, moment: torch.Tensor | None, hessian: torch.Tensor | None, damping: float
) -> None:
    if method not in METHODS:
        raise ValueError(f"quantize_calibrated: method is {method!r}: expected one of {', '.join(METHODS)}.")
    if weight.dim() != 2:
        raise ValueError(f"quantize_calibrated: weight is {list(weight.shape)}: expected two dimensions, [N, K].")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"quantize_calibrated: damping is {damping}: expected a finite number, 0 or more.")
    if method == "gptq" and hessian is None:
        raise ValueError("quantize_calibrated: method 'gptq' needs the hessian of the weight's inputs, [K, K].")
    if method == "wmse" and moment is None and hessian is None:
        raise ValueError("quantize_calibrated: method 'wmse' needs the second moments of the weight's inputs, [K].")
    k = weight.shape[1]
    for name, tensor, shape in (("moment", moment, [k]), ("hessian", hessian, [k, k])):
        if tensor is None:
            continue
        if list(tensor.shape) != shape or tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"quantize_calibrated: {name} is {tensor.dtype} {list(tensor.shape)}: expected float32 {shape} for a "
                f"weight {list(weight.shape)}."
            )
        if tensor.device != weight.device:
            raise ValueError(
                f"quantize_calibrated: {name} is on {tensor.device}, the weight on {weight.device}: move one of them."
            )
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            at = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"quantize_calibrated: element {at} of the {name} is {float(tensor[tuple(at)])}: the statistics of the "
                "inputs must be finite. Was the model run in float16? Use bfloat16 or float32."
            )
        diagonal = tensor if tensor.dim() == 1 else torch.diagonal(tensor)
        if bool((diagonal < 0).any()):
            at = (diagonal < 0).nonzero()[0].tolist()
            raise ValueError(
                f"quantize_calibrated: the second moment of channel {at[0]} is {float(diagonal[at[0]])}: expected 0 or "
                "more."
            )
        if tensor.dim() == 2 and k:
            apart, largest = float((tensor - tensor.t()).abs().max()), float(diagonal.max())
            if apart > 1e-3 * largest:
                raise ValueError(
                    f"quantize_calibrated: the hessian differs from its transpose by {apart:.3g}, its largest diagonal "
                    f"element is {largest:.3g}: expected a symmetric matrix, the sum or mean of x x^T."
                )


def _near_one(moment: torch.Tensor) -> torch.Tensor:
    """The moments over a power of two near the largest, fp32: exact, and their products do not overflow."""
    _, exponent = torch.frexp(moment.max().double())
    return torch.ldexp(moment.double(), -exponent).float().contiguous()


def _search(
    weight: torch.Tensor,
    moment: torch.Tensor,
    form: Form,
    table: torch.Tensor,
    multiplier: torch.Tensor,
    offset: torch.Tensor,
    initial: torch.Tensor,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    settings = SEARCH_LOW, SEARCH_HIGH, quant_type_number(form.quant_type), form.block_size
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.qlora_native.search_scales_4bit(
        weight, moment, table.to(weight.device), multiplier, offset, initial, group, *settings
    )
    return found


def _signed(weight: torch.Tensor, moment: torch.Tensor, form: Form, shares: tuple[float, ...]) -> QuantizedWeight:
    """The scale of each block the best of those shares of its largest magnitude, of either sign."""
    plain = quantize(weight, quant_type=form.quant_type, block_size=form.block_size, double_quant=False)
    table = torch.tensor([*shares, *(-share for share in shares)] if form.quant_type == "nf4" else shares)
    whole = torch.full_like(plain.absmax, shares.index(1.0), dtype=torch.uint8)
    nothing = plain.absmax.new_zeros(())
    packed, chosen = _search(weight, moment, form, table, plain.absmax, nothing, whole, 1)
    signed = _replaced(plain, packed, table.to(weight.device)[chosen.long()] * plain.absmax)
    if form.double_quant:
        signed.absmax, signed.nested_absmax, signed.nested_offset = reference.quantize_scales(signed.absmax)
    return signed


def _searched(weight: torch.Tensor, moment: torch.Tensor, form: Form) -> QuantizedWeight:
    """The scales of the least weighted error among those that can be stored."""
    signed = _signed(weight, moment, form, COARSE_SHARES if form.double_quant else SHARES)
    if signed.nested_absmax is None or signed.nested_offset is None:
        return signed
    place = signed.nested_absmax, signed.nested_offset, signed.absmax, reference.NESTED_BLOCK
    return _replaced(signed, *_search(weight, moment, form, _native.nested_code(), *place))


def _replaced(w: QuantizedWeight, packed: torch.Tensor, absmax: torch.Tensor | None = None) -> QuantizedWeight:
    return QuantizedWeight(
        packed,
        w.absmax if absmax is None else absmax,
        shape=w.shape,
        dtype=w.dtype,
        quant_type=w.quant_type,
        block_size=w.block_size,
        nested_absmax=w.nested_absmax,
        nested_offset=w.nested_offset,
    )
