"""The weights that an adapter was trained on: a run records them beside its adapter, and stores them if they were
calibrated, since rounding to nearest does not make those again."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_native._io import as_write_error, atomic_folder, read_json
from qlora_native.errors import UserError
from qlora_native.models.load import LoadReport
from qlora_native.weights.files import aligned_files
from qlora_native.weights.open import open_source
from qlora_native.weights.stream import KEEP, Source

RECORD = "adapter_base.json"  # beside an adapter: of its base's weights, sha256; of stored ones, folder and made_from
STORED = "base-4bit"  # folder beside the folders of the adapters
SHARD_BYTES = 4 * 10**9  # as `qlora quantize` has it, which makes the folder again
PART, PARTS = 1 << 16, 64  # bytes of each part of a file that is in its digest, and how many


@dataclass(frozen=True)
class TrainedBase:
    """What loads the weights that an adapter was trained on: the arguments of :func:`qlora_native.load_model`."""

    path: Path
    options: dict[str, Any]


def digest(source: Source) -> str:
    """SHA-256 of the sizes and of PARTS parts of each file of weights, evenly spaced: models differ nearly everywhere,
    and a whole file of some gigabytes takes longer to read than to map."""
    made = hashlib.sha256()
    for path in source.files:
        if path.suffix == ".json":
            continue
        size = path.stat().st_size
        made.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for start in range(0, size, max(PART, size // PARTS)):
                file.seek(start)
                made.update(file.read(PART))
    return made.hexdigest()


def can_round_again(report: LoadReport | None) -> bool:
    """Whether loading the same files again makes the weights of a loaded model, without text to calibrate with."""
    return report is None or not report.bytes_4bit or report.method in ("rtn", KEEP)


def store_model(
    model: Any, folder: Path, tokenizer: Any, shard_bytes: int = SHARD_BYTES, advice: str = ""
) -> None:
    """Write a 4-bit ``model`` without an adapter, and its tokenizer if there is one, as `qlora quantize` does.

    UserError, which ends with ``advice``, if it cannot be written; a folder that was there stays then.
    """
    with as_write_error(folder, advice), atomic_folder(folder) as partial:
        with aligned_files():
            model.save_pretrained(partial, max_shard_size=shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def source_of(model: Any, source: Source | None = None) -> Source | None:
    """What a model was loaded from, if it says so and ``source`` is not that already."""
    report: LoadReport | None = getattr(model, "load_report", None)
    return (
        open_source(report.path)
        if source is None and report is not None and report.path.exists()
        else source
    )


def record_of(
    model: Any, source: Source | None, stored: Source | None, output_dir: Path
) -> dict[str, str]:
    """What is recorded beside the adapters of ``model`` in ``output_dir``, whose base ``source``, ``stored`` or
    the folder STORED holds; nothing of 16-bit weights that were rounded to nearest."""
    report: LoadReport | None = getattr(model, "load_report", None)
    source = source_of(model, source)
    if source is None or report is None or not report.bytes_4bit:
        return {}
    if source.has_four_bit_weights or report.is_kept:
        return {"sha256": digest(source)}
    folder = output_dir / STORED if stored is None else stored.path
    if can_round_again(report) or not folder.is_dir():
        return {}
    made = {"sha256": digest(open_source(folder)), "made_from": digest(source)}
    return made | {"folder": os.path.relpath(folder, output_dir)}


def check_base(adapter: Path | None, record: dict[str, str], model: str) -> None:
    """UserError if a run on the recorded weights of ``model`` would start from an adapter of other ones."""
    trained = read_record(adapter).get("sha256") if adapter is not None else None
    if trained is not None and trained != record.get("sha256"):
        raise UserError(
            f"lora.adapter {adapter} was trained on other weights than {model} holds: set model to its base"
        )


def write_record(folder: Path, record: dict[str, str]) -> None:
    """Write ``folder``/RECORD."""
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_record(adapter: Path) -> dict[str, str]:
    """What the run recorded of the base; empty if nothing."""
    path = adapter / RECORD
    return {name: str(value) for name, value in read_json(path).items()} if path.is_file() else {}


def stored_base(adapter: Path | None, source: Source | None) -> Source | None:
    """The 4-bit weights that the run of an adapter made from ``source`` and stored, if they are there and whole."""
    if adapter is None or source is None:
        return None
    record = read_record(adapter)
    folder = Path(os.path.abspath(adapter)).parent / record.get("folder", STORED)
    if (
        "folder" not in record
        or record["made_from"] != digest(source)
        or not (folder / "config.json").is_file()
    ):
        return None
    stored = open_source(folder)
    return stored if digest(stored) == record["sha256"] else None
