"""A QLoRA training run on SmolLM2-135M against transformers + peft: speed, memory and loss.

    python bench/bench_train.py --json bench/results/train.json
    python bench/bench_train.py --peer plain --full-length --quick

The peer (`--peer`) is `bitsandbytes`, NF4 with double quantisation and fp32 adapters; `bitsandbytes-tuned`, the same
with bf16 adapters on both sides and, for the peer, a malloc that keeps its memory; or `plain`, LoRA with fp32 adapters
on the bf16 weights themselves.

Each side is a process of its own that loads the same 16-bit weights, starts from the same adapter tensors and sees the
same batches in the same order at the same learning rate. The parent lets them take turns, one step each, so that both
meet the same machine; each side's memory is its own process's peak, loading included. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from common import machine, quartiles, write_json

ROWS, LENGTH = 4, 256
RANK, ALPHA = 16, 32
QUICK_STEPS = 12
PEERS = ("bitsandbytes", "bitsandbytes-tuned", "plain")
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "10000000000"}


def prepare(folder: Path, steps: int, seed: int, train_on: Literal["answers", "all"], full_length: bool) -> None:
    """Writes the 16-bit model, the common adapter, the batches of every step and the held-out batches."""
    from transformers import AutoModelForCausalLM, GgufConfig

    import qlora_native as qn
    from qlora_native.cli.demo import HELD_OUT_ROWS, MAX_CHARACTERS, model_file
    from qlora_native.data import BatchPlan, collate, load_dataset, padding_id
    from qlora_native.data.standard_library import write_split
    from qlora_native.train.setup import load_tokenizer

    source = model_file()
    tokenizer: Any = load_tokenizer(str(source))
    options = {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    dense = AutoModelForCausalLM.from_pretrained(source.parent, **options)
    dense.config.__dict__.pop("quantization_config", None)
    dense.save_pretrained(folder / "model")

    model = qn.load_model(folder / "model")
    qn.add_lora(model, qn.LoraConfig(r=RANK, alpha=ALPHA, seed=seed))
    qn.save_adapter(model, folder / "adapter")

    train_file, held_out_file, _, _ = write_split(folder / "data", MAX_CHARACTERS, HELD_OUT_ROWS)
    rows = load_dataset(train_file, tokenizer, max_length=LENGTH, train_on=train_on)
    held_out = load_dataset(held_out_file, tokenizer, max_length=LENGTH)
    pad = padding_id(tokenizer)
    order = BatchPlan(rows.lengths, ROWS, seed=seed).forever()
    if full_length:
        text = torch.cat([torch.as_tensor(rows[i]["input_ids"]).long() for i in range(len(rows))])
        text = text.repeat(-(-steps * ROWS * LENGTH // text.numel()))[: steps * ROWS * LENGTH]
        batches = [
            {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
            for ids in text.view(steps, ROWS, LENGTH)
        ]
    else:
        batches = [collate([rows[i] for i in next(order)], pad) for _ in range(steps)]
    evaluation = [
        collate([held_out[i] for i in range(at, min(at + ROWS, len(held_out)))], pad)
        for at in range(0, len(held_out), ROWS)
    ]
    torch.save({"train": batches, "held_out": evaluation}, folder / "batches.pt")


Loss = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def our_side(folder: Path) -> tuple[Any, Loss]:
    """The model as `qlora train` has it, and its loss."""
    import qlora_native as qn
    from qlora_native.train.fused import fuse
    from qlora_native.train.loss import causal_lm_loss
    from qlora_native.train.memory import keep_freed_memory

    keep_freed_memory()
    model: Any = qn.load_model(folder / "model")
    qn.load_adapter(model, folder / "adapter")
    fuse(model)
    return model, lambda batch: causal_lm_loss(model, batch)


def their_side(folder: Path, quantised: bool) -> tuple[Any, Loss]:
    """The usual stack: a bf16 model or a BitsAndBytesConfig, a PEFT adapter in fp32, and the model's own loss."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cpu"}
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    base = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
    return model, lambda batch: model(**batch).loss


