"""The rows of docs/ci-full.md. Run by .ci/full, which gives the sections that it ran in SUMMARY.

python .ci/report.py          prints the table with those sections' rows made anew
python .ci/report.py --old    lists the sections that ran before the code that they test was changed
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "ci-full.md"
HEAD = ("| section | seconds | result | run on | commit |", "|---|---|---|---|---|")
NATIVE = "cpp cmake CMakeLists.txt tests/cpp"
LIBRARY = "python cpp cuda cmake CMakeLists.txt pyproject.toml"
# What a section tests, by a part of its name; the first one that fits. A section that is not listed tests the library.
CODE = {
    "system packages": "",
    "nvcc and its readers": "",
    "environment of": "",
    "C++ tests": f"{NATIVE} tests/avx512_on_avx2",
    "native tests": NATIVE,
    "lines of kernels": f"{NATIVE} tests/avx512_on_avx2",
    "macOS and Windows": "cpp cmake CMakeLists.txt",
    "ThreadSanitizer": NATIVE,
    "barriers": "cuda tests/cuda_on_cpu",
    "CUDA kernels on the CPU": "cuda cpp/core tests/cuda_on_cpu",
    "GPU code": "cuda cpp/core tests/cuda_static.py tests/test_cuda_static.py",
    "mends of GPU code": "cuda tests/revert.py tests/cuda_on_cpu",
    "build": "cpp cuda cmake CMakeLists.txt pyproject.toml",
    "walked": f"README.md docs/tutorial.md {LIBRARY}",
    "documentation": "docs mkdocs.yml python",
    "whole suite": f"tests {LIBRARY}",
}


def rows(text: str) -> dict[str, list[str]]:
    """Name of each section of the page -> its other cells: seconds, result, date, commit."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 5 and cells[0] != "section":
            found[cells[0]] = cells[1:]
    return found


def paths_of(name: str) -> list[str]:
    return next((paths for part, paths in CODE.items() if part in name), LIBRARY).split()


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def changes_since(commit: str, paths: list[str]) -> int | None:
    """How many commits have changed these paths since; None if this clone does not have the commit."""
    try:
        return int(git("rev-list", "--count", f"{commit}..HEAD", "--", *paths)) if paths else 0
    except subprocess.CalledProcessError:
        return None


def old(text: str) -> list[str]:
    """A line for each section that is older than what it tests."""
    lines = []
    for name, (_, _, date, commit) in rows(text).items():
        count = changes_since(commit, paths_of(name))
        if count != 0:
            since = "its commit is not in this clone" if count is None else f"{count} commits to what it tests since"
            lines.append(f"older than its code: {name} ({date}, {commit}; {since})")
    return lines


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if "--old" in sys.argv:
        print("\n".join(old(text)) or "no section is older than its code")
        return
    table = rows(text)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    for line in os.environ["SUMMARY"].splitlines():
        found = re.fullmatch(r"(.*?) +(\d+) s  (.*)", line)
        assert found is not None, line
        table[found[1]] = [found[2], found[3], str(today), git("rev-parse", "--short", "HEAD")]
    print(*HEAD, *(f"| {' | '.join([name, *cells])} |" for name, cells in table.items()), sep="\n")


if __name__ == "__main__":
    main()
