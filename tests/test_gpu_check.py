"""The check for machines with a GPU, as far as one without can run it; its golden words against plain arithmetic."""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
import replay
import torch
from gpu_timing import Case
from laws import ROOT
from sentences import Check

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


def rows_in(file: Path) -> dict[str, Any]:
    return gpu_timing.rows_of(gpu_timing.read(file))


@no_gpu
@pytest.mark.parametrize("name", gpu_check.GROUPS)
def test_every_row_of_a_group_has_a_match(name: str, context: gpu_timing.Context, one_thread: None) -> None:
    group = gpu_check.GROUPS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, **options: model)
        gpu_check.child(group.run, group.needs, str(context.file), "inf")
    rows = rows_in(context.file)
    assert [row for row in rows.values() if not row.get("match")] == []
    assert rows or gpu_check.of("absent", context.file)
    assert gpu_check.of("row", context.file) == [name for name in rows for _ in range(2)]  # begun, and ended


# ---------------------------------------------------------------------------------------------------------------------
# Groups and their records


def fails() -> Any:
    raise RuntimeError("a failure that was asked for")


# How a group ends behind its first row: the call, the state that is recorded, and what its last words have.
ENDS: dict[str, tuple[Callable[[], object], str, str]] = {
    "well": (lambda: None, "ok", ""),
    "segv": (lambda: ctypes.string_at(0), "ended by SIGSEGV", "Segmentation fault"),
    "leaves": (lambda: os._exit(3), "ended with status 3", ""),
    "fails": (fails, "ended with status 1", "failure that was asked for"),
    "hangs": (lambda: time.sleep(3600), "cut off", ""),
}


def end(context: gpu_timing.Context, how: str) -> None:
    context.row(Case("first"), lambda: {"match": True})
    ENDS[how][0]()


def leave_in_a_row(context: gpu_timing.Context) -> None:
    context.row(Case("first"), lambda: {"match": True})
    context.row(Case("second"), lambda: os._exit(3))
    context.row(Case("third"), lambda: {"match": True})


@no_gpu
@pytest.mark.long
def test_a_failure_costs_its_own_group_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group stands before one that ends well."""
    names = [name for how in ENDS for name in (how, f"after {how}")]
    groups = {name: gpu_check.Group(20, f"test_gpu_check end {name if name in ENDS else 'well'}") for name in names}
    groups["in a row"] = gpu_check.Group(20, "test_gpu_check leave_in_a_row")
    groups["absent"] = gpu_check.Group(20, "test_gpu_check end fails", "no_such_package")  # it is not run
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    monkeypatch.setattr(gpu_check, "RESERVE", 2)
    monkeypatch.setattr(gpu_check, "GROUPS", groups)
    out = tmp_path / "gpu_check.json"
    said = gpu_check.check(tmp_path, tmp_path, [], time.monotonic() + 3000)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["groups"]) == list(groups)
    expected = {"in a row": ("ended with status 3", "", ["first", "third"]), "absent": ("ok", "", [])}
    for name, entry in found["groups"].items():
        state, words, matched = expected.get(name, (*ENDS.get(name, ENDS["well"])[1:], ["first"]))
        assert entry["state"].startswith(state) and words in entry["words"], name
        assert [row["row"] for row in found["rows"] if row["group"] == name and row.get("match")] == matched, name
    assert found["groups"]["absent"]["absent"] == ["no_such_package"]
    assert len(said) == 6  # of the five groups that failed, and the row in which one was left

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


def test_every_group_fits_into_one_run() -> None:
    assert max(group.seconds for group in gpu_check.GROUPS.values()) + gpu_check.RESERVE < 540


def test_rows_that_were_begun_are_not_begun_again(tmp_path: Path) -> None:
    """But the row in which something was refused."""
    first = gpu_timing.Context(tmp_path / "group.jsonl")
    first.record(row="op m=1", error="the process ended in this row")
    first.drop("a rival", "it synchronizes")
    with pytest.raises(SystemExit):
        first.row(Case("op", 2), lambda: sys.exit(gpu_timing.AGAIN))
    second = gpu_timing.Context(first.file)
    assert second.without == {"a rival"}
    for m in (1, 2):
        second.row(Case("op", m), lambda: {"match": True})
    assert {name: "match" in row for name, row in rows_in(first.file).items()} == {"op m=1": False, "op m=2": True}
    with pytest.raises(SystemExit) as ended:
        gpu_timing.Context(first.file, -1.0).row(Case("op", 3), lambda: {"match": True})
    assert ended.value.code == gpu_timing.AGAIN


def test_a_row_that_hangs_leaves_half_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rows behind it; one that is alone may take all."""
    limits: list[Any] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: limits.append((seconds, exit)))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: limits.append("ended"))
    context = gpu_timing.Context(tmp_path / "group.jsonl", 100.0)
    context.row(Case("one of many"), lambda: {"match": True}, True)
    context.row(Case("fails"), fails, True)
    context.rows([Case("alone")], lambda case: {"match": True})
    assert limits == [(pytest.approx(50, abs=5), True), "ended"] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Without a GPU, or a compiler for it


