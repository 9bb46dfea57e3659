"""The ranks of a run on several processes: sums over them, their common errors, and what happens if one is lost."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qlora_native.data.batching import Items
from qlora_native.distributed.one import OneProcess, RankLost, restarts
from qlora_native.errors import UserError

# Seconds at least until a process that has not joined counts as lost: its imports take some.
JOINING = 60
# Words of gloo's and NCCL's errors when another process does not take part in a collective.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed? ?out|broken pipe|peer", re.IGNORECASE)


class Ranks(OneProcess):
    """Several processes joined by torch.distributed, each with the whole model ("ddp") or a part of it ("fsdp")."""

    def __init__(self, mode: str, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.is_first, self.is_sharded = rank == 0, mode == "fsdp"
        self.averaged_over = world if self.is_sharded else 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """All finish the block, or none: the lowest rank with a UserError raises it, the others an empty RankLost."""
        error = ""
        try:
            yield
        except UserError as mistake:
            error = str(mistake)
        errors = self.gather(error)
        at_fault = [rank for rank, text in enumerate(errors) if text]
        if at_fault:
            raise UserError(error) if self.rank == at_fault[0] else RankLost("")

    def mine(self, items: Items) -> Items:
        """Every world-th item, so that long and short rows spread evenly."""
        return items[self.rank :: self.world]

    def filler(self, items: Items, batch_size: int) -> list[Items]:
        """As many micro-batches as another rank has more: all gather the blocks of a sharded model equally often."""
        most = math.ceil(math.ceil(len(items) / self.world) / batch_size)
        lacking = most - math.ceil(len(self.mine(items)) / batch_size) if self.is_sharded else 0
        return [items[:1]] * lacking

    def sum(self, *values: float) -> list[float]:
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared)
        return shared.tolist()

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients of copies, all in one message; FSDP sums those of a sharded model."""
        if self.is_sharded:
            return
        for parameter in parameters:
            if parameter.grad is None:  # a rank without rows
                parameter.grad = torch.zeros_like(parameter)
        grads: list[Any] = [parameter.grad for parameter in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


@contextmanager
def join(mode: str, rank_timeout: float) -> Iterator[Ranks]:
    """As :func:`qlora_native.distributed.joined`, for several processes."""
    is_ours = not dist.is_initialized()
    if mode == "none":
        world = int(os.environ["WORLD_SIZE"]) if is_ours else dist.get_world_size()
        raise UserError(
            f"{world} processes were started, but parallel is none: set parallel to ddp (each has the whole model) or "
            "fsdp (each has a part of it), or start one process"
        )
    if is_ours:
        has_gpu, timeout = torch.cuda.is_available(), timedelta(seconds=rank_timeout)
        if has_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        joining = timedelta(seconds=max(rank_timeout, JOINING))
        store, rank, world = next(dist.rendezvous("env://", timeout=joining))
        # torchrun keeps one store over restarts, with the addresses of processes that are gone in it.
        store = dist.PrefixStore(f"qlora_native/attempt_{restarts()}", store)
        backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    ranks = Ranks(mode, dist.get_rank(), dist.get_world_size())
    try:
        yield ranks
    except Exception as error:
        # Whether a collective raised the error because another rank does not take part.
        is_loss = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
        if isinstance(error, RankLost) or not (is_loss or isinstance(error, dist.DistError)):
            raise
        if threading.current_thread() is threading.main_thread():
            # torchrun's; it kills what has not ended in 30 s.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RankLost(
            f"rank {ranks.rank} of {ranks.world} waited for another process that ended or hangs; the last checkpoint "
            "is intact, and --resume continues from it, on any number of processes"
        ) from error
    if is_ours:
        dist.destroy_process_group()
