"""The page of a run: ``report.html``, one file that needs no server and no network, made of what is in the run's folder
(``report.json``, ``metrics.jsonl``, the names of the checkpoints) and of nothing else."""

from __future__ import annotations

import json
from array import array
from contextlib import suppress
from datetime import timedelta
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from qlora_native._io import as_write_error, read_json, reading, shorten, write_whole

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    HAS_MATPLOTLIB = True
except ImportError:
    HAS_MATPLOTLIB = False

CURVES = {
    "loss": "Training loss",
    "eval_loss": "Held-out loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
# If the values differ by more than so many times.
LOGARITHMIC, LOG_FROM = (("loss", "eval_loss", "grad_norm"), 5)
STRETCHES = 240  # of a curve; the lowest and the highest point of each are drawn
MOST_DOTS = 60
MOST_EVENTS = 100
MOST_SAMPLES = 32
# Characters: of five bytes each, as those that HTML escapes, the page is below 1 MB.
MOST_CONFIG = 20_000
# What matplotlib draws in these colors takes those of the page's variables, which a dark page changes.
SOFT, LINE = "#667085", "#e3e6ec"  # of words, of the grid
COLORS = {"steps": "#2563eb", "mean": "#2563eb", "held-out": "#d9480f", "lowest": "#2f9e6e"}
VARIABLES = {"#2563eb": "--c0", "#d9480f": "--c1", "#2f9e6e": "--c2", SOFT: "--soft", LINE: "--line"}
Points = tuple[np.ndarray, np.ndarray]  # float64 [points] each: steps, values


class Curves:
    """The figures and the last answers of a ``metrics.jsonl`` that grows: :meth:`read` takes the lines that are new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._columns = {key: (array("d"), array("d")) for key in (*CURVES, "tokens", "seconds")}
        self.samples: list[dict[str, str]] = []

    def read(self) -> dict[str, Points]:
        """The points by key."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for text in file:
                line: dict[str, Any] = {}
                with suppress(ValueError):  # an incomplete one of a killed run
                    line = json.loads(text)
                for key in line.keys() & self._columns.keys():
                    if line[key] is not None:
                        self._columns[key][0].append(line["step"])
                        self._columns[key][1].append(line[key])
                self.samples = line.get("samples", self.samples)
            self._offset = file.tell()
        return {
            key: (np.array(steps), np.array(values)) for key, (steps, values) in self._columns.items()
        }


def write_page(folder: Path, curves: Curves | None = None) -> Path:
    """Write ``report.html`` into the folder of a run, and return its path; ``curves`` are those read so far."""
    with reading(folder, "the run is as it was"):
        text = _template().render(content(folder, curves or Curves(folder / "metrics.jsonl")))
    page = folder / "report.html"
    with as_write_error(page):
        write_whole(page, text.encode("utf-8", "replace").decode("utf-8"))
    return page


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    here = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=here, undefined=StrictUndefined, **options).get_template("page.html")


def content(folder: Path, curves: Curves) -> dict[str, Any]:
    """What the template shows."""
    points = curves.read()
    facts: dict[str, Any] = {
        "model": folder.name,
        "config": "",
        "rows": [],
        "steps": None,
        "memory": None,
        "notes": [],
    }
    facts["has_ended"] = False
    if (folder / "report.json").is_file():
        facts |= read_json(folder / "report.json")
    step = int(max((steps[-1] for steps, _ in points.values() if len(steps)), default=0))
    figures = {"step": f"{step:,}" + (f" of {facts['steps']:,}" if facts["steps"] else "")}
    events = [(note["step"], shorten(note["text"])) for note in facts["notes"]]
    events += [(int(path.name[5:]), f"checkpoint {path.name}") for path in folder.glob("step-*")]
    steps, losses = points["eval_loss"]
    if len(losses):
        figures["held-out loss"] = f"{losses[0]:.3f} → {losses[-1]:.3f}"
        events.append((int(steps[losses.argmin()]), f"lowest held-out loss: {losses.min():.4f}"))
    if len(speeds := points["tokens_per_second"][1]):
        figures["tokens per second, median"] = f"{np.median(speeds):,.0f}"
        figures["tokens"] = f"{points['tokens'][1].sum():,.0f}"
        figures["time of the steps"] = str(timedelta(seconds=round(points["seconds"][1].sum())))
    events.sort(key=lambda event: event[0])
    return {
        **facts,
        "figures": figures,
        "charts": [_chart(key, points) for key in CURVES if HAS_MATPLOTLIB and len(points[key][0])],
        "can_draw": HAS_MATPLOTLIB,
        "events": events[-MOST_EVENTS:],
        "left_out": len(events) - MOST_EVENTS,
        "samples": [
            {k: shorten(v) for k, v in sample.items()} for sample in curves.samples[:MOST_SAMPLES]
        ],
        "more_samples": len(curves.samples) - MOST_SAMPLES,
        "config": shorten(facts["config"], MOST_CONFIG),
    }


def _chart(key: str, points: dict[str, Points]) -> dict[str, Any]:
    """A curve as SVG; beside the training loss the held-out loss is drawn."""
    steps, values = points[key]
    lines: dict[str, Points] = {} if key == "eval_loss" else {"steps": (steps, values)}
    window = len(values) // 40
    if key not in ("eval_loss", "lr") and window > 1:
        lines["mean"] = steps[window - 1 :], np.convolve(values, np.ones(window) / window, "valid")
    if key in ("loss", "eval_loss") and len(points["eval_loss"][0]):
        lines["held-out"] = points["eval_loss"]
        at = lines["held-out"][1].argmin()
        lines["lowest"] = tuple(column[[at]] for column in lines["held-out"])  # type: ignore[assignment]
    every = np.concatenate([line[1] for line in lines.values()])
    is_log = key in LOGARITHMIC and every.min() > 0 and every.max() > LOG_FROM * every.min()
    file = StringIO()
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": key, "path.simplify": False, "font.size": 11}
    ):
        figure = Figure(figsize=(5, 2.5), facecolor="none")
        axes = figure.add_axes(
            (0.14, 0.1, 0.85, 0.87), frameon=False, yscale="log" if is_log else "linear"
        )
        for name, line in lines.items():
            has_dots = name == "lowest" or (name == "held-out" and len(line[0]) <= MOST_DOTS)
            alpha = 0.4 if name == "steps" and "mean" in lines else 1.0
            axes.plot(
                *thin(*line),
                ".-" if has_dots else "-",
                color=COLORS[name],
                alpha=alpha,
                gid=f"{key}:{name}",
            )
        if is_log:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter("")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.9g}")
        axes.tick_params(which="both", length=0, labelcolor=SOFT)
        axes.grid(axis="y", color=LINE)
        # Without the date and the program the bytes depend on the figures alone.
        figure.savefig(
            file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = file.getvalue().partition("<svg")[2]
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return {
        "title": CURVES[key] + (" (log scale)" if is_log else ""),
        "last": f"{values[-1]:,.0f}" if abs(values[-1]) >= 1000 else f"{values[-1]:.3g}",
        "names": list(lines),
        "svg": f"<svg{svg}",
    }


def thin(steps: np.ndarray, values: np.ndarray) -> Points:
    """The first and the last point, and of each of STRETCHES parts the lowest and the highest: no peak is lost."""
    if len(values) <= 2 * STRETCHES:
        return steps, values
    parts = np.array_split(np.arange(len(values)), STRETCHES)
    ends = (part[find(values[part])] for part in parts for find in (np.argmin, np.argmax))
    kept = np.unique([0, len(values) - 1, *ends])
    return steps[kept], values[kept]
