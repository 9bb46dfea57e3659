"""GlobalOptimManager: which parameters keep 32-bit states in an 8-bit optimizer, or 8-bit ones in a 32-bit one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

KEYS = ("optim_bits", "min_8bit_size")


class GlobalOptimManager:
    """Settings of single parameters, for every optimizer of this package; there is one, :meth:`get_instance`.

    Only the form of the states can be set (``optim_bits``, ``min_8bit_size``), and before the first step. A learning
    rate or a decay of its own is a parameter group's.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager: there is one: call GlobalOptimManager.get_instance().")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The manager."""
        if cls._instance is None:
            cls._instance = object.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget all settings."""
        self._of_parameters = WeakTensorKeyDictionary()
        self._of_modules: list[tuple[weakref.ref[nn.Module], str, dict[str, Any]]] = []

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Nothing needs to be registered: settings go by the parameter itself, which stays the same when moved."""

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Set ``key`` to ``value``, or all of ``key_value_dict``, for one parameter or several.

        Raises ValueError for keys other than "optim_bits" and "min_8bit_size".
        """
        config = {**({} if key is None else {key: value}), **(key_value_dict or {})}
        _check(config)
        for parameter in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
            self._of_parameters.setdefault(parameter, {}).update(config)

    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Set ``config`` for whatever parameter stands under ``param_name`` of the module at the first step."""
        _check(config)
        self._of_modules.append((weakref.ref(module), param_name, dict(config)))

    def config_of(self, parameter: Tensor) -> dict[str, Any]:
        """What is set for this parameter."""
        config = dict(self._of_parameters.get(parameter, {}))
        for module, name, more in self._of_modules:
            if getattr(module(), name, None) is parameter:
                config |= more
        return config


def _check(config: Mapping[str, Any]) -> None:
    for key in config:
        if key not in KEYS:
            raise ValueError(
                f"GlobalOptimManager: {key!r} cannot be set for single parameters: expected {' or '.join(KEYS)}; "
                "give the parameters a group of their own for everything else."
            )
