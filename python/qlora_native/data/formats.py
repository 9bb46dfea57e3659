"""The layouts a row of training data may have, and how each becomes messages or plain text.

=================  ==========================================================================================
format             keys of a row
=================  ==========================================================================================
messages           ``messages``: list of ``{role, content}`` (OpenAI); ``weight: 0`` leaves an answer untrained; an
                   answer may have ``tool_calls``, the row ``tools``
sharegpt           ``conversations``: list of ``{from, value}``; optional ``system``, ``tools``; a call is a turn from
                   ``function_call``, its result one from ``observation``
alpaca             ``instruction``, ``output``; optional ``input``, ``system``, ``history`` (list of pairs)
prompt-completion  ``prompt``, ``completion``: two strings, or two lists of ``{role, content}``
text               ``text``: one string, trained whole
=================  ==========================================================================================

Other keys are ignored. A key whose value is null, as Parquet writes absent keys, is left out by the readers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import cycle
from typing import Any

from qlora_native.data.readers import SourceRow, kind_of

# role and content; an assistant's tool_calls, a tool's name and tool_call_id, as chat templates expect them
Message = dict[str, Any]
Turn = tuple[Message, bool]  # and whether it is trained, if it is an answer

# In order of precedence: published sets often carry a rendered "text" or a bare "prompt" beside the richer keys.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
FORMATS = tuple(_REQUIRED)
KEYS = (*(key for keys in _REQUIRED.values() for key in keys), "input", "system", "history", "tools")

# Of the keys of a message; "sharegpt" prefers the second ones.
_SPELLINGS = [("role", "from"), ("content", "value")]
_ROLES = {
    spelling: role
    for role, spellings in {
        "system": "system developer",
        "user": "user human",
        "assistant": "assistant gpt model bot chatgpt bing bard function_call",
        "tool": "tool observation function",
    }.items()
    for spelling in spellings.split()
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row in the common form: ``messages``, or ``completion`` after a ``prompt``, or ``text``; the rest is None.

    ``untrained`` holds the indices of answers that are context only; ``tools`` the functions that the assistant may
    call, as JSON schemas for the chat template.
    """

    where: str
    line: int
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    untrained: frozenset[int] = frozenset()
    tools: tuple[dict[str, Any], ...] = ()


def infer_format(rows: Sequence[SourceRow], mapped: Iterable[str] = ()) -> str:
    """The one of :data:`FORMATS` that all ``rows`` (the first few of a file) satisfy; of those that need a key of
    ``mapped``, if any does.

    UserError with the row and near-miss keys if none does, or the rows differ.
    """
    meant = {name: needed for name, needed in _REQUIRED.items() if {*needed} & {*mapped}} or _REQUIRED
    first, *others = rows
    found = next((name for name, needed in meant.items() if {*needed} <= {*first.data}), None)
    if found is None:
        formats = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in meant.items())
        advice = _renames([key for needed in meant.values() for key in needed], first.data) or (
            "rename the keys to those of one format, or map them: --columns prompt=KEY completion=KEY"
        )
        raise first.error(
            f"the keys {_listed(sorted(first.data))} fit no known format ({formats}); {advice}."
        )
    for row in others:
        _check_keys(row, f"format '{found}', which {first.where} has,", _REQUIRED[found], row.data)
    return found


