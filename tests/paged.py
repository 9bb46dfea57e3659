"""What the tests of optimizers share: parameters, gradients, training, and page files in pytest's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bytes

import qlora_native as qn
from qlora_native import _C
from qlora_native.optim import pressure

Params = list[torch.nn.Parameter]
Made = tuple[Params, Any]  # parameters and their optimizer
MIB = 1 << 20
LEAST = 256 * _C.page_bytes
SIZES = (5, 4097, 600_000, 0, 70_000, 800_000)  # small ones that share a chunk, and some that are split
OPTIMIZERS = (qn.optim.AdamW, qn.optim.Adam, qn.optim.Lion)


def parameters(dtype: torch.dtype = torch.float32, sizes: Sequence[int | tuple[int, ...]] = SIZES) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def made(rule: Any = qn.optim.AdamW, dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    params = parameters(dtype)
    return params, rule(params, **{"lr": 1e-2, **options})


@pytest.fixture
def page_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for page files, and no watcher: the tests call for the moves."""
    if _C.lies_in_memory(str(tmp_path)):
        pytest.skip("temporary files lie in memory here: pytest --basetemp names a folder on a disk")
    monkeypatch.setattr(pressure, "watch", lambda *_: None)
    return tmp_path


def is_in_file(optimizer: Any) -> bool:
    return bool(optimizer.states_paged_out() == optimizer.paging_statistics()["state_bytes"] > 0)


def give_grads(params: Params, seed: int, scale: float = 1.0, skip: bool = True) -> None:
    """With ``skip``, now and then a parameter has none."""
    generator = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
        param.grad = None if skip and (seed + i) % 7 == 6 else grad


def train(
    optimizer: Any, params: Params, seeds: range, after: Callable[[int], None] = lambda seed: None, skip: bool = True
) -> None:
    for seed in seeds:
        give_grads(params, seed, skip=skip)
        optimizer.step()
        after(seed)


def train_all(all_made: Sequence[Made], seeds: range, skip: bool = True) -> None:
    for params, optimizer in all_made:
        train(optimizer, params, seeds, skip=skip)


def same_params(a: Made, b: Made) -> bool:
    return all(same_bytes(x.detach(), y.detach()) for x, y in zip(a[0], b[0], strict=True))


def same_states(a: Made, b: Made) -> bool:
    """Byte for byte."""
    states = zip(*([optimizer.state[param] for param in params] for params, optimizer in (a, b)), strict=True)
    return all(
        mine.keys() == theirs.keys() and all(same_bytes(mine[key], theirs[key]) for key in mine)
        for mine, theirs in states
    )


def same_training(a: Made, b: Made) -> bool:
    return same_params(a, b) and same_states(a, b)


def grouped(rule: str, sizes: Sequence[int] = (5, 4097, 20_000), **options: Any) -> Any:
    """An optimizer with two groups of parameters of two dtypes, the same at each call."""
    params = [*parameters(torch.float32, sizes), *parameters(torch.bfloat16, sizes)]
    half = len(sizes) + 1
    groups = [{"params": params[:half], "lr": 1e-2}, {"params": params[half:], "lr": 3e-3, "weight_decay": 0.1}]
    return getattr(qn.optim, rule)(groups, **options)


def params_of(optimizer: torch.optim.Optimizer) -> Params:
    return [param for group in optimizer.param_groups for param in group["params"]]


def same_optimizers(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    return same_training((params_of(a), a), (params_of(b), b))
