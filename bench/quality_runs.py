"""Fine-tuning runs of bench_quality: the same batches on each base, and the held-out losses of their adapters.

A run is named BASE-LR-SEED; its result is a file of that name in FOLDER/runs, and a run that has one is not made again.
The bases are the model folders FOLDER/BASE, which bench_quality makes.
"""

from __future__ import annotations

import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import kept
from peer_models import tokenizer
from quality_texts import batches, held_out

import qlora_native as qn
from qlora_native._memory import keep_freed_memory
from qlora_native.models.load import load_dense
from qlora_native.models.loss import causal_lm_loss
from qlora_native.tool.evaluate.measure import measure
from qlora_native.tool.train.setup import learning_rate

SEEDS = (0, 1, 2)
RATES = (2e-4, 1e-3)
STEPS, ROWS, LENGTH = 100, 2, 128
RANK, ALPHA = 16, 32
EVALUATED = ("A", "B")
EVALUATED_ROWS = 24


def as_rows(ids: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """Windows [rows, length] as rows in which every token is predicted."""
    return [{"input_ids": row, "labels": row} for row in ids.numpy().astype(np.int32)]


def load(folder: Path) -> Any:
    """A base of the comparison, 16-bit or 4-bit."""
    return load_dense(folder) if folder.name == "bf16" else qn.load_model(folder)


def run(base: Path, rate: float, seed: int, tokenizer: Any) -> dict[str, Any]:
    """One adapter of rank 16 on every linear layer, as `qlora train` makes it: AdamW, clipping, warm-up, cosine."""
    began = time.monotonic()
    model = qn.add_lora(load(base), qn.LoraConfig(r=RANK, alpha=ALPHA, seed=seed)).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = qn.optim.AdamW(parameters, rate, max_norm=1.0)
    losses = []
    for step, ids in enumerate(batches(tokenizer, STEPS, ROWS, LENGTH, seed)):
        loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, peak=rate, warmup=0.05, scheduler="cosine")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    result: dict[str, Any] = {"base": base.name, "lr": rate, "seed": seed, "train_loss": losses}
    for name, text in held_out(tokenizer).items():
        if name in EVALUATED:
            scores, _ = measure(model, as_rows(text.ids[:EVALUATED_ROWS]), 0)
            result[name] = {"loss": scores.loss[0], "nats": scores.nats.tolist(), "tokens": scores.tokens.tolist()}
    return result | {"seconds": round(time.monotonic() - began, 1)}


def make_part(work: str, bases: list[str], part: int, parts: int) -> None:
    """Makes those of the runs that are missing which fall to one of several processes."""
    keep_freed_memory()
    encode = tokenizer()
    runs = itertools.product(SEEDS, RATES, bases)
    for seed, rate, base in itertools.islice(runs, part, None, parts):
        name = f"{base}-{rate:g}-{seed}"
        found = kept(Path(work, "runs", f"{name}.json"), partial(run, Path(work, base), rate, seed, encode))
        print(name, {text: round(found[text]["loss"], 4) for text in EVALUATED}, found["seconds"], "s", flush=True)
