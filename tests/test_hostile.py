"""Files made to do harm: each ends in one short sentence and exit code 2, soon, and nothing is written."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from adapters import make_adapter, write_model_and_adapter
from runs import settings
from test_load_errors import BROKEN, CONFIG, INDEX, WEIGHTS, header, shard, write
from test_load_errors import TENSOR as KEY
from tiny_models import edit_config, edit_tensors

import qlora_native as qn
from qlora_native import _io
from qlora_native.data import _limits, template
from qlora_native.models.convert import convert as convert_folder
from qlora_native.tool.cli import doctor
from qlora_native.tool.cli.main import MOST_CHARACTERS, main

SECONDS = 20  # in which a sentence must come
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
STATE = f"{KEY}.quant_state.bitsandbytes__nf4"

Damage = Callable[[Path], object]


def put(name: str, content: str | bytes) -> Damage:
    return write(content, name)


def other(name: str, target: str = "") -> Damage:
    """A pipe in place of a file, or a link to ``target``."""

    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target) if target else os.mkfifo(folder / name)

    return replace


def config(**changes: object) -> Damage:
    return lambda folder: edit_config(folder, **changes)


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda folder: edit_tensors(folder, edit)


def value(key: str, number: float) -> Damage:
    return tensors(lambda t: t[key].view(-1)[:1].fill_(number))


def adapter(**changes: object) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / ADAPTER_CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def adapter_value(number: float, dtype: torch.dtype = torch.float32) -> Damage:
    def change(t: dict[str, torch.Tensor]) -> None:
        t[min(t)] = torch.full_like(t[min(t)], number).to(dtype)

    def edit(folder: Path) -> None:
        (folder / ADAPTER).rename(folder / WEIGHTS)
        edit_tensors(folder, change)
        (folder / WEIGHTS).rename(folder / ADAPTER)

    return edit


def state(**changes: object) -> Damage:
    """Change the quant state of one 4-bit weight."""

    def edit(t: dict[str, torch.Tensor]) -> None:
        values = {**json.loads(bytes(t[STATE].numpy())), **changes}
        t[STATE] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    return tensors(edit)


def index(file: str) -> Damage:
    """Shards, one tensor of which lies in ``file`` by the index."""

    def replace(folder: Path) -> None:
        shutil.copyfile(shard(folder), folder.parent / "outside.safetensors")
        values = json.loads((folder / INDEX).read_text())
        values["weight_map"][KEY] = file.format(folder.parent)
        (folder / INDEX).write_text(json.dumps(values))

    return replace


def index_names_twice(folder: Path) -> None:
    shard(folder)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(f'"{KEY}":', f'"{KEY}": "none.safetensors", "{KEY}":'))


def deep_tools(depth: int) -> str:
    """A row with a tool whose parameters are nested so deep."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": turns, "tools": [{"name": "f", "parameters": "DEEP"}]}
    return json.dumps(row).replace('"DEEP"', '{"a": ' * depth + "1" + "}" * depth)


DEEP = "[" * 200_000
LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'ha'}]\n" for n in range(9))
CONVERT, QUANTIZE = "convert {model} {out} --to 16bit", "quantize {model} --out {out}"
MERGE, PEFT = "merge {model} {adapter} --out {out}", "export {model} --adapter {adapter} --to peft --out {out}"
SHOW = "data show {run}/train.jsonl --model {model}"
EXPORT, TRAIN = "export {model} --to gguf --out {out}.gguf", "train {run}/run.yaml"
CHAT, CHECK = "chat {model} --prompt hello --max-tokens 1", "config check {run}/run.yaml"
EVIL = {"__metadata__": {}, "a\x1b[2J" + "b" * 1_000_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}

