"""Write the page of the config's keys from the schema.

python bench/config_page.py > docs/config.md
"""

from __future__ import annotations

from qlora_native.tool.cli.train import as_text, values_of
from qlora_native.tool.config import keys

BLOCKS = {"": "The run", "data": "Rows", "quant": "Frozen weights", "lora": "Adapter", "train": "Training"}


def page() -> str:
    """The whole page."""
    lines = [
        "# Keys of the config",
        "",
        "After this page you can set every key of a training config; each is here with its values and its default.",
        "Every key can be given on the command line as `--key value`, by its whole name or its last part.",
        "A file with an unknown key is refused.",
        "",
        "- `qlora config init` writes a commented file, `qlora config list` names the shipped ones.",
        "- `qlora config init --preset llama-3.1-8b` writes the usual start for one of ten families of models.",
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
        default = "required" if field.is_required() else f"`{as_text(field.get_default(call_default_factory=True))}`"
        lines.append(f"| `{key}` | {values_of(field.annotation, '`')} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
