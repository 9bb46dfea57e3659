"""The speed of a run whose weights do not fit in memory: what streams, what is read, how long it takes.

Computing is measured on the first two decoder layers of the model: all layers of one kind take the same time. The disk
is measured on the model's own file, past the page cache, and once more as a run reads: by its thread, beside computing,
which that slows down, since the kernel moves pages on the same cores.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from qlora_native import _C
from qlora_native._memory import Free, kib_fields
from qlora_native.calibration.layers import decoder_layers
from qlora_native.errors import UserError
from qlora_native.lora import add_lora
from qlora_native.models.load import load_model
from qlora_native.models.loss import causal_lm_loss, has_plain_head
from qlora_native.models.mapped import mapped_tensors, num_bytes, parts_of, plan_streaming
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.estimate.memory import Estimator
from qlora_native.tool.estimate.model import Setting

READ = 256 << 20  # bytes read to measure the disk
BLOCK = 8 << 20
SLOT = 256 << 20
TIMED = 3  # passes of one layer and of two


@dataclass(frozen=True)
class StreamedRun:
    """A prediction; bytes and seconds are of an optimizer step."""

    memory: int
    weights: int
    resident: int
    layers: int
    layers_streamed: int
    bytes_read: int
    disk_rate: float
    tokens_per_second: float
    tokens_per_second_in_memory: float

    def __str__(self) -> str:
        if not self.layers_streamed:
            return f"In {self.memory / 2**30:.3g} GiB all weights stay: {self.tokens_per_second:,.3g} tokens/s."
        return (
            f"In {self.memory / 2**30:.3g} GiB {self.layers_streamed} of {self.layers} layers stream: "
            f"{self.bytes_read / 2**20:,.0f} MiB are read a step, at {self.disk_rate / 1e6:,.0f} MB/s; "
            f"{self.tokens_per_second:,.3g} tokens/s, {self.tokens_per_second_in_memory:,.3g} if all stayed."
        )


def disk_rate(file: Path) -> float:
    """Bytes a second of reading a file past the page cache, or through it where the file system allows nothing else."""
    block = mmap.mmap(-1, BLOCK)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        descriptor = os.open(file, os.O_RDONLY)
    done = 0
    began = time.monotonic()
    try:
        while done < READ and (got := os.preadv(descriptor, [block], done)) > 0:
            done += got
    finally:
        os.close(descriptor)
    return done / (time.monotonic() - began)


def streamed_run(
    config: TrainConfig, estimator: Estimator, memory: int, rate: float | None = None
) -> StreamedRun:
    """A run of ``config`` on the CPU within ``memory`` bytes, page cache counted; the disk's ``rate`` is measured if it
    is None. UserError if the model is neither a 4-bit folder nor a GGUF file whose weights are kept."""
    setting = estimator.setting
    terms = estimator.at().peak
    model: Any = load_model(Path(config.model), residency="mapped", dtype=setting.dtype)
    held = kib_fields(Path("/proc/self/status").read_text(encoding="ascii"))["RssAnon"]
    add_lora(model, setting.lora).train()
    if setting.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    weights = num_bytes(parts_of(model))
    beside = terms.total - terms.weights - terms.scales - terms.dense
    free = Free(memory - held, memory, "memory")
    budget = config.weight_budget or free.bytes - free.margin - beside
    plan = plan_streaming(model, budget)
    files = [part.file for _, _, part in mapped_tensors(model)]
    if not files:
        raise UserError(f"{config.model} has no weights of 64 KiB or more, so none would stream")
    path = max(files, key=lambda file: file.num_bytes).path
    layer, rest = _seconds(model, setting)
    count = len(plan.units) - 2
    forward = [0.0, *[layer[0]] * count, rest]
    backward = [0.0, *[layer[1]] * count, 0.0]
    in_memory = speed = setting.tokens / (sum(forward) + sum(backward))
    found = rate or disk_rate(Path(path))
    fits = weights <= budget
    if not fits:
        slower = 0.0
        with _reading(path) as reads:
            slowed, _ = _seconds(model, setting)
        if reads.num_bytes >= READ:  # of less, noise is most
            slower = max(0.0, 1 - sum(layer) / sum(slowed)) / reads.rate
            found = rate or min(found, reads.rate)
        speed = setting.tokens / plan.seconds(found, forward, backward, slower)
    return StreamedRun(
        memory=memory,
        weights=weights,
        resident=weights if fits else plan.resident_bytes,
        layers=count,
        layers_streamed=0 if fits else len(plan.streamed),
        bytes_read=0 if fits else plan.bytes_read() * setting.micro_batches,
        disk_rate=found,
        tokens_per_second=speed,
        tokens_per_second_in_memory=in_memory,
    )


class _Reads:
    num_bytes = 0
    rate = 0.0  # bytes a second


@contextmanager
def _reading(path: str) -> Iterator[_Reads]:
    """Read a file over and over in two slots, as a run does, from its end on; the figures are there at the end."""
    file = _C.MappedFile(path)
    found = _Reads()
    ends = threading.Event()
    pieces = [[(file, at, min(at + SLOT, file.num_bytes))] for at in range(0, file.num_bytes, SLOT)][
        ::-1
    ]
    stream = _C.WeightStream(pieces, [], [])

    def read() -> None:
        now = 0
        while not ends.is_set() and stream.want([now, (now + 1) % len(pieces)], now, False):
            now = (now + 1) % len(pieces)

    reader = threading.Thread(target=read, name="reads", daemon=True)
    began = time.monotonic()
    reader.start()
    try:
        yield found
    finally:
        found.num_bytes = stream.bytes_read
        found.rate = found.num_bytes / (time.monotonic() - began)
        ends.set()
        reader.join()


def _seconds(model: Any, setting: Setting) -> tuple[tuple[float, float], float]:
    """Seconds of a decoder layer, forward and backward, and of everything else, of one micro-batch."""
    path, layers = decoder_layers(model)
    parent, _, name = path.rpartition(".")
    whole = model.get_submodule(parent)
    ids = (
        torch.arange(setting.tokens).view(-1, setting.length)
        % model.get_input_embeddings().num_embeddings
    )
    has_plain_head(model, {"input_ids": ids[:, :2]})
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    try:
        for count in (2, *(1, 2) * TIMED):  # the first brings what is read once
            setattr(whole, name, nn.ModuleList(layers[:count]))
            began = time.monotonic()
            loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids})
            between = time.monotonic()
            loss.backward()
            found[count].append((between - began, time.monotonic() - between))
    finally:
        setattr(whole, name, layers)
    (forward, backward), both = (
        tuple(map(median, zip(*runs, strict=True))) for runs in (found[1], found[2][1:])
    )
    layer = max(0.0, both[0] - forward), max(0.0, both[1] - backward)
    return layer, max(0.0, forward + backward - sum(layer))
