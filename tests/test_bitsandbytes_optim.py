"""The optimizers of qlora_native.bitsandbytes: bitsandbytes' arguments, updates and states, either way."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import relative_error, same_bytes, through_a_file
from torch import Tensor, nn

import qlora_native.bitsandbytes as bnb
from qlora_native import _native, reference
from qlora_native import optim as native
from qlora_native.bitsandbytes import optim as states

FAMILIES = ("Adam", "AdamW", "Lion")
FORMS = [f"{paged}{family}{bits}" for family in FAMILIES for paged in ("", "Paged") for bits in ("", "8bit", "32bit")]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """One that is coded under 8 bits, with a last block that is not full, and one that is too small."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in ((71, 65), (40,))]


def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], count: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * 0.01
        optimizer.step()


def values(state: dict[str, Any], number: int, package: Any = bnb) -> Tensor:
    """A state of bitsandbytes' names as fp32, decoded by this package or by bitsandbytes."""
    codes: Tensor = state[f"state{number}"]
    if codes.dtype != torch.float32:
        fields = {"absmax": state[f"absmax{number}"], "code": state[f"qmap{number}"], "blocksize": 256}
        codes = package.functional.dequantize_blockwise(codes, **fields)
    return codes


@pytest.mark.parametrize("form", FORMS)
def test_defaults_and_form(theirs: Any, form: str) -> None:
    ours, other = getattr(bnb.optim, form)(parameters()), getattr(theirs.optim, form)(parameters())
    group, expected = ours.param_groups[0], other.param_groups[0]
    for name in ("lr", "betas", "weight_decay"):
        assert tuple(torch.tensor(group[name]).reshape(-1)) == tuple(torch.tensor(expected[name]).reshape(-1)), name
    assert group["bits"] == (8 if form.endswith("8bit") else 32)
    steps(ours, ours.param_groups[0]["params"], 1)
    big, small = (ours.state[param]["state1"].dtype for param in group["params"])
    assert (big, small) == (torch.uint8 if form.endswith("8bit") else torch.float32, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_32_bit_updates_are_theirs(theirs: Any, family: str, weight_decay: float) -> None:
    """Decay is decoupled in all three, in Adam too, and comes before the update, as on bitsandbytes' CPU."""
    ours, other = parameters(), parameters()
    for module, params in ((bnb, ours), (theirs, other)):
        steps(getattr(module.optim, family)(params, lr=1e-2, weight_decay=weight_decay), params, 20)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(ours, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_8_bit_updates_stay_as_near_to_32_bits_as_theirs(theirs: Any, family: str) -> None:
    exact, ours, other = parameters(), parameters(), parameters()
    for module, bits, params in ((bnb, "32bit", exact), (bnb, "8bit", ours), (theirs, "8bit", other)):
        steps(getattr(module.optim, family + bits)(params), params, 30)
    assert (ours[0] - exact[0]).norm() < 1.5 * (other[0] - exact[0]).norm() + 1e-6
    assert relative_error(ours[1], exact[1]) == 0  # too small to be coded


@pytest.mark.parametrize("bits", ["8bit", "32bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_state_dict_loads(theirs: Any, family: str, bits: str) -> None:
    params = parameters()
    other = getattr(theirs.optim, family + bits)(params)
    steps(other, params, 5)
    stored = through_a_file(other.state_dict())
    moments = (1,) if family == "Lion" else (1, 2)

    # Into 32-bit states of qlora_native.optim: exactly what their states stand for.
    plain = getattr(native, family)(params, bits=32)
    plain.load_state_dict(bnb.optim.native_state_dict(stored))
    for param in params:
        for number, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=False):
            assert torch.equal(plain.state[param][name], values(other.state[param], number))
        assert family == "Lion" or float(plain.state[param]["step"]) == 5

    # Into the same class here: 32 bits exactly, 8 bits to the nearest code of ours.
    ours = getattr(bnb.optim, family + bits)(params)
    ours.load_state_dict(stored)
    for param in params:
        for number in moments:
            expected, got = values(other.state[param], number), values(ours.state[param], number)
            codes = ours.state[param][f"state{number}"]
            assert codes.dtype == other.state[param][f"state{number}"].dtype
            if codes.dtype == torch.float32:
                assert torch.equal(got, expected)
            else:
                nearest, absmax = reference.encode_state(expected, signed=number == 1)
                assert same_bytes(codes, nearest.view(torch.uint8)) and relative_error(got, expected) < 0.03
                assert same_bytes(ours.state[param][f"absmax{number}"], absmax)
    assert ours.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    steps(ours, params, 1)


@pytest.mark.parametrize("bits", ["8bit", "32bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_our_state_dict_loads_in_theirs(theirs: Any, family: str, bits: str) -> None:
    params = parameters()
    ours = getattr(bnb.optim, family + bits)(params)
    steps(ours, params, 5)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = getattr(theirs.optim, family + bits)(twins)
    other.load_state_dict(through_a_file(ours.state_dict()))
    for param, twin in zip(params, twins, strict=True):
        for number in (1,) if family == "Lion" else (1, 2):
            state = other.state[twin]
            if state[f"state{number}"].dtype == torch.uint8:
                assert torch.equal(state[f"qmap{number}"].sort().values, state[f"qmap{number}"])  # theirs searches it
            assert torch.equal(values(state, number, theirs), values(ours.state[param], number))
    before = [param.detach().clone() for param in params]
    steps(ours, params, 3)
    steps(other, twins, 3)
    for param, twin, start in zip(params, twins, before, strict=True):
        moved = (param - start).norm()
        assert (param - twin).norm() < (0.02 if param.numel() > 4096 and bits == "8bit" else 1e-4) * moved


@pytest.mark.parametrize("form", ["AdamW", "AdamW8bit", "Lion", "Lion8bit", "Adam8bit"])
def test_resuming_is_exact(form: str) -> None:
    make: Any = getattr(bnb.optim, form)
    straight, broken = parameters(), parameters()
    optimizer = make(straight)
    steps(optimizer, straight, 3)
    steps(optimizer, straight, 3, seed=2)
    first = make(broken)
    steps(first, broken, 3)
    second = make(broken)
    second.load_state_dict(through_a_file(first.state_dict()))
    steps(second, broken, 3, seed=2)
    assert all(same_bytes(a, b) for a, b in zip(straight, broken, strict=True))
    twin = copy.deepcopy(second)
    assert twin.args == second.args
    for param, other in zip(broken, twin.param_groups[0]["params"], strict=True):
        assert all(same_bytes(twin.state[other][name], value) for name, value in second.state[param].items())


@pytest.mark.parametrize(
    ("make", "form"),
    [(partial(native.AdamW, bits=8), "AdamW8bit"), (torch.optim.AdamW, "AdamW")],
    ids=["ours", "torch"],
)
def test_states_under_torchs_names_load(make: Any, form: str) -> None:
    params = parameters()
    plain, ours, back = make(params), getattr(bnb.optim, form)(params), make(params)
    steps(plain, params, 3)
    ours.load_state_dict(plain.state_dict())
    back.load_state_dict(bnb.optim.native_state_dict(ours.state_dict()))
    for param in params:
        for name, value in plain.state[param].items():
            assert same_bytes(ours.state[param][name], value)
            assert same_bytes(back.state[param][name], value)


def test_bitsandbytes_names_are_the_same_memory() -> None:
    params = parameters()
    ours = bnb.optim.AdamW8bit(params)
    steps(ours, params, 2)
    state = ours.state[params[0]]
    assert state["state1"].data_ptr() == state["exp_avg"].data_ptr()
    assert torch.equal(values(state, 1), reference.decode_state(state["exp_avg"], state["exp_avg_absmax"]))
    assert torch.equal(values(state, 2), reference.decode_state(state["exp_avg_sq"], state["exp_avg_sq_absmax"]))
    for name in ("state3", "qmap1x", "unorm_vec"):
        with pytest.raises(KeyError, match=name):
            state[name]
    with pytest.raises(KeyError, match="qmap1"):
        ours.state[params[1]]["qmap1"]


def test_older_layouts(theirs: Any) -> None:
    params = parameters()
    other = theirs.optim.AdamW8bit(params)
    steps(other, params, 2)
    stored = other.state_dict()
    flat = {k: {"step": v["step"], **v[states.WRAPPER]} for k, v in stored["state"].items()}  # before the wrapper
    ours = bnb.optim.AdamW8bit(params)
    ours.load_state_dict({**stored, "state": flat})
    assert relative_error(values(ours.state[params[0]], 1), values(other.state[params[0]], 1)) < 0.03
    codes = torch.randint(0, 256, (5000,), dtype=torch.uint8)  # one scale for 2048, as before 0.44
    qmap = _native.nested_code().clone()
    old = {"step": 1, "state1": codes, "qmap1": qmap, "absmax1": torch.tensor([1.0, 2.0, 3.0])}
    decoded = states.from_bitsandbytes(old)["exp_avg"]
    assert torch.equal(decoded, qmap[codes.long()] * torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(2048)[:5000])
    with pytest.raises(ValueError, match="5000 elements has 7 scales: .* 256 or 2048"):
        states.from_bitsandbytes({**old, "absmax1": torch.ones(7)})
    with pytest.raises(ValueError, match="qmap1 is missing"):
        states.from_bitsandbytes({"state1": codes, "absmax1": torch.ones(20)})


def test_frozen_packed_weights_may_be_among_the_parameters() -> None:
    model: Any = nn.Sequential(bnb.nn.LinearNF4(64, 64), nn.Linear(64, 64)).to("cpu")
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-2)
    before = model[0].weight.data.clone()
    for _ in range(3):
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model[0].weight.data, before)
    assert len(optimizer.state) == 3  # the bias of the first, weight and bias of the second
    with pytest.raises(ValueError, match="torch.complex64"):
        bnb.optim.AdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@pytest.mark.parametrize("form", ["PagedAdamW8bit", "PagedLion", "PagedAdam32bit"])
def test_paged_states_out_of_memory_give_the_same_bytes(form: str) -> None:
    packed = bnb.nn.Params4bit(torch.randn(256, 256)).to("cpu")
    stays, leaves = parameters(), parameters()
    straight = getattr(bnb.optim, form.removeprefix("Paged"))(stays)
    paged = getattr(bnb.optim, form)([packed, *leaves])
    steps(straight, stays, 2)
    steps(paged, leaves, 2)
    paged.page_out()
    statistics = paged.paging_statistics()
    assert statistics["paged_out_bytes"] > 0
    assert statistics["state_bytes"] < 70_000 < packed.numel() * 4  # nothing is kept for the frozen weight
    steps(straight, stays, 2)
    steps(paged, leaves, 2)
    assert all(same_bytes(a, b) for a, b in zip(stays, leaves, strict=True))
    assert straight.paged is False


def test_a_group_of_its_own_keeps_32_bit_states() -> None:
    embed, out = (nn.Parameter(torch.randn(100, 64)) for _ in range(2))
    optimizer = bnb.optim.Adam8bit([{"params": [embed], "bits": 32}, {"params": [out]}])
    for param in (embed, out):
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[embed]["state1"].dtype == torch.float32
    assert optimizer.state[out]["state1"].dtype == torch.uint8


def test_arguments_that_cannot_be() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="AdamW8bit: amsgrad is True"):
        bnb.optim.AdamW8bit(params, amsgrad=True)
    for form in ("Adam8bit", "Adam"):
        with pytest.raises(ValueError, match="bits is 16"):
            getattr(bnb.optim, form)(params, optim_bits=16)
    optimizer = bnb.optim.AdamW(params, args=SimpleNamespace(optim_bits=8, min_8bit_size=32))
    steps(optimizer, params, 1)
    assert all(optimizer.state[param]["state2"].dtype == torch.uint8 for param in params)
    assert optimizer.args.optim_bits == 8
