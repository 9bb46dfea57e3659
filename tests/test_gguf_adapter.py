"""Adapters in GGUF: files of their own by `qlora export --to gguf-adapter`, and in the codes of a file by `--type keep`
and `lora.ship: gguf`. What changes is what PEFT adds, by the gguf package and, with --llama-cpp, by llama.cpp itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from adapters import RANK, make_adapter
from gguf_files import MIX, write_gguf
from helpers import relative_error
from runs import settings
from test_export import export, model_of
from torch import Tensor
from torch.nn.functional import cross_entropy

import qlora_native as qn
from qlora_native import gguf_blocks
from qlora_native.calibration.data import as_calibration, take_tokens
from qlora_native.data.dataset import load_dataset
from qlora_native.lora import lora_layers
from qlora_native.models.load import load_model
from qlora_native.tool.cli.demo import demo_config, model_file
from qlora_native.tool.cli.standard_library import write_split
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.rows import load_files
from qlora_native.tool.train.loop import Trainer
from qlora_native.weight import quant_type_number
from qlora_native.weights.gguf import DENSE
from qlora_native.weights.open import load_tokenizer

gguf = pytest.importorskip("gguf")


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).double()


# ---------------------------------------------------------------------------------------------------------------------
# A file of its own


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
# In the codes of a file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of many types, an adapter over it, and rows."""
    folder = tmp_path_factory.mktemp("shipped")
    write_gguf(folder / "file.gguf")
    tiny.write_rows(folder / "train.jsonl", 20)
    tiny.write_rows(folder / "text.jsonl", 200)
    model = qn.add_lora(load_model(folder / "file.gguf"), qn.LoraConfig(r=4, seed=1, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.005
    qn.save_adapter(model, folder / "adapter")
    return folder


@torch.no_grad()
def test_the_file_with_other_codes(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the adapter's change in llama.cpp's own names and order of rows."""
    source, out, text = files / "file.gguf", tmp_path / "out.gguf", files / "text.jsonl"
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
    config = settings(files, tmp_path, {"eval_fraction": 0.2}, lora, **train) | {"model": str(files / "file.gguf")}
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
    held_out = load_files(run.config.data, run.config.data.train, run.tokenizer).split(4, seed=run.config.train.seed)[1]
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
# llama.cpp


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
    if shipped:
        model, tuned, adapter = load_model(run / "shipped.gguf").eval(), run / "shipped.gguf", None
    else:
        export(run / "adapter", "--to", "gguf-adapter")
        model, tuned, adapter = trainer.model.eval(), path, run / "adapter.gguf"
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
