"""What a run reports while it runs: one bar on a terminal, plain lines elsewhere, every step in ``metrics.jsonl``, and
the same figures in other programs (TensorBoard, trackio)."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_native._io import as_write_error, atomic_file
from qlora_native._memory import peak_rss_bytes
from qlora_native.errors import UserError


class Metrics:
    """``metrics.jsonl``: one JSON object per step and per evaluation, appended and flushed at once.

    A run that resumes at step N drops what a killed run wrote after the checkpoint: steps above N, and evaluations
    from N on, which are made again. Each line goes to the ``loggers`` too. Without a ``path``, on all ranks but the
    first, nothing is written.
    """

    def __init__(self, path: Path | None, resume_step: int, loggers: Sequence[Logger] = ()) -> None:
        self.path, self._loggers = path, loggers
        if path is None:
            return
        kept = [line for line in read_metrics(path) if line["step"] + ("eval_loss" in line) <= resume_step]
        with as_write_error(path):
            with atomic_file(path) as partial:
                partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. JSON has no NaN: what is not finite is written as null."""
        if self.path is None:
            return
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
        """Close the file and the loggers."""
        if self.path is not None:
            self._file.close()
        for logger in self._loggers:
            logger.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without an incomplete last one of a killed run; empty if there is no file."""
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


class TensorBoard:
    """Event files in ``output_dir/tensorboard``; `tensorboard --logdir` shows them."""

    def __init__(self, output_dir: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(output_dir / "tensorboard"))
        self.close = self._writer.close  # writes what is buffered

    def write(self, record: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])


class Trackio:
    """A run of the project ``qlora_native``, named like the output folder; `trackio show` shows it."""

    def __init__(self, output_dir: Path, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project="qlora_native", name=output_dir.name, config=dict(config), resume="allow")
        self.close = trackio.finish

    def write(self, record: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``."""
        self._trackio.log(scalars(record), step=record["step"])


Logger = TensorBoard | Trackio
_LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "trackio": Trackio}


def make_loggers(names: Sequence[str], output_dir: Path, config: Mapping[str, Any]) -> list[Logger]:
    """The loggers that ``logging`` names. UserError naming the package of one that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"logging names {name}, which is not installed: pip install {name}, or leave it out")
    return [_LOGGERS[name](output_dir, config) for name in names]


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line but its step, held-out ones under ``eval/`` and the others under ``train/``."""
    found = {}
    for key, value in record.items():
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
            found[f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"] = float(value)
    return found


class Progress:
    """Prints notes, steps and evaluations; nothing if ``quiet``.

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
        """After step ``done``, before its own evaluation."""
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
