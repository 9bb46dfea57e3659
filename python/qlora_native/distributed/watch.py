"""Which rank keeps the others waiting: every process tells a store that it lives and how far it is."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

BEAT_SECONDS = 1.0
MISSED_BEATS = 6  # after which a process is gone or stopped
GRACE_SECONDS = BEAT_SECONDS * (MISSED_BEATS + 2)
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed? ?out|broken pipe|peer", re.IGNORECASE)


class RankLost(RuntimeError):
    """Another process died or hangs. The message is one sentence, and empty on all processes but one that says it."""


class Watch:
    """A thread that writes this rank's beats, and looks at those of the others when a collective has failed.

    Args:
        store: that all ranks reach, as torchrun's. rank, world: this rank and how many there are.
        seconds: after which a rank whose beats stop ends this process too, should it sit in a collective that does
            not notice.

    """

    def __init__(self, store: Any, rank: int, world: int, seconds: float) -> None:
        self.rank, self.world, self.seconds, self.step = rank, world, seconds, 0
        clone = getattr(store, "clone", None)
        own = store if clone is None else clone()  # a connection of its own: the other one may be waiting
        self._store = dist.PrefixStore("watch", own)
        self._calls = self._beats = 0
        self._more: dict[str, Any] = {}
        self._lock = threading.Lock()  # a store's connection serves one thread at a time
        self._last: dict[int, tuple[str, float]] = {}  # of each rank: its last word, and when it was new
        self._done = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="qlora-watch", daemon=True)
        self._thread.start()

    def finished(self, step: int) -> None:
        """Tell the others that this rank has finished a step."""
        self.step = step
        self._say()

    def enter(self) -> None:
        """Count a collective that every rank enters."""
        self._calls += 1

    def leave(self, reason: str) -> None:
        """Stop beating; ``reason`` is for the others: empty if the work is done, or if one of them is at fault."""
        self._done.set()
        self._thread.join()
        self._say(reason=reason, left=True)

    def sentence(self) -> str:
        """Who is at fault, once a collective has failed here: a sentence on the lowest rank that is not, else ""."""
        self._say(waiting=True)
        limit = time.monotonic() + GRACE_SECONDS
        while True:
            told = self._look()
            lost = self._lost(told)
            if lost or time.monotonic() > limit:
                break
            time.sleep(BEAT_SECONDS / 4)
        if not lost:  # all live: who entered fewer collectives than the others
            calls = {rank: word["calls"] for rank, word in told.items()}
            least = min(calls.values())
            lost = [rank for rank in calls if calls[rank] == least] if least < max(calls.values()) else []
        speaker = next((rank for rank in range(self.world) if rank not in lost), self.rank)
        if self.rank != speaker:
            return ""
        if not lost:
            return f"the {self.world} processes lost touch after step {self.step}; {ADVICE}"
        words = [told.get(rank, {}) for rank in lost]
        reasons = "; ".join(word["reason"] for word in words if word.get("reason"))
        step = max((word.get("step", 0) for word in words), default=0)
        ranks = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
        what = f"stopped ({reasons})" if reasons else "died or hangs"
        return f"{ranks} of {self.world} {what} after step {step}; {ADVICE}"

    def _lost(self, told: dict[int, dict[str, Any]]) -> list[int]:
        """Ranks that stopped on their own or give no sign of life."""
        now = time.monotonic()
        found = []
        for rank in range(self.world):
            word = told.get(rank)
            if rank == self.rank or (word is not None and word.get("waiting")):
                continue
            _, since = self._last.get(rank, ("", now))
            silent = now - since > BEAT_SECONDS * MISSED_BEATS and not (word or {}).get("left")
            if word is None or word.get("reason") or silent:
                found.append(rank)
        return found

    def _look(self) -> dict[int, dict[str, Any]]:
        told = {}
        for rank in range(self.world):
            try:
                with self._lock:
                    text = self._store.get(str(rank)).decode() if self._store.check([str(rank)]) else ""
            except (RuntimeError, dist.DistError):  # the store went with the host that kept it
                text = ""
            if text:
                told[rank] = json.loads(text)
            if self._last.get(rank, ("", 0.0))[0] != text:
                self._last[rank] = text, time.monotonic()
        return told

    def _say(self, **more: Any) -> None:
        with self._lock, suppress(RuntimeError, dist.DistError):  # the store is gone: the others see that too
            self._more |= more
            word = {"step": self.step, "calls": self._calls, "beats": self._beats, **self._more}
            self._store.set(str(self.rank), json.dumps(word))

    def _beat(self) -> None:
        self._beats += 1
        self._say()

    def _run(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            self._beat()
            told = self._look()
            now = time.monotonic()
            stopped = [
                rank
                for rank, (text, since) in self._last.items()
                if rank != self.rank and text and "left" not in told.get(rank, {}) and now - since > self.seconds
            ]
            if stopped:  # a collective that cannot be interrupted: nothing is left but to go
                if self.rank == min(rank for rank in range(self.world) if rank not in stopped):
                    step = told.get(stopped[0], {}).get("step", 0)
                    sentence = f"rank {stopped[0]} of {self.world} died or hangs after step {step}; {ADVICE}"
                    print(f"qlora: {sentence}", file=sys.stderr, flush=True)
                os._exit(1)


ADVICE = "the last checkpoint is intact, and --resume continues from it, on any number of processes"


def is_loss(error: BaseException) -> bool:
    """Whether an exception is what a collective raises when another rank does not take part."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and LOST.search(str(error)) is not None
