"""Every broken model folder is one sentence that names the file or the tensor, and what to do."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, edit_tensors, save

import qlora_native as qn
from qlora_native.hf.build import MetaModel
from qlora_native.hf.load import load_model
from qlora_native.hf.source import load_tokenizer

WEIGHTS = "model.safetensors"
TENSOR = "model.layers.1.mlp.up_proj.weight"


def put(value: float, name: str = TENSOR) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[5:6].fill_(value)


def edit_header(folder: Path, edit: Callable[[dict], object]) -> None:
    """Change the JSON of the safetensors header and keep the data as they are."""
    raw = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def truncate(folder: Path, num_bytes: int) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:num_bytes])


def shard(folder: Path) -> Path:
    """Turn the single file into two with an index; returns the second."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
    return folder / "part-1.safetensors"


def index_names_too_much(folder: Path) -> None:
    shard(folder)
    path = folder / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = "part-0.safetensors"
    path.write_text(json.dumps(index))


def gguf_only(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(20))


# What is done to a sound folder, and what the sentence must contain.
BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    ("config is not JSON", lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    ("config of nothing", lambda f: (f / "config.json").write_text("{}"), r"config\.json has no model_type"),
    (
        "unknown kind",
        lambda f: edit_config(f, model_type="nonsense"),
        r"config\.json \(model type nonsense\) cannot be used",
    ),
    (
        "no causal LM",
        lambda f: (f / "config.json").write_text(json.dumps({"model_type": "clip"})),
        "holds a clip model: expected a causal language model",
    ),
    ("a size that does not fit", lambda f: edit_config(f, num_attention_heads=5), "not a multiple of the number of"),
    (
        "other quantization",
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
        "holds gptq weights",
    ),
    (
        "8-bit",
        lambda f: edit_config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "holds 8-bit bitsandbytes weights",
    ),
    ("no weights", lambda f: (f / WEIGHTS).unlink(), r"holds no weights: expected model\.safetensors"),
    ("pickle", lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), r"pickle \(pytorch_model\.bin\)"),
    ("missing shard", lambda f: shard(f).unlink(), r"lacks 1 of the 2 weight files.*part-1\.safetensors"),
    ("broken index", lambda f: (shard(f), (f / f"{WEIGHTS}.index.json").write_text("[]")), "not an index of shards"),
    ("index of another model", index_names_too_much, r"part-0\.safetensors lacks tensor model\.extra\.weight"),
    ("empty file", lambda f: truncate(f, 0), r"cut short: it should hold at least 8 bytes and holds 0"),
    ("truncated header", lambda f: truncate(f, 100), r"model\.safetensors is cut short.*holds 100;"),
    (
        "truncated data",
        lambda f: truncate(f, -10),
        r"model\.safetensors is cut short: it should hold at least [\d,]+ bytes",
    ),
    ("not JSON", lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"abcd"), "header is not JSON"),
    ("wild length", lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), "first 8 bytes.* are no header length"),
    ("a web page", lambda f: (f / WEIGHTS).write_bytes(b"<!DOCTYPE html>" * 9), "first 8 bytes.* are no header length"),
    ("a pointer", lambda f: (f / WEIGHTS).write_bytes(b"version https://git-lfs"), "git lfs pull"),
    ("no offsets", lambda f: edit_header(f, lambda h: h[TENSOR].pop("data_offsets")), f"{TENSOR} is incomplete"),
    ("bad shape", lambda f: edit_header(f, lambda h: h[TENSOR].update(shape=[-1, 4])), f"{TENSOR} is malformed"),
    ("other size", lambda f: edit_header(f, lambda h: h[TENSOR].update(shape=[96, 63])), r"24,192 bytes.*24,576"),
    ("other dtype", lambda f: edit_header(f, lambda h: h[TENSOR].update(dtype="F4")), f"{TENSOR} has dtype F4"),
    ("NaN", lambda f: edit_tensors(f, put(float("nan"))), f"{TENSOR} cannot be quantized.*5"),
    ("infinity", lambda f: edit_tensors(f, put(float("inf"))), f"{TENSOR} cannot be quantized.*5"),
    (
        "NaN in the embedding",
        lambda f: edit_tensors(f, put(float("nan"), "model.embed_tokens.weight")),
        r"tensor model\.embed_tokens\.weight holds a NaN",
    ),
    (
        "whole numbers",
        lambda f: edit_tensors(f, lambda t: t.update({TENSOR: t[TENSOR].char()})),
        f"{TENSOR} is torch.int8: expected float32",
    ),
    (
        "other shape",
        lambda f: edit_tensors(f, lambda t: t.update({TENSOR: t[TENSOR][:64].clone()})),
        rf"{TENSOR} is \[64, 64\], but \[96, 64\] by config\.json",
    ),
    (
        "other shape of the embedding",
        lambda f: edit_config(f, vocab_size=120),
        r"embed_tokens\.weight is \[128, 64\], but \[120, 64\]|lm_head",
    ),
    ("a layer more", lambda f: edit_config(f, num_hidden_layers=3), r"lacks 9 of the 30 tensors.*layers\.2\."),
    ("adapter", lambda f: (f / "config.json").rename(f / "adapter_config.json"), "holds an adapter and no model"),
    ("broken GGUF", gguf_only, r"broken\.gguf cannot be read as GGUF"),
    (
        "broken generation config",
        lambda f: (f / "generation_config.json").write_text("{"),
        r"generation_config\.json cannot be used",
    ),
]


