"""The predicted time of every row of the truth table (gpu_check.py) on six cards, from instruction counts and bytes.

    python bench/gpu_model.py --write   bench/results/model.json, whose rows are named as gpu_check's
    python bench/gpu_model.py --check   exit status 1 if that file is not what this script gives

Assumptions:
- A kernel takes the longest of: bytes at 92 % of the memory's rate; integer instructions of its main loop at 2 a clock
  an SM (16 lanes in each of four schedulers), or all of its instructions at 4; shared-memory cycles of its main loop (1
  for 4 bytes a lane in the small kernel, 4 for 16 bytes in the tiles); tensor operations at 80 % of the dense rate with
  fp32 sums (50 % on a T4, which 70 W limit). Plus 3 us to begin and end. Blocks come in whole waves.
- The main loop's counts are static, of sm_80 in tests/cuda_budgets.json, and hold for every card. The registers there
  limit the blocks an SM.
- Two-step products decode to 16 bits, which the GEMM reads again: over L2 if the panel fits half of it. A GEMM of M
  rows reaches M / (M + 128) of the best rate. A low-rank term reads its operands once more.
- A step is the sum of its products (forward twice, as checkpoints recompute), norms and the like by bytes, attention,
  the loss and the optimizer; or the host's time if that is longer. Clocks are the boost clocks, without throttling.
- Rivals are measured, not predicted.

Uncertainty: about 25 % a row, 12 % our steps, 50 % host rows. The first run shows where it errs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_models
import gpu_paging
import gpu_passes
import gpu_products
from common import birth
from gpu_timing import Case
from pages import RESULTS, Page, command

from qlora_native import _C

MODEL = RESULTS / "model.json"
BUDGETS = Path(__file__).parents[1] / "tests" / "cuda_budgets.json"
PACKED = 0.5 + (1 + 4 / 256) / 64  # bytes a weight: NF4 in blocks of 64, double-quantized scales
BLOCKS = {name: size / elements for name, elements, size in _C.block_formats if elements}  # bytes a weight, of GGUF
MEMORY_SHARE, START_S = 0.92, 3e-6
GIB = 1 << 30


class Rates(NamedTuple):
    """Of a card, by NVIDIA's data sheets."""

    tflops: float  # 16 bits, fp32 sums, dense
    share: float  # of them that products reach: half on a T4, which 70 W limit
    pcie_gb_per_s: float  # that pinned memory reaches over the bus of the card's generation, 16 lanes


RATES = {
    "T4": Rates(65, 0.5, 12),
    "A100": Rates(312, 0.8, 25),
    "H100": Rates(989, 0.8, 50),
    "H200": Rates(989, 0.8, 50),
    "4090": Rates(165, 0.8, 25),
    "5090": Rates(209, 0.8, 50),
}


class Card(NamedTuple):
    """NVIDIA's figures: data sheets, and the whitepapers of Turing, Ampere, Hopper, Ada and Blackwell."""

    sms: int
    ghz: float  # boost
    gb_per_s: float
    tflops: float  # 16 bits, fp32 sums, dense
    l2_mib: float
    memory_gib: float  # usable
    pcie_gb_per_s: float
    arch: str
    tensor_share: float


def _card(name: str, sms: int, ghz: float, gb_per_s: float, l2_mib: float, memory_gib: float, arch: str) -> Card:
    rates = RATES[name]
    return Card(sms, ghz, gb_per_s, rates.tflops, l2_mib, memory_gib, rates.pcie_gb_per_s, arch, rates.share)


CARDS = {
    "T4": _card("T4", 40, 1.59, 320, 4, 14.6, "75"),
    "A100": _card("A100", 108, 1.41, 1555, 40, 39, "80"),
    "H100": _card("H100", 132, 1.98, 3350, 50, 79, "90"),
    "H200": _card("H200", 132, 1.98, 4800, 50, 140, "90"),
    "4090": _card("4090", 128, 2.52, 1008, 72, 23.5, "89"),
    "5090": _card("5090", 170, 2.41, 1792, 96, 31.4, "120"),
}
FUSED_TOKENS = {"75": 256, "80": 512, "89": 1536, "90": 128, "120": 1536}  # cuda/matmul_plan.cc
TILES = {16: (0, 64), 32: (1, 64), 64: (2, 64), 128: (3, 128)}  # rows -> number in the kernel's name, columns
HOST_US = {"host linear": 61.0, "host lora": 230.0, "host lora step": 700.0, "host adamw_step": 300.0}  # over stubs


