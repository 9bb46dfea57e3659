"""Paged optimizers of a CUDA device, over the emulator: bytes, moves, launches, messages and lifetimes.

tests/cuda_on_cpu/test_managed_store.cc tests the stores themselves.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import paged as paged_helpers
import pytest
import torch
from emulated import Emulator
from helpers import same_bytes, through_a_file
from paged import MIB, grouped, params_of, same_optimizers
from sentences import Check

import qlora_native as qn
from qlora_native import errors
from qlora_native.ops import _cuda_kernels
from qlora_native.optim import device_pages

SIZES = (5, 4097, 200_000, 20_000, 0, 90_000)
Optimizer = qn.optim.AdamW


@pytest.fixture(autouse=True)
def _memory(emulator: Emulator) -> Iterator[None]:
    emulator.module.set_memory(1 << 30, True)
    emulator.module.take_managed_counters()
    yield
    emulator.module.run_streams(False, 0)


def make(rule: str = "AdamW", bits: int = 32, **options: object) -> Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pinned memory; test_the_fallback_is_named_once reads it
        made: Optimizer = grouped(rule, SIZES, bits=bits, **options)
    return made


PAGED: dict[str, Any] = {"paged": True, "page_budget": MIB}
by_store = pytest.mark.parametrize("concurrent", [True, False], ids=["managed", "pinned"])


def give_grads(optimizer: torch.optim.Optimizer, seed: int, scale: float = 1.0) -> None:
    paged_helpers.give_grads(params_of(optimizer), seed, scale, skip=False)


def step(number: int, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        give_grads(optimizer, number)
        optimizer.step()


def quiet(counters: dict[str, int]) -> bool:
    return not any(counters[name] for name in ("device_faults", "host_faults", "remote_accesses", "evicted"))


@by_store
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rule", ["AdamW", "Adam", "Lion"])
def test_paged_steps_give_the_bytes_of_unpaged_ones(emulator: Emulator, rule: str, bits: int, concurrent: bool) -> None:
    """Clipped, with a step that is skipped, a parameter that goes without a gradient, learning rates that change, and
    parameters that come later."""
    emulator.module.set_memory(1 << 30, concurrent)
    paged = make(rule, bits, **PAGED, max_norm=1.0)
    plain = make(rule, bits, paged=False, max_norm=1.0)
    for number, scale in enumerate((1.0, float("nan"), 1e-3, 1.0)):
        for optimizer in (paged, plain):
            if number == 2:
                optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(50_000))], "lr": 1e-3})
            give_grads(optimizer, number, scale)
            if number == 2:
                params_of(optimizer)[2].grad = None
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
            optimizer.step()
        assert paged.skipped == plain.skipped == (scale != scale)
        assert paged.grad_norm == plain.grad_norm or scale != scale
    pages = paged._pages[torch.device("cpu")]
    assert isinstance(pages, device_pages.DevicePages) and pages.managed == concurrent
    assert same_optimizers(paged, plain)


@by_store
@pytest.mark.parametrize("seed", range(1, 7))
def test_the_order_of_streams_does_not_matter(emulator: Emulator, seed: int, concurrent: bool) -> None:
    emulator.module.set_memory(1 << 30, concurrent)
    emulator.stream = emulator.module.new_stream()
    paged, plain = make(**PAGED), make(paged=False)
    for number in range(2):
        step(number, plain)
        give_grads(paged, number)
        emulator.module.run_streams(True, seed)
        paged.step()
        assert emulator.module.num_queued() > 0, "the host waited in a step"
        emulator.module.run_streams(False, 0)
    assert same_optimizers(paged, plain)


def test_a_checkpoint_waits_for_copies_that_are_under_way(emulator: Emulator) -> None:
    emulator.module.set_memory(1 << 30, False)
    emulator.stream = emulator.module.new_stream()
    paged, plain = make("Lion", **PAGED), make("Lion", paged=False)
    step(0, plain)
    give_grads(paged, 0)
    emulator.module.run_streams(True, 1)
    paged.step()
    saved = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in (paged, plain)]
    assert all(same_bytes(saved[0][i]["exp_avg"], saved[1][i]["exp_avg"]) for i in saved[1])


def test_in_steady_state_nothing_faults_and_a_page_moves_once_each_way(emulator: Emulator) -> None:
    paged = make(**PAGED)
    for number in range(4):
        give_grads(paged, number)
        emulator.module.take_managed_counters()
        paged.step()
        counters = emulator.module.take_managed_counters()
        if number > 0:
            assert quiet(counters), counters
            assert counters["most_to_device"] == counters["most_to_host"] == 1, counters
            assert counters["to_device"] == counters["to_host"] > 0 == counters["idle_prefetches"], counters
    statistics = paged.paging_statistics()
    assert statistics["resident_bytes"] <= MIB < statistics["state_bytes"]
    assert statistics["paged_out_bytes"] == statistics["state_bytes"] - statistics["resident_bytes"]
    assert statistics["bytes_in"] - statistics["bytes_out"] == statistics["resident_bytes"]
    assert statistics["stalls"] == 0


def test_without_pressure_a_step_is_the_two_launches_of_an_unpaged_one(emulator: Emulator) -> None:
    auto = make(max_norm=1.0)
    for number in range(3):
        give_grads(auto, number)
        emulator.launches()
        emulator.module.take_managed_counters()
        auto.step()
        assert len(emulator.launches()) == 2
        counters = emulator.module.take_managed_counters()
        assert number == 0 or not any(counters.values()), counters
    statistics = auto.paging_statistics()
    assert statistics["resident_bytes"] == statistics["state_bytes"] > 0 == statistics["bytes_out"]


def test_auto_pages_under_pressure_and_comes_back(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(device_pages.time, "monotonic", lambda: clock[0])
    module = emulator.module
    auto, plain = make(), make(paged=False)

    def counters_of(number: int) -> Any:
        step(number, auto, plain)
        return module.take_managed_counters()

    counters_of(0)
    spike = module.allocate(module.memory()[0] - MIB)
    assert counters_of(1)["to_host"] > 0 and auto.states_paged_out() > 0
    assert quiet(counters_of(2))
    module.release(spike)
    assert counters_of(3)["to_host"] > 0, "there is room again, but not for long"
    clock[0] = 60.0
    counters_of(4)
    assert auto.states_paged_out() == 0
    assert not any(counters_of(5).values())
    assert same_optimizers(auto, plain)


def test_an_allocation_evicts_states_and_they_return(emulator: Emulator) -> None:
    """As the driver does it: an allocation finds room, and the next step is right."""
    module = emulator.module
    auto, plain = make("Lion"), make("Lion", paged=False)
    step(0, auto, plain)
    spike = module.allocate(module.memory()[0] + MIB)
    assert module.take_managed_counters()["evicted"] >= MIB // module.managed_page_bytes
    for number in (1, 2):
        step(number, auto, plain)
        assert module.take_managed_counters()["device_faults"] == 0
    module.release(spike)
    assert same_optimizers(auto, plain)


def test_evicted_states_come_back_when_there_is_room(emulator: Emulator) -> None:
    """CUDA does not report an eviction. Read over the bus from then on, they would slow every step."""
    module = emulator.module
    auto, plain = make("Lion"), make("Lion", paged=False)
    step(0, auto, plain)
    module.release(module.allocate(module.memory()[0] + MIB))  # gone before the next step looks
    assert module.take_managed_counters()["evicted"] > 0
    for number in range(1, 1 + device_pages.ASK_AGAIN):
        step(number, auto, plain)
    moved = auto.paging_statistics()["bytes_in"]
    module.take_managed_counters()
    for number in range(2):
        step(number, auto, plain)
        assert not any(module.take_managed_counters().values())
    assert same_optimizers(auto, plain) and auto.paging_statistics()["bytes_in"] == moved


def test_a_capture_of_moving_states_is_refused(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for events from outside the graph. States that stay on the device can be captured."""
    moving, staying = make(**PAGED), make()
    step(0, moving, staying)
    with monkeypatch.context() as patch:
        patch.setattr(_cuda_kernels, "is_capturing", lambda device: True)
        give_grads(moving, 1)
        with pytest.raises(RuntimeError, match="AdamW: its paged states move .*paged=False"):
            moving.step()
        step(1, staying)


