"""Products without torch's dispatcher: when they are taken, and that nobody could tell."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TOLERANCE
from helpers import relative_error, same_bytes, through_a_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_native as qn
from qlora_native import _C, lora
from qlora_native.nn import QuantizedLinear
from qlora_native.ops import _direct
from qlora_native.ops._direct import unobserved
from qlora_native.ops._operands import Weight

K, N = 128, 48


def on_each_device(test: Callable[..., None]) -> Callable[..., None]:
    """On a CPU, and the same way for CUDA tensors, whose part is played by CPU tensors over the emulator."""
    marks = pytest.mark.devices("cpu", "emulated"), pytest.mark.usefixtures("device")
    return marks[0](marks[1](test))


def layer(bias: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **options: Any) -> QuantizedLinear:
    torch.manual_seed(seed)
    made = QuantizedLinear.from_linear(torch.nn.Linear(K, N, bias=bias, dtype=dtype), **options)
    return made.requires_grad_(False)


def adapter_on(made: QuantizedLinear) -> lora.LoRALinear:
    adapted = lora.LoRALinear(made, 4, 2.0)
    torch.nn.init.normal_(adapted.lora_B)
    return adapted


def by_dispatcher(made: QuantizedLinear | lora.LoRALinear, x: Tensor) -> Tensor:
    if isinstance(made, QuantizedLinear):
        return torch.ops.qlora_native.linear_4bit(x, made.bias, *made.quantized.op_args())
    base: Any = made.base_layer
    adapter = (None, made.lora_A, made.lora_B, 2.0, base.bias)
    return torch.ops.qlora_native.lora_linear_4bit(x, *adapter, *base.quantized.op_args())[0]


class Recorder(TorchDispatchMode):
    """The names of the ops that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


OBSERVED: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Recorder,
    "function mode": TorchFunctionMode,
    "fake tensors": FakeTensorMode,
    "default device": lambda: torch.device("meta"),
    "forward derivative": forward_ad.dual_level,
    "profiler": torch.profiler.profile,
}
FREE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
}


@on_each_device
@pytest.mark.parametrize("state", OBSERVED)
def test_steps_aside(state: str, request: pytest.FixtureRequest) -> None:
    arguments = (torch.randn(3, K), None, layer().quantized.op_args())

    def ways() -> tuple[bool, bool]:
        return unobserved(arguments[0]), _direct.kernel_of("linear_4bit", arguments) is not None

    free = (request.node.callspec.params["device"] == "cpu", True)
    assert ways() == free
    with OBSERVED[state]():
        assert ways() == (False, False)
    assert ways() == free


@pytest.mark.parametrize("state", FREE)
def test_is_taken(state: str) -> None:
    made = layer(bias=True)
    with FREE[state]():
        x = torch.randn(1, K, dtype=torch.bfloat16)
        assert unobserved(x, made.bias)
        got, expected = made(x), by_dispatcher(made, x)
    assert same_bytes(got, expected)
    assert got.is_inference() == expected.is_inference()
    assert not got.requires_grad


