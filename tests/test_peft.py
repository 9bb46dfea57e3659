"""PEFT on 4-bit models: the same numbers as PEFT on the decoded weights, by way of one autograd node."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_models import assert_same, dense_twin, distance, fill, four_bit_layers, logits, save, tokens
from torch import nn
from transformers import AutoModelForCausalLM

import qlora_native as qn
from qlora_native.nn import QuantizedLinear
from qlora_native.nn.experts import quantized_stacks

peft = pytest.importorskip("peft")
FusedLayer: Any = pytest.importorskip("qlora_native.interop.peft").QuantizedLoraLinear


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base"))


def base(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = qn.QLoRANativeConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def both(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The adapter on a 4-bit model and on its dense twin, with the same values."""
    model = base(folder)
    twin = dense_twin(folder, model)[0]
    torch.manual_seed(1)
    ours = adapted(model, **options)
    theirs = peft.get_peft_model(twin, peft.LoraConfig(**{**DEFAULTS, **options}))
    theirs.load_state_dict({name: p for name, p in ours.named_parameters() if p.requires_grad}, strict=False)
    return ours, theirs


def state_of(model: Any, part: str = "") -> dict[str, torch.Tensor]:
    """A copy of the tensors with ``part`` in their names."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if part in name}


def fused_layers(model: Any) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, FusedLayer)}


def assert_same_gradients(ours: Any, theirs: Any) -> dict[str, torch.Tensor]:
    found, gradients = gradients_of(ours), gradients_of(theirs)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert distance(found[name], gradient) < 1e-4, name
    return found


def adapted(model: Any, **options: Any) -> Any:
    """The model with an adapter by peft_config, filled."""
    return fill(peft.get_peft_model(model, qn.peft_config(**options)))


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Of a training step, by name."""
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differing(got: qn.QuantizedWeight, dense: torch.Tensor) -> float:
    """The share of decoded elements that are not those of ``dense`` quantized: a code may move by one."""
    return float((got.dequantize(torch.float32) != qn.quantize(dense).dequantize()).float().mean())


DEFAULTS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

ADAPTERS: list[tuple[dict[str, Any], int, bool]] = [  # options, layers, whether they are one autograd node
    ({}, 14, True),
    ({"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}, 4, True),
    ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}}, 14, True),
    ({"init_lora_weights": "gaussian", "modules_to_save": ["lm_head"]}, 14, True),
    ({"use_dora": True, "r": 4}, 14, False),
    ({"init_lora_weights": "orthogonal"}, 14, True),
    ({"trainable_token_indices": {"embed_tokens": [17, 127], "lm_head": [17]}}, 14, True),
]


@pytest.mark.parametrize(
    ("options", "count", "fused"), ADAPTERS, ids=["+".join(options) or "plain" for options, *_ in ADAPTERS]
)
def test_the_adapter_computes_what_it_does_on_dense_weights(
    folder: Path, options: dict[str, Any], count: int, fused: bool
) -> None:
    ours, theirs = both(folder, **options)
    assert len(fused_layers(ours)) == count
    real = QuantizedLinear.with_adapter
    with patch.object(QuantizedLinear, "with_adapter", autospec=True, side_effect=real) as calls:
        assert_same_gradients(ours, theirs)
    assert calls.call_count == (count if fused else 0)
    assert distance(logits(ours), logits(theirs)) < 1e-5


def test_dropout_is_seen_by_the_adapter_alone(folder: Path) -> None:
    ours = adapted(base(folder), lora_dropout=0.5).train()
    layer = ours.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 64)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    low = layer.lora_A["default"](layer.lora_dropout["default"](x))
    assert distance(got, layer.base_layer(x) + layer.lora_B["default"](low) * 2) < 1e-5


