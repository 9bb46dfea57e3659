"""An optimizer step whose states are in a page file, against what keeps them in memory and against the disk.

    python bench/bench_paged.py --page-dir DIR --json
    python bench/bench_paged.py --learn 30 --json

Shares: a step over 50 M parameters with a residency budget that leaves 0, 25, 50 and 100 % of the states outside; torch
and the peers keep theirs in memory. Large: 400 M parameters' 32-bit states under a budget of 1 GB, against a plain loop
over a mapped file of the same size with the same chunks, hints and budget. Idle: paging allowed and not needed. Learn:
the held-out loss of SmolLM2 with 8-bit states in a file and with 32-bit states in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from common import (
    Bar,
    Functions,
    Seconds,
    add_json,
    interleaved,
    interleaved_sparing,
    line,
    machine,
    timings,
    write_json,
)
from paged_loop import PlainLoop, disk_rates, largest_resident

import qlora_native as qn
from qlora_native.optim.paging import CHUNK_BYTES

Row = dict[str, Any]
LR, DECAY = 1e-4, 0.01
COUNT, NUMEL = 400, 125_000  # 50 M parameters, as in bench_optim
LARGE_COUNT, LARGE_NUMEL, LARGE_BUDGET = 40, 10_000_000, 1_000_000_000
SHARES = (0.0, 0.25, 0.5, 1.0)
LEAST_BUDGET = 32 << 20  # a few chunks are all that is resident when 100 % are paged out
ADAMW: Any = qn.optim.AdamW


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


def peers(notes: list[str]) -> dict[str, Callable[[Any], Any]]:
    """torch's fused AdamW and what else can be imported and takes parameters on a CPU; the others go into ``notes``."""
    candidates: dict[str, Callable[[Any], Any]] = {
        "torch fused": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=DECAY, fused=True)
    }
    for name, module, make in (
        ("bitsandbytes PagedAdamW", "bitsandbytes.optim", lambda m, p: m.PagedAdamW(p, lr=LR, weight_decay=DECAY)),
        (
            "torchao CPUOffloadOptimizer",
            "torchao.optim",
            lambda m, p: m.CPUOffloadOptimizer(p, torch.optim.AdamW, lr=LR, weight_decay=DECAY, fused=True),
        ),
    ):
        try:
            loaded = importlib.import_module(module)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trial = torch.nn.Parameter(torch.zeros(100_000))
                trial.grad = torch.zeros(100_000)
                make(loaded, [trial]).step()
            notes += [f"{name}: {warning.message}" for warning in caught if "aged" in str(warning.message)]
            candidates[name] = lambda p, make=make, loaded=loaded: make(loaded, p)  # type: ignore[misc]
        except ImportError:
            notes.append(f"{name}: not installed")
        except (AssertionError, RuntimeError) as error:
            notes.append(f"{name}: {error}")
    return candidates


def same_as_unpaged(folder: str) -> bool:
    """Whether three steps through a page file have the bytes of three steps in memory."""
    made = [ADAMW(parameters(40, 70_001), lr=LR, weight_decay=DECAY, paged=False)]
    made.append(ADAMW(parameters(40, 70_001), LR, page_budget=2 << 20, weight_decay=DECAY, paged=True, page_dir=folder))
    for optimizer in made:
        for _ in range(3):
            optimizer.step()
    moved = made[1].paging_statistics()["bytes_in"] > 0
    return moved and digest(made[0]) == digest(made[1])


