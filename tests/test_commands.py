"""What holds for every command: likely mistakes end in one sentence, and no output needs a terminal."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from adapters import make_adapter

import qlora_native as qn
from qlora_native.errors import UserError
from qlora_native.models import device_layers
from qlora_native.tool.cli import demo, doctor, main, standard_library
from qlora_native.tool.cli._run import DISTRIBUTIONS
from qlora_native.tool.cli.main import COMMANDS
from qlora_native.tool.evaluate import variants

# Per command, at least three: what was typed, and what the sentence has in it.
MISTAKES = {
    "demo --steps 0": "--steps is 0: expected 1 or more",
    "demo --steps many": "argument --steps: invalid int value: 'many'",
    "demo --no-such-option": "unrecognized arguments: --no-such-option",
    "train gone.yaml": "gone.yaml does not exist",
    "train": "expected a config file, or --model",
    "train --model m --train r.jsonl --no-such-option 1": "--no-such-option is not a key",
    "quantize gone --out new": "gone is not there",
    "quantize {model}": "the following arguments are required: --out",
    "quantize {model} --out {model}": "{model} exists already",
    "quantize {model} --out new --block-size 48": "argument --block-size: invalid choice:",
    "quantize {model} --out new --skip-modules lm_haed": "lm_haed",
    "quantize {model} --out new --shard-size 4": "--shard-size is '4': expected a size",
    "quantize {model} --out {rows}/new": "could not write {rows}/new: ",
    "convert gone new --to 16bit": "gone is not there",
    "convert {model} {model} --to 16bit": "{model} exists already",
    "convert {model} new --to 8bit": "argument --to: invalid choice: '8bit'",
    "config make": "invalid choice: 'make'",
    "config check gone.yaml": "gone.yaml does not exist",
    "config list --no-such-option": "takes no --no-such-option",
    "doctor gone": "gone is not there",
    "doctor --tokens 1": "unrecognized arguments: --tokens",
    "doctor --no-such-option": "unrecognized arguments: --no-such-option",
    "bench attention": "argument OP: invalid choice: 'attention'",
    "bench --model gone": "gone is not there",
    "bench --no-such-option": "unrecognized arguments: --no-such-option",
    "estimate gone": "gone",
    "estimate {model} --gpu much": "much",
    "estimate": "expected a config, a model, or",
    "data show gone.yaml": "gone.yaml",
    "data look gone.yaml": "invalid choice: 'look'",
    "data": "the following arguments are required",
    "eval gone --data gone.txt": "gone is not there",
    "eval {model}": "--data",
    "eval {model} --no-such-option": "unrecognized arguments: --no-such-option",
    "merge {model}": "arguments are required: ADAPTER, --out",
    "merge gone adapter --out new": "gone is not there",
    "merge {model} {model} --out new": "has no adapter_config.json",
    "export {model} --to onnx --out new": "argument --to: invalid choice: 'onnx'",
    "export {model} --to peft --out new": "--to peft needs MODEL",
    "export gone --to gguf --out new.gguf": "gone is not there",
    "chat gone": "gone is not there",
    "chat {model} --temperature -1": "temperature is -1.0",
    "chat {model} --adapter {model} --prompt x": "{model} has no adapter_config.json",
    "chat {model} --prompt x --top-p 0": "top_p is 0.0: expected more than 0",
    f"chat {{model}} --prompt '{'a ' * 300}'": "tokens, the model's context 256: begin",
    "chat {model} --seed x": "argument --seed: invalid int value: 'x'",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    tiny.write_rows(folder / "rows.jsonl", 64)
    make_adapter(tiny.write_model(folder / "model", num_hidden_layers=1), folder / "adapter")
    return folder / "model"


@pytest.mark.parametrize("command", COMMANDS)
def test_likely_mistakes_are_one_sentence_each(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "rows": model.parent / "rows.jsonl"}
    lines = [line for line in MISTAKES if line.split()[0] == command]
    assert len(lines) >= 3
    for line in lines:
        assert MISTAKES[line].format(**names) in mistake(*shlex.split(line.format(**names)))
    assert list(tmp_path.iterdir()) == []


# What a valid call of each command needs, by the package that brings it, where something may be missing.
_HF, _ALL = "transformers yaml", "transformers yaml pydantic"
CALLS = {
    "train config.yaml": f"{_ALL} jinja2",
    "estimate {model} --gpu 24GB": _ALL,
    "quantize {model} --out quantized": _HF,
    "quantize {model} --calibration {rows} --calibration-rows 2 --out calibrated": f"{_HF} jinja2",
    "convert {model} converted --to bitsandbytes": _HF,
    "chat {model} --adapter {adapter} --prompt x --max-tokens 1": f"{_HF} jinja2",
    "merge {model} {adapter} --out merged": _HF,
    "export {model} --adapter {adapter} --to safetensors --out exported": _HF,
    "export {model} --to gguf --out exported.gguf": f"{_HF} gguf",
    "eval {model} --data {rows}": f"{_HF} jinja2",
    "config list": "",
    "config init": "",
    "config init {model} --gpu 24GB": _ALL,
    "config check config.yaml": "yaml pydantic",
    "data show {rows} --model {model}": f"{_ALL} jinja2",
    "bench linear_4bit --shape 1 64 64 --rounds 1": "",
    "bench linear_4bit --model {model} --tokens 1 --rounds 1": _HF,
    "doctor": "",
    "doctor {model}": _HF,
    "demo": f"{_ALL} gguf accelerate jinja2",
}
# Runs the lines of stdin where some packages can neither be found nor imported; prints exit codes and stderr.
WITHOUT = """
import contextlib, importlib.util, io, json, sys
blocked = sys.argv[1].split()
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in blocked: raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
plain = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in blocked else plain(name, package)
from qlora_native.tool.cli.main import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = main(line.split())
        except SystemExit as stop: code = stop.code
        except BaseException as bug: code = repr(bug)
    print(json.dumps([code, err.getvalue(), out.getvalue()]))
