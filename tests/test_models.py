"""Architectures from one end to the other: load both ways, answer, train two steps, save, load again, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import assert_same, dense_twin, distance, logits, make, tokens
from transformers import AutoModelForCausalLM

import qlora_native as qn
from qlora_native.models.build import four_bit_parts

# Kind, changes to its config, 4-bit parameters, how far the logits may lie from those of the 16-bit model.
MODELS: list[tuple[str, dict[str, Any], int, float]] = [
    ("Llama", {}, 7, 0.25),
    ("Mistral", {}, 7, 0.25),
    ("Qwen2", {}, 7, 0.25),
    ("Qwen3", {"head_dim": 16}, 7, 0.25),
    ("Gemma2", {"head_dim": 16}, 7, 0.35),
    ("Gemma3Text", {"head_dim": 16}, 7, 0.35),
    ("Phi3", {}, 4, 0.25),
    ("GPTNeoX", {}, 4, 0.25),
    ("GPT2", {"n_layer": 1}, 4, 0.25),
    ("Olmo2", {}, 7, 0.35),
    ("Mixtral", {"num_local_experts": 4}, 6, 0.25),
    ("Qwen3Moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, 6, 0.35),
]


@pytest.mark.parametrize(("kind", "changes", "count", "bound"), MODELS, ids=[kind for kind, *_ in MODELS])
def test_from_one_end_to_the_other(
    tmp_path: Path, kind: str, changes: dict[str, Any], count: int, bound: float
) -> None:
    layers = {} if kind == "GPT2" else {"num_hidden_layers": 1}
    dense = make(kind, torch.bfloat16, **layers, **changes)
    dense.save_pretrained(tmp_path / "dense")
    model = qn.load_model(tmp_path / "dense", dtype=torch.float32, fuse=False)
    options: Any = {"quantization_config": qn.QLoRANativeConfig(), "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)
    ours = four_bit_parts(model)
    assert len(ours) == count
    assert_same(*({name: part.packed for name, part in four_bit_parts(one).items()} for one in (theirs, model)))
    assert torch.equal(logits(theirs), logits(model))

    twin, worst = dense_twin(tmp_path / "dense", model)
    assert worst < 0.12
    assert distance(logits(model), logits(twin)) < 1e-5
    assert 1e-4 < distance(logits(model), logits(dense.float())) < bound

    report = model.load_report
    every = dict(model.named_parameters())
    assert set(report.dense) == set(every) - set(ours)
    assert report.bytes_4bit == sum(weight.nbytes for weight in ours.values())
    assert f"{100 * report.share_4bit:.1f} %" in str(report)
    assert next(iter(report.dense)) in str(report)

    theirs.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(theirs))

    qn.add_lora(model, qn.LoraConfig(r=4, seed=0)).train()
    optimizer = qn.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = tokens(), []
    for _ in range(3):
        loss = model(input_ids=batch, labels=batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]

    model.eval()
    expected = logits(model)
    merged = qn.merge(model, base="dequantized", dtype=torch.float32)
    assert not four_bit_parts(merged)
    assert distance(logits(merged), expected) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert distance(logits(plain), expected) < 1e-4
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("merged", "dense")]
    assert names[0] == names[1]


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_merge_to_the_original_weights(tmp_path: Path, kind: str) -> None:
    changes = {name: options for name, options, _, _ in MODELS}[kind]
    dense = make(kind, torch.bfloat16, num_hidden_layers=1, **changes)
    dense.save_pretrained(tmp_path)
    assert_same(qn.merge(qn.load_model(tmp_path), base="original").state_dict(), dense.state_dict())


@pytest.mark.parametrize("double_quant", [False, True])
def test_experts_quantized_one_by_one_have_the_bytes_of_the_stack(tmp_path: Path, double_quant: bool) -> None:
    dense = make("Mixtral", torch.bfloat16, num_hidden_layers=1, num_local_experts=4)
    dense.save_pretrained(tmp_path)  # experts one by one
    model = qn.load_model(tmp_path, double_quant=double_quant)
    stacks = {name: weight for name, weight in four_bit_parts(model).items() if ".experts." in name}
    assert len(stacks) == 2
    for name, weight in stacks.items():
        assert_same(qn.to_bnb(weight), qn.to_bnb(qn.quantize(dense.get_parameter(name), double_quant=double_quant)))
