"""rotary against transformers' own function, bit by bit, and its derivative."""

from __future__ import annotations

import pytest
import torch
from helpers import errors_in_fp64, relative_error, same_values
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]
rotary = torch.ops.qlora_native.rotary
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(batch: int, heads: int, length: int, width: int, dtype: torch.dtype, angle_rows: int = 1) -> list[Tensor]:
    """x as a projection makes it (heads side by side), and angles whose two halves differ."""
    x = torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2)
    return [x, *(torch.randn(angle_rows, length, width).to(dtype) for _ in range(2))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 34), (2, 9, 7, 64), (3, 2, 4, 128), (0, 2, 3, 8)], ids=str)
@pytest.mark.parametrize("own_angles", [False, True])
def test_same_bits_as_transformers(shape: tuple[int, int, int, int], dtype: torch.dtype, own_angles: bool) -> None:
    x, cos, sin = operands(*shape, dtype, angle_rows=shape[0] if own_angles else 1)
    want, _ = apply_rotary_pos_emb(x, x, cos, sin)
    got = rotary(x, cos, sin, False)
    assert same_values(got, want)
    assert got.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(dtype: torch.dtype) -> None:
    x, cos, sin = operands(2, 3, 5, 32, dtype)
    errors = errors_in_fp64(
        lambda t: rotary(t, cos, sin, False), lambda t: apply_rotary_pos_emb(t, t, cos.double(), sin.double())[0], x
    )
    assert errors[1] < {torch.float32: 1e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def test_inverse_undoes_a_rotation() -> None:
    x, _, _ = operands(2, 3, 5, 32, torch.float32)
    angle = torch.randn(1, 5, 16).repeat(1, 1, 2)
    back = rotary(rotary(x, angle.cos(), angle.sin(), False), angle.cos(), angle.sin(), True)
    assert relative_error(back, x.double()) < 1e-6
