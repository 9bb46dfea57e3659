"""A QLoRA training step on SmolLM2-135M against transformers + peft: speed, memory and loss.

    python bench/bench_train.py --json
    python bench/bench_train.py --peers bitsandbytes --learn 100 --json

The peers (`--peers`) are set up as somebody who knows them would: adapters in the dtype that is fastest, and a malloc
that keeps its memory. Our side is as `qlora train` has it. `plain-tuned` is LoRA on the bf16 weights themselves;
`bitsandbytes-tuned` is NF4 with double quantization, bf16 adapters on both sides; `fp32-both` is LoRA on fp32 weights
against our own step in fp32: equal dtypes. A CPU without a dot product for bf16 is compared with `fp32-tuned`, fp32
against our bf16, and `fp32-both`: bf16 products take minutes a step there. `bitsandbytes` has fp32 adapters and
malloc as it is; `ours-fp32` is our own step in fp32 against the one in bf16.
Rows are 4 x 256 tokens, all trained; with `--learn`, answers of at most 256 tokens, so many steps, and the held-out
loss before and after. Checkpointing is off.

Each side is a process of its own that loads the same 16-bit weights, starts from the same adapter tensors and sees the
same batches in the same order at the same learning rate. The parent lets them take turns, one step each, so that both
meet the same machine; each side's memory is its own process's peak, loading included. `match`: whether our first
loss is that of transformers' code in fp32 on the decoded weights, to 0.5 %.

`products` is the floor: the time of all products but attention's at this run's best rate in bf16 (in fp32 without a dot
product for bf16, or where our side is in fp32). Counted are those of each token with the frozen layers, forward and
input gradient (4 operations a weight); with the adapters, forward, input gradient and their own gradients (6); and of
each trained token with the output embedding, forward and input gradient (4). Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from ceilings import Ceilings, ceilings, floor
from children import Child
from common import (
    Bar,
    add_json,
    bitsandbytes_kernels,
    line,
    machine,
    multiplies_bf16,
    quartiles,
    rounded,
    timings,
    write_json,
)
from train_sides import LENGTH, PEERS, RANK, ROWS, prepare, worker

WARM_UP = 3  # steps that are not counted
LOSS_TOLERANCE = 5e-3
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "10000000000"}
SPEED_BARS = {
    "plain-tuned": (Bar("theirs", 1.8, faster=True),),
    "fp32-tuned": (Bar("theirs", 1.35, faster=True),),
    "fp32-both": (Bar("theirs", 1.0, faster=True),),
    "ours-fp32": (Bar("theirs", 1.0, faster=True),),
    "bitsandbytes-tuned": (Bar("theirs", 1.3, faster=True),),
}
MEMORY_BARS = {"plain-tuned": 0.60, "fp32-tuned": 0.45, "bitsandbytes-tuned": 0.75}
FLOOR_BAR = 0.75


def side(name: str, peer: str, arguments: argparse.Namespace, folder: Path) -> Child:
    """The process of one side."""
    command = [os.path.abspath(__file__), "--worker", name, "--folder", str(folder), "--peers", peer]
    command += ["--lr", str(arguments.lr), "--threads", str(arguments.threads)]
    return Child(name, command, TUNED_MALLOC if name == "theirs" and PEERS[peer].tuned_malloc else None)


def products(batches: list[dict[str, torch.Tensor]], prepared: dict[str, float]) -> dict[str, float]:
    """Operations of a step in 1e9, by what is multiplied with: of the median batch."""
    tokens = median(int(batch["attention_mask"].sum()) for batch in batches)
    trained = median(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    counts = {"frozen": 4 * tokens, "head": 4 * trained, "adapters": 6 * tokens}
    return {name: count * prepared[name] / 1e9 for name, count in counts.items()}


def compare(
    peer: str, arguments: argparse.Namespace, folder: Path, prepared: dict[str, float], measured: Ceilings
) -> dict[str, Any]:
    """Runs both sides step by step in turn; a row."""
    batches = torch.load(folder / "batches.pt")["train"]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    sides = {name: side(name, peer, arguments, folder) for name in ("ours", "theirs")}
    start = {name: child.ask("evaluate")["loss"] for name, child in sides.items()} if arguments.learn else {}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(len(tokens)):
        for name in sorted(sides, reverse=bool(index % 2)):
            answer = sides[name].ask(f"step {index}")
            seconds[name].append(answer["seconds"])
            losses[name].append(answer["loss"])
    memory = {name: child.ask("memory") for name, child in sides.items()}
    end = {name: child.ask("evaluate")["loss"] for name, child in sides.items()} if arguments.learn else {}
    for child in sides.values():
        child.end()

    warm = slice(min(WARM_UP, len(tokens) - 1), None)
    first = {name: values[0] for name, values in losses.items()}
    row: dict[str, Any] = {"peer": peer, "rows": ROWS, "max_length": LENGTH, "rank": RANK, "steps": len(tokens)}
    row["tokens_a_step"] = sum(tokens) / len(tokens)
    row["match"] = abs(first["ours"] - prepared["loss"]) <= LOSS_TOLERANCE * prepared["loss"]
    row["first_loss"] = {"reference": prepared["loss"], **first}
    counted = {name: values[warm] for name, values in seconds.items()}
    bars = () if arguments.learn else SPEED_BARS.get(peer, ())
    row |= timings(counted, bars)
    operations = products(batches[warm], prepared)
    dtype = "fp32" if PEERS[peer].ours == torch.float32 else "bf16"
    least = floor(measured, 0, flops=1e9 * sum(operations.values()), dtype=dtype)
    reached = rounded([least / median(counted["ours"])])[0]
    row["products"] = {"gflop": operations, "floor_ms": rounded([least], 1e3)[0], "of_floor": reached}
    if bars and peer in ("plain-tuned", "fp32-tuned"):
        verdict = {"rival": "products", "measure": "of the floor", "bar": FLOOR_BAR}
        row["bars"].append(verdict | {"value": reached, "met": reached >= FLOOR_BAR})
    row["tokens_per_second"] = {
        name: rounded(quartiles([t / s for t, s in zip(tokens[warm], values, strict=True)]))
        for name, values in counted.items()
    }
    row["peak_rss_mib"] = {name: round(memory[name]["peak_mib"]) for name in sides}
    ratio = memory["ours"]["peak_mib"] / memory["theirs"]["peak_mib"]
    row["peak_rss_ratio"] = round(ratio, 3)
    if peer in MEMORY_BARS and not arguments.learn:
        verdict = {"rival": "theirs", "measure": "of the peak memory", "bar": MEMORY_BARS[peer]}
        row["bars"].append(verdict | {"value": round(ratio, 3), "met": ratio <= MEMORY_BARS[peer]})
    row["trainable_parameters"] = {name: memory[name]["trainable"] for name in sides}
    if arguments.learn:
        row["held_out_loss"] = {name: [start[name], end[name]] for name in sides}
    return row


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = ["plain-tuned", "bitsandbytes-tuned"] if multiplies_bf16() else ["fp32-tuned"]
    default.append("fp32-both")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=default)
    parser.add_argument("--steps", type=int, default=15, help=f"{WARM_UP} of them to warm up")
    parser.add_argument("--learn", type=int, metavar="STEPS", help="steps on answers, with the held-out loss")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    add_json(parser)
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.peers[0], arguments.folder, arguments.lr, arguments.threads)
        return
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"bench": "train", "machine": machine(), "ceilings": ceilings()}
    result["setting"] = {
        "lr": arguments.lr,
        "seed": arguments.seed,
        "train_on": "answers" if arguments.learn else "all",
    }
    result["rows"] = []
    print(json.dumps(result["machine"]), json.dumps(result["ceilings"]), sep="\n")
    with tempfile.TemporaryDirectory() as name:
        folder, learn = Path(name), bool(arguments.learn)
        prepared = prepare(folder, arguments.learn or arguments.steps, arguments.seed, full_length=not learn)
        for peer in arguments.peers:
            row = compare(peer, arguments, folder, prepared, result["ceilings"])
            result["rows"].append(row)
            print(line(row, "peer"), row["tokens_per_second"], row["first_loss"], row.get("held_out_loss", ""))
    if any(PEERS[peer].base == "nf4" for peer in arguments.peers):
        result["bitsandbytes_kernels"] = bitsandbytes_kernels()
    write_json(arguments.json, result, "train_learn" if arguments.learn else None)


if __name__ == "__main__":
    main()
