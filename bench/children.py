"""Processes that answer a line of JSON to each line that they are sent, so that two of them can take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Child:
    """One such process: a script of this folder with its arguments and its environment."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe would fill and stop the child)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def ask(self, command: str) -> dict[str, Any]:
        """Sends a line and waits for the answer.

        Raises:
            SystemExit: the process ended; with the last line that it wrote to stderr.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            self.errors.seek(0)
            last = self.errors.read().strip().splitlines()[-1:] or ["nothing on stderr"]
            raise SystemExit(f"the process {self.name!r} ended at {command!r}: {last[0]}")
        return dict(json.loads(answer))

    def end(self) -> None:
        """Stops it and waits."""
        self.process.terminate()
        self.process.communicate()


def serve(answer: Callable[[list[str]], dict[str, Any]]) -> None:
    """The child's side: what libraries print goes to stderr; the pipe carries answers only."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(line.split())), file=channel, flush=True)
