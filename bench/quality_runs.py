"""Fine-tuning runs of bench_quality: the same batches on each base, and the held-out losses of their adapters.

    python bench/quality_runs.py --work FOLDER bf16 rtn wmse gptq

A run is named BASE-LR-SEED; its result is a file of that name in FOLDER/runs, and a run that has one is not made again,
so that this can be stopped, continued, and started twice to use two processors. The bases are the model folders
FOLDER/BASE, which bench_quality makes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_texts import batches, held_out

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
    import qlora_native as qn
    from qlora_native.models.load import load_dense

    return load_dense(folder) if folder.name == "bf16" else qn.load_model(folder)


def run(base: Path, rate: float, seed: int, tokenizer: Any) -> dict[str, Any]:
    """One adapter of rank 16 on every linear layer, as `qlora train` makes it: AdamW, clipping, warm-up, cosine."""
    import qlora_native as qn
    from qlora_native.models.loss import causal_lm_loss
    from qlora_native.tool.evaluate.measure import measure
    from qlora_native.tool.train.setup import learning_rate

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


def main() -> None:
    """Make the runs that are missing."""
    from qlora_native._memory import keep_freed_memory
    from qlora_native.tool.cli.demo import model_file
    from qlora_native.weights.open import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bases", nargs="+", metavar="BASE")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    keep_freed_memory()
    tokenizer = load_tokenizer(str(model_file()))
    runs = arguments.work / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for seed, rate, base in itertools.product(SEEDS, RATES, arguments.bases):
        name = f"{base}-{rate:g}-{seed}"
        claim = runs / f"{name}.{os.getpid()}"
        if (runs / f"{name}.json").exists() or any(_alive(other) for other in runs.glob(f"{name}.[0-9]*")):
            continue
        claim.touch()
        try:
            result = run(arguments.work / base, rate, seed, tokenizer)
            claim.write_text(json.dumps(result) + "\n", encoding="utf-8")
            claim.rename(runs / f"{name}.json")
        finally:
            claim.unlink(missing_ok=True)
        print(name, {text: round(result[text]["loss"], 4) for text in EVALUATED}, result["seconds"], "s", flush=True)


def _alive(claim: Path) -> bool:
    try:
        os.kill(int(claim.suffix[1:]), 0)
    except (ProcessLookupError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
