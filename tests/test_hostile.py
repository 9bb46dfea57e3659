"""Files made to do harm: each ends in one short sentence and exit code 2, soon, and nothing is written."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import damages
import pytest
import tiny
import torch
import yaml
from adapters import make_adapter, write_model_and_adapter
from damages import CONFIG, CONVERT, EXPORT, LOAD, MERGE, PEFT, QUANTIZE, WEIGHTS, Damage
from runs import settings
from tiny_models import edit_tensors
from transformers import AutoTokenizer

import qlora_native as qn
from qlora_native import _io
from qlora_native.data import _limits, template
from qlora_native.models.build import MetaModel
from qlora_native.models.convert import convert as convert_folder
from qlora_native.tool.cli import doctor
from qlora_native.tool.cli.main import MOST_CHARACTERS, main

SECONDS = 20  # in which a sentence must come


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


def refused(folder: str) -> str:
    with pytest.raises(qn.UserError) as error:
        qn.load_model(folder)
    return f"qlora: {error.value}"


CASES: list[Any] = [
    pytest.param("model", damage, [LOAD] + [CONVERT, MERGE] * ("generation" not in name), match, id=name)
    for name, damage, match in damages.BROKEN
]
for part in (f"{damages.TENSOR}.{name}" for name in ("absmax", "quant_map", "nested_absmax")):
    damage = damages.tensors(lambda t, part=part: t.pop(part))  # type: ignore[misc]
    CASES.append(pytest.param("four_bit", damage, [LOAD, CONVERT], re.escape(part), id=f"no {part}"))


@pytest.mark.parametrize(
    ("what", "damage", "commands", "match"),
    [*CASES, *(pytest.param(*row, "", id=f"{row[0]}-{number}") for number, row in enumerate(damages.HOSTILE))],
)
def test_one_sentence(
    what: str, damage: Damage, commands: list[str], match: str, sound: Path, tmp_path: Path, mistake: Any
) -> None:
    """Which has the folder and, for a broken model, what ``match`` says where load_model reads it."""
    places = {name: tmp_path / name for name in ("model", "adapter", "run")} | {"out": tmp_path / "out"}
    for name in ("model", "adapter", "run"):
        shutil.copytree(sound / (what if (what, name) == ("four_bit", "model") else name), places[name])
    run = settings(tmp_path, tmp_path / "out", {"train": str(places["run"] / "train.jsonl")}, steps=1)
    (places["run"] / "run.yaml").write_text(yaml.safe_dump(run))
    damage(places["model" if what == "four_bit" else what])
    before = sorted(path.name for path in tmp_path.iterdir())
    for command in commands:
        name, *words = command.format(**places).split()
        with at_most(SECONDS):
            line = refused(*words) if command == LOAD else mistake(name, *words)
        assert line.startswith("qlora: ") and len(line) < MOST_CHARACTERS + 20 and line.isprintable(), line
        assert ".qlora-partial" not in line
        if command == LOAD:
            assert re.search(match, line) and str(places["model"]) in line and line.endswith("."), line
    after = sorted(path.name for path in tmp_path.iterdir() if path.name != "out" or any(path.iterdir()))
    assert after == before


def prompt_of(folder: Path, text: str) -> str:
    """What a chat template makes of a question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = text
    with at_most(SECONDS):
        ids = template.ChatEncoder(tokenizer).prompt_ids([{"role": "user", "content": "a"}])
    return str(tokenizer.decode(ids))


def test_a_template_that_loops(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "MOST_SECONDS", 0.2)
    with pytest.raises(qn.UserError, match="over 0.2 s"):
        prompt_of(sound / "model", "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2)


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
    assert "---1610" in prompt_of(sound / "model", "{{ '-' * 3 ~ 2**3 * 2 ~ (7 | round(-1)) }}")
    with pytest.raises(qn.UserError, match="the chat template refuses"):
        prompt_of(sound / "model", text)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_model(tmp_path)
    store = MetaModel.store

    def stored(*arguments: Any) -> None:
        damages.truncate(tmp_path, 3000)
        store(*arguments)

    monkeypatch.setattr(MetaModel, "store", stored)
    with pytest.raises(qn.UserError, match=r"ends at byte 3,000"):
        qn.load_model(tmp_path)


def test_unknown_tensors_are_left_out_with_a_warning(tmp_path: Path) -> None:
    tiny.write_model(tmp_path)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"  # a buffer of old checkpoints, left out silently
    edit_tensors(tmp_path, lambda t: t.update({"model.vision.weight": torch.zeros(3), old: torch.zeros(8)}))
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM has no place for 1 of.*model\.vision\.weight"):
        qn.load_model(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("model.vision.weight"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has no place")
        qn.load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("none", {}, "none is not there: expected"),
        ("a.pt", {}, "a.pt is a file: expected a"),
        (".", {"method": "awq"}, "is 'awq': expected 'rtn', 'wmse'"),
        (".", {"method": "rtn", "calibration": ["text"]}, "takes no calibration data"),
        (".", {"method": "gptq"}, "method .gptq. needs calibration data"),
        (".", {"dtype": torch.int8}, "dtype is torch.int8"),
        (".", {"quant_type": "int4"}, "quant_type is 'int4'"),
        (".", {"block_size": 48}, "block_size is 48"),
    ],
)
def test_wrong_arguments(tmp_path: Path, name: str, arguments: dict[str, Any], words: str) -> None:
    (tmp_path / "a.pt").touch()
    with pytest.raises((ValueError, qn.UserError), match=words):
        qn.load_model(tmp_path / name, **arguments)


def test_gguf_files_that_are_none(tmp_path: Path, mistake: Callable[..., str]) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    for name in (tmp_path, tmp_path / "model.gguf"):
        assert "model.gguf is a folder, a pipe" in mistake("chat", name, "--prompt", "a")
    damages.gguf_only(tmp_path)
    for name in (tmp_path, tmp_path / "broken.gguf"):
        with pytest.raises(qn.UserError, match=r"broken\.gguf cannot be read"):
            qn.load_tokenizer(str(name))


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
