"""Checkpointing: what a recomputation does not compute again, and that no gradient changes by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FLOAT_DTYPES
from emulated import Emulator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qlora_native as qn
from qlora_native.ops import _cuda_kernels, _cuda_products
from qlora_native.ops.linear_4bit import CPU

SIZE = 64
TOKENS = 40  # more than go by single rows


class Layer:
    """Two products with an adapter and one without, as in a decoder layer: the last one is the end of it."""

    def __init__(self, is_last_adapted: bool, size: int = SIZE) -> None:
        self.weights = [qn.quantize(torch.randn(size, size) / 8) for _ in range(3)]
        adapters = [(torch.randn(4, size) / 8, torch.randn(size, 4) / 8) for _ in range(2)]
        self.adapters = [(a.requires_grad_(), b.requires_grad_()) for a, b in adapters]
        self.is_last_adapted = is_last_adapted

    def __call__(self, x: Tensor) -> Tensor:
        first, second, third = self.weights
        (a, b), (c, d) = self.adapters
        y = torch.tanh(qn.lora_linear(x, first, a, b, 0.5))
        if self.is_last_adapted:
            return x + qn.lora_linear(torch.tanh(qn.linear(y, second)), third, c, d, 0.5)
        return x + qn.linear(torch.tanh(qn.lora_linear(y, second, c, d, 0.5)), third)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each product since the start was a forward one."""
    seen: list[bool] = []
    product = CPU.product

    def counted(is_forward: bool, *arguments: Any, **options: Any) -> Tensor:
        seen.append(is_forward)
        return product(is_forward, *arguments, **options)

    monkeypatch.setattr(CPU, "product", counted)
    return seen


Run = Callable[[Layer, Tensor], Tensor]


def checkpointed(run: Run) -> Run:
    return lambda layer, x: checkpoint(run, layer, x, use_reentrant=False)


def gradients(layers: list[Layer], run: Run, dtype: torch.dtype, tokens: int = TOKENS) -> list[Tensor]:
    """Of the input and of all adapters, by layers that ``run`` calls."""
    torch.manual_seed(1)
    x = start = torch.randn(tokens, layers[0].weights[0].shape[1]).to(dtype).requires_grad_()
    for layer in layers:
        x = run(layer, x)
    parameters = [matrix for layer in layers for pair in layer.adapters for matrix in pair]
    return list(torch.autograd.grad(x.float().square().sum(), [start, *parameters]))


@pytest.mark.parametrize("is_last_adapted", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_last_product_of_a_layer_is_not_computed_again(
    products: list[bool], is_last_adapted: bool, dtype: torch.dtype
) -> None:
    layers = [Layer(is_last_adapted) for _ in range(3)]
    expected = gradients(layers, Layer.__call__, dtype)
    assert (products.count(True), products.count(False)) == (9, 9)
    products.clear()
    found = gradients(layers, checkpointed(Layer.__call__), dtype)
    assert (products.count(True), products.count(False)) == (9 + 6, 9)  # three a layer again, but for the last
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, TOKENS])
def test_no_gradient_changes(tokens: int, dtype: torch.dtype) -> None:
    """Of few tokens, which go by other kernels, and of sums so long that torch adds up fp32 in another order."""
    layers = [Layer(is_last_adapted=True, size=320) for _ in range(2)]
    expected = gradients(layers, Layer.__call__, dtype, tokens)
    assert all(map(torch.equal, gradients(layers, checkpointed(Layer.__call__), dtype, tokens), expected))


def penalized(layer: Layer, x: Tensor) -> Tensor:
    """A gradient within."""
    with torch.enable_grad():
        inner = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(layer(inner).float().square().sum(), inner)
    return layer(x) * slope.to(x.dtype).mean()


def dropped(layer: Layer, x: Tensor) -> Tensor:
    """A checkpoint within, and dropout."""
    (a, b), _ = layer.adapters
    seen = torch.nn.functional.dropout(x, 0.5)
    return checkpointed(Layer.__call__)(layer, x) + qn.lora_linear(x, layer.weights[0], a, b, 0.5, x_lora=seen)


@pytest.mark.parametrize(("run", "dtype"), [(penalized, torch.float32), (dropped, torch.bfloat16)])
def test_what_a_checkpoint_may_hold(run: Run, dtype: torch.dtype) -> None:
    layers = [Layer(is_last_adapted=True) for _ in range(2)]
    assert all(map(torch.equal, gradients(layers, checkpointed(run), dtype), gradients(layers, run, dtype)))


class Decodes:
    """What CUDA products in two steps decode, and the most bytes that lie kept meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.most = 0
        self.error = -1  # the decoding that runs out of memory
        decode = _cuda_products.decode

        def counted(*given: Any) -> None:
            if self.count == self.error:
                raise torch.OutOfMemoryError
            self.count += 1
            self.most = max(self.most, self.kept())
            decode(*given)

        monkeypatch.setattr(_cuda_products, "decode", counted)
        monkeypatch.setattr(_cuda_products, "plan_of", lambda *_: _cuda_products.TWO_STEPS)
        monkeypatch.setattr(_cuda_kernels, "is_capturing", lambda device: False)

    @staticmethod
    def kept() -> int:
        return sum(one.nbytes for kept in _cuda_products._passes.values() for one in kept.values())


BYTES = SIZE * SIZE * 2  # of a decoded weight


@pytest.mark.parametrize(("budget", "spared"), [(0, 0), (BYTES - 1, 0), (BYTES, 1), (2 * BYTES - 1, 1), (1 << 30, 2)])
def test_decoded_weights_are_kept_from_recomputation_to_backward(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, budget: int, spared: int
) -> None:
    """Of the three products of a layer one is not computed again; two may be spared, within a budget."""
    layers = [Layer(is_last_adapted=True) for _ in range(3)]
    decodes = Decodes(monkeypatch)
    expected = gradients(layers, checkpointed(Layer.__call__), torch.bfloat16)
    assert decodes.count == 3 * (3 + 2 + 3)
    decodes.count = 0
    monkeypatch.setattr(_cuda_products, "KEPT_BYTES", budget)
    found = gradients(layers, checkpointed(Layer.__call__), torch.bfloat16)
    assert all(map(torch.equal, found, expected))
    assert decodes.count == 3 * (3 + 2 + 3 - spared) and decodes.most == min(spared, 2) * BYTES <= budget
    assert decodes.kept() == 0 and not _cuda_products._passes
    if spared:
        decodes.count, decodes.error = 0, 3 * 3 + 3  # in the backward pass of the last layer
        with pytest.raises(torch.OutOfMemoryError):
            gradients(layers, checkpointed(Layer.__call__), torch.bfloat16)
        assert decodes.most and not _cuda_products._passes
