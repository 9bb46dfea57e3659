"""Families of transformers, a tiny random model each: adapters in PEFT and from it, training, odd configs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tiny_models import dense_twin, distance, edit_config, fill, logits, save, tokens

import qlora_native as qn
from qlora_native.lora import LoraConfig, adapter_settings, add_lora, load_adapter, lora_layers, save_adapter
from qlora_native.models.build import four_bit_parts
from qlora_native.models.load import load_model

peft = pytest.importorskip("peft")

# transformers' renaming of laguna's keys matches its own result: PEFT reads no adapter of the shared experts back.
LAGUNA = pytest.param("laguna", marks=[pytest.mark.long, pytest.mark.xfail(raises=UserWarning, strict=True)])


@contextmanager
def no_warnings(but: str = "(?!)") -> Iterator[None]:
    """Inside, every warning is an error, but for one of transformers about a name that PEFT uses, and ``but``."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", but)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def in_peft(model: Any, folder: Path) -> Any:
    """A copy of the model with the adapter of a folder, by PEFT."""
    return peft.PeftModel.from_pretrained(deepcopy(model), folder).eval()


@pytest.mark.parametrize(
    "kind",
    [
        *families.known(families.MIXTURES),
        *(pytest.param(kind, marks=pytest.mark.long) for kind in families.known(families.MORE_MIXTURES)),
        LAGUNA,
    ],
)
def test_an_adapter_of_a_mixture_is_one_here_and_in_peft(tmp_path: Path, kind: str) -> None:
    model = families.make(kind)
    ours = fill(add_lora(deepcopy(model), LoraConfig(r=4, seed=0)))
    save_adapter(ours, tmp_path / "ours")
    assert distance(logits(ours), logits(model)) > 0.01
    with no_warnings():
        theirs = in_peft(model, tmp_path / "ours")
        assert distance(logits(theirs), logits(ours)) < 1e-5
        fill(theirs, seed=4).save_pretrained(tmp_path / "theirs")
        again = load_adapter(deepcopy(model), tmp_path / "theirs")
    assert distance(logits(again), logits(ours)) > 0.001
    assert distance(logits(again), logits(theirs)) < 1e-5


OPTIONS: list[dict[str, Any]] = [
    {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    {"rank_pattern": {"q_proj": 2, "shared_expert.up_proj|o_proj": 3}, "alpha_pattern": {r"down_\w+$": 5}},
    {"rslora": True, "dropout": 0.25, "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_the_settings_of_such_an_adapter(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tmp_path / "base"
    families.make("qwen3_next").save_pretrained(folder)
    config = LoraConfig(**{"r": 4, "seed": 0, **options})
    ours = fill(add_lora(load_model(folder, dtype=torch.float32), config)).eval()
    save_adapter(ours, tmp_path / "ours")
    for base in (dense_twin(folder, ours)[0], load_model(folder, dtype=torch.float32)):
        with no_warnings("The following alpha_pattern keys did not match"):  # PEFT asks target_modules alone
            assert distance(logits(in_peft(base, tmp_path / "ours")), logits(ours)) < 1e-5
    again = load_adapter(load_model(folder, dtype=torch.float32), tmp_path / "ours")
    assert torch.equal(logits(again.eval()), logits(ours))
    names = ("dropout", "rank_pattern", "alpha_pattern", "rslora")
    found = adapter_settings(tmp_path / "ours")
    assert {name: found[name] for name in names} == {name: getattr(config, name) for name in names}
    assert set(found["target_modules"]) == set(dict(lora_layers(ours)))
    written = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert "model.layers.1.mlp.shared_expert.up_proj.weight" in written["target_parameters"]
    assert not any(name.endswith(("up_proj", "gate_proj", "down_proj")) for name in written["target_modules"])


def test_two_such_adapters_on_one_4_bit_model(tmp_path: Path) -> None:
    families.make("qwen3_next").save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base", dtype=torch.float32)
    for seed in (3, 4):
        ours = fill(add_lora(deepcopy(base), LoraConfig(r=4, seed=seed)), seed)
        save_adapter(ours, tmp_path / f"{seed}")
    theirs = in_peft(base, tmp_path / "3")
    theirs.load_adapter(tmp_path / "4", "second")
    theirs.set_adapter("second")
    assert distance(logits(theirs), logits(ours)) < 1e-5


def test_adapters_of_experts_are_refused(tmp_path: Path, sentence: Callable[[object], None]) -> None:
    model = families.make("qwen3_moe")
    config = peft.LoraConfig(r=4, target_modules=["up_proj", "gate_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.raises(qn.UserError) as error:
        load_adapter(model, tmp_path)
    sentence(str(error.value).replace("'down_proj', 'gate_up_proj'", "'gate_up_proj', 'down_proj'"))


NO_PRODUCTS = {
    # Of other forwards.
    "phimoe": "router",
    "llama4_text": "router",
    "deepseek_v4": "o_a_proj",
    # Whose weights other code reads.
    "jamba": "dt_proj",
    # On which a choice of tokens depends, and no gradient.
    "deepseek_v32": "weights_proj",
}


@pytest.mark.parametrize("kind", families.known(" ".join(NO_PRODUCTS)))
def test_what_is_no_plain_product_gets_no_adapter(kind: str) -> None:
    adapted = {path.rpartition(".")[2] for path, _ in lora_layers(add_lora(families.make(kind), LoraConfig(r=4)))}
    assert NO_PRODUCTS[kind] not in adapted and len(adapted) > 3


# Each crashed in its first pass or step: Falcon, Gemma 3n and RoCBert change outputs of linear layers in place; PhiMoE,
# Llama 4 and DeepSeek-V4 have linear layers of other forwards; DeepSeek-V3.2 and the next three cast to the dtype of a
# linear layer's weight; Qwen2-MoE writes a sliding_window of 0.
# Nemotron-H passes the weight of its out_proj to a kernel that is not installed.
TRAINED = "falcon gemma3n_text roc_bert phimoe llama4_text deepseek_v4 deepseek_v32 glm_moe_dsa axk2 hy_v4 qwen2_moe"
TRAINED += " nemotron_h"


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
