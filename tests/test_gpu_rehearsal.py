"""The first minutes with a card, rehearsed: groups of bench/gpu_check.py as processes over the emulator, on a stand-in
device that fails in each way that CUDA and torch document."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import emulated
import gpu_basics
import gpu_check
import gpu_passes
import gpu_timing
import pytest
import torch
from laws import ROOT

from qlora_native.ops import _cuda_products

ILLEGAL = "CUDA error: an illegal memory access was encountered"
Patch = pytest.MonkeyPatch


def raising(error: Exception) -> Callable[..., Any]:
    return MagicMock(side_effect=error)


def out_of_memory(patch: Patch, context: gpu_timing.Context, device: emulated.Emulator) -> None:
    """Once, in a product."""
    product, error = _cuda_products.Cuda.product, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    calls = iter((raising(error),))
    patch.setattr(_cuda_products.Cuda, "product", lambda *given: next(calls, product)(*given))


def illegal_address(patch: Patch, context: gpu_timing.Context, device: emulated.Emulator) -> None:
    """In the row of the loss, and from then on in all that the process does with the device."""

    def broken() -> bool:
        for module in (gpu_timing, gpu_basics):
            patch.setattr(module, "wait", raising(RuntimeError(ILLEGAL)))
        raise RuntimeError(ILLEGAL)

    patch.setattr(gpu_basics, "loss", broken)


def hang(patch: Patch, context: gpu_timing.Context, device: emulated.Emulator) -> None:
    patch.setattr(gpu_basics, "norms", lambda: time.sleep(3600))


def capture_refused(patch: Patch, context: gpu_timing.Context, device: emulated.Emulator) -> None:
    """In the first row of the process that begins the group."""

    class Refusing(gpu_timing.Replay):
        def __init__(self, calls: Any, place: torch.device, capture: bool = True) -> None:
            super().__init__(calls, place)
            if capture and not context.begun and "graphs" not in context.without:
                self.refused = "operation not permitted when stream is capturing"

    for module in (gpu_timing, gpu_basics):
        patch.setattr(module, "Replay", Refusing)


def managed_refused(patch: Patch, context: gpu_timing.Context, device: emulated.Emulator) -> None:
    """concurrentManagedAccess is 0, as on Windows, WSL2 and Tegra."""
    device.module.set_memory(1 << 30, False)


def no_compiler(patch: Patch, context: gpu_timing.Context, device: emulated.Emulator) -> None:
    patch.setattr(gpu_basics, "on_gpu", lambda: True)
    patch.setattr(shutil, "which", lambda name, path: None)


class Way(NamedTuple):
    """A group, the row that fails, if one does, with words of its error and of how the group ended."""

    fails: Callable[..., None]
    group: str
    row: str = ""
    error: str = ""
    state: str = "ok"
    words: str = ""


DIED = "the process ended in this row"
WAYS = {
    "basics_memory": Way(out_of_memory, "gpu_basics run", "basics loss", "OutOfMemoryError"),
    "basics_address": Way(illegal_address, "gpu_basics run", "basics loss", ILLEGAL, "ended with status 1", ILLEGAL),
    "basics_hang": Way(hang, "gpu_basics run", "basics norms", DIED, "ended with status 1", "Timeout ("),
    "capture": Way(capture_refused, "gpu_basics run_capture", "capture decode", "not permitted"),
    "passes": Way(capture_refused, "gpu_passes run passes"),  # timed without graphs
    "paging": Way(managed_refused, "gpu_passes run paging"),  # from pinned memory
    "primitives": Way(no_compiler, "gpu_basics run_primitives"),
    "crossovers": Way(lambda *_: None, "gpu_products run crossovers"),
}


def stand_in(context: gpu_timing.Context, name: str, module: str, function: str, *arguments: str) -> None:
    """A group, in its process, on a device that fails."""
    made = emulated.load(os.environ["EMULATED"])
    assert made is not None
    with Patch.context() as patch:
        for stream in ("Stream", "current_stream", "stream"):
            patch.setattr(torch.cuda, stream, MagicMock())
        with emulated.kernels(made, patch) as device:
            WAYS[name].fails(patch, context, device)
            getattr(importlib.import_module(module), function)(context, *arguments)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: bench/gpu_check.sh measures on it")
def test_no_failure_of_a_device_costs_more_than_its_row(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: Patch
) -> None:
    emulated.module_or_skip(request.config)
    monkeypatch.setenv("EMULATED", request.config.getoption("--emulated") or str(ROOT / "build" / "emulated"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    groups = {
        name: gpu_check.Group(90, f"test_gpu_rehearsal stand_in {name} {way.group}") for name, way in WAYS.items()
    }
    groups["basics_hang"] = groups["basics_hang"]._replace(seconds=40)
    monkeypatch.setattr(gpu_check, "GROUPS", groups)
    said = gpu_check.check(tmp_path, tmp_path, [], time.monotonic() + 3000)
    found = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    rows = {name: [row for row in found["rows"] if row["group"] == name] for name in groups}
    for name, way in WAYS.items():
        ended = found["groups"][name]
        assert (ended["state"], way.words in ended["words"]) == (way.state, True), ended
        failed = [row for row in rows[name] if not row.get("match")]
        assert [row["row"] for row in failed] == [way.row] * bool(way.row), name
        assert all(way.error in row["error"] for row in failed)
        assert len(rows[name]) > len(failed) or name == "primitives"
        if name.startswith("basics"):
            assert {row["row"] for row in rows[name]} == {row["row"] for row in rows["basics_memory"]}
    assert "graphs, from here on" in found["groups"]["passes"]["left_out"][0]
    assert [row["store"] for row in rows["paging"]] == ["DevicePages"]
    assert found["groups"]["primitives"]["absent"] == ["nvcc"]
    assert len(said) == sum(bool(way.row) + (way.state != "ok") for way in WAYS.values())


def test_what_is_worth_most_comes_first_and_fits() -> None:
    """Within the first ten minutes, with two and a half for the build; of managed memory at most 256 MiB."""
    first = ["basics", "capture", "paging", "step_8b", "crossovers"]
    assert list(gpu_check.GROUPS)[: len(first)] == first
    assert sum(gpu_check.GROUPS[name].seconds for name in first) + 150 <= 540
    assert gpu_passes.STATE_BYTES <= 256 << 20
