"""Products by two steps and the loss on a CUDA device: panels, roundings, launches, readings of the head, no waiting.

What needs kernels runs over the emulator; what is counted runs over a module of stubs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import emulated
import pytest
import torch
from cases import GGUF_TYPES, TOLERANCE
from emulated import Emulator
from emulated_torch import WAITING
from helpers import gguf_truth, gguf_weight, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_native as qn
from qlora_native import reference
from qlora_native.ops import _cuda_kernels, _cuda_products, _library, lora_linear_4bit
from qlora_native.ops import linear_cross_entropy as loss_op

OPS = torch.ops.qlora_native
TWO_STEP = _cuda_products.TWO_STEP
TWO_STEPS = (TWO_STEP, 0, 0, 1, 0, 0, 0)


def in_two_steps(monkeypatch: pytest.MonkeyPatch, columns: int | None = None) -> None:
    """Every product by two steps, in panels of so many columns of y, if a number is given."""
    monkeypatch.setattr(_cuda_products, "plan_of", lambda *_: _cuda_products.Plan(*TWO_STEPS))
    if columns is not None:
        monkeypatch.setattr(_cuda_products, "panel_columns", lambda width, *_: min(width, columns))


SHAPES = ((300, 192, 7), (1100, 96, 512), (40, 65, 1), (70, 4096, 1024))
PANELS = [(kind, *shape) for kind in ("nf4", "nested") for shape in SHAPES]


@pytest.mark.parametrize(("kind", "n", "k", "columns"), [*PANELS, ("q5_0", 40, 96, 7), ("q6_k", 12, 2304, 1024)])
def test_panels_of_any_width(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, kind: str, n: int, k: int, columns: int
) -> None:
    """Panels begin inside a byte, a block, a group of nested scales, or at one; the last is narrower."""
    in_two_steps(monkeypatch, columns)
    if kind in GGUF_TYPES:
        w = gguf_weight(kind, (n, k))
        dense = gguf_truth(w).double()
    else:
        w = qn.quantize(torch.randn(n, k), double_quant=kind == "nested")
        dense = reference.dequantize(torch.float32, *w.op_args()).double()
    x, grad, bias = torch.randn(20, k), torch.randn(20, n), torch.randn(n)
    low, up, down = torch.randn(20, 4), torch.randn(n, 4), torch.randn(4, k)
    engine = _cuda_products.Cuda(emulator.module)
    for forward, left, matrix, width, factor in ((True, x, dense.t(), n, up.t()), (False, grad, dense, k, down)):
        for has_adapter, b in itertools.product((False, True), (None, bias) if forward else (None,)):
            adapter = _cuda_products.Adapter(low, up if forward else down) if has_adapter else None
            emulator.launches()
            y = engine.product(forward, left, w.op_args(), b, adapter)
            assert len(emulator.launches()) == -(-width // columns)
            truth = left.double() @ matrix + (0 if b is None else b) + (low @ factor if has_adapter else 0)
            assert relative_error(y, truth) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("quant_type", GGUF_TYPES)
def test_few_tokens_of_gguf_are_fused(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, quant_type: str) -> None:
    """The adapter's product and the bias among it, in each of the kernel's dtypes; parts take a launch more."""
    monkeypatch.setattr(_cuda_products.Cuda, "_two_step", lambda *_: pytest.fail("two steps"))
    w, a, b, bias = gguf_weight(quant_type, (40, 768)), torch.randn(4, 768), torch.randn(40, 4), torch.randn(40)
    for m, dtype in (
        (1, torch.float16),
        (16, torch.bfloat16),
        (17, torch.float16),
        (48, torch.bfloat16),
        (64, torch.float16),
    ):
        x, dense = torch.randn(m, 768).to(dtype), gguf_truth(w).to(dtype)
        emulator.launches()
        got = qn.lora_linear(x, w, a, b, 2.0, bias=bias)
        assert len(emulator.launches()) == 1 + (m > 16)
        low = 2.0 * x.double() @ a.double().t() @ b.double().t()
        assert relative_error(got, reference.linear(x, dense, bias) + low) < TOLERANCE[dtype]


def test_width_of_a_panel() -> None:
    """Whole where it fits, else whole tiles; the largest of an 8B model in 16 bits is one panel, of 117 MB."""
    of = _cuda_products.panel_columns
    assert of(14336, 4096, 2) == 14336 and of(4096, 14336, 2) == 4096
    assert 2 * 14336 * 4096 == 117_440_512 < _cuda_products.PANEL_BYTES
    for width, depth, itemsize in ((128256, 4096, 2), (28672, 8192, 2), (8192, 28672, 2), (4096, 128256, 4)):
        columns = of(width, depth, itemsize)
        assert 0 < columns < width and columns % (1 if columns < 256 else 256) == 0
        most = _cuda_products.PANEL_BYTES
        assert columns * depth * itemsize <= most < 2 * columns * depth * itemsize
    assert of(1100, _cuda_products.PANEL_BYTES // 2400, 2) == 1100
    assert of(300, 1 << 40, 2) == 1 and of(0, 64, 2) == 0 and of(64, 0, 2) == 64


def test_an_input_gradient_is_rounded_once(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that is rounded to bf16 after each of five panels of rows has 1.5 times the error of one that is not."""
    n, k, m = 640, 512, 64
    in_two_steps(monkeypatch, 100)  # columns: six panels
    w = qn.quantize(torch.randn(n, k))
    grad = torch.randn(m, n).bfloat16()
    dense = reference.dequantize(torch.bfloat16, *w.op_args())
    truth = grad.double() @ dense.double()
    by_rows = torch.zeros(m, k, dtype=torch.bfloat16)
    for first in range(0, n, 128):
        by_rows.addmm_(grad[:, first : first + 128], dense[first : first + 128])
    got = OPS.linear_4bit_grad_input(grad, *w.op_args())
    assert relative_error(got, truth) < 0.0019 < 0.0025 < relative_error(by_rows, truth)
    assert relative_error(got, truth) < 1.02 * relative_error(truth.bfloat16(), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_fp32_adapters_are_not_rounded_to_16_bits(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A product rounded to 16 bits has a relative error of 2^-10 (bf16) or 2^-13 (fp16) or so."""
    engine = _cuda_products.Cuda(emulator.module)
    left, right = torch.randn(300, 8).to(dtype), torch.randn(300, 192).to(dtype)
    truth = 0.37 * left.double().t() @ right.double()
    for transposed in (False, True):
        got = engine.outer(left, right, 0.37, torch.float32, transposed)
        expected = truth.t() if transposed else truth
        assert got.dtype == torch.float32 and got.is_contiguous()
        assert relative_error(got, expected) < 1e-6 < relative_error(expected.to(dtype), expected)
    # scale * B is rounded once, also into the other 16-bit format
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for source in (right, right.float(), right.double()):
        for target in (dtype, other, torch.float32, torch.float64):
            wide = source.float() if source.dtype != torch.float64 else source
            assert torch.equal(engine.narrow(source, target, 0.37), (wide * 0.37).to(target))
            assert torch.equal(engine.narrow(source, target), source.to(target))


# ---------------------------------------------------------------------------------------------------------------------
# Over stubs

VIEWS = {"view", "_unsafe_view", "t", "transpose", "slice", "select", "expand", "detach", "alias"}
VIEWS |= {"as_strided", "unbind"}
NO_LAUNCHES = {"promote_types", "lift_fresh", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """Counts torch's operations that launch a kernel and the calls of ours; refuses what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{func} waits for the device"
        if func.overloadpacket is torch.ops.aten.index.Tensor.overloadpacket:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "an index of booleans waits for the device"
        if func.namespace == "aten" and name not in VIEWS | NO_LAUNCHES:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, ...]], Any]:
    """The engine over a module whose kernels do nothing, for a plan; its launches are counted with torch's."""

    @contextmanager
    def launching(device: torch.device) -> Iterator[int]:
        yield 0

    def make(plan: tuple[int, ...]) -> Any:
        launches = Launches()
        kernels = {
            "dequantize_4bit": 1,
            "linear_4bit": 2 if plan[0] == 1 else 1,  # parts of a reduction are summed by a second launch
            "softmax_loss": 1,
        }
        module: Any = ModuleType("_cuda")
        module.plan_matmul = lambda question: plan
        for name, count in kernels.items():
            setattr(module, name, lambda *_, name=name, count=count: launches.names.extend([name] * count))
        monkeypatch.setattr(_cuda_kernels, "native", lambda device: module)
        monkeypatch.setattr(_cuda_kernels, "launching", launching)
        monkeypatch.setattr(_cuda_kernels, "raw_stream", lambda index: 0)
        monkeypatch.setattr(_cuda_kernels, "facts", lambda device: emulated.FACTS)
        monkeypatch.setattr(_cuda_products, "wide_product", wide_product_of(launches))
        _cuda_products.plan_of.cache_clear()
        return SimpleNamespace(engine=_cuda_products.Cuda(module), module=module, launches=launches)

    return make


