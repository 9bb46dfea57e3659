"""GGUF files as they are: read without transformers, kept in their own bytes, trained, and refused where needed; and
adapters in GGUF."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from adapters import IDS, RANK, make_adapter
from gguf_files import MIX, write_gguf
from helpers import demo_model_or_skip, relative_error
from runs import settings
from test_export import export, model_of
from tiny_models import distance
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_native as qn
from qlora_native import gguf_blocks
from qlora_native._native import quant_type_number
from qlora_native.calibration.data import as_calibration, take_tokens
from qlora_native.data.dataset import load_dataset, load_split
from qlora_native.lora import lora_layers
from qlora_native.models.build import four_bit_parts
from qlora_native.models.load import load_dense, load_model
from qlora_native.models.loss import causal_lm_loss
from qlora_native.nn import QuantizedEmbedding, QuantizedLinear
from qlora_native.tool.cli.demo import demo_config, model_file
from qlora_native.tool.cli.standard_library import write_split
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer
from qlora_native.weights.files import mapped_part
from qlora_native.weights.gguf import DENSE, KEPT
from qlora_native.weights.open import load_tokenizer, open_source

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of many types, an adapter over it, and rows."""
    folder = tmp_path_factory.mktemp("shipped")
    write_gguf(folder / "model.gguf")
    tiny.write_rows(folder / "train.jsonl", 20)
    tiny.write_rows(folder / "text.jsonl", 200)
    model = qn.add_lora(load_model(folder / "model.gguf"), qn.LoraConfig(r=4, seed=1, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.005
    qn.save_adapter(model, folder / "adapter")
    return folder


@pytest.fixture
def file(files: Path) -> Path:
    return files / "model.gguf"


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


@torch.no_grad()
def test_what_is_made_of_it(files: Path, file: Path, tmp_path: Path, printed: Any, mistake: Any) -> None:
    """Beside what test_bases.py has of every kind of base."""
    model, twin = (qn.load_adapter(load_model(file, dtype=torch.float32), files / "adapter") for _ in range(2))
    whole = qn.merge(twin, dtype=torch.float32)
    assert type(whole.lm_head) is torch.nn.Linear and distance(whole(IDS).logits, model(IDS).logits) < 1e-4
    estimate = printed("estimate", file, "--cpu", "--batch-size", 1)
    assert estimate["peak"]["weights"] == sum(part.packed.nbytes for part in four_bit_parts(model).values())
    for base in ("original", "dequantized"):
        words = ("--check",) if base == "original" else ()
        out = tmp_path / base
        printed("merge", file, files / "adapter", "--out", out, "--base", base, "--to", "fp32", *words)
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


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).double()


# ---------------------------------------------------------------------------------------------------------------------
# An adapter in a file of its own: what llama.cpp adds to each matrix is what PEFT adds


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Qwen3", {"use_rslora": True}),
    ("Mistral", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3.0}}),
]
each_option = pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=[kind for kind, _ in OPTIONS])


def exported(folder: Path, kind: str, options: dict[str, Any]) -> tuple[Path, Path]:
    """A model and an adapter, beside base.gguf and adapter.gguf of them."""
    model = model_of(folder / "model", kind, head_dim=16)
    adapter = make_adapter(model, folder / "adapter", **options)
    export(adapter, "--to", "gguf-adapter")
    export(model, "--to", "gguf", "--type", "f32", "--out", folder / "base.gguf")
    return model, adapter


@each_option
def test_it_adds_what_merging_adds(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model, adapter = exported(tmp_path, kind, options)
    export(model, "--adapter", adapter, "--to", "gguf", "--type", "f32", "--out", tmp_path / "merged.gguf")
    base, merged, parts = (
        {name: tensor.data for name, tensor in tensors(tmp_path / f"{file}.gguf").items() if len(tensor.shape) == 2}
        for file in ("base", "merged", "adapter")
    )
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "adapter.gguf").fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == ("qwen3" if kind == "Qwen3" else "llama")
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert {f"{name}.lora_{side}" for name in changed for side in "ab"} == parts.keys() and len(changed) == 14
    for name in changed:
        a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
        assert len(a) == (2 if "attn_q" in name and "rank_pattern" in options else RANK)
        delta = fields["adapter.lora.alpha"] / len(a) * (b @ a)
        np.testing.assert_allclose(delta, merged[name] - base[name], atol=1e-6)


