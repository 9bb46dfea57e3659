"""Captures into CUDA graphs by torch's own ``torch.cuda.graph``, over stand-ins of what it calls: a failed one leaves
nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import emulated_graphs
import pytest
import tiny_models
import torch
from emulated_graphs import Cuda

import qlora_native as qn
from qlora_native.models import graphs
from qlora_native.models.graphs import Pool, has_experts, rehearsed, why_not_captured
from qlora_native.ops import _library


def interrupted(cuda: Cuda) -> None:
    raise KeyboardInterrupt


def out_of_memory(cuda: Cuda) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def aborted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(graphs, "_aborted", found)
    return found


@pytest.mark.parametrize("fails", [Cuda.wait, out_of_memory, interrupted])
@pytest.mark.parametrize("version", emulated_graphs.VERSIONS)
def test_a_failed_capture_is_unwound(version: str, fails: Callable[[Cuda], None], aborted: list[Any]) -> None:
    """Beside a graph that is kept; then another capture is made in the same memory."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameters[0].grad = kept = torch.ones(2)
    with emulated_graphs.graphs(version) as cuda:
        pool = Pool()
        with pool.captured(parameters) as first:
            assert cuda.is_capturing and cuda.current is pool.stream is not cuda.default
        assert not cuda.is_capturing and cuda.current is cuda.default
        generator, seed = cuda.generator, cuda.generator.state.seed

        def fail(pool: Pool) -> None:
            with pool.captured(parameters):
                torch.stack(parameters).sum().backward()
                fails(cuda)

        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            fail(pool)
        assert cuda.current is cuda.default and not cuda.underway
        assert cuda.users == {pool.memory.id: 2}, "the pool's and the first graph's"
        assert not generator.state.in_capture and generator.state.seed == seed
        assert parameters[0].grad is kept and parameters[1].grad is None
        with pool.captured(parameters) as second:
            pass
        assert cuda.users == {pool.memory.id: 3} and second.has_ended
        memory = pool.memory.id
        del first, second, pool
        aborted.clear()
        assert cuda.users[memory] == 0, "all memory is free"


def test_a_rehearsal_lists_what_waits() -> None:
    """With the line of Python; other warnings are none of it, and transformers believes that it is captured."""
    from transformers.utils import import_utils

    with emulated_graphs.graphs() as cuda:
        with rehearsed() as waits:
            assert import_utils.is_cuda_stream_capturing()
            torch.ones(2).sum().mul_(2)
        assert waits == [] and not import_utils.is_cuda_stream_capturing()
        with rehearsed() as waits:
            torch.ones(2).sum().item()
        assert len(waits) == 1 and not cuda.is_capturing


def test_which_models_are_not_captured(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = qn.load_model(tiny_models.save(tmp_path / "a", "Mixtral", torch.bfloat16, num_local_experts=4))
    dense = qn.load_model(tiny_models.save(tmp_path / "b", "Llama", torch.bfloat16))
    assert has_experts(experts) and not has_experts(dense)

    def on_cuda(model: Any, **more: Any) -> Any:
        return SimpleNamespace(device=torch.device("cuda"), modules=model.modules, **more)

    kernels: list[Any] = [None]
    monkeypatch.setattr(_library, "module_for", lambda device: kernels[0])
    assert why_not_captured(on_cuda(dense))
    kernels[0] = object()
    assert why_not_captured(on_cuda(dense)) is None
    assert why_not_captured(on_cuda(dense, streamed_layers=object()))
    assert why_not_captured(on_cuda(experts))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert why_not_captured(on_cuda(dense))
