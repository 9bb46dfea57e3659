"""config.json: what it says of a model and its 4-bit weights, read and written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from qlora_native._io import read_json, reading
from qlora_native.errors import UserError
from qlora_native.weights.files import first_sentence

METHOD = "qlora_native"  # quant_method in config.json
# Key of quantization_config, bitsandbytes' too: how the 4-bit weights were made.
METADATA = "qlora_native"
_MOST_LAYERS = 2048  # transformers makes a module of each
# The least and the most of the numbers of these names: with others a model takes all memory, or cannot be.
_BOUNDS = (
    (re.compile(r"(n|num)_(.*_)?(layers?|experts?|blocks?)|block_count"), 0, _MOST_LAYERS),
    (re.compile("hidden_size|n_embd|d_model"), 1, 1 << 31),
    (re.compile(".*(dropout|pdrop|layerdrop).*"), 0, 0.999),
)
_HUB_KERNEL = re.compile(r"_?(attn|experts)_implementation(_internal)?")  # which would be code


def check_config(path: Path, values: dict[str, Any]) -> None:
    """UserError for a number out of bounds, and for code of the hub."""
    for key, value in values.items():
        if isinstance(value, dict):
            check_config(path, value)
        elif isinstance(value, str) and _HUB_KERNEL.fullmatch(key) and "/" in value:
            raise UserError(
                f"{path}: {key} is {value!r}, code of a hub, which is not run: expected 'sdpa' or 'eager'."
            )
        for pattern, least, most in _BOUNDS if type(value) in (int, float) else ():
            if pattern.fullmatch(key) and not least <= value <= most:
                raise UserError(f"{path}: {key} is {value:,}: expected {least} to {most:,}.")


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a folder; UserError if it is none that transformers can use."""
    path = folder / "config.json"
    values = read_json(path)
    with reading(path):
        check_config(path, values)
        window = values.get("sliding_window")
        if window is not None and (type(window) is not int or not 0 <= window < 1 << 31):
            raise ValueError(
                f"sliding_window is {window!r}: expected a whole number of 0 or more, or null"
            )
    kind = values.get("model_type")
    if not kind:
        raise UserError(
            f"{path} has no model_type: expected the configuration of a transformers model."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its validators raise types of their own, with the reason as the cause
        reason = first_sentence(error.__cause__ or error)
        raise UserError(f"{path} (model type {kind}) cannot be used: {reason}") from error
    if getattr(config, "sliding_window", None) == 0:  # none, as in Qwen2-MoE's own config
        kinds = getattr(config, "layer_types", None)
        if "sliding_attention" in (kinds or ()):
            raise UserError(
                f"{path}: sliding_window is 0, but layer_types has 'sliding_attention': expected a number over 0."
            )
        if kinds is None:  # the mask would be one of this width; with kinds, it is made and not used
            config.sliding_window = None
    config.name_or_path = str(folder)
    return config


def four_bit_config(config: PreTrainedConfig, folder: Path) -> dict[str, object] | None:
    """config.json's own description of 4-bit weights; UserError for other quantized weights but 8-bit floats."""
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    values = dict(given if isinstance(given, dict) else given.to_dict())
    method = values.get("quant_method")
    if method in (METHOD, "mxfp4") or (
        method == "bitsandbytes" and (values.get("load_in_4bit") or values.get("_load_in_4bit"))
    ):
        return values
    if method == "fp8":
        return None
    kind = "8-bit bitsandbytes" if values.get("load_in_8bit") else method or "unknown"
    raise UserError(
        f"{folder} holds {kind} weights: expected 16-bit or 32-bit weights, 8-bit floats, or 4-bit in bitsandbytes' "
        "format or MXFP4; load the original model."
    )


def native_config(
    dense: list[str], options: dict[str, Any], compute_dtype: str | None, **made: Any
) -> dict[str, Any]:
    """The quantization_config of 4-bit weights as :class:`qlora_native.QLoRANativeConfig` has it."""
    return {
        "quant_method": METHOD,
        **options,
        "skip_modules": dense,
        "compute_dtype": compute_dtype,
        **made,
    }


def bitsandbytes_config(
    dtype: torch.dtype, options: dict[str, Any], dense: list[str]
) -> dict[str, Any]:
    """The quantization_config of 4-bit weights in bitsandbytes' format; ``dense`` are the other linear layers."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": options["quant_type"],
        "bnb_4bit_use_double_quant": options["double_quant"],
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }
