"""``qlora train``: run a config file."""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from typing import Any, Literal

from qlora_native.cli._run import missing_packages


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and the page of keys."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; `qlora config init` writes one")
    parser.usage = "qlora train CONFIG [--key value ...]"
    parser.epilog = f"""examples:
  qlora config init --out config.yaml
  qlora train config.yaml
  qlora train config.yaml --lr 1e-4 --lora.r 32 --output_dir run2
  qlora train config.yaml --resume
  torchrun --nproc-per-node 4 -m qlora_native train config.yaml --parallel fsdp

Ctrl-C finishes the step, saves a checkpoint and exits with 130 (SIGTERM: 143, SIGHUP: 129); a second Ctrl-C stops at
once.

Any key of the config can be given as --key value:
{_key_page()}"""


def _key_page() -> str:
    if packages := missing_packages(("pydantic", "yaml")):
        return f"  (pip install {' '.join(packages)} shows them here)"
    from qlora_native.config import keys

    lines = []
    for name, field in keys().items():
        default = "required" if field.is_required() else f"default {as_text(field.default)}"
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
    names = {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): f"{quote}null{quote}"}
    return names.get(annotation, str(annotation))


def run(args: argparse.Namespace) -> int:
    """Check the config, then train."""
    from qlora_native.config import TrainConfig
    from qlora_native.distributed import RankLost

    config = TrainConfig.from_file(args.config, args.overrides)
    from qlora_native.train.loop import Trainer

    try:
        Trainer(config).train()
    except RankLost as lost:
        if str(lost):
            print(f"qlora: {lost}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # threads of the backend that still wait for the lost process can abort or hang a normal exit
    return 0
