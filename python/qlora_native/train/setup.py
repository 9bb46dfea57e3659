"""What a run needs before its first step: the base model, its tokenizer, the rows, the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.fsdp import FSDPModule

from qlora_native import distributed
from qlora_native._io import as_user_error, as_write_error
from qlora_native.calibration.data import FILE, CalibrationData, quantize_command
from qlora_native.config import LoopSection, TrainConfig
from qlora_native.data.dataset import TokenizedDataset
from qlora_native.distributed.ranks import Ranks
from qlora_native.errors import UserError
from qlora_native.hf.config import METADATA
from qlora_native.hf.fuse import fuse
from qlora_native.hf.load import CALIBRATED, load_model
from qlora_native.hf.progress import LayerProgress
from qlora_native.hf.residuals import lora_statistics
from qlora_native.hf.source import open_source
from qlora_native.lora import LayerStatistics, LoraConfig, LoRALinear, add_lora
from qlora_native.lora.config import H_SVD, ZERO
from qlora_native.optim import AdamW, Lion


def load_rows(config: TrainConfig, tokenizer: Any) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training rows and held-out rows (None if the config asks for none), tokenized and masked."""
    data, folder = config.data, Path(config.output_dir).expanduser()
    rows = data.load(data.train, tokenizer, folder=folder)
    if data.eval is not None:
        return rows, data.load(data.eval, tokenizer, folder=folder)
    if data.eval_fraction == 0:
        return rows, None
    # A few rows still give a held-out loss: at least one is held out.
    held_out = max(1, round(data.eval_fraction * len(rows)))
    if held_out >= len(rows):
        raise UserError(
            f"{data.train} has {len(rows)} usable row: holding one out leaves none to learn from; "
            "add rows or set data.eval_fraction to 0"
        )
    return rows.split(held_out, seed=config.train.seed)


def prepare_model(
    config: TrainConfig,
    model: Any = None,
    rows: TokenizedDataset | None = None,
    ranks: Ranks | None = None,
    *,
    quiet: bool = False,
) -> Any:
    """The 4-bit model with adapters, in training mode; loads it unless it is given, adds adapters unless it has
    them. ``rows`` are the training rows, which calibrate it if ``quant.calibration`` names nothing else. Cut over the
    ranks if the config says so."""
    options, ranks = config.train, ranks or Ranks()
    lora = LoraConfig(**config.lora.model_dump(), seed=options.seed)
    with as_user_error(), LayerProgress(quiet=quiet or not ranks.first) as progress:
        if model is None:
            path = Path(config.model).expanduser()
            is_made = _is_made(path, config.quant.method)
            given: dict[str, Any] = {
                "quant_type": config.quant.type,
                "block_size": config.quant.block_size,
                "double_quant": config.quant.double_quant,
                "dtype": getattr(torch, options.dtype),
                "device": "cuda" if torch.cuda.is_available() else None,
                "method": "rtn" if is_made else config.quant.method,
            }
            calibration = None if is_made else _calibration(config, rows)
            if ranks.world == 1:
                model = load_model(path, calibration=calibration, progress=progress, **given)
            elif calibration is None:
                model = distributed.load_model(path, cut=ranks.is_sharded, lora=lora, **given)
            else:
                quant = config.quant
                text = quant.calibration or config.data.train
                command = quantize_command(config.model, quant.model_dump(), options.dtype, text, "DIR")
                raise UserError(
                    f"quant.method is {quant.method}, which calibrates on one process, and {ranks.world} were "
                    f"started: make the 4-bit model first (`{command}`) and set model to DIR"
                )
        if not any(isinstance(module, LoRALinear) for module in model.modules()):
            if ranks.world > 1 and config.lora.init != ZERO:
                raise UserError(
                    f"lora.init is {config.lora.init}, which one process computes, and {ranks.world} were started: "
                    f"set lora.init to {ZERO}"
                )
            add_lora(model, lora, _statistics(config, model, rows))
        fuse(model)
        if ranks.is_sharded and not isinstance(model, FSDPModule):
            distributed.shard(model)
        if options.grad_checkpointing:
            # transformers 5.0 knows the older name only. Not the re-entrant kind: it cuts the graph where a block's
            # input needs no gradient, as the first one's here.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
    return model.train()


def _is_made(path: Path, method: str) -> bool:
    """Whether the files are 4-bit already and say that ``method`` made them, so that nothing is left to it."""
    if method == "rtn" or path.suffix == ".gguf":  # whose configuration takes seconds to read, and holds no such thing
        return False
    told: dict[str, Any] = dict(open_source(path).four_bit_config or {})
    return (told.get(METADATA) or {}).get("method") == method


def _calibration(config: TrainConfig, rows: TokenizedDataset | None) -> CalibrationData | None:
    method, path = config.quant.method, config.quant.calibration
    if method not in CALIBRATED:
        if path is not None and config.lora.init != H_SVD:
            raise UserError(f"quant.calibration is {path}, but quant.method {method} takes no text: remove it")
        return None
    folder = Path(config.output_dir).expanduser()
    with as_write_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return replace(_text(config, rows, f"quant.method is {method}"), keep=folder / FILE)


def _statistics(config: TrainConfig, model: Any, rows: TokenizedDataset | None) -> Iterator[LayerStatistics] | None:
    """What an adapter begins with, if it does not begin with nothing; the inputs' moments alone, which take no room."""
    init = config.lora.init
    if init == ZERO:
        return None
    return lora_statistics(model, _text(config, rows, f"lora.init is {init}") if init == H_SVD else None, full=False)


def _text(config: TrainConfig, rows: TokenizedDataset | None, why: str) -> CalibrationData:
    path, seed = config.quant.calibration, config.train.seed
    if path is not None:
        return CalibrationData(Path(path).expanduser(), seed=seed)
    if rows is None:
        raise ValueError(f"{why}: it needs the training rows or quant.calibration")
    # Not the file: it also holds the rows that are held out.
    return CalibrationData([torch.from_numpy(row["input_ids"].copy()) for row in rows], seed=seed)


def make_optimizer(options: LoopSection, parameters: list[torch.nn.Parameter], output_dir: Path) -> AdamW | Lion:
    """The optimizer that the config names, with its clipping; it measures the gradient's norm without clipping too.

    Its page file, if there comes to be one, lies in ``train.page_dir`` or else in ``output_dir``, where there must be
    room anyway.
    """
    page_dir = Path(options.page_dir).expanduser() if options.page_dir else output_dir
    with as_write_error(page_dir):
        page_dir.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {
        "paged": options.paged,
        "page_dir": page_dir,
        "page_budget": options.page_budget,
        "max_norm": options.clip or math.inf,
    }
    with as_user_error():
        if options.optimizer == "lion":
            return Lion(parameters, options.lr, options.betas, options.weight_decay, **common)
        bits: Literal[8, 32] = 8 if options.optimizer == "adamw8bit" else 32
        return AdamW(parameters, options.lr, options.betas, options.eps, options.weight_decay, bits=bits, **common)


def describe_rows(train: TokenizedDataset, held_out: TokenizedDataset | None) -> list[str]:
    """Lines to print about the data."""
    lines = [train.stats.describe()]
    if held_out is not None and held_out.stats.path == train.stats.path:
        lines.append(f"held out: {len(held_out):,} of its rows")
    elif held_out is not None:
        lines.append(held_out.stats.describe())
    return lines
