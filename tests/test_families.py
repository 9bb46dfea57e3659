"""Families of transformers, a tiny random model each: adapters in PEFT and from it, training, odd configs."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from tiny_models import dense_twin, distance, fill, tokens

from qlora_native.lora import LoraConfig, add_lora
from qlora_native.models.build import four_bit_parts
from qlora_native.models.load import load_model

# Each crashed in its first pass or step: Falcon, Gemma 3n and RoCBert change outputs of linear layers in place.
TRAINED = "falcon gemma3n_text roc_bert"


@pytest.mark.parametrize("kind", families.known(TRAINED))
def test_a_step_of_training(tmp_path: Path, kind: str) -> None:
    families.make(kind).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    assert four_bit_parts(model)
    twin, worst = dense_twin(tmp_path, model)
    assert worst < 0.15
    models = [fill(add_lora(each, LoraConfig(r=4, seed=0))).eval() for each in (model, twin)]
    ids = tokens()
    losses = [each(ids, labels=ids).loss for each in models]
    for loss in losses:
        loss.backward()
    assert distance(*(loss.detach() for loss in losses)) < 1e-5
    gradients = [{name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in models]
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 8
    for name, gradient in gradients[1].items():
        assert distance(gradients[0][name], gradient) < 1e-4, name
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    with torch.no_grad():
        assert model(ids, labels=ids).loss < losses[0]
