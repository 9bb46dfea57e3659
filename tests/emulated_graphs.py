"""What ``torch.cuda.graph`` calls, without a card: streams, memory pools, a random generator, and graphs that leave
behind what those of torch 2.11, 2.12 and 2.13 do where a capture fails. With the emulator they hold its kernels."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import emulated_torch
import pytest
import torch
import transformers.generation.utils  # noqa: F401  its annotations take torch.cuda's own classes
from emulated import Emulator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from qlora_native.models import graphs as graphs_of_models
from qlora_native.ops import _cuda_kernels

PoolId = tuple[int, int]


class Version(NamedTuple):
    """What torch does of a failed capture."""

    ends_allocation: bool = True  # capture_end() before it raises (pytorch#180395)
    releases_pool: bool = False  # reset() (pytorch#190348)
    frees_generator: bool = True  # capture_end(), or nothing is held from the start (pytorch#176753)


VERSIONS = {
    "2.11": Version(ends_allocation=False, frees_generator=False),
    "2.12": Version(ends_allocation=False),
    "2.13.0": Version(),
    "2.13, mended": Version(releases_pool=True),
}


class Generator:
    """The default one of the device; its state is that of an object, which a capture marks."""

    def __init__(self, seed: int = 7) -> None:
        self.state = SimpleNamespace(seed=seed, in_capture=False)

    def clone_state(self) -> Generator:
        return Generator(self.state.seed)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state


class Waits(TorchDispatchMode):
    """What ``set_sync_debug_mode("warn")`` does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in emulated_torch.WAITING:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=4)
        kernel = emulated_torch.implementation(func)
        if kernel is not None:
            with self:
                return kernel(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Cuda:
    """The state of the device and of torch's allocator."""

    def __init__(self, version: Version, emulator: Emulator | None) -> None:
        self.version, self.emulator = version, emulator
        self.default = self.current = self.new_stream(0 if emulator is None else emulator.stream)
        self.users: Counter[PoolId] = Counter()  # of pools
        self.underway: set[PoolId] = set()
        self.is_capturing = self.is_spoiled = False
        self.generator = Generator()
        self.watch: Waits | None = None
        self.chosen_devices: list[torch.device] = []

    def new_stream(self, handle: int | None = None) -> Any:
        if handle is None:
            handle = 1 if self.emulator is None else self.emulator.module.new_stream()
        return SimpleNamespace(handle=handle, device=0)

    def set_stream(self, stream: Any) -> None:
        self.current = stream
        if self.emulator is not None:
            self.emulator.stream = stream.handle

    def wait(self) -> None:
        """An operation that waits for the device."""
        if self.is_capturing:
            self.is_spoiled = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def end_allocation(self, device: int, pool: PoolId) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: PoolId) -> None:
        assert self.users[pool] > 0, "released once too often, which breaks torch's allocator"
        self.users[pool] -= 1

    def debug_waits(self, mode: str | int) -> None:
        if mode == "warn":
            self.watch = Waits()
            self.watch.__enter__()
        elif self.watch is not None:
            self.watch.__exit__(None, None, None)

    def pool(self) -> MemPool:
        return MemPool(self)

    @contextmanager
    def chosen(self, device: torch.device) -> Iterator[None]:
        """torch.cuda.device; all tensors are a CPU's here."""
        self.chosen_devices.append(device)
        yield

    def graph(self) -> CUDAGraph:
        return CUDAGraph(self)


class MemPool:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.id = cuda, (0, len(cuda.users) + 1)
        cuda.users[self.id] += 1

    def use_count(self) -> int:
        return self.cuda.users[self.id]

    def __del__(self) -> None:
        self.cuda.release(0, self.id)


