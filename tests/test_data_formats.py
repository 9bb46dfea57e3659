"""Every layout of a row: inferred from the keys, brought into one form, and refused in one sentence if it is wrong."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from laws import ROOT
from sentences import Check

from qlora_native.data.formats import FORMATS, Row, infer_format, normalize
from qlora_native.data.readers import SourceRow
from qlora_native.errors import UserError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def source(data: dict[str, Any], line: int = 7) -> SourceRow:
    return SourceRow(f"d.jsonl:{line}", line, data)


def normal(data: dict[str, Any], format: str) -> Row:
    return normalize(source(data), format)


# ---- inference


@pytest.mark.parametrize(
    ("data", "format"),
    [
        ({"messages": CHAT}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "sharegpt"),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca"),
        ({"instruction": "i", "output": "o"}, "alpaca"),
        ({"prompt": "p", "completion": "c"}, "prompt-completion"),
        ({"text": "t"}, "text"),
        ({"text": "t", "id": 3, "source": None}, "text"),
        # Published sets carry a rendered text or a bare prompt beside the richer keys.
        ({"instruction": "i", "input": "", "output": "o", "text": "all of it"}, "alpaca"),
        ({"prompt": "p", "messages": CHAT}, "messages"),
    ],
)
def test_format_is_inferred_from_the_keys(data: dict[str, Any], format: str) -> None:
    assert infer_format([source(data, 1), source(data, 2)]) == format
    assert format in FORMATS


@pytest.mark.parametrize(
    "data",
    [
        {"instuction": "i", "output": "o"},
        {"Text": "t"},
        {"mesages": CHAT},
        {"promt": "p", "completions": "c"},
        {"q": "x"},
    ],
    ids=" ".join,
)
def test_unknown_keys_are_listed_with_the_near_miss(data: dict[str, Any], sentence: Check) -> None:
    with pytest.raises(UserError) as caught:
        infer_format([source(data, 1)])
    sentence(caught.value)


def test_rows_of_two_formats_are_named_by_line(sentence: Check) -> None:
    with pytest.raises(UserError, match="^d.jsonl:4: .* d.jsonl:1 .*'txt'") as caught:
        infer_format([source({"text": "t"}, 1), source({"txt": "t"}, 4)])
    sentence(caught.value)


# ---- each format


HISTORY: list[Any] = [["q1", "a1"]]
SHAREGPT = [
    {"from": "human", "value": "q"},
    {"from": "gpt", "value": "a", "weight": 0},
    {"from": "observation", "value": "o"},
    {"role": "user", "content": "q2"},
    {"from": "assistant", "value": "a2"},
]
SPELLINGS = [
    {"role": "developer", "content": ""},
    {"role": "Human", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]},
    {"role": "tool", "content": "42"},
    {"from": "gpt", "value": "a", "role": None, "tool_calls": None},
]


@pytest.mark.parametrize(
    ("format", "data", "expected", "untrained"),
    [
        ("messages", {"messages": [{"role": "system", "content": "s"}, *CHAT], "id": 1}, "s:s u:q a:a", set()),
        ("messages", {"messages": SPELLINGS}, "s: u:one_two t:42 a:a", set()),
        ("messages", {"messages": [*CHAT, {**CHAT[1], "weight": 0}, {**CHAT[1], "weight": 1}]}, "u:q a:a a:a a:a", {2}),
        ("sharegpt", {"conversations": SHAREGPT}, "u:q a:a t:o u:q2 a:a2", {1}),
        ("sharegpt", {"conversations": SHAREGPT, "system": "S"}, "s:S u:q a:a t:o u:q2 a:a2", {2}),
        ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, *SHAREGPT[:2]]}, "s:s u:q a:a", {2}),
        ("alpaca", {}, "u:i a:o", set()),
        ("alpaca", {"input": ""}, "u:i a:o", set()),
        ("alpaca", {"input": "x"}, "u:i\n\nx a:o", set()),
        ("alpaca", {"instruction": "", "input": "x"}, "u:x a:o", set()),
        ("alpaca", {"system": "s"}, "s:s u:i a:o", set()),
        ("alpaca", {"history": HISTORY, "system": ""}, "u:q1 a:a1 u:i a:o", set()),
        # Answers within the prompt are context.
        ("prompt-completion", {"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]}, "u:q a:a u:q a:a", {0, 1, 2}),
    ],
)
def test_conversations(format: str, data: dict[str, Any], expected: str, untrained: set[int]) -> None:
    found = normal({**({"instruction": "i", "output": "o"} if format == "alpaca" else {}), **data}, format)
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    turns = [(roles[turn[0]], turn[2:].replace("_", " ")) for turn in expected.split(" ")]
    assert [(message["role"], message["content"]) for message in found.messages or ()] == turns
    assert found == Row("d.jsonl:7", 7, messages=found.messages, untrained=frozenset(untrained))


def test_reasoning_is_kept_and_weights_are_not() -> None:
    row = normal({"messages": [CHAT[0], {**CHAT[1], "weight": 0, "reasoning_content": "r"}]}, "messages")
    assert row.messages == (CHAT[0], {**CHAT[1], "reasoning_content": "r"})


def test_plain_text() -> None:
    row = normal({"prompt": "p: ", "completion": "c"}, "prompt-completion")
    assert row == Row("d.jsonl:7", 7, prompt="p: ", completion="c")
    assert normal({"text": "t\n"}, "text") == Row("d.jsonl:7", 7, text="t\n")
    with pytest.raises(ValueError, match="format is 'chatml', expected one"):
        normal({"text": "t"}, "chatml")


# ---- what is refused

ASSISTANT = {"role": "assistant", "content": "a"}
BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "text": [
        ({"txt": "t"}, "rename 'txt' to 'text'"),
        ({}, "needs 'text', got no keys"),
        ({"text": 3}, "'text' is a number"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": "a\ud83d"}, r"'text' holds \\ud83d"),
    ],
    "alpaca": [
        ({"instruction": "i", "outptu": "o"}, "rename 'outptu' to 'output'"),
        ({"a": "i", "b": "o"}, "needs 'instruction', 'output', got 'a', 'b'"),
        ({"instruction": "i", "output": ""}, "'output' is empty"),
        ({"instruction": "", "output": "o"}, "'instruction' is empty"),
        ({"instruction": "i", "output": ["o"]}, "'output' is an array"),
        ({"instruction": "i", "input": {}, "output": "o"}, "'input' is an object"),
        ({"instruction": "i", "output": "o", "history": "h"}, "'history' is not valid JSON"),
        ({"instruction": "i", "output": "o", "history": 3}, "'history' is a number"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, r"history\[0\] is an array"),
    ],
    "prompt-completion": [
        ({"prompt": "p", "completion": ""}, "'completion' is empty"),
        ({"prompt": "p", "completion": [ASSISTANT]}, "'prompt' is not valid JSON"),
    ],
    "messages": [
        ({"messages": "hi"}, "'messages' is not valid JSON"),
        ({"messages": "{}"}, "'messages' is an object"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["hi"]}, r"messages\[0\] is a string"),
        ({"messages": [{"rol": "user", "content": "q"}]}, "rename 'rol' to 'role'"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] needs 'content', got 'role'"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "role is 'asistant', expected .*assistant"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, r"'messages\[1\].content' is empty"),
        ({"messages": [{"role": "user", "content": 5}]}, r"'messages\[0\].content' is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"content\[0\] is .* 'image_url'"),
        ({"messages": [{**ASSISTANT, "content": "", "tool_calls": [{"id": "1"}]}]}, r"\[0\].tool_calls\[0\] names no"),
        ({"messages": CHAT, "tools": [{}]}, r"tools\[0\] names no function"),
        ({"messages": [{**ASSISTANT, "weight": 0.5}]}, r"messages\[0\].weight is 0.5"),
    ],
    "sharegpt": [
        ({"conversations": [{"who": "human", "what": "q"}]}, r"conversations\[0\] needs 'from', 'value', got 'who'"),
        ({"conversations": [{"form": "human", "value": "q"}]}, "rename 'form' to 'from'"),
        ({"conversations": [{"from": "narrator", "value": "q"}]}, r"conversations\[0\].from is 'narrator'"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, r"conversations\[0\].value names no function"),
    ],
}


@pytest.mark.parametrize("format", BAD)
def test_a_bad_row_is_one_sentence_with_file_and_line(format: str, sentence: Check) -> None:
    for data, match in BAD[format]:
        with pytest.raises(UserError, match=f"^d.jsonl:7: .*{match}") as caught:
            normal(data, format)
        sentence(caught.value)


def test_every_example_of_the_page_is_of_the_format_it_stands_under() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    sections = re.split(r"^### (.+)$", page.partition("## Templates")[0], flags=re.M)[1:]
    assert tuple(sections[::2]) == FORMATS
    for name, section in zip(sections[::2], sections[1::2], strict=True):
        examples = re.findall(r"^```json\n(.*?)^```", section, re.M | re.S)
        assert examples, name
        for number, text in enumerate(examples, 1):
            row = SourceRow(f"docs/data.md, {name} {number}", number, json.loads(text))
            assert infer_format([row]) == name
            found = normalize(row, name)
            assert bool(found.tools) == ('"tools"' in text)
            assert found.messages or found.text or found.completion
