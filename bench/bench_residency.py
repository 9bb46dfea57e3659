"""A 4-bit folder mapped and copied, and training under a memory limit that is smaller than its file.

    python bench/four_bit_folder.py 8B FOLDER
    python bench/bench_residency.py FOLDER --limits 4 2.5 --json        needs cgroup version 1 and root
    python bench/bench_residency.py FOLDER70 --limits 20 --skip open steps unlimited --tokens 256 --json FILE
    python bench/any_file_page.py --write

open: seconds beyond the imports and private memory, warm, copied against mapped. steps: passes of few tokens in turns,
copied against mapped; the gradients must be equal. train: `qlora train`'s own loop, 3 steps of 1,024 tokens, unlimited
and under each limit (GiB, page cache counted), with the file out of the cache at the start: tokens/s, bytes read a step
by the kernel's count, the plan's and `qlora estimate`'s, and the adapter, which must be the same bytes. Without the
unlimited run there is nothing to compare speed and adapter with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from children import Child, calling, in_turns, last_line, serve
from common import Bench

import qlora_native as qn

GIB = 1 << 30
CGROUPS = Path("/sys/fs/cgroup/memory")
TOKENS, STEPS, RANK = 1024, 3, 8
OPEN_SECONDS, OPEN_BYTES, MAPPED_STEP = 1.5, 150e6, 1.02  # at most: a mapped model opens, and computes a step
SPEED, READ, APART = 0.9, 2.2, 0.1  # of the unlimited speed, of what streams, of the estimate made before the run


def count(file: str, name: str) -> int:
    """A figure of the kernel's, from a file of /proc."""
    return int(re.findall(rf"^{name}:\s+(\d+)", Path("/proc", file).read_text(), re.M)[0])


def swap_bytes() -> int:
    """Of the machine."""
    return 1024 * count("meminfo", "SwapTotal")


def private_bytes() -> int:
    """Of this process alone: what it wrote to."""
    return 1024 * count("self/smaps_rollup", "Private_Dirty")


def disk_rate(file: Path, most: int = GIB) -> float:
    """Bytes a second of reading the file past the page cache."""
    import mmap

    block = mmap.mmap(-1, 8 << 20)
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    done, began = 0, time.monotonic()
    while done < most and (got := os.preadv(descriptor, [block], done)) > 0:
        done += got
    os.close(descriptor)
    return done / (time.monotonic() - began)


def forget(folder: Path) -> None:
    """The files' pages leave the page cache."""
    from qlora_native import _C

    for file in folder.glob("*.safetensors"):
        mapped = _C.MappedFile(str(file))
        mapped.release(0, mapped.num_bytes)


def opened(folder: Path | str, residency: str) -> dict[str, Any]:
    """Loads the model in this process."""
    from transformers.models.llama import modeling_llama  # noqa: F401

    import qlora_native.models.load  # noqa: F401

    before, began = private_bytes(), time.monotonic()
    model = qn.load_model(folder, residency=residency)
    seconds = time.monotonic() - began
    private = private_bytes() - before
    del model  # not before: its memory is what was counted
    return {"seconds": round(seconds, 3), "private_mib": round(private / 2**20, 1)}


