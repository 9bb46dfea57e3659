"""The page of a run: ``report.html``, one file that needs no server and no network, made of what is in the run's folder
(``report.json``, ``metrics.jsonl``, the names of the checkpoints) and of nothing else."""

from __future__ import annotations

import json
import math
from array import array
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qlora_native._io import as_write_error, read_json, reading, write_whole

CURVES = {"loss": "Training loss", "eval_loss": "Held-out loss", "lr": "Learning rate", "grad_norm": "Gradient norm"}
CURVES["tokens_per_second"] = "Tokens per second"
LOGARITHMIC, LOG_FROM = ("loss", "eval_loss", "grad_norm"), 5  # if the values differ by more than so many times
STRETCHES = 240  # of a curve; the lowest and the highest point of each are drawn
MOST_DOTS, MOST_EVENTS, MOST_SAMPLES = 60, 100, 32
MOST_TEXT, MOST_CONFIG = 600, 20_000  # characters: of five bytes each, as those that HTML escapes, it is below 1 MB
LEFT, TOP, RIGHT, BOTTOM = 46, 8, 352, 158  # of a chart's area, in its view box of 360 x 180
Points = tuple[np.ndarray, np.ndarray]  # float64 [points] each: steps, values


class Curves:
    """The figures and the last answers of a ``metrics.jsonl`` that grows: :meth:`read` takes the lines that are new."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
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
        return {key: (np.array(steps), np.array(values)) for key, (steps, values) in self._columns.items()}


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
    from jinja2 import Environment, StrictUndefined

    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(source)


def content(folder: Path, curves: Curves) -> dict[str, Any]:
    """What the template shows."""
    points = curves.read()
    facts: dict[str, Any] = {"model": folder.name, "config": "", "rows": [], "steps": None, "memory": None, "notes": []}
    facts |= {"has_ended": False, **(read_json(folder / "report.json") if (folder / "report.json").is_file() else {})}
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
    charts = [_chart(key, points) for key in CURVES if len(points[key][0])]
    events.sort(key=lambda event: event[0])
    facts |= {"events": events[-MOST_EVENTS:], "left_out": len(events) - MOST_EVENTS}
    facts["samples"] = [{k: shorten(v) for k, v in sample.items()} for sample in curves.samples[:MOST_SAMPLES]]
    facts |= {"more_samples": len(curves.samples) - MOST_SAMPLES, "config": shorten(facts["config"], MOST_CONFIG)}
    return {**facts, "figures": figures, "charts": charts}


def shorten(text: str, most: int = MOST_TEXT) -> str:
    """The text, of a longer one its ends and how many characters lie between them."""
    left_out = len(text) - most
    return text if left_out <= 0 else f"{text[: most // 2]} [… {left_out:,} characters …] {text[-most // 2 :]}"


def _chart(key: str, points: dict[str, Points]) -> dict[str, Any]:
    """A curve as SVG paths and the ticks of its axes; beside the training loss the held-out loss is drawn."""
    steps, values = points[key]
    held_out = points["eval_loss"] if key in ("loss", "eval_loss") else (steps[:0], values[:0])
    lines = {"held-out" if key == "eval_loss" else "steps": (steps, values)}
    if key not in ("eval_loss", "lr") and (window := len(values) // 40) > 1:
        lines["mean"] = steps[window - 1 :], np.convolve(values, np.ones(window) / window, "valid")
    if len(held_out[0]):
        lines["held-out"] = held_out
    low, high = (float(bound(np.concatenate([values, held_out[1]]))) for bound in (np.min, np.max))
    is_log = key in LOGARITHMIC and low > 0 and high > LOG_FROM * low
    marks = ticks(low, high, is_log=is_log)
    low, high, last = min(low, marks[0]), max(high, marks[-1]), max(*(each[-1] for each, _ in lines.values()), 1)

    def place(step: float, value: float) -> str:
        value, bottom, top = (math.log(each) if is_log else each for each in (value, low, high))
        x, y = LEFT + (RIGHT - LEFT) * step / last, BOTTOM - (BOTTOM - TOP) * (value - bottom) / (top - bottom)
        return f"{x:.1f} {y:.1f}"

    lowest = held_out[1].argmin() if len(held_out[1]) else None
    return {
        "key": key,
        "title": CURVES[key] + (" (log scale)" if is_log else ""),
        "last": f"{values[-1]:,.0f}" if abs(values[-1]) >= 1000 else f"{values[-1]:.3g}",
        "lines": {name: "M" + "L".join(map(place, *thin(*line))) for name, line in lines.items()},
        "dots": [
            (place(at, value).split(), f"step {at:,.0f}: {value:.4f}", number == lowest)
            for number, (at, value) in enumerate(zip(*held_out, strict=True))
            if number == lowest or len(held_out[0]) <= MOST_DOTS
        ],
        "y_ticks": [(place(0, mark).split()[1], f"{mark:,.9g}") for mark in marks],
        "x_ticks": [(place(at, low).split()[0], f"{at:,.0f}") for at in ticks(0, last) if at % 1 == 0 and at <= last],
    }


def thin(steps: np.ndarray, values: np.ndarray) -> Points:
    """The first and the last point, and of each of STRETCHES parts the lowest and the highest: no peak is lost."""
    if len(values) <= 2 * STRETCHES:
        return steps, values
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), STRETCHES):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return steps[sorted(kept)], values[sorted(kept)]


def ticks(low: float, high: float, *, is_log: bool = False) -> list[float]:
    """Some two to eight round numbers, from about ``low`` to about ``high``."""
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [mark for power in powers for factor in (1, 2, 5) if low <= (mark := factor * 10.0**power) <= high]
        marks = marks if len(marks) <= 8 else [mark for mark in marks if f"{mark:e}".startswith("1.0")]
        return marks[:: 1 + len(marks) // 9]
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if 4 * factor * power >= high - low)
    return [float(f"{number * step:.12g}") for number in range(math.floor(low / step), math.ceil(high / step) + 1)]
