"""load_model against transformers' own loading: the same model but for the 4-bit layers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import rewrite, write_gguf
from safetensors.torch import load_file
from tiny_models import dense_twin, distance, edit_tensors, four_bit_layers, logits, make, save
from transformers import AutoModelForCausalLM, GenerationConfig

import qlora_native as qn
from qlora_native.models import device_layers
from qlora_native.models.load import load_model
from qlora_native.nn import QuantizedLinear
from qlora_native.weights import gguf_source
from qlora_native.weights.open import open_source

# Kind, changes to its config, layers that become 4-bit. What each one probes stands behind it.
ARCHITECTURES: list[tuple[str, dict[str, Any], int]] = [
    ("Llama", {}, 14),
    ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, 14),
    ("Qwen2", {}, 14),  # biases in part of the layers
    ("Qwen3", {"head_dim": 16}, 14),  # norms of heads
    ("Gemma2", {"head_dim": 16}, 14),  # tied by default, a non-persistent scale
    ("Gemma3Text", {"head_dim": 16}, 14),  # two rotary tables
    ("Phi3", {}, 8),  # fused projections
    ("GPTNeoX", {}, 8),  # the output embedding is called embed_out in checkpoints
    ("GPT2", {}, 8),  # transposed Conv1D, tied
    ("Falcon", {"new_decoder_architecture": False}, 8),  # a subclass of nn.Linear
    ("Mixtral", {"num_local_experts": 4}, 8),  # experts stored one by one, stacked on loading, 4-bit as stacks
    ("Mamba", {}, 6),  # dt_proj's weight is read past its layer
]


@pytest.mark.parametrize(("kind", "changes", "layers"), ARCHITECTURES, ids=lambda value: str(value)[:12])
def test_the_same_model_but_for_its_4bit_layers(
    tmp_path: Path, kind: str, changes: dict[str, Any], layers: int
) -> None:
    model = load_model(save(tmp_path, kind, torch.bfloat16, **changes), dtype=torch.float32)
    twin, worst = dense_twin(tmp_path, model)
    assert len(four_bit_layers(model)) == layers and worst < 0.12
    assert distance(logits(model), logits(twin)) < 1e-5
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.dtype == torch.float32
    buffers = dict(twin.named_buffers())  # the rotary tables among them, which no file holds
    for name, buffer in model.named_buffers():
        assert name not in buffers or torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_quantized_as_stored_and_the_rest_is_cast(tmp_path: Path, stored: torch.dtype) -> None:
    options: dict[str, Any] = {"quant_type": "fp4", "block_size": 128, "double_quant": False}
    model = load_model(save(tmp_path, dtype=stored), **options)
    file = load_file(tmp_path / "model.safetensors")
    layer = model.model.layers[1].mlp.down_proj
    expected = qn.quantize(file["model.layers.1.mlp.down_proj.weight"], **options)
    assert torch.equal(layer.quantized.packed, expected.packed)
    assert torch.equal(layer.quantized.absmax, expected.absmax)
    assert layer.quantized.dtype == torch.bfloat16
    assert torch.equal(model.model.embed_tokens.weight, file["model.embed_tokens.weight"].bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_shards_give_the_same_model(tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    model = make(num_hidden_layers=11)  # layer 10 sorts before layer 2 as text
    model.save_pretrained(whole)
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 5
    assert torch.equal(logits(load_model(whole)), logits(load_model(sharded)))


def test_the_prefix_of_the_base_model_may_be_absent(tmp_path: Path) -> None:
    expected = logits(load_model(save(tmp_path, tie_word_embeddings=True)))
    edit_tensors(tmp_path, lambda t: [t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t)])
    assert torch.equal(logits(load_model(tmp_path)), expected)


def test_tied_weights_stored_twice(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in model.load_report.dense


def test_norms_kept_in_fp32_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(save(tmp_path), dtype=torch.float16)
    assert model.model.norm.weight.dtype == torch.float16  # llama asks for nothing
    monkeypatch.setattr(type(make()), "_keep_in_fp32_modules_strict", {"norm"})
    model = load_model(tmp_path, dtype=torch.float16)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.float16
    monkeypatch.setattr(type(make()), "_keep_in_fp32_modules_strict", None)
    monkeypatch.setattr(type(make()), "_keep_in_fp32_modules", {"norm"})  # transformers does so for float16 alone
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        assert load_model(tmp_path, dtype=dtype).model.norm.weight.dtype == expected


def test_skip_modules(tmp_path: Path) -> None:
    everything = {*four_bit_layers(load_model(save(tmp_path), skip_modules=[]))}
    assert "lm_head" in everything
    for entry, part in (("lm_head", "lm_head"), ("q_proj", "q_proj"), ("layers.1", ".1.")):
        left = {*four_bit_layers(load_model(tmp_path, skip_modules=[entry]))}
        assert left == {path for path in everything if part not in path}
    with pytest.raises(ValueError, match=r"skip_modules.*'q_prj'.*did you mean q_proj"):
        load_model(tmp_path, skip_modules=["q_prj"])
    with pytest.raises(ValueError, match="expected a list"):
        load_model(tmp_path, skip_modules="lm_head")
    save(tmp_path, "GPTNeoX")  # calls its output embedding otherwise
    assert isinstance(load_model(tmp_path).get_output_embeddings(), torch.nn.Linear)
    assert isinstance(load_model(tmp_path, skip_modules=[]).get_output_embeddings(), QuantizedLinear)


def test_the_report_counts_every_byte(tmp_path: Path) -> None:
    report = load_model(save(tmp_path, num_hidden_layers=1)).load_report
    elements = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3
    blocks = elements // 64
    nested = 2 * 1 + 2 * 1 + 3 * 1  # each layer has fewer than 256 blocks: one fp32 scale of scales
    assert report.bytes_4bit == elements // 2 + blocks + 4 * nested + 4 * 7  # and an fp32 offset each
    norms = {f"model.layers.0.{name}_layernorm.weight": 128 for name in ("input", "post_attention")}
    embeddings = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), 128 * 64 * 2)
    assert report.dense == {**embeddings, **norms, "model.norm.weight": 128}
    inv_freq = 2 * 4 * 8  # kept twice by transformers, fp32 [head_dim / 2]
    assert report.bytes_dense == sum(report.dense.values()) + inv_freq
    assert report.num_bytes == report.bytes_4bit + report.bytes_dense
    assert report.path == tmp_path
    text = str(replace(report, dense={"embed": 2 << 20, "norm": 8192}))
    assert "embed (2.0 MiB)" in text and "norm" not in text, "no line of 0.0 MiB"


def test_generation_config_and_generate(tmp_path: Path) -> None:
    save(tmp_path)
    GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=[127]).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.generation_config.eos_token_id == [127]
    assert model.generate(torch.tensor([[5, 6]])).shape[1] <= 5


def test_what_we_save_bitsandbytes_reads(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(save(tmp_path / "dense", intermediate_size=128), dtype=torch.float32)
    model.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, device_map={"": "cpu"})
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert distance(logits(theirs.train()).detach(), logits(model)) < 1e-5


SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1}


@pytest.mark.parametrize("forbidden", [True, False])
def test_the_readers_bar_can_be_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], forbidden: bool
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1" if forbidden else "")
    expected = load_model(write_gguf(tmp_path / "tiny.gguf", {}, **SMALL), dtype=torch.float32)
    monkeypatch.setattr(gguf_source, "ARCHITECTURES", {})  # so that transformers' own reader makes the model
    assert torch.equal(logits(load_model(tmp_path, dtype=torch.float32)), logits(expected))
    assert ("de-quantizing" in capfd.readouterr().err) != forbidden


@pytest.mark.parametrize("kind", ["safetensors", "experts", "gguf"])
def test_an_open_source_loads_again_and_again(tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        write_gguf(tmp_path / "tiny.gguf", {}, **SMALL)
    else:
        changes: dict[str, Any] = {"kind": "Mixtral", "num_local_experts": 4} if kind == "experts" else {}
        save(tmp_path, **changes)
    source = open_source(tmp_path)
    assert open_source(source) is source
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        model, expected = load_model(source, dtype=dtype), load_model(tmp_path, dtype=dtype)
        assert torch.equal(logits(model), logits(expected))


def test_gguf_file_and_folder(tmp_path: Path) -> None:
    model = load_model(write_gguf(tmp_path / "tiny.gguf", {}, **SMALL), dtype=torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    layers = four_bit_layers(model)
    assert len(layers) == 7
    for path, layer in layers.items():
        weight = twin.get_submodule(path).weight
        assert torch.equal(layer.quantized.packed, qn.quantize(weight).packed), path
        weight.data.copy_(layer.quantized.dequantize(torch.float32))
    assert distance(logits(model), logits(twin)) < 1e-5
    assert torch.equal(logits(load_model(tmp_path, dtype=torch.float32)), logits(model))
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "other.gguf")
    with pytest.raises(qn.UserError, match="2 GGUF files"):
        load_model(tmp_path)
    for count in (0, 2, 255):
        with pytest.raises(qn.UserError, match=f"{count} layers and has tensors of 1"):
            load_model(rewrite(tmp_path / "tiny.gguf", tmp_path / "other.gguf", {}, **{"llama.block_count": count}))


@pytest.mark.parametrize("options", [{"double_quant": False}, {"skip_modules": []}, {"block_size": 256}], ids=str)
def test_the_bytes_that_decide_whether_layers_stream_are_those_of_the_options(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    source = open_source(save(tmp_path))
    predicted = [device_layers._rounded_bytes(source, given) for given in ({}, options)]
    loaded = [load_model(source, **given).load_report.num_bytes for given in ({}, options)]
    assert predicted[1] - predicted[0] == loaded[1] - loaded[0] != 0
