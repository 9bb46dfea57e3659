"""``qlora estimate``: the memory of a run before it, from a config file or a model's folder."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_native.errors import UserError

if TYPE_CHECKING:
    from qlora_native.estimate import Estimate, Estimator
    from qlora_native.train import TrainConfig

UNITS = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
CARDS = (1 << 30, 1 << 40)  # bytes of the smallest and the largest card that is believed
MOST_ROWS = 64  # of the table of what fits

WHAT = {
    "weights": "4-bit weights",
    "scales": "their scales",
    "dense": "embeddings, norms",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "loss": "logits and loss",
    "scratch": "kernels, loading",
    "slack": "allocator",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.usage = "qlora estimate CONFIG|MODEL [--gpu 24GB] [--key value ...]"
    parser.add_argument(
        "what", metavar="CONFIG|MODEL", help="a YAML file, a model folder (config.json is enough) or a .gguf file"
    )
    parser.add_argument(
        "--gpu", metavar="SIZE", help="memory of a card, such as 24GB: does the run fit, and what would"
    )
    parser.add_argument("--seq-length", type=int, metavar="N", help="tokens a row (the key data.max_length)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows a micro-batch (the key train.batch_size)")
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="several processes with a card each, by ddp and by fsdp"
    )
    parser.add_argument(
        "--link", default="25GB", metavar="SIZE", help="with --gpus: bytes a second between cards (25GB)"
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="for a run on the CPU (the default where torch finds no GPU and --gpu is not given)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")
    parser.add_argument("--plot", metavar="FILE.png", help="draw each part for checkpointing on and off")
    parser.epilog = """No weights are read. Any key of the config can be given as --key value. docs/memory.md tells
how each figure comes about and how far it was from what was measured.

examples:
  qlora estimate config.yaml
  qlora estimate Llama-3.1-8B-Instruct --gpu 24GB --seq-length 2048 --batch-size 1
  qlora estimate Llama-3.1-70B-Instruct --gpus 8 --gpu 24GB --link 50GB
  qlora estimate Qwen3-8B --gpu 16GB --lora.r 64 --optimizer adamw8bit --plot memory.png"""


def run(args: argparse.Namespace) -> int:
    """Estimate and print."""
    from qlora_native.cli.rank_view import each_rank, rank_lines, told_ranks
    from qlora_native.estimate import Estimator
    from qlora_native.train.report import setting_of
    from qlora_native.train.setup import told_to_the_user

    logging.getLogger("transformers").setLevel(logging.ERROR)
    card = None if args.gpu is None else card_bytes(args.gpu)
    config = _config(args)
    device = "cpu" if args.cpu else "cuda" if card is not None or _has_gpu() else "cpu"
    with told_to_the_user():
        estimator = Estimator(Path(config.model).expanduser(), setting_of(config, device))
        estimate = estimator.at()
    fitting = None if card is None else _fitting(estimator, card)
    ranks = [] if args.gpus == 1 else each_rank(estimator, estimate, config, args.gpus, card_bytes(args.link, "--link"))
    if args.plot:
        from qlora_native.cli.memory_view import plot

        plot(estimator, Path(args.plot), Path(config.model).name)
    if args.json:
        told = {"setting": _told(config, device), "card": card, "fits": fitting, "ranks": told_ranks(ranks)}
        print(json.dumps({**estimate.as_dict(), **told}))
        return 0
    from qlora_native.cli.memory_view import show

    show(estimate, _title(config, device), _lines(estimate, card, fitting) + rank_lines(ranks, card))
    return 0


def card_bytes(text: str, option: str = "--gpu") -> int:
    """The memory of a card: 24GB is 24 GiB, as makers of cards count."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])?(?:i?B)?", text.strip(), re.IGNORECASE)
    size = 0 if found is None else int(float(found[1]) * UNITS[(found[2] or "G").upper()])
    if not CARDS[0] <= size <= CARDS[1]:
        what = "the memory of a card" if option == "--gpu" else "bytes a second"
        raise UserError(f"{option} is {text!r}: expected {what} from 1GB to 1TB, such as 24GB")
    return size


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _config(args: argparse.Namespace) -> TrainConfig:
    from qlora_native.train.config import TrainConfig

    overrides = list(args.overrides)
    for key, value in (("data.max_length", args.seq_length), ("train.batch_size", args.batch_size)):
        overrides += [] if value is None else [f"--{key}", str(value)]
    if args.what.endswith((".yaml", ".yml")):
        return TrainConfig.from_file(args.what, overrides)
    return TrainConfig.from_values({"model": args.what, "data": {"train": "rows.jsonl"}}, overrides)


def _told(config: TrainConfig, device: str) -> dict[str, Any]:
    options = config.train
    return {
        "model": config.model,
        "device": device,
        "batch_size": options.batch_size,
        "length": config.data.max_length,
        "grad_checkpointing": options.grad_checkpointing,
        "optimizer": options.optimizer,
        "r": config.lora.r,
    }


def _title(config: TrainConfig, device: str) -> str:
    options = config.train
    return (
        f"{config.model} on {'a GPU' if device == 'cuda' else 'the CPU'}: {options.batch_size} x "
        f"{config.data.max_length} tokens, checkpointing {'on' if options.grad_checkpointing else 'off'}, "
        f"{options.optimizer}, rank {config.lora.r}"
    )


def _fitting(estimator: Estimator, card: int) -> list[dict[str, int]]:
    """The longest rows for some batch sizes."""
    found = []
    batch_size = 1
    while batch_size <= MOST_ROWS:
        length = estimator.longest(card, batch_size)
        if length == 0:
            break
        found.append({"batch_size": batch_size, "length": length})
        batch_size *= 2
    return found


def _lines(estimate: Estimate, card: int | None, fitting: list[dict[str, int]] | None) -> list[str]:
    lines = [f"The most is held {_WHEN[estimate.moment]}."]
    if estimate.paged:
        lines.append(f"{size(estimate.paged)} of optimizer states are in a page file.")
    for kind in estimate.is_rough:
        lines.append(f"There is no formula for all that {kind} keeps: the activations are more than that.")
    if card is None:
        return lines
    needed = estimate.total + estimate.reserve
    verdict = "fits" if estimate.fits(card) else "does not fit"
    lines.append(f"With {size(estimate.reserve)} for CUDA itself: {size(needed)}, which {verdict} {size(card)}.")
    for entry in fitting or ():
        lines.append(f"  batch_size {entry['batch_size']:<3} up to {entry['length']:,} tokens a row")
    if not fitting:
        lines.append("No row fits: the weights alone are too large, or nearly.")
    return lines


_WHEN = {
    "loading": "while the model is loaded",
    "loss": "at the loss, with all activations kept",
    "backward": "in the backward pass",
    "step": "in the optimizer's step",
}


def size(num_bytes: float) -> str:
    """In MiB, or in GiB from 10 on."""
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 10 * 2**30 else f"{num_bytes / 2**20:,.0f} MiB"


def is_plain() -> bool:
    """Whether the output is no terminal."""
    return not sys.stdout.isatty()
