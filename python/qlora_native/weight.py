"""A quantized weight as one value, and the tensors under which bitsandbytes stores it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_native import _native, reference
from qlora_native.ops._operands import Weight
from qlora_native.ops.linear_4bit import Prepared
from qlora_native.ops.quantize_4bit import empty_outputs

# Fields that hold tensors, in the order in which ops take them.
TENSOR_FIELDS = ("packed", "absmax", "nested_absmax", "nested_offset", "code", "nested_code")
CALIBRATED = ("wmse", "gptq")  # methods of quantizing that need data
METHODS = ("rtn", *CALIBRATED)
MOST_SCALE = 65504  # float16's largest number: no weight of a model that was ever run is as large
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


class QuantizedWeight:
    """A frozen tensor in 4 bits (NF4 or FP4) with one scale a block, or in a block format of GGUF as the file holds it.

    Blocks of ``block_size`` elements run over the flattened tensor. In NF4 and FP4 element 2i lies in the high nibble
    of byte i; the layout is bitsandbytes' (see docs/format.md). A GGUF format's blocks hold scales and codes, and the
    tensor is whole blocks.

    Attributes:
        packed: uint8 [ceil(n/2)], two codes a byte; of a GGUF format uint8 [bytes], the tensor's bytes in the file.
        absmax: fp32 [blocks], or uint8 [blocks] codes when double-quantized; of a GGUF format fp32 [0].
        nested_absmax: fp32 [ceil(blocks/256)], None unless double-quantized.
        nested_offset: fp32 [], None unless double-quantized.
        code: fp32 [16] levels of a checkpoint that differ from the built-in ones, else None.
        nested_code: fp32 [256], likewise.
        shape: torch.Size of the dense tensor.
        dtype: dtype of the dense tensor, and the default of :meth:`dequantize`.
        quant_type: "nf4", "fp4", or of GGUF q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, iq4_nl or mxfp4.
        block_size: elements a scale, a power of two from 32 to 4096; of a GGUF format its elements a block, 32 or 256.
        storage_dtype: dtype under which :func:`to_bnb` stores the packed bytes, uint8 by default.
    """

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        *,
        shape: Iterable[int],
        dtype: torch.dtype,
        quant_type: str = "nf4",
        block_size: int = 64,
        nested_absmax: Tensor | None = None,
        nested_offset: Tensor | None = None,
        code: Tensor | None = None,
        nested_code: Tensor | None = None,
        storage_dtype: torch.dtype = torch.uint8,
    ) -> None:
        given = (packed, absmax, nested_absmax, nested_offset, code, nested_code)
        for name, tensor in zip(TENSOR_FIELDS, given, strict=True):
            if not isinstance(tensor, Tensor) and (tensor is not None or name in ("packed", "absmax")):
                kind = type(tensor).__name__
                raise TypeError(f"QuantizedWeight: {name} is a {kind}: expected a tensor.")
        self.packed = packed
        self.absmax = absmax
        self.nested_absmax = nested_absmax
        self.nested_offset = nested_offset
        self.code = code
        self.nested_code = nested_code
        self.shape = torch.Size(shape)
        if min(self.shape, default=0) < 0:
            raise ValueError(
                f"QuantizedWeight: shape is {list(self.shape)}: expected sizes of 0 or more."
            )
        self.dtype = dtype
        self.quant_type = quant_type
        self.block_size = block_size
        self.storage_dtype = storage_dtype

    @classmethod
    def empty(
        cls,
        shape: Iterable[int],
        *,
        dtype: torch.dtype,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
    ) -> QuantizedWeight:
        """A weight whose tensors are not initialized; "meta" is allowed as its device.

        The blocks of a GGUF format are its own: ``block_size`` and ``double_quant`` are for NF4 and FP4.
        """
        shape = torch.Size(shape)
        where = torch.get_default_device() if device is None else torch.device(device)
        if sizes := _native.GGUF_BLOCKS.get(_native.quant_type_number(quant_type)):
            packed = torch.empty(shape.numel() // sizes[0] * sizes[1], dtype=torch.uint8, device=where)
            return cls.of_blocks(packed, shape=shape, dtype=dtype, quant_type=quant_type)
        packed, absmax, *nested = empty_outputs(shape.numel(), where, block_size, double_quant)
        scales: Any = dict(zip(TENSOR_FIELDS[2:4], nested if double_quant else (), strict=False))
        return cls(
            packed,
            absmax,
            shape=shape,
            dtype=dtype,
            quant_type=quant_type,
            block_size=block_size,
            **scales,
        )

    @classmethod
    def of_blocks(
        cls, packed: Tensor, *, shape: Iterable[int], dtype: torch.dtype, quant_type: str
    ) -> QuantizedWeight:
        """A weight over the blocks of a GGUF format, uint8 [bytes], without copying them.

        Raises ValueError for another type, or for bytes that are not those of ``shape``.
        """
        sizes = _native.GGUF_BLOCKS.get(_native.quant_type_number(quant_type))
        if sizes is None:
            raise ValueError(
                f"of_blocks: quant_type is {quant_type!r}: expected one of GGUF's block formats."
            )
        absmax = torch.empty(0, dtype=torch.float32, device=packed.device)
        made = cls(
            packed, absmax, shape=shape, dtype=dtype, quant_type=quant_type, block_size=sizes[0]
        )
        made.op_args().check()
        return made

    @property
    def is_gguf(self) -> bool:
        """Whether it is in a block format of GGUF."""
        return self.op_args().quant_type in _native.GGUF_BLOCKS

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, scales and maps included."""
        return sum(t.nbytes for t in self.op_args()[:6] if t is not None)

    def numel(self) -> int:
        """Elements of the dense tensor."""
        return math.prod(self.shape)

    def op_args(self) -> Weight:
        """The weight arguments of ``torch.ops.qlora_native.*``."""
        fields = (
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.code,
            self.nested_code,
            list(self.shape),  # which an op reads faster than a torch.Size
            _native.quant_type_number(self.quant_type),
            self.block_size,
        )
        # In half the time of Weight(...), for products of one token.
        return tuple.__new__(Weight, fields)

    def _matrix(self) -> Any:
        """The native form of a matrix in CPU memory, or None for another weight."""
        prepared = self.__dict__.get("_prepared")
        if prepared is None:
            prepared = self._prepared = Prepared()
        return prepared.matrix(self.op_args())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The dense tensor: round_to_dtype(fp32 level * fp32 scale), the same bits on every device.

        Args:
            dtype: float32, bfloat16 or float16; the original dtype by default.
            out: written in place of a new tensor; its dtype wins, its shape must be ``self.shape``.

        Raises:
            ValueError: another dtype; an ``out`` of another shape or device; both given and in conflict.
        """
        if out is None:
            return torch.ops.qlora_native.dequantize_4bit(
                self.dtype if dtype is None else dtype, *self.op_args()
            )
        if dtype is not None and dtype != out.dtype:
            raise ValueError(
                f"dequantize: dtype is {dtype}, out is {out.dtype}: give one of them or make them agree."
            )
        torch.ops.qlora_native.dequantize_4bit.out(out, *self.op_args())
        return out

    def scales(self) -> Tensor:
        """The scale of every block, fp32 [blocks], double quantization undone.

        Raises ValueError for a GGUF format.
        """
        refuse_gguf(self, "scales")
        return reference.scales(self.absmax, self.nested_absmax, self.nested_offset, self.nested_code)

    def slice(self, start: int, stop: int) -> QuantizedWeight:
        """Elements [start:stop] of the first dimension as a weight of their own, as views where the format allows it.

        A slice begins at a block: ``start`` times the elements of a row is a multiple of ``block_size``. If it does not
        begin at a block of 256 double-quantized scales as well, its scales are decoded to fp32: other bytes, the same
        values.

        Raises:
            IndexError: out of range.
            ValueError: a slice that does not begin at a block.
        """
        count = sum(self.shape[:1])  # 0 for a scalar
        if not 0 <= start <= stop <= count:
            raise IndexError(
                f"slice [{start}:{stop}] is out of range for the first dimension of {list(self.shape)}."
            )
        return self.with_arguments(self.op_args().slice(start, stop))

    def __getitem__(self, index: int) -> QuantizedWeight:
        """One slice along the first dimension, without that dimension (stacked experts); see :meth:`slice`."""
        count = sum(self.shape[:1])
        if not -count <= index < count:
            shape = list(self.shape)
            raise IndexError(f"index {index} is out of range for the first dimension of {shape}.")
        part = self.op_args().slice(index % count, index % count + 1)
        return self.with_arguments(part._replace(shape=part.shape[1:]))

    def flatten(self) -> QuantizedWeight:
        """The same weight in one dimension, over the same tensors."""
        return self.with_arguments(self.op_args()._replace(shape=[self.numel()]))

    def with_packed(self, packed: Tensor) -> QuantizedWeight:
        """The same scales with other codes, uint8 [ceil(n/2)] (of a GGUF format, other blocks)."""
        return self.with_arguments(self.op_args()._replace(packed=packed))

    def with_arguments(self, arguments: Weight) -> QuantizedWeight:
        """A weight of these tensors and this shape, alike in all else."""
        other = object.__new__(QuantizedWeight)
        other.__dict__.update(self.__getstate__())
        for name in TENSOR_FIELDS:
            setattr(other, name, getattr(arguments, name))
        other.shape = torch.Size(arguments.shape)
        return other

    def map(self, function: Callable[[Tensor], Any]) -> QuantizedWeight:
        """A weight of what ``function`` returns for each tensor."""
        arguments = self.op_args()
        mapped: Any = [None if tensor is None else function(tensor) for tensor in arguments[:6]]
        return self.with_arguments(Weight._make((*mapped, *arguments[6:])))

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> QuantizedWeight:
        """The same weight on another device. Bytes are moved, never requantized."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def __repr__(self) -> str:
        nested = ", double-quantized" if self.double_quant else ""
        return (
            f"QuantizedWeight({self.quant_type}, shape={list(self.shape)}, dtype={self.dtype}, "
            f"block_size={self.block_size}{nested}, device={self.device}, nbytes={self.nbytes})"
        )


