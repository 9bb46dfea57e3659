"""The predicted time of the training steps of gpu_check.py on six cards, from bytes and operations.

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

Uncertainty: about 12 %. The first run shows where it errs.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from common import birth
from gpu_models import BATCHES, GIB, STEPS
from gpu_timing import LLAMA, VOCABULARY, Case, linears
from pages import RESULTS, Page, command

MODEL = RESULTS / "model.json"
PACKED = 0.5 + (1 + 4 / 256) / 64  # bytes a weight: NF4 in blocks of 64, double-quantized scales
MEMORY_SHARE, START_S = 0.92, 3e-6
HOST_S = (230 + 700) * 1e-6  # of an adapted layer's forward, and of its step, over stubs


class Card(NamedTuple):
    """NVIDIA's figures: data sheets, and the whitepapers of Turing, Ampere, Hopper, Ada and Blackwell. The methods give
    seconds."""

    gb_per_s: float
    tflops: float  # 16 bits, fp32 sums, dense
    share: float  # of them that products reach
    memory_gib: float  # usable

    def moving(self, num_bytes: float) -> float:
        return num_bytes / (MEMORY_SHARE * 1e9 * self.gb_per_s)

    def computing(self, flops: float) -> float:
        return flops / (self.share * 1e12 * self.tflops)

    def gemm(self, m: int, n: int, k: int) -> float:
        return max(self.computing(2 * n * k * (m + 128)), self.moving(2 * (m * k + m * n + n * k)))

    def product(self, m: int, n: int, k: int) -> float:
        """x [m, k] times a 4-bit weight [n, k], in two steps."""
        return self.moving((PACKED + 2) * n * k) + START_S + self.gemm(m, n, k)

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
    "T4": Card(320, 65, 0.5, 14.6),
    "A100": Card(1555, 312, 0.8, 39),
    "H100": Card(3350, 989, 0.8, 79),
    "H200": Card(4800, 989, 0.8, 140),
    "4090": Card(1008, 165, 0.8, 23.5),
    "5090": Card(1792, 209, 0.8, 31.4),
}


def text(old: str) -> str:
    """Of model.json: milliseconds by row and card, and the birth of these rows, which is kept if ``old`` has them."""
    seconds = {case.name: {name: card.step(case) for name, card in CARDS.items()} for case in STEPS.values()}
    found = {
        row: {name: None if s is None else float(f"{1e3 * s:.3g}") for name, s in times.items()}
        for row, times in seconds.items()
    }
    before = json.loads(old)
    born = before["birth"] if before.get("rows") == found else birth()
    return json.dumps({"bench": "gpu_model", "birth": born, "unit": "ms", "rows": found}, indent=1) + "\n"


def main() -> None:
    command(__doc__, Page(MODEL, {}, text))


if __name__ == "__main__":
    main()
