"""The one table of cases: what the tests run each op on, and the benches time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlora_native.reference import BLOCK_SIZES as BLOCK_SIZES
from qlora_native.reference import TOLERANCE as TOLERANCE

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANT_TYPES = ("nf4", "fp4")
GGUF_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_nl", "mxfp4")

# To quantize: odd counts, rows that are no multiple of the block, 1-D, 3-D, empty, many scales.
WEIGHT_SHAPES = ((0,), (1,), (63,), (64,), (65,), (5, 127), (6, 96), (3, 7, 50), (4, 0, 3), (300, 64), (129, 257))


class Product(NamedTuple):
    """A product x [M, K] with a weight [N, K] and adapters of rank r."""

    m: int
    n: int
    k: int
    r: int


PRODUCTS = (
    Product(1, 64, 64, 1),
    Product(3, 32, 64, 4),
    Product(7, 33, 65, 3),
    Product(16, 96, 100, 8),
    Product(33, 130, 192, 16),
    Product(0, 32, 64, 4),
)

# With weights in GGUF's blocks, of which each row is a whole number.
GGUF_PRODUCTS = tuple(
    Product(m, n, k, r) for m, n, k, r in ((1, 33, 256, 3), (3, 130, 768, 4), (20, 70, 1280, 8), (70, 96, 256, 16))
)

# What the benches time: square, and an 8B model's MLP.
BENCH_PRODUCTS = tuple(Product(m, n, 4096, 16) for n in (4096, 14336) for m in (1, 16, 64, 256, 1024))
