"""qn.optim as a torch optimizer: schedulers, groups, checkpoints, clipping, GradScaler, and what 8-bit states cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import paged
import pytest
import torch
from helpers import through_a_file
from paged import OPTIMIZERS, Made, Params, same_params, same_states

import qlora_native as qn
from qlora_native.ops._optim import StepTable

AdamW = qn.optim.AdamW


def parameters(dtype: torch.dtype = torch.float32) -> Params:
    return paged.parameters(dtype, ((70, 70), (5,), (4096,), (33, 200)))


def made(rule: Any = AdamW, **options: Any) -> Made:
    params = parameters()
    return params, rule(params, **options)


def give_grads(params: Params, seed: int, scale: float = 1.0) -> None:
    paged.give_grads(params, seed, scale, skip=False)


def train(seeds: range, *all_made: Made) -> None:
    paged.train_all(all_made, seeds, skip=False)


@pytest.mark.parametrize(("ours", "theirs"), [(AdamW, torch.optim.AdamW), (qn.optim.Adam, torch.optim.Adam)])
def test_groups_and_scheduler_follow_torch(ours: Any, theirs: Any) -> None:
    def run(rule: Any) -> Params:
        params = parameters()
        groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 5e-3, "betas": (0.5, 0.9)}]
        optimizer = rule(groups, lr=1e-2, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for seed in range(10):
            give_grads(params, seed)
            optimizer.step()
            scheduler.step()
        return params

    torch.testing.assert_close(run(ours), run(theirs), rtol=0, atol=2e-6)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
def test_clipping_is_clip_grad_norm(max_norm: float) -> None:
    """One norm over all groups."""
    a, b = parameters(), parameters()
    ours = AdamW([{"params": [p]} for p in a], lr=1e-2, max_norm=max_norm)
    lion = qn.optim.Lion([{"params": [p]} for p in a], lr=0.0, max_norm=max_norm)
    theirs = torch.optim.AdamW(b, lr=1e-2, weight_decay=0.0)
    ours.step()  # without a gradient
    assert not ours.state and ours.grad_norm is None
    for seed in range(5):
        give_grads(a, seed, scale=seed)
        give_grads(b, seed, scale=seed)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in b if p.grad is not None))
        assert float(torch.nn.utils.clip_grad_norm_(b, max_norm)) == pytest.approx(norm, rel=1e-5)
        before = [p.grad.clone() for p in a if p.grad is not None]
        for optimizer in (lion, ours, theirs):
            optimizer.step()
        assert lion.grad_norm == ours.grad_norm == pytest.approx(norm, rel=1e-12)
        assert all(torch.equal(p.grad, g) for p, g in zip(a, before, strict=True) if p.grad is not None)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(rule: Any, bits: int, value: float) -> None:
    disturbed, plain = (made(rule, bits=bits, max_norm=1.0) for _ in range(2))
    train(range(2), disturbed, plain)
    params, optimizer = disturbed
    give_grads(params, 9)
    assert params[3].grad is not None
    params[3].grad[5, 5] = value
    optimizer.step()
    assert optimizer.skipped and not math.isfinite(optimizer.grad_norm)
    assert same_params(disturbed, plain)
    train(range(2, 4), disturbed, plain)
    assert not optimizer.skipped
    assert same_params(disturbed, plain)  # the states and the count of steps were left alone too


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_continues_bit_equal(rule: Any, bits: int, dtype: torch.dtype) -> None:
    a = parameters(dtype)
    first = a, rule(a, lr=1e-2, bits=bits, max_norm=1.0)
    train(range(3), first)
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    second = b, rule(b, bits=bits, max_norm=1.0)
    second[1].load_state_dict(first[1].state_dict())  # of which it keeps copies
    for p, q in zip(a, b, strict=True):
        assert first[1].state[p]["exp_avg"].data_ptr() != second[1].state[q]["exp_avg"].data_ptr()
    second[1].load_state_dict(through_a_file(first[1].state_dict()))
    assert same_states(first, second) and second[1].param_groups[0]["lr"] == 1e-2
    train(range(3, 6), first, second)
    assert same_params(first, second)


def test_states_that_do_not_fit_are_refused() -> None:
    lion, (_, adamw) = made(qn.optim.Lion), made()
    train(range(1), lion)
    with pytest.raises(ValueError, match=r"AdamW: exp_avg_sq .*\[70, 70\] is NoneType"):
        adamw.load_state_dict({**adamw.state_dict(), "state": lion[1].state_dict()["state"]})


def test_closure_hooks_and_missing_gradients() -> None:
    params, optimizer = made(lr=0.1)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    start = [p.detach().clone() for p in params]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum() + params[2].square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert optimizer.grad_norm is None and not optimizer.skipped  # without max_norm
    assert losses == sorted(losses, reverse=True)
    assert seen == ["before", "after"] * 3
    assert torch.equal(params[1], start[1]) and not torch.equal(params[0], start[0])
    assert params[1] not in optimizer.state
    train(range(1), (params, optimizer))  # now all have one, each with its own count of steps
    assert [float(optimizer.state[p]["step"]) for p in params] == [4, 1, 4, 1]


@pytest.mark.parametrize("bits", [32, 8])
def test_add_param_group_and_new_storage(bits: Any) -> None:
    """Addresses are read anew: .data may be exchanged, states replaced, groups added, and an order be another."""
    a, b = parameters(), parameters()
    first, second = (a, AdamW(a, lr=1e-2, bits=bits)), (b, AdamW(b[:2], lr=1e-2, bits=bits))
    second[1].add_param_group({"params": b[2:]})
    train(range(2), first, second)
    for p in b:
        p.data = p.data.clone()
        second[1].state[p]["exp_avg"] = second[1].state[p]["exp_avg"].clone()
    train(range(2, 4), first, second)
    assert same_params(first, second)
    b[0].data = b[0].data.t().contiguous().t()
    train(range(4, 7), first, second)
    assert same_params(first, second) and not b[0].is_contiguous()


def test_tensor_learning_rate_and_named_parameters() -> None:
    module = torch.nn.Linear(4, 3)
    optimizer = AdamW(module.named_parameters(), lr=torch.tensor(0.5))
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    before = module.bias.detach().clone()
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(module.bias.detach(), before - 0.5)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(unscale_first: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    (a, scaled), (b, plain) = (made(lr=1e-2, max_norm=0.5) for _ in range(2))

    def loss_of(params: Params) -> torch.Tensor:
        return torch.stack([p.square().sum() for p in params]).sum()

    for _ in range(3):
        scaled.zero_grad()
        plain.zero_grad()
        scaler.scale(loss_of(a)).backward()
        loss_of(b).backward()
        if unscale_first:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        plain.step()
        assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert a[0].grad is not None
    a[0].grad[0, 0] = float("inf")
    before = [p.detach().clone() for p in a]
    scaler.scale(torch.zeros(()))
    scaler.step(scaled)
    scaler.update()
    assert scaled.skipped and scaler.get_scale() == 512.0
    assert all(torch.equal(p, q) for p, q in zip(a, before, strict=True))


def test_sparse_is_refused() -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="AdamW: .* torch.sparse_coo: expected dense"):
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"params": [torch.nn.Parameter(torch.zeros(3).double())]}, {"paged": "yes"}, {"bits": 4}, {"lr": -1.0},
        {"betas": (0.9, 1.0)}, {"eps": float("nan")}, {"max_norm": 0.0},
    ],
    ids=" ".join,
)  # fmt: skip
def test_refuses_in_words(options: dict[str, Any], sentence: Any) -> None:
    for rule in OPTIMIZERS[:2] if "eps" in options else OPTIMIZERS:  # Lion has none
        with pytest.raises(ValueError) as raised:
            rule(**{"params": parameters(), **options})
        sentence(raised.value)


@pytest.mark.parametrize("rule", [AdamW, qn.optim.Lion])
def test_a_budget_below_the_least_is_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match=f"{rule.__name__}: page_budget is 1000: .* {paged.LEAST} bytes"):
        rule(parameters(), page_budget=1000)


def test_signature_is_the_promised_one() -> None:
    for states in ("auto", False):
        AdamW(parameters(), 2e-4, (0.9, 0.999), 1e-8, 0.0, 8, states, "pages")


def test_other_devices_and_dtypes_take_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of another dtype cannot go to the kernel: same numbers, by way of the reference."""
    plain, by_ops = (made(bits=8, max_norm=1.0) for _ in range(2))
    train(range(3), plain)
    monkeypatch.setattr(StepTable, "point_at", lambda self, grads, device: False)
    train(range(3), by_ops)
    assert by_ops[1].grad_norm == plain[1].grad_norm
    assert same_params(plain, by_ops)


