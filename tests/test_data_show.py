"""``qlora data show``: a file, its rows, and the sentences on mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from sentences import Check

from qlora_native.tool.cli.data import histogram
from qlora_native.tool.cli.main import main

QUESTION = {"role": "user", "content": "\x1b[31mred"}
LONG = {"role": "assistant", "content": "apple " * 40}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of which one is truncated and two are dropped: without an answer, and with a late one."""
    folder = tmp_path_factory.mktemp("files")
    tiny.write_model(folder / "model", num_hidden_layers=1)
    rows = [json.loads(line) for line in tiny.write_rows(folder / "train.jsonl", 6).read_text().splitlines()]
    for chat in ([QUESTION, LONG], [QUESTION], [{**LONG, "role": "user"}, LONG]):
        rows.append({"messages": chat})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = f"model: {folder / 'model'}\ndata: {{train: {folder / 'train.jsonl'}, max_length: 64}}\n"
    (folder / "config.yaml").write_text(config)
    return folder


def shown(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["data", "show", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_config_by_the_real_command_line(files: Path, sentence: Check) -> None:
    command = [sys.executable, "-m", "qlora_native", "data", "show", str(files / "config.yaml"), "--rows", "1"]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    sentence(done.stdout)
    assert done.stdout.isascii() and "\x1b" not in done.stdout


def test_a_data_file_with_keys_and_one_row(
    files: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, sentence: Check
) -> None:
    words = (files / "train.jsonl", "--model", files / "model", "--max_length", 64, "--packing", "true")
    sentence(shown(capsys, *words, "--row", 8, "--png", tmp_path / "lengths.png"))
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert ":7: 64 tokens, 54 of them trained, 108 more " in shown(capsys, *words, "--row", 7)
    assert ":9: 64 tokens, 0 of them trained," in (out := shown(capsys, *words, "--row", 9))
    assert "dropped: no trained token within max_length=64\n" in out
    out = shown(capsys, *words[:5], "--row", 9)
    assert out == shown(capsys, "--row", 9, *words[:5])
    assert out == shown(capsys, "--model", files / "model", "--train", *words[:1], "--row", 9, *words[3:5])


def test_another_chat_template(files: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = "{{ 'Chat: ' }}" + tiny.CHAT_TEMPLATE
    (tmp_path / "other.jinja").write_text(text)
    words = (files / "train.jsonl", "--model", files / "model", "--rows", 1, "--chat_template")
    assert "\nChat: <|user|>say, " in (out := shown(capsys, *words, text)) and "[[apple<|end|>]]" in out
    assert shown(capsys, *words, tmp_path / "other.jinja") == out
    assert main(["data", "show", *map(str, words), str(tmp_path / "none.jinja")]) == 2
    assert "none.jinja cannot be read" in capsys.readouterr().err


def test_several_files(files: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("instruction,output\nq,a\n")
    words = (files / "config.yaml", "--rows", 1, "--train", files / "train.jsonl", tmp_path / "more.csv", "--packing")
    out = shown(capsys, *words)
    assert f"{tmp_path / 'more.csv'}:2: " in out and f"{files / 'train.jsonl'}:1: " in out
    assert [file["rows"] for file in json.loads(shown(capsys, *words, "--json"))["files"]] == [7, 1]
    assert "more.csv" not in shown(capsys, *words, "--row", 9).partition("packed:")[2]


def test_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, files / "config.yaml", "--json", "--rows", "2", "--train_on", "all"))
    (file,) = found["files"]
    assert (file["rows"], file["dropped"], file["truncated"], file["format"]) == (9, 0, 2, "messages")
    assert file["truncated_lines"] == [7, 9]
    assert sum(count for *_, count in file["histogram"]) == 9
    assert [row["line"] for row in found["rows"]] == [1, 2]
    assert "".join(part["text"] for part in found["rows"][0]["parts"]).startswith("<|user|>say, what is red")
    assert found["packing"] is None


def test_on_a_terminal_trained_tokens_are_colored(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = shown(capsys, files / "config.yaml", "--rows", "1")
    assert "<|assistant|>\x1b[1;32mapple<|end|>\x1b[0m" in out and "[[" not in out


@pytest.mark.parametrize(
    "words",
    [
        "trian.jsonl --model model",
        "broken.jsonl --model model",
        "rows.xls --model model",
        "odd.jsonl --model model",
        "train.jsonl",
        "--train train.jsonl",
        "train.jsonl --train train.jsonl --model model",
        "--model model",
        "train.jsonl --model model --row 99",
        "train.jsonl --model model --max_lenght 9",
    ],
)
def test_mistakes_are_one_sentence(
    files: Path, words: str, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., str], sentence: Check
) -> None:
    monkeypatch.chdir(files)
    (files / "broken.jsonl").write_text('{"text": "abc"}\n{broken\n')
    (files / "odd.jsonl").write_text('{"q": "abc", "a": "b"}\n')
    sentence(mistake("data", "show", *words.split()))


def test_histogram_covers_all_lengths() -> None:
    lengths = np.array([3, 3, 9, 26, 27])
    found = histogram(lengths)
    assert found[0][0] == 3 and found[-1][1] >= 27 and sum(count for *_, count in found) == 5
    for low, high, count in found:
        assert count == int(((lengths >= low) & (lengths <= high)).sum())
    assert histogram(np.array([5, 5])) == [(5, 5, 2)]