def normalize(row: SourceRow, format: str) -> Row:
    """Bring a row into the common form; UserError with file and line for missing keys, wrong types, unknown roles and
    empty fields."""
    if format not in _REQUIRED:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    keys = _REQUIRED[format]
    data = row.data
    _check_keys(row, f"format '{format}'", keys, data)
    tools = _tools(row, data["tools"]) if data.get("tools") else ()
    if format == "text" or (
        format == "prompt-completion" and all(isinstance(data[key], str) for key in keys)
    ):
        plain = {key: _text(row, key, data[key], may_be_empty=key == "prompt") for key in keys}
        if tools:
            raise row.error(
                "the row has 'tools' but plain text, which shows none; write messages, or remove its 'tools' key."
            )
        return Row(row.where, row.line, **plain)  # type: ignore[arg-type]
    if format == "alpaca":
        turns = _alpaca(row)
    elif format == "prompt-completion":
        context, answer = (_turns(row, key) for key in keys)
        turns = [*((message, False) for message, _ in context), *answer]
    else:
        turns = _turns(row, keys[0])
    if (
        format in ("alpaca", "sharegpt")
        and (system := _text(row, "system", data.get("system", ""))).strip()
    ):
        turns.insert(0, ({"role": "system", "content": system}, True))
    messages = tuple(message for message, _ in turns)
    untrained = frozenset(index for index, (_, is_trained) in enumerate(turns) if not is_trained)
    return Row(row.where, row.line, messages, untrained=untrained, tools=tools)


def _alpaca(row: SourceRow) -> list[Turn]:
    texts: dict[str, Any] = {}  # questions and answers in turn, by their places
    for index, pair in enumerate(
        _array(row, "history", row.data.get("history", []), "[question, answer] pairs")
    ):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.error(
                f"history[{index}] is {kind_of(pair)}, expected a [question, answer] pair."
            )
        texts |= {f"history[{index}][{side}]": text for side, text in enumerate(pair)}
    asked = [_text(row, key, row.data.get(key, "")) for key in ("instruction", "input")]
    question = "\n\n".join(text for text in asked if text.strip())
    texts |= {"instruction": _text(row, "instruction", question, False), "output": row.data["output"]}
    sides = zip(cycle(("user", "assistant")), texts.items(), strict=False)
    return [
        ({"role": role, "content": _text(row, at, text, role == "user")}, True)
        for role, (at, text) in sides
    ]


def _turns(row: SourceRow, key: str) -> list[Turn]:
    """The messages under a key; those with ``weight`` 0 are not trained. Both spellings of their keys are read."""
    entries = _array(row, key, row.data[key], "messages")
    if not entries:
        raise row.error(f"'{key}' is empty, expected at least one message; delete the row.")
    spellings = [names[::-1] if key == "conversations" else names for names in _SPELLINGS]
    turns: list[Turn] = []
    for index, entry in enumerate(entries):
        at = f"{key}[{index}]"
        if not isinstance(entry, dict):
            raise row.error(f"{at} is {kind_of(entry)}, expected an object with 'role' and 'content'.")
        turn = {name: item for name, item in entry.items() if item is not None}
        named = next((name for name in ("function_call", "tool_calls") if turn.get(name)), None)
        calls = _tool_calls(row, f"{at}.{named}", turn[named]) if named else []
        role_key, content_key = (
            next((name for name in names if name in turn), names[0]) for names in spellings
        )
        _check_keys(row, at, (role_key,) if calls else (role_key, content_key), turn)
        role = _ROLES.get(str(turn[role_key]).strip().lower())
        if role is None:
            got = f"{at}.{role_key} is {turn[role_key]!r}"
            raise row.error(f"{got}, expected system, user, assistant or tool (human, gpt).")
        content_at = f"{at}.{content_key}"
        content = _content(
            row, content_at, turn.get(content_key, ""), role != "assistant" or bool(calls)
        )
        if turn[role_key] == "function_call":
            calls = _tool_calls(row, content_at, content)
            content = ""
        if calls and role != "assistant":
            raise row.error(f"{at} has tool calls and the role {role}, expected assistant.")
        others = ("reasoning_content", "name", "tool_call_id")
        kept = {name: turn[name] for name in others if isinstance(turn.get(name), str)}
        weight = turn.get("weight", 1)
        if weight not in (0, 1):
            raise row.error(f"{at}.weight is {weight!r}, expected 0 (context only) or 1 (trained).")
        message = {
            "role": role,
            "content": content,
            **({"tool_calls": calls} if calls else {}),
            **kept,
        }
        turns.append((message, weight == 1))
    return turns


