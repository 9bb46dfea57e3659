"""Rows of JSONL, JSON and Parquet files, and the sentence for each fault of a file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sentences import Check

from qlora_native.data.readers import SourceRow, read_rows
from qlora_native.errors import UserError


def write(folder: Path, content: str | bytes, name: str = "train.jsonl") -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def failure(file: Path, **options: Any) -> str:
    """The error of reading the file, without its folder."""
    with pytest.raises(UserError) as caught:
        list(read_rows(file, **options))
    message = str(caught.value).replace(str(file.parent) + "/", "")
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


def lines_and_data(rows: Iterator[SourceRow]) -> list[tuple[int, dict[str, Any]]]:
    return [(row.line, row.data) for row in rows]


def test_jsonl_rows_carry_their_lines_through_blank_lines_crlf_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = write(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "\xc3\xa9\\n"}\r\n{"text": "c"}')
    rows = list(read_rows(file))
    assert [(row.line, row.data["text"]) for row in rows] == [(1, "a"), (4, "é\n"), (5, "c")]
    assert rows[1].where == f"{file}:4"
    file = write(tmp_path, '{"text": "a\u2028b\x85c"}\n{"text": "d"}\n')  # Unicode's separators end no line
    assert lines_and_data(read_rows(file)) == [(1, {"text": "a\u2028b\x85c"}), (2, {"text": "d"})]


def test_jsonl_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path, '{"text": "a"}\n{"text": "b"}\n{broken\n')
    rows = read_rows(file)
    assert [next(rows).line, next(rows).line] == [1, 2]
    with pytest.raises(UserError, match=":3: "):
        next(rows)
    assert len(list(read_rows(file, limit=2))) == 2


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.JSON"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects_is_read_whatever_the_suffix(tmp_path: Path, name: str, indent: int | None) -> None:
    values = [{"text": "a"}, {"messages": [{"role": "user", "content": "x\ny"}]}, {"text": "]"}]
    text = "\n" + json.dumps(values, indent=indent)
    opening = [number for number, line in enumerate(text.split("\n"), 1) if line == "  {"] if indent else [2, 2, 2]
    assert lines_and_data(read_rows(write(tmp_path, text, name))) == list(zip(opening, values, strict=True))
    by_line = write(tmp_path, '{"text": "a"}\n{"text": "b"}\n', name)
    assert lines_and_data(read_rows(by_line)) == [(1, {"text": "a"}), (2, {"text": "b"})]


GOOD = '{"text": "a"}\n'
LINES: list[tuple[str | bytes, str]] = [  # of train.jsonl, and the error
    (GOOD * 2 + '{"text": "b"\n', "train.jsonl:3: .*column 13"),
    (GOOD + '\n{"text": "b"} {"text": "c"}\n', "train.jsonl:3: .*Extra data.*column 15"),
    ('{\n  "text": "a"\n}\n', "train.jsonl:1: .*may not span lines"),
    (GOOD + "[" * 100_000, "train.jsonl:2: .*recursion"),
    (GOOD + '["b"]\n', "train.jsonl:2: the row is an array"),
    (GOOD + '"b"\n', "train.jsonl:2: the row is a string"),
    (GOOD + "3\n", "train.jsonl:2: the row is a number"),
    (GOOD + "true\n", "train.jsonl:2: .*row is true or false"),
    (GOOD + "null\n", "train.jsonl:2: the row is null"),
    (GOOD.encode() * 2 + b'{"text": "\xe9"}\n', "train.jsonl:3: byte 0xe9 is not UTF-8"),
    ('{"text": "a"}\n'.encode("utf-16"), "train.jsonl: the file is UTF-16"),
    ("", "train.jsonl: the file has no rows"),
    ("\n \r\n", "train.jsonl: the file has no rows"),
]
ARRAYS: list[tuple[str | bytes, str]] = [
    ('[\n{"text": "a"},\n{"text" "b"}\n]', "rows.json:3: .* not valid JSON .*':' delimiter"),
    ('[\n{"text": "a"}\n{"text": "b"}\n]', "rows.json:3: .* not valid JSON .*expected ',' or ']'"),
    ('[\n{"text": "a"}\n', "rows.json:3: .* not valid JSON .*expected ',' or ']'"),
    ('[\n{"text": "a"},\n]', "rows.json:3: .* not valid JSON .*Expecting value"),
    ('[{"text": "a"}]\n\n{"text": "b"}', "rows.json:3: .* valid JSON .*extra data"),
    ('[\n{"text": "a"},\n\n7]', "rows.json:4: the row is a number"),
    ('[\n{\n"text" "b"\n}]', "rows.json:3: .* not valid JSON .*':' delimiter"),
    ("[]", "rows.json: the file has no rows"),
    (b'[\n{"text": "a"},\n{"text": "\xff"}]', "rows.json:3: byte 0xff is not UTF-8"),
]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [*(("train.jsonl", *case) for case in LINES), *(("rows.json", *case) for case in ARRAYS)],
)
def test_a_bad_line_is_one_sentence_with_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, match: str
) -> None:
    assert re.match(match, failure(write(tmp_path, content, name)))


def test_a_path_that_is_no_data_file(tmp_path: Path, sentence: Check) -> None:
    write(tmp_path, GOOD)
    sentence(failure(tmp_path / "trian.jsonl"))
    assert "check the path" in failure(tmp_path / "nowhere" / "x.jsonl")
    assert failure(write(tmp_path, "a,b", "rows.xls")).startswith("rows.xls: got a '.xls' file, expected .jsonl")
    with pytest.raises(UserError, match="is a folder, a pipe"):
        read_rows(tmp_path)


def test_a_key_that_is_null_is_absent(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, '{"messages": null, "text": "t"}\n{"text": null}\n'))
    assert lines_and_data(rows) == [(1, {"text": "t"}), (2, {})]


def test_csv_rows_have_the_keys_of_the_first_row_and_their_own_lines(tmp_path: Path) -> None:
    text = '\ufeffinstruction,input,output\r\n\r\nq,,"a, ""b""\r\nc"\r\n,,\r\n\u00fc,i,\n\nshort\r\n'
    expected = [(3, {"instruction": "q", "output": 'a, "b"\r\nc'}), (6, {"instruction": "ü", "input": "i"})]
    expected.append((8, {"instruction": "short"}))
    assert lines_and_data(read_rows(write(tmp_path, text, "rows.csv"))) == expected
    assert lines_and_data(read_rows(write(tmp_path, "text\tother\na,b\tc\n", "rows.TSV"))) == [
        (2, {"text": "a,b", "other": "c"})
    ]
    long = "x" * 200_000  # more than Python's csv takes unless asked
    assert next(read_rows(write(tmp_path, f"text\n{long}\n", "rows.csv"))).data == {"text": long}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("text\na\nb,c\n", "rows.csv:3: .* a cell more"),
        ("text,\na,b\n", "rows.csv:2: .* a cell more"),
        ('text\n"a\n', "rows.csv cannot be read: unexpected end"),
        (b"text\n\xe9\n", "rows.csv cannot be read: not UTF-8"),
        ("text\n", "rows.csv: the file has no rows"),
        ("", "rows.csv: the file has no rows"),
    ],
)
def test_a_bad_csv_file(tmp_path: Path, content: str | bytes, match: str) -> None:
    assert re.match(match, failure(write(tmp_path, content, "rows.csv")))


def test_parquet_without_pyarrow_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = failure(write(tmp_path, b"PAR1", "rows.parquet"))
    assert re.match("rows.parquet: reading Parquet needs pyarrow.*pip install pyarrow", message)


def test_parquet_rows_are_numbered_across_batches(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": f"é{number}"}]} for number in range(1025)]
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert lines_and_data(read_rows(file)) == list(enumerate(rows, 1))
    assert [row.data for row in read_rows(file, limit=2)] == rows[:2]
    bad = failure(write(tmp_path, b"PAR1", "bad.parquet"))
    assert re.match(r"bad.parquet cannot be read: .+; write .*again\.$", bad)
