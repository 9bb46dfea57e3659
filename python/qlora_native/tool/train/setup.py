"""What a run needs before its first step: the 4-bit model with its adapters, the optimizer, the learning rate."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_native._io import announced, as_user_error, as_write_error, user_path
from qlora_native.data.batching import BatchSampler, PackedBatchSampler, Sampler
from qlora_native.data.dataset import TokenizedDataset
from qlora_native.distributed import OneProcess
from qlora_native.errors import UserError
from qlora_native.lora import LoraConfig, LoRALinear, add_lora, load_adapter, lora_layers
from qlora_native.models.build import four_bit_parts
from qlora_native.models.fuse import fuse, modes_kept
from qlora_native.models.load import load_model
from qlora_native.models.loss import hidden_states
from qlora_native.models.progress import Progress, layer_progress
from qlora_native.nn import QuantizedLinear
from qlora_native.optim import AdamW, Lion
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.sections import LoopSection
from qlora_native.tool.train.checkpoint import Checkpoint
from qlora_native.tool.train.passes import why_eager
from qlora_native.weight import CALIBRATED
from qlora_native.weights.config import METADATA
from qlora_native.weights.open import notes_of, open_source
from qlora_native.weights.shapes import dense_beside
from qlora_native.weights.stream import AUTO, KEEP, Source


def prepare_model(
    config: TrainConfig,
    model: Any = None,
    rows: TokenizedDataset | None = None,
    ranks: OneProcess | None = None,
    *,
    source: Source | None = None,
    stored: Source | None = None,
    tokenizer: Any = None,
    layers_budget: int | None = None,
    adapter: Path | None = None,
    quiet: bool = False,
) -> Any:
    """The 4-bit model with adapters, in training mode, sharded over the ranks if the config says so.

    Args:
        model: used instead of loading ``config.model``; adapters are added unless it has some.
        rows: training rows, which calibrate it if ``quant.calibration`` names nothing else.
        source: of ``config.model``, if it is open already.
        stored: the weights that the first part of this run made of it.
        tokenizer: of the run, which names the rows that ``lora.trainable_tokens`` trains.
        adapter: the folder of the adapter to start from.
        layers_budget: bytes of the card for the layers' 4-bit weights; the layers beyond it stream.
    """
    options = config.train
    ranks = ranks or OneProcess()
    lora = config.lora.as_config(options.seed, tokenizer)
    with as_user_error(), layer_progress(quiet=quiet) as progress:
        if model is None:
            source = open_source(source or user_path(config.model))
            for note in notes_of(source, config.quant.options["quant_type"]):
                progress(note, 0, 0)
            on_card = torch.cuda.is_available() and layers_budget is None
            with nullcontext() if quiet else announced(f"loading {source.path}"):
                model = _load(
                    config, stored or source, lora, rows, ranks, progress, "cuda" if on_card else None
                )
            model.load_report = replace(model.load_report, path=source.path)
            if layers_budget is not None:
                from qlora_native.models.device_layers import stream_layers

                stream_layers(model, "cuda", layers_budget)
        else:
            fuse(model)
        has_adapters = any(isinstance(module, LoRALinear) for module in model.modules())
        if config.quant.save and stored is None and not has_adapters and ranks.world == 1:
            _store(model, source, user_path(config.output_dir), tokenizer, progress)
        if adapter is not None:
            load_adapter(model, adapter)
            for _, layer in lora_layers(model):
                layer.dropout = lora.dropout
            model.lora_config = replace(model.lora_config, dropout=lora.dropout)
        elif not has_adapters:
            add_lora(model, lora)
        if ranks.is_sharded:
            from torch.distributed.fsdp import FSDPModule

            from qlora_native.distributed.sharding import shard

            model = model if isinstance(model, FSDPModule) else shard(model)
        if options.grad_checkpointing:
            # transformers 5.0 has the older name only. Not the re-entrant kind: it drops the gradients of a block
            # whose input needs none, as the first one's here.
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )
            checkpointing = {"use_reentrant": False}
            # In a graph nothing is random, and it cannot save a state.
            if why_eager(config, model, ranks.world) is None:
                checkpointing["preserve_rng_state"] = False
            enable(checkpointing)
    return model.train()


def check_held_out(config: TrainConfig) -> None:
    """UserError for what needs held-out rows, where there are to be none."""
    if config.data.eval is not None or config.data.eval_fraction:
        return
    for key in ("patience", "samples"):
        if isinstance(value := getattr(config.train, key), int) and value:
            raise UserError(
                f"train.{key} is {value}, and no rows are held out: set data.eval, or data.eval_fraction above 0"
            )


def check_data(
    source: Source | None, tokenizer: Any, rows: TokenizedDataset, held_out: TokenizedDataset | None
) -> list[str]:
    """The mistakes in the rows, as lines to print. UserError for rows on which the model computes nonsense or fails."""
    from qlora_native.data.check import iter_findings

    text = source and source.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    # check_vocabulary has looked at the embedding.
    findings = list(iter_findings(rows, held_out, tokenizer, positions))
    if wrong := [finding.text for finding in findings if finding.name == "beyond-positions"]:
        raise UserError(f"{rows.stats.path}: {wrong[0]}")
    notes = [f"data check: {finding}" for finding in findings]
    if rows.stats.template == "default":
        made_up = "rows get `### User:` and `### Assistant:`; data.chat_template sets one"
        notes.insert(0, f"the tokenizer has no chat template: {made_up}")
    return notes


def resolve(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    rows: TokenizedDataset,
    source: Source | None,
    model: Any,
) -> tuple[TrainConfig, list[str]]:
    """The config of a run with nothing left open, and lines to print where that is not what was asked for.

    ``quant.method`` becomes rtn where the training rows are too few to calibrate with, and ``quant.type`` auto what it
    means for the weights: those of the checkpoint to continue from, of ``source``, or of the ``model`` given. What
    reads the adapter, and a resumed run, must find in its config what it was trained on.

    UserError if the method is not that of the checkpoint.
    """
    quant = config.quant
    kind: str = quant.type
    method = quant.method
    notes = []
    if source is not None and quant.falls_back and not _is_made(config, source):
        from qlora_native.calibration.data import LEAST_TOKENS

        least = LEAST_TOKENS[method]
        if rows.stats.tokens < least:
            notes.append(
                f"quant.method is rtn in place of {method}, which calibrates on {least:,} tokens and more: the "
                f"training rows have {rows.stats.tokens:,}; quant.calibration names a file with more"
            )
            method = "rtn"
    if checkpoint is not None:
        kind = checkpoint.quant_type
        if checkpoint.method != method:
            checkpoint.refuse(f"quant.method {checkpoint.method} -> {method}")
    if kind == AUTO:
        report = getattr(model, "load_report", None)
        is_kept = (
            report and report.is_kept if source is None else method == "rtn" and source.keeps(AUTO)
        )
        kind = "keep" if is_kept else "nf4"
    return config.model_copy(
        update={"quant": quant.model_copy(update={"type": kind, "method": method})}
    ), notes


def _is_made(config: TrainConfig, source: Source) -> bool:
    """Whether the files hold the 4-bit weights of ``quant.method`` already."""
    metadata: Any = (source.four_bit_config or {}).get(METADATA) or {}
    return config.quant.method != "rtn" and metadata.get("method") == config.quant.method


def what_is_trained(config: TrainConfig, model: Any, is_converted: bool, total: int) -> str:
    """The first line of a run: what its weights are, what is trained beside them, for how long."""
    method = getattr(getattr(model, "load_report", None), "method", None)
    frozen = [layer.quantized for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    weights = ""
    if frozen:
        made = "kept as" if method == KEEP else "converted to" if is_converted else "in"
        kinds = "/".join(sorted({weight.quant_type.upper() for weight in frozen}))
        weights = (
            f"{len(frozen)} layers {made} {kinds}{f' by {method}' if method in CALIBRATED else ''}, "
        )
    ranks = [layer.r for _, layer in lora_layers(model)]
    between = " to ".join(map(str, sorted({min(ranks), max(ranks)})))
    start = "" if config.lora.adapter is None else f" from {config.lora.adapter}"
    four_bit = four_bit_parts(model)
    dense = [parameter for name, parameter in model.named_parameters() if name not in four_bit]
    trained = sum(parameter.numel() for parameter in dense if parameter.requires_grad)
    everything = sum(part.numel() for part in (*dense, *four_bit.values()))
    step_rows = config.train.batch_size * config.train.grad_accum
    items = "sequences" if config.data.packing else "rows"
    return (
        f"{Path(config.model).name}: {weights}rank {between} on {len(ranks)} layers{start}, {_in_words(trained)} of "
        f"{_in_words(everything)} parameters trained, {total:,} steps of {step_rows} {items}"
    )


def _in_words(count: float) -> str:
    """8.8 M, 494 M, 1.54 B."""
    for unit in ("", " k", " M"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} B"


def _store(
    model: Any, source: Source | None, output_dir: Path, tokenizer: Any, progress: Progress
) -> None:
    """Write the 4-bit weights that rounding to nearest does not make again, unless they lie in a folder already."""
    from qlora_native.models.trained import STORED, can_round_again, source_of, store_model

    source = source_of(model, source)
    folder = output_dir / STORED
    if (
        source is not None
        and not source.has_four_bit_weights
        and not can_round_again(getattr(model, "load_report", None))
    ):
        store_model(model, folder, tokenizer, advice="; quant.save false trains without it")
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        progress(
            f"{folder}: the weights as {model.load_report.method} made them, {num_bytes / 2**20:,.1f} MiB",
            0,
            0,
        )


def _load(
    config: TrainConfig,
    source: Source,
    lora: LoraConfig,
    rows: TokenizedDataset | None,
    ranks: OneProcess,
    progress: Progress,
    device: str | None,
) -> Any:
    """The 4-bit model; on several processes with adapters, since they cannot be added to what is sharded."""
    quant = config.quant
    is_kept = source.keeps(quant.options["quant_type"])
    options: dict[str, Any] = {
        **quant.options,
        "dtype": getattr(torch, config.train.dtype),
        "device": device,
        "skip_modules": dense_beside(lora.modules_to_save, lora.trainable_tokens, is_kept),
        "residency": config.residency,
    }
    calibration: Any = None
    if quant.method in CALIBRATED and not _is_made(config, source):
        from qlora_native.calibration.data import FILE, CalibrationData, quantize_command

        if ranks.world > 1:
            text = quant.calibration or config.data.files[0]
            command = quantize_command(
                config.model, quant.model_dump(), config.train.dtype, text, "DIR"
            )
            raise UserError(
                f"quant.method is {quant.method}, which calibrates on one process, and {ranks.world} were started: "
                f"make the 4-bit model first (`{command}`) and set model to DIR"
            )
        texts: Any = quant.calibration and user_path(quant.calibration)
        if not texts:  # not the file of the rows, which also holds those that are held out
            texts = [torch.from_numpy(row["input_ids"].copy()) for row in rows or ()]
        calibration = CalibrationData(
            texts, seed=config.train.seed, keep=user_path(config.output_dir) / FILE
        )
        options["method"] = quant.method
    elif quant.calibration is not None and quant.method == "rtn":
        raise UserError(
            f"quant.calibration is {quant.calibration}, but quant.method rtn takes no text: remove it"
        )
    if ranks.world == 1:
        return load_model(source, calibration=calibration, progress=progress, **options)
    from qlora_native.distributed.loading import load_model as load_together

    return load_together(source, sharded=ranks.is_sharded, lora=lora, **options)


def parameter_groups(model: torch.nn.Module, lora_plus_ratio: float) -> list[dict[str, Any]]:
    """The trainable parameters, those of B apart where their learning rate has another ``lr_ratio``."""
    groups: dict[float, list[torch.nn.Parameter]] = {1.0: [], lora_plus_ratio: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[lora_plus_ratio if name.endswith(".lora_B") else 1.0].append(parameter)
    return [{"params": params, "lr_ratio": ratio} for ratio, params in groups.items()]


def make_sampler(config: TrainConfig, rows: TokenizedDataset) -> Sampler:
    """The order of the steps: each has ``batch_size * grad_accum`` rows of like length, or as many packed sequences."""
    size = config.train.batch_size * config.train.grad_accum
    seed = config.train.seed
    sampler: Sampler = BatchSampler(rows.lengths, size, seed=seed)
    if config.data.packing:
        sampler = PackedBatchSampler(rows.lengths, size, config.data.max_length, seed=seed)
    if config.data.weights is not None:
        for number, path in enumerate(config.data.files):
            if number not in rows.file:
                raise UserError(f"{path} has no row left to train on: remove it, or add rows")
        sampler.mix = (rows.file, config.data.weights)
    return sampler


@torch.no_grad()
def check_packing(model: Any) -> None:
    """UserError if a row's hidden states change when another row stands before it in its sequence, as they do where a
    state is carried across rows or positions do not restart. Draws no random number."""

    def hidden(ids: Tensor, positions: Tensor) -> Tensor:
        return hidden_states(model, {"input_ids": ids, "position_ids": positions})[0]

    vocabulary = model.get_input_embeddings().num_embeddings
    numbers = torch.arange(28, device=model.device)[None]
    row = (numbers * 7 + 1) % vocabulary
    positions = torch.cat((numbers[:, :12], numbers), 1)
    heads = ((numbers[:, :12] * step + 3) % vocabulary for step in (5, 11))
    name = type(model).__name__
    with modes_kept(model):
        model.eval()
        try:
            alone = hidden(row, numbers)
            found = [hidden(torch.cat((head, row), 1), positions)[:, 12:] for head in heads]
        except TypeError as error:
            raise UserError(
                f"{name} cannot train on packed rows: {error}; set data.packing to false"
            ) from error
    for behind in found:
        off = (behind.float() - alone.float()).norm(dim=-1)
        distance = float((off / alone.float().norm(dim=-1)).max())
        # So far apart are two orders of rounding.
        if not distance <= (1e-3 if behind.dtype == torch.float32 else 5e-2):
            raise UserError(
                f"{name} cannot train on packed rows: a row's hidden states change by {distance:.0%} when another row "
                "stands before it; set data.packing to false"
            )


def make_optimizer(options: LoopSection, parameters: list[Any], output_dir: Path) -> AdamW | Lion:
    """The optimizer that the config names, with its clipping; it measures the gradient's norm without clipping too."""
    page_dir = user_path(options.page_dir) if options.page_dir else output_dir
    with as_write_error(page_dir):
        page_dir.mkdir(parents=True, exist_ok=True)
    make: Any = Lion
    if options.optimizer != "lion":
        make = partial(AdamW, eps=options.eps, bits=8 if options.optimizer == "adamw8bit" else 32)
    shared = {
        name: getattr(options, name)
        for name in ("lr", "betas", "weight_decay", "paged", "page_budget")
    }
    with as_user_error():
        optimizer: AdamW | Lion = make(
            parameters, page_dir=page_dir, max_norm=options.clip or math.inf, **shared
        )
    return optimizer


def learning_rate(
    step: int,  # number of the step about to be taken, counted from 0
    total_steps: int,
    *,
    peak: float,
    warmup: float,  # steps; below 1 a share of total_steps
    scheduler: Literal["cosine", "linear", "constant"],
) -> float:
    """Rises linearly to ``peak`` over the warm-up, then falls to 0 at ``total_steps`` (or stays, for "constant").

    A function of the step alone, so that a resumed run needs no state of a scheduler. The first of n steps of a warm-up
    already has peak / n: a step with a rate of 0 would be wasted.
    """
    warmup_steps = round(warmup * total_steps) if warmup < 1 else round(warmup)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return peak * share[scheduler]
