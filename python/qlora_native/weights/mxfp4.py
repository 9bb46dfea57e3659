"""MXFP4 as folders of gpt-oss have it: the codes of a weight in one tensor, the exponents of its blocks in another.

Source: OCP Microscaling Formats (MX) Specification 1.0; ``transformers.integrations.mxfp4`` for the order in a byte.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from qlora_native.weight import QuantizedWeight
from qlora_native.weights.files import StoredTensor
from qlora_native.weights.stream import Read

CODES, EXPONENTS = "_blocks", "_scales"  # end the names of the tensors of a weight
_AT_A_TIME = 1 << 18  # blocks


def owner(key: str, keys: Container[str]) -> str:
    """The name of the weight that a stored tensor is a part of; "" if it is of none."""
    for ending, other in ((CODES, EXPONENTS), (EXPONENTS, CODES)):
        name = key.removesuffix(ending)
        if name != key and name + other in keys:
            return name
    return ""


def weight_of(name: str, parts: list[StoredTensor], read: Read) -> QuantizedWeight:
    """The weight [..., N, K] in GGUF's blocks of 17 bytes, of codes uint8 [..., N, K / 32, 16], neighbors in a byte,
    and exponents uint8 [..., N, K / 32]. ValueError if they do not fit together."""
    tensors = {stored.name: read(stored) for stored in parts}
    codes, exponents = tensors[name + CODES], tensors[name + EXPONENTS]
    if codes.shape != (*exponents.shape, 16) or not codes.dtype == exponents.dtype == torch.uint8:
        raise ValueError(
            f"{name}{CODES} is {codes.dtype} {list(codes.shape)}, {name}{EXPONENTS} {exponents.dtype} "
            f"{list(exponents.shape)}: expected 16 bytes for each exponent"
        )
    packed = torch.empty(exponents.numel(), 17, dtype=torch.uint8, device=codes.device)
    packed[:, 0] = exponents.flatten()
    for place, part in zip(
        packed.split(_AT_A_TIME), codes.view(-1, 16).split(_AT_A_TIME), strict=True
    ):
        first, second = torch.stack((part & 15, part >> 4), 2).view(-1, 2, 16).unbind(1)
        place[:, 1:] = first | second << 4  # elements i and i + 16 of the block
    *outer, blocks = exponents.shape
    return QuantizedWeight.of_blocks(
        packed.view(-1), shape=(*outer, 32 * blocks), dtype=torch.bfloat16, quant_type="mxfp4"
    )
