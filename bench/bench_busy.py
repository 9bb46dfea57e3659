"""`qlora train` on a machine whose every core is busy with another program, and on an idle one.

    python bench/bench_busy.py --json

Threads that have nothing to do: ours sleep while threads wait for a CPU and else spin, passive always sleep
(OMP_WAIT_POLICY=passive), libgomp's spin 300,000 turns, its default. Busy: one process each, in turns; the time is that
of a step, the median of a run without its first, and all must make the same adapter. Idle: one process, whose CPUs are
looked at in every second step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
import yaml
from ceilings import ceilings
from common import Bar, Bench, timings
from safetensors.torch import save_file

from qlora_native import _threads
from qlora_native.calibration.data import FILE, TENSOR
from qlora_native.tool.cli.demo_model import model_file
from qlora_native.tool.cli.standard_library import write_split
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer

THREADS = {"ours": {}, "passive": {"OMP_WAIT_POLICY": "passive"}, "libgomp": {"GOMP_SPINCOUNT": "300000"}}
METHODS = {"idle": "rtn", "busy": "rtn", "calibrated": "wmse"}  # by state
BARS = {"busy": Bar("passive", 0.8, faster=True), "calibrated": Bar("passive", 1.1)}


def config(folder: Path, steps: int, state: str, **data: Any) -> dict[str, Any]:
    """One of SmolLM2-135M, with rows of at most 128 tokens."""
    train = {"steps": steps, "batch_size": 1, "save_every": 0, "eval_every": 0, "log_every": steps}
    data |= {"train": str(folder / "data" / "train.jsonl"), "eval_fraction": 0, "max_length": 128}
    files = {"model": str(model_file()), "output_dir": str(folder / "out")}
    quant = {"method": METHODS[state], "calibration": str(folder / FILE) if state == "calibrated" else None}
    return {**files, "quant": quant, "data": data, "train": train}


def run(folder: Path, settings: dict[str, str], steps: int, state: str) -> tuple[float, bytes]:
    """Seconds of a step, and the adapter, of one run."""
    out = folder / "out"
    (folder / "config.yaml").write_text(yaml.safe_dump(config(folder, steps, state)), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in _threads.CHOSEN} | settings
    words = [sys.executable, "-m", "qlora_native", "train", str(folder / "config.yaml")]
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = [json.loads(text) for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [record["seconds"] for record in records if "loss" in record]
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out)
    return median(seconds[1:]), adapter


def busy(folder: Path, repeats: int, steps: int, state: str) -> dict[str, Any]:
    """All three in turns, beside a program on every core; libgomp's own once, and not after a calibration."""
    seconds: dict[str, list[float]] = {name: [] for name in THREADS}
    adapters = set()
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(other.kill)
        for number in range(repeats):
            for threads, settings in THREADS.items():
                if threads == "libgomp" and (number or state == "calibrated"):
                    continue  # each waits for the other's turn to end
                took, adapter = run(folder, settings, steps, state)
                seconds[threads].append(took)
                adapters.add(adapter)
    seconds = {name: times for name, times in seconds.items() if times}
    return {"match": len(adapters) == 1, **timings(seconds, [BARS[state]])}


def idle(folder: Path, steps: int) -> dict[str, Any]:
    """Steps of one process; in every second one the threads are said to wait no longer than before."""
    seconds: dict[str, list[float]] = {"ours": [], "libgomp": []}
    look = _threads._waited

    def next_step(record: dict[str, Any]) -> None:
        is_odd = record["step"] % 2 == 1
        if record["step"] > 1:
            seconds["libgomp" if is_odd else "ours"].append(record["seconds"])
        now = look()
        _threads._waited = look if is_odd else lambda: now

    values = config(folder, steps, "idle", packing=True)  # every step of as many tokens
    Trainer(TrainConfig.model_validate(values), on_step=next_step, quiet=True).train()
    return {"match": None, "same_adapter": None, **timings(seconds, [Bar("libgomp", 0.97, faster=True)])}


def main() -> None:
    bench = Bench("busy", __doc__, repeats=5, steps=8, states=tuple(METHODS))  # five times as many steps if idle
    bench.begin(ceilings=ceilings())
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_split(folder / "data", 400, 1)
        few = torch.randint(1000, (4, 128), dtype=torch.int32)  # nearly all of the time is the search, which needs none
        save_file({TENSOR: few}, folder / FILE)
        for state in bench.options.states:
            if state == "idle":
                row = idle(folder, 5 * bench.options.steps + 1)
            else:
                row = busy(folder, bench.options.repeats, bench.options.steps, state)
            bench.add({"state": state, "load": round(os.getloadavg()[0], 1), **row}, "state", "load")
    bench.write()


if __name__ == "__main__":
    main()
