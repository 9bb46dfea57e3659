"""The operands of every op, checked in one place before an address is taken: dtype, shape and device of each.

Kernels make dense operands contiguous themselves; the tensors of a quantized weight have to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, wraps
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native._native import DTYPE_NUMBER, GGUF_BLOCKS, QUANT_TYPES

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
    # packed: where the weight is dense
    "linear_cross_entropy": "h T [..., K]; labels int64 [...]; packed T [N, K]; rows float [R, K]; row_ids int64",
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
NATIVE = tuple(DTYPE_NUMBER)
WIDE: dict[torch.dtype | None, torch.dtype] = {dtype: torch.promote_types(dtype, torch.float32) for dtype in FLOATS}


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
        begin, end = start * width, stop * width
        is_gguf = self.quant_type in GGUF_BLOCKS
        if begin % self.block_size or (is_gguf and end % self.block_size):
            where, at = ("ends", end) if begin % self.block_size == 0 else ("begins", begin)
            raise ValueError(
                f"a slice of {list(self.shape)} {where} at element {at}, no multiple of block_size "
                f"{self.block_size}: it does not {where[:-1]} at a block; dequantize the whole weight instead."
            )
        first, last = begin // self.block_size, -(-end // self.block_size)
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

    def check(self) -> None:
        """Refuses tensors that do not fit each other in size, dtype and device, or are not contiguous."""
        _check_parts(*self)

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
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


# The tensors of a weight in nf4 or fp4, with dtype and number of elements as expressions.
PARTS = {
    "packed": ("uint8", "(numel + 1) // 2"),
    "absmax": ("(float32 if nested_absmax is None else uint8)", "blocks"),
    "nested_absmax": ("float32", f"-(-blocks // {NESTED_BLOCK})"),
    "nested_offset": ("float32", "1"),
    "code": ("float32", "16"),
    "nested_code": ("float32", "256"),
}
# What the source of a check may name.
SCOPE = {"prod": math.prod, "FLOATS": FLOATS, "NATIVE": NATIVE, "WIDE": WIDE, "BLOCK_SIZES": reference.BLOCK_SIZES}
SCOPE["GGUF_BLOCKS"] = GGUF_BLOCKS
SCOPE |= {name: getattr(torch, name) for name in ("uint8", "int64", "float32", "strided")}


class Operand(NamedTuple):
    """A tensor argument of an op, and what it has to be."""

    name: str
    dtype: str  # T, wide, float, native, or the name of a dtype
    leads: bool  # begins with ...
    axes: tuple[str, ...] | None  # names of the sizes of the other dimensions

    @classmethod
    def read(cls, entry: str) -> Operand:
        name, dtype, *shape = entry.split(" ", 2)
        words = shape[0].strip("[]").split(", ") if shape else []
        return cls(name, dtype, "..." in words, tuple(w for w in words if w != "...") if shape else None)

    def misfit(
        self,
        op: str,
        tensor: Tensor,
        device: torch.device,
        kind: torch.dtype | None,
        leading: Sequence[int] | None,
        sizes: dict[str, int],
    ) -> ValueError:
        """What it is and what it has to be, in words, with the T, the leading dimensions and the sizes known so far.

        What is not known before is as the tensor has it.
        """
        if kind is None and tensor.dtype in FLOATS:
            kind = tensor.dtype
        known: dict[str, Sequence[object]] = {"T": FLOATS if kind is None else (kind,), "wide": (WIDE.get(kind),)}
        known |= {"float": FLOATS, "native": NATIVE}
        expected = " or ".join(map(str, known.get(self.dtype) or (SCOPE[self.dtype],)))
        if self.axes is not None:
            split = len(tensor.shape) - len(self.axes)
            if split >= 0:
                leading = tensor.shape[:split] if leading is None else leading
                sizes = dict(zip(self.axes, tensor.shape[split:], strict=True)) | sizes
            first = (["..."] if leading is None else list(map(str, leading))) if self.leads else []
            expected += f" [{', '.join([*first, *(str(sizes.get(a.rstrip('?'), a)) for a in self.axes)])}]"
        given = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        if tensor.layout is not torch.strided:
            given += f", {tensor.layout}"
        return ValueError(f"{op}: {self.name} is {given}: expected {expected} on {device}.")


def _missing(op: str, tensors: dict[str, Tensor | None]) -> ValueError:
    names = " and ".join(name for name, tensor in tensors.items() if tensor is None)
    return ValueError(f"{op}: {names} is None: expected a tensor.")


def _misfit_of_sizes(shape: Sequence[int], block_size: int) -> ValueError:
    return ValueError(
        f"quantized weight {list(shape)} in blocks of {block_size}: expected sizes of 0 or more, and blocks of a power "
        "of two from 32 to 4096."
    )


def _misfit_of_part(
    name: str, tensor: Tensor, dtype: torch.dtype, count: int, shape: Sequence[int], block_size: int
) -> ValueError:
    return ValueError(
        f"quantized weight {list(shape)} in blocks of {block_size}: {name} is {tensor.dtype} "
        f"{list(tensor.shape)} with strides {tensor.stride()}: expected {count} contiguous {dtype} values."
    )


def _misplaced(name: str, tensor: Tensor, device: torch.device) -> ValueError:
    return ValueError(
        f"quantized weight: {name} is on {tensor.device}, packed on {device}: "
        "move the weight as a whole with .to(device)."
    )


def _check_gguf(
    packed: Tensor, absmax: Tensor, others: Sequence[Tensor | None], shape: Sequence[int], number: int, block_size: int
) -> None:
    """Refuses tensors that are not those of a GGUF type: its blocks in ``packed``, no element in ``absmax``."""
    about = f"quantized weight {list(shape)} in {QUANT_TYPES[number]} blocks of {block_size}"
    (elements, size), numel = GGUF_BLOCKS[number], math.prod(shape)
    if block_size != elements or min(shape, default=0) < 0 or numel % elements:
        raise ValueError(f"{about}: expected sizes of 0 or more that make whole blocks of {elements}.")
    if any(other is not None for other in others):
        raise ValueError(f"{about}: expected no nested scales and no tables, which lie in the packed bytes.")
    for name, tensor, dtype, count in (
        ("packed", packed, torch.uint8, numel // elements * size),
        ("absmax", absmax, torch.float32, 0),
    ):
        if tensor.dtype is not dtype or tensor.numel() != count or not tensor.is_contiguous():
            given = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            raise ValueError(f"{about}: {name} is {given}: expected {count} contiguous {dtype} values.")
        if tensor.device != packed.device:
            raise _misplaced(name, tensor, packed.device)


def _lines_of_parts() -> Iterator[str]:
    """The check of a quantized weight's tensors, as source."""
    yield "if quant_type in GGUF_BLOCKS:"
    yield "    others = nested_absmax, nested_offset, code, nested_code"
    yield "    check_gguf(packed, absmax, others, shape, quant_type, block_size)"
    yield "else:"
    yield from (f"    {line}" for line in _lines_of_codebook_parts())


