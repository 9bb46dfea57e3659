"""Damaged files of every reader, each given to a command line in this process; test_damaged.py starts it and sets the
environment, which torch and transformers read when they are imported.

A damage is a list of edits, plain JSON: ``["json", path, text]`` puts a text in place of a value of the document,
``["drop", path]`` takes the value away, ``["bytes", at, length, hex]`` replaces bytes of the file. corpus.jsonl has
those that once did harm; the others follow from the reader's name and a number.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import re
import shutil
import struct
import sys
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import adapters
import damages
import gguf
import gguf_files
import runs
import tiny
import torch
import workers
import yaml
from safetensors.torch import load, load_file, save

from qlora_native.distributed.sharding import save_sharded_states
from qlora_native.models.convert import convert
from qlora_native.tool.cli import main as cli
from qlora_native.weight import unpack_json

CORPUS = Path(__file__).with_name("corpus.jsonl")
MOST_BYTES = 3 << 30  # of address space, beyond what the imports take
MARK = "\ue000{}\ue000"
GONE = object()
MOST_LINES = 40  # of what is wrong with a config
WARNING = re.compile(r"qlora: \w+Warning: ")
DEEP = "[" * 3000 + "]" * 3000
TEXTS = ["null", "true", "false", "0", "1", "-1", "2", "3", "64", "0.5", "1e-9", "1e999", "NaN", "-Infinity", "1e38"]
TEXTS += [str(2**31), str(2**63), str(-(2**63) - 1), str(10**400), "1" * 5000, DEEP, '{"a": ' * 3000 + "1" + "}" * 3000]
TEXTS += ['""', '"a"', '"\\u0000"', '"\\u001b[2J\\n\\u202e"', '"\\ud800"', '"../x"', '"/dev/zero"', f'"{"b" * 99999}"']
TEXTS += ["[]", "{}", "[[]]", "[0]", "[-1, 64]", "[null]", '{"a": 1}', '{"": {}}', "[" + "7, " * 9999 + "7]"]
TEXTS += ['"float16"', '"float64"', '"int8"', '"llama"', '"gpt2"', '"F16"', '"U8"', '"F64"', '"{{ 9 }}"', '"1e9"']
TEXTS += ['"F8_E4M3"', '"C64"']
YAML = ["!!python/name:os.system x", "&a [*a]", "!!timestamp x", "!!binary x", "*nothing", "0o9", "1:2:3", "| x", "%"]


class Reader(NamedTuple):
    """A file, how its document is found in it, and the command lines that read it."""

    file: str
    kind: str  # json, yaml, lines (JSON), header or state (of safetensors), gguf, bytes
    commands: tuple[str, ...]
    share: int  # of the inputs
    more: str = ""  # keys that the document may have beside its own


CONVERT = "convert {}/model {}/out --to 16bit"
PEFT, MERGE = ("export {}/model --adapter {}/adapter --to peft --out {}/out", "merge {}/model {}/adapter --out {}/out")
CHAT, GGUF = "chat {}/model --prompt hello --max-tokens 2", "quantize {}/model.gguf --out {}/out"
FRESH = "train {}/run.yaml --steps 1 --output_dir {}/fresh"
SHOW, RESUME = "data show {}/train.jsonl --model {}/model --json", "train {}/run.yaml --resume"
CONFIG_KEYS = "quantization_config rope_parameters rope_scaling sliding_window layer_types auto_map text_config dtype "
CONFIG_KEYS += "torch_dtype pruned_heads num_labels id2label attention_bias mlp_bias num_experts is_encoder_decoder"
RUN_KEYS = "quant lora train data dtype steps lr packing max_length format method r alpha targets seed optimizer eval"
ADAPTER_KEYS = "rank_pattern alpha_pattern modules_to_save layers_to_transform use_dora use_rslora bias "
ADAPTER_KEYS += "init_lora_weights"
STEP = "run/step-000002"
TYPES = {"token_embd": "q8_0", "attn_q": "q4_1", "attn_k": "q5_0", "attn_v": "iq4_nl", "ffn_up": "q4_0"}
READERS = {
    "config": Reader("model/config.json", "json", (CONVERT, CHAT, "estimate {}/model --json"), 8, CONFIG_KEYS),
    "generation": Reader("model/generation_config.json", "json", (CHAT,), 2, "top_k temperature do_sample max_length"),
    "header": Reader("model/model.safetensors", "header", (CONVERT, GGUF.replace(".gguf", "")), 8, "__metadata__"),
    "index": Reader("sharded/model.safetensors.index.json", "json", (CONVERT.replace("model", "sharded"),), 4),
    "state": Reader("four_bit/model.safetensors", "state", (CONVERT.replace("model", "four_bit"),), 8),
    "packed": Reader("four_bit/model.safetensors", "header", (CONVERT.replace("model", "four_bit"),), 4),
    "gguf": Reader("model.gguf", "gguf", (GGUF, CHAT.replace("/model", "/model.gguf")), 6),
    "tokenizer": Reader("model/tokenizer.json", "json", (CHAT,), 6),
    "tokens": Reader("model/tokenizer_config.json", "json", (CHAT, SHOW), 3, "auto_map chat_template"),
    "template": Reader("model/chat_template.jinja", "bytes", (SHOW,), 2),
    "adapter": Reader("adapter/adapter_config.json", "json", (PEFT, MERGE), 5, ADAPTER_KEYS),
    "factors": Reader("adapter/adapter_model.safetensors", "header", (PEFT, MERGE), 4, "__metadata__"),
    "settings": Reader("run.yaml", "yaml", ("config check {}/run.yaml", "estimate {}/run.yaml", FRESH), 12, RUN_KEYS),
    "rows": Reader("train.jsonl", "lines", (SHOW,), 12, "text prompt completion tools messages conversations train"),
    "array": Reader("train.json", "json", (SHOW.replace(".jsonl", ".json"),), 4, "text prompt completion"),
    "parquet": Reader("train.parquet", "bytes", (SHOW.replace(".jsonl", ".parquet"),), 2),
    "trainer": Reader(f"{STEP}/trainer.json", "json", (RESUME,), 4),
    "states": Reader(f"{STEP}/trainer.safetensors", "header", (RESUME,), 4),
    "resumed": Reader(f"{STEP}/config.yaml", "yaml", (RESUME,), 2),
    "metrics": Reader("run/metrics.jsonl", "lines", (RESUME,), 3, "samples eval_loss loss"),
    "report": Reader("run/report.json", "json", (RESUME,), 1),
    "table": Reader("train.csv", "bytes", (SHOW.replace(".jsonl", ".csv"),), 1),
    "tabs": Reader("train.tsv", "bytes", (SHOW.replace(".jsonl", ".tsv"),), 1),
    "kept": Reader("kept.gguf", "gguf", (CHAT.replace("/model", "/kept.gguf"),), 3),
    "metadata": Reader("parted/states/.metadata", "bytes", (f"{RESUME} {{}}/parted",), 1),
    "parts": Reader("parted/states/__0_0.distcp", "bytes", (f"{RESUME} {{}}/parted",), 1),
}  # fmt: skip
Edits = list[list[Any]]


def write_sound(place: Path) -> None:
    """The sound files, two of which are read through links of their own."""
    pyarrow: Any = importlib.import_module("pyarrow.parquet")
    model, sizes = place / "model", {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    gguf_files.write_gguf(place / "kept.gguf", {**TYPES, "output": "f16"}, **sizes)
    adapters.make_adapter(model, place / "adapter")
    shutil.copytree(model, place / "sharded")
    damages.shard(place / "sharded")
    shutil.copytree(model, place / "four_bit", ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    convert(model, place / "four_bit", "bitsandbytes")
    tiny.write_rows(place / "train.jsonl", 6)
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    (place / "train.json").write_text(json.dumps(rows))
    for suffix, mark in ((".csv", ","), (".tsv", "\t")):
        texts = [[message["content"] for message in row["messages"]] for row in rows]
        lines = [mark.join(f'"{text}"' for text in row) for row in [["prompt", "completion"], *texts]]
        (place / f"train{suffix}").write_text("\n".join(lines))
    pyarrow.write_table(importlib.import_module("pyarrow").Table.from_pylist(rows), place / "train.parquet")
    settings = runs.settings(place, place / "run", {"train": "train.jsonl"}, steps=2, save_every=1)
    (place / "run.yaml").write_text(yaml.safe_dump({**settings, "data": {"train": str(place / "train.jsonl")}}))
    assert cli.main(["export", str(model), "--to", "gguf", "--type", "q8_0", "--out", str(place / "model.gguf")]) == 0
    assert cli.main(["train", str(place / "run.yaml")]) == 0
    shutil.copytree(place / STEP, place / "parted")
    named = {name.split(".", 1)[1]: tensor for name, tensor in load_file(place / STEP / "trainer.safetensors").items()}
    states: Any = {0: {name: tensor for name, tensor in named.items() if name[0].isdigit()}}
    save_sharded_states(place / "parted/states", SimpleNamespace(state_dict=lambda: {"state": states}))  # type: ignore


def opened(reader: Reader, raw: bytes) -> tuple[Any, Any]:
    """The document of a file, and the function that makes a file's bytes of another text of it."""
    if reader.kind == "json":
        return json.loads(raw), str.encode
    if reader.kind == "yaml":
        return yaml.safe_load(raw), str.encode
    if reader.kind == "lines":
        return [json.loads(line) for line in raw.splitlines()], str.encode
    if reader.kind == "header":
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        return json.loads(raw[8:end]), lambda text: struct.pack("<Q", len(text.encode())) + text.encode() + raw[end:]
    if reader.kind == "state":
        tensors = load(raw)
        name = next(name for name in sorted(tensors) if "quant_state" in name)

        def written(text: str) -> bytes:
            return bytes(save({**tensors, name: torch.tensor(list(text.encode()), dtype=torch.uint8)}))

        return unpack_json(tensors[name]), written
    return None, None


