"""Loading with calibrated methods: one decoder layer at a time in 16 bits, run on the calibration set, then 4-bit.

Every layer sees what the unquantized model would have given it. Sequences run side by side, each on one thread, and
what they add to the statistics is added in their order: the bytes do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._buffers import interleave
from qlora_native._memory import trim_heap
from qlora_native._version import __version__
from qlora_native.calibration.data import CalibrationTokens, as_calibration, take_tokens
from qlora_native.calibration.layers import (
    MOST_IN_MEMORY,
    FinishedLayers,
    HiddenStates,
    LayerCalls,
    decoder_layers,
)
from qlora_native.calibration.quantize import quantize_calibrated, torch_threads
from qlora_native.calibration.statistics import Inputs, InputTaps, Key, Statistic, Statistics
from qlora_native.errors import UserError
from qlora_native.models.build import MetaModel
from qlora_native.models.fuse import fuse, unfuse
from qlora_native.models.progress import Progress
from qlora_native.nn.experts import STACKS
from qlora_native.weight import QuantizedWeight
from qlora_native.weights.files import first_sentence
from qlora_native.weights.open import load_tokenizer
from qlora_native.weights.shapes import turned
from qlora_native.weights.stream import Entry, Source, stream
from qlora_native.weights.transforms import join

Stored = dict[str, tuple[Tensor, str]]  # weights to be, as they are stored, and their files
Group = tuple[Statistic | None, list[Key]]  # weights that share an input, and what is known of it
FellBack = dict[str, str]  # weight, or weight[expert] -> why it did not get the method

MOST_THREADS = 8  # each holds the activations of one sequence
LEAST_TOKENS = 64  # that must have reached a weight for statistics to mean something
LEAST_TOKENS_PER_CHANNEL = 0.25  # for "gptq": with fewer most of the Hessian is its damping


def calibrated(
    source: Source,
    meta: MetaModel,
    names: dict[str, bool],
    options: dict[str, Any],
    method: str,
    given: Any,
    work_dir: Path | None,
    progress: Progress | None,
) -> tuple[dict[str, Any], FellBack]:
    """Fill ``meta`` from ``source``, the weights of these ``names`` quantized with these ``options`` by ``method``,
    "wmse" or "gptq", with the calibration data ``given``.

    Returns what is kept of the data beside the weights, and the weights that did not get the method.
    """
    progress = progress or (lambda text, done, total: None)
    text = source.config.get_text_config()
    total, tokens = text.num_hidden_layers, tokens_for(source, given, method)
    rows, length = tokens.ids.shape
    if rows * length < tokens.wanted:
        progress(f"the calibration data have {rows * length:,} of {tokens.wanted:,} tokens", 0, total)
    described = tokens.describe()
    num_bytes = rows * length * text.hidden_size * meta.dtype.itemsize
    finished, folder = None, work_dir
    try:
        with ExitStack() as stack:
            if work_dir is not None:
                files = {
                    str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns]
                    for file in source.files
                }
                run = {
                    "version": __version__,
                    "model": files,
                    "method": method,
                    "calibration": described,
                }
                run |= {**options, "dtype": str(meta.dtype), "skip_modules": sorted(names)}
                finished = FinishedLayers(work_dir, run)
                if finished.changed:
                    changed = ", ".join(finished.changed)
                    progress(
                        f"{changed} changed since the run that was interrupted: starting anew",
                        0,
                        total,
                    )
                elif finished.count:
                    progress(
                        f"{finished.count} layers are finished already: going on after them",
                        finished.count,
                        total,
                    )
            elif num_bytes > MOST_IN_MEMORY and not _C.lies_in_memory(gettempdir()):
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="qlora-calibration-")))
            fell_back = _Layers(source, meta, names, options, method, tokens.ids).run(
                finished, folder, progress
            )
        if finished is not None:
            finished.remove()
    except OSError as error:
        raise UserError(
            f"{work_dir or gettempdir()}: the calibration's files cannot be written or read "
            f"({error.strerror or error}); they take {2 * num_bytes / 2**20:,.0f} MiB and the 4-bit layers."
        ) from error
    return described, fell_back


def tokens_for(source: Source, given: Any, method: str) -> CalibrationTokens:
    """The sequences of the data ``given`` to calibrate the model of ``source`` with."""
    text = source.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    return take_tokens(
        as_calibration(given), method, partial(load_tokenizer, source), text.vocab_size, longest
    )


@contextmanager
def side_by_side(device: torch.device) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that each run ops of torch alone; and how many they are."""
    count = min(torch.get_num_threads(), MOST_THREADS) if device.type == "cpu" else 1
    with (
        torch_threads(1),
        ThreadPoolExecutor(count, "calibration", torch.set_num_threads, (1,)) as pool,
    ):
        yield pool, count


