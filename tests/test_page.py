"""The page of a run: what it shows, that it is made of the run's folder alone, in a browser too, and what it costs."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import yaml
from helpers import program
from PIL import Image
from runs import Crash, crash_at

from qlora_native.errors import UserError
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.evaluate import page
from qlora_native.tool.train import progress
from qlora_native.tool.train.checkpoint import TrainState
from qlora_native.tool.train.loop import Trainer
from qlora_native.tool.train.progress import Progress, RunReport, read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_CURVE = {"loss", "eval_loss", "lr", "grad_norm", "tokens_per_second"}


class Parsed(HTMLParser):
    """Attributes by tag, and the text inside elements with an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: dict[str, str] = {}
        self._id = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self._id = dict(attrs).get("id") or self._id

    def handle_data(self, data: str) -> None:
        self.texts[self._id] = self.texts.get(self._id, "") + data


def curves_of(text: str) -> dict[tuple[str, str], np.ndarray]:
    """The points [2, points] of each line in the pixels of its picture, by the key of its curve and its name."""
    found = re.findall(r'<g id="(\w+):([\w-]+)">\s*<path d="M ([^"]*)"', text)
    return {(key, name): np.array(path.replace("L", "").split(), float).reshape(-1, 2).T for key, name, path in found}


def distance(points: np.ndarray, steps: Any, values: Any, is_log: bool = False) -> float:
    """The largest distance, in pixels, of a line's points from where an axis puts the figures: x evenly, y evenly or by
    their logarithm, upwards."""
    worst = 0.0
    for places, figures in zip(points, (np.array(steps), np.log(values) if is_log else np.array(values)), strict=True):
        slope, start = np.polyfit(figures, places, 1)
        worst = max(worst, float(np.abs(places - slope * figures - start).max()))
    assert slope < 0
    return worst


def plain(text: str) -> str:
    return re.sub(r"[^!-~]", "", text)  # a random model writes control characters


