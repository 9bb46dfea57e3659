"""load_model: a causal LM from a folder, 4-bit, with one tensor at a time in 16 bits."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import integrations
from ..errors import UserError
from ..integrations.experts import without_stacks
from ..ops.quantize_4bit import double_quantize
from ..reference import NESTED_BLOCK
from ..weight import TENSOR_FIELDS, QuantizedWeight, quantize
from .files import some_of
from .layers import OUTPUT_EMBEDDING, four_bit_parts, four_bit_weights, is_four_bit, is_plain_linear
from .source import Source, open_source
from .tree import Tree, first_sentence

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
METHODS = ("rtn",)
TRIM_EVERY_BYTES = 1 << 27


@dataclass(frozen=True)
class LoadReport:
    """What a loaded model is made of, kept as ``model.load_report``.

    Attributes:
        path: the folder or GGUF file it came from.
        bytes_4bit: bytes of the 4-bit weights, their scales included.
        bytes_dense: bytes of every other parameter and buffer.
        dense: bytes of each parameter that is not 4-bit, by name, largest first; tied ones once.
    """

    path: Path
    bytes_4bit: int
    bytes_dense: int
    dense: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model."""
        return self.bytes_4bit + self.bytes_dense

    @property
    def share_4bit(self) -> float:
        """The part of all bytes that is 4-bit weights, 0 to 1."""
        return self.bytes_4bit / self.num_bytes if self.num_bytes else 0.0

    def __str__(self) -> str:
        named = [f"{name} ({num_bytes / 2**20:.1f} MiB)" for name, num_bytes in self.dense.items()]
        return (
            f"{self.num_bytes / 2**20:.1f} MiB, {100 * self.share_4bit:.1f} % of them 4-bit; not 4-bit: "
            f"{some_of(named, 8) or 'nothing'}"
        )


def load_model(
    path: str | os.PathLike[str],
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | int | None = None,
    skip_modules: Iterable[str] = (OUTPUT_EMBEDDING,),
    method: str = "rtn",
    calibration: Any = None,
    fuse: bool = True,
) -> PreTrainedModel:
    """Load any transformers causal LM with its linear layers in 4 bits.

    Tensors are read one at a time, quantised (or cast to ``dtype``) and dropped, so memory peaks at the 4-bit model
    plus the largest tensor. The model comes back in evaluation mode, every parameter frozen; ``model.load_report``
    says what is 4-bit and what is not.

    Args:
        path: a folder with ``config.json`` and safetensors (one file or sharded; fp32, bf16, fp16, or 4-bit in
            bitsandbytes' format), a ``.gguf`` file, or a folder that holds one. GGUF goes through transformers'
            reader, which makes the 16-bit model first.
        quant_type, block_size, double_quant: as :func:`qlora_native.quantize`. Weights that are 4-bit already keep
            what they have.
        dtype: of everything that stays dense, and the dtype that the 4-bit weights stand for: bfloat16, float16 or
            float32.
        device: where the model goes; None is torch's default device.
        skip_modules: linear layers to leave dense: module paths or path endings, with all under them. "lm_head"
            means the output embedding, whatever the model calls it. Tied weights always stay dense.
        method: "rtn", round to nearest.
        calibration: for methods that need data; None with "rtn".
        fuse: give the modules between the products native kernels where they compute the same, as
            :func:`qlora_native.fuse` says. Outputs then agree with transformers' own code to rounding; on a device
            other than a CPU nothing changes.

    Raises:
        UserError: the files are missing, broken, of another model or hold a NaN; the sentence names the file and the
            tensor.
        ValueError: an argument is wrong.
    """
    if dtype not in DTYPES:
        raise ValueError(f"load_model: dtype is {dtype}: expected torch.bfloat16, torch.float16 or torch.float32.")
    if method not in METHODS:
        raise ValueError(f"load_model: method is {method!r}: expected {' or '.join(map(repr, METHODS))}.")
    if calibration is not None:
        raise ValueError(f"load_model: method {method!r} takes no calibration data: leave calibration out.")
    if isinstance(skip_modules, str):
        raise ValueError(f"load_model: skip_modules is the string {skip_modules!r}: expected a list of module names.")
    options: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    quantize(torch.zeros(1), **options)  # refuses wrong options before minutes of reading

    target = torch.get_default_device() if device is None else torch.device(device)
    source = open_source(Path(path), dtype)
    tree = Tree(source.config, dtype, target)
    # A model that is 4-bit already says itself which layers are not.
    weights = {} if source.is_four_bit(tree) else four_bit_weights(tree.model, skip_modules, block_size, tree.in_fp32)

    def is_copied(name: str, stored: torch.dtype) -> bool:
        return name in weights or stored != tree.dtype_of(name) or target.type != "cpu"

    passed = 0
    for name, value, file in source.arrivals(tree, lambda name: True, is_copied, weights.__contains__):
        if isinstance(value, Iterator):
            weight = _quantized_stack(name, value, tree.shapes[name].shape, file, target, options)
            weight.dtype = dtype
            tree.put_quantized(name, weight, False, file)
            passed += 2 * weight.numel()
        elif isinstance(value, QuantizedWeight):
            module = tree.model.get_submodule(name.rpartition(".")[0])
            transposed = is_plain_linear(module) and not isinstance(module, nn.Linear)
            tree.put_quantized(name, value.to(target), transposed, file)
        elif name in weights:
            weight = _quantized(name, value.to(target), file, weights[name], options)
            weight.dtype = dtype  # not that of the file: everything dense is cast likewise
            tree.put_quantized(name, weight, weights[name], file)
        else:
            _check_finite(name, value, file)
            tree.put(name, value, file)
        passed += value.nbytes if isinstance(value, Tensor) else 0
        if passed > TRIM_EVERY_BYTES:
            passed = 0
            give_memory_back()
    model = tree.finish(source.unexpected(tree), str(source.path))
    if (generation := source.generation_config()) is not None:
        model.generation_config = generation
    model._weight_conversions = without_stacks(getattr(model, "_weight_conversions", None) or (), model)
    model.load_report = make_report(model, source.path)
    _set_quantization_config(model, source, dtype, options)
    if fuse:
        integrations.fuse(model)
    give_memory_back()
    return model


