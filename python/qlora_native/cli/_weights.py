"""Options of the commands that read or write 4-bit weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qlora_native.cases import BLOCK_SIZES
from qlora_native.cli._run import parse_size, require
from qlora_native.errors import UserError
from qlora_native.weight import CALIBRATED

DTYPES = ("bfloat16", "float16", "float32")


def add_quantizing(parser: argparse.ArgumentParser, keeps: bool = True) -> None:
    """How to quantize what is not 4-bit yet; ``keeps`` allows a GGUF file's weights as they are. What is not given is
    None: the default of load_model, or of the run."""
    add = parser.add_argument
    levels = "4-bit data type; keep: a GGUF file's weights as they are (default: keep for such a file, else nf4)"
    types, text = (("nf4", "fp4", "keep"), levels) if keeps else (("nf4", "fp4"), "4-bit data type (default: nf4)")
    add("--quant-type", choices=types, help=text)
    add("--block-size", type=int, choices=BLOCK_SIZES, metavar="N", help="weights per scale (default: 64)")
    add("--double-quant", action=argparse.BooleanOptionalAction, help="store the scales in 8 bits (default: yes)")
    add("--skip-modules", nargs="+", metavar="NAME", help="linear layers to leave dense (default: lm_head)")


def quantizing(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`add_quantizing` that were given, as load_model takes them."""
    names = ("quant_type", "block_size", "double_quant", "skip_modules")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    """How large a file of safetensors may be, in bytes."""
    parser.add_argument(
        "--shard-size", type=_file_size, default="4GB", metavar="SIZE", help="largest file (default: 4GB)"
    )


def _file_size(text: str) -> int:
    num_bytes = parse_size(text, 1000)
    if not num_bytes:
        raise UserError(f"--shard-size is {text!r}: expected a size such as 500MB or 4GB")
    return num_bytes


def is_four_bit(model: Path) -> bool:
    """Whether the files hold 4-bit weights."""
    from qlora_native.hf.source import open_source

    return bool(open_source(model).four_bit_config)


def as_trained(args: argparse.Namespace, rounds: bool) -> dict[str, Any]:
    """The options of quantizing that were given; for the others, those of the config beside the adapter.

    Raises UserError if 16-bit weights are to become those of the run (``rounds``) and the run calibrated them, which
    rounding to nearest cannot repeat.
    """
    given = quantizing(args)
    config = args.adapter / "config.yaml" if args.adapter else None
    if config is None or not config.is_file() or is_four_bit(args.model):
        return given
    require(f"reading {config}", "pydantic")
    from qlora_native._io import reading
    from qlora_native.config import QuantConfig, read_yaml
    from qlora_native.hf.build import dense_beside
    from qlora_native.hf.source import open_source

    with reading(config, "expected the config of the adapter's run, or none"):
        settings = read_yaml(config)[0]
        quant = QuantConfig.model_validate(settings.get("quant") or {})
        dtype = (settings.get("train") or {}).get("dtype", "bfloat16")
        lora = settings.get("lora") or {}
        trained = [list(lora.get(name) or ()) for name in ("modules_to_save", "trainable_tokens")]
    method = quant.method
    if rounds and method != "rtn":
        from qlora_native.calibration.data import kept_calibration, quantize_command

        kept = kept_calibration(args.adapter) or quant.calibration
        text = kept or ("FILE" if method in CALIBRATED else None)
        command = quantize_command(str(args.model), quant.model_dump(), dtype, text, "DIR")
        raise UserError(
            f"{args.adapter} was trained on weights made by {method}, and {args.model} is 16-bit: make them again with "
            f"`{command}`, and give DIR in its place"
        )
    is_kept = any(trained) and open_source(args.model).keeps(quant.type)
    skip = {"skip_modules": dense_beside(trained[0], trained[1], is_kept)} if any(trained) else {}
    return quant.options | skip | given