@dataclass
class _Layers:
    """One load: the layers, what they are called with, and what is made of each."""

    source: Source
    meta: MetaModel
    names: dict[str, bool]
    options: dict[str, Any]
    method: str
    ids: Tensor

    def __post_init__(self) -> None:
        self.path, self.layers = decoder_layers(self.meta.model)
        self.taps = InputTaps()

    def run(
        self, finished: FinishedLayers | None, folder: Path | None, progress: Progress
    ) -> FellBack:
        """As :func:`calibrated`; ``finished`` are layers of an earlier run, ``folder`` is for hidden states."""
        meta, inside, count = self.meta, f"{self.path}.", len(self.layers)
        start = finished.count if finished else 0
        items = meta.rounded(self.source, self.names, self.options)
        meta.load(item for item in items if not item.name.startswith(inside))
        outside = [name for name in self.names if not name.startswith(inside)]
        fell_back = dict.fromkeys(outside, "it stands outside the decoder layers: 'rtn'")
        self.calls = LayerCalls(meta.prepare(), self.layers)
        with side_by_side(meta.device) as (self.pool, self.threads):
            ids = self.ids.to(meta.device)
            first = self.calls.first_input(ids[:1])
            hidden = HiddenStates((len(ids), *first.shape[1:]), first.dtype, folder)
            hidden.layer = start
            del first
            if start == 0:  # else the input of that layer lies in the folder already
                hidden.begin(0)
                for row, sequence in enumerate(ids.split(1)):
                    hidden.write(row, self.calls.first_input(sequence), 0)
            for index in range(count):
                if finished is not None and index < start:
                    weights, fallen = finished.load(index)
                    self.read(f"{inside}{index}.", weights)  # what is dense in the layer
                    for name, weight in weights.items():
                        self.store(name, weight.to(meta.device), str(self.source.path))
                else:
                    weights, fallen = self.calibrate(index, hidden)
                    if finished is not None:
                        hidden.sync(index + 1)
                        finished.save(index, weights, fallen)
                    hidden.advance()
                fell_back |= fallen
                trim_heap()
                progress(f"layer {index + 1} of {count}", index + 1, count)
        return fell_back

    def calibrate(
        self, index: int, hidden: HiddenStates
    ) -> tuple[dict[str, QuantizedWeight], FellBack]:
        """Read a layer, run it, quantize it; ``hidden`` then also holds what it makes of its input."""
        prefix, layer = f"{self.path}.{index}.", self.layers[index]
        stored = self.read(prefix)
        rows, length = self.ids.shape
        full = self.method == "gptq"
        statistics = Statistics(full, None if full else length)
        hidden.begin(index + 1)
        run = partial(self._run, index, hidden)
        fuse(layer)  # torch's own 16-bit products are slow on many CPUs
        with self.taps.on(layer, prefix, stored):
            for first in range(0, rows, self.threads):
                inputs = self.pool.map(run, range(rows)[first : first + self.threads])
                statistics.add([*inputs], self.pool)
        unfuse(layer)
        trim_heap()  # that of the activations, before weights are worked on
        groups = _by_size(statistics, stored)
        del statistics
        # Weight after weight: one takes as much memory as the statistics.
        with torch_threads(self.threads):
            return self._quantize(groups, stored)

    @torch.no_grad()
    def _quantize(
        self, groups: list[Group], stored: Stored
    ) -> tuple[dict[str, QuantizedWeight], FellBack]:
        """Store the layer's weights in 4 bits; statistics and weights in 16 bits go as they are done."""
        done: dict[str, QuantizedWeight] = {}
        parts: dict[str, dict[int, QuantizedWeight]] = {}
        fell_back: FellBack = {}
        while groups:
            statistic, keys = groups.pop(0)
            if self.method == "gptq":
                trim_heap()  # that of the matrices before, which leave holes
            for name, expert, weight, reason in self._quantized(statistic, keys, stored):
                if reason:
                    fell_back[name if expert is None else f"{name}[{expert}]"] = reason
                if expert is None:
                    done[name] = self.store(name, weight, stored.pop(name)[1])
                else:
                    parts.setdefault(name, {})[expert] = weight
        for name, experts in parts.items():
            tensor, file = stored.pop(name)
            in_order = (experts.pop(expert) for expert in range(len(tensor)))
            shape = turned(tensor.shape) if self.names[name] else tensor.shape
            joined = join(in_order, shape, self.meta.dtype, self.options, self.meta.device)
            done[name] = self.store(name, joined, file)
        return done, fell_back

    def store(self, name: str, weight: QuantizedWeight, file: str) -> QuantizedWeight:
        """Store a weight, with the model's dtype, in memory that its products read fast."""
        weight.dtype = self.meta.dtype
        interleave(weight.packed)
        self.meta.store(name, weight, file)
        return weight

    def read(self, prefix: str, done: Container[str] = ()) -> Stored:
        """Store a layer dense, without what is ``done``; returns its weights to be, as they are in the files."""
        meta, names, stored = self.meta, self.names, Stored()

        def is_lasting(entry: Entry) -> bool:
            return entry.name in names or meta.keeps(entry)

        for item in stream(self.source, meta, prefix=prefix, is_lasting=is_lasting):
            if item.name in done and item.entry.is_plain:
                continue
            for name, value in item.values():
                assert isinstance(value, Tensor)
                if name in done:
                    continue
                meta.store(name, meta.dense(name, value, item.entry.file), item.entry.file)
                if name in names:
                    stored[name] = (value.to(meta.device), item.entry.file)
            meta.trim(item.entry.num_bytes)
        return stored

    @torch.no_grad()
    def _run(self, index: int, hidden: HiddenStates, row: int) -> Inputs:
        with self.taps.noting() as inputs:
            out = self.calls[index].run(self.layers[index], hidden.read(row).to(self.meta.device))
        if not bool(out.isfinite().all()):
            raise UserError(
                f"layer {index} makes a NaN or an infinity of sequence {row} of the calibration data in {out.dtype}: "
                "load with dtype float32, or calibrate with other text."
            )
        if index + 1 < len(self.layers):
            hidden.write(row, out, index + 1)
        return inputs

    def _quantized(
        self, statistic: Statistic | None, keys: list[Key], stored: Stored
    ) -> Iterator[tuple[str, int | None, QuantizedWeight, str | None]]:
        """The weights that share an input, with their keys, and why they did not get the method, if so."""
        tokens = statistic.tokens if statistic else 0
        method, why = self.method, ""
        if statistic is None or tokens < LEAST_TOKENS:
            method, statistic = "rtn", None
            why = f"{tokens} tokens of the calibration data reached it, expected at least {LEAST_TOKENS}: 'rtn'"
        elif method == "gptq" and tokens < LEAST_TOKENS_PER_CHANNEL * len(statistic.squares):
            method = "wmse"
            why = f"{tokens} tokens reached it, which has {len(statistic.squares)} input channels: 'wmse'"
        moment = statistic.moment if statistic else None
        hessian = statistic.hessian() if statistic and method == "gptq" else None
        for name, expert in keys:
            tensor, file = stored[name]
            options = self.options
            # The scales of a stack are nested together, once all of them are there.
            if expert is not None:
                tensor, options = tensor[expert], {**options, "double_quant": False}
            tensor = tensor.t().contiguous() if self.names[name] else tensor
            try:
                result = quantize_calibrated(tensor, method, moment=moment, hessian=hessian, **options)
            except ValueError as error:
                reason = first_sentence(error).removeprefix("quantize_calibrated: ")
                raise UserError(f"{file}: weight {name} cannot be quantized: {reason}") from error
            yield name, expert, result.weight, why or result.report.fallback


def _by_size(statistics: Statistics, stored: Stored) -> list[Group]:
    """The groups of weights, those with the largest statistics last, after the weights that no token reached."""
    unseen = [
        (name, expert)
        for name, (tensor, _) in stored.items()
        for expert in (range(len(tensor)) if name.rpartition(".")[2] in STACKS else (None,))
        if (name, expert) not in statistics.of
    ]
    return [(None, unseen), *sorted(statistics.groups(), key=lambda group: len(group[0].squares))]
