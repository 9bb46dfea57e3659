"""What is kept of an adapter by models without one: merged to 16 bits, to 4 bits by each method, at the end of a run.

    python bench/bench_shipping.py --work FOLDER --json
    python bench/shipping_page.py --write      # writes docs/shipping.md's tables
    python bench/plots.py shipping             # draws docs/shipping.png

FOLDER keeps what is done, so a run that was stopped goes on: shipping_runs.py makes what is missing. `--no-runs` takes
what is there, and of it the seeds that have all forms. Some 75 minutes on two cores that do nothing else. Retention is
that of evaluate/retention.py, against the adapter of the run without ``lora.ship``; losses of the seeds are added up
row by row, so that its error has rows as the sample. `match`: every form of a run scored the same tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from common import add_json, birth_in, machine, rounded, write_json
from shipping_runs import CALIBRATION_ROWS, LENGTH, MERGES, SEEDS, SETTINGS, STEPS, TEXTS

TRAINED = ("plain", "shipped")  # the adapter beside its base, and the model that `lora.ship` wrote
BARS = {"gptq-original": (1.0, 0.9), "gptq-base": (0.85, 0.6), "shipped": (0.97, 0.9)}  # usual, light
APART_BAR, RAW_BAR = 1e-4, 0.02  # nats a token


def read_runs(work: Path, text: str, setting: str) -> dict[int, dict[str, Any]]:
    """What each seed's forms scored, of seeds that have all of them."""
    found = {}
    for seed in SEEDS:
        name = f"{text}-{setting}-{seed}"
        files = {form: work / "runs" / f"{name}-{form}.json" for form in ("plain", "trained", *MERGES)}
        if all(file.exists() for file in files.values()):
            forms = {form: json.loads(file.read_text(encoding="utf-8")) for form, file in files.items()}
            found[seed] = forms | forms.pop("trained")
    return found


def rows_of(work: Path) -> list[dict[str, Any]]:
    """A row of the result for each setting and form."""
    from qlora_native.tool.evaluate.measure import Scores
    from qlora_native.tool.evaluate.retention import retention

    def scores(*found: dict[str, Any]) -> Scores:
        tokens, nats = (torch.tensor([one[key] for one in found]).double().sum(0) for key in ("tokens", "nats"))
        return Scores(tokens, nats)

    rows = []
    for setting, number in ((setting, number) for number, setting in enumerate(SETTINGS)):
        for form in (*TRAINED, *MERGES):
            row: dict[str, Any] = {"setting": setting, "form": form, "match": True, "bars": [], "texts": {}}
            for text in TEXTS:
                runs = read_runs(work, text, setting)
                if not runs:
                    continue
                base = json.loads((work / "runs" / f"{text}.json").read_text(encoding="utf-8"))

                def kept(*seeds: int, form: str = form, base: Any = base, runs: Any = runs) -> dict[str, Any]:
                    sides = ([base] * len(seeds), [runs[s]["plain"] for s in seeds], [runs[s][form] for s in seeds])
                    return retention(*(scores(*side) for side in sides))

                whole = kept(*runs)
                row["texts"][text] = {
                    "retention": rounded([whole["retention"], whole["retention_error"]]),
                    "seeds": {seed: rounded([kept(seed)["retention"]])[0] for seed in runs},
                    "losses": [round(whole[f"{side}_loss"], 4) for side in ("base", "adapted", "shipped")],
                }
                row["match"] &= all(run[form]["tokens"] == base["tokens"] for run in runs.values())
                if form in BARS:
                    row["bars"].append(_bar(f"retention on {text}", BARS[form][number], whole["retention"], True))
                if form == "shipped":
                    apart = max(abs(run["shipped"]["loss_after"] - run["ship"]["loss_after"]) for run in runs.values())
                    raw = mean(scores(run["ship"]).excess(scores(run["plain"]))[0] for run in runs.values())
                    row["bars"].append(_bar(f"nats from the last evaluation on {text}", APART_BAR, apart, False))
                    row["bars"].append(_bar(f"nats of the raw adapter on {text}", RAW_BAR, raw, False))
            if row["texts"]:
                rows.append(row)
    return rows


def _bar(measure: str, limit: float, value: float, at_least: bool) -> dict[str, Any]:
    met = value >= limit if at_least else value <= limit
    return {"measure": measure, "bar": limit, "at_least": at_least, "value": rounded([value])[0], "met": met}


def main() -> None:
    """Make what is missing, then put it together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="what is done is kept here")
    parser.add_argument("--no-runs", action="store_true", help="take the runs that are there")
    add_json(parser)
    arguments = parser.parse_args()
    work: Path = arguments.work
    born = birth_in(work)
    if not arguments.no_runs:
        command = [sys.executable, str(Path(__file__).with_name("shipping_runs.py")), "--work", str(work)]
        subprocess.run([*command, "--prepare"], check=True)
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        workers = [subprocess.Popen([*command, text], env=one_thread) for text in TEXTS]
        failed = [worker.wait() for worker in workers]
        if any(failed):
            raise SystemExit("a run failed; what is done is kept")
    result: dict[str, Any] = {"bench": "shipping", "birth": born, "machine": machine(), "texts": {}}
    for text in TEXTS:
        file = work / text / "heldout.jsonl"
        lines = file.read_bytes().splitlines()
        result["texts"][text] = {"rows": len(lines), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    result["training"] = {"steps": STEPS, "rates": SETTINGS, "length": LENGTH}
    result["training"]["calibration_rows"] = CALIBRATION_ROWS
    result["rows"] = rows_of(work)
    for row in result["rows"]:
        print(row["setting"], row["form"], {text: found["retention"] for text, found in row["texts"].items()})
        for bar in row["bars"]:
            print("   ", bar["measure"], bar["value"], "met" if bar["met"] else "MISSED")
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
