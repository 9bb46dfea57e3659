"""Work on several processes joined by gloo, and what tests compare of models there. The processes are forked from one
server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

PRELOADED = ["tiny_models", "qlora_native.distributed.loading", "qlora_native.distributed.ranks"]
PRELOADED += ["qlora_native.tool.train.loop"]
SECONDS = 240  # a hang is a failure, not a long test


def on_ranks(
    world: int, work: Callable[..., Any], *args: Any, dying: int | None = None, timeout: float = SECONDS
) -> list[Any]:
    """``work(rank, world, *args)`` on each of ``world`` processes of one thread; what each returned, by rank.

    The rank ``dying`` kills itself on the way; its place in the list is None. ``timeout`` is the seconds that a
    collective waits for the others.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        given = (world, folder, work, args, dying is None, timeout)
        processes = [context.Process(target=_run, args=(rank, *given)) for rank in range(world)]
        for process in processes:
            process.start()
        limit = time.monotonic() + SECONDS
        try:
            while any(process.is_alive() for process in processes) and time.monotonic() < limit:
                if any(process.exitcode and rank != dying for rank, process in enumerate(processes)):
                    break
                time.sleep(0.01)
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, errors[0]
        codes = [process.exitcode for process in processes]
        assert codes == [-signal.SIGKILL if rank == dying else 0 for rank in range(world)], codes
        results = [Path(folder, f"{rank}.result") for rank in range(world)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in results]


def _run(
    rank: int, world: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...], all_live: bool, timeout: float
) -> None:
    torch.set_num_threads(1)
    try:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", store, timedelta(seconds=timeout), world_size=world, rank=rank)
        torch.save(work(rank, world, *args), Path(folder, f"{rank}.result"))
        if all_live:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise


def whole(tensor: Any) -> Tensor:
    """All of a tensor, whether it is sharded or not."""
    part: Any = tensor.detach()
    return part.full_tensor() if isinstance(part, DTensor) else part


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, whole, by their names without DDP's prefix."""
    named = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: whole(parameter).clone() for name, parameter in named.items()}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(float((got[name] - expected[name]).abs().max()) for name in expected)


def held_bytes(model: nn.Module) -> int:
    """Bytes of all frozen tensors that this rank holds."""
    tensors = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return sum(local(tensor).nbytes for tensor in tensors)


def whole_checkpoint(model: Any, folder: str) -> None:
    """A sharded model through torch.distributed.checkpoint: out, zeroed, and back in."""
    state = get_model_state_dict(model)
    before = {name: local(tensor).clone() for name, tensor in model.state_dict().items()}
    dcp.save(state, checkpoint_id=folder)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            local(tensor).zero_()
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(local(after[name]), before[name]) for name in before)
    trained_alone = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    assert {name for name in trained_alone if isinstance(trained_alone[name], DTensor)} == adapters(model).keys()
