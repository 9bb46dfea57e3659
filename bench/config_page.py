"""Write the page of the config's keys from the schema.

python bench/config_page.py > docs/config.md
"""

from __future__ import annotations

import json
import typing
from typing import Any

from qlora_native.config import keys

BLOCKS = {"": "The run", "data": "Rows", "quant": "Frozen weights", "lora": "Adapter", "train": "Training"}


def page() -> str:
    """The whole page."""
    lines = [
        "# Keys of the config",
        "",
        "On this page you find every key of a training config, with its values and its default.",
        "Every key can be given on the command line as `--key value`, by its whole name or its last part.",
        "A file with an unknown key is refused.",
        "",
        "- `qlora config init` writes a commented file, `qlora config list` names the shipped ones.",
        "- `qlora config check` reports every mistake at once.",
        "",
        "`bench/config_page.py` writes this page from the schema; a test compares.",
    ]
    block = None
    for key, field in keys().items():
        here = key.rpartition(".")[0]
        if here != block:
            block = here
            lines += ["", f"## {BLOCKS.get(block, block)}{f' (`{block}:`)' if block else ''}", ""]
            lines += ["| key | values | default | |", "|---|---|---|---|"]
        default = "required" if field.is_required() else f"`{_text(field.default)}`"
        lines.append(f"| `{key}` | {_values(field.annotation)} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _values(annotation: Any) -> str:
    """The type of a key, as the table has it."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{_text(value)}`" for value in arguments)
    if typing.get_origin(annotation) is tuple:
        return f"{len(arguments)} numbers"
    if typing.get_origin(annotation) is list:
        return "list of texts"
    if hasattr(annotation, "__metadata__"):
        return _values(arguments[0])
    if arguments:
        return " or ".join(_values(argument) for argument in arguments)
    names = {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): "`null`"}
    return names.get(annotation, str(annotation))


if __name__ == "__main__":
    print(page(), end="")
