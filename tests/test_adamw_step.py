"""adamw_step against torch.optim in double precision; the bytes of both rules against plain torch on every ISA."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from cases import FLOAT_DTYPES
from helpers import relative_error, same_bytes

import qlora_native as qn
from qlora_native import reference

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]

SIZES = (0, 1, 7, 15, 16, 17, 255, 256, 257, 1000, 4096, 5001, 40_000)
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw_step": {"lr": 3e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True},
    "lion_step": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1},
}
MOMENTS = {"adamw_step": {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}, "lion_step": {"exp_avg": torch.int8}}

both_rules = pytest.mark.parametrize("op", list(OPTIONS))
both_forms = pytest.mark.parametrize("coded", [False, True], ids=["32-bit", "8-bit"])


class Lists(dict[str, list[torch.Tensor]]):
    """The lists of an op call by name, in the op's order."""

    def __init__(self, op: str, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, coded: bool = False):
        self.op = op
        self |= {name: [torch.randn(n).to(dtype) for n in sizes] for name in ("param", "grad")}
        for name, codes in MOMENTS[op].items():
            self[name] = [torch.zeros(n, dtype=codes if coded else torch.float32) for n in sizes]
        for name in MOMENTS[op]:
            self[f"{name}_absmax"] = [torch.zeros(-(-n // 256)) for n in sizes] if coded else []
        if op == "adamw_step":
            self["step"] = [torch.zeros(()) for _ in sizes]

    def new_grads(self) -> None:
        for grad in self["grad"]:
            grad.copy_(torch.randn(grad.shape) * torch.rand(grad.shape).pow(4))

    def arguments(self, grad_factor: float = 1.0, **options: Any) -> tuple[Any, ...]:
        return *self.values(), *{**OPTIONS[self.op], **options}.values(), grad_factor

    def call(self, grad_factor: float = 1.0, **options: Any) -> None:
        getattr(torch.ops.qlora_native, self.op)(*self.arguments(grad_factor, **options))

    def reference(self, grad_factor: float = 1.0, **options: Any) -> None:
        for i in range(len(self["param"])):
            tensors = (part[i] if part else None for part in self.values())
            getattr(reference, self.op)(*tensors, grad_factor=grad_factor, **{**OPTIONS[self.op], **options})

    def same(self, other: Lists) -> bool:
        pairs = zip(self.values(), other.values(), strict=True)
        return all(same_bytes(a, b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_torch_in_double_precision(decoupled: bool, weight_decay: float) -> None:
    lists = Lists("adamw_step", SIZES[1:])
    params = [torch.nn.Parameter(p.double()) for p in lists["param"]]
    rule = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = rule(params, lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)
    for _ in range(30):
        lists.new_grads()
        for param, grad in zip(params, lists["grad"], strict=True):
            param.grad = grad.double()
        theirs.step()
        lists.call(decoupled=decoupled, weight_decay=weight_decay)
    for ours, param in zip(lists["param"], params, strict=True):
        assert (ours - param).abs().max() < 4e-6  # half an ulp a step
        assert relative_error(ours, param) < 1e-6
    for name in MOMENTS["adamw_step"]:
        for state, param in zip(lists[name], params, strict=True):
            assert relative_error(state, theirs.state[param][name]) < 1e-6


@both_forms
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "options"), [("adamw_step", {"decoupled": True}), ("adamw_step", {"decoupled": False}), ("lion_step", {})]
)
def test_bytes_are_those_of_the_rule(op: str, options: dict[str, bool], dtype: torch.dtype, coded: bool) -> None:
    lists = Lists(op, SIZES, dtype, coded)
    expected = deepcopy(lists)
    for factor in (1.0, 0.37, 1e-3, 1e-4, 1.0):
        lists.new_grads()
        lists["grad"][-1][::3] = 0  # for Lion, a sign of 0 moves nothing but the decay
        expected["grad"] = [grad.clone() for grad in lists["grad"]]
        lists.call(factor, **options)
        expected.reference(factor, **options)
        assert lists.same(expected)


@pytest.mark.devices("cpu")
@both_forms
def test_subnormals_and_flush_flags(coded: bool) -> None:
    lists = Lists("adamw_step", (600,), coded=coded)
    lists["param"][0] *= 1e-38
    lists["grad"][0] *= 1e-20
    expected = deepcopy(lists)
    expected.reference(lr=1e-40, eps=1e-30)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        lists.call(lr=1e-40, eps=1e-30)
    finally:
        torch.set_flush_denormal(False)
    assert lists.same(expected)


@pytest.mark.devices("cpu")
@both_rules
@both_forms
def test_thread_count_does_not_change_bytes(op: str, coded: bool) -> None:
    results = [Lists(op, (100, 70_000, 3, 40_001, 256), coded=coded)]
    results += [deepcopy(results[0]) for _ in range(2)]
    threads = torch.get_num_threads()
    for count, lists in zip((1, 2, 5), results, strict=True):
        torch.set_num_threads(count)
        for _ in range(3):
            lists.call(0.5)
    torch.set_num_threads(threads)
    assert results[0].same(results[1]) and results[0].same(results[2])


@both_forms
def test_non_finite_gradients_spread_no_further_than_documented(coded: bool) -> None:
    """32-bit: the element alone, as in torch. 8-bit: its block of 256."""
    lists = Lists("adamw_step", (1024,), coded=coded)
    lists["grad"][0][300] = float("nan")
    for reach in (1, 256 if coded else 1):
        lists.call()
        assert int(lists["param"][0].isnan().sum()) == reach
        lists.new_grads()


def test_a_second_moment_does_not_vanish() -> None:
    """A gradient 10^6 times smaller than its block's largest: were it coded to 0, the next step would divide by eps."""
    lists = Lists("adamw_step", (4096,), coded=True)
    lists["grad"][0].fill_(1e-6)
    lists["grad"][0][::256] = 1.0
    lists.call(weight_decay=0.0)
    assert (lists["exp_avg_sq"][0] > 0).all()
    before = lists["param"][0].clone()
    lists["grad"][0].zero_()
    lists.call(weight_decay=0.0)
    assert (lists["param"][0] - before).abs().max() < 2 * OPTIONS["adamw_step"]["lr"]


@both_rules
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_gradients_of_another_dtype(op: str, dtype: torch.dtype) -> None:
    lists = Lists(op, (300,), dtype)
    lists["grad"] = [torch.randn(300)]
    expected = deepcopy(lists)
    lists.call()
    expected.reference()
    assert lists.same(expected)


@both_rules
def test_non_contiguous(op: str) -> None:
    lists = Lists(op, (40 * 60,))
    for name in ("param", "grad", *MOMENTS[op]):
        lists[name] = [t.reshape(40, 60) for t in lists[name]]
    expected = deepcopy(lists)
    lists["param"] = [torch.empty(60, 40).t().copy_(lists["param"][0])]
    lists["grad"] = [torch.empty(40, 120)[:, ::2].copy_(lists["grad"][0])]
    lists.call()
    expected.call()
    assert not lists["param"][0].is_contiguous()
    assert lists.same(expected)


def test_misaligned() -> None:
    lists = Lists("adamw_step", (1001,), torch.bfloat16, coded=True)
    expected = deepcopy(lists)
    expected.call()
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        (t,) = lists[name]
        whole = torch.empty(1002, dtype=t.dtype)
        whole[1:] = t
        lists[name] = [whole[1:]]
    lists.call()
    assert lists.same(expected)


@both_rules
@both_forms
def test_opcheck(op: str, coded: bool) -> None:
    lists = Lists(op, (300, 5), coded=coded)
    torch.library.opcheck(getattr(torch.ops.qlora_native, op).default, lists.arguments())


@both_rules
def test_the_path_of_other_devices(op: str) -> None:
    """The kernel registered for devices without one of their own, called by hand: there is no such device here."""
    lists = Lists(op, (300, 5), coded=True)
    expected = deepcopy(lists)
    getattr(qn.ops, op).anywhere(*lists.arguments(0.5))
    expected.call(0.5)
    assert lists.same(expected)


def test_refuses_in_words() -> None:
    def refuses(message: str, dtype: torch.dtype = torch.float32, coded: bool = False, **changed: Any) -> None:
        lists = Lists("adamw_step", (300, 5), dtype, coded)
        lists |= changed
        with pytest.raises(ValueError, match=message):
            lists.call()

    twos = [torch.zeros(2), torch.zeros(2)]
    refuses(r"parameter 1 is \[5\], its state exp_avg_absmax torch.float32 \[2\]", coded=True, exp_avg_absmax=twos)
    refuses(r"parameter 0 is torch.float64: expected float32, bfloat16 or float16", torch.float64)
    refuses("2 params, but 0 steps: expected 2", step=[])
    refuses(r"parameter 0 is \[300\] on \w+(:0)?, its gradient \[299\]", grad=[torch.zeros(299), torch.zeros(5)])
    row = [0] * qn._C.optim_row_length
    row[qn._native.NUMEL] = 4
    table = qn.ops._optim.table_of([row])
    with pytest.raises(ValueError, match="grad .*null pointer, but 4 elements"):
        qn._C.adamw_step(qn.ops._optim.address_of(table), 1, [(0.1,) * 5 + (True,)], 1.0)
