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
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from ceilings import Ceilings, ceilings, floor
from children import Child, calling, in_turns
from common import Bar, Bench, bitsandbytes_kernels, multiplies_bf16, timings, tokens_a_second, verdict
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
    command = calling(worker, name, peer, folder, arguments.lr, arguments.threads)
    return Child(name, command, TUNED_MALLOC if name == "theirs" and PEERS[peer].tuned_malloc else None)


def products(
    batches: list[dict[str, torch.Tensor]], prepared: dict[str, Any], checkpointing: bool = False
) -> dict[str, float]:
    """Operations of a step in 1e9, by what is multiplied with: of the median batch."""
    tokens = median(int(batch["attention_mask"].sum()) for batch in batches)
    trained = median(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    again = 2 * checkpointing  # the layers' forward
    counts = {"frozen": (4 + again) * tokens, "head": 4 * trained, "adapters": (6 + again) * tokens}
    return {name: count * prepared[name] / 1e9 for name, count in counts.items()}


def take_steps(
    sides: dict[str, Child],
    batches: list[dict[str, torch.Tensor]],
    reference: float,
    evaluates: bool,
    bars: Sequence[Bar],
    least: float,
) -> dict[str, Any]:
    """Both sides step by step in turn, and what they make of the held-out rows before and after; a row.

    Args:
        reference: what our first loss should be. least: seconds of a step's products.
    """
    held_out: dict[str, list[float]] = {name: [] for name in sides}

    def evaluate() -> None:
        for name in sides if evaluates else ():
            held_out[name].append(sides[name].ask("evaluate")["loss"])

    evaluate()
    steps = in_turns(sides, (f"step {index}" for index in range(len(batches))))
    memory = {name: side.ask("memory") for name, side in sides.items()}
    evaluate()
    for side in sides.values():
        side.end()

    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    warm = slice(min(WARM_UP, len(tokens) - 1), None)
    seconds = {name: [step["seconds"] for step in found[warm]] for name, found in steps.items()}
    first = {name: found[0]["loss"] for name, found in steps.items()}
    row: dict[str, Any] = {"rows": ROWS, "max_length": LENGTH, "rank": RANK, "steps": len(tokens)}
    row["tokens_a_step"] = sum(tokens) / len(tokens)
    row["match"] = abs(first["ours"] - reference) <= LOSS_TOLERANCE * reference
    row["first_loss"] = {"reference": reference, **first}
    row |= timings(seconds, bars, least)
    row["tokens_per_second"] = tokens_a_second(seconds, *tokens[warm])
    row["peak_rss_mib"] = {name: round(found["peak_mib"]) for name, found in memory.items()}
    row["peak_rss_ratio"] = round(memory["ours"]["peak_mib"] / memory["theirs"]["peak_mib"], 3)
    row["trainable_parameters"] = {name: found["trainable"] for name, found in memory.items()}
    return row | ({"held_out_loss": held_out} if evaluates else {})


def compare(
    peer: str, arguments: argparse.Namespace, folder: Path, prepared: dict[str, Any], measured: Ceilings
) -> dict[str, Any]:
    batches = torch.load(folder / "batches.pt")["train"]
    sides = {name: side(name, peer, arguments, folder) for name in ("ours", "theirs")}
    operations = products(batches[min(WARM_UP, len(batches) - 1) :], prepared)
    dtype = "fp32" if PEERS[peer].ours == torch.float32 else "bf16"
    least = floor(measured, 0, flops=1e9 * sum(operations.values()), dtype=dtype)
    bars = () if arguments.learn else SPEED_BARS.get(peer, ())
    row = {"peer": peer} | take_steps(sides, batches, prepared["loss"], bool(arguments.learn), bars, least)
    row["products"] = {"gflop": operations, "floor_ms": row.pop("floor_ms"), "of_floor": row.pop("of_floor")}
    if bars and peer in ("plain-tuned", "fp32-tuned"):
        row["bars"].append(verdict("products", "of the floor", FLOOR_BAR, row["products"]["of_floor"], at_least=True))
    if bars and peer in MEMORY_BARS:
        row["bars"].append(verdict("theirs", "of the peak memory", MEMORY_BARS[peer], row["peak_rss_ratio"]))
    return row


def main() -> None:
    usual = ["plain-tuned", "bitsandbytes-tuned"] if multiplies_bf16() else ["fp32-tuned"]
    peers = {"nargs": "+", "choices": PEERS, "default": [*usual, "fp32-both"]}
    learn = {"type": int, "metavar": "STEPS", "help": "steps on answers, with the held-out loss"}
    bench = Bench("train", __doc__, peers=peers, steps=15, learn=learn, lr=5e-4, seed=0)
    options = bench.options
    setting = {"lr": options.lr, "seed": options.seed, "train_on": "answers" if options.learn else "all"}
    bench.begin(ceilings=ceilings(), setting=setting)
    with tempfile.TemporaryDirectory() as name:
        prepared = prepare(Path(name), options.learn or options.steps, options.seed, full_length=not options.learn)
        for peer in options.peers:
            row = compare(peer, options, Path(name), prepared, bench.result["ceilings"])
            bench.add(row, "peer", "tokens_per_second", "first_loss", "held_out_loss")
    if any(PEERS[peer].base == "nf4" for peer in options.peers):
        bench.result["bitsandbytes_kernels"] = bitsandbytes_kernels()
    bench.write("train_learn" if options.learn else None)


if __name__ == "__main__":
    main()
