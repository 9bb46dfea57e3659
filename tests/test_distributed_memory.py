"""What the weights take of a rank's memory: counted, and measured in anonymous memory at rest and in a step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import sampled
from ranks import held_bytes, on_ranks, trained
from test_load_memory import anonymous_bytes
from tiny_models import save, tokens
from torch import nn
from torch.distributed.tensor import DTensor

import qlora_native as qn
from qlora_native import distributed
from qlora_native._memory import MMAP_THRESHOLD, trim_heap
from qlora_native.distributed.memory import rank_memory
from qlora_native.optim import AdamW

LAYERS = 4
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
}
LARGEST = 2 * 1024 * 2816  # bytes of a tensor in the files, which hold 103 MB
LORA = qn.LoraConfig(r=2, seed=0)
OBJECTS = LAYERS << 19  # what FSDP and DTensors take of a layer besides its bytes, whatever its size: 0.4 MB measured
SLACK = 8 << 20  # 5 MB were measured: not quite a layer of 6 MB, as a message in gloo's hands would be


def alone(folder: Path) -> nn.Module:
    return qn.add_lora(qn.load_model(folder, dtype=torch.float32), LORA)


def sharded(folder: Path) -> nn.Module:
    model: nn.Module = distributed.load_model(folder, dtype=torch.float32, lora=LORA)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())  # embeddings, norms, scales too
    whole = sum(buffer.nbytes for buffer in model.buffers())  # second level of the scales, rotary frequencies
    assert whole < held_bytes(model) / 100 or folder.name == "tiny"
    return model


def step(model: Any) -> None:
    rows = tokens(1, 8)
    optimizer = AdamW(trained(model), 1e-3, paged=False)
    model.train()(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    optimizer.step()


def memory_of(rank: int, world: int, load: Callable[[Path], nn.Module], folder: Path) -> dict[str, int]:
    """Bytes of frozen tensors held, and anonymous memory above that of the imports: at most while loading, at rest,
    and at most in a step."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)  # what is freed is gone at once
    step(load(folder / "tiny"))  # what the libraries take at first use
    trim_heap()
    start = anonymous_bytes("self")

    def above() -> int:
        return anonymous_bytes("self") - start

    with sampled(above) as loading:
        model = load(folder / "model")
    trim_heap()
    rest = above()
    with sampled(above) as peak:
        step(model)
    return {"held": held_bytes(model), "loading": max(loading), "rest": rest, "peak": max(peak)}


def test_weights_of_one_rank_of_four(tmp_path: Path) -> None:
    save(tmp_path / "tiny")
    save(tmp_path / "model", dtype=torch.bfloat16, **SIZES)
    whole = on_ranks(1, memory_of, alone, tmp_path)[0]
    plan = rank_memory(alone(tmp_path / "model"), 4)
    assert whole["rest"] > 0.9 * whole["held"]  # that memory is seen
    for part in on_ranks(4, memory_of, sharded, tmp_path):
        assert part["held"] <= 0.30 * whole["held"], (part, whole)
        assert part["rest"] <= 0.30 * whole["rest"] + OBJECTS, (part, whole)
        # A layer that is not complete, the tensor at hand in 16 bits and what quantizing it takes; never the model.
        assert part["loading"] <= part["rest"] + plan.gathered_blocks // 3 + 2 * LARGEST, (part, whole)
        # In a step what is gathered for a moment comes on top, and what a step takes on one process.
        in_step = plan.gathered_blocks + whole["peak"] - whole["rest"]
        assert part["peak"] <= part["rest"] + in_step + SLACK, (part, whole, plan)
