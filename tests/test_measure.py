"""bench/measure.sh: what is there is not measured again, what cannot run is named, and the time limit holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import births
import common
import measure
import pages
import pytest
from laws import ROOT

BENCH = """import json, sys
from pathlib import Path
file = Path(sys.argv[sys.argv.index("--json") + 1])
file.write_text(json.dumps({"birth": json.loads(Path(sys.argv[1]).read_text()), "rows": []}))
with open(sys.argv[1] + ".runs", "a") as out:
    print(file.stem, file=out)
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one bench, which writes the birth in a file that it is given."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/bench_tiny.py").write_text(BENCH)
    birth = {"commit": "ab" * 20, "changed": False, "date": "2026-12-01", "versions": {"torch": "2"}}
    (tmp_path / "birth").write_text(json.dumps(birth))
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(births, "changed_since", lambda commit, paths: ())
    monkeypatch.setattr(common, "birth", lambda: birth)
    return tmp_path


def job(**options: Any) -> measure.Job:
    return measure.Job("optim", options.pop("command", "bench_tiny.py STATE/birth"), 1, **options)


def runs(folder: Path) -> list[str]:
    file = folder / "birth.runs"
    return file.read_text().split() if file.exists() else []


def test_what_is_there_for_this_code_is_not_measured_again(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [(job(), ""), (job(), "avx2")]
    own = f"optim-{measure.own_class()}"
    assert measure.measure(chosen, bench, 10) == [] and runs(bench) == [own, "optim-avx2"]
    assert measure.measure(chosen, bench, 10) == [] and len(runs(bench)) == 2
    monkeypatch.setattr(births, "changed_since", lambda commit, paths: ("bench/bench_optim.py",))
    assert measure.measure(chosen[:1], bench, 10) == [] and runs(bench)[2:] == [own]


def test_a_result_of_unsure_birth_is_measured_again(bench: Path) -> None:
    changes: list[dict[str, Any]] = [{"backfilled": True}, {"changed": True}, {"versions": {"torch": "1"}}]
    for stale in (*changes, {"commit": None}, {}):
        (bench / "optim-avx2.json").write_text(json.dumps({"birth": {**common.birth(), **stale}}))
        assert measure.is_done(job(), "avx2") is not bool(stale), stale


@pytest.mark.parametrize(
    ("options", "minutes", "reason"),
    [
        ({"packages": ("no_such_package",)}, 10, "no no_such_package"),
        ({"disk_gib": 1 << 30}, 10, "GiB of disk"),
        ({"memory_gib": 1 << 30}, 10, "GiB of memory"),
        ({}, 0.5, "about 1 minutes, 0 are left"),
        ({"command": "bench_none.py"}, 10, "there is no bench/bench_none.py"),
        ({"command": "bench_tiny.py STATE/none"}, 10, "bench_tiny.py ended with status 1"),
    ],
)
def test_what_is_left_out_is_named(options: dict[str, Any], minutes: float, reason: str, bench: Path) -> None:
    (left_out,) = measure.measure([(job(**options), "")], bench, minutes)
    assert left_out.startswith(f"optim-{measure.own_class()}: ") and reason in left_out
    assert runs(bench) == []


def test_every_job_has_paths_and_every_result_a_job() -> None:
    names = [job.name for job in measure.JOBS]
    assert names[:2] == ["train", "real"] and set(names) <= births.PATHS.keys()
    stored = {file.stem.rpartition("-")[0] for cpu in pages.CLASSES for file in measure.RESULTS.glob(f"*-{cpu}.json")}
    assert stored - set(names) == {"residency_70b"}  # 40 GB of disk: by hand


def test_the_command_says_what_it_takes() -> None:
    env = {**os.environ, "PYTHON": sys.executable}
    command: list[Any] = ["bash", ROOT / "bench" / "measure.sh", "--help"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "--minutes" in done.stdout and "--classes" in done.stdout
