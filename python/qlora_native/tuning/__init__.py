"""Which kernel multiplies by a 4-bit weight fastest on this card: measured once, kept in a file, used ever after.

Without it the library goes by estimates (cuda/matmul_plan.h). Nothing here runs unless :func:`tune` is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from qlora_native.cases import TOLERANCE
from qlora_native.errors import UserError
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.ops import _cuda_kernels, _tuned_plans
from qlora_native.ops._cuda_products import Plan, Products, Sizes, plan_of, question_of, sizes_of
from qlora_native.ops._library import Weight
from qlora_native.ops._products import Adapter
from qlora_native.ops._tuned_plans import Choice, Problem
from qlora_native.tuning.replay import Call, Replay, copies, in_turns
from qlora_native.weight import quantize

TOKENS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MARGIN = 0.05  # of the time: a plan that gains less does not replace the built-in one
FINALISTS = 3  # beside the built-in plan, measured a second time, in turns
SCREENING, ROUNDS = 3, 9  # samples a plan, first and in turns


class Tuned(NamedTuple):
    """What was found for one product; ``problem.m`` is the bucket's largest token count, where it was measured."""

    problem: Problem
    built_in: Choice
    built_in_seconds: float
    chosen: Choice
    chosen_seconds: float
    candidates: int
    left_out: tuple[str, ...]  # candidates that failed or whose result was wrong, each with a sentence


class Shape(NamedTuple):
    """Of a weight [n, k], and where it is multiplied."""

    device: torch.device
    n: int
    k: int
    block_size: int


def choose(seconds: Mapping[Plan, Sequence[float]], built_in: Plan) -> Plan:
    """The plan with the least time, as the median over the rounds of its ratio to the built-in plan's in that round;
    the built-in one unless that is less than 1 - MARGIN."""
    base = seconds[built_in]
    ratios = {plan: median(a / b for a, b in zip(times, base, strict=True)) for plan, times in seconds.items()}
    best = min(ratios, key=ratios.__getitem__)
    return best if ratios[best] < 1 - MARGIN else built_in


def choice_of(plan: Plan) -> Choice:
    """What a file keeps of a plan."""
    return Choice(plan.kind, plan.rows, plan.columns, plan.splits)


class Operands:
    """Copies of a made-up weight, and what is multiplied with them. The global random state is left alone."""

    def __init__(self, shape: Shape, dtype: torch.dtype, rank: int) -> None:
        self.shape, self.dtype, self.rank = shape, dtype, rank
        self.generator = torch.Generator(shape.device).manual_seed(0)
        first = quantize(self.normal(shape.n, shape.k, shape.k**-0.5), block_size=shape.block_size)
        count = copies(first.nbytes, shape.device)
        self.weights = [Weight(*copy.deepcopy(first).op_args()) for _ in range(count)]

    def normal(self, rows: int, columns: int, scale: float) -> torch.Tensor:
        """Normal values [rows, columns]."""
        drawn = torch.randn(rows, columns, generator=self.generator, device=self.shape.device, dtype=self.dtype)
        return drawn.mul_(scale)

    def of(self, m: int, forward: bool) -> tuple[torch.Tensor, Adapter | None]:
        """x [m, k] and the adapter of a forward product, or [m, n] and that of an input gradient."""
        _, n, k, _ = self.shape
        x = self.normal(m, k if forward else n, 1.0)
        if self.rank == 0:
            return x, None
        up = self.normal(n, self.rank, 0.25) if forward else self.normal(self.rank, k, 0.25)
        return x, Adapter(self.normal(m, self.rank, 1.0), up)


