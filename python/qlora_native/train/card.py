"""The README.md beside an adapter: what it is, what it was trained on, how to load it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from qlora_native._version import __version__
from qlora_native.config import TrainConfig
from qlora_native.hf.build import dense_beside
from qlora_native.weight import CALIBRATED


def write_card(folder: Path, config: TrainConfig, facts: dict[str, Any], hashes: dict[str, str]) -> None:
    """Write ``folder``/README.md. ``facts`` are the fields of the loop's ``TrainState``, ``hashes`` the SHA-256 of the
    data files by their paths. The front matter is PEFT's, from which the Hugging Face hub reads the adapter's base."""
    model, quant, lora = config.model, config.quant, config.lora
    arguments = repr(model) + "".join(f", {name}={value!r}" for name, value in quant.options.items())
    made, base = "", f"base in 4 bits ({quant.type}, blocks of {quant.block_size}"
    base += ", double quantization)" if quant.double_quant else ")"
    if quant.type == "keep":
        arguments, base = repr(model), "GGUF file whose weights stayed as they are"
    if lora.modules_to_save or lora.trainable_tokens:
        skipped = dense_beside(lora.modules_to_save, lora.trainable_tokens, quant.type == "keep")
        arguments += f", skip_modules={skipped!r}"
    if quant.method != "rtn":  # too slow to do on each load
        from qlora_native.calibration.data import FILE, quantize_command

        kept = Path(config.output_dir) / FILE if quant.method in CALIBRATED else None
        command = quantize_command(model, quant.model_dump(), config.train.dtype, kept, "base-4bit")
        made = f" Make it with `{command}`:"
        arguments = "'base-4bit'"
    data = [("training rows", path) for path in config.data.files]
    data += [("held-out rows", config.data.eval)] if config.data.eval is not None else []
    files = [f"| {what} | `{path}` | `{hashes[path]}` |" for what, path in data]
    losses = ""
    if facts["loss_after"] is not None:
        before = "" if facts["loss_before"] is None else f"{facts['loss_before']:.4f} before training, "
        losses = f"\nHeld-out loss: {before}{facts['loss_after']:.4f} nats a token after it.\n"
    if facts["retention"] is not None:
        from qlora_native.evaluate.retention import describe

        losses += f"\nThe folder `shipped` holds a 4-bit model without an adapter: {describe(facts['retention'])}.\n"
    answers = ""
    if facts["samples"]:
        shown = json.dumps(facts["samples"], indent=1, ensure_ascii=False)
        answers = f"## Answers\n\nBefore training, and by this adapter:\n\n```json\n{shown}\n```\n\n"
    packages = ("torch", "transformers", "safetensors")
    versions = {"qlora_native": __version__, **{name: importlib.metadata.version(name) for name in packages}}
    text = f"""---
base_model: {json.dumps(model)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- qlora
- qlora_native
- transformers
---

# LoRA adapter for {Path(model).name}

Trained with qlora_native on a {base}: rank {lora.r}, alpha {lora.alpha:g}, {facts["step"]} steps,
{facts["tokens"]:,} tokens.
{losses}
## Load it

On the base as it was trained.{made}

```python
import qlora_native as qn

model = qn.load_model({arguments})
qn.load_adapter(model, "path/to/this/folder")
```

{_elsewhere(model, quant.type == "keep")}
As a model of its own: `qlora merge {model} path/to/this/folder --out merged --check`

{answers}## Data

| what | file | SHA-256 |
|---|---|---|
{chr(10).join(files)}

## Versions

{chr(10).join(f"- {name} {version}" for name, version in versions.items())}

## Config

```yaml
{config.to_yaml().rstrip()}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _elsewhere(model: str, is_kept: bool) -> str:
    """How other programs load the adapter."""
    if is_kept:
        return f"""In llama.cpp, over the same file:

```sh
qlora export path/to/this/folder --to gguf-adapter --out adapter.gguf
llama-cli -m {model} --lora adapter.gguf
```
"""
    return """With PEFT:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""
