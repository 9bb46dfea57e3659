"""Damages to the files of a sound model, 4-bit model, adapter and run, and the commands that read them then."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import qlora_native as qn

Damage = Callable[[Path], object]
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
TENSOR, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
STATE = f"{TENSOR}.quant_state.bitsandbytes__nf4"


def put(name: str, content: str | bytes) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def other(name: str, target: str = "") -> Damage:
    """A pipe in place of a file, or a link to ``target``."""

    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target) if target else os.mkfifo(folder / name)

    return replace


def fields(file: str, **changes: object) -> Damage:
    """Set keys of a JSON file."""

    def edit(folder: Path) -> None:
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))

    return edit


config, adapter = (partial(fields, name) for name in (CONFIG, ADAPTER_CONFIG))


def tensors(edit: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS) -> Damage:
    """Let ``edit`` change the tensors of a file by name."""

    def change(folder: Path) -> None:
        found = load_file(folder / file)
        edit(found)
        save_file(found, folder / file, {"format": "pt"})

    return change


def change(edit: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(lambda t: t.update({TENSOR: edit(t[TENSOR])}))


def value(key: str, number: float, at: int = 0) -> Damage:
    return tensors(lambda t: t[key].view(-1)[at : at + 1].fill_(number))


def adapter_value(number: float, dtype: torch.dtype = torch.float32) -> Damage:
    return tensors(lambda t: t.update({min(t): torch.full_like(t[min(t)], number).to(dtype)}), ADAPTER)


def state(**changes: object) -> Damage:
    """Change the quant state of one 4-bit weight."""

    def edit(t: dict[str, torch.Tensor]) -> None:
        values = {**json.loads(bytes(t[STATE].numpy())), **changes}
        t[STATE] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    return tensors(edit)


def header(edit: Callable[[dict[str, Any]], object], text: Callable[[str], str] = str) -> Damage:
    """Changes the header of the safetensors, as values and as text, and keeps the data as they are."""

    def edit_header(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8:end])
        edit(entries)
        new = text(json.dumps(entries)).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + raw[end:])

    return edit_header


def entry(edit: Callable[[dict[str, Any]], object]) -> Damage:
    return header(lambda entries: edit(entries[TENSOR]))


def truncate(folder: Path, num_bytes: int) -> None:
    put(WEIGHTS, (folder / WEIGHTS).read_bytes()[:num_bytes])(folder)


def shard(folder: Path, **more: str) -> Path:
    """Make two files with an index of the one; ``more`` are its entries for other tensors. Returns the second."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | more}))
    (folder / WEIGHTS).unlink()
    return folder / "part-1.safetensors"


def index(file: str) -> Damage:
    """Shards, one tensor of which lies in ``file`` by the index."""

    def replace(folder: Path) -> None:
        shutil.copyfile(shard(folder), folder.parent / "outside.safetensors")
        values = json.loads((folder / INDEX).read_text())
        values["weight_map"][TENSOR] = file.format(folder.parent)
        (folder / INDEX).write_text(json.dumps(values))

    return replace


def index_names_twice(folder: Path) -> None:
    shard(folder)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(f'"{TENSOR}":', f'"{TENSOR}": "none.safetensors", "{TENSOR}":'))


