"""Which units stay in memory and which stream: counts of the plan."""

from __future__ import annotations

import pytest

from qlora_native.models.residency import Residency, Unit, plan_residency

LAYER, HEAD = 100, 900


def units(layers: int = 32) -> list[Unit]:
    middle = [Unit(f"layers.{i}", LAYER) for i in range(layers)]
    return [Unit("embed", 0), *middle, Unit("norm", 1, must_stay=True), Unit("head", HEAD, must_stay=True)]


def budget_for(resident: int, slots: int) -> int:
    return HEAD + 1 + (resident + slots) * LAYER


def replay(plan: Residency, training: bool) -> int:
    """Bytes read by two steps in turn; asserts that each visited unit is there and that the budget holds."""
    wanted = plan.wanted(training)
    streamed, held, read = set(plan.streamed), set(wanted[-1]), 0
    for visited, kept, reads in 2 * list(zip(plan.order(training), wanted, plan.reads(training), strict=True)):
        held &= {*kept}  # the others are released
        assert held.isdisjoint(reads)
        held |= {*reads}
        assert held == {*kept}
        read += sum(plan.units[unit].num_bytes for unit in reads)
        assert visited in held or visited not in streamed
        assert held <= streamed
        assert len(held) <= plan.slots
    return read


@pytest.mark.parametrize("resident", [0, 1, 7, 16, 27, 28])
def test_a_step_reads_each_streamed_unit_twice_but_those_at_its_ends(resident: int) -> None:
    plan = plan_residency(units(), budget_for(resident, 3))
    assert (len(plan.streamed), plan.slots) == (32 - resident, 3)
    assert plan.num_bytes == budget_for(resident, 3)
    reads_of = [sum(unit in reads for reads in plan.reads()) for unit in plan.streamed]
    assert max(reads_of) <= 2
    assert plan.bytes_read() == 2 * (len(plan.streamed) - plan.slots) * LAYER
    assert replay(plan, training=True) == 2 * plan.bytes_read()


@pytest.mark.parametrize("resident", [0, 5, 16, 28])
def test_a_forward_pass_reads_each_streamed_unit_once(resident: int) -> None:
    plan = plan_residency(units(), budget_for(resident, 3))
    assert plan.bytes_read(training=False) == plan.streamed_bytes == (32 - resident) * LAYER
    assert replay(plan, training=False) == 2 * plan.streamed_bytes


def test_streamed_units_are_spread_evenly() -> None:
    for count in range(4, 33):
        plan = plan_residency(units(), budget_for(32 - count, 3))
        gaps = {later - earlier for earlier, later in zip(plan.streamed, plan.streamed[1:], strict=False)}
        assert len(plan.streamed) == count
        assert max(gaps) - min(gaps) <= 1


def test_all_stays_if_all_fits_and_slots_shrink_before_it_fails() -> None:
    total = sum(unit.num_bytes for unit in units())
    assert plan_residency(units(), total).streamed == ()
    assert plan_residency(units(), total).bytes_read() == 0
    assert len(plan_residency(units(), total - 1).streamed) == 4  # one fewer resident and three slots
    least = plan_residency(units(), budget_for(0, 2))
    assert (least.slots, len(least.streamed)) == (2, 32)
    with pytest.raises(ValueError, match="expected"):
        plan_residency(units(), budget_for(0, 2) - 1)


def test_units_of_different_sizes_fit_the_largest_slot() -> None:
    mixed = [Unit(str(size), size) for size in (50, 50, 400, 100, 100, 100, 100, 0, 100)]
    plan = plan_residency(mixed, 950)
    assert plan.num_bytes <= 950
    assert 7 not in plan.streamed  # nothing to read
    assert plan.slot_bytes == max(mixed[unit].num_bytes for unit in plan.streamed)


def test_a_pass_that_is_left_off_leaves_slots_that_the_next_one_mends() -> None:
    plan = plan_residency(units(), budget_for(0, 3))
    wanted = plan.wanted(training=True)
    assert wanted[32] == [32, 31, 30]  # the last layers are kept for the backward pass
    assert wanted[0] == [1, 2, 3]  # and none of them if a forward pass begins instead


def test_seconds_are_the_larger_of_reading_and_computing() -> None:
    plan = plan_residency(units(), budget_for(16, 3))
    forward, backward = [0.0] + [1.0] * 32 + [0.0, 0.0], [0.0] + [2.0] * 32 + [0.0, 0.0]
    assert plan.seconds(1e12, forward, backward) == pytest.approx(96)
    assert plan.seconds(plan.bytes_read() / 48, forward, backward) == pytest.approx(96, rel=0.05)  # hidden
    slow = plan.bytes_read() / 960
    assert plan.seconds(slow, forward, backward) == pytest.approx(960, rel=0.1)
    assert plan.seconds(1e12, forward) == pytest.approx(32)
    assert plan.seconds(1e12, forward, backward, 4 / plan.bytes_read()) == pytest.approx(100)  # reading slows it
