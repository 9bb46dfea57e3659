"""Entering the registries of transformers and PEFT once these are imported, without importing them.

Both are looked at when a model is loaded from a folder that names our format, or gets an adapter from PEFT: nothing of
ours is called before that. Importing them here would take seconds from programs that need neither.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Module that holds the registry -> module of ours that enters our classes there when it is imported.
REGISTRIES = {
    "transformers.quantizers.auto": "qlora_native.interop.config",
    "transformers.trainer": "qlora_native.interop.trainer",
    "peft.tuners.lora.model": "qlora_native.interop.peft",
}


class _Finder:
    """Finds the modules of REGISTRIES where they lie, and has ours imported when they are ready."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in REGISTRIES else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(name)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(name: str) -> None:
    try:
        importlib.import_module(REGISTRIES[name])
    except (ImportError, AttributeError) as error:  # their import must not fail for us
        warnings.warn(
            f"qlora_native does not fit this version of {name.partition('.')[0]} ({error}): its integration is off.",
            stacklevel=2,
        )


def watch() -> None:
    """Register with what is imported already, and with the others when they are."""
    for name in REGISTRIES:
        if name in sys.modules:
            _register(name)
    sys.meta_path.insert(0, _Finder())
