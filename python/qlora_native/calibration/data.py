"""Calibration data: a fixed number of token sequences out of a file, texts or tokens, the same ones every time."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_native.data import ChatEncoder, Row, infer_format, normalize, read_rows
from qlora_native.data.batching import permutation
from qlora_native.data.formats import INFER_ROWS
from qlora_native.errors import UserError

ROWS = {"wmse": 16, "gptq": 128}  # sequences that a method takes unless told otherwise
LENGTH = 512  # tokens of a sequence, likewise
LEAST_TOKENS = {"wmse": 2048, "gptq": 8192}  # fewer than the default is accepted down to here
FILE, TENSOR = "calibration.safetensors", "input_ids"  # sequences that were kept, and their name in that file
MOST_ROWS = 4096  # of a file: the first ones are drawn from, so that a large file is not read to its end

Source = str | os.PathLike[str] | Sequence[str] | Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class CalibrationData:
    """What the statistics of a calibrated method are gathered from, and how much of it.

    Attributes:
        source: a file that ``qlora train`` reads (rows in any of its formats, through the model's chat template);
            a .safetensors file that ``keep`` wrote; a list of texts; a list of int tensors [tokens], one a document;
            or an int tensor [rows, length], used as it is.
        rows: sequences; None is 16 for "wmse" and 128 for "gptq".
        length: tokens of a sequence; None is 512, or the model's number of positions if that is less.
        seed: of the order in which rows or texts are drawn.
        format: of the rows of a file; None finds out from the first ones.
        keep: a .safetensors file that gets the sequences that were drawn (int32 ``input_ids`` [rows, length], and the
            seed): given as ``source`` it makes the same 4-bit weights again.
        tokenizer: of the model, for rows and texts; None loads it.
    """

    source: Source
    rows: int | None = None
    length: int | None = None
    seed: int = 0
    format: str | None = None
    keep: Path | None = None
    tokenizer: Any = None


@dataclass(frozen=True)
class CalibrationTokens:
    """The sequences, int64 [rows, length], and the seed and number of tokens that were asked for."""

    ids: Tensor
    seed: int
    wanted: int

    def describe(self) -> dict[str, Any]:
        """What is kept beside the weights: JSON values."""
        rows, length = self.ids.shape
        return {"sha256": self.sha256, "rows": rows, "length": length, "tokens": rows * length, "seed": self.seed}

    def save(self, path: Path) -> None:
        """Write a file that is a source of calibration data."""
        save_file({TENSOR: self.ids.to(torch.int32)}, path, metadata={"seed": str(self.seed)})

    @property
    def sha256(self) -> str:
        """Of the token numbers as little-endian 64-bit integers, in hexadecimal."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()


def as_calibration(given: Any) -> CalibrationData:
    """``given`` as :class:`CalibrationData`; ValueError naming the argument that is out of range."""
    data = given if isinstance(given, CalibrationData) else CalibrationData(given)
    for name in ("rows", "length"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise ValueError(f"calibration: {name} is {value}: expected 1 or more.")
    return data


def take_tokens(
    data: CalibrationData,
    method: str,
    load_tokenizer: Callable[[], Any],
    vocab_size: int,
    positions: int | None,
) -> CalibrationTokens:
    """Draw the sequences that ``method`` takes.

    Documents are drawn in an order that ``seed`` fixes and laid end to end; each gives its first ``length`` tokens,
    and what is behind them only if there is not enough otherwise.

    Args:
        load_tokenizer: called if there is text, and ``data`` brings no tokenizer.
        vocab_size: token numbers lie below it. positions: the longest sequence that the model takes, None if any.

    Raises:
        UserError: too little text, none, or a file that cannot be read.
        ValueError: a wrong argument.
    """
    length, seed = data.length or min(LENGTH, positions or LENGTH), data.seed
    kept = _read_kept(data.source)
    if kept is not None:
        (ids, seed), length = kept, kept[0].shape[1]
        _check_whole(data)
    elif isinstance(data.source, Tensor):
        ids = _as_given(data)
        length = ids.shape[1]
    else:
        rows = data.rows or ROWS[method]
        ids = _cut(_documents(data, load_tokenizer), rows, length, _told(data.source), method)
    if positions is not None and length > positions:
        raise UserError(
            f"calibration: sequences of {length} tokens, but the model has {positions} positions: make length smaller."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"calibration: token numbers from {low} to {high}, but the model's lie from 0 to {vocab_size - 1}: "
            "tokenize with the tokenizer of this model."
        )
    tokens = CalibrationTokens(ids, seed, data.rows * length if data.rows else ROWS[method] * length)
    if data.keep is not None:
        tokens.save(data.keep)
    return tokens


def _read_kept(source: Any) -> tuple[Tensor, int] | None:
    """The sequences in a file that ``keep`` wrote, and their seed; None if the source is something else."""
    if not isinstance(source, (str, os.PathLike)) or Path(source).suffix != ".safetensors":
        return None
    try:
        with safe_open(source, "pt") as file:
            ids, seed = file.get_tensor(TENSOR), int((file.metadata() or {}).get("seed", 0))
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such file; expected calibration data") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{source}: no calibration data ({error}): expected a file that a training run kept."
        ) from error
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise UserError(
            f"{source}: {TENSOR} is {list(ids.shape)} of {ids.dtype}: expected token numbers [rows, length]."
        )
    return ids.to(torch.int64), seed


def _as_given(data: CalibrationData) -> Tensor:
    ids = data.source
    assert isinstance(ids, Tensor)
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise ValueError(
            f"calibration is a tensor {list(ids.shape)} of {ids.dtype}: expected token numbers [rows, length]."
        )
    _check_whole(data)
    return ids.to("cpu", torch.int64).contiguous()


def _check_whole(data: CalibrationData) -> None:
    if data.rows is not None or data.length is not None:
        raise ValueError("calibration: sequences [rows, length] are used as they are: leave rows and length out.")


def _documents(data: CalibrationData, load_tokenizer: Callable[[], Any]) -> Iterator[list[int]]:
    source = data.source
    if isinstance(source, (str, os.PathLike)):
        rows = read_rows(Path(source), limit=MOST_ROWS)
        first = list(islice(rows, INFER_ROWS))
        name = data.format or infer_format(first)
        kept = [*first, *rows]
        encoder = ChatEncoder(data.tokenizer or load_tokenizer(), train_on="all")
        for index in permutation(len(kept), data.seed):
            yield encoder.encode(normalize(kept[index], name)).input_ids
        return
    documents: list[Any] = list(source)
    order = permutation(len(documents), data.seed)
    if all(isinstance(one, str) for one in documents):
        if not documents:
            return
        encoder = ChatEncoder(data.tokenizer or load_tokenizer(), train_on="all")
        for index in order:
            if documents[index].strip():
                yield encoder.encode(Row(f"calibration text {index}", 1, text=documents[index])).input_ids
        return
    for index in order:
        one = documents[index]
        if not isinstance(one, Tensor) or one.dim() != 1 or one.is_floating_point():
            raise ValueError(
                f"calibration: entry {index} of the list is {_kind(one)}: expected texts, or int tensors [tokens]."
            )
        yield one.tolist()


def _cut(documents: Iterator[list[int]], rows: int, length: int, told: str, method: str) -> Tensor:
    """The documents end to end, in sequences: int64 [at most rows, length]."""
    wanted = rows * length
    taken: list[int] = []
    behind: list[list[int]] = []
    for document in documents:
        taken += document[:length]
        behind.append(document[length:])
        if len(taken) >= wanted:
            break
    while len(taken) < wanted and behind:
        taken += behind.pop(0)
    least = min(wanted, max(length, LEAST_TOKENS[method]))
    if len(taken) < least:
        raise UserError(
            f"{told}: {len(taken):,} tokens of text, expected at least {least:,} to calibrate {method} "
            f"({rows} sequences of {length}); give more text, ask for fewer or shorter sequences, or take method rtn."
        )
    whole = min(rows, len(taken) // length)
    return torch.tensor(taken[: whole * length], dtype=torch.int64).view(whole, length)


def _told(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "calibration"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"


def quantize_command(model: str, quant: Mapping[str, Any], dtype: str, calibration: Path | str | None, out: str) -> str:
    """The line for a shell.

    Args:
        model: the 16-bit model of the run.
        quant: the section ``quant`` of its config; what is left out has its default.
        dtype: ``train.dtype``.
        calibration: the text, or the sequences that the run kept. out: the new folder.
    """
    words = ["qlora", "quantize", model, "--method", quant.get("method", "rtn")]
    if calibration is not None:
        words += ["--calibration", str(calibration)]
    if (kind := quant.get("type", "nf4")) != "nf4":
        words += ["--quant-type", kind]
    if (size := quant.get("block_size", 64)) != 64:
        words += ["--block-size", str(size)]
    if not quant.get("double_quant", True):
        words.append("--no-double-quant")
    if dtype != "bfloat16":
        words += ["--dtype", dtype]
    return shlex.join([*words, "--out", out])


def kept_calibration(adapter: Path) -> Path | None:
    """What the run of an adapter was calibrated on, if its folder still lies in that of the run."""
    return next((path for parent in adapter.resolve().parents[:2] if (path := parent / FILE).is_file()), None)
