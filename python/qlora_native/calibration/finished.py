"""The layers that an interrupted run has finished: a folder from which the next run of the same kind goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_native._io import fsync
from qlora_native.calibration.hidden import hidden_file
from qlora_native.weight import QuantizedWeight, from_bnb, to_bnb

KIND = "run.json"


class FinishedLayers:
    """One file a layer, in bitsandbytes' format, and ``run.json``, which says what run they belong to.

    Args:
        folder: made if it is not there. run: everything that determines the bytes, as JSON values. What the folder
            holds of another run is deleted; ``changed`` then names the settings that differ.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self.folder, self.changed = folder, []
        run = json.loads(json.dumps(run))
        earlier = self._earlier()
        if earlier != run:
            if earlier is not None:
                self.changed = sorted(name for name in {*run, *earlier} if run.get(name) != earlier.get(name))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._write(KIND, lambda path: path.write_text(json.dumps(run, indent=2), encoding="utf-8"))
        self.count = 0
        while self._file(self.count).is_file():
            self.count += 1
        if not hidden_file(folder, self.count).is_file():
            self.count = 0
        for path in folder.glob("hidden-*"):
            if path != hidden_file(folder, self.count):  # a kill leaves the next layer's, half written
                path.unlink()

    def load(self, index: int) -> tuple[dict[str, QuantizedWeight], dict[str, str]]:
        """The 4-bit weights of a layer by name, and those that fell back."""
        with safe_open(self._file(index), framework="pt") as file:
            told = json.loads(file.metadata()["told"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: from_bnb(tensors, name) for name in told["names"]}, told["fell_back"]

    def save(self, index: int, weights: dict[str, QuantizedWeight], fell_back: dict[str, str]) -> None:
        """Put a layer on the disk, whole or not at all."""
        tensors = {
            key: tensor.cpu().contiguous()
            for name, weight in weights.items()
            for key, tensor in to_bnb(weight, name).items()
        }
        told = {"told": json.dumps({"names": list(weights), "fell_back": fell_back})}
        self._write(self._file(index).name, lambda path: save_file(tensors, path, told))

    def remove(self) -> None:
        """Delete the folder: what it holds is in the model."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:04}.safetensors"

    def _earlier(self) -> Any:
        try:
            return json.loads((self.folder / KIND).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _write(self, name: str, write: Any) -> None:
        partial = self.folder / f".{name}.part"
        write(partial)
        fsync(partial)
        os.rename(partial, self.folder / name)
        fsync(self.folder)
