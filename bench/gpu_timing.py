"""What the card can do, and the time of contenders on it: the basis of gpu_check.py's groups.

A contender is a list of calls, one a copy of its weight, replayed as a CUDA graph (replay.py): no launch is in its
time, and no call finds its weight in the L2 cache. Launches are counted and timed on the host apart from that.
Without a GPU (a dry run) shapes are tiny, and calls are timed by the clock.
"""

from __future__ import annotations

import csv
import faulthandler
import importlib
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial, reduce
from operator import or_
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from ceilings import Ceilings
from common import Seconds, interleaved, line
from replay import Call, Replay, in_turns, l2_bytes

import qlora_native as qn

AGAIN = 75  # exit status of a process whose group is to go on in another
SENSORS = ("sm_mhz", "memory_mhz", "watts", "celsius", "throttle")  # as gpu_check.sh has nvidia-smi read them
VOCABULARY = 128256
LLAMA: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4},
}

Row = dict[str, Any]


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

    def tiny(self) -> Case:
        """What stands for it in a dry run."""
        return self._replace(m=min(self.m, 40), n=min(self.n, 96), k=min(self.k, 256))


def on_gpu() -> bool:
    """Whether this is no dry run."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where the operands stand."""
    return torch.device("cuda" if on_gpu() else "cpu")


def half() -> torch.dtype:
    """The 16-bit type whose products this card has: bf16 from compute capability 8.0 on, fp16 before."""
    return torch.bfloat16 if not on_gpu() or torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def wait() -> None:
    """Until the device has done what was launched."""
    if on_gpu():
        torch.cuda.synchronize()


def brief(error: Exception) -> str:
    """Its class and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def linears(name: str) -> list[tuple[int, int]]:
    """The weights [n, k] of a layer: q, o, gate, up, down, k, v; 8 heads of keys."""
    shape = LLAMA[name]
    width, hidden = shape["hidden_size"], shape["intermediate_size"]
    keys = 8 * width // shape["num_attention_heads"]
    return [(width, width)] * 2 + [(hidden, width)] * 2 + [(width, hidden)] + [(keys, width)] * 2


def made_up(n: int, k: int, quant_type: str = "nf4") -> qn.QuantizedWeight:
    """A weight [n, k] of random codes, with scales of the size that trained weights have; of a GGUF format one of bytes
    so small that no scale is infinite."""
    w = qn.QuantizedWeight.empty((n, k), dtype=half(), quant_type=quant_type, device=device())
    if w.nested_absmax is None or w.nested_offset is None:
        w.packed.random_(0, 0x3C)
        if quant_type == "mxfp4":
            w.packed.view(-1, 17)[:, 0] = 120  # 2^-8, where a byte of exponent is the scale
        return w
    w.packed.random_(0, 256)
    w.absmax.random_(0, 256)
    w.nested_absmax.fill_(0.2 / k**0.5)
    w.nested_offset.fill_(1.0 / k**0.5)
    return w


def peak_bytes(call: Call) -> int | None:
    """What one call takes at most beyond what stands already; None in a dry run."""
    if not on_gpu():
        return None
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    wait()
    return torch.cuda.max_memory_allocated() - before


def card() -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {"name": "dry run on a CPU", "torch": torch.__version__, "torch_cuda": torch.version.cuda}
    found |= {key: value for key, value in qn.build_info().items() if key in ("version", "cuda_archs")}
    if on_gpu():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "sm_count": properties.multi_processor_count,
            "memory_mib": properties.total_memory >> 20,
            "l2_mib": l2_bytes(device()) >> 20,
            "dtype": str(half()).removeprefix("torch."),
        }
    return found


def text_of(file: Path) -> list[str]:
    """Its lines; none if it is not there."""
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def clocks(lines: Sequence[str]) -> dict[str, Any]:
    """Median, least and largest reading of each sensor, by nvidia-smi; of the reasons for lower clocks all, as a bit
    mask. A line that is not whole is left out."""
    whole = [cells for cells in csv.reader(lines, skipinitialspace=True) if len(cells) == len(SENSORS)]
    found: dict[str, Any] = {}
    for name, *texts in zip(SENSORS, *whole, strict=True):
        masks = [int(text, 16) for text in texts if text.startswith("0x")]
        numbers = [float(text) for text in texts if text.replace(".", "", 1).isdigit()]
        if masks:
            found[name] = hex(reduce(or_, masks))
        elif numbers:
            found[name] = [median(numbers), min(numbers), max(numbers)]
    return found


def read(file: Path) -> list[Row]:
    """The lines of a group's record; one that a crash cut off is left out."""
    return [json.loads(text) for text in text_of(file) if text.endswith("}")]


def rows_of(records: Iterable[Row]) -> dict[str, Row]:
    """By name, each as its last record has it; one of nothing but a name was not measured."""
    found = {record["row"]: record for record in records if "row" in record}
    return {name: row for name, row in found.items() if len(row) > 1}


