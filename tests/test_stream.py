"""The stream of a model's tensors: what its transforms make, against whole tensors; nothing is read too early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bytes
from tiny_models import edit_tensors, save
from torch import Tensor

import qlora_native as qn
from qlora_native.lora.adapter import StoredAdapter
from qlora_native.weights import stream as module
from qlora_native.weights.files import StoredTensor
from qlora_native.weights.open import open_source
from qlora_native.weights.shapes import ModelShapes
from qlora_native.weights.stream import Item, Transform, stream
from qlora_native.weights.transforms import adding, decoding, recoding, rounding

OPTIONS: dict[str, Any] = {"quant_type": "nf4", "block_size": 64, "double_quant": True}
MIXTRAL: dict[str, Any] = {"num_local_experts": 4}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 4096)  # so that tiny tensors come in several parts


def items_of(folder: Path, *transforms: Any, **options: Any) -> dict[str, Item]:
    """The items by name; a transform may be a function of the model's shapes that makes one."""
    source = open_source(folder)
    meta = ModelShapes(source.config, torch.float32)
    made: list[Transform] = [make(meta) for make in transforms]
    return {item.name: item for item in stream(source, meta, made, **options)}


def to_four_bit(meta: ModelShapes) -> Transform:
    return rounding(meta, meta.four_bit_weights((), 64), OPTIONS)


def truth(folder: Path) -> dict[str, Tensor]:
    """The tensors that transformers gives the model."""
    from transformers import AutoModelForCausalLM

    return {name: tensor.clone() for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path)

    def refused(*_: Any) -> Tensor:
        raise AssertionError("read too early")

    monkeypatch.setattr(StoredTensor, "read", refused)
    monkeypatch.setattr(StoredTensor, "read_part", refused)
    items = items_of(folder, to_four_bit, lambda meta: decoding(lambda name: True))
    with pytest.raises(AssertionError, match="too early"):
        next(items["model.layers.1.mlp.up_proj.weight"].rows())


@pytest.mark.parametrize(("kind", "changes"), [("Llama", {}), ("GPT2", {}), ("Mixtral", MIXTRAL)])
def test_parts_have_the_bytes_of_the_whole(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    folder = save(tmp_path, kind, **changes)
    expected = truth(folder)
    items = items_of(folder, to_four_bit)
    made = {name: item for name, item in items.items() if item.weight is not None}
    assert len(made) > 7
    for name, item in made.items():
        dense = expected[name].t().contiguous() if kind == "GPT2" else expected[name]
        whole = qn.quantize(dense, **OPTIONS)
        codes: list[Tensor] = []
        (value,) = [value for _, value in item.values()]
        assert isinstance(value, qn.QuantizedWeight) and item.weight is not None
        for weight in (item.weight(), value, item.weight(codes.append)):
            assert same_bytes(weight.absmax, whole.absmax) and weight.shape == whole.shape, name
            assert weight.nested_offset == whole.nested_offset
        assert same_bytes(item.weight().packed, whole.packed) and same_bytes(value.packed, whole.packed)
        assert same_bytes(torch.cat(codes), whole.packed)
    for name, item in items.items():
        if name not in made:
            ((_, value),) = item.values()
            assert item.is_stored and isinstance(value, Tensor) and torch.equal(value, expected[name])


def test_one_transform_after_another(tmp_path: Path) -> None:
    """As a merge over the 4-bit base does it: rounded, decoded, the adapter added, rounded again."""
    folder = save(tmp_path)
    path = "model.layers.0.mlp.down_proj"
    name, dense = f"{path}.weight", truth(folder)[f"{path}.weight"]
    a, b = torch.randn(4, dense.shape[1]), torch.randn(dense.shape[0], 4)
    base = qn.quantize(dense, **OPTIONS).dequantize(torch.float32)
    adapter = StoredAdapter({path: (a, b, 0.5)}, {})
    steps = [to_four_bit, lambda meta: decoding(lambda name: True), lambda meta: adding(adapter, {})]
    item = items_of(folder, *steps)[name]
    total = base + (b @ a) * 0.5
    torch.testing.assert_close(torch.cat([*item.rows()]), total, rtol=1e-6, atol=1e-6)
    again = items_of(folder, *steps, to_four_bit)[name]
    assert again.weight is not None
    assert same_bytes(again.weight().packed, qn.quantize(torch.cat([*item.rows()]), **OPTIONS).packed)

    head = torch.ones(7, 64)
    replaced = items_of(folder, lambda meta: adding(adapter, {"lm_head.weight": head}))["lm_head.weight"]
    assert replaced.shape == (7, 64) and torch.equal(torch.cat([*replaced.rows()]), head)


def test_codes_from_a_file_lie_under_the_same_scales(tmp_path: Path) -> None:
    folder, path = save(tmp_path / "model"), "model.layers.1.self_attn.q_proj"
    before = items_of(folder, to_four_bit)[f"{path}.weight"].weight
    assert before is not None
    packed = before().packed.flip(0)
    packed.numpy().tofile(tmp_path / "codes")
    after = items_of(folder, to_four_bit, lambda meta: recoding({path: tmp_path / "codes"}))
    changed = {name for name, item in after.items() if item.weight and not same_bytes(item.weight().packed, packed)}
    assert len(changed) == 14 and f"{path}.weight" not in changed
    weight = after[f"{path}.weight"].weight
    assert weight is not None and same_bytes(weight().absmax, before().absmax)


def test_one_layer(tmp_path: Path) -> None:
    prefix = "model.layers.1."
    names = set(items_of(save(tmp_path), prefix=prefix))
    assert len(names) == 9 and all(name.startswith(prefix) for name in names)


def test_a_weight_that_is_not_finite_is_named_with_its_element(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def put(tensors: dict[str, Tensor]) -> None:
        tensors[name][70, 5] = float("inf")

    folder = save(tmp_path)
    edit_tensors(folder, put)
    item = items_of(folder, to_four_bit)[name]
    assert item.weight is not None
    for make in (item.weight, lambda: [*item.values()]):
        with pytest.raises(qn.UserError, match=rf"{name} .* element \[70, 5\] .* inf"):
            make()
