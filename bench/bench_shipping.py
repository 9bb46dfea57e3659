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

import hashlib
import json
from pathlib import Path
from statistics import mean
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from children import all_calls
from common import Bench, birth_in, rounded, verdict
from shipping_runs import CALIBRATION_ROWS, LENGTH, MERGES, SEEDS, SETTINGS, STEPS, TEXTS, make_runs, prepare

from qlora_native.tool.evaluate.measure import Scores
from qlora_native.tool.evaluate.retention import retention

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
    rows = []
    for number, setting in enumerate(SETTINGS):
        found = {text: read_runs(work, text, setting) for text in TEXTS}
        for form in (*TRAINED, *MERGES):
            row: dict[str, Any] = {"setting": setting, "form": form, "match": True, "bars": [], "texts": {}}
            for text in (text for text, runs in found.items() if runs):
                base = json.loads((work / "runs" / f"{text}.json").read_text(encoding="utf-8"))
                add_text(row, text, found[text], base, BARS[form][number] if form in BARS else None)
            if row["texts"]:
                rows.append(row)
    return rows


def add_text(
    row: dict[str, Any], text: str, runs: dict[int, dict[str, Any]], base: dict[str, Any], limit: float | None
) -> None:
    """What the row's form keeps on a text."""
    form = row["form"]

    def scores(*found: dict[str, Any]) -> Scores:
        tokens, nats = (torch.tensor([one[key] for one in found]).double().sum(0) for key in ("tokens", "nats"))
        return Scores(tokens, nats)

    def kept(*seeds: int) -> dict[str, Any]:
        sides = ([base] * len(seeds), [runs[s]["plain"] for s in seeds], [runs[s][form] for s in seeds])
        return retention(*(scores(*side) for side in sides))

    whole = kept(*runs)
    row["texts"][text] = {
        "retention": rounded([whole["retention"], whole["retention_error"]]),
        "seeds": {seed: rounded([kept(seed)["retention"]])[0] for seed in runs},
        "losses": [round(whole[f"{side}_loss"], 4) for side in ("base", "adapted", "shipped")],
    }
    row["match"] &= all(run[form]["tokens"] == base["tokens"] for run in runs.values())
    bars = []
    if limit is not None:
        bars.append(verdict("", f"retention on {text}", limit, whole["retention"], at_least=True))
    if form == "shipped":
        apart = max(abs(run["shipped"]["loss_after"] - run["ship"]["loss_after"]) for run in runs.values())
        raw = mean(scores(run["ship"]).excess(scores(run["plain"]))[0] for run in runs.values())
        bars.append(verdict("", f"nats from the last evaluation on {text}", APART_BAR, apart))
        bars.append(verdict("", f"nats of the raw adapter on {text}", RAW_BAR, raw))
    row["bars"] += bars


def main() -> None:
    folder = {"type": Path, "required": True, "metavar": "FOLDER", "help": "what is done is kept here"}
    bench = Bench("shipping", __doc__, work=folder, no_runs=False)
    work: Path = bench.options.work
    born = birth_in(work)
    if not bench.options.no_runs:
        prepare(work)
        all_calls(*((make_runs, work, text) for text in TEXTS))
    files = {text: (work / text / "heldout.jsonl").read_bytes() for text in TEXTS}
    texts = {
        text: {"rows": len(held_out.splitlines()), "sha256": hashlib.sha256(held_out).hexdigest()}
        for text, held_out in files.items()
    }
    training = {"steps": STEPS, "rates": SETTINGS, "length": LENGTH, "calibration_rows": CALIBRATION_ROWS}
    bench.begin(birth=born, texts=texts, training=training)
    for row in rows_of(work):
        bench.add(row, "setting", "form", "texts")
    bench.write()


if __name__ == "__main__":
    main()
