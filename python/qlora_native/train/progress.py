"""What a run reports while it runs: one bar on a terminal, plain lines elsewhere, every step in ``metrics.jsonl``, and
the same figures in other programs (TensorBoard, trackio)."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_native._io import as_write_error, atomic_file, write_whole
from qlora_native._memory import peak_rss_bytes
from qlora_native.errors import UserError


class Metrics:
    """``metrics.jsonl``: one JSON object per step and per evaluation, appended, flushed at once, and given to the
    ``loggers``. Without a ``path``, on all ranks but the first, nothing is written.

    A run that resumes at step N drops what a killed run wrote after the checkpoint: steps above N, and evaluations
    from N on, which are made again.
    """

    def __init__(self, path: Path | None, resume_step: int, loggers: Sequence[Logger] = ()) -> None:
        self.path, self._loggers = path, loggers
        if path is None:
            return
        kept = [line for line in read_metrics(path) if line["step"] + ("eval_loss" in line) <= resume_step]
        with as_write_error(path):
            write_whole(path, "".join(f"{json.dumps(line)}\n" for line in kept))
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
        if self.path is not None:
            with suppress(OSError):  # of a line that could not be written, which write() has reported
                self._file.close()
        for logger in self._loggers:
            logger.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without an incomplete last one of a killed run; empty if there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def plot_losses(output_dir: Path) -> None:
    """Draw training and held-out loss over the steps into ``loss.png``, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = read_metrics(output_dir / "metrics.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    styles: dict[str, Any] = {
        "loss": {"linewidth": 1, "label": "training"},
        "eval_loss": {"marker": "o", "label": "held out"},
    }
    for key, style in styles.items():
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        axes.plot(*zip(*points, strict=True), **style) if points else None
    axes.legend()
    axes.grid(alpha=0.3)
    picture = output_dir / "loss.png"
    with as_write_error(picture), atomic_file(picture) as partial:
        figure.savefig(partial, dpi=120, format="png")


class TensorBoard:
    """Event files in ``output_dir/tensorboard``; `tensorboard --logdir` shows them."""

    def __init__(self, output_dir: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(output_dir / "tensorboard"))
        self.close = self._writer.close  # writes what is buffered

    def write(self, record: Mapping[str, Any]) -> None:
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
    """Prints notes, steps and evaluations; nothing if ``quiet``."""

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
        """One optimizer step, given as its line of ``metrics.jsonl``.

        The time left is the mean time of a step times the steps left, and the time of the last evaluation times those
        that are due: at the end, and every ``eval_every`` steps unless that is 0.
        """
        done = record["step"]
        self._step_seconds += record["seconds"]
        due = -(-self.total // self.eval_every) - (done - 1) // self.eval_every if self.eval_every else 1
        left = self._step_seconds / (done - self._start) * (self.total - done) + self._evaluation_seconds * due
        minutes, seconds = divmod(round(left), 60)
        clock = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
        status = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"peak {peak_rss_bytes() / 2**20:,.0f} MiB  {clock} left"
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
        if self._bar is not None:
            self._bar.stop()

    def _rich_bar(self) -> Any:
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as RichProgress
        except ImportError:
            return None
        return RichProgress(MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[status]}"))