def test_mistakes(tmp_path: Path, mistake: Callable[..., str], sentence: Callable[[str], None]) -> None:
    model = model_of(tmp_path / "model", "Llama", num_hidden_layers=1)
    adapter = make_adapter(model, tmp_path / "adapter", modules_to_save=["lm_head"])
    tied = model_of(tmp_path / "tied", "Llama", num_hidden_layers=1, tie_word_embeddings=True)
    make_adapter(tied, tmp_path / "head", ["lm_head", "q_proj"])
    make_adapter(model_of(tmp_path / "gpt2", "GPT2", n_layer=1), tmp_path / "other")
    make_adapter(model, tmp_path / "dora", use_dora=True)
    edit = make_adapter(model, tmp_path / "nameless") / "adapter_config.json"
    edit.write_text(json.dumps({**json.loads(edit.read_text()), "base_model_name_or_path": None}))
    make_adapter(model, tmp_path / "rows", ["q_proj"], trainable_token_indices=[3])
    for words in ("adapter", "rows", "head", "other", "dora", "nameless", "model"):
        sentence(mistake("export", tmp_path / words, "--to", "gguf-adapter"))
    sentence(mistake("export", adapter, "--to", "gguf-adapter", "--type", "f16"))
    sentence(mistake("export", model, "--to", "gguf"))
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# An adapter in the codes of a file, by `--type keep` and by `lora.ship: gguf`


@torch.no_grad()
def test_the_file_with_other_codes(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the adapter's change in llama.cpp's own names and order of rows."""
    source, out, text = files / "model.gguf", tmp_path / "out.gguf", files / "text.jsonl"
    adapted = (source, "--adapter", files / "adapter", "--to", "gguf")
    export(*adapted, "--type", "keep", "--out", out, "--calibration", text)
    said = capsys.readouterr().err
    (total,) = re.findall(r"finding the codes of (\d+) weights with \d+ sequences of \d+ tokens", said)
    assert said.splitlines()[-1] == f"calibrating: layer {total} of {total}" and said.count("calibrating: layer") >= 8
    export(source, "--to", "gguf", "--type", "f32", "--out", tmp_path / "plain.gguf")
    export(*adapted, "--type", "f32", "--out", tmp_path / "merged.gguf")
    before, after, plain, merged = (tensors(tmp_path / path) for path in (source, out, "plain.gguf", "merged.gguf"))
    outside = [bytearray(path.read_bytes()) for path in (source, out)]
    changes: dict[str, Tensor] = {}
    for name, tensor in after.items():
        change = torch.from_numpy(merged[name].data - plain[name].data).double()
        assert (before[name].data == tensor.data).all() == (not change.any()), name
        if change.any():
            changes[name] = change
            for content in outside:
                content[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = bytes(tensor.n_bytes)
    assert outside[0] == outside[1] and len(outside[0]) == source.stat().st_size and len(changes) == 14
    for name, change in changes.items():
        kind, moved = after[name].tensor_type.name.lower(), values(after[name]) - values(before[name])
        if kind in DENSE:
            assert torch.allclose(values(after[name]), values(before[name]) + change, rtol=2**-8, atol=1e-6), name
            continue
        number = quant_type_number(kind)
        old, new = (
            torch.from_numpy(side[name].data.copy()).view(-1, qn._native.GGUF_BLOCKS[number][1])
            for side in (before, after)
        )
        assert torch.equal(gguf_blocks.with_codes(new, gguf_blocks.codes(old, number), number), old), name
        assert moved.any(), name
    model: Any = qn.load_adapter(load_model(source), files / "adapter")
    ids = take_tokens(as_calibration(str(text)), "wmse", lambda: load_tokenizer(source), 300, None).ids[:4]
    base, beside, ships = (each(ids).logits.double() for each in (load_model(source), model, load_model(out)))
    moved, wanted = ships - base, beside - base
    assert float((moved * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.15)
    assert float((ships - beside).norm() / wanted.norm()) < 0.9  # of 4 bits and a random adapter


def test_a_run_ends_with_the_file_that_it_evaluated(files: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "ship": "gguf", "target_modules": ["q_proj", "o_proj", "gate_proj"]}
    train = {"steps": 4, "batch_size": 3, "lr": 5e-3, "eval_every": 2}
    config = settings(files, tmp_path, {"eval_fraction": 0.2}, lora, **train) | {"model": str(files / "model.gguf")}
    run = Trainer(TrainConfig.model_validate(config), quiet=True)
    summary = run.train()
    assert summary.shipped_dir == tmp_path / "shipped.gguf"
    loaded: Any = load_model(tmp_path / "shipped.gguf")
    changed = 0
    for path, layer in lora_layers(run.model):
        base: Any = layer.base_layer
        packed = loaded.get_submodule(path).quantized.packed
        assert torch.equal(packed, layer.shipped.packed)  # type: ignore[union-attr]
        changed += int((packed != base.quantized.packed).sum())
    assert changed > 100
    held_out: Any = load_split(tokenizer=run.tokenizer, **run.config.row_options)[1]
    again = Trainer(run.config, model=loaded, tokenizer=run.tokenizer, quiet=True)
    assert again.evaluate(held_out) == pytest.approx(summary.loss_after, abs=1e-6)


def test_files_whose_codes_cannot_take_it(files: Path, tmp_path: Path, mistake: Callable[..., str]) -> None:
    odd = write_gguf(tmp_path / "odd.gguf", {**MIX, "attn_v": "q2_k"})
    tied = write_gguf(tmp_path / "tied.gguf", tie_word_embeddings=True)
    make_adapter(tmp_path / "model", tmp_path / "head", ["lm_head"])
    words = ("--to", "gguf", "--type", "keep", "--calibration", "text.jsonl", "--out", tmp_path / "out.gguf")
    for model, adapter, match in (
        (files / "model", files / "adapter", "is no GGUF file"),
        (odd, files / "adapter", "v_proj in q2_k"),
        (tied, tmp_path / "head", "an adapter of linear layers"),
    ):
        assert match in mistake("export", model, "--adapter", adapter, *words)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# The same by llama.cpp itself, with --llama-cpp


def evaluated(path: Path, adapter: Path | None, ids: list[int]) -> Tensor:
    """llama.cpp's logits [T, V]."""
    import llama_cpp

    options = {"lora_path": None if adapter is None else str(adapter), "n_ctx": 512, "n_threads": 1}
    runner = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **options)
    runner.eval(ids)
    logits = torch.from_numpy(runner.scores[: len(ids)].copy())
    runner.close()
    return logits


