"""qn.tune over the emulator: which plans are candidates, which is chosen by a clock of the test's own, what is kept."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from emulated import Emulator
from helpers import relative_error, same_bytes

import qlora_native as qn
from qlora_native import reference, tuning
from qlora_native.cases import TOLERANCE
from qlora_native.ops import _cuda_kernels, _cuda_products, _library, _tuned_plans
from qlora_native.ops._cuda_products import Plan
from qlora_native.ops._tuned_plans import Choice, Problem
from qlora_native.tuning import replay

GEMV, SPLIT_K, TILE, TWO_STEP = range(4)
CPU = torch.device("cpu")
N, K = 512, 512


@pytest.fixture
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Emulator]:
    with emulated.kernels(emulated.module_or_skip(request.config), monkeypatch) as found:
        monkeypatch.setenv("QLORA_NATIVE_TUNING", str(tmp_path))
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


def rows_and_parts_win(plan: Plan, forward: bool) -> float:
    """Forward: the few-token kernel, the more rows of W the better. Gradient: two steps, then the most parts."""
    if forward:
        return 1.0 / plan.columns if plan.kind == GEMV else 1.0
    return 0.4 if plan.kind == TWO_STEP else 1.0 / plan.splits


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


class Device:
    """Stands in for torch.cuda in the replays: a clock that its work advances, and a log of what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0  # milliseconds
        self.log: list[str] = []
        self.calls: list[Callable[[], None]] | None = None  # while a graph is captured
        names = ("device", "stream", "current_stream", "synchronize", "Stream", "CUDAGraph", "Event", "graph")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def work(self, milliseconds: float) -> None:
        if self.calls is not None:
            self.calls.append(lambda: self.work(milliseconds))
        else:
            self.log.append("work")
            self.now += milliseconds

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    stream = device

    def current_stream(self) -> Device:
        return self

    Stream = current_stream

    def wait_stream(self, other: object) -> None:
        self.log.append("wait")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    class CUDAGraph:
        calls: list[Callable[[], None]]

        def replay(self) -> None:
            for call in self.calls:
                call()

    @contextmanager
    def graph(self, graph: CUDAGraph) -> Iterator[None]:
        self.calls = graph.calls = []
        try:
            yield
        finally:
            self.calls = None

    def Event(self, enable_timing: bool) -> Any:
        class Event:
            def record(event) -> None:
                event.at = self.now

            def synchronize(event) -> None:
                self.log.append("synchronize")

            def elapsed_time(event, end: Any) -> float:
                return float(end.at - event.at)

        return Event()


def test_a_graph_is_replayed_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    made = replay.Replay([lambda: device.work(2.0), lambda: device.work(4.0)], torch.device("cuda", 0))
    assert device.log == ["wait", "work", "work", "wait", "synchronize"] and not made.refused, (
        "warmed up, then captured"
    )
    assert made.seconds() == pytest.approx(3e-3), "of one call"
    assert device.log[5:] == ["work", "work", "synchronize"]


def test_what_cannot_stand_in_a_graph_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    def waits() -> None:
        if device.calls is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")
        device.work(2.0)

    made = replay.Replay([waits], torch.device("cuda", 0))
    assert made.refused == "CUDA error: operation not permitted when stream is capturing"
    assert made.seconds() == pytest.approx(2e-3)


