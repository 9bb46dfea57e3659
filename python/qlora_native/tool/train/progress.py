"""What a run reports while it runs: one bar on a terminal, plain lines elsewhere, every step in ``metrics.jsonl``, and
the same figures in other programs (TensorBoard, trackio, W&B, MLflow)."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_native._io import (
    as_write_error,
    atomic_file,
    is_terminal,
    read_json,
    reason,
    without_nan,
    write_whole,
)
from qlora_native._memory import peak_rss_bytes
from qlora_native.errors import UserError

# Imported at once: its matplotlib is no part of the memory of a run.
from qlora_native.tool.evaluate import page
from qlora_native.tool.train.checkpoint import TrainState

Record = dict[str, Any]  # one line of metrics.jsonl


class Observer:
    """Called by the loop in the order of its list; every method does nothing unless an observer has its own.

    An exception ends the run; ``close`` is called however it ends.
    """

    work = "evaluation after step {}"  # what `evaluating` does, in the error if memory runs out

    def evaluating(self, state: TrainState) -> None:
        """Before the held-out loss is computed, also where no rows are held out; once more if memory runs out."""

    def computed(self, loss: float) -> None:
        """The loss of a step, before anything has changed by it, or of the held-out rows."""

    def evaluated(self, record: Record) -> None:
        """After ``evaluating``, with the line of the metrics, to which it may add."""

    def stepped(self, record: Record) -> None:
        """After an optimizer step, with its line of the metrics; ``TrainState.step`` still counts those before it."""

    def close(self) -> None:
        """The run ends."""


class OnStep(Observer):
    """A function that gets the line of each step."""

    def __init__(self, function: Any) -> None:
        self.stepped = function  # type: ignore[method-assign]


class Recorder(Observer):
    """Writes every line of the metrics somewhere."""

    def write(self, record: Record) -> None:
        """Write one line."""

    def stepped(self, record: Record) -> None:
        self.write(record)

    def evaluated(self, record: Record) -> None:
        if len(record) > 1:  # than the step: rows are held out, or prompts were answered
            self.write(record)


class Metrics(Recorder):
    """``metrics.jsonl``: one JSON object per step and per evaluation, appended and flushed at once.

    A run that resumes at step N drops what a killed run wrote after the checkpoint: steps above N, and evaluations
    (and answers) from N on, which are made again.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = [
            line for line in read_metrics(path) if line["step"] + ("loss" not in line) <= resume_step
        ]
        with as_write_error(path):
            write_whole(path, "".join(f"{json.dumps(line)}\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        with as_write_error(self.path):
            self._file.write(json.dumps(without_nan(record)) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # of a line that could not be written, which write() has reported
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` that hold a step and its numbers or answers, which an incomplete last one of a
    killed run does not; empty if there is no file."""
    lines = []
    for text in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ()
    ):
        with suppress(ValueError, RecursionError, AttributeError):
            line = json.loads(text)
            numbers = [value for key, value in line.items() if value is not None and key != "samples"]
            are_numbers = all(
                type(value) in (int, float) and abs(value) < math.inf for value in numbers
            )
            if are_numbers and type(line.get("step")) is int and type(line.get("samples", [])) is list:
                lines.append(line)
    return lines


def plot_losses(output_dir: Path) -> None:
    """Draw training and held-out loss over the steps, and the best step, into ``loss.png``, if matplotlib is
    installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        return
    lines = read_metrics(output_dir / "metrics.jsonl")
    trained, held_out = (
        [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        for key in ("loss", "eval_loss")
    )
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    axes.plot(*np.array(trained).T, linewidth=1, label="training")
    if held_out:
        axes.plot(*np.array(held_out).T, marker="o", label="held out")
        step, loss = min(held_out, key=lambda point: point[1])
        axes.plot(step, loss, "k*", markersize=11, label=f"best: {loss:.4f} at step {step}")
    axes.set_yscale("log")  # the first step does not flatten the others
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 1e5 * lowest else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend()
    axes.grid(alpha=0.3)
    picture = output_dir / "loss.png"
    with as_write_error(picture), atomic_file(picture) as partial:
        figure.savefig(partial, dpi=120, format="png")


class Logger(Recorder):
    """A run in another program, which ``log`` gives figures by name, and the number of their step."""

    def __init__(self, log: Callable[..., object], close: Any) -> None:
        self._log = log
        self.close = close  # type: ignore[method-assign]

    def write(self, record: Record) -> None:
        """Log the finite numbers of a line but its step, held-out ones under ``eval/``, the others under ``train/``."""
        found = {}
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                place = key.replace("eval_", "eval/", 1) if key.startswith("eval_") else f"train/{key}"
                found[place] = float(value)
        self._log(found, step=record["step"])


def _start(name: str, output_dir: Path, config: Mapping[str, Any]) -> Logger:
    """TensorBoard gets event files in ``output_dir/tensorboard``, which `tensorboard --logdir` shows; the others a run
    named like the output folder, of the project or experiment ``qlora_native``. W&B and trackio have the same calls."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(output_dir / name))

        def add(figures: Mapping[str, float], step: int) -> None:
            for key, value in figures.items():
                writer.add_scalar(key, value, step)

        return Logger(add, writer.close)  # which writes what is buffered
    package: Any = importlib.import_module(name)
    if name == "mlflow":
        package.set_experiment("qlora_native")
        package.start_run(run_name=output_dir.name)
        package.log_dict(dict(config), "config.json")
        return Logger(package.log_metrics, package.end_run)
    package.init(project="qlora_native", name=output_dir.name, config=dict(config), resume="allow")
    return Logger(package.log, package.finish)


def make_loggers(names: Sequence[str], output_dir: Path, config: Mapping[str, Any]) -> list[Logger]:
    """The loggers that ``logging`` names. UserError naming one that is not installed or does not start."""
    made = []
    for name in names:
        try:
            made.append(_start(name, output_dir, config))
        except ModuleNotFoundError as error:
            raise UserError(
                f"logging names {name}, which is not installed: pip install {name}, or leave it out"
            ) from error
        except Exception as error:  # it is not logged in, has no network, or whatever else
            raise UserError(f"logging names {name}, which does not start: {reason(error)}") from error
    return made


class Progress(Observer):
    """Prints notes, steps and evaluations; nothing if ``quiet``."""

    def __init__(
        self, total: int, start: int, log_every: int, eval_every: int = 0, *, quiet: bool = False
    ) -> None:
        self.speeds: list[float] = []  # tokens per second of each step
        self._total, self._start, self._log_every, self._quiet = total, start, log_every, quiet
        self._eval_every = eval_every or total
        self._step_seconds = self._evaluation_seconds = 0.0
        self._began = 0.0  # the evaluation that is being made
        self._bar: Any = None
        if not quiet and is_terminal(sys.stdout):
            with suppress(ImportError):
                from rich import progress as rich

                columns = rich.MofNCompleteColumn(), rich.BarColumn(bar_width=24)
                self._bar = rich.Progress(*columns, rich.TextColumn("{task.fields[status]}"))
                self._bar.start()
                self._bar.add_task("", total=total, completed=start, status="")

    def note(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(text, flush=True)

    def stepped(self, record: Record) -> None:
        done = record["step"]
        self._step_seconds += record["seconds"]
        self.speeds.append(record["tokens_per_second"])
        figures = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        status = f"{figures}  peak {mib(peak_rss_bytes())}  {self._time_left(done)}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, status=status)
        elif done % self._log_every == 0 or done in (self._start + 1, self._total):
            self.note(f"step {done}/{self._total}  {status}")

    def _time_left(self, done: int) -> str:
        """The mean time of a step times the steps left, and the time of the last evaluation times those that are due:
        every ``eval_every`` steps, and at the end."""
        evaluations = -(-self._total // self._eval_every) - (done - 1) // self._eval_every
        steps_left = self._step_seconds / (done - self._start) * (self._total - done)
        left = round(steps_left + self._evaluation_seconds * evaluations)
        minutes, seconds = divmod(left, 60)
        clock = (
            f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
            if minutes >= 60
            else f"{minutes}:{seconds:02d}"
        )
        return (
            f"{clock} left"
            if done < self._total or not left
            else f"{clock} left, for the last evaluation"
        )

    def evaluating(self, state: TrainState) -> None:
        self._began = time.monotonic()

    def evaluated(self, record: Record) -> None:
        if (loss := record.get("eval_loss")) is not None:
            self._evaluation_seconds = time.monotonic() - self._began
            perplexity = record["eval_perplexity"]
            self.note(
                f"step {record['step']}/{self._total}  held-out loss {loss:.4f}  perplexity {perplexity:,.2f}"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


PAGE_SHARE = 0.005  # of a run's time, at most, that writing its page takes


class RunReport(Observer):
    """Keeps ``report.json``, the ``facts`` of a run and its notes, and ``report.html``, made of it and of the metrics.

    A page that cannot be written is noted once and ends no run. ``memory`` is a
    :class:`qlora_native.tool.train.memory.MemoryReport`, or None.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        progress: Progress,
        state: TrainState,
        memory: Any = None,
    ) -> None:
        self._folder, self._facts, self._progress, self._state, self._memory = (
            folder,
            facts,
            progress,
            state,
            memory,
        )
        self._began = time.monotonic()
        self._last = self._all = 0.0  # seconds of the last write, and of all
        self._has_failed = self._has_ended = False
        self._curves = page.Curves(folder / "metrics.jsonl")
        self._notes: list[dict[str, Any]] = []
        if state.step:
            with suppress(Exception):  # a damaged file costs its notes alone
                found = read_json(folder / "report.json")["notes"]
                notes: list[dict[str, Any]] = [
                    {"step": int(note["step"]), "text": str(note["text"])} for note in found
                ]
                self._notes = [note for note in notes if 0 <= note["step"] <= state.step]

    def note(self, text: str) -> None:
        """Print one line, and list it among the run's events."""
        self._notes.append({"step": self._state.step, "text": text})
        self._progress.note(text)

    def evaluated(self, record: Record) -> None:
        """Write the page, unless all writes, this one and the last, would take more than their share of the time."""
        if self._all + 2 * self._last <= PAGE_SHARE * (time.monotonic() - self._began):
            self._write()

    def close(self) -> None:
        """Write the page as that of a run that has ended, once."""
        if not self._has_ended:
            self._has_ended = True
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            memory = self._memory and self._memory.as_dict()
            facts = {
                **self._facts,
                "memory": memory,
                "notes": self._notes,
                "has_ended": self._has_ended,
            }
            write_whole(self._folder / "report.json", json.dumps(facts) + "\n")
            page.write_page(self._folder, self._curves)
        except Exception as error:  # whatever it is, the run is worth more
            if not self._has_failed:
                self._progress.note(f"report.html could not be written: {reason(error)}")
            self._has_failed = True
        self._last = time.monotonic() - began
        self._all += self._last


@dataclass(frozen=True)
class TrainSummary:
    steps: int
    skipped_steps: int
    tokens: int  # that passed through the model, padding not counted
    # Held-out loss in nats per token of the quantized model; None without held-out rows.
    loss_before: float | None
    loss_after: float | None
    best_loss: float | None
    best_step: int | None
    tokens_per_second: float  # median over the steps of this process; 0 if it took none
    seconds: float  # of this process, from the first step to the last
    paged_bytes: int  # of optimizer states that this process moved, both ways together
    paging_seconds: float  # waiting for them, and in first attempts that failed
    retried: int  # steps and evaluations that ran out of memory and were repeated
    peak_rss_bytes: int
    adapter_dir: Path  # the adapter after the last step
    best_dir: Path | None  # the adapter with the lowest held-out loss
    weight_bytes_read: int = 0  # of frozen weights that did not fit, by this process
    weight_stall_seconds: float = 0.0  # waiting for them
    shipped_dir: Path | None = None  # the 4-bit model that the last evaluation was of
    retention: dict[str, Any] | None = None  # how much of what the adapter learned that model keeps


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def describe(summary: TrainSummary) -> str:
    """The lines that are printed at the end."""
    speed = (
        f"{summary.tokens_per_second:,.0f} tokens/s (median), " if summary.tokens_per_second else ""
    )
    lines = [
        f"{summary.steps} steps, {summary.tokens:,} tokens, {speed}peak memory {mib(summary.peak_rss_bytes)}"
    ]
    if summary.loss_before is not None and summary.loss_after is not None:
        lines.append(f"held-out loss {summary.loss_before:.4f} -> {summary.loss_after:.4f}")
    if summary.paged_bytes or summary.retried:
        steps = "step" if summary.retried == 1 else "steps"
        lines.append(
            f"paging moved {mib(summary.paged_bytes)} of optimizer states; {summary.retried} {steps} began again; "
            f"it cost {summary.paging_seconds:.1f} s"
        )
    if summary.weight_bytes_read:
        lines.append(
            f"read {mib(summary.weight_bytes_read)} of frozen weights that did not fit in memory, and "
            f"waited {summary.weight_stall_seconds:.1f} s for them"
        )
    if summary.skipped_steps:
        lines.append(
            f"{summary.skipped_steps} steps were skipped: their loss or gradient was not finite"
        )
    lines.append(f"adapter: {summary.adapter_dir}")
    if summary.shipped_dir is not None:
        lines.append(f"the 4-bit model of this loss: {summary.shipped_dir}")
    if summary.best_dir is not None and summary.best_step != summary.steps:
        lines.append(
            f"lowest held-out loss {summary.best_loss:.4f} at step {summary.best_step}: {summary.best_dir}"
        )
    return "\n".join(lines)
