"""The figures of ``metrics.jsonl`` sent to other programs too: TensorBoard, trackio."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qlora_native.errors import UserError


class Logger(Protocol):
    """What takes lines of ``metrics.jsonl``."""

    def write(self, record: Mapping[str, Any]) -> None:
        """One line, with its ``step``."""

    def close(self) -> None:
        """Nothing more comes."""


def make_loggers(names: Sequence[str], output_dir: Path, config: Mapping[str, Any]) -> list[Logger]:
    """The loggers that ``logging`` names. UserError naming the package that one of them needs and that is not there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"logging names {name}, which is not installed: pip install {name}, or leave it out")
    kinds: dict[str, type[TensorBoard] | type[Trackio]] = {"tensorboard": TensorBoard, "trackio": Trackio}
    return [kinds[name](output_dir, config) for name in names]


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line but its step, held-out ones under ``eval/`` and the others under ``train/``."""
    found = {}
    for key, value in record.items():
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
            found[f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"] = float(value)
    return found


class TensorBoard:
    """Event files in ``output_dir/tensorboard``; `tensorboard --logdir` shows them."""

    def __init__(self, output_dir: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(output_dir / "tensorboard"))

    def write(self, record: Mapping[str, Any]) -> None:
        """One line."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class Trackio:
    """A run of the project ``qlora_native``, named like the output folder; `trackio show` shows it."""

    def __init__(self, output_dir: Path, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project="qlora_native", name=output_dir.name, config=dict(config), resume="allow")

    def write(self, record: Mapping[str, Any]) -> None:
        """One line."""
        self._trackio.log(scalars(record), step=record["step"])

    def close(self) -> None:
        """End the run."""
        self._trackio.finish()
