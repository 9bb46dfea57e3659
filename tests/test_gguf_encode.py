"""Element types of GGUF: codes of blocks taken out and put back; the encoders against searches in double precision."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bytes_of, gguf_weight, relative_error, same_bytes, same_bytes_under_threads
from torch import Tensor

from qlora_native import gguf_blocks
from qlora_native.tool.export.gguf_encode import encode
from qlora_native.weights.gguf import KEPT

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType


def rows() -> dict[str, Tensor]:
    """Rows [n, 512] as weights have them, and stranger ones."""
    normal = torch.randn(24, 512)
    return {
        "normal": normal * 0.02,
        "heavy": normal / torch.randn(24, 512).square().add(0.3),
        "blocks": normal * torch.randn(24, 16).exp().repeat_interleave(32, 1),
        "moved": normal + 0.7,
    }


def decoded(x: Tensor, kind: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(encode(x, kind), kind))


@pytest.mark.parametrize("quant_type", sorted(KEPT))
def test_blocks_take_other_codes(quant_type: str) -> None:
    one, two = (gguf_weight(quant_type, (8, 512)) for _ in range(2))
    number, (first, second) = one.op_args().quant_type, (w.packed.view(-1, bytes_of(w)) for w in (one, two))
    codes = gguf_blocks.codes(second, number)
    made = gguf_blocks.with_codes(first, codes, number)
    assert same_bytes(gguf_blocks.codes(made, number), codes)
    assert same_bytes(gguf_blocks.with_codes(made, gguf_blocks.codes(first, number), number), first)
    assert len(gguf_blocks.levels(number)) > int(codes.max()) > 13


def best_of_iq4_nl(x: Tensor) -> Tensor:
    """The least squared error of each block of 32, of 1,000 scales."""
    x, levels = x.double().view(-1, 1, 32), gguf_blocks.levels(10).double()
    tried = torch.linspace(-0.02, 0.02, 1000, dtype=torch.float64)[:, None] * x.abs().amax(-1, keepdim=True)
    errors = []
    for scale in tried.split(50, 1):
        code = torch.bucketize(x / scale, (levels[1:] + levels[:-1]) / 2)
        errors.append((levels[code] * scale - x).square().sum(-1))
    return torch.cat(errors, 1).nan_to_num(0).amin(1)


def best_of_q4_k(x: Tensor) -> Tensor:
    """The least squared error of each run of 32, of 40 times 40 scales and minima that no 6 bits round."""
    x = x.double().view(-1, 1, 32)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0, 1.25, 40).tolist():
        scale = (high - low) * torch.linspace(0.03, 0.09, 40, dtype=torch.float64)[:, None]
        code = ((x - share * low) / scale).round().clamp(0, 15)
        best = best.minimum((code * scale + share * low - x).square().sum(-1).nan_to_num(0).amin(1))
    return best


@pytest.mark.parametrize("name", rows())
def test_near_the_best_of_a_search(name: str) -> None:
    x = rows()[name]
    for kind, search, most in ((Kind.IQ4_NL, best_of_iq4_nl, 1.1), (Kind.Q4_K, best_of_q4_k, 1.15)):
        found, best = float((decoded(x, kind) - x).square().sum()), float(search(x).sum())
        assert 0.9 * best < found < most * best, kind.name


@pytest.mark.parametrize("kind", [Kind.IQ4_NL, Kind.Q4_K], ids=str)
def test_blocks_with_nothing_to_search(kind: Any) -> None:
    zeros, edge = torch.zeros(1, 512), torch.zeros(1, 512)
    edge[0, 37] = -3.0
    assert same_bytes(decoded(zeros, kind), zeros)
    for x, most in ((edge, 0.05), (torch.full((1, 512), 0.3), 1e-3), (torch.full((1, 512), -0.3), 1e-3)):
        assert relative_error(decoded(x, kind), x) < most  # IQ4_NL has no level of 0


@pytest.mark.parametrize("kind", [Kind.IQ4_NL, Kind.Q4_K], ids=str)
def test_threads_and_parts_do_not_matter(kind: Any) -> None:
    x = torch.randn(1024, 512)
    whole = same_bytes_under_threads(lambda: torch.from_numpy(encode(x, kind)))
    assert same_bytes(torch.cat([torch.from_numpy(encode(part, kind)) for part in x.split(37)]), whole)


def test_no_worse_than_llama_cpp(llama_cpp: Any) -> None:
    """By more than half a percent, which Q4_K may lose where runs of a block differ much in size."""
    quantize = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib*/libggml-base.*")))).ggml_quantize_chunk
    for kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.IQ4_NL):
        for name, x in rows().items():
            out = torch.empty(encode(x, kind).shape, dtype=torch.uint8)
            call = partial(quantize, int(kind), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
            call(ctypes.c_int64(0), *map(ctypes.c_int64, x.shape), None)
            theirs = torch.from_numpy(gguf.quants.dequantize(out.numpy(), kind))
            assert relative_error(decoded(x, kind), x) <= 1.005 * relative_error(theirs, x), (kind.name, name)
