"""Optimizer states in bitsandbytes' layout, and in that of ``qlora_native.optim``.

bitsandbytes keeps ``state1`` and ``state2`` of each parameter, fp32 or uint8 codes, and beside codes the map that
decodes them (``qmap1``, fp32 [256]) and a scale for each 256 elements (``absmax1``). ``qlora_native.optim`` keeps
``exp_avg`` and ``exp_avg_sq``, whose codes are those of docs/format.md. A map travels with every 8-bit state, so our
codes are a valid state for bitsandbytes, under our map. The other way codes are taken as they are where the map is
ours, and decoded to fp32 where it is another, such as bitsandbytes' dynamic one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_native import _native, reference

WRAPPER = "__bnb_optimizer_quant_state__"  # keeps FSDP from gathering what is not of the parameter's shape
MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}  # our name of a state -> the number in bitsandbytes' names
OLD_BLOCK = 2048  # of bitsandbytes before 0.44


@cache
def table(signed: bool) -> Tensor:
    """The values of all codes in ascending order, fp32 [256]; the signed code in offset binary (code + 128)."""
    codes = torch.arange(256, dtype=torch.uint8)
    if not signed:
        return reference.decode_state(codes)
    values = reference.decode_state((codes ^ 128).view(torch.int8))
    values[0] = -1.0  # no code is -128
    return values


class State(dict[str, Any]):
    """The states of one parameter, under our names; bitsandbytes' names give the same memory.

    ``state1`` is uint8 where the states are coded, and ``qmap1`` is the map of those bytes.
    """

    def __missing__(self, key: str) -> Any:
        for name, number in MOMENTS.items():
            if name not in self or not key.endswith(number):
                continue
            value: Tensor = self[name]
            if key == f"state{number}":
                return value.view(torch.uint8) if value.dtype == torch.int8 else value
            if key == f"absmax{number}" and f"{name}_absmax" in self:
                return self[f"{name}_absmax"]
            if key == f"qmap{number}" and f"{name}_absmax" in self:
                values = table(value.dtype == torch.int8)
                return (values.roll(128) if value.dtype == torch.int8 else values).to(value.device)
        raise KeyError(key)


def to_bitsandbytes(state: Mapping[str, Any]) -> dict[str, Any]:
    """The states of one parameter as bitsandbytes' ``state_dict`` holds them."""
    wrapped: dict[str, Any] = {}
    for name, number in MOMENTS.items():
        if name not in state:
            continue
        value: Tensor = state[name]
        if f"{name}_absmax" in state:
            signed = value.dtype == torch.int8
            wrapped[f"qmap{number}"] = table(signed).to(value.device)
            wrapped[f"absmax{number}"] = state[f"{name}_absmax"]
            value = value.view(torch.uint8) ^ 128 if signed else value
        wrapped[f"state{number}"] = value
    return {"step": int(state.get("step", 0)), WRAPPER: wrapped}


def from_bitsandbytes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The states of one parameter as ``qlora_native.optim`` takes them, from bitsandbytes' layout or our own.

    Raises ValueError for codes without a map or with scales for blocks of another size than 256 or 2048.
    """
    state = {**given, **given.get(WRAPPER, {})}
    if "state1" not in state:
        return dict(given)
    result: dict[str, Any] = {"step": state.get("step", 0)}
    for name, number in MOMENTS.items():
        value = state.get(f"state{number}")
        if value is None:
            continue
        if value.dtype != torch.uint8:
            result[name] = value
            continue
        absmax, qmap = state.get(f"absmax{number}"), state.get(f"qmap{number}")
        if absmax is None or qmap is None:
            raise ValueError(f"state{number} is uint8, but absmax{number} or qmap{number} is missing beside it.")
        signed = name == "exp_avg"
        if torch.equal(qmap.cpu(), table(signed)):
            result[name] = (value ^ 128).view(torch.int8) if signed else value
            result[f"{name}_absmax"] = absmax
        else:
            block = _block_of(value, absmax)
            result[name] = reference.dequantize_blockwise(value, absmax.to(value.device), qmap.to(value.device), block)
    return result


def _block_of(codes: Tensor, absmax: Tensor) -> int:
    for block in (_native.STATE_BLOCK, OLD_BLOCK):
        if absmax.numel() == -(-codes.numel() // block):
            return block
    raise ValueError(
        f"an 8-bit state of {codes.numel()} elements has {absmax.numel()} scales: expected one for each "
        f"{_native.STATE_BLOCK} or {OLD_BLOCK}."
    )


def native_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` of a bitsandbytes optimizer as one that ``qlora_native.optim`` loads.

    For ``AdamW``, ``Adam`` and ``Lion`` and their 8-bit, 32-bit and paged forms. 8-bit states under bitsandbytes' own
    map are decoded to fp32; an optimizer with ``bits=8`` encodes them anew when it loads them. What is in our layout
    already is passed on.

    Raises ValueError for states that are neither.
    """
    states = {number: from_bitsandbytes(state) for number, state in state_dict["state"].items()}
    return {**state_dict, "state": states}
