"""A training step on rows whose lengths vary tenfold: padded as they come, grouped by length, packed.

    python bench/bench_packing.py --json bench/results/packing.json

SmolLM2-135M in 4 bits with adapters of rank 16, through the trainer's own step (forward and backward over
micro-batches, checkpointing off), on the same rows in each arm: functions of Python's standard library, the longest ten
times as long as the shortest, their lengths even on a logarithmic scale. `padded` cuts them into micro-batches in a
random order, `grouped` in the order of their lengths, `ours` packs them. Tokens a second count no padding. `match` says
whether each arm has the loss of the rows one by one, from full logits, and the gradients of the padded arm.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Bar, interleaved, line, machine, ratios, relative_error, rounded, timings, write_json

from qlora_native.cli.demo import model_file
from qlora_native.data import TokenizedDataset
from qlora_native.data.batching import permutation
from qlora_native.data.packing import pack
from qlora_native.data.standard_library import write_split
from qlora_native.train import TrainConfig, Trainer
from qlora_native.train.batches import check_packing
from qlora_native.train.setup import load_data, load_tokenizer, prepare_model

SHORTEST, SPREAD = 50, 10  # tokens; longest over shortest
PACKED_LENGTH = SHORTEST * SPREAD
BARS = (Bar("padded", 1.5, faster=True),)
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-3, 5e-2  # of bf16 activations


def choose(rows: TokenizedDataset, count: int) -> TokenizedDataset:
    """``count`` rows with lengths as evenly spread on a logarithmic scale as the file allows."""
    left, chosen = rows.lengths.astype(float), []
    for target in np.geomspace(SHORTEST, PACKED_LENGTH, count):
        chosen.append(int(np.argmin(np.abs(left - target) + (left > PACKED_LENGTH) * 1e9)))
        left[chosen[-1]] = np.inf
    return rows.subset(chosen)


def one_by_one(model: Any, rows: TokenizedDataset) -> float:
    """The loss over all rows from full logits, each row on its own."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.from_numpy(row[key].astype("int64"))[None] for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


def main() -> None:
    """Prepare, compare, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    path = model_file()
    with tempfile.TemporaryDirectory() as folder:
        file = write_split(Path(folder), 4000, 1)[0]
        config = TrainConfig.model_validate(
            {
                "model": str(path),
                "data": {"train": str(file), "max_length": PACKED_LENGTH, "train_on": "all"},
                "train": {"batch_size": arguments.batch, "grad_checkpointing": False},
            }
        )
        tokenizer = load_tokenizer(str(path))
        rows = choose(load_data(config, str(file), tokenizer, limit=2000), arguments.rows)
    torch.manual_seed(0)
    model = prepare_model(config)
    check_packing(model)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in weights.items():
        if "lora_B" in name:  # zero as made, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.01)

    order = permutation(len(rows), 0)
    sorted_rows = np.argsort(-rows.lengths, kind="stable")
    items = {
        "padded": order.tolist(),
        "grouped": sorted_rows.tolist(),
        "ours": pack(rows.lengths, order, PACKED_LENGTH),
    }
    trainers = {name: Trainer(config, model=model, tokenizer=tokenizer, quiet=True) for name in items}
    # As many tokens at once as the padded arm holds on average.
    mean = median(max(rows.lengths[order[at : at + arguments.batch]]) for at in range(0, len(rows), arguments.batch))
    packed = config.model_copy(deep=True)
    packed.train.batch_size = max(1, round(arguments.batch * mean / PACKED_LENGTH))
    trainers["ours"].config = packed

    def step(name: str) -> float:
        model.zero_grad()
        return trainers[name]._learn(rows, items[name])[0]

    losses, grads = {}, {}
    for name in items:
        losses[name] = step(name)
        grads[name] = torch.cat([parameter.grad.flatten() for parameter in weights.values()])
    truth = one_by_one(model.eval(), rows)
    model.train()
    distance = {name: relative_error(grads[name], grads["padded"]) for name in ("grouped", "ours")}
    seconds = interleaved({name: partial(step, name) for name in items}, arguments.repeats, warmup=1)

    tokens = int(rows.lengths.sum())
    row: dict[str, Any] = {
        "case": "SmolLM2-135M",
        "rows": len(rows),
        "micro_batch": {"padded": arguments.batch, "grouped": arguments.batch, "ours": packed.train.batch_size},
        "lengths": [int(value) for value in np.quantile(rows.lengths, [0, 0.25, 0.5, 0.75, 1])],
        "tokens": tokens,
        "match": all(abs(loss - truth) <= LOSS_TOLERANCE * truth for loss in losses.values())
        and max(distance.values()) <= GRADIENT_TOLERANCE,
        "loss": {"one by one": truth, **losses},
        "gradient_distance": distance,
    }
    row |= timings(seconds, BARS)
    row["tokens_per_second"] = {name: rounded([tokens / median(values)])[0] for name, values in seconds.items()}
    row["times_as_fast"] = {name: rounded(ratios(seconds[name], seconds["ours"])) for name in items if name != "ours"}
    print(line(row, "case"))
    print(json.dumps({key: row[key] for key in ("tokens_per_second", "times_as_fast", "loss", "gradient_distance")}))
    write_json(arguments.json, {"machine": machine(), "rows": [row]})


if __name__ == "__main__":
    main()
