"""The operands of every op, checked in one place before an address is taken: dtype, shape and device of each.

Kernels make dense operands contiguous themselves; the tensors of a quantized weight have to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native._native import DTYPE_NUMBER, GGUF_BLOCKS, QUANT_TYPES

NESTED_BLOCK = reference.NESTED_BLOCK

# The tensors of each op by name, with dtype and shape. Dtypes: T is one of FLOATS, the same throughout a call; wide is
# T or float32, whichever is wider; float is any of FLOATS; native is what the kernels take. Shapes: a name stands for
# one size throughout a call, B? for B or 1; ... for any number of dimensions, the same throughout a call. Without a
# shape the op itself checks the number of elements. In an op that takes a weight, N and K are its dimensions, and ...
# is its whole shape where the rules name neither. A name with ? may be None.
OPERANDS = {
    "quantize_4bit": "t native",
    "search_scales_4bit": "t native; moment float32; table float32; multiplier float32; offset float32; initial uint8",
    "gptq_4bit": "t native [N, K]; factor float32 [K, K]; order int64 [K]; scales float32",
    "dequantize_4bit": "",
    "dequantize_4bit.out": "out native [...]",
    "linear_4bit": "x T [..., K]; bias? float [N]",
    "linear_4bit_grad_input": "grad_y T [..., N]",
    "lora_linear_4bit": "x T [..., K]; x_lora? T [..., K]; a float [r, K]; b float [N, r]; bias? float [N]",
    "lora_linear_4bit_backward": "x T [..., K]; grad_y T [..., N]; xa T [..., r]; a float [r, K]; b float [N, r]",
    "dense_linear": "x T [..., K]; weight T [N, K]; bias? float [N]",
    "dense_linear_grad_input": "grad_y T [..., N]; weight T [N, K]",
    "dense_linear_grad_weight": "x T [..., K]; grad_y T [..., N]",
    # packed: where the weight is dense
    "linear_cross_entropy": "h T [..., K]; labels int64 [...]; packed? T [N, K]; rows? float [R, K]; row_ids? int64",
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
ACCEPTED = {"float": FLOATS, "native": tuple(DTYPE_NUMBER)}
ACCEPTED |= {name: (getattr(torch, name),) for name in ("float32", "int64", "uint8")}


# What a check looks at. The answer depends on nothing else, so it is kept for the next call with operands alike: in
# training, for the next layer. Sizes that are symbols, as in tracing, cannot be looked up and are checked each time.
KEPT = 4096  # answers
Facts = tuple[torch.dtype, torch.Size, torch.device, Any]  # of an operand, last its layout
# Of a weight: those of its tensors, last if one is contiguous, and its shape, quant_type and block_size.
WeightFacts = tuple[tuple["Facts | None", ...], tuple[int, ...], int, int]


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
        self.check()
        width = math.prod(self.shape[1:])
        begin = start * width
        end = stop * width
        is_gguf = self.quant_type in GGUF_BLOCKS
        if begin % self.block_size or (is_gguf and end % self.block_size):
            where, at = ("ends", end) if begin % self.block_size == 0 else ("begins", begin)
            raise ValueError(
                f"a slice of {list(self.shape)} {where} at element {at}, no multiple of block_size "
                f"{self.block_size}: it does not {where[:-1]} at a block; dequantize the whole weight instead."
            )
        first = begin // self.block_size
        last = -(-end // self.block_size)
        if is_gguf:
            size = GGUF_BLOCKS[self.quant_type][1]
            return self._replace(packed=self.packed[first * size : last * size], shape=[stop - start, *self.shape[1:]])
        part = self._replace(
            packed=self.packed[begin // 2 : (end + 1) // 2],
            absmax=self.absmax[first:last],
            shape=[stop - start, *self.shape[1:]],
        )
        if self.nested_absmax is None:
            return part
        group, inside = divmod(first, NESTED_BLOCK)  # the first block of scales that the slice touches
        nested = self.nested_absmax.reshape(-1)[group : -(-last // NESTED_BLOCK)]
        if inside == 0:
            return part._replace(nested_absmax=nested)
        scales = reference.scales(self.absmax[first - inside : last], nested, self.nested_offset, self.nested_code)
        plain = scales[inside:].clone()
        return part._replace(absmax=plain, nested_absmax=None, nested_offset=None, nested_code=None)

    def facts(self) -> WeightFacts:
        """What a check of it looks at."""
        tensors = self[:6]
        parts = [None if t is None else (t.dtype, t.shape, t.device, t.is_contiguous()) for t in tensors]
        return tuple(parts), tuple(self.shape), self.quant_type, self.block_size

    def check(self) -> None:
        """Refuses tensors that do not fit each other in size, dtype and device, or are not contiguous."""
        refuse(_misfit_of_weight(self.facts()))

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


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the very tensor; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it alone."""
    return part_of(tensor) is not tensor


