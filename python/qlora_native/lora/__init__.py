"""Low-rank adapters beside frozen linear layers (Hu et al., "LoRA", 2021), 4-bit or dense.

``config.py`` has an adapter's settings, ``layer.py`` a layer with one, ``targets.py`` selects layers, ``adapter.py`` is
PEFT's file format, and ``model.py`` puts adapters into a model.
"""

from __future__ import annotations

from qlora_native.lora.adapter import adapter_settings, save_adapter
from qlora_native.lora.config import LoraConfig
from qlora_native.lora.layer import LoRALinear, adapters_off, lora_layers
from qlora_native.lora.model import add_lora, load_adapter, unload_adapter

__all__ = [
    "LoRALinear",
    "LoraConfig",
    "adapter_settings",
    "adapters_off",
    "add_lora",
    "load_adapter",
    "lora_layers",
    "save_adapter",
    "unload_adapter",
]