def _lines_of_codebook_parts() -> Iterator[str]:
    yield "if block_size not in BLOCK_SIZES or min(shape, default=0) < 0:"
    yield "    raise misfit_of_sizes(shape, block_size)"
    yield "numel = prod(shape)"
    yield "blocks = -(-numel // block_size)"
    yield "if nested_absmax is not None and nested_offset is None:"
    yield "    raise ValueError(f'quantized weight {list(shape)}: nested_absmax is given, nested_offset is not.')"
    for name, (dtype, count) in PARTS.items():
        yield f"if {name} is not None:"
        yield f"    if {name}.dtype is not {dtype} or {name}.numel() != {count} or not {name}.is_contiguous():"
        yield f"        raise misfit_of_part({name!r}, {name}, {dtype}, {count}, shape, block_size)"
        if name != "packed":
            yield f"    if {name}.device != device:"
            yield f"        raise misplaced({name!r}, {name}, device)"


def _lines_of_operands(op: str, operands: Sequence[Operand], has_weight: bool) -> Iterator[str]:
    """The check of an op's other tensors, as source. What is compared is known once an operand before has shown it."""
    kind = leading = None
    sizes: list[str] = []
    if has_weight and any({"N", "K"} & set(operand.axes or ()) for operand in operands):
        sizes = ["N", "K"]
        yield "if len(shape) != 2:"
        yield f"    raise ValueError(f'{op}: weight is {{list(shape)}}: expected two dimensions, [N, K].')"
        yield "size_N, size_K = shape"
    elif has_weight:
        leading = "leading"
        yield "leading = tuple(shape)"
    elif operands:
        yield f"device = {operands[0].name}.device"
    for i, (name, dtype, leads, axes) in enumerate(operands):
        yield "if absmax is None:" if name == "packed" else f"if {name} is not None:"
        known = ", ".join(f"{axis!r}: size_{axis}" for axis in sizes)
        refuse = f"        raise misfit[{i}]({op!r}, {name}, device, {kind}, {leading}, {{{known}}})"
        accepted = {"T": "is kind" if kind else "in FLOATS", "wide": "is WIDE[kind]"}
        accepted |= {"float": "in FLOATS", "native": "in NATIVE"}
        conditions = [f"{name}.dtype {accepted.get(dtype, f'is {dtype}')}", f"{name}.device == device"]
        conditions.append(f"{name}.layout is strided")
        found = []  # what it shows
        if axes is not None:
            yield f"    dims = {name}.shape"
            count, shows_leading = len(axes), leads and leading is None
            if shows_leading or not all(axis in sizes for axis in axes):
                before = f"dims[:{-count}]" if count else "dims"
                if shows_leading:
                    conditions.append(f"len(dims) >= {count}")
                    found.append(f"    leading = {before}")
                elif leads:
                    conditions += [f"len(dims) == len(leading) + {count}", f"{before} == leading"]
                else:
                    conditions.append(f"len(dims) == {count}")
                for j, axis in enumerate(axes, -count):
                    size = axis.rstrip("?")
                    if size not in sizes:
                        found.append(f"    size_{size} = dims[{j}]")
                        sizes.append(size)
                    else:
                        conditions.append(f"dims[{j}] {f'== size_{size}' if axis == size else f'in (1, size_{size})'}")
                leading = "leading" if leads else leading
            else:
                whole = "".join([*(["*leading, "] if leads else []), *(f"size_{axis}, " for axis in axes)])
                conditions.append(f"dims == ({whole})")
        if dtype == "T" and kind is None:
            kind = "kind"
            found.append(f"    kind = {name}.dtype")
        yield f"    if not ({' and '.join(conditions)}):"
        yield refuse
        yield from found


