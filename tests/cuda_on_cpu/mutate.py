"""Deletes one barrier or wait of the CUDA kernels at a time and asks the emulator's tests to notice.

    python tests/cuda_on_cpu/mutate.py [--only linear_4bit_tile.cuh] [--first N] [--scratch DIR] [--list] [-D<option>]

Works on a copy of the tree and leaves this one alone. A mutant is tried in the builds race, plain and asan, in that
order, with the tests of the ops whose sources include its file, until one fails. Prints a line for each and the score;
the exit status is 1 if one survived that EXPLAINED does not excuse.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ("race", "plain", "asan")
SECONDS_A_TEST = 300
STATEMENT = re.compile(r"^\s*(?:__syncthreads\(\)|__syncwarp\([^;]*\)|(?:wp::)?cp_async_wait<[^;]*>\(\));")

# (file, statement and the comment behind it) -> why the emulator cannot see that it is gone.
EXPLAINED: dict[tuple[str, str], str] = {
    ("cuda/tensor_list.cuh", "__syncwarp();"): "it orders device memory after lane 0's fence, which is not modelled",
}


@dataclass(frozen=True)
class Mutant:
    path: str  # from the root
    line: int  # from 1
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def mutants(root: Path) -> list[Mutant]:
    return [
        Mutant(path.relative_to(root).as_posix(), number, line.strip())
        for path in sorted((root / "cuda").glob("*.cu*"))
        if path.name != "wp.cuh"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if STATEMENT.match(line)
    ]


def included(path: Path, root: Path) -> set[str]:
    """The files of cuda/ that `path` includes, itself among them."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        name = current.relative_to(root).as_posix()
        if name not in found:
            found.add(name)
            inner = re.findall(r'^#include "(cuda/[^"]+)"', current.read_text(), re.MULTILINE)
            waiting += [root / other for other in inner if (root / other).exists()]
    return found


def tests_of(mutant: Mutant, root: Path) -> list[str]:
    """Tests named after an op one of whose sources includes the file; all of them if there is none."""
    tests = sorted(path.stem for path in (root / "tests/cuda_on_cpu").glob("test_*.cc"))
    sources = [path.stem for path in (root / "cuda").glob("*.cu") if mutant.path in included(path, root)]
    own = [test for test in tests if any(source.startswith(test.removeprefix("test_")) for source in sources)]
    return own or tests


def copy_of_tree(into: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)


def build(folder: Path, targets: list[str]) -> bool:
    command = ["cmake", "--build", str(folder), "--target", *targets]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout[-3000:])
    return done.returncode == 0


def passes(executable: Path) -> bool:
    try:
        return subprocess.run([executable], capture_output=True, timeout=SECONDS_A_TEST).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def killer(mutant: Mutant, root: Path, folder: Path) -> str | None:
    """The test and build that notice; None if all pass."""
    path = root / mutant.path
    sound = path.read_text()
    lines = sound.splitlines(keepends=True)
    lines[mutant.line - 1] = STATEMENT.sub(";", lines[mutant.line - 1])
    path.write_text("".join(lines))
    try:
        for kind in BUILDS:
            names = [f"{test}_{kind}" for test in tests_of(mutant, root)]
            if not build(folder, names):
                return f"the compiler of {kind}"
            for name in names:
                if not passes(folder / "tests/cuda_on_cpu" / name):
                    return name
    finally:
        path.write_text(sound)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants of files whose name ends so")
    parser.add_argument("--first", type=int, default=1, help="number of the mutant to begin with")
    parser.add_argument("--scratch", type=Path, help="a folder for the copy, kept for the next run")
    parser.add_argument("--list", action="store_true", help="only name them")
    options, cmake_options = parser.parse_known_args()
    chosen = [mutant for mutant in mutants(ROOT) if mutant.path.endswith(options.only)]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    survivors: list[Mutant] = []
    with contextlib.ExitStack() as stack:
        scratch = options.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root, folder = scratch / "tree", scratch / "build"
        root.mkdir(parents=True, exist_ok=True)
        copy_of_tree(root)
        configure = ["cmake", "-S", str(root), "-B", str(folder), "-DQLORA_NATIVE_CUDA_ON_CPU=ON"]
        configure += ["-DQLORA_NATIVE_PYTHON=OFF", "-DQLORA_NATIVE_CUDA=OFF", *cmake_options]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        for number, mutant in enumerate(chosen[options.first - 1 :], options.first):
            start = time.monotonic()
            found = killer(mutant, root, folder)
            excuse = EXPLAINED.get((mutant.path, mutant.text))
            verdict = f"seen by {found}" if found else f"SURVIVES ({excuse or 'unexplained'})"
            print(f"{number}/{len(chosen)} {mutant}  {verdict}, {time.monotonic() - start:.0f} s", flush=True)
            if found is None and excuse is None:
                survivors.append(mutant)
    tried = len(chosen) - options.first + 1
    print(f"score: {tried - len(survivors)} of {tried} seen or explained")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
