"""The README.md beside an adapter: what it is, what it was trained on, how to load it."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_native._version import __version__
from qlora_native.calibration.data import FILE, quantize_command
from qlora_native.models.trained import read_record
from qlora_native.tool.config import TrainConfig
from qlora_native.weight import CALIBRATED
from qlora_native.weights.shapes import dense_beside


def write_card(
    folder: Path, config: TrainConfig, facts: dict[str, Any], hashes: dict[str, str]
) -> None:
    """Write ``folder``/README.md, in which what is recorded of the base lies already.

    ``facts`` are the fields of the loop's ``TrainState``, ``hashes`` the SHA-256 of the data files by their paths. The
    front matter is PEFT's, from which the Hugging Face hub reads the adapter's base.
    """
    model = config.model
    quant = config.quant
    lora = config.lora
    record = read_record(folder)
    is_kept = quant.type == "keep"
    is_stored = "folder" in record
    arguments = repr(model) + "".join(f", {name}={value!r}" for name, value in quant.options.items())
    made = ""
    base = f"base in 4 bits ({quant.type} by {quant.method}, blocks of {quant.block_size}"
    base += ", double quantization)" if quant.double_quant else ")"
    if record:
        base = "GGUF file whose weights stayed as they are" if is_kept else "base in 4 bits"
        base += f" ({quant.type} by {quant.method})" if is_stored else ""
        arguments = repr(str(Path(config.output_dir) / record["folder"]) if is_stored else model)
    started = "" if lora.adapter is None else f", from the adapter in {lora.adapter}"
    trains_more = bool(lora.modules_to_save or lora.trainable_tokens)
    skipped = dense_beside(lora.modules_to_save, lora.trainable_tokens, is_kept) if trains_more else []
    if skipped and (is_kept or not record):
        arguments += f", skip_modules={skipped!r}"
    merged = model
    kept = Path(config.output_dir) / FILE if quant.method in CALIBRATED else None
    command = quantize_command(
        model, quant.model_dump(), config.train.dtype, kept, "base-4bit", skipped
    )
    made_for_peft = (
        "" if record or _is_bitsandbytes(config) else f", on the base that `{command}` makes"
    )
    if quant.method != "rtn" and not record:  # too slow to do on each load
        made = f" Make it with `{command}`:"
        arguments, merged = "'base-4bit'", "base-4bit"
    files = [f"| training rows | `{path}` | `{hashes[path]}` |" for path in config.data.files]
    if (path := config.data.eval) is not None:
        files.append(f"| held-out rows | `{path}` | `{hashes[path]}` |")
    losses = ""
    if facts["loss_after"] is not None:
        before = (
            "" if facts["loss_before"] is None else f"{facts['loss_before']:.4f} before these steps, "
        )
        losses = f"\nHeld-out loss: {before}{facts['loss_after']:.4f} nats a token after it.\n"
    if facts["retention"] is not None:
        from qlora_native.tool.evaluate.retention import describe

        losses += f"\nThe folder `shipped` holds a 4-bit model without an adapter: {describe(facts['retention'])}.\n"
    answers = ""
    if facts["samples"]:
        shown = json.dumps(facts["samples"], indent=1, ensure_ascii=False)
        answers = (
            f"## Answers\n\nBefore these steps, and by this adapter:\n\n```json\n{shown}\n```\n\n"
        )
    packages = ("torch", "transformers", "safetensors")
    versions = {
        "qlora_native": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }
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
{facts["tokens"]:,} tokens{started}.
{losses}
## Load it

On the base as it was trained, from the folder in which the run was started.{made}

```python
import qlora_native as qn

model = qn.load_model({arguments})
qn.load_adapter(model, "path/to/this/folder")
```

With PEFT{made_for_peft}:

```python
{peft_snippet(config, record, "path/to/this/folder")}
```
{_llama_cpp(config) if is_kept and not trains_more else ""}
As a model of its own: `{shlex.join(["qlora", "merge", merged, "path/to/this/folder"])} --out merged --check`

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


def _is_bitsandbytes(config: TrainConfig) -> bool:
    """Whether bitsandbytes makes the 4-bit weights of the run of the files, whose name alone is looked at."""
    return (
        config.quant.method == "rtn"
        and config.quant.block_size == 64
        and not config.model.endswith(".gguf")
    )


def peft_snippet(config: TrainConfig, record: Mapping[str, str], adapter: str) -> str:
    """The lines that load the adapter on its base with PEFT and without this package."""
    quant = config.quant
    dtype = config.train.dtype
    model = Path(config.model)
    names = ""
    if "folder" in record:
        place = repr(str(Path(config.output_dir) / record["folder"]))
    elif quant.type == "keep":
        place = f"{str(model.parent)!r}, gguf_file={model.name!r}, quantization_config=GgufConfig(dequantize=True)"
        names = ", GgufConfig"
    elif record:
        place = repr(config.model)
    elif _is_bitsandbytes(config):
        place = f"{config.model!r}, quantization_config=four_bit"
        names = ", BitsAndBytesConfig"
    else:
        place = "'base-4bit'"
    lines = ["from peft import PeftModel", f"from transformers import AutoModelForCausalLM{names}", ""]
    if names == ", BitsAndBytesConfig":
        options = f"bnb_4bit_quant_type={quant.type!r}, bnb_4bit_use_double_quant={quant.double_quant}"
        lines += [
            f"four_bit = BitsAndBytesConfig(load_in_4bit=True, {options}, bnb_4bit_compute_dtype={dtype!r})"
        ]
    lines += [f"base = AutoModelForCausalLM.from_pretrained({place}, dtype={dtype!r})"]
    return "\n".join([*lines, f"model = PeftModel.from_pretrained(base, {adapter!r})"])


def _llama_cpp(config: TrainConfig) -> str:
    return f"""
In llama.cpp, over the same file:

```sh
qlora export path/to/this/folder --to gguf-adapter --out adapter.gguf
llama-cli -m {shlex.quote(config.model)} --lora adapter.gguf
```
"""
