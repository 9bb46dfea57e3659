"""The peak memory of TRL's trainers on SmolLM2-135M in 4 bits: DPO and KTO against SFT at as many tokens a step.

    python bench/bench_preference.py --json

Each run is a process of its own with our optimizer and bf16 activations, on 8 sequences of 256 tokens, which for DPO
are 4 pairs; the reference of DPO and KTO is the base without its adapter. `peak_mib` is the peak of resident memory
from the first step on, less what the imports take; `above_sft` its ratio to SFT's, with checkpointing or without.
`head`: the log-probabilities are computed by our chunks or by TRL's own code. `match`: the gradient's norm of the first
step is that with TRL's code, to 2 %. Needs the extra `test`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from ceilings import ceilings
from children import Answer, called
from common import Bench, verdict
from peer_models import private_megabytes, reset_peak, tokenizer

import qlora_native as qn
from qlora_native.tool.cli.demo import MAX_CHARACTERS, model_file
from qlora_native.tool.cli.standard_library import examples

SEQUENCES, LENGTH, STEPS = 8, 256, 2
BAR, TOLERANCE = 1.15, 0.02
KINDS = ("sft", "dpo", "kto")
# Trainer, head, checkpointing
RUNS = [*((kind, "ours", kept) for kept in (True, False) for kind in KINDS), *((kind, "trl", True) for kind in KINDS)]


def rows(kind: str) -> list[dict[str, Any]]:
    """Texts that are longer than LENGTH tokens, in the columns of a trainer."""
    text = "".join(example.source for example in examples(MAX_CHARACTERS))
    size, found = 8 * LENGTH, []
    for first in range(0, 2 * SEQUENCES * STEPS * size, 2 * size):
        prompt, chosen = text[first : first + 64], text[first + 64 : first + size]
        columns: dict[str, dict[str, Any]] = {
            "sft": {"text": prompt + chosen},
            "dpo": {"prompt": prompt, "chosen": chosen, "rejected": text[first + size :][:size]},
            "kto": {"prompt": prompt, "completion": chosen, "label": first % (4 * size) == 0},
        }
        found.append(columns[kind])
    return found


def peak(kind: str, head: str, checkpointing: bool, out: str) -> Answer:
    """Trains in this process; MiB, and the gradient's norm of the first step."""
    import trl
    from datasets import Dataset

    imported = private_megabytes("VmRSS")
    if head != "trl":
        qn.patch_trl()
    trainer = getattr(trl, f"{kind.upper()}Trainer")(
        model=qn.load_model(model_file(), quant_type="nf4", dtype=torch.bfloat16),
        args=getattr(trl, f"{kind.upper()}Config")(
            output_dir=out,
            max_steps=STEPS,
            max_length=LENGTH,
            per_device_train_batch_size=SEQUENCES // 2 if kind == "dpo" else SEQUENCES,
            gradient_checkpointing=checkpointing,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows(kind)),
        processing_class=tokenizer(),
        peft_config=qn.peft_config(),
    )
    trainer.optimizer_cls_and_kwargs = (qn.optim.AdamW, {"lr": 2e-4})
    reset_peak()
    trainer.train()
    norm = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
    return {"peak_mib": round(private_megabytes("VmHWM") - imported), "imports_mib": round(imported), "norm": norm}


def judged(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with ratios, bars and whether they match."""
    for row in found:
        sft = next(r for r in found if r["trainer"] == "sft" and r["checkpointing"] == row["checkpointing"])
        truth = next(r for r in found if r["trainer"] == row["trainer"] and r["head"] == "trl")["norm"]
        value = row["above_sft"] = round(row["peak_mib"] / sft["peak_mib"], 3)
        row |= {"match": abs(row["norm"] - truth) <= TOLERANCE * truth, "bars": []}
        if (row["trainer"], row["head"]) == ("dpo", "ours"):
            row["bars"].append(verdict("sft", "of the peak memory", BAR, value))
    return found


def main() -> None:
    bench = Bench("preference", __doc__)
    bench.begin(ceilings=ceilings(), setting={"tokens_a_step": SEQUENCES * LENGTH, "steps": STEPS})
    found = []
    for kind, head, checkpointing in RUNS:
        row = {"trainer": kind, "head": head, "checkpointing": checkpointing}
        with tempfile.TemporaryDirectory() as out:
            found.append(row | called(peak, kind, head, checkpointing, out))
    for row in judged(found):
        bench.add(row, "trainer", "head", "checkpointing", "peak_mib", "above_sft")
    bench.write()


if __name__ == "__main__":
    main()
