"""``qlora bench``: this library's ops against torch's own, on this machine and on the shapes of a model of yours.

The benches of the project take their timing from here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_native import build_info
from qlora_native._io import as_user_error
from qlora_native.errors import UserError
from qlora_native.functional import linear, linear_cross_entropy, lora_linear
from qlora_native.optim import AdamW
from qlora_native.reference import TOLERANCE
from qlora_native.tool.cli._run import add_to, parse_size, require
from qlora_native.weight import QuantizedWeight, quantize

TOKENS = (1, 16, 256)
RANK = 16  # of the adapter
LEVELS = 0.12  # relative error of normal numbers in 4 bits, which is the levels' own

Functions = dict[str, Callable[[], Any]]
Seconds = dict[str, list[float]]

# ---- timing


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def ratios(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of a / b round by round; where one was timed in the first rounds only, over those."""
    return quartiles([x / y for x, y in zip(a, b, strict=False)])


def rounded(values: Iterable[float], factor: float = 1.0) -> list[float]:
    """For JSON: four significant digits."""
    return [float(f"{factor * value:.4g}") for value in values]


def interleaved(functions: Functions, repeats: int, warmup: int = 2) -> Seconds:
    """Seconds of each function, called in turn, so that noise between runs falls on all of them alike.

    The order changes with every round: what ran before decides what the caches hold.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: Seconds = {name: [] for name in functions}
    order = random.Random(0)
    for _ in range(repeats):
        for name, function in order.sample(list(functions.items()), len(functions)):
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over the truth's."""
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def cpu_name() -> str:
    """The model name in /proc/cpuinfo, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def cache_bytes(root: str = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """The size of the last-level cache in sysfs; 32 MiB where there is none."""
    sizes = (file.read_text(encoding="utf-8") for file in Path(root).glob("index*/size"))
    return max((parse_size(size, 1024) or 0 for size in sizes), default=32 << 20)


# ---- what is timed


class Operands(NamedTuple):
    """The sizes and the form of x [m, k] and a weight [n, k]."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    device: torch.device

    def randn(self, *shape: int, **options: Any) -> Tensor:
        return torch.randn(*shape, device=self.device, **{"dtype": self.dtype, **options})


class Contest(NamedTuple):
    """An op and torch's own, which return like tensors; ``tolerance`` is that of their relative difference."""

    ours: Callable[[], Any]
    torch: Callable[[], Any]
    rival: str  # in words
    tolerance: float


def _backward(output: Tensor, grad: Tensor | None, *leaves: Tensor) -> Tensor | None:
    """The gradient of the first leaf."""
    for leaf in leaves:
        leaf.grad = None
    output.backward(grad)
    return leaves[0].grad


