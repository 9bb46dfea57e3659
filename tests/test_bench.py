"""The benches' own arithmetic, committed rows, and that the pages have the committed results' figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial, reduce
from pathlib import Path
from typing import Any

import any_file_page
import bench_residency
import bench_start
import ceilings
import common
import goals
import gpu_page
import isa_env
import memory_page
import pages
import plots
import pytest
import quality_page
import readme
import scaling_page
import shipping_page
import torch
from births import without_marks
from children import Child
from common import Bar
from laws import ROOT
from sentences import Check
from table_writer import by_class, spread

BENCH = ROOT / "bench"
RESULTS = [file for cpu in pages.CLASSES for file in sorted((BENCH / "results").glob(f"*-{cpu}.json"))]
PAGES = [
    readme.README,
    readme.PERFORMANCE,
    *(each.PAGE for each in (any_file_page, gpu_page, memory_page, quality_page, scaling_page, shipping_page)),
]


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def test_ratios() -> None:
    assert common.ratios([5.0, 1.0, 3.0, 2.0, 4.0], [1.0] * 5) == (2.0, 3.0, 4.0)  # quartiles
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


def test_timings_are_in_milliseconds_and_bars_are_met_on_their_own_side() -> None:
    faster, slower = [Bar("rival", limit, faster=True) for limit in (2.0, 2.1)], [Bar("rival", 0.5), Bar("rival", 0.49)]
    bars = [*faster, *slower, Bar("absent", 1.0), Bar("floor", 2.0)]
    row = common.timings({"ours": [0.002] * 3, "rival": [0.004] * 3}, bars, floor=0.001)
    assert row["ms"] == {"ours": [2.0] * 3, "rival": [4.0] * 3} and row["ours_over"] == {"rival": [0.5] * 3}
    assert (row["floor_ms"], row["of_floor"]) == (1.0, 0.5)
    found = [(bar["bar"], bar["value"], bar["met"]) for bar in row["bars"]]
    assert found[:4] == [(2.0, 2.0, True), (2.1, 2.0, False), (0.5, 0.5, True), (0.49, 0.5, False)]
    assert found[4:] == [(1.0, None, None), (2.0, 2.0, True)]


def test_floor_is_the_longer_of_bytes_and_operations() -> None:
    measured = {"read_gb_per_s": 10.0, "write_gb_per_s": 5.0, "bf16_gflop_per_s": 100.0}
    assert ceilings.floor(measured, read=1e9) == pytest.approx(0.1)
    assert ceilings.floor(measured, read=1e9, written=1e9) == pytest.approx(0.3)
    assert ceilings.floor(measured, read=1e9, flops=1e9) == pytest.approx(0.1)
    assert ceilings.floor(measured, read=1e9, flops=1e11) == pytest.approx(1.0)


def test_prepacked_is_the_plain_product() -> None:
    weight, x = torch.randn(96, 64), torch.randn(5, 64)
    assert common.relative_error(ceilings.prepacked(weight, 5)(x), x.double() @ weight.double().t()) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# The machine, processes


def test_the_cache_is_the_largest_that_the_kernel_lists(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "65536K", "1024K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n", encoding="utf-8")
    assert common.cache_bytes(str(tmp_path)) == 64 << 20
    assert common.cache_bytes(str(tmp_path / "none")) == 32 << 20


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


# ---------------------------------------------------------------------------------------------------------------------
# Results


def test_a_written_result_reads_back_from_the_file_of_its_cpu_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    rows: list[dict[str, Any]] = [{"ms": {"ours": [1.0, 2.0, 3.0]}, "bars": []}]
    result = {"bench": "train", "machine": {"cpu_isa": "avx2"}, "rows": rows, "note": "a, b"}
    common.write_json("", result)
    common.write_json("", {**result, "birth": {"commit": "kept"}}, "train_learn")
    common.write_json(None, result)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train-avx2.json", "train_learn-avx2.json"]
    assert pages.results_of("train", tmp_path) == {"avx2": {"birth": common.birth(), **result}}
    assert pages.results_of("train_learn", tmp_path)["avx2"]["birth"] == {"commit": "kept"}
    assert '"ours": [1.0, 2.0, 3.0]' in (tmp_path / "train-avx2.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_every_committed_row_matched_the_reference(file: Path) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["rows"] and result["machine"]["cpu"]
    assert file.stem.endswith(f"-{result['machine']['cpu_isa']}")
    assert result.get("ceilings") or not any("ms" in row for row in result["rows"])
    for row in () if file.stem.startswith("start-") else result["rows"]:  # the former computes nothing of its own
        # Of a run that had no other to be compared with, nothing is said.
        assert row["match"] is True or (row["match"] is None and row["same_adapter"] is None), row
        assert all(bar["met"] in (True, False, None) for bar in row["bars"])
    if file.stem.startswith("residency"):
        before = json.dumps(result)
        bench_residency.judge(result)
        assert json.dumps(result) == before, "ratios and bars follow from the measurements"


def test_a_missed_bar_is_listed_as_missed(sentence: Check) -> None:
    seconds = {"ours": [1.0] * 3, "onednn_prepacked": [2.0] * 3}
    row = common.timings(seconds, [Bar("onednn_prepacked", 3.5, faster=True), Bar("gone", 1.0)])
    sentence(readme.bars(row))
    assert goals.met_bars(row) == [False]
    # Bars of which one is enough count once.
    bars = [{"met": True}, {"met": False}, {"met": None}]
    assert goals.met_bars({"bars": bars}) == [True, False]
    assert goals.met_bars({"bars": bars, "either_bar": True}) == [True]


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def test_classes_stand_side_by_side_and_empty_columns_are_left_out() -> None:
    rows = {"avx512": [{"case": "a", "ms": [1, 2, 3]}, {"case": "b"}], "avx2": [{"case": "b", "ms": [1e3, 2e3, 4e3]}]}
    columns = {"": "{case}", "CPU": "{cpu}", "ms": "{ms:spread}", "none has it": "{gone}"}
    assert by_class(columns)({cpu: {"rows": found} for cpu, found in rows.items()}).splitlines() == [
        "|  | CPU | ms |",
        "|---|---|---|",
        "| a | avx512 | 2 (1-3) |",
        "| b | avx512 |  |",
        f"| b | avx2 | {spread([1e3, 2e3, 4e3])} |",
    ]
    assert spread([1e3, 2e3, 4e3]) == "2,000 (1,000-4,000)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.stem)
def test_a_page_is_what_its_script_writes_over_other_figures(page: pages.Page) -> None:
    text = without_marks(page.path.read_text(encoding="utf-8"))
    other = reduce(lambda old, script: pages.between(old, script, "1,000 times as fast"), page.blocks, text)
    assert without_marks(page.make(other)) == text, f"run the script of {page.path} with --write"


def test_the_check_sees_another_figure_and_no_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    block = "<!-- bench/readme.py begins -->\n1,000 times as fast\n<!-- bench/readme.py ends -->\n"
    page.write_text(f"before\n{block}after\n", encoding="utf-8")

    def status(action: str) -> int:
        command = [sys.executable, str(BENCH / "readme.py"), "--performance", str(page), action]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert [status(action) for action in ("--check", "--write", "--check")] == [1, 0, 0]
    text = without_marks(page.read_text(encoding="utf-8"))
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "1,000 times" not in text
    page.write_text(text.replace("| avx2 |", "| avx2 † |"), encoding="utf-8")
    assert status("--check") == 0
    with pytest.raises(ValueError, match="once each"):
        pages.between("no markers", "readme.py", "new")


@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_picture_is_of_the_committed_results(name: str) -> None:
    digest = plots.source(plots.results_for(name))
    assert digest.encode() in (ROOT / "docs" / f"{name}.png").read_bytes(), f"run: python bench/plots.py {name}"
