"""The memory of a run: what was predicted before the model was loaded, against what it came to."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_native._memory import kib_fields
from qlora_native.config import TrainConfig
from qlora_native.estimate import Estimate, Estimator, Setting


def anonymous_bytes(status: str) -> tuple[int, int]:
    """Memory in use that no file stands behind, now and at most so far, from the text of /proc/self/status. The most
    is that of all memory less the files' pages now, which only become more."""
    sizes = kib_fields(status)
    return sizes["RssAnon"] + sizes["RssShmem"], sizes["VmHWM"] - sizes["RssFile"]


class MemoryReport:
    """Made before the model is loaded; :meth:`line` is for the end.

    Args:
        config: of the run.
        longest: tokens of the longest row.
    """

    def __init__(self, config: TrainConfig, longest: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.predicted: Estimate | None = None
        self.reason = ""
        try:
            estimator = Estimator(Path(config.model).expanduser(), Setting.from_config(config, self.device))
            self.predicted = estimator.at(length=-(-longest // 8) * 8)  # as collate pads
        except Exception as error:  # what cannot be loaded is told by loading; the rest must not stop a run
            self.reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        self._start = self._now()[0]
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _now(self) -> tuple[int, int]:
        if self.device == "cuda":
            return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        try:
            return anonymous_bytes(Path("/proc/self/status").read_text(encoding="ascii"))
        except (OSError, KeyError):  # not Linux
            return 0, 0

    def measured(self) -> int:
        """The most bytes held so far above the start: anonymous memory, or what torch has allocated on a device."""
        return max(0, self._now()[1] - self._start)

    def line(self) -> str:
        """Predicted against measured."""
        measured = self.measured()
        told = f"measured {measured / 2**20:,.0f} MiB" if measured else "which this system does not measure"
        if self.predicted is None:
            return f"memory of model and training: not predicted ({self.reason}), {told}"
        error = f" ({100 * (self.predicted.total / measured - 1):+.1f} %)" if measured else ""
        return f"memory of model and training: predicted {self.predicted.total / 2**20:,.0f} MiB, {told}{error}"
