"""Work on several processes joined by gloo. They are forked from one server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    "tiny_models",
    "qlora_native.parallel",
    "qlora_native.lora",
    "qlora_native.optim",
    "qlora_native.train.loop",
]
SECONDS = 240  # a hang is a failure, not a long test


def on_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """``work(rank, world, *args)`` on each of ``world`` processes of one thread; what each returned, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_run, args=(rank, world, folder, work, args)) for rank in range(world)]
        for process in processes:
            process.start()
        limit = time.monotonic() + SECONDS
        try:
            while any(process.is_alive() for process in processes):
                failed = [p.exitcode for p in processes if p.exitcode]
                if failed or time.monotonic() > limit:
                    break
                time.sleep(0.01)
        finally:
            for process in processes:
                process.kill()
                process.join()
        told = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not told, told[0]
        assert all(p.exitcode == 0 for p in processes), [p.exitcode for p in processes]
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world)]


def _run(rank: int, world: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        torch.save(work(rank, world, *args), Path(folder, f"{rank}.result"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
