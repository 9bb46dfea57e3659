"""GGUF files as they are: read without transformers, kept in their own bytes, trained, and refused where needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from adapters import IDS
from gguf_files import MIX, write_gguf
from helpers import demo_model_or_skip, relative_error
from tiny_models import distance
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_native as qn
from qlora_native.models.build import four_bit_parts
from qlora_native.models.load import load_dense, load_model
from qlora_native.models.loss import causal_lm_loss
from qlora_native.nn import QuantizedEmbedding, QuantizedLinear
from qlora_native.weights.files import mapped_part
from qlora_native.weights.gguf import KEPT
from qlora_native.weights.open import load_tokenizer, open_source

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("kept") / "model.gguf")


def decoded(path: Path) -> Any:
    """transformers' own reading of the file, in fp32."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_the_files(tmp_path: Path, tied: bool) -> None:
    source: Any = open_source(write_gguf(tmp_path / "model.gguf", tie_word_embeddings=tied))
    model = load_model(source, dtype=torch.float32)
    assert model.load_report.is_kept and "quantized" in str(model.load_report)
    assert distance(model(IDS).logits, decoded(source.path)(IDS).logits) < 1e-5
    parts = four_bit_parts(model)
    assert {part.quant_type for part in parts.values()} == KEPT - ({"q6_k"} if tied else set())
    for name, part in parts.items():
        is_view = mapped_part(part.packed) is not None
        assert is_view != ("q_proj" in name or "k_proj" in name), name
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert (head.weight is embedding.weight) == tied
    dense = load_model(source, dtype=torch.float32, skip_modules=["lm_head", "q_proj"])
    assert not isinstance(dense.lm_head, QuantizedLinear)
    assert not isinstance(dense.model.layers[0].self_attn.q_proj, QuantizedLinear)
    assert distance(dense(IDS).logits, model(IDS).logits) < 1e-5
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for name, tensor in torch.load(tmp_path / "state.pt").items():
        assert torch.equal(tensor, stored[name])
    assert torch.equal(deepcopy(model)(IDS).logits, model(IDS).logits)
    rows = embedding(IDS)
    assert "q8_0" in repr(embedding) and torch.equal(model.half().get_input_embeddings()(IDS), rows)
    assert load_model(source, quant_type="nf4").load_report.method == "rtn"


def test_formats_without_kernels_become_nf4(tmp_path: Path, sentence: Any) -> None:
    path = write_gguf(tmp_path / "model.gguf", {**MIX, "token_embd": "q2_k", "ffn_down": "q2_k"})
    with pytest.warns(UserWarning, match="no kernel") as seen:
        model = load_model(path, dtype=torch.float32)
    sentence(next(warning.message for warning in seen if "kernel" in str(warning.message)))
    assert model.model.layers[0].mlp.down_proj.quantized.quant_type == "nf4"
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    expected = decoded(path)
    for layer, twin in zip(model.model.layers, expected.model.layers, strict=True):
        twin.mlp.down_proj.weight.data = layer.mlp.down_proj.quantized.dequantize(torch.float32)
    with torch.no_grad():
        assert distance(model(IDS).logits, expected(IDS).logits) < 1e-4


def test_gradients_are_those_of_the_decoded_model(file: Path) -> None:
    """Of LoRALinear and of PEFT's layers."""
    grads = []
    for model in (load_model(file, dtype=torch.float32), decoded(file)):
        model = qn.add_lora(model, qn.LoraConfig(r=4, seed=1))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.data += 0.01
        loss = causal_lm_loss(model, {"input_ids": IDS, "labels": IDS})
        loss.backward()
        grads.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 1e-4
    adapted = peft.get_peft_model(load_model(file, dtype=torch.float32), qn.peft_config(r=4))
    assert type(adapted.base_model.model.model.layers[0].mlp.up_proj).__name__ == "QuantizedLoraLinear"
    loss = adapted(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="q4_k"):
        adapted.merge_adapter()