def wide_product_of(launches: Launches) -> Callable[[Tensor, Tensor], Tensor]:
    def product(left: Tensor, right: Tensor) -> Tensor:
        launches.names.append("mm")
        return torch.empty(left.shape[0], right.shape[1], dtype=torch.float32)

    return product


PLANS = {"two_step": TWO_STEPS, "fused": (2, 64, 64, 1, 3, 0, 0), "split": (1, 64, 64, 4, 3, 0, 4096)}


@pytest.mark.parametrize("panels", [1, 3])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(PLANS))
def test_launches_of_an_adapted_layer(
    stubbed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str, adapter: torch.dtype, panels: int
) -> None:
    """The products, the decoder, and the scale of B's gradient; in the first pass after a step also 16-bit copies."""
    n = k = 96
    monkeypatch.setattr(_cuda_products, "panel_columns", lambda width, *_: width // panels)
    monkeypatch.setattr(_library.recording, "on", True)  # as in a pass that autograd records
    w = qn.quantize(torch.randn(n, k), block_size=32)
    x, grad = torch.randn(40, k).bfloat16(), torch.randn(40, n).bfloat16()
    a, b, bias = torch.randn(8, k).to(adapter), torch.randn(n, 8).to(adapter), torch.randn(n).bfloat16()
    torch.optim.SGD([a, b]).step()  # changes nothing; copies are kept of what an optimizer steps
    run = stubbed(PLANS[kind])
    needed = [True, False, True, True]
    forward_products = {"two_step": 2 + 2 * panels, "fused": 2, "split": 3}[kind]
    backward_products = {"two_step": 4 + 2 * panels, "fused": 4, "split": 5}[kind] + 1  # the scale of B's gradient
    for number in range(2):
        copies = {0: 2 if adapter == torch.float32 else 1, 1: 0}[number]  # of A and scale * B
        run.launches.names.clear()
        with run.launches:
            _, xa = lora_linear_4bit.forward_by(run.engine, x, None, a, b, 0.5, bias, w.op_args())
        assert len(run.launches.names) == copies + forward_products, run.launches.names
        run.launches.names.clear()
        with run.launches:
            lora_linear_4bit.backward_by(run.engine, grad, x, xa, a, b, 0.5, False, needed, w.op_args())
        assert len(run.launches.names) == backward_products, run.launches.names


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def loss_arguments(
    h: Tensor, weight: Tensor | qn.QuantizedWeight, labels: Tensor, need_grad_weight: bool = False
) -> tuple[Any, ...]:
    if isinstance(weight, qn.QuantizedWeight):
        return h, labels, -100, True, False, None, None, *weight.op_args()
    return h, labels, -100, True, need_grad_weight, None, None, weight, *[None] * 5, list(weight.shape), 0, 64


def test_how_often_the_head_is_read(stubbed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 tokens over the 128,256 words of Llama 3, which chunks of 24 MiB of logits would read 84 times."""
    tokens, words = 4096, 128_256
    monkeypatch.setattr(loss_op, "without_autocast", lambda x: nullcontext())  # which the meta device does not have
    h, head = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (tokens, words))
    run = stubbed(TWO_STEPS)
    with run.launches:
        loss_op.cuda(*loss_arguments(h, head, torch.empty(tokens, dtype=torch.int64, device="meta")))
    chunks = run.launches.names.count("softmax_loss")
    assert run.launches.names.count("mm") == 2 * chunks <= 9
    assert 2 * -(-tokens // loss_op.chunk_tokens("cpu", words, 2, tokens)) == 32
    assert loss_op.chunk_tokens("cpu", 32_768, 2, tokens) == 384
    assert loss_op.chunk_tokens("cuda", words, 2, tokens) >= 512
    assert loss_op.chunk_tokens("cuda", 100, 2, tokens) == tokens
    assert len(run.launches.names) <= 3 * chunks + 6  # the mean of the losses beside


@pytest.mark.parametrize("quantized", [False, True])
def test_the_loss_waits_for_nothing(stubbed: Callable[..., Any], quantized: bool) -> None:
    """Neither by our kernels nor by torch's operations alone; on a CPU it counts the labels."""
    h, dense = torch.randn(9, 64), torch.randn(101, 64)
    labels = torch.arange(9).masked_fill(torch.arange(9) % 2 == 0, -100)
    arguments = loss_arguments(h, qn.quantize(dense) if quantized else dense, labels, not quantized)
    run = stubbed(TWO_STEPS)
    for function in (loss_op.cuda, loss_op.anywhere):
        if quantized and function is loss_op.anywhere:
            continue  # its products are ops, which torch's modes do not look into
        with run.launches:
            _, grad_h, grad_weight = function(*arguments)
            context = SimpleNamespace(
                saved_tensors=(labels, grad_h, grad_weight), ignore_index=-100, h_dtype=h.dtype,
                weight_dtype=dense.dtype, needs_input_grad=(True, *[False] * 6, not quantized),
            )  # fmt: skip
            loss_op._backward(context, torch.ones(()))
    if not quantized:
        with pytest.raises(AssertionError, match="waits for the device"), run.launches:
            loss_op.cpu(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masked_labels(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Ignored rows have the gradient 0; one label that is no word makes the loss and its own row NaN, and no other."""
    monkeypatch.setattr(loss_op, "CPU_TOKENS", 4)
    monkeypatch.setattr(loss_op, "DEVICE_TOKENS", 4)
    monkeypatch.setattr(loss_op, "LOGIT_BYTES", 1)
    h, weight = torch.randn(11, 16).to(dtype), torch.randn(101, 16).to(dtype)
    labels = torch.arange(11).masked_fill(torch.arange(11) % 3 == 0, -100)
    for function in (loss_op.cuda, loss_op.anywhere):
        loss, grad_h, _ = function(*loss_arguments(h, weight, labels))
        wide = h.double().clone().requires_grad_()
        truth = torch.nn.functional.cross_entropy(wide @ weight.double().t(), labels, reduction="sum")
        (expected,) = torch.autograd.grad(truth, wide)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 3e-6
        assert abs(float(loss) - float(truth) / int((labels != -100).sum())) < 3 * tolerance
        assert relative_error(grad_h, expected) < tolerance
        assert (grad_h[::3] == 0).all()
        for strange in (101, -1, 1 << 40):
            bad = labels.clone()
            bad[4] = strange
            loss, bad_grad, _ = function(*loss_arguments(h, weight, bad))
            assert loss.isnan() and bad_grad[4].isnan().all()
            assert torch.equal(torch.cat([bad_grad[:4], bad_grad[5:]]), torch.cat([grad_h[:4], grad_h[5:]]))
