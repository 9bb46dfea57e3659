"""The check for machines with a GPU, as far as one without can run it; its golden words against plain arithmetic."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import emulated
import gpu_basics
import gpu_check
import gpu_model
import gpu_models
import gpu_page
import gpu_products
import gpu_timing
import pytest
import torch
from laws import ROOT
from sentences import Check

from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops import _cuda_products

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: bench/gpu_check.sh measures on it")


@pytest.fixture
def context(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What a group gets in a dry run, with the emulated kernels if they are built."""
    folder = request.config.getoption("--emulated") or str(ROOT / "build" / "emulated")
    module = emulated.load(folder)
    for name in () if torch.cuda.is_available() else ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    with nullcontext() if module is None else emulated.kernels(module, monkeypatch):
        yield gpu_timing.Context(tmp_path / "group.jsonl")


@no_gpu
@pytest.mark.parametrize("name", gpu_check.GROUPS)
def test_every_row_of_a_group_has_a_match(name: str, context: gpu_timing.Context, one_thread: None) -> None:
    group = gpu_check.GROUPS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, **options: model)
        gpu_check.child(group.run, group.needs, str(context.file), "inf")
    rows = gpu_timing.rows_of(gpu_timing.read(context.file))
    assert [row for row in rows.values() if not row.get("match")] == []
    assert rows or gpu_check.of("absent", context.file)
    assert gpu_check.of("row", context.file) == [name for name in rows for _ in range(2)]  # begun, and ended


# Groups that end early: each after its first of two rows, or in its second of three.


def first_row(context: gpu_timing.Context) -> None:
    context.row(gpu_timing.Case("first"), lambda: {"match": True})


def segv(context: gpu_timing.Context) -> None:
    first_row(context)
    ctypes.string_at(0)


def leave(context: gpu_timing.Context) -> None:
    first_row(context)
    os._exit(3)


def fail(context: gpu_timing.Context) -> None:
    first_row(context)
    raise RuntimeError("a failure that was asked for")


def hang(context: gpu_timing.Context) -> None:
    first_row(context)
    time.sleep(3600)


def leave_in_a_row(context: gpu_timing.Context) -> None:
    first_row(context)
    context.row(gpu_timing.Case("second"), lambda: os._exit(3))
    context.row(gpu_timing.Case("third"), lambda: {"match": True})


def without_a_package(context: gpu_timing.Context) -> None:
    raise AssertionError("a group is not run without what it needs")


