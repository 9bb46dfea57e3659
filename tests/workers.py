"""Cases run in worker processes: a signal, or a case that does not end, is that case's outcome, and the rest go on."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 60  # of computing, after which a case ends its worker
MOST_SECONDS = 900  # in all: for one that waits
CASES = 2000  # of one worker
STDERR = "stderr"  # file in the worker's folder

Case = tuple[Any, Callable[[], str]]  # what it is, as JSON holds it, and the call that returns its outcome


def limit_memory(more: int) -> None:
    """Let this process take so many bytes of address space beyond what it has."""
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def serve(count: int, case_at: Callable[[int], Case], folder: Path, first: int) -> None:
    """In a worker: print each case before it runs and its outcome after. Descriptors 1 and 2 go to files in the folder,
    which are empty when a case begins."""
    out = os.fdopen(os.dup(1), "w")
    files = [os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND) for name in ("stdout", STDERR)]
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
    for number in range(first, min(count, first + CASES)):
        name, case = case_at(number)
        print(json.dumps(name), file=out, flush=True)
        for file in files:
            os.ftruncate(file, 0)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF, which ends the process
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        outcome = case()
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(outcome), file=out, flush=True)


def outcomes(script: str, folder: Path, *arguments: object) -> list[tuple[Any, str]]:
    """Each case of ``script``, which serves the cases from the number on that is its last argument, and its outcome."""
    found: list[tuple[Any, str]] = []
    before = -1
    while before < len(found):  # the last worker finds no case
        before = len(found)
        words = [sys.executable, str(Path(__file__).parent / script), str(folder), *map(str, arguments), str(before)]
        ended = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        lines = [json.loads(line) for line in ended.stdout.splitlines()]
        found += zip(lines[::2], lines[1::2])  # noqa: B905 - of the last one there may be no outcome
        if ended.returncode:
            why = signal.Signals(-ended.returncode).name if ended.returncode < 0 else f"exit {ended.returncode}"
            said = (folder / STDERR).read_text(errors="replace")[-3000:] if (folder / STDERR).exists() else ""
            assert len(lines) % 2, f"the worker ended outside a case with {why}: {said}"
            found.append((lines[-1], f"wrong: {why} {said}"))
    assert found, f"no case of {script} ran"
    return found


def summary(found: list[tuple[Any, str]]) -> tuple[str, list[str]]:
    """Counts of the outcomes in words, and the cases that went wrong."""
    counts = Counter(outcome.partition(":")[0] for _, outcome in found)
    wrong = [f"{json.dumps(name)}: {outcome}" for name, outcome in found if outcome.startswith("wrong")]
    return ", ".join([f"{len(found):,} cases", *(f"{n:,} {what}" for what, n in sorted(counts.items()))]), wrong
