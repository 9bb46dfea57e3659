"""Compares what a GPU made of the primitives with the emulator's words.

    python bench/gpu_primitives.py tests/golden/cuda_primitives.txt FILE

Each file has a line for each primitive: its name and 32-bit words, those of a lane together (tests/conformance/).
"""

from __future__ import annotations

import sys
from pathlib import Path

LANES = 32
FP32 = ("arithmetic",)  # lines whose words are fp32 numbers


def read(path: str) -> dict[str, list[str]]:
    """Words by primitive."""
    lines = (line.split() for line in Path(path).read_text(encoding="ascii").splitlines())
    return {name: words for name, *words in lines}


def same_nan(word: str) -> str:
    """One word for every NaN: which one an operation gives differs between processors (NVIDIA's is 7fffffff)."""
    bits = int(word, 16) & 0x7FFFFFFF
    return "7fffffff" if bits > 0x7F800000 else word


def differences(golden: dict[str, list[str]], found: dict[str, list[str]]) -> list[str]:
    """One sentence for each primitive that differs from the emulator."""
    said = []
    for name, words in golden.items():
        if name not in found:
            said.append(f"{name} was not run (bf16 products begin with sm_80)")
            continue
        pairs = zip(*(map(same_nan, row) if name in FP32 else row for row in (words, found[name])), strict=False)
        wrong = [i for i, (want, got) in enumerate(pairs) if want != got]
        if wrong or len(words) != len(found[name]):
            per_lane = len(words) // LANES
            first = wrong[0] if wrong else 0
            lane, word = divmod(first, per_lane)
            said.append(
                f"{name} DIFFERS in {len(wrong)} of {len(words)} words, first in lane {lane}, word {word}: the GPU has "
                f"{found[name][first]}, the emulator {words[first]}"
            )
    return said


def main() -> None:
    golden, found = read(sys.argv[1]), read(sys.argv[2])
    said = differences(golden, found)
    print(*said, f"{len(golden) - len(said)} of {len(golden)} primitives give the emulator's words", sep="\n")
    raise SystemExit(any("DIFFERS" in sentence for sentence in said))


if __name__ == "__main__":
    main()
