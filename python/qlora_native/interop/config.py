"""The quantization config of transformers' ``from_pretrained``, and its entry in transformers' registries.

This file is imported while transformers itself still is, so it takes from it only what is there by then.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

import qlora_native as qn
from qlora_native.weights.config import METADATA, METHOD

# bitsandbytes' names for the same settings, so that a script changes nothing but the class.
_THEIR_NAMES = {
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "llm_int8_skip_modules": "skip_modules",
}
# Theirs that have no effect here, with the values that are accepted.
_THEIR_OTHERS: dict[str, tuple[Any, ...]] = {
    "load_in_4bit": (True,),
    "load_in_8bit": (False,),
    "bnb_4bit_quant_storage": (None, "uint8", torch.uint8),
    "llm_int8_threshold": (6.0, 0.0),
    "llm_int8_enable_fp32_cpu_offload": (False,),
    "llm_int8_has_fp16_weight": (False,),
}


class QLoRANativeConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of transformers' ``from_pretrained`` for 4-bit weights of this library.

    Args:
        quant_type, block_size, double_quant: as :func:`qlora_native.quantize`.
        compute_dtype: the dtype of the products with 4-bit weights, as torch.dtype or its name; None takes that of the
            activations.
        skip_modules: linear layers to leave dense, as :func:`qlora_native.load_model` has it; None is the output
            embedding. Tied weights always stay dense.
        others: bitsandbytes' names of these (``bnb_4bit_quant_type``, ``bnb_4bit_use_double_quant``,
            ``bnb_4bit_compute_dtype``, ``llm_int8_skip_modules``), and ``load_in_4bit=True``.

    Raises:
        ValueError: an unknown name, or a value that this library does not have.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: Iterable[str] | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = METHOD
        self.quant_type, self.block_size, self.double_quant = quant_type, block_size, double_quant
        self.compute_dtype, self.skip_modules = compute_dtype, skip_modules
        self._take(others)
        if self.compute_dtype is not None:
            self.compute_dtype = str(self.compute_dtype).removeprefix("torch.")
        if self.compute_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                f"QLoRANativeConfig: compute_dtype is {self.compute_dtype}: expected float32, bfloat16 or float16."
            )
        if isinstance(self.skip_modules, str):
            raise ValueError(
                f"QLoRANativeConfig: skip_modules is the string {self.skip_modules!r}: expected a list of names."
            )
        self.skip_modules = None if self.skip_modules is None else list(self.skip_modules)
        qn.quantize(torch.zeros(1, device="cpu"), **self.options())  # refuses wrong options now

    def _take(self, others: dict[str, Any]) -> None:
        for name, value in others.items():
            if name in _THEIR_NAMES or name == METADATA:
                setattr(self, _THEIR_NAMES.get(name, name), value)
            elif name in _THEIR_OTHERS:
                if value not in _THEIR_OTHERS[name]:
                    raise ValueError(
                        f"QLoRANativeConfig: {name} is {value!r}: expected {_THEIR_OTHERS[name][0]!r}."
                    )
            elif name not in ("quant_method", "_load_in_4bit", "_load_in_8bit"):
                names = [*self.options(), "compute_dtype", "skip_modules"]
                near = get_close_matches(name, [*names, *_THEIR_NAMES], n=2)
                hint = (
                    f"did you mean {' or '.join(near)}?" if near else f"expected {', '.join(names)}."
                )
                raise ValueError(f"QLoRANativeConfig has no setting {name!r}: {hint}")

    def options(self) -> dict[str, Any]:
        """The arguments of :func:`qlora_native.quantize`."""
        return {
            "quant_type": self.quant_type,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
        }


_merge = AutoHfQuantizer.merge_quantization_configs


def _merge_quantization_configs(stored: Any, given: Any) -> Any:
    """Our config, given by the caller, wins over the 8-bit floats and 4-bit weights that it can read."""
    values = stored if isinstance(stored, dict) else stored.to_dict()
    readable = values.get("quant_method") == "fp8" or values.get("load_in_4bit")
    if not (isinstance(given, QLoRANativeConfig) and readable):
        return _merge(stored, given)
    if METADATA in values:
        given.qlora_native = values[METADATA]
    return given


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QLoRANativeConfig
AUTO_QUANTIZER_MAPPING[METHOD] = lambda config, **options: qn.QLoRANativeQuantizer(config, **options)
AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_quantization_configs)
