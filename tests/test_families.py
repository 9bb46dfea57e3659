"""Families of transformers, a tiny random model each: adapters in PEFT and from it, training, odd configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from tiny_models import dense_twin, distance, edit_config, fill, logits, save, tokens

import qlora_native as qn
from qlora_native.lora import LoraConfig, add_lora, lora_layers
from qlora_native.models.build import four_bit_parts
from qlora_native.models.load import load_model

NO_PRODUCTS = {
    # Of other forwards.
    "phimoe": "router",
    "llama4_text": "router",
    "deepseek_v4": "o_a_proj",
    # Whose weights other code reads.
    "deepseek_v32": "weights_proj",
    "jamba": "dt_proj",
    "nemotron_h": "out_proj",
}


@pytest.mark.parametrize("kind", families.known(" ".join(NO_PRODUCTS)))
def test_what_is_no_plain_product_gets_no_adapter(kind: str) -> None:
    adapted = {path.rpartition(".")[2] for path, _ in lora_layers(add_lora(families.make(kind), LoraConfig(r=4)))}
    assert NO_PRODUCTS[kind] not in adapted and len(adapted) > 3


# Each crashed in its first pass or step: Falcon, Gemma 3n and RoCBert change outputs of linear layers in place; PhiMoE,
# Llama 4 and DeepSeek-V4 have linear layers of other forwards; DeepSeek-V3.2 and the next three cast to the dtype of a
# linear layer's weight; Qwen2-MoE writes a sliding_window of 0.
TRAINED = "falcon gemma3n_text roc_bert phimoe llama4_text deepseek_v4 deepseek_v32 glm_moe_dsa axk2 hy_v4 qwen2_moe"


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


def test_a_sliding_window_of_0_is_none(tmp_path: Path, sentence: Callable[[object], None]) -> None:
    folder = save(tmp_path / "mistral", "Mistral", sliding_window=None)
    without = logits(load_model(folder, dtype=torch.float32))
    edit_config(folder, sliding_window=0)
    assert torch.equal(logits(load_model(folder, dtype=torch.float32)), without)
    folder = save(tmp_path / "gemma", "Gemma3Text", head_dim=16)
    edit_config(folder, sliding_window=0)
    with pytest.raises(qn.UserError) as error:
        load_model(folder)
    sentence(error.value)
