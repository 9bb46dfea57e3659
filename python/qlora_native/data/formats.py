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
from dataclasses import dataclass, replace
from typing import Any

from qlora_native.data.readers import SourceRow, _kind
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
INFER_ROWS = 20

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row in the common form: ``messages``, or ``completion`` after a ``prompt``, or ``text``; the rest is None.

    ``untrained`` holds the indices of messages that stay context even though the assistant wrote them; ``tools`` what
    the assistant may call, as JSON schemas for the chat template.
    """

    where: str
    line: int
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    untrained: frozenset[int] = frozenset()
    tools: tuple[dict[str, Any], ...] = ()


def infer_format(rows: Iterable[SourceRow]) -> str:
    """Name the one of :data:`FORMATS` that every one of ``rows`` (the first few of a file) satisfies.

    Raises:
        UserError: no format fits, or the rows differ; names the row and near-miss keys.
        ValueError: ``rows`` is empty.
    """
    found: str | None = None
    first: SourceRow | None = None
    for row in rows:
        keys = {key for key, value in row.data.items() if value is not None}
        if first is None or found is None:
            first = row
            found = next((name for name, needed in _REQUIRED.items() if keys.issuperset(needed)), None)
            if found is None:
                raise UserError(_no_format(row, sorted(keys)))
        elif not keys.issuperset(_REQUIRED[found]):
            raise UserError(
                f"{_missing(row, found, sorted(keys))[:-1]} (a file holds one format, and {first.where} is '{found}')."
            )
    if found is None:
        raise ValueError("infer_format: got no rows, expected at least one")
    return found


def normalize(row: SourceRow, format: str) -> Row:
    """Turn a row of the given format into the common form.

    Raises:
        UserError: a missing key, a wrong type, an unknown role or an empty field, with file and line.
        ValueError: ``format`` is not one of :data:`FORMATS`.
    """
    if format not in _REQUIRED:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    data = {key: value for key, value in row.data.items() if value is not None}
    if not data.keys() >= set(_REQUIRED[format]):
        raise UserError(_missing(row, format, data))
    tools = _tools(row, data["tools"]) if data.get("tools") else ()
    found = _common_form(row, format, data)
    if tools and found.messages is None:
        raise UserError(
            f"{row.where}: the row has 'tools' but plain text, and only a chat template can show them; "
            "write the row as messages, or remove its 'tools' key."
        )
    return replace(found, tools=tools) if tools else found


def _common_form(row: SourceRow, format: str, data: Mapping[str, Any]) -> Row:
    if format == "text":
        return Row(row.where, row.line, text=_text(row, "text", data["text"], may_be_empty=False))
    if format == "alpaca":
        return Row(row.where, row.line, messages=_alpaca(row, data))
    if format == "prompt-completion":
        return _prompt_completion(row, data)
    key = _REQUIRED[format][0]
    messages, untrained = _turns(row, key, data[key])
    if format == "sharegpt" and data.get("system"):
        messages.insert(0, {"role": "system", "content": _text(row, "system", data["system"])})
        untrained = [index + 1 for index in untrained]
    return Row(row.where, row.line, messages=tuple(messages), untrained=frozenset(untrained))


def _alpaca(row: SourceRow, data: Mapping[str, Any]) -> tuple[Message, ...]:
    messages: list[Message] = []
    system = _text(row, "system", data.get("system", ""))
    if system.strip():
        messages.append({"role": "system", "content": system})
    history = data.get("history", [])
    if not isinstance(history, list):
        raise UserError(f"{row.where}: 'history' is {_kind(history)}, expected an array of [question, answer] pairs.")
    for index, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"{row.where}: history[{index}] is {_kind(pair)}, expected a [question, answer] pair.")
        messages.append({"role": "user", "content": _text(row, f"history[{index}][0]", pair[0])})
        messages.append({"role": "assistant", "content": _text(row, f"history[{index}][1]", pair[1], False)})
    question = _text(row, "instruction", data["instruction"])
    extra = _text(row, "input", data.get("input", ""))
    if extra.strip():
        question = f"{question}\n\n{extra}" if question.strip() else extra
    if not question.strip():
        raise UserError(f"{row.where}: 'instruction' is empty, expected text; fill it or delete the row.")
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _text(row, "output", data["output"], False)})
    return tuple(messages)


def _prompt_completion(row: SourceRow, data: Mapping[str, Any]) -> Row:
    prompt, completion = data["prompt"], data["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Row(
            row.where,
            row.line,
            prompt=_text(row, "prompt", prompt),
            completion=_text(row, "completion", completion, may_be_empty=False),
        )
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise UserError(
            f"{row.where}: 'prompt' is {_kind(prompt)} and 'completion' is {_kind(completion)}, "
            "expected two strings or two arrays of {role, content}."
        )
    before, _ = _turns(row, "prompt", prompt)
    after, untrained = _turns(row, "completion", completion)
    context = [*range(len(before)), *(len(before) + index for index in untrained)]
    return Row(row.where, row.line, messages=(*before, *after), untrained=frozenset(context))


def _turns(row: SourceRow, key: str, value: Any) -> tuple[list[Message], list[int]]:
    """The messages in ``value`` and the indices of those with ``weight`` 0; both spellings of the two keys are read."""
    if not isinstance(value, list):
        raise UserError(f"{row.where}: '{key}' is {_kind(value)}, expected an array of messages.")
    if not value:
        raise UserError(f"{row.where}: '{key}' is empty, expected at least one message; delete the row.")
    messages: list[Message] = []
    untrained: list[int] = []
    for index, entry in enumerate(value):
        at = f"{key}[{index}]"
        if not isinstance(entry, dict):
            raise UserError(f"{row.where}: {at} is {_kind(entry)}, expected an object with 'role' and 'content'.")
        turn = {name: item for name, item in entry.items() if item is not None}
        calls: list[dict[str, Any]] = []
        for name in ("tool_calls", "function_call"):
            if turn.get(name):
                calls = _tool_calls(row, f"{at}.{name}", turn[name])
        spellings = [("role", "content"), ("from", "value")]
        if key == "conversations":
            spellings.reverse()
        # The spelling the turn has more of; on a tie, the format's own.
        role_key, content_key = max(spellings, key=lambda pair: (pair[0] in turn) + (pair[1] in turn))
        for needed in (role_key, content_key):
            if needed not in turn and not (calls and needed == content_key):
                raise UserError(
                    f"{row.where}: {at} has no '{needed}', got {_listed(turn)}; "
                    f"{_advice((role_key, content_key), turn)}."
                )
        role = _role(row, f"{at}.{role_key}", turn[role_key])
        may_be_empty = role != "assistant" or bool(calls)
        content = _content(row, f"{at}.{content_key}", turn.get(content_key, ""), may_be_empty)
        if turn[role_key] == "function_call":
            calls, content = _tool_calls(row, f"{at}.{content_key}", content), ""
        message: Message = {"role": role, "content": content}
        if calls:
            if role != "assistant":
                raise UserError(f"{row.where}: {at} has tool calls and the role {role}, expected assistant.")
            message["tool_calls"] = calls
        for name in ("reasoning_content", "name", "tool_call_id"):
            if isinstance(turn.get(name), str):
                message[name] = turn[name]
        messages.append(message)
        weight = turn.get("weight", 1)
        if weight not in (0, 1):
            raise UserError(f"{row.where}: {at}.weight is {weight!r}, expected 0 (context only) or 1 (trained).")
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
            raise UserError(f"{row.where}: {place} names no function, expected {{'name': ..., 'arguments': {{...}}}}.")
        arguments = function.get("arguments")
        arguments = {} if arguments in (None, "") else _from_json(row, f"{place}.arguments", arguments)
        if not isinstance(arguments, dict):
            raise UserError(f"{row.where}: {place}.arguments is {_kind(arguments)}, expected an object.")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _tools(row: SourceRow, value: Any) -> tuple[dict[str, Any], ...]:
    """The functions that may be called, each ``{type: function, function: {name, ...}}``."""
    value = _from_json(row, "tools", value)
    if not isinstance(value, list):
        raise UserError(f"{row.where}: 'tools' is {_kind(value)}, expected an array of functions.")
    tools = []
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{row.where}: tools[{index}] has no 'name', expected a function with name and parameters.")
        tools.append({"type": "function", "function": _without_nulls(function)})
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
    except ValueError as error:
        raise UserError(f"{row.where}: '{at}' is not valid JSON ({error}); write an object or its JSON.") from None


def _role(row: SourceRow, at: str, value: Any) -> str:
    if isinstance(value, str) and (role := _ROLES.get(value.strip().lower())):
        return role
    near = difflib.get_close_matches(str(value).lower(), list(_ROLES), n=1)
    advice = f"did you mean '{near[0]}'?" if near else "write one of these."
    raise UserError(f"{row.where}: {at} is {value!r}, expected system, user, assistant or tool (human, gpt); {advice}")


def _content(row: SourceRow, at: str, value: Any, may_be_empty: bool) -> str:
    """A string, or OpenAI's list of text parts, joined."""
    if isinstance(value, list):
        parts: list[str] = []
        for index, part in enumerate(value):
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else None
                got = f"a part of type {kind!r}" if kind else _kind(part)
                raise UserError(f"{row.where}: {at}[{index}] is {got}, expected text parts only; remove the row.")
            parts.append(part["text"])
        value = "".join(parts)
    return _text(row, at, value, may_be_empty)


