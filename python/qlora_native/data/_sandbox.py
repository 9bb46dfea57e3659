"""Bounds on what a chat template, a program of someone else's, can take of this machine by one operation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

MOST_BITS = 4096  # of a whole number that a product or a power makes
MOST_ITEMS = 10_000_000  # of a text or a list that a product makes
MOST_BYTES = 2 << 30  # that rendering may take beyond what the process has


@cache
def bound_operators() -> None:
    """Have transformers compile chat templates in a sandbox whose ``*``, ``**`` and ``round`` are bounded: one of them
    can compute for hours, in which no signal is handled."""
    from jinja2.filters import do_round
    from transformers.utils import chat_template_utils as theirs

    sandbox: Any = getattr(theirs, "ImmutableSandboxedEnvironment", None)
    if sandbox is None:  # of a later transformers; memory and time are bounded even so
        return

    def rounded(value: Any, precision: int = 0, method: Any = "common") -> Any:
        if abs(precision) > MOST_BITS:
            raise OverflowError(f"precision is {precision}")
        return do_round(value, precision, method)

    class BoundedSandbox(sandbox):
        intercepted_binops = frozenset(("*", "**"))

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.filters["round"] = rounded

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int) and isinstance(right, int)
            if operator == "**":
                fits = not numbers or left.bit_length() * abs(right) <= MOST_BITS
            elif numbers:
                fits = left.bit_length() + right.bit_length() <= MOST_BITS
            else:
                fits = not any(
                    hasattr(items, "__len__") and isinstance(count, int) and len(items) * count > MOST_ITEMS
                    for items, count in ((left, right), (right, left))
                )
            if not fits:
                raise OverflowError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    setattr(theirs, "ImmutableSandboxedEnvironment", BoundedSandbox)  # noqa: B010 - for the type checker
    theirs._compile_jinja_template.cache_clear()


@contextmanager
def bounded_memory() -> Iterator[None]:
    """MemoryError for what takes more than ``MOST_BYTES``, on Linux; for the thread that is allowed to set limits."""
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [pages * resource.getpagesize() + MOST_BYTES, *(limit for limit in (soft, hard) if limit >= 0)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