def run_script(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@no_gpu
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("bash", "bench/gpu_check.sh"), "no NVIDIA GPU"),
        ((sys.executable, "bench/gpu_check.py"), "no NVIDIA GPU"),
        ((sys.executable, "bench/gpu_check.py", "step_9b"), "no group is named step_9b"),
    ],
    ids=["the script", "the program", "no such group"],
)
def test_what_cannot_be_run_is_said(command: tuple[str, ...], said: str) -> None:
    done = run_script(*command)
    assert done.returncode == 1 and said in done.stdout + done.stderr


@no_gpu
def test_a_card_without_a_compiler_is_said_to_need_one(tmp_path: Path) -> None:
    """A card that no build here has kernels for; this one has no second to succeed."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 9.9\n", encoding="utf-8")
    tool.chmod(0o755)
    places = {"PATH": f"{tool.parent}:/usr/bin:/bin", "OUT": str(tmp_path), "GPU_CHECK_WORK": str(tmp_path / "work")}
    done = run_script("bash", "bench/gpu_check.sh", PYTHON=sys.executable, GPU_CHECK_BUILD_SECONDS="0.1", **places)
    assert done.returncode == 1, done.stdout
    assert "build for sm_99" in done.stdout and "nothing to check" in done.stdout
    code = "import torch, sys; print(torch.__version__, sys.prefix)"
    inside = subprocess.run([tmp_path / "work/venv/bin/python", "-c", code], capture_output=True, text=True, check=True)
    assert inside.stdout.split() == [torch.__version__, str(tmp_path / "work" / "venv")]


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def test_copies_are_more_than_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "l2_bytes", lambda device: 50 << 20)
    for num_bytes in (1 << 20, 9 << 20, 60 << 20, 200 << 20):
        assert replay.copies(num_bytes, torch.device("cpu"), most=1000) * num_bytes > 2 * (50 << 20)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """What stands in for torch.cuda in the replays: 6 ms lie between its events."""
    made = MagicMock()
    made.Event.return_value.elapsed_time.return_value = 6.0
    for name in ("device", "stream", "current_stream", "synchronize", "Stream", "CUDAGraph", "Event", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def test_a_graph_is_replayed_between_two_events(cuda: MagicMock) -> None:
    call = MagicMock()
    made = replay.Replay([call, call], torch.device("cuda", 0))
    assert not made.refused and call.call_count == 2 + 2  # warmed up, captured
    cuda.reset_mock()
    assert made.seconds() == pytest.approx(3e-3), "of one call"
    asked = [name for name, *_ in cuda.mock_calls if name.endswith((".record", ".replay", ".synchronize"))]
    assert asked == ["Event().record", "CUDAGraph().replay", "Event().record", "Event().synchronize"]


def test_what_cannot_stand_in_a_graph_says_so(cuda: MagicMock) -> None:
    call = MagicMock(side_effect=[None, None, RuntimeError("not permitted\nand more"), None])
    made = replay.Replay([call], torch.device("cuda", 0))
    assert made.refused == "not permitted"
    assert made.seconds() == pytest.approx(6e-3) and call.call_count == 4 and not cuda.CUDAGraph().replay.called


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
    rows = rows_in(context.file)
    assert all(row["match"] for row in rows.values())
    assert rows["forward m=16 n=96 k=256"]["relative_error"]["bitsandbytes"] < 1e-2
    assert "bitsandbytes" in rows["grad_input m=1 n=96 k=256"]["ours_over"]
    assert "marlin" in context.without
    assert set(gpu_check.of("absent", context.file)) == {"flute.integrations.base", "unsloth.kernels.utils"}


def test_readings_of_a_card() -> None:
    lines = ["1980, 2619, 350.25, 61, 0x0000000000000001", "1755, 2619, [N/A], 64, 0x4", "17"]
    found = gpu_timing.clocks(lines)
    assert found["sm_mhz"] == [1867.5, 1755.0, 1980.0] and found["watts"] == [350.25] * 3
    assert found["celsius"][2] == 64 and found["throttle"] == "0x5"
    assert gpu_timing.clocks([]) == {}


def test_the_floor_is_the_longer_of_bytes_and_operations(context: gpu_timing.Context) -> None:
    context.measured = {"copy_gb_per_s": 1000.0, "mm_tflop_per_s": 100.0}
    assert context.floor(1e9) == pytest.approx(1e-3)
    assert context.floor(1e9, 1e12) == pytest.approx(1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# The model and the page


def test_the_basics_reach_every_tile(request: pytest.FixtureRequest) -> None:
    """By the planner of the emulated module."""
    module = emulated.module_or_skip(request.config)
    plans = [
        module.plan_matmul((m, gpu_basics.N, gpu_basics.K, 8, 64, 1, forward, low, 80, 108, 0))
        for m, forward, low in itertools.product(gpu_basics.TOKENS[1:], (True, False), (False, True))
    ]
    assert {plan[1] for plan in plans if plan[0] in (1, 2)} >= {16, 32, 64, 128}
    assert 0 in {plan[0] for plan in plans}


def test_the_written_model_has_every_step_and_respects_the_floors() -> None:
    """No step is faster than the operations of its products at the card's full rate, or than their bytes."""
    stored = gpu_model.MODEL.read_text(encoding="utf-8")
    assert gpu_model.text(stored) == stored, "run: python bench/gpu_model.py --write"
    assert list(gpu_page.predictions()) == [case.name for case in gpu_models.STEPS.values()]
    for case in gpu_models.STEPS.values():
        layers = gpu_timing.LLAMA[case.form]["num_hidden_layers"]
        weights = layers * sum(n * k for n, k in gpu_timing.linears(case.form))
        for name, milliseconds in gpu_page.predictions()[case.name].items():
            card = gpu_model.CARDS[name]
            least = max(3 * 0.5 * weights / card.gb_per_s / 1e6, 3 * 2e-9 * case.m * weights / card.tflops)
            assert milliseconds is None or milliseconds >= least, (case.name, name)
    for card in gpu_model.CARDS.values():  # a whole weight is decoded, and read by the GEMM
        assert card.product(1, 4096, 4096) >= (0.516 + 2 + 2) * 4096**2 / card.gb_per_s / 1e9


