"""What the build chooses by itself: GPU architectures, from what nvcc knows and which cards are in sight."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CUDA_12_0 = "50 60 70 75 80 86 87 89 90"
CUDA_13_0 = "75 80 86 87 88 89 90 100 110 103 120 121"


def chosen(folder: Path, known: str, cards: str | None, wanted: str = "") -> str:
    """The architectures for an nvcc that knows `known`, beside cards of these compute capabilities; None: no driver."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("there is no cmake here: pip install cmake")
    programs = {"nvcc": " ".join(f"sm_{arch}" for arch in known.split())}
    if cards is not None:
        programs["nvidia-smi"] = cards
    for name, words in programs.items():
        program = folder / name
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' {words}\n[ -n '{words}' ]\n")
        program.chmod(0o755)
    script = folder / "choose.cmake"
    script.write_text(
        f'include("{ROOT}/cmake/cuda_archs.cmake")\n'
        f'choose_cuda_archs(chosen "{folder}/nvcc" "{wanted}")\nmessage("${{chosen}}")\n'
    )
    environment = {**os.environ, "PATH": f"{folder}:{os.defpath}"}
    done = subprocess.run([cmake, "-P", str(script)], env=environment, capture_output=True, text=True, check=True)
    return done.stderr.strip()


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
    assert chosen(tmp_path, known, cards, wanted) == expected
