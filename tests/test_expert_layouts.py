"""Experts with biases, and stored as [E, in, out]: gpt-oss' and Aria's; MXFP4 as gpt-oss is published in it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import families
import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import assert_same, dense_twin, distance, edit_config, edit_tensors, fill, logits
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qlora_native as qn
from qlora_native.models.build import four_bit_parts
from qlora_native.models.convert import convert
from qlora_native.models.load import load_model
from qlora_native.tool.estimate.model import Setting, meta_model

KINDS = [kind for kind in ("gpt_oss", "aria_text") if kind in families.known("gpt_oss aria_text")]
SIZES = {"hidden_size": 64, "intermediate_size": 96}  # so that no stack is square


def folder_of(kind: str, folder: Path) -> Path:
    families.make(kind, **SIZES).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_become_4_bit_and_compute_the_same(tmp_path: Path, kind: str) -> None:
    base = folder_of(kind, tmp_path / "base")
    model = load_model(base, dtype=torch.float32)
    stacks = [name for name in four_bit_parts(model) if ".experts." in name]
    assert len(stacks) == 2 * model.config.num_hidden_layers
    twin, worst = dense_twin(base, model)
    assert worst < 0.2 and distance(logits(model), logits(twin)) < 1e-5
    by_hooks = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=qn.QLoRANativeConfig()
    )
    for name, weight in four_bit_parts(model).items():
        other = four_bit_parts(by_hooks)[name]
        assert weight.shape == other.shape and torch.equal(weight.packed, other.packed)
    assert distance(logits(by_hooks.eval()), logits(model)) < 1e-5


@pytest.mark.parametrize("method", ["wmse", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_stacks(tmp_path: Path, kind: str, method: str) -> None:
    base = folder_of(kind, tmp_path / "base")
    model = load_model(base, dtype=torch.float32, method=method, calibration=torch.randint(3, 100, (24, 64)))
    assert not any(name.endswith(("gate_up_proj[0]", "down_proj[0]")) for name in model.load_report.fell_back)
    twin, worst = dense_twin(base, model)
    assert worst < 0.3 and distance(logits(model), logits(twin)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_class_its_stacks_back(tmp_path: Path, kind: str) -> None:
    base = folder_of(kind, tmp_path / "base")
    stored = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = qn.merge(load_model(base, dtype=torch.float32), "original", torch.float32)
    assert_same(model.state_dict(), stored.state_dict())
    model = load_model(base, dtype=torch.float32)
    twin, _ = dense_twin(base, model)
    assert_same(qn.merge(model, "dequantized", torch.float32).state_dict(), twin.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_folders(tmp_path: Path, kind: str) -> None:
    """4-bit and 16-bit again, file by file; the bytes of a load."""
    base = folder_of(kind, tmp_path / "base")
    for name in ("four_bit", "dense"):
        (tmp_path / name).mkdir()
    model = load_model(base)
    convert(base, tmp_path / "four_bit", "qlora")
    stored = load_model(tmp_path / "four_bit")
    for name, weight in four_bit_parts(model).items():
        assert torch.equal(four_bit_parts(stored)[name].packed, weight.packed)
    convert(tmp_path / "four_bit", tmp_path / "dense", "16bit")
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    merged = qn.merge(stored, base="dequantized")
    assert_same(decoded.state_dict(), merged.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapts_them(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    base = folder_of(kind, tmp_path / "base")
    model = load_model(base, dtype=torch.float32)
    names = sorted({name.rpartition(".")[2] for name in four_bit_parts(model) if ".experts." in name})
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=[f"experts.{name}" for name in names])
    twin, _ = dense_twin(base, model)
    ours = fill(peft.get_peft_model(model, config))
    ours.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(deepcopy(twin), tmp_path / "adapter").eval()
    assert distance(logits(theirs), logits(twin)) > 0.01
    assert distance(logits(ours), logits(theirs)) < 1e-5


def as_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Gives a folder of gpt-oss the form in which OpenAI publishes it; returns its stacks as transformers decodes them,
    [E, in, out]."""
    dense: dict[str, torch.Tensor] = {}

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            stack = tensors.pop(name).float().mT.contiguous()
            made = torch.from_numpy(gguf.quants.quantize(stack.numpy(), gguf.GGMLQuantizationType.MXFP4))
            blocks = made.view(*stack.shape[:2], -1, 17)
            codes = torch.cat((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), -1)  # of elements in order
            tensors[f"{name}_scales"] = blocks[..., 0].contiguous()
            tensors[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
            dense[name] = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])

    edit_tensors(folder, edit)
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return dense


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Any]:
    """A folder in MXFP4, and the model that it stands for."""
    base = folder_of("gpt_oss", tmp_path / "base")
    twin = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for name, stack in as_mxfp4(base).items():
        twin.get_parameter(name).data.copy_(stack)
    return base, twin


def test_mxfp4_is_kept_trained_on_and_merged(published: tuple[Path, Any], tmp_path: Path) -> None:
    base, twin = published
    model = load_model(base, dtype=torch.float32)
    kinds = {weight.quant_type for weight in four_bit_parts(model).values()}
    assert kinds == {"mxfp4"} and distance(logits(model), logits(twin)) < 1e-5
    adapted = fill(qn.add_lora(model, qn.LoraConfig(r=4, seed=0)))
    qn.save_adapter(adapted, tmp_path / "adapter")
    want = logits(adapted.eval())
    assert distance(want, logits(twin)) > 0.01
    merged = qn.merge(adapted, "dequantized", torch.float32)
    assert distance(logits(merged), want) < 1e-5
    (tmp_path / "dense").mkdir()
    convert(base, tmp_path / "dense", "16bit")
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(load_file(tmp_path / "dense/model.safetensors")[name], twin.get_parameter(name).bfloat16())


def test_mxfp4_estimated(published: tuple[Path, Any]) -> None:
    model, _ = meta_model(published[0], Setting())
    loaded = load_model(published[0])
    assert model.load_report.bytes_4bit == loaded.load_report.bytes_4bit > 0


def test_mxfp4_that_does_not_fit(published: tuple[Path, Any], sentence: Callable[[object], None]) -> None:
    base, _ = published
    name = "model.layers.0.mlp.experts.down_proj_scales"
    edit_tensors(base, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    with pytest.raises(qn.UserError) as error:
        load_model(base)
    sentence(str(error.value))


def test_what_is_not_written_in_mxfp4(
    published: tuple[Path, Any], tmp_path: Path, sentence: Callable[[object], None]
) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(qn.UserError) as error:
        convert(published[0], tmp_path / "other", "qlora")
    sentence(str(error.value))
