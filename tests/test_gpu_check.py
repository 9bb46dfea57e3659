"""The check for machines with a GPU, as far as one without can run it; its golden words against plain arithmetic."""

from __future__ import annotations

import itertools
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import emulated
import gpu_basics
import gpu_check
import gpu_model
import gpu_models
import gpu_page
import gpu_primitives
import gpu_products
import gpu_timing
import pytest
import torch
from laws import ROOT
from sentences import Check

from qlora_native._native import DTYPE_NUMBER

GOLDEN = ROOT / "tests" / "golden" / "cuda_primitives.txt"
PYTHON_GROUPS = [group.name for group in gpu_check.GROUPS if not group.is_bash]
# How a group can end, and what is recorded of it.
KINDS = {"segv": "ended by SIGSEGV", "exit": "ended with status 3", "raise": "ended with status 1", "hang": "cut off"}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: bench/gpu_check.sh measures on it")


def folder_of_emulator(config: pytest.Config) -> list[str]:
    """Options for the emulated kernels, if they are built; else the CPU's ops are run."""
    folder = config.getoption("--emulated") or str(ROOT / "build" / "emulated")
    return ["--emulated", folder] if emulated.load(folder) else []


def checked(out: Path, words: list[str], fail: str = "") -> tuple[int, dict[str, Any], str]:
    """A dry run of some groups: its exit status, its result, and what it printed."""
    env = {
        **os.environ,
        "OUT": str(out),
        "GPU_CHECK_WORK": str(out / "work"),
        "PYTHON": sys.executable,
        "GPU_CHECK_FAIL": fail,
    }
    done = subprocess.run(
        ["bash", "bench/gpu_check.sh", "--dry-run", *words],
        cwd=ROOT,
        env=env | {"GPU_CHECK_SECONDS": "3000"},
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads((out / "gpu_check.json").read_text(encoding="utf-8")), done.stdout


@pytest.fixture
def context(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What a group gets in a dry run, with the emulated kernels if they are built."""
    monkeypatch.setenv("GPU_CHECK_GROUP", "none")
    with ExitStack() as stack:
        options = folder_of_emulator(request.config)
        if options:
            stack.enter_context(emulated.kernels(emulated.module_or_skip(request.config), monkeypatch))
        yield gpu_timing.Context(tmp_path / "group.jsonl", 1000.0, dry=True)


@no_gpu
@pytest.mark.parametrize("name", PYTHON_GROUPS)
def test_every_row_of_a_group_has_a_match(name: str, context: gpu_timing.Context, one_thread: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, **options: model)
        gpu_check.run_python(gpu_check.BY_NAME[name], context)
    records = gpu_check.read(context.file)
    rows = [record for record in records if "row" in record]
    assert [row for row in rows if "error" in row or not row["match"]] == []
    absent = [record["value"] for record in records if record.get("note") == "absent"]
    assert rows or absent
    assert [record["begun"] for record in records if "begun" in record] == [row["row"] for row in rows]


@no_gpu
@pytest.mark.long
def test_a_failure_costs_its_own_group_alone(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fail = {"norms": "segv", "host": "raise", "paging": "exit", "loss": "hang"}
    words = ["host", "norms", "loss", "paging", "passes", "--limit", "loss=12", *folder_of_emulator(request.config)]
    status, found, printed = checked(tmp_path, words, ",".join(f"{name}:{kind}" for name, kind in fail.items()))
    assert status == 1 and "5 groups" in printed
    states = {name: entry["state"] for name, entry in found["groups"].items()}
    assert states.pop("passes") == "ok"
    assert states.keys() == fail.keys()
    for name, kind in fail.items():
        assert states[name].startswith(KINDS[kind]), (name, states[name])
        rows = [row for row in found["rows"] if row["group"] == name]
        # Each process records a row before it fails; all but a group that hangs are started twice again.
        assert kind == "hang" or sum("error" not in row for row in rows) == min(3, len(rows))
    assert "Segmentation fault" in found["groups"]["norms"]["words"]
    assert "failure that was asked for" in found["groups"]["host"]["words"]


@no_gpu
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_other_group_fails(kind: str, first: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--gpu-check-failures"):
        pytest.skip("--gpu-check-failures was not given; .ci/full gives it")
    failing = PYTHON_GROUPS[first::2]
    limits = ["--limit", ",".join(f"{name}=30" for name in failing)] if kind == "hang" else []
    words = [*PYTHON_GROUPS, *limits, *folder_of_emulator(request.config)]
    _, found, printed = checked(tmp_path, words, ",".join(f"{name}:{kind}" for name in failing))
    states = {name: entry["state"] for name, entry in found["groups"].items()}
    assert list(states) == PYTHON_GROUPS
    for name, state in states.items():
        missing = "absent" in found["groups"][name]
        wanted = KINDS[kind] if name in failing and not missing else "ok"
        assert state.startswith(wanted), (name, state, printed[-3000:])


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
    done = subprocess.run([sys.executable, "bench/gpu_check.py", "part", "9"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "group or part is named 9" in done.stderr


def test_parts_fit_nine_minutes_with_a_build() -> None:
    for part, groups in itertools.groupby(gpu_check.GROUPS, key=lambda group: group.part):
        seconds = sum(group.seconds for group in groups)
        assert seconds <= gpu_check.PART_SECONDS, part


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
    file = tmp_path / "group.jsonl"
    first = gpu_timing.Context(file, 100.0, dry=True)
    first.record({"begun": "op m=1"})
    first.note("without", "a rival")
    with pytest.raises(gpu_timing.Restart):
        first.row(gpu_timing.Case("op", 2), lambda: refuse("another"))
    second = gpu_timing.Context(file, 100.0, dry=True)
    assert second.without == {"a rival"}
    for m in (1, 2):
        second.row(gpu_timing.Case("op", m), lambda: {"match": True})
    assert [record["row"] for record in gpu_check.read(file) if "row" in record] == ["op m=2"]


def refuse(name: str) -> dict[str, Any]:
    raise gpu_timing.Restart(name)


def test_a_rival_that_no_graph_takes_is_left_out_from_then_on(
    context: gpu_timing.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(gpu_timing.Replay):
        def __init__(self, calls: Any, device: torch.device, capture: bool = True) -> None:
            super().__init__(calls, device)
            self.refused = str(calls[0]()) if capture else ""

    monkeypatch.setattr(gpu_timing, "Replay", Refusing)
    calls = {"ours": [lambda: ""], "rival": [lambda: "it synchronizes"]}
    with pytest.raises(gpu_timing.Restart, match="rival"):
        gpu_timing.interleaved_replays(calls, context)
    with pytest.raises(gpu_timing.Restart, match="graphs"):
        gpu_timing.interleaved_replays({"ours": [lambda: "it allocates"]}, context)
    again = gpu_timing.Context(context.file, 100.0, dry=True)
    assert again.without == {"rival", "graphs"}
    assert list(gpu_timing.interleaved_replays({"ours": [lambda: "it allocates"]}, again)) == ["ours"]


@no_gpu
def test_other_libraries_are_rivals_or_left_out(context: gpu_timing.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes multiplies, on the CPU here; one that fails and one that is not installed cost no row."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setitem(sys.modules, "marlin", ModuleType("marlin"))
    monkeypatch.setattr(gpu_products, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu_products, "TINY", ((128, 128),))
    gpu_products.run(context, "few")
    records = gpu_check.read(context.file)
    rows = {row["row"]: row for row in records if "row" in row}
    assert all(row["match"] for row in rows.values())
    assert rows["forward m=16 n=128 k=128"]["relative_error"]["bitsandbytes"] < 1e-2
    assert "bitsandbytes" in rows["grad_input m=1 n=128 k=128"]["ours_over"]
    assert "marlin" in context.without
    absent = {record["value"] for record in records if record.get("note") == "absent"}
    assert absent == {"flute.integrations.base", "unsloth.kernels.utils"}


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
    text = "2026/11/27 10:00:00.500, 1980, 2619, 350.25, 61, 0x0000000000000001\n"
    text += "2026/11/27 10:00:01.000, 1755, 2619, [N/A], 64, 0x4\n2026"
    samples = gpu_check.readings(text)
    assert [round(moment - samples[0][0], 3) for moment, _ in samples] == [0.0, 0.5]
    found = gpu_check.summary(samples, samples[0][0], samples[1][0])
    assert found["sm_mhz"] == [1867.5, 1755.0, 1980.0] and found["watts"] == [350.25] * 3
    assert found["celsius"][2] == 64 and found["throttle"] == "0x5"
    assert gpu_check.summary(samples, 0, 1) == {}


# ---------------------------------------------------------------------------------------------------------------------
# The model and the page


def test_the_model_has_every_row_and_is_written() -> None:
    stored = gpu_model.MODEL.read_text(encoding="utf-8")
    assert gpu_model.text(stored) == stored, "run: python bench/gpu_model.py --write"
    for name, times in gpu_page.predictions().items():
        assert all(value is None or value > 0 for value in times.values()), name
        assert name.endswith(gpu_page.MODELS) or None not in times.values()


@pytest.mark.parametrize("name", gpu_model.CARDS)
def test_the_model_takes_the_kernels_that_are_planned(name: str, request: pytest.FixtureRequest) -> None:
    module, card = emulated.module_or_skip(request.config), gpu_model.CARDS[name]
    model = gpu_model.Model(card, {})
    ways = ["small", "tile", "tile", "two_step"]  # of MatmulKind
    for case in gpu_model.every_case():
        if case.op in gpu_products.DIRECTIONS:
            is_forward = case.op.endswith("forward")
            number = DTYPE_NUMBER[torch.float16]
            question = (case.m, case.n, case.k, case.r, 64, number, is_forward, False, int(card.arch), card.sms, 0)
            way: Any = model.way(case.m, is_forward)
            assert getattr(way, "func", way).__name__ == ways[module.plan_matmul(question)[0]], case.name


def test_predictions_respect_the_floors() -> None:
    """No product is faster than its bytes or its operations at the card's full rates."""
    for case in gpu_model.every_case():
        if case.op not in ("forward", "grad_input"):
            continue
        times = gpu_page.predictions()[case.name]
        for name, card in gpu_model.CARDS.items():
            least = max(0.5 * case.n * case.k / card.gb_per_s / 1e6, 2e-9 * case.m * case.n * case.k / card.tflops)
            assert (times[name] or 0) >= least, (case.name, name)


def result_of(name: str, groups: dict[str, float], **more: Any) -> dict[str, Any]:
    """A result in which each group has one row of so many ms."""
    card = {"name": name, "torch": "2.11", "torch_cuda": "13.0"}
    rows = [
        {"group": group, "row": "forward m=1 n=4096 k=4096", "match": True, "ms": {"ours": [ms, ms, ms]}}
        for group, ms in groups.items()
    ]
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
    guess = gpu_page.predictions()["forward m=1 n=4096 k=4096"]["H100"]
    assert guess is not None
    result = result_of("NVIDIA H100 80GB HBM3", {"few": 2 * guess})
    (tmp_path / "card.json").write_text(json.dumps(result), encoding="utf-8")
    text = gpu_page.lines(tmp_path)
    assert "| forward m=1 n=4096 k=4096 |" in text and "| 2.00 |" in text
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


def test_the_floor_is_the_longer_of_bytes_and_operations() -> None:
    measured = {"copy_gb_per_s": 1000.0, "mm_tflop_per_s": 100.0}
    assert gpu_timing.floor(measured, 1e9) == pytest.approx(1e-3)
    assert gpu_timing.floor(measured, 1e9, 1e12) == pytest.approx(1e-2)


def test_a_primitive_that_differs_is_named(sentence: Check) -> None:
    golden = {"mma": ["00000000"] * 128, "bf16": ["1"] * 32}
    assert gpu_primitives.differences(golden, golden) == []
    other = {"mma": [*golden["mma"][:70], "00000001", *golden["mma"][71:]]}
    sentence("\n".join(gpu_primitives.differences(golden, other)))


def test_a_nan_of_another_processor_is_no_difference() -> None:
    golden = {"arithmetic": ["ffc00000"] * 32, "rounding": ["ffc00000"] * 32}
    other = {"arithmetic": ["7fffffff"] * 32, "rounding": ["7fffffff"] * 32}
    (line,) = gpu_primitives.differences(golden, other)
    assert line.startswith("rounding DIFFERS")
    infinite = {"arithmetic": ["ff800000"] * 32}
    assert len(gpu_primitives.differences({"arithmetic": golden["arithmetic"]}, infinite)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The golden words, which the emulator wrote, are those of plain arithmetic


def words(name: str) -> list[list[int]]:
    """By lane."""
    flat = [int(word, 16) for word in gpu_primitives.read(str(GOLDEN))[name]]
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