@pytest.mark.parametrize("config", ["ours", "theirs"])
def test_the_layers_survive_saving(tmp_path: Path, folder: Path, config: str) -> None:
    made = qn.peft_config() if config == "ours" else peft.LoraConfig(**DEFAULTS)
    first = fill(peft.get_peft_model(base(folder), made)).eval()
    first.save_pretrained(tmp_path)
    second = peft.PeftModel.from_pretrained(base(folder), tmp_path)
    assert len(fused_layers(second)) == 14
    assert torch.equal(logits(second), logits(first))
    ours = qn.load_adapter(qn.load_model(folder, dtype=torch.float32, fuse=False), tmp_path)
    assert distance(logits(ours), logits(first)) < 1e-5


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 8}, {"use_dora": True}], ids=str)
def test_merging_quantizes_the_sum(folder: Path, options: dict[str, Any]) -> None:
    ours, theirs = both(folder, **options)
    before, with_adapter = state_of(ours), logits(ours)
    merged = theirs.merge_and_unload()
    ours.merge_adapter(safe_merge=True)
    for path, layer in four_bit_layers(ours).items():
        dense = merged.get_submodule(path.removeprefix("base_model.model.").removesuffix(".base_layer"))
        expected = qn.quantize(dense.weight).dequantize()
        assert distance(layer.quantized.dequantize(torch.float32), expected) < 0.2, path
        assert differing(layer.quantized, dense.weight) < 1e-2, path
    assert 0 < distance(logits(ours), with_adapter) < 0.3
    ours.unmerge_adapter()
    assert_same(ours.state_dict(), before)
    plain = ours.merge_and_unload()
    assert type(plain.model.layers[0].mlp.up_proj) is QuantizedLinear
    assert distance(logits(plain), with_adapter) < 0.3


def test_adapters_of_folders_by_name(folder: Path, tmp_path: Path) -> None:
    """Loaded, switched, turned off, added with weights, deleted, merged and unloaded: as the dense weights plus each
    weight times scale B A."""
    deltas: dict[str, dict[str, torch.Tensor]] = {}
    both: dict[str, dict[str, Any]] = {"a": {"r": 4}, "b": {"r": 2, "target_modules": ["q_proj"]}}
    for seed, (name, options) in enumerate(both.items()):
        made = fill(peft.get_peft_model(base(folder), peft.LoraConfig(**{**DEFAULTS, **options})), seed)
        made.save_pretrained(tmp_path / name)
        layers = fused_layers(made.base_model.model)
        deltas[name] = {path: layer.get_delta_weight("default") for path, layer in layers.items()}
    model = peft.PeftModel.from_pretrained(base(folder), tmp_path / "a", adapter_name="a").eval()
    model.load_adapter(tmp_path / "b", "b")
    before = state_of(model, "base_layer")

    def plain_torch(**weights: float) -> torch.Tensor:
        twin = dense_twin(folder, base(folder))[0]
        for name, weight in weights.items():
            for path, delta in deltas[name].items():
                twin.get_submodule(path).weight.data += weight * delta
        return logits(twin)

    assert distance(logits(model), plain_torch(a=1)) < 1e-5
    model.set_adapter("b")
    only_b = plain_torch(b=1)
    assert distance(logits(model), only_b) < 1e-5 < distance(only_b, plain_torch(a=1))
    with model.disable_adapter():
        assert distance(logits(model), plain_torch()) < 1e-5
    model.base_model.set_adapter(["a", "b"])
    assert distance(logits(model), plain_torch(a=1, b=1)) < 1e-5
    with torch.no_grad():
        mixed = model(input_ids=tokens(), adapter_names=["a", "__base__"]).logits
    assert distance(mixed, torch.stack([plain_torch(a=1)[0], plain_torch()[1]])) < 1e-5
    for kind, options in {"cat": {}, "svd": {"svd_rank": 6}}.items():
        model.add_weighted_adapter(["a", "b"], [0.25, 0.5], kind, combination_type=kind, **options)
        model.set_adapter(kind)
        assert distance(logits(model), plain_torch(a=0.25, b=0.5)) < 1e-5, kind
        model.delete_adapter(kind)
    model.delete_adapter("a")
    model.set_adapter("b")
    assert set(model.peft_config) == {"b"} and distance(logits(model), only_b) < 1e-5
    model.merge_adapter()
    assert 1e-5 < distance(logits(model), only_b) < 0.3
    model.unmerge_adapter()
    assert_same(state_of(model, "base_layer"), before)
    unloaded = model.unload()
    assert not fused_layers(unloaded)
    assert distance(logits(unloaded), plain_torch()) < 1e-5