def linear_4bit(by: Operands) -> Contest:
    """The forward product; of a few tokens with enough weights that none is found in the cache."""
    dense = by.randn(by.n, by.k) / by.k**0.5
    weight = quantize(dense)
    is_cached = by.m > 16 or by.device.type != "cpu"
    copies = range(1 if is_cached else min(-(-2 * cache_bytes() // weight.nbytes), 16))
    packed = itertools.cycle([quantize(dense) for _ in copies])
    decoded = itertools.cycle([weight.dequantize(by.dtype) for _ in copies])
    x = by.randn(by.m, by.k)
    return Contest(
        lambda: linear(x, next(packed)),
        lambda: F.linear(x, next(decoded)),
        "F.linear",
        3 * TOLERANCE[by.dtype],
    )


def lora_linear_4bit(by: Operands) -> Contest:
    """A layer with an adapter, forward and backward."""
    weight = quantize(by.randn(by.n, by.k) / by.k**0.5)
    dense = weight.dequantize(by.dtype)
    x, grad = by.randn(by.m, by.k, requires_grad=True), by.randn(by.m, by.n)
    a = (by.randn(RANK, by.k, dtype=torch.float32) / by.k**0.5).requires_grad_()
    b = by.randn(by.n, RANK, dtype=torch.float32).mul_(0.1).requires_grad_()

    def theirs() -> Tensor:
        return F.linear(x, dense) + F.linear(F.linear(x, a.to(by.dtype)), b.to(by.dtype)) * 2.0

    return Contest(
        lambda: _backward(lora_linear(x, weight, a, b, 2.0), grad, x, a, b),
        lambda: _backward(theirs(), grad, x, a, b),
        "the same layer of F.linear",
        4 * TOLERANCE[by.dtype],
    )


def quantize_4bit(by: Operands) -> Contest:
    """Floating point to 4 bits, double quantization and all."""
    dense = by.randn(by.n, by.k)
    return Contest(lambda: quantize(dense), dense.clone, "a copy", LEVELS)


def dequantize_4bit(by: Operands) -> Contest:
    """4 bits to floating point."""
    dense = by.randn(by.n, by.k)
    decode = partial(quantize(dense).dequantize, by.dtype, out=torch.empty_like(dense))
    return Contest(decode, dense.clone, "a copy", LEVELS)


def cross_entropy(by: Operands) -> Contest:
    """The loss of m tokens over a vocabulary of n, forward and backward."""
    weight = by.randn(by.n, by.k) / by.k**0.5
    h = by.randn(by.m, by.k, requires_grad=True)
    labels = torch.randint(by.n, (by.m,), device=by.device)
    return Contest(
        lambda: _backward(linear_cross_entropy(h, weight, labels), None, h),
        lambda: _backward(F.cross_entropy(F.linear(h, weight).float(), labels), None, h),
        "F.cross_entropy over the whole logits",
        4 * TOLERANCE[by.dtype],
    )


def adamw_step(by: Operands) -> Contest:
    """Optimizer steps of an adapter's n x k fp32 parameters, which are 0 in the beginning."""
    grad = by.randn(by.n, by.k, dtype=torch.float32)

    def steps(made: Any) -> Callable[[], Tensor]:
        parameter = torch.nn.Parameter(torch.zeros_like(grad))
        parameter.grad = grad.clone()
        optimizer = made([parameter], lr=1e-3, weight_decay=0.01)

        def step() -> Tensor:
            optimizer.step()
            return parameter

        return step

    return Contest(steps(AdamW), steps(torch.optim.AdamW), "torch.optim.AdamW", 1e-4)


CONTESTS: dict[str, Callable[[Operands], Contest]] = {
    "linear_4bit": linear_4bit,
    "lora_linear_4bit": lora_linear_4bit,
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "linear_cross_entropy": cross_entropy,
    "adamw_step": adamw_step,
}
WITHOUT_TOKENS = ("quantize_4bit", "dequantize_4bit", "adamw_step")  # once a weight

# ---- the command


def configure(parser: argparse.ArgumentParser) -> None:
    add = add_to(parser)
    add("op", list(CONTESTS), f"one of {', '.join(CONTESTS)} (default: all)", metavar="OP", nargs="?")
    add("--model", "MODEL", "take the shapes of its linear layers; no weight is read")
    add("--shape", "N", "M tokens, N outputs, K inputs", metavar=("M", "N", "K"), nargs=3, least=1)
    add("--tokens", "N", "token counts, without --shape (default: 1 16 256)", nargs="+", least=1)
    add("--dtype", ("bfloat16", "float16", "float32"), "of x", default="bfloat16")
    add("--rounds", "N", "calls of each, in turn (default: 11)", default=11, least=1)
    add("--json", None, "print one JSON object a row")
    parser.epilog = """Both are called in turns, so that background load affects both equally; the ratio is
the median over the rounds, above 1 where this library is faster. Without --model and --shape: a weight [4096, 4096].
Close other programs.

examples:
  qlora bench
  qlora bench linear_4bit --shape 16 4096 14336
  qlora bench --model Llama-3.1-8B-Instruct --tokens 1 512"""


def run(args: argparse.Namespace) -> int:
    """Measure and print each row as it comes."""
    shapes = _shapes(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_properties(device).name if device.type == "cuda" else cpu_name()
    if not args.json:
        isa = (
            ""
            if device.type == "cuda"
            else f", {build_info()['cpu_isa']}, {torch.get_num_threads()} threads"
        )
        print(f"{name}{isa}, torch {torch.__version__}, {args.dtype}")
    torch.manual_seed(0)
    for op in [args.op] if args.op else CONTESTS:
        head = True
        for m, n, k in dict.fromkeys((m * (op not in WITHOUT_TOKENS), n, k) for m, n, k in shapes):
            contest = CONTESTS[op](Operands(m, n, k, getattr(torch, args.dtype), device))
            about = {"op": op, "m": m or None, "n": n, "k": k, "dtype": args.dtype, "device": name}
            row = about | measured(contest, args.rounds, device)
            if args.json:
                print(json.dumps(row), flush=True)
                continue
            if head:
                print(f"\n{op}, against {contest.rival} in {args.dtype}")
                print(
                    f"{'M':>7}  {'[N, K]':<18}{'ours, ms':>10}{'torch, ms':>10}  times as fast (quartiles)"
                )
            head = False
            low, high = row["quartiles"]
            match = "" if row["match"] else f"  NO MATCH: relative error {row['relative_error']:g}"
            times = f"{row['ours_ms']:>10g}{row['torch_ms']:>10g}{row['times_as_fast']:>8g} ({low:g} to {high:g})"
            print(f"{m or '':>7}  {f'[{n}, {k}]':<18}{times}{match}", flush=True)
    return 0


def measured(contest: Contest, rounds: int, device: torch.device) -> dict[str, Any]:
    """The times of both sides, and whether they agree."""

    def wait_for(function: Callable[[], Any]) -> Any:
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    got, expected = contest.ours(), contest.torch()
    if isinstance(got, QuantizedWeight):
        got = got.dequantize(expected.dtype)
    error = relative_error(got.detach(), expected.detach())
    began = time.monotonic()
    sides: Functions = {
        "ours": partial(wait_for, contest.ours),
        "torch": partial(wait_for, contest.torch),
    }
    seconds = interleaved(sides, rounds)
    low, middle, high = rounded(ratios(seconds["torch"], seconds["ours"]))
    return {
        **{f"{side}_ms": rounded(quartiles(seconds[side]), 1e3)[1] for side in sides},
        "torch_is": contest.rival,
        "times_as_fast": middle,
        "quartiles": [low, high],
        "match": error < contest.tolerance,
        "relative_error": float(f"{error:.2g}"),
        "seconds": round(time.monotonic() - began, 2),
    }


def _shapes(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    if args.model and args.shape:
        raise UserError("qlora bench: --model and --shape were given: expected one of them")
    if args.shape and args.tokens:
        raise UserError(
            "qlora bench: --tokens does not go with --shape, whose first number it is; leave one out"
        )
    if args.shape:
        return [tuple(args.shape)]
    weights = [(4096, 4096)]
    if args.model:
        require("qlora bench --model", "transformers", "yaml")
        weights = sorted(set(layer_shapes(args.model)))
    return [(m, n, k) for n, k in weights for m in args.tokens or TOKENS]


def four_bit_of(model: Path) -> tuple[Any, dict[str, bool]]:
    """The model on the meta device, and the weights that load_model would make 4-bit, by the configuration alone."""
    from qlora_native.models.build import MetaModel
    from qlora_native.weights.open import open_source

    with as_user_error():
        meta = MetaModel(open_source(model).config, torch.bfloat16, torch.device("meta"))
        return meta, meta.four_bit_weights(("lm_head",), 64)


def layer_shapes(model: Path) -> list[tuple[int, int]]:
    """[N, K] of each weight of :func:`four_bit_of`."""
    meta, weights = four_bit_of(model)
    # The last two axes: of one expert, where a weight is a stack of them.
    shapes = ((meta.shapes[name].shape[-2:], transposed) for name, transposed in weights.items())
    return [
        (columns, rows) if transposed else (rows, columns) for (rows, columns), transposed in shapes
    ]
