"""docs/tutorial.md, block by block in a folder with a small model; docs/troubleshooting.md against the source."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import tiny
from laws import ROOT

from qlora_native.cli import main

STEPS = "4"
ELSEWHERE = ("pip install", "hf download")  # what a test cannot run: it would need a network


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, title, text) of each block of code."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_step_of_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    tiny.write_model(Path("base-model"), num_attention_heads=2, num_key_value_heads=1)
    ran = []
    for language, title, text in blocks("tutorial.md"):
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, "docs/tutorial.md", "exec"), {"__name__": "__main__"})
        else:
            assert language == "sh", language
            for command in text.splitlines():
                if command.startswith(ELSEWHERE):
                    continue
                program, *words = shlex.split(command.replace("step-000060", f"step-{int(STEPS):06}"))
                if words[0] == "train":  # as many steps as a test has time for
                    words += ["--steps", STEPS]
                capsys.readouterr()
                assert program == "qlora" and main.main(words) == 0, command
                printed = capsys.readouterr().out
                assert "\x1b" not in printed and "\r" not in printed, command  # no terminal: plain lines
                ran.append(words[0])
    assert {"doctor", "chat", "config", "train", "merge", "export"} <= set(ran)
    left = (
        "run/adapter/README.md",
        "run/loss.png",
        "run-2/adapter",
        "merged/merge_report.md",
        "tuned.gguf",
        "for-peft",
    )
    assert all(Path(name).exists() for name in left)


# ---------------------------------------------------------------------------------------------------------------------
# Troubleshooting


def literals() -> list[str]:
    """Every text in the package's source; what an f-string fills in stands as a NUL."""
    found = []
    for path in (ROOT / "python" / "qlora_native").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_of_the_troubleshooting_page_is_in_the_source() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(messages) >= 20 and len(set(messages)) == len(messages)
    source = literals()
    missing = []
    for message in messages:
        parts = [part for part in message.split("...") if part]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        if not any(pattern.search(literal) for literal in source):
            missing.append(message)
    assert missing == []
    assert all(len(body.strip()) > 40 for body in re.split(r"^### .*$", text, flags=re.MULTILINE)[1:])
