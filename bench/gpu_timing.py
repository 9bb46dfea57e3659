"""What the card can do, and the time of contenders on it: the basis of gpu_check.py's groups.

A contender is a list of calls, one a copy of its weight, replayed as a CUDA graph (replay.py): no launch is in its
time, and no call finds its weight in the L2 cache. Launches are counted and timed on the host apart from that.
Without a GPU (a dry run) the calls are timed by the clock.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from ceilings import Ceilings
from common import Bar, Seconds, interleaved, line, rounded
from replay import Call, Replay, copies, in_turns, l2_bytes

import qlora_native as qn

READ_BYTES, PRODUCT_SIZE = 1 << 30, 8192
HOST_CALLS = 100
HOST_SERIES = 5


class Case(NamedTuple):
    """One row of the truth table."""

    op: str
    m: int = 0  # tokens
    n: int = 0
    k: int = 0
    r: int = 0  # of the adapter
    form: str = ""  # what differs from the usual: "fp16", "bias", "plain scales", "8 bits", ...

    @property
    def name(self) -> str:
        """The row's name, here and in bench/results/model.json."""
        sizes = {"m": self.m, "n": self.n, "k": self.k, "r": self.r}
        return " ".join([self.op, *(f"{key}={size}" for key, size in sizes.items() if size), self.form]).strip()


def on_gpu() -> bool:
    """Whether this is the real thing."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where the operands stand."""
    return torch.device("cuda" if on_gpu() else "cpu")


def half() -> torch.dtype:
    """The 16-bit type whose products this card has: bf16 from compute capability 8.0 on, fp16 before."""
    return torch.bfloat16 if not on_gpu() or torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def copies_of(num_bytes: int) -> int:
    """How many operands of so many bytes to rotate over, so that none is found in the L2 cache; two in a dry run."""
    return copies(num_bytes, device()) if on_gpu() else 2


def wait() -> None:
    """Until the device has done what was launched."""
    if on_gpu():
        torch.cuda.synchronize()


def importable(name: str, context: Context) -> Any | None:
    """The module; None, and a note, where it cannot be imported, whatever the reason."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # binaries that do not fit fail in many ways
        context.note("absent", name if isinstance(error, ModuleNotFoundError) else f"{name}: {brief(error)}")
        return None


def brief(error: Exception) -> str:
    """Its class and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def of_floor(share: float) -> Bar:
    """At least this share of the floor."""
    return Bar("floor", round(1 / share, 4))


def interleaved_replays(contenders: Mapping[str, Sequence[Call]], context: Context) -> Seconds:
    """Samples of each contender, replayed in turns in a changing order.

    A failed capture can leave torch's allocator in capture, so the process ends with it, and the group goes on in
    another: without the rival that failed, or without graphs if it was ours.

    Raises:
        Restart: that has happened.
    """
    replays: dict[str, Replay] = {}
    for name, calls in contenders.items():
        try:
            replays[name] = Replay(calls, device(), capture="graphs" not in context.without)
            reason = replays[name].refused
        except Exception as error:
            if name.startswith("ours"):
                raise
            reason = brief(error)
        if reason:
            refused = "graphs" if name.startswith("ours") else name
            context.drop(refused, f"{name}: {reason}")
            raise Restart(refused)
    return in_turns(replays, context.rounds)


def interleaved_calls(calls: Mapping[str, Call], rounds: int) -> Seconds:
    """Samples of each call with its launches, called in turns; no graph is captured."""

    def whole(call: Call) -> None:
        call()
        wait()

    return interleaved({name: partial(whole, call) for name, call in calls.items()}, rounds)


def host_us(call: Call, calls: int = HOST_CALLS) -> float:
    """Microseconds of the host a call: the median over series, none of which waits for the device."""
    means = []
    for _ in range(HOST_SERIES):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        means.append(1e6 * (time.perf_counter() - started) / calls)
    wait()
    return rounded([median(means)])[0]


def launches(call: Call) -> int | None:
    """Kernels, copies and fills that a call launches; None where the profiler sees no device."""
    if not on_gpu():
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    wait()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            wait()
    except RuntimeError as error:  # a machine that does not give its counters away
        print(f"launches are not counted: {brief(error)}")
        return None
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events()) or None


