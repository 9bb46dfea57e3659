"""transformers' own loading with 4-bit weights: ``from_pretrained(..., quantization_config=QLoRANativeConfig())``.

transformers reads the tensors one after another and calls this file for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations import is_fsdp_enabled
from transformers.quantizers.base import HfQuantizer

from qlora_native._memory import trim_heap
from qlora_native._threads import sleep_while_busy
from qlora_native.errors import UserError
from qlora_native.models.build import HeapTrimmer, put_dense, put_four_bit
from qlora_native.models.decode import Decodes, decode_by_graphs
from qlora_native.models.load import make_report
from qlora_native.nn.experts import (
    STACKS,
    QuantizedExperts,
    quantized_stacks,
    take_stack,
    without_stacks,
)
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.weight import bnb_state_key, from_bnb, quantize
from qlora_native.weights.config import METADATA
from qlora_native.weights.files import first_sentence, read_header
from qlora_native.weights.float8 import SCALE_SUFFIX, unscaled
from qlora_native.weights.shapes import OUTPUT_EMBEDDING, four_bit_weights, kept_in_fp32
from qlora_native.weights.stream import STATE_MARK

# How the names of the parts of a 4-bit weight end.
_PARTS = [
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    f"{STATE_MARK}nf4",
    f"{STATE_MARK}fp4",
]


class QLoRANativeQuantizer(HfQuantizer):
    """What transformers calls while it loads, saves and trains a model with this library's 4-bit weights."""

    requires_calibration = False
    is_trainable = True
    is_compileable = True
    quantization_config: Any

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map that leaves weights on the disk, and a load on one rank for all."""
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
        default = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        return {"": default} if device_map is None else device_map

    @property
    def quantized_element_size(self) -> float:
        """Bytes an element, for automatic device maps."""
        return (
            0.5
            + (1 if self.quantization_config.double_quant else 4) / self.quantization_config.block_size
        )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._weights

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        stored = [
            name for file in files if file.suffix == ".safetensors" for name in read_header(file)
        ]
        config, scales = (
            self.quantization_config,
            [name for name in stored if name.endswith(SCALE_SUFFIX)],
        )
        self.pre_quantized, self._scaled = any(STATE_MARK in name for name in stored), bool(scales)
        if not self.pre_quantized:
            setattr(config, METADATA, {"method": "rtn"})
        self._folder = files[0].parent if files else Path(str(model.config.name_or_path))
        self._dtype = dtype or model.dtype
        self._in_fp32 = kept_in_fp32(model, self._dtype)
        self._trim, self._refused = HeapTrimmer(), ""
        if any(".experts." in name for name in scales):
            raise UserError(
                f"{self._folder} holds experts as 8-bit floats with scales, which from_pretrained cannot bring "
                "together: load it with qlora_native.load_model."
            )
        skip = (OUTPUT_EMBEDDING,) if config.skip_modules is None else config.skip_modules
        sleep_while_busy()
        self._weights = four_bit_weights(model, skip, config.block_size, self._in_fp32)

    def get_quantize_ops(self) -> ConversionOps:
        return _Conversion(self, self._quantized)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How the parts of a stored weight come together: a 4-bit one's, or an 8-bit one's and its scales."""
        names, endings, conversion = ["weight"], ["", SCALE_SUFFIX], _Conversion(self, _unscaled)
        if self.pre_quantized:
            names = [*(rf"experts\.{name}" for name in STACKS), "weight"]
            endings, conversion = _PARTS, _Conversion(self, self._of_its_parts)
        elif not self._scaled:
            return []
        return [
            WeightConverter([name + ending for ending in endings], name, [conversion])
            for name in names
        ]

    def _quantized(self, tensors: dict[str, Any], model: Any, name: str) -> dict[str, Tensor]:
        result = {}
        options = self.quantization_config.options()
        for key in list(tensors):
            tensor = result[key] = tensors.pop(key)
            if key not in self._weights:
                continue
            dense = tensor.mT.contiguous() if self._weights[key] else tensor
            try:
                weight = quantize(dense, **options)
            # Raised after loading, in a sentence: transformers would print a stack trace.
            except ValueError as error:
                reason = first_sentence(error).removeprefix("quantize: ")
                self._refused = (
                    self._refused or f"{self._folder}: weight {key} cannot be quantized: {reason}"
                )
                weight = quantize(torch.zeros_like(dense), **options)
            weight.dtype = self._dtype
            self._trim(tensor.nbytes)  # what was freed so far; the tensor itself goes next time
            result[key] = put_four_bit(model, key, weight)
        return result

    def _of_its_parts(self, tensors: dict[str, Any], model: Any, name: str) -> dict[str, Tensor]:
        """A 4-bit weight of its stored parts, in place of its layer."""
        leaf = name.rpartition(".")[2]
        parts = {key.removeprefix(r"experts\."): value for key, value in tensors.items()}
        if bnb_state_key(parts, leaf) is None:
            return {name: parts[leaf].to(torch.float32 if self._in_fp32(name) else self._dtype)}
        self._weights.setdefault(name, False)
        return {name: put_four_bit(model, name, from_bnb(parts, leaf))}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._refused:
            raise UserError(self._refused)
        compute = self.quantization_config.compute_dtype
        for module in model.modules():
            if isinstance(module, (QuantizedLinear, QuantizedExperts)):
                module.compute_dtype = None if compute is None else getattr(torch, compute)
        model.requires_grad_(False)
        # The parts of a 4-bit weight are saved as state_dict names them: nothing is to be reversed.
        theirs = (
            entry
            for entry in model._weight_conversions
            if not any(isinstance(op, _Conversion) for op in getattr(entry, "operations", ()))
        )
        model._weight_conversions = without_stacks(theirs, model)
        model.load_report = make_report(model, self._folder)
        decode_by_graphs(model)
        trim_heap()
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or self._dtype
        if isinstance(model, Decodes):
            model.__class__ = type(model).__bases__[1]
        with torch.no_grad():
            for path, module in list(model.named_modules()):
                if isinstance(module, QuantizedLinear):
                    put_dense(model, path, module, module.quantized.dequantize(dtype))
            for _, experts, name, weight in list(quantized_stacks(model)):
                take_stack(experts, name, weight.dequantize(dtype))
        for parameter in model.parameters():
            if parameter.dtype == self._dtype:  # what is kept in fp32 stays so
                parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return model

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        if any(getattr(module, "is_sharded", False) for module in model.modules()):
            raise ValueError(
                "save_pretrained: the 4-bit model is sharded over several processes: save the adapter alone, or the "
                "model before it is sharded."
            )
        return super().get_state_dict_and_metadata(model)


class _Conversion(ConversionOps):
    """A function as a step of transformers' loading, which leaves the dtypes of the stored tensors to it."""

    def __init__(self, hf_quantizer: QLoRANativeQuantizer, function: Any) -> None:
        # Of (tensors by name, model, parameter's name).
        self.hf_quantizer, self._function = (hf_quantizer, function)

    def __deepcopy__(self, memo: object) -> _Conversion:
        return self  # transformers copies converters, a parameter each; the quantizer stays one

    def convert(
        self, input_dict: Any, model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> Any:
        for key, value in input_dict.items():
            input_dict[key] = value[0] if isinstance(value, list) else value
        return self._function(input_dict, model, full_layer_name)


def _unscaled(tensors: dict[str, Any], model: Any, name: str) -> dict[str, Tensor]:
    """8-bit floats times the scales of their blocks, as checkpoints of the method "fp8" store them."""
    weight, *scales = tensors.values()
    return {name: unscaled(weight, scales[0], weight.dtype) if scales else weight}
