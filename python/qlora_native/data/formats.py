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

Other keys are ignored. A key whose value is null counts as absent, as Parquet writes absent keys that way.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_native.data.readers import SourceRow, kind_of
from qlora_native.errors import UserError

# role and content; an assistant's tool_calls, a tool's name and tool_call_id, as chat templates expect them
Message = dict[str, Any]

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


def infer_format(rows: Iterable[SourceRow], mapped: Iterable[str] = ()) -> str:
    """The one of :data:`FORMATS` that all ``rows`` (the first few of a file) satisfy; of those that need a key of
    ``mapped``, if any does.

    UserError with the row and near-miss keys if none does, or the rows differ.
    """
    meant = {name: needed for name, needed in _REQUIRED.items() if {*needed} & {*mapped}} or _REQUIRED
    found = ""
    where = ""
    for row in rows:
        keys = sorted(key for key, value in row.data.items() if value is not None)
        if not found:
            found = next((name for name, needed in meant.items() if {*needed} <= {*keys}), "")
            where = row.where
            if not found:
                formats = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in meant.items())
                advice = _renames(meant.values(), keys) or (
                    "rename the keys to those of one format, or map them: --columns prompt=KEY completion=KEY"
                )
                raise row.error(f"the keys {_listed(keys)} fit no known format ({formats}); {advice}.")
        elif not {*_REQUIRED[found]} <= {*keys}:
            problem = str(_missing(row, found, keys)).removesuffix(".")
            raise UserError(f"{problem} (a file holds one format, and {where} is '{found}').")
    if not found:
        raise ValueError("infer_format: got no rows, expected at least one")
    return found


def normalize(row: SourceRow, format: str) -> Row:
    """Bring a row into the common form; UserError with file and line for missing keys, wrong types, unknown roles and
    empty fields."""
    if format not in _REQUIRED:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    data = {key: value for key, value in row.data.items() if value is not None}
    if not data.keys() >= set(_REQUIRED[format]):
        raise _missing(row, format, data)
    tools = _tools(row, data["tools"]) if data.get("tools") else ()
    keys = _REQUIRED[format]
    untrained = list[int]()
    if format == "text" or (format == "prompt-completion" and all(isinstance(data[key], str) for key in keys)):
        plain = {key: _text(row, key, data[key], may_be_empty=key == "prompt") for key in keys}
        if tools:
            raise row.error(
                "the row has 'tools' but plain text, and only a chat template can show them; "
                "write the row as messages, or remove its 'tools' key."
            )
        return Row(row.where, row.line, **plain)  # type: ignore[arg-type]
    if format == "alpaca":
        messages = _alpaca(row, data)
    elif format == "prompt-completion":
        if not all(isinstance(data[key], list) for key in keys):
            raise row.error(
                f"'prompt' is {kind_of(data['prompt'])} and 'completion' is {kind_of(data['completion'])}, "
                "expected two strings or two arrays of {role, content}."
            )
        (before, _), (after, context) = (_turns(row, key, data[key]) for key in keys)
        messages = [*before, *after]
        untrained = [*range(len(before)), *(len(before) + index for index in context)]
    else:
        messages, untrained = _turns(row, keys[0], data[keys[0]])
        if format == "sharegpt" and data.get("system"):
            messages.insert(0, {"role": "system", "content": _text(row, "system", data["system"])})
            untrained = [index + 1 for index in untrained]
    return Row(row.where, row.line, messages=tuple(messages), untrained=frozenset(untrained), tools=tools)


def _alpaca(row: SourceRow, data: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    system = _text(row, "system", data.get("system", ""))
    if system.strip():
        messages.append({"role": "system", "content": system})
    history = _from_json(row, "history", data.get("history", []))
    if not isinstance(history, list):
        raise row.error(f"'history' is {kind_of(history)}, expected an array of [question, answer] pairs.")
    for index, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise row.error(f"history[{index}] is {kind_of(pair)}, expected a [question, answer] pair.")
        messages.append({"role": "user", "content": _text(row, f"history[{index}][0]", pair[0])})
        messages.append({"role": "assistant", "content": _text(row, f"history[{index}][1]", pair[1], False)})
    question = _text(row, "instruction", data["instruction"])
    extra = _text(row, "input", data.get("input", ""))
    if extra.strip():
        question = f"{question}\n\n{extra}" if question.strip() else extra
    if not question.strip():
        raise row.error("'instruction' is empty, expected text; fill it or delete the row.")
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _text(row, "output", data["output"], False)})
    return messages


