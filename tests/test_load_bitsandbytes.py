"""Checkpoints that bitsandbytes and transformers wrote, loaded without bitsandbytes: weights, logits and files.

bitsandbytes' layers answer in training mode here: in evaluation mode its CPU path rounds to bf16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_values
from safetensors.torch import load_file
from tiny_models import bitsandbytes_model, distance, edit_config, edit_tensors, four_bit_layers, logits, save
from torch import Tensor, nn

from qlora_native import reference
from qlora_native.models.load import load_model
from qlora_native.nn import QuantizedLinear

bitsandbytes = pytest.importorskip("bitsandbytes")


def write(folder: Path, dtype: torch.dtype, quant_type: str, nested: bool, storage: str) -> Any:
    """A folder that transformers saved with bitsandbytes' layers, and the model in training mode."""
    options = {"quant_type": quant_type, "use_double_quant": nested, "quant_storage": storage, "compute_dtype": dtype}
    save(folder / "dense", intermediate_size=128, attention_bias=True)  # its CPU kernels need rows of whole blocks
    model = bitsandbytes_model(folder / "dense", dtype, **{f"bnb_4bit_{name}": one for name, one in options.items()})
    model.save_pretrained(folder / "theirs")
    return model.train()


class ByReference(nn.Module):
    """A 4-bit layer in plain torch: the reference's decoded weight, torch's own linear layer."""

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = reference.dequantize(dtype, *layer.quantized.op_args())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_and_logits_are_theirs_and_the_file_is_saved_again(
    tmp_path: Path, dtype: torch.dtype, quant_type: str, nested: bool, storage: str
) -> None:
    theirs = write(tmp_path, dtype, quant_type, nested, storage)
    expected = logits(theirs)
    ours = load_model(tmp_path / "theirs", dtype=dtype)
    layers = four_bit_layers(ours)
    assert len(layers) == 14
    for path, layer in layers.items():
        weight = theirs.get_submodule(path).weight
        dense = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert same_values(layer.quantized.dequantize(), dense), path
        assert same_values(reference.dequantize(dtype, *layer.quantized.op_args()), dense), path

    assert distance(logits(ours), expected) < (1e-5 if dtype == torch.float32 else 1e-2)

    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "theirs/model.safetensors").read_bytes()
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "again"))
    assert after["quantization_config"] == before["quantization_config"]

    plain = load_model(tmp_path / "theirs", dtype=dtype, fuse=False)
    assert distance(logits(plain), expected) < (1e-5 if dtype == torch.float32 else 1e-2)
    for path in layers:
        plain.set_submodule(path, ByReference(plain.get_submodule(path), dtype))
    assert torch.equal(logits(plain.train()), expected)


def test_maps_that_differ_are_honored_and_saved(tmp_path: Path) -> None:
    """Both libraries' files hold their maps; bitsandbytes does not read the 16 levels, and this library does."""
    write(tmp_path, torch.float32, "nf4", True, "uint8")
    file = tmp_path / "theirs" / "model.safetensors"
    name = "model.layers.0.mlp.down_proj.weight"
    nested_map = f"{name}.nested_quant_map"
    edit_tensors(file.parent, lambda t: t[f"{name}.quant_map"].mul_(0.75))
    edit_tensors(file.parent, lambda t: t.update({nested_map: t[nested_map].flip(0)}))
    tensors = load_file(file)
    model = load_model(tmp_path / "theirs", dtype=torch.float32)
    got = model.get_submodule(name.removesuffix(".weight")).quantized.dequantize()
    state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    nested = tensors[nested_map][tensors[f"{name}.absmax"].long()]
    spread = tensors[f"{name}.nested_absmax"].repeat_interleave(256)[: nested.numel()]
    scales = (nested * spread + torch.tensor(state["nested_offset"])).repeat_interleave(64)
    packed = tensors[name].view(-1)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1).long()
    assert torch.equal(got, (tensors[f"{name}.quant_map"][codes] * scales).view(64, 128))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == file.read_bytes()


def test_a_config_with_4_bits_in_the_other_field(tmp_path: Path) -> None:
    """Some published folders have only `_load_in_4bit`."""
    theirs = write(tmp_path, torch.float32, "nf4", False, "uint8")
    quantization = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    del quantization["load_in_4bit"]
    assert quantization["_load_in_4bit"]
    edit_config(tmp_path / "theirs", quantization_config=quantization)
    assert distance(logits(load_model(tmp_path / "theirs", dtype=torch.float32)), logits(theirs)) < 1e-5