def shares(folder: str, repeats: int, notes: list[str]) -> list[Row]:
    """A step with this share of the states out of memory; 0 % is in the file, too."""
    num_bytes = 8 * COUNT * NUMEL
    functions: Functions = {name: make(parameters(COUNT, NUMEL)).step for name, make in peers(notes).items()}
    functions["unpaged"] = ADAMW(parameters(COUNT, NUMEL), LR, weight_decay=DECAY, paged=False).step
    ours = {}
    for share in SHARES:
        budget = max(LEAST_BUDGET, num_bytes - int(share * num_bytes)) if share else 2 * num_bytes
        options = {"weight_decay": DECAY, "paged": True, "page_dir": folder, "page_budget": budget}
        ours[share] = ADAMW(parameters(COUNT, NUMEL), LR, **options)
        functions[f"ours {share}"] = ours[share].step
    # What waits for the disk runs in a few rounds; what takes longer than that, once.
    once = interleaved(functions, 1, warmup=1)
    chosen = {name: function for name, function in functions.items() if once[name][0] < 3}
    seconds = once | interleaved_sparing(chosen, repeats, keep=[], slow=0.2, few=max(3, repeats // 3))
    rivals = {name: values for name, values in seconds.items() if not name.startswith("ours 0") and name != "ours 1.0"}
    match = same_as_unpaged(folder)
    rows = []
    for share in SHARES:
        before = ours[share].paging_statistics()
        ours[share].step()
        after = ours[share].paging_statistics()
        moved = {f"{key}_a_step": after[key] - before[key] for key in ("bytes_in", "bytes_out")}
        row: Row = {"case": "shares", "optimizer": "AdamW 32-bit", "parameters": COUNT * NUMEL, "paged_out": share}
        row["gradients"] = COUNT
        row |= {"match": match, **moved} | timings({"ours": seconds[f"ours {share}"], **rivals})
        rows.append(row)
        print(line(row, "case", "paged_out"), flush=True)
    return rows


def large(folder: str, repeats: int, ceilings: dict[str, float]) -> list[Row]:
    """3.2 GB of states under 1 GB, against the plain loop; steps and samples of what is resident; the bytes."""
    num_bytes = 8 * LARGE_COUNT * LARGE_NUMEL
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY}
    warm = 2  # steps before the timing, here and in the unpaged run
    unpaged = ADAMW(parameters(LARGE_COUNT, LARGE_NUMEL), **options, paged=False)
    for _ in range(warm):
        unpaged.step()
    wanted = digest(unpaged)
    del unpaged
    ours = ADAMW(parameters(LARGE_COUNT, LARGE_NUMEL), **options, paged=True, page_dir=folder, page_budget=LARGE_BUDGET)
    ours.step()
    tensors = states(ours)
    first = min(tensor.data_ptr() for tensor in tensors)
    last = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors)
    page = os.sysconf("SC_PAGE_SIZE")
    with largest_resident(first // page * page, -(-(last - first // page * page) // page) * page) as samples:
        ours.step()
    match = digest(ours) == wanted
    ours.page_out()  # the digest has read everything
    # As the pager: two chunks fetched ahead, one in work, one on its way out; what else the budget holds stays.
    resident = (LARGE_BUDGET - 4 * CHUNK_BYTES) // CHUNK_BYTES * CHUNK_BYTES
    loop = PlainLoop(folder, num_bytes, CHUNK_BYTES, resident)
    seconds = interleaved({"ours": ours.step, "plain loop": loop.run}, repeats, warmup=1)
    before = ours.paging_statistics()
    ours.step()
    after = ours.paging_statistics()
    moved = {key: after[key] - before[key] for key in ("bytes_in", "bytes_out")}
    floor = max(
        moved["bytes_in"] / ceilings["disk_read_gb_per_s"], moved["bytes_out"] / ceilings["disk_write_gb_per_s"]
    )
    row: Row = {"case": "large", "optimizer": "AdamW 32-bit", "parameters": LARGE_COUNT * LARGE_NUMEL, "match": match}
    row |= {"state_bytes": num_bytes, "budget_bytes": LARGE_BUDGET, "samples": len(samples)}
    row |= {f"{key}_a_step": value for key, value in moved.items()} | {"resident_bytes_max": max(samples)}
    row |= timings(seconds, [Bar("plain loop", 0.7, faster=True)], floor / 1e9)
    over = round(max(samples) / LARGE_BUDGET, 4)
    row["bars"].append({"rival": "budget", "measure": "of the bytes", "bar": 1.1, "value": over, "met": over <= 1.1})
    print(line(row, "case"), flush=True)
    return [row]


def idle(folder: str, repeats: int) -> list[Row]:
    """No pressure: states that may leave memory and need not, and states in the file with room for all."""
    made: dict[str, dict[str, Any]] = {
        "unpaged": {"paged": False},
        "auto": {"paged": "auto", "page_dir": folder},
        "in the file": {"paged": True, "page_dir": folder, "page_budget": 16 * COUNT * NUMEL},
    }
    optimizers = {name: ADAMW(parameters(COUNT, NUMEL), LR, weight_decay=DECAY, **o) for name, o in made.items()}
    seconds = interleaved({name: optimizer.step for name, optimizer in optimizers.items()}, repeats)
    match = digest(optimizers["auto"]) == digest(optimizers["unpaged"]) == digest(optimizers["in the file"])
    rows = []
    for name in ("auto", "in the file"):
        row: Row = {"case": "idle", "optimizer": f"AdamW 32-bit, {name}", "parameters": COUNT * NUMEL, "match": match}
        times: Seconds = {"ours": seconds[name], "unpaged": seconds["unpaged"]}
        row |= timings(times, [Bar("unpaged", 1.05)])
        rows.append(row)
        print(line(row, "case", "optimizer"), flush=True)
    return rows


def learn(folder: str, steps: int) -> list[Row]:
    """Held-out loss after a run of the demo, with both forms of the states."""
    from qlora_native.tool.cli.demo import HELD_OUT_ROWS, MAX_CHARACTERS, demo_config, model_file
    from qlora_native.tool.cli.standard_library import write_split
    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.train.loop import Trainer

    for name in ("transformers", "qlora_native"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, paged in (("adamw", False), ("adamw8bit", True)):
            out = Path(scratch, name)
            write_split(out / "data", MAX_CHARACTERS, HELD_OUT_ROWS)
            values = demo_config(model_file(), out, steps, 5e-4, 0).model_dump()
            values["train"] |= {"optimizer": name, "paged": paged}
            if paged:
                values["train"]["page_budget"] = 2 << 20
            summary = Trainer(TrainConfig.model_validate(values), quiet=True).train()
            row: Row = {"case": "learn", "optimizer": name, "paged": paged, "steps": steps}
            row |= {"held_out_loss": [summary.loss_before, summary.loss_after], "paged_bytes": summary.paged_bytes}
            rows.append(row)
    apart = abs(rows[0]["held_out_loss"][1] - rows[1]["held_out_loss"][1])
    bar = {"rival": "32-bit", "measure": "nats apart", "bar": 0.01, "value": round(apart, 6), "met": apart <= 0.01}
    for row in rows:
        # Before the first step it is one model: the held-out losses must be the same.
        row |= {"match": row["held_out_loss"][0] == rows[0]["held_out_loss"][0], "bars": [bar] if row["paged"] else []}
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Parse, run, print one line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=21, help="of the steps in memory; fewer of the slow ones")
    parser.add_argument("--page-dir", default=tempfile.gettempdir(), help="a folder on a disk")
    parser.add_argument("--learn", type=int, metavar="STEPS", help="only the comparison of losses")
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.page_dir
    result: dict[str, Any] = {"bench": "paged", "machine": machine(), "ceilings": disk_rates(folder), "notes": []}
    print(json.dumps(result), flush=True)
    if arguments.learn:
        result["rows"] = learn(folder, arguments.learn)
    else:
        result["rows"] = []
        result["rows"] += idle(folder, 2 * arguments.repeats)
        result["rows"] += shares(folder, arguments.repeats, result["notes"])
        result["rows"] += large(folder, max(3, arguments.repeats // 4), result["ceilings"])
        print("\n".join(result["notes"]))
    write_json(arguments.json, result, "paged_learn" if arguments.learn else None)


if __name__ == "__main__":
    main()
