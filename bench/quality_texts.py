"""The texts of bench_quality: windows of tokens from what every installation has, named and hashed.

``train``, ``calibration`` and ``A`` are source code of the running Python's standard library, as
qlora_native.tool.cli.standard_library splits it: whole modules are held out, and A is taken from these alone. ``B`` is
English prose with examples: the language reference that CPython ships as pydoc_data.topics. ``C`` is the long
descriptions (READMEs) of installed packages, Markdown and prose.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_native.data.batching import permutation
from qlora_native.tool.cli.standard_library import SKIPPED_FOLDERS, is_held_out

PACKAGES = [
    "accelerate",
    "huggingface-hub",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
]
CALIBRATION_ROWS, CALIBRATION_LENGTH = 128, 512
HELD_OUT_ROWS, HELD_OUT_LENGTH = 64, 256


class Windows(NamedTuple):
    """Windows of one text, int64 [rows, length], and where they come from."""

    about: str
    ids: torch.Tensor

    @property
    def sha256(self) -> str:
        """Of the ids as little-endian int32."""
        return hashlib.sha256(self.ids.numpy().astype("<i4").tobytes()).hexdigest()


def modules(held_out: bool) -> list[str]:
    """The source of the standard library's modules of one side of the split, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        is_skipped = bool(SKIPPED_FOLDERS.intersection(parts)) or parts[0] == "pydoc_data"
        if not is_skipped and is_held_out(".".join(parts)) == held_out:
            with suppress(UnicodeDecodeError):
                texts.append(path.read_text(encoding="utf-8"))
    return texts


def topics() -> list[str]:
    from pydoc_data.topics import topics as pages

    return [pages[name] for name in sorted(pages)]


def descriptions() -> list[str]:
    """The long descriptions of PACKAGES, of those that are installed."""
    texts = []
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            metadata = importlib.metadata.metadata(name)
            texts.append(str(metadata.get_payload() or metadata.get("Description") or ""))  # type: ignore[attr-defined]
    return texts


def windows(tokenizer: Any, texts: Iterable[str], rows: int, length: int, seed: int) -> torch.Tensor:
    """``rows`` windows of ``length`` tokens, drawn without replacement from all that lie end to end in the texts."""
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    if len(found) < rows:
        raise SystemExit(f"the texts make {len(found)} windows of {length} tokens, {rows} are needed")
    return torch.tensor([found[number] for number in permutation(len(found), seed)[:rows]])


def held_out(tokenizer: Any) -> dict[str, Windows]:
    python = f"CPython {platform.python_version()}"
    made = {
        "A": (f"source of the held-out standard library modules, {python}", modules(held_out=True)),
        "B": (f"language reference (pydoc_data.topics), {python}", topics()),
        "C": (f"long descriptions of {', '.join(PACKAGES)} as installed", descriptions()),
    }
    return {
        name: Windows(about, windows(tokenizer, texts, HELD_OUT_ROWS, HELD_OUT_LENGTH, 1))
        for name, (about, texts) in made.items()
    }


def calibration(tokenizer: Any) -> Windows:
    """The calibration windows, from the modules that are not held out."""
    ids = windows(tokenizer, modules(held_out=False), CALIBRATION_ROWS, CALIBRATION_LENGTH, 2)
    return Windows("source of the other standard library modules", ids)


def batches(tokenizer: Any, steps: int, rows: int, length: int, seed: int) -> torch.Tensor:
    """What the adapters learn from, int64 [steps, rows, length]: the modules that are not held out."""
    return windows(tokenizer, modules(held_out=False), steps * rows, length, 100 + seed).view(steps, rows, length)
