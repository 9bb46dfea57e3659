"""Names under their paths of release 0.1, which work for one release more and warn."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def names_from(old: str, homes: Mapping[str, str] | tuple[str, ...]) -> Callable[[str], Any]:
    """The ``__getattr__`` of the module ``old`` for names that moved: ``homes`` has the new module of each, or has the
    modules that all of them may be in."""

    def getattr_moved(name: str) -> Any:
        modules = homes if isinstance(homes, tuple) else filter(None, [homes.get(name)])
        for module in () if name.startswith("__") else modules:
            found = getattr(importlib.import_module(module), name, None)
            if found is not None:
                warnings.warn(f"{old}.{name} is now {module}.{name}", DeprecationWarning, stacklevel=2)
                return found
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return getattr_moved


def modules_from(package: ModuleType, homes: Mapping[str, tuple[str, ...]]) -> None:
    """Let ``package`` have modules of these names, with what the modules in ``homes`` have."""
    for name, modules in homes.items():
        module = ModuleType(f"{package.__name__}.{name}")
        module.__getattr__ = names_from(module.__name__, modules)  # type: ignore[method-assign]
        sys.modules[module.__name__] = module
        setattr(package, name, module)
