"""QLoRA as a native library: frozen weights in 4 bits, adapters trained beside them, on CPU and CUDA.

``import qlora_native as qn`` brings the kernels (``torch.ops.qlora_native``), the quantized weight, the differentiable
functions and the linear layer. Whatever needs transformers is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _late, ops  # ops registers torch.ops.qlora_native
from ._native import build_info
from ._version import __version__
from .errors import UserError
from .functional import linear, linear_cross_entropy, lora_linear
from .weight import QuantizedWeight, from_bnb, quantize, to_bnb

if TYPE_CHECKING:
    from . import nn as nn
    from . import optim as optim
    from . import parallel as parallel
    from .calibration.data import CalibrationData as CalibrationData
    from .integrations import fuse as fuse
    from .integrations.peft import peft_config as peft_config
    from .integrations.transformers import QLoRANativeConfig as QLoRANativeConfig
    from .load import load_model as load_model
    from .load import lora_statistics as lora_statistics
    from .load import merge as merge
    from .load.quantizer import QLoRANativeQuantizer as QLoRANativeQuantizer
    from .lora import LoraConfig as LoraConfig
    from .lora import add_lora as add_lora
    from .lora import load_adapter as load_adapter
    from .lora import save_adapter as save_adapter
    from .train import TrainConfig as TrainConfig
    from .train import Trainer as Trainer
    from .tuning import tune as tune

_LAZY = {
    "CalibrationData": "calibration.data",
    "nn": "nn",
    "optim": "optim",
    "parallel": "parallel",
    "fuse": "integrations",
    "peft_config": "integrations.peft",
    "QLoRANativeConfig": "integrations.transformers",
    "QLoRANativeQuantizer": "load.quantizer",
    "load_model": "load",
    "LoraConfig": "lora",
    "add_lora": "lora",
    "save_adapter": "lora",
    "load_adapter": "lora",
    "lora_statistics": "load",
    "merge": "load",
    "TrainConfig": "train",
    "Trainer": "train",
    "tune": "tuning",
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
    "add_lora",
    "build_info",
    "from_bnb",
    "fuse",
    "linear",
    "linear_cross_entropy",
    "load_adapter",
    "load_model",
    "lora_linear",
    "lora_statistics",
    "merge",
    "nn",
    "ops",
    "optim",
    "parallel",
    "peft_config",
    "quantize",
    "save_adapter",
    "to_bnb",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'qlora_native' has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name]}", __name__)
    value = module if name in ("nn", "optim", "parallel") else getattr(module, name)
    globals()[name] = value
    return value


_late.watch()  # so that transformers and PEFT know our classes, whichever is imported first
