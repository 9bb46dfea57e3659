"""Calibration data: a fixed number of token sequences from a file, texts or tokens, the same ones every time."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_native._io import as_write_error, atomic_file, reading, regular
from qlora_native.data.batching import permutation
from qlora_native.data.formats import Row, infer_format, normalize
from qlora_native.data.readers import FIRST_ROWS, read_rows
from qlora_native.data.template import ChatEncoder
from qlora_native.errors import UserError

ROWS = {"wmse": 16, "gptq": 128}  # default number of sequences
LENGTH = 512  # default tokens of a sequence
LEAST_TOKENS = {"wmse": 2048, "gptq": 8192}  # fewer than the default is accepted down to here
FILE, TENSOR = "calibration.safetensors", "input_ids"  # kept sequences, and their name in that file
MOST_ROWS = 4096  # of a file are drawn from, so that a large file is not read to its end

Source = str | os.PathLike[str] | Sequence[str] | Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class CalibrationData:
    """The data that the statistics of a calibrated method are gathered from.

    Attributes:
        source: a file that ``qlora train`` reads (rows in any of its formats, through the model's chat template);
            a .safetensors file that ``keep`` wrote; a list of texts; a list of int tensors [tokens], one a document;
            or an int tensor [rows, length], used as it is.
        rows: sequences; None is 16 for "wmse" and 128 for "gptq".
        length: tokens of a sequence; None is 512, or the model's number of positions if that is less.
        seed: of the order in which rows or texts are drawn.
        format: of the rows of a file; None infers it from the first ones.
        keep: a .safetensors file to write the drawn sequences to (int32 ``input_ids`` [rows, length], and the seed):
            given as ``source`` it makes the same 4-bit weights again.
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
        """JSON values, to be kept beside the weights."""
        rows, length = self.ids.shape
        return {
            "sha256": self.sha256,
            "rows": rows,
            "length": length,
            "tokens": rows * length,
            "seed": self.seed,
        }

    @property
    def sha256(self) -> str:
        """Hexadecimal, of the token numbers as little-endian 64-bit integers."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()


def as_calibration(source: Any) -> CalibrationData:
    """``source`` as :class:`CalibrationData`; ValueError for an argument that is out of range."""
    data = source if isinstance(source, CalibrationData) else CalibrationData(source)
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
    """Draw the sequences for ``method``; UserError for too little text, ValueError for a wrong argument.

    Documents are drawn in an order that ``seed`` fixes and laid end to end; each gives its first ``length`` tokens,
    and those after them only if there are not enough otherwise. ``load_tokenizer`` is called if there is text, and
    ``data`` has no tokenizer; ``positions`` is the longest sequence of the model, None if any.
    """
    length = data.length or min(LENGTH, positions or LENGTH)
    seed = data.seed
    source = data.source
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    is_drawn = False
    if isinstance(source, Tensor):
        ids = source
        if not _is_sequences(ids):
            raise ValueError(
                f"calibration is a tensor {list(ids.shape)} of {ids.dtype}: expected token numbers [rows, length]."
            )
    elif path is not None and path.suffix == ".safetensors":
        ids, seed = _read_kept(path)
    else:
        documents = _documents(data, path, load_tokenizer)
        ids = _end_to_end(
            documents, data.rows or ROWS[method], length, str(path or "calibration"), method
        )
        is_drawn = True
    if not is_drawn:
        if data.rows is not None or data.length is not None:
            raise ValueError(
                "calibration: sequences [rows, length] are used as they are: leave rows and length out."
            )
        ids = ids.to("cpu", torch.int64).contiguous()
        length = ids.shape[1]
    if positions is not None and length > positions:
        raise UserError(
            f"calibration: sequences of {length} tokens, but the model has {positions} positions: make length smaller."
        )
    low = int(ids.min())
    high = int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"calibration: token numbers from {low} to {high}, but the model's lie from 0 to {vocab_size - 1}: "
            "tokenize with the tokenizer of this model."
        )
    tokens = CalibrationTokens(ids, seed, (data.rows or ROWS[method]) * length)
    if data.keep is not None:
        with as_write_error(data.keep), atomic_file(data.keep) as file:
            save_file({TENSOR: ids.to(torch.int32)}, file, metadata={"seed": str(seed)})
    return tokens


def _is_sequences(ids: Tensor) -> bool:
    return ids.dim() == 2 and ids.numel() > 0 and not ids.is_floating_point()


def _read_kept(path: Path) -> tuple[Tensor, int]:
    """The sequences in a file that ``keep`` wrote, and their seed."""
    with (
        reading(path, "expected calibration data that a training run kept"),
        safe_open(regular(path), "pt") as file,
    ):
        ids = file.get_tensor(TENSOR)
        seed = int((file.metadata() or {}).get("seed", 0))
    if not _is_sequences(ids):
        raise UserError(
            f"{path}: {TENSOR} is {list(ids.shape)} of {ids.dtype}: expected token numbers [rows, length]."
        )
    return ids, seed


def _documents(
    data: CalibrationData, path: Path | None, load_tokenizer: Callable[[], Any]
) -> Iterator[list[int]]:
    """The token numbers of each document of the file or list, in an order that the seed fixes."""
    documents: list[Any] = list(data.source if path is None else read_rows(path, limit=MOST_ROWS))  # type: ignore[arg-type]
    order = permutation(len(documents), data.seed)
    if path is None and not all(isinstance(document, str) for document in documents):
        for index in order:
            ids = documents[index]
            if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.is_floating_point():
                is_tensor = isinstance(ids, Tensor)
                kind = f"tensor {list(ids.shape)} of {ids.dtype}" if is_tensor else type(ids).__name__
                raise ValueError(
                    f"calibration: entry {index} of the list is a {kind}: expected texts, or int tensors [tokens]."
                )
            yield ids.tolist()
        return
    format = "" if path is None else data.format or infer_format(documents[:FIRST_ROWS])
    encoder = ChatEncoder(data.tokenizer or load_tokenizer(), train_on="all")
    for index in order:
        document = documents[index]
        if path is not None:
            yield encoder.encode(normalize(document, format)).input_ids
        elif document.strip():
            yield encoder.encode(Row(f"calibration text {index}", 1, text=document)).input_ids


def _end_to_end(
    documents: Iterator[list[int]], rows: int, length: int, name: str, method: str
) -> Tensor:
    """Sequences of the documents' tokens, int64 [at most rows, length]."""
    wanted = rows * length
    taken = list[int]()
    rest = list[list[int]]()
    for document in documents:
        taken += document[:length]
        rest.append(document[length:])
        if len(taken) >= wanted:
            break
    while len(taken) < wanted and rest:
        taken += rest.pop(0)
    least = min(wanted, max(length, LEAST_TOKENS[method]))
    if len(taken) < least:
        raise UserError(
            f"{name}: {len(taken):,} tokens of text, expected at least {least:,} to calibrate {method} "
            f"({rows} sequences of {length}); give more text, ask for fewer or shorter sequences, or do without "
            "calibration (rtn)."
        )
    whole = min(rows, len(taken) // length)
    return torch.tensor(taken[: whole * length], dtype=torch.int64).view(whole, length)


def quantize_command(
    model: str,
    quant: Mapping[str, Any],
    dtype: str,
    calibration: Path | str | None,
    out: str,
    skipped: Sequence[str] = (),
) -> str:
    """The shell command ``qlora quantize`` that makes the 4-bit weights of a training run from its 16-bit ``model``,
    section ``quant`` of the config and ``train.dtype``, the text or the sequences that it kept, and the modules that
    stayed dense if they are not the default."""
    words = ["qlora", "quantize", model, "--method", quant.get("method", "rtn")]
    for option, value, default in (
        ("--calibration", calibration, None),
        ("--quant-type", "fp4" if quant.get("type") == "fp4" else "nf4", "nf4"),
        ("--block-size", quant.get("block_size", 64), 64),
        ("--dtype", dtype, "bfloat16"),
    ):
        words += [option, str(value)] if value != default else []
    words += [] if quant.get("double_quant", True) else ["--no-double-quant"]
    words += ["--skip-modules", *skipped] if skipped else []
    return shlex.join([*words, "--out", out])


def kept_calibration(adapter: Path) -> Path | None:
    """The calibration data of an adapter's training run, if its folder still lies in that of the run."""
    files = [parent / FILE for parent in adapter.resolve().parents[:2]]
    return next((file for file in files if file.is_file()), None)
