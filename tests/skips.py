"""Why a test may be skipped. A skip for a reason that is not listed here fails the run: nothing is left out in silence.

``pytest --present cmake,nvcc`` says which programs and packages are here: a skip for want of one fails the run too.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

# A pattern of the whole reason -> why the test is right to be skipped. A group `program` names what is missing.
REASONS = {
    r"no (?P<program>cmake|ninja|nm|c\+\+|g\+\+|cc|gcc) on PATH": "checks the build; an installed copy needs none",
    r"no (?P<program>nvcc) on PATH( when this was built)?": "checks CUDA code; the build does without",
    r"no (?P<program>chromium) on PATH": "looks at a report's page; .ci/full installs it",
    r"no (?P<program>emulator) of a GPU in build/emulated: .*": "runs CUDA kernels on the CPU; .ci/run builds it",
    r"no (?P<program>cuobjdump|nvdisasm|c\+\+filt) reads GPU code here: .*": "reads machine code; .ci/run installs it",
    r"torch finds no CUDA device": "needs a GPU; bench/gpu_check.sh asks for one",
    r"there is a (GPU: .*|CUDA device.*)": "shows what happens without a GPU",
    r"no build folder, so the library was built elsewhere": "reads the objects of an install from this folder",
    r"could not import '(?P<program>scikit_build_core|pybind11)': .*": "builds the package; .ci/run installs them",
    r"could not import '(?P<program>mlflow|wandb|trackio|lm_eval|scipy)': .*": "they are large; .ci/full installs them",
    r"--[a-z-]+ was not given; \.ci/full gives it": "takes minutes or other packages",
    r"no (?P<program>demo) model in the cache: .*": "a download of 93 MB; .ci/run fetches it first",
    r"no git clone, in which paths are looked up": "reads the history; an unpacked sdist has none",
    r"root may write anywhere": "shows what a folder without permission does",
    r"this kernel gives none|the system does not (list its|let a process choose) .*": "kernels differ",
    r"no tmpfs here|no file system may be mounted here": "containers differ in what they may mount",
    r"temporary files lie in memory here: .*|page files are Linux's, and .*": "needs temporary files on a disk",
    r"an x86-64 CPU's instructions": "limits them, as other CPUs cannot",
    r"(needs|reads|files are mapped on|libgomp is) (Linux|/proc).*|/proc is Linux's|forks, .*": "another system",
    r"no pseudo-terminals|limits the size of files by setrlimit": "Windows has neither",
    r"only glibc's malloc is configured": "another C library",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--present", default="", help="programs that are here: no test may be skipped for want of one")


def reason_of(report: Any) -> str:
    """What the skip of a test or of a whole file says."""
    place = report.longrepr
    return str(place[2] if isinstance(place, tuple) else place).removeprefix("Skipped: ")


def rule_of(reason: str, present: str) -> str | None:
    """The pattern of REASONS that lets a test be skipped for ``reason``; None if none does."""
    for pattern in REASONS:
        if found := re.fullmatch(pattern, reason, re.DOTALL):
            return None if found.groupdict().get("program") in present.split(",") else pattern
    return None


class Skips:
    """Counts the reasons of this run, and fails it for those that are not listed."""

    def __init__(self, present: str) -> None:
        self.present = present
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.counts[reason_of(report)] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.counts[reason_of(report)] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted() and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def unlisted(self) -> list[str]:
        return [reason for reason in self.counts if rule_of(reason, self.present) is None]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.counts:
            terminalreporter.section("reasons of skips")
        for reason, count in self.counts.most_common():
            rule = rule_of(reason, self.present)
            why = "FAILED: tests/skips.py does not allow this here" if rule is None else REASONS[rule]
            terminalreporter.write_line(f"{count} x {reason[:90]} ({why})")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of xdist, whose reports come to its controller
        config.pluginmanager.register(Skips(config.getoption("--present")), "skips of this run")