def passes(folder: Path | str, residency: str, tokens: int) -> None:
    """A child that makes a forward and a backward pass at each line; the answer has its seconds and a hash."""
    from qlora_native.models.loss import causal_lm_loss

    model: Any = qn.add_lora(qn.load_model(folder, residency=residency), qn.LoraConfig(r=RANK, seed=0)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(tokens)[None] % 300

    def answer(_: list[str]) -> dict[str, Any]:
        model.zero_grad()
        began = time.monotonic()
        loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        seconds = time.monotonic() - began
        found = hashlib.sha256(str(loss.item()).encode())
        for parameter in model.parameters():
            if parameter.grad is not None:
                found.update(parameter.grad.numpy().tobytes())
        return {"seconds": seconds, "sha256": found.hexdigest()}

    serve(answer)


def train(folder: Path, out: Path, length: int) -> dict[str, Any]:
    from qlora_native._memory import peak_rss_bytes
    from qlora_native.models.mapped import num_bytes, parts_of, streaming_of
    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.train.loop import Trainer

    text = "what is red? apple and what is blue? plum. " * (length // 8)
    (out / "rows.jsonl").write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(4)))
    options = {"steps": STEPS, "batch_size": 1, "grad_accum": 1, "optimizer": "adamw8bit"}
    options |= {"eval_every": 0, "save_every": 0}
    data = {"train": str(out / "rows.jsonl"), "max_length": length, "eval_fraction": 0, "train_on": "all"}
    config = TrainConfig.from_values(
        {"model": str(folder), "output_dir": str(out / "run"), "data": data, "lora": {"r": RANK}, "train": options}
    )
    began = time.monotonic()
    read, computing = [0], [time.process_time()]  # before the first step, and after each
    records: list[dict[str, Any]] = []

    def on_step(record: dict[str, Any]) -> None:
        read.append(count("self/io", "read_bytes"))
        computing.append(time.process_time())
        records.append(record)
        print(record, file=sys.stderr, flush=True)

    trainer = Trainer(config, on_step=on_step)
    summary = trainer.train()
    streaming = streaming_of(trainer.model)
    plan = None if streaming is None else streaming.plan
    return {
        "tokens": records[0]["tokens"],
        "seconds": [record["seconds"] for record in records],
        "cpu_seconds": [after - before for before, after in pairwise(computing)],
        "loss": [record["loss"] for record in records],
        "read_bytes": [after - before for before, after in pairwise(read)],
        "weights": num_bytes(parts_of(trainer.model)),
        "resident": None if plan is None else plan.resident_bytes,
        "streamed": 0 if plan is None else plan.streamed_bytes,
        "layers_streamed": 0 if plan is None else len(plan.streamed),
        "planned_read": 0 if plan is None else plan.bytes_read(),
        "stall_seconds": round(summary.weight_stall_seconds, 2),
        "peak_rss": peak_rss_bytes(),
        "seconds_in_all": round(time.monotonic() - began, 1),
        "sha256": hashlib.sha256((summary.adapter_dir / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }


def trained(folder: str, length: int) -> dict[str, Any]:
    """The same beside the model."""
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as out:
        return train(Path(folder), Path(out), length)


def child(*call: Any, limit: float | None = None) -> dict[str, Any]:
    """What a call returns in a process, under a limit in GiB if one is given."""
    group = None
    if limit is not None:
        group = Path(tempfile.mkdtemp(prefix="qlora-", dir=CGROUPS))
        (group / "memory.limit_in_bytes").write_text(str(int(limit * GIB)))
    join = f"echo $$ > {group}/cgroup.procs; " if group else ""
    command = ["bash", "-c", f'{join}exec "$0" "$@"', sys.executable, *calling(*call)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = {}
    if group is not None:
        found["cgroup_peak"] = int((group / "memory.max_usage_in_bytes").read_text())
        found["failcnt"] = int((group / "memory.failcnt").read_text())
        (group / "memory.force_empty").write_text("0")
        group.rmdir()
    if done.returncode:
        return {**found, "exit": done.returncode}
    return {**last_line(done.stdout), **found}


def estimated(folder: Path, limit: float, tokens: int) -> dict[str, Any]:
    """What `qlora estimate` says of such a run; it times two layers."""
    options = {"memory": f"{limit}GiB", "seq-length": tokens, "batch-size": 1, "optimizer": "adamw8bit", "lora.r": RANK}
    options["train.grad_accum"] = 1
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "qlora_native", "estimate", str(folder), "--cpu", "--json", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)["streamed"]
    return found


def bar(name: str, value: float, met: bool) -> dict[str, Any]:
    return {"bar": name, "value": round(float(value), 3), "met": bool(met)}


def judge(result: dict[str, Any]) -> None:
    if "open" in result:
        seconds, private = result["open"]["mapped"]["seconds"], result["open"]["mapped"]["private_mib"] * 2**20
        result["open"]["bars"] = [
            bar(f"opens in {OPEN_SECONDS:g} s", seconds, seconds <= OPEN_SECONDS),
            bar(f"at most {OPEN_BYTES / 1e6:g} MB private", private / 1e6, private <= OPEN_BYTES),
        ]
    if "steps" in result:
        ratio, equal = median(result["steps"]["ratios"]), result["steps"]["equal"]
        result["steps"]["median_ratio"] = ratio
        result["steps"]["bars"] = [
            bar(f"at most {MAPPED_STEP:g} of the time", ratio, ratio <= MAPPED_STEP),
            bar("equal bits", equal, equal),
        ]
    first = next((row for row in result["rows"] if row["limit_gib"] is None and "seconds" in row), None)
    for row in result["rows"]:
        row |= {"match": False, "bars": []}
        if "seconds" in row:
            judge_row(row, first)


def judge_row(row: dict[str, Any], first: dict[str, Any] | None) -> None:
    """One run, against the unlimited one if that was made."""
    row["tokens_per_second"] = speed = row["tokens"] / median(row["seconds"][1:])
    row |= dict.fromkeys(("same_adapter", "speed_to_unlimited", "cpu_to_unlimited"))
    if first is not None:
        row["same_adapter"] = row["sha256"] == first["sha256"]
        row["speed_to_unlimited"] = speed * median(first["seconds"][1:]) / first["tokens"]
        row["cpu_to_unlimited"] = sum(row["cpu_seconds"][1:]) / sum(first["cpu_seconds"][1:])
    row["match"] = row["same_adapter"]
    if row["streamed"]:
        row["read_to_streamed"] = read = max(row["read_bytes"][1:]) / row["streamed"]
        if first is not None:
            ratio = row["speed_to_unlimited"]
            row["bars"].append(bar(f"{SPEED:g} of the unlimited speed", ratio, ratio >= SPEED))
        row["bars"].append(bar(f"reads at most {READ:g} times what streams", read, read <= READ))
    if "estimates" in row:
        speeds = [one["tokens_per_second"] for one in row["estimates"]]
        row["speed_to_estimate_before"] = ratio = speed / speeds[0]
        row["speed_to_estimate"] = speed * mean(1 / one for one in speeds)
        name = f"within {100 * APART:g} % of the estimate made before"
        row["bars"].append(bar(name, ratio, abs(ratio - 1) <= APART))


def compared(folder: Path, pairs: int, tokens: int) -> dict[str, Any]:
    """Passes of both residencies in turns, after one that does not count."""
    sides = {name: Child(name, calling(passes, folder, name, tokens)) for name in ("memory", "mapped")}
    answers = in_turns(sides, ["pass"] * (pairs + 1))
    for side in sides.values():
        side.end()
    seconds = {name: [answer["seconds"] for answer in found[1:]] for name, found in answers.items()}
    equal = len({answer["sha256"] for found in answers.values() for answer in found}) == 1
    ratios = [mapped / copied for mapped, copied in zip(seconds["mapped"], seconds["memory"], strict=True)]
    return {"ratios": ratios, "equal": equal, "tokens": tokens}


def limited(folder: Path, limit: float | None, tokens: int) -> dict[str, Any]:
    """A run under a limit, with estimates before and after it, since the machine's own speed drifts in such a time."""
    forget(folder)
    row: dict[str, Any] = {"limit_gib": limit, "load_average": os.getloadavg()}
    if limit is None:
        return row | child(trained, folder, tokens)
    estimates = [estimated(folder, limit, tokens)]
    forget(folder)
    row |= child(trained, folder, tokens, limit=limit)
    if "seconds" in row:
        forget(folder)
        row["estimates"] = [*estimates, estimated(folder, limit, tokens)]
    return row


def main() -> None:
    limits = {"type": float, "nargs": "*", "default": [], "metavar": "GIB"}
    skip = {"nargs": "*", "choices": ("open", "steps", "unlimited"), "default": []}
    tokens = {"pass_tokens": 64, "tokens": TOKENS}
    bench = Bench("residency", __doc__, folder=Path, limits=limits, skip=skip, pairs=5, **tokens)
    options, folder, result = bench.options, bench.options.folder, bench.result
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    result |= {"load_average": os.getloadavg(), "file_bytes": file.stat().st_size}
    result |= {"swap_bytes": swap_bytes(), "disk_bytes_per_second": disk_rate(file)}
    if "open" not in options.skip:
        child(opened, folder, "memory")  # warms the page cache
        result["open"] = {name: child(opened, folder, name) for name in ("memory", "mapped")}
    if "steps" not in options.skip:
        result["steps"] = compared(folder, options.pairs, options.pass_tokens)
    bench.begin()
    for limit in [*([] if "unlimited" in options.skip else [None]), *options.limits]:
        result["rows"].append(limited(folder, limit, options.tokens))
        judge(result)
        print(json.dumps(result["rows"][-1]), flush=True)
    bench.write()


if __name__ == "__main__":
    main()
