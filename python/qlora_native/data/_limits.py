"""Bounds on what a chat template, a program of someone else's, can take of this machine: time, memory, and the size of
what a product or a power makes, since one can compute for hours, in which no signal is handled."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from qlora_native.errors import UserError

MOST_SECONDS = 20.0  # that the process may compute for a row
MOST_BYTES = 2 << 30  # that rendering may take beyond what the process has
MOST_BITS = 4096  # of a whole number that a product or a power makes
MOST_ITEMS = 10_000_000  # of a text or a list that a product makes


class _TimeIsUp(BaseException):  # which no template can catch
    pass


@contextmanager
def bounded_time(where: str) -> Iterator[None]:
    """UserError if what is inside takes too long; no limit outside the main thread, where there are no timers."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    except _TimeIsUp:
        raise UserError(
            f"{where}: the chat template took over {MOST_SECONDS:g} s of computing time for one conversation: "
            "expected a template that ends, and fewer messages in a row."
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """MemoryError for what takes more than ``MOST_BYTES``, on Linux."""
    if sys.platform != "linux":
        yield
        return
    import resource

    in_use = (
        int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = in_use + MOST_BYTES
    resource.setrlimit(
        resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@cache
def bound_operators() -> None:
    """Have transformers compile chat templates in a sandbox whose ``*``, ``**`` and ``round`` are bounded."""
    from jinja2.filters import do_round
    from transformers.utils import chat_template_utils as theirs

    sandbox: Any = getattr(theirs, "ImmutableSandboxedEnvironment", None)
    if sandbox is None:  # of a later transformers; memory and time are bounded even so
        return

    def bounded_round(value: Any, precision: int = 0, method: Any = "common") -> Any:
        _check(abs(precision) <= MOST_BITS)
        return do_round(value, precision, method)

    class BoundedSandbox(sandbox):
        intercepted_binops = frozenset(("*", "**"))

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.filters["round"] = bounded_round

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length()
                _check(
                    (bits * abs(right) if operator == "**" else bits + right.bit_length()) <= MOST_BITS
                )
            for items, count in ((left, right), (right, left)):
                if hasattr(items, "__len__") and isinstance(count, int):
                    _check(len(items) * count <= MOST_ITEMS)
            return super().call_binop(context, operator, left, right)

    setattr(theirs, "ImmutableSandboxedEnvironment", BoundedSandbox)  # noqa: B010 - for the type checker
    theirs._compile_jinja_template.cache_clear()


def _check(fits: bool) -> None:
    if not fits:
        raise OverflowError("the result of an operation is too large")
