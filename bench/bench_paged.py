"""An optimizer step whose states are in a page file, against what keeps them in memory and against the disk.

    python bench/bench_paged.py --page-dir DIR --json
    python bench/bench_paged.py --learn 30 --json

Shares: a step over 50 M parameters with a residency budget that leaves 0, 25, 50 and 100 % of the states outside; torch
and the peers keep theirs in memory. Large: 400 M parameters' 32-bit states under a budget of 1 GB, against a plain loop
over a mapped file of the same size with the same chunks, hints and budget. Idle: paging allowed and not needed. Learn:
the held-out loss of SmolLM2 with 8-bit states in a file and with 32-bit states in memory.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from common import Bar, Bench, Functions, interleaved, interleaved_sparing, timings, verdict
from paged_loop import PlainLoop, disk_rates, largest_resident

import qlora_native as qn
from qlora_native.optim.paging import CHUNK_BYTES
from qlora_native.tool.cli.demo import HELD_OUT_ROWS, MAX_CHARACTERS, demo_config, model_file
from qlora_native.tool.cli.standard_library import write_split
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer

Row = dict[str, Any]
LR, DECAY = 1e-4, 0.01
COUNT, NUMEL = 400, 125_000  # 50 M parameters, as in bench_optim
LARGE_COUNT, LARGE_NUMEL, LARGE_BUDGET = 40, 10_000_000, 1_000_000_000
SHARES = (0.0, 0.25, 0.5, 1.0)
LEAST_BUDGET = 32 << 20  # a few chunks are all that is resident when 100 % are paged out


@cache
def gradients(count: int, numel: int) -> list[torch.Tensor]:
    """The same for all optimizers."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(numel, generator=generator) * 1e-2 for _ in range(count)]


def parameters(count: int, numel: int) -> list[torch.nn.Parameter]:
    """The same values every time, each with its gradient, as in bench_optim; large ones share one."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(numel, generator=generator)) for _ in range(count)]
    grads = gradients(count if numel < LARGE_NUMEL else 1, numel)
    for number, parameter in enumerate(made):
        parameter.grad = grads[number % len(grads)]
    return made


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The averages, in the order of the parameters."""
    found = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return [state[name] for state in found for name in ("exp_avg", "exp_avg_sq")]


def digest(optimizer: torch.optim.Optimizer) -> str:
    """Of all parameters and states."""
    found = hashlib.sha256()
    for tensor in [*(p for group in optimizer.param_groups for p in group["params"]), *states(optimizer)]:
        found.update(memoryview(tensor.detach().numpy()).cast("B"))
    return found.hexdigest()


def moved(optimizer: Any) -> dict[str, int]:
    """A step, and the bytes that it reads from the file and writes there."""
    before = optimizer.paging_statistics()
    optimizer.step()
    after = optimizer.paging_statistics()
    return {f"{key}_a_step": after[key] - before[key] for key in ("bytes_in", "bytes_out")}


def peers(notes: list[str]) -> dict[str, Callable[[Any], Any]]:
    """torch's fused AdamW and what else can be imported and takes parameters on a CPU; the others go into ``notes``."""
    fused: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "fused": True}
    found: dict[str, Callable[[Any], Any]] = {"torch fused": partial(torch.optim.AdamW, **fused)}
    candidates: dict[str, Callable[[Any, Any], Any]] = {
        "bitsandbytes PagedAdamW": lambda optim, p: optim.PagedAdamW(p, lr=LR, weight_decay=DECAY),
        "torchao CPUOffloadOptimizer": lambda optim, p: optim.CPUOffloadOptimizer(p, torch.optim.AdamW, **fused),
    }
    for name, make in candidates.items():
        try:
            optim = importlib.import_module(f"{name.split()[0]}.optim")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trial = torch.nn.Parameter(torch.zeros(100_000))
                trial.grad = torch.zeros(100_000)
                make(optim, [trial]).step()
            notes += [f"{name}: {warning.message}" for warning in caught if "aged" in str(warning.message)]
            found[name] = partial(make, optim)
        except ImportError:
            notes.append(f"{name}: not installed")
        except (AssertionError, RuntimeError) as error:
            notes.append(f"{name}: {error}")
    return found