"""


def run_without(packages: str, lines: list[str], folder: Path) -> list[tuple[int, str, str]]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, packages],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "packages",
    ["transformers", "yaml", *(pytest.param(p, marks=pytest.mark.long) for p in ("pydantic", "jinja2 rich gguf"))],
)
def test_a_missing_package_is_named_by_those_that_need_it(packages: str, model: Path, tmp_path: Path) -> None:
    rows = model.parent / "rows.jsonl"
    (tmp_path / "config.yaml").write_text(
        f"model: {model}\noutput_dir: trained\ndata: {{train: {rows}}}\n"
        "train: {steps: 1, batch_size: 2, grad_accum: 1}\n"
    )
    lines = [line.format(model=model, rows=rows, adapter=model.parent / "adapter") for line in CALLS]
    found = run_without(packages, lines, tmp_path)
    for line, needs, (code, errors, _) in zip(lines, CALLS.values(), found, strict=True):
        missing = {*needs.split()} & {*packages.split()}
        assert code == (2 if missing else 0), (line, code, errors)
        if missing:
            last = errors.splitlines()[-1]
            assert any(DISTRIBUTIONS.get(name, name) in last for name in missing), (line, errors)
            assert last.startswith("qlora") and "pip install" in last and "Traceback" not in errors


def test_with_the_core_packages_only_help_and_doctor_work(tmp_path: Path) -> None:
    """Nothing that an extra brings can be imported or found."""
    blocked = " ".join([*doctor.EXTRAS.values(), "tokenizers"])
    lines = ["doctor", "--help", "--version", *(f"{command} --help" for command in COMMANDS)]
    (_, _, printed), *_ = found = run_without(blocked, lines, tmp_path)
    assert [(code, errors) for code, errors, _ in found] == [(0, "")] * len(lines)
    assert "missing: transformers, pydantic, pyyaml" in printed


def test_output_is_plain_lines_where_there_is_no_terminal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A screen reader gets text from top to bottom: no colors, no line that is written over; test_docs.py has the
    other commands."""
    monkeypatch.chdir(tmp_path)
    bars = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")  # read by transformers and tqdm when they are imported
    for name in bars:
        monkeypatch.delenv(name, raising=False)
    for command in (
        f"quantize {model} --out four-bit",
        "convert four-bit sixteen-bit --to 16bit",
        "bench linear_4bit --shape 2 64 64 --rounds 1",
        "config list",
    ):
        capsys.readouterr()
        assert main.main(command.split()) == 0, command
        printed = capsys.readouterr().out
        assert printed.strip() and not set(printed) & {"\x1b", "\r", "\b"}, command
    assert all(os.environ[name] == "1" for name in bars)


