"""The quality bench's own arithmetic on made-up scores, and its page against the committed result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import bench_quality  # noqa: E402
import quality_page  # noqa: E402
from pages import results_of  # noqa: E402
from quality_texts import windows  # noqa: E402

EXCESS = {"bf16": 0.0, "rtn": 0.2, "wmse": 0.08, "gptq": 0.02}


def write_runs(folder: Path, seeds: int) -> None:
    """Runs in which each base ends above the 16-bit one by its EXCESS, twice that on B."""
    (folder / "runs").mkdir()
    for base, excess in EXCESS.items():
        for rate in bench_quality.RATES:
            for seed in range(seeds):
                run: dict[str, Any] = {"base": base, "lr": rate, "seed": seed, "train_loss": [2.0 + seed, 1.5]}
                for factor, text in enumerate(bench_quality.EVALUATED, 1):
                    loss = 2 + seed / 10 + factor * excess
                    run[text] = {"loss": loss, "nats": [10 * loss, 20 * loss], "tokens": [10.0, 20.0]}
                (folder / "runs" / f"{base}-{rate:g}-{seed}.json").write_text(json.dumps(run), encoding="utf-8")


def test_gaps_after_learning_are_means_over_the_runs_that_all_bases_made(tmp_path: Path) -> None:
    write_runs(tmp_path, 2)
    (tmp_path / "runs" / f"gptq-{bench_quality.RATES[1]:g}-1.json").unlink()
    rows = {row["base"]: row for row in bench_quality.learning_rows(tmp_path)}
    assert list(rows) == list(EXCESS) and all(row["match"] and row["runs"] == 3 for row in rows.values())
    assert rows["wmse"]["texts"]["A"]["gap"] == pytest.approx(0.08)
    assert rows["gptq"]["texts"]["B"]["gap"] == pytest.approx(0.04)
    assert [bar["value"] for bar in rows["wmse"]["bars"]] == pytest.approx([0.4, 0.4])
    assert [bar["met"] for bar in rows["gptq"]["bars"]] == [True, True]
    assert [len(gaps) for gaps in rows["rtn"]["texts"]["A"]["gaps"].values()] == [2, 1]


def test_shares_closed_are_those_of_the_losses(tmp_path: Path) -> None:
    scored: dict[str, Any] = {}
    for base, excess in EXCESS.items():
        sums = {"nats": [10 * (2 + excess), 20 * (2 + excess)], "tokens": [10.0, 20.0]}
        sums |= {"kl": [1, 2], "agreed": [9, 9]} if base != "bf16" else {}
        scored[base] = {"match": True, "A": sums, "B": sums}
    rows = {row["base"]: row for row in bench_quality.method_rows(scored, dict.fromkeys("AB"))}  # type: ignore[arg-type]
    assert rows["rtn"]["texts"]["A"]["excess"][0] == pytest.approx(0.2) and "closed" not in rows["rtn"]["texts"]["A"]
    assert [bar["value"] for bar in rows["wmse"]["bars"]] == pytest.approx([0.6, 0.6])
    assert [(bar["bar"], bar["met"]) for bar in rows["gptq"]["bars"]] == [(0.75, True), (0.65, True)]
    assert rows["gptq"]["texts"]["B"]["kl"][0] == pytest.approx(0.1)

    write_runs(tmp_path, 3)
    setting: dict[str, Any] = dict.fromkeys(("steps", "rows", "length", "r", "alpha"), 1)
    setting |= {"evaluated_rows": 2, "rates": [1e-3], "seeds": [0]}
    texts = {name: {"about": f"text {name}", "rows": 2, "length": 20} for name in "AB"}
    result = {"texts": texts, "lora": setting, "machine": {"cpu": "c", "torch": "t", "cpu_isa": "i"}}
    page = quality_page.losses({"i": {**result, "rows": [*rows.values(), *bench_quality.learning_rows(tmp_path)]}})
    assert "| `wmse` |" in page and "60 ± " in page and "at least 50 %: met" in page and "0.080" in page


def test_windows_lie_end_to_end_and_none_is_drawn_twice() -> None:
    class Letters:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": list(map(ord, text))}

    found = windows(Letters(), ["abcdefg", "xyzuvw"], 4, 3, 0).tolist()
    assert sorted("".join(map(chr, row)) for row in found) == ["abc", "def", "uvw", "xyz"]
    with pytest.raises(SystemExit, match="make 4 windows of 3 tokens, 5"):
        windows(Letters(), ["abcdefg", "xyzuvw"], 5, 3, 0)


def test_the_page_is_that_of_the_committed_result() -> None:
    assert results_of("quality")
    command = [sys.executable, str(ROOT / "bench/quality_page.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0
