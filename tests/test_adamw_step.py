"""adamw_step against torch.optim in double precision, and its bytes against the plain-torch rule on every instruction
set."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import relative_error, same_bytes

import qlora_native as qn
from qlora_native import reference
from qlora_native.cases import FLOAT_DTYPES

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]

OP = torch.ops.qlora_native.adamw_step
SIZES = (0, 1, 7, 15, 16, 17, 255, 256, 257, 1000, 4096, 5001, 40_000)
OPTIONS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True}


class Lists:
    """The lists of an op call, freshly made or copied."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype, coded: bool) -> None:
        self.params = [torch.randn(n).to(dtype) for n in sizes]
        self.grads = [torch.randn(n).to(dtype) for n in sizes]
        kind: tuple[torch.dtype, torch.dtype] = (torch.int8, torch.uint8) if coded else (torch.float32, torch.float32)
        self.exp_avgs = [torch.zeros(n, dtype=kind[0]) for n in sizes]
        self.exp_avg_sqs = [torch.zeros(n, dtype=kind[1]) for n in sizes]
        self.absmaxes = [[torch.zeros(-(-n // 256)) for n in sizes] if coded else [] for _ in "mv"]
        self.steps = [torch.zeros(()) for _ in sizes]

    def all(self) -> tuple[Any, ...]:
        return self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, *self.absmaxes, self.steps

    def copy(self) -> Lists:
        other = object.__new__(Lists)
        lists = [[t.clone() for t in part] for part in self.all()]
        other.params, other.grads, other.exp_avgs, other.exp_avg_sqs, *other.absmaxes, other.steps = lists
        return other

    def new_grads(self) -> None:
        for grad in self.grads:
            grad.copy_(torch.randn(grad.shape) * torch.rand(grad.shape).pow(4))

    def call(self, grad_factor: float = 1.0, **options: Any) -> None:
        OP(*self.all(), *{**OPTIONS, **options}.values(), grad_factor)

    def reference(self, grad_factor: float = 1.0, **options: Any) -> None:
        for i in range(len(self.params)):
            first, second = (part[i] if part else None for part in self.absmaxes)
            reference.adamw_step(
                self.params[i], self.grads[i], self.exp_avgs[i], self.exp_avg_sqs[i], first, second,
                self.steps[i],
                grad_factor=grad_factor, **{**OPTIONS, **options},
            )  # fmt: skip

    def same(self, other: Lists) -> bool:
        pairs = zip(self.all(), other.all(), strict=True)
        return all(same_bytes(a, b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_torch_in_double_precision(decoupled: bool, weight_decay: float) -> None:
    lists = Lists(SIZES[1:], torch.float32, coded=False)
    params = [torch.nn.Parameter(p.double()) for p in lists.params]
    rule = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = rule(params, lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)
    for _ in range(30):
        lists.new_grads()
        for param, grad in zip(params, lists.grads, strict=True):
            param.grad = grad.double()
        theirs.step()
        lists.call(decoupled=decoupled, weight_decay=weight_decay)
    for ours, param in zip(lists.params, params, strict=True):
        assert (ours - param).abs().max() < 4e-6  # half an ulp a step
        assert relative_error(ours, param) < 1e-6
    for name, states in (("exp_avg", lists.exp_avgs), ("exp_avg_sq", lists.exp_avg_sqs)):
        for state, param in zip(states, params, strict=True):
            assert relative_error(state, theirs.state[param][name]) < 1e-6


@pytest.mark.parametrize("coded", [False, True], ids=["32-bit", "8-bit"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("decoupled", [True, False])
def test_bytes_are_those_of_the_rule(dtype: torch.dtype, coded: bool, decoupled: bool) -> None:
    lists = Lists(SIZES, dtype, coded)
    expected = lists.copy()
    for factor in (1.0, 0.37, 1e-3, 1.0):
        lists.new_grads()
        expected.grads = [grad.clone() for grad in lists.grads]
        lists.call(factor, decoupled=decoupled)
        expected.reference(factor, decoupled=decoupled)
        assert lists.same(expected)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("coded", [False, True], ids=["32-bit", "8-bit"])
def test_subnormals_and_flush_flags(coded: bool) -> None:
    lists = Lists((600,), torch.float32, coded)
    lists.params[0] *= 1e-38
    lists.grads[0] *= 1e-20
    expected = lists.copy()
    expected.reference(lr=1e-40, eps=1e-30)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        lists.call(lr=1e-40, eps=1e-30)
    finally:
        torch.set_flush_denormal(False)
    assert lists.same(expected)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("coded", [False, True], ids=["32-bit", "8-bit"])
def test_thread_count_does_not_change_bytes(coded: bool) -> None:
    start = Lists((100, 70_000, 3, 40_001, 256), torch.float32, coded)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        lists = start.copy()
        for _ in range(3):
            lists.call(0.5)
        results.append(lists)
    torch.set_num_threads(threads)
    assert results[0].same(results[1]) and results[0].same(results[2])


def test_non_finite_gradients_spread_as_far_as_said() -> None:
    """32-bit: the element alone, as in torch. 8-bit: its block of 256."""
    for coded, reach in ((False, 1), (True, 256)):
        lists = Lists((1024,), torch.float32, coded)
        lists.grads[0][300] = float("nan")
        lists.call()
        assert int(lists.params[0].isnan().sum()) == 1
        lists.new_grads()
        lists.call()
        assert int(lists.params[0].isnan().sum()) == reach


def test_a_second_moment_does_not_vanish() -> None:
    """A gradient 10^6 times smaller than its block's largest: were it coded to 0, the next step would divide by eps."""
    lists = Lists((4096,), torch.float32, True)
    lists.grads[0].fill_(1e-6)
    lists.grads[0][::256] = 1.0
    lists.call(weight_decay=0.0)
    assert (lists.exp_avg_sqs[0] > 0).all()
    before = lists.params[0].clone()
    lists.grads[0].zero_()
    lists.call(weight_decay=0.0)
    assert (lists.params[0] - before).abs().max() < 2 * OPTIONS["lr"]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_gradients_of_another_dtype(dtype: torch.dtype) -> None:
    lists = Lists((300,), dtype, False)
    lists.grads = [torch.randn(300)]
    expected = lists.copy()
    lists.call()
    expected.reference()
    assert lists.same(expected)


def test_non_contiguous() -> None:
    lists = Lists((40 * 60,), torch.float32, False)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        setattr(lists, name, [t.reshape(40, 60) for t in getattr(lists, name)])
    expected = lists.copy()
    lists.params = [torch.empty(60, 40).t().copy_(lists.params[0])]
    lists.grads = [torch.empty(40, 120)[:, ::2].copy_(lists.grads[0])]
    lists.call()
    expected.call()
    assert not lists.params[0].is_contiguous()
    assert lists.same(expected)


def test_misaligned() -> None:
    lists = Lists((1001,), torch.bfloat16, True)
    expected = lists.copy()
    expected.call()
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        (t,) = getattr(lists, name)
        whole = torch.empty(1002, dtype=t.dtype)
        whole[1:] = t
        setattr(lists, name, [whole[1:]])
    lists.call()
    assert lists.same(expected)


@pytest.mark.parametrize("coded", [False, True], ids=["32-bit", "8-bit"])
def test_opcheck(coded: bool) -> None:
    lists = Lists((300, 5), torch.float32, coded)
    torch.library.opcheck(OP.default, (*lists.all(), *OPTIONS.values(), 1.0))


def test_the_path_of_other_devices() -> None:
    """The kernel registered for devices without one of their own, called by hand: there is no such device here."""
    lists = Lists((300, 5), torch.float32, True)
    expected = lists.copy()
    qn.ops.adamw_step.anywhere(*lists.all(), *OPTIONS.values(), 0.5)
    expected.call(0.5)
    assert lists.same(expected)


def test_refuses_in_words() -> None:
    lists = Lists((300, 5), torch.float32, True)
    lists.absmaxes[0][1] = torch.zeros(2)
    with pytest.raises(
        ValueError, match=r"exp_avg 1 is torch.int8 \[5\] on \w+(:0)? with an absmax of torch.float32 \[2\]"
    ):
        lists.call()
    lists = Lists((300,), torch.float64, False)
    with pytest.raises(ValueError, match=r"parameter 0 is torch.float64: expected float32, bfloat16 or float16"):
        lists.call()
    lists = Lists((300,), torch.float32, False)
    lists.steps = []
    with pytest.raises(ValueError, match="expected 1 step counters"):
        lists.call()
    lists.grads = [torch.zeros(299)]
    with pytest.raises(ValueError, match=r"parameter 0 is \[300\] on \w+(:0)?, its gradient \[299\]"):
        lists.call()
    with pytest.raises(ValueError, match="grad is a null pointer, but 4 elements are expected"):
        qn._C.adamw_step(qn.ops._tensor_rows.address_of(rows := null_row()), 1, [(0.1,) * 5 + (True,)], 1.0)
    assert len(rows) == qn._C.optim_row_length


def null_row() -> Any:
    row = [0] * qn._C.optim_row_length
    row[qn.ops._tensor_rows.NUMEL] = 4
    return qn.ops._tensor_rows.table_of([row])


DIGEST = """
import hashlib, torch, qlora_native as qn
g = torch.Generator().manual_seed(3)
h = hashlib.sha256()
for bits in (32, 8):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for optimizer in (qn.optim.AdamW, qn.optim.Adam, qn.optim.Lion):
            params = [torch.nn.Parameter(torch.randn(n, generator=g).to(dtype)) for n in (5, 4097, 9000, 16384)]
            rule = optimizer(params, lr=1e-2, weight_decay=0.01, bits=bits, max_norm=1.0)
            for step in range(4):
                for p in params:
                    p.grad = (torch.randn(p.shape, generator=g) * 10.0 ** (3 - 4 * step)).to(dtype)
                rule.step()
                h.update(repr(rule.grad_norm).encode())
            for t in [*params, *(t for s in rule.state.values() for t in s.values())]:
                h.update(t.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
print(qn.build_info()["cpu_isa"], h.hexdigest())
"""


@pytest.mark.devices("cpu")
def test_same_bytes_on_every_isa() -> None:
    """All optimizers, the clipping included."""
    digests = {}
    for isa in qn.build_info()["isas_built"]:
        environment = {**os.environ, "QLORA_NATIVE_ISA": isa}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=False
        )
        if run.returncode:
            assert "this machine and build offer" in run.stderr, run.stderr
            continue
        used, digest = run.stdout.split()
        assert used == isa
        digests[isa] = digest
    assert len(digests) >= 1
    assert len(set(digests.values())) == 1, digests
