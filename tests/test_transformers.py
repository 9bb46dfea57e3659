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
import tiny_models
import torch
from laws import ROOT
from safetensors.torch import load_file, save_file
from tiny_models import assert_same, distance, edit_config, edit_tensors, four_bit_layers, logits, make, save
from transformers import AutoConfig, AutoModelForCausalLM

import qlora_native as qn
from qlora_native.models.build import four_bit_parts
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


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_map(tmp_path: Path, device_map: Any) -> None:
    model = load(save(tmp_path, dtype=torch.bfloat16), device_map=device_map)
    assert torch.equal(logits(model), logits(qn.load_model(tmp_path, fuse=False)))


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


def scaled_expert(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.0.w1.weight_scale_inv"] = torch.ones(1, 1)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_typ": "nf4"}, "no setting 'quant_typ': did you mean quant_type"),
    ({"load_in_8bit": True}, "load_in_8bit is True: expected False"),
    ({"quant_type": "nf5"}, "quant_type is 'nf5'"),
    ({"block_size": 48}, "48"),
    ({"compute_dtype": "float8"}, "compute_dtype is float8: expected float32, bfloat16 or float16"),
    ({"skip_modules": "lm_head"}, "skip_modules is the string 'lm_head'"),
    ({"bnb_4bit_quant_storage": torch.bfloat16}, "bnb_4bit_quant_storage is torch.bfloat16"),
    ({"skip_modules": ["q_prj"]}, r"no module 'q_prj'; did you mean q_proj"),
    ({"device_map": {"model": "disk", "lm_head": "cpu"}}, "on the disk.*'cpu'"),
    ({"edit": scaled_expert}, "8-bit floats.*qlora_native.load_model"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_refused_is_one_sentence(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    edit_tensors(save(tmp_path), options.get("edit", lambda tensors: None))
    with pytest.raises((ValueError, qn.UserError), match=words) as error:
        load(tmp_path, **{name: value for name, value in options.items() if name != "edit"})
    assert "\n" not in str(error.value)


def test_a_nan_is_named(tmp_path: Path, sentence: Any) -> None:
    save(tmp_path)
    edit_tensors(tmp_path, lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 4:5].fill_(torch.nan))
    with pytest.raises(qn.UserError) as raised:
        load(tmp_path)
    sentence(raised.value)


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


# ---------------------------------------------------------------------------------------------------------------------
# Architectures from one end to the other: load both ways, answer, train, save, load again, merge

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

    twin, worst = tiny_models.dense_twin(tmp_path / "dense", model)
    assert worst < 0.12
    assert distance(logits(model), logits(twin)) < 1e-5
    assert 1e-4 < distance(logits(model), logits(dense.float())) < bound

    report = model.load_report
    every = dict(model.named_parameters())
    assert set(report.dense) == set(every) - set(ours)
    assert report.bytes_4bit == sum(weight.nbytes for weight in ours.values())

    theirs.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(theirs))

    qn.add_lora(model, qn.LoraConfig(r=4, seed=0)).train()
    optimizer = qn.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = tiny_models.tokens(), []
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
