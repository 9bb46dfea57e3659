"""The page stores of CUDA compile against the declarations of CUDA 12 and of CUDA 13, without a toolkit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++") or shutil.which("clang++")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Wsign-conversion", "-Werror")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler on PATH")


def compile_against(version: int, source: str) -> subprocess.CompletedProcess[str]:
    folders = (f"-I{ROOT / folder}" for folder in ("cpp", ".", "tests/cuda_12"))
    command = [str(COMPILER), "-std=c++20", "-fsyntax-only", *WARNINGS, *folders, f"-DCUDART_VERSION={version}"]
    return subprocess.run([*command, "-x", "c++", "-"], input=source, capture_output=True, text=True)


@pytest.mark.parametrize("version", [12080, 13000])
@pytest.mark.parametrize("file", ["managed_store.cc", "pinned_store.cc", "page_store.cc"])
def test_it_compiles_with_both_signatures(file: str, version: int) -> None:
    done = compile_against(version, f'#include "cuda/{file}"\n')
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("version", [12080, 13000])
def test_the_declarations_differ_by_version(version: int) -> None:
    call = "return cudaMemPrefetchAsync(nullptr, 1, 0, nullptr);" if version == 13000 else "return cudaMemLocation{};"
    done = compile_against(version, f"#include <cuda_runtime_api.h>\nauto f() {{ {call} }}\n")
    assert done.returncode != 0
