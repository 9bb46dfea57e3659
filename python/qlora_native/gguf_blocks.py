"""The block formats of GGUF files in plain torch: codes, levels and scales of blocks, and blocks with other codes.

Source: gguf/quants.py of the ``gguf`` package, and ggml-common.h of llama.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_native import _native

# Fields of a block that hold codes: the byte where it begins, the bytes of a row, how many elements share a byte, and
# the lowest bit of a code that is there. Row r holds elements r * count * width to (r + 1) * count * width: those that
# are ``width`` apart share a byte, the first in its lowest bits.
_FIELDS = {
    "q4_0": ((2, 16, 2, 0),),
    "q4_1": ((4, 16, 2, 0),),
    "q5_0": ((6, 16, 2, 0), (2, 1, 8, 4)),
    "q5_1": ((8, 16, 2, 0), (4, 1, 8, 4)),
    "q8_0": ((2, 32, 1, 0),),
    "q4_k": ((16, 32, 2, 0),),
    "q5_k": ((48, 32, 2, 0), (16, 32, 8, 4)),
    "q6_k": ((0, 64, 2, 0), (128, 32, 4, 4)),
    "iq4_nl": ((2, 16, 2, 0),),
    "mxfp4": ((1, 16, 2, 0),),
}
_LOWEST = {"q4_0": -8, "q5_0": -16, "q6_k": -32, "q8_0": -128}
# The bit by which stored codes differ from those here, which count levels from the lowest.
_SIGN = {"q8_0": 128}


def levels(quant_type: int) -> Tensor:
    """The levels by code, ascending, fp32 on CPU; integers one apart for all types but iq4_nl and mxfp4."""
    name = _native.QUANT_TYPES[quant_type]
    if name in ("iq4_nl", "mxfp4"):
        return _native.levels(quant_type).sort().values
    bits = sum(8 // count for _, _, count, _ in _FIELDS[name])
    return torch.arange(1 << bits, dtype=torch.float32, device="cpu") + _LOWEST.get(name, 0)


def nearest_codes(target: Tensor, levels: Tensor) -> Tensor:
    """The code of the level nearest to each value, uint8; of two as near the even integer, else the lower one. NaN
    takes the lowest."""
    inside = target.nan_to_num(float(levels[0])).clamp(levels[0], levels[-1])
    if len(levels) == int(levels[-1] - levels[0]) + 1:
        inside = inside.round()
    return torch.bucketize(inside, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _shifts(count: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, 8 // count, dtype=torch.uint8, device=device)[:, None]


def _ascending(codes: Tensor) -> Tensor:
    """MXFP4's codes, a sign before a magnitude, as those of :func:`levels`; two zeros stay two."""
    return torch.where(codes < 8, codes + 8, 15 - codes)


def codes(blocks: Tensor, quant_type: int) -> Tensor:
    """The codes of blocks [n, bytes], uint8 [n, elements]."""
    name, (elements, _) = _native.QUANT_TYPES[quant_type], _native.GGUF_BLOCKS[quant_type]
    found = torch.zeros(len(blocks), elements, dtype=torch.uint8, device=blocks.device)
    for begin, width, count, lowest in _FIELDS[name]:
        stored = blocks[:, begin : begin + elements // count].reshape(len(blocks), -1, 1, width)
        part = stored >> _shifts(count, blocks.device) & (255 >> (8 - 8 // count))
        found |= part.view(len(blocks), elements) << lowest
    return _ascending(found) if name == "mxfp4" else found ^ _SIGN.get(name, 0)


def with_codes(blocks: Tensor, codes: Tensor, quant_type: int) -> Tensor:
    """The same blocks with these codes, uint8 [n, elements], under the scales that they have."""
    name, (elements, _) = _native.QUANT_TYPES[quant_type], _native.GGUF_BLOCKS[quant_type]
    made, codes = blocks.clone(), codes ^ _SIGN.get(name, 0)
    if name == "mxfp4":
        codes = torch.where(codes < 8, 15 - codes, codes - 8)
    for begin, width, count, lowest in _FIELDS[name]:
        part = codes >> lowest & (255 >> (8 - 8 // count))
        shifted = part.view(len(blocks), -1, count, width) << _shifts(count, blocks.device)
        made[:, begin : begin + elements // count] = shifted.sum(2, dtype=torch.uint8).view(
            len(blocks), -1
        )
    return made


def scales(blocks: Tensor, quant_type: int) -> tuple[Tensor, Tensor | None]:
    """Of each run of elements that share them, fp32 [n, runs]: the factor of its levels, and what is added."""
    name = _native.QUANT_TYPES[quant_type]

    def half(at: int) -> Tensor:
        return blocks[:, at : at + 2].contiguous().view(torch.float16).float()

    if name == "mxfp4":  # half a power of two, by its bits: of the smallest two a subnormal number's
        exponent = blocks[:, :1].int()
        bits = torch.where(exponent < 2, 1 << 21 << exponent, (exponent - 1) << 23)
        return bits.view(torch.float32), None
    if name in ("q4_1", "q5_1"):
        return half(0), half(2)
    if name == "q6_k":
        return half(208) * blocks[:, 192:208].view(torch.int8).float(), None
    if name not in ("q4_k", "q5_k"):
        return half(0), None
    low, middle, top = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    factors = half(0) * torch.cat((low & 63, top & 15 | (low >> 2 & 48)), 1).float()
    return factors, -(half(2) * torch.cat((middle & 63, top >> 4 | (middle >> 2 & 48)), 1).float())


def spread(of_runs: Tensor, quant_type: int) -> Tensor:
    """Values of runs, [n, runs], as those of their elements, [n, elements]."""
    return of_runs.repeat_interleave(_native.GGUF_BLOCKS[quant_type][0] // of_runs.shape[1], 1)


def values(packed: Tensor, quant_type: int) -> Tensor:
    """The elements of whole blocks, uint8 [bytes], in fp32, flattened, every operation rounded."""
    blocks = packed.view(-1, _native.GGUF_BLOCKS[quant_type][1])
    factors, added = scales(blocks, quant_type)
    found = levels(quant_type).to(packed.device)[codes(blocks, quant_type).int()] * spread(
        factors, quant_type
    )
    return (found if added is None else found + spread(added, quant_type)).reshape(-1)
