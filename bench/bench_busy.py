"""`qlora train` on a machine whose every core is busy with another program, and on an idle one.

    python bench/bench_busy.py --json

Threads that have nothing to do: ours sleep while threads wait for a CPU and else spin, passive always sleep
(OMP_WAIT_POLICY=passive), libgomp's spin 300,000 turns, its default. One process each, in turns; the time is that of a
step, the median of a run without its first. All must make the same adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import isa_env  # noqa: F401  (before torch)
import yaml
from common import Bar, add_json, line, machine, timings, write_json

from qlora_native.cli.demo_model import model_file
from qlora_native.data.standard_library import write_split

THREADS = {"ours": {}, "passive": {"OMP_WAIT_POLICY": "passive"}, "libgomp": {"GOMP_SPINCOUNT": "300000"}}
BARS = {"busy": [Bar("passive", 0.8, faster=True)], "idle": [Bar("libgomp", 0.97, faster=True)]}
SET_BY_US = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def run(folder: Path, settings: dict[str, str], steps: int) -> tuple[float, bytes]:
    """Seconds of a step, and the adapter, of one run of SmolLM2-135M with rows of 128 tokens."""
    train = {"steps": steps, "batch_size": 1, "save_every": 0, "eval_every": 0, "log_every": steps}
    data = {"train": str(folder / "data" / "train.jsonl"), "eval_fraction": 0, "max_length": 128}
    out = folder / "out"
    values = {"model": str(model_file()), "output_dir": str(out), "data": data, "train": train}
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_US} | settings
    command = [sys.executable, "-m", "qlora_native", "train", str(folder / "config.yaml")]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = [json.loads(text) for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [record["seconds"] for record in records if "loss" in record]
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    subprocess.run(["rm", "-r", str(out)], check=True)
    return median(seconds[1:]), adapter


def row(state: str, repeats: int, steps: int) -> dict[str, Any]:
    """All three in turns, beside a program on every core where the state is busy."""
    seconds: dict[str, list[float]] = {name: [] for name in THREADS}
    adapters = set()
    with ExitStack() as stack, TemporaryDirectory() as name:
        folder = Path(name)
        write_split(folder / "data", 400, 1)
        for _ in range((os.cpu_count() or 1) * (state == "busy")):
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(other.kill)
        for number in range(repeats):
            for threads, settings in THREADS.items():
                if threads == "libgomp" and state == "busy" and number:
                    continue  # each waits for the other's turn to end
                took, adapter = run(folder, settings, steps)
                seconds[threads].append(took)
                adapters.add(adapter)
    load = os.getloadavg()[0]
    return {"state": state, "load": round(load, 1), "match": len(adapters) == 1, **timings(seconds, BARS[state])}


def main() -> None:
    """Parse, run, print one line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    add_json(parser)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"bench": "busy", "machine": machine(), "rows": []}
    for state in BARS:
        found["rows"].append(row(state, arguments.repeats, arguments.steps))
        print(line(found["rows"][-1], "state", "load"), flush=True)
    write_json(arguments.json, found)


if __name__ == "__main__":
    main()