def test_the_demo_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model in place of the packaged one, which .ci/full takes: data, calibration, answers, adapter."""
    model = tiny.write_model(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=512)
    monkeypatch.setattr(demo, "model_file", lambda name: model)
    out = tmp_path / "out"
    assert main.main(["demo", "--steps", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert not set(printed) & {"\x1b", "\r", "\b"}
    for part in ("memory of the weights: ", "step 2/2  held-out loss ", "  before: ", "  after:  ", "  theirs: "):
        assert part in printed
    made = yaml.safe_load((out / "adapter" / "config.yaml").read_text())
    assert made["quant"]["method"] == "wmse"
    kept = qn.CalibrationData(out / "calibration.safetensors")
    again = qn.load_model(model, method="wmse", calibration=kept)
    assert again.load_report.calibration["tokens"] >= 2048
    assert f"{out}/base-4bit" in (out / "adapter" / "README.md").read_text() and (out / "base-4bit").is_dir()
    assert qn.load_adapter(again, out / "adapter") is not None


@pytest.mark.parametrize("option", ["--keep", "--model=1.5b"])
def test_the_demo_with_the_files_own_weights(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    few = [(f"module{n}", f"def f{n}():\n    return {n}", f"Return {n}.") for n in range(64)]
    monkeypatch.setattr(standard_library, "examples", lambda most: iter(few))
    file, out = write_gguf(tmp_path / "model.gguf", num_hidden_layers=1), tmp_path / "out"
    asked: list[str] = []

    def model_file(name: str) -> Path:
        asked.append(name)
        return file

    monkeypatch.setattr(demo, "model_file", model_file)
    assert main.main(["demo", option, "--steps", "2", "--out", str(out)]) == 0
    made = yaml.safe_load((out / "adapter" / "config.yaml").read_text())
    large = option == "--model=1.5b"
    assert asked == ["1.5b" if large else "smollm2"] and made["quant"]["type"] == "keep"
    assert made["train"].get("grad_checkpointing", False) is large
    printed = capsys.readouterr().out
    for part in ("its own weights as they are", "MiB, the file's own", "  after:  ", "held-out loss: "):
        assert part in printed
    command = next(line for line in printed.splitlines() if line.startswith("  qlora export "))
    assert main.main([*shlex.split(command)[1:], "--out", str(tmp_path / "adapter.gguf")]) == 0


@pytest.mark.parametrize("is_asked", [True, False])
def test_the_demo_in_float16(is_asked: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model and the run have the dtype, by the option, or as on a card without bfloat16."""
    if not is_asked:
        monkeypatch.setattr("qlora_native.tool.sections.card_dtype", lambda: "float16")
    dtypes: list[torch.dtype] = []

    def answer(model: Any, *_: Any) -> str:
        dtypes.append(model.dtype)
        return ""

    few = [(f"module{n}", f"def f{n}():\n    return {n}", f"Return {n}.") for n in range(64)]
    monkeypatch.setattr(standard_library, "examples", lambda most: iter(few))
    monkeypatch.setattr(demo, "model_file", lambda name: model)
    monkeypatch.setattr(demo, "_answer", answer)
    words = ["--steps", "1", *["--dtype", "float16"] * is_asked, "--out", str(tmp_path / "out")]
    assert main.main(["demo", *words]) == 0
    made = yaml.safe_load((tmp_path / "out" / "adapter" / "config.yaml").read_text())
    assert made["train"]["dtype"] == "float16" and set(dtypes) == {torch.float16}


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("command", ["demo", "chat {model} --prompt x", "eval {model} --data {rows}"])
def test_the_model_goes_to_the_card_in_its_type(
    command: str, has_bf16: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4 emulates bfloat16, at a tenth of its float16."""
    asked: list[Any] = []

    def load(*_: Any, **options: Any) -> None:
        asked.append((str(options["device"]), options["dtype"]))
        raise UserError("loaded")

    few = [(f"module{n}", f"def f{n}():\n    return {n}", f"Return {n}.") for n in range(64)]
    monkeypatch.setattr(standard_library, "examples", lambda most: iter(few))
    monkeypatch.setattr(demo, "model_file", lambda name: model)
    monkeypatch.setattr(qn, "load_model", load)
    monkeypatch.setattr(device_layers, "load_to_device", load)
    monkeypatch.setattr(variants, "load_to_device", load)
    monkeypatch.setattr(variants, "load_dense", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.chdir(tmp_path)
    assert main.main(command.format(model=model, rows=model.parent / "rows.jsonl").split()) == 2
    assert asked == [("cuda", torch.bfloat16 if has_bf16 else torch.float16)]
