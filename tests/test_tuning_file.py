"""What qn.tune keeps: whether the ops follow it, and whether a file can do harm."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tuned
from emulated import Emulator
from helpers import relative_error, same_bytes
from tuned import (
    GEMV,
    SPLIT_K,
    TILE,
    TWO_STEP,
    Clock,
    K,
    N,
    file_here,
    forget,
    keep,
    plan_of,
    problem,
    rows_and_parts_win,
)

import qlora_native as qn
from qlora_native import reference, tuning
from qlora_native.cases import TOLERANCE
from qlora_native.ops import _cuda_kernels, _cuda_products, _tuned_plans
from qlora_native.ops._cuda_products import Plan
from qlora_native.ops._tuned_plans import Choice, Problem


@pytest.fixture
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Emulator]:
    with tuned.tunable(request.config, monkeypatch, tmp_path) as found:
        yield found


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
    for name in ("QLORA_NATIVE_TUNING", "QLORA_NATIVE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _tuned_plans.folder() == Path("/a/home/.cache/qlora_native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QLORA_NATIVE_TUNING", "")
    assert _tuned_plans.folder() == tmp_path / "qlora_native"
    monkeypatch.setenv("QLORA_NATIVE_CACHE", "/a/cache")
    assert _tuned_plans.folder() == Path("/a/cache")
    monkeypatch.setenv("QLORA_NATIVE_TUNING", "/another")
    assert _tuned_plans.folder() == Path("/another")
    monkeypatch.setenv("QLORA_NATIVE_TUNING", "off")
    assert _tuned_plans.folder() is None


def test_off_reads_nothing(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(emulator, {problem(4): Choice(GEMV, 4, 64, 1)})
    monkeypatch.setenv("QLORA_NATIVE_TUNING", "off")
    assert plan_of(emulator, 4).columns == 32
