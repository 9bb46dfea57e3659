"""Deletes one barrier, fence or wait of the CUDA kernels at a time and asks the emulator's tests to notice.

    python tests/cuda_on_cpu/mutate.py [--only linear_4bit_tile.cuh] [--scratch DIR] [--list] [-D<option>]

Works on a copy of the tree, in which CUEMU_LEFT_OUT in the environment says which one to pass over, so that one build
has all mutants. Each is tried in the builds race, plain and asan, in that order, with the tests of the ops whose
sources include its file, and then with all other tests, until one fails. A test must pass without a mutant first, and
is stopped where it fails. Prints a line for each mutant and the score; the exit status is 1 if one survived.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ("race", "plain", "asan")
SECONDS_A_TEST = 300
ORDERS = r"(?:__syncthreads\w*|__syncwarp|__threadfence\w*|(?:wp::)?cp_async_(?:commit|wait<[^;]*>))\("
STATEMENT = re.compile(rf"^\s*{ORDERS}[^;]*\);")
SWITCH = """
#include <cstdlib>
namespace cuemu {
inline const int left_out = std::atoi(std::getenv("CUEMU_LEFT_OUT"));
}
"""


class Mutant(NamedTuple):
    path: str  # from the root
    line: int  # from 1
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def mutants(root: Path) -> list[Mutant]:
    """Every line of the kernels that orders memory; each is a statement of its own, or it could not be deleted."""
    found = []
    for path in sorted((root / "cuda").glob("*.cu*")):
        if path.name == "wp.cuh":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            mutant = Mutant(path.relative_to(root).as_posix(), number, line.strip())
            if STATEMENT.match(line):
                found.append(mutant)
            elif re.search(ORDERS, line.partition("//")[0]):
                raise SystemExit(f"{mutant}  cannot be deleted: expected a statement on a line of its own")
    return found


def included(path: Path, root: Path) -> set[str]:
    """The files of cuda/ that `path` includes, itself among them."""
    found, waiting = set[str](), [path.relative_to(root).as_posix()]
    while waiting:
        name = waiting.pop()
        if name not in found and (root / name).exists():
            found.add(name)
            waiting += re.findall(r'^#include "(cuda/[^"]+)"', (root / name).read_text(), re.MULTILINE)
    return found


def all_tests(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "tests/cuda_on_cpu").glob("test_*.cc"))


def tests_of(mutant: Mutant, root: Path) -> list[str]:
    """Tests named after an op one of whose sources includes the file."""
    sources = [path.stem for path in (root / "cuda").glob("*.cu") if mutant.path in included(path, root)]
    return [test for test in all_tests(root) if any(f"test_{source}".startswith(test) for source in sources)]


def with_switches(root: Path, found: list[Mutant]) -> dict[str, bytes]:
    """The files that have a mutant, each behind its number from 1, and the one that declares the switch."""
    texts: dict[str, list[str]] = {}
    for number, mutant in enumerate(found, 1):
        lines = texts.setdefault(mutant.path, (root / mutant.path).read_text().splitlines(keepends=True))
        line = lines[mutant.line - 1]
        lines[mutant.line - 1] = STATEMENT.sub(rf"if (::cuemu::left_out != {number}) {{ \g<0> }}", line)
    declared = "tests/cuda_on_cpu/builtins.h"
    texts[declared] = [(root / declared).read_text(), SWITCH]
    return {path: "".join(lines).encode() for path, lines in texts.items()}


def copy_of_tree(into: Path, edited: Mapping[str, bytes]) -> None:
    """What git would commit, with other bytes for some files."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = ROOT / name, into / name
        if not source.is_file():
            continue
        wanted = edited.get(name) or source.read_bytes()
        if not (copy.is_file() and copy.read_bytes() == wanted):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(wanted)  # with the time of now, so that it is compiled again


class Tests:
    """The emulator's tests of a tree in their three builds."""

    def __init__(self, root: Path, folder: Path, cmake_options: list[str]) -> None:
        self.root, self.folder = root, folder
        self.sound: set[str] = set()  # names of tests that pass on the tree as it is
        configure = ["cmake", "-S", str(root), "-B", str(folder), "-DQLORA_NATIVE_CUDA_ON_CPU=ON"]
        configure += ["-DQLORA_NATIVE_PYTHON=OFF", "-DQLORA_NATIVE_CUDA=OFF", *cmake_options]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)

    def build(self, names: list[str]) -> bool:
        command = ["cmake", "--build", str(self.folder), "--target", *names]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout[-3000:] if done.returncode else "", end="")
        return done.returncode == 0

    def passes(self, name: str, left_out: int = 0) -> bool:
        """Whether it does, in time, without the mutant of that number; it is ended at the first test that fails."""
        command = [self.folder / "tests/cuda_on_cpu" / name]
        env = {**os.environ, "CUEMU_LEFT_OUT": str(left_out)}
        quiet: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with subprocess.Popen(command, env=env, **quiet) as running:
            alarm = threading.Timer(SECONDS_A_TEST, running.kill)
            alarm.start()
            try:
                assert running.stdout is not None
                if any(line.endswith(" FAILED\n") for line in running.stdout):
                    running.kill()
                return running.wait() == 0
            finally:
                alarm.cancel()

    def check_sound(self, names: list[str]) -> None:
        new = [name for name in names if name not in self.sound]
        if new and not self.build(new):
            raise SystemExit("the tree does not compile without a mutant")
        for name in new:
            if not self.passes(name):
                raise SystemExit(f"{name} fails without a mutant")
        self.sound.update(new)

    def killer(self, number: int, mutant: Mutant) -> str | None:
        """The test and build that notice; None if all pass."""
        own = tests_of(mutant, self.root)
        others = [test for test in all_tests(self.root) if test not in own]
        for tests, kind in itertools.product(filter(None, (own, others)), BUILDS):
            names = [f"{test}_{kind}" for test in tests]
            self.check_sound(names)
            for name in names:
                if not self.passes(name, number):
                    return name
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants of files whose name ends so")
    parser.add_argument("--scratch", type=Path, help="a folder for the copy, kept for the next run")
    parser.add_argument("--list", action="store_true", help="only name them")
    options, cmake_options = parser.parse_known_args()
    every = mutants(ROOT)
    chosen = [pair for pair in enumerate(every, 1) if pair[1].path.endswith(options.only)]
    if options.list:
        print(*(mutant for _, mutant in chosen), sep="\n")
        return 0
    survivors = 0
    with contextlib.ExitStack() as stack:
        scratch = options.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root = scratch / "tree"
        root.mkdir(parents=True, exist_ok=True)
        copy_of_tree(root, with_switches(ROOT, every))
        tests = Tests(root, scratch / "build", cmake_options)
        for number, mutant in chosen:
            start = time.monotonic()
            found = tests.killer(number, mutant)
            survivors += found is None
            verdict = f"seen by {found}" if found else "SURVIVES"
            print(f"{number}/{len(every)} {mutant}  {verdict}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"score: {len(chosen) - survivors} of {len(chosen)} seen")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