def gguf_only(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    put("broken.gguf", b"GGUF" + bytes(20))(folder)


def quantized(**about: object) -> Damage:
    return config(quantization_config=about)


def deep_tools(depth: int) -> str:
    """A row with a tool whose parameters are nested so deep."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": turns, "tools": [{"name": "f", "parameters": "DEEP"}]}
    return json.dumps(row).replace('"DEEP"', '{"a": ' * depth + "1" + "}" * depth)


FILE = r"model\.safetensors cannot be read"
# What is done to the folder of a model, and what the sentence of load_model must contain.
BROKEN: list[tuple[str, Damage, str]] = [
    ("no config", lambda f: (f / CONFIG).unlink(), r"has no config\.json"),
    ("config is not JSON", put(CONFIG, "{"), r"config\.json cannot be read"),
    ("config of nothing", put(CONFIG, "{}"), r"config\.json has no model_type"),
    ("unknown kind", config(model_type="nonsense"), r"config\.json .*nonsense\) cannot be used"),
    ("no causal LM", put(CONFIG, '{"model_type": "clip"}'), "holds a clip model: expected"),
    ("a size that does not fit", config(num_attention_heads=5), "a multiple of the number"),
    ("other quantization", quantized(quant_method="gptq"), "holds gptq weights"),
    ("8-bit", quantized(quant_method="bitsandbytes", load_in_8bit=True), "holds 8-bit bitsandbytes weights"),
    ("no weights", lambda f: (f / WEIGHTS).unlink(), r"holds no weights: expected model\.safetensors"),
    ("pickle", lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), r"pickle \(pytorch_model\.bin\)"),
    ("missing shard", lambda f: shard(f).unlink(), r"lacks 1 of the 2 weight files.*part-1\.safetensors"),
    ("broken index", lambda f: (shard(f), put(INDEX, "[]")(f)), r"index\.json cannot be read: .*not a list"),
    ("index of another model", lambda f: shard(f, a="part-0.safetensors"), r"part-0\.safetensors lacks tensor a"),
    ("empty file", lambda f: truncate(f, 0), r"it holds 0 bytes: expected 8 or more"),
    ("truncated header", lambda f: truncate(f, 100), rf"{FILE}: it holds 100 bytes: expected [\d,]+ or more;"),
    ("truncated data", lambda f: truncate(f, -10), rf"{FILE}: it holds [\d,]+ bytes: expected [\d,]+;"),
    ("not JSON", put(WEIGHTS, struct.pack("<Q", 4) + b"abcd"), r"model\.safetensors cannot be read: Expecting value"),
    ("wild length", put(WEIGHTS, b"\xff" * 64), "first 8 bytes.* are no header length"),
    ("a web page", put(WEIGHTS, "<!DOCTYPE html>" * 9), "first 8 bytes.* are no header length"),
    ("a pointer", put(WEIGHTS, "version https://git-lfs"), "git lfs pull"),
    ("no offsets", entry(lambda e: e.pop("data_offsets")), f"{TENSOR} is malformed"),
    ("bad shape", entry(lambda e: e.update(shape=[-1, 4])), f"{TENSOR} is malformed"),
    ("other size", entry(lambda e: e.update(shape=[128, 63])), r"16,128 bytes.*16,384"),
    ("other dtype", entry(lambda e: e.update(dtype="F4")), f"{TENSOR} has dtype F4"),
    ("NaN", value(TENSOR, math.nan, at=5), f"{TENSOR} cannot be quantized.*5"),
    ("infinity", value(TENSOR, math.inf, at=5), f"{TENSOR} cannot be quantized.*5"),
    ("NaN in the embedding", value(EMBEDDING, math.nan), rf"tensor {EMBEDDING} holds a NaN"),
    ("whole numbers", change(lambda t: t.char()), f"{TENSOR} is torch.int8: expected float32"),
    ("other shape", change(lambda t: t[:64].clone()), rf"{TENSOR} is \[64, 64\], but \[128, 64\] by config\.json"),
    ("other vocabulary", config(vocab_size=120), r"is \[300, 64\], but \[120, 64\]"),
    ("a layer more", config(num_hidden_layers=3), r"lacks 9 of the 30 tensors.*layers\.2\."),
    ("adapter", lambda f: (f / CONFIG).rename(f / "adapter_config.json"), "an adapter and no model"),
    ("broken GGUF", gguf_only, r"broken\.gguf cannot be read"),
    ("broken generation config", put("generation_config.json", "{"), r"generation_config\.json cannot be read"),
]

DEEP = "[" * 200_000
LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'ha'}]\n" for n in range(9))
LOAD = "load_model {model}"
CONVERT, QUANTIZE = "convert {model} {out} --to 16bit", "quantize {model} --out {out}"
MERGE, PEFT = "merge {model} {adapter} --out {out}", "export {model} --adapter {adapter} --to peft --out {out}"
SHOW = "data show {run}/train.jsonl --model {model}"
EXPORT, TRAIN = "export {model} --to gguf --out {out}.gguf", "train {run}/run.yaml"
CHAT, CHECK = "chat {model} --prompt hello --max-tokens 1", "config check {run}/run.yaml"
EVIL = {"__metadata__": {}, "a\x1b[2J" + "b" * 1_000_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}

# What is done to which folder, and what is run then.
HOSTILE: list[tuple[str, Damage, list[str]]] = [
    *(
        ("model", value("model.norm.weight", number), [EXPORT, QUANTIZE, CONVERT, MERGE])
        for number in (math.nan, math.inf)
    ),
    ("model", config(hidden_size=128), [CONVERT, MERGE, EXPORT]),
    *(("model", other(name), [CONVERT]) for name in (CONFIG, WEIGHTS, "generation_config.json")),
    *(("model", other(name, "/dev/zero"), [CONVERT, CHAT]) for name in (CONFIG, "tokenizer.json")),
    *(("model", put(CONFIG, text), [CONVERT]) for text in (DEEP, "[]", '{"a": ' * 9999, "1" * 5000, " " * (17 << 20))),
    *(("model", put("generation_config.json", text), [QUANTIZE]) for text in (DEEP, "[]")),
    *(("model", put("tokenizer.json", text), [CHAT]) for text in (DEEP, "[]", "{}")),
    *(("model", config(**{name: 10**9}), [CONVERT]) for name in ("num_hidden_layers", "hidden_size", "vocab_size")),
    *(("model", config(**{name: 0}), [CONVERT]) for name in ("num_attention_heads", "hidden_size")),
    *(("model", config(attention_dropout=share), [TRAIN, CHAT]) for share in (5, 1, -0.5, float("nan"))),
    ("model", config(embd_pdrop=1.5), [CONVERT]),
    ("model", config(num_key_value_heads=-1, head_dim="x"), [CONVERT]),
    ("model", config(_attn_implementation="someone/kernel"), [CONVERT]),
    ("model", config(auto_map={"AutoConfig": "code.Config"}, model_type="mine"), [CONVERT]),
    *(("model", index(f"{where}/outside.safetensors"), [CONVERT]) for where in ("..", "{}")),
    ("model", index_names_twice, [CONVERT]),
    ("model", put(WEIGHTS, struct.pack("<Q", len(DEEP)) + DEEP.encode()), [CONVERT]),
    ("model", put(WEIGHTS, struct.pack("<Q", len(json.dumps(EVIL))) + json.dumps(EVIL).encode()), [CONVERT]),
    ("model", header(lambda e: e.update(twin=e[TENSOR])), [CONVERT]),  # two tensors of the same bytes
    ("model", header(lambda e: e.pop(TENSOR)), [CONVERT]),  # a hole
    ("model", header(lambda e: None, lambda text: f'{{"{TENSOR}": 1, {text[1:]}'), [CONVERT]),  # a name twice
    ("model", header(lambda e: e[TENSOR].update(shape=[1] * 100)), [CONVERT]),
    ("model", header(lambda e: e[TENSOR].update(dtype=[])), [CONVERT]),
    ("model", put("tokenizer_config.json", '{"model_max_length": []}'), [CHAT]),
    ("model", put("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'), [CHAT]),
    *(("four_bit", state(dtype=name), [CONVERT]) for name in ("__class__", "int8", 5)),
    *(("four_bit", state(shape=shape), [CONVERT]) for shape in ("64", [64.0, 64.0], [[64], [64]], [-64, -64], 4096)),
    *(("four_bit", state(**{k: v}), [CONVERT]) for k, v in {"blocksize": "64", "quant_type": "fp4"}.items()),
    *(("four_bit", state(nested_offset=number), [CONVERT]) for number in (float("nan"), float("inf"), "1", None)),
    *(("four_bit", value(f"{TENSOR}.{name}", math.nan), [CONVERT]) for name in ("nested_absmax", "nested_quant_map")),
    ("four_bit", value(f"{TENSOR}.nested_absmax", 1e38), [CONVERT, CHAT]),
    ("four_bit", tensors(lambda t: t.update({f"{TENSOR}.quant_map": qn._native.levels(1).clone()})), [CONVERT]),
    ("four_bit", tensors(lambda t: t.update({STATE: t[STATE].float()})), [CONVERT]),
    *(("adapter", other(name), [MERGE, PEFT]) for name in (ADAPTER, ADAPTER_CONFIG)),
    *(("adapter", put(ADAPTER_CONFIG, text), [PEFT]) for text in (DEEP, "[]", " " * (2 << 20))),
    *(("adapter", put(ADAPTER, raw), [PEFT]) for raw in (b"", b"\0" * 8, struct.pack("<Q", 4) + b"null")),
    *(("adapter", adapter(**{name: "x"}), [PEFT]) for name in ("r", "lora_alpha", "lora_dropout", "rank_pattern")),
    *(("adapter", adapter(lora_alpha=number), [PEFT]) for number in (float("nan"), 1e999, 10**400, None)),
    *(("adapter", adapter(rank_pattern={text: 4}), [PEFT]) for text in ("(", "(.|.)+x", r"(a+)+\d", ".*" * 9, "(?=a)")),
    *(("adapter", adapter(alpha_pattern={text: 4}), [PEFT]) for text in ("(.|.)" * 30, "(" * 500 + ")" * 500)),
    ("adapter", adapter(rank_pattern={f"layer{n}": 4 for n in range(20_000)}), [PEFT]),
    *(("adapter", adapter_value(number), [PEFT]) for number in (float("nan"), float("-inf"))),
    *(("adapter", adapter_value(1, getattr(torch, f"float8_{name}")), [MERGE, PEFT]) for name in ("e4m3fn", "e5m2")),
    *(("adapter", adapter_value(1, dtype), [MERGE]) for dtype in (torch.complex64, torch.int32, torch.float64)),
    *(("adapter", put("config.yaml", text), [MERGE]) for text in ("quant: 5", "quant: {type: int3}", "- a", "a: [")),
    *(("run", put("run.yaml", text), [CHECK]) for text in (DEEP, LAUGHS, "a: &a [*a]", "a: !!python/name:os.system x")),
    *(("run", put("run.yaml", text), [CHECK]) for text in ("a: !!timestamp x", "steps: " + "1" * 5000, b"\xff", "\0")),
    ("run", other("run.yaml"), [CHECK]),
    ("run", other("run.yaml", "/dev/zero"), [CHECK]),
    ("run", put("train.jsonl", '{"text": ' + DEEP), [TRAIN]),
    *(("run", put("train.jsonl", deep_tools(depth)), [SHOW, TRAIN]) for depth in (300, 900)),
    ("run", other("train.jsonl"), [TRAIN]),
    ("run", lambda f: f, ["train ~nosuchuser/a.yaml", f"train {'n' * 300}", "quantize {model} --out " + "n" * 300]),
    ("run", lambda f: f, ["quantize ~nosuchuser/model --out {out}", f"merge {'n' * 300} {{adapter}} --out {{out}}"]),
]
