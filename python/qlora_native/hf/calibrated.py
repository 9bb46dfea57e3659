"""Loading with calibrated methods: one decoder layer at a time in 16 bits, run on the calibration set, then 4-bit.

Every layer sees what the unquantized model would have given it. Sequences run side by side, each on one thread, and
what they add to the statistics is added in their order: the bytes do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import _C
from qlora_native._memory import trim_heap
from qlora_native._version import __version__
from qlora_native.calibration.data import as_calibration, take_tokens
from qlora_native.calibration.layers import MOST_IN_MEMORY, FinishedLayers, HiddenStates, LayerCalls, decoder_layers
from qlora_native.calibration.quantize import quantize_calibrated
from qlora_native.calibration.statistics import Inputs, InputTaps, Key, Statistic, Statistics
from qlora_native.errors import UserError
from qlora_native.hf.build import MetaModel, join
from qlora_native.hf.fuse import fuse, unfuse
from qlora_native.hf.load import Progress
from qlora_native.hf.plan import Plain
from qlora_native.hf.source import Source, load_tokenizer
from qlora_native.nn.experts import STACKS
from qlora_native.weight import QuantizedWeight

Stored = dict[str, tuple[Tensor, str]]  # weights to be, as they are stored, and their files
Group = tuple[Statistic | None, list[Key]]  # weights that share an input, and what is known of it
FellBack = dict[str, str]  # weight, or weight[expert] -> why it did not get the method

MOST_THREADS = 8  # each holds the activations of one sequence
LEAST_TOKENS = 64  # that must have reached a weight for statistics to mean something
LEAST_TOKENS_PER_CHANNEL = 0.25  # for "gptq": with fewer most of the Hessian is its damping


def calibrated(
    source: Source, meta: MetaModel, method: str, given: Any, work_dir: Path | None, progress: Progress | None
) -> tuple[dict[str, Any], FellBack]:
    """Fill ``meta`` from ``source`` by ``method``, "wmse" or "gptq", with the calibration data ``given``.

    Returns:
        What is kept of the data beside the weights, and the 4-bit weights that were rounded to nearest, or got "wmse"
        in place of "gptq", and why.
    """
    progress = progress or (lambda text, done, total: None)
    text = source.config.get_text_config()
    tokens = take_tokens(
        as_calibration(given),
        method,
        partial(load_tokenizer, source),
        text.vocab_size,
        getattr(text, "max_position_embeddings", None),
    )
    rows, length = tokens.ids.shape
    if rows * length < tokens.wanted:
        progress(f"the calibration data have {rows * length:,} of {tokens.wanted:,} tokens", 0, text.num_hidden_layers)
    described = tokens.describe()
    num_bytes = rows * length * text.hidden_size * meta.dtype.itemsize
    try:
        if work_dir is not None:
            files = {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in source.files}
            run = {"version": __version__, "model": files, "method": method, "calibration": described}
            run |= {**meta.options, "dtype": str(meta.dtype), "skip_modules": sorted(meta.weights)}
            finished = FinishedLayers(work_dir, run)
            _report_finished(finished, progress, text.num_hidden_layers)
            fell_back = _calibrate_layers(source, meta, method, tokens.ids, finished, None, progress)
            finished.remove()
        elif num_bytes > MOST_IN_MEMORY and not _C.lies_in_memory(gettempdir()):
            with TemporaryDirectory(prefix="qlora-calibration-") as scratch:
                fell_back = _calibrate_layers(source, meta, method, tokens.ids, None, Path(scratch), progress)
        else:
            fell_back = _calibrate_layers(source, meta, method, tokens.ids, None, None, progress)
    except OSError as error:
        folder = work_dir or gettempdir()
        raise UserError(
            f"{folder}: the calibration's files cannot be written or read ({error.strerror or error}); they take "
            f"{2 * num_bytes / 2**20:,.0f} MiB and the 4-bit layers."
        ) from error
    return described, fell_back


def _report_finished(finished: FinishedLayers, progress: Progress, total: int) -> None:
    if finished.changed:
        progress(f"{', '.join(finished.changed)} changed since the run that was interrupted: starting anew", 0, total)
    elif finished.count:
        progress(f"{finished.count} layers are finished already: going on after them", finished.count, total)


def _calibrate_layers(
    source: Source,
    meta: MetaModel,
    method: str,
    ids: Tensor,
    finished: FinishedLayers | None,
    scratch: Path | None,
    progress: Progress,
) -> FellBack:
    """As :func:`calibrated`; ``finished`` are layers of an earlier run, with room for those of this one, ``scratch`` is
    a folder for hidden states."""
    path, layers = decoder_layers(meta.model)
    meta.load(source, [step for step in source.plan(meta).steps if not step.name.startswith(f"{path}.")])
    outside = [name for name in meta.weights if not name.startswith(f"{path}.")]
    fell_back = dict.fromkeys(outside, "it stands outside the decoder layers: 'rtn'")
    work = _Layers(source, meta, method, ids, path, layers, LayerCalls(meta.prepare(), layers))
    with _side_by_side(meta.device) as (pool, threads):
        start = finished.count if finished else 0
        hidden = work.first_inputs(finished.folder if finished else scratch, start)
        for index in range(len(layers)):
            if finished is not None and index < start:
                weights, fallen = finished.load(index)
                work.put_finished(index, weights)
            else:
                weights, fallen = work.calibrate(index, hidden, pool, threads)
                if finished is not None:
                    hidden.sync(index + 1)
                    finished.save(index, weights, fallen)
                hidden.advance()
            fell_back |= fallen
            trim_heap()
            progress(f"layer {index + 1} of {len(layers)}", index + 1, len(layers))
    return fell_back


@contextmanager
def _side_by_side(device: torch.device) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that run torch next to each other, each op on one of them; and how many they are."""
    threads = torch.get_num_threads()
    count = min(threads, MOST_THREADS) if device.type == "cpu" else 1
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, "calibration", torch.set_num_threads, (1,)) as pool:
            yield pool, count
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Layers:
    """One load: the layers, what they are called with, and what is made of each."""

    source: Source
    meta: MetaModel
    method: str
    ids: Tensor
    path: str
    layers: nn.ModuleList
    calls: LayerCalls
    taps: InputTaps = field(default_factory=InputTaps)

    def first_inputs(self, folder: Path | None, start: int) -> HiddenStates:
        """What enters the layer ``start``; where that is not the first it lies in the folder already."""
        ids = self.ids.to(self.meta.device)
        first = self.calls.first_input(ids[:1])
        hidden = HiddenStates((len(ids), *first.shape[1:]), first.dtype, folder)
        hidden.layer = start
        if start == 0:
            hidden.begin(0)
            for row in range(len(ids)):
                hidden.write(row, self.calls.first_input(ids[row : row + 1]) if row else first, 0)
        return hidden

    def put_finished(self, index: int, weights: dict[str, QuantizedWeight]) -> None:
        """Read what is dense in a layer, and store its 4-bit weights, which are there already."""
        self._read(f"{self.path}.{index}.", weights)
        for name, weight in weights.items():
            self._store(name, weight.to(self.meta.device), str(self.source.path))

    def calibrate(
        self, index: int, hidden: HiddenStates, pool: ThreadPoolExecutor, threads: int
    ) -> tuple[dict[str, QuantizedWeight], FellBack]:
        """Read a layer, run it, quantize it; ``hidden`` then also holds what it makes of its input."""
        prefix, layer, last = f"{self.path}.{index}.", self.layers[index], index + 1 == len(self.layers)
        stored = self._read(prefix)
        full = self.method == "gptq"
        statistics = Statistics(full, None if full else self.ids.shape[1])
        hidden.begin(index + 1)
        run = partial(self._run, index, hidden, last)
        fuse(layer)  # torch's own 16-bit products are slow on many CPUs
        with self.taps.on(layer, prefix, stored):
            for first in range(0, len(self.ids), threads):
                rows = range(first, min(first + threads, len(self.ids)))
                statistics.add(list(pool.map(run, rows)), pool)
        unfuse(layer)
        trim_heap()  # that of the activations, before weights are worked on
        groups = _by_size(statistics, stored)
        del statistics
        torch.set_num_threads(threads)  # weight after weight: work on one takes as much memory as the statistics
        try:
            return self._quantize(groups, stored)
        finally:
            torch.set_num_threads(1)

    @torch.no_grad()
    def _quantize(self, groups: list[Group], stored: Stored) -> tuple[dict[str, QuantizedWeight], FellBack]:
        """Store the layer's weights in 4 bits; statistics and weights in 16 bits go as they are done."""
        names, done = list(stored), dict[str, QuantizedWeight]()
        parts: dict[str, dict[int, QuantizedWeight]] = {}
        fell_back: FellBack = {}
        while groups:
            statistic, keys = groups.pop(0)
            if self.method == "gptq":
                trim_heap()  # that of the matrices before, which leave holes
            made, fallen = self._quantized_by(statistic, keys, stored)
            fell_back |= fallen
            for (name, expert), weight in made.items():
                if expert is None:
                    done[name] = weight
                    self._store(name, weight, stored.pop(name)[1])
                else:
                    parts.setdefault(name, {})[expert] = weight
        for name, experts in parts.items():
            tensor, file = stored.pop(name)
            in_order = (experts.pop(expert) for expert in range(len(tensor)))
            done[name] = join(in_order, tensor.shape, self.meta.dtype, self.meta.options, self.meta.device)
            self._store(name, done[name], file)
        return {name: done[name] for name in names}, fell_back

    def _store(self, name: str, weight: QuantizedWeight, file: str) -> None:
        self.meta.store(name, self.meta.finished(weight), file)

    def _read(self, prefix: str, done: Container[str] = ()) -> Stored:
        """Store a layer dense, without what is ``done``; returns its weights to be, as they are in the files."""
        meta, stored = self.meta, Stored()
        steps = [step for step in self.source.plan(meta).steps if step.name.startswith(prefix)]
        steps = [step for step in steps if step.name not in done or not isinstance(step, Plain)]
        scratch = meta.scratch([step for step in steps if step.name not in meta.weights])
        for step in steps:
            copied = step.name not in meta.weights and meta.is_copied(step)
            for name, value in step.iter_tensors(meta.model, self.source.read, scratch if copied else None):
                assert isinstance(value, Tensor)
                if name in done:
                    continue
                meta.store(name, meta.dense(name, value, step.file), step.file)
                if name in meta.weights:
                    stored[name] = (value.to(meta.device), step.file)
            meta.trim(step.num_bytes)
        return stored

    @torch.no_grad()
    def _run(self, index: int, hidden: HiddenStates, last: bool, row: int) -> Inputs:
        device = self.meta.device
        with self.taps.noting() as inputs:
            out = self.calls[index].run(self.layers[index], hidden.read(row).to(device))
        if not bool(out.isfinite().all()):
            raise UserError(
                f"layer {index} makes a NaN or an infinity of sequence {row} of the calibration data in {out.dtype}: "
                "load with dtype float32, or calibrate with other text."
            )
        if not last:
            hidden.write(row, out, index + 1)
        return inputs

    def _quantized_by(
        self, statistic: Statistic | None, keys: list[Key], stored: Stored
    ) -> tuple[dict[Key, QuantizedWeight], FellBack]:
        """The weights that share an input, and which of them did not get the method."""
        method, why = self._method_for(statistic)
        data: dict[str, Any] = {"method": method}
        if statistic is not None and method != "rtn":
            data |= {"moment": statistic.moment, "hessian": statistic.hessian() if method == "gptq" else None}
        made: dict[Key, QuantizedWeight] = {}
        fell_back: FellBack = {}
        for name, expert in keys:
            tensor, file = stored[name]
            called, one, nested = name, tensor, {}
            if expert is not None:
                # The scales of a stack are nested together, once all of them are there.
                called, one, nested = f"{name}[{expert}]", tensor[expert], {"double_quant": False}
            result = self.meta.quantized(name, one, file, partial(quantize_calibrated, **data), **nested)
            made[name, expert] = result.weight
            if reason := why or result.report.fallback:
                fell_back[called] = reason
        return made, fell_back

    def _method_for(self, statistic: Statistic | None) -> tuple[str, str]:
        """The method for weights with that input, and why it is not the one asked for."""
        tokens = 0 if statistic is None else statistic.tokens
        if statistic is None or tokens < LEAST_TOKENS:
            return "rtn", f"{tokens} tokens of the calibration data reached it, expected at least {LEAST_TOKENS}: 'rtn'"
        channels = len(statistic.squares)
        if self.method == "gptq" and tokens < LEAST_TOKENS_PER_CHANNEL * channels:
            return "wmse", f"{tokens} tokens reached it, which has {channels} input channels: 'wmse'"
        return self.method, ""


def _by_size(statistics: Statistics, stored: Stored) -> list[Group]:
    """The groups of weights, those with the largest statistics last, after the weights that no token reached."""
    groups: list[Group] = [*statistics.groups()]
    groups.sort(key=lambda group: len(group[0].squares) if group[0] is not None else 0)
    keys: list[Key] = []
    for name, (tensor, _) in stored.items():
        is_stack = name.rpartition(".")[2] in STACKS
        keys += [(name, expert) for expert in range(len(tensor))] if is_stack else [(name, None)]
    unseen = [key for key in keys if key not in statistics.of]
    return [(None, unseen), *groups] if unseen else groups
