"""The memory of a run: what was predicted against what was measured, and what happens when it runs out."""

from __future__ import annotations

import gc
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from qlora_native import _C
from qlora_native._memory import (
    free_device_memory,
    free_memory,
    kib_fields,
    peak_rss_bytes,
    release_free_memory,
)
from qlora_native.errors import UserError
from qlora_native.optim import AdamW, Lion
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.checkpoint import random_state, set_random_state
from qlora_native.tool.train.progress import Observer, Record, mib
from qlora_native.weights.stream import Source

if TYPE_CHECKING:
    from qlora_native.tool.estimate import Estimate, Estimator

Result = TypeVar("Result")


@dataclass(frozen=True)
class Forecast:
    """The memory that a run is expected to take, and how its model is loaded for that."""

    estimate: Estimate | None = None
    # Bytes of a card for the layers' 4-bit weights, beyond which they stream.
    layers_budget: int | None = None
    has_room_for_graphs: bool = True
    reason: str = ""  # why there is no estimate


def forecast(config: TrainConfig, source: Source, longest: int, rows: int = 1 << 20) -> Forecast:
    """The forecast for a run on ``rows`` rows of ``source``'s model, the longest of so many tokens."""
    from qlora_native.tool.estimate import Estimator, Setting

    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        estimator = Estimator(source, Setting.from_config(config, device, rows, longest))
        if device == "cpu":
            return Forecast(estimator.at())
        return fit(
            estimator, free_device_memory(torch.device(device, torch.cuda.current_device())).bytes
        )
    # Loading raises what is wrong with the model; nothing else must stop a run.
    except Exception as error:
        return Forecast(reason=f"{type(error).__name__}: {error}".partition("\n")[0])


def fit(estimator: Estimator, free: int) -> Forecast:
    """The forecast for a card with so many free bytes: if the run does not fit there, it captures no CUDA graphs, and
    if that is not enough, layers stream."""
    from qlora_native.tool.estimate.cards import streamed_on

    estimate = estimator.at()
    if estimate.fits(free):
        return Forecast(estimate)
    run = streamed_on(estimator, free)
    if run is None or not run.residency.streamed:
        return Forecast(estimator.at(cuda_graph=False), has_room_for_graphs=not estimate.graphs)
    return Forecast(run.estimate, run.residency.num_bytes)


class MemoryReport:
    """The memory of a run, measured from here on, beside its forecast. Made before the model is loaded."""

    def __init__(self, forecast: Forecast) -> None:
        self.predicted = forecast.estimate
        self.reason = forecast.reason
        # Bytes of mapped weights: in memory at once, and those left in the files.
        self.mapped = self.streamed = 0
        gc.collect()  # what an earlier run in this process has left, which would hide as much of this one's
        release_free_memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):  # where Linux refuses that, the peak is the process's
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._start, self._earlier = self._now()

    def _now(self) -> tuple[int, int]:
        """Bytes in use now and at most so far: on a device, or in memory that is not backed by a file, where the second
        is an upper bound: file pages only grow."""
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        try:
            sizes = kib_fields(Path("/proc/self/status").read_text(encoding="ascii"))
            return sizes["RssAnon"] + sizes["RssShmem"], sizes["VmHWM"] - sizes["RssFile"]
        except (OSError, KeyError):  # not Linux
            return 0, 0

    def measured(self) -> int:
        """The most bytes held so far above the start: anonymous memory, or what torch has allocated on a device. 0 if
        that is not known: the process held as much before."""
        peak = self._now()[1]
        return max(0, peak - self._start) if peak > self._earlier else 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON, in bytes; ``predicted`` is by part, with the ``mapped`` weights."""
        parts = {} if self.predicted is None else dict(vars(self.predicted.peak))
        if parts:
            parts["weights"] = max(0, parts["weights"] - self.streamed)
        return {
            "measured": self.measured(),
            "mapped": self.mapped,
            "predicted": parts,
            "reason": self.reason,
        }

    def line(self) -> str:
        """Predicted against measured, with the mapped weights in both, as far as they are in memory, and what is beside
        them: the libraries' memory is no part of either."""
        measured = self.measured() and self.measured() + self.mapped
        result = f"measured {mib(measured)}" if measured else "which was not measured"
        if self.predicted is None:
            return f"memory of model and training: not predicted ({self.reason}), {result}"
        predicted = self.predicted.total - self.streamed
        text = f"memory of model and training: predicted {mib(predicted)}, {result}"
        if measured:
            error = predicted / measured - 1
            text += f" ({100 * abs(error):.1f} % too {'much' if error > 0 else 'little'} predicted)"
        if self.mapped:
            text += f"; {mib(self.mapped)} of it are mapped weights"
        if self.streamed:
            text += f", of {mib(self.mapped + self.streamed)} in the files"
        beside = peak_rss_bytes() - measured
        if measured and beside > 0 and not torch.cuda.is_available():
            text += f"; Python, libraries and rows take {mib(beside)} beside it"
        return text


