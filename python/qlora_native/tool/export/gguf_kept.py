"""A GGUF file with an adapter in its codes: the same file, scales and metadata, in which other levels were chosen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from qlora_native.calibration.data import CalibrationData
from qlora_native.errors import UserError
from qlora_native.models.merge_files import Merging
from qlora_native.models.progress import Progress
from qlora_native.models.recode import calibrated_codes
from qlora_native.weights.gguf import ARCHITECTURES, DENSE, KEPT
from qlora_native.weights.gguf_source import GgufSource


def export_kept(
    work: Merging, path: Path, adapter_folder: Path, text: str, progress: Progress
) -> dict[str, Any]:
    """Write ``path``, the GGUF file of the source with the adapter in its blocks.

    Codes become those of :func:`~qlora_native.models.recode.recode`, with ``text`` as calibration; floats the rounded
    sum. ``changed`` of the result is the share of bytes that are others, by tensor. UserError for another source, and
    for an adapter that the file's tensors cannot take.
    """
    source = work.source
    adapter = work.adapter
    if not isinstance(source, GgufSource) or source.architecture is None:
        raise UserError(
            f"{source.path} is no GGUF file of {', '.join(ARCHITECTURES)}: --type keep keeps the types of such a file"
        )
    if adapter.saved or work.untied or not adapter.pairs:
        raise UserError(
            f"--type keep takes an adapter of linear layers alone, whose weights are tensors of their own in "
            f"{source.path}; export with another --type"
        )
    stored = {item.name: item.entry.parts[0] for item in work.items()}
    for module in adapter.pairs:
        if (kind := source.kind_of(stored[f"{module}.weight"])) not in KEPT | DENSE.keys():
            raise UserError(
                f"{source.path} has {module} in {kind}: expected one of {', '.join(sorted(KEPT))}"
            )
    changed: dict[str, float] = {}
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        codes = calibrated_codes(work, adapter_folder, CalibrationData(text), Path(folder), progress)

        def weights() -> Iterator[tuple[str, Tensor]]:
            """The bytes of each weight with its adapter, in the model's order of rows."""
            for module, (a, b, scale) in adapter.pairs.items():
                name = f"{module}.weight"
                if module in codes:
                    before = source.quantized(stored[name], torch.float32, True).packed
                    after = torch.from_file(
                        str(codes[module]), size=before.numel(), dtype=before.dtype
                    ).view_as(before)
                else:
                    floats = source.read(stored[name])
                    total = (floats.float() + b.float() @ a.float() * scale).to(floats.dtype)
                    before, after = floats.view(torch.uint8), total.view(torch.uint8)
                changed[name] = float((before != after).double().mean())
                yield name, after

        source.write_copy(path, weights())
    return {"tensors": len(source.gguf.tensors), "num_bytes": path.stat().st_size, "changed": changed}