# A pickle made by torch.save names this class and the dtype: both are data, which torch.load may then read.
torch.serialization.add_safe_globals([QuantizedWeight])


def refuse_gguf(w: QuantizedWeight, what: str) -> None:
    """ValueError for a weight in a GGUF format, which has no scales of its own."""
    if w.is_gguf:
        raise ValueError(
            f"{what}: a {w.quant_type} weight holds its scales inside its blocks: dequantize() reads them."
        )


def quantize(
    t: Tensor, *, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> QuantizedWeight:
    """Quantize a tensor to 4 bits.

    Each element becomes the nearest level of x * (1 / absmax), ties to the lower code; an all-zero block gets the code
    of zero and absmax 0. NF4 codes are bitsandbytes' bit for bit; FP4 follows its CUDA rule.

    Args:
        t: any shape, float32, bfloat16 or float16, any device.
        quant_type: "nf4" or "fp4".
        block_size: elements a scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits too (4.127 instead of 4.5 bits an element at block 64).

    Raises:
        ValueError: a non-finite element (named by its index), another dtype, another block size.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3.
    """
    if quant_type not in _native.CODEBOOKS:
        raise ValueError(f"quantize: quant_type is {quant_type!r}: expected 'nf4' or 'fp4'.")
    options = _native.quant_type_number(quant_type), block_size, double_quant
    packed, absmax, *nested = torch.ops.qlora_native.quantize_4bit(t.detach(), *options)
    about: Any = dict(zip(TENSOR_FIELDS[2:4], nested if double_quant else (), strict=False))
    about |= {"shape": t.shape, "dtype": t.dtype, "quant_type": quant_type, "block_size": block_size}
    return QuantizedWeight(packed, absmax, **about)


def to_bnb(w: QuantizedWeight, prefix: str = "weight") -> dict[str, Tensor]:
    """The tensors under which bitsandbytes stores a 4-bit weight, by key.

    Keys: ``prefix`` (packed bytes, uint8 [ceil(n/2), 1] or another storage dtype), ``prefix.absmax``,
    ``prefix.quant_map`` fp32 [16], with double quantization ``prefix.nested_absmax`` and ``prefix.nested_quant_map``
    fp32 [256], and ``prefix.quant_state.bitsandbytes__nf4`` (or ``fp4``), UTF-8 JSON as uint8. Loading and saving is
    byte-identical.

    Raises ValueError if the packed bytes do not fill whole elements of the storage dtype, and for a GGUF format, which
    bitsandbytes does not have.
    """
    refuse_gguf(w, "to_bnb")
    state: dict[str, Any] = {
        "quant_type": w.quant_type,
        "blocksize": w.block_size,
        "dtype": str(w.dtype).removeprefix("torch."),
        "shape": list(w.shape),
    }
    if w.packed.numel() % w.storage_dtype.itemsize:
        raise ValueError(
            f"to_bnb: {w.packed.numel()} packed bytes are no whole number of {w.storage_dtype} elements: "
            "set storage_dtype to torch.uint8."
        )
    number = _native.quant_type_number(w.quant_type)
    levels = _native.levels(number).clone() if w.code is None else w.code
    tensors = {
        prefix: w.packed.view(w.storage_dtype).reshape(-1, 1),
        f"{prefix}.absmax": w.absmax,
        f"{prefix}.quant_map": levels.to(w.device),
    }
    if w.nested_absmax is not None and w.nested_offset is not None:
        nested_offset = w.nested_offset.item()
        state |= {
            "nested_blocksize": reference.NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": nested_offset,
        }
        nested_code = _native.nested_code().clone() if w.nested_code is None else w.nested_code
        tensors[f"{prefix}.nested_absmax"] = w.nested_absmax
        tensors[f"{prefix}.nested_quant_map"] = nested_code.to(w.device)
    tensors[f"{prefix}.quant_state.bitsandbytes__{w.quant_type}"] = pack_json(state).to(w.device)
    return tensors


def pack_json(state: Mapping[str, Any]) -> Tensor:
    """A quant state's plain values as the UTF-8 bytes of a JSON object, uint8 [length]."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def unpack_json(stored: Tensor) -> dict[str, Any]:
    """The values that :func:`pack_json` packed. Raises ValueError if the bytes are no JSON object."""
    try:
        state = json.loads(bytes(stored.cpu().numpy()))
    except (TypeError, RecursionError) as error:  # of another dtype
        raise ValueError(str(error)) from None
    if not isinstance(state, dict):
        raise ValueError("not a JSON object")
    return state


def bnb_state_key(keys: Container[str], prefix: str = "weight") -> str | None:
    """The quant-state key of ``prefix`` among ``keys``, or None if it is no 4-bit weight."""
    ours = (f"{prefix}.quant_state.bitsandbytes__{name}" for name in _native.CODEBOOKS)
    return next((key for key in ours if key in keys), None)


# What a quant state holds, and in words.
_STATE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "blocksize": (
        lambda size: type(size) is int and size in reference.BLOCK_SIZES,
        "a power of two from 32 to 4096",
    ),
    "shape": (
        lambda value: (
            type(value) is list and all(type(size) is int and 0 <= size < 1 << 31 for size in value)
        ),
        "a list of whole numbers",
    ),
    "dtype": (
        lambda value: value in ("bfloat16", "float16", "float32"),
        "bfloat16, float16 or float32",
    ),
    "nested_blocksize": (lambda value: value == reference.NESTED_BLOCK, str(reference.NESTED_BLOCK)),
    "nested_offset": (lambda value: type(value) is float and math.isfinite(value), "a finite number"),
}


def read_state(stored: Tensor, names: Iterable[str]) -> dict[str, Any]:
    """The values of a quant state, of which those of these names are checked, nested ones where there are such."""
    state = unpack_json(stored)
    for name in names:
        is_valid, expected = _STATE[name]
        is_there = "nested_blocksize" in state or not name.startswith("nested_")
        if is_there and not is_valid(state.get(name)):
            raise ValueError(f"{name} is {state.get(name)!r}: expected {expected}")
    return state


def from_bnb(
    tensors: Mapping[str, Tensor], prefix: str = "weight", *, unread: Container[str] = ()
) -> QuantizedWeight:
    """A weight from bitsandbytes' tensors (see :func:`to_bnb` for the keys; other keys are ignored).

    Maps that equal the built-in tables are dropped, others are kept and honored. Scales under keys in ``unread`` are
    not checked for NaN and numbers too large for a weight.

    Raises ValueError, naming the key, if one is missing or does not fit the others.
    """
    key = bnb_state_key(tensors, prefix)
    if key is None:
        raise ValueError(
            f"from_bnb: there is no '{prefix}.quant_state.bitsandbytes__nf4' or '..__fp4' among the keys."
        )
    try:
        state = read_state(tensors[key], _STATE)
    except ValueError as error:
        raise ValueError(f"from_bnb: '{key}' holds no valid quant state: {error}.") from None
    quant_type = key.rpartition("__")[2]
    if state.get("quant_type") != quant_type:
        raise ValueError(f"from_bnb: '{key}' holds a quant state of {state.get('quant_type')!r}.")
    number = _native.quant_type_number(quant_type)
    nested = "nested_blocksize" in state
    block_size = state["blocksize"]
    shape = tuple(state["shape"])
    dtype = getattr(torch, state["dtype"])
    numel = math.prod(shape)
    blocks = -(-numel // block_size)

    def get(name: str, count: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        full = prefix + name
        tensor = tensors.get(full)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"from_bnb: key '{full}' is missing or holds no tensor.")
        is_other = tensor.dtype not in dtypes or tensor.is_meta != tensors[prefix].is_meta
        if is_other or tensor.numel() != count:
            raise ValueError(
                f"from_bnb: '{full}' is {tensor.dtype} with {tensor.numel()} elements: expected {count} of "
                f"{' or '.join(map(str, dtypes))} for a {list(shape)} weight in blocks of {block_size}, all on one "
                "device."
            )
        is_checked = name and full not in unread and tensor.is_floating_point() and not tensor.is_meta
        if is_checked and not bool((tensor.abs() <= MOST_SCALE).all()):
            raise ValueError(
                f"from_bnb: '{full}' holds a number over {MOST_SCALE:,}, or a NaN: expected smaller ones."
            )
        return tensor.contiguous().reshape(-1)

    stored = tensors.get(prefix)
    if not isinstance(stored, Tensor) or stored.dtype not in STORAGE_DTYPES:
        found = f"{stored.dtype}" if isinstance(stored, Tensor) else "missing or holds no tensor"
        raise ValueError(
            f"from_bnb: key '{prefix}' is {found}: expected packed codes as {' or '.join(map(str, STORAGE_DTYPES))}."
        )
    packed = get("", (numel + 1) // (2 * stored.dtype.itemsize), STORAGE_DTYPES).view(torch.uint8)
    fp32 = (torch.float32,)
    nested_absmax = nested_offset = nested_code = None
    if nested:
        nested_absmax = get(".nested_absmax", -(-blocks // reference.NESTED_BLOCK), fp32)
        nested_offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
        nested_code = get(".nested_quant_map", 256, fp32)
    code = get(".quant_map", 16, fp32)
    if not code.is_meta and _unless_built_in(code, _native.levels(1 - number)) is None:
        raise ValueError(
            f"from_bnb: '{prefix}.quant_map' holds the levels of another type: expected {quant_type}'s."
        )
    return QuantizedWeight(
        packed,
        get(".absmax", blocks, (torch.uint8,) if nested else fp32),
        shape=shape,
        dtype=dtype,
        quant_type=quant_type,
        block_size=block_size,
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
        code=_unless_built_in(code, _native.levels(number)),
        nested_code=_unless_built_in(nested_code, _native.nested_code()),
        storage_dtype=stored.dtype,
    )


def _unless_built_in(stored: Tensor | None, built_in: Tensor) -> Tensor | None:
    if stored is None or stored.is_meta:
        return None
    is_same = torch.equal(stored.cpu().view(torch.int32), built_in.view(torch.int32))
    return None if is_same else stored
