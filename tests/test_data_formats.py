"""Every layout of a row: told from the keys, brought into one form, and refused in one sentence when it is wrong."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from laws import ROOT

from qlora_native.data import FORMATS, Row, SourceRow, infer_format, normalize
from qlora_native.errors import UserError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def source(data: dict[str, Any], line: int = 7) -> SourceRow:
    return SourceRow(f"d.jsonl:{line}", line, data)


def normal(data: dict[str, Any], format: str) -> Row:
    return normalize(source(data), format)


def turns(row: Row) -> list[tuple[str, str]]:
    assert row.messages is not None
    assert (row.prompt, row.completion, row.text) == (None, None, None)
    return [(message["role"], message["content"]) for message in row.messages]


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
        # Parquet spells an absent key as null.
        ({"messages": None, "text": "t"}, "text"),
    ],
)
def test_format_is_inferred_from_the_keys(data: dict[str, Any], format: str) -> None:
    assert infer_format([source(data, 1), source(data, 2)]) == format
    assert format in FORMATS


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        ({"instuction": "i", "output": "o"}, "rename 'instuction' to 'instruction'."),
        ({"Text": "t"}, "rename 'Text' to 'text'."),
        ({"mesages": CHAT}, "rename 'mesages' to 'messages'."),
        ({"promt": "p", "completions": "c"}, "rename 'promt' to 'prompt' and 'completions' to 'completion'."),
        ({"q": "x"}, "rename the keys to those of one format."),
    ],
)
def test_unknown_keys_are_listed_with_the_near_miss(data: dict[str, Any], advice: str) -> None:
    with pytest.raises(UserError) as caught:
        infer_format([source(data, 1)])
    message = str(caught.value)
    keys = ", ".join(f"'{key}'" for key in sorted(data))
    assert message.startswith(f"d.jsonl:1: the keys {keys} fit no known format (messages: messages; ")
    assert message.replace("' and rename '", "' and '").endswith(advice)


def test_rows_of_two_formats_are_told_apart_by_line() -> None:
    with pytest.raises(UserError) as caught:
        infer_format([source({"text": "t"}, 1), source({"txt": "t"}, 4)])
    assert str(caught.value) == (
        "d.jsonl:4: format 'text' needs 'text', got 'txt'; rename 'txt' to 'text' "
        "(a file holds one format, and d.jsonl:1 is 'text')."
    )
    with pytest.raises(ValueError, match="no rows"):
        infer_format([])


# ---- each format


def test_messages() -> None:
    row = normal({"messages": [{"role": "system", "content": "s"}, *CHAT], "id": 1}, "messages")
    assert turns(row) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert (row.where, row.line, row.untrained) == ("d.jsonl:7", 7, frozenset())


def test_messages_in_other_spellings() -> None:
    row = normal(
        {
            "messages": [
                {"role": "developer", "content": ""},
                {"role": "Human", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]},
                {"role": "tool", "content": "42"},
                {"from": "gpt", "value": "a", "role": None, "tool_calls": None},
            ]
        },
        "messages",
    )
    assert turns(row) == [("system", ""), ("user", "one two"), ("tool", "42"), ("assistant", "a")]


def test_weight_zero_leaves_an_answer_untrained_and_reasoning_is_kept() -> None:
    answer = {"role": "assistant", "content": "a", "weight": 0}
    row = normal({"messages": [*CHAT, CHAT[0], answer, {**CHAT[1], "weight": 1, "reasoning_content": "r"}]}, "messages")
    assert row.untrained == {3}
    assert row.messages is not None
    assert row.messages[3] == {"role": "assistant", "content": "a"}
    assert row.messages[4] == {"role": "assistant", "content": "a", "reasoning_content": "r"}


def test_sharegpt() -> None:
    conversation = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a", "weight": 0},
        {"from": "observation", "value": "o"},
        {"role": "user", "content": "q2"},
        {"from": "assistant", "value": "a2"},
    ]
    row = normal({"conversations": conversation}, "sharegpt")
    expected = [("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "o"), ("user", "q2"), ("assistant", "a2")]
    assert turns(row) == expected
    assert row.untrained == {2}
    above = normal({"conversations": conversation[1:], "system": "S"}, "sharegpt")
    assert turns(above) == [("system", "S"), *expected[1:]]
    assert above.untrained == {2}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, [("user", "i"), ("assistant", "o")]),
        ({"input": ""}, [("user", "i"), ("assistant", "o")]),
        ({"input": None}, [("user", "i"), ("assistant", "o")]),
        ({"input": "x"}, [("user", "i\n\nx"), ("assistant", "o")]),
        ({"instruction": "", "input": "x"}, [("user", "x"), ("assistant", "o")]),
        ({"system": "s"}, [("system", "s"), ("user", "i"), ("assistant", "o")]),
        (
            {"history": [["q1", "a1"]], "system": ""},
            [("user", "q1"), ("assistant", "a1"), ("user", "i"), ("assistant", "o")],
        ),
    ],
)
def test_alpaca(extra: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(normal({"instruction": "i", "output": "o", **extra}, "alpaca")) == expected


def test_prompt_and_completion() -> None:
    row = normal({"prompt": "p: ", "completion": "c"}, "prompt-completion")
    assert (row.prompt, row.completion, row.messages, row.text) == ("p: ", "c", None, None)
    chat = normal({"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]}, "prompt-completion")
    assert turns(chat) == [("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "a")]
    assert chat.untrained == {0, 1, 2}, "answers within the prompt are context"


def test_text() -> None:
    row = normal({"text": "t\n"}, "text")
    assert (row.text, row.messages, row.prompt, row.completion) == ("t\n", None, None, None)


# ---- what is refused

ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("format", "data", "message"),
    [
        ("text", {"txt": "t"}, "format 'text' needs 'text', got 'txt'; rename 'txt' to 'text'."),
        ("text", {"text": None}, "format 'text' needs 'text', got no keys; expected 'text'."),
        ("text", {"text": 3}, "'text' is a number, expected a string."),
        ("text", {"text": " \n"}, "'text' is empty, expected text to train on; fill it or delete the row."),
        ("text", {"text": "a\ud83d"}, "'text' holds \\ud83d, half of a surrogate pair; remove the character."),
        (
            "alpaca",
            {"instruction": "i", "outptu": "o"},
            "format 'alpaca' needs 'output', got 'instruction', 'outptu'; rename 'outptu' to 'output'.",
        ),
        (
            "alpaca",
            {"a": "i", "b": "o"},
            "format 'alpaca' needs 'instruction', 'output', got 'a', 'b'; expected 'instruction' and 'output'.",
        ),
        (
            "alpaca",
            {"instruction": "i", "output": ""},
            "'output' is empty, expected text to train on; fill it or delete the row.",
        ),
        (
            "alpaca",
            {"instruction": "", "output": "o"},
            "'instruction' is empty, expected text; fill it or delete the row.",
        ),
        ("alpaca", {"instruction": "i", "output": ["o"]}, "'output' is an array, expected a string."),
        ("alpaca", {"instruction": "i", "input": {}, "output": "o"}, "'input' is an object, expected a string."),
        (
            "alpaca",
            {"instruction": "i", "output": "o", "history": "h"},
            "'history' is a string, expected an array of [question, answer] pairs.",
        ),
        (
            "alpaca",
            {"instruction": "i", "output": "o", "history": [["q"]]},
            "history[0] is an array, expected a [question, answer] pair.",
        ),
        (
            "prompt-completion",
            {"prompt": "p", "completion": ""},
            "'completion' is empty, expected text to train on; fill it or delete the row.",
        ),
        (
            "prompt-completion",
            {"prompt": "p", "completion": [ASSISTANT]},
            "'prompt' is a string and 'completion' is an array, expected two strings or two arrays of {role, content}.",
        ),
        ("messages", {"messages": "hi"}, "'messages' is a string, expected an array of messages."),
        ("messages", {"messages": []}, "'messages' is empty, expected at least one message; delete the row."),
        ("messages", {"messages": ["hi"]}, "messages[0] is a string, expected an object with 'role' and 'content'."),
        (
            "messages",
            {"messages": [{"rol": "user", "content": "q"}]},
            "messages[0] has no 'role', got 'rol', 'content'; rename 'rol' to 'role'.",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": None}]},
            "messages[0] has no 'content', got 'role'; expected 'role' and 'content'.",
        ),
        (
            "sharegpt",
            {"conversations": [{"who": "human", "what": "q"}]},
            "conversations[0] has no 'from', got 'who', 'what'; expected 'from' and 'value'.",
        ),
        (
            "sharegpt",
            {"conversations": [{"form": "human", "value": "q"}]},
            "conversations[0] has no 'from', got 'form', 'value'; rename 'form' to 'from'.",
        ),
        (
            "messages",
            {"messages": [{"role": "asistant", "content": "a"}]},
            "messages[0].role is 'asistant', expected system, user, assistant or tool (human, gpt); "
            "did you mean 'assistant'?",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "narrator", "value": "q"}]},
            "conversations[0].from is 'narrator', expected system, user, assistant or tool (human, gpt); "
            "write one of these.",
        ),
        (
            "messages",
            {"messages": [CHAT[0], {"role": "assistant", "content": " "}]},
            "'messages[1].content' is empty, expected text to train on; fill it or delete the row.",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": 5}]},
            "'messages[0].content' is a number, expected a string.",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
            "messages[0].content[0] is a part of type 'image_url', expected text parts only; remove the row.",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0] names no function, expected {'name': ..., 'arguments': {...}}.",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "{}"}]},
            "conversations[0].value names no function, expected {'name': ..., 'arguments': {...}}.",
        ),
        (
            "messages",
            {"messages": CHAT, "tools": [{}]},
            "tools[0] has no 'name', expected a function with name and parameters.",
        ),
        (
            "messages",
            {"messages": [{**ASSISTANT, "weight": 0.5}]},
            "messages[0].weight is 0.5, expected 0 (context only) or 1 (trained).",
        ),
    ],
)
def test_a_bad_row_is_one_sentence_with_file_and_line(format: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        normal(data, format)
    assert str(caught.value) == f"d.jsonl:7: {message}"


def test_an_unknown_format_is_a_wrong_argument() -> None:
    with pytest.raises(ValueError, match="format is 'chatml', expected one of messages, sharegpt, alpaca"):
        normal({"text": "t"}, "chatml")


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
