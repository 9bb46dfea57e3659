"""From a file to rows: JSONL, JSON, CSV and Parquet, every layout of a row, and the sentence for each fault."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from laws import ROOT
from sentences import Check
from test_data_template import byte_tokenizer, encode, im

from qlora_native.data.formats import FORMATS, Row, infer_format, normalize
from qlora_native.data.readers import SourceRow, read_rows
from qlora_native.data.template import ChatEncoder
from qlora_native.errors import UserError

# ---- files


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def read(file: Path, **options: Any) -> list[tuple[int, dict[str, Any]]]:
    return [(row.line, row.data) for row in read_rows(file, **options)]


def failure(file: Path) -> str:
    """The error of reading the file, without its folder."""
    with pytest.raises(UserError) as caught:
        read(file)
    message = str(caught.value).replace(str(file.parent) + "/", "")
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


MARKED = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "\xc3\xa9\\n"}\r\n{"text": "c"}'
CELLS = '\ufeffinstruction,input,output\r\n\r\nq,,"a, ""b""\r\nc"\r\n,,\r\n\u00fc,i,\n\nshort\r\n'
CELLS_READ = {3: {"instruction": "q", "output": 'a, "b"\r\nc'}, 6: {"instruction": "\u00fc", "input": "i"}}
LONG = "x" * 200_000  # more than Python's csv takes unless asked
FILES: list[tuple[str, str | bytes, dict[int, dict[str, Any]]]] = [  # name, content, rows by line
    ("marked.jsonl", MARKED, {1: {"text": "a"}, 4: {"text": "\u00e9\n"}, 5: {"text": "c"}}),
    # Unicode's separators end no line, and a key that is null is absent.
    ("lines.jsonl", '{"text": "a\u2028b\x85c"}\n{"text": "d"}\n', {1: {"text": "a\u2028b\x85c"}, 2: {"text": "d"}}),
    ("nulls.jsonl", '{"messages": null, "text": "t"}\n{"text": null}\n', {1: {"text": "t"}, 2: {}}),
    ("cells.csv", CELLS, {**CELLS_READ, 8: {"instruction": "short"}}),
    ("tabs.TSV", "text\tother\na,b\tc\n", {2: {"text": "a,b", "other": "c"}}),
    ("long.csv", f"text\n{LONG}\n", {2: {"text": LONG}}),
]


@pytest.mark.parametrize(("name", "content", "rows"), FILES, ids=[name for name, *_ in FILES])
def test_rows_and_their_lines(tmp_path: Path, name: str, content: str | bytes, rows: dict[int, dict[str, Any]]) -> None:
    file = write(tmp_path, name, content)
    assert read(file) == list(rows.items())
    assert [row.where for row in read_rows(file)] == [f"{file}:{line}" for line in rows]


def test_jsonl_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path, "rows.jsonl", '{"text": "a"}\n{"text": "b"}\n{broken\n')
    rows = read_rows(file)
    assert [next(rows).line, next(rows).line] == [1, 2]
    with pytest.raises(UserError, match=":3: "):
        next(rows)
    assert len(read(file, limit=2)) == 2


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.JSON"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects_is_read_whatever_the_suffix(tmp_path: Path, name: str, indent: int | None) -> None:
    values = [{"text": "a"}, {"messages": [{"role": "user", "content": "x\ny"}]}, {"text": "]"}]
    text = "\n" + json.dumps(values, indent=indent)
    opening = [number for number, line in enumerate(text.split("\n"), 1) if line == "  {"] if indent else [2, 2, 2]
    assert read(write(tmp_path, name, text)) == list(zip(opening, values, strict=True))
    by_line = write(tmp_path, name, '{"text": "a"}\n{"text": "b"}\n')
    assert read(by_line) == [(1, {"text": "a"}), (2, {"text": "b"})]


def test_parquet_rows_are_numbered_across_batches(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": f"é{number}"}]} for number in range(1025)]
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert read(file) == list(enumerate(rows, 1))
    assert [data for _, data in read(file, limit=2)] == rows[:2]
    bad = failure(write(tmp_path, "bad.parquet", b"PAR1"))
    assert re.match(r"bad.parquet cannot be read: .+; write .*again\.$", bad)


GOOD = '{"text": "a"}\n'
BAD_FILES: list[tuple[str, str | bytes, str]] = [  # name, content, error
    ("train.jsonl", GOOD * 2 + '{"text": "b"\n', "train.jsonl:3: .*column 13"),
    ("train.jsonl", GOOD + '\n{"text": "b"} {"text": "c"}\n', "train.jsonl:3: .*Extra data.*column 15"),
    ("train.jsonl", '{\n  "text": "a"\n}\n', "train.jsonl:1: .*may not span lines"),
    ("train.jsonl", GOOD + "[" * 100_000, "train.jsonl:2: .*recursion"),
    ("train.jsonl", GOOD + '["b"]\n', "train.jsonl:2: the row is an array"),
    ("train.jsonl", GOOD + "true\n", "train.jsonl:2: .*row is true or false"),
    ("train.jsonl", GOOD + "null\n", "train.jsonl:2: the row is null"),
    ("train.jsonl", GOOD.encode() * 2 + b'{"text": "\xe9"}\n', "train.jsonl:3: byte 0xe9 is not UTF-8"),
    ("train.jsonl", GOOD.encode("utf-16"), "train.jsonl: the file is UTF-16"),
    ("train.jsonl", "", "train.jsonl: the file has no rows"),
    ("train.jsonl", "\n \r\n", "train.jsonl: the file has no rows"),
    ("rows.json", '[\n{"text": "a"},\n{"text" "b"}\n]', "rows.json:3: .* not valid JSON .*':' delimiter"),
    ("rows.json", '[\n{"text": "a"}\n{"text": "b"}\n]', "rows.json:3: .* not valid JSON .*expected ',' or ']'"),
    ("rows.json", '[\n{"text": "a"}\n', "rows.json:3: .* not valid JSON .*expected ',' or ']'"),
    ("rows.json", '[\n{"text": "a"},\n]', "rows.json:3: .* not valid JSON .*Expecting value"),
    ("rows.json", '[{"text": "a"}]\n\n{"text": "b"}', "rows.json:3: .* valid JSON .*extra data"),
    ("rows.json", '[\n{"text": "a"},\n\n7]', "rows.json:4: the row is a number"),
    ("rows.json", '[\n{\n"text" "b"\n}]', "rows.json:3: .* not valid JSON .*':' delimiter"),
    ("rows.json", "[]", "rows.json: the file has no rows"),
    ("rows.json", b'[\n{"text": "a"},\n{"text": "\xff"}]', "rows.json:3: byte 0xff is not UTF-8"),
    ("rows.csv", "text\na\nb,c\n", "rows.csv:3: .* a cell more"),
    ("rows.csv", "text,\na,b\n", "rows.csv:2: .* a cell more"),
    ("rows.csv", 'text\n"a\n', "rows.csv cannot be read: unexpected end"),
    ("rows.csv", b"text\n\xe9\n", "rows.csv cannot be read: not UTF-8"),
    ("rows.csv", "text\n", "rows.csv: the file has no rows"),
    ("rows.csv", "", "rows.csv: the file has no rows"),
    ("rows.xls", "a,b", "rows.xls: got a '.xls' file, expected .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "match"), BAD_FILES)
def test_a_bad_file_is_one_sentence_with_its_line(tmp_path: Path, name: str, content: str | bytes, match: str) -> None:
    assert re.match(match, failure(write(tmp_path, name, content)))


def test_a_path_that_is_no_data_file(tmp_path: Path, sentence: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "train.jsonl", GOOD)
    sentence(failure(tmp_path / "trian.jsonl"))
    assert "check the path" in failure(tmp_path / "nowhere" / "x.jsonl")
    with pytest.raises(UserError, match="is a folder, a pipe"):
        read_rows(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = failure(write(tmp_path, "rows.parquet", b"PAR1"))
    assert re.match("rows.parquet: reading Parquet needs pyarrow.*pip install pyarrow", message)


# ---- formats

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def source(data: dict[str, Any], line: int = 7) -> SourceRow:
    return SourceRow(f"d.jsonl:{line}", line, data)


def normal(data: dict[str, Any], format: str) -> Row:
    """The row in its format, which may be left to its keys."""
    return normalize(source(data), infer_format([source(data)]) if format == "inferred" else format)


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


def test_columns_that_are_mapped_decide_the_format() -> None:
    row = source({"instruction": "i", "output": "o", "prompt": "p", "completion": "c"})
    assert (infer_format([row]), infer_format([row], ["prompt"])) == ("alpaca", "prompt-completion")
    assert infer_format([row], ["system"]) == "alpaca"


def test_rows_of_two_formats_are_named_by_line(sentence: Check) -> None:
    with pytest.raises(UserError, match="^d.jsonl:4: .* d.jsonl:1 .*'txt'") as caught:
        infer_format([source({"text": "t"}, 1), source({"txt": "t"}, 4)])
    sentence(caught.value)


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


ASSISTANT = {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {}}


def called(**call: Any) -> list[dict[str, Any]]:
    return [{**ASSISTANT, "content": "", "tool_calls": [call]}]


BAD_ROWS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "inferred": [
        ({"instuction": "i", "output": "o"}, "rename 'instuction' to 'instruction'"),
        ({"Text": "t"}, "rename 'Text' to 'text'"),
        ({"mesages": CHAT}, "rename 'mesages' to 'messages'"),
        ({"promt": "p", "completions": "c"}, "rename 'promt' to 'prompt' and rename 'completions' to 'completion'"),
        ({"q": "x"}, "or map them: --columns"),
    ],
    "text": [
        ({"txt": "t"}, "rename 'txt' to 'text'"),
        ({}, "needs 'text', got no keys"),
        ({"text": 3}, "'text' is a number"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": "a\ud83d"}, r"'text' holds \\ud83d"),
        ({"text": "abc", "tools": [CALL]}, "the row has 'tools' but"),
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
        ({"messages": called(id="1")}, r"\[0\].tool_calls\[0\] names no"),
        ({"messages": CHAT, "tools": [{}]}, r"tools\[0\] names no function"),
        ({"messages": [{**ASSISTANT, "weight": 0.5}]}, r"messages\[0\].weight is 0.5"),
        ({"messages": called(name="f", arguments="{city")}, r"tool_calls\[0\].arguments' is not valid JSON"),
        ({"messages": called(name="f", arguments=[1])}, r"calls\[0\].arguments is an array, expected an object"),
        ({"messages": [{**CHAT[0], "tool_calls": [CALL]}]}, r"messages\[0\] has tool calls and the role user"),
        ({"messages": CHAT, "tools": CALL}, "'tools' is an object, expected an array of functions"),
    ],
    "sharegpt": [
        ({"conversations": [{"who": "human", "what": "q"}]}, r"conversations\[0\] needs 'from', 'value', got 'who'"),
        ({"conversations": [{"form": "human", "value": "q"}]}, "rename 'form' to 'from'"),
        ({"conversations": [{"from": "narrator", "value": "q"}]}, r"conversations\[0\].from is 'narrator'"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, r"conversations\[0\].value names no function"),
    ],
}


@pytest.mark.parametrize("format", BAD_ROWS)
def test_a_bad_row_is_one_sentence_with_file_and_line(format: str, sentence: Check) -> None:
    for data, match in BAD_ROWS[format]:
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


# ---- tools

# As Qwen2.5's: tools in a system message, calls between tags, results as the user's.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
WEATHER = {"name": "weather", "arguments": {"city": "Bern"}}


def conversation(call: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", **call},
        {"role": "tool", "content": "sun", "name": "weather", "tool_call_id": "1"},
        {"role": "assistant", "content": "sunny"},
    ]


OPENAI = {"tool_calls": [{"id": "1", "type": "function", "function": {**WEATHER, "arguments": '{"city": "Bern"}'}}]}
SHAREGPT_CALLS = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": json.dumps(WEATHER)},
    {"from": "observation", "value": "sun"},
    {"from": "gpt", "value": "sunny"},
]
NULL = json.dumps([{**FUNCTION, "strict": None}])  # as Parquet writes an absent key
TOOLS: dict[str, tuple[str, dict[str, Any], str]] = {  # format, row, text before the call
    "tool_calls": (
        "messages",
        {"messages": conversation({"content": None, **OPENAI}), "tools": [{"type": "function", "function": FUNCTION}]},
        "",
    ),
    "text and calls": ("messages", {"messages": conversation({"content": "ok", **OPENAI}), "tools": [FUNCTION]}, "ok"),
    "function_call": ("messages", {"messages": conversation({"function_call": WEATHER}), "tools": [FUNCTION]}, ""),
    "sharegpt": ("sharegpt", {"conversations": SHAREGPT_CALLS, "tools": NULL}, ""),
}


@pytest.mark.parametrize(("format", "data", "said"), TOOLS.values(), ids=TOOLS)
def test_calls_are_trained_and_results_are_not(format: str, data: dict[str, Any], said: str) -> None:
    tokenizer = byte_tokenizer(TOOL_TEMPLATE)
    found = normal(data, format)
    assert found.tools == ({"type": "function", "function": FUNCTION},)
    head, _, rest = encode(tokenizer, found).partition("<|im_end|>\n")
    assert head.startswith('<|im_start|>system\n{"') and '"name": "weather"' in head
    call = f"<tool_call>{json.dumps(WEATHER)}</tool_call>"
    assert rest == im("u:q", f"a!{said}{call}", "u:<tool_response>sun</tool_response>", "a!sunny")


@pytest.mark.parametrize("part", ["messages", "tools"])
def test_a_template_that_leaves_tools_out_is_refused(part: str) -> None:
    messages = conversation({"content": "ok", **OPENAI})
    data = {"messages": messages} if part == "messages" else {"messages": messages[::3], "tools": [FUNCTION]}
    with pytest.raises(UserError, match=r"d.jsonl:7: the chat template .* \('weather' is"):
        ChatEncoder(byte_tokenizer()).encode(normal(data, "messages"))