ROW, H100 = gpu_models.STEPS["8B"].name, "NVIDIA H100 80GB HBM3"


def result_of(name: str, groups: dict[str, float], **more: Any) -> dict[str, Any]:
    """A result in which each group has one row of so many ms."""
    card = {"name": name, "torch": "2.11", "torch_cuda": "13.0"}
    rows = [{"group": group, "row": ROW, "match": True, "ms": {"ours": [ms, ms, ms]}} for group, ms in groups.items()]
    entries = {group: {"state": "ok", "words": ""} for group in groups}
    birth = {"commit": "ab" * 20, "changed": False, "date": "2026-12-02", "versions": {"torch": "2.11"}}
    return {"bench": "gpu_check", "birth": birth, "card": card, "ceilings": {}, "groups": entries, "rows": rows, **more}


def test_results_are_merged_by_group() -> None:
    first = {**result_of(H100, {})["birth"], "date": "2026-12-01"}  # the oldest of its groups
    both = [result_of(H100, {"a": 1.0, "b": 2.0}), result_of(H100, {"b": 3.0}, birth=first)]
    found = gpu_page.merged(both)
    assert found["birth"] == gpu_page.merged(both[::-1])["birth"] == first
    assert [(row["group"], row["ms"]["ours"][1]) for row in found["rows"]] == [("a", 1.0), ("b", 3.0)]
    assert gpu_page.slug(H100) == "h100-80gb-hbm3"
    with pytest.raises(ValueError, match="merge one card's"):
        gpu_page.merged([result_of(H100, {"a": 1.0}), result_of("Tesla T4", {"a": 1.0})])


