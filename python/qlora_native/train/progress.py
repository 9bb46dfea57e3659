"""What a run reports while it runs: one bar on a terminal, plain lines elsewhere, every step in ``metrics.jsonl``, and
the same figures in other programs (TensorBoard, trackio, W&B, MLflow)."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partialmethod
from pathlib import Path
from typing import Any

from qlora_native._io import as_write_error, atomic_file, is_terminal, read_json, reason, without_nan, write_whole
from qlora_native._memory import peak_rss_bytes
from qlora_native.errors import UserError


class Metrics:
    """``metrics.jsonl``: one JSON object per step and per evaluation, appended, flushed at once, and given to the
    ``loggers``. Without a ``path``, on all ranks but the first, nothing is written.

    A run that resumes at step N drops what a killed run wrote after the checkpoint: steps above N, and evaluations
    (and answers) from N on, which are made again.
    """

    def __init__(self, path: Path | None, resume_step: int, loggers: Sequence[Logger] = ()) -> None:
        self.path, self._loggers = path, loggers
        if path is None:
            return
        kept = [line for line in read_metrics(path) if line["step"] + ("loss" not in line) <= resume_step]
        with as_write_error(path):
            write_whole(path, "".join(f"{json.dumps(line)}\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        if self.path is None:
            return
        with as_write_error(self.path):
            self._file.write(json.dumps(without_nan(record)) + "\n")
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
    """The lines of a ``metrics.jsonl`` that hold a step and its numbers or answers, which an incomplete last one of a
    killed run does not; empty if there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError, AttributeError):
            line = json.loads(text)
            numbers = {key: value for key, value in line.items() if value is not None}
            answers = numbers.pop("samples", [])
            if type(numbers.get("step")) is int and type(answers) is list and all(map(_is_number, numbers.values())):
                lines.append(line)
    return lines


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def plot_losses(output_dir: Path) -> None:
    """Draw training and held-out loss over the steps, and the best step, into ``loss.png``, if matplotlib is
    installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
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
        if points and key == "eval_loss":
            step, loss = min(points, key=lambda point: point[1])
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


class Logger:
    """A run in another program, which ``log`` gives figures by name, and the number of their step."""

    def __init__(self, log: Callable[..., object], close: Callable[[], object]) -> None:
        self._log, self.close = log, close

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the finite numbers of a line but its step, held-out ones under ``eval/``, the others under ``train/``."""
        found = {}
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                found[f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"] = float(value)
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
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"logging names {name}, which is not installed: pip install {name}, or leave it out")
    made = []
    for name in names:
        try:
            made.append(_start(name, output_dir, config))
        except Exception as error:  # it is not logged in, has no network, or whatever else
            raise UserError(f"logging names {name}, which does not start: {reason(error)}") from error
    return made


class Progress:
    """Prints notes, steps and evaluations; nothing if ``quiet``."""

    def __init__(self, total: int, start: int, log_every: int, eval_every: int = 0, *, quiet: bool = False) -> None:
        self.total, self.log_every, self.eval_every, self.quiet = total, log_every, eval_every, quiet
        self._start, self._step_seconds, self._evaluation_seconds = start, 0.0, 0.0
        self._bar: Any = None
        if not quiet and is_terminal(sys.stdout):
            with suppress(ImportError):
                from rich import progress as rich

                columns = rich.MofNCompleteColumn(), rich.BarColumn(bar_width=24)
                self._bar = rich.Progress(*columns, rich.TextColumn("{task.fields[status]}"))
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
        clock += " left" if done < self.total or round(left) == 0 else " left, for the last evaluation"
        status = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"peak {peak_rss_bytes() / 2**20:,.0f} MiB  {clock}"
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


PAGE_SHARE = 0.005  # of a run's time, at most, that writing its page takes


class RunPage:
    """Keeps ``report.json``, the ``facts`` of a run and its notes, and ``report.html``, made of it and of the metrics.

    A page that cannot be written is noted once and ends no run. Without a ``folder``, on all ranks but the first,
    nothing is written. ``step`` returns the run's step, ``memory`` is its MemoryReport.
    """

    def __init__(
        self, folder: Path | None, facts: dict[str, Any], progress: Progress, step: Callable[[], int], memory: Any
    ) -> None:
        self._folder, self._facts, self._progress, self._step, self._memory = folder, facts, progress, step, memory
        self._began, self._cost, self._spent, self._has_failed = time.monotonic(), 0.0, 0.0, False
        self._curves: Any = None
        self._notes: list[dict[str, Any]] = []
        with suppress(Exception):  # a new run has none, and a damaged file costs its notes alone
            earlier = read_json(folder / "report.json")["notes"] if folder is not None and step() else []
            kept = [(int(note["step"]), str(note["text"])) for note in earlier if 0 <= note["step"] <= step()]
            self._notes = [{"step": number, "text": text} for number, text in kept]

    def note(self, text: str) -> None:
        """Print one line, and list it among the run's events."""
        self._notes.append({"step": self._step(), "text": text})
        self._progress.note(text)

    def write(self, *, has_ended: bool = False) -> None:
        """Write the page, unless all writes, this one and the last, would take more than their share; always at the
        start and at the end."""
        began = time.monotonic()
        is_early = self._spent + 2 * self._cost > PAGE_SHARE * (began - self._began) and not has_ended
        if self._folder is None or is_early or self._facts.get("has_ended"):
            return
        try:
            from qlora_native.evaluate.page import Curves, write_page

            self._facts |= {"memory": self._memory and self._memory.as_dict(), "notes": self._notes}
            self._facts["has_ended"] = has_ended
            write_whole(self._folder / "report.json", json.dumps(self._facts) + "\n")
            self._curves = self._curves or Curves(self._folder / "metrics.jsonl")
            write_page(self._folder, self._curves)
        except Exception as error:  # whatever it is, the run is worth more
            if not self._has_failed:
                self._progress.note(f"report.html could not be written: {reason(error)}")
            self._has_failed = True
        self._cost = time.monotonic() - began
        self._spent += self._cost

    close = partialmethod(write, has_ended=True)
