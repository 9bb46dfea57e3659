"""transformers' own loading and saving with QLoRANativeConfig, against load_model and plain torch."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import ROOT
from safetensors.torch import load_file, save_file
from tiny_models import assert_same, distance, edit_config, edit_tensors, four_bit_layers, logits, make, save
from transformers import AutoConfig, AutoModelForCausalLM

import qlora_native as qn
from qlora_native.nn import QuantizedLinear

FEW: dict[str, dict[str, Any]] = {"Mixtral": {"num_local_experts": 4}}  # changes to a kind's config, for speed


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, device_map: Any = None, **options: Any) -> Any:
    """The model by from_pretrained; ``options`` are QLoRANativeConfig's."""
    config = qn.QLoRANativeConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map=device_map)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.bfloat16, torch.float16)],
)
def test_the_model_is_that_of_load_model(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    model = load(save(tmp_path, dtype=stored, attention_bias=True), dtype)
    ours = qn.load_model(tmp_path, dtype=dtype, fuse=False)
    assert model.state_dict().keys() == ours.state_dict().keys()
    if stored != torch.bfloat16 or dtype != torch.float16:  # transformers casts before, load_model after quantizing
        assert_same(model.state_dict(), ours.state_dict())
        assert torch.equal(logits(model), logits(ours))
    assert model.load_report.dense == ours.load_report.dense
    assert model.load_report.num_bytes == ours.load_report.num_bytes
    assert f"{100 * ours.load_report.share_4bit:.1f} % of them 4-bit; not 4-bit: model.embed" in str(model.load_report)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    scales = {buffer.dtype for name, buffer in model.named_buffers() if name.endswith("absmax")}
    assert scales == {torch.uint8, torch.float32}


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mixtral", "GPTNeoX"])
def test_saved_and_loaded_again(tmp_path: Path, kind: str) -> None:
    model = load(save(tmp_path / "dense", kind, torch.bfloat16, **FEW.get(kind, {})), block_size=32, double_quant=False)
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["block_size"]) == ("qlora_native", 32)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("saved", "again")))
    ours = qn.load_model(tmp_path / "saved", fuse=False)
    assert torch.equal(logits(ours), logits(model))
    assert ours.config.quantization_config["quant_method"] == "qlora_native"


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mixtral"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_dequantize_gives_the_dense_model(tmp_path: Path, kind: str, dtype: torch.dtype | None) -> None:
    model = load(save(tmp_path / "dense", kind, torch.bfloat16, **FEW.get(kind, {})))
    before = logits(model).float()
    classes = {path: type(module) for path, module in make(kind, **FEW.get(kind, {})).named_modules()}
    dense = model.dequantize(dtype)
    assert {path: type(module) for path, module in dense.named_modules()} == classes
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype or torch.bfloat16}
    assert distance(logits(dense).float(), before) < 3e-2
    dense.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dense.dtype)
    assert distance(logits(plain), logits(dense)) < 1e-6


def test_output_embedding_and_tied_weights_stay_dense(tmp_path: Path) -> None:
    tied = load(save(tmp_path / "tied", tie_word_embeddings=True), skip_modules=[])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert type(load(save(tmp_path / "untied")).lm_head) is torch.nn.Linear
    assert isinstance(load(tmp_path / "untied", skip_modules=[]).lm_head, QuantizedLinear)
    some = four_bit_layers(load(tmp_path / "untied", llm_int8_skip_modules=["layers.1", "lm_head"]))
    assert some and all("layers.0" in path for path in some)
    with pytest.raises(ValueError, match=r"no module 'q_prj'; did you mean q_proj"):
        load(tmp_path / "untied", skip_modules=["q_prj"])


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_map(tmp_path: Path, device_map: Any) -> None:
    model = load(save(tmp_path, dtype=torch.bfloat16), device_map=device_map)
    assert torch.equal(logits(model), logits(qn.load_model(tmp_path, fuse=False)))


def test_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on the disk.*'cpu'"):
        load(save(tmp_path), device_map={"model": "disk", "lm_head": "cpu"})


def as_8bit(folder: Path, dtype: torch.dtype, scaled: bool, block: int = 64) -> dict[str, torch.Tensor]:
    """Make the linear weights of a folder 8-bit floats; returns their values in fp32."""
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensor = tensors[name]
        scales = torch.ones(-(-tensor.shape[0] // block), -(-tensor.shape[1] // block))
        if scaled:
            tensors[f"{name}_scale_inv"] = scales = torch.rand_like(scales) + 0.5
        spread = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[: tensor.shape[0], : tensor.shape[1]]
        tensors[name] = (tensor / spread).to(dtype)
        meant[name] = tensors[name].float() * spread
    save_file(tensors, folder / "model.safetensors")
    if scaled:
        edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [block, block]})
    return meant


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scaled", [False, True])
def test_8bit_floats(tmp_path: Path, kind: torch.dtype, scaled: bool) -> None:
    save(tmp_path)
    meant = as_8bit(tmp_path, kind, scaled)  # 96 rows in blocks of 64: the last block is smaller
    theirs, ours = load(tmp_path), qn.load_model(tmp_path, fuse=False)
    for name, truth in meant.items():
        layers = [model.get_submodule(name.removesuffix(".weight")) for model in (ours, theirs)]
        by_us, by_them = (layer.quantized.dequantize(torch.float32) for layer in layers)
        expected = qn.quantize(truth.bfloat16()).dequantize(torch.float32)
        assert torch.equal(by_us, expected), name
        # transformers rounds the scales to 16 bits, so a code may move by one: no worse for it.
        assert (by_them - truth).norm() <= (1.02 if scaled else 1) * (expected - truth).norm(), name
    assert not scaled or AutoConfig.from_pretrained(tmp_path).quantization_config["quant_method"] == "fp8"