class Contest:
    """One product by each of its candidates."""

    def __init__(self, products: Products, operands: Operands, m: int, forward: bool) -> None:
        self.products, self.operands = products, operands
        self.x, self.adapter = operands.of(m, forward)
        self.sizes = sizes_of(forward, self.x, operands.weights[0], self.adapter)
        facts = _cuda_kernels.facts(operands.shape.device)
        module = products.module

        def candidates(sizes: Sizes) -> list[Plan]:
            return [Plan(*fields) for fields in module.candidate_plans(question_of(sizes, facts))]

        # By low_memory; the built-in plan first.
        self.candidates = {low: candidates(self.sizes._replace(low_memory=low)) for low in (False, True)}
        self.plans = list(dict.fromkeys([*self.candidates[False], *self.candidates[True]]))
        self.left_out: dict[Plan, str] = {}

    def call(self, plan: Plan, weight: Weight) -> torch.Tensor:
        """y by a plan."""
        return self.products.by_plan(plan, self.sizes, self.x, weight, None, self.adapter)

    def leave_out(self, plan: Plan, why: str) -> None:
        """A candidate takes no part; that a built-in plan does not is an error."""
        if any(plan == plans[0] for plans in self.candidates.values()):
            raise RuntimeError(f"tune: the built-in plan fails for {self.sizes}: {why}.")
        self.left_out[plan] = why

    def check(self) -> None:
        """Leaves out what does not give the built-in plan's result, or fails."""
        weight = self.operands.weights[0]
        truth = self.call(self.plans[0], weight).float()
        for plan in self.plans[1:]:
            try:
                error = float((self.call(plan, weight).float() - truth).norm() / truth.norm())
            except (RuntimeError, ValueError) as failure:
                self.leave_out(plan, str(failure).splitlines()[0])
            else:
                if not error < 2 * TOLERANCE[self.operands.dtype]:
                    self.leave_out(plan, f"its result differs by {error:.1e} from the first plan's")

    def ready(self, plans: Iterable[Plan]) -> Iterator[tuple[Plan, Replay]]:
        """Those of the plans that can be timed without their launches."""
        for plan in plans:
            calls: list[Call] = [lambda p=plan, w=w: self.call(p, w) for w in self.operands.weights]  # type: ignore[misc]
            replay = Replay(calls, self.operands.shape.device)
            if replay.refused:
                self.leave_out(plan, replay.refused)
            else:
                yield plan, replay

    def finals(self) -> dict[Plan, list[float]]:
        """Seconds of the built-in plans and of those that come out fastest in a first round, taken in turns."""
        right = [plan for plan in self.plans if plan not in self.left_out]
        first = {plan: median(in_turns({plan: replay}, SCREENING)[plan]) for plan, replay in self.ready(right)}
        finalists: dict[Plan, None] = {}
        for plans in self.candidates.values():
            timed = sorted(filter(first.__contains__, plans), key=first.__getitem__)
            finalists |= dict.fromkeys([plans[0], *timed[:FINALISTS]])
        return in_turns(dict(self.ready(finalists)), ROUNDS)

    def results(self) -> list[Tuned]:
        """With low_memory and without; nothing where there is nothing to choose."""
        if len(self.plans) == 1:
            return []
        self.check()
        seconds = self.finals()
        found = []
        for low, plans in self.candidates.items():
            built_in = plans[0]
            chosen = choose({plan: seconds[plan] for plan in plans if plan in seconds}, built_in)
            found.append(
                Tuned(
                    self.sizes.problem()._replace(low_memory=low),
                    choice_of(built_in),
                    median(seconds[built_in]),
                    choice_of(chosen),
                    median(seconds[chosen]),
                    len(plans),
                    tuple(f"{choice_of(plan)}: {self.left_out[plan]}" for plan in plans if plan in self.left_out),
                )
            )
        return found


def _shapes(of: nn.Module | Iterable[tuple[int, int]], block_size: int, device: torch.device | None) -> list[Shape]:
    if isinstance(of, nn.Module):
        layers = [module for module in of.modules() if isinstance(module, QuantizedLinear)]
        found = [Shape(m.weight.device, m.out_features, m.in_features, m.quantized.block_size) for m in layers]
        if not found:
            raise UserError("tune: the model has no 4-bit linear layer: load it with qn.load_model, or give shapes.")
    else:
        if device is None or (device.type == "cuda" and device.index is None):
            device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
        found = [Shape(device, n, k, block_size) for n, k in of]
    for shape in found:
        if shape.n < 1 or shape.k < 1:
            raise UserError(f"tune: a weight of [{shape.n}, {shape.k}]: expected positive sizes, N and K.")
    return list(dict.fromkeys(found))


