"""When optimizer states leave memory and come back: the policy, and the thread that applies it on the CPU.

One daemon thread an optimizer, which holds it by a weak reference and ends with it. A single large allocation can come
between two checks of the thread; the training loop answers that one by ``page_out()`` and a retry.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Literal

from qlora_native._memory import Free
from qlora_native.errors import say_once

INTERVAL = 0.05  # seconds between two checks; one takes about 0.1 ms
CALM, LONGEST_CALM = 10.0, 640.0  # seconds


class PagingPolicy:
    """When to move: out as soon as less than the margin is free; in when, for ``calm`` seconds on end, the margin and
    the states had room, since a training step needs much memory in its middle and little at its end. If coming back was
    too early, the next time takes twice as long, up to ``longest``."""

    def __init__(self, calm: float = CALM, longest: float = LONGEST_CALM) -> None:
        self.calm = calm
        self.base = calm
        self.longest = longest
        self._out = False  # at the last decision; the training loop moves states, too
        self._short = -math.inf  # when there was last too little room to come back
        self._came_back = -math.inf

    def decide(
        self, now: float, free: Free, in_memory: int, paged_out: int
    ) -> Literal["out", "in"] | None:
        """The move to make at ``now``, seconds of any clock; the states are in bytes."""
        if in_memory > 0 and free.bytes < free.margin:
            return "out"
        out = paged_out > 0
        if out and not self._out:
            again = now - self._came_back < self.calm
            self.calm = min(2 * self.calm, self.longest) if again else self.base
        if (out and not self._out) or free.bytes < free.margin + paged_out:
            self._short = now
        if self._out and not out:
            self._came_back = now
        self._out = out
        return "in" if out and now - self._short >= self.calm else None


_ending = threading.Event()
_watchers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def watch(
    optimizer: Any,
    free_bytes: Callable[[], Free | None],
    interval: float = 0,
    policy: PagingPolicy | None = None,
) -> threading.Thread:
    """Start the watcher of an optimizer's paged states; ``interval`` is in seconds, ``INTERVAL`` by default.

    Without memory for its stack it is not started, and a warning is given. It ends when the optimizer is collected,
    when ``free_bytes`` returns None (nothing can be read here) or raises, and at the interpreter's end.
    """
    thread = threading.Thread(
        target=_watch,
        args=(weakref.ref(optimizer), free_bytes, interval or INTERVAL, policy or PagingPolicy()),
        name="qlora_native page watcher",
        daemon=True,
    )
    try:
        thread.start()
        _watchers.add(thread)
    except RuntimeError:  # not even its stack finds room
        say_once(
            "qlora_native: memory is too short for the thread that moves optimizer states out ahead of time; "
            "a step that runs short is tried once more instead."
        )
    return thread


def _watch(
    reference: Any, free_bytes: Callable[[], Free | None], interval: float, policy: PagingPolicy
) -> None:
    while not _ending.wait(interval):
        free = free_bytes()
        optimizer = reference()
        if free is None or optimizer is None:
            return
        move = policy.decide(
            time.monotonic(), free, optimizer.states_in_memory(), optimizer.states_paged_out()
        )
        if move == "out":
            optimizer.page_out()
        elif move == "in":
            optimizer.page_in()
        del optimizer


@atexit.register
def _end() -> None:
    """A thread in native code must not wake up in an interpreter that is gone."""
    _ending.set()
    for thread in list(_watchers):
        thread.join()