def test_is_not_taken_for_what_the_dispatcher_would_treat() -> None:
    x = torch.randn(1, K)
    needs_grad = x.clone().requires_grad_()
    assert not unobserved(needs_grad)
    assert not unobserved(x, needs_grad)
    with torch.no_grad():
        assert unobserved(needs_grad)
    for other in (torch.nn.Parameter(x, requires_grad=False), torch._neg_view(x), x.to_sparse(), x.to("meta")):
        assert not unobserved(other)
    seen: list[bool] = []

    def look(row: Tensor) -> Tensor:
        seen.append(unobserved(row))
        return row.sum()

    for transform in (torch.vmap, torch.func.grad, torch.func.functionalize):
        transform(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    assert seen and not any(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
def test_same_bytes(dtype: torch.dtype, double_quant: bool, bias: torch.dtype | None) -> None:
    made = layer(bias=bias is not None, dtype=bias or torch.float32, double_quant=double_quant)
    shapes = [(K,), (1, K), (1, 1, K), (2, 3, K), (3, K), (40, K), (0, K), (2, 0, K)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    inputs.append(torch.randn(K, 3).to(dtype).t())
    inputs.append(torch.randn(2, 3, 2 * K).to(dtype)[:, :, ::2])
    for x in inputs:
        expected = by_dispatcher(made, x)
        for got in (made(x), qn.linear(x, made.quantized, made.bias)):
            assert same_bytes(got, expected) and got.is_contiguous()


def test_errors_are_those_of_the_op() -> None:
    made = layer()
    for x in (torch.randn(1, K + 1), torch.randn(()), torch.randn(K, 1), torch.ones(1, K, dtype=torch.int64)):
        with pytest.raises(ValueError) as by_op:
            by_dispatcher(made, x)
        for call in (made, lambda x: qn.linear(x, made.quantized)):
            with pytest.raises(ValueError) as direct:
                call(x)
            assert str(direct.value) == str(by_op.value)
    with pytest.raises(ValueError, match=r"bias is torch.float32 \[3\] .*\[48\]"):
        qn.linear(torch.randn(1, K), made.quantized, torch.zeros(3))
    made.absmax = made.absmax[:-1]
    with pytest.raises(ValueError, match="absmax is torch.uint8"):
        made(torch.randn(1, K))


def test_follows_its_tensors() -> None:
    x = torch.randn(1, K, dtype=torch.bfloat16)
    made, other = layer(), layer(seed=1)
    before, after = made(x), other(x)
    assert not torch.equal(before, after)

    made.load_state_dict(other.state_dict())
    assert same_bytes(made(x), after)

    made = layer()
    made(x)
    for name in ("absmax", "nested_absmax", "nested_offset"):
        setattr(made, name, getattr(other, name))
    made.weight.data = other.weight.data.clone()  # the same parameter, other memory
    assert same_bytes(made(x), after)
    made.weight.copy_(layer().weight)  # the same memory
    assert same_bytes(made(x), by_dispatcher(made, x))

    made.quantized = qn.quantize(torch.randn(N, K), block_size=32, quant_type="fp4", double_quant=False)
    assert same_bytes(made(x), by_dispatcher(made, x))

    weight = layer().quantized
    qn.linear(x, weight)
    weight.packed = other.quantized.packed
    assert same_bytes(qn.linear(x, weight), torch.ops.qlora_native.linear_4bit(x, None, *weight.op_args()))


def test_copies_and_pickles() -> None:
    x = torch.randn(1, K, dtype=torch.bfloat16)
    made = layer()
    weight = made.quantized
    expected = made(x)
    qn.linear(x, weight)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        with torch.no_grad():
            kept = made.weight.clone()
            made.weight.zero_()
            assert same_bytes(twin(x), expected)
            made.weight.copy_(kept)
    assert same_bytes(qn.linear(x, through_a_file(weight)), expected)
    assert same_bytes(qn.linear(x, weight.to("cpu")), expected)


def test_compiled() -> None:
    made, x = layer(bias=True), torch.randn(1, K, dtype=torch.bfloat16)
    with torch.no_grad():
        assert same_bytes(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (40,), (1, 1), (2, 1), (2, 40)], ids=str)
def test_training_takes_a_node_of_the_same_derivative(
    shape: tuple[int, ...], adapter: torch.dtype, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    adapted = adapter_on(made := layer(bias=True, dtype=dtype))
    adapted.to(adapter)
    x, grad_y = torch.randn(*shape, K).to(dtype).requires_grad_(), torch.randn(*shape, N).to(dtype)
    leaves = [x, adapted.lora_A, adapted.lora_B]
    expected, got = by_dispatcher(adapted, x), adapted(x)
    key = {"cpu": "cpu", "emulated": "cuda"}[request.node.callspec.params["device"]]
    assert type(got.grad_fn).__name__ == f"lora_linear_4bit_{key}Backward" != type(expected.grad_fn).__name__
    assert same_bytes(got, expected) and same_bytes(made(x), by_dispatcher(made, x))
    assert all(map(same_bytes, *(torch.autograd.grad(y, leaves, grad_y) for y in (got, expected))))
    with torch.no_grad():
        assert same_bytes(adapted(x), by_dispatcher(adapted, x))
    with Recorder() as recorder:
        seen = adapted(x)
        torch.autograd.grad(seen, leaves, grad_y)
        with torch.no_grad():
            made(x)
    assert type(seen.grad_fn).__name__ == type(expected.grad_fn).__name__
    for op in ("lora_linear_4bit.default", "lora_linear_4bit_backward.default", "linear_4bit.default"):
        assert f"qlora_native.{op}" in recorder.seen


@on_each_device
@pytest.mark.parametrize("changed", ["a", "b", "packed", "absmax", "nested_absmax"])
def test_an_operand_that_shrinks_before_backward_is_refused(changed: str) -> None:
    """Autograd saves leaves as they are, so that ``.data =`` puts other memory there."""
    w = qn.quantize(torch.randn(N, K))
    a, b = torch.randn(4, K, requires_grad=True), torch.randn(N, 4, requires_grad=True)
    y = qn.lora_linear(torch.randn(40, K), w, a, b, 2.0)
    tensor = {"a": a, "b": b}.get(changed, getattr(w, changed, None))
    assert tensor is not None
    tensor.data = tensor.data[:-1].clone()
    with pytest.raises(ValueError, match=rf"\b{changed} is torch"):
        y.sum().backward()


def test_a_training_layer_reaches_the_kernel_under_few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of our functions between a layer and its kernel costs every layer of every step."""
    native = _C.linear_4bit
    depths: list[int] = []

    def counted(*arguments: Any) -> int:
        frame, depth = sys._getframe(1), 0
        while frame is not None:
            depth += str(Path(_C.__file__).parent) in frame.f_code.co_filename
            frame = frame.f_back  # type: ignore[assignment]
        depths.append(depth)
        return native(*arguments)

    monkeypatch.setattr(_C, "linear_4bit", counted)
    adapted = adapter_on(layer())
    adapted(torch.randn(40, K).bfloat16().requires_grad_()).sum().backward()
    assert depths
    assert max(depths) <= 6


def test_a_weight_of_a_subclass_goes_through_the_dispatcher() -> None:
    class Own(Tensor):
        pass

    w = layer().quantized.op_args()
    assert _direct.kernel_of("linear_4bit", (torch.randn(1, K), None, w)) is not None
    for i in range(4):
        given = [part.as_subclass(Own) if j == i else part for j, part in enumerate(w)]  # type: ignore[union-attr]
        assert _direct.kernel_of("linear_4bit", (torch.randn(1, K), None, Weight._make(given))) is None


@pytest.fixture
def matrices(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The native matrices that are made from here on."""
    made: list[object] = []
    native = _C.matrix

    def counted(*arguments: Any) -> object:
        made.append(native(*arguments))
        return made[-1]

    monkeypatch.setattr(_C, "matrix", counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapted_layer_makes_its_native_matrix_once(dtype: torch.dtype, matrices: list[object]) -> None:
    base = layer(bias=True, dtype=dtype)
    adapted = adapter_on(base)
    dense = base.quantized.dequantize(torch.float32).double() + adapted.delta().double()
    inputs = [torch.randn(shape).to(dtype) for shape in ((1, 1, K), (1, 1, K), (3, K), (40, K))]
    inputs.append(torch.randn(2, 3, K).to(dtype)[:, -1:])
    with torch.no_grad():
        for x in inputs:
            expected = x.double() @ dense.t() + base.bias.double()
            assert relative_error(adapted(x), expected) < 2 * TOLERANCE[dtype]
    assert len(matrices) == 1


@torch.no_grad()
def test_what_the_kernel_cannot_take_costs_no_native_matrix_a_call(matrices: list[object]) -> None:
    """Neither a layer nor an adapter on it makes one again to find out that the operands do not fit."""
    made = layer(bias=True)
    adapted = lora.LoRALinear(made, 4, 2.0)
    rows = torch.randn(2, 3, 2 * K)[:, :, ::2]
    for x in (rows, rows.bfloat16(), rows.double(), torch.randn(3, K), torch.empty(0, K)):
        for module in (made, adapted):
            module(x), module(x)
    assert len(matrices) <= 1


def test_keys_of_a_device() -> None:
    """Beside its own key a plain tensor has those of autograd and autocast, or of autocast alone in inference mode."""
    with torch.inference_mode():
        inference = torch.empty(1)
    for tensor in (torch.empty(1), inference):
        assert _direct._DEVICES[torch._C._dispatch_keys(tensor).raw_repr()] == "CPU"
    names = sorted(str(torch._C.DispatchKeySet.from_raw_repr(keys)) for keys in _direct._DEVICES)
    assert [name.replace("CUDA", "CPU") for name in names[2:]] == names[:2]