def _refuse_if_busy() -> None:
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        raise UserError("tune: it was called while a graph is captured or compiled: call it before, once a card.")


def _keep(products: Products, device: torch.device, results: Iterable[Tuned]) -> None:
    """Into the card's file, and into use."""
    facts = _cuda_kernels.facts(device)
    where = _tuned_plans.folder()
    assert where is not None
    file = _tuned_plans.file_of(where, facts)
    found = {r.problem: None if r.chosen == r.built_in else r.chosen for r in results}
    try:
        _tuned_plans.write(file, products.module, facts, _tuned_plans.read(file, products.module, facts) | found)
    except OSError as error:
        raise UserError(f"tune: {file} could not be written ({error.strerror}): set QLORA_NATIVE_TUNING.") from error
    _tuned_plans.choices_of.cache_clear()
    plan_of.cache_clear()


def tune(
    of: nn.Module | Iterable[tuple[int, int]],
    *,
    tokens: Iterable[int] = TOKENS,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
    rank: int = 16,
    device: torch.device | str | None = None,
    report: Callable[[Tuned], None] | None = None,
) -> list[Tuned]:
    """Measures on this card which kernel is fastest for each product, and keeps it for this and every later process.

    Call it once a card and model shape, before training, on a card that does nothing else. It needs device memory for
    copies of a weight (together more than twice the L2 cache), for x, and for a few of y. What it finds holds from its
    return on; graphs captured before keep their plans. The file is described in docs/tuning.md. The sums of a product,
    so its last bits, depend on the plan: the same file gives the same bits.

    Args:
        of: a model, whose 4-bit linear layers are measured where they are; or shapes (N, K) of weights.
        tokens: rows of x, M. Each stands for its bucket: the token counts up to the next power of two (at least 4).
        dtype: of x, bfloat16 or float16.
        block_size: elements a scale, for shapes; a model has its own.
        rank: of the adapter in the measured products, 0 for none. Plans do not depend on it.
        device: for shapes; the current CUDA device by default.
        report: called with each result as it comes.

    Returns:
        For each product, forward and input gradient, with low_memory and without, what was found; none for products of
        which there is a single plan.

    Raises:
        UserError: no device with these kernels, nothing to measure, a graph being captured, a file that cannot be
            written, ``QLORA_NATIVE_TUNING=off``.
        ValueError: ``block_size`` is none that weights have.
        RuntimeError: the built-in plan itself fails.
    """
    _refuse_if_busy()
    if _tuned_plans.folder() is None:
        raise UserError("tune: QLORA_NATIVE_TUNING is off, so nothing would be kept: unset it, or set it to a folder.")
    if dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"tune: dtype is {dtype}: expected torch.bfloat16 or torch.float16; others have one plan each.")
    tokens = list(tokens)
    if rank < 0 or not tokens or min(tokens) < 1:
        raise UserError(f"tune: rank is {rank}, tokens are {tokens}: expected rank >= 0 and positive token counts.")
    results = []
    for shape in _shapes(of, block_size, None if device is None else torch.device(device)):
        if shape.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("tune: torch finds no CUDA device: it is on one that tuning measures.")
        module = _cuda_kernels.module_for(shape.device)
        if module is None:
            raise UserError(
                f"tune: {shape.device} has no kernels of this build: a CUDA device and its kernels are needed."
            )
        products = Products(module, low_memory=False)
        with torch.no_grad(), torch.autocast(shape.device.type, enabled=False):
            operands = Operands(shape, dtype, rank)
            for m in sorted({module.tokens_bucket(m) for m in tokens}):
                found = [r for forward in (True, False) for r in Contest(products, operands, m, forward).results()]
                _keep(products, shape.device, found)
                results += found
                for result in found if report is not None else ():
                    report(result)  # type: ignore[misc]
    return results
