"""``qlora estimate``: the memory of a run before it, from a config file or a model's folder."""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_native._io import as_user_error, user_path
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import add_to, parse_size, picture, print_result

if TYPE_CHECKING:
    from qlora_native.distributed.memory import RankMemory
    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.estimate import Estimate, Estimator, Terms
    from qlora_native.tool.estimate.streaming import StreamedRun

CARDS = (1 << 30, 1 << 40)  # bytes of the smallest and the largest card that --gpu accepts
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)  # of the table of what fits

# Of the fields of Terms, in the table.
NAMES = {
    "weights": "4-bit weights",
    "scales": "their scales",
    "dense": "embeddings, norms",
    "adapters": "adapters",
    "copies": "copies of them",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "loss": "logits and loss",
    "scratch": "kernels, loading",
    "slack": "allocator",
}
WHEN = {
    "loading": "loading the model",
    "loss": "the loss, with all activations kept",
    "backward": "backward pass",
    "step": "the optimizer's step",
    "shipping": "finding the codes that ship, after the last step",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.usage = "qlora estimate [CONFIG|MODEL] [--gpu 24GB] [--key value ...]"
    add = add_to(parser)
    what = "a YAML file, a model folder (config.json is enough) or a .gguf file; --model names a model too"
    add("what", "CONFIG|MODEL", what, nargs="?")
    add("--gpu", "SIZE", "memory of a card, such as 24GB: does the run fit, and what would")
    add("--seq-length", "N", "tokens of the longest row (default: of data.train, if it is there)")
    add("--batch-size", "N", "rows a micro-batch (the key train.batch_size)")
    add("--gpus", "N", "several processes with a card each, by ddp and by fsdp", default=1)
    add(
        "--cpu",
        None,
        "for a run on the CPU (the default where torch finds no GPU and --gpu is not given)",
    )
    add(
        "--memory", "SIZE", "CPU: speed of a 4-bit folder or GGUF file in this memory, from two layers"
    )
    add(
        "--disk-rate",
        "SIZE",
        "with --memory: bytes a second of the disk (default: measured on the file)",
    )
    add("--json", None, "print one JSON object, in bytes")
    add("--plot", "FILE", "draw each part for checkpointing on and off, as .png")
    parser.epilog = """No weights are read, but with --memory. Any key of the config can be given as --key value.
With a model and --train FILE it is the run of `qlora train --model MODEL --train FILE`, which chooses by the rows.
docs/memory.md derives each figure and compares it with measurements.

examples:
  qlora estimate config.yaml
  qlora estimate --model Llama-3.1-8B-Instruct --train train.jsonl
  qlora estimate Llama-3.1-8B-Instruct --gpu 24GB --seq-length 2048 --batch-size 1
  qlora estimate Llama-3.1-70B-Instruct --gpus 8 --gpu 24GB
  qlora estimate Llama-3.1-8B-nf4 --memory 4GB --disk-rate 500MB
  qlora estimate Qwen3-8B --gpu 16GB --lora.r 64 --optimizer adamw8bit --plot memory.png"""


def run(args: argparse.Namespace) -> int:
    """Estimate and print."""
    import torch

    from qlora_native.tool.estimate import Estimator, Setting
    from qlora_native.tool.estimate.cards import streamed_on
    from qlora_native.tool.estimate.model import opened
    from qlora_native.weights.open import notes_of
    from qlora_native.weights.stream import Source

    logging.getLogger("transformers").setLevel(logging.ERROR)
    card = None if args.gpu is None else card_bytes(args.gpu)
    device = "cpu" if args.cpu or (card is None and not torch.cuda.is_available()) else "cuda"
    config, has_rows = _config(args, device, card)
    counts, why = _rows_at_hand(config) if has_rows and not args.seq_length else ((), "")
    with as_user_error():
        source = opened(user_path(config.model))
        estimator = Estimator(source, Setting.from_config(config, device, *counts))
        estimate = estimator.at()
    fitting = None if card is None else _fitting(estimator, card)
    on_card = None if card is None or estimate.fits(card) else streamed_on(estimator, card)
    ranks = [] if args.gpus == 1 else each_rank(estimator, config, args.gpus)
    if args.plot:
        plot(estimator, args.plot, Path(config.model).name)
    streamed = _streamed(args, config, estimator)
    options, rows, length = config.train, estimate.setting.batch_size, estimate.setting.length
    setting = {
        "model": config.model,
        "device": device,
        "batch_size": rows,
        "length": length,
        "grad_checkpointing": options.grad_checkpointing,
        "optimizer": options.optimizer,
        "r": config.lora.r,
    }
    result = {
        **estimate.as_dict(),
        "setting": setting,
        "card": card,
        "fits": fitting,
        "on_card": on_card and on_card.as_dict(),
        "streamed": streamed and vars(streamed),
        "ranks": [rank.as_dict() for rank in ranks],
    }
    lines = [
        f"{config.model} on {'a GPU' if device == 'cuda' else 'the CPU'}: {rows} x {length} tokens{why}, "
        f"checkpointing {'on' if options.grad_checkpointing else 'off'}, {options.optimizer}, rank {config.lora.r}"
    ]
    for field, name in [*NAMES.items(), ("total", "total")]:
        lines.append(f"  {name:<20} {size(getattr(estimate.peak, field)):>12}")
    lines += _lines(estimate, card, fitting)
    if device == "cpu":
        lines.append("Python and its libraries take up to 0.5 GiB beside it.")
    if on_card:
        found = on_card.as_dict()
        lines.append(
            f"It runs with {found['streamed_layers']} of {found['layers']} layers streaming through "
            f"{found['slots']} slots, in {size(found['card_bytes'])}; {size(found['pinned_bytes'])} are in pinned "
            f"memory of the host, {size(found['step_bytes'])} are copied a step."
        )
    lines += [str(streamed)] if streamed else []
    lines += [rank.line(card) for rank in ranks]
    lines += notes_of(source, config.quant.options["quant_type"]) if isinstance(source, Source) else []
    print_result(args, result, lines)
    return 0


def card_bytes(text: str, option: str = "--gpu") -> int:
    """The memory of a card: 24GB is 24 GiB, as makers of cards count; 24 means 24GB."""
    num_bytes = parse_size(text, 1024) or parse_size(f"{text}GB", 1024) or 0
    if not CARDS[0] <= num_bytes <= CARDS[1]:
        what = "the memory of a card" if option == "--gpu" else "memory"
        raise UserError(f"{option} is {text!r}: expected {what} from 1GB to 1TB, such as 24GB")
    return num_bytes


def _streamed(
    args: argparse.Namespace, config: TrainConfig, estimator: Estimator
) -> StreamedRun | None:
    """The run in the memory of --memory."""
    if args.memory is None:
        return None
    from qlora_native.tool.estimate.streaming import streamed_run

    if estimator.setting.device != "cpu":
        raise UserError(
            "--memory is for a run on the CPU: add --cpu, or use --gpu for the memory of a card"
        )
    rate = None if args.disk_rate is None else parse_size(args.disk_rate, 1000) or 0
    if rate is not None and not 1 << 20 <= rate <= 1 << 40:
        raise UserError(
            f"--disk-rate is {args.disk_rate!r}: expected bytes a second from 2MB to 1TB, such as 500MB"
        )
    return streamed_run(config, estimator, card_bytes(args.memory, "--memory"), rate)


def _config(args: argparse.Namespace, device: str, card: int | None) -> tuple[TrainConfig, bool]:
    """The config, and whether files of rows were named."""
    from qlora_native.tool.cli._start import completed
    from qlora_native.tool.config import TrainConfig

    flags = {"--data.max_length": args.seq_length, "--train.batch_size": args.batch_size}
    what, overrides = args.what, [*args.overrides]
    if not what and overrides and not overrides[0].startswith("--"):
        what = overrides.pop(0)
    overrides += [f"{key}={value}" for key, value in flags.items() if value is not None]
    if what and what.endswith((".yaml", ".yml")):
        return TrainConfig.from_file(what, overrides), True
    if what:
        overrides = ["--model", what, *overrides]
    given = {word.partition("=")[0] for word in overrides}
    if given & {"--train", "--data.train"}:
        return completed(TrainConfig.from_values({"data": {}}, overrides), device, card), True
    if "--model" not in given:
        raise UserError("qlora estimate: expected a config, a model, or --model MODEL --train FILE")
    return TrainConfig.from_values({"data": {"train": "rows.jsonl"}}, overrides), False


def _rows_at_hand(config: TrainConfig) -> tuple[tuple[int, ...], str]:
    """``measured_rows`` where the files are here and can be read, and how that is said."""
    from qlora_native.tool.cli._start import measured_rows

    if not all(user_path(path).exists() for path in config.data.files):
        return (), ""
    try:
        rows, longest = measured_rows(config)
    except UserError as error:
        return (), f" (data.max_length: {error})"
    return (rows, longest), f" (the longest of {rows:,} rows of {' and '.join(config.data.files)})"


def _fitting(estimator: Estimator, card: int) -> list[dict[str, int]]:
    """The longest rows for some batch sizes."""
    found = [{"batch_size": rows, "length": estimator.longest(card, rows)} for rows in BATCH_SIZES]
    return [entry for entry in found if entry["length"]]


def _lines(estimate: Estimate, card: int | None, fitting: list[dict[str, int]] | None) -> list[str]:
    lines = [f"Peak: {WHEN[estimate.moment]}."]
    if estimate.paged:
        lines.append(f"{size(estimate.paged)} of optimizer states are in a page file.")
    for kind in estimate.is_rough:
        lines.append(
            f"Not all that {kind} keeps could be counted: the activations are more than that."
        )
    if card is None:
        return lines
    needed = estimate.total + estimate.reserve
    verdict = "fits" if estimate.fits(card) else "does not fit"
    graphs = f" and {size(estimate.graphs)} for its graphs" if estimate.graphs else ""
    reserve = f"{size(estimate.reserve - estimate.graphs)} for CUDA itself{graphs}"
    lines.append(f"With {reserve}: {size(needed)}, which {verdict} {size(card)}.")
    for entry in fitting or ():
        lines.append(f"  batch_size {entry['batch_size']:<3} up to {entry['length']:,} tokens a row")
    if not fitting:
        lines.append("No row fits: the weights alone are too large, or nearly.")
    return lines


def size(num_bytes: float) -> str:
    """With its unit: MiB, or GiB from 10 on."""
    return (
        f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 10 * 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
    )


def plot(estimator: Estimator, file: Path, model: str) -> None:
    """Stacked bars of the peak for four lengths, checkpointing on and off, into a PNG."""
    length = estimator.setting.length
    cells = [
        (n, on)
        for n in (max(64, length // 4), max(64, length // 2), length, 2 * length)
        for on in (True, False)
    ]
    with picture("--plot", file) as figure:
        axes = figure.add_subplot(
            ylabel="GiB", title=f"{model}, batch of {estimator.setting.batch_size}"
        )
        peaks = [estimator.at(length=n, checkpointing=on).peak for n, on in cells]
        bottoms = [0.0] * len(cells)
        for field, name in NAMES.items():
            heights = [getattr(peak, field) / 2**30 for peak in peaks]
            axes.bar(range(len(cells)), heights, bottom=bottoms, label=name)
            bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
        axes.set_xticks(
            range(len(cells)),
            [f"{n:,}\n{'ckpt' if on else 'all kept'}" for n, on in cells],
            fontsize=8,
        )
        axes.legend(fontsize=8, loc="upper left")
        axes.grid(axis="y", alpha=0.3)


@dataclass(frozen=True)
class Rank:
    """One of several processes: ``moments`` are bytes by the part of a run."""

    mode: str
    memory: RankMemory
    moments: dict[str, int]
    reserve: int

    @property
    def total(self) -> int:
        """The peak, with what a card keeps for itself."""
        return max(self.moments.values()) + self.reserve

    def as_dict(self) -> dict[str, Any]:
        memory = {**vars(self.memory)}
        memory["cut"] = memory.pop("sharded")
        return {"mode": self.mode, "total": self.total, "moments": self.moments, **memory}

    def line(self, card: int | None) -> str:
        memory = self.memory
        verdict = (
            ""
            if card is None
            else f", which {'fits' if self.total <= card else 'does not fit'} {size(card)}"
        )
        held = f"{size(memory.frozen)} of frozen weights"
        if memory.sharded:
            most = max(memory.gathered_blocks, memory.gathered_input, memory.gathered_output)
            held += f" and up to {size(most)} gathered for a moment"
        received = f"{size(memory.received)} received a step"
        return f"{self.mode} on {memory.world}: {size(self.total)} a card{verdict}; {held}; {received}"


def each_rank(estimator: Estimator, config: TrainConfig, world: int) -> list[Rank]:
    """A rank under ddp and one under fsdp. UserError if there are no two of them, or no rows for each."""
    from qlora_native.distributed.memory import rank_memory

    batch_size = config.train.batch_size
    rows = batch_size * config.train.grad_accum
    if not 2 <= world <= rows:
        raise UserError(
            f"--gpus is {world}: expected 2 to {rows}, since a step learns from batch_size * grad_accum = {rows} rows"
        )
    rows_of_rank = math.ceil(rows / world)
    micro_batches = math.ceil(rows_of_rank / batch_size)
    local = estimator.at(
        micro_batches=micro_batches, batch_size=min(batch_size, rows_of_rank), cuda_graph=False
    )
    # The input embedding comes before all that grows with the tokens.
    begin = replace(local.moments["loss"], activations=0, loss=0, scratch=0)
    found: list[Rank] = []
    for mode in ("ddp", "fsdp"):
        memory = rank_memory(
            estimator.model, world, sharded=mode == "fsdp", micro_batches=micro_batches
        )
        gathered = {
            "input": memory.gathered_input,
            "loss": memory.gathered_output,
            "backward": memory.gathered_blocks,
        }
        moments = {
            name: _of_rank(terms, memory) + gathered.get(name, 0)
            for name, terms in {"input": begin, **local.moments}.items()
        }
        found.append(Rank(mode, memory, moments, local.reserve))
    return found


def _of_rank(terms: Terms, memory: RankMemory) -> int:
    """Bytes of one moment, with this rank's part of what is sharded."""
    part = memory.trained / terms.adapters if terms.adapters else 1.0
    shared = {
        name: math.ceil(getattr(terms, name) * part) for name in ("adapters", "gradients", "optimizer")
    }
    copies = 0 if memory.sharded else terms.copies  # none is kept of what is gathered
    return replace(terms, weights=memory.frozen, scales=0, dense=0, copies=copies, **shared).total