def ceilings(rounds: int) -> Ceilings:
    """Rates by medians: a copy, bytes read plus bytes written, and a read-only pass (the better of a
    sum and a product with a vector), in GB/s; a large 16-bit product in TFLOP/s."""
    count, size = (READ_BYTES, PRODUCT_SIZE) if on_gpu() else (1 << 20, 256)
    source, target = (torch.zeros(count // 4, device=device()) for _ in range(2))
    matrix, vector = source.view(-1, 1 << 12), torch.ones(1 << 12, device=device())
    a, b = (torch.randn(size, size, device=device(), dtype=half()) for _ in range(2))
    product = torch.empty_like(a)
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "sum": source.sum,
        "mv": lambda: torch.mv(matrix, vector),
        "mm": lambda: torch.mm(a, b.t(), out=product),
    }
    seconds = in_turns({name: Replay([call], device()) for name, call in calls.items()}, rounds)
    least = {name: median(samples) for name, samples in seconds.items()}
    found = {
        "copy_gb_per_s": 2e-9 * count / least["copy"],
        "read_gb_per_s": 1e-9 * count / min(least["sum"], least["mv"]),
        "mm_tflop_per_s": 2e-12 * size**3 / least["mm"],
    }
    return {name: rounded([value])[0] for name, value in found.items()}


def floor(measured: Ceilings, num_bytes: float, flops: float = 0.0) -> float:
    """Seconds: the longer of moving the bytes at a copy's rate and doing the operations at the product's."""
    moving = num_bytes / measured["copy_gb_per_s"] / 1e9
    return max(moving, flops / measured["mm_tflop_per_s"] / 1e12)


def peak_bytes(call: Call) -> int | None:
    """What one call takes at most beyond what stands already; None in a dry run."""
    if not on_gpu():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def card() -> dict[str, Any]:
    """What the figures were measured on."""
    build = {key: value for key, value in qn.build_info().items() if key in ("version", "cuda_archs")}
    found: dict[str, Any] = {"torch": torch.__version__, "torch_cuda": torch.version.cuda, **build}
    if not on_gpu():
        return found | {"name": "dry run on a CPU"}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "memory_mib": properties.total_memory >> 20,
        "l2_mib": l2_bytes(device()) >> 20,
        "dtype": str(half()).removeprefix("torch."),
    }


class Restart(Exception):
    """The group has to go on in a new process."""


class Context:
    """What a group gets: ``row`` measures and records one row.

    The group's record is a file of JSON lines, which the process that starts it reads, and so does the group itself if
    it is started again after it died: rows that were begun are not begun again, nor are rivals used that were refused.
    """

    def __init__(self, file: Path, seconds: float, dry: bool) -> None:
        self.file, self.dry, self.rounds = file, dry, 2 if dry else 9
        self.deadline = time.monotonic() + seconds
        past = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        self.begun = {record["begun"] for record in past if "begun" in record}
        self.begun -= {record["again"] for record in past if "again" in record}
        self.without = {record["value"] for record in past if record.get("note") == "without"}
        self._measured: Ceilings | None = None

    @property
    def measured(self) -> Ceilings:
        """The ceilings, measured when they are first asked for: they change with the card's temperature."""
        if self._measured is None:
            self._measured = ceilings(self.rounds)
            self.note("ceilings", self._measured)
        return self._measured

    def record(self, made: dict[str, Any]) -> None:
        """Appends to the file, at once."""
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(made) + "\n")

    def note(self, key: str, value: Any) -> None:
        """Something that is no row: ``left_out``, ``without``, ``absent``, ``ceilings``, ``card``."""
        self.record({"note": key, "value": value})

    def drop(self, name: str, reason: str) -> None:
        """Does without a rival, or graphs, from here on."""
        self.without.add(name)
        self.note("without", name)
        self.note("left_out", f"{name}, from here on: {reason}")

    def row(self, case: Case, measure: Callable[[], dict[str, Any]]) -> None:
        """Measures one row. An exception costs this row, unless the device refuses from now on: that ends the process.
        When no time is left, that is recorded in its place."""
        if case.name in self.begun:
            return
        if time.monotonic() > self.deadline:
            self.note("left_out", f"{case.name}: no time left")
            return
        self.record({"begun": case.name})
        started = time.time()
        head: dict[str, Any] = {"row": case.name, "op": case.op}
        try:
            found = measure()
        except Restart:
            self.record({"again": case.name})
            raise
        except ModuleNotFoundError as error:
            self.record({"again": case.name})
            self.note("absent", str(error.name))
        except Exception as error:
            traceback.print_exc()
            head["error"] = brief(error)
            self.record(head)
            wait()  # raises where an illegal address has broken the device for this process
            if on_gpu():
                torch.cuda.empty_cache()
        else:
            self.record(head | found | {"at": [round(started, 2), round(time.time(), 2)]})
            print(line(head | found, "row") if "ms" in found else head | found, flush=True)
            fail_if_asked()


def fail_if_asked() -> None:
    """For tests: GPU_CHECK_FAIL=group:kind,... makes a group end in that way after its first row."""
    asked = dict(pair.split(":") for pair in os.environ.get("GPU_CHECK_FAIL", "").split(",") if pair)
    kind = asked.get(os.environ.get("GPU_CHECK_GROUP", ""))
    if kind == "segv":
        ctypes.string_at(0)
    elif kind == "exit":
        os._exit(3)
    elif kind == "hang":
        time.sleep(3600)
    elif kind == "raise":
        raise RuntimeError("a failure that was asked for")
