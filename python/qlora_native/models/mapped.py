"""Models whose weights lie in mapped files: what changed under them, what they hold, and which of it streams.

A streamed model keeps its tensors where they are. Hooks tell a native thread which decoder layer runs; it reads the
layers that are next and gives up those behind (:mod:`qlora_native.models.residency` says which). A visit that nobody
foresaw costs time, never a wrong value.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import _C
from qlora_native._memory import free_memory
from qlora_native.calibration.layers import decoder_layers
from qlora_native.errors import UserError
from qlora_native.models.residency import Residency, Unit, least_residency, plan_residency
from qlora_native.weights.files import MappedPart, check_finite, mapped_part

BESIDE = 512 << 20  # bytes that chatting and evaluating are given for other things than weights
GAP = 4096  # bytes between two tensors of a unit that are read as one range


def mapped_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, MappedPart]]:
    """Every parameter and buffer that lies in a mapped file, with its name."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if (part := mapped_part(tensor)) is not None:
            yield name, tensor, part


def check_files(files: list[_C.MappedFile]) -> None:
    """UserError if a file was changed since it was mapped."""
    for file in files:
        if sentence := file.change():
            raise UserError(
                f"{sentence[:-1]}; load the model again, or continue from the last checkpoint."
            )


def check_mapped_finite(model: nn.Module, where: str) -> None:
    """UserError that names a mapped tensor with a NaN or an infinity: for when a loss is not finite."""
    for name, tensor, _ in mapped_tensors(model):
        if tensor.is_floating_point():
            check_finite(tensor, name, where)


def parts_of(module: nn.Module) -> list[MappedPart]:
    """The ranges of mapped files that a module's tensors take, in the files' order, near ones as one."""
    found = sorted(
        (part for _, _, part in mapped_tensors(module)),
        key=lambda part: (part.file.address, part.begin),
    )
    merged: list[MappedPart] = []
    for part in found:
        last = merged[-1] if merged else None
        if last is not None and last.file is part.file and part.begin - last.end <= GAP:
            merged[-1] = last._replace(end=max(last.end, part.end))
        else:
            merged.append(part)
    return merged


def num_bytes(parts: list[MappedPart]) -> int:
    """Of all ranges."""
    return sum(part.end - part.begin for part in parts)


_streaming: weakref.WeakKeyDictionary[nn.Module, Streaming] = weakref.WeakKeyDictionary()


