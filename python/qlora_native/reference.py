"""Every op in plain torch, slow but exact: the truth that the tests compare with, and the path of other devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_native import _native

NESTED_BLOCK = 256
# Relative error (Frobenius) of a product against the fp64 truth on the same dequantized weight: half an ulp of the
# output's rounding, plus the operands' (adapters and their intermediate are rounded to x's dtype).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity; in one pass, without a mask as large as the tensor."""
    # Both pass a NaN on.
    bounds = torch.aminmax(tensor) if tensor.is_floating_point() and tensor.numel() else ()
    return all(map(math.isfinite, bounds))


def _padded_blocks(flat: Tensor, block: int) -> Tensor:
    return F.pad(flat, (0, -flat.numel() % block)).reshape(-1, block)


def _blocks_and_absmax(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = _padded_blocks(flat, block)
    return blocks, blocks.abs().amax(1) if flat.numel() else flat.new_zeros(0)


def _normalized(blocks: Tensor, absmax: Tensor) -> Tensor:
    reciprocal = 1.0 / absmax
    overflow = torch.isinf(reciprocal)
    return torch.where(overflow[:, None], blocks / absmax[:, None], blocks * reciprocal[:, None])


def _codes(normalized: Tensor, quant_type: int) -> Tensor:
    bounds = _native.boundaries(quant_type).to(normalized.device)
    if quant_type == 0:
        # The code is the number of boundaries strictly below.
        return torch.bucketize(normalized, bounds).to(torch.uint8)
    rank = torch.bucketize(normalized.abs(), bounds)
    code_of_rank = torch.tensor([0, 1, 6, 7, 4, 5, 2, 3], device=normalized.device)
    return (code_of_rank[rank] | (normalized < 0) * 8).to(torch.uint8)


def quantize_blocks(t: Tensor, quant_type: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes packed two to a byte, uint8 [ceil(n/2)], and the largest magnitude of each block, fp32 [blocks]."""
    flat = t.detach().reshape(-1).float()
    bad = (~torch.isfinite(flat)).nonzero()
    if bad.numel():
        raise ValueError(non_finite_message(int(bad[0]), t))
    blocks, absmax = _blocks_and_absmax(flat, block_size)
    zero_code = 7 if quant_type == 0 else 0
    codes = torch.where(
        (absmax == 0)[:, None], zero_code, _codes(_normalized(blocks, absmax), quant_type)
    )
    return pack(codes.reshape(-1)[: flat.numel()].to(torch.uint8), quant_type), absmax


def non_finite_message(index: int, t: Tensor, begin: int = 0, shape: Sequence[int] = ()) -> str:
    """The one wording of the error about NaN and infinity in a weight, or in ``t``, its elements from ``begin`` on."""
    shape = [*(shape or t.shape)]
    where = [int(i) for i in torch.unravel_index(torch.tensor(begin + index, device="cpu"), shape)]
    value = float(t.detach().reshape(-1)[index])
    return f"quantize: element {where} of the {shape} tensor is {value}: only finite weights can be quantized."


def _fixed_order_mean(values: Tensor) -> Tensor:
    slots = _padded_blocks(values.double(), NESTED_BLOCK)
    while slots.shape[1] > 1:
        half = slots.shape[1] // 2
        slots = slots[:, :half] + slots[:, half:]
    total = 0.0
    for group in slots[:, 0].tolist():  # in order, in double precision
        total += group
    return (
        torch.tensor(total / values.numel(), dtype=torch.float64).to(torch.float32).to(values.device)
    )


def nearest_index(values: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest value of the sorted ``table``, fp32 [at most 256]; uint8. A tie takes the even one."""
    threshold = (table[:-1] + table[1:]) * 0.5
    low = torch.bucketize(values, threshold)
    last = table.numel() - 1
    tie = (low < last) & (threshold[low.clamp(max=last - 1)] == values)
    return torch.where(tie & (low % 2 == 1), low + 1, low).to(torch.uint8)


def quantize_blockwise(t: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Indices into ``table`` (uint8, of t's shape) of each element over its block's largest magnitude (fp32 [blocks]);
    that of zero in a block of zeros."""
    blocks, absmax = _blocks_and_absmax(t.detach().reshape(-1).float(), block_size)
    values = torch.where((absmax == 0)[:, None], 0.0, _normalized(blocks, absmax))
    return nearest_index(values, table).reshape(-1)[: t.numel()].reshape(t.shape), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, table: Tensor, block_size: int) -> Tensor:
    """table[code] * absmax of the block, fp32, of the shape of ``codes``."""
    spread = absmax.repeat_interleave(block_size)[: codes.numel()]
    return table[codes.long()] * spread.reshape(codes.shape)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: codes uint8 [blocks], nested_absmax fp32 [ceil(blocks/256)], offset fp32 []."""
    if absmax.numel() == 0:
        return absmax.to(torch.uint8), absmax.clone(), absmax.new_zeros(())
    offset = _fixed_order_mean(absmax)
    codes, nested_absmax = quantize_blockwise(
        absmax - offset, _native.nested_code().to(absmax.device), NESTED_BLOCK
    )
    return codes, nested_absmax, offset


def scales(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_code: Tensor | None,
) -> Tensor:
    """Scales of all blocks, fp32 [blocks], double quantization undone: product rounded, then sum rounded."""
    if nested_absmax is None or nested_offset is None:
        return absmax.reshape(-1)
    code = (_native.nested_code() if nested_code is None else nested_code.reshape(-1)).to(
        absmax.device
    )
    return dequantize_blockwise(
        absmax.reshape(-1), nested_absmax.reshape(-1), code, NESTED_BLOCK
    ) + nested_offset.view(())


def dequantize(dtype: torch.dtype, *weight: Any) -> Tensor:
    """round_to_dtype(fp32 level * fp32 scale), of the weight's shape; of a GGUF type, as its blocks say."""
    packed, absmax, nested_absmax, nested_offset, code, nested_code, shape, quant_type, block_size = (
        weight
    )
    numel = math.prod(shape)
    if quant_type in _native.GGUF_BLOCKS:
        from qlora_native import gguf_blocks  # few models need it

        return gguf_blocks.values(packed.reshape(-1), quant_type).to(dtype).reshape(shape)
    spread = scales(absmax, nested_absmax, nested_offset, nested_code).repeat_interleave(block_size)[
        :numel
    ]
    table = (_native.levels(quant_type) if code is None else code.reshape(-1)).to(packed.device)
    levels = table[torch.stack([packed >> 4, packed & 15], -1).reshape(-1)[:numel].long()]
    return (levels * spread).to(dtype).reshape(shape)


def pack(codes: Tensor, quant_type: int) -> Tensor:
    """Two codes a byte, the earlier one in the high nibble; an odd last byte is filled with the code of zero."""
    codes = F.pad(codes.reshape(-1), (0, codes.numel() % 2), value=7 if quant_type == 0 else 0)
    return codes[0::2] << 4 | codes[1::2]


def reciprocals(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not finite: such a block takes the code of zero throughout."""
    inverse = 1.0 / scales
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


SUM_LANES = 16  # partial sums of a block's error: element i belongs to sum i % 16, and a halving tree adds them up


def _weighted_error(x: Tensor, moment: Tensor, scales: Tensor, quant_type: int) -> Tensor:
    """Sum over each block of moment * (x - level * scale)^2 in fp32, in the fixed order; [blocks]."""
    codes = _codes(x * reciprocals(scales)[:, None], quant_type)
    error = x - _native.levels(quant_type).to(x.device)[codes.long()] * scales[:, None]
    terms = (moment * (error * error)).unflatten(1, (-1, SUM_LANES))
    sums = terms[:, 0].clone()
    for step in range(1, terms.shape[1]):
        sums += terms[:, step]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def search_scales(
    t: Tensor,
    moment: Tensor,
    table: Tensor,
    multiplier: Tensor,
    offset: Tensor,
    initial: Tensor,
    group: int,
    low: float,
    high: float,
    quant_type: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Packed codes and, for each block, the index of the scale with the least weighted squared error.

    The scales are table[i] * multiplier + offset. A block tries those whose magnitude lies between ``low`` and
    ``high`` times its largest element, and at ``initial``; equal errors take the lower index. Each row of ``t`` is
    weighted by ``moment``, fp32 [K].
    """
    moment, table, multiplier, initial = (
        tensor.reshape(-1) for tensor in (moment, table, multiplier, initial)
    )
    offset, flat = offset.reshape(()), t.detach().reshape(-1).float()
    x, absmax = _blocks_and_absmax(flat, block_size)
    weights = _padded_blocks(moment.repeat(flat.numel() // max(moment.numel(), 1)), block_size)
    spread = multiplier.repeat_interleave(group)[: absmax.numel()]
    best, chosen = torch.full_like(absmax, math.inf), initial.clone()
    for index, level in enumerate(table):
        scales = level * spread + offset
        size = scales.abs()
        allowed = ((absmax * low <= size) & (size <= absmax * high)) | (initial == index)
        rows = allowed.nonzero()[:, 0]
        error = _weighted_error(x[rows], weights[rows], scales[rows], quant_type)
        better = error < best[rows]
        best[rows[better]] = error[better]
        chosen[rows[better]] = index
    scales = table[chosen.long()] * spread + offset
    codes = _codes(x * reciprocals(scales)[:, None], quant_type)
    return pack(codes.reshape(-1)[: flat.numel()], quant_type), chosen


def gptq(
    t: Tensor, factor: Tensor, order: Tensor, scales: Tensor, quant_type: int, block_size: int
) -> Tensor:
    """Packed codes of ``t`` [N, K] under given scales, each column's rounding error handed on to the later ones.

    Columns go in ``order``, int64 [K]. The i-th of them adds (weight - decoded) * factor[i, j] to every later column
    j, fp32 product and sum apart; ``factor`` is fp32 [K, K] in that order, read above its diagonal alone.

    Source: Frantar et al., "GPTQ", 2022, algorithm 1, in the form of Babai's nearest plane (Chen et al., "The Geometry
    of LLM Quantization", 2025): the same codes with one Cholesky factor and no inverse.
    """
    weight = t.detach().float()[:, order]
    spread = scales.repeat_interleave(block_size)[: t.numel()].reshape(t.shape)[:, order]
    inverse = reciprocals(spread)
    levels = _native.levels(quant_type).to(t.device)
    target = weight.clone()
    codes = torch.empty(t.shape, dtype=torch.uint8, device=t.device)
    for i in range(t.shape[1]):
        code = _codes(target[:, i] * inverse[:, i], quant_type)
        codes[:, order[i]] = code
        error = weight[:, i] - levels[code.long()] * spread[:, i]
        target[:, i + 1 :] += error[:, None] * factor[i, i + 1 :]
    return pack(codes, quant_type)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in double precision, rounded once to x's dtype. ``weight`` is the dequantized weight [N, K]."""
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)


STATE_BLOCK = _native.STATE_BLOCK


def _exponent_bits(x: Tensor, bits: int) -> Tensor:
    """The low bits of the exponent field of fp32 ``x``, as an index."""
    return (x.view(torch.int32) >> 23 & ((1 << bits) - 1)).long()


def decode_state(codes: Tensor, absmax: Tensor | None = None) -> Tensor:
    """The fp32 values of an 8-bit state (int8: the signed code, uint8: the unsigned); in [-1, 1] without ``absmax``."""
    a, b, *_ = (table.to(codes.device) for table in _native.state_code(codes.dtype == torch.int8))
    value = codes.float()
    segment = _exponent_bits(value, 3)
    relative = a[segment] * torch.where(value < 0, -1.0, 1.0) + b[segment] * value
    if absmax is None:
        return relative
    flat = relative.reshape(-1)
    return (flat * absmax.repeat_interleave(STATE_BLOCK)[: flat.numel()]).reshape(codes.shape)


def encode_state(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """An fp32 state as codes (int8 signed, uint8 unsigned; of its shape) and absmax, fp32 [blocks of 256].

    A block that holds something not finite gets codes 0 and absmax NaN.
    """
    _, _, alpha, beta, limits = (table.to(values.device) for table in _native.state_code(signed))
    lowest, top = limits.tolist()
    blocks, absmax = _blocks_and_absmax(values.reshape(-1), STATE_BLOCK)
    absmax = torch.where(absmax.isfinite(), absmax, math.nan)
    x = _normalized(blocks, absmax).abs().clamp(min=lowest)
    exponent = _exponent_bits(x, 5)
    magnitude = (x * beta[exponent] + alpha[exponent]).round().clamp(max=top)
    magnitude = torch.where((absmax > 0)[:, None], magnitude, 0.0)
    codes = torch.where(blocks < 0, -magnitude, magnitude) if signed else magnitude
    codes = codes.to(torch.int8 if signed else torch.uint8)
    return codes.reshape(-1)[: values.numel()].reshape(values.shape), absmax


def gradient_norm(grads: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients taken as one vector, summed in double precision; fp64 []."""
    device = grads[0].device if grads else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        total += grad.detach().double().square().sum().to(device)
    return total.sqrt()


def power(base: float, exponent: int) -> float:
    """base**exponent by squaring: the order of roundings of the native code."""
    result = 1.0
    while exponent > 0:
        result *= base if exponent % 2 else 1.0
        base *= base
        exponent //= 2
    return result


def _decay(state: Tensor, absmax: Tensor | None, factors: list[float]) -> tuple[Tensor, list[Tensor]]:
    """A state as fp32 values, and the factors to multiply them by: with the absmax inside, where there is one."""
    one = torch.ones((), dtype=torch.float32, device=state.device)
    if absmax is None:
        return state, [one * factor for factor in factors]
    values = decode_state(state)
    spread = [(absmax * (one * f)).repeat_interleave(STATE_BLOCK)[: state.numel()] for f in factors]
    return values, [factor.reshape(state.shape) for factor in spread]


def _store_state(values: Tensor, state: Tensor, absmax: Tensor | None) -> None:
    if absmax is not None:
        values, new_absmax = encode_state(values, state.dtype == torch.int8)
        absmax.copy_(new_absmax)
    state.copy_(values)


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor | None,
    exp_avg_sq_absmax: Tensor | None,
    step: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    grad_factor: float = 1.0,
) -> None:
    """One step of AdamW (``decoupled``) or Adam on one tensor, in place: fp32, rounded once to the parameter's dtype.

    Moments of int8 and uint8 are codes, each block of 256 relative to its absmax.
    """
    step += 1
    taken = int(step.item())
    p = param.float()
    g = grad.float() * grad_factor
    if not decoupled and weight_decay != 0:
        g = g + p * weight_decay
    m, (m_decay,) = _decay(exp_avg, exp_avg_absmax, [beta1])
    v, (v_decay,) = _decay(exp_avg_sq, exp_avg_sq_absmax, [beta2])
    m = m * m_decay + g * (1 - beta1)
    v = v * v_decay + (g * (1 - beta2)) * g
    root_correction = 1 / math.sqrt(1 - power(beta2, taken))
    root = v.double().sqrt().float()  # correctly rounded, as torch does not promise for fp32
    denominator = root * root_correction + eps
    kept = p * (1 - lr * weight_decay if decoupled else 1.0)
    param.copy_(kept - (m * (lr / (1 - power(beta1, taken)))) / denominator)
    _store_state(m, exp_avg, exp_avg_absmax)
    _store_state(v, exp_avg_sq, exp_avg_sq_absmax)


def lion_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_factor: float = 1.0,
) -> None:
    """One step of Lion (Chen et al. 2023, algorithm 2) on one tensor, in place, in fp32."""
    p = param.float()
    g = grad.float() * grad_factor
    m, (decay1, decay2) = _decay(exp_avg, exp_avg_absmax, [beta1, beta2])
    direction = (m * decay1 + g * (1 - beta1)).sign()
    param.copy_(p * (1 - lr * weight_decay) - direction * lr)
    _store_state(m * decay2 + g * (1 - beta2), exp_avg, exp_avg_absmax)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * round(x / rms(x)) over the last axis, as LlamaRMSNorm rounds; and 1 / rms(x) [...], at least fp32."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * (wide * rstd[..., None]).to(x.dtype), rstd


def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of rms_norm to x; itself differentiable."""
    wide, gradient = _wide(x), _wide(grad_y) * _wide(weight)
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normal = wide * rstd
    return (rstd * (gradient - normal * (gradient * normal).mean(-1, keepdim=True))).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """round(silu(gate)) * up."""
    return F.silu(gate) * up


def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of swiglu to gate and up; themselves differentiable."""
    wide, gradient = _wide(gate), _wide(grad_y)
    sigmoid = torch.sigmoid(wide)
    grad_gate = gradient * _wide(up) * (sigmoid * (1 + wide * (1 - sigmoid)))
    return grad_gate.to(gate.dtype), (gradient * (wide * sigmoid).to(gate.dtype)).to(up.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Dimensions i and i + D/2 of each head of x [B, H, T, D] rotated by the angles in cos and sin [1 or B, T, D]."""
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if inverse:  # the transpose
        rotated = x * sin
        return x * cos + torch.cat((rotated[..., half:], -rotated[..., :half]), -1)
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v where no position sees a later one; and the log of the softmax's sum, [B, H, T].

    q is [B, H, T, D]; k and v are [B, H / g, T, D], each head of theirs shared by g of q's.
    """
    keys, values = _each_query_head(k, q), _each_query_head(v, q)
    weights, lse = _causal_weights(q, keys, scale)
    return (weights @ values).to(q.dtype), lse


def causal_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of causal_attention to q, k and v; themselves differentiable."""
    keys, values, gradient = _each_query_head(k, q), _each_query_head(v, q), _wide(grad_out)
    weights, _ = _causal_weights(q, keys, scale)
    grad_weights = gradient @ values.transpose(2, 3)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
    shared = (k.shape[0], k.shape[1], q.shape[1] // k.shape[1], *k.shape[2:])
    grad_k = (grad_scores.transpose(2, 3) @ _wide(q)).view(shared).sum(2)
    grad_v = (weights.transpose(2, 3) @ gradient).view(shared).sum(2)
    return (grad_scores @ keys).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _each_query_head(x: Tensor, q: Tensor) -> Tensor:
    return _wide(x).repeat_interleave(q.shape[1] // x.shape[1], 1)


def _causal_weights(q: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (scale * (_wide(q) @ keys.transpose(2, 3))).masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]), lse
