"""CUDA graphs of a model's passes: which models allow them, and captures that leave nothing behind where they fail."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import import_utils

from qlora_native.nn.experts import QuantizedExperts
from qlora_native.ops import _library
from qlora_native.weights.files import replaced

# What the allocator of torch 2.11 and 2.12 still points to (pytorch#180395).
_aborted: list[torch.cuda.CUDAGraph] = []
# A capture, and what a rehearsal replaces, is the process's.
_alone = threading.RLock()


def has_experts(model: nn.Module) -> bool:
    """Whether a model has 4-bit experts: which of them compute, the host decides in each forward pass."""
    return any(isinstance(module, QuantizedExperts) for module in model.modules())


def why_not_captured(model: Any) -> str | None:
    """Why no pass of a model on a CUDA device can be captured; None if one may be."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "the process is one of several"
    if getattr(model, "streamed_layers", None) is not None:
        return "layers stream to the device"
    if has_experts(model):
        return "the host reads which experts the tokens go to"
    if _library.module_for(model.device) is None:
        return f"this build has no kernels for {model.device}"
    return None


@contextmanager
def rehearsed() -> Iterator[list[str]]:
    """Runs eagerly what is to be captured afterwards, on the paths that transformers takes in a capture; at the end the
    list has the lines of Python that wait for the device, which would spoil it."""
    found: list[str] = []
    in_capture = replaced(import_utils, "is_cuda_stream_capturing", lambda: True)
    with _alone, warnings.catch_warnings(record=True) as caught, in_capture:
        before = torch.cuda.get_sync_debug_mode()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "called a synchronizing" in str(warning.message)
    ]


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The one for captures: torch leaves a workspace of cuBLAS behind for each."""
    return torch.cuda.Stream(device)


class Pool:
    """Memory of the current CUDA device and a stream, for captures whose graphs run one after another."""

    def __init__(self) -> None:
        self.memory, self.stream = torch.cuda.MemPool(), _stream(torch.cuda.current_device())

    @contextmanager
    def captured(self, parameters: Iterable[Tensor] = ()) -> Iterator[torch.cuda.CUDAGraph]:
        """Captures into the graph that it gives. Where that fails, by whatever exception, the current stream, the
        gradients of ``parameters``, torch's allocator and its random generator are as before."""
        with _alone:
            graph, users = torch.cuda.CUDAGraph(), self.memory.use_count()
            stream, device = torch.cuda.current_stream(), torch.cuda.current_device()
            grads = [(parameter, parameter.grad) for parameter in parameters]
            memory: Any = self.memory.id
            try:
                # Backward has a thread of its own.
                capture = torch.cuda.graph(
                    graph, pool=memory, stream=self.stream, capture_error_mode="thread_local"
                )
                with capture:
                    yield graph
            except BaseException:
                # torch ends a capture first, which raises for a spoiled one, and does the rest only where it did not.
                torch.cuda.set_stream(stream)
                with suppress(RuntimeError):  # 2.13 has done it
                    torch._C._cuda_endAllocateToPool(device, memory)
                graph.reset()
                _aborted.append(graph)
                while self.memory.use_count() > users:  # up to 2.13.0 (pytorch#190348)
                    torch._C._cuda_releasePool(device, memory)
                generator: Any = torch.cuda.default_generators[device]
                generator.graphsafe_set_state(generator.clone_state())  # one that is in no capture
                for parameter, grad in grads:
                    parameter.grad = grad  # one made in the capture was never written
                raise
