"""``qlora train``: run a config file, or a model and a file of rows without one."""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_native._io import user_path
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import missing_packages

if TYPE_CHECKING:
    from qlora_native.tool.config import TrainConfig


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and the page of keys."""
    help = "a YAML file; `qlora config init` writes one; without it --model and --train are needed"
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=help)
    parser.usage = "qlora train [CONFIG] [--key value ...]"
    parser.epilog = f"""examples:
  qlora train --model half.gguf --train train.jsonl
  qlora train --model SmolLM2-135M-Instruct --train train.jsonl --eval held.jsonl --output_dir run
  qlora train --model half.gguf --train more.jsonl --adapter run/adapter --output_dir run2
  qlora config init --out config.yaml
  qlora train config.yaml
  qlora train config.yaml --lr 1e-4 --lora.r 32 --output_dir run2
  qlora train config.yaml --resume
  torchrun --nproc-per-node 4 -m qlora_native train config.yaml --parallel fsdp

Without CONFIG, batch size, passes over the rows, length and optimizer are chosen by the rows and the memory, unless
they are given; adapter/config.yaml has all of them.
Ctrl-C finishes the step, saves a checkpoint and exits with 130 (SIGTERM: 143, SIGHUP: 129); a second Ctrl-C stops at
once.

Any key of the config can be given as --key value:
{_key_page()}"""


def _key_page() -> str:
    if packages := missing_packages(("pydantic", "yaml")):
        return f"  (pip install {' '.join(packages)} shows them here)"
    from qlora_native.tool.config import keys

    lines = []
    for name, field in keys().items():
        default = (
            "required"
            if field.is_required()
            else f"default {as_text(field.get_default(call_default_factory=True))}"
        )
        lines.append(f"  --{name:<26} {values_of(field.annotation)} ({default}): {field.description}")
    return "\n".join(lines)


def as_text(value: Any) -> str:
    """A value of a key as one writes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def values_of(annotation: Any, quote: str = "") -> str:
    """What a key takes, by its annotation, with quotes around values."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"{quote}{as_text(value)}{quote}" for value in arguments)
    if typing.get_origin(annotation) is tuple:
        return f"{len(arguments)} numbers"
    if typing.get_origin(annotation) is dict:
        return f"{values_of(arguments[1], quote)} by name"
    if typing.get_origin(annotation) is list:
        inner = values_of(arguments[0], quote)
        return f"list of {inner}s" if inner in ("text", "number") else f"list of {inner}"
    if hasattr(annotation, "__metadata__"):
        return values_of(arguments[0], quote)
    if arguments:
        return " or ".join(values_of(argument, quote) for argument in arguments)
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true, false",
        type(None): f"{quote}null{quote}",
    }
    return names.get(annotation, str(annotation))


def run(args: argparse.Namespace) -> int:
    """Check the config, then train."""
    from qlora_native.distributed import RankLost
    from qlora_native.tool.config import TrainConfig

    if args.config is None:
        raise UserError("qlora train: expected a config file, or --model MODEL --train FILE")
    config = (
        TrainConfig.from_file(args.config, args.overrides)
        if args.config
        else config_of(args.overrides)
    )
    from qlora_native.tool.train.loop import Trainer

    try:
        Trainer(config).train()
    except RankLost as lost:
        if str(lost):
            print(f"qlora: {lost}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Threads of the backend that still wait for the lost process can abort or hang a normal exit.
        os._exit(1)
    return 0


def config_of(overrides: list[str]) -> TrainConfig:
    """The config of a run without a file; a resumed run has that of its checkpoint."""
    from qlora_native.tool.cli._start import completed
    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.train.checkpoint import CONFIG, checkpoints

    config = TrainConfig.from_values({"data": {}}, overrides)
    if config.resume is not None:
        is_auto = config.resume == "auto"
        for folder in (
            checkpoints(user_path(config.output_dir))[-1:] if is_auto else [Path(config.resume)]
        ):
            return TrainConfig.from_file(folder / CONFIG, overrides)
    return completed(config)
