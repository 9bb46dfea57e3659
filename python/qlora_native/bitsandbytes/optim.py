"""The optimizers of ``bitsandbytes.optim`` that QLoRA is trained with, over those of ``qlora_native.optim``.

bitsandbytes keeps ``state1`` and ``state2``, fp32 or uint8 codes; with codes their map (``qmap1``, fp32 [256]) and a
scale for each 256 elements (``absmax1``). ``qlora_native.optim`` keeps ``exp_avg`` and ``exp_avg_sq``, coded as in
docs/format.md. bitsandbytes reads our codes by our map; codes under any other map are decoded to fp32 here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_native import _native, reference
from qlora_native import optim as native
from qlora_native.bitsandbytes.functional import without
from qlora_native.optim.states import MIN_CODED_NUMEL
from qlora_native.optim.step import Optimizer

# Name: bits of the states, 0 by the argument optim_bits, and whether they are paged.
_FORMS = {
    "{}8bit": (8, False),
    "{}32bit": (32, False),
    "Paged{}": (0, True),
    "Paged{}8bit": (8, True),
    "Paged{}32bit": (32, True),
}
_RULES = ("Adam", "AdamW", "Lion")
__all__ = ["native_state_dict", *_RULES, *(form.format(rule) for rule in _RULES for form in _FORMS)]
# Keeps FSDP from gathering what is not of the parameter's shape.
WRAPPER = "__bnb_optimizer_quant_state__"
# The number in bitsandbytes' names of a state -> our name.
MOMENTS = {"1": "exp_avg", "2": "exp_avg_sq"}
BLOCKS = (_native.STATE_BLOCK, 2048)  # elements that share a scale; 2048 before bitsandbytes 0.44


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"qlora_native.bitsandbytes.optim has no {name!r}: it offers {', '.join(__all__)}. Parameters that are to keep "
        "32-bit states get a group of their own: {'params': [...], 'bits': 32}."
    )


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
        return _numbered(self, in_place=True)[key]


def _numbered(state: Mapping[str, Any], in_place: bool) -> dict[str, Tensor]:
    """The states under bitsandbytes' names: ``in_place`` the same memory and a map of its bytes, else ascending maps,
    which bitsandbytes searches."""
    found: dict[str, Tensor] = {}
    for number, name in MOMENTS.items():
        if name not in state:
            continue
        value: Tensor = state[name]
        if f"{name}_absmax" in state:
            signed = value.dtype == torch.int8
            qmap = table(signed).to(value.device)
            value = value.view(torch.uint8)
            if signed:
                value, qmap = (value, qmap.roll(128)) if in_place else (value ^ 128, qmap)
            found |= {f"qmap{number}": qmap, f"absmax{number}": state[f"{name}_absmax"]}
        found[f"state{number}"] = value
    return found


def from_bitsandbytes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The states of one parameter as ``qlora_native.optim`` takes them, from bitsandbytes' layout or our own.

    Raises ValueError for codes without a map or with scales for blocks of another size than 256 or 2048.
    """
    state = {**given, **given.get(WRAPPER, {})}
    if "state1" not in state:
        return dict(given)
    result: dict[str, Any] = {"step": state.get("step", 0)}
    for number, name in MOMENTS.items():
        value, absmax, qmap = (state.get(f"{part}{number}") for part in ("state", "absmax", "qmap"))
        signed = name == "exp_avg"
        if value is None:
            continue
        if value.dtype != torch.uint8:
            result[name] = value
        elif absmax is None or qmap is None:
            raise ValueError(
                f"state{number} is uint8, but absmax{number} or qmap{number} is missing beside it."
            )
        elif torch.equal(qmap.cpu(), table(signed)):
            result[name] = (value ^ 128).view(torch.int8) if signed else value
            result[f"{name}_absmax"] = absmax
        else:
            block = next(
                (size for size in BLOCKS if absmax.numel() == -(-value.numel() // size)), None
            )
            if block is None:
                raise ValueError(
                    f"an 8-bit state of {value.numel()} elements has {absmax.numel()} scales: expected one for each "
                    f"{' or '.join(map(str, BLOCKS))}."
                )
            result[name] = reference.dequantize_blockwise(
                value, absmax.to(value.device), qmap.to(value.device), block
            )
    return result


def native_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` of a bitsandbytes optimizer as one that ``qlora_native.optim`` loads.

    For ``AdamW``, ``Adam`` and ``Lion`` and their 8-bit, 32-bit and paged forms. 8-bit states under bitsandbytes' own
    map are decoded to fp32; an optimizer with ``bits=8`` encodes them anew when it loads them. What is in our layout
    already is passed on.

    Raises ValueError for states that are neither.
    """
    return {
        **state_dict,
        "state": {number: from_bitsandbytes(state) for number, state in state_dict["state"].items()},
    }


class _Bitsandbytes(Optimizer):
    """bitsandbytes' arguments, names of states, and layout of ``state_dict``."""

    _bits: ClassVar[int] = 0  # 0: by the argument optim_bits
    _paged: ClassVar[bool] = False
    args: SimpleNamespace

    def _arguments(
        self, optim_bits: int, args: Any, min_8bit_size: int, is_paged: bool, amsgrad: bool = False
    ) -> dict[str, Any]:
        """Those of ``qlora_native.optim``; keeps the others in ``self.args``."""
        if amsgrad:
            raise ValueError(
                f"{type(self).__name__}: amsgrad is True, which is not offered; bitsandbytes ignores it: leave it out."
            )
        is_fixed = self._bits and optim_bits in (8, 32)  # a number that is neither is refused later
        bits = self._bits if is_fixed else getattr(args, "optim_bits", optim_bits)
        self.args = SimpleNamespace(
            optim_bits=bits, min_8bit_size=getattr(args, "min_8bit_size", min_8bit_size)
        )
        return {"bits": bits, "paged": "auto" if self._paged or is_paged else False}

    def _check_group(self, group: dict[str, Any]) -> None:
        # Frozen parameters may be of any dtype, and get no states: model.parameters() has the packed weights, too.
        params = [
            param for param in group["params"] if param.requires_grad or param.is_floating_point()
        ]
        super()._check_group({**group, "params": params})

    def _is_coded(self, param: Tensor, group: dict[str, Any]) -> bool:
        return bool(group["bits"] == 8 and param.numel() >= self.args.min_8bit_size)

    def _new_state(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        return State(super()._new_state(*arguments, **options))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "args": self.args}

    def state_dict(self) -> dict[str, Any]:
        """In bitsandbytes' layout: it loads there, in this class and, by :func:`native_state_dict`, in
        ``qlora_native.optim``."""
        given = super().state_dict()
        states = {
            number: {"step": int(state.get("step", 0)), WRAPPER: _numbered(state, in_place=False)}
            for number, state in given["state"].items()
        }
        # bitsandbytes reads it for Lion, too.
        groups = [{"eps": 1e-8, **group} for group in given["param_groups"]]
        return {**given, "state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """A ``state_dict`` of this class, of bitsandbytes or of ``qlora_native.optim``; see :func:`native_state_dict`.

        Args:
            move_to_device: ignored: states are always where their parameter is.
        """
        super().load_state_dict(native_state_dict(state_dict))


class Adam(_Bitsandbytes, native.AdamW):
    """Adam; ``weight_decay`` is decoupled, as in bitsandbytes.

    Args:
        params, lr, betas, eps, weight_decay: as for :class:`qlora_native.optim.AdamW`; ``weight_decay`` is 0 by
            default, of :class:`AdamW` 0.01.
        amsgrad: False; True raises ValueError.
        optim_bits: 32 or 8.
        args: an object whose ``optim_bits`` and ``min_8bit_size`` win over the arguments.
        min_8bit_size: parameters of fewer elements keep 32-bit states.
        is_paged: let the states leave memory when it runs short (``paged="auto"``).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_CODED_NUMEL,
        is_paged: bool = False,
    ) -> None:
        arguments = self._arguments(optim_bits, args, min_8bit_size, is_paged, amsgrad)
        super().__init__(params, lr, betas, eps, weight_decay, **arguments)


class AdamW(Adam):
    """AdamW; arguments as for :class:`Adam`."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_CODED_NUMEL,
        is_paged: bool = False,
    ) -> None:
        options = (amsgrad, optim_bits, args, min_8bit_size, is_paged)
        super().__init__(params, lr, betas, eps, weight_decay, *options)


class Lion(_Bitsandbytes, native.Lion):
    """Lion; arguments as for :class:`Adam`."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_CODED_NUMEL,
        is_paged: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            **self._arguments(optim_bits, args, min_8bit_size, is_paged),
        )


def _forms(base: type[_Bitsandbytes]) -> Iterator[Any]:
    """The 8-bit, the 32-bit and the three paged forms of ``base``."""
    for name, (bits, paged) in _FORMS.items():
        states = f"{bits or 'optim_bits'}-bit states" + (
            ", which leave memory when it runs short" if paged else ""
        )
        members: dict[str, Any] = {
            "_bits": bits,
            "_paged": paged,
            "__doc__": f"{base.__name__} with {states}.",
            "__module__": __name__,
        }
        if base is Lion and bits:  # as in bitsandbytes
            members["__init__"] = without(Lion.__init__, "optim_bits", bits)
        yield type(name.format(base.__name__), (base,), members)


Adam8bit, Adam32bit, PagedAdam, PagedAdam8bit, PagedAdam32bit = _forms(Adam)
AdamW8bit, AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit = _forms(AdamW)
Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit = _forms(Lion)
