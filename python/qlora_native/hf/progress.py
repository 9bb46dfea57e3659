"""How far a calibrated load has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from typing import Any

_LINES = 8  # printed over a whole load where there is no bar


class LayerProgress:
    """The ``progress`` of :func:`qlora_native.load_model`, on stderr; ``quiet`` prints nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> LayerProgress:
        if not self.quiet and sys.stderr.isatty():
            self._bar = _rich_bar()
            if self._bar is not None:
                self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, text: str, done: int, total: int) -> None:
        """``text`` names what has happened; ``done`` of ``total`` layers are finished."""
        if self.quiet:
            return
        is_note = not text.startswith("layer ")
        if self._bar is None:
            if is_note or done == total or done % max(1, total // _LINES) == 0:
                print(f"calibrating: {text}" if not is_note else text, file=sys.stderr, flush=True)
        elif is_note:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            if self._task is None:
                self._task = self._bar.add_task("calibrating", total=total)
            self._bar.update(self._task, completed=done)


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))
