"""Options of the commands that read or write 4-bit weights."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_native._io import user_path
from qlora_native.errors import UserError
from qlora_native.reference import BLOCK_SIZES
from qlora_native.tool.cli._run import add_to, parse_size, require
from qlora_native.weight import CALIBRATED

if TYPE_CHECKING:
    from qlora_native.models.trained import TrainedBase
    from qlora_native.tool.sections import QuantConfig

DTYPE_NAMES = ("bfloat16", "float16", "float32")


def add_quantizing(parser: argparse.ArgumentParser, keeps: bool = True) -> None:
    """How to quantize what is not 4-bit yet; ``keeps`` allows a GGUF file's weights as they are. What is not given is
    None: the default of load_model, or of the run."""
    add = add_to(parser)
    levels = "4-bit data type; keep: a GGUF file's weights as they are (default: keep for such a file, else nf4)"
    types, text = (
        (("nf4", "fp4", "keep"), levels)
        if keeps
        else (("nf4", "fp4"), "4-bit data type (default: nf4)")
    )
    add("--quant-type", types, text)
    add("--block-size", "N", "weights per scale (default: 64)", choices=BLOCK_SIZES)
    double = "store the scales in 8 bits (default: yes)"
    parser.add_argument("--double-quant", action=argparse.BooleanOptionalAction, help=double)
    add("--skip-modules", "NAME", "linear layers to leave dense (default: lm_head)", nargs="+")


def quantizing(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`add_quantizing` that were given, as load_model takes them."""
    names = ("quant_type", "block_size", "double_quant", "skip_modules")
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def add_base(parser: argparse.ArgumentParser) -> None:
    """Which weights an adapter is added to; None for those of :func:`merge_base`."""
    base = "add the adapter to the weights in MODEL, or to the 4-bit ones made of them, decoded (default: those that "
    base += "it was trained on where that is known, else original)"
    add_to(parser)("--base", ("original", "dequantized"), base)


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    """How large a file of safetensors may be, in bytes."""
    add_to(parser)(
        "--shard-size", "SIZE", "largest file (default: 4GB)", type=_file_size, default="4GB"
    )


def _file_size(text: str) -> int:
    num_bytes = parse_size(text, 1000)
    if not num_bytes:
        raise UserError(f"--shard-size is {text!r}: expected a size such as 500MB or 4GB")
    return num_bytes


def has_four_bit_config(model: Path) -> bool:
    """Whether the files hold 4-bit weights in bitsandbytes' format."""
    from qlora_native.weights.open import open_source

    return bool(open_source(model).four_bit_config)


@dataclass(frozen=True)
class Run:
    """What the config beside an adapter says of the run and of the weights that it was on."""

    model: str
    quant: QuantConfig
    dtype: str
    trained: list[str]  # modules that are trained whole
    tokens: list[Any]  # whose embeddings are trained
    columns: dict[str, str]

    def skipped(self, is_kept: bool) -> list[str]:
        """Modules that stayed dense, of weights that are kept or new; none for the default."""
        from qlora_native.weights.shapes import dense_beside

        return dense_beside(self.trained, self.tokens, is_kept) if self.trained or self.tokens else []

    def options(self) -> dict[str, Any]:
        """As load_model takes them."""
        skipped = self.skipped(self.quant.type == "keep")
        return self.quant.options | ({"skip_modules": skipped} if skipped else {})


def run_of(adapter: Path | None) -> Run | None:
    """The run of an adapter, if its config lies beside it."""
    config = adapter / "config.yaml" if adapter else None
    if config is None or not config.is_file():
        return None
    require(f"reading {config}", "pydantic")
    from qlora_native._io import reading
    from qlora_native.tool.config import read_yaml
    from qlora_native.tool.sections import QuantConfig

    with reading(config, "expected the config of the adapter's run, or none"):
        settings = read_yaml(config)[0]
        data, quant, lora, train = (
            settings.get(name) or {} for name in ("data", "quant", "lora", "train")
        )
        return Run(
            str(settings.get("model", "the base")),
            QuantConfig.model_validate(quant),
            train.get("dtype", "bfloat16"),
            list(lora.get("modules_to_save") or ()),
            list(lora.get("trainable_tokens") or ()),
            {str(key): str(column) for key, column in (data.get("columns") or {}).items()},
        )


