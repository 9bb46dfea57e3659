"""Which parts of a model stay in memory and which are read for each use: a plan by bytes alone, for any device.

A pass runs the units of a model (embedding, decoder layers, norm, head) in their order, a backward pass in reverse. All
that fits a budget stays resident; the other units stream through a few slots. At each visit of a unit the slots hold
the streamed units that come next, those behind are released. So reads are issued ahead of their use, and the units at
either end of a pass, where it turns around, are not read again: a step reads a streamed unit at most twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AHEAD = 2  # streamed units that are read before their use, beside the one in use; 1 where the budget has no room for 2


@dataclass(frozen=True)
class Unit:
    """A part of the model that runs as one; ``must_stay`` if it is used several times a pass (a head in chunks)."""

    name: str
    num_bytes: int
    must_stay: bool = False


@dataclass(frozen=True)
class Residency:
    """What stays, what streams. ``streamed`` are indices of ``units``; each of ``slots`` holds any one of them."""

    units: tuple[Unit, ...]
    streamed: tuple[int, ...]
    slots: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest unit that streams."""
        return max((self.units[unit].num_bytes for unit in self.streamed), default=0)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the units that stay."""
        return sum(unit.num_bytes for unit in self.units) - self.streamed_bytes

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the units that stream, each once."""
        return sum(self.units[unit].num_bytes for unit in self.streamed)

    @property
    def num_bytes(self) -> int:
        """Bytes in memory at most: what stays, and the slots."""
        return self.resident_bytes + self.slots * self.slot_bytes

    def order(self, training: bool) -> list[int]:
        """The units in the order of their visits: forward, and in training back again."""
        forward = list(range(len(self.units)))
        return forward + forward[::-1] if training else forward

    def wanted(self, training: bool) -> list[list[int]]:
        """The streamed units that the slots hold during each visit of :meth:`order`, soonest used first.

        Whatever is held before, release what is not among them and read what is missing: after a visit that was left
        out, or a pass that began anew, the slots are right again.
        """
        order, streams, wanted = self.order(training), set(self.streamed), []
        for position in range(len(order)):
            coming = dict.fromkeys(order[position:] + order[:position])
            wanted.append([unit for unit in coming if unit in streams][: self.slots])
        return wanted

    def reads(self, training: bool = True) -> list[list[int]]:
        """The units whose reading begins at each visit of a step (or a forward pass) that follows one of its kind."""
        wanted = self.wanted(training)
        held = zip([*wanted[-1:], *wanted], wanted, strict=False)
        return [[unit for unit in now if unit not in before] for before, now in held]

    def bytes_read(self, training: bool = True) -> int:
        """Bytes that a step (or a forward pass) reads."""
        return sum(self.units[unit].num_bytes for reads in self.reads(training) for unit in reads)

    def seconds(
        self,
        rate: float,
        forward: Sequence[float],
        backward: Sequence[float] = (),
        slower: float = 0.0,
    ) -> float:
        """Predicted seconds of a step; of a forward pass without ``backward``.

        ``rate`` is in bytes a second; the next two are what computing takes for each unit, and ``slower`` what each
        byte read adds to that. One read runs at a time, beside the computing; it begins when the visit that releases
        room for it begins.
        """
        times, training = [*forward, *reversed(backward)], bool(backward)
        visits = list(zip(self.order(training), times, self.reads(training), strict=True))
        now = disk = began = 0.0
        ready: dict[int, float] = {}
        for _ in range(2):  # the first leaves the slots and the disk as they are between two steps
            began = now
            for visited, computing, reads in visits:
                for unit in reads:
                    num_bytes = self.units[unit].num_bytes
                    disk = ready[unit] = max(disk, now) + num_bytes / rate
                    computing += slower * num_bytes
                now = max(now, ready.get(visited, 0.0)) + computing
        return now - began


def plan_residency(units: Sequence[Unit], budget: int) -> Residency:
    """As few streamed units as ``budget`` bytes allow, spread evenly over the pass: reads then lie beside computing.

    Args:
        units: in the order of a forward pass.
        budget: bytes for the units that stay and the slots, of which there is one more than units read before their
            use. Reading one ahead is tried where there is no room for more.

    Raises:
        ValueError: not even two slots fit beside what must stay; the sentence has the bytes that are needed.
    """
    least = least_residency(units)
    movable = least.streamed
    for slots in (AHEAD + 1, 2):
        for count in range(len(movable) + 1):
            # Of n units every (n / count)-th, the last ones of equal parts.
            streamed = (movable[-(-part * len(movable) // count) - 1] for part in range(1, count + 1))
            found = Residency(least.units, tuple(streamed), min(slots, count))
            if found.num_bytes <= budget:
                return found
    raise ValueError(
        f"a budget of {budget / 2**20:,.0f} MiB is too small for the model's weights: expected "
        f"{least.num_bytes / 2**20:,.0f} MiB or more, for two slots and what is used several times a pass"
    )


def least_residency(units: Sequence[Unit]) -> Residency:
    """All streams that may, through two slots: the plan for memory that has no room for any."""
    movable = tuple(index for index, unit in enumerate(units) if not unit.must_stay and unit.num_bytes)
    return Residency(tuple(units), movable, min(2, len(movable)))