def test_what_cannot_stand_in_a_graph_is_not_chosen(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(replay.Replay):
        def __init__(self, calls: list[replay.Call], device: torch.device) -> None:
            super().__init__(calls, device)
            if self.refuses(calls[0].__defaults__[0]):  # type: ignore[attr-defined]
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
# The ops follow it


def test_linear_and_lora_linear_follow_the_file(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with the truth's values; low_memory with its own choice."""
    m = 20  # of bucket 32
    file_has = {
        problem(32): Choice(TWO_STEP, 0, 0, 1),
        problem(32, forward=False): Choice(SPLIT_K, 16, 64, 2),
        problem(32, low_memory=True): Choice(SPLIT_K, 32, 64, 2),
        problem(32, forward=False, low_memory=True): Choice(TILE, 16, 64, 1),
    }
    keep(emulator, dict(file_has))
    taken: list[tuple[bool, Choice]] = []
    by_plan = _cuda_products.Products.by_plan

    def product(products: Any, plan: Plan, sizes: Any, *others: Any) -> torch.Tensor:
        taken.append((sizes.forward, tuning.choice_of(plan)))
        return by_plan(products, plan, sizes, *others)

    monkeypatch.setattr(_cuda_products.Products, "by_plan", product)
    w = qn.quantize(torch.randn(N, K) / K**0.5)
    dense = reference.dequantize(torch.bfloat16, *w.op_args()).double()
    a, b = torch.randn(8, K) / K**0.5, torch.randn(N, 8)
    wide = dense + 2.0 * b.bfloat16().double() @ a.bfloat16().double()
    grad = torch.randn(m, N).bfloat16()
    for low_memory in (False, True):
        for adapted in (False, True):
            x = torch.randn(m, K).bfloat16().requires_grad_()
            y = (
                qn.lora_linear(x, w, a, b, 2.0, low_memory=low_memory)
                if adapted
                else qn.linear(x, w, low_memory=low_memory)
            )
            y.backward(grad)
            assert x.grad is not None
            truth = wide if adapted else dense
            assert relative_error(y, x.detach().double() @ truth.t()) < 3 * TOLERANCE[torch.bfloat16]
            assert relative_error(x.grad, grad.double() @ truth) < 3 * TOLERANCE[torch.bfloat16]
    assert taken == [
        (forward, file_has[problem(32, forward, low_memory)])
        for low_memory in (False, True)
        for _ in ("linear", "lora_linear")
        for forward in (True, False)
    ]


def test_the_same_file_gives_the_same_bits(emulator: Emulator) -> None:
    w, x = qn.quantize(torch.randn(N, K)), torch.randn(20, K).bfloat16()
    results = []
    for splits in (2, 2, 1):
        keep(emulator, {problem(32): Choice(SPLIT_K if splits > 1 else TILE, 32, 64, splits)})
        results.append(qn.linear(x, w))
    assert same_bytes(results[0], results[1])
    assert not same_bytes(results[0], results[2]), "the plan was not followed"


def test_the_file_is_read_once_a_process(emulator: Emulator) -> None:
    keep(emulator, {problem(4): Choice(GEMV, 4, 64, 1)})
    assert plan_of(emulator, 4).columns == 64
    file = _tuned_plans.file_of(_tuned_plans.folder() or Path(), emulator.facts)
    file.unlink()
    assert plan_of(emulator, 3).columns == 64
    forget()
    assert plan_of(emulator, 3).columns == 32


@pytest.mark.parametrize(
    ("about", "choice"),
    [
        (problem(32, low_memory=True), Choice(TWO_STEP, 0, 0, 1)),
        (problem(32), Choice(GEMV, 16, 32, 1)),
        (problem(32), Choice(TILE, 128, 128, 1)),
        (problem(32), Choice(SPLIT_K, 32, 64, 32)),
    ],
)
def test_a_file_cannot_ask_for_what_is_not_possible(emulator: Emulator, about: Problem, choice: Choice) -> None:
    built_in = plan_of(emulator, 32, low_memory=about.low_memory)
    keep(emulator, {about: choice})
    assert plan_of(emulator, 32, low_memory=about.low_memory) == built_in


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_further_calls_add_to_the_file(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Clock(monkeypatch, rows_and_parts_win)
    kept = {problem(64): Choice(TILE, 32, 64, 1), problem(4): None}
    file = keep(emulator, dict(kept))
    qn.tune([(N, K)], tokens=[4], device="cpu")
    found = _tuned_plans.read(file, emulator.module, emulator.facts)
    assert found[problem(64)] == kept[problem(64)] and found[problem(4)] == Choice(GEMV, 4, 64, 1)
    assert len(found) == 5 and file_here(tmp_path) == file


def test_the_file_is_of_the_card(emulator: Emulator) -> None:
    facts = _cuda_kernels.Facts(90, 132, "NVIDIA H100 80GB HBM3")
    file = _tuned_plans.file_of(Path("folder"), facts)
    assert file == Path("folder/plans-nvidia-h100-80gb-hbm3-sm90-132.json")
    keep(emulator, {problem(4): Choice(GEMV, 4, 64, 1)})
    emulator.facts = facts
    assert _tuned_plans.choices_of(emulator.module, facts) == {}


def said(emulator: Emulator) -> str:
    """The one sentence with which a file is ignored; the plan is the built-in one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert plan_of(emulator, 4).columns == 32
            forget()
    (warning,) = caught
    return str(warning.message)


@pytest.mark.parametrize("name", ["format", "version", "kernels", "torch", "gpu", "compute_capability", "sm_count"])
def test_a_foreign_file_is_ignored(emulator: Emulator, name: str) -> None:
    file = keep(emulator, {problem(4): Choice(GEMV, 4, 64, 1)})
    assert plan_of(emulator, 4).columns == 64
    forget()
    found = json.loads(file.read_text(encoding="utf-8"))
    found[name] = 99 if isinstance(found[name], int) else "another"
    file.write_text(json.dumps(found), encoding="utf-8")
    sentence = said(emulator)
    assert str(file) in sentence and f"measured with {name} {found[name]!r}, here it is" in sentence


def entry(**changes: object) -> str:
    """A file's only entry, changed."""
    plan = {"kind": "gemv", "rows": 4, "columns": 64, "splits": 1}
    sizes = {"m": 4, "n": N, "k": K, "block_size": 64, "dtype": "bfloat16", "forward": True, "low_memory": False}
    return json.dumps({**sizes, "plan": plan, **changes})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff\xfe" + text,
        lambda text: b"[]",
        lambda text: b"[" * 100_000,
        lambda text: text.replace(b'"entries"', b'"other"'),
        lambda text: text.replace(b'"gemv"', b'"gem"'),
        lambda text: text.replace(b'"columns": 64', b'"columns": "64"'),
        lambda text: text.replace(b'"columns": 64', b'"columns": -64'),
        lambda text: text.replace(b'"columns": 64', b'"columns": 18446744073709551616'),
        lambda text: text.replace(b'"forward": true', b'"forward": 1'),
        lambda text: text.replace(b'"bfloat16"', b'"float8"'),
        lambda text: text.replace(b'"m": 4, ', b""),
    ],
)
def test_a_damaged_file_is_ignored(emulator: Emulator, damage: Callable[[bytes], bytes]) -> None:
    file = keep(emulator, {problem(4): Choice(GEMV, 4, 64, 1)})
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    sentence = said(emulator)
    assert str(file) in sentence and "it is damaged" in sentence and "qn.tune writes a new one" in sentence
    assert len(sentence.splitlines()) == 1


def test_a_file_that_cannot_be_read_is_ignored(emulator: Emulator) -> None:
    file = keep(emulator, {})
    file.unlink()
    file.mkdir()
    assert "it cannot be read (Is a directory)" in said(emulator)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_file_is_replaced_whole_or_not_at_all(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str
) -> None:
    file = keep(emulator, {problem(4): Choice(GEMV, 4, 64, 1)})
    before = file.read_bytes()

    def fails(*arguments: object) -> None:
        assert file.read_bytes() == before
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        Clock(patch, rows_and_parts_win)
        patch.setattr(os, step, fails)
        with pytest.raises(qn.UserError, match=r"could not be written \(No space left on device\): set QLORA_NATIVE"):
            qn.tune([(64, 128)], tokens=[4], device="cpu")
    assert file_here(tmp_path) == file and file.read_bytes() == before


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/a/home")
    monkeypatch.delenv("QLORA_NATIVE_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _tuned_plans.folder() == Path("/a/home/.cache/qlora_native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QLORA_NATIVE_TUNING", "")
    assert _tuned_plans.folder() == tmp_path / "qlora_native"
    monkeypatch.setenv("QLORA_NATIVE_TUNING", "/another")
    assert _tuned_plans.folder() == Path("/another")
    monkeypatch.setenv("QLORA_NATIVE_TUNING", "off")
    assert _tuned_plans.folder() is None


def test_off_reads_nothing(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(emulator, {problem(4): Choice(GEMV, 4, 64, 1)})
    monkeypatch.setenv("QLORA_NATIVE_TUNING", "off")
    assert plan_of(emulator, 4).columns == 32


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