class CUDAGraph:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.used: PoolId | None = None
        self.has_ended = False
        self.captured: Any = None

    def capture_begin(self, pool: PoolId, capture_error_mode: str, **_: Any) -> None:
        cuda = self.cuda
        assert cuda.current is not cuda.default, "graphs are captured on another stream than the default one"
        assert pool not in cuda.underway and not cuda.generator.state.in_capture
        cuda.underway.add(pool)
        cuda.users[pool] += 1
        self.used, cuda.is_capturing = pool, True
        cuda.generator.state.in_capture = not cuda.version.frees_generator
        if cuda.emulator is not None:
            cuda.emulator.module.begin_capture(cuda.emulator.stream, False)
            self.captured = emulated_torch.Graph(cuda.emulator)
            self.mode = emulated_torch.Captured(self.captured)
            self.mode.__enter__()

    def capture_end(self) -> None:
        cuda, version = self.cuda, self.cuda.version
        assert self.used is not None and cuda.current is not cuda.default
        cuda.is_capturing, is_spoiled = False, cuda.is_spoiled
        cuda.is_spoiled = False
        address = 0
        if cuda.emulator is not None:
            self.mode.__exit__(None, None, None)
            try:
                address = cuda.emulator.module.end_capture(cuda.emulator.stream)
            except RuntimeError:
                is_spoiled = True
        if version.ends_allocation or not is_spoiled:
            cuda.end_allocation(0, self.used)
        if is_spoiled:
            raise torch.AcceleratorError("operation failed due to a previous error during capture")
        cuda.generator.state.in_capture = False
        self.has_ended = True
        if self.captured is not None:
            self.captured.finish(address)

    def replay(self) -> None:
        assert self.has_ended
        self.captured.replay()

    def reset(self) -> None:
        if self.used is not None and (self.has_ended or self.cuda.version.releases_pool):
            self.cuda.release(0, self.used)
        self.used, self.has_ended, self.captured = None, False, None

    def __del__(self) -> None:
        self.reset()


class Calls(Emulator):
    """In the place of the emulator and of its module, where all operations are a CPU's: a graph is a list of calls."""

    def __init__(self) -> None:
        self.module, self.stream = self, 0  # type: ignore[assignment]
        self.graphs: list[list[Callable[[], object]]] = []

    def new_stream(self) -> int:
        return 1

    def begin_capture(self, stream: int, relaxed: bool) -> None:
        self.graphs.append([])

    def call_on_stream(self, stream: int, call: Callable[[], object]) -> None:
        self.graphs[-1].append(call)

    def synchronize(self, stream: int) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    def end_capture(self, stream: int) -> int:
        return len(self.graphs) - 1

    def launch_graph(self, graph: int, stream: int) -> None:
        for call in self.graphs[graph]:
            call()

    def destroy_graph(self, graph: int) -> None:
        self.graphs[graph].clear()


@contextmanager
def graphs(version: str = "2.13.0", emulator: Emulator | None = None) -> Iterator[Cuda]:
    """``torch.cuda.graph``, which stays torch's own, works with these in here."""
    cuda = Cuda(VERSIONS[version], emulator)
    with pytest.MonkeyPatch.context() as patch:
        stand_ins = {
            "Stream": lambda device=None: cuda.new_stream(),
            "MemPool": cuda.pool,
            "CUDAGraph": cuda.graph,
            "current_stream": lambda device=None: cuda.current,
            "set_stream": cuda.set_stream,
            "current_device": lambda: 0,
            "device": cuda.chosen,
            "_get_device_index": lambda *_: 0,
            "synchronize": cuda.wait,
            "empty_cache": lambda: None,
            "default_generators": (cuda.generator,),
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": cuda.debug_waits,
        }
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocation)
        patch.setattr(torch._C, "_cuda_releasePool", cuda.release)
        patch.setattr(_cuda_kernels, "is_capturing", lambda device: cuda.is_capturing)
        patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: cuda.is_capturing)
        graphs_of_models._stream.cache_clear()
        yield cuda
    graphs_of_models._stream.cache_clear()
