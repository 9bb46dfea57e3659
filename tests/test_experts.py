"""QuantizedExperts: all experts of a layer by one product, as transformers' rule and as an expert after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from helpers import relative_error, same_bytes_under_threads
from tiny_models import dense_twin
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qlora_native as qn
from qlora_native.nn.experts import QuantizedExperts, by_expert

EXPERTS = 4


class Layer:
    """The experts of a tiny model, those of transformers with the same weights, and tokens for them."""

    def __init__(self, folder: Path, dtype: torch.dtype, kind: str = "qwen3_moe", is_adapted: bool = False) -> None:
        families.make(kind).save_pretrained(folder)
        model = qn.load_model(folder, dtype=torch.float32)
        twin, _ = dense_twin(folder, model)
        self.ours = next(module for module in model.modules() if isinstance(module, QuantizedExperts))
        path = next(path for path, module in model.named_modules() if module is self.ours)
        self.theirs: Any = twin.get_submodule(path)
        self.x = torch.randn(11, 64).to(dtype).requires_grad_()
        scores = torch.rand(11, EXPERTS)
        scores[:, 2] = 0.0  # nobody's
        weights, self.index = scores.topk(2)
        self.weights = weights.to(dtype).requires_grad_()
        self.factors: list[Tensor] = []
        for name in ("gate_up_proj", "down_proj") if is_adapted else ():
            stack = self.ours.stack(name)
            assert stack is not None
            _, n, k = stack.shape
            pair = [torch.randn(shape).requires_grad_() for shape in ((EXPERTS, 3, k), (EXPERTS, n, 3))]
            self.ours.adapters[name] = [(*pair, 0.1)]  # type: ignore[list-item]
            self.factors += pair

    def results(self, run: Callable[..., Tensor]) -> list[Tensor]:
        """What comes out, and the gradients."""
        y = run(self.x, self.index, self.weights)
        generator = torch.Generator().manual_seed(1)
        grad_y = torch.randn(y.shape, generator=generator).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, [self.x, self.weights, *self.factors], grad_y)]

    def one_by_one(self, *arguments: Tensor) -> Tensor:
        return by_expert(self.ours, *arguments, product=self.ours._product)


@pytest.fixture
def no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("an expert alone")

    monkeypatch.setattr(QuantizedExperts, "_product", refuse)


@pytest.mark.usefixtures("no_loop")
@pytest.mark.parametrize("kind", families.known("qwen3_moe mixtral"))
def test_as_transformers(tmp_path: Path, kind: str) -> None:
    layer = Layer(tmp_path, torch.float32, kind)
    for got, expected in zip(layer.results(layer.ours), layer.results(layer.theirs), strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_adapted", [True, False])
def test_as_one_after_another(tmp_path: Path, is_adapted: bool, dtype: torch.dtype) -> None:
    layer = Layer(tmp_path, dtype, is_adapted=is_adapted)
    grouped, single = layer.results(layer.ours), layer.results(layer.one_by_one)
    for got, expected in zip(grouped, single, strict=True):
        assert got.dtype == expected.dtype
        assert relative_error(got, expected) < (1e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.isa
def test_threads_and_recomputation_change_no_byte(tmp_path: Path) -> None:
    layer = Layer(tmp_path, torch.bfloat16, is_adapted=True)

    def checkpointed(*arguments: Tensor) -> Tensor:
        return checkpoint(layer.ours, *arguments, use_reentrant=False)

    once = same_bytes_under_threads(lambda: layer.results(layer.ours), (1, 2, 3))
    assert all(map(torch.equal, once, layer.results(checkpointed)))


def test_experts_of_another_process_add_nothing(tmp_path: Path) -> None:
    layer = Layer(tmp_path, torch.float32)
    layer.index[::3, 1] = EXPERTS
    assert relative_error(layer.ours(layer.x, layer.index, layer.weights),
                          layer.one_by_one(layer.x, layer.index, layer.weights)) < 1e-6  # fmt: skip
    layer.index.fill_(EXPERTS)
    assert not layer.ours(layer.x, layer.index, layer.weights).any()


def test_no_tokens(tmp_path: Path) -> None:
    layer = Layer(tmp_path, torch.float32)
    assert layer.ours(layer.x[:0], layer.index[:0], layer.weights[:0]).shape == (0, 64)


@pytest.mark.usefixtures("no_loop")
def test_compute_dtype(tmp_path: Path) -> None:
    layer = Layer(tmp_path, torch.float32)
    exact = layer.ours(layer.x, layer.index, layer.weights)
    layer.ours.compute_dtype = torch.bfloat16
    rounded = layer.ours(layer.x, layer.index, layer.weights)
    assert rounded.dtype == torch.float32
    assert 1e-4 < relative_error(rounded, exact) < 1e-2


def test_two_adapters_at_once_and_a_dense_stack(tmp_path: Path) -> None:
    layer = Layer(tmp_path, torch.float32, is_adapted=True)
    for name, factors in layer.ours.adapters.items():
        layer.ours.adapters[name] = factors * 2
    twice = layer.ours(layer.x, layer.index, layer.weights)
    for name, factors in layer.ours.adapters.items():
        a, b, scale = factors[0]
        layer.ours.adapters[name] = [(a, b, 2 * scale)]
    assert relative_error(twice, layer.ours(layer.x, layer.index, layer.weights)) < 1e-5


def test_compiles_without_breaks(tmp_path: Path, backend: str) -> None:
    torch._dynamo.reset()
    layer = Layer(tmp_path, torch.float32)
    compiled = torch.compile(layer.ours, fullgraph=True, backend=backend)
    for got, expected in zip(layer.results(compiled), layer.results(layer.ours), strict=True):
        assert relative_error(got, expected) < 1e-6
