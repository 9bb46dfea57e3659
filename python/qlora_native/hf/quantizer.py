"""transformers' own loading with 4-bit weights: ``from_pretrained(..., quantization_config=QLoRANativeConfig())``.

transformers reads the tensors, one after another, and asks this file what becomes of each. What is 4-bit, and how it
is exchanged, is as in :func:`qlora_native.load_model`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations import is_fsdp_enabled
from transformers.quantizers.base import HfQuantizer

from qlora_native._memory import trim_heap
from qlora_native.errors import UserError
from qlora_native.hf.build import (
    OUTPUT_EMBEDDING,
    TRIM_EVERY_BYTES,
    dequantize_model,
    first_sentence,
    four_bit_weights,
    is_plain_linear,
    patterns_kept_in_fp32,
    put_four_bit,
)
from qlora_native.hf.config import METADATA
from qlora_native.hf.load import make_report
from qlora_native.hf.plan import SCALE_SUFFIX, STATE_MARK, unscaled
from qlora_native.nn.experts import STACKS, QuantizedExperts, without_stacks
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.weight import QuantizedWeight, bnb_state_key, from_bnb, quantize

# The parts of a 4-bit weight in a checkpoint, as their names end.
_PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f"{STATE_MARK}nf4", f"{STATE_MARK}fp4")


class QLoRANativeQuantizer(HfQuantizer):
    """What transformers asks while it loads, saves and trains a model with this library's 4-bit weights."""

    requires_calibration = False
    quantization_config: Any

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses a device map that leaves weights on the disk, and a load on one rank for all."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts modules on the disk, where 4-bit weights cannot stay: expected devices or 'cpu'."
            )
        if is_fsdp_enabled():
            raise ValueError(
                "FSDP_CPU_RAM_EFFICIENT_LOADING is true, under which accelerate sends parameters alone from rank 0 to "
                "the others, and a 4-bit weight has buffers too: set fsdp_cpu_ram_efficient_loading to false."
            )

    def update_device_map(self, device_map: Any) -> Any:
        """The current GPU if there is one, else the CPU, where the caller names none."""
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    @property
    def quantized_element_size(self) -> float:
        """Bytes an element, for automatic device maps."""
        return 0.5 + (1 if self.quantization_config.double_quant else 4) / self.quantization_config.block_size

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether the parameter is, or becomes, packed bytes."""
        return param_name in self._weights

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        stored = _stored_names(checkpoint_files or ())
        self.pre_quantized = any(STATE_MARK in name for name in stored)
        if not self.pre_quantized:
            setattr(self.quantization_config, METADATA, {"method": "rtn"})
        self._scaled = any(name.endswith(SCALE_SUFFIX) for name in stored)
        self._folder = Path(checkpoint_files[0]).parent if checkpoint_files else Path(str(model.config.name_or_path))
        self._dtype = dtype or model.dtype
        self._in_fp32 = patterns_kept_in_fp32(model, self._dtype)
        self._passed, self._refused = 0, ""
        if any(name.endswith(SCALE_SUFFIX) and ".experts." in name for name in stored):
            raise UserError(
                f"{self._folder} holds experts as 8-bit floats with scales, which from_pretrained cannot bring "
                "together: load it with qlora_native.load_model."
            )
        skip = self.quantization_config.skip_modules
        self._weights = four_bit_weights(
            model, (OUTPUT_EMBEDDING,) if skip is None else skip, self.quantization_config.block_size, self._in_fp32
        )

    def get_quantize_ops(self) -> ConversionOps:
        """What a 16-bit weight goes through."""
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How the parts of a stored weight come together: a 4-bit one's, or an 8-bit one's and its scales."""
        if self.pre_quantized:
            names = [rf"experts\.{name}" for name in STACKS] + ["weight"]
            return [_converter(name, _PARTS, Deserialize(self)) for name in names]
        return [_converter("weight", ("", SCALE_SUFFIX), Unscale(self))] if self._scaled else []

    def quantize(self, model: Any, name: str, tensor: Tensor) -> Tensor:
        """Exchange the layer of parameter ``name`` for its 4-bit form; returns the parameter."""
        transposed = self._weights[name]
        try:
            weight = quantize(tensor.t().contiguous() if transposed else tensor, **self.quantization_config.options())
        except ValueError as error:  # told after loading, in a sentence: transformers would print a stack trace
            reason = first_sentence(error).removeprefix("quantize: ")
            self._refused = self._refused or f"{self._folder}: weight {name} cannot be quantized: {reason}"
            weight = quantize(
                torch.zeros_like(tensor.t() if transposed else tensor), **self.quantization_config.options()
            )
        weight.dtype = self._dtype
        self._passed += tensor.nbytes
        if self._passed > TRIM_EVERY_BYTES:  # what was freed so far; the tensor itself goes next time
            self._passed = 0
            trim_heap()
        return self.put(model, name, weight, transposed)

    def put(self, model: Any, name: str, weight: QuantizedWeight, transposed: bool) -> Tensor:
        """Exchange the layer of parameter ``name`` for ``weight``; returns the parameter."""
        self._weights[name] = transposed
        return put_four_bit(model, name, weight, transposed)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a dense parameter."""
        return torch.float32 if self._in_fp32(name) else self._dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._refused:
            raise UserError(self._refused)
        compute = self.quantization_config.compute_dtype
        for module in model.modules():
            if isinstance(module, (QuantizedLinear, QuantizedExperts)):
                module.compute_dtype = None if compute is None else getattr(torch, compute)
        model.requires_grad_(False)
        # The parts of a 4-bit weight are saved as state_dict names them: nothing is to be turned back.
        conversions = [entry for entry in model._weight_conversions if not _is_ours(entry)]
        model._weight_conversions = without_stacks(conversions, model)
        model.load_report = make_report(model, self._folder)
        trim_heap()
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or self._dtype
        dequantize_model(model, dtype)
        for parameter in model.parameters():
            if parameter.dtype == self._dtype:  # what is kept in fp32 stays so
                parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return model

    def is_serializable(self) -> bool:
        """save_pretrained works."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Refuses a model of which each rank holds a part."""
        if any(
            isinstance(layer, (QuantizedLinear, QuantizedExperts)) and layer.is_sharded for layer in model.modules()
        ):
            raise ValueError(
                "save_pretrained: the 4-bit model is sharded over several processes: save the adapter alone, or the "
                "model before it is sharded."
            )
        return super().get_state_dict_and_metadata(model)

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile takes it."""
        return True


class Quantize(ConversionOps):
    """16-bit tensors to 4-bit ones."""

    def __init__(self, hf_quantizer: QLoRANativeQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """Name in the model -> parameter."""
        result = {}
        for name in list(input_dict):
            tensor = _first(input_dict.pop(name))
            if self.hf_quantizer.param_needs_quantization(model, name):
                tensor = self.hf_quantizer.quantize(model, name, tensor)
            result[name] = tensor
        return result


class Unscale(ConversionOps):
    """8-bit floats times the scales of their blocks, as checkpoints of the method "fp8" store them."""

    def __init__(self, hf_quantizer: QLoRANativeQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, Tensor]:
        """Name in the model -> dense tensor."""
        parts = [_first(value) for value in input_dict.values()]
        tensor = parts[0] if len(parts) == 1 else unscaled(parts[0], parts[1], parts[0].dtype)
        return {full_layer_name: tensor}


class Deserialize(ConversionOps):
    """The stored parts of a 4-bit weight to its layer."""

    def __init__(self, hf_quantizer: QLoRANativeQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        """Name in the model -> parameter."""
        leaf = full_layer_name.rpartition(".")[2]
        parts = {key.removeprefix(r"experts\."): _first(value) for key, value in input_dict.items()}
        if bnb_state_key(parts, leaf) is None:
            return {full_layer_name: parts[leaf].to(self.hf_quantizer.dtype_of(full_layer_name))}
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        transposed = is_plain_linear(module) and not isinstance(module, nn.Linear)
        return {full_layer_name: self.hf_quantizer.put(model, full_layer_name, from_bnb(parts, leaf), transposed)}


def _converter(name: str, endings: tuple[str, ...], op: ConversionOps) -> WeightConverter:
    return WeightConverter([name + ending for ending in endings], name, [op])


def _is_ours(entry: Any) -> bool:
    return any(isinstance(op, (Deserialize, Unscale)) for op in getattr(entry, "operations", ()))


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _stored_names(files: Iterable[str]) -> list[str]:
    names: list[str] = []
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                names += opened.keys()
    return names
