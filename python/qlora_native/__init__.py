"""QLoRA as a native library: frozen weights in 4 bits, adapters trained beside them, on CPU and CUDA.

``import qlora_native as qn`` brings the kernels (``torch.ops.qlora_native``), the quantized weight, the differentiable
functions and the linear layer. Whatever needs transformers is imported when it is first used.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

# In this order: ops imports torch, during which Ctrl-C ends a command, and registers itself.
from qlora_native import _import_hooks, _interrupt, _moved, ops  # noqa: F401
from qlora_native._native import build_info
from qlora_native._version import __version__
from qlora_native.errors import UserError
from qlora_native.functional import dequantize_rows, linear, linear_cross_entropy, lora_linear
from qlora_native.weight import QuantizedWeight, from_bnb, quantize, to_bnb

if TYPE_CHECKING:
    from qlora_native import distributed, nn, optim
    from qlora_native.calibration.data import CalibrationData
    from qlora_native.interop.config import QLoRANativeConfig
    from qlora_native.interop.peft import peft_config
    from qlora_native.interop.quantizer import QLoRANativeQuantizer as QLoRANativeQuantizer
    from qlora_native.interop.trl import patch_trl
    from qlora_native.lora import (
        LoraConfig,
        adapters_off,
        add_lora,
        load_adapter,
        save_adapter,
        unload_adapter,
    )
    from qlora_native.models.device_layers import stream_layers
    from qlora_native.models.fuse import fuse
    from qlora_native.models.load import load_model
    from qlora_native.models.merge import merge
    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.train.loop import Trainer
    from qlora_native.weights.open import load_tokenizer

_LAZY = {
    "CalibrationData": "calibration.data",
    "nn": "nn",
    "optim": "optim",
    "distributed": "distributed",
    "fuse": "models.fuse",
    "stream_layers": "models.device_layers",
    "patch_trl": "interop.trl",
    "peft_config": "interop.peft",
    "QLoRANativeConfig": "interop.config",
    "QLoRANativeQuantizer": "interop.quantizer",
    "load_model": "models.load",
    "load_tokenizer": "weights.open",
    "LoraConfig": "lora",
    "adapters_off": "lora",
    "add_lora": "lora",
    "save_adapter": "lora",
    "load_adapter": "lora",
    "unload_adapter": "lora",
    "merge": "models.merge",
    "TrainConfig": "tool.config",
    "Trainer": "tool.train.loop",
}

__all__ = [
    "CalibrationData",
    "LoraConfig",
    "QLoRANativeConfig",
    "QuantizedWeight",
    "TrainConfig",
    "Trainer",
    "UserError",
    "__version__",
    "adapters_off",
    "add_lora",
    "build_info",
    "dequantize_rows",
    "distributed",
    "from_bnb",
    "fuse",
    "linear",
    "linear_cross_entropy",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "lora_linear",
    "merge",
    "nn",
    "ops",
    "optim",
    "patch_trl",
    "peft_config",
    "quantize",
    "save_adapter",
    "stream_layers",
    "to_bnb",
    "unload_adapter",
]


def __getattr__(name: str) -> Any:
    if name == "parallel":  # its name in 0.1
        warnings.warn(
            "qlora_native.parallel is now qlora_native.distributed", DeprecationWarning, stacklevel=2
        )
        name = "distributed"
    if name not in _LAZY:
        raise AttributeError(f"module 'qlora_native' has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name]}", __name__)
    value = module if name in ("nn", "optim", "distributed") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.meta_path.append(_moved.Finder())  # after the finders of files
_import_hooks.watch()  # so that transformers and PEFT know our classes, whichever is imported first