FAILURES = {
    "segv": "ended by SIGSEGV",
    "leave": "ended with status 3",
    "fail": "ended with status 1",
    "hang": "cut off",
    "leave_in_a_row": "ended with status 3",
}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> dict[str, gpu_check.Group]:
    """The groups above, each before one that ends well."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    monkeypatch.setattr(gpu_check, "RESERVE", 2)
    names = [name for failure in FAILURES for name in (failure, f"after {failure}")]
    runs = {name: name if name in FAILURES else "first_row" for name in names}
    made = {name: gpu_check.Group(20, f"test_gpu_check {run}") for name, run in runs.items()}
    made["absent"] = gpu_check.Group(20, "test_gpu_check without_a_package", "no_such_package")
    monkeypatch.setattr(gpu_check, "GROUPS", made)
    return made


@no_gpu
@pytest.mark.long
def test_a_failure_costs_its_own_group_alone(
    tmp_path: Path, groups: dict[str, gpu_check.Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu_check.json"
    said = gpu_check.check(tmp_path, tmp_path, [], time.monotonic() + 3000)
    found = json.loads(out.read_text(encoding="utf-8"))
    states = {name: entry["state"] for name, entry in found["groups"].items()}
    assert list(states) == list(groups)
    for name, state in states.items():
        assert state.startswith(FAILURES.get(name, "ok")), (name, state)
        rows = [row["row"] for row in found["rows"] if row["group"] == name and row.get("match")]
        assert rows == {"leave_in_a_row": ["first", "third"], "absent": []}.get(name, ["first"])
    assert "Segmentation fault" in found["groups"]["segv"]["words"]
    assert "failure that was asked for" in found["groups"]["fail"]["words"]
    assert found["groups"]["absent"]["absent"] == ["no_such_package"]
    assert len(said) == len(FAILURES) + 1  # of the groups, and the row in which one was left

    monkeypatch.setattr(gpu_check, "run_once", None)
    gpu_check.check(tmp_path, tmp_path, [], time.monotonic() + 3000)  # no group is run again
    assert json.loads(out.read_text(encoding="utf-8")) == found


def test_a_group_without_time_goes_on_in_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[list[str]] = []

    def run_once(command: list[str], seconds: float) -> tuple[str, str]:
        context = gpu_timing.Context(Path(command[-2]))
        known.append(list(context.begun))
        if len(known) > 1:
            context.record(row=f"row {len(known)}", match=True)
        return "unfinished" if len(known) < 3 else "ok", ""

    monkeypatch.setattr(gpu_check, "run_once", run_once)
    monkeypatch.setattr(gpu_check, "GROUPS", {"slow": gpu_check.Group(100, "")})

    def check(*names: str) -> str:
        assert gpu_check.check(tmp_path, tmp_path, names, time.monotonic() + 3000) == []
        found = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
        return str(found["groups"]["slow"]["state"])

    assert check() == "unfinished" and known == [[]]
    assert check() == "ok" and known == [[], [], ["row 2"]]  # in a second process, as it got further
    assert check() == "ok" and len(known) == 3
    assert check("slow") == "ok" and known[3:] == [[]]  # anew


def test_groups_run_in_order_of_worth() -> None:
    """Correctness, CUDA graphs, managed memory, a step of an 8B model, crossovers, long timings."""
    order = ["basics", "passes", "paging", "step_8b", "products_few", "step_70b", "products_70b"]
    assert [name for name in gpu_check.GROUPS if name in order] == order
    assert max(group.seconds for group in gpu_check.GROUPS.values()) + gpu_check.RESERVE < 540  # of one run


@no_gpu
def test_without_a_gpu_the_script_says_so() -> None:
    done = subprocess.run(
        ["bash", "bench/gpu_check.sh"],
        cwd=ROOT,
        env={**os.environ, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "no NVIDIA GPU" in done.stdout
    for words, said in (([], "no NVIDIA GPU"), (["step_9b"], "no group is named step_9b")):
        command = [sys.executable, "bench/gpu_check.py", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr


def test_the_basics_reach_every_tile(request: pytest.FixtureRequest) -> None:
    """By the planner of the emulated module."""
    module = emulated.module_or_skip(request.config)
    plans = [
        module.plan_matmul((m, gpu_basics.N, gpu_basics.K, 8, 64, 1, forward, low, 80, 108, 0))
        for m, forward, low in itertools.product(gpu_basics.TOKENS[1:], (True, False), (False, True))
    ]
    assert {plan[1] for plan in plans if plan[0] in (1, 2)} >= {16, 32, 64, 128}
    assert 0 in {plan[0] for plan in plans}


def test_rows_that_were_begun_are_not_begun_again(tmp_path: Path) -> None:
    """But the row in which something was refused."""
    first = gpu_timing.Context(tmp_path / "group.jsonl")
    first.record(row="op m=1", error="the process ended in this row")
    first.drop("a rival", "it synchronizes")
    with pytest.raises(SystemExit):
        first.row(gpu_timing.Case("op", 2), lambda: sys.exit(gpu_timing.AGAIN))
    second = gpu_timing.Context(first.file)
    assert second.without == {"a rival"}
    for m in (1, 2):
        second.row(gpu_timing.Case("op", m), lambda: {"match": True})
    rows = gpu_timing.rows_of(gpu_timing.read(first.file))
    assert {name: "match" in row for name, row in rows.items()} == {"op m=1": False, "op m=2": True}
    with pytest.raises(SystemExit) as ended:
        gpu_timing.Context(first.file, -1.0).row(gpu_timing.Case("op", 3), lambda: {"match": True})
    assert ended.value.code == gpu_timing.AGAIN


def test_a_rival_that_no_graph_takes_is_left_out_from_then_on(
    context: gpu_timing.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(gpu_timing.Replay):
        def __init__(self, calls: Any, device: torch.device, capture: bool = True) -> None:
            super().__init__(calls, device)
            self.refused = str(calls[0]()) if capture else ""

    monkeypatch.setattr(gpu_timing, "Replay", Refusing)
    both, alone = {"ours": [lambda: ""], "rival": [lambda: "it synchronizes"]}, {"ours": [lambda: "it allocates"]}
    for calls in (both, alone):
        with pytest.raises(SystemExit):
            context.replays(calls)
        assert list(context.replays(calls)) == ["ours"]
    assert gpu_timing.Context(context.file).without == {"rival", "graphs"}


@no_gpu
def test_other_libraries_are_rivals_or_left_out(context: gpu_timing.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes multiplies, on the CPU here; one that fails and one that is not installed cost no row."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setitem(sys.modules, "marlin", ModuleType("marlin"))
    monkeypatch.setattr(gpu_products, "on_gpu", lambda: True)
    gpu_products.run(context, "few")
    rows = gpu_timing.rows_of(gpu_timing.read(context.file))
    assert all(row["match"] for row in rows.values())
    assert rows["forward m=16 n=96 k=256"]["relative_error"]["bitsandbytes"] < 1e-2
    assert "bitsandbytes" in rows["grad_input m=1 n=96 k=256"]["ours_over"]
    assert "marlin" in context.without
    assert set(gpu_check.of("absent", context.file)) == {"flute.integrations.base", "unsloth.kernels.utils"}


@no_gpu
def test_a_card_without_a_compiler_is_said_to_need_one(tmp_path: Path) -> None:
    """A card that no build here has kernels for; this one has no second to succeed."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 9.9\n", encoding="utf-8")
    tool.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tool.parent}:/usr/bin:/bin",
        "PYTHON": sys.executable,
        "GPU_CHECK_BUILD_SECONDS": "0.1",
    }
    env |= {"OUT": str(tmp_path), "GPU_CHECK_WORK": str(tmp_path / "work")}
    done = subprocess.run(["bash", "bench/gpu_check.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "build for sm_99" in done.stdout and "nothing to check" in done.stdout
    code = "import torch, sys; print(torch.__version__, sys.prefix)"
    inside = subprocess.run([tmp_path / "work/venv/bin/python", "-c", code], capture_output=True, text=True, check=True)
    assert inside.stdout.split() == [torch.__version__, str(tmp_path / "work" / "venv")]


def test_readings_of_a_card() -> None:
    lines = ["1980, 2619, 350.25, 61, 0x0000000000000001", "1755, 2619, [N/A], 64, 0x4", "17"]
    found = gpu_timing.clocks(lines)
    assert found["sm_mhz"] == [1867.5, 1755.0, 1980.0] and found["watts"] == [350.25] * 3
    assert found["celsius"][2] == 64 and found["throttle"] == "0x5"
    assert gpu_timing.clocks([]) == {}


# ---------------------------------------------------------------------------------------------------------------------
# The model and the page


def test_the_model_has_every_step_and_is_written() -> None:
    stored = gpu_model.MODEL.read_text(encoding="utf-8")
    assert gpu_model.text(stored) == stored, "run: python bench/gpu_model.py --write"
    assert list(gpu_page.predictions()) == [case.name for case in gpu_models.STEPS.values()]
    for name, times in gpu_page.predictions().items():
        assert all(value is None or value > 0 for value in times.values()), name


@pytest.mark.parametrize("name", gpu_model.CARDS)
def test_the_model_takes_the_kernels_that_are_planned(name: str, request: pytest.FixtureRequest) -> None:
    """Two steps, for every product of a step that fits into the card."""
    module, card = emulated.module_or_skip(request.config), gpu_model.CARDS[name]
    number = DTYPE_NUMBER[torch.float16]
    for case in (case for case in gpu_models.STEPS.values() if card.step(case)):
        for (n, k), is_forward in itertools.product(gpu_timing.linears(case.form), (True, False)):
            question = (case.m, n, k, case.r, 64, number, is_forward, False, int(card.arch), card.sms, 0)
            assert module.plan_matmul(question)[0] == _cuda_products.TWO_STEP, (case.name, n, k)


def test_predictions_respect_the_floors() -> None:
    """No step is faster than the operations of its products at the card's full rate, or than their bytes."""
    for case in gpu_models.STEPS.values():
        layers = gpu_timing.LLAMA[case.form]["num_hidden_layers"]
        weights = layers * sum(n * k for n, k in gpu_timing.linears(case.form))
        for name, milliseconds in gpu_page.predictions()[case.name].items():
            card = gpu_model.CARDS[name]
            least = max(3 * 0.5 * weights / card.gb_per_s / 1e6, 3 * 2e-9 * case.m * weights / card.tflops)
            assert milliseconds is None or milliseconds >= least, (case.name, name)


ROW = gpu_models.STEPS["8B"].name


def result_of(name: str, groups: dict[str, float], **more: Any) -> dict[str, Any]:
    """A result in which each group has one row of so many ms."""
    card = {"name": name, "torch": "2.11", "torch_cuda": "13.0"}
    rows = [{"group": group, "row": ROW, "match": True, "ms": {"ours": [ms, ms, ms]}} for group, ms in groups.items()]
    entries = {group: {"state": "ok", "words": ""} for group in groups}
    birth = {"commit": "ab" * 20, "changed": False, "date": "2026-12-02", "versions": {"torch": "2.11"}}
    return {"bench": "gpu_check", "birth": birth, "card": card, "ceilings": {}, "groups": entries, "rows": rows, **more}


def test_results_are_merged_by_group(tmp_path: Path) -> None:
    name = "NVIDIA H100 80GB HBM3"
    first = {**result_of(name, {})["birth"], "date": "2026-12-01"}  # the oldest of its groups
    both = [result_of(name, {"a": 1.0, "b": 2.0}), result_of(name, {"b": 3.0}, birth=first)]
    found = gpu_page.merged(both)
    assert found["birth"] == gpu_page.merged(both[::-1])["birth"] == first
    assert [(row["group"], row["ms"]["ours"][1]) for row in found["rows"]] == [("a", 1.0), ("b", 3.0)]
    assert gpu_page.slug(name) == "h100-80gb-hbm3"
    with pytest.raises(ValueError, match="merge one card's"):
        gpu_page.merged([result_of(name, {"a": 1.0}), result_of("Tesla T4", {"a": 1.0})])
    with pytest.raises(ValueError, match="dry run"):
        gpu_page.merged([result_of(name, {"a": 1.0}, dry_run=True)])


def test_the_page_shows_measured_over_predicted(tmp_path: Path) -> None:
    guess = gpu_page.predictions()[ROW]["H100"]
    assert guess is not None
    result = result_of("NVIDIA H100 80GB HBM3", {"few": 2 * guess})
    (tmp_path / "card.json").write_text(json.dumps(result), encoding="utf-8")
    text = gpu_page.lines(tmp_path)
    assert f"| {ROW} |" in text and "| 2.00 |" in text
    assert "more than 1.3 in 1 of 1 rows" in text and "Measured 2026-12-02, commit abababa, torch 2.11" in text
    page = gpu_page.PAGE.path.read_text(encoding="utf-8")
    assert gpu_page.PAGE.make(page, tmp_path).startswith("# What a GPU measured\n")


def test_what_no_card_has_measured_is_called_predicted_and_rivals_are_not(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes(gpu_model.MODEL.read_bytes())
    page = gpu_page.PAGE.make(gpu_page.PAGE.path.read_text(encoding="utf-8"), tmp_path)
    assert page.startswith("# Predicted, not measured\n")
    assert not [
        row for row in gpu_page.predictions() if row.startswith(tuple(f"{rival} step" for rival in gpu_models.RIVALS))
    ]


def test_the_page_is_of_the_results() -> None:
    done = subprocess.run([sys.executable, "bench/gpu_page.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_floor_is_the_longer_of_bytes_and_operations(context: gpu_timing.Context) -> None:
    context.measured = {"copy_gb_per_s": 1000.0, "mm_tflop_per_s": 100.0}
    assert context.floor(1e9) == pytest.approx(1e-3)
    assert context.floor(1e9, 1e12) == pytest.approx(1e-2)


def test_a_primitive_that_differs_is_named(sentence: Check) -> None:
    golden = {"mma": ["00000000"] * 128, "bf16": ["1"] * 32}
    assert gpu_basics.differences(golden, golden) == []
    other = {"mma": [*golden["mma"][:70], "00000001", *golden["mma"][71:]]}
    sentence("\n".join(gpu_basics.differences(golden, other)))


def test_a_nan_of_another_processor_is_no_difference() -> None:
    golden = {"arithmetic": ["ffc00000"] * 32, "rounding": ["ffc00000"] * 32}
    other = {"arithmetic": ["7fffffff"] * 32, "rounding": ["7fffffff"] * 32}
    (line,) = gpu_basics.differences(golden, other)
    assert line.startswith("rounding DIFFERS")
    infinite = {"arithmetic": ["ff800000"] * 32}
    assert len(gpu_basics.differences({"arithmetic": golden["arithmetic"]}, infinite)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The golden words, which the emulator wrote, are those of plain arithmetic


def words(name: str) -> list[list[int]]:
    """By lane."""
    flat = [int(word, 16) for word in gpu_basics.words_of(gpu_basics.GOLDEN.read_text(encoding="ascii"))[name]]
    return [flat[i : i + len(flat) // 32] for i in range(0, len(flat), len(flat) // 32)]


def as_float(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


@pytest.mark.parametrize("name", ["mma_m16n8k16_bf16", "mma_m16n8k16_fp16", "mma_m16n8k8_fp16"])
def test_golden_products(name: str) -> None:
    """Row and column of a lane's four sums as the PTX manual tabulates them, section 9.7.14.5."""
    depth, times = (8, 1) if "k8" in name else (16, 2)
    a = torch.tensor([[(3 * m + 5 * k) % 17 - 8 for k in range(depth)] for m in range(16)])
    b = torch.tensor([[(7 * k + 11 * n) % 13 - 6 for n in range(8)] for k in range(depth)])
    product = times * (a @ b)
    for lane, got in enumerate(words(name)):
        for i, word in enumerate(got):
            row, column = lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2
            start = 8 * row + column if depth == 16 else i + 1
            assert as_float(word) == start + int(product[row, column]), (lane, i)


@pytest.mark.parametrize("trans", [False, True])
def test_golden_ldmatrix(trans: bool) -> None:
    """Element (row, column) of matrix i is 64 i + 8 row + column."""
    for lane, got in enumerate(words("ldmatrix_trans" if trans else "ldmatrix")):
        for matrix, word in enumerate(got):
            g, t = lane // 4, lane % 4
            pair = [(2 * t + j, g) if trans else (g, 2 * t + j) for j in range(2)]
            low, high = (64 * matrix + 8 * row + column for row, column in pair)
            assert word == low | high << 16, (lane, matrix)


def test_golden_rounding() -> None:
    """Against torch's conversions; the inputs are those of the row `cp_async` copies."""
    inputs = [lane[:4] for lane in words("cp_async")]  # lane l holds the words of lane l + 1
    inputs = [inputs[-1], *inputs[:-1]]
    for lane, got in zip(inputs, words("rounding"), strict=True):
        values = torch.tensor([struct.unpack("<i", struct.pack("<I", w))[0] for w in lane], dtype=torch.int32)
        for first, dtype in ((0, torch.bfloat16), (2, torch.float16)):
            halves = values.view(torch.float32).to(dtype).view(torch.int16).tolist()
            packed = [(halves[2 * i] & 0xFFFF) | (halves[2 * i + 1] & 0xFFFF) << 16 for i in range(2)]
            assert got[first : first + 2] == packed
        for first, dtype in ((4, torch.float16), (8, torch.bfloat16)):
            back = values.view(torch.float32).to(dtype).float().view(torch.int32).tolist()
            assert got[first : first + 4] == [word & 0xFFFFFFFF for word in back]
