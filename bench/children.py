"""Processes for functions of the benches, and those that answer lines, so that two of them can take turns."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def calling(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The command that calls a function of a script of this folder and prints what it returns; paths become texts."""
    return [__file__, Path(inspect.getfile(function)).stem, function.__name__, json.dumps(arguments, default=str)]


class Child:
    """One such process: a script with its arguments and its environment."""

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

    def ask(self, command: str, meanwhile: Callable[[], object] | None = None) -> Answer:
        """Send a line and wait for the answer; ``meanwhile`` is called all the time until it comes.

        Raises:
            SystemExit: the process ended; with the last line that it wrote to stderr.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            while meanwhile is not None and not select.select([self.process.stdout], [], [], 0.0005)[0]:
                meanwhile()
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
        self.process.terminate()
        self.process.communicate()


def called(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    command = [sys.executable, *calling(function, *arguments)]
    return last_line(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def last_line(printed: str) -> Any:
    """What a function returned, after what libraries print."""
    return json.loads(printed.splitlines()[-1])


def all_calls(*calls: tuple[Any, ...]) -> None:
    """Functions with their arguments, each in a process with one thread: the fastest way to make many runs.

    Raises:
        SystemExit: one of them failed.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, *calling(*call)], env=env) for call in calls]
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit("a run failed; what is done is kept")


def in_turns(sides: Mapping[str, Child], commands: Iterable[str]) -> dict[str, list[Answer]]:
    """What each side answers to each of the commands; the order changes with every command."""
    answers: dict[str, list[Answer]] = {name: [] for name in sides}
    for number, command in enumerate(commands):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            answers[name].append(sides[name].ask(command))
    return answers


def serve(answer: Callable[[list[str]], Answer]) -> None:
    """The child's side: what libraries print goes to stderr; the pipe carries answers only."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(line.split())), file=channel, flush=True)


if __name__ == "__main__":
    module, name, arguments = sys.argv[1:]
    if (answer := getattr(importlib.import_module(module), name)(*json.loads(arguments))) is not None:
        print(json.dumps(answer))