def test_page_out_and_page_in(emulator: Emulator) -> None:
    auto, plain = make(bits=8), make(bits=8, paged=False)
    for number in range(4):
        step(number, auto, plain)
        if number == 1:
            auto.page_out()
            assert auto.states_in_memory() == 0 < auto.states_paged_out()
        if number == 2:
            auto.page_in()
    assert auto.states_paged_out() == 0
    assert same_optimizers(auto, plain)


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("bits", [32, 8])
def test_auto_pins_states_where_pages_cannot_move(emulator: Emulator, bits: int, by_hand: bool) -> None:
    module = emulator.module
    module.set_memory(1 << 30, False)
    auto, plain = make(bits=bits), make(bits=bits, paged=False)
    spike = 0
    for number in range(4):
        for optimizer in (auto, plain):
            give_grads(optimizer, number)
            emulator.launches()
            optimizer.step()
            assert number > 1 or len(emulator.launches()) == 1
        if number == 1:
            assert auto.states_in_memory() > 0 == auto.states_paged_out()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if by_hand:
                    auto.page_out()
                    assert auto.states_in_memory() == 0 < auto.states_paged_out()
                else:
                    spike = module.allocate(module.memory()[0] - MIB)
    assert auto.states_paged_out() > 0 < auto.paging_statistics()["bytes_out"]
    assert same_optimizers(auto, plain)
    if spike:
        module.release(spike)