@torch.no_grad()
@pytest.mark.usefixtures("llama_cpp")
@each_option
def test_llama_cpp_runs_it(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    _, adapter = exported(tmp_path, kind, options)
    ids = list(range(10, 58))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    expected = theirs(torch.tensor([ids])).logits[0]
    assert relative_error(evaluated(tmp_path / "base.gguf", tmp_path / "adapter.gguf", ids), expected) < 1e-2
    assert relative_error(evaluated(tmp_path / "base.gguf", None, ids), expected) > 1e-1


@torch.no_grad()
def mean_loss(rows: list[list[int]], logits: Callable[[list[int]], Tensor]) -> float:
    losses = [cross_entropy(logits(ids)[:-1].float(), torch.tensor(ids[1:]), reduction="none") for ids in rows]
    return float(torch.cat(losses).mean())


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("shipped", [None, "q4_0", "q4_k"])
def test_llama_cpp_has_the_same_loss(
    tmp_path: Path, shipped: str | None, record_property: Callable[[str, object], None]
) -> None:
    """Of held-out rows: of SmolLM2's own Q4_1 file and an adapter that was trained on it as it is, or of the file in
    another type with the adapter in its codes."""
    path, run = model_file(), tmp_path / "run"
    if shipped:
        export(path, "--to", "gguf", "--type", shipped, "--out", tmp_path / "base.gguf")
        path = tmp_path / "base.gguf"
    write_split(run / "data", 700, 12)
    config = demo_config(path, run, 10, 5e-4, 0, keep=True)
    config = config.model_copy(update={"lora": replace(config.lora, ship="gguf" if shipped else None)})
    trainer = Trainer(config, quiet=True)
    summary = trainer.train()
    if not shipped:
        export(run / "adapter", "--to", "gguf-adapter")
    tuned, adapter = (run / "shipped.gguf", None) if shipped else (path, run / "adapter.gguf")
    model = load_model(tuned).eval() if shipped else trainer.model.eval()
    dataset = load_dataset(config.data.eval or "", load_tokenizer(path), max_length=256, format=None, train_on="all")
    rows = [row["input_ids"].tolist() for row in dataset]
    # One side after the other: ggml takes a thread's AMX tiles to stay configured, and dies of our kernels in between.
    ours = mean_loss(rows, lambda ids: model(torch.tensor([ids])).logits[0])
    theirs = mean_loss(rows, lambda ids: evaluated(tuned, adapter, ids))
    base = mean_loss(rows, lambda ids: evaluated(path, None, ids))
    record_property("held-out loss of what was trained, here and in llama.cpp, and of its base", (ours, theirs, base))
    assert abs(ours - theirs) < (0.02 if shipped else 0.01) < base - theirs
    if shipped:
        assert (summary.loss_before or 0) - (summary.loss_after or 0) > 0.3
        assert summary.retention is not None and summary.retention["retention"] > 0.9
