"""Read rows of JSONL, JSON, CSV and Parquet files and of the hub's data sets, each row with its place.

JSONL is read one line at a time, so a file larger than memory can be read; a ``.json`` array is held in memory whole.
Whatever is wrong with a file or a row is a :class:`~qlora_native.errors.UserError` that names the file and the line.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from qlora_native._io import reading, reason, regular, sha256, user_path
from qlora_native.errors import UserError

FIRST_ROWS = 20  # of a file, by which its format and its columns are found
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

# OWNER/NAME, of data [/CONFIG][:SPLIT].
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.-]+))?")
_FILE = re.compile(r".*\.(gguf|jsonl?|ndjson|parquet|[ct]sv|txt|md)", re.IGNORECASE)
_UTF8_BOM = b"\xef\xbb\xbf"


class SourceRow(NamedTuple):
    """One row of a data file: its place (``train.jsonl:17``), its line (from 1; in Parquet its row) and its keys."""

    where: str
    line: int
    data: dict[str, Any]

    def error(self, problem: str) -> UserError:
        """An error that begins with the place of the row."""
        return UserError(f"{self.where}: {problem}")


def read_rows(
    path: str | Path, *, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[SourceRow]:
    """Iterate over the rows of ``path``, at most ``limit`` of them; a bad row is a UserError when it is reached.
    ``columns`` names the file's column for a key: ``{"prompt": "question"}``.

    ``.jsonl``, ``.ndjson`` and ``.json`` hold either one object per line or one array of objects (distinguished by the
    first character); ``.csv`` and ``.tsv`` begin with a row of names; ``.parquet`` needs pyarrow. Blank lines, CRLF
    line ends and a UTF-8 byte order mark are accepted. ``OWNER/NAME[/CONFIG][:SPLIT]`` is read from the hub.
    """
    file = user_path(path)
    if name := hub_id(path):
        values = enumerate(load_data(name), 1)
        rows: Iterator[SourceRow] = (_checked(file, number, value) for number, value in values)
    else:
        if not file.exists():
            siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
            near = difflib.get_close_matches(file.name, siblings, n=1)
            advice = f"did you mean {file.parent / near[0]}?" if near else "check the path."
            raise UserError(f"{file}: no such data file; {advice}")
        suffix = regular(file).suffix.lower()
        if suffix not in DATA_SUFFIXES:
            raise UserError(
                f"{file}: got a '{suffix}' file, expected {', '.join(DATA_SUFFIXES)}; convert it to JSONL."
            )
        rows = {".parquet": _read_parquet, ".csv": _read_table, ".tsv": _read_table}.get(
            suffix, _read_text
        )(file)
    return _renamed(islice(rows, limit), columns or {}, file)


def _renamed(rows: Iterator[SourceRow], columns: Mapping[str, str], file: Path) -> Iterator[SourceRow]:
    """The rows with their keys in place of the file's columns, and without keys that are null. UserError if there is no
    row, or the first ones have no such column."""
    first = list(islice(rows, FIRST_ROWS if columns else 1))
    if not first:
        raise UserError(
            f"{file}: the file has no rows, expected at least one JSON object; write one object per line."
        )
    found = {name for row in first for name in row.data}
    for key, column in columns.items():
        if not found & {key, column}:  # another of several files may have the key itself
            listed = ", ".join(f"'{name}'" for name in sorted(found))
            raise UserError(
                f"{file}: data.columns.{key} is '{column}', and the file has {listed}; name one of these."
            )
    for row in chain(first, rows):
        pairs = [pair for pair in row.data.items() if pair[0] not in columns.values()]
        pairs += [(key, row.data.get(column)) for key, column in columns.items()]
        yield row._replace(data={name: value for name, value in pairs if value is not None})


def content_hash(path: str | Path) -> str:
    """SHA-256 of a data file, or of the rows of a data set of the hub."""
    if (name := hub_id(path)) is None:
        return sha256(user_path(path))
    digest = hashlib.sha256()
    for row in load_data(name):
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()


def _checked(file: Path, line: int, value: Any) -> SourceRow:
    row = SourceRow(f"{file}:{line}", line, value)
    if not isinstance(value, dict):
        raise row.error(f'the row is {kind_of(value)}, expected a JSON object like {{"text": "..."}}.')
    return row


def kind_of(value: Any) -> str:
    """JSON's name of a value's type, with its article."""
    names = {int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"}
    names |= {bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _read_text(file: Path) -> Iterator[SourceRow]:
    with reading(file, "check its permissions"), file.open("rb") as stream:
        start = stream.read(4096)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{file}: the file is UTF-16, expected UTF-8; save it again as UTF-8.")
        stream.seek(len(_UTF8_BOM) if start.startswith(_UTF8_BOM) else 0)
        if start.removeprefix(_UTF8_BOM).lstrip().startswith(b"["):
            yield from _array_rows(file, _decode(file, 1, stream.read()))
            return
        for line, raw in enumerate(stream, 1):
            if text := _decode(file, line, raw).strip():
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise _broken(f"{file}:{line}", error) from None
                yield _checked(file, line, value)


def _decode(file: Path, first_line: int, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise UserError(
            f"{file}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file again as UTF-8."
        ) from None


def _broken(where: str, error: Exception) -> UserError:
    column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    return UserError(
        f"{where}: the text is not valid JSON ({getattr(error, 'msg', error)}{column}); "
        "write one object per line, which may not span lines, or one array of objects."
    )


def _array_rows(file: Path, text: str) -> Iterator[SourceRow]:
    """The elements of the array one by one; the line of an element is that of its first character."""
    decoder = json.JSONDecoder()
    line = 1
    begin = 0  # of the element before
    mark = "["
    at = text.index(mark)
    try:
        while mark != "]":
            at = _skip_space(text, at + 1)
            if mark == "[" and text.startswith("]", at):
                break
            line += text.count("\n", begin, at)
            begin = at
            value, at = decoder.raw_decode(text, at)
            yield _checked(file, line, value)
            at = _skip_space(text, at)
            mark = text[at : at + 1]
            if mark not in (",", "]"):
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
        if (at := _skip_space(text, at + 1)) < len(text):
            raise json.JSONDecodeError("extra data", text, at)
    except (ValueError, RecursionError) as error:
        raise _broken(f"{file}:{getattr(error, 'lineno', line)}", error) from None


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _read_table(file: Path) -> Iterator[SourceRow]:
    """CSV, whose first row names the columns; an empty cell is an absent key."""
    csv.field_size_limit(1 << 24)  # characters; it is 131,072 otherwise
    with (
        reading(file, "save it as CSV in UTF-8"),
        file.open(encoding="utf-8-sig", newline="") as stream,
    ):
        delimiter = "," if file.suffix.lower() == ".csv" else "\t"
        table = csv.DictReader(stream, delimiter=delimiter, restkey="", restval="", strict=True)
        for cells in table:
            line = table.line_num - sum(
                cell.count("\n") for cell in cells.values() if isinstance(cell, str)
            )
            row = SourceRow(
                f"{file}:{line}", line, {name: cell for name, cell in cells.items() if cell}
            )
            if "" in row.data:
                raise row.error(
                    "the row has a cell more than the first one has names; quote cells with delimiters."
                )
            if row.data:
                yield row


def _read_parquet(file: Path) -> Iterator[SourceRow]:
    try:
        # By name, so that the type checker does not ask for a package that is optional here.
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(
            f"{file}: reading Parquet needs pyarrow, which is not installed; "
            "type pip install pyarrow, or convert the file to JSONL."
        ) from None
    with reading(file, "write the Parquet file again"), parquet.ParquetFile(file) as table:
        values = chain.from_iterable(
            batch.to_pylist() for batch in table.iter_batches(batch_size=1024)
        )
        for line, value in enumerate(values, 1):
            yield _checked(file, line, value)


# ---- ids of the Hugging Face hub in place of paths; its packages are imported when one is read


def hub_id(path: str | os.PathLike[str]) -> re.Match[str] | None:
    """The parts of an id; None for what is here or would be, by its first folder or its suffix."""
    text = os.fspath(path)
    return (
        None
        if os.path.exists(text.partition("/")[0]) or _FILE.fullmatch(text)
        else _ID.fullmatch(text)
    )


def fetch_model(
    name: str, files: tuple[str, ...] = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
) -> Path:
    """The folder in the hub's cache with the files of a model, which are downloaded if they are not there."""
    options = {"allow_patterns": list(files), "ignore_patterns": ["original/*", "consolidated*"]}
    return Path(_call("huggingface_hub", "snapshot_download", name, f"hf download {name}", **options))


def load_data(name: re.Match[str]) -> Any:
    """The rows of a data set by the parts of its id, of the split "train" if it names none."""
    command = f"hf download --repo-type dataset {name[1]}"
    return _call("datasets", "load_dataset", name[1], command, name=name[2], split=name[3] or "train")


def _call(package: str, function: str, what: str, command: str, /, **options: Any) -> Any:
    try:
        return getattr(import_module(package), function)(what, **options)
    except Exception as error:  # of the network, of Python or of the hub
        hint = f": pip install {package}" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(
            f"{what} is not here and cannot be read from the Hugging Face hub ({reason(error)[:200]}{hint}); where "
            f"there is a network, `{command} --local-dir FOLDER` makes a folder: name it, or a file in it."
        ) from error