def test_scaled_experts_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.mlp.experts.0.w1.weight_scale_inv": torch.ones(1, 1)}))
    with pytest.raises(qn.UserError, match="8-bit floats.*qlora_native.load_model"):
        load(tmp_path)


def test_a_nan_is_named(tmp_path: Path, sentence: Any) -> None:
    save(tmp_path)
    edit_tensors(tmp_path, lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 4:5].fill_(torch.nan))
    with pytest.raises(qn.UserError) as raised:
        load(tmp_path)
    sentence(raised.value)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_our_config_reads_weights_that_are_4bit_already(tmp_path: Path, storage: torch.dtype) -> None:
    stored = qn.load_model(save(tmp_path / "dense", dtype=torch.bfloat16), quant_type="fp4", fuse=False)
    for layer in four_bit_layers(stored).values():
        weight = layer.quantized
        weight.storage_dtype = storage
        layer.quantized = weight
    stored.save_pretrained(tmp_path / "theirs")  # as bitsandbytes writes it
    model = load(tmp_path / "theirs")
    assert model.model.layers[0].mlp.up_proj.quantized.quant_type == "fp4"
    assert torch.equal(logits(model), logits(stored))


def test_their_names_are_understood() -> None:
    theirs: dict[str, Any] = {"quant_type": "fp4", "use_double_quant": False, "compute_dtype": torch.bfloat16}
    theirs = {f"bnb_4bit_{name}": value for name, value in {**theirs, "quant_storage": torch.uint8}.items()}
    config = qn.QLoRANativeConfig(load_in_4bit=True, **theirs)
    assert (config.quant_type, config.double_quant, config.compute_dtype) == ("fp4", False, "bfloat16")
    assert qn.QLoRANativeConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"quant_typ": "nf4"}, "no setting 'quant_typ': did you mean quant_type"),
    ({"load_in_8bit": True}, "load_in_8bit is True: expected False"),
    ({"quant_type": "nf5"}, "quant_type is 'nf5'"),
    ({"block_size": 48}, "48"),
    ({"compute_dtype": "float8"}, "compute_dtype is float8: expected float32, bfloat16 or float16"),
    ({"skip_modules": "lm_head"}, "skip_modules is the string 'lm_head'"),
    ({"bnb_4bit_quant_storage": torch.bfloat16}, "bnb_4bit_quant_storage is torch.bfloat16"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_settings_are_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        qn.QLoRANativeConfig(**options)
    assert "\n" not in str(error.value)


def test_compute_dtype_is_that_of_the_product(tmp_path: Path) -> None:
    model = load(save(tmp_path), torch.float32, compute_dtype="bfloat16")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    expected = torch.nn.functional.linear(x.bfloat16(), layer.quantized.dequantize(torch.bfloat16)).float()
    assert layer(x).dtype == torch.float32
    assert distance(layer(x), expected) < 1e-2
    assert torch.equal(layer(x), layer(x.bfloat16()).float())
    experts = load(save(tmp_path / "m", "Mixtral", **FEW["Mixtral"]), torch.float32, compute_dtype="bfloat16")
    block = experts.model.layers[0].mlp.experts
    assert block.compute_dtype == torch.bfloat16
    weights, chosen = torch.ones(3, 1), torch.tensor([[0], [1], [3]])
    wanted = []
    for row, expert in enumerate(chosen.flatten().tolist()):
        up, down = (block.stack(name).dequantize(torch.bfloat16)[expert] for name in ("gate_up_proj", "down_proj"))
        gate, inner = (x[row].bfloat16() @ up.t()).float().chunk(2)
        wanted.append(((torch.nn.functional.silu(gate) * inner).bfloat16() @ down.t()).float())
    assert distance(block(x, chosen, weights), torch.stack(wanted)) < 2e-2


def test_a_pickle_and_a_copy_hold_the_weights(tmp_path: Path) -> None:
    model = load(save(tmp_path, "Mixtral", **FEW["Mixtral"]))
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    other = load(tmp_path, quant_type="fp4")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)


RELOAD = """
import sys
import qlora_native
assert "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__, type(model.hf_quantizer).__name__)
"""


def test_a_saved_folder_loads_when_ours_is_imported_first(tmp_path: Path) -> None:
    load(save(tmp_path / "dense", num_hidden_layers=1)).save_pretrained(tmp_path / "saved")
    done = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path / "saved")], capture_output=True, text=True)
    assert done.stdout.strip() == "QuantizedLinear QLoRANativeQuantizer", done.stderr


def test_a_saved_folder_fails_as_the_page_has_it_when_ours_is_not_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import auto

    load(save(tmp_path / "dense", num_hidden_layers=1)).save_pretrained(tmp_path / "saved")
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    ((warning, error),) = re.findall(r"^### transformers warns: `(.+)\.\.\.`\n[^#]*`(\w+Error)`", page, re.MULTILINE)
    said: list[str] = []
    monkeypatch.setattr(auto.logger, "warning", said.append)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "qlora_native")
    with pytest.raises(Exception, match="mismatched") as failed:
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert any(text.startswith(warning) for text in said) and type(failed.value).__name__ == error