def numbers_in(reader: Reader, path: Path, raw: bytes) -> list[tuple[int, int]]:
    """Where the numbers of a binary file stand that say what follows, and their bytes."""
    if reader.kind == "header":
        return [(0, 8), *((at, 1) for at in range(8, 8 + struct.unpack("<Q", raw[:8])[0]))]
    if reader.kind != "gguf":
        return [(at, 1) for at in range(len(raw))]
    read = gguf.GGUFReader(path)
    places = []
    for field in [*read.fields.values(), *(tensor.field for tensor in read.tensors)]:
        at = field.offset
        for part in field.parts[:9]:
            places.append((at, min(part.nbytes, 8)))
            at += part.nbytes
    return places


def place_in(node: Any, chance: random.Random) -> tuple[list[Any], Any]:
    """A path in a document, and the value there."""
    path: list[Any] = []
    while node and isinstance(node, (dict, list)) and chance.random() < 0.85:
        path.append(chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node)))
        node = node[path[-1]]
    return path, node


def document_edit(reader: Reader, document: Any, chance: random.Random) -> list[Any]:
    path, value = place_in(document, chance)
    kind = chance.randrange(8)
    if kind == 0 and path:
        return ["drop", path]
    if kind == 1 and path and isinstance(path[-1], str) and reader.more:
        path = [*path[:-1], chance.choice(reader.more.split())]
    elif kind == 2:
        return ["json", path, json.dumps(place_in(document, chance)[1])]
    elif kind == 3 and type(value) in (int, float):
        return ["json", path, str(chance.choice((value + 1, value - 1, -value, value * 2, value // 2, value * 2**32)))]
    return ["json", path, chance.choice(TEXTS + YAML if reader.kind == "yaml" else TEXTS)]


def bytes_edit(raw: bytes, places: list[tuple[int, int]], chance: random.Random) -> list[Any]:
    at, length = chance.choice(places) if chance.random() < 0.7 else (chance.randrange(len(raw)), 1)
    other, some = chance.randrange(len(raw)), chance.choice((1, 2, 8, 100))
    top = 1 << 8 * length
    number = chance.choice((0, 1, 4, 9, 255, top - 1, top // 2, top // 2 - 1, 1 << 30, chance.randrange(top))) % top
    return chance.choice(
        (
            ["bytes", at, length, number.to_bytes(length, "little").hex()],
            ["bytes", at, length, number.to_bytes(length, "little").hex()],
            ["bytes", at, 1, bytes([raw[at] ^ 1 << chance.randrange(8)]).hex()],
            ["bytes", at, some, raw[other : other + some].hex()],
            ["bytes", at, 0, raw[other : other + some].hex()],
            ["bytes", at, some, ""],
            ["bytes", at, len(raw), ""],
        )
    )


def edited(reader: Reader, raw: bytes, edits: Edits) -> bytes:
    """The bytes of the file after the edits, those of the document first."""
    texts: list[str] = []
    if any(edit[0] != "bytes" for edit in edits):
        document, written = opened(reader, raw)
        for kind, path, *text in (edit for edit in edits if edit[0] != "bytes"):
            document = replaced(document, path, GONE if kind == "drop" else MARK.format(len(texts)))
            texts += text
        rows = document if reader.kind == "lines" and isinstance(document, list) else [document]
        whole = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        for number, new in enumerate(texts):
            whole = whole.replace(json.dumps(MARK.format(number), ensure_ascii=False), new)
        raw = written(whole)
    for _, at, length, new in (edit for edit in edits if edit[0] == "bytes"):
        raw = raw[:at] + bytes.fromhex(new) + raw[at + length :]
    return raw


def replaced(node: Any, path: list[Any], value: Any) -> Any:
    """The document with ``value`` at the path, where there is one."""
    if not path:
        return value
    key, *rest = path
    if isinstance(node, dict):
        node = {**node, key: replaced(node.get(key), rest, value)}
        return {name: inner for name, inner in node.items() if inner is not GONE}
    if isinstance(node, list) and isinstance(key, int) and key < len(node):
        node = [replaced(inner, rest, value) if n == key else inner for n, inner in enumerate(node)]
        return [inner for inner in node if inner is not GONE]
    return node


def made(name: str, number: int, place: Path) -> Edits:
    """The edits of a reader's input of this number."""
    reader, chance = READERS[name], random.Random(f"{name} {number}")
    raw = (place / "sound" / reader.file).read_bytes()
    document, _ = opened(reader, raw)
    return [
        document_edit(reader, document, chance)
        if document is not None and chance.random() < 0.75
        else bytes_edit(raw, numbers_in(reader, place / "sound" / reader.file, raw), chance)
        for _ in range(chance.choice((1, 1, 1, 2, 4)))
    ]


def outcome(name: str, edits: Edits, command: str, place: Path) -> str:
    """Damages the file, runs the command, and puts everything back."""
    reader, out = READERS[name], place / "out"
    sound = place / "sound" / reader.file
    (place / reader.file).write_bytes(edited(reader, sound.read_bytes(), edits))
    why = ""
    try:
        code = cli.main(command.format(*[place] * 3).split())
    except BaseException:
        code, why = 1, traceback.format_exc()[-2000:]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        written = (place / "stdout").read_text(errors="surrogateescape")
        lines = (place / workers.STDERR).read_text(errors="surrogateescape").splitlines()
        said = [line for line in lines if not WARNING.match(line)]
        try:
            if not why and not all(len(line) < cli.MOST_CHARACTERS + 20 and is_text(line) for line in lines):
                why = "a line that a terminal cannot take"
            elif code == 2 and (len(said) != 1 or not said[0].startswith("qlora") or "alloc" in said[0]):
                why = f"{len(said)} lines" * (reader.kind != "yaml" or not 0 < len(said) <= MOST_LINES)
            elif code == 2 and out.exists():
                why = "refused and written"
            elif code == 0:
                why = wrong_output(place, written, "--json" in command)
        except Exception:
            why = traceback.format_exc()[-2000:]
        for folder in ("out", "run", "fresh"):
            shutil.rmtree(place / folder, ignore_errors=True)
        shutil.copytree(place / "sound/run", place / "run")
        shutil.copyfile(sound, place / reader.file)
    if why or code not in (0, 2):
        return f"wrong: exit {code}, {why} {lines[-5:]}"
    return "accepted" if code == 0 else f"refused: {said[0]}"


def is_text(line: str) -> bool:
    return line.replace("\t", " ").isprintable()


def wrong_output(place: Path, printed: str, is_json: bool) -> str:
    """What is wrong with the tensors or the numbers that a command made of an accepted file."""
    if is_json:
        json.loads(printed, parse_constant=lambda name: 1 / 0)
    elif not all(map(is_text, printed.splitlines())):
        return "output that a terminal cannot take"
    shapes = {name: tensor.shape for name, tensor in load_file(place / "sound/model/model.safetensors").items()}
    files = (place.glob(f"{folder}/*.safetensors") for folder in ("out", "run/adapter", "fresh/adapter"))
    for file in itertools.chain(*files):
        for name, tensor in load_file(file).items():
            if not tensor.isfinite().all():
                return f"{name} is not finite"
            if tensor.is_floating_point() and tensor.shape != shapes.get(name, tensor.shape):
                return f"{name} is {list(tensor.shape)}"
    return ""


def case_at(place: Path, known: list[str], number: int) -> workers.Case:
    """The corpus comes first; then each reader's share of the inputs, spread evenly."""
    if number < len(known):
        name, edits, command = json.loads(known[number])
    else:
        turns = [name for name, reader in READERS.items() for _ in range(reader.share)]
        random.Random(0).shuffle(turns)
        name = turns[number % len(turns)]
        edits, command = made(name, number, place), random.Random(number).choice(READERS[name].commands)
    return [name, edits, command], partial(outcome, name, edits, command, place)


def main(folder: str, count: str, first: str) -> None:
    place, known = Path(folder), CORPUS.read_text().splitlines()
    setattr(os, "fsync", lambda descriptor: None)  # noqa: B010 - which takes most of the time, as drawing does
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    with contextlib.redirect_stdout(sys.stderr):
        if not (place / "sound").exists():
            write_sound(place)
            shutil.copytree(place, place / "sound", ignore=shutil.ignore_patterns("sound", "std*"))
    workers.limit_memory(MOST_BYTES)
    workers.serve(len(known) + int(count), partial(case_at, place, known), place, int(first))


if __name__ == "__main__":
    main(*sys.argv[1:])
