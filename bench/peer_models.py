"""SmolLM2-135M as several benches have it, and how transformers and bitsandbytes are given it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_native import reference
from qlora_native.nn import QuantizedLinear
from qlora_native.tool.cli.demo_model import model_file
from qlora_native.weights.open import load_tokenizer


def dense_model() -> Any:
    """The 16-bit one, by transformers' own code."""
    from transformers import AutoModelForCausalLM, GgufConfig

    source = model_file()
    options = {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(source.parent, **options)
    model.config.__dict__.pop("quantization_config", None)
    return model


def tokenizer() -> Any:
    return load_tokenizer(str(model_file()))


def nf4_config(kind: Any, dtype: torch.dtype) -> Any:
    """A quantization config of that class as scripts have it: NF4 with double quantization."""
    return kind(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def quantized_layers(model: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def decode_into(dense: Any, model: Any) -> None:
    """Gives a dense model the weights that a 4-bit one stands for."""
    with torch.no_grad():
        for name, layer in quantized_layers(model).items():
            decoded = reference.dequantize(torch.bfloat16, *layer.quantized.op_args())
            dense.get_submodule(name).weight.copy_(decoded)


def private_megabytes(field: str, process: int | str = "self") -> float:
    """A memory figure of a process from the kernel, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def reset_peak() -> None:
    """From now on VmHWM of this process is the peak of what comes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
