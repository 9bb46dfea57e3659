"""The ranks of a run on one process, which those of several have the methods of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from qlora_native.data.batching import Items


class RankLost(RuntimeError):
    """Another process ended or hangs. The message is one sentence, or empty if another process prints why."""


class OneProcess:
    """The ranks of a run on one process; :class:`qlora_native.distributed.ranks.Ranks` are those of several."""

    rank, world = 0, 1  # number of this process, and how many there are
    is_first = True  # whether this process prints and writes
    is_sharded = False  # whether the model is sharded over the processes
    # What the gradients of a sharded model are divided by; losses are multiplied by it.
    averaged_over = 1

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
