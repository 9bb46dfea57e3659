"""AdamW, Adam and Lion with bitsandbytes' arguments, over the optimizers of ``qlora_native.optim``."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor

from qlora_native import optim as native
from qlora_native.bitsandbytes.optim.manager import GlobalOptimManager
from qlora_native.bitsandbytes.optim.states import State, native_state_dict, to_bitsandbytes
from qlora_native.optim.base import MIN_CODED_NUMEL, Optimizer

LION_EPS = 1e-8  # of no effect; bitsandbytes looks for it in every group


class _Bitsandbytes(Optimizer):
    """What the classes below share: bitsandbytes' arguments, names of states, and layout of ``state_dict``."""

    _bits: ClassVar[int | None] = None  # None: the argument optim_bits tells
    _paged: ClassVar[bool] = False
    args: SimpleNamespace

    def _arguments(
        self, optim_bits: int, args: Any, min_8bit_size: int, is_paged: bool, amsgrad: bool = False
    ) -> dict[str, Any]:
        """Those of ``qlora_native.optim``; keeps the others in ``self.args``."""
        name = type(self).__name__
        if amsgrad:
            raise ValueError(
                f"{name}: amsgrad is True: there is no such form here; bitsandbytes ignores it: leave it out."
            )
        if self._bits == 8 and optim_bits not in (8, 32):
            raise ValueError(f"{name}: optim_bits is {optim_bits}: this class is 8-bit; leave optim_bits out.")
        optim_bits = getattr(args, "optim_bits", optim_bits)
        bits = optim_bits if self._bits is None else self._bits
        min_8bit_size = getattr(args, "min_8bit_size", min_8bit_size)
        self.args = SimpleNamespace(optim_bits=bits, min_8bit_size=min_8bit_size, max_unorm=0.0, skip_zeros=False)
        return {"bits": bits, "paged": "auto" if self._paged or is_paged else False}

    # Frozen parameters may be of any dtype, and get no states: model.parameters() holds the packed weights as well.

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(
            {**group, "params": [p for p in group["params"] if p.requires_grad or p.is_floating_point()]}
        )

    def _reserve(self, wanted: Iterable[tuple[Tensor, bool]]) -> None:
        super()._reserve([(param, coded) for param, coded in wanted if param.is_floating_point()])

    def _is_coded(self, param: Tensor, group: dict[str, Any]) -> bool:
        config = GlobalOptimManager.get_instance().config_of(param)
        least = config.get("min_8bit_size", self.args.min_8bit_size)
        return bool(config.get("optim_bits", group["bits"]) == 8 and param.numel() >= least)

    def _new_state(self, param: Tensor, coded: bool, blank: bool = True) -> dict[str, Any]:
        return State(super()._new_state(param, coded, blank))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "args": self.args}

    def state_dict(self) -> dict[str, Any]:
        """In bitsandbytes' layout: it loads there, in this class and, by :func:`native_state_dict`, in
        ``qlora_native.optim``."""
        given = super().state_dict()
        groups = [{"eps": LION_EPS, **group} for group in given["param_groups"]]
        return {**given, "state": {k: to_bitsandbytes(v) for k, v in given["state"].items()}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """A ``state_dict`` of this class, of bitsandbytes or of ``qlora_native.optim``; see :func:`native_state_dict`.

        Args:
            move_to_device: not looked at: states are always where their parameter is.
        """
        super().load_state_dict(native_state_dict(state_dict))


class Adam(_Bitsandbytes, native.AdamW):
    """Adam; ``weight_decay`` is decoupled, as in bitsandbytes.

    Args:
        params, lr, betas, eps, weight_decay: as for :class:`qlora_native.optim.AdamW`.
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


class AdamW(_Bitsandbytes, native.AdamW):
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
        arguments = self._arguments(optim_bits, args, min_8bit_size, is_paged, amsgrad)
        super().__init__(params, lr, betas, eps, weight_decay, **arguments)


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
        super().__init__(params, lr, betas, weight_decay, **self._arguments(optim_bits, args, min_8bit_size, is_paged))


class _FixedLion(Lion):
    """The forms of Lion that take no ``optim_bits``."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        args: Any = None,
        min_8bit_size: int = MIN_CODED_NUMEL,
        is_paged: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, args=args, min_8bit_size=min_8bit_size, is_paged=is_paged)


class Lion8bit(_FixedLion):
    """:class:`Lion` with 8-bit states."""

    _bits = 8


class Lion32bit(_FixedLion):
    """:class:`Lion` with 32-bit states."""

    _bits = 32


class PagedLion(Lion):
    """:class:`Lion` whose states leave memory when it runs short."""

    _paged = True


class PagedLion8bit(Lion8bit):
    """:class:`PagedLion` with 8-bit states."""

    _paged = True


class PagedLion32bit(Lion32bit):
    """:class:`PagedLion` with 32-bit states."""

    _paged = True


class Adam8bit(Adam):
    """:class:`Adam` with 8-bit states."""

    _bits = 8


class Adam32bit(Adam):
    """:class:`Adam` with 32-bit states."""

    _bits = 32


class PagedAdam(Adam):
    """:class:`Adam` whose states leave memory when it runs short."""

    _paged = True


class PagedAdam8bit(Adam8bit):
    """:class:`PagedAdam` with 8-bit states."""

    _paged = True


class PagedAdam32bit(Adam32bit):
    """:class:`PagedAdam` with 32-bit states."""

    _paged = True


class AdamW8bit(AdamW):
    """:class:`AdamW` with 8-bit states."""

    _bits = 8


class AdamW32bit(AdamW):
    """:class:`AdamW` with 32-bit states."""

    _bits = 32


class PagedAdamW(AdamW):
    """:class:`AdamW` whose states leave memory when it runs short."""

    _paged = True


class PagedAdamW8bit(AdamW8bit):
    """:class:`PagedAdamW` with 8-bit states."""

    _paged = True


class PagedAdamW32bit(AdamW32bit):
    """:class:`PagedAdamW` with 32-bit states."""

    _paged = True
