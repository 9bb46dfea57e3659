"""RMSNorm, rotary and SwiGLU on a CUDA device, executed without a GPU: the CPU ops' bytes, launches, and fuse() there.

The op tests themselves run over the emulator too, as `[emulated-...]`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated import Emulator
from helpers import relative_error, same_bytes
from test_fuse import loss_and_gradient, model_of
from torch import Tensor

import qlora_native as qn
from qlora_native.models import fuse as fusing
from qlora_native.models.fuse import fuse
from qlora_native.ops import _direct, _library
from qlora_native.ops._library import KERNELS

OPS = torch.ops.qlora_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6


def operands(dtype: torch.dtype, *shape: int) -> Tensor:
    return (3 * torch.randn(shape)).to(dtype)


def both_norms(dtype: torch.dtype, width: int) -> list[tuple[Any, Any]]:
    x, grad_y, weight = operands(dtype, 2, 19, width), operands(dtype, 2, 19, width), operands(dtype, width)
    expected = KERNELS["rms_norm", "CPU"](x, weight, EPS)
    arguments = grad_y, x, weight, expected[1], EPS
    return [
        (OPS.rms_norm(x, weight, EPS), expected),
        (OPS.rms_norm_backward(*arguments), KERNELS["rms_norm_backward", "CPU"](*arguments)),
    ]


def both_rotations(dtype: torch.dtype, width: int) -> list[tuple[Any, Any]]:
    x = operands(dtype, 2, 5, 18, 2 * width).transpose(1, 2)  # 18 heads, as a projection lays them out
    cos, sin = operands(dtype, 1, 5, 2 * width), operands(dtype, 1, 5, 2 * width)
    inverses = (False, True)
    return [(OPS.rotary(x, cos, sin, inverse), KERNELS["rotary", "CPU"](x, cos, sin, inverse)) for inverse in inverses]


def both_gates(dtype: torch.dtype, width: int) -> list[tuple[Any, Any]]:
    gate, up, grad_y = (operands(dtype, 7, width) for _ in range(3))
    backward = OPS.swiglu_backward(grad_y, gate, up)
    return [
        (OPS.swiglu(gate, up), KERNELS["swiglu", "CPU"](gate, up)),
        (backward, KERNELS["swiglu_backward", "CPU"](grad_y, gate, up)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("both", [both_norms, both_rotations, both_gates], ids=lambda both: both.__name__)
@pytest.mark.parametrize("width", [1, 17, 64, 576])
def test_the_bytes_of_the_cpu(
    emulator: Emulator, both: Callable[..., list[tuple[Any, Any]]], dtype: torch.dtype, width: int
) -> None:
    """On a stream of its own, one launch for each op."""
    emulator.stream = emulator.module.new_stream()
    for got, expected in both(dtype, width):
        for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (got, expected)), strict=True):
            assert same_bytes(a, b) and a.stride() == b.stride()
    assert [stream for _, stream in emulator.launches()] == [emulator.stream] * 2


def test_a_refused_launch_is_named(emulator: Emulator) -> None:
    x = torch.randn(2, 8)
    angles = torch.randn(1, 2, 8)
    w = qn.quantize(x)
    emulator.stream = 12345  # no stream
    calls: dict[str, Callable[[], Any]] = {
        "dequantize_4bit": w.dequantize,
        "rms_norm": lambda: OPS.rms_norm(x, x[0], EPS),
        "rms_norm_backward": lambda: OPS.rms_norm_backward(x, x, x[0], x[:, 0], EPS),
        "rotary": lambda: OPS.rotary(x[None, None], angles, angles, False),
        "swiglu": lambda: OPS.swiglu(x, x),
        "swiglu_backward": lambda: OPS.swiglu_backward(x, x, x),
    }
    for op, call in calls.items():
        with pytest.raises(RuntimeError, match=f"^{op}: CUDA failed with cudaErrorInvalidResourceHandle"):
            call()


def test_without_kernels_torch_computes(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "module_for", lambda device: None)
    for dtype in DTYPES:
        for both in (both_norms, both_rotations, both_gates):
            for got, expected in both(dtype, 16):
                for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (got, expected)), strict=True):
                    assert relative_error(a, b.double()) < {torch.float32: 1e-6}.get(dtype, 1e-2)
    assert emulator.launches() == []


FUSED = {
    "Llama": {"attention": 2, "mlp": 2, "norm": 5},
    "Qwen3": {"attention": 2, "mlp": 2, "norm": 9},
    "Phi3": {"attention": 2, "norm": 5},
    "Gemma": {"attention": 2},
    "GPT2": {},  # no rotation
    "Cohere": {"mlp": 2},  # an interleaved rotation
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(FUSED))
def test_fused_models(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    """As on a CUDA device: norms, gates and rotations by the kernels, attention and dense layers by torch."""
    model = model_of(kind, dtype)
    plain = copy.deepcopy(model)
    monkeypatch.setattr(fusing, "is_on_cpu", lambda tensor: False)
    assert fuse(model) == FUSED[kind]
    called: list[str] = []

    def recorded(name: str, *arguments: Any) -> Any:
        called.append(name)
        return _direct.call(name, *arguments)

    monkeypatch.setattr(fusing, "call", recorded)
    emulator.launches()
    (loss, gradient), (want, want_gradient) = loss_and_gradient(model), loss_and_gradient(plain)
    exact = dtype == torch.float32
    assert float(loss) == pytest.approx(float(want), rel=1e-5 if exact else 2e-3)
    assert relative_error(gradient, want_gradient) < (1e-5 if exact else 3e-2)
    counts = {"rms_norm": "norm", "swiglu": "mlp", "rotary": "attention"}
    for op, label in counts.items():
        assert called.count(op) == (2 if op == "rotary" else 1) * FUSED[kind].get(label, 0)
    assert set(called) <= set(counts)
    assert len(emulator.launches()) == 2 * len(called), "one launch forward, one backward"


@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
def test_nothing_is_fused_without_kernels_for_the_device(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(fusing, "is_on_cpu", lambda tensor: False)
    assert fuse(model_of(kind)) == {}
    assert fuse(model_of(kind).to("meta")) == {}