def private_megabytes(field: str) -> float:
    """A memory figure of this process from the kernel, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def worker(side: str, peer: str, folder: Path, lr: float, threads: int) -> None:
    """Serves one side: reads a command a line, answers with a line of JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; the pipe carries answers only
    imported = private_megabytes("VmRSS")
    model, loss_of = our_side(folder) if side == "ours" else their_side(folder, quantised=peer != "plain")
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if peer == "bitsandbytes-tuned":
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.bfloat16)
    if side == "ours":  # as `qlora train` has it: the step clips
        from qlora_native.optim import AdamW

        optimizer: torch.optim.Optimizer = AdamW(parameters, lr, max_norm=1.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=True)
    batches = torch.load(folder / "batches.pt")

    def held_out_loss() -> float:
        # In training mode, which without dropout computes the same: one forward of bitsandbytes' layers in evaluation
        # mode on a CPU repacks their weights in place, and cuts the gradients of all training after it.
        total = count = 0.0
        with torch.no_grad():
            for batch in batches["held_out"]:
                tokens = int((batch["labels"][:, 1:] != -100).sum())
                total += float(loss_of(batch)) * tokens
                count += tokens
        return total / count

    def step(index: int) -> dict[str, float]:
        started = time.perf_counter()
        loss = loss_of(batches["train"][index])
        loss.backward()
        if side != "ours":
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss), "seconds": time.perf_counter() - started}

    trainable = sum(p.numel() for p in parameters)
    for line in sys.stdin:
        command, *rest = line.split()
        answer: dict[str, float] = {}
        if command == "step":
            answer = step(int(rest[0]))
        elif command == "evaluate":
            answer = {"loss": held_out_loss()}
        elif command == "memory":  # VmHWM: the peak, of the training steps too
            answer = {"peak_mib": private_megabytes("VmHWM"), "imported_mib": imported, "trainable": trainable}
        print(json.dumps(answer), file=channel, flush=True)


class Side:
    """A worker process of the parent."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path) -> None:
        command = [sys.executable, __file__, "--worker", name, "--folder", str(folder), "--peer", arguments.peer]
        tuned = name == "theirs" and arguments.peer == "bitsandbytes-tuned"
        env = {**os.environ, **(TUNED_MALLOC if tuned else {})}
        command += ["--lr", str(arguments.lr), "--threads", str(arguments.threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )

    def ask(self, command: str) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended early: run it by hand, with --worker and --folder, to see why")
        return dict(json.loads(line))


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs both sides step by step in turn."""
    prepare(folder, arguments.steps, arguments.seed, arguments.train_on, arguments.full_length)
    tokens = [int(b["attention_mask"].sum()) for b in torch.load(folder / "batches.pt")["train"]]
    sides = {name: Side(name, arguments, folder) for name in ("ours", "theirs")}
    start = {} if arguments.quick else {name: side.ask("evaluate")["loss"] for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(arguments.steps):
        for name, side in sides.items():
            answer = side.ask(f"step {index}")
            seconds[name].append(answer["seconds"])
            losses[name].append(answer["loss"])
    memory = {name: side.ask("memory") for name, side in sides.items()}
    end = {} if arguments.quick else {name: side.ask("evaluate")["loss"] for name, side in sides.items()}
    for side in sides.values():
        side.process.terminate()

    warm = slice(min(3, arguments.steps - 1), None)
    speeds = {name: quartiles([t / s for t, s in zip(tokens, seconds[name], strict=True)][warm]) for name in sides}
    ratios = quartiles([b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)][warm])
    return {
        "bench": "train",
        "machine": machine(),
        "setting": {
            key: getattr(arguments, key)
            for key in ("peer", "steps", "lr", "seed", "train_on", "full_length", "threads")
        }
        | {"rows": ROWS, "max_length": LENGTH, "rank": RANK, "tokens_a_step": sum(tokens) / len(tokens)},
        "held_out_loss_start": start,
        "held_out_loss_end": end,
        "train_loss_last_10": {name: sum(v[-10:]) / len(v[-10:]) for name, v in losses.items()},
        "tokens_per_second_quartiles": speeds,
        "speed_ratio_quartiles": ratios,
        "peak_rss_mib": {name: memory[name]["peak_mib"] for name in sides},
        "peak_rss_ratio": memory["ours"]["peak_mib"] / memory["theirs"]["peak_mib"],
        "trainable_parameters": {name: memory[name]["trainable"] for name in sides},
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer", choices=PEERS, default="bitsandbytes")
    parser.add_argument("--full-length", action="store_true", help=f"every row is {LENGTH} tokens, all trained")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, no held-out loss")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--train-on", choices=("answers", "all"), default="answers")
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.peer, arguments.folder, arguments.lr, arguments.threads)
        return
    if arguments.quick:
        arguments.steps = QUICK_STEPS
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments, Path(folder))
    write_json(arguments.json, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
