"""One process or several: the ranks of a run, and models sharded or copied over them through torch.distributed.

A run on one process needs this file alone. ``shard``, ``load_model`` and the rest of ``_LAZY`` are imported when they
are first used, and :mod:`.ranks` when there are several processes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from qlora_native.distributed.loading import load_model as load_model
    from qlora_native.distributed.sharding import blocks_of as blocks_of
    from qlora_native.distributed.sharding import lay_out as lay_out
    from qlora_native.distributed.sharding import shard as shard

_LAZY = {"load_model": "loading", "blocks_of": "sharding", "lay_out": "sharding", "shard": "sharding"}

Items = Sequence[int | list[int]]  # of a batch: row numbers, or those of the rows packed into one sequence


class RankLost(RuntimeError):
    """Another process ended or hangs. The message is one sentence, or empty if another process prints why."""


class OneProcess:
    """The ranks of a run on one process; :class:`qlora_native.distributed.ranks.Ranks` are those of several."""

    rank, world = 0, 1  # number of this process, and how many there are
    is_first = True  # whether this process prints and writes
    is_sharded = False  # whether the model is sharded over the processes
    averaged_over = 1  # what the gradients of a sharded model are divided by; losses are multiplied by it

    def together(self) -> AbstractContextManager[None]:
        """A block that all processes finish, or none: a UserError on one of them ends the others."""
        return nullcontext()

    def mine(self, items: Items) -> Items:
        """The items of a batch that this process computes."""
        return items

    def filler(self, items: Items, batch_size: int) -> list[Items]:
        """Micro-batches that this process computes without learning from them, as a sharded model needs them."""
        return []

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over the processes, in double precision."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any process."""
        return self.sum(float(flag))[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """``value`` of each process, by rank."""
        return [value]

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients of a copied model over the processes."""


def restarts() -> int:
    """How often torchrun has restarted these processes because one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def joined(mode: str, rank_timeout: float) -> Iterator[OneProcess]:
    """The ranks of the run: several if torchrun started them, or if a process group of several exists already.

    UserError for several processes if ``mode`` is "none". RankLost if another process ended, or keeps the others
    waiting for ``rank_timeout`` seconds.
    """
    import torch.distributed as dist

    in_group = dist.is_available() and dist.is_initialized()
    if (dist.get_world_size() if in_group else int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        yield OneProcess()
        return
    from qlora_native.distributed.ranks import join

    with join(mode, rank_timeout) as ranks:
        yield ranks


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
