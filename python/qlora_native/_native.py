"""The native modules, imported in the one order that works, and the tables they hold."""

from __future__ import annotations

import ctypes
import os
from functools import cache, partial
from typing import Any

import torch  # before _C: an OpenMP extension loaded after torch shares torch's runtime and its thread count

from qlora_native import _C

# The index is the number that crosses into C++.
QUANT_TYPES = tuple(name for name, _, _ in _C.block_formats)
# nf4 and fp4, which quantize() makes; the others are block formats of GGUF.
CODEBOOKS = QUANT_TYPES[:2]
_NUMBERS = {name: number for number, name in enumerate(QUANT_TYPES)}
# Of GGUF's types by number: elements and bytes of a block.
GGUF_BLOCKS = {number: sizes for number, (_, *sizes) in enumerate(_C.block_formats) if sizes[0]}
DTYPE_NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATE_BLOCK: int = _C.state_block  # elements of an 8-bit optimizer state that share an absmax
# Columns of a row of the optimizers' table, as in cpp/python/tensor_rows.h.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, EXP_AVG_ABSMAX, EXP_AVG_SQ_ABSMAX, STEP, NUMEL, DTYPE, GROUP = range(
    _C.optim_row_length
)


def _share_threads_with_torch() -> None:
    """As many threads as torch's own ops on every Python thread, and none that waits while the process forks.

    A forked child has the forking thread alone, where libgomp would wait for the others for ever, in torch's ops as in
    ours. Paused (omp_pause_resource_all of OpenMP 5.0), it ends them, and starts new ones for the next loop.
    """
    count = getattr(ctypes.CDLL(torch._C.__file__), "_ZN2at15get_num_threadsEv", None)
    if count is not None:
        _C.take_threads_of_torch(ctypes.cast(count, ctypes.c_void_p).value or 0)
    pause = getattr(ctypes.CDLL(_C.__file__), "omp_pause_resource_all", None)
    if pause is not None and hasattr(os, "register_at_fork"):
        # 1: omp_pause_soft, which keeps the number of threads.
        os.register_at_fork(before=partial(pause, 1))


_share_threads_with_torch()


def _table(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def quant_type_number(quant_type: str) -> int:
    """The number of a type as ops take it, 0 for "nf4"; ValueError for anything else."""
    number = _NUMBERS.get(quant_type)
    if number is None:
        formats = ", ".join(map(repr, list(_NUMBERS)[len(CODEBOOKS) :]))
        raise ValueError(
            f"quant_type is {quant_type!r}: expected 'nf4' or 'fp4', or of GGUF {formats}."
        )
    return number


@cache
def levels(quant_type: int) -> torch.Tensor:
    """The 16 levels of nf4, fp4, iq4_nl or mxfp4, by code, fp32 [16] on CPU."""
    return _table(_C.levels(quant_type))


@cache
def boundaries(quant_type: int) -> torch.Tensor:
    """Decision boundaries, fp32 [15] for nf4, fp32 [7] magnitudes for fp4, on CPU."""
    return _table(_C.boundaries(quant_type))


@cache
def nested_code() -> torch.Tensor:
    """The 256 values that double-quantized scales are stored in, fp32 [256] on CPU."""
    return _table(_C.nested_code())


@cache
def state_code(signed: bool) -> tuple[torch.Tensor, ...]:
    """Tables of an 8-bit state's code, fp32 on CPU: a [8], b [8], alpha [32], beta [32], (lowest, top) [2]."""
    return tuple(map(_table, _C.state_code(signed)))


def build_info() -> dict[str, Any]:
    """What was built and what runs.

    Returns a dict with ``version`` (str), ``cuda`` (bool: the CUDA kernels were compiled), ``cuda_archs`` (list of
    compute capabilities as int, e.g. ``[80, 90]``), ``cuda_lacking`` (str: why they were not compiled, or empty),
    ``compiler`` (str), ``isas_built`` (list of str) and ``cpu_isa`` (str, in use on this machine). Raises ValueError if
    ``QLORA_NATIVE_ISA`` asks for one that is not here.
    """
    info: dict[str, Any] = dict(_C.build_info())
    archs = [int(arch) for arch in info["cuda_archs"].split(",") if arch]
    return {**info, "cuda": bool(archs), "cuda_archs": archs, "cpu_isa": _C.cpu_isa()}
