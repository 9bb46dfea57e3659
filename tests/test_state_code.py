"""The 8-bit codes of optimizer states: their values from the description, and that encoding is nearest and monotone."""

from __future__ import annotations

import pytest
import torch

from qlora_native import reference

SIGNED, UNSIGNED = torch.int8, torch.uint8
both = pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])
EDGES = (-20, -17, -13, -10, -7, -3)  # log2 of the values at which the spacing changes, see cpp/core/state_code.h


def all_codes(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(128).to(SIGNED) if dtype == SIGNED else torch.arange(256).to(UNSIGNED)


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


@pytest.mark.parametrize(("dtype", "bits"), [(SIGNED, 7), (UNSIGNED, 8)])
def test_values_are_those_described(dtype: torch.dtype, bits: int) -> None:
    values = reference.decode_state(all_codes(dtype)).double()
    assert values[0] == 0 and values[-1] == 1
    torch.testing.assert_close(values, described(bits), rtol=1e-4, atol=0)  # the slopes have 16 bits
    assert (values.diff() > 0).all()
    if dtype == SIGNED:
        assert torch.equal(reference.decode_state(-all_codes(SIGNED)).double(), -values)


def encode_grid(grid: torch.Tensor, signed: bool) -> torch.Tensor:
    """Codes relative to an absmax of 1: every block gets a 1."""
    blocks = torch.cat([grid.reshape(-1, 255), torch.ones(grid.numel() // 255, 1)], 1)
    codes, absmax = reference.encode_state(blocks, signed)
    assert (absmax == 1).all()
    return codes[:, :255].reshape(-1)


@both
def test_encoding_is_nearest_and_monotone(dtype: torch.dtype) -> None:
    # Magnitudes of every binade from 2^-34 to 1, in increasing order, a multiple of 255 of them.
    grid = torch.cat([torch.linspace(1, 2, 4097)[:-1] * 2.0**e for e in range(-34, 0)])
    grid = grid[: grid.numel() // 255 * 255]
    codes = encode_grid(grid, dtype == SIGNED)
    assert (codes.int().diff() >= 0).all()
    table = reference.decode_state(all_codes(dtype)).double()
    if dtype == UNSIGNED:
        assert codes.min() == 1
        table[0] = -1.0  # never chosen: a second moment does not vanish
    got = (table[codes.long()] - grid).abs()
    upper = torch.bucketize(grid.double(), table).clamp(1, len(table) - 1)
    best = torch.minimum((table[upper] - grid).abs(), (table[upper - 1] - grid).abs())
    step = table[upper] - table[upper - 1]
    assert ((got - best) / step).max() < 4e-3  # of a step: the boundaries are rounded too
    if dtype == SIGNED:
        assert torch.equal(encode_grid(-grid, True), -codes)


def test_blocks_of_zeros_and_of_what_is_not_finite() -> None:
    values = torch.zeros(3, 256)
    values[1, 5], values[2, 7], values[2, 9] = float("inf"), 1e-42, 1e-42
    for signed in (True, False):
        codes, absmax = reference.encode_state(values, signed)
        decoded = reference.decode_state(codes, absmax)
        assert (decoded[0] == 0).all() and not codes[0].any()
        assert decoded[1].isnan().all()
        assert decoded[2, 7] == values[2, 7]  # subnormal: the reciprocal overflows
