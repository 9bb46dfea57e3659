"""qn.tune over the emulator: what is a candidate, what is chosen by a clock of the test's own, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tuned
from emulated import Emulator
from helpers import relative_error, same_bytes
from tuned import (
    CPU,
    GEMV,
    SPLIT_K,
    TILE,
    TWO_STEP,
    Clock,
    K,
    N,
    file_here,
    forget,
    plan_of,
    problem,
    rows_and_parts_win,
)

import qlora_native as qn
from qlora_native import reference, tuning
from qlora_native.cases import TOLERANCE
from qlora_native.ops import _cuda_products
from qlora_native.ops._cuda_products import Plan
from qlora_native.ops._tuned_plans import Choice, Problem
from qlora_native.tuning import replay


@pytest.fixture
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Emulator]:
    with tuned.tunable(request.config, monkeypatch, tmp_path) as found:
        yield found


# ---------------------------------------------------------------------------------------------------------------------
# Candidates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize(
    ("m", "n", "k", "forward", "kinds"),
    [
        (4, 72, 512, True, {GEMV, SPLIT_K, TILE, TWO_STEP}),
        (16, 64, 512, True, {GEMV, SPLIT_K, TILE, TWO_STEP}),
        (8, 512, 128, False, {SPLIT_K, TILE, TWO_STEP}),
        (64, 64, 512, True, {SPLIT_K, TILE, TWO_STEP}),
        (160, 136, 128, True, {TILE, TWO_STEP}),
        (160, 128, 192, False, {TILE, TWO_STEP}),
        (16, 65, 64, False, {TWO_STEP}),
    ],
)
def test_every_candidate_gives_the_product(
    emulator: Emulator, m: int, n: int, k: int, forward: bool, kinds: set[int], rank: int, dtype: torch.dtype
) -> None:
    operands = tuning.Operands(tuning.Shape(CPU, n, k, 64), dtype, rank)
    contest = tuning.Contest(_cuda_products.Products(emulator.module, False), operands, m, forward)
    assert {plan.kind for plan in contest.plans} == kinds
    dense = reference.dequantize(dtype, *operands.weights[0]).double()
    truth = contest.x.double() @ (dense.t() if forward else dense)
    if contest.adapter is not None:
        low, up = contest.adapter.low.double(), contest.adapter.up.double()
        truth += low @ (up.t() if forward else up)
    for plan in contest.plans:
        for weight in operands.weights:
            assert relative_error(contest.call(plan, weight), truth) < 2 * TOLERANCE[dtype], plan


def test_what_stays_built_in_for_low_memory_is_among_the_candidates(emulator: Emulator) -> None:
    emulator.facts = emulator.facts._replace(sm_count=7)  # parts that are not on the ladder
    operands = tuning.Operands(tuning.Shape(CPU, 64, 2048, 64), torch.bfloat16, 0)
    contest = tuning.Contest(_cuda_products.Products(emulator.module, False), operands, 512, True)
    plain, frugal = contest.candidates[False], contest.candidates[True]
    assert plain[0].kind == TWO_STEP and TWO_STEP not in {plan.kind for plan in frugal}
    assert set(contest.plans) == {*plain, *frugal} and len(set(contest.plans)) == len(contest.plans)


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def a_plan(splits: int) -> Plan:
    return Plan(SPLIT_K, 16, 64, splits, 4, 0, 0, 0)


def test_a_win_must_exceed_the_margin() -> None:
    built_in, other, third = a_plan(2), a_plan(3), a_plan(4)
    assert tuning.choose({built_in: [1.0] * 3, other: [0.96] * 3}, built_in) == built_in
    assert tuning.choose({built_in: [1.0] * 3, other: [0.94] * 3}, built_in) == other
    assert tuning.choose({other: [0.9] * 3, built_in: [1.0] * 3, third: [0.8] * 3}, built_in) == third
    assert tuning.choose({built_in: [1.0] * 3}, built_in) == built_in


def test_the_choice_is_by_ratios_within_a_round() -> None:
    """A machine that slows down by the round, and one disturbed sample, change nothing."""
    built_in, other = a_plan(2), a_plan(3)
    assert tuning.choose({built_in: [1.0, 2.0, 4.0], other: [0.9, 1.8, 40.0]}, built_in) == other
    assert tuning.choose({built_in: [1.0, 2.0, 4.0], other: [0.1, 2.0, 4.0]}, built_in) == built_in


def test_tuning_chooses_what_the_clock_says(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    another_bucket = plan_of(emulator, 17)
    with monkeypatch.context() as patch:
        clock = Clock(patch, rows_and_parts_win)
        seen: list[tuning.Tuned] = []
        found = qn.tune([(N, K), (N, K)], tokens=[3, 4], rank=8, device="cpu", report=seen.append)
    assert seen == found and [r.problem for r in found] == [
        problem(4, forward, low_memory) for forward in (True, False) for low_memory in (False, True)
    ]
    built_in = [Choice(GEMV, 4, 32, 1)] * 2 + [Choice(TILE, 16, 64, 1)] * 2
    chosen = [Choice(GEMV, 4, 64, 1)] * 2 + [Choice(TWO_STEP, 0, 0, 1), Choice(SPLIT_K, 16, 64, 2)]
    assert [r.built_in for r in found] == built_in and [r.chosen for r in found] == chosen
    assert [r.built_in_seconds for r in found] == pytest.approx([1 / 32, 1 / 32, 1, 1])
    assert [r.chosen_seconds for r in found] == pytest.approx([1 / 64, 1 / 64, 0.4, 0.5])
    assert [r.candidates for r in found] == [6, 5, 3, 2] and not any(r.left_out for r in found)
    assert len(set(clock.weights)) == 2, "the weights do not rotate"
    assert clock.weights[-4:-2] == clock.weights[-2:] == list(dict.fromkeys(clock.weights))

    for _ in range(2):  # in this process, then in a new one
        assert [plan_of(emulator, m).columns for m in (1, 2, 4)] == [64, 64, 64]
        assert plan_of(emulator, 3, forward=False).kind == TWO_STEP
        assert plan_of(emulator, 3, forward=False, low_memory=True).splits == 2
        assert plan_of(emulator, 17) == another_bucket
        assert plan_of(emulator, 4, n=N + 64).columns == 32, "another weight"
        forget()


def test_what_gains_too_little_stays_built_in(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        Clock(patch, lambda plan, forward: 0.96 if plan.columns == 64 else 1.0)
        found = qn.tune([(N, K)], tokens=[4], rank=0, device="cpu")
    assert all(r.chosen == r.built_in for r in found)
    entries = json.loads(file_here(tmp_path).read_text(encoding="utf-8"))["entries"]
    assert len(entries) == 4 and all(entry["plan"] is None for entry in entries)
    assert plan_of(emulator, 4).columns == 32


def test_wrong_and_failing_candidates_are_left_out(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    by_plan = _cuda_products.Products.by_plan

    def product(products: Any, plan: Plan, *others: Any) -> torch.Tensor:
        if plan.columns == 64 and plan.kind == GEMV:
            raise RuntimeError("linear_4bit: CUDA failed with a sentence\nand more")
        y = by_plan(products, plan, *others)
        return y * float("nan") if plan.kind == TWO_STEP else y

    monkeypatch.setattr(_cuda_products.Products, "by_plan", product)
    plain = qn.tune([(N, K)], tokens=[4], device="cpu")[0]
    assert plain.chosen.kind != TWO_STEP and plain.chosen != Choice(GEMV, 4, 64, 1)
    assert plain.left_out == (
        "gemv 4x64: linear_4bit: CUDA failed with a sentence",
        "two_step: its result differs by nan from the first plan's",
    )


def test_a_wrong_built_in_plan_is_no_choice(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    by_plan = _cuda_products.Products.by_plan

    def product(products: Any, plan: Plan, *others: Any) -> torch.Tensor:
        return by_plan(products, plan, *others) * (0.5 if plan.kind == TILE else 1.0)

    monkeypatch.setattr(_cuda_products.Products, "by_plan", product)
    with pytest.raises(RuntimeError, match="the built-in plan fails for Sizes"):
        qn.tune([(64, 128)], tokens=[512], device="cpu")


def test_a_model_is_tuned_where_its_layers_are(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [qn.nn.QuantizedLinear(k, n, block_size=b) for n, k, b in ((64, 128, 64), (64, 128, 64), (64, 128, 32))]
    Clock(monkeypatch, lambda plan, forward: 1.0)
    model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 8))
    state = torch.get_rng_state()
    found = qn.tune(model, tokens=[4])
    assert same_bytes(torch.get_rng_state(), state)
    assert {r.problem for r in found} == {
        Problem(4, 64, 128, block_size, 1, forward, low_memory)
        for block_size in (64, 32)
        for forward in (True, False)
        for low_memory in (False, True)
    }


def test_what_cannot_stand_in_a_graph_is_not_chosen(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(replay.Replay):
        def __init__(self, calls: list[replay.Call], device: torch.device) -> None:
            super().__init__(calls, device)
            plan, _ = calls[0].__defaults__  # type: ignore[misc]
            if self.refuses(plan):
                self.refused = "it waits"

        refuses = staticmethod(lambda plan: plan.kind == TWO_STEP)

    monkeypatch.setattr(tuning, "Replay", Refusing)
    Clock(monkeypatch, rows_and_parts_win)
    found = qn.tune([(N, K)], tokens=[4], device="cpu")
    assert found[2].left_out == ("two_step: it waits",) and found[2].chosen.kind == SPLIT_K
    monkeypatch.setattr(Refusing, "refuses", staticmethod(lambda plan: plan.kind == GEMV))
    with pytest.raises(RuntimeError, match="the built-in plan fails for Sizes.*: it waits"):
        qn.tune([(N, K)], tokens=[4], device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": torch.float32}, "dtype is torch.float32: expected torch.bfloat16 or torch.float16"),
        ({"tokens": [0]}, r"tokens are \[0\]: expected rank >= 0 and positive token counts"),
        ({"tokens": []}, r"tokens are \[\]"),
        ({"rank": -1}, "rank is -1"),
        ({"of": [(64, 0)]}, r"a weight of \[64, 0\]"),
        ({"of": torch.nn.Linear(8, 8)}, "the model has no 4-bit linear layer"),
    ],
)
def test_what_cannot_be_tuned_is_told(emulator: Emulator, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(qn.UserError, match=sentence):
        qn.tune(**{"of": [(N, K)], "tokens": [4], "device": "cpu", **arguments})


def test_it_needs_kernels() -> None:
    with pytest.raises(qn.UserError, match="cpu has no kernels of this build: a CUDA device"):
        qn.tune([(64, 64)], device="cpu")


def test_it_refuses_to_keep_nothing(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_NATIVE_TUNING", "off")
    with pytest.raises(qn.UserError, match="QLORA_NATIVE_TUNING is off"):
        qn.tune([(N, K)], device="cpu")


@pytest.mark.parametrize("name", ["graph", "compiler"])
def test_it_refuses_while_a_graph_is_captured(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    if name == "graph":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(qn.UserError, match="while a graph is captured or compiled"):
        qn.tune([(N, K)], device="cpu")
    assert emulator.launches() == [] and list(tmp_path.iterdir()) == []


def test_products_never_measure(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(replay, "Replay", None)
    monkeypatch.setattr(tuning, "Contest", None)
    qn.linear(torch.randn(4, K).bfloat16(), qn.quantize(torch.randn(N, K)))
    assert list(tmp_path.iterdir()) == []
