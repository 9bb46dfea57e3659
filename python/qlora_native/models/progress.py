"""The progress of loading and calibrating."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from qlora_native._io import is_terminal

Progress = Callable[[str, int, int], None]  # (what is done, layers done, layers in all)


@contextmanager
def layer_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """The ``progress`` of :func:`load_model` on stderr: a bar on a terminal, a line now and then elsewhere."""
    bar: Any = None
    if not quiet and is_terminal(sys.stderr):
        with suppress(ImportError):
            from rich import progress as rich
            from rich.console import Console

            columns = (
                rich.TextColumn("{task.description}"),
                rich.MofNCompleteColumn(),
                rich.BarColumn(bar_width=24),
            )
            bar = rich.Progress(*columns, rich.TimeRemainingColumn(), console=Console(stderr=True))
            bar.add_task("calibrating", visible=False)

    def show(text: str, done: int, total: int) -> None:
        is_layer = text.startswith("layer ")
        if bar is not None and is_layer:
            bar.update(bar.task_ids[0], total=total, completed=done, visible=True)
        elif bar is not None:
            bar.console.print(text, markup=False, highlight=False)
        elif not quiet and (not is_layer or done == total or done % max(1, total // 8) == 0):
            print(f"calibrating: {text}" if is_layer else text, file=sys.stderr, flush=True)

    with nullcontext() if bar is None else bar:
        yield show