class Context:
    """What a group gets, to measure and record rows.

    Its record is a file of JSON lines, by which a group goes on that ended early: rows that were begun are not begun
    again, nor are rivals used that were refused.
    """

    def __init__(self, file: Path, seconds: float = math.inf) -> None:
        self.file, self.rounds = file, 9 if on_gpu() else 2
        self.sensors = file.with_name("sensors.csv")
        self.deadline = time.monotonic() + seconds
        self.begun = rows_of(read(file)).keys()
        self.without = {record["without"] for record in read(file) if "without" in record}

    @cached_property
    def measured(self) -> Ceilings:
        """Rates by medians, measured when they are first asked for, as they change with the card's temperature: of a
        copy, bytes read plus bytes written, and of a read-only pass (the better of a sum and a product with a vector),
        in GB/s; of a large 16-bit product in TFLOP/s."""
        count, size = (1 << 30, 8192) if on_gpu() else (1 << 20, 256)
        source, target = (torch.zeros(count // 4, device=device()) for _ in range(2))
        matrix, vector = source.view(-1, 1 << 12), torch.ones(1 << 12, device=device())
        a, b = (torch.randn(size, size, device=device(), dtype=half()) for _ in range(2))
        product = torch.empty_like(a)
        calls: dict[str, Sequence[Call]] = {
            "copy": [lambda: target.copy_(source)],
            "sum": [source.sum],
            "mv": [lambda: torch.mv(matrix, vector)],
            "mm": [lambda: torch.mm(a, b.t(), out=product)],
        }
        samples = in_turns({name: Replay(call, device()) for name, call in calls.items()}, self.rounds)
        seconds = {name: median(values) for name, values in samples.items()}
        found = {
            "copy_gb_per_s": 2e-9 * count / seconds["copy"],
            "read_gb_per_s": 1e-9 * count / min(seconds["sum"], seconds["mv"]),
            "mm_tflop_per_s": 2e-12 * size**3 / seconds["mm"],
        }
        self.record(ceilings=found)
        return found

    def floor(self, num_bytes: float, flops: float = 0.0) -> float:
        """Seconds: the longer of moving the bytes at a copy's rate and doing the operations at the product's."""
        moving = num_bytes / self.measured["copy_gb_per_s"] / 1e9
        return max(moving, flops / self.measured["mm_tflop_per_s"] / 1e12)

    def record(self, **made: Any) -> None:
        """Appends to the file, at once: a ``row``, or ``left_out``, ``without``, ``absent``, ``ceilings``, ``card``."""
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(made) + "\n")

    def drop(self, name: str, reason: str) -> None:
        """Does without a rival, or graphs, from here on."""
        self.without.add(name)
        self.record(without=name, left_out=f"{name}, from here on: {reason}")

    def importable(self, name: str) -> Any | None:
        """The module; None, and a record, where it cannot be imported, whatever the reason."""
        try:
            return importlib.import_module(name)
        except Exception as error:  # binaries that do not fit fail in many ways
            self.record(absent=name if isinstance(error, ModuleNotFoundError) else f"{name}: {brief(error)}")
            return None

    def replays(self, contenders: Mapping[str, Sequence[Call]]) -> Seconds:
        """Samples of each contender, replayed in turns in a changing order.

        A failed capture can leave torch's allocator in capture, so the process ends with it, and the group goes on in
        another: without the rival that failed, or without graphs if it was ours.
        """
        replays: dict[str, Replay] = {}
        for name in (name for name in contenders if name not in self.without):
            is_ours = name.startswith("ours")
            try:
                replays[name] = Replay(contenders[name], device(), capture="graphs" not in self.without)
                reason = replays[name].refused
            except Exception as error:
                if is_ours:
                    raise
                reason = brief(error)
            if reason:
                self.drop("graphs" if is_ours else name, f"{name}: {reason}")
                raise SystemExit(AGAIN)
        return in_turns(replays, self.rounds)

    def calls(self, calls: Mapping[str, Call]) -> Seconds:
        """Samples of each call with its launches, called in turns; no graph is captured."""

        def whole(call: Call) -> None:
            call()
            wait()

        return interleaved({name: partial(whole, call) for name, call in calls.items()}, self.rounds)

    def rows(self, cases: Iterable[Case], measure: Callable[[Case], Row]) -> None:
        """Measures a row for each case."""
        several = list(cases if on_gpu() else dict.fromkeys(case.tiny() for case in cases))
        for case in several:
            self.row(case, partial(measure, case), len(several) > 1)

    def row(self, case: Case, measure: Callable[[], Row], is_one_of_many: bool = False) -> bool:
        """Measures one row; False if it failed. An exception costs this row, unless the device refuses from now on:
        that ends the process, as does the end of the time. One of many rows that hangs ends it after half of that time,
        which leaves the other half to the rows behind it."""
        if case.name in self.begun:
            return True
        if time.monotonic() > self.deadline:
            raise SystemExit(AGAIN)
        head = {"row": case.name, "op": case.op}
        self.record(**head, error="the process ended in this row")
        before = max(0, len(text_of(self.sensors)) - 1)
        has_limit = is_one_of_many and self.deadline < math.inf
        if has_limit:
            faulthandler.dump_traceback_later((self.deadline - time.monotonic()) / 2, exit=True)
        try:
            found = head | measure()
        except SystemExit:
            self.record(row=case.name)
            raise
        except Exception as error:
            traceback.print_exc()
            self.record(**head, error=brief(error))
            wait()  # raises where an illegal address has broken the device for this process
            if on_gpu():
                torch.cuda.empty_cache()
            return False
        finally:
            if has_limit:
                faulthandler.cancel_dump_traceback_later()
        self.record(**found, clocks=clocks(text_of(self.sensors)[before:]))
        print(line(found, "row") if "ms" in found else found, flush=True)
        return True
