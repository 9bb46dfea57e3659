"""What holds for every command: three likely mistakes end in one sentence, and no output needs a terminal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import yaml

import qlora_native as qn
from qlora_native.cli import demo, main
from qlora_native.cli.main import COMMANDS

OPTION = "--no-such-option"
# Per command: what was typed, and what the sentence has in it.
MISTAKES: dict[str, list[tuple[list[str], str]]] = {
    "demo": [
        (["--steps", "0"], "--steps is 0: expected 1 or more"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        ([OPTION], f"unrecognized arguments: {OPTION}"),
    ],
    "train": [
        (["gone.yaml"], "gone.yaml does not exist"),
        ([], "the following arguments are required: CONFIG"),
        ([OPTION, "1"], "the config file comes first"),
    ],
    "quantize": [
        (["gone", "--out", "new"], "gone is not there"),
        (["{model}"], "the following arguments are required: --out"),
        (["{model}", "--out", "{model}"], "{model} exists already"),
    ],
    "convert": [
        (["gone", "new", "--to", "16bit"], "gone is not there"),
        (["{model}", "{model}", "--to", "16bit"], "{model} exists already"),
        (["{model}", "new", "--to", "8bit"], "argument --to: invalid choice: '8bit'"),
    ],
    "config": [
        (["make"], "invalid choice: 'make'"),
        (["check", "gone.yaml"], "gone.yaml does not exist"),
        (["list", OPTION], f"takes no {OPTION}"),
    ],
    "tune": [
        (["gone"], "gone is not there"),
        (["{model}", "--tokens", "x"], "argument --tokens: invalid int value: 'x'"),
        (["{model}", OPTION], f"unrecognized arguments: {OPTION}"),
    ],
    "doctor": [
        (["gone"], "gone is not there"),
        (["--tokens", "0"], "--tokens is 0"),
        ([OPTION], f"unrecognized arguments: {OPTION}"),
    ],
    "bench": [
        (["attention"], "argument OP: invalid choice: 'attention'"),
        (["--model", "gone"], "gone is not there"),
        ([OPTION], f"unrecognized arguments: {OPTION}"),
    ],
    "estimate": [
        (["gone"], "gone"),
        (["{model}", "--gpu", "much"], "much"),
        ([], "the following arguments are required"),
    ],
    "data": [
        (["show", "gone.yaml"], "gone.yaml"),
        (["look", "gone.yaml"], "invalid choice: 'look'"),
        ([], "the following arguments are required"),
    ],
    "eval": [
        (["gone", "--data", "gone.txt"], "gone is not there"),
        (["{model}"], "--data"),
        (["{model}", OPTION], f"unrecognized arguments: {OPTION}"),
    ],
    "merge": [
        (["{model}"], "the following arguments are required: ADAPTER, --out"),
        (["gone", "adapter", "--out", "new"], "gone is not there"),
        (["{model}", "{model}", "--out", "new"], "has no adapter_config.json"),
    ],
    "export": [
        (["{model}", "--to", "onnx", "--out", "new"], "argument --to: invalid choice: 'onnx'"),
        (["{model}", "--to", "peft", "--out", "new"], "--to peft takes --adapter DIR"),
        (["gone", "--to", "gguf", "--out", "new.gguf"], "gone is not there"),
    ],
    "chat": [
        (["gone"], "gone is not there"),
        (["{model}", "--temperature", "-1"], "temperature is -1.0"),
        (["{model}", "--adapter", "{model}", "--prompt", "x"], "has no adapter_config.json"),
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    tiny.write_rows(folder / "rows.jsonl", 4)
    return tiny.write_model(folder / "model", num_hidden_layers=1)


@pytest.mark.parametrize("command", COMMANDS)
def test_three_likely_mistakes_are_one_sentence_each(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(MISTAKES[command]) == 3
    for words, told in MISTAKES[command]:
        capsys.readouterr()
        assert main.main([command, *(word.format(model=model) for word in words)]) == 2, words
        lines = [text for text in capsys.readouterr().err.splitlines() if not text.startswith(("Loading", "Writing"))]
        assert len(lines) == 1 and told.format(model=model) in lines[0], lines
        assert lines[0].startswith("qlora")
    assert list(tmp_path.iterdir()) == []


def test_output_is_plain_lines_where_there_is_no_terminal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A screen reader gets text from top to bottom: no colors, no line that is written over. The tutorial's test looks
    at the other commands."""
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
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model in place of the packaged one, which .ci/full takes: data, calibration, answers, adapter."""
    monkeypatch.setattr(demo, "model_file", lambda: model)
    out = tmp_path / "out"
    assert main.main(["demo", "--steps", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert not set(printed) & {"\x1b", "\r", "\b"}
    for told in ("memory of the weights: ", "step 2/2  held-out loss ", "  before: ", "  after:  ", "  theirs: "):
        assert told in printed
    made = yaml.safe_load((out / "adapter" / "config.yaml").read_text())
    assert made["quant"]["method"] == "wmse"
    kept = qn.CalibrationData(out / "calibration.safetensors")
    again = qn.load_model(model, method="wmse", calibration=kept)
    assert again.load_report.calibration["tokens"] >= 2048
    assert f"--calibration {out}/calibration.safetensors" in (out / "adapter" / "README.md").read_text()
    assert qn.load_adapter(again, out / "adapter") is not None
