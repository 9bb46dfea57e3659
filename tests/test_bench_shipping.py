"""The shipping bench's own arithmetic on made-up scores, and its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import bench_shipping  # noqa: E402
import shipping_page  # noqa: E402
from shipping_runs import MERGES  # noqa: E402

KEPT = {"plain": 1.0, "ship": 0.99, "shipped": 0.95, "gptq-base": 0.9, "rtn-base": 0.1}  # others: 1


def write_runs(folder: Path, seeds: int) -> None:
    """Runs of the first text in which a form keeps KEPT of an adapter that gains 1 nat, seed for seed alike."""
    (folder / "runs").mkdir()

    def scores(kept: float) -> dict[str, Any]:
        return {"tokens": [10.0, 20.0, 30.0], "nats": [10 * (4 - kept), 20 * (4 - kept), 30 * (4 - kept)]}

    (folder / "runs" / "docstrings.json").write_text(json.dumps(scores(0)), encoding="utf-8")
    for seed in range(seeds):
        trained: dict[str, Any] = {form: scores(KEPT[form]) for form in ("ship", "shipped")}
        trained["ship"]["loss_after"], trained["shipped"]["loss_after"] = 3.05, 3.05 + 1e-5 * seed
        for form, found in {
            "trained": trained,
            **{form: scores(KEPT.get(form, 1.0)) for form in ("plain", *MERGES)},
        }.items():
            file = folder / "runs" / f"docstrings-usual-{seed}-{form}.json"
            file.write_text(json.dumps(found), encoding="utf-8")


def test_rows_are_of_the_seeds_that_have_all_forms(tmp_path: Path) -> None:
    write_runs(tmp_path, 3)
    (tmp_path / "runs" / "docstrings-usual-1-rtn-base.json").unlink()
    rows = {row["form"]: row for row in bench_shipping.rows_of(tmp_path)}
    assert list(rows) == ["plain", "shipped", *MERGES] and all(row["match"] for row in rows.values())
    for form, row in rows.items():
        found = row["texts"]["docstrings"]
        assert found["retention"] == pytest.approx([KEPT.get(form, 1.0), 0], abs=1e-6), form
        assert list(found["seeds"]) == [0, 2] and found["losses"] == pytest.approx([4, 3, 4 - KEPT.get(form, 1.0)])
    assert [(bar["bar"], bar["met"]) for bar in rows["gptq-base"]["bars"]] == [(0.85, True)]
    kept, apart, raw = rows["shipped"]["bars"]
    assert not kept["met"] and apart["value"] == pytest.approx(2e-5) and apart["met"]
    assert raw["value"] == pytest.approx(0.01) and raw["met"]

    training = {"steps": 100, "rates": {"usual": 5e-4, "light": 1e-5}, "calibration_rows": 120}
    machine = {"cpu": "c", "torch": "t", "cpu_isa": "i"}
    page = shipping_page.retention({"i": {"rows": list(rows.values()), "training": training, "machine": machine}})
    assert "4-bit base | 3.1000 | 0.900 ± 0.000 (0.90 to 0.90) |" in page
    assert "at least 0.97 missed" in page and "**light**" not in page


def test_the_page_has_the_figures_of_the_result() -> None:
    command = [sys.executable, str(ROOT / "bench" / "shipping_page.py"), "--check"]
    subprocess.run(command, check=True)
