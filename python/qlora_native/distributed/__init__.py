"""One process or several: the ranks of a run, and models sharded or copied over them through torch.distributed.

A run on one process needs this file and :mod:`.one` alone. ``shard``, ``load_model`` and the rest of ``_LAZY`` are
imported when they are first used, and :mod:`.ranks` when there are several processes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qlora_native.distributed.one import OneProcess
from qlora_native.distributed.one import RankLost as RankLost
from qlora_native.distributed.one import restarts as restarts

if TYPE_CHECKING:
    from qlora_native.distributed.loading import load_model as load_model
    from qlora_native.distributed.sharding import blocks_of as blocks_of
    from qlora_native.distributed.sharding import lay_out as lay_out
    from qlora_native.distributed.sharding import shard as shard

_LAZY = {"load_model": "loading", "blocks_of": "sharding", "lay_out": "sharding", "shard": "sharding"}


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
