"""Work on several processes joined by gloo. They are forked from one server that has imported everything once."""

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

PRELOADED = [
    "tiny_models",
    "qlora_native.distributed",
    "qlora_native.lora",
    "qlora_native.optim",
    "qlora_native.train.loop",
]
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
            while any(process.is_alive() for process in processes):
                failed = [p.exitcode for rank, p in enumerate(processes) if p.exitcode and rank != dying]
                if failed or time.monotonic() > limit:
                    break
                time.sleep(0.01)
        finally:
            for process in processes:
                process.kill()
                process.join()
        told = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not told, told[0]
        codes = [process.exitcode for process in processes]
        assert codes == [-signal.SIGKILL if rank == dying else 0 for rank in range(world)], codes
        return [
            None if rank == dying else torch.load(Path(folder, f"{rank}.result"), weights_only=False)
            for rank in range(world)
        ]


def _run(
    rank: int,
    world: int,
    folder: str,
    work: Callable[..., Any],
    args: tuple[Any, ...],
    all_live: bool,
    timeout: float,
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
