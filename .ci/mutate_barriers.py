"""Deletes each barrier and each wait of the CUDA kernels in turn; the kernel's tests in the emulator must then fail.

    python .ci/mutate_barriers.py FOLDER [part of a file's name]

Works in a copy of the tree under FOLDER. Each line of cuda/*.cuh with __syncthreads, __syncwarp or cp_async_wait is one
mutant, tried in the race build and, if that passes, in the plain one. Prints the score; the exit status is 1 if a mutant
survives that SURVIVORS does not explain, or if one that it explains is found after all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CALL = re.compile(r"(?:wp::)?(?:__syncthreads\(\)|__syncwarp\([^;]*\)|cp_async_wait<[^;]*>\(\));")
BUILDS = ("race", "plain")
LIMIT_S = 600  # a mutant that hangs is found, too

# File and the line's text: why no test can fail without it.
SURVIVORS: dict[tuple[str, str], str] = {}


class Mutant(NamedTuple):
    """A line of a kernel file."""

    path: str  # from the root
    number: int
    line: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.line.strip()}"


def mutants(root: Path, part: str = "") -> list[Mutant]:
    """Every line to delete, in order."""
    found = []
    for file in sorted((root / "cuda").glob("*.cuh")):
        if file.name == "wp.cuh" or part not in file.name:
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if CALL.search(line.split("//")[0]):
                found.append(Mutant(f"cuda/{file.name}", number, line))
    return found


def without(text: str, mutant: Mutant) -> str:
    """The file's text with the call replaced by nothing."""
    lines = text.splitlines(keepends=True)
    lines[mutant.number - 1] = CALL.sub("(void)0;", lines[mutant.number - 1])
    return "".join(lines)


def including(root: Path, name: str) -> set[str]:
    """Ops whose .cu comes, over any number of includes, to the header ``name``."""
    texts = {file.name: file.read_text(encoding="utf-8") for file in (root / "cuda").glob("*.cu*")}
    reached, grown = {name}, True
    while grown:
        more = {file for file, text in texts.items() if any(f'"cuda/{header}"' in text for header in reached)}
        grown = not more <= reached
        reached |= more
    return {file.removesuffix(".cu") for file in reached if file.endswith(".cu")}


def tests_of(root: Path, mutant: Mutant) -> list[str]:
    """The emulator's tests that execute the file."""
    stems = including(root, Path(mutant.path).name)
    tests = sorted(file.stem for file in (root / "tests" / "cuda_on_cpu").glob("test_*.cc"))
    return [test for test in tests if test.removeprefix("test_") in stems]


def passes(build_dir: Path, tests: list[str], build: str) -> str | None:
    """None if all tests pass; else why not. SystemExit if the tree does not compile."""
    names = [f"{test}_{build}" for test in tests]
    made = subprocess.run(["cmake", "--build", str(build_dir), "--target", *names], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"does not compile:\n{made.stdout[-3000:]}")
    for name in names:
        program = next(build_dir.rglob(name))
        try:
            done = subprocess.run([str(program)], capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"{name} hangs"
        if done.returncode:
            words = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            return f"{name}: {words[0][:120] if words else done.returncode}"
    return None


def copied(folder: Path) -> tuple[Path, Path]:
    """A copy of the sources, and its configured build."""
    tree, build_dir = folder / "tree", folder / "build"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("cmake", "cpp", "cuda", "tests"):
        shutil.copytree(ROOT / name, tree / name)
    (tree / "python/qlora_native").mkdir(parents=True)
    shutil.copy(ROOT / "python/qlora_native/_version.py", tree / "python/qlora_native")
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    options = ("QLORA_NATIVE_CUDA_ON_CPU=ON", "QLORA_NATIVE_PYTHON=OFF", "QLORA_NATIVE_CUDA=OFF")
    command = ["cmake", "-S", str(tree), "-B", str(build_dir), "-G", "Ninja", *(f"-D{option}" for option in options)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return tree, build_dir


def main() -> None:
    folder, part = Path(sys.argv[1]), "".join(sys.argv[2:3])
    tree, build_dir = copied(folder)
    everything = mutants(tree, part)
    for build in BUILDS:
        sound = sorted({test for mutant in everything for test in tests_of(tree, mutant)})
        reason = passes(build_dir, sound, build)
        if reason:
            raise SystemExit(f"the tests fail before anything is deleted: {reason}")
    survived, wrong = [], []
    for mutant in everything:
        started, file = time.monotonic(), tree / mutant.path
        text = file.read_text(encoding="utf-8")
        file.write_text(without(text, mutant), encoding="utf-8")
        tests = tests_of(tree, mutant)
        reasons = (passes(build_dir, tests, build) for build in BUILDS)
        reason = next((found for found in reasons if found), None) if tests else None
        file.write_text(text, encoding="utf-8")
        explained = SURVIVORS.get((mutant.path, mutant.line.strip()))
        verdict = f"found, {reason}" if reason else f"SURVIVES{f' as explained: {explained}' if explained else ''}"
        print(f"{mutant}\n    {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
        if not reason:
            survived.append(mutant)
        if bool(reason) == bool(explained):
            wrong.append(mutant)
    found = len(everything) - len(survived)
    print(f"{found} of {len(everything)} deleted barriers and waits make a test fail", *map(str, survived), sep="\n  ")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
