"""The predicted time of the training steps of gpu_check.py on six cards, and of products with GGUF's blocks, from bytes
and operations.

    python bench/gpu_model.py --write   bench/results/model.json, whose rows are named as gpu_check's
    python bench/gpu_model.py --check   exit status 1 if that file is not what this script gives

Assumptions:
- Bytes move at 92 % of the memory's rate; tensor operations run at 80 % of the dense rate with fp32 sums (50 % on a T4,
  which 70 W limit). A kernel takes the longer of both, plus 3 us to begin and end.
- Products decode whole weights to 16 bits, as cuda/matmul_plan.cc plans it for so many tokens: 2.516 bytes a weight,
  before the GEMM reads them. A GEMM of M rows reaches M / (M + 128) of the best rate. A low-rank term reads its
  operands once more.
- A step is the sum of its products (forward twice, as checkpoints recompute), norms and the like by bytes, attention,
  and the loss; or the host's time if that is longer.
- Rivals are measured, not predicted.
- A fused product takes the longest of its bytes, of its tensor operations at 60 % of a GEMM's rate, of its instructions
  (tests/cuda_budgets.json) at one a clock and scheduler, and of x, which every 64 rows of W read from the L2 cache, at
  16 bytes a clock and SM. Up to 16 tokens of a pass, x comes from the L1 cache.

Uncertainty: about 12 %. The first run shows where it errs.
"""

from __future__ import annotations

import json
from itertools import product
from typing import NamedTuple

from common import birth
from gpu_models import BATCHES, GIB, STEPS
from gpu_timing import LLAMA, VOCABULARY, Case, linears
from pages import RESULTS, ROOT, Page, command

from qlora_native._native import GGUF_BLOCKS, QUANT_TYPES

MODEL = RESULTS / "model.json"
PACKED = 0.5 + (1 + 4 / 256) / 64  # bytes a weight: NF4 in blocks of 64, double-quantized scales
BLOCK_BYTES = {QUANT_TYPES[number]: size / elements for number, (elements, size) in GGUF_BLOCKS.items()}  # a weight
BUDGETS = json.loads((ROOT / "tests/cuda_budgets.json").read_text(encoding="utf-8"))
FUSED_SHARE = 0.6
MEMORY_SHARE, START_S = 0.92, 3e-6
HOST_S = (230 + 700) * 1e-6  # of an adapted layer's forward, and of its step, over stubs


