"""QuantState: what decodes the bytes of a packed tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_native import _native, reference
from qlora_native._native import quant_type_number
from qlora_native.ops.linear_4bit import Prepared
from qlora_native.weight import pack_json, unpack_json

_PACKED_KEY = "quant_state.bitsandbytes__"
_ALWAYS = {"quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"}
_NESTED = {"nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset"}


class QuantState:
    """Scales, levels and form of a quantized tensor, as ``quantize_4bit`` and ``quantize_blockwise`` return them.

    Attributes:
        absmax: fp32 [blocks]; uint8 [blocks], codes, where ``nested``.
        shape: torch.Size of the dense tensor; None for 8-bit blockwise quantization.
        code: fp32 [16] levels (4-bit) or fp32 [256] map (8-bit); may differ from the built-in table.
        blocksize: elements a scale.
        quant_type: "nf4", "fp4", or None for 8-bit.
        dtype: of the dense tensor.
        offset: fp32 [], mean of the scales, None unless ``nested``.
        state2: QuantState of the scales themselves, None unless ``nested``.
        nested: whether the scales are stored in 8 bits.
    """

    valid_quant_types = _native.CODEBOOKS

    def __init__(
        self,
        absmax: Tensor,
        shape: Any = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None
        self.code = code
        self._prepared = Prepared()

    @property
    def code(self) -> Tensor | None:
        """The table of levels."""
        return self._code

    @code.setter
    def code(self, table: Tensor | None) -> None:
        # _other_code: a table that is not the built-in one.
        self._code, self._other_code = (table, None)
        if table is not None and table.device.type != "meta":
            name = self.quant_type
            built_in = (
                _native.nested_code() if name is None else _native.levels(quant_type_number(name))
            )
            self._other_code = None if torch.equal(table.cpu(), built_in) else table

    def __getattr__(self, name: str) -> Any:
        # FSDP walks the keys of a state_dict attribute by attribute, the packed one among them.
        if name == f"bitsandbytes__{self.__dict__.get('quant_type')}":
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __getitem__(self, index: Any) -> Any:
        """The fields as the list that bitsandbytes kept before version 0.39."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> QuantState:
        """The state from what :meth:`as_dict` gives, packed or not, under any prefix; ``qs_dict`` is left as it is.

        Raises ValueError naming the keys that are missing, unknown or broken.
        """
        values = dict(qs_dict)
        for key in [
            key for key, value in values.items() if "quant_state" in key and isinstance(value, Tensor)
        ]:
            try:
                values |= unpack_json(values.pop(key))
            except ValueError as error:
                raise ValueError(
                    f"QuantState.from_dict: '{key}' holds no quant state ({error})."
                ) from None
        values = {key.split(".")[-1]: value for key, value in values.items()}
        expected = _ALWAYS | _NESTED if _NESTED & values.keys() else _ALWAYS
        if values.keys() != expected:
            different = (expected - values.keys(), values.keys() - expected)
            missing, unknown = (", ".join(sorted(keys)) or "none" for keys in different)
            raise ValueError(
                f"QuantState.from_dict: missing keys: {missing}; unknown keys: {unknown}; those that are no tensors "
                f"may be packed under one that ends in {_PACKED_KEY}nf4 or fp4."
            )
        offset = state2 = None
        if "nested_absmax" in values:
            offset = torch.tensor(float(values["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                values["nested_absmax"].to(device),
                blocksize=values["nested_blocksize"],
                code=values["nested_quant_map"].to(device),
                dtype=getattr(torch, values["nested_dtype"]),
            )
        return cls(
            values["absmax"].to(device),
            None if values["shape"] is None else torch.Size(values["shape"]),
            values["quant_map"].to(device),
            values["blocksize"],
            values["quant_type"],
            getattr(torch, values["dtype"]),
            offset,
            state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The fields by name.

        Args:
            packed: everything as tensors, plain values as JSON bytes under ``quant_state.bitsandbytes__nf4`` (or
                ``fp4``): what a state_dict holds (see docs/format.md). 8-bit states have no packed form.
        """
        values: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None and self.offset is not None:
            second = self.state2.as_dict()
            values |= {
                "nested_absmax": second["absmax"],
                "nested_blocksize": second["blocksize"],
                "nested_quant_map": second[
                    "quant_map"
                ].clone(),  # safetensors saves no tensors that share memory
                "nested_dtype": second["dtype"],
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return values
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in values.items() if key not in tensors}
        return {**tensors, _PACKED_KEY + self.quant_type: pack_json(plain)}

    def to(self, device: torch.device | str | int) -> None:
        """Moves the tensors, in place."""
        for name in ("absmax", "code", "offset"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device))
        if self.state2 is not None:
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        """Same form, and tables and scales equal within 1e-6 (and 1e-5 of the value)."""
        if not isinstance(other, QuantState):
            return False
        # None or a tensor of one element.
        names = ("shape", "dtype", "blocksize", "quant_type", "state2", "offset")
        return all(bool(getattr(self, name) == getattr(other, name)) for name in names) and all(
            a is b
            or (
                a is not None
                and b is not None
                and a.shape == b.shape
                and torch.allclose(a, b, atol=1e-6)
            )
            for a, b in ((self.absmax.float(), other.absmax.float()), (self.code, other.code))
        )

    __hash__ = None  # type: ignore[assignment]

    def scales(self) -> Tensor:
        """The scale of every block, fp32 [blocks], double quantization undone."""
        if self.state2 is None:
            return self.absmax.float()
        absmax = self.state2.decode(self.absmax)
        return absmax if self.offset is None else absmax + self.offset

    def decode(self, codes: Tensor) -> Tensor:
        """The values of 8-bit codes, fp32, of their shape."""
        table = (_native.nested_code() if self.code is None else self.code).to(codes.device)
        return reference.dequantize_blockwise(codes, self.scales(), table, self.blocksize or 0)

    def op_args(self, packed: Tensor) -> tuple[Any, ...]:
        """The weight arguments of ``torch.ops.qlora_native.*`` for these packed bytes (of any storage dtype)."""
        absmax = self.absmax
        second = self.state2
        nested: Any = (None, None, None)
        if second is not None:
            if second.blocksize == reference.NESTED_BLOCK and second.absmax.dtype == torch.float32:
                nested = (
                    second.absmax,
                    None if self.offset is None else self.offset.float(),
                    second._other_code,
                )
            else:
                absmax = self.scales()
        number = quant_type_number(self.quant_type or "")
        data = packed.reshape(-1).view(torch.uint8)
        return (
            data,
            absmax,
            *nested[:2],
            self._other_code,
            nested[2],
            list(self.shape),
            number,
            self.blocksize,
        )