def _turns(row: SourceRow, key: str, value: Any) -> tuple[list[Message], list[int]]:
    """The messages in ``value`` and the indices of those with ``weight`` 0; both spellings of the two keys are read."""
    value = _from_json(row, key, value)
    if not isinstance(value, list):
        raise row.error(f"'{key}' is {kind_of(value)}, expected an array of messages.")
    if not value:
        raise row.error(f"'{key}' is empty, expected at least one message; delete the row.")
    messages: list[Message] = []
    untrained: list[int] = []
    for index, entry in enumerate(value):
        at = f"{key}[{index}]"
        if not isinstance(entry, dict):
            raise row.error(f"{at} is {kind_of(entry)}, expected an object with 'role' and 'content'.")
        turn = {name: item for name, item in entry.items() if item is not None}
        named = next((name for name in ("function_call", "tool_calls") if turn.get(name)), None)
        calls = _tool_calls(row, f"{at}.{named}", turn[named]) if named else []
        spellings = [("role", "content"), ("from", "value")]
        if key == "conversations":
            spellings.reverse()
        # The spelling the turn has more of; on a tie, the format's own.
        role_key, content_key = max(spellings, key=lambda pair: (pair[0] in turn) + (pair[1] in turn))
        for needed in (role_key, content_key):
            if needed not in turn and not (calls and needed == content_key):
                raise row.error(
                    f"{at} has no '{needed}', got {_listed(turn)}; {_advice((role_key, content_key), turn)}."
                )
        role = _role(row, f"{at}.{role_key}", turn[role_key])
        may_be_empty = role != "assistant" or bool(calls)
        content = _content(row, f"{at}.{content_key}", turn.get(content_key, ""), may_be_empty)
        if turn[role_key] == "function_call":
            calls = _tool_calls(row, f"{at}.{content_key}", content)
            content = ""
        if calls and role != "assistant":
            raise row.error(f"{at} has tool calls and the role {role}, expected assistant.")
        others = ("reasoning_content", "name", "tool_call_id")
        kept = {name: turn[name] for name in others if isinstance(turn.get(name), str)}
        messages.append({"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **kept})
        weight = turn.get("weight", 1)
        if weight not in (0, 1):
            raise row.error(f"{at}.weight is {weight!r}, expected 0 (context only) or 1 (trained).")
        if weight == 0:
            untrained.append(index)
    return messages, untrained


def _tool_calls(row: SourceRow, at: str, value: Any) -> list[dict[str, Any]]:
    """OpenAI's ``[{id, type, function: {name, arguments}}]``, a bare ``{name, arguments}`` or JSON text of either, with
    arguments as an object: templates write it as JSON themselves."""
    value = _from_json(row, at, value)
    calls = []
    for index, given in enumerate(value if isinstance(value, list) else [value]):
        place = f"{at}[{index}]" if isinstance(value, list) else at
        call = given if isinstance(given, dict) else {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise row.error(f"{place} names no function, expected {{'name': ..., 'arguments': {{...}}}}.")
        arguments = function.get("arguments")
        arguments = {} if arguments in (None, "") else _from_json(row, f"{place}.arguments", arguments)
        if not isinstance(arguments, dict):
            raise row.error(f"{place}.arguments is {kind_of(arguments)}, expected an object.")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _tools(row: SourceRow, value: Any) -> tuple[dict[str, Any], ...]:
    """Each function as ``{type: function, function: {name, ...}}``."""
    value = _from_json(row, "tools", value)
    if not isinstance(value, list):
        raise row.error(f"'tools' is {kind_of(value)}, expected an array of functions.")
    tools = []
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise row.error(f"tools[{index}] has no 'name', expected a function with name and parameters.")
        try:
            tools.append({"type": "function", "function": _without_nulls(function)})
        except RecursionError:
            raise row.error(f"tools[{index}] is nested too deep for a schema; remove the row.") from None
    return tuple(tools)


def _without_nulls(value: Any) -> Any:
    """Without the keys that Parquet writes for the schemas of other functions."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _from_json(row: SourceRow, at: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise row.error(f"'{at}' is not valid JSON ({error}); write the value itself or its JSON.") from None


def _role(row: SourceRow, at: str, value: Any) -> str:
    if isinstance(value, str) and (role := _ROLES.get(value.strip().lower())):
        return role
    near = difflib.get_close_matches(str(value).lower(), list(_ROLES), n=1)
    advice = f"did you mean '{near[0]}'?" if near else "write one of these."
    raise row.error(f"{at} is {value!r}, expected system, user, assistant or tool (human, gpt); {advice}")


def _content(row: SourceRow, at: str, value: Any, may_be_empty: bool) -> str:
    """A string, or OpenAI's list of text parts, joined."""
    if isinstance(value, list):
        for index, part in enumerate(value):
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else None
                got = f"a part of type {kind!r}" if kind else kind_of(part)
                raise row.error(f"{at}[{index}] is {got}, expected text parts only; remove the row.")
        value = "".join(part["text"] for part in value)
    return _text(row, at, value, may_be_empty)


def _text(row: SourceRow, at: str, value: Any, may_be_empty: bool = True) -> str:
    if not isinstance(value, str):
        raise row.error(f"'{at}' is {kind_of(value)}, expected a string.")
    if not may_be_empty and not value.strip():
        raise row.error(f"'{at}' is empty, expected text to train on; fill it or delete the row.")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON may escape half of a pair alone; no tokenizer can encode it
            half = f"\\u{ord(value[error.start]):04x}"
            raise row.error(f"'{at}' holds {half}, half of a surrogate pair; remove the character.") from None
    return value


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys) or "no keys"


def _renames(formats: Iterable[Sequence[str]], keys: Iterable[str]) -> str:
    """Advice to rename the keys that resemble an absent one of a format."""
    renames: dict[str, str] = {}
    for needed in formats:
        lowered = {key.lower().strip(): key for key in keys if key not in needed}
        near = {name: difflib.get_close_matches(name, lowered, n=1, cutoff=0.7) for name in needed if name not in keys}
        renames |= {lowered[match[0]]: name for name, match in near.items() if match}
    return " and ".join(f"rename '{got}' to '{meant}'" for got, meant in renames.items())


def _advice(needed: Sequence[str], keys: Iterable[str]) -> str:
    return _renames([needed], keys) or "expected " + " and ".join(f"'{name}'" for name in needed)


def _missing(row: SourceRow, format: str, keys: Iterable[str]) -> UserError:
    needed = _REQUIRED[format]
    absent = _listed(name for name in needed if name not in keys)
    return row.error(f"format '{format}' needs {absent}, got {_listed(keys)}; {_advice(needed, keys)}.")
