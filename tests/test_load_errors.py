"""Every broken model folder is one sentence that names the file or the tensor, and what to do."""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, edit_tensors, save

import qlora_native as qn
from qlora_native.models.build import MetaModel
from qlora_native.models.load import load_model
from qlora_native.weights.open import load_tokenizer

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CONFIG = "config.json"
TENSOR = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def put(value: float, name: str = TENSOR) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))


def change(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({TENSOR: edit(tensors[TENSOR])}))


def header(edit: Callable[[dict[str, Any]], object], text: Callable[[str], str] = str) -> Callable[[Path], object]:
    """Changes the header of the safetensors, as values and as text, and keeps the data as they are."""

    def edit_header(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8:end])
        edit(entries)
        new = text(json.dumps(entries)).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + raw[end:])

    return edit_header


def entry(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return header(lambda entries: edit(entries[TENSOR]))


def write(content: bytes | str, name: str = WEIGHTS) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def truncate(folder: Path, num_bytes: int) -> None:
    write((folder / WEIGHTS).read_bytes()[:num_bytes])(folder)


def shard(folder: Path, **more: str) -> Path:
    """Make two files with an index of the one; ``more`` are its entries for other tensors. Returns the second."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | more}))
    (folder / WEIGHTS).unlink()
    return folder / "part-1.safetensors"


def gguf_only(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    write(b"GGUF" + bytes(20), "broken.gguf")(folder)


def quantized(**config: object) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, quantization_config=config)


# What is done to a sound folder, and what the sentence must contain.
BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda f: (f / CONFIG).unlink(), r"has no config\.json"),
    ("config is not JSON", write("{", CONFIG), r"config\.json cannot be read"),
    ("config of nothing", write("{}", CONFIG), r"config\.json has no model_type"),
    ("unknown kind", lambda f: edit_config(f, model_type="nonsense"), r"config\.json .*nonsense\) cannot be used"),
    ("no causal LM", write('{"model_type": "clip"}', CONFIG), "holds a clip model: expected"),
    ("a size that does not fit", lambda f: edit_config(f, num_attention_heads=5), "a multiple of the number"),
    ("other quantization", quantized(quant_method="gptq"), "holds gptq weights"),
    ("8-bit", quantized(quant_method="bitsandbytes", load_in_8bit=True), "holds 8-bit bitsandbytes weights"),
    ("no weights", lambda f: (f / WEIGHTS).unlink(), r"holds no weights: expected model\.safetensors"),
    ("pickle", lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), r"pickle \(pytorch_model\.bin\)"),
    ("missing shard", lambda f: shard(f).unlink(), r"lacks 1 of the 2 weight files.*part-1\.safetensors"),
    ("broken index", lambda f: (shard(f), write("[]", INDEX)(f)), r"index\.json cannot be read: .*not a list"),
    ("index of another model", lambda f: shard(f, a="part-0.safetensors"), r"part-0\.safetensors lacks tensor a"),
    ("empty file", lambda f: truncate(f, 0), r"it holds 0 bytes: expected 8 or more"),
    (
        "truncated header",
        lambda f: truncate(f, 100),
        r"model\.safetensors cannot be read: it holds 100 bytes: expected [\d,]+ or more;",
    ),
    (
        "truncated data",
        lambda f: truncate(f, -10),
        r"model\.safetensors cannot be read: it holds [\d,]+ bytes: expected [\d,]+;",
    ),
    ("not JSON", write(struct.pack("<Q", 4) + b"abcd"), r"model\.safetensors cannot be read: Expecting value"),
    ("wild length", write(b"\xff" * 64), "first 8 bytes.* are no header length"),
    ("a web page", write("<!DOCTYPE html>" * 9), "first 8 bytes.* are no header length"),
    ("a pointer", write("version https://git-lfs"), "git lfs pull"),
    ("no offsets", entry(lambda e: e.pop("data_offsets")), f"{TENSOR} is malformed"),
    ("bad shape", entry(lambda e: e.update(shape=[-1, 4])), f"{TENSOR} is malformed"),
    ("other size", entry(lambda e: e.update(shape=[96, 63])), r"24,192 bytes.*24,576"),
    ("other dtype", entry(lambda e: e.update(dtype="F4")), f"{TENSOR} has dtype F4"),
    ("NaN", put(float("nan")), f"{TENSOR} cannot be quantized.*5"),
    ("infinity", put(float("inf")), f"{TENSOR} cannot be quantized.*5"),
    ("NaN in the embedding", put(float("nan"), EMBEDDING), rf"tensor {EMBEDDING} holds a NaN"),
    ("whole numbers", change(lambda t: t.char()), f"{TENSOR} is torch.int8: expected float32"),
    ("other shape", change(lambda t: t[:64].clone()), rf"{TENSOR} is \[64, 64\], but \[96, 64\] by config\.json"),
    ("other vocabulary", lambda f: edit_config(f, vocab_size=120), r"is \[128, 64\], but \[120, 64\]"),
    ("a layer more", lambda f: edit_config(f, num_hidden_layers=3), r"lacks 9 of the 30 tensors.*layers\.2\."),
    ("adapter", lambda f: (f / CONFIG).rename(f / "adapter_config.json"), "an adapter and no model"),
    ("broken GGUF", gguf_only, r"broken\.gguf cannot be read"),
    ("broken generation config", write("{", "generation_config.json"), r"generation_config\.json cannot be read"),
]


def test_the_tokenizer_of_a_broken_gguf_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    gguf_only(folder)
    for path in (folder, folder / "broken.gguf"):
        with pytest.raises(qn.UserError, match=r"broken\.gguf cannot be read"):
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
    write(b"", "weights.pt")(tmp_path)
    for name, words in (("nowhere", "is not there: expected a model folder"), ("weights.pt", "is a file: expected a")):
        with pytest.raises(qn.UserError, match=rf"{name} {words}"):
            load_model(tmp_path / name)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    store = MetaModel.store

    def stored(*arguments: Any) -> None:
        truncate(tmp_path, 3000)
        store(*arguments)

    monkeypatch.setattr(MetaModel, "store", stored)
    with pytest.raises(qn.UserError, match=r"ends at byte 3,000"):
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
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"  # a buffer of old checkpoints, left out silently
    edit_tensors(tmp_path, lambda t: t.update({"model.vision.weight": torch.zeros(3), old: torch.zeros(8)}))
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM has no place for 1 of.*model\.vision\.weight"):
        load_model(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("model.vision.weight"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has no place")
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "awq"}, "is 'awq': expected 'rtn', 'wmse'"),
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