@by_store
def test_states_survive_a_round_trip(emulator: Emulator, concurrent: bool) -> None:
    emulator.module.set_memory(1 << 30, concurrent)
    paged, other = (make(bits=8, **PAGED) for _ in range(2))
    plain = make(bits=8, paged=False)
    step(0, paged, plain)
    other.load_state_dict(through_a_file(copy.deepcopy(paged.state_dict())))
    for param, values in zip(params_of(other), params_of(paged), strict=True):
        param.data.copy_(values.detach())
    step(1, other, plain)
    assert other.paging_statistics()["bytes_in"] > 0
    for number in (2, 3):
        emulator.module.take_managed_counters()
        step(number, other, plain)
    assert quiet(emulator.module.take_managed_counters()), "loading has unsettled the pages for good"
    assert same_optimizers(other, plain)


def test_a_state_keeps_its_arena_alive(emulator: Emulator) -> None:
    gc.collect()
    free = emulator.module.memory()[0]
    paged = make(**PAGED)
    step(0, paged)
    state = paged.state[params_of(paged)[2]]["exp_avg"]
    expected = state.clone()
    del paged
    gc.collect()
    assert same_bytes(state, expected)
    del state
    gc.collect()
    assert emulator.module.memory()[0] == free


def test_the_fallback_is_named_once(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    emulator.module.set_memory(1 << 30, False)
    params = [torch.nn.Parameter(torch.zeros(5000))]
    with pytest.warns(UserWarning, match=r"Tegra\): AdamW's .* pinned host"):
        Optimizer(params, paged=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Optimizer(params, paged=True)


def test_a_store_that_cannot_be_had_is_an_error(emulator: Emulator) -> None:
    emulator.module.set_memory(1 << 30, False)
    with pytest.raises(RuntimeError, match=r"65536 bytes of managed memory .* cudaErrorInvalid\w+\.$"):
        emulator.module.ManagedStore([(1000, 2, False)], 65536, 65536)


@pytest.mark.parametrize("arenas", [0, 1])
def test_auto_goes_on_where_a_managed_store_fails(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, arenas: int, sentence: Check
) -> None:
    """The first store, or the one of a group that comes later; with paged=True it is an error."""
    module = emulator.module
    monkeypatch.setattr(errors, "_warned", set())
    given = iter([module.ManagedStore] * arenas)

    def store(*arguments: Any) -> Any:
        made = next(given, None)
        if made is None:
            raise RuntimeError("paging: no such memory.")
        return made(*arguments)

    monkeypatch.setattr(module, "ManagedStore", store)
    caught: list[warnings.WarningMessage]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        auto, plain = (grouped("AdamW", SIZES, paged=paged) for paged in ("auto", False))
        for number in range(3):
            step(number, auto, plain)
            if number == 0:
                for optimizer in (auto, plain):
                    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(9000))]})
    sentence("\n".join(str(item.message) for item in caught))
    (pages,) = auto._pages.values()
    assert same_optimizers(auto, plain) and len(pages.stores) == arenas
    assert isinstance(pages, device_pages.DevicePages) and pages.could_pin == (arenas == 0)
    with pytest.raises(RuntimeError, match="no such memory.*bits=8"):
        make(paged=True)


def test_a_budget_below_a_chunk_is_refused_in_numbers(emulator: Emulator) -> None:
    params = [torch.nn.Parameter(torch.zeros(6_000_000))]
    with pytest.raises(ValueError, match="budget is 1048576 bytes: .* largest chunk"):
        Optimizer(params, bits=8, **PAGED)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: m.StoreTable(s, [0, 1], 0), "2 rows, .* 1 tensors"),
        (lambda m, s: m.StoreTable(None, [0], 0), "the store is None"),
        (lambda m, s: m.ManagedStore([(-1, 2, False)], 65536, 65536), "a form is"),
        (lambda m, s: m.ManagedStore([(1, 2, False)], 100, 65536), "page_bytes is 100"),
        (lambda m, s: m.StoreTable(m.PinnedStore([(9, 1, True)], 4096, 4096), [0], 0), "staging is a null pointer"),
        (lambda m, s: m.StoreTable(s, [0], 0).lion_step(0, 0, MIB, 0, 0, 1.0, 0.0, 0, 0, 0, 0, 0, 64, 0), "tensors"),
    ],
)
def test_stores_are_checked_at_the_boundary(emulator: Emulator, call: object, message: str) -> None:
    store = emulator.module.ManagedStore([(1000, 1, False)], 65536, 65536)
    with pytest.raises(ValueError, match=message):
        call(emulator.module, store)  # type: ignore[operator]


def test_a_method_of_none_is_refused(emulator: Emulator) -> None:
    """pybind11 hands None to a pointer to a member as a null `this`."""
    for cls in (emulator.module.PageStore, emulator.module.PinnedStore, emulator.module.StoreTable):
        for name, member in vars(cls).items():
            function: Any = member.fget if isinstance(member, property) else member
            if not name.startswith("_"):
                with pytest.raises(TypeError, match="incompatible function arguments"):
                    function(None)
