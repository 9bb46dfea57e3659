"""What a user should read before a model is trained: whether a GGUF file stays as it is, and what llama.cpp can run."""

from __future__ import annotations

from qlora_native.hf.source import AUTO, KEEP, Source


def notes_of(source: Source, quant_type: str = AUTO) -> list[str]:
    """A sentence each, for weights that become ``quant_type``."""
    try:
        from qlora_native.hf.gguf import ARCHITECTURES
    except ImportError:  # of the package gguf, without which nothing is exported for llama.cpp
        return []
    name, kind = source.path.name, source.config.model_type
    notes = []
    if source.path.suffix == ".gguf" and quant_type != KEEP and not source.keeps(quant_type):
        why = f"those of {kind} are not kept"
        why = "without quant.type and quant.method they stay" if source.keeps(AUTO) else why
        notes.append(f"{name}: its weights are converted to 4 bits anew and do not stay as they are; {why}")
    if kind not in ARCHITECTURES:
        notes.append(
            f"{name}: llama.cpp's formats are not written for {kind}; what is trained can be merged into safetensors"
        )
    return notes
