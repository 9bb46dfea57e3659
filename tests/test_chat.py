"""`qlora chat`, against transformers' own generate."""

from __future__ import annotations

import io
import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from adapters import write_model_and_adapter
from transformers import AutoTokenizer

import qlora_native as qn
from qlora_native.lora.layer import adapters_off
from qlora_native.models import generate
from qlora_native.tool.cli import chat, main

PROMPT = "what is green?"
TOKENS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_adapter(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def expected(files: Path) -> dict[str, str]:
    return greedy(files)


def greedy(files: Path, **options: Any) -> dict[str, str]:
    """transformers' greedy answers to PROMPT."""
    model: Any = qn.load_adapter(qn.load_model(files / "model", **options), files / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer() -> str:
        output = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    with_adapter = answer()
    with adapters_off(model):
        return {"base": answer(), "adapter": with_adapter}


def run(files: Path, *more: str) -> int:
    arguments = ("--adapter", str(files / "adapter"), "--max-tokens", str(TOKENS), *more)
    return main.main(["chat", str(files / "model"), *arguments])


def test_greedy_answers_are_those_of_generate(
    files: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected["base"] != expected["adapter"]
    assert run(files, "--system", "be brief", "--prompt", PROMPT, "--json") == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert {answer["from"]: answer["text"] for answer in answers} == expected
    assert [answer["tokens"] for answer in answers] == [TOKENS, TOKENS]
    assert all(answer["ended"] == "length" and answer["tokens_per_second"] > 0 for answer in answers)

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert run(files, "--system", "be brief", "--prompt", PROMPT, f"--max_tokens={TOKENS}") == 0
    base, adapter = map(chat.printable, expected.values())
    assert capsys.readouterr().out == f"base: {base}\nadapter: {adapter}\n"


def test_dtype_is_that_of_the_model(
    files: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = greedy(files, dtype=torch.float32)
    assert run(files, "--system", "be brief", "--prompt", PROMPT, "--json", "--dtype", "float32") == 0
    assert {each["from"]: each["text"] for each in json.loads(capsys.readouterr().out)["answers"]} == wide != expected


def test_lines_are_turns_of_one_conversation_until_the_input_ends(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talk(lines: str, *more: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        assert run(files, "--json", "--temperature", "1.5", "--top-p", "0.9", *more) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    first = talk(f"{PROMPT}\n\n{PROMPT}\n")
    assert len(first) == 2
    assert first[0]["answers"][0]["text"] != first[1]["answers"][0]["text"]  # the second has the first before it
    again, other = talk(f"{PROMPT}\n"), talk(f"{PROMPT}\n", "--seed", "5")
    texts = [[answer["text"] for answer in rows[0]["answers"]] for rows in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def interrupted_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The first answer meets Ctrl-C after so many tokens."""
    plain, calls = generate.stream, iter(range(100))

    def stream(*args: Any) -> Iterator[int]:
        tokens = plain(*args)
        if next(calls):
            yield from tokens
        yield from itertools.islice(tokens, count)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", stream)


def test_ctrl_c_ends_an_answer_and_not_the_program(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_after(monkeypatch, 1)
    line = mock.Mock(side_effect=[PROMPT, KeyboardInterrupt(), "and red?", EOFError()])
    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main.main(["chat", str(files / "model"), "--max-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Ctrl-C ends an answer") and "Ctrl-D ends the program." in lines

    interrupted_after(monkeypatch, 1)
    assert run(files, "--prompt", PROMPT, "--json") == 130  # and the program, if it is but one answer
    first, second = json.loads(capsys.readouterr().out)["answers"]
    assert (first["ended"], first["tokens"], second["tokens"]) == ("interrupted", 1, 0)


def test_side_by_side_on_a_terminal(
    files: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    assert run(files, "--system", "be brief", "--prompt", PROMPT) == 0
    printed = capsys.readouterr().out
    heads = [line for line in printed.splitlines() if " base " in line and " adapter " in line]
    assert heads, printed
    for text in expected.values():
        assert chat.printable(text).split()[0][:8] in printed


def test_a_notebook_gets_plain_lines(
    files: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ``!command`` runs in a terminal that does not move its cursor."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert run(files, "--prompt", PROMPT) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and len(printed.splitlines()) == 2
    assert [line.split(": ")[0] for line in printed.splitlines()] == ["base", "adapter"]


def test_an_answer_cannot_command_the_terminal() -> None:
    assert chat.printable("a\tb\n\x1b[2J\r\x9bc\u202e \u00e9\ud800") == (
        "a\tb\n" + r"\x1b[2J\r\x9bc\u202e" + " \u00e9" + r"\ud800"
    )


def test_drawing_keeps_to_its_limits() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(**options: Any) -> set[int]:
        sampling = generate.Sampling(temperature=1.0, **options)
        return {generate.choose(logits, sampling, generator) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3} and drawn(top_k=2) == {1, 2} and drawn(top_p=0.01) == {1}
    assert drawn(top_p=0.7) == {1, 2}  # 0.644 alone is less
    assert generate.choose(logits, generate.Sampling(), generator) == 1
