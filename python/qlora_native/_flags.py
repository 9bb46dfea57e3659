"""Keys of a config on the command line: ``--key value`` pairs, written into the nested values of a file."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_native.errors import UserError


def apply_flags(
    values: dict[str, Any],
    words: Sequence[str],
    known: Mapping[str, Any],
    value_of: Callable[[str], Any],
) -> dict[str, str]:
    """Write ``words`` into ``values``; returns the flag as typed for each dotted key that it set.

    A key may be given without its section (``--lr``), a key of names also as ``--columns prompt=question``. A flag
    without a value means true, ``--resume`` alone means auto. ``value_of`` reads a value as YAML, so that lists,
    numbers and null work as in the file; ``known`` are the fields of all keys by their dotted names.
    """
    by_leaf = {key.rpartition(".")[2]: key for key in known}
    flags: dict[str, str] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r} stands alone: expected --key value, for example --lr 1e-4")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        path = name if name in known else by_leaf.get(name, name)
        annotation = known[path].annotation if path in known else None
        is_named = typing.get_origin(annotation) is dict
        taken = [text] if equals else []
        while words and not words[0].startswith("--"):
            if taken and not _takes_list(annotation) and not (is_named and "=" in taken[0]):
                break
            taken.append(words.pop(0))
        text = taken[0] if taken else "auto" if name == "resume" else "true"
        value: Any = text  # a path such as 2024-01-01 is not a date
        if len(taken) == 1 and text in ("null", "none"):
            value = None
        elif is_named and "=" in text:
            value = {key: value_of(item) for key, _, item in (pair.partition("=") for pair in taken)}
        elif len(taken) > 1:
            value = [value_of(each) for each in taken]  # --betas 0.9 0.99
        elif annotation not in (str, str | None):
            value = value_of(text)
        *sections, leaf = path.split(".")
        target = values
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):  # left as it is, for the check to report
                break
        else:
            target[leaf] = value
        flags[path] = word.partition("=")[0]
    # A length from the command line replaces the file's.
    lengths = [name for name in ("steps", "epochs") if f"train.{name}" in flags]
    if len(lengths) == 1 and isinstance(values.get("train"), dict):
        values["train"].pop("epochs" if lengths == ["steps"] else "steps", None)
    return flags


def _takes_list(annotation: Any) -> bool:
    is_list = typing.get_origin(annotation) in (list, tuple)
    return is_list or any(_takes_list(each) for each in typing.get_args(annotation))
