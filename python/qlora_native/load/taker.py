"""What becomes of a tensor that arrives: dense in the model's dtype, or 4-bit, rounded to nearest."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..calibration.quantize import quantize_calibrated
from ..errors import UserError
from ..ops import _pages
from ..ops.quantize_4bit import double_quantize
from ..reference import NESTED_BLOCK
from ..weight import QuantizedWeight, quantize
from .layers import is_plain_linear
from .source import Arrivals
from .tree import Tree, first_sentence

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRIM_EVERY_BYTES = 1 << 27

Result = TypeVar("Result")


class Taker:
    """Puts tensors into a tree, one after another.

    Args:
        tree: the model. weights: what becomes 4-bit, and whether the model stores it transposed.
        options: of :func:`qlora_native.quantize`. signed: let a scale be negative where that is nearer.
        dtype: that the 4-bit weights stand for.
    """

    def __init__(
        self, tree: Tree, weights: dict[str, bool], options: dict[str, Any], signed: bool, dtype: torch.dtype
    ) -> None:
        self.tree, self.weights, self.options, self.signed, self.dtype = tree, weights, options, signed, dtype
        self._passed = 0

    def is_copied(self, name: str, stored: torch.dtype) -> bool:
        """Whether :meth:`take_all` does not keep the tensor itself."""
        return name in self.weights or stored != self.tree.dtype_of(name) or self.tree.device.type != "cpu"

    def take_all(self, arrivals: Arrivals) -> None:
        """Put everything that arrives in its place."""
        tree = self.tree
        for name, value, file in arrivals:
            if isinstance(value, Iterator):
                shape = tree.shapes[name].shape
                parts = self._quantized_slices(name, value, shape, file)
                self.put_four_bit(name, self.joined(name, parts, shape, file), file)
                self.trim(2 * shape.numel())
            elif isinstance(value, QuantizedWeight):
                module = tree.model.get_submodule(name.rpartition(".")[0])
                transposed = is_plain_linear(module) and not isinstance(module, nn.Linear)
                tree.put_quantized(name, value.to(tree.device), transposed, file)
            elif name in self.weights:
                self.put_four_bit(name, self.nearest(name, value.to(tree.device), file), file)
            else:
                self.put_dense(name, value, file)
            self.trim(value.nbytes if isinstance(value, Tensor) else 0)

    def put_dense(self, name: str, value: Tensor, file: str) -> None:
        """As it is, in the model's dtype. UserError for a NaN or an infinity."""
        _check_finite(name, value, file)
        self.tree.put(name, value, file)

    def put_four_bit(self, name: str, weight: QuantizedWeight, file: str) -> None:
        """In the model's dtype, whatever that of the file: everything dense is cast likewise."""
        weight.dtype = self.dtype
        _pages.interleave(weight.packed)
        self.tree.put_quantized(name, weight, self.weights[name], file)

    def nearest(self, name: str, tensor: Tensor, file: str, **changes: Any) -> QuantizedWeight:
        """The tensor of the parameter ``name``, or one slice of it, each element rounded to the nearest level;
        ``changes`` are to the options."""
        if self.signed:
            return self.quantized(name, tensor, file, _signed, **changes)
        return self.quantized(name, tensor, file, quantize, **changes)

    def quantized(
        self, name: str, tensor: Tensor, file: str, function: Callable[..., Result], **changes: Any
    ) -> Result:
        """The tensor [out, in] by ``function`` with the options; what is wrong with it is told as of ``name``."""
        if tensor.dtype not in DTYPES:
            raise UserError(f"{file}: weight {name} is {tensor.dtype}: expected float32, bfloat16 or float16.")
        turned = tensor.t().contiguous() if self.weights[name] else tensor
        try:
            return function(turned, **{**self.options, **changes})
        except ValueError as error:
            reason = re.sub(r"^quantize\w*: ", "", first_sentence(error))
            raise UserError(f"{file}: weight {name} cannot be quantized: {reason}") from error

    def _quantized_slices(
        self, name: str, slices: Iterator[Tensor], shape: torch.Size, file: str
    ) -> Iterator[QuantizedWeight]:
        for one in slices:
            if one.shape != (1, *shape[1:]):
                raise UserError(
                    f"{file}: a part of {name} is {list(one.shape[1:])}, but {list(shape[1:])} by config.json."
                )
            yield self.nearest(name, one.to(self.tree.device), file, double_quant=False)

    def joined(self, name: str, parts: Iterator[QuantizedWeight], shape: torch.Size, file: str) -> QuantizedWeight:
        """A stack [E, N, K] of its slices, whose scales are in fp32: the bytes of the stack quantized whole, without
        the stack in 16 bits."""
        block, done, device = self.options["block_size"], 0, self.tree.device
        packed = torch.empty(shape.numel() // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(shape.numel() // block, device=device)
        for part in parts:
            packed[done // 2 :][: part.packed.numel()] = part.packed
            scales[done // block :][: part.absmax.numel()] = part.absmax
            done += part.numel()
            del part  # before the next is made
        if done != shape.numel():
            raise UserError(f"{file}: {name} has {done // shape[1:].numel()} parts, but {shape[0]} by config.json.")
        about = {key: self.options[key] for key in ("quant_type", "block_size")}
        weight = QuantizedWeight(packed, scales, shape=shape, dtype=self.dtype, **about)
        if self.options["double_quant"]:
            codes = torch.empty(scales.numel(), dtype=torch.uint8)
            nested, offset = torch.empty(-(-scales.numel() // NESTED_BLOCK)), torch.empty(())
            double_quantize(scales.cpu(), codes, nested, offset)
            weight.absmax, weight.nested_absmax, weight.nested_offset = (t.to(device) for t in (codes, nested, offset))
        return weight

    def trim(self, num_bytes: int) -> None:
        """Count bytes that were passed on, and give memory back now and then."""
        self._passed += num_bytes
        if self._passed > TRIM_EVERY_BYTES:
            self._passed = 0
            give_memory_back()


def _signed(tensor: Tensor, **options: Any) -> QuantizedWeight:
    return quantize_calibrated(tensor, "rtn_signed", **options).weight


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


def give_memory_back() -> None:
    """Return freed heap to the system: glibc keeps it, and tensors of many sizes leave holes that add up to a tenth
    of the model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # musl has none and needs none
            trim(0)
