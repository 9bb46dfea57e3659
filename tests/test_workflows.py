"""The workflows of a public repository: what they run is here, what they use is pinned, and one job may publish."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from laws import ROOT

tomllib: Any = pytest.importorskip("tomllib", reason="it came with Python 3.11")
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS: dict[str, Any] = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yml"))}
JOBS = {(name, key): job for name, workflow in WORKFLOWS.items() for key, job in workflow["jobs"].items()}
PINNED = re.compile(r"[\w-]+/[\w-]+@(v\d+|release/v\d+|[0-9a-f]{40})")
BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]


def test_what_they_use_is_pinned_and_bounded() -> None:
    assert {*WORKFLOWS} == {"ci", "wheels"}
    used = [step["uses"] for job in JOBS.values() for step in job["steps"] if "uses" in step]
    assert len(used) >= 6 and [name for name in used if not PINNED.fullmatch(name)] == []
    assert all(0 < job["timeout-minutes"] <= 180 for job in JOBS.values())
    assert all("concurrency" in workflow for workflow in WORKFLOWS.values())


def test_only_publishing_may_write_and_only_on_a_tag() -> None:
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    assert {key: job["permissions"] for key, job in JOBS.items() if "permissions" in job} == {
        ("wheels", "publish"): {"id-token": "write"}
    }
    publish = JOBS["wheels", "publish"]
    assert "ref_type == 'tag'" in publish["if"] and publish["needs"] == ["wheels", "sdist"]
    assert "secrets." not in "".join(path.read_text() for path in FOLDER.glob("*.yml"))


def test_ci_is_the_one_script() -> None:
    job = JOBS["ci", "run"]
    assert job["steps"][-1] == {"run": "bash .ci/run"} and job["timeout-minutes"] == 60
    assert {*WORKFLOWS["ci"][True]} == {"push", "pull_request"}  # YAML reads the key `on` as true


def test_wheels_are_of_every_system_and_tested_there() -> None:
    runners = {row["runner"].split("-")[0] for row in JOBS["wheels", "wheels"]["strategy"]["matrix"]["include"]}
    assert runners == {"ubuntu", "macos", "windows"}
    tests = re.findall(r"\{project\}/(\S+)", BUILD["test-command"])
    assert len(tests) == 8 and all((ROOT / test).is_file() for test in tests)
    sections = [BUILD, *(BUILD[system] for system in ("macos", "windows"))]
    assert [section["environment"]["QLORA_NATIVE_CUDA"] for section in sections] == ["OFF"] * 3
    assert BUILD["linux"]["environment"] == {"QLORA_NATIVE_CUDA": "ON", "QLORA_NATIVE_CUDA_ARCHS": "all"}
