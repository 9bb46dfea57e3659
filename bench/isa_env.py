"""QLORA_NATIVE_ISA for the libraries under torch too. Import this before torch.

Our kernels alone on smaller instructions say nothing of a CPU that has no larger ones: there torch's own 16-bit
products are plain loops. So where ``QLORA_NATIVE_ISA`` is set, oneDNN, ATen and MKL are limited to the same
instructions by variables that each of them reads once, as torch is loaded; :func:`limits` asks torch what came of it.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from functools import cache

ONEDNN, ATEN, MKL = "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS"
# What stands for the instructions of ours, as each library calls them; SSE4.1 is the least that oneDNN has. For the
# kernels of arm64 none of the three has such a setting.
X86 = {
    "scalar": {ONEDNN: "SSE41", ATEN: "default", MKL: "SSE4_2"},
    "avx2": {ONEDNN: "AVX2", ATEN: "avx2", MKL: "AVX2"},
    "avx512": {ONEDNN: "AVX512_CORE", ATEN: "avx512", MKL: "AVX512"},
    "avx512_bf16": {ONEDNN: "AVX512_CORE_BF16", ATEN: "avx512", MKL: "AVX512"},
}
SETTINGS = X86 if platform.machine() in ("x86_64", "AMD64") else {}
# How oneDNN's verbose mode spells them.
SPELLED = {
    "SSE41": "Intel SSE4.1",
    "AVX2": "Intel AVX2",
    "AVX512_CORE": "Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions",
    "AVX512_CORE_BF16": "Intel AVX-512 with Intel DL Boost and bfloat16 support",
}


def settings(isa: str) -> dict[str, str]:
    """The environment of a process that is to behave like a CPU of that class: one of ours, or "" for this CPU's."""
    return {"QLORA_NATIVE_ISA": isa, **SETTINGS.get(isa, {})}


def _wanted() -> dict[str, str]:
    return SETTINGS.get(os.environ.get("QLORA_NATIVE_ISA", ""), {})


def apply() -> None:
    """Sets the variables of ``QLORA_NATIVE_ISA`` for this process and those that it starts.

    Raises:
        SystemExit: torch was imported before, under other settings.
    """
    late = [f"{name}={value}" for name, value in _wanted().items() if os.environ.get(name) != value]
    if late and "torch" in sys.modules:
        isa = os.environ["QLORA_NATIVE_ISA"]
        raise SystemExit(
            f"QLORA_NATIVE_ISA is {isa}, but torch was imported without {' '.join(late)}: import isa_env first."
        )
    os.environ.update(_wanted())
    if _wanted():  # torch.compile finds what it compiled before by the graph alone, whatever instructions that was for
        folder = os.path.join(tempfile.gettempdir(), f"torchinductor-{os.environ['QLORA_NATIVE_ISA']}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)


@cache
def limits() -> dict[str, str]:
    """The instructions that torch's own loops and oneDNN use in this process, by their own words.

    Raises:
        RuntimeError: they are not those that ``QLORA_NATIVE_ISA`` stands for.
    """
    import torch

    found = {"aten": torch.backends.cpu.get_cpu_capability(), "onednn": _onednn_isa()}
    wanted = _wanted()
    if wanted and (found["aten"].lower(), found["onednn"]) != (wanted[ATEN], SPELLED[wanted[ONEDNN]]):
        raise RuntimeError(f"QLORA_NATIVE_ISA is {os.environ['QLORA_NATIVE_ISA']}, but torch uses {found}.")
    return found


def _onednn_isa() -> str:
    """The head of oneDNN's verbose mode, which it prints once a process."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return "none"
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                torch.ops.mkldnn._reorder_linear_weight(torch.ones(8, 8), 8)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return next((line.partition("isa:")[2].strip() for line in file if "info,cpu,isa:" in line), "unknown")


apply()
