"""Which way a product takes on a card, measured: by a fused kernel, or by decoding for torch's GEMM.

Both ways are timed when a product of new sizes first runs on a CUDA device. The faster one is kept for this card and
these versions, in the cache folder too. The plan of cuda/matmul_plan.h decides where ``QLORA_NATIVE_MEASURE_KERNELS``
is 0, and while a CUDA graph is captured, in which nothing can be timed.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from qlora_native._io import cache_folder, read_json, reading, write_whole
from qlora_native._version import __version__
from qlora_native.errors import UserError
from qlora_native.ops import _cuda_kernels

# Fewer always pay by a fused kernel, as decoding alone moves nine times the bytes; more never, as it takes less than a
# tenth of the GEMM.
TOKENS = range(17, 2048)
ROUNDS = 5

Card = tuple[str, ...]
Sizes = tuple[int, ...]
logger = logging.getLogger(__name__)


@cache
def card(module: ModuleType, device: torch.device) -> Card | None:
    """What an answer holds for: the device's name, its driver, the versions; None where nothing is to be measured."""
    if device.type != "cuda" or os.environ.get("QLORA_NATIVE_MEASURE_KERNELS") == "0":
        return None
    name = torch.cuda.get_device_name(device)
    return name, str(module.driver_version()), str(torch.__version__), __version__


def _file(card: Card) -> Path:
    return cache_folder() / f"kernels-{re.sub('[^a-z0-9]+', '-', card[0].lower())}.json"


@cache
def _answers(card: Card) -> dict[Sizes, int]:
    file = _file(card)
    with suppress(UserError), reading(file):
        stored = read_json(file)
        if stored["card"] == list(card):
            return {tuple(sizes): way for *sizes, way in stored["answers"]}
    return {}


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Of a product on the device, at best, when the L2 cache holds none of its operands."""
    other = torch.empty(
        torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device
    )
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with _cuda_kernels.launching(device):
            other.zero_()
            begin.record()
            run()
            end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times) / 1e3


def fastest(
    card: Card, device: torch.device, sizes: Sizes, guess: int, ways: Sequence[Callable[[], Tensor]]
) -> int:
    """The index of the fastest of two ways, fused and two steps, for a product of these sizes, tokens first."""
    answers = _answers(card)
    key = 1 << (sizes[0] - 1).bit_length(), *sizes[1:]  # tokens up to a power of two share an answer
    if key not in answers:
        if _cuda_kernels.is_capturing(device):
            return guess
        times = [seconds(way, device) for way in ways]
        answers[key] = times.index(min(times))
        logger.info("%s: product %s: fused %.3g s, in two steps %.3g s", card[0], key, *times)
        with suppress(
            UserError, OSError
        ):  # where it cannot be written, the next process measures again
            rows = [[*each, way] for each, way in answers.items()]
            write_whole(_file(card), json.dumps({"card": card, "answers": rows}))
    return answers[key]
