"""Stacks of 4-bit experts sharded over two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import adapters, distance, held_bytes, on_ranks, trained, whole_checkpoint
from tiny_models import save, tokens
from torch import Tensor
from torch.distributed.tensor import DTensor

import qlora_native as qn
from qlora_native import distributed
from qlora_native.distributed.memory import rank_memory
from qlora_native.nn.experts import quantized_stacks
from qlora_native.optim import AdamW

peft = pytest.importorskip("peft")

KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
LORA = qn.LoraConfig(r=3, seed=0)
Stacks = dict[str, tuple[Tensor, Tensor]]


def train(model: Any, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Three steps on this rank's rows; the trained parameters, whole."""
    optimizer = AdamW(trained(model), 1e-3, max_norm=0.5, paged=False)
    model.train()
    for seed in range(3):
        rows = tokens(4, seed=seed)[rank::world]  # all of one length: the ranks' losses weigh the same
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapters(model)


def stacks(model: Any) -> Stacks:
    """Codes and scales of every stack."""
    return {f"{path}.{name}": (stack.packed, stack.absmax) for path, _, name, stack in quantized_stacks(model)}


def with_patterns(folder: Path, double_quant: bool) -> Any:
    """A model whose stacks hold every 16-bit number, NaNs of bf16 among them, with PEFT's adapters on the experts."""
    model = qn.load_model(folder, dtype=torch.float32, double_quant=double_quant)
    patterns = torch.arange(1 << 16).to(torch.uint16).view(torch.uint8)
    for codes, _ in stacks(model).values():
        codes.copy_(patterns.roll(-4096)[: codes.numel()])
    torch.manual_seed(0)
    return peft.get_peft_model(model, qn.peft_config(r=2))


def same_stacks(model: Any, expected: Stacks) -> None:
    """The bytes of sharded stacks, and of their scales."""
    found = stacks(model)
    assert found.keys() == expected.keys() and len(found) == 4
    for name, parts in found.items():
        for part, whole in zip(parts, expected[name], strict=True):
            assert isinstance(part, DTensor) and torch.equal(part.full_tensor(), whole)


def check(model: Any, expected: Stacks, seen: set[str]) -> None:
    """Compare what is gathered whenever experts are at work."""

    def compare(path: str, experts: Any) -> None:
        for name in ("gate_up_proj", "down_proj"):
            codes, absmax = expected[f"{path}.{name}"]
            assert torch.equal(experts.stack(name).packed, codes) and torch.equal(experts.stack(name).absmax, absmax)
        seen.add(path)

    for path, experts in {path: experts for path, experts, _, _ in quantized_stacks(model)}.items():
        experts.register_forward_hook(lambda experts, *_, path=path: compare(path, experts))


def on_two(rank: int, world: int, folder: Path, expected: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    found = {}
    for kind in KINDS:
        alone = qn.load_model(folder / kind, dtype=torch.float32)
        plan = rank_memory(qn.add_lora(alone, LORA), world)
        model = distributed.load_model(folder / kind, dtype=torch.float32, lora=LORA)
        assert rank > 0 or held_bytes(model) == plan.frozen
        seen: set[str] = set()
        check(model, stacks(alone), seen)
        found[kind] = distance(train(model, rank, world), expected[kind])
        assert len(seen) == 2
        same_stacks(model, stacks(alone))
    for double_quant in (True, False):
        model = with_patterns(folder / "Qwen3Moe", double_quant)
        before = held_bytes(model)
        kept = {name: (codes.clone(), absmax.clone()) for name, (codes, absmax) in stacks(model).items()}
        distributed.shard(model)
        assert held_bytes(model) < 0.52 * before
        found[f"PEFT {double_quant}"] = distance(train(model, rank, world), expected[f"PEFT {double_quant}"])
        same_stacks(model, kept)
        whole_checkpoint(model, str(folder / f"whole {double_quant}"))
    return found


def test_two_ranks_train_experts_as_one(tmp_path: Path) -> None:
    expected = {}
    for kind, changes in KINDS.items():
        save(tmp_path / kind, kind, **changes)
        expected[kind] = train(qn.add_lora(qn.load_model(tmp_path / kind, dtype=torch.float32), LORA))
    for double_quant in (True, False):
        expected[f"PEFT {double_quant}"] = train(with_patterns(tmp_path / "Qwen3Moe", double_quant))
    for found in on_ranks(2, on_two, tmp_path, expected):
        assert max(found.values()) <= 1e-5, found
