"""The operands of every op, checked in one place before an address is taken: dtype, shape and device of each.

Kernels make dense operands contiguous themselves; the tensors of a quantized weight have to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native._native import DTYPE_NUMBER

NESTED_BLOCK = reference.NESTED_BLOCK

# The tensors of each op by name, with dtype and shape. Dtypes: T is one of FLOATS, the same throughout a call; wide is
# T or float32, whichever is wider; float is any of FLOATS; native is what the kernels take. Shapes: a name stands for
# one size throughout a call; ... for any number of dimensions, the same throughout a call; B? for B or 1. Without a
# shape the op itself checks the number of elements. In an op that takes a weight, N and K are its dimensions, and ...
# is its whole shape where the rules name neither.
OPERANDS = {
    "quantize_4bit": "t native",
    "search_scales_4bit": "t native; moment float32; table float32; multiplier float32; offset float32; initial uint8",
    "gptq_4bit": "t native [N, K]; factor float32 [K, K]; order int64 [K]; scales float32",
    "dequantize_4bit": "",
    "dequantize_4bit.out": "out native [...]",
    "linear_4bit": "x T [..., K]; bias float [N]",
    "linear_4bit_grad_input": "grad_y T [..., N]",
    "lora_linear_4bit": "x T [..., K]; x_lora T [..., K]; a float [r, K]; b float [N, r]; bias float [N]",
    "lora_linear_4bit_backward": "x T [..., K]; grad_y T [..., N]; xa T [..., r]; a float [r, K]; b float [N, r]",
    "dense_linear": "x T [..., K]; weight T [N, K]; bias float [N]",
    "dense_linear_grad_input": "grad_y T [..., N]; weight T [N, K]",
    "dense_linear_grad_weight": "x T [..., K]; grad_y T [..., N]",
    "linear_cross_entropy": "h T [..., K]; labels int64 [...]; packed T [N, K]",  # packed: where the weight is dense
    "adamw_step": "",  # lists: _optim checks them
    "lion_step": "",
    "gradient_norm": "",
    "causal_attention": "q T [B, H, L, D]; k T [B, G, L, D]; v T [B, G, L, D]",
    "causal_attention_backward": (
        "q T [B, H, L, D]; k T [B, G, L, D]; v T [B, G, L, D]; grad_out T [B, H, L, D]; out T [B, H, L, D]; "
        "lse wide [B, H, L]"
    ),
    "rms_norm": "x T [..., K]; weight T [K]",
    "rms_norm_backward": "x T [..., K]; grad_y T [..., K]; weight T [K]; rstd wide [...]",
    "rotary": "x T [B, H, L, D]; cos T [B?, L, D]; sin T [B?, L, D]",
    "swiglu": "gate T [...]; up T [...]",
    "swiglu_backward": "gate T [...]; grad_y T [...]; up T [...]",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDE: dict[torch.dtype | None, torch.dtype] = {dtype: torch.promote_types(dtype, torch.float32) for dtype in FLOATS}
DTYPES = {"T": FLOATS, "float": FLOATS, "native": tuple(DTYPE_NUMBER)}


class Weight(NamedTuple):
    """The weight arguments of an op, by name."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    code: Tensor | None
    nested_code: Tensor | None
    shape: Sequence[int]
    quant_type: int
    block_size: int

    def slice(self, start: int, stop: int) -> Weight:
        """Elements [start:stop] of the first dimension: views, but for double-quantized scales that do not begin at a
        block of scales, which are decoded to fp32. Raises ValueError if the slice does not begin at a block."""
        width = math.prod(self.shape[1:])
        begin, end = start * width, stop * width
        if begin % self.block_size:
            raise ValueError(
                f"a slice of {list(self.shape)} begins at element {begin}, no multiple of block_size "
                f"{self.block_size}: it does not begin at a block; dequantize the whole weight instead."
            )
        first, last = begin // self.block_size, -(-end // self.block_size)
        part = self._replace(
            packed=self.packed[begin // 2 : (end + 1) // 2],
            absmax=self.absmax[first:last],
            shape=[stop - start, *self.shape[1:]],
        )
        if self.nested_absmax is None:
            return part
        group, inside = divmod(first, NESTED_BLOCK)  # the first block of scales that the slice touches
        nested = self.nested_absmax[group : -(-last // NESTED_BLOCK)]
        if inside == 0:
            return part._replace(nested_absmax=nested)
        scales = reference.scales(self.absmax[first - inside : last], nested, self.nested_offset, self.nested_code)
        plain = scales[inside:].clone()
        return part._replace(absmax=plain, nested_absmax=None, nested_offset=None, nested_code=None)

    def check(self) -> None:
        """Refuses tensors that do not fit each other in size, dtype and device, or are not contiguous."""
        packed, absmax, nested_absmax, nested_offset, code, nested_code, shape, _, block_size = self
        numel = math.prod(shape)
        blocks = -(-numel // block_size)
        device = packed.device
        parts = [
            ("packed", packed, torch.uint8, (numel + 1) // 2),
            ("absmax", absmax, torch.float32 if nested_absmax is None else torch.uint8, blocks),
        ]
        if nested_absmax is not None:
            if nested_offset is None:
                raise ValueError(f"quantized weight {list(shape)}: nested_absmax is given, nested_offset is not.")
            parts.append(("nested_absmax", nested_absmax, torch.float32, -(-blocks // NESTED_BLOCK)))
            parts.append(("nested_offset", nested_offset, torch.float32, 1))
        if nested_code is not None:
            parts.append(("nested_code", nested_code, torch.float32, 256))
        if code is not None:
            parts.append(("code", code, torch.float32, 16))
        for name, tensor, dtype, count in parts:
            if tensor.dtype is not dtype or tensor.numel() != count or not tensor.is_contiguous():
                raise ValueError(
                    f"quantized weight {list(shape)} in blocks of {block_size}: {name} is {tensor.dtype} "
                    f"{list(tensor.shape)} with strides {tensor.stride()}: expected {count} contiguous {dtype} values."
                )
            if tensor.device != device:
                raise ValueError(
                    f"quantized weight: {name} is on {tensor.device}, packed on {device}: "
                    "move the weight as a whole with .to(device)."
                )

    def pointers(self) -> tuple[int, ...]:
        """Arguments of the native functions that take a weight, which is to be checked before; 0 for no tensor."""
        packed, absmax, nested_absmax, nested_offset, code, nested_code, shape, quant_type, block_size = self
        return (
            packed.data_ptr(),
            absmax.data_ptr() if nested_absmax is None else 0,
            0 if nested_absmax is None else absmax.data_ptr(),
            0 if nested_absmax is None else nested_absmax.data_ptr(),
            0 if nested_offset is None else nested_offset.data_ptr(),
            0 if nested_code is None else nested_code.data_ptr(),
            0 if code is None else code.data_ptr(),
            quant_type,
            math.prod(shape),
            block_size,
        )


class Operand(NamedTuple):
    """A tensor argument of an op, and what it has to be."""

    position: int
    name: str
    dtype: str  # a word of DTYPES, "wide", or the name of a dtype
    allowed: tuple[torch.dtype, ...]  # empty for "wide"
    leads: bool  # begins with ...
    axes: tuple[str, ...] | None  # names of the sizes of the other dimensions

    def expected(self, kind: torch.dtype | None, leading: Sequence[int] | None, sizes: dict[str, int]) -> str:
        """What it has to be, in words, with the T, the leading dimensions and the sizes that are known."""
        known = {"T": kind, "wide": WIDE.get(kind)}.get(self.dtype)
        dtype = " or ".join(map(str, self.allowed if known is None else [known]))
        if self.axes is None:
            return dtype
        first = ["..."] if leading is None else list(map(str, leading))
        return f"{dtype} [{', '.join([*(first if self.leads else []), *(str(sizes.get(a, a)) for a in self.axes)])}]"


class Rule(NamedTuple):
    """What an op takes."""

    op: str
    operands: tuple[Operand, ...]
    has_weight: bool  # its last arguments
    is_matrix: bool  # of two dimensions
    may_be_one: frozenset[str]  # sizes in whose place 1 will do


def rule_of(op: str, schema: str) -> Rule:
    """The rule of an op's entry in ``OPERANDS``, for the arguments of its schema."""
    names = [argument.split()[-1] for argument in schema[1 : schema.index(") ->")].split(", ")]
    operands = []
    may_be_one: set[str] = set()
    for line in filter(None, OPERANDS[op].split("; ")):
        name, dtype, *shape = line.split(" ", 2)
        allowed = () if dtype == "wide" else DTYPES.get(dtype) or (getattr(torch, dtype),)
        words = shape[0].strip("[]").split(", ") if shape else []
        axes = tuple(word.rstrip("?") for word in words if word != "...")
        may_be_one |= {word.rstrip("?") for word in words if word.endswith("?")}
        operands.append(Operand(names.index(name), name, dtype, allowed, "..." in words, axes if shape else None))
    has_weight = names[-len(Weight._fields) :] == list(Weight._fields)
    is_matrix = any({"N", "K"} & set(operand.axes or ()) for operand in operands)
    return Rule(op, tuple(operands), has_weight, is_matrix, frozenset(may_be_one))


def check(rule: Rule, arguments: tuple[Any, ...]) -> None:
    """Refuses the arguments of a call, with ValueError, unless every operand is as the rule has it.

    Every call of every op comes through here: nothing is built that a call which fits does not need.
    """
    sizes: dict[str, int] = {}
    leading = kind = device = None
    is_quantized = False
    if rule.has_weight:
        packed, absmax, *_, shape, _, _ = weight = arguments[-9:]
        device, is_quantized = packed.device, absmax is not None
        if is_quantized:
            Weight(*weight).check()
        if not rule.is_matrix:
            leading = tuple(shape)
        elif len(shape) == 2:
            sizes["N"], sizes["K"] = shape
        else:
            raise ValueError(f"{rule.op}: weight is {list(shape)}: expected two dimensions, [N, K].")
    for operand in rule.operands:
        position, name, word, allowed, leads, axes = operand
        tensor = arguments[position]
        if tensor is None or (is_quantized and name == "packed"):
            continue
        dtype = tensor.dtype
        if word == "T":
            fits = dtype in allowed if kind is None else dtype is kind
            kind = kind or dtype
        elif word == "wide":
            fits = dtype is WIDE[kind]
        else:
            fits = dtype in allowed
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            fits = False
        if axes is not None:
            shape = tensor.shape
            if leads:
                split = len(shape) - len(axes)
                first = shape[:split] if split > 0 else ()
                if leading is None:
                    leading = first
                fits = fits and split >= 0 and first == leading
                shape = shape[split:] if split > 0 else shape
            if len(shape) != len(axes):
                fits = False
            elif fits:
                for axis, size in zip(axes, shape):  # noqa: B905 - of one length
                    if axis not in sizes:
                        sizes[axis] = size
                    elif sizes[axis] != size and not (size == 1 and axis in rule.may_be_one):
                        fits = False
        if not fits:
            raise ValueError(
                f"{rule.op}: {name} is {dtype} {list(tensor.shape)} on {tensor.device}: expected "
                f"{operand.expected(kind, leading, sizes)} on {device}."
            )
