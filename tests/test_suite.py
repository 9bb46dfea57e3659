"""The suite's own rules: the README's test command, reasons of skips, workers, and sections of CI that are left out."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BYTES_OF_A_WORKER, workers
from laws import ROOT
from skips import REASONS, rule_of

TESTS = ROOT / "tests"


def bash(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Two commands")[2]
    block = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    (line,) = [line for line in block.splitlines() if "pytest" in line]
    command = re.sub(r" +#.*", "", line)
    assert re.fullmatch(r"pip install '\.\[\w+\]' && pytest", command)
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (taken,) = re.findall(r"^readme_command=.*?^readme_install=.*?$", run, re.MULTILINE | re.DOTALL)
    done = bash(f'{taken}\nprintf "%s\\n" "$readme_install" "$readme_pytest"')
    assert done.stdout.splitlines() == command.split(" && ")
    assert run.count('bash -c "$readme_install" &&') == run.count('bash -c "$readme_pytest"') == 1


def reasons_in(path: Path) -> Iterator[str]:
    """What the skips of a file say; a part that is filled in stands as 0."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = [word.value for word in node.keywords if word.arg == "reason"]
            if node.func.attr == "skip" or (node.func.attr == "skipif" and given):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "0"
                    for part in getattr((given or node.args)[0], "values", (given or node.args)[:1])
                )


def test_every_reason_of_a_skip_is_listed() -> None:
    found = {reason: path.name for path in TESTS.glob("*.py") for reason in reasons_in(path)}
    found.pop("0", None)  # of a variable
    assert len(found) > 20
    for reason, file in found.items():
        assert rule_of(reason.replace("no 0 ", "no cmake "), ""), f"{file}: {reason}"
    assert all(len(why) > 10 for why in REASONS.values())


def test_a_program_that_is_here_is_no_reason() -> None:
    assert rule_of("no cmake on PATH", "ninja,nvcc") and not rule_of("no cmake on PATH", "ninja,cmake")
    assert not rule_of("could not import 'peft': gone", "")  # the extra `test` brings it
    assert not rule_of("needs more time", "")


@pytest.mark.parametrize(
    ("body", "words", "code"),
    [
        ("pytest.skip('no cmake on PATH')", [], 0),
        ("pytest.skip('no cmake on PATH')", ["--present", "cmake"], 1),
        ("pytest.skip('as I like')", [], 1),
        ("pytest.importorskip('none_such')", [], 1),
        ("pytest.xfail('as I like')", [], 0),
        ("pass", [], 0),
    ],
)
def test_a_skip_for_no_listed_reason_fails_the_run(body: str, words: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(f"import pytest\ndef test_one():\n    {body}\ndef test_two():\n    pass\n")
    (tmp_path / "conftest.py").write_text(f"import sys\nsys.path.append({str(TESTS)!r})\npytest_plugins = ['skips']\n")
    for more in ([], ["-n", "2"])[: 1 + ("pytest.skip" in body)]:  # reports of other processes count as well
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), str(tmp_path), *words, *more]
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == code, done.stdout
        assert ("reasons of skips" in done.stdout) == (".skip" in body or "importorskip" in body)


@pytest.mark.parametrize(
    ("cores", "gib", "expected"), [(2, 16, 4), (1, 16, 3), (64, 64, 4), (2, 5, 2), (2, 1, 1), (8, 0, 1)]
)
def test_workers(cores: int, gib: int, expected: int) -> None:
    assert workers(cores, gib << 30) == expected and BYTES_OF_A_WORKER == 2 << 30


@pytest.mark.parametrize(
    ("optional", "command", "failures", "verdict"),
    [
        ("", "true", 0, "ok"),
        ("", "false", 1, "FAILED (status 1)"),
        ("", "left_out no nvcc", 1, "FAILED: left out: no nvcc"),
        ("another one", "left_out no nvcc", 1, "FAILED: left out: no nvcc"),
        ("one", "left_out no nvcc", 0, "left out: no nvcc"),
    ],
)
def test_a_section_that_is_left_out_fails_unless_it_is_optional(
    optional: str, command: str, failures: int, verdict: str
) -> None:
    script = f". .ci/common.sh; optional=('a' '{optional}'); section one {command}; print_summary; echo $failures"
    *_, last, count = bash(script).stdout.splitlines()
    assert last.split(" s  ")[1] == verdict and int(count) == failures
