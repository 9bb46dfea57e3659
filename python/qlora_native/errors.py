"""The one exception that means: the user can mend this, and the message says how."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a file, a path or an option, in one sentence: what was got, what was expected, what to do.

    The command line prints the message alone and exits with 2. Of several mistakes, the arguments, each has a line.
    Wrong arguments to a Python function are ``ValueError``.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))