def _quantized(name: str, tensor: Tensor, file: str, transposed: bool, options: dict[str, Any]) -> QuantizedWeight:
    if tensor.dtype not in DTYPES:
        raise UserError(f"{file}: weight {name} is {tensor.dtype}: expected float32, bfloat16 or float16.")
    try:
        return quantize(tensor.t().contiguous() if transposed else tensor, **options)
    except ValueError as error:
        reason = first_sentence(error).removeprefix("quantize: ")
        raise UserError(f"{file}: weight {name} cannot be quantised: {reason}") from error


def _quantized_stack(
    name: str,
    slices: Iterator[Tensor],
    shape: torch.Size,
    file: str,
    device: torch.device,
    options: dict[str, Any],
) -> QuantizedWeight:
    """Quantise a stack [E, N, K] from its slices [1, N, K]: the same bytes, without the stack in 16 bits."""
    block, done = options["block_size"], 0
    packed = torch.empty(shape.numel() // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(shape.numel() // block, device=device)
    for one in slices:
        if one.shape != (1, *shape[1:]):
            raise UserError(f"{file}: a part of {name} is {list(one.shape[1:])}, but {list(shape[1:])} by config.json.")
        part = _quantized(name, one.to(device), file, False, {**options, "double_quant": False})
        packed[done // 2 :][: part.packed.numel()] = part.packed
        scales[done // block :][: part.absmax.numel()] = part.absmax
        done += one.numel()
        del part  # before the next is made
    if done != shape.numel():
        raise UserError(f"{file}: {name} has {done // shape[1:].numel()} parts, but {shape[0]} by config.json.")
    about = {name: options[name] for name in ("quant_type", "block_size")}
    weight = QuantizedWeight(packed, scales, shape=shape, dtype=torch.bfloat16, **about)
    if options["double_quant"]:
        codes = torch.empty(scales.numel(), dtype=torch.uint8)
        nested, offset = torch.empty(-(-scales.numel() // NESTED_BLOCK)), torch.empty(())
        double_quantize(scales.cpu(), codes, nested, offset)
        weight.absmax, weight.nested_absmax, weight.nested_offset = (t.to(device) for t in (codes, nested, offset))
    return weight


def _check_finite(name: str, tensor: Tensor, file: str) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.dtype not in (*DTYPES, torch.float64):
        raise UserError(f"{file}: tensor {name} is {tensor.dtype}: expected float32, bfloat16 or float16.")
    low, high = torch.aminmax(tensor)  # one pass without a mask as large as the tensor; both pass a NaN on
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(
            f"{file}: tensor {name} holds a NaN or an infinity: expected finite numbers; copy or train the model again."
        )


def make_report(model: nn.Module, path: Path) -> LoadReport:
    """Count what ``model``, loaded from ``path``, holds."""
    four_bit = four_bit_parts(model)
    scales = {id(getattr(weight, name)) for weight in four_bit.values() for name in TENSOR_FIELDS[1:]}
    dense = {name: tensor.nbytes for name, tensor in model.named_parameters() if name not in four_bit}
    return LoadReport(
        path=path,
        bytes_4bit=sum(weight.nbytes for weight in four_bit.values()),
        bytes_dense=sum(dense.values()) + sum(buffer.nbytes for buffer in model.buffers() if id(buffer) not in scales),
        dense=dict(sorted(dense.items(), key=lambda item: -item[1])),
    )


def _set_quantization_config(
    model: PreTrainedModel, source: Source, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    if not is_four_bit(model):
        model.config.__dict__.pop("quantization_config", None)
        return
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    model.config.quantization_config = source.four_bit_config or bitsandbytes_config(dtype, options, dense)


def bitsandbytes_config(dtype: torch.dtype, options: dict[str, Any], dense: list[str]) -> dict[str, Any]:
    """What transformers writes beside 4-bit weights in bitsandbytes' format, so that it reads the folder again.

    ``options`` are those of :func:`qlora_native.quantize`, ``dense`` the linear layers that are not 4-bit.
    """
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


def give_memory_back() -> None:
    """Return freed heap to the system: glibc keeps it, and tensors of many sizes leave holes that add up to a tenth
    of the model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # musl has none and needs none
            trim(0)