# What is done to which folder, and what is run then.
HOSTILE: list[tuple[str, Damage, list[str]]] = [
    *(("model", damage, [CONVERT, MERGE]) for name, damage, _ in BROKEN if "generation" not in name),
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
    ("model", config(num_attention_heads=0), [CONVERT]),
    *(("model", config(attention_dropout=share), [TRAIN, CHAT]) for share in (5, 1, -0.5, float("nan"))),
    ("model", config(embd_pdrop=1.5), [CONVERT]),
    ("model", config(num_key_value_heads=-1, head_dim="x"), [CONVERT]),
    ("model", config(_attn_implementation="someone/kernel"), [CONVERT]),
    ("model", config(auto_map={"AutoConfig": "code.Config"}, model_type="mine"), [CONVERT]),
    *(("model", index(f"{where}/outside.safetensors"), [CONVERT]) for where in ("..", "{}")),
    ("model", index_names_twice, [CONVERT]),
    ("model", put(WEIGHTS, struct.pack("<Q", len(DEEP)) + DEEP.encode()), [CONVERT]),
    ("model", put(WEIGHTS, struct.pack("<Q", len(json.dumps(EVIL))) + json.dumps(EVIL).encode()), [CONVERT]),
    ("model", header(lambda e: e.update(twin=e[KEY])), [CONVERT]),  # two tensors of the same bytes
    ("model", header(lambda e: e.pop(KEY)), [CONVERT]),  # a hole
    ("model", header(lambda e: None, lambda text: f'{{"{KEY}": 1, {text[1:]}'), [CONVERT]),  # a name twice
    ("model", header(lambda e: e[KEY].update(shape=[1] * 100)), [CONVERT]),
    ("model", header(lambda e: e[KEY].update(dtype=[])), [CONVERT]),
    ("model", put("tokenizer_config.json", '{"model_max_length": []}'), [CHAT]),
    ("model", put("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'), [CHAT]),
    *(("four_bit", state(dtype=name), [CONVERT]) for name in ("__class__", "int8", 5)),
    *(("four_bit", state(shape=shape), [CONVERT]) for shape in ("64", [64.0, 64.0], [[64], [64]], [-64, -64], 4096)),
    *(("four_bit", state(**{k: v}), [CONVERT]) for k, v in {"blocksize": "64", "quant_type": "fp4"}.items()),
    *(("four_bit", state(nested_offset=number), [CONVERT]) for number in (float("nan"), float("inf"), "1", None)),
    *(("four_bit", value(f"{KEY}.{name}", float("nan")), [CONVERT]) for name in ("nested_absmax", "nested_quant_map")),
    ("four_bit", value(f"{KEY}.nested_absmax", 1e38), [CONVERT, CHAT]),
    ("four_bit", tensors(lambda t: t.update({f"{KEY}.quant_map": qn._native.levels(1).clone()})), [CONVERT]),
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


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_and_adapter(tmp_path_factory.mktemp("sound"))
    shutil.copytree(folder / "model", folder / "four_bit", ignore=shutil.ignore_patterns(WEIGHTS, CONFIG))
    convert_folder(folder / "model", folder / "four_bit", "bitsandbytes")
    (folder / "run").mkdir()
    tiny.write_rows(folder / "run/train.jsonl")
    return folder


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"no sentence after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("what", "damage", "commands"), HOSTILE, ids=[f"{n}" for n in range(len(HOSTILE))])
def test_one_sentence(
    what: str, damage: Damage, commands: list[str], sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("model", "adapter", "run")} | {"out": tmp_path / "out"}
    for name in ("model", "adapter", "run"):
        shutil.copytree(sound / (what if (what, name) == ("four_bit", "model") else name), places[name])
    run = settings(tmp_path, tmp_path / "out", {"train": str(places["run"] / "train.jsonl")}, steps=1)
    (places["run"] / "run.yaml").write_text(yaml.safe_dump(run))
    damage(places["model" if what == "four_bit" else what])
    before = sorted(path.name for path in tmp_path.iterdir())
    for command in commands:
        capsys.readouterr()
        with at_most(SECONDS):
            code = main(command.format(**places).split())
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Loading", "Writing"))]
        assert code == 2 and len(lines) == 1 and ".qlora-partial" not in lines[0], (command, lines)
        assert lines[0].startswith("qlora: ") and len(lines[0]) < MOST_CHARACTERS + 20 and lines[0].isprintable(), lines
    after = sorted(path.name for path in tmp_path.iterdir() if path.name != "out" or any(path.iterdir()))
    assert after == before


def test_a_template_that_loops(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(_limits, "MOST_SECONDS", 0.2)
    tokenizer = AutoTokenizer.from_pretrained(sound / "model")
    tokenizer.chat_template = "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2
    with pytest.raises(qn.UserError, match="over 0.2 s"), at_most(SECONDS):
        template.ChatEncoder(tokenizer).prompt_ids([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "text",
    [
        *("{{ 10**(10**9) }}", "{{ 'a' * 10**10 }}", "{{ [1] * 10**10 }}", "{{ 1 | round(-10**9) }}"),
        *("{{ 'a'.center(10**11) }}", "{{ '%99999999999d' % 1 }}", "{{ '{:>99999999999}'.format(1) }}"),
        "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "{% set n = namespace(a=9) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}",
    ],
)
def test_a_template_with_one_huge_operation(sound: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sound / "model")
    message = {"role": "user", "content": "a"}
    tokenizer.chat_template = "{{ '-' * 3 ~ 2**3 * 2 ~ (7 | round(-1)) }}"
    assert "---1610" in tokenizer.decode(template.ChatEncoder(tokenizer).prompt_ids([message]))
    tokenizer.chat_template = text
    with pytest.raises(qn.UserError, match="the chat template refuses"), at_most(SECONDS):
        template.ChatEncoder(tokenizer).prompt_ids([message])


def test_a_pipe_in_place_of_a_gguf_file(tmp_path: Path, mistake: Callable[..., str]) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    for name in (tmp_path, tmp_path / "model.gguf"):
        assert "model.gguf is a folder, a pipe" in mistake("chat", name, "--prompt", "a")


def test_more_tokens_than_rows_of_the_embedding(sound: Path, tmp_path: Path, mistake: Callable[..., str]) -> None:
    tiny.write_model(tmp_path / "model", vocab_size=40)
    run = settings(tmp_path, tmp_path / "out", {"train": str(sound / "run/train.jsonl")}, steps=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    shutil.copy(sound / "run/train.jsonl", tmp_path)
    make_adapter(tmp_path / "model", tmp_path / "adapter")
    evaluate = "eval {0}/model --data {0}/train.jsonl"
    merge = "merge {0}/model {0}/adapter --out {0}/merged --check"
    commands = ("train {0}/run.yaml", "chat {0}/model --prompt hello --max-tokens 1", evaluate)
    for command in (*commands, merge, f"{merge} --sample {{0}}/train.jsonl"):
        assert "beyond the 40 rows" in mistake(*command.format(tmp_path).split())


@pytest.mark.parametrize("command", [CONVERT, MERGE, PEFT])
def test_a_link_that_leaves_its_folder_is_not_copied(command: str, sound: Path, tmp_path: Path, capsys: Any) -> None:
    """Those of the hub's cache lead from snapshots to blobs of the same model."""
    (tmp_path / "secret").write_text("secret")
    model, found = tmp_path / "models--a--b" / "snapshots" / "0f", tmp_path / "adapter"
    shutil.copytree(sound / "adapter", found)
    shutil.copytree(sound / "model", model.parents[1] / "blobs")
    model.mkdir(parents=True)
    for path in (model.parents[1] / "blobs").iterdir():
        (model / path.name).symlink_to(Path("../../blobs") / path.name)
    for name in ("LICENSE", "README.md"):
        (model / name).symlink_to(tmp_path / "secret")
    (found / "README.md").unlink()
    (found / "README.md").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match=r"README.md is a link to .*secret"):
        assert main(command.format(model=model, adapter=found, out=tmp_path / "out").split()) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"LICENSE", "README.md"} & names
    assert len(names) > 1 and (command == PEFT or "tokenizer.json" in names)


def test_a_width_of_nothing(sound: Path, tmp_path: Path, mistake: Callable[..., str]) -> None:
    """Refused before torch warns of empty tensors, which was a second line."""
    shutil.copytree(sound / "model", tmp_path / "model")
    edit_config(tmp_path / "model", hidden_size=0)
    assert "hidden_size is 0" in mistake("convert", tmp_path / "model", tmp_path / "out", "--to", "16bit")


def test_a_state_dict_of_another_kind_names_the_key() -> None:
    layer = qn.nn.QuantizedLinear.from_linear(torch.nn.Linear(64, 32))
    for weight in (torch.zeros(8, dtype=torch.int64), torch.zeros(32, 63), torch.full((32, 64), float("nan"))):
        with pytest.raises(RuntimeError, match="'weight': .*(expected|finite)"):
            layer.load_state_dict({"weight": weight, "bias": torch.zeros(32)})


def test_ctrl_c_while_modules_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport none_such\n")
    path = os.pathsep.join([str(tmp_path), str(Path(qn.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "qlora_native", "doctor"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    assert (done.returncode, done.stderr) == (130, b"qlora: interrupted\n")

    def examine() -> None:  # as transformers does on the way
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module") from error

    monkeypatch.setattr(doctor, "examine", examine)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "qlora: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", [CONVERT, QUANTIZE, MERGE, EXPORT])
def test_a_signal_leaves_nothing_half_written(
    command: str, number: signal.Signals, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = command.format(model=sound / "model", adapter=sound / "adapter", out=tmp_path / "out").split()
    sent: list[str] = []

    def fsync(path: Path) -> None:
        sent.append(path.name)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(_io, "fsync", fsync)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert main(words) == 128 + number
        assert len(sent) == 1 and not list(tmp_path.iterdir())
        assert capsys.readouterr().err.splitlines()[-1] == f"qlora: stopped by {number.name}"
        assert signal.signal(number, signal.SIG_IGN) is signal.SIG_DFL  # as under nohup
        assert main(words) == 0 and list(tmp_path.iterdir())
    finally:
        signal.signal(number, before)


def test_a_second_signal_interrupts_no_cleaning_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted join of a thread forgets it: it would come back from native code after Python's end, and abort."""
    cleaned: list[bool] = []

    def run(args: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    monkeypatch.setattr(doctor, "run", run)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert main(["doctor"]) == 143 and cleaned == [True]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("where", ["2>/dev/full", "<&- >&- 2>&-"])
def test_output_that_cannot_be_written(sound: Path, tmp_path: Path, where: str) -> None:
    """A sentence that is lost changes neither the exit code nor the files."""
    code = "import sys\nfrom qlora_native.tool.cli.main import main\n"
    code += "code = main(sys.argv[1:4]) * 10\nprint('a library says', file=sys.stderr)\n"
    code += "sys.exit(code + main(['quantize', *sys.argv[2:]]))"
    words = [sys.executable, "-c", code, "trian", str(sound / "model"), "--out", str(tmp_path / "out")]
    done = subprocess.run(["bash", "-c", f'"$@" {where}', "-", *words])
    assert done.returncode == 20 and (tmp_path / "out" / WEIGHTS).is_file()


def test_text_that_the_encoding_of_the_output_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(written := io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(doctor, "run", lambda args: print("a \u2192 b"))
    assert main(["doctor"]) == 0
    assert written.getvalue() == b"a ? b\n"


def test_a_warning_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    assert main(["config", "list"]) == 0
    assert warnings.formatwarning("\x1b[2J" + "a" * 9999, UserWarning, "", 1)[:-1].isprintable()
