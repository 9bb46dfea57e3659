"""The 8-bit codes of optimizer states: their values from the description, and blocks that are not like others.

That encoding is nearest, monotone and undone by decoding is tests/cpp/test_state_code.cc's, over the same tables.
"""

from __future__ import annotations

import pytest
import torch

from qlora_native import reference

EDGES = (-20, -17, -13, -10, -7, -3)  # log2 of the values at which the spacing changes, see cpp/core/state_code.h


def described(bits: int) -> torch.Tensor:
    """The magnitudes in double precision, from the words: 2^i even steps between neighboring edges, the last segment
    up to 1, the first four down to 0."""
    edges = EDGES[8 - bits :]
    values = [2.0 ** edges[0] * i / 4 for i in range(4)]
    for i in range(2, bits - 1):
        low, high = 2.0 ** edges[i - 2], 2.0 ** edges[i - 1]
        values += [low + (high - low) * j / 2**i for j in range(2**i)]
    count = 2 ** (bits - 1)
    values += [2.0**-3 + (1 - 2.0**-3) * j / (count - 1) for j in range(count)]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.int8, 7), (torch.uint8, 8)])
def test_values_are_those_described(dtype: torch.dtype, bits: int) -> None:
    codes = torch.arange(1 << bits).to(dtype)
    values = reference.decode_state(codes).double()
    assert values[0] == 0 and values[-1] == 1
    torch.testing.assert_close(values, described(bits), rtol=1e-4, atol=0)  # the slopes have 16 bits
    assert (values.diff() > 0).all()
    if dtype == torch.int8:
        assert torch.equal(reference.decode_state(-codes).double(), -values)


def test_blocks_of_zeros_and_of_what_is_not_finite() -> None:
    values = torch.zeros(3, 256)
    values[1, 5], values[2, 7], values[2, 9] = float("inf"), 1e-42, 1e-42
    for signed in (True, False):
        codes, absmax = reference.encode_state(values, signed)
        decoded = reference.decode_state(codes, absmax)
        assert (decoded[0] == 0).all() and not codes[0].any()
        assert decoded[1].isnan().all()
        assert decoded[2, 7] == values[2, 7]  # subnormal: the reciprocal overflows
