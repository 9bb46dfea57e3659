"""The modules of release 0.1 that are now in ``weights``, ``models`` and ``interop``; they go with the next release."""

from __future__ import annotations

import sys

from qlora_native._moved import modules_from

_SAME = ("convert", "device_layers", "fuse", "generate", "loss", "mapped", "residency", "trained")
_HOMES: dict[str, tuple[str, ...]] = {
    **{name: (f"models.{name}",) for name in _SAME},
    **{name: (f"interop.{name}",) for name in ("peft", "quantizer", "trainer", "trl")},
    "build": ("models.build", "weights.shapes", "weights.stream"),
    "calibrated": ("models.calibrate",),
    "checkpoint": ("weights.files",),
    "config": ("interop.config", "weights.config"),
    "gguf": ("weights.gguf",),
    "gguf_source": ("weights.gguf_source",),
    "load": ("models.load", "models.progress", "weights.config"),
    "merge": ("models.merge", "models.merge_files", "models.recode"),
    "plan": ("weights.match", "weights.float8"),
    "source": ("weights.open", "weights.source", "weights.config"),
}
modules_from(
    sys.modules[__name__], {name: tuple(f"qlora_native.{home}" for home in homes) for name, homes in _HOMES.items()}
)