def as_trained(args: argparse.Namespace) -> TrainedBase:
    """The weights that an adapter was trained on, for chat, eval, merge and export alike.

    These are those in ``args.model``, those that the run made from it and stored, or it rounded to nearest as the run
    did. UserError if it is none of these.

    Without an adapter, or one whose run is unknown, ``args.model`` with the options of quantizing that were given;
    these come before those of the run.
    """
    from qlora_native.models.trained import TrainedBase, digest, read_record, stored_base
    from qlora_native.weights.config import METADATA
    from qlora_native.weights.open import open_source

    model, adapter, given = args.model, args.adapter, quantizing(args)
    run = run_of(adapter)
    record = read_record(adapter) if adapter else {}
    if run is None and not record:
        return TrainedBase(model, given)
    source = open_source(model)
    base = "the base" if run is None else run.model
    options = given if run is None or source.has_four_bit_weights else run.options() | given
    other = f"and {model} holds others: give {base} in its place"
    folder = Path(os.path.abspath(adapter)).parent / record["folder"] if "folder" in record else None
    if folder is not None and not source.has_four_bit_weights:
        if stored := stored_base(adapter, source):
            return TrainedBase(stored.path, {})
        if digest(source) != record["made_from"]:
            raise UserError(f"{adapter} was trained on weights made from {base}, {other}")
        again = "" if run is None else f": make it with `{_command(run, model, adapter, str(folder))}`"
        raise UserError(
            f"{adapter} was trained on the weights in {folder}, which is not there as it was{again}"
        )
    if run is None or record:
        if digest(source) == record["sha256"]:
            return TrainedBase(model, options)
        raise UserError(f"{adapter} was trained on the weights of {folder or base}, {other}")
    method = run.quant.method
    if source.has_four_bit_weights:
        metadata = (source.four_bit_config or {}).get(METADATA)
        made = str((metadata if isinstance(metadata, dict) else {}).get("method") or method)
        if made != method and user_path(run.model) != model:
            raise UserError(f"{adapter} was trained on weights made by {method}, {other}")
    elif method != "rtn":
        raise UserError(
            f"{adapter} was trained on weights made by {method}, and {model} holds others: make them again with "
            f"`{_command(run, model, adapter, 'DIR')}`, and give DIR in its place"
        )
    return TrainedBase(model, options)


def announce_base(args: argparse.Namespace, base: TrainedBase) -> None:
    """Print which weights take the place of those in ``args.model``, if others do."""
    if base.path != args.model:
        print(
            f"base: the 4-bit weights of {base.path}, on which {args.adapter} was trained",
            file=sys.stderr,
        )


def _command(run: Run, model: Path, adapter: Path, out: str) -> str:
    """The shell command that makes the weights of a run again."""
    from qlora_native.calibration.data import kept_calibration, quantize_command

    kept = kept_calibration(adapter) or run.quant.calibration
    text = kept or ("FILE" if run.quant.method in CALIBRATED else None)
    return quantize_command(
        str(model), run.quant.model_dump(), run.dtype, text, out, run.skipped(is_kept=False)
    )


def merge_base(args: argparse.Namespace) -> tuple[str, TrainedBase]:
    """``--base``, and what it is of: by default the weights that the adapter was trained on, where its run is known or
    MODEL has no others, else the original ones."""
    from qlora_native.models.trained import TrainedBase

    run = run_of(args.adapter)
    base = args.base or (
        "original" if run is None and not has_four_bit_config(args.model) else "dequantized"
    )
    if base == "dequantized":
        trained = as_trained(args)
        if (
            args.base is None
            and args.adapter is not None
            and trained.options.get("quant_type") != "keep"
        ):
            print(
                f"base: the 4-bit weights of {trained.path}, on which it was trained", file=sys.stderr
            )
        return base, trained
    options = {} if run is None else run.options()
    return base, TrainedBase(args.model, options | quantizing(args))
