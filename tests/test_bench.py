"""The benches' own arithmetic, and that README.md and docs/performance.md have the committed results' figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import bench_start
import ceilings
import common
import goals
import isa_env
import pages
import plots
import pytest
import readme
import torch
from children import Child
from common import Bar
from laws import ROOT
from sentences import Check

BENCH = ROOT / "bench"
RESULTS = [file for cpu in pages.CLASSES for file in sorted((BENCH / "results").glob(f"*-{cpu}.json"))]


def test_quartiles_and_ratios() -> None:
    assert common.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert common.quartiles([7.0]) == (7.0, 7.0, 7.0)
    # A machine that doubles its time half-way: the ratio of the medians would be off, the paired one is not.
    assert common.ratios([1.0, 1.0, 2.0, 2.0], [2.0, 2.0, 4.0, 4.0]) == (0.5, 0.5, 0.5)
    # Of unequal counts the rounds that both ran in are paired.
    assert common.ratios([2.0, 2.0, 200.0], [1.0, 4.0]) == (0.875, 1.25, 1.625)
    assert common.ratios([1.0], [4.0, 400.0]) == (0.25, 0.25, 0.25)


def test_interleaved_runs_each_function_in_every_round() -> None:
    calls: list[str] = []
    seconds = common.interleaved({name: partial(calls.append, name) for name in "abc"}, repeats=20, warmup=1)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 21 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 3  # in changing order
    assert all(len(values) == 20 and min(values) >= 0 for values in seconds.values())


def test_slow_rivals_are_spared_but_not_those_to_keep() -> None:
    functions = {name: lambda: time.sleep(0.003) for name in ("ours", "slow", "slow_but_kept")}
    seconds = common.interleaved_sparing(functions, 5, keep=("ours", "slow_but_kept"), slow=0.002, few=2)
    assert {name: len(values) for name, values in seconds.items()} == {"ours": 5, "slow": 2, "slow_but_kept": 5}


def test_a_bar_is_met_on_its_own_side() -> None:
    faster, slower = [Bar("rival", limit, faster=True) for limit in (2.0, 2.1)], [Bar("rival", 0.5), Bar("rival", 0.49)]
    bars = [*faster, *slower, Bar("absent", 1.0)]
    found = common.verdicts({"ours": [1.0, 1.0, 1.0], "rival": [2.0, 2.0, 2.0]}, bars)
    assert [row["value"] for row in found] == [2.0, 2.0, 0.5, 0.5, None]
    assert [row["met"] for row in found] == [True, False, True, False, None]
    assert [row["bar"] for row in found] == [bar.limit for bar in bars]


def test_floor_is_the_longer_of_bytes_and_operations() -> None:
    measured = {"read_gb_per_s": 10.0, "write_gb_per_s": 5.0, "bf16_gflop_per_s": 100.0}
    assert ceilings.floor(measured, read=1e9) == pytest.approx(0.1)
    assert ceilings.floor(measured, read=1e9, written=1e9) == pytest.approx(0.3)
    assert ceilings.floor(measured, read=1e9, flops=1e9) == pytest.approx(0.1)
    assert ceilings.floor(measured, read=1e9, flops=1e11) == pytest.approx(1.0)


def test_timings_are_in_milliseconds_and_reach_a_share_of_the_floor() -> None:
    row = common.timings({"ours": [0.002] * 3, "rival": [0.004] * 3}, [Bar("rival", 1.0)], floor=0.001)
    assert row["ms"] == {"ours": [2.0] * 3, "rival": [4.0] * 3}
    assert row["ours_over"] == {"rival": [0.5] * 3}
    assert (row["floor_ms"], row["of_floor"], row["bars"][0]["met"]) == (1.0, 0.5, True)


def test_the_cache_is_the_largest_that_the_kernel_lists(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n", encoding="utf-8")
    assert common.cache_bytes(str(tmp_path)) == 32 << 20
    assert common.cache_bytes(str(tmp_path / "none")) == 32 << 20


def test_prepacked_is_the_plain_product() -> None:
    weight, x = torch.randn(96, 64), torch.randn(5, 64)
    assert common.relative_error(ceilings.prepacked(weight, 5)(x), x.double() @ weight.double().t()) < 1e-6


def test_a_written_result_reads_back_and_keeps_short_lists_on_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    result: dict[str, Any] = {"rows": [{"ms": {"ours": [1.0, 2.0, 3.0]}, "bars": []}], "note": "a, b"}
    common.write_json(str(tmp_path / "r.json"), result)
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"birth": common.birth(), **result}
    assert '"ours": [1.0, 2.0, 3.0]' in text


def test_a_result_without_a_name_is_called_by_its_cpu_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    result = {"bench": "train", "machine": {"cpu_isa": "avx2"}, "birth": {"commit": "kept"}}
    common.write_json("", result)
    common.write_json("", result, "train_learn")
    common.write_json(None, result)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train-avx2.json", "train_learn-avx2.json"]
    assert pages.results_of("train", tmp_path) == {"avx2": result}


def test_classes_stand_side_by_side() -> None:
    bodies = {"avx512": [["a", "1"], ["b", "2"]], "avx2": [["b", "3"], ["c", "4"]]}
    alone = pages.side_by_side(["", "ms"], {"avx2": bodies["avx2"]})
    assert alone == ["|  | CPU | ms |", "|---|---|---|", "| b | avx2 | 3 |", "| c | avx2 | 4 |", ""]
    assert pages.side_by_side(["", "ms"], bodies) == [
        "|  | CPU | ms |",
        "|---|---|---|",
        "| a | avx512 | 1 |",
        "| b | avx512 | 2 |",
        "| b | avx2 | 3 |",
        "| c | avx2 | 4 |",
        "",
    ]


@pytest.mark.skipif("avx2" not in isa_env.SETTINGS, reason="an x86-64 CPU's instructions")
def test_an_instruction_set_holds_for_the_libraries_under_torch() -> None:
    command = [sys.executable, "-c", "import isa_env, torch; print(isa_env.limits())"]
    env = {**os.environ, "PYTHONPATH": str(BENCH), "QLORA_NATIVE_ISA": "avx2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "{'aten': 'AVX2', 'onednn': 'Intel AVX2'}\n"
    command[2] = "import torch, isa_env"
    env[isa_env.ONEDNN] = "AVX512_CORE"
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("QLORA_NATIVE_ISA is avx2, but torch was imported")


def test_a_child_that_dies_is_named_with_its_last_words() -> None:
    child = Child("left", ["-c", "import sys; sys.exit('no model here')"])
    with pytest.raises(SystemExit, match="'left' .*'step 0': no model here"):
        child.ask("step 0")


def test_the_start_bench_finds_both_commands_of_the_readme() -> None:
    assert bench_start.commands() == {
        "demo": ("pip install '.[demo]'", "qlora demo"),
        "test": ("pip install '.[test]'", "pytest"),
    }


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_every_committed_row_matched_the_reference(file: Path) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["rows"] and result["machine"]["cpu"]
    assert file.stem.endswith(f"-{result['machine']['cpu_isa']}")
    assert result.get("ceilings") or not any("ms" in row for row in result["rows"])
    for row in () if file.stem.startswith("start-") else result["rows"]:  # the former computes nothing of its own
        # Of a run that had no other to be compared with, nothing is said.
        assert row["match"] is True or (row["match"] is None and row["same_adapter"] is None), row
        assert row["bars"] == [] or all(bar["met"] in (True, False, None) for bar in row["bars"])


def test_the_pages_have_the_figures_of_the_results() -> None:
    names, classes = zip(*(file.stem.rsplit("-", 1) for file in RESULTS), strict=True)
    assert {"linear", "quantize", "optim", "train"} <= set(names) and set(classes) <= set(pages.CLASSES)
    run = subprocess.run([sys.executable, BENCH / "readme.py", "--check"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("option", ["--readme", "--performance"])
def test_the_check_sees_another_figure(option: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    scripts = ("bench/start_page.py", "bench/readme.py") if option == "--readme" else ("bench/readme.py",)
    blocks = (f"<!-- {script} begins -->\n1,000 times as fast\n<!-- {script} ends -->\n" for script in scripts)
    page.write_text(f"before\n{''.join(blocks)}after\n", encoding="utf-8")
    command = [sys.executable, str(BENCH / "readme.py"), option, str(page)]
    assert subprocess.run([*command, "--check"], capture_output=True, check=False).returncode == 1
    subprocess.run([*command, "--write"], check=True)
    assert subprocess.run([*command, "--check"], capture_output=True, check=False).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "1,000 times" not in text
    with pytest.raises(ValueError, match="once each"):
        pages.between("no markers", "readme.py", "new")


@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_picture_is_of_the_committed_results(name: str) -> None:
    digest = plots.source(plots.results_for(name))
    assert digest.encode() in (ROOT / "docs" / f"{name}.png").read_bytes(), f"run: python bench/plots.py {name}"


def test_a_missed_bar_is_listed_as_missed(sentence: Check) -> None:
    seconds = {"ours": [1.0] * 3, "onednn_prepacked": [2.0] * 3}
    row = common.timings(seconds, [Bar("onednn_prepacked", 3.5, faster=True), Bar("gone", 1.0)])
    sentence(readme.bars(row))
    assert goals.met_bars(row) == [False]
    # Bars of which one is enough count once.
    bars = [{"met": True}, {"met": False}, {"met": None}]
    assert goals.met_bars({"bars": bars}) == [True, False]
    assert goals.met_bars({"bars": bars, "either_bar": True}) == [True]
