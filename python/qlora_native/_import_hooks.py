"""What is done while modules are imported: registering with them, and stopping on Ctrl-C.

Our classes enter the registries of transformers, PEFT and TRL as soon as these are imported, without importing them.
Ctrl-C while a command imports torch and transformers, which takes seconds and turns a KeyboardInterrupt on the way into
errors of their own, ends it with one line and no stack trace.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

# Module that holds the registry -> module of ours that enters our classes there when it is imported.
REGISTRIES = {
    "transformers.quantizers.auto": "qlora_native.interop.config",
    "transformers.trainer": "qlora_native.interop.trainer",
    "peft.tuners.lora.model": "qlora_native.interop.peft",
    "trl.trainer.utils": "qlora_native.interop.trl",
}


class _Finder:
    """Finds the modules of REGISTRIES as the other finders do, and has ours imported when they are ready."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in REGISTRIES:
            return None
        for finder in sys.meta_path:
            find = None if isinstance(finder, _Finder) else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """A module's own loader, and then the import of ours."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module.__name__)


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


def _stop(number: int, frame: object) -> None:
    os.write(2, b"qlora: interrupted\n")
    os._exit(128 + number)


def _is_command() -> bool:
    """Whether this process was started as ``qlora`` or ``python -m qlora_native``."""
    name, words = getattr(sys, "argv", [""])[0], list(sys.orig_argv)
    return Path(name).stem == "qlora" or (name == "-m" and ("-m", "qlora_native") in pairwise(words))


def restore_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, _stop)