@cache
def _code(source: str) -> CodeType:
    return compile(source, "<operands>", "exec")


def _made(parameters: Iterable[str], lines: Iterable[str], **names: Any) -> Callable[..., Any]:
    """The function of these lines."""
    body = "".join(f"    {line}\n" for line in lines)
    scope = {**SCOPE, **names, "misfit_of_part": _misfit_of_part, "misplaced": _misplaced, "missing": _missing}
    scope |= {"misfit_of_sizes": _misfit_of_sizes, "check_gguf": _check_gguf}
    exec(_code(f"def made({', '.join(parameters)}):\n{body}"), scope)
    made: Callable[..., Any] = scope["made"]
    return made


_check_parts = _made(Weight._fields, ["device = packed.device", *_lines_of_parts()])


def checked(op: str, schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The op's function behind a check of its operands, which raises ValueError unless they are as ``OPERANDS`` has it.

    Every call of every op goes through it, so it is written out, comparison by comparison, from the tables.
    """
    arguments = [argument.split() for argument in schema[1 : schema.index(") ->")].split(", ")]
    parameters = [words[-1] for words in arguments]
    operands = [Operand.read(entry) for entry in filter(None, OPERANDS[op].split("; "))]
    has_weight = parameters[-len(Weight._fields) :] == list(Weight._fields)
    may_be_dense = any(operand.name == "packed" for operand in operands)
    optional = {words[-1] for words in arguments if words[0] == "Tensor?"}
    required = [operand.name for operand in operands if operand.name not in optional | {"packed"}]
    required += ["packed"] if may_be_dense else ["packed", "absmax"] if has_weight else []
    lines = []
    if required:
        lines.append(f"if {' or '.join(f'{name} is None' for name in required)}:")
        lines.append(f"    raise missing({op!r}, {{{', '.join(f'{name!r}: {name}' for name in required)}}})")
    if has_weight:
        lines += ["device = packed.device", "if absmax is not None:", *(f"    {line}" for line in _lines_of_parts())]
    lines += [*_lines_of_operands(op, operands, has_weight), f"return function({', '.join(parameters)})"]
    misfits = [operand.misfit for operand in operands]
    return wraps(function)(_made(parameters, lines, function=function, misfit=misfits))