def _text(row: SourceRow, at: str, value: Any, may_be_empty: bool = True) -> str:
    if not isinstance(value, str):
        raise UserError(f"{row.where}: '{at}' is {_kind(value)}, expected a string.")
    if not may_be_empty and not value.strip():
        raise UserError(f"{row.where}: '{at}' is empty, expected text to train on; fill it or delete the row.")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            # JSON may escape one half of a pair alone; no tokenizer can encode it.
            half = f"\\u{ord(value[error.start]):04x}"
            raise UserError(
                f"{row.where}: '{at}' holds {half}, half of a surrogate pair; remove the character."
            ) from None
    return value


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys) or "no keys"


def _near(needed: Sequence[str], keys: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs (key found, key probably meant) for the needed keys that are absent."""
    present = list(keys)
    pairs: list[tuple[str, str]] = []
    for name in needed:
        if name in present:
            continue
        lowered = {key.lower().strip(): key for key in present if key not in needed}
        match = difflib.get_close_matches(name, list(lowered), n=1, cutoff=0.7)
        if match:
            pairs.append((lowered[match[0]], name))
    return pairs


def _advice(needed: Sequence[str], keys: Iterable[str]) -> str:
    pairs = _near(needed, keys)
    if pairs:
        return " and ".join(f"rename '{got}' to '{meant}'" for got, meant in pairs)
    return "expected " + " and ".join(f"'{name}'" for name in needed)


def _missing(row: SourceRow, format: str, keys: Iterable[str]) -> str:
    present = list(keys)
    needed = _REQUIRED[format]
    absent = _listed(name for name in needed if name not in present)
    return f"{row.where}: format '{format}' needs {absent}, got {_listed(present)}; {_advice(needed, present)}."


def _no_format(row: SourceRow, keys: list[str]) -> str:
    near = [pair for needed in _REQUIRED.values() for pair in _near(needed, keys)]
    choices = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in _REQUIRED.items())
    advice = " and ".join(f"rename '{got}' to '{meant}'" for got, meant in dict(near).items())
    ending = f"; {advice}" if advice else "; rename the keys to those of one format"
    return f"{row.where}: the keys {_listed(keys)} fit no known format ({choices}){ending}."
