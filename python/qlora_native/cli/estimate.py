"""``qlora estimate``: the memory of a run before it, from a config file or a model's folder."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_native.errors import UserError

if TYPE_CHECKING:
    from qlora_native.config import TrainConfig
    from qlora_native.distributed.plan import RankPlan
    from qlora_native.estimate import Estimate, Estimator, Terms

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
    from qlora_native._io import as_user_error
    from qlora_native.estimate import Estimator, Setting

    logging.getLogger("transformers").setLevel(logging.ERROR)
    card = None if args.gpu is None else card_bytes(args.gpu)
    config = _config(args)
    device = "cpu" if args.cpu else "cuda" if card is not None or _has_gpu() else "cpu"
    with as_user_error():
        estimator = Estimator(Path(config.model).expanduser(), Setting.from_config(config, device))
        estimate = estimator.at()
    fitting = None if card is None else _fitting(estimator, card)
    ranks = [] if args.gpus == 1 else each_rank(estimator, estimate, config, args.gpus, card_bytes(args.link, "--link"))
    if args.plot:
        plot(estimator, Path(args.plot), Path(config.model).name)
    if args.json:
        told = {"setting": _told(config, device), "card": card, "fits": fitting, "ranks": told_ranks(ranks)}
        print(json.dumps({**estimate.as_dict(), **told}))
        return 0

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
    from qlora_native.config import TrainConfig

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


def show(estimate: Estimate, title: str, lines: Sequence[str]) -> None:
    """Print the parts of the peak, largest moment; a table on a terminal, plain lines elsewhere."""
    peak = estimate.peak
    rows = [(WHAT[field.name], getattr(peak, field.name)) for field in fields(peak)]
    if is_plain() or not _rich_table(title, rows, peak.total):
        print(title)
        for name, num_bytes in [*rows, ("total", peak.total)]:
            print(f"  {name:<20} {size(num_bytes):>12}")
    for line in lines:
        print(line)


def _rich_table(title: str, rows: Sequence[tuple[str, int]], total: int) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("", footer="total")
    table.add_column("memory", footer=size(total), justify="right")
    table.add_column("")
    most = max(num_bytes for _, num_bytes in rows) or 1
    for name, num_bytes in rows:
        table.add_row(name, size(num_bytes), "\u2588" * round(30 * num_bytes / most))
    Console().print(table)
    return True


def plot(estimator: Estimator, picture: Path, name: str) -> None:
    """Stacked bars of the peak for four lengths, checkpointing on and off, into a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib, which is not installed: pip install 'qlora_native[train]'") from None
    if picture.suffix != ".png":
        raise UserError(f"--plot is {picture}: expected a name that ends in .png")
    length = estimator.setting.length
    cells = [(n, on) for n in (max(64, length // 4), max(64, length // 2), length, 2 * length) for on in (True, False)]
    estimates = [estimator.at(length=n, checkpointing=on) for n, on in cells]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel="GiB", title=f"{name}, batch of {estimator.setting.batch_size}")
    bottoms = [0.0] * len(cells)
    for field, what in WHAT.items():
        heights = [getattr(estimate.peak, field) / 2**30 for estimate in estimates]
        axes.bar(range(len(cells)), heights, bottom=bottoms, label=what)
        bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(cells)), [f"{n:,}\n{'ckpt' if on else 'all kept'}" for n, on in cells], fontsize=8)
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(axis="y", alpha=0.3)
    try:
        figure.savefig(picture, dpi=120)
    except OSError as error:
        raise UserError(f"could not write {picture}: {error.strerror}") from error


@dataclass(frozen=True)
class Rank:
    """One of several processes: ``moments`` are bytes by the part of a run, ``seconds`` those of a step's messages."""

    mode: str
    plan: RankPlan
    moments: dict[str, int]
    reserve: int
    seconds: float

    @property
    def total(self) -> int:
        """The peak, with what a card keeps for itself."""
        return max(self.moments.values()) + self.reserve


def each_rank(estimator: Estimator, estimate: Estimate, config: TrainConfig, world: int, link: int) -> list[Rank]:
    """A rank under ddp and one under fsdp. UserError if there are no two of them, or no rows for each."""
    from qlora_native.distributed.plan import plan_rank

    options = config.train
    rows = options.batch_size * options.grad_accum
    if not 2 <= world <= rows:
        raise UserError(
            f"--gpus is {world}: expected 2 to {rows}, since a step learns from batch_size * grad_accum = {rows} rows"
        )
    micro_batches = math.ceil(math.ceil(rows / world) / options.batch_size)
    found = []
    for mode in ("ddp", "fsdp"):
        plan = plan_rank(estimator.anatomy.model, world, cut=mode == "fsdp", micro_batches=micro_batches)
        local = estimator.at(micro_batches=micro_batches, batch_size=min(options.batch_size, math.ceil(rows / world)))
        # The input embedding comes before all that grows with the tokens.
        begin = replace(local.moments["loss"], activations=0, loss=0, scratch=0)
        moments = {name: _of_rank(name, terms, plan) for name, terms in {"input": begin, **local.moments}.items()}
        found.append(Rank(mode, plan, moments, estimate.reserve, plan.seconds(link)))
    return found


def _of_rank(moment: str, terms: Terms, plan: RankPlan) -> int:
    """Bytes of one moment, with this rank's part of what is cut."""
    part = plan.trained / terms.adapters if terms.adapters else 1.0
    own = replace(
        terms,
        weights=plan.frozen,
        scales=0,
        dense=0,
        adapters=math.ceil(terms.adapters * part),
        gradients=math.ceil(terms.gradients * part),
        optimizer=math.ceil(terms.optimizer * part),
    )
    gathered = {"input": plan.gathered_input, "loss": plan.gathered_output, "backward": plan.gathered_blocks}
    return own.total + gathered.get(moment, 0)


def told_ranks(ranks: list[Rank]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {"mode": rank.mode, "total": rank.total, "seconds": rank.seconds, "moments": rank.moments, **vars(rank.plan)}
        for rank in ranks
    ]


def rank_lines(ranks: list[Rank], card: int | None) -> list[str]:
    """A few lines on each mode."""
    lines = []
    for rank in ranks:
        plan = rank.plan
        verdict = "" if card is None else f", which {'fits' if rank.total <= card else 'does not fit'} {size(card)}"
        held = f"{size(plan.frozen)} of frozen weights"
        if plan.cut:
            most = max(plan.gathered_blocks, plan.gathered_input, plan.gathered_output)
            held += f" and up to {size(most)} gathered for a moment"
        lines.append(
            f"{rank.mode} on {plan.world}: {size(rank.total)} a card{verdict}; {held}; "
            f"{size(plan.received)} received a step, {rank.seconds:.2g} s on that link"
        )
    return lines
