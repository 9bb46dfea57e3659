"""Modules and names under their paths of release 0.1, which work for one release more and warn."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module -> the modules that now have its names.
_HOMES: dict[str, tuple[str, ...]] = {
    "hf": (),
    **{
        f"hf.{name}": (f"models.{name}",)
        for name in (
            "convert",
            "device_layers",
            "fuse",
            "generate",
            "loss",
            "mapped",
            "residency",
            "trained",
        )
    },
    **{f"hf.{name}": (f"interop.{name}",) for name in ("peft", "quantizer", "trainer", "trl")},
    "hf.build": ("models.build", "weights.shapes", "weights.stream", "weights.transforms"),
    "hf.calibrated": ("models.calibrate",),
    "hf.checkpoint": ("weights.files",),
    "hf.config": ("interop.config", "weights.config"),
    "hf.gguf": ("weights.gguf",),
    "hf.gguf_source": ("weights.gguf_source",),
    "hf.load": ("models.load", "models.progress", "weights.config"),
    "hf.merge": ("models.merge", "models.merge_files", "models.recode"),
    "hf.plan": ("weights.stream", "weights.float8", "weights.open"),
    "hf.source": ("weights.open", "weights.stream", "weights.config"),
    "optim.base": ("optim.states", "optim.step"),
    "optim.rules": ("optim",),
    "data.standard_library": ("tool.cli.standard_library",),
    "export.check": ("tool.evaluate.check",),
    "train.batches": ("tool.train.setup", "data.batching"),
    "train.graphs": ("tool.train.checkpoint", "tool.train.passes"),
}
_IN_TOOL = ("config", "train", "estimate", "evaluate", "export", "cli")  # with all that is in them


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


class Finder:
    """Finds a module that moved, where no file has its name: an empty one that fetches its names from the new ones."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        if package != "qlora_native" or (old not in _HOMES and old.split(".")[0] not in _IN_TOOL):
            return None
        homes = [f"{package}.{home}" for home in _HOMES.get(old, (f"tool.{old}",))]
        if any(importlib.util.find_spec(home) is None for home in homes):
            return None
        return ModuleSpec(name, self, loader_state=tuple(homes), is_package="." not in old)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual one."""

    def exec_module(self, module: ModuleType) -> None:
        homes = module.__spec__.loader_state if module.__spec__ else ()
        module.__getattr__ = names_from(module.__name__, homes)  # type: ignore[method-assign]