def test_the_page_is_called_predicted_until_it_shows_measured_over_predicted(tmp_path: Path) -> None:
    page = gpu_page.PAGE.path.read_text(encoding="utf-8")
    assert gpu_page.PAGE.make(page, tmp_path).startswith("# Predicted, not measured\n")
    guess = gpu_page.predictions()[ROW]["H100"]
    assert guess is not None
    (tmp_path / "card.json").write_text(json.dumps(result_of(H100, {"few": 2 * guess})), encoding="utf-8")
    text = gpu_page.PAGE.make(page, tmp_path)
    assert text.startswith("# What a GPU measured\n") and f"| {ROW} |" in text and "| 2.00 |" in text
    assert "more than 1.3 in 1 of 1 rows" in text and "Measured 2026-12-02, commit abababa, torch 2.11" in text


# ---------------------------------------------------------------------------------------------------------------------
# Primitives


def test_a_primitive_that_differs_is_named(sentence: Check) -> None:
    golden = {"mma": ["00000000"] * 128, "bf16": ["1"] * 32}
    assert gpu_basics.differences(golden, golden) == []
    other = {"mma": [*golden["mma"][:70], "00000001", *golden["mma"][71:]]}
    sentence("\n".join(gpu_basics.differences(golden, other)))


def test_a_nan_of_another_processor_is_no_difference() -> None:
    golden = {"arithmetic": ["ffc00000"] * 32, "rounding": ["ffc00000"] * 32}
    (line,) = gpu_basics.differences(golden, dict.fromkeys(golden, ["7fffffff"] * 32))
    assert line.startswith("rounding DIFFERS")
    infinite = {"arithmetic": ["ff800000"] * 32}
    assert len(gpu_basics.differences({"arithmetic": golden["arithmetic"]}, infinite)) == 1


# The golden words, which the emulator wrote, are those of plain arithmetic.


def words(name: str) -> torch.Tensor:
    """int64 [32 lanes, words]."""
    found = gpu_basics.words_of(gpu_basics.GOLDEN.read_text(encoding="ascii"))[name]
    return torch.tensor([int(word, 16) for word in found]).view(32, -1)


LANE = torch.arange(32)[:, None]


@pytest.mark.parametrize("name", ["mma_m16n8k16_bf16", "mma_m16n8k16_fp16", "mma_m16n8k8_fp16"])
def test_golden_products(name: str) -> None:
    """Row and column of a lane's four sums as the PTX manual tabulates them, section 9.7.14.5."""
    depth, times = (8, 1) if "k8" in name else (16, 2)
    m, n, k, i = torch.arange(16), torch.arange(8), torch.arange(depth), torch.arange(4)
    product = times * (((3 * m[:, None] + 5 * k) % 17 - 8) @ ((7 * k[:, None] + 11 * n) % 13 - 6))
    row, column = LANE // 4 + 8 * (i // 2), 2 * (LANE % 4) + i % 2
    start = 8 * row + column if depth == 16 else i + 1
    assert torch.equal(words(name).int().view(torch.float32), (start + product[row, column]).float())


@pytest.mark.parametrize("trans", [False, True])
def test_golden_ldmatrix(trans: bool) -> None:
    """Element (row, column) of matrix i is 64 i + 8 row + column."""
    matrix, g, t = torch.arange(4), LANE // 4, LANE % 4
    low, high = (64 * matrix + (8 * (2 * t + j) + g if trans else 8 * g + 2 * t + j) for j in range(2))
    assert torch.equal(words("ldmatrix_trans" if trans else "ldmatrix"), low | high << 16)


def test_golden_rounding() -> None:
    """Against torch's conversions; the inputs are those of the row `cp_async` copies."""
    inputs = words("cp_async")[:, :4].roll(1, 0).int()  # lane l holds the words of lane l + 1
    got = words("rounding").int()
    for first, dtype in ((0, torch.bfloat16), (2, torch.float16)):
        packed = inputs.view(torch.float32).to(dtype).view(torch.int32)
        assert torch.equal(got[:, first : first + 2], packed)
    for first, dtype in ((4, torch.float16), (8, torch.bfloat16)):
        back = inputs.view(torch.float32).to(dtype).float().view(torch.int32)
        assert torch.equal(got[:, first : first + 4], back)
