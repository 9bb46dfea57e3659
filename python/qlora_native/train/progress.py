"""What a run says while it runs: one bar on a terminal, plain lines elsewhere, and every step in ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_native._io import as_write_error, atomic_file
from qlora_native._memory import peak_rss_bytes
from qlora_native.train.loggers import Logger


class Metrics:
    """``metrics.jsonl``: one JSON object per step and per evaluation, appended and flushed at once.

    A run that resumes at step N drops what a killed run wrote after the checkpoint: steps above N, and evaluations
    from N on, which are made again. Each line goes to the ``loggers`` too.
    """

    def __init__(self, path: Path, resume_step: int, loggers: Sequence[Logger] = ()) -> None:
        self.path, self._loggers = path, loggers
        kept = [line for line in read_metrics(path) if line["step"] + ("eval_loss" in line) <= resume_step]
        with as_write_error(path):
            with atomic_file(path) as partial:
                partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. JSON has no NaN: what is not finite is written as null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with as_write_error(self.path):
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        for logger in self._loggers:
            logger.write(record)

    def close(self) -> None:
        """Close the file; what could be written is written already."""
        self._file.close()
        for logger in self._loggers:
            logger.close()


class NoMetrics:
    """In place of :class:`Metrics` where another rank writes the file."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without a last one that a kill cut short; empty if there is no file."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines


def plot_losses(metrics: Path, picture: Path) -> bool:
    """Draw training and held-out loss over the steps into a PNG; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = read_metrics(metrics)
    trained = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    axes.plot(*zip(*trained, strict=True), linewidth=1, label="training") if trained else None
    axes.plot(*zip(*held_out, strict=True), marker="o", label="held out") if held_out else None
    axes.legend()
    axes.grid(alpha=0.3)
    with as_write_error(picture):
        figure.savefig(picture, dpi=120)
    return True


class Progress:
    """The human side: notes, steps and evaluations. ``quiet`` prints nothing.

    The time left is the mean time of a step times the steps left, and the time of the last evaluation times those that
    are still due: at the end, and every ``eval_every`` steps unless that is 0.
    """

    def __init__(self, total: int, start: int, log_every: int, eval_every: int = 0, *, quiet: bool = False) -> None:
        self.total, self.log_every, self.eval_every, self.quiet = total, log_every, eval_every, quiet
        self._start, self._step_seconds, self._evaluation_seconds = start, 0.0, 0.0
        self._bar = self._rich_bar() if not quiet and sys.stdout.isatty() else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=start, status="")

    def note(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            print(text, flush=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """One optimizer step, given as its line of ``metrics.jsonl``."""
        done = record["step"]
        self._step_seconds += record["seconds"]
        status = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"peak {peak_rss_bytes() / 2**20:,.0f} MiB  {_clock(self._seconds_left(done))} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif not self.quiet and (done % self.log_every == 0 or done in (self._start + 1, self.total)):
            print(f"step {done}/{self.total}  {status}", flush=True)

    def evaluation(self, step: int, loss: float, seconds: float) -> None:
        """One evaluation on the held-out rows, which took ``seconds``."""
        self._evaluation_seconds = seconds
        perplexity = math.exp(min(loss, 700.0))
        self.note(f"step {step}/{self.total}  held-out loss {loss:.4f}  perplexity {perplexity:,.2f}")

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()

    def _seconds_left(self, done: int) -> float:
        """After step ``done``, whose own evaluation is still to come if one is due."""
        due = 1
        if self.eval_every:
            due = -(-self.total // self.eval_every) - (done - 1) // self.eval_every
        return self._step_seconds / (done - self._start) * (self.total - done) + self._evaluation_seconds * due

    def _rich_bar(self) -> Any:
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as RichProgress
        except ImportError:
            return None
        return RichProgress(MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[status]}"))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
