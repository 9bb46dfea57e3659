"""Ctrl-C in two steps: the first asks the loop to finish its step and save, the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SAME_SIGNAL_SECONDS = 5.0


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after everything was saved; the message says where."""


class StopRequest:
    """While entered, turns SIGINT and SIGTERM into ``requested = True``; a second signal raises KeyboardInterrupt
    where it finds us.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
        several: this is one of several processes: a terminal and torchrun both send one Ctrl-C to it, so a second
            signal within a few seconds counts as the first.
        speaks: whether this process says what happens next.
    """

    def __init__(self, several: bool = False, speaks: bool = True) -> None:
        self.requested = False
        self._several, self._speaks, self._since = several, speaks, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and self._several and time.monotonic() - self._since < SAME_SIGNAL_SECONDS:
            return
        if self.requested:
            raise KeyboardInterrupt("stopped at once by the second signal; the last checkpoint is intact")
        self.requested, self._since = True, time.monotonic()
        if not self._speaks:
            return
        print("\nfinishing this step and saving; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
