"""Adapters in a model: where they go, how they begin, what they compute and what they add when merged."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import dense_twin, distance, fill, logits, make, save
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import qlora_native as qn
from qlora_native.lora import LoraConfig, LoRALinear, adapters_off, add_lora, load_adapter, lora_layers, save_adapter
from qlora_native.models.load import load_model
from qlora_native.models.merge import merge
from qlora_native.nn import QuantizedLinear


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base"))


def make_layer(base: str, dropout: float = 0.0) -> tuple[LoRALinear, torch.Tensor]:
    """A layer of 24 inputs and 40 outputs with rank 4, and its dense weight."""
    dense = nn.Linear(24, 40)
    layer = QuantizedLinear.from_linear(dense) if base == "4-bit" else dense
    weight = layer.quantized.dequantize() if isinstance(layer, QuantizedLinear) else dense.weight.detach()
    lora = LoRALinear(layer, 4, 1.5, dropout)
    nn.init.normal_(lora.lora_B)
    return lora, weight


@pytest.mark.parametrize("base", ["4-bit", "dense"])
def test_forward_and_gradients(base: str) -> None:
    layer, weight = make_layer(base)
    x = torch.randn(3, 5, 24, requires_grad=True)
    up = torch.randn(3, 5, 40)
    (layer(x) * up).sum().backward()
    a, b, seen = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B, x))
    expected = F.linear(seen, weight + 1.5 * b @ a, layer.bias)
    (expected * up).sum().backward()
    torch.testing.assert_close(layer(x), expected)
    for got, truth in ((layer.lora_A, a), (layer.lora_B, b), (x, seen)):
        assert got.grad is not None
        torch.testing.assert_close(got.grad, truth.grad)


@pytest.mark.parametrize("base", ["4-bit", "dense"])
def test_dropout_reaches_the_adapter_only_and_only_in_training(base: str) -> None:
    layer, weight = make_layer(base, dropout=0.5)
    x = torch.randn(7, 24)
    whole = F.linear(x, weight + 1.5 * layer.lora_B @ layer.lora_A, layer.bias)
    torch.testing.assert_close(layer.eval()(x), whole)
    torch.manual_seed(11)
    got = layer.train()(x)
    torch.manual_seed(11)
    dropped = F.dropout(x, 0.5)
    assert 0.2 < float((dropped == 0).float().mean()) < 0.8
    added = 1.5 * dropped @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(got, F.linear(x, weight, layer.bias) + added)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_stay_fp32_in_a_16_bit_model(dtype: torch.dtype) -> None:
    layer, _ = make_layer("4-bit")
    layer.base_layer.bias.data = layer.base_layer.bias.data.to(dtype)
    x = torch.randn(6, 24).to(dtype).requires_grad_()
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == dtype and layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer.lora_A.grad is not None and layer.lora_A.grad.dtype == torch.float32


def test_what_is_wrapped_and_what_trains(folder: Path) -> None:
    model = load_model(folder)
    before = logits(model)
    assert add_lora(model, LoraConfig(r=4)) is model
    layers = dict(lora_layers(model))
    assert len(layers) == 14 and not any("lm_head" in path for path in layers)
    assert torch.equal(logits(model), before), "a new adapter changes nothing"
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{path}.lora_{side}" for path in layers for side in "AB"}
    layer = layers["model.layers.0.self_attn.k_proj"]
    assert (layer.lora_A.shape, layer.lora_B.shape, layer.scale) == ((4, 64), (32, 4), 32 / 4)
    assert (layer.in_features, layer.out_features) == (64, 32)
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(model, LoraConfig())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_prj"]}, "'q_prj': did you mean q_proj"),
    ({"target_modules": ["qproj", "q_proj"]}, "'qproj': did you mean q_proj"),
    ({"target_modules": ["zzz"]}, "it has down_proj, gate_proj"),
    ({"target_modules": ["proj"]}, "no linear layer named 'proj'"),  # an ending is one at a dot
    ({"target_modules": ["input_layernorm"]}, "no linear layer named 'input_layernorm'"),
    ({"target_modules": []}, "target_modules is empty"),
    ({"layers_to_transform": [0, 2]}, "has no layer 2 to adapt"),
    ({"rank_pattern": {"q_porj": 2}}, "'q_porj' matches no layer"),
    ({"alpha_pattern": {"layers.1.*": 2}, "layers_to_transform": [0]}, r"'layers\.1\.\*' matches no layer"),
    ({"modules_to_save": ["up_proj"]}, r"up_proj is quantized.*skip_modules=\('up_proj',\)"),
    ({"modules_to_save": ["lm_hed"]}, "no module named 'lm_hed': did you mean lm_head"),
    ({"r": 0}, "rank 'r' is 0"),
    ({"rank_pattern": {"q_proj": 1.5}}, "rank 'q_proj' is 1.5"),
    ({"dropout": 1.0}, "dropout is 1.0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_a_refused_config_leaves_the_model_alone(folder: Path, options: dict[str, Any], message: str) -> None:
    model = load_model(folder)
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoraConfig(**options))
    assert not list(lora_layers(model))


def test_targets_by_name(folder: Path) -> None:
    def wrapped(*names: str) -> set[str]:
        return set(dict(lora_layers(add_lora(load_model(folder), LoraConfig(target_modules=[*names])))))

    assert wrapped("q_proj") == {f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)}
    assert wrapped("layers.1.mlp.up_proj") == {"model.layers.1.mlp.up_proj"}
    assert wrapped("lm_head", "1.mlp.gate_proj") == {"lm_head", "model.layers.1.mlp.gate_proj"}


def test_seeds(folder: Path) -> None:
    def first(seed: int | None) -> list[torch.Tensor]:
        return [layer.lora_A for _, layer in lora_layers(add_lora(load_model(folder), LoraConfig(r=4, seed=seed)))]

    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, again, other = first(1), first(1), first(2)
    assert torch.equal(torch.get_rng_state(), state), "a seed of its own leaves torch's alone"
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[3]), "two layers of one shape differ"
    assert not torch.equal(first(None)[0], first(None)[0])
    bound = math.sqrt(1 / 64)  # Kaiming uniform with a = sqrt(5): variance 1 / (3 K)
    assert one[0].abs().max() <= bound
    assert abs(float(one[0].detach().std()) - bound / math.sqrt(3)) < 0.1 * bound


def test_an_adapter_is_turned_off_and_unloaded(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    plain = logits(model)
    fill(add_lora(model, LoraConfig(r=4)))
    adapted = logits(model)
    assert distance(adapted, plain) > 0.01
    with adapters_off(model):
        assert torch.equal(logits(model), plain)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(logits(model), adapted)
    qn.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(qn.unload_adapter(model)), plain)
    assert not {"lora_config", "save_pretrained"} & set(vars(model))
    assert torch.equal(logits(qn.load_adapter(model, tmp_path / "adapter")), adapted)
    add_lora(qn.unload_adapter(model), LoraConfig(r=2))


def test_a_copy_and_a_pickle_save_their_own_adapter(folder: Path, tmp_path: Path) -> None:
    model = fill(add_lora(load_model(folder), LoraConfig(r=4)))
    for name, twin in {"copy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}.items():
        changed: Any = fill(twin, seed=4)
        changed.save_pretrained(tmp_path / name)
        assert not (tmp_path / name / "model.safetensors").exists()
        fresh = qn.load_adapter(load_model(folder), tmp_path / name)
        assert torch.equal(logits(fresh), logits(changed)) and not torch.equal(logits(fresh), logits(model))


def test_modules_trained_whole(folder: Path) -> None:
    model = load_model(folder)
    add_lora(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad
    model.lm_head.weight.data.fill_(0.25)
    got = merge(model, "original", torch.float32)
    assert (got.lm_head.weight == 0.25).all() and got.lm_head.weight.dtype == torch.float32


def saved_and_loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def merged_truth(folder: Path, model: PreTrainedModel, base: str) -> PreTrainedModel:
    """The fp32 model whose weights are W + scale * B A, by plain transformers and torch."""
    twin = dense_twin(folder, model)[0] if base == "dequantized" else AutoModelForCausalLM.from_pretrained(folder)
    for path, layer in lora_layers(model):
        there = twin.get_submodule(path)
        delta = layer.scale * layer.lora_B.detach() @ layer.lora_A.detach()
        there.weight.data += delta if isinstance(there, nn.Linear) else delta.t()
    return twin.float().eval()


@pytest.mark.parametrize("base", ["original", "dequantized"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mixtral"])
@pytest.mark.parametrize("names", ["all-linear", "some"])
def test_merge_gives_a_plain_model(tmp_path: Path, base: str, kind: str, names: str) -> None:
    extra: dict[str, Any] = {"num_local_experts": 4} if kind == "Mixtral" else {}
    folder = save(tmp_path / "model", kind, **extra)
    targets = names if names == "all-linear" else ["c_attn"] if kind == "GPT2" else ["v_proj", "lm_head"]
    model = fill(add_lora(load_model(folder, dtype=torch.float32), LoraConfig(r=4, target_modules=targets)))
    truth = merged_truth(folder, model, base)
    got: Any = merge(model, base, torch.float32)
    assert id(got) == id(model)
    assert not any(isinstance(module, (QuantizedLinear, LoRALinear)) for module in got.modules())
    assert distance(logits(got), logits(truth)) < 1e-5
    assert got.load_report.bytes_4bit == 0
    assert not any(parameter.requires_grad for parameter in got.parameters())
    assert kind != "GPT2" or isinstance(got.transformer.h[0].attn.c_attn, Conv1D)
    assert torch.equal(logits(saved_and_loaded(got, tmp_path / "merged")), logits(got))


def test_merge_rounds_once_to_the_dtype_asked_for(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")  # stored in fp32, loaded in bf16, merged in fp16: nothing may pass through bf16
    model = fill(add_lora(load_model(folder), LoraConfig(r=4)))
    truth = merged_truth(folder, model, "original").half()
    got = merge(model, "original", torch.float16)
    assert got.config.dtype == torch.float16
    expected = dict(truth.named_parameters())
    for name, parameter in got.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=0, msg=name)


def test_merge_of_a_tied_output_embedding_unties_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tie_word_embeddings=True)
    model = load_model(folder, dtype=torch.float32)
    fill(add_lora(model, LoraConfig(r=4, target_modules=["lm_head"])))
    expected = logits(model)
    got = merge(model, "dequantized", torch.float32)
    assert distance(logits(got), expected) < 1e-5
    assert distance(logits(saved_and_loaded(got, tmp_path / "merged")), expected) < 1e-5


def test_merge_refuses(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    with pytest.raises(ValueError, match="base is 'originl': expected 'original'"):
        merge(model, "originl")
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        merge(model, dtype=torch.int8)
    model.save_pretrained(tmp_path / "four")
    with pytest.raises(qn.UserError, match="holds 4-bit weights and no original"):
        merge(load_model(tmp_path / "four"))
    with pytest.raises(ValueError, match="not loaded by load_model"):
        merge(make())
    model = load_model(save(tmp_path / "changed"))
    save(tmp_path / "changed", intermediate_size=128)
    with pytest.raises(qn.UserError, match=r"has changed .*down_proj.weight is \[64, 128\] there now"):
        merge(model)


def test_an_older_adapter_that_corrects_its_base_loads_and_says_so(folder: Path, tmp_path: Path) -> None:
    save_adapter(fill(add_lora(load_model(folder), LoraConfig(r=4))), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, {"qlora_native.init": "loftq"})
    with pytest.warns(UserWarning, match="init loftq.* base 'dequantized'"):
        model = load_adapter(load_model(folder), tmp_path / "adapter")
    assert all(layer.lora_B.any() for _, layer in lora_layers(model))