def test_the_trainers_of_transformers_and_trl(file: Path, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    qn.patch_trl()
    rows = datasets.Dataset.from_list([{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in IDS] * 4)
    common: dict[str, Any] = {"max_steps": 2, "report_to": "none", "use_cpu": True, "save_steps": 2}
    for kind, arguments in ((transformers.Trainer, transformers.TrainingArguments), (trl.SFTTrainer, trl.SFTConfig)):
        out = tmp_path / kind.__name__
        model = peft.get_peft_model(load_model(file), qn.peft_config(r=4))
        options = {"processing_class": load_tokenizer(file)} if kind is trl.SFTTrainer else {}
        kind(model=model, args=arguments(str(out), **common), train_dataset=rows, **options).train()
        assert isinstance(model.get_output_embeddings(), QuantizedLinear)
        assert (out / "checkpoint-2" / "adapter_model.safetensors").is_file()
        stored = (out / "checkpoint-2" / "adapter_config.json").read_text(encoding="utf-8")
        assert json.loads(stored)["base_model_name_or_path"] == str(file)


@pytest.fixture(scope="module")
def adapter(file: Path) -> Path:
    model = qn.add_lora(load_model(file), qn.LoraConfig(r=4, seed=1))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data += 0.02
    qn.save_adapter(model, file.parent / "adapter")
    return file.parent / "adapter"


@torch.no_grad()
def test_what_is_made_of_it(file: Path, adapter: Path, tmp_path: Path, printed: Any, mistake: Any) -> None:
    """Beside what test_bases.py has of every kind of base."""
    model, twin = (qn.load_adapter(load_model(file, dtype=torch.float32), adapter) for _ in range(2))
    whole = qn.merge(twin, dtype=torch.float32)
    assert type(whole.lm_head) is torch.nn.Linear and distance(whole(IDS).logits, model(IDS).logits) < 1e-4
    estimate = printed("estimate", file, "--cpu", "--batch-size", 1)
    assert estimate["peak"]["weights"] == sum(part.packed.nbytes for part in four_bit_parts(model).values())
    for base in ("original", "dequantized"):
        words = ("--check",) if base == "original" else ()
        out = tmp_path / base
        printed("merge", file, adapter, "--out", out, "--base", base, "--to", "fp32", *words)
        config, generation = (json.loads((out / f"{name}config.json").read_text()) for name in ("", "generation_"))
        assert config["architectures"] == ["LlamaForCausalLM"] and generation["eos_token_id"] == config["eos_token_id"]
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert distance(merged(IDS).logits, whole(IDS).logits) < 1e-5
    for target, command in (("16bit", "qlora export"), ("bitsandbytes", "qlora quantize")):
        assert command in mistake("convert", file, tmp_path / "converted", "--to", target)
    printed("quantize", file, "--out", tmp_path / "nf4")
    assert load_model(tmp_path / "nf4").model.layers[0].mlp.up_proj.quantized.quant_type == "nf4"


def test_its_tokenizer_is_transformers_without_reading_twice(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    plain, read = gguf.GGUFReader, list[Path]()
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(Path(path)) or plain(path))  # type: ignore[func-returns-value]
    found = qn.load_tokenizer(file)
    assert file not in read  # by the reader that takes seconds for an array of tokens
    assert type(found) is type(expected)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert found.chat_template == expected.chat_template
    assert found.special_tokens_map == expected.special_tokens_map


GPTQ = {"data": {"train": "rows.jsonl"}, "quant": {"type": "keep", "method": "gptq"}}
REFUSED: dict[str, Callable[[Path, Path], object]] = {  # of the file and a folder
    "folder": lambda file, new: load_model(tiny.write_model(new / "model"), quant_type="keep"),
    "floats": lambda file, new: load_model(write_gguf(new / "plain-floats.gguf", {}), quant_type="keep"),
    "method": lambda file, new: load_model(file, quant_type="keep", method="wmse", calibration=["a"]),
    "whole": lambda file, new: qn.add_lora(load_model(file), qn.LoraConfig(modules_to_save=["embed_tokens"])),
    "save": lambda file, new: load_model(file).save_pretrained(new),
    "sharded": lambda file, new: qn.distributed.load_model(file),
    "config": lambda file, new: qn.TrainConfig.from_values({**GPTQ, "model": str(file)}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(kind: str, file: Path, tmp_path: Path, sentence: Any) -> None:
    with pytest.raises((qn.UserError, ValueError), match=r"keep|GGUF|quantized") as seen:
        REFUSED[kind](file, tmp_path)
    sentence(str(seen.value).replace(str(file.parent), "DIR"))


@torch.no_grad()
def test_a_published_file_keeps_its_loss() -> None:
    """SmolLM2-135M's Q4_1 file on source text, against its values without blocks, which rounding to NF4 is far from."""
    path = demo_model_or_skip()
    ids = torch.tensor([load_tokenizer(path)(Path(json.__file__).read_text(encoding="utf-8"))["input_ids"][:128]])
    kept, dense, rounded = (
        float(causal_lm_loss(model, {"input_ids": ids, "labels": ids}))
        for model in (
            load_model(path, dtype=torch.float32),
            load_dense(path, dtype=torch.float32),
            load_model(path, quant_type="nf4", dtype=torch.float32),
        )
    )
    assert kept == pytest.approx(dense, abs=1e-4) and rounded > dense + 0.1
