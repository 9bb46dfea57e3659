"""adamw_step against torch.optim in double precision; the bytes of both rules against plain torch on every ISA."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from cases import FLOAT_DTYPES
from helpers import refuses, relative_error, same_bytes

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
    """And so are those of the kernel for devices without one of their own, of which there is none here."""
    lists = Lists(op, SIZES, dtype, coded)
    lists["grad"][-2] = lists["grad"][-2].float()  # a gradient of another dtype than the parameter's
    expected, anywhere = deepcopy(lists), deepcopy(lists)
    for factor in (1.0, 0.37, 1e-3, 1e-4, 1.0):
        lists.new_grads()
        lists["grad"][-1][::3] = 0  # for Lion, a sign of 0 moves nothing but the decay
        expected["grad"] = [grad.clone() for grad in lists["grad"]]
        anywhere["grad"] = [grad.clone() for grad in lists["grad"]]
        lists.call(factor, **options)
        expected.reference(factor, **options)
        getattr(qn.ops, op).anywhere(*anywhere.arguments(factor, **options))
        assert lists.same(expected) and anywhere.same(expected)


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


def test_refuses_in_words() -> None:
    lists = Lists("adamw_step", (300, 5), torch.float64)
    refuses("parameter 0 is torch.float64: expected float32, bfloat16 or float16", lists.call)
    lists["step"] = []
    refuses("2 params, but 0 steps: expected 2", lists.call)
    row = [0] * qn._C.optim_row_length
    row[qn._native.NUMEL] = 4
    table = qn.ops._optim.table_of([row])
    address = qn.ops._optim.address_of(table)
    refuses("grad .*null pointer, but 4 elements", qn._C.adamw_step, address, 1, [(0.1,) * 5 + (True,)], 1.0)