def _tool_calls(row: SourceRow, at: str, value: Any) -> list[dict[str, Any]]:
    """OpenAI's ``[{id, type, function: {name, arguments}}]``, a bare ``{name, arguments}`` or JSON text of either, with
    arguments as an object: templates write it as JSON themselves."""
    value = _from_json(row, at, value)
    calls = []
    for index, call in enumerate(value if isinstance(value, list) else [value]):
        place = f"{at}[{index}]" if isinstance(value, list) else at
        function = _function(row, place, call)
        arguments = function.get("arguments")
        arguments = {} if arguments in (None, "") else _from_json(row, f"{place}.arguments", arguments)
        if not isinstance(arguments, dict):
            raise row.error(f"{place}.arguments is {kind_of(arguments)}, expected an object.")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append(
            {
                **identity,
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return calls


def _tools(row: SourceRow, value: Any) -> tuple[dict[str, Any], ...]:
    """Each function as ``{type: function, function: {name, ...}}``."""
    given = _array(row, "tools", value, "functions")
    functions = [_function(row, f"tools[{index}]", tool) for index, tool in enumerate(given)]
    try:
        return tuple(
            {"type": "function", "function": _without_nulls(function)} for function in functions
        )
    except RecursionError:
        raise row.error("'tools' is nested too deep for a schema; remove the row.") from None


def _function(row: SourceRow, at: str, given: Any) -> dict[str, Any]:
    function = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise row.error(f"{at} names no function, expected an object with 'name'.")
    return function


def _without_nulls(value: Any) -> Any:
    """Without the keys that Parquet writes for the schemas of other functions."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _from_json(row: SourceRow, at: str, value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise row.error(
            f"'{at}' is not valid JSON ({error}); write the value itself or its JSON."
        ) from None


def _array(row: SourceRow, at: str, value: Any, what: str) -> list[Any]:
    value = _from_json(row, at, value)
    if not isinstance(value, list):
        raise row.error(f"'{at}' is {kind_of(value)}, expected an array of {what}.")
    return value


def _content(row: SourceRow, at: str, value: Any, may_be_empty: bool) -> str:
    """A string, or OpenAI's list of text parts, joined."""
    if isinstance(value, list):
        for index, part in enumerate(value):
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise row.error(
                    f"{at}[{index}] is {part!r:.80}, expected text parts only; remove the row."
                )
        value = "".join(part["text"] for part in value)
    return _text(row, at, value, may_be_empty)


def _text(row: SourceRow, at: str, value: Any, may_be_empty: bool = True) -> str:
    if not isinstance(value, str):
        raise row.error(f"'{at}' is {kind_of(value)}, expected a string.")
    if not may_be_empty and not value.strip():
        raise row.error(f"'{at}' is empty, expected text; fill it or delete the row.")
    try:
        value.encode("utf-8")
    # JSON may escape half of a pair alone; no tokenizer can encode it.
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise row.error(
            f"'{at}' holds {half}, half of a surrogate pair; remove the character."
        ) from None
    return value


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys) or "no keys"


def _renames(needed: Sequence[str], keys: Iterable[str]) -> str:
    """Advice to rename the keys that resemble an absent one."""
    lowered = {key.lower().strip(): key for key in keys if key not in needed}
    near = {
        name: get_close_matches(name, lowered, n=1, cutoff=0.7) for name in needed if name not in keys
    }
    return " and ".join(
        f"rename '{lowered[match[0]]}' to '{name}'" for name, match in near.items() if match
    )


def _check_keys(row: SourceRow, what: str, needed: Sequence[str], keys: Iterable[str]) -> None:
    """UserError if ``what`` lacks a key that it needs."""
    if absent := [name for name in needed if name not in keys]:
        advice = _renames(needed, keys)
        raise row.error(
            f"{what} needs {_listed(absent)}, got {_listed(keys)}{advice and f'; {advice}'}."
        )