def test_initializations_that_read_the_weights_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa'.*4-bit.*True"):
        peft.get_peft_model(base(folder), qn.peft_config(init_lora_weights="pissa"))


def test_some_layers_alone(folder: Path) -> None:
    model = peft.get_peft_model(base(folder), qn.peft_config(r=4, layers_to_transform=[1]))
    assert len(fused_layers(model)) == 7 and all(".layers.1." in path for path in fused_layers(model))


def test_preparing_for_training_does_no_harm(folder: Path) -> None:
    model = base(folder, torch.bfloat16, compute_dtype="bfloat16")
    before = state_of(model, "proj")
    prepared = peft.prepare_model_for_kbit_training(model)
    assert_same(state_of(prepared, "proj"), before)
    assert prepared.model.norm.weight.dtype == torch.float32
    trained = peft.get_peft_model(prepared, qn.peft_config(r=4))
    gradients = gradients_of(trained)
    assert all(bool(gradients[name].any()) for name, _ in trained.named_parameters() if ".lora_B" in name)


def test_conv1d_layers(tmp_path: Path) -> None:
    ours, theirs = both(save(tmp_path, "GPT2"), r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    assert distance(logits(ours), logits(theirs)) < 1e-5
    assert distance(logits(ours.merge_and_unload()), logits(theirs)) < 0.3


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
def test_experts(tmp_path: Path) -> None:
    """PEFT's "all-linear" means the stacks of experts as well, and the router."""
    save(tmp_path / "base", "Mixtral", num_local_experts=4, num_hidden_layers=1)
    ours, theirs = both(tmp_path / "base", r=4)
    assert sum("experts" in name for name in assert_same_gradients(ours, theirs)) == 4
    expected = logits(ours)
    assert distance(expected, logits(theirs)) < 1e-5
    ours.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base(tmp_path / "base"), tmp_path / "adapter")
    assert distance(logits(again), expected) < 1e-6
    before = state_of(ours, ".experts.")
    ours.merge_adapter(safe_merge=True)
    merged = theirs.merge_and_unload()
    stacks = list(quantized_stacks(ours.base_model.model))
    assert len(stacks) == 2
    for path, _, name, stack in stacks:
        there = merged.get_submodule(path.removesuffix(".base_layer.base_layer")).get_parameter(name)
        assert differing(stack, there) < 1e-2, name
    ours.unmerge_adapter()
    assert_same(state_of(ours, ".experts."), before)
    unloaded = ours.merge_and_unload()
    assert [stack.shape for *_, stack in quantized_stacks(unloaded)] == [stack.shape for *_, stack in stacks]


def test_a_copy_has_its_own_layers(folder: Path) -> None:
    ours = adapted(base(folder), r=4)
    twin = copy.deepcopy(ours)
    assert torch.equal(logits(twin), logits(ours))
    nn.init.zeros_(twin.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    assert not torch.equal(logits(twin), logits(ours))


def test_models_of_load_model_take_part(folder: Path) -> None:
    ours = fill(peft.get_peft_model(qn.load_model(folder, dtype=torch.float32), peft.LoraConfig(**DEFAULTS)))
    theirs = fill(peft.get_peft_model(base(folder), peft.LoraConfig(**DEFAULTS)))
    for name, parameter in ours.named_parameters():
        if ".lora_A" in name:
            parameter.data.copy_(theirs.get_parameter(name))
    assert distance(logits(ours), logits(theirs)) < 1e-4
