"""Tables of levels: the two 4-bit types, and the 8-bit maps that blockwise quantization takes, all fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_native import _native
from qlora_native.weight import quant_type_number

TABLE_SIZE = 256  # maps of fewer levels are filled up with zeros


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The 16 levels of "nf4" or "fp4", fp32 [16], indexed by code.

    Args:
        typename: "nf4" or "fp4".
        device: where the tensor goes; None is a CUDA device if there is one, else the CPU.
        blocksize: of no influence on these types.

    Raises NotImplementedError for any other type.
    """
    if typename not in _native.QUANT_TYPES:
        raise NotImplementedError(f"get_4bit_type: typename is {typename!r}: expected 'nf4' or 'fp4'.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _native.levels(quant_type_number(typename)).clone().to(device)


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced levels from -1 (or 0, unsigned) to 1, fp32 [256].

    A signed map, or one of fewer than 8 bits, gives up one level so that 0 is among them.
    """
    count = 2**total_bits - (1 if signed and (add_zero or total_bits < 8) else 0)
    levels = torch.linspace(-1.0 if signed else 0.0, 1.0, count)
    half = count // 2
    return torch.cat([levels[:half], torch.zeros(TABLE_SIZE - count), levels[half:]])


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution over the largest, fp32 [256], sorted, filled up with zeros.

    Args:
        offset: probability below the outermost level.
        use_extra_value: 8 levels above zero and 7 below, as NF4 has; else 7 on both sides.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3.
    """

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(offset, 0.5, count + 1)[:-1].double())

    sides = quantiles(8 if use_extra_value else 7), -quantiles(7)
    zeros = torch.zeros(TABLE_SIZE - sum(map(len, sides)))
    levels = torch.cat([*sides, zeros]).float().sort().values
    return levels / levels.max()


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """Every value of a small floating-point type over the largest, fp32 [256], sorted, filled up with zeros.

    With e the exponent field, m the fraction and b = 2^(exponent_bits - 1): a value is m * 2^-b where e is 0, else
    (1 + m) * 2^-(e - b - 1). (So a larger field is a smaller value; the set of values is what counts.)

    Raises ValueError if the fields, and the sign, do not make up ``total_bits``.
    """
    if exponent_bits + precision_bits + signed != total_bits:
        raise ValueError(
            f"create_fp8_map: {exponent_bits} exponent bits, {precision_bits} precision bits and "
            f"{int(signed)} sign bits are not total_bits = {total_bits}: make them add up."
        )
    bias = 2 ** (exponent_bits - 1)
    fractions = torch.arange(2**precision_bits, dtype=torch.float64) / 2**precision_bits
    normal = [(1 + fractions) * 2.0 ** (bias + 1 - field) for field in range(1, 2**exponent_bits)]
    values = torch.cat([fractions * 2.0**-bias, *normal])
    if signed:
        values = torch.cat([values, -values])
    values = torch.cat([values, values.new_zeros(TABLE_SIZE - len(values))]).float().sort().values
    return values / values.max()


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic type: each power of ten has twice as many levels as the one below it; fp32 [256], sorted.

    The levels of a power of ten are the midpoints of even intervals between a tenth of it and itself. 0 and 1 are
    added, and zeros where ``total_bits`` is below 8.

    Raises ValueError for numbers of bits that do not give 2^total_bits levels.

    Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015.
    """
    value_bits = total_bits - 1
    spare = value_bits - max_exponent_bits

    def decade(exponent: int, intervals: int) -> Tensor:
        edges = torch.linspace(0.1, 1, intervals + 1, dtype=torch.float32)
        return 10**exponent * ((edges[:-1] + edges[1:]) / 2.0)

    exponents = range(1 - max_exponent_bits, 1)
    parts = [decade(exponent, int(2 ** (number + spare + (not signed)))) for number, exponent in enumerate(exponents)]
    if spare > 0:
        parts.append(decade(exponents[-1], 2**spare - 1))
    if signed:
        parts += [-part for part in parts]
    levels = torch.cat([*parts, torch.tensor([0.0, 1.0])])
    if len(levels) != 2**total_bits:
        raise ValueError(
            f"create_dynamic_map: signed={signed}, max_exponent_bits={max_exponent_bits} give {len(levels)} levels: "
            f"expected {2**total_bits} for total_bits={total_bits}; unsigned maps take total_bits - 1 exponent bits."
        )
    return torch.cat([levels, levels.new_zeros(TABLE_SIZE - len(levels))]).sort().values
