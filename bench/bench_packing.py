"""A training step on rows whose lengths vary tenfold: padded as they come, grouped by length, packed.

    python bench/bench_packing.py --json

SmolLM2-135M in 4 bits with adapters of rank 16, through the trainer's own step (forward and backward over
micro-batches, checkpointing off), on the same rows in each arm: random tokens, the longest row ten times as long as the
shortest, the lengths even on a logarithmic scale. `padded` cuts the rows into micro-batches in a random order,
`grouped` in the order of their lengths, `ours` packs them. Tokens a second count no padding. `match`: whether each
arm has the loss of the rows one by one, from full logits, and the gradients of the padded arm. The floor is the time of
the products with frozen weights alone, on the rows' own tokens, at oneDNN's best rate in this run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import isa_env  # noqa: F401  (before torch)
import numpy as np
import torch
from ceilings import ceilings, floor
from common import Bar, Bench, interleaved, ratios, relative_error, rounded, timings
from peer_models import quantized_layers

from qlora_native.data.batching import micro_batches, pack, permutation
from qlora_native.models.loss import causal_lm_loss, trained_tokens
from qlora_native.tool.cli.demo import model_file
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.setup import check_packing, prepare_model

SHORTEST, SPREAD = 24, 10  # tokens; longest over shortest
PACKED_LENGTH = SHORTEST * SPREAD
BARS = (Bar("padded", 1.5, faster=True),)
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-3, 5e-2  # of bf16 activations


def random_rows(count: int, vocabulary: int) -> list[dict[str, np.ndarray]]:
    draw = np.random.RandomState(0)
    rows = []
    for length in np.geomspace(SHORTEST, PACKED_LENGTH, count).round().astype(int):
        ids = draw.randint(3, vocabulary, length)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(length) == 0, -100, ids)})
    return rows


@torch.no_grad()
def one_by_one(model: Any, rows: list[dict[str, np.ndarray]]) -> float:
    """The loss over all rows from full logits, each row on its own."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row["input_ids"])[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.numel() - 1
    return total / count


def main() -> None:
    # A model folder in place of SmolLM2-135M-Instruct; rows of a padded micro-batch.
    bench = Bench("packing", __doc__, model="", rows=24, batch=4, repeats=5)
    path, batch = Path(bench.options.model or model_file()), bench.options.batch
    values: dict[str, Any] = {"model": str(path), "data": {"train": "random"}, "quant": {"type": "nf4"}}
    values["train"] = {"grad_checkpointing": False}
    model = prepare_model(TrainConfig.model_validate(values))
    check_packing(model)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero as made, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.01)

    rows: Any = random_rows(bench.options.rows, model.config.vocab_size)
    lengths = np.array([len(row["input_ids"]) for row in rows])
    order = permutation(len(rows), 0)
    items: dict[str, list[Any]] = {
        "padded": order.tolist(),
        "grouped": np.argsort(-lengths, kind="stable").tolist(),
        "ours": pack(lengths, order, PACKED_LENGTH),
    }
    # As many tokens at once as the padded arm holds on average.
    widths = [lengths[order[at : at + batch]].max() for at in range(0, len(rows), batch)]
    sizes = dict.fromkeys(items, batch)
    sizes["ours"] = max(1, round(batch * float(np.mean(widths)) / PACKED_LENGTH))

    def step(name: str) -> float:
        model.zero_grad()
        batches = list(micro_batches(rows, items[name], sizes[name], 0, model.device))
        counts = [trained_tokens(batch) for batch in batches]
        loss = 0.0
        for batch, count in zip(batches, counts, strict=True):
            share = causal_lm_loss(model, batch) * (count / sum(counts))
            share.backward()
            loss += share.item()
        return loss

    losses, grads = {}, {}
    for name in items:
        losses[name] = step(name)
        grads[name] = torch.cat([parameter.grad.flatten() for parameter in weights if parameter.grad is not None])
    truth = one_by_one(model, rows)
    distance = {name: relative_error(grads[name], grads["padded"]) for name in ("grouped", "ours")}
    measured = ceilings(3)
    bench.begin(ceilings=measured)
    seconds = interleaved({name: partial(step, name) for name in items}, bench.options.repeats, warmup=0)

    tokens = int(lengths.sum())
    row: dict[str, Any] = {
        "case": path.stem,
        "rows": len(rows),
        "micro_batch": sizes,
        "lengths": [int(value) for value in np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])],
        "tokens": tokens,
        "match": all(abs(loss - truth) <= LOSS_TOLERANCE * truth for loss in losses.values())
        and max(distance.values()) <= GRADIENT_TOLERANCE,
        "loss": {"one by one": truth, **losses},
        "gradient_distance": distance,
    }
    frozen = sum(layer.quantized.numel() for layer in quantized_layers(model).values())
    row |= timings(seconds, BARS, floor(measured, 0, flops=4 * frozen * tokens))
    row["tokens_per_second"] = {name: rounded([tokens / median(values)])[0] for name, values in seconds.items()}
    row["times_as_fast"] = {name: rounded(ratios(seconds[name], seconds["ours"])) for name in items if name != "ours"}
    bench.add(row, "case", "tokens_per_second", "times_as_fast", "loss", "gradient_distance")
    bench.write()


if __name__ == "__main__":
    main()
