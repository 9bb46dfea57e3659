"""Command lines in forks of one warm process, in which a chosen call that writes fails, is cut short, or kills.

The calls are counted by write_faults.c, which is preloaded. A fork costs milliseconds, the imports seconds.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import program

SOURCE = Path(__file__).with_suffix(".c")


class Fault(IntEnum):
    """What the chosen call does; see the C source."""

    COUNT = 1
    ONCE = 2
    FULL = 3
    SHORT = 4
    KILL = 5
    TORN = 6


class Outcome(NamedTuple):
    """How a command ended: its exit code, or minus the signal; the calls below the folder, what was printed."""

    code: int
    calls: list[str]  # name and path, or for files without a name what the system calls it
    printed: str  # on both streams


class Commands:
    """The warm process. ``folder`` is where the faults happen."""

    def __init__(self, folder: Path, build: Path) -> None:
        if sys.platform != "linux":
            pytest.skip("needs Linux")
        compiler = program(os.environ.get("CC", "cc"))
        library = build / "write_faults.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE], check=True)
        self.folder, self._log = folder, build / "printed"
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        )

    def run(
        self, command: Sequence[object], fault: Fault = Fault.COUNT, at: int = 0, error: int = errno.EIO, **how: Any
    ) -> Outcome:
        """Run one command line with a fault at its call number ``at``, counted from 1.

        ``seconds=``: SIGKILL after so many. ``fork=False``: in the warm process itself, which imports more.
        """
        job = {"command": [str(word) for word in command], "log": str(self._log), **how}
        job["arm"] = [str(self.folder), int(fault), at, error]
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        code, log = json.loads(self._process.stdout.readline())
        return Outcome(code, log.splitlines(), self._log.read_text())

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # a second for each picture of the losses
    from qlora_native.tool.cli.main import main

    shim = ctypes.CDLL(None)
    shim.faults_log.restype = ctypes.c_char_p
    replies = os.fdopen(os.dup(1), "w")

    def run(job: dict[str, Any]) -> int:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.close(log)
        folder, fault, number, error = job["arm"]
        shim.faults_arm(folder.encode(), fault, ctypes.c_long(number), error)
        try:
            return main(job["command"])
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()

    for line in sys.stdin:
        job = json.loads(line)
        shim.faults_arm(b"", 0, ctypes.c_long(0), 0)  # a fork may be killed before it clears the log
        if not job.get("fork", True):
            code = run(job)
            gc.collect()
            gc.freeze()  # forks collect nothing of this
        else:
            child = os.fork()
            if child == 0:
                os._exit(run(job))
            if "seconds" in job:
                time.sleep(job["seconds"])
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([code, shim.faults_log().decode()]), file=replies, flush=True)


if __name__ == "__main__":
    serve()