def test_the_tokenizer_of_a_broken_gguf_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    gguf_only(folder)
    for path in (folder, folder / "broken.gguf"):
        with pytest.raises(qn.UserError, match=r"broken\.gguf cannot be read as GGUF"):
            load_tokenizer(str(path))


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_folders(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    folder = save(tmp_path / "model")
    damage(folder)
    with pytest.raises(qn.UserError) as error:
        load_model(folder)
    sentence = str(error.value)
    assert re.search(words, sentence), sentence
    assert str(folder) in sentence, sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(qn.UserError, match="is not there: expected a model folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(qn.UserError, match=r"weights\.pt is a file: expected a model folder or a \.gguf file"):
        load_model(tmp_path / "weights.pt")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    store = MetaModel.store

    def stored(*arguments: Any) -> None:
        truncate(tmp_path, 3000)
        store(*arguments)

    monkeypatch.setattr(MetaModel, "store", stored)
    with pytest.raises(qn.UserError, match=r"model\.safetensors is cut short"):
        load_model(tmp_path)


@pytest.mark.parametrize("missing", [".absmax", ".quant_map", ".nested_absmax"])
def test_four_bit_weights_without_a_part(tmp_path: Path, missing: str) -> None:
    save(tmp_path)

    def to_four_bit(tensors: dict[str, torch.Tensor]) -> None:
        parts = qn.to_bnb(qn.quantize(tensors.pop(TENSOR)), TENSOR)
        parts.pop(TENSOR + missing)
        tensors.update(parts)

    edit_tensors(tmp_path, to_four_bit)
    with pytest.raises(qn.UserError, match=re.escape(TENSOR + missing)):
        load_model(tmp_path)


def test_unknown_tensors_are_left_out_with_a_warning(tmp_path: Path) -> None:
    save(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"model.vision.weight": torch.zeros(3)}))
    with pytest.warns(UserWarning, match=r"left out 1 of the stored.*LlamaForCausalLM.*model\.vision\.weight"):
        load_model(tmp_path)


def test_old_rotary_tables_are_left_out_silently(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    save(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    load_model(tmp_path)
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "awq"}, "method is 'awq': expected 'rtn', 'rtn_signed', 'wmse', 'gptq'"),
        ({"method": "rtn", "calibration": ["text"]}, "takes no calibration data"),
        ({"method": "gptq"}, "method .gptq. needs calibration data"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"quant_type": "int4"}, "quant_type is 'int4'"),
        ({"block_size": 48}, "block_size is 48"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path, **arguments)  # type: ignore[arg-type]
