"""What the loop knows of other processes: which rows are this one's, sums over all of them, and who writes files.

On one process everything here is a matter of course: all rows, sums of one.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from qlora_native.distributed.watch import RankLost, Watch, is_loss
from qlora_native.errors import UserError

Result = TypeVar("Result")
Items = Sequence[int | list[int]]  # rows of a batch: a row, or those packed into one sequence


class Ranks:
    """The processes of a run.

    Attributes:
        rank, world: this one's number, and how many there are.
        mode: "none" (one process), "ddp" (each has the whole model) or "fsdp" (each has a part of it).
    """

    def __init__(self, mode: str = "none", rank: int = 0, world: int = 1, watch: Watch | None = None) -> None:
        self.mode, self.rank, self.world, self.watch = mode, rank, world, watch

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether the model is sharded over the processes."""
        return self.mode == "fsdp"

    @property
    def averaged_over(self) -> int:
        """By what FSDP divides the summed gradients of a cut model; losses are multiplied by it."""
        return self.world if self.is_sharded else 1

    def mine(self, items: Items) -> Items:
        """This rank's part of a batch: every world-th of it, so that long and short rows spread evenly."""
        return items[self.rank :: self.world]

    def filler(self, items: Items, batch_size: int) -> list[Items]:
        """Micro-batches that this rank passes through a cut model without learning from them, because another rank has
        more of them: all ranks gather the same blocks as often."""
        most = math.ceil(math.ceil(len(items) / self.world) / batch_size)
        lacking = most - math.ceil(len(self.mine(items)) / batch_size) if self.is_sharded else 0
        return [items[:1]] * lacking

    def sum(self, *values: float) -> list[float]:
        """The sums over the ranks, in double precision."""
        if self.world == 1:
            return list(values)
        self._enter()
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared)
        return shared.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum(float(flag))[0] > 0

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients of copies over the ranks, all in one message; those of a cut model are summed already."""
        if self.mode != "ddp":
            return
        for parameter in parameters:
            if parameter.grad is None:  # a rank without rows
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])  # type: ignore[union-attr]
        self._enter()
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):  # type: ignore[union-attr]
            grad.copy_(part.view_as(grad))  # type: ignore[union-attr]

    def together(self, work: Callable[[], Result]) -> Result:
        """``work()`` on every rank. If one cannot, all stop: the lowest such rank raises its UserError, the others
        :class:`RankLost` without a word."""
        result, error = None, ""
        try:
            result = work()
        except UserError as mistake:
            if self.world == 1:
                raise
            error = str(mistake)
        if self.world > 1:
            errors: list[str] = [""] * self.world
            self._enter()
            dist.all_gather_object(errors, error)
            at_fault = [rank for rank, text in enumerate(errors) if text]
            if at_fault:
                raise UserError(error) if self.rank == at_fault[0] else RankLost("")
        return result  # type: ignore[return-value]

    def on_first(self, work: Callable[[], Result]) -> Result | None:
        """``work()`` on rank 0 alone, while the others wait; its error stops all. None on the others."""
        return self.together(lambda: work() if self.first else None)

    def finished(self, step: int) -> None:
        """Tell the others how far this rank is."""
        if self.watch is not None:
            self.watch.finished(step)

    def _enter(self) -> None:
        if self.watch is not None:
            self.watch.enter()


def restarts() -> int:
    """How often torchrun has started these processes anew because one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def joined(mode: str, rank_timeout: float) -> Iterator[Ranks]:
    """The ranks of the run, joined by torch.distributed if torchrun started several; a process group that is there
    already is used.

    Args:
        mode: "none", "ddp" or "fsdp", as :class:`Ranks` has it.
        rank_timeout: seconds after which a rank that others wait for counts as lost.

    Raises:
        UserError: several processes, but ``mode`` is none. RankLost: another rank died or hangs.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    ours = started > 1 and not dist.is_initialized()
    if not ours and not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield Ranks()
        return
    if mode == "none":
        raise UserError(
            f"{started if ours else dist.get_world_size()} processes were started, but parallel is none: set parallel "
            "to ddp (each has the whole model) or fsdp (each has a part of it), or start one process"
        )
    if ours:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=rank_timeout)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps one store over restarts, with the addresses of processes that are gone in it.
        store = dist.PrefixStore(f"qlora_native/attempt_{restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    rank, world, store = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
    watch = Watch(store, rank, world, rank_timeout)
    ranks = Ranks(mode, rank, world, watch)
    reason = ""
    try:
        yield ranks
    except RankLost:
        raise
    except Exception as error:
        if is_loss(error):
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's; it kills what has not ended in 30 s
            raise RankLost(watch.sentence()) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise
    finally:
        watch.leave(reason)
    if ours:
        dist.destroy_process_group()
