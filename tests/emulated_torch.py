"""Torch's side of the emulated device: whose memory a CPU tensor plays, and which of torch's operations a graph holds.

A mode looks at each operation of torch. Under ``placed`` what they make is registered with the emulator as memory of
the device, with its exact bounds, and a kernel's access of anything else is reported. Under ``captured`` they join the
graph that the kernels are captured into. Under ``late`` they join the stream that the kernels are launched on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulated import Emulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_native.ops import _cuda_kernels, _library

# What reads the device's memory on the host, and so waits for it.
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2", "item"}


def tensors_in(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def implementation(func: Any) -> Callable[..., Any] | None:
    """The device's kernel of an op of ours, or None for torch's ops."""
    if func.namespace != "qlora_native":
        return None
    name = func._schema.name.split("::")[1]
    either = [_library.IMPLEMENTATIONS.get((name, key)) for key in ("CUDA", "CompositeExplicitAutograd")]
    return next(filter(None, either), None)


class Placed(TorchDispatchMode):
    """Registers what torch's operations make: as the host's memory if all that they read is the host's."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__()
        self.module = emulator.module
        self.on_host: dict[int, Tensor] = {}  # by the address of the storage
        self.known: dict[int, weakref.finalize[..., Any]] = {}  # what is registered, while it lives

    def host(self, tensor: Tensor) -> Tensor:
        """A copy of it in memory that no kernel may read."""
        copy = tensor.detach().clone()
        self._register(copy, "host")
        return copy

    def _register(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or storage.data_ptr() in self.on_host:
            return
        if kind == "host":
            self.on_host[storage.data_ptr()] = tensor
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        before = self.known.get(address)
        if before is None or not before.alive or kind == "host":
            if before is not None:
                before.detach()
            self.module.add_range(address, num_bytes, kind)
            self.known[address] = weakref.finalize(storage, self.module.add_range, address, num_bytes, "freed")

    def _is_on_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.on_host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = implementation(func)
        if kernel is not None:
            for tensor in tensors_in(args):
                self._register(tensor, "device")
            with self:
                return kernel(*args, **(kwargs or {}))
        read = [tensor for tensor in tensors_in(args) if tensor.dim() > 0]
        kind = "host" if read and all(map(self._is_on_host, read)) else "device"
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._register(tensor, kind)
        return result


@contextmanager
def placed(emulator: Emulator) -> Iterator[Placed]:
    """Tensors made in here are the device's, but for those of ``host``; wants the module of checked kernels."""
    for function in vars(_cuda_kernels).values():
        if hasattr(function, "cache_clear"):  # tables that were made before are not registered
            function.cache_clear()
    emulator.module.set_strict(True)
    mode = Placed(emulator)
    try:
        with mode:
            yield mode
    finally:
        emulator.module.set_strict(False)
        for address in mode.on_host:
            mode.known[address].detach()
            emulator.module.forget_range(address)


class Graph:
    """Kernels and torch's operations that were captured together."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator, self.address = emulator, 0
        self.made: list[Tensor] = []  # in the capture, and alive as long as it, as in the memory pool of torch's graphs

    def replay(self) -> None:
        with torch.no_grad():  # what is captured lies below autograd
            self.emulator.module.launch_graph(self.address, self.emulator.stream)

    def finish(self, address: int) -> None:
        self.address = address
        weakref.finalize(self, self.emulator.module.destroy_graph, address)


class Captured(TorchDispatchMode):
    """Puts operations into the emulator's stream. What writes to its operands runs there alone, later.

    What makes a tensor runs at once, too, since the result is needed to go on; its values are not those of later.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.module, self.graph = graph.emulator.module, graph

    @property
    def stream(self) -> int:
        return self.graph.emulator.stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kernel = implementation(func)
        if kernel is not None:
            with self:
                return kernel(*args, **kwargs)
        schema = func._schema
        if schema.name.split("::")[1] in WAITING:
            self.module.synchronize(self.stream)  # which a capture refuses
        written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written:
            self.module.call_on_stream(self.stream, lambda: func(*args, **kwargs))
            values = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            results = [values[a.name] for a in written] if schema.returns else []
            return results[0] if len(results) == 1 else tuple(results) or None
        result = func(*args, **kwargs)
        self.graph.made += tensors_in(result)
        read = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(args)}
        made = [tensor.untyped_storage().data_ptr() not in read for tensor in tensors_in(result)]  # else a view
        if any(made) and "empty" not in schema.name:
            targets = tensors_in(result)

            def again() -> None:
                for is_new, old, new in zip(made, targets, tensors_in(func(*args, **kwargs)), strict=True):
                    if is_new:
                        old.copy_(new)

            self.module.call_on_stream(self.stream, again)
        return result


@contextmanager
def captured(emulator: Emulator, *, relaxed: bool = False) -> Iterator[Graph]:
    """What is done in here on the device is captured and does not run before ``replay``."""
    before, graph = emulator.stream, Graph(emulator)
    emulator.stream = emulator.module.new_stream()
    emulator.module.begin_capture(emulator.stream, relaxed)
    try:
        with Captured(graph):
            yield graph
    finally:
        try:
            graph.finish(emulator.module.end_capture(emulator.stream))
        finally:
            emulator.stream = before


@dataclass(frozen=True)
class Stream:
    """In the place of torch.cuda's; an event is its address."""

    emulator: Emulator
    handle: int

    def record_event(self) -> int:
        event: int = self.emulator.module.new_event()
        self.emulator.module.record_event(event, self.handle)
        return event

    def wait_event(self, event: int) -> None:
        self.emulator.module.wait_event(self.handle, event)

    def wait_stream(self, other: Stream) -> None:
        self.emulator.module.wait_event(self.handle, other.record_event())


@contextmanager
def streams(emulator: Emulator) -> Iterator[None]:
    """``torch.cuda``'s streams and events are the emulator's."""

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, emulator.stream = emulator.stream, stream.handle
        try:
            yield
        finally:
            emulator.stream = before

    new = emulator.module.new_stream
    with pytest.MonkeyPatch.context() as patch, on(Stream(emulator, new())):
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(emulator, new()))
        patch.setattr(torch.cuda, "current_stream", lambda device: Stream(emulator, emulator.stream))
        patch.setattr(torch.cuda, "stream", on)
        yield


@contextmanager
def late(emulator: Emulator, seed: int) -> Iterator[None]:
    """What is done in here on the device runs when something waits for it, in an order of the streams that the seed
    draws."""
    graph = Graph(emulator)  # keeps what was made until all has run
    with streams(emulator):
        emulator.module.run_streams(True, seed)
        try:
            with Captured(graph):
                yield
        finally:
            with torch.no_grad():
                emulator.module.run_streams(False, 0)


def count_replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that has an item more for each replay of a graph."""
    found: list[int] = []
    replay = Graph.replay

    def counted(graph: Graph) -> None:
        found.append(1)
        replay(graph)

    monkeypatch.setattr(Graph, "replay", counted)
    return found
