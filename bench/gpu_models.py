"""Whole models with made-up weights on a GPU: a QLoRA step of an 8B model, and the load of a 70B one.

The model is Llama's architecture in plain torch, so that nothing but torch and this library is needed. Its 4-bit
weights are random codes; what is measured depends on shapes alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from common import rounded
from gpu_timing import device, on_gpu
from torch import nn
from torch.utils.checkpoint import checkpoint

import qlora_native as qn

GIB = 1 << 30


class Shape(NamedTuple):
    """Of a model, and of the step that is measured with it."""

    layers: int
    width: int
    hidden: int
    heads: int
    key_heads: int
    vocabulary: int
    batch: int = 4
    length: int = 1024

    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of a layer's weights."""
        keys = self.width // self.heads * self.key_heads
        return {
            "q_proj": (self.width, self.width),
            "k_proj": (keys, self.width),
            "v_proj": (keys, self.width),
            "o_proj": (self.width, self.width),
            "gate_proj": (self.hidden, self.width),
            "up_proj": (self.hidden, self.width),
            "down_proj": (self.width, self.hidden),
        }


LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = Shape(80, 8192, 28672, 64, 8, 128256)
TINY = Shape(2, 64, 128, 4, 2, 96, batch=2, length=16)


def made_up(n: int, k: int) -> qn.QuantizedWeight:
    """A weight [n, k] of random codes, with scales of the size that trained weights have."""
    blocks = n * k // 64
    place = {"device": device()}
    return qn.QuantizedWeight(
        torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, **place),  # type: ignore[call-overload]
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, **place),  # type: ignore[call-overload]
        shape=(n, k),
        dtype=torch.bfloat16,
        nested_absmax=torch.full((-(-blocks // 256),), 0.2 / k**0.5, **place),  # type: ignore[call-overload]
        nested_offset=torch.full((), 1.0 / k**0.5, **place),  # type: ignore[call-overload]
    )


class Layer(nn.Module):
    """A decoder layer: attention and gated feed-forward, each behind an RMS norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        for name, (n, k) in shape.linears().items():
            layer = qn.nn.QuantizedLinear(k, n, bias=False, device="meta")
            layer.quantized = made_up(n, k)
            self.add_module(name, layer)
        self.norms = nn.Parameter(torch.ones(2, shape.width, device=device(), dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, length, width]."""
        x = x + self.attend(nn.functional.rms_norm(x, x.shape[-1:], self.norms[0]))
        y = nn.functional.rms_norm(x, x.shape[-1:], self.norms[1])
        gate, up, down = (self.get_submodule(f"{name}_proj") for name in ("gate", "up", "down"))
        hidden: torch.Tensor = nn.functional.silu(gate(y)) * up(y)
        return x + down(hidden)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Causal attention, without the rotation of positions: no product depends on it."""
        batch, length, width = x.shape
        head = width // self.shape.heads
        q, k, v = (
            self.get_submodule(f"{name}_proj")(x).view(batch, length, -1, head).transpose(1, 2) for name in "qkv"
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        projected: torch.Tensor = self.get_submodule("o_proj")(out.transpose(1, 2).reshape(batch, length, width))
        return projected


class Model(nn.Module):
    """Embedding, layers under gradient checkpointing, and the loss over a dense output embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        place = {"device": device(), "dtype": torch.bfloat16}
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, shape.width, **place) * 0.02)  # type: ignore[call-overload]
        self.head = nn.Parameter(torch.randn(shape.vocabulary, shape.width, **place) * 0.02)  # type: ignore[call-overload]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of tokens [batch, length] as their own labels."""
        x = nn.functional.embedding(tokens, self.embedding).requires_grad_()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return qn.linear_cross_entropy(x, self.head, tokens)


@contextmanager
def memory_limit(limit: int) -> Iterator[dict[str, Any]]:
    """No more than ``limit`` bytes of device memory through torch; what was taken at most stands in the dict."""
    found: dict[str, Any] = {"limit_gib": limit / GIB}
    if not on_gpu():
        yield found
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    if total < limit:
        found["limit_gib"] = total / GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    torch.cuda.reset_peak_memory_stats()
    try:
        yield found
    finally:
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def _wait() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def train_steps(shape: Shape, limit: int, steps: int) -> dict[str, Any]:
    """QLoRA steps, adapters of rank 16 on every layer, 8-bit AdamW with clipping: ms a step and memory."""
    with memory_limit(limit) as found:
        model = qn.add_lora(Model(shape), qn.LoraConfig(r=16, seed=0)).to(device())
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = qn.optim.AdamW(trained, lr=1e-4, bits=8, max_norm=1.0)
        tokens = torch.randint(0, shape.vocabulary, (shape.batch, shape.length), device=device())
        seconds, losses = [], []
        for _ in range(steps):
            _wait()
            started = time.perf_counter()
            loss = model(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            _wait()
            seconds.append(time.perf_counter() - started)
            losses.append(float(loss.detach()))
        found |= {"tokens": tokens.numel(), "trained": sum(p.numel() for p in trained)}
        found["step_ms"] = rounded(seconds, 1e3)
        found |= {"tokens_per_second": round(tokens.numel() / min(seconds), 1), "losses": losses}
        found["match"] = bool(torch.tensor(losses).isfinite().all()) and losses[-1] < losses[0]
    return found


def load(shape: Shape, limit: int) -> dict[str, Any]:
    """Quantizes every matrix from 16 bits, one at a time, as loading does; seconds and memory."""
    with memory_limit(limit) as found:
        started = time.perf_counter()
        dense = {
            nk: torch.randn(nk, device=device(), dtype=torch.bfloat16) for nk in sorted(set(shape.linears().values()))
        }
        held = [qn.quantize(dense[nk]) for _ in range(shape.layers) for nk in shape.linears().values()]
        ends = [
            torch.zeros(shape.vocabulary, shape.width, device=device(), dtype=torch.bfloat16) for _ in ("in", "out")
        ]
        _wait()
        found["seconds"] = round(time.perf_counter() - started, 2)
        found["weights_gib"] = sum(w.nbytes for w in held) / GIB
        found["embeddings_gib"] = sum(t.nbytes for t in ends) / GIB
        found["elements"] = sum(w.numel() for w in held)
        first = next(iter(shape.linears().values()))
        error = (held[0].dequantize().float() - dense[first].float()).abs().mean()
        found["match"] = abs(float(error) - 0.0728) < 2e-3  # NF4's published error on normal weights, block 64
    return found
