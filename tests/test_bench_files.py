"""The benches of docs/any-file.md on tiny shapes, and their own arithmetic on made-up runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from laws import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import any_file_page
import bench_gguf
import bench_residency
import four_bit_folder
import linear_contenders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_bit_folder.write_folder("tiny", tmp_path_factory.mktemp("residency") / "tiny")


def test_a_folder_of_random_codes_opens_mapped_and_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for residency in ("memory", "mapped"):
        found = bench_residency.opened(folder, residency)
        assert found["seconds"] > 0 and found["private_mib"] < 1000
    served: list[Callable[[list[str]], dict[str, Any]]] = []
    monkeypatch.setattr(bench_residency, "serve", served.append)
    for residency in ("memory", "mapped"):
        bench_residency.passes(folder, residency, 8)
    assert len({answer([])["sha256"] for answer in served}) == 1
    bench_residency.forget(folder)
    assert bench_residency.swap_bytes() >= 0


def test_a_run_on_it_is_its_own_reference(folder: Path, tmp_path: Path) -> None:
    row = {"limit_gib": None, **bench_residency.train(folder, tmp_path, 32)}
    result = {"rows": [row]}
    bench_residency.judge(result)
    assert row["match"] and row["speed_to_unlimited"] == pytest.approx(1) and row["bars"] == []
    assert row["tokens"] == 32 and len(row["loss"]) == bench_residency.STEPS


def run_of(limit: float | None, seconds: float, sha256: str = "a", **more: Any) -> dict[str, Any]:
    row = {"limit_gib": limit, "tokens": 100, "seconds": [9.0, seconds, seconds], "cpu_seconds": [2.0, 2.0, 2.0]}
    return {**row, "read_bytes": [0, 18, 20], "streamed": 10 if limit else 0, "sha256": sha256, "peak_rss": 1, **more}


def test_bars_of_runs(tmp_path: Path) -> None:
    estimates = [{"tokens_per_second": 50.0}, {"tokens_per_second": 40.0}]
    rows = [run_of(None, 2.0), run_of(4.0, 2.5, estimates=estimates), run_of(2.0, 2.1, "b"), {"limit_gib": 1.0}]
    result: dict[str, Any] = {"rows": rows}
    result["open"] = {side: {"seconds": 1.6, "private_mib": 120.0} for side in ("memory", "mapped")}
    result["steps"] = {"ratios": [1.0, 1.01, 1.5], "equal": True}
    bench_residency.judge(result)
    assert [row["match"] for row in rows] == [True, True, False, False]
    assert [bar["met"] for bar in rows[1]["bars"]] == [False, True, False]  # 0.8 of the speed, 2 times, 40 of 50
    assert [bar["met"] for bar in rows[2]["bars"]] == [True, True]
    assert rows[1]["speed_to_estimate_before"] == pytest.approx(0.8)
    assert rows[1]["speed_to_estimate"] == pytest.approx(0.9)
    assert [bar["met"] for bar in result["open"]["bars"] + result["steps"]["bars"]] == [False, True, True, True]

    alone: dict[str, Any] = {"rows": [run_of(4.0, 2.5, estimates=estimates)]}
    bench_residency.judge(alone)
    (row,) = alone["rows"]
    assert row["match"] is row["same_adapter"] is row["speed_to_unlimited"] is row["cpu_to_unlimited"] is None
    assert [bar["met"] for bar in row["bars"]] == [True, False]

    result |= {"machine": {"cpu_isa": "avx2"}, "file_bytes": 5e9, "disk_bytes_per_second": 1e8}
    result["rows"].pop()
    for file in ("residency", "residency_70b"):
        (tmp_path / f"{file}-avx2.json").write_text(json.dumps(result), encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in any_file_page.residency(tmp_path).splitlines()]
    assert [line[3] for line in lines if line[0] == "8B, 5.0 GB"] == ["no limit", "4 GiB", "2 GiB"]
    (mapped,) = (line for line in lines if line[:2] == ["70B", "mapped"])
    assert mapped[5] == "1.010 x" and mapped[6].count(", met") == 3 and mapped[6].count(", missed") == 1


@pytest.mark.parametrize(
    "file", sorted((ROOT / "bench" / "results").glob("residency*.json")), ids=lambda file: file.stem
)
def test_the_stored_ratios_and_bars_follow_from_the_measurements(file: Path) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    before = json.dumps(result)
    bench_residency.judge(result)
    assert json.dumps(result) == before


def test_every_gguf_format_has_a_row_for_each_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gguf.json"
    monkeypatch.setattr(bench_gguf, "ceilings", dict)
    monkeypatch.setattr(linear_contenders, "cache_bytes", lambda: 1 << 16)
    words = ["--n", "256", "--k", "256", "--m", "1", "64", "--repeats", "2", "--threads", "2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_gguf.py", *words])
    bench_gguf.main()
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = {(row["type"], row["m"], row["direction"]): row for row in result["rows"]}
    assert len(rows) == 3 * len(bench_gguf.GGUF_TYPES) and all(row["match"] for row in rows.values())
    for (name, m, _), row in rows.items():
        expected = [("nf4", 1.15)] if m == 64 else [("ggml", 0.8)] if name in bench_gguf.STREAMED else []
        assert [(bar["rival"], bar["bar"]) for bar in row["bars"]] == expected
    rows["q4_0", 1, "forward"]["ours_over"]["ggml"] = [0.5, 0.8, 1.0]
    _, _, *lines = (line.strip("| ").split(" | ") for line in any_file_page.formats({"avx2": result}).splitlines())
    assert len(lines) == len(bench_gguf.GGUF_TYPES) and {len(line) for line in lines} == {6}
    assert next(line for line in lines if line[0] == "Q4_0")[3] == "1.25 (1-2)"
