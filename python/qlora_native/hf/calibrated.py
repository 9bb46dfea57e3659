"""Loading with calibrated methods: one decoder layer at a time in 16 bits, run on the calibration set, then 4-bit.

Every layer sees what the unquantized model would have given it. Sequences run side by side, each on one thread, and
what they add to the statistics is added in their order: the bytes do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import _C
from qlora_native._memory import trim_heap
from qlora_native._version import __version__
from qlora_native.calibration.data import CalibrationTokens, as_calibration, take_tokens
from qlora_native.calibration.finished import FinishedLayers
from qlora_native.calibration.hidden import MOST_IN_MEMORY, HiddenStates
from qlora_native.calibration.layers import LayerCalls, decoder_layers
from qlora_native.calibration.quantize import quantize_calibrated
from qlora_native.calibration.statistics import Inputs, InputTaps, Key, Statistic, Statistics
from qlora_native.errors import UserError
from qlora_native.hf.build import Loader
from qlora_native.hf.fuse import fuse, unfuse
from qlora_native.hf.source import Source, load_tokenizer
from qlora_native.nn.experts import STACKS
from qlora_native.weight import QuantizedWeight

Progress = Callable[[str, int, int], None]  # (what is done, layers done, layers in all)
Stored = dict[str, tuple[Tensor, str]]  # weights to be, as they are stored, and their files
Group = tuple[Statistic | None, list[Key]]  # weights that share an input, and what is known of it
FellBack = dict[str, str]  # weight, or weight[expert] -> why it did not get the method

MOST_THREADS = 8  # each holds the activations of one sequence
LEAST_TOKENS = 64  # that must have reached a weight for statistics to mean something
LEAST_TOKENS_PER_CHANNEL = 0.25  # for "gptq": with fewer most of the Hessian is its damping


def calibrated(
    source: Source, loader: Loader, method: str, given: Any, work_dir: Path | None, progress: Progress | None
) -> tuple[dict[str, Any], FellBack]:
    """Fill the loader's tree from ``source`` by ``method``, "wmse" or "gptq", with the calibration data ``given``.

    Returns:
        What is kept of the data beside the weights, and the 4-bit weights that were rounded to nearest, or got "wmse"
        in place of "gptq", and why.
    """
    tell = progress or (lambda text, done, total: None)
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
        tell(f"the calibration data have {rows * length:,} of {tokens.wanted:,} tokens", 0, text.num_hidden_layers)
    told = tokens.describe()
    num_bytes = rows * length * text.hidden_size * loader.dtype.itemsize
    try:
        if work_dir is not None:
            run = {"version": __version__, "model": source.identity(), "method": method, "calibration": told}
            run |= {**loader.options, "dtype": str(loader.dtype), "skip_modules": sorted(loader.weights)}
            finished = FinishedLayers(work_dir, run)
            _tell_of(finished, tell, text.num_hidden_layers)
            fell_back = _calibrate_layers(source, loader, method, tokens, finished, None, tell)
            finished.remove()
        elif num_bytes > MOST_IN_MEMORY and not _C.lies_in_memory(gettempdir()):
            with TemporaryDirectory(prefix="qlora-calibration-") as scratch:
                fell_back = _calibrate_layers(source, loader, method, tokens, None, Path(scratch), tell)
        else:
            fell_back = _calibrate_layers(source, loader, method, tokens, None, None, tell)
    except OSError as error:
        folder = work_dir or gettempdir()
        raise UserError(
            f"{folder}: the calibration's files cannot be written or read ({error.strerror or error}); they take "
            f"{2 * num_bytes / 2**20:,.0f} MiB and the 4-bit layers."
        ) from error
    return told, fell_back


def _tell_of(finished: FinishedLayers, tell: Progress, total: int) -> None:
    if finished.changed:
        tell(f"{', '.join(finished.changed)} changed since the run that was interrupted: starting anew", 0, total)
    elif finished.count:
        tell(f"{finished.count} layers are finished already: going on after them", finished.count, total)


def _calibrate_layers(
    source: Source,
    loader: Loader,
    method: str,
    tokens: CalibrationTokens,
    finished: FinishedLayers | None,
    scratch: Path | None,
    progress: Progress,
) -> FellBack:
    """As :func:`calibrated`; ``finished`` are layers of an earlier run, with room for those of this one, ``scratch`` is
    a folder for hidden states."""
    path, layers = decoder_layers(loader.tree.model)
    outside = partial(_is_outside, f"{path}.")
    loader.take_all(source.iter_tensors(loader.tree, outside, loader.is_copied, loader.weights.__contains__, outside))
    fell_back = {name: "it stands outside the decoder layers: 'rtn'" for name in loader.weights if outside(name)}
    model = loader.tree.prepare()
    work = _Layers(source, loader, method, tokens, path, layers, LayerCalls(model, layers))
    with _side_by_side(loader.tree.device) as (pool, threads):
        start = finished.count if finished else 0
        hidden = work.first_inputs(tokens.ids, finished.folder if finished else scratch, start)
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


def _is_outside(prefix: str, name: str) -> bool:
    return not name.startswith(prefix)


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


class _Layers:
    """One load: the layers, what they are called with, and what is made of each."""

    def __init__(
        self,
        source: Source,
        loader: Loader,
        method: str,
        tokens: CalibrationTokens,
        path: str,
        layers: nn.ModuleList,
        calls: LayerCalls,
    ) -> None:
        self.source, self.loader, self.method, self.ids = source, loader, method, tokens.ids
        self.path, self.layers, self.calls = path, layers, calls
        self.taps = InputTaps()

    def first_inputs(self, ids: Tensor, folder: Path | None, start: int) -> HiddenStates:
        """What enters the layer ``start``; where that is not the first it lies in the folder already."""
        device = self.loader.tree.device
        first = self.calls.first_input(ids[:1].to(device))
        hidden = HiddenStates((len(ids), *first.shape[1:]), first.dtype, folder)
        hidden.layer = start
        if start == 0:
            hidden.begin(0)
            for row in range(len(ids)):
                hidden.write(row, self.calls.first_input(ids[row : row + 1].to(device)) if row else first, 0)
        return hidden

    def put_finished(self, index: int, weights: dict[str, QuantizedWeight]) -> None:
        """Read what is dense in a layer, and put its 4-bit weights, which are there already."""
        prefix, loader = f"{self.path}.{index}.", self.loader
        dense = [name for name in loader.tree.shapes if name.startswith(prefix) and name not in weights]
        loader.take_all(
            self.source.iter_tensors(loader.tree, dense.__contains__, loader.is_copied, among=_starting(prefix))
        )
        for name, weight in weights.items():
            loader.put_four_bit(name, weight.to(loader.tree.device), str(self.source.path))

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
        """Put the layer's weights into the tree in 4 bits; statistics and weights in 16 bits go as they are done."""
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
                    self.loader.put_four_bit(name, weight, stored.pop(name)[1])
                else:
                    parts.setdefault(name, {})[expert] = weight
        for name, experts in parts.items():
            tensor, file = stored.pop(name)
            in_order = (experts.pop(expert) for expert in range(len(tensor)))
            done[name] = self.loader.joined(name, in_order, tensor.shape, file)
            self.loader.put_four_bit(name, done[name], file)
        return {name: done[name] for name in names}, fell_back

    def _read(self, prefix: str) -> Stored:
        """Put a layer into the tree, dense; returns its weights to be, as they are stored, and their files."""
        loader, stored = self.loader, {}

        def is_copied(name: str, dtype: torch.dtype) -> bool:
            return name not in loader.weights and loader.is_copied(name, dtype)

        iter_tensors = self.source.iter_tensors(loader.tree, lambda name: True, is_copied, among=_starting(prefix))
        for name, value, file in iter_tensors:
            assert isinstance(value, Tensor)
            loader.put_dense(name, value, file)
            if name in loader.weights:
                stored[name] = (value.to(loader.tree.device), file)
        return stored

    @torch.no_grad()
    def _run(self, index: int, hidden: HiddenStates, last: bool, row: int) -> Inputs:
        device = self.loader.tree.device
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
            result = self.loader.quantized(name, one, file, partial(quantize_calibrated, **data), **nested)
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


def _starting(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


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
