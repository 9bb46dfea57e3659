"""Every stored figure names its commit, day and versions; a page marks what is older than its code, and stays green."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import births
import common
import goals
import pages
import pytest
import readme
from laws import ROOT

RESULTS = ROOT / "bench" / "results"
VERSIONS = {"torch": "2.13.0", "peft": "0.21.2"}
BIRTH: dict[str, Any] = {"commit": "ab" * 20, "changed": False, "date": "2026-12-01", "versions": VERSIONS}


def git(folder: Path, *words: str) -> str:
    options = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *options, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with a kernel of the products and a bench in it, in place of this one."""
    for name in ("cpp/cpu/kernels/gemm.cc", "bench/bench_quality.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "begin")
    monkeypatch.setattr(births, "ROOT", tmp_path)
    births.changed_since.cache_clear()
    yield tmp_path
    births.changed_since.cache_clear()


def born(clone: Path) -> dict[str, Any]:
    return {"birth": {**BIRTH, "commit": git(clone, "rev-parse", "HEAD").strip()}}


def test_every_result_is_born_and_has_paths_that_exist() -> None:
    assert births.unborn(RESULTS) == []
    names = {file.stem.rpartition("-")[0] for cpu in pages.CLASSES for file in RESULTS.glob(f"*-{cpu}.json")}
    assert names and names <= births.PATHS.keys()
    if not (ROOT / ".git").exists():
        pytest.skip("no git clone, in which paths are looked up")
    for name, paths in births.PATHS.items():
        for path in paths if name in names else ():
            assert git(ROOT, "ls-files", "--", path.removeprefix(":(exclude)")), f"{name}: {path}"


def test_a_figure_is_marked_when_code_of_its_paths_has_changed(clone: Path) -> None:
    result = born(clone)
    assert births.changed_since(result["birth"]["commit"], births.PATHS["linear"]) == ()
    assert not births.is_old("linear", result)
    (clone / "cpp/cpu/kernels/gemm.cc").write_text("2\n")
    git(clone, "commit", "-qam", "change a product")
    births.changed_since.cache_clear()
    assert births.is_old("linear", result) and not births.is_old("optim", result)
    page = "Machine: x (avx2, amx).\n| a | avx2 | 1 |\n| avx2x | amx | `avx2` |"
    marked = births.marked("linear", page, {"avx2": result})
    assert marked == "Machine: x (avx2 †, amx).\n| a | avx2 † | 1 |\n| avx2x | amx | `avx2` |"
    assert births.without_marks(marked) == page
    assert births.without_marks(f"{marked}\n{births.FOOTNOTE}\n") == f"{page}\n"  # a page may have it where marks are
    assert births.marked("optim", page, {"avx2": result}) == page


def test_where_git_does_not_know_the_commit_nothing_is_marked_and_that_is_said(clone: Path) -> None:
    stranger = {"birth": BIRTH}
    assert births.changed_since(BIRTH["commit"], ("cpp",)) is None and not births.is_old("linear", stranger)
    (clone / "linear-avx2.json").write_text(json.dumps(stranger))
    (clone / "optim-avx2.json").write_text(json.dumps(born(clone)))
    (said, known) = births.report(clone)
    assert said.startswith("linear-avx2: unknown") and BIRTH["commit"][:7] in said
    assert known.startswith("optim-avx2: as measured")


def test_pages_print_when_a_figure_was_measured() -> None:
    stored = {**BIRTH, "backfilled": True, "versions": {"torch": "2.13.0"}}
    later = {**BIRTH, "changed": True, "until": {**BIRTH, "commit": "cd" * 20, "date": "2026-12-03"}}
    found = births.text_of({"amx": {"birth": BIRTH}, "avx2": {"birth": BIRTH}, "neon": {"birth": stored}})
    both, alone = found.splitlines()
    assert both.startswith("Measured 2026-12-01, commit abababa,") and both.endswith("peft 0.21.2 (amx, avx2).")
    assert alone == "Stored 2026-12-01, commit abababa, torch 2.13.0 (neon)."
    lines = births.text_of({"amx": {"birth": later}}).splitlines()
    assert all(len(line) <= births.WIDTH for line in lines)
    text = " ".join(lines)
    assert "abababa with changes on top" in text and "until 2026-12-03, commit cdcdcdc" in text


def test_the_check_fails_without_a_birth(tmp_path: Path) -> None:
    for missing in (None, *BIRTH):
        birth = {key: value for key, value in BIRTH.items() if key != missing}
        (tmp_path / f"without_{missing}-avx2.json").write_text(json.dumps({"birth": birth}), encoding="utf-8")
    (tmp_path / "without_birth-avx2.json").write_text("{}", encoding="utf-8")
    unborn = [f"without_{missing}-avx2.json" for missing in ("birth", "commit", "date", "versions")]
    assert births.unborn(tmp_path) == unborn
    command: list[Any] = [sys.executable, ROOT / "bench" / "readme.py", "--check", "--results", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and ", ".join(unborn) in done.stderr


def test_a_work_folder_keeps_the_first_birth_and_refuses_other_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {**BIRTH}
    monkeypatch.setattr(common, "birth", lambda: dict(now))
    work = tmp_path / "work"
    assert common.birth_in(work) == BIRTH == common.birth_in(work)
    now |= {"commit": "cd" * 20, "date": "2026-12-03"}
    later = common.birth_in(work)
    assert later["commit"] == BIRTH["commit"] and later["until"]["commit"] == "cd" * 20
    now["versions"] = {"torch": "2.14.0"}
    with pytest.raises(SystemExit, match=r"begun with .*2\.13\.0.* now .*2\.14\.0"):
        common.birth_in(work)
    (work / "birth.json").unlink()
    (work / "runs").mkdir()
    with pytest.raises(SystemExit, match="unknown commit"):
        common.birth_in(work)


def test_rows_that_were_not_measured_again_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {**BIRTH}
    monkeypatch.setattr(common, "birth", lambda: dict(now))
    file = tmp_path / "real-amx.json"

    def measure(*rows: tuple[str, bool | None, float]) -> dict[str, Any]:
        of = [{"model": model, "part": value} | ({} if on is None else {"on": on}) for model, on, value in rows]
        result: dict[str, Any] = {"bench": "real", "machine": {"cpu_isa": "amx"}, "rows": of}
        common.keep_other_rows(str(file), result, ("model", "on"))
        common.write_json(str(file), result)
        return dict(json.loads(file.read_text(encoding="utf-8")))

    assert measure(("a", True, 1.0), ("a", False, 2.0), ("b", None, 3.0))["birth"] == BIRTH
    now |= {"commit": "cd" * 20, "date": "2026-12-03"}
    part = measure(("a", False, 5.0), ("c", None, 6.0))
    assert [row["part"] for row in part["rows"]] == [1.0, 5.0, 3.0, 6.0]
    assert part["birth"]["commit"] == BIRTH["commit"] and part["birth"]["until"]["commit"] == "cd" * 20
    whole = measure(("a", True, 1.5), ("a", False, 2.5), ("b", None, 3.5), ("c", None, 4.5))
    assert whole["birth"] == now
    now["versions"] = {"torch": "2.14.0"}
    with pytest.raises(SystemExit, match="measure all"):
        measure(("a", True, 1.0))


def test_outside_a_clone_the_commit_is_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common.birth.__wrapped__()["commit"] is None
    assert not births.is_born({"birth": common.birth.__wrapped__()})
    monkeypatch.setenv("BENCH_COMMIT", "ef" * 20)
    assert births.is_born({"birth": common.birth.__wrapped__()})


def test_amx_stands_beside_the_other_classes(tmp_path: Path) -> None:
    """The same tables with one class more have its rows more, each with its class, and no other row changes."""
    for file in (file for file in RESULTS.glob("*.json") if not file.stem.endswith("-amx")):
        shutil.copy(file, tmp_path)
    before = births.without_marks(readme.performance(tmp_path)).partition("## Missed goals")[0]
    for file in tmp_path.glob("*-avx512_bf16.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        result["machine"]["cpu_isa"] = "amx"
        result["rows"] = [{**row, "bars": []} for row in result["rows"]]  # it has no goals of its own everywhere
        file.with_name(file.name.replace("avx512_bf16", "amx")).write_text(json.dumps(result), encoding="utf-8")
    after = births.without_marks(readme.performance(tmp_path)).partition("## Missed goals")[0]
    rows = [line for line in before.splitlines() if line.startswith("|")]
    assert [line for line in after.splitlines() if line.startswith("|") and "| amx |" not in line] == rows
    assert after.count("| amx |") == before.count("| avx512_bf16 |") > 50 > before.count("| amx |") == 0
    assert "from such a processor" in before and "from such a processor" not in after
    assert "| amx |" in births.without_marks(readme.summary(tmp_path))


def test_the_list_of_missed_goals_is_whole() -> None:
    """As many as the pages call missed, and those of results that no page shows."""
    found = [goal for goal in goals.found(RESULTS) if not goal.met]
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8").partition("## Missed goals")[0]
    on_page = [goal for goal in found if goal.bench in readme.SECTIONS]
    assert text.count(", missed") == len(on_page) > 0
    for name, page in (("residency", "any-file"), ("quality", "quality"), ("shipping", "shipping")):
        count = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8").count("missed")
        assert sum(goal.bench.startswith(name) for goal in found) == count > 0, name


def test_a_goal_of_which_one_of_two_is_enough_counts_once(tmp_path: Path) -> None:
    bar = {"rival": "a", "measure": "times as fast", "bar": 2.0, "value": 1.0}
    bars = [{**bar, "met": met} for met in (False, True, None)]
    rows = [{"case": "either", "bars": bars, "either_bar": True}, {"case": "both", "bars": bars}]
    (tmp_path / "optim-amx.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    found = [(goal.row, goal.met) for goal in goals.found(tmp_path)]
    assert found == [("either", True), ("both", False), ("both", True)]
