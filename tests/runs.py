"""The files and the config of a small run, ``qlora train`` in a process of its own, and the metrics it leaves."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import yaml


def write_files(folder: Path, rows: int = 20, **sizes: Any) -> Path:
    """A folder with ``model`` and ``train.jsonl``."""
    tiny.write_model(folder / "model", **sizes)
    tiny.write_rows(folder / "train.jsonl", rows)
    return folder


def settings(files: Path, out: Path, data: Any = None, lora: Any = None, **train: Any) -> dict[str, Any]:
    """The config of a run on such files; neither checkpoints nor evaluations unless ``train`` asks for them."""
    return {
        "model": str(files / "model"),
        "output_dir": str(out),
        "data": {"train": str(files / "train.jsonl"), "eval_fraction": 0, **(data or {})},
        "lora": lora or {},
        "train": {"save_every": 0, "eval_every": 0, **train},
    }


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times, which differ from run to run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def events(out: Path) -> list[tuple[int, str]]:
    """The notes of report.json, each of which the page has among its events: the step, the text."""
    notes = [(note["step"], note["text"]) for note in json.loads((out / "report.json").read_text())["notes"]]
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert all(f"<tr><th>{step:,}</th><td>{text}</td></tr>" in page for step, text in notes)
    return notes


class Crash(Exception):
    pass


def crash_at(step: int) -> Callable[[dict[str, Any]], None]:
    """A Trainer's ``on_step`` that raises Crash after ``step``."""

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise Crash

    return on_step


def start(config: dict[str, Any], folder: Path, driver: str = "", **environment: str) -> subprocess.Popen[str]:
    """``qlora train`` on ``config``; ``driver`` is Python that runs before it."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    hup = "import signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # under nohup it is ignored
    code = f"{hup}{driver}\nfrom qlora_native.tool.cli.main import main\nsys.exit(main(['train', sys.argv[1]]))\n"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 180
) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.002)


def steps_made(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.is_file() else 0