def ours(count: int, numel: int, **options: Any) -> Any:
    return qn.optim.AdamW(parameters(count, numel), LR, weight_decay=DECAY, **options)


def same_as_unpaged(folder: str) -> bool:
    """Whether three steps through a page file have the bytes of three steps in memory."""
    unpaged, paged = (
        ours(40, 70_001, **options)
        for options in ({"paged": False}, {"paged": True, "page_dir": folder, "page_budget": 2 << 20})
    )
    for _ in range(3):
        unpaged.step()
        paged.step()
    return paged.paging_statistics()["bytes_in"] > 0 and digest(unpaged) == digest(paged)


def shares(folder: str, repeats: int, notes: list[str]) -> list[Row]:
    """A step with this share of the states out of memory; 0 % is in the file, too."""
    num_bytes = 8 * COUNT * NUMEL
    functions: Functions = {name: make(parameters(COUNT, NUMEL)).step for name, make in peers(notes).items()}
    functions["unpaged"] = ours(COUNT, NUMEL, paged=False).step
    paged = {}
    for share in SHARES:
        budget = max(LEAST_BUDGET, num_bytes - int(share * num_bytes)) if share else 2 * num_bytes
        paged[share] = ours(COUNT, NUMEL, paged=True, page_dir=folder, page_budget=budget)
        functions[f"ours {share}"] = paged[share].step
    # What waits for the disk runs in a few rounds; what takes longer than that, once.
    once = interleaved(functions, 1, warmup=1)
    chosen = {name: function for name, function in functions.items() if once[name][0] < 3}
    seconds = once | interleaved_sparing(chosen, repeats, keep=[], slow=0.2, few=max(3, repeats // 3))
    rivals = {name: values for name, values in seconds.items() if not name.startswith("ours 0") and name != "ours 1.0"}
    match = same_as_unpaged(folder)
    row: Row = {"case": "shares", "optimizer": "AdamW 32-bit", "parameters": COUNT * NUMEL, "gradients": COUNT}
    return [
        {**row, "paged_out": share, "match": match, **moved(paged[share])}
        | timings({"ours": seconds[f"ours {share}"], **rivals})
        for share in SHARES
    ]


def large(folder: str, repeats: int, ceilings: dict[str, float]) -> list[Row]:
    """3.2 GB of states under 1 GB, against the plain loop; steps and samples of what is resident; the bytes."""
    count, numel, budget = LARGE_COUNT, LARGE_NUMEL, LARGE_BUDGET
    unpaged = ours(count, numel, paged=False)
    for _ in range(2):  # as many as the paged one makes before the timing
        unpaged.step()
    wanted = digest(unpaged)
    del unpaged
    paged = ours(count, numel, paged=True, page_dir=folder, page_budget=budget)
    paged.step()
    tensors = states(paged)
    page = os.sysconf("SC_PAGE_SIZE")
    first = min(tensor.data_ptr() for tensor in tensors) // page * page
    last = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors)
    with largest_resident(first, -(-(last - first) // page) * page) as samples:
        paged.step()
    match = digest(paged) == wanted
    paged.page_out()  # the digest has read everything
    # As the pager: two chunks fetched ahead, one in work, one on its way out; what else the budget holds stays.
    num_bytes, resident = 8 * count * numel, (budget - 4 * CHUNK_BYTES) // CHUNK_BYTES * CHUNK_BYTES
    loop = PlainLoop(folder, num_bytes, CHUNK_BYTES, resident)
    seconds = interleaved({"ours": paged.step, "plain loop": loop.run}, repeats, warmup=1)
    bytes_moved = moved(paged)
    reading = bytes_moved["bytes_in_a_step"] / ceilings["disk_read_gb_per_s"]
    writing = bytes_moved["bytes_out_a_step"] / ceilings["disk_write_gb_per_s"]
    row: Row = {"case": "large", "optimizer": "AdamW 32-bit", "parameters": count * numel, "match": match}
    row |= {"state_bytes": num_bytes, "budget_bytes": budget, "samples": len(samples)}
    row |= {**bytes_moved, "resident_bytes_max": max(samples)}
    row |= timings(seconds, [Bar("plain loop", 0.7, faster=True)], max(reading, writing) / 1e9)
    row["bars"].append(verdict("budget", "of the bytes", 1.1, max(samples) / budget))
    return [row]


def idle(folder: str, repeats: int) -> list[Row]:
    """No pressure: states that may leave memory and need not, and states in the file with room for all."""
    made = {
        "unpaged": ours(COUNT, NUMEL, paged=False),
        "auto": ours(COUNT, NUMEL, paged="auto", page_dir=folder),
        "in the file": ours(COUNT, NUMEL, paged=True, page_dir=folder, page_budget=16 * COUNT * NUMEL),
    }
    seconds = interleaved({name: optimizer.step for name, optimizer in made.items()}, repeats)
    unpaged = seconds.pop("unpaged")
    row: Row = {"case": "idle", "parameters": COUNT * NUMEL, "match": len(set(map(digest, made.values()))) == 1}
    return [
        {**row, "optimizer": f"AdamW 32-bit, {name}"}
        | timings({"ours": values, "unpaged": unpaged}, [Bar("unpaged", 1.05)])
        for name, values in seconds.items()
    ]


def learn(folder: str, steps: int) -> list[Row]:
    """Held-out loss after a run of the demo, with both forms of the states."""
    for name in ("transformers", "qlora_native"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows: list[Row] = []
    options: dict[str, dict[str, Any]] = {
        "adamw": {"paged": False},
        "adamw8bit": {"paged": True, "page_budget": 2 << 20},
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, paging in options.items():
            out = Path(scratch, name)
            write_split(out / "data", MAX_CHARACTERS, HELD_OUT_ROWS)
            values = demo_config(model_file(), out, steps, 5e-4, 0).model_dump()
            values["train"] |= {"optimizer": name, **paging}
            summary = Trainer(TrainConfig.model_validate(values), quiet=True).train()
            row: Row = {"case": "learn", "optimizer": name, "paged": paging["paged"], "steps": steps, "bars": []}
            row |= {"held_out_loss": [summary.loss_before, summary.loss_after], "paged_bytes": summary.paged_bytes}
            rows.append(row)
    (before, after), (coded_before, coded_after) = (row["held_out_loss"] for row in rows)
    for row in rows:
        row["match"] = before == coded_before  # before the first step it is one model
    rows[1]["bars"].append(verdict("32-bit", "nats apart", 0.01, abs(after - coded_after)))
    return rows


def main() -> None:
    # A folder on a disk; repeats of the steps in memory, fewer of the slow ones; steps of the comparison of losses.
    bench = Bench("paged", __doc__, repeats=21, page_dir=tempfile.gettempdir(), learn=0)
    folder, repeats, steps = bench.options.page_dir, bench.options.repeats, bench.options.learn
    notes: list[str] = []
    ceilings = disk_rates(folder)
    bench.begin(ceilings=ceilings, notes=notes)
    parts: list[Callable[[], list[Row]]] = [
        lambda: idle(folder, 2 * repeats),
        lambda: shares(folder, repeats, notes),
        lambda: large(folder, max(3, repeats // 4), ceilings),
    ]
    for part in [lambda: learn(folder, steps)] if steps else parts:
        for row in part():
            bench.add(row, "case", "optimizer", "paged_out", "held_out_loss")
    print("\n".join(notes))
    bench.write("paged_learn" if steps else None)


if __name__ == "__main__":
    main()
