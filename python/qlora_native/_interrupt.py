"""Ctrl-C while a command imports torch and transformers ends it with one line.

The imports take seconds, and turn a KeyboardInterrupt on the way into errors of their own. The package itself imports
torch, so this file is imported before that, and the command restores what was there once it can answer in a line.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path


def _stop(number: int, frame: object) -> None:
    os.write(2, b"qlora: interrupted\n")
    os._exit(128 + number)


def is_command() -> bool:
    """Whether this process was started as ``qlora`` or ``python -m qlora_native``."""
    name, words = getattr(sys, "argv", [""])[0], list(sys.orig_argv)
    return Path(name).stem == "qlora" or (name == "-m" and ("-m", "qlora_native") in pairwise(words))


def restore() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, _stop)
