"""Which lines of the CPU kernels the native tests executed: python tests/kernel_coverage.py BUILD [BUILD...]

Each BUILD is a folder of objects compiled with --coverage, whose tests ran under every instruction set. A line counts
once, however many objects hold it, and is executed if it is in any of them. Fails under 95 % in sum.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

LEAST = 0.95


def executed_lines(build: Path) -> dict[str, dict[int, bool]]:
    """For each kernels/*-inl.h by name: its lines that have code, and whether a test executed them."""
    lines: dict[str, dict[int, bool]] = defaultdict(dict)
    notes = sorted(build.rglob("isa_*.gcno"))  # an object that no test entered has notes, and no counts
    for note in notes:
        gcov = subprocess.run(["gcov", "--json-format", "--stdout", note], capture_output=True, text=True, check=True)
        for file in json.loads(gcov.stdout)["files"]:
            if re.search(r"cpp/cpu/(kernels/[\w-]+-inl|isa/vec-\w+)\.h$", file["file"]):
                of_file = lines[Path(file["file"]).name]
                for line in file["lines"]:
                    number = line["line_number"]
                    of_file[number] = of_file.get(number, False) or line["count"] > 0
    return lines


def main(builds: list[str]) -> int:
    """Print the table; 0 if enough was executed."""
    merged: dict[str, dict[int, bool]] = defaultdict(dict)
    for build in builds:
        for name, lines in executed_lines(Path(build)).items():
            for number, executed in lines.items():
                merged[name][number] = merged[name].get(number, False) or executed
    print("| file | lines | executed | never |\n|---|---|---|---|")
    for name, lines in sorted(merged.items()):
        never = " ".join(str(number) for number, executed in sorted(lines.items()) if not executed)
        print(f"| {name} | {len(lines)} | {sum(lines.values())} | {never} |")
    total = sum(map(len, merged.values()))
    reached = sum(sum(lines.values()) for lines in merged.values())
    print(f"{reached} of {total} lines, {100 * reached / max(total, 1):.2f} %; at least {100 * LEAST:.0f} % are wanted")
    return 0 if total and reached >= LEAST * total else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