@pytest.mark.parametrize(("bits", "expected"), [(32, 8.0), (8, 2.03125)])
def test_bytes_of_the_states(bits: Any, expected: float) -> None:
    """Small tensors keep 32 bits."""
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (1 << 20, 4096, 4095)]
    optimizer = AdamW(params, bits=bits)
    train(range(1), (params, optimizer))
    for param, count in zip(params, (expected, expected, 8), strict=True):
        assert sum(t.nbytes for t in optimizer.state[param].values() if t.dim()) == count * param.numel()


def losses_of(rule: Callable[..., torch.optim.Optimizer], **options: Any) -> list[float]:
    """Of a small next-token model on a language of its own: a noisy permutation of 64 symbols."""
    torch.manual_seed(0)
    follows = torch.randperm(64)
    model = torch.nn.Sequential(
        torch.nn.Embedding(64, 96), torch.nn.Linear(96, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
    )
    optimizer = rule(model.parameters(), **options)
    losses = []
    for _ in range(300):
        tokens, noise = torch.randint(64, (2, 128))
        target = torch.where(torch.rand(128) < 0.2, noise, follows[tokens])
        loss = torch.nn.functional.cross_entropy(model(tokens), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(("rule", "lr"), [(AdamW, 1e-3), (qn.optim.Adam, 1e-3), (qn.optim.Lion, 3e-4)])
def test_8_bit_training_follows_32_bit(rule: Any, lr: float) -> None:
    wide, coded = (losses_of(rule, lr=lr, bits=bits) for bits in (32, 8))
    end = sum(wide[-50:]) / 50
    assert end < 0.5 * wide[0]
    assert abs(sum(coded[-50:]) / 50 - end) < 0.02 * end
    assert all(abs(a - b) < 0.1 * a for a, b in zip(wide, coded, strict=True))
