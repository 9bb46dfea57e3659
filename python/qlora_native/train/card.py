"""The README.md beside an adapter: what it is, what it learned from, how to load it."""

from __future__ import annotations

import importlib.metadata
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_native import _io
from qlora_native._version import __version__
from qlora_native.calibration.data import FILE, quantize_command
from qlora_native.config import TrainConfig
from qlora_native.errors import UserError
from qlora_native.hf.load import CALIBRATED

NAME = "README.md"
_PACKAGES = ("torch", "transformers", "safetensors")


def write_card(folder: Path, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Write ``folder``/README.md.

    Args:
        config: of the run.
        facts: ``step``, ``tokens`` that were seen, ``loss_before`` and ``loss_after``, held-out ones in nats a token,
            None without held-out rows.
    """
    (folder / NAME).write_text(card(config, facts), encoding="utf-8")


def card(config: TrainConfig, facts: dict[str, Any]) -> str:
    """The text. Its front matter is what PEFT writes, so that the Hugging Face hub knows the adapter's base."""
    model, quant, lora = config.model, config.quant, config.lora
    options = {"quant_type": quant.type, "block_size": quant.block_size, "double_quant": quant.double_quant}
    given = repr(model) + "".join(f", {name}={value!r}" for name, value in options.items())
    made = ""
    if quant.method != "rtn":  # not made anew on every loading
        kept = Path(config.output_dir) / FILE if quant.method in CALIBRATED else None
        command = quantize_command(model, quant.model_dump(), config.train.dtype, kept, "base-4bit")
        made = f" Make it with `{command}`:"
        given = "'base-4bit'"
    data = {"training rows": config.data.train, "held-out rows": config.data.eval}
    hashes = [f"| {what} | `{path}` | `{sha256(path)}` |" for what, path in data.items() if path is not None]
    losses = ""
    if facts["loss_after"] is not None:
        before = "" if facts["loss_before"] is None else f"{facts['loss_before']:.4f} before training, "
        losses = f"\nHeld-out loss: {before}{facts['loss_after']:.4f} nats a token after it.\n"
    versions = "\n".join(f"- {name} {_version(name)}" for name in ("qlora_native", *_PACKAGES))
    base = json.dumps(model)  # a JSON string is a YAML string
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- qlora
- qlora_native
- transformers
---

# LoRA adapter for {Path(model).name}

Trained with qlora_native on a base in 4 bits ({quant.type}, blocks of {quant.block_size}\
{", double quantization" if quant.double_quant else ""}): rank {lora.r}, alpha {lora.alpha:g}, {facts["step"]} steps,
{facts["tokens"]:,} tokens.
{losses}
## Load it

On the 4-bit base, as it was trained.{made}

```python
import qlora_native as qn

model = qn.load_model({given})
qn.load_adapter(model, "path/to/this/folder")
```

With PEFT:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```

As a model of its own: `qlora merge {model} path/to/this/folder --out merged --check`

## Data

| what | file | SHA-256 |
|---|---|---|
{chr(10).join(hashes)}

## Versions

{versions}

## Config

```yaml
{config.to_yaml().rstrip()}
```
"""


def sha256(path: str) -> str:
    """Of a data file, read once a state of it."""
    try:
        state = Path(path).expanduser().stat()
        return _sha256(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read any more: {error.strerror}") from error


@lru_cache(maxsize=8)
def _sha256(path: str, size: int, changed: int) -> str:
    return _io.sha256(Path(path).expanduser())


def _version(name: str) -> str:
    return __version__ if name == "qlora_native" else importlib.metadata.version(name)
