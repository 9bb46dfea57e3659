"""What the tests of the autotuner share: the emulator with a folder for its file, a clock of their own, lookups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from emulated import Emulator

from qlora_native import tuning
from qlora_native.ops import _cuda_products, _library, _tuned_plans
from qlora_native.ops._cuda_products import Plan
from qlora_native.ops._tuned_plans import Choice, Problem
from qlora_native.tuning import replay

GEMV, SPLIT_K, TILE, TWO_STEP = range(4)
CPU = torch.device("cpu")
N, K = 512, 512


@contextmanager
def tunable(config: pytest.Config, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Emulator]:
    """The emulated kernels, few samples of them, and a folder for the files."""
    with emulated.kernels(emulated.module_or_skip(config), monkeypatch) as found:
        monkeypatch.setenv("QLORA_NATIVE_TUNING", str(folder))
        monkeypatch.setattr(_library, "_warned", set())
        monkeypatch.setattr(tuning, "copies", lambda num_bytes, device: 2)
        monkeypatch.setattr(tuning, "ROUNDS", 3)
        yield found


class Clock:
    """Stands in for the clock of the replays; each product takes as long as ``cost`` says of its plan."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Callable[[Plan, bool], float]) -> None:
        self.now = 0.0
        self.weights: list[int] = []  # addresses, in the order of the products
        by_plan = _cuda_products.Products.by_plan

        def product(products: Any, plan: Plan, sizes: Any, x: torch.Tensor, weight: Any, *others: Any) -> torch.Tensor:
            self.now += cost(plan, sizes.forward)
            self.weights.append(weight.packed.data_ptr())
            return by_plan(products, plan, sizes, x, weight, *others)

        monkeypatch.setattr(_cuda_products.Products, "by_plan", product)
        monkeypatch.setattr(replay.time, "perf_counter", lambda: self.now)


def forget() -> None:
    """As a new process."""
    _tuned_plans.choices_of.cache_clear()
    _cuda_products.plan_of.cache_clear()


def plan_of(emulator: Emulator, m: int, forward: bool = True, low_memory: bool = False, n: int = N) -> Plan:
    sizes = _cuda_products.Sizes(m, n, K, 0, 64, 1, forward, low_memory)
    return _cuda_products.plan_of(emulator.module, sizes, CPU)


def file_here(tmp_path: Path) -> Path:
    (found,) = tmp_path.iterdir()
    return found


def keep(emulator: Emulator, choices: dict[Problem, Choice | None]) -> Path:
    """A file as qn.tune writes it, and as a new process finds it."""
    folder = _tuned_plans.folder()
    assert folder is not None
    file = _tuned_plans.file_of(folder, emulator.facts)
    _tuned_plans.write(file, emulator.module, emulator.facts, choices)
    forget()
    return file


def problem(m: int, forward: bool = True, low_memory: bool = False) -> Problem:
    return Problem(m, N, K, 64, 1, forward, low_memory)


def rows_and_parts_win(plan: Plan, forward: bool) -> float:
    """Forward: the few-token kernel, the more rows of W the better. Gradient: two steps, then the most parts."""
    if forward:
        return 1.0 / plan.columns if plan.kind == GEMV else 1.0
    return 0.4 if plan.kind == TWO_STEP else 1.0 / plan.splits