class Card(NamedTuple):
    """NVIDIA's figures: data sheets, and the whitepapers of Turing, Ampere, Hopper, Ada and Blackwell. The methods give
    seconds."""

    gb_per_s: float
    tflops: float  # 16 bits, fp32 sums, dense
    share: float  # of them that products reach
    memory_gib: float  # usable
    ghz: float  # clocks of all schedulers, four an SM
    architecture: int

    def moving(self, num_bytes: float) -> float:
        return num_bytes / (MEMORY_SHARE * 1e9 * self.gb_per_s)

    def computing(self, flops: float) -> float:
        return flops / (self.share * 1e12 * self.tflops)

    def gemm(self, m: int, n: int, k: int) -> float:
        return max(self.computing(2 * n * k * (m + 128)), self.moving(2 * (m * k + m * n + n * k)))

    def product(self, m: int, n: int, k: int, packed: float = PACKED) -> float:
        """x [m, k] times a 4-bit weight [n, k], in two steps."""
        return self.moving((packed + 2) * n * k) + START_S + self.gemm(m, n, k)

    def fused(self, m: int, n: int, k: int, quant_type: str, tokens: int) -> float:
        """x [m, k] times a weight [n, k] in blocks of GGUF, by passes over it for so many tokens: 16, 32 or 64."""
        number = QUANT_TYPES.index(quant_type)
        shape = f"GgufShape<{4 + tokens // 32}, {number}> " if tokens > 16 else number
        kernel = f"linear_4bit_gguf_{'tile_' * (tokens > 16)}kernel<Bf16, {shape}>"
        loop = BUDGETS[kernel][str(self.architecture)][2]
        instructions = loop["instructions"] * tokens / loop["mma"]  # of 2,048 weights
        seconds = (
            self.moving(BLOCK_BYTES[quant_type] * n * k + 2 * tokens * (n + k)),
            self.computing(2 * n * k * tokens) / FUSED_SHARE,
            n * k * instructions / 2048 / (1e9 * self.ghz),
            2 * n * k * tokens / 64 / (4e9 * self.ghz) * (tokens > 16),
        )
        return -(-m // tokens) * (max(seconds) + START_S)

    def adapted(self, m: int, n: int, k: int, r: int) -> float:
        """A layer with an adapter: forward, forward again, backward."""
        forward = self.product(m, n, k) + self.moving(2 * m * (k + 2 * n)) + self.computing(2 * m * r * (n + k))
        backward = self.product(m, k, n) + self.moving(2 * m * (3 * k + 2 * n)) + self.computing(4 * m * r * (n + k))
        return 2 * (forward + 2 * START_S) + backward + 4 * START_S

    def loss(self, m: int, n: int, k: int) -> float:
        """Logits and the gradient of h, in chunks of 512 tokens that each read the head twice; three passes
        over logits of 16 bits."""
        chunks = -(-m // 512)
        return chunks * (2 * self.gemm(min(m, 512), n, k) + 4 * START_S) + self.moving(6 * m * n)

    def step(self, case: Case) -> float | None:
        """Our training step; None where the memory is too small."""
        shape, m, (_, length) = LLAMA[case.form], case.m, BATCHES[case.form]
        width, layers = shape["hidden_size"], shape["num_hidden_layers"]
        weights = layers * sum(n * k for n, k in linears(case.form))
        if weights * PACKED + 4 * VOCABULARY * width + m * width * 2 * layers + 3 * GIB > GIB * self.memory_gib:
            return None
        seconds = sum(self.adapted(m, n, k, case.r) for n, k in linears(case.form))
        # Norms, rotation, SwiGLU and residuals: 2.1 GB of 4,096 tokens of the 8B model.
        seconds += self.moving(2.1e9 * m / 4096 * width / 4096)
        seconds += 2 * self.computing(3.5 * 2 * 2 * m * length / 2 * width)  # attention, at half the products' rate
        return max(layers * seconds + self.loss(m, VOCABULARY, width), layers * 7 * HOST_S)


CARDS = {
    "T4": Card(320, 65, 0.5, 14.6, 254, 75),
    "A100": Card(1555, 312, 0.8, 39, 609, 80),
    "H100": Card(3350, 989, 0.8, 79, 966, 90),
    "H200": Card(4800, 989, 0.8, 140, 966, 90),
    "4090": Card(1008, 165, 0.8, 23.5, 1290, 89),
    "5090": Card(1792, 209, 0.8, 31.4, 1637, 120),
}
OF_BLOCKS = ("A100", "H100", "4090")  # with T4's bf16 there is no product
PRODUCTS = [
    *product(("q4_k",), ((4096, 4096), (14336, 4096), (4096, 14336)), (17, 32, 64)),
    *product(("q4_0", "q6_k", "q8_0"), ((14336, 4096),), (64,)),
]


def of_blocks() -> dict[str, dict[str, list[float]]]:
    """Products with GGUF's blocks, in microseconds: in two steps, by passes of 16 tokens, by one pass."""
    found: dict[str, dict[str, list[float]]] = {}
    for form, (n, k), m in PRODUCTS:
        row = found[Case("forward", m, n, k, form=form).name] = {}
        for name in OF_BLOCKS:
            card = CARDS[name]
            fused = (card.fused(m, n, k, form, tokens) for tokens in (16, 32 if m <= 32 else 64))
            times = card.product(m, n, k, BLOCK_BYTES[form]), *fused
            row[name] = [float(f"{1e6 * seconds:.3g}") for seconds in times]
    return found


def text(old: str) -> str:
    """Of model.json: milliseconds by row and card, products, and their birth, which is kept if ``old`` has them."""
    seconds = {case.name: {name: card.step(case) for name, card in CARDS.items()} for case in STEPS.values()}
    found = {
        row: {name: None if s is None else float(f"{1e3 * s:.3g}") for name, s in times.items()}
        for row, times in seconds.items()
    }
    before = json.loads(old)
    made = {"rows": found, "products": of_blocks()}
    born = before["birth"] if all(before.get(key) == made[key] for key in made) else birth()
    return json.dumps({"bench": "gpu_model", "birth": born, "unit": "ms", **made}, indent=1) + "\n"


def main() -> None:
    command(__doc__, Page(MODEL, {}, text))


if __name__ == "__main__":
    main()
