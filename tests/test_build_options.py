"""What the build chooses by itself: GPU architectures, and which code the linker may take from which object."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from laws import ROOT

CUDA_12_0 = "50 60 70 75 80 86 87 89 90"
CUDA_13_0 = "75 80 86 87 88 89 90 100 110 103 120 121"


@pytest.mark.parametrize(
    ("known", "cards", "wanted", "expected"),
    [
        (CUDA_13_0, None, "", "75;80;86;89;90;100;120"),
        (CUDA_12_0, None, "", "75;80;86;89;90"),
        ("35 50 70", None, "", ""),
        (CUDA_13_0, "", "", "75;80;86;89;90;100;120"),  # a driver that fails, or sees no card
        (CUDA_13_0, "9.0 8.9 9.0", "", "89;90"),
        (CUDA_13_0, "12.1", "", "121"),
        (CUDA_13_0, "10.0 9.0", "", "90;100"),
        (CUDA_12_0, "12.0", "", "75;80;86;89;90"),  # newer than nvcc: PTX serves it
        (CUDA_12_0, "7.0 8.0", "", "80"),
        (CUDA_12_0, "6.1", "", "75;80;86;89;90"),
        (CUDA_13_0, "9.0", "all", "75;80;86;89;90;100;120"),
        (CUDA_13_0, "9.0", "86;80", "80;86"),
        (CUDA_13_0, "9.0", "sm_80", "sm_80"),  # refused later, in words
    ],
)
def test_architectures(known: str, cards: str | None, wanted: str, expected: str, tmp_path: Path) -> None:
    """For an nvcc that supports ``known``, beside cards of these capabilities; None: no driver."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("there is no cmake here: pip install cmake")
    programs = {"nvcc": " ".join(f"sm_{arch}" for arch in known.split())}
    if cards is not None:
        programs["nvidia-smi"] = cards
    for name, words in programs.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' {words}\n[ -n '{words}' ]\n")
        program.chmod(0o755)
    script = tmp_path / "choose.cmake"
    script.write_text(
        f'include("{ROOT}/cmake/cuda_archs.cmake")\n'
        f'choose_cuda_archs(chosen "{tmp_path}/nvcc" "{wanted}")\nmessage("${{chosen}}")\n'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.defpath}"}
    done = subprocess.run([cmake, "-P", str(script)], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == expected


def weak_functions(listing: str) -> set[str]:
    """Object and name of each weak function that an instruction set's flags made, in what `nm` prints of an archive."""
    found, name = set(), ""
    for line in listing.splitlines():
        if line.endswith(":"):
            name = line
        elif re.match(r"isa_(?!scalar)", name) and re.match(r"[0-9a-f]+ W ", line):  # V and u are data
            found.add(name + line.split(" W ")[1])
    return found


def test_no_kernel_object_offers_code_for_all() -> None:
    """Of equal weak functions the linker keeps any one: one with AVX-512 in it would end other CPUs with SIGILL."""
    nm = shutil.which("nm")
    archives = sorted(ROOT.glob("build/cp3*/libqlora_native_cpu.a"))
    if nm is None or not archives:
        pytest.skip("there is no build folder here, or no nm")
    for archive in archives:
        listing = subprocess.run([nm, "-C", "--defined-only", str(archive)], capture_output=True, text=True, check=True)
        assert "isa_scalar" in listing.stdout and not weak_functions(listing.stdout), archive


def test_a_weak_function_is_seen() -> None:
    line = "0000000000000000 W float std::max<float>(float const&, float const&)"
    assert weak_functions(f"isa_avx512.cc.o:\n{line}\n") and not weak_functions(f"isa_scalar.cc.o:\n{line}\n")
    assert not weak_functions("isa_avx512.cc.o:\n0000000000000000 V qlora_native::kNestedCode\n")