class MappedWeights(Observer):
    """The weights of a run that lie in mapped files: streamed where they do not fit, checked at each loss.

    ``stream`` is the native one, None where nothing streams. Of ``world`` processes those on one host share its memory.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        report: MemoryReport | None,
        note: Callable[[str], None],
        world: int,
    ) -> None:
        from qlora_native.models.mapped import num_bytes, parts_of, stream_if_needed

        self._model = model
        self._where = config.model
        self.stream: _C.WeightStream | None = None
        is_mapped = getattr(getattr(model, "load_report", None), "bytes_mapped", 0)
        parts = parts_of(model) if is_mapped else []
        self._files = list({id(part.file): part.file for part in parts}.values())
        if not parts:
            if config.weight_budget is not None:
                raise UserError(
                    f"weight_budget is {config.weight_budget}, but no weight of {config.model} is mapped: `residency: "
                    "mapped` says what is missing"
                )
            return
        beside = 0  # bytes predicted beside frozen weights and the adapters, which are there already
        if report is not None and report.predicted is not None:
            terms = report.predicted.peak
            beside = terms.total - terms.weights - terms.scales - terms.dense - terms.adapters
            beside *= int(os.environ.get("LOCAL_WORLD_SIZE", world))
        streaming = stream_if_needed(model, config.weight_budget, beside, note)
        mapped = resident = num_bytes(parts)
        if streaming is not None:
            self.stream = streaming.stream
            resident = min(mapped, streaming.plan.num_bytes)
        if report is not None:
            report.mapped = resident
            report.streamed = mapped - resident

    def computed(self, loss: float) -> None:
        """UserError if a file was changed under the run, or if the loss is not finite since a weight is not."""
        if self._files:
            from qlora_native.models.mapped import check_files, check_mapped_finite

            check_files(self._files)
            if not math.isfinite(loss):
                check_mapped_finite(self._model, self._where)


# In a plain RuntimeError of torch's CPU allocator, C++, oneDNN, cuBLAS and cuDNN.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|could not create a memory|_ALLOC_FAILED"
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory could not be allocated, on the host or on a device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


class _OutOfMemory(UserError):
    """Memory ran out."""


class OOMRetry(Observer):
    """Runs the passes of a training step or an evaluation, and once more, with the optimizer's states paged out, if
    they run out of memory; not if ``train.paged`` is false, nor, without ``can_retry``, on one of several processes.

    ``stop_capturing``, which is given the reason, frees the memory of CUDA graphs before the second attempt: only they
    can use it. ``note`` prints the line about the start of paging. ``retries`` and ``lost_seconds`` count the failed
    first attempts, with the paging out after them.
    """

    def __init__(
        self,
        config: TrainConfig,
        optimizer: AdamW | Lion,
        note: Callable[[str], None],
        stop_capturing: Callable[[str], None],
        *,
        can_retry: bool,
    ) -> None:
        self.config, self.optimizer, self._note = config, optimizer, note
        self._stop_capturing = stop_capturing
        self.retries, self.lost_seconds = 0, 0.0
        self._can_retry = can_retry and config.train.paged is not False
        self._has_noted = False

    def run(self, passes: Callable[[], Result], what: str) -> Result:
        """``passes()``. A retry starts from the random state of the first attempt, without gradients: it computes the
        same. UserError, which begins with ``what``, if memory runs out again."""
        if self._can_retry:
            before = random_state()
            began = time.monotonic()
            with suppress(_OutOfMemory):
                return self.run_once(passes, what)
            self._stop_capturing(f"memory ran out in {what}")
            self.optimizer.zero_grad()
            gc.collect()
            self.optimizer.page_out()
            release_free_memory()
            self.note_paging(what)
            set_random_state(*before)
            self.retries += 1
            self.lost_seconds += time.monotonic() - began
        return self.run_once(passes, what)

    def run_once(self, work: Callable[[], Result], what: str) -> Result:
        """``work()``, which cannot be repeated: UserError if memory runs out or the page file fails."""
        try:
            return work()
        except _C.PageFileError as error:
            raise UserError(f"{what}: {error}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            found = _ASKED.search(str(error))
        # Behind the except clause, since the exception's traceback keeps the tensors of the pass alive.
        asked = f"it asked for {found[1]}" if found else "an allocation failed"
        options, length = self.config.train, self.config.data.max_length
        device: torch.device = self.optimizer.param_groups[0]["params"][0].device
        free = free_device_memory(device) if device.type == "cuda" else free_memory()
        advice = {
            f"halve train.batch_size (now {options.batch_size}) and double train.grad_accum": options.batch_size
            > 1,
            f"lower data.max_length (now {length})": True,
            "set train.grad_checkpointing to true": not options.grad_checkpointing,
            "set train.paged to auto": options.paged is False,
        }
        raise _OutOfMemory(
            f"{what} needs more memory than there is ({asked}{f'; {free}' if free else ''}); "
            f"{', or '.join(text for text, helps in advice.items() if helps)}"
        )

    def note_paging(self, when: str) -> None:
        """Note once that states are paged out, whatever the reason."""
        num_bytes = 0 if self._has_noted else self.optimizer.states_paged_out()
        if num_bytes:
            self._has_noted = True
            cause = "as train.paged says" if self.config.train.paged is True else "memory is short"
            self._note(f"{when}: {cause}, so {mib(num_bytes)} of optimizer states are paged out")

    def stepped(self, record: Record) -> None:
        self.note_paging(f"step {record['step']}")
