"""The one exception that means: the user can mend this, and the message says how; and warnings given once."""

from __future__ import annotations

import traceback
import warnings


class Brief(BaseException):
    """What IPython shows as its message alone, without a trace."""

    def _render_traceback_(self) -> list[str]:  # IPython's name
        traceback.clear_frames(self.__traceback__)  # IPython keeps them, and with them a model
        return [f"{type(self).__name__}: {self}"]


class UserError(Brief, Exception):
    """A mistake in a file, a path or an option, in one sentence: what was got, what was expected, what to do.

    The command line prints the message alone and exits with 2; a notebook shows it without a trace. Of several
    mistakes, the arguments, each has a line. Wrong arguments to a Python function are ``ValueError``.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


_warned: set[str] = set()


def say_once(sentence: str) -> None:
    """Warn about a slower path, or of what is done instead, once a process."""
    if sentence not in _warned:
        _warned.add(sentence)
        warnings.warn(sentence, stacklevel=3)