class Streaming:
    """A model with some layers in memory; the others come and go, within ``budget`` bytes of weights.

    Where the budget is too small, every layer streams through two slots: ``plan`` says what is held. All is as before
    after :meth:`close`. A copy or a pickle of the model has no part in it.

    Raises UserError if the model has no list of decoder layers.
    """

    def __init__(self, model: Any, budget: int) -> None:
        path, layers = decoder_layers(model)
        parts = _unit_parts(model)
        self.plan = plan_streaming(model, budget)
        self.files = list({id(part.file): part.file for each in parts for part in each}.values())
        self._wanted = {training: self.plan.wanted(training) for training in (False, True)}
        self._training = False
        streamed = set(self.plan.streamed)
        resident = [part for unit, each in enumerate(parts) if unit not in streamed for part in each]
        # A tied head has none.
        rows = [part for part in parts_of(model.get_input_embeddings()) if part not in parts[-1]]
        units_of_stream = [part if unit in streamed else [] for unit, part in enumerate(parts)]
        self.stream = _C.WeightStream(units_of_stream, resident, rows)
        decoder = model.get_submodule(path.rpartition(".")[0]) if "." in path else model
        self._handles = [decoder.register_forward_pre_hook(_Hook(self._begin))]
        for number, layer in enumerate(layers, 1):
            self._handles.append(layer.register_forward_pre_hook(_Hook(self._before, number)))
            self._handles.append(layer.register_forward_hook(_Hook(self._behind, number)))

    def close(self) -> None:
        """Remove the hooks; the pages come and go as the system decides."""
        for handle in self._handles:
            handle.remove()
        self.stream.want([], -1, False)
        for model in [model for model, streaming in _streaming.items() if streaming is self]:
            del _streaming[model]

    def _begin(self, *_: Any) -> None:
        self._training = torch.is_grad_enabled()

    def _before(self, number: int, *_: Any) -> None:
        """Before a layer's forward pass, which within a backward pass is a checkpoint's."""
        self._visit(number, torch._C._current_graph_task_id() != -1)

    def _behind(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        """Behind a forward pass: have the gradient of its output call, which comes before the layer's backward pass."""
        hidden = output[0] if isinstance(output, tuple) else output
        if (
            isinstance(hidden, Tensor)
            and hidden.requires_grad
            and torch._C._current_graph_task_id() == -1
        ):
            hidden.register_hook(_Hook(self._visit, number, True))

    def _visit(self, number: int, is_backward: bool, *_: Any) -> None:
        schedule = self._wanted[self._training or is_backward]
        wanted = schedule[-1 - number if is_backward else number]
        now = number if number in wanted and number in self.plan.streamed else -1
        if not self.stream.want(wanted, now, number == 1 and not is_backward):
            check_files(self.files)
            raise UserError(
                "a file of the model cannot be read: its disk fails; continue from the last checkpoint."
            )


def _unit_parts(model: Any) -> list[list[MappedPart]]:
    """The ranges of each unit: the embedding, whose rows are looked up, has none; decoder layers; head."""
    head = model.get_output_embeddings()
    return [[], *map(parts_of, decoder_layers(model)[1]), [] if head is None else parts_of(head)]


def plan_streaming(model: Any, budget: int) -> Residency:
    """What of a mapped model stays within ``budget`` bytes; where it is too small, all layers stream through two slots.

    UserError if the model has no list of decoder layers.
    """
    parts = _unit_parts(model)
    names = ["embedding", *(f"layer {number}" for number in range(len(parts) - 2)), "head"]
    units = [
        Unit(name, num_bytes(part), must_stay=name == "head")
        for name, part in zip(names, parts, strict=True)
    ]
    try:
        return plan_residency(units, budget)
    except ValueError:
        return least_residency(units)


def stream_if_needed(
    model: Any, budget: int | None, beside: int, note: Callable[[str], None] = lambda line: None
) -> Streaming | None:
    """Stream the layers of a mapped model whose weights do not fit ``budget`` bytes; None if they do or it streams.

    Without a budget it is what is free beyond its margin, less ``beside``: bytes that the run will take for other
    things. ``note`` gets one line. The model keeps what is returned.
    """
    total = num_bytes(parts_of(model))
    free = free_memory()
    if budget is None:
        budget = total if free is None else free.bytes - free.margin - beside
    if total <= budget or model in _streaming:
        return None
    streaming = _streaming[model] = Streaming(model, budget)
    plan = streaming.plan
    note(
        f"weights take {total / 2**20:,.0f} MiB, {max(0, budget) / 2**20:,.0f} MiB of memory are for them"
        f"{f' ({free})' if free else ''}: {len(plan.streamed)} of {len(plan.units) - 2} layers are read from the files "
        f"as they are needed, {plan.bytes_read() / 2**20:,.0f} MiB a step"
    )
    return streaming


def streaming_of(model: nn.Module) -> Streaming | None:
    """How the model streams, if it does."""
    return _streaming.get(model)


class _Hook:
    """A call of a method with a number and what a hook is given; nothing in a copy or a pickle."""

    def __init__(self, method: Any = None, *numbers: int) -> None:
        self._method, self._numbers = method, numbers

    def __call__(self, *args: Any) -> None:
        if self._method is not None:
            self._method(*self._numbers, *args)

    def __reduce__(self) -> Any:
        return _Hook, ()
