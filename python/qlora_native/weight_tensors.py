"""The two directions between a quantized weight and the tensors of a state_dict, in bitsandbytes' keys and in ours."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_native import _native, reference
from qlora_native.weight import STORAGE_DTYPES, QuantizedWeight, quant_type_number, refuse_gguf

MOST_SCALE = 65504  # float16's largest number: no weight of a model that was ever run is as large


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
    number = quant_type_number(w.quant_type)
    tensors = {
        prefix: w.packed.view(w.storage_dtype).reshape(-1, 1),
        f"{prefix}.absmax": w.absmax,
        f"{prefix}.quant_map": (_native.levels(number).clone() if w.code is None else w.code).to(w.device),
    }
    if w.nested_absmax is not None and w.nested_offset is not None:
        nested_offset = w.nested_offset.item()
        state |= {"nested_blocksize": reference.NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nested_offset}
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


def bnb_state_key(keys: Iterable[str], prefix: str = "weight") -> str | None:
    """The quant-state key of ``prefix`` among ``keys``, or None if it is no 4-bit weight."""
    present = set(keys)
    ours = (f"{prefix}.quant_state.bitsandbytes__{name}" for name in _native.CODEBOOKS)
    return next((key for key in ours if key in present), None)


def state_key(keys: Iterable[str], prefix: str = "weight") -> str | None:
    """The key of ``prefix`` among ``keys`` that describes a quantized weight (:func:`to_tensors`), or None."""
    present = set(keys)
    ours = (f"{prefix}.quant_state.gguf__{_native.QUANT_TYPES[number]}" for number in _native.GGUF_BLOCKS)
    return next((key for key in ours if key in present), bnb_state_key(present, prefix))


def to_tensors(w: QuantizedWeight, prefix: str = "weight") -> dict[str, Tensor]:
    """The tensors of a state_dict: those of :func:`to_bnb`; of a GGUF format its blocks, uint8 [bytes, 1], under
    ``prefix``, and dtype and shape as UTF-8 JSON under ``prefix.quant_state.gguf__q4_0`` (or another name)."""
    if not w.is_gguf:
        return to_bnb(w, prefix)
    state = {"dtype": str(w.dtype).removeprefix("torch."), "shape": list(w.shape)}
    about = pack_json(state).to(w.device)
    return {prefix: w.packed.view(-1, 1), f"{prefix}.quant_state.gguf__{w.quant_type}": about}


def from_tensors(tensors: Mapping[str, Tensor], prefix: str = "weight") -> QuantizedWeight:
    """A weight from the tensors of :func:`to_tensors`. Raises ValueError, naming the key, if they do not fit."""
    key = state_key(tensors, prefix)
    if key is None or ".gguf__" not in key[len(prefix) :]:
        return from_bnb(tensors, prefix)
    packed = tensors.get(prefix)
    try:
        state = _state_in(tensors[key], ("dtype", "shape"))
        if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
            raise ValueError(f"'{prefix}' is missing or holds no bytes")
        about: Any = {"shape": state["shape"], "dtype": getattr(torch, state["dtype"])}
        return QuantizedWeight.of_blocks(packed.reshape(-1), quant_type=key.rpartition("__")[2], **about)
    except ValueError as error:
        raise ValueError(f"from_tensors: '{key}': {error}") from None


# What a quant state holds, and in words.
_STATE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "blocksize": (
        lambda value: type(value) is int and value in reference.BLOCK_SIZES,
        "a power of two from 32 to 4096",
    ),
    "shape": (
        lambda value: type(value) is list and all(type(size) is int and 0 <= size < 1 << 31 for size in value),
        "a list of whole numbers",
    ),
    "dtype": (lambda value: value in ("bfloat16", "float16", "float32"), "bfloat16, float16 or float32"),
    "nested_blocksize": (lambda value: value == reference.NESTED_BLOCK, str(reference.NESTED_BLOCK)),
    "nested_offset": (lambda value: type(value) is float and math.isfinite(value), "a finite number"),
}


def _state_in(stored: Tensor, names: Iterable[str]) -> dict[str, Any]:
    """The values of a quant state, of which those of these names are checked, nested ones where there are such."""
    state = unpack_json(stored)
    for name in names:
        is_valid, expected = _STATE[name]
        is_there = "nested_blocksize" in state or not name.startswith("nested_")
        if is_there and not is_valid(state.get(name)):
            raise ValueError(f"{name} is {state.get(name)!r}: expected {expected}")
    return state


def _named(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(map(str, dtypes))


def from_bnb(tensors: Mapping[str, Tensor], prefix: str = "weight", *, unread: Container[str] = ()) -> QuantizedWeight:
    """A weight from bitsandbytes' tensors (see :func:`to_bnb` for the keys; other keys are ignored).

    Maps that equal the built-in tables are dropped, others are kept and honored. Scales under keys in ``unread`` are
    not checked for NaN and numbers too large for a weight.

    Raises ValueError, naming the key, if one is missing or does not fit the others.
    """
    key = bnb_state_key(tensors, prefix)
    if key is None:
        raise ValueError(f"from_bnb: there is no '{prefix}.quant_state.bitsandbytes__nf4' or '..__fp4' among the keys.")
    try:
        state = _state_in(tensors[key], _STATE)
    except ValueError as error:
        raise ValueError(f"from_bnb: '{key}' holds no valid quant state: {error}.") from None
    quant_type = key.rpartition("__")[2]
    if state.get("quant_type") != quant_type:
        raise ValueError(f"from_bnb: '{key}' holds a quant state of {state.get('quant_type')!r}.")
    number = quant_type_number(quant_type)
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
        if tensor.numel() != count or tensor.dtype not in dtypes or tensor.is_meta != tensors[prefix].is_meta:
            raise ValueError(
                f"from_bnb: '{full}' is {tensor.dtype} with {tensor.numel()} elements: expected "
                f"{count} of {_named(dtypes)} for a {list(shape)} weight in blocks of {block_size}, all on one device."
            )
        is_checked = name and full not in unread and tensor.is_floating_point() and not tensor.is_meta
        if is_checked and not bool((tensor.abs() <= MOST_SCALE).all()):
            raise ValueError(f"from_bnb: '{full}' holds a number over {MOST_SCALE:,}, or a NaN: expected smaller ones.")
        return tensor.contiguous().reshape(-1)

    stored = tensors.get(prefix)
    if not isinstance(stored, Tensor) or stored.dtype not in STORAGE_DTYPES:
        found = f"{stored.dtype}" if isinstance(stored, Tensor) else "missing or holds no tensor"
        raise ValueError(f"from_bnb: key '{prefix}' is {found}: expected packed codes as {_named(STORAGE_DTYPES)}.")
    packed = get("", (numel + 1) // (2 * stored.dtype.itemsize), STORAGE_DTYPES).view(torch.uint8)
    fp32 = (torch.float32,)
    nested_absmax = nested_offset = nested_code = None
    if nested:
        nested_absmax = get(".nested_absmax", -(-blocks // reference.NESTED_BLOCK), fp32)
        nested_offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
        nested_code = get(".nested_quant_map", 256, fp32)
    code = get(".quant_map", 16, fp32)
    if not code.is_meta and _unless_built_in(code, _native.levels(1 - number)) is None:
        raise ValueError(f"from_bnb: '{prefix}.quant_map' holds the levels of another type: expected {quant_type}'s.")
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
        nested_code=None if nested_code is None else _unless_built_in(nested_code, _native.nested_code()),
        storage_dtype=stored.dtype,
    )


def _unless_built_in(stored: Tensor, built_in: Tensor) -> Tensor | None:
    return None if stored.is_meta or torch.equal(stored.cpu().view(torch.int32), built_in.view(torch.int32)) else stored
