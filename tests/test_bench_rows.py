"""The rows and bars that benches make of the figures of runs, here made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_quality
import bench_residency
import bench_shipping
import pytest
from bench_shipping import MERGES
from quality_texts import windows

# ---------------------------------------------------------------------------------------------------------------------
# Quality


EXCESS = {"bf16": 0.0, "rtn": 0.2, "wmse": 0.08, "gptq": 0.02}


def scores(loss: float, tokens: tuple[float, ...] = (10.0, 20.0)) -> dict[str, Any]:
    """Of rows of so many tokens."""
    return {"nats": [count * loss for count in tokens], "tokens": list(tokens)}


def write_learned(folder: Path, seeds: int) -> None:
    """Runs in which each base ends above the 16-bit one by its EXCESS, twice that on B."""
    (folder / "runs").mkdir()
    for base, excess in EXCESS.items():
        for rate in bench_quality.RATES:
            for seed in range(seeds):
                run: dict[str, Any] = {"base": base, "lr": rate, "seed": seed, "train_loss": [2.0 + seed, 1.5]}
                for factor, text in enumerate(bench_quality.EVALUATED, 1):
                    loss = 2 + seed / 10 + factor * excess
                    run[text] = {"loss": loss, **scores(loss)}
                (folder / "runs" / f"{base}-{rate:g}-{seed}.json").write_text(json.dumps(run), encoding="utf-8")


def test_gaps_after_learning_are_means_over_the_runs_that_all_bases_made(tmp_path: Path) -> None:
    write_learned(tmp_path, 2)
    (tmp_path / "runs" / f"gptq-{bench_quality.RATES[1]:g}-1.json").unlink()
    rows = {row["base"]: row for row in bench_quality.learning_rows(tmp_path)}
    assert list(rows) == list(EXCESS) and all(row["match"] and row["runs"] == 3 for row in rows.values())
    assert rows["wmse"]["texts"]["A"]["gap"] == pytest.approx(0.08)
    assert rows["gptq"]["texts"]["B"]["gap"] == pytest.approx(0.04)
    assert [bar["value"] for bar in rows["wmse"]["bars"]] == pytest.approx([0.4, 0.4])
    assert [bar["met"] for bar in rows["gptq"]["bars"]] == [True, True]
    assert [len(gaps) for gaps in rows["rtn"]["texts"]["A"]["gaps"].values()] == [2, 1]


def test_shares_closed_are_those_of_the_losses() -> None:
    scored: dict[str, Any] = {}
    for base, excess in EXCESS.items():
        sums = scores(2 + excess) | ({"kl": [1, 2], "agreed": [9, 9]} if base != "bf16" else {})
        scored[base] = {"match": True, "A": sums, "B": sums}
    rows = {row["base"]: row for row in bench_quality.method_rows(scored, dict.fromkeys("AB"))}  # type: ignore[arg-type]
    assert rows["rtn"]["texts"]["A"]["excess"][0] == pytest.approx(0.2) and "closed" not in rows["rtn"]["texts"]["A"]
    assert [bar["value"] for bar in rows["wmse"]["bars"]] == pytest.approx([0.6, 0.6])
    assert [(bar["bar"], bar["met"]) for bar in rows["gptq"]["bars"]] == [(0.75, True), (0.65, True)]
    assert rows["gptq"]["texts"]["B"]["kl"][0] == pytest.approx(0.1)


def test_windows_lie_end_to_end_and_none_is_drawn_twice() -> None:
    def letters(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}

    found = windows(letters, ["abcdefg", "xyzuvw"], 4, 3, 0).tolist()
    assert sorted("".join(map(chr, row)) for row in found) == ["abc", "def", "uvw", "xyz"]
    with pytest.raises(SystemExit, match="make 4 windows of 3 tokens, 5"):
        windows(letters, ["abcdefg", "xyzuvw"], 5, 3, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Shipping


KEPT = {"plain": 1.0, "ship": 0.99, "shipped": 0.95, "gptq-base": 0.9, "rtn-base": 0.1}  # others: 1


def write_shipped(folder: Path, seeds: int) -> None:
    """Runs of the first text in which a form keeps KEPT of an adapter that gains 1 nat, seed for seed alike."""
    (folder / "runs").mkdir()

    def write(name: str, found: dict[str, Any]) -> None:
        (folder / "runs" / f"docstrings{name}.json").write_text(json.dumps(found), encoding="utf-8")

    def kept(form: str) -> dict[str, Any]:
        return scores(4 - KEPT.get(form, 1.0), (10.0, 20.0, 30.0))

    write("", scores(4, (10.0, 20.0, 30.0)))
    for seed in range(seeds):
        ends = {"ship": 3.05, "shipped": 3.05 + 1e-5 * seed}
        write(f"-usual-{seed}-trained", {form: {**kept(form), "loss_after": end} for form, end in ends.items()})
        for form in ("plain", *MERGES):
            write(f"-usual-{seed}-{form}", kept(form))


def test_rows_are_of_the_seeds_that_have_all_forms(tmp_path: Path) -> None:
    write_shipped(tmp_path, 3)
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


# ---------------------------------------------------------------------------------------------------------------------
# Residency


def run_of(limit: float | None, seconds: float, sha256: str = "a", **more: Any) -> dict[str, Any]:
    row = {"limit_gib": limit, "tokens": 100, "seconds": [9.0, seconds, seconds], "cpu_seconds": [2.0, 2.0, 2.0]}
    return {**row, "read_bytes": [0, 18, 20], "streamed": 10 if limit else 0, "sha256": sha256, "peak_rss": 1, **more}


def met(part: dict[str, Any]) -> list[bool]:
    return [bar["met"] for bar in part["bars"]]


def test_bars_of_runs_under_a_memory_limit() -> None:
    estimates = [{"tokens_per_second": 50.0}, {"tokens_per_second": 40.0}]
    rows = [run_of(None, 2.0), run_of(4.0, 2.5, estimates=estimates), run_of(2.0, 2.1, "b"), {"limit_gib": 1.0}]
    result: dict[str, Any] = {"rows": rows, "steps": {"ratios": [1.0, 1.01, 1.5], "equal": True}}
    result["open"] = {side: {"seconds": 1.6, "private_mib": 120.0} for side in ("memory", "mapped")}
    bench_residency.judge(result)
    assert [row["match"] for row in rows] == [True, True, False, False]
    assert met(rows[1]) == [False, True, False]  # 0.8 of the speed, 2 times, 40 of 50
    assert met(rows[2]) == [True, True]
    assert rows[1]["speed_to_estimate_before"] == pytest.approx(0.8)
    assert rows[1]["speed_to_estimate"] == pytest.approx(0.9)
    assert met(result["open"]) + met(result["steps"]) == [False, True, True, True]

    row = run_of(4.0, 2.5, estimates=estimates)  # without an unlimited one
    bench_residency.judge({"rows": [row]})
    assert row["match"] is row["same_adapter"] is row["speed_to_unlimited"] is row["cpu_to_unlimited"] is None
    assert met(row) == [True, False]
