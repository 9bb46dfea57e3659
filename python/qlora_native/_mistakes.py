"""What is wrong with a config: one of pydantic's errors as a sentence that names the key that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

# The names that other trainers give to our keys; difflib alone would not find `lr` from `learning_rate`.
ALIASES = {
    "base_model": "model", "model_name_or_path": "model", "datasets": "data.train", "dataset": "data.train",
    "sequence_len": "data.max_length", "max_seq_length": "data.max_length", "val_set_size": "data.eval_fraction",
    "sample_packing": "data.packing", "train_on_inputs": "data.train_on", "quant_type": "quant.type",
    "bnb_4bit_quant_type": "quant.type", "load_in_4bit": "quant.type", "report_to": "logging",
    "bnb_4bit_use_double_quant": "quant.double_quant", "quant_method": "quant.method",
    "lora_r": "lora.r", "rank": "lora.r", "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout", "use_rslora": "lora.rslora", "lora_target_modules": "lora.target_modules",
    "loraplus_lr_ratio": "lora.lora_plus_ratio", "peft_layers_to_transform": "lora.layers_to_transform",
    "resume_adapter_file": "lora.adapter", "adapter_path": "lora.adapter",
    "max_steps": "train.steps", "num_train_epochs": "train.epochs", "num_epochs": "train.epochs",
    "micro_batch_size": "train.batch_size", "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.grad_accum", "learning_rate": "train.lr", "lr_scheduler": "train.scheduler",
    "lr_scheduler_type": "train.scheduler", "warmup_steps": "train.warmup", "warmup_ratio": "train.warmup",
    "adam_epsilon": "train.eps", "max_grad_norm": "train.clip", "gradient_checkpointing": "train.grad_checkpointing",
    "eval_steps": "train.eval_every", "save_steps": "train.save_every", "save_total_limit": "train.keep",
    "logging_steps": "train.log_every", "bf16": "train.dtype", "early_stopping_patience": "train.patience",
}  # fmt: skip


def _suggest(path: str, known: Mapping[str, Any]) -> str:
    """The key or section that a mistyped one most likely means, or the keys that exist there."""
    section, _, leaf = path.rpartition(".")
    here = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    here |= (
        {}
        if section
        else {name: name for name, dot, _ in (key.partition(".") for key in known) if dot}
    )
    meant = {**ALIASES, **{key.rpartition(".")[2]: key for key in known}}
    if leaf in meant:
        return f"did you mean {meant[leaf]}?"
    for names in (here, meant):
        if near := difflib.get_close_matches(leaf, names, n=1):
            return f"did you mean {names[near[0]]}?"
    return f"the {f'keys of {section}' if section else 'top-level keys'} are {', '.join(here)}"


def explain(
    path: str,
    item: Mapping[str, Any],
    source: str,
    lines: Mapping[str, int],
    flags: Mapping[str, str],
    known: Mapping[str, Any],
) -> str:
    """The error at the key ``path`` as one sentence; ``known`` are the fields of all keys by their dotted names."""
    kind, got = item["type"], item["input"]
    where = flags.get(path) or (
        f"{source}:{lines[path]}: {path}" if path in lines else f"{source}: {path}"
    )

    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where} is not a key; {_suggest(path, known)}"
    if kind == "missing" and len(item["loc"]) > path.count(".") + 1:  # a list that is too short
        return f"{where} is {got!r}: expected another number behind it"
    if kind == "missing":
        block, _, leaf = path.rpartition(".")
        what = f"a block `{path}:`"
        if path in known:
            under = f" under {block}" if block else ""
            what = f"`{leaf}: ...`{under} ({known[path].description}), or --{path} on the command line"
        return f"{source}: {path} is not set; add {what}"
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        return f"{where} is {got!r}: expected a block of keys, one per line"
    message = item["msg"].removeprefix("Value error, ")
    if kind in ("too_long", "too_short"):
        least, most = item["ctx"].get("min_length"), item["ctx"].get("max_length")
        message = f"expected at {f'most {most}' if least is None else f'least {least}'} values"
    # This is a rule over several keys of a block, which names them itself.
    if kind == "value_error" and path not in known:
        return f"{source}: {path}{'.' if path else ''}{message}"
    expected = re.sub(
        "Input should be|Tuple should have", "expected", re.split(", (?:unable|got)", message)[0]
    )
    return f"{where} is {got!r}: {expected}"