class Model:
    """Times on one card, in seconds."""

    def __init__(self, card: Card, budgets: dict[str, Any]) -> None:
        self.card, self.budgets = card, budgets

    def moving(self, num_bytes: float) -> float:
        return num_bytes / (MEMORY_SHARE * 1e9 * self.card.gb_per_s)

    def cycles(self, count: float) -> float:
        """So many cycles of every SM together."""
        return count / (self.card.sms * 1e9 * self.card.ghz)

    def gemm(self, m: int, n: int, k: int) -> float:
        rate = self.card.tensor_share * 1e12 * self.card.tflops * m / (m + 128)
        return max(2 * m * n * k / rate, self.moving(2 * (m * k + m * n + n * k)))

    def loop(self, kernel: str, of_turn: int, shared_cycles: int, weights: float, outer: int = 0) -> float:
        """Seconds to decode so many weights, ``of_turn`` of them by a warp in a turn of its main loop; ``outer``
        instructions a turn, half of them integer ones, are those of a loop around it."""
        count = self.budgets[kernel]["80"][2]
        alu, every = count["alu"] + outer / 2, count["instructions"] + outer
        cycles = max(alu / 2, every / 4, count["shared"] * shared_cycles)
        return self.cycles(weights / of_turn * cycles)

    def waves(self, kernel: str, threads: int, blocks: int) -> float:
        """Whole waves of blocks over the share of them that is full, at least 1."""
        registers = self.budgets.get(kernel, {}).get(self.card.arch, [128])[0]
        at_once = self.card.sms * max(1, min(4, 65536 // (registers * threads)))
        return -(-blocks // at_once) / (blocks / at_once) if blocks > at_once else 1.0

    def small(self, m: int, n: int, k: int) -> float:
        groups = 1 if m <= 4 else 2 if m <= 8 else 4
        kernel = f"linear_4bit_small_kernel<Bf16, {groups}>"
        blocks = -(-n // (32 if groups == 1 else 64))
        bound = self.loop(kernel, 2048, 1, n * k) * self.waves(kernel, 128 if groups == 4 else 256, blocks)
        return max(self.moving(PACKED * n * k + 2 * m * (n + k)), bound)

    def gguf(self, form: str, m: int, n: int, k: int) -> float:
        """As ``small``, with a weight in blocks of GGUF, which are copied for two turns at once."""
        kernel = f"linear_4bit_gguf_kernel<Bf16, {[name for name, *_ in _C.block_formats].index(form)}>"
        blocks = -(-n // (32 if m <= 4 else 64))
        bound = self.loop(kernel, 2048, 1, n * k, 48) * self.waves(kernel, 128, blocks)
        return max(self.moving(BLOCKS[form] * n * k + 2 * m * (n + k)), bound)

    def tile(self, m: int, n: int, k: int, is_forward: bool) -> float:
        rows = next((rows for rows in TILES if rows >= m), 128)
        number, columns = TILES[rows]
        inner = {0: "1, 4", 1: "1, 4", 2: "2, 2", 3: "2, 4"}[number]
        kernel = f"linear_4bit_tile_kernel<Bf16, TileShape<{number}, {inner}>, {str(is_forward).lower()}>"
        of_turn = 1024
        if is_forward and rows < 128:
            kernel, of_turn = f"linear_4bit_fragment_kernel<Bf16, FragmentShape<{4 + number}> >", 2048
        passes = -(-m // rows)
        tensor = 2 * passes * rows * n * k / (self.card.tensor_share * 1e12 * self.card.tflops)
        bound = max(self.loop(kernel, of_turn, 4, passes * n * k), tensor)
        wave = self.waves(kernel, 2 * columns, passes * -(-n // columns)) if rows == 128 else 1.15  # split-K fills them
        return max(self.moving(PACKED * n * k + 2 * m * (n + k)), bound * wave)

    def two_step(self, m: int, n: int, k: int) -> float:
        in_cache = min(2 * n * k, 24 << 20) < self.card.l2_mib * (1 << 20) / 2
        return self.moving((PACKED + (0 if in_cache else 2)) * n * k) + START_S + self.gemm(m, n, k)

    def way(self, m: int, is_forward: bool) -> Callable[[int, int, int], float]:
        """The kind of kernel, as cuda/matmul_plan.cc plans it."""
        if m > FUSED_TOKENS[self.card.arch]:
            return self.two_step
        return self.small if m <= 16 and is_forward else partial(self.tile, is_forward=is_forward)

    def product(self, case: Case) -> float:
        """A row of gpu_products."""
        op, (m, n, k, r) = case.op.removeprefix("lora_"), case[1:5]
        is_forward = op == "forward"
        if case.form in BLOCKS:
            return self.gguf(case.form, m, n, k) + START_S
        seconds = self.way(m, is_forward)(m, *((n, k) if is_forward else (k, n)))
        if r:  # forward: x A^T and the addition to y; backward: those of dx, and the gradients of A and B
            seconds += START_S + self.moving(2 * m * (k + 2 * n if is_forward else 3 * k + 2 * n))
            seconds += (2 if is_forward else 4) * m * r * (n + k) / (self.card.tensor_share * 1e12 * self.card.tflops)
            seconds += 0 if is_forward else 2 * START_S
        return seconds + START_S + (self.moving(4 / 64 * n * k) if case.form == "plain scales" else 0)

    def passing(self, case: Case) -> float:
        """A row bound by memory."""
        m, n, k = case.m, case.n, case.k
        packed = BLOCKS.get(case.form, PACKED)
        num_bytes = {
            "dequantize_4bit": (packed + (4 if case.form == "fp32" else 2)) * n * k,
            "quantize_4bit": (PACKED + 2) * n * k,
            "adamw_step": k * (28 if case.form == "32 bits" else 16),
            "gradient_norm": 4 * k,
            "rms_norm": 4 * m * k,
            "rms_norm_backward": 6 * m * k,
            "rotary": 4 * m * k,
            "swiglu": 6 * m * n,
            "swiglu_backward": 10 * m * n,
        }[case.op]
        launches = {"quantize_4bit": 6, "adamw_step": 3, "gradient_norm": 2}.get(case.op, 1)
        return self.moving(num_bytes) + launches * START_S

    def loss(self, m: int, n: int, k: int) -> float:
        """Logits and the gradient of h, in chunks of 512 tokens that each read the head twice; three passes over
        logits of 16 bits."""
        chunks = -(-m // 512)
        return chunks * (2 * self.gemm(min(m, 512), n, k) + 4 * START_S) + self.moving(6 * m * n)

    def step(self, case: Case, name: str) -> float | None:
        """A training step of ours; None where the card's memory is too small."""
        shape, m = gpu_models.LLAMA[name], case.m
        width, layers, linears = shape["hidden_size"], shape["num_hidden_layers"], gpu_models.linears(name)
        vocabulary = gpu_models.VOCABULARY
        weights = layers * sum(n * k for n, k in linears)
        needed = weights * PACKED + 4 * vocabulary * width + m * width * 2 * layers + 3 * GIB
        if needed > GIB * self.card.memory_gib:
            return None
        seconds = 0.0
        for n, k in linears:
            forward = self.product(Case("lora_forward", m, n, k, case.r))
            seconds += 2 * forward + self.product(Case("lora_backward", m, n, k, case.r))
        # Norms, rotation, SwiGLU and residuals: 2.1 GB of 4,096 tokens of the 8B model.
        seconds += self.moving(2.1e9 * m / 4096 * width / 4096)
        length = gpu_models.BATCHES[name][1]
        seconds += 3.5 * 2 * 2 * m * length / 2 * width / (0.5 * self.card.tensor_share * 1e12 * self.card.tflops)
        device = layers * seconds + self.loss(m, vocabulary, width)
        return max(device, layers * 7 * (HOST_US["host lora"] + HOST_US["host lora step"]) * 1e-6)

    def seconds(self, case: Case) -> float | None:
        """Of any row."""
        if case.op in gpu_products.DIRECTIONS:
            return self.product(case)
        if case.op == "linear_cross_entropy":
            return self.loss(case.m, case.n, case.k)
        if case.op == "paged_adamw_step":  # three quarters of the states come and go, both ways at once
            return 0.75 * 8 * case.k / 1e9 / self.card.pcie_gb_per_s
        if case.op in HOST_US:
            return 1e-6 * HOST_US[case.op]
        if case.op == "qlora_step":
            return self.step(case, case.form)
        return self.passing(case)


def every_case() -> list[Case]:
    """The rows of all groups that have times."""
    products = [
        case for which in ("many", "few", "variants", "long", "70b") for case in gpu_products.cases(which, False)
    ]
    passes = [gpu_passes.cases, gpu_passes.norm_cases, gpu_passes.loss_cases, gpu_passes.host_cases, gpu_paging.cases]
    steps = [case for model in ("8B", "70B") for case in gpu_models.cases(model, False)]
    return [*products, *(case for cases in passes for case in cases(False)), *steps]


def text(old: str) -> str:
    """Of model.json: milliseconds by row and card, and the birth of these rows, which is kept if ``old`` has them."""
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8"))
    models = {name: Model(card, budgets) for name, card in CARDS.items()}
    found: dict[str, dict[str, float | None]] = {}
    for case in every_case():
        seconds = {name: model.seconds(case) for name, model in models.items()}
        found[case.name] = {name: None if s is None else float(f"{1e3 * s:.3g}") for name, s in seconds.items()}
    before = json.loads(old)
    born = json.dumps(before["birth"] if "birth" in before and before["rows"] == found else birth())
    rows = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
    return f'{{\n "bench": "gpu_model",\n "birth": {born},\n "unit": "ms",\n "rows": {{\n  {rows}\n }}\n}}\n'


def main() -> None:
    command(__doc__, Page(MODEL, {}, text))


if __name__ == "__main__":
    main()