def config(folder: Path, out: str = "out", **train: Any) -> TrainConfig:
    options: dict[str, Any] = {"steps": 12, "batch_size": 4, "grad_accum": 1, "lr": 5e-3}
    options |= {"eval_every": 2, "save_every": 4, "samples": 2}
    values = runs.settings(folder, folder / out, {"eval_fraction": 0.2}, {"r": 8}, **{**options, **train})
    return TrainConfig.model_validate(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that crashed after step 7 and was resumed from step 4."""
    folder = runs.write_files(tmp_path_factory.mktemp("page"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "PAGE_SHARE", math.inf)
        with pytest.raises(Crash):
            Trainer(config(folder), quiet=True, on_step=crash_at(7)).train()
    Trainer(config(folder).model_copy(update={"resume": "auto"}), quiet=True).train()
    return folder


@pytest.fixture(scope="module")
def parsed(folder: Path) -> Parsed:
    return Parsed((folder / "out" / "report.html").read_text(encoding="utf-8"))


def test_every_curve_has_every_point(folder: Path, parsed: Parsed) -> None:
    lines = read_metrics(folder / "out" / "metrics.jsonl")
    steps, evaluations = ([line for line in lines if key in line] for key in ("loss", "eval_loss"))
    assert [line["step"] for line in steps] == [*range(1, 13)] and len(evaluations) == 7
    text = (folder / "out" / "report.html").read_text(encoding="utf-8")
    curves = curves_of(text)
    assert {key for key, _ in curves} == EVERY_CURVE
    logarithmic = {key for key, title in page.CURVES.items() if f"{title} (log scale)" in text}
    for (key, kind), points in curves.items():
        if kind != "lowest":
            found, name = (evaluations, "eval_loss") if kind == "held-out" else (steps, key)
            figures = [line[name] for line in found]
            assert distance(points, [line["step"] for line in found], figures, key in logarithmic) < 0.1
    held_out = curves["loss", "held-out"]
    assert curves["loss", "lowest"].T.tolist() == [held_out[:, held_out[1].argmax()].tolist()]
    lowest = min(evaluations, key=lambda line: line["eval_loss"])
    assert f"{lowest['step']}lowest held-out loss: {lowest['eval_loss']:.4f}" in parsed.texts["events"]


def test_rows_memory_answers_events_and_config(folder: Path, parsed: Parsed) -> None:
    facts = json.loads((folder / "out" / "report.json").read_text())
    train, held_out = facts["rows"]
    data = parsed.texts["data"]
    for stats in (train, held_out):
        assert f"{stats['share_trained']:.1%}" in data and str(stats["tokens"]) in data
    assert (train["rows"], held_out["rows"]) == (16, 4)
    memory = facts["memory"]
    assert f"{sum(memory['predicted'].values()) / 2**20:.2g} MiB" in parsed.texts["memory"]
    assert memory["measured"] > 0 and "activations" in parsed.texts["memory"]
    last = [line for line in read_metrics(folder / "out" / "metrics.jsonl") if "samples" in line][-1]["samples"]
    shown = plain(parsed.texts["samples"])
    assert len(last) == 2 and all(plain(sample[key]) in shown for sample in last for key in sample)
    assert "4continuing from" in parsed.texts["events"] and "12checkpoint step-000012" in parsed.texts["events"]
    shown = yaml.safe_load(parsed.texts["config"])
    shown["quant"]["type"] = "auto"  # nf4 in the resolved config
    assert shown == config(folder).model_dump(mode="json", exclude={"resume"})


def test_it_is_made_of_the_folder_alone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "out", tmp_path / "moved")
    (tmp_path / "moved" / "report.html").unlink()
    written = page.write_page(tmp_path / "moved")
    assert written.read_bytes() == (folder / "out" / "report.html").read_bytes()
    (tmp_path / "moved" / "report.json").unlink()  # of a run of an earlier version
    page.write_page(tmp_path / "moved")
    assert {key for key, _ in curves_of(written.read_text(encoding="utf-8"))} == EVERY_CURVE
    (tmp_path / "moved" / "report.json").write_text('{"notes": 1}')
    with pytest.raises(UserError, match="moved cannot be read"):
        page.write_page(tmp_path / "moved")


def test_no_request_and_no_markup_of_others(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    attack = "<img src=http://host/x onerror=alert(1)></p><script>1</script>"
    with (out / "metrics.jsonl").open("a") as file:
        sample = {"prompt": attack, "before": attack, "answer": attack}
        file.write(json.dumps({"step": 12, "eval_loss": 1.0, "samples": [sample]}) + '\n{"step": 13, "lo')
    text = page.write_page(out).read_text(encoding="utf-8")
    assert text.count("&lt;script&gt;") == 3 and "default-src &#39;none&#39;" not in text
    found = Parsed(text)
    assert not {tag for tag, _ in found.tags} & {"script", "img", "link", "iframe", "object"}
    assert not {name for _, attributes in found.tags for name in attributes} & {"src", "href", "srcset", "onerror"}
    assert not re.search(r"url\((?!#)|@import", text)
    assert all(value[0] == "#" for _, attributes in found.tags for name, value in attributes.items() if "href" in name)
    policies = [attributes for _, attributes in found.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert [policy["content"] for policy in policies] == ["default-src 'none'; style-src 'unsafe-inline'"]


def write_long_run(folder: Path, steps: int) -> None:
    chance = np.random.default_rng(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {"step": step, "loss": 1 + chance.random(), "lr": 2e-4 * (1 - step / steps), "tokens": 4096}
            record |= {"grad_norm": chance.random(), "seconds": 1.5, "tokens_per_second": 2000 + chance.random()}
            record["loss"] = 9.0 if step == 12_345 else record["loss"]
            file.write(json.dumps(record) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "eval_loss": 1 + 1 / step, "eval_perplexity": 3.0}) + "\n")


def test_a_long_run_is_thinned_and_keeps_its_peak(tmp_path: Path, record_property: Any) -> None:
    """Below 1 MB also with many long texts, of characters that HTML escapes; the page says what it leaves out."""
    write_long_run(tmp_path, 20_000)
    sample = dict.fromkeys(("prompt", "before", "answer", "expected"), f"the start {'&' * 8000} the end")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20_000, "eval_loss": 1.0, "samples": [sample] * 200}) + "\n")
    notes = [{"step": step, "text": "&" * 2_000} for step in range(300)]
    (tmp_path / "report.json").write_text(json.dumps({"notes": notes, "config": "&" * 100_000}))
    curves, clock = page.Curves(tmp_path / "metrics.jsonl"), [time.perf_counter()]
    for _ in range(2):
        written = page.write_page(tmp_path, curves)
        clock.append(time.perf_counter())
    record_property("ms to write the page of 20,000 steps first and again", (1000 * np.diff(clock)).round(1).tolist())
    assert written.stat().st_size < 1_000_000
    found = Parsed(written.read_text(encoding="utf-8"))
    answers = found.texts["samples"]
    assert answers.count("[… 7,418 characters …]") == answers.count(" the end") == 4 * 32
    assert "168 more are in metrics.jsonl" in answers and "201 earlier ones" in found.texts["events"]
    assert found.texts["config"].count("&") == 20_000
    lines = curves_of(written.read_text(encoding="utf-8"))
    assert all(points.shape[1] <= 2 * page.STRETCHES + 2 for points in lines.values())
    x, y = lines["loss", "steps"]
    assert (x[y.argmin()] - x[0]) / (x[-1] - x[0]) == pytest.approx(12_345 / 20_000, abs=1e-3)


@pytest.mark.parametrize(("lowest", "span", "is_log"), [(2.204, 0.008, False), (0.5, 6, True)])
def test_values_are_where_the_axis_puts_them(tmp_path: Path, lowest: float, span: float, is_log: bool) -> None:
    chance, steps = np.random.default_rng(0), range(1, 401)
    losses = [lowest + span * chance.random() for _ in steps]
    lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in zip(steps, losses, strict=True)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    text = page.write_page(tmp_path).read_text(encoding="utf-8")
    assert ("Training loss (log scale)" in text) is is_log
    curves = curves_of(text)
    means = [sum(losses[at - 10 : at]) / 10 for at in range(10, 401)]  # of a fortieth of the run
    assert distance(curves["loss", "steps"], steps, losses, is_log) < 0.1
    assert distance(curves["loss", "mean"], range(10, 401), means, is_log) < 0.1


def test_without_matplotlib_the_page_has_no_chart_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    monkeypatch.setattr(page, "HAS_MATPLOTLIB", False)
    text = page.write_page(tmp_path).read_text(encoding="utf-8")
    assert "<svg" not in text and "pip install matplotlib" in text


def test_lines_that_are_new_are_read_and_no_other(tmp_path: Path) -> None:
    write_long_run(tmp_path, 50)
    curves = page.Curves(tmp_path / "metrics.jsonl")
    assert len(curves.read()["loss"][0]) == 50
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "loss": 2.0, "grad_norm": null}\n')
    points = curves.read()
    assert points["loss"][0].tolist() == [*range(1, 52)] and len(points["grad_norm"][0]) == 50


def test_a_page_that_fails_ends_no_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(page, "write_page", fails)
    monkeypatch.setattr(progress, "PAGE_SHARE", math.inf)
    summary = Trainer(config(folder, "failing", samples=0, steps=4)).train()
    printed = capsys.readouterr().out
    assert summary.steps == 4 and printed.count("written: a bug") == 1
    assert not (folder / "failing" / "report.html").exists()


def test_it_takes_its_share_of_the_time_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [0.0], list[float]()

    def takes_two_seconds(*_: Any) -> None:
        written.append(clock[0])
        clock[0] += 2

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(page, "write_page", takes_two_seconds)
    (tmp_path / "metrics.jsonl").touch()
    shown = RunReport(tmp_path, {}, Progress(1, 0, 1, quiet=True), TrainState())
    for _ in range(100):
        shown.evaluated({})
        clock[0] += 30
    shown.close()
    shown.close()
    assert 2 * len(written) <= progress.PAGE_SHARE * clock[0] < 2 * (len(written) + 1) and np.diff(written).min() > 200
    assert json.loads((tmp_path / "report.json").read_text())["has_ended"]


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

MEASURE = """<script>addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("g[id*=':']:not([id$=lowest]) > path")].map(path => {
    const key = path.parentNode.id.split(":")[0]
    return [key, path.getTotalLength(), path.getBoundingClientRect().width, getComputedStyle(path).stroke]
  })
  const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  const requests = performance.getEntriesByType("resource").map(entry => entry.name)
  const style = getComputedStyle(document.body), colors = [style.backgroundColor, style.color]
  const text = Math.min(...[...document.querySelectorAll("text")].map(e => e.getBoundingClientRect().height))
  parent.postMessage({boxes, wide: wide.length, requests, colors, text, width: innerWidth}, "*")
})</script>"""
FRAME = """<body style="margin:0"><iframe src="measured.html" style="border:0; width:{width}px; height:3000px"></iframe>
<script>addEventListener("message", e => document.body.append(JSON.stringify(e.data)))</script>"""


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium(folder: Path, tmp_path: Path, width: int, is_dark: bool) -> None:
    """In a frame as wide as the device, since a window has a least width; with a script that the page would refuse."""
    browser = program("chromium")
    text = (folder / "out" / "report.html").read_text(encoding="utf-8")
    own = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', MEASURE, text)
    assert own != text
    (tmp_path / "measured.html").write_text(own, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500)},3000"]
    flags += [f"--blink-settings=preferredColorScheme={int(not is_dark)}", f"--screenshot={tmp_path / 'shot.png'}"]
    command = [browser, *flags, "--dump-dom", f"file://{tmp_path / 'frame.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.findall(r"\{\"boxes.*\}", done.stdout)[0])
    assert found["width"] == width and found["wide"] == 0 and found["requests"] == []
    assert {key for key, *_ in found["boxes"]} == EVERY_CURVE
    least = 150 if width < 500 else 200
    for _, length, across, stroke in found["boxes"]:
        assert length > least / 2 and across > least and stroke != "none"
    assert found["text"] >= 10  # pixels
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (max(width, 500), 3000)
        frame = shot.convert("RGB").crop((0, 0, width, 1500))
    assert len(frame.getcolors(1 << 24)) > 100
    assert "rgb({}, {}, {})".format(*frame.getpixel((3, 3))) == found["colors"][0]  # nothing is drawn there
    page_light, ink_light = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in found["colors"])
    assert (page_light < ink_light) is is_dark and abs(page_light - ink_light) > 450
