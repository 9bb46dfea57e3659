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
from qlora_native._native import DTYPE_NUMBER, GGUF_BLOCKS

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
    "linear_cross_entropy": (
        "h T [..., K]; labels int64 [...]; packed? T [N, K]; rows? float [R, K]; row_ids? int64 [R]"
    ),
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
WIDE: dict[torch.dtype | None, torch.dtype] = {
    dtype: torch.promote_types(dtype, torch.float32) for dtype in FLOATS
}
ACCEPTED = {"float": FLOATS, "native": tuple(DTYPE_NUMBER)}
ACCEPTED |= {name: (getattr(torch, name),) for name in ("float32", "int64", "uint8")}


# What a check looks at. The answer depends on nothing else, so it is kept for the next call with operands alike: in
# training, for the next layer. Sizes that are symbols, as in tracing, cannot be looked up and are checked each time.
MOST_KEPT = 4096  # answers
# Of an operand dtype, shape, device and layout, or None. Of a weight: dtype, elements and device of its tensors, and
# whether each is contiguous; its shape, quant_type and block_size.
Facts = tuple[Any, ...]


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
        elements, size = GGUF_BLOCKS.get(self.quant_type, (1, 0))
        if begin % self.block_size or end % elements:  # a block of GGUF's is not divided
            raise ValueError(
                f"a slice of {list(self.shape)} is at element {begin if begin % self.block_size else end}, no multiple "
                f"of block_size {self.block_size}: dequantize the whole weight instead."
            )
        first = begin // self.block_size
        last = -(-end // self.block_size)
        low, high = (first * size, last * size) if size else (begin // 2, (end + 1) // 2)
        shape = [stop - start, *self.shape[1:]]
        part = self._replace(packed=self.packed[low:high], absmax=self.absmax[first:last], shape=shape)
        if self.nested_absmax is None:
            return part
        group, inside = divmod(first, NESTED_BLOCK)  # the first block of scales that the slice touches
        nested = self.nested_absmax.reshape(-1)[group : -(-last // NESTED_BLOCK)]
        if inside == 0:
            return part._replace(nested_absmax=nested)
        scales = reference.scales(
            self.absmax[first - inside : last], nested, self.nested_offset, self.nested_code
        )
        plain = scales[inside:].clone()
        return part._replace(absmax=plain, nested_absmax=None, nested_offset=None, nested_code=None)

    def facts(self) -> Facts:
        """What a check of it looks at."""
        tensors = self[:6]
        parts = [
            None if t is None else (t.dtype, t.numel(), t.device, t.is_contiguous()) for t in tensors
        ]
        return tuple(parts), tuple(self.shape), self.quant_type, self.block_size

    def check(self) -> None:
        """Refuses tensors that do not fit each other in size, dtype and device, or are not contiguous."""
        _check_weight(self.facts())

    def pointers(self) -> tuple[int, ...]:
        """Arguments of the native functions that take a weight, which is to be checked before; 0 for no tensor."""
        (
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            code,
            nested_code,
            shape,
            quant_type,
            block_size,
        ) = self
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


@lru_cache(MOST_KEPT)
def _check_weight(weight: Facts) -> None:
    """Raises ValueError unless all that a weight consists of fits together."""
    facts, shape, number, block_size = weight
    packed, absmax, nested_absmax, nested_offset, *_ = facts
    if packed is None or absmax is None:
        raise ValueError("quantized weight: packed or absmax is None: expected tensors.")
    numel = math.prod(shape)
    is_gguf = number in GGUF_BLOCKS  # whose blocks hold scales and codes
    elements, num_bytes = GGUF_BLOCKS.get(number, (2, 1))
    about = f"quantized weight {list(shape)} in blocks of {block_size}"
    is_whole = (
        block_size == elements and numel % elements == 0
        if is_gguf
        else block_size in reference.BLOCK_SIZES
    )
    if not is_whole or min(shape, default=0) < 0:
        blocks = (
            f"whole blocks of {elements}" if is_gguf else "blocks of a power of two from 32 to 4096"
        )
        raise ValueError(f"{about}: expected sizes of 0 or more, and {blocks}.")
    if is_gguf and any(facts[2:]):
        raise ValueError(
            f"{about}: expected no nested scales and no tables, which lie in the packed bytes."
        )
    if nested_absmax is not None and nested_offset is None:
        raise ValueError(f"{about}: nested_absmax is given, nested_offset is not.")
    scales = 0 if is_gguf else -(-numel // block_size)
    expected = (
        (torch.uint8, -(-numel // elements) * num_bytes),
        (torch.float32 if nested_absmax is None else torch.uint8, scales),
        (torch.float32, -(-scales // NESTED_BLOCK)),
        (torch.float32, 1),
        (torch.float32, 16),
        (torch.float32, 256),
    )
    for name, form, fact in zip(Weight._fields, expected, facts, strict=False):
        if fact is None:
            continue
        dtype, count, device, is_contiguous = fact
        if (dtype, count) != form or not is_contiguous:
            given = f"{dtype} [{count}]{'' if is_contiguous else ', not contiguous'}"
            raise ValueError(
                f"{about}: {name} is {given}: expected {form[1]} contiguous {form[0]} values."
            )
        if device != packed[2]:
            raise ValueError(
                f"quantized weight: {name} is on {device}, packed on {packed[2]}: "
                "move the weight as a whole with .to(device)."
            )


class Operand(NamedTuple):
    """A tensor argument of an op, and what it has to be."""

    name: str
    is_optional: bool
    dtype: str  # T, wide, float, native, or the name of a dtype
    axes: tuple[str, ...]  # names of the sizes; empty where the op checks them

    @classmethod
    def read(cls, entry: str) -> Operand:
        name, dtype, *shape = entry.split(" ", 2)
        axes = shape[0].strip("[]").split(", ") if shape else ()
        return cls(name.rstrip("?"), name.endswith("?"), dtype, tuple(axes))


TABLE = {
    op: [Operand.read(entry) for entry in filter(None, line.split("; "))]
    for op, line in OPERANDS.items()
}


@lru_cache(MOST_KEPT)
def _check(op: str, facts: Facts, weight: Facts | None) -> None:
    """Raises ValueError unless an op's weight and its other operands are as ``OPERANDS`` has them."""
    operands = TABLE[op]
    device = next((found[2] for found in facts if found is not None), None)
    # What T, ... and the names of sizes stand for, as far as the operands before have shown it.
    kind: torch.dtype | None = None
    sizes: dict[str, Sequence[int]] = {}
    if weight is not None:
        (packed, absmax, *_), shape, *_ = weight
        if packed is None:
            raise ValueError(f"{op}: packed is None: expected a tensor.")
        # A weight without scales is dense.
        if absmax is not None or all(operand.name != "packed" for operand in operands):
            _check_weight.__wrapped__(weight)
        device = packed[2]
        if not any({"N", "K"} & set(operand.axes) for operand in operands):
            sizes["..."] = shape
        elif len(shape) == 2:
            sizes = {"N": shape[:1], "K": shape[1:]}
        else:
            raise ValueError(f"{op}: weight is {list(shape)}: expected two dimensions, [N, K].")
    for (name, is_optional, words, axes), found in zip(operands, facts, strict=True):
        if found is None:
            if is_optional:
                continue
            raise ValueError(f"{op}: {name} is None: expected a tensor.")
        dtype, dims, place, layout = found
        if kind is None and dtype in FLOATS:
            kind = dtype
        accepted = ACCEPTED.get(words) or (
            (WIDE.get(kind),) if words == "wide" else (kind,) if kind else FLOATS
        )
        expected = " or ".join(map(str, accepted))
        fits = dtype in accepted and place == device and layout is torch.strided
        if axes:
            split = len(dims) + 1 - len(axes) if axes[0] == "..." else 0
            if split >= 0:  # what no operand has shown yet is as this one has it
                leading = [dims[:split]] if axes[0] == "..." else []
                sizes = dict(zip(axes, [*leading, *zip(dims[split:])])) | sizes  # noqa: B905 - compared below
            want = [size for axis in axes for size in sizes.get(axis.rstrip("?"), (axis,))]
            expected += f" [{', '.join(map(str, want))}]"
            is_broadcast = axes[0] == "B?" and dims[:1] == (1,)
            fits = fits and list(dims[is_broadcast:]) == want[is_broadcast:]
        if not fits:
            given = f"{dtype} {list(dims)} on {place}" + (
                "" if layout is torch.strided else f", {layout}"
            )
            raise ValueError(f"{op}: {name} is {given}: expected {expected} on {device}.")


def check_of(
    op: str, parameters: Sequence[str], is_frozen: bool, is_traced: bool = False
) -> Callable[[Sequence[Any]], None]:
    """The check of an op's arguments, which raises ValueError unless its operands are as ``OPERANDS`` has them.

    ``is_frozen``: behind the parameters comes a :class:`Weight`. ``is_traced``: sizes may be symbols.
    """
    run = _check.__wrapped__ if is_traced else _check
    places = [parameters.index(operand.name) for operand in TABLE[op]]
    packed = parameters.index("packed") if "packed" in parameters else None

    def check(given: Sequence[Any]) -> None:
        facts = [
            None if (t := given[place]) is None else (t.dtype, t.shape, t.device, t.layout)
            for place in places
        ]
        weight: Weight | None = given[-1] if is_frozen else None
        if packed is not None:
            weight = tuple.__new__(Weight, given[packed:])
            if weight.absmax is not None:
                facts[places.index(packed)] = None  # packed bytes, no dense weight
        run(op, tuple(facts), None if weight is None else weight.facts())

    return check