def refuse(misfit: str | None) -> None:
    """Raises the sentence of a check, if there is one."""
    if misfit is not None:
        raise ValueError(misfit)


def _parts(
    has_nested: bool, shape: Sequence[int], number: int, block_size: int
) -> tuple[str, dict[str, tuple[torch.dtype, int]]]:
    """What is wrong with a weight's numbers, or "", and its tensors by name, with dtype and number of elements."""
    numel = math.prod(shape)
    if number in GGUF_BLOCKS:  # the blocks hold scales and codes
        elements, size = GGUF_BLOCKS[number]
        is_whole = block_size == elements and min(shape, default=0) >= 0 and numel % elements == 0
        wrong = "" if is_whole else f"expected sizes of 0 or more that make whole blocks of {elements}."
        return wrong, {"packed": (torch.uint8, numel // elements * size), "absmax": (torch.float32, 0)}
    if block_size not in reference.BLOCK_SIZES or min(shape, default=0) < 0:
        return "expected sizes of 0 or more, and blocks of a power of two from 32 to 4096.", {}
    blocks = -(-numel // block_size)
    return "", {
        "packed": (torch.uint8, (numel + 1) // 2),
        "absmax": (torch.uint8 if has_nested else torch.float32, blocks),
        "nested_absmax": (torch.float32, -(-blocks // NESTED_BLOCK)),
        "nested_offset": (torch.float32, 1),
        "code": (torch.float32, 16),
        "nested_code": (torch.float32, 256),
    }


@lru_cache(KEPT)
def _misfit_of_weight(weight: WeightFacts) -> str | None:
    """What is wrong with a weight; None if all fits."""
    facts, shape, number, block_size = weight
    packed, absmax, nested_absmax, nested_offset, *_ = facts
    if packed is None or absmax is None:
        return "quantized weight: packed or absmax is None: expected tensors."
    is_gguf = number in GGUF_BLOCKS
    about = f"quantized weight {list(shape)} in {f'{QUANT_TYPES[number]} ' if is_gguf else ''}blocks of {block_size}"
    wrong, parts = _parts(nested_absmax is not None, shape, number, block_size)
    if wrong:
        return f"{about}: {wrong}"
    if is_gguf and any(fact is not None for fact in facts[2:]):
        return f"{about}: expected no nested scales and no tables, which lie in the packed bytes."
    if nested_absmax is not None and nested_offset is None:
        return f"{about}: nested_absmax is given, nested_offset is not."
    for (name, expected), fact in zip(parts.items(), facts, strict=False):
        if fact is None:
            continue
        dtype, dims, device, is_contiguous = fact
        if (dtype, math.prod(dims)) != expected or not is_contiguous:
            given = f"{dtype} {list(dims)}{'' if is_contiguous else ', not contiguous'}"
            return f"{about}: {name} is {given}: expected {expected[1]} contiguous {expected[0]} values."
        if device != packed[2]:
            return (
                f"quantized weight: {name} is on {device}, packed on {packed[2]}: "
                "move the weight as a whole with .to(device)."
            )
    return None


class Operand(NamedTuple):
    """A tensor argument of an op, and what it has to be."""

    name: str
    is_optional: bool
    dtype: str  # T, wide, float, native, or the name of a dtype
    leads: bool  # begins with ...
    axes: tuple[str, ...] | None  # names of the sizes of the other dimensions

    @classmethod
    def read(cls, entry: str) -> Operand:
        name, dtype, *shape = entry.split(" ", 2)
        words = shape[0].strip("[]").split(", ") if shape else []
        axes = tuple(word for word in words if word != "...") if shape else None
        return cls(name.rstrip("?"), name.endswith("?"), dtype, "..." in words, axes)


TABLE = {op: [Operand.read(entry) for entry in filter(None, line.split("; "))] for op, line in OPERANDS.items()}


@lru_cache(KEPT)
def _misfit(op: str, facts: Sequence[Facts | None], weight: WeightFacts | None) -> str | None:
    """What is wrong with an op's weight, or the first of its other operands that is not as ``OPERANDS`` has it.

    None if all fit.
    """
    operands = TABLE[op]
    device = next((found[2] for found in facts if found is not None), None)
    # What T, ... and the names of sizes stand for, as far as the operands before have shown it.
    kind: torch.dtype | None = None
    leading: Sequence[int] | None = None
    sizes: dict[str, int] = {}
    if weight is not None:
        (packed, absmax, *_), shape, *_ = weight
        if packed is None:
            return f"{op}: packed is None: expected a tensor."
        is_dense = absmax is None and any(operand.name == "packed" for operand in operands)
        misfit = None if is_dense else _misfit_of_weight.__wrapped__(weight)
        if misfit is not None:
            return misfit
        device = packed[2]
        if not any({"N", "K"} & set(operand.axes or ()) for operand in operands):
            leading = shape
        elif len(shape) == 2:
            sizes = dict(zip("NK", shape, strict=True))
        else:
            return f"{op}: weight is {list(shape)}: expected two dimensions, [N, K]."
    for (name, is_optional, words, leads, axes), found in zip(operands, facts, strict=True):
        if found is None:
            if is_optional:
                continue
            return f"{op}: {name} is None: expected a tensor."
        dtype, dims, place, layout = found
        if kind is None and dtype in FLOATS:
            kind = dtype
        accepted = ACCEPTED.get(words) or ((WIDE.get(kind),) if words == "wide" else (kind,) if kind else FLOATS)
        expected = " or ".join(map(str, accepted))
        fits = dtype in accepted and place == device and layout is torch.strided
        if axes is not None:
            split = len(dims) - len(axes)
            if split >= 0:  # what no operand has shown yet is as this one has it
                leading = dims[:split] if leads and leading is None else leading
                sizes = dict(zip(axes, dims[split:], strict=True)) | sizes
            first = [] if not leads else ["..."] if leading is None else list(leading)
            want = [*first, *(sizes.get(axis.rstrip("?"), axis) for axis in axes)]
            expected += f" [{', '.join(map(str, want))}]"
            seen = list(dims)
            if axes[:1] == ("B?",) and seen[:1] == [1]:
                seen[0] = sizes["B"]
            fits = fits and seen == want
        if not fits:
            given = f"{dtype} {list(dims)} on {place}" + ("" if layout is torch.strided else f", {layout}")
            return f"{op}: {name} is {given}: expected {expected} on {device}."
    return None


def check_of(
    op: str, parameters: Sequence[str], is_frozen: bool, is_traced: bool = False
) -> Callable[[Sequence[Any]], None]:
    """The check of an op's arguments, which raises ValueError unless its operands are as ``OPERANDS`` has them.

    ``is_frozen``: behind the parameters comes a :class:`Weight`. ``is_traced``: sizes may be symbols.
    """
    misfit = _misfit.__wrapped__ if is_traced else _misfit
    places = [parameters.index(operand.name) for operand in TABLE[op]]
    may_be_dense = "packed" in parameters

    def check(given: Sequence[Any]) -> None:
        tensors = [given[place] for place in places]
        weight: Weight | None = given[-1] if is_frozen else None
        if may_be_dense:
            packed = parameters.index("packed")
            weight = tuple.__new__(Weight, given[packed:])
            if weight.absmax is not None:
                tensors[places.index(packed)] = None  # packed bytes, no dense weight
        facts = [None if t is None else (t.dtype, t.shape, t.device, t.layout) for t in tensors]
        refuse(misfit(op, tuple(facts), None if weight is None else weight.facts()))

    return check
