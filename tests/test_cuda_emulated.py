"""What stands between the ops and the CUDA kernels, executed without a GPU: bindings, plans, streams, device tables.

The op tests themselves run over the emulator too, as `[emulated-...]`; here is what they do not look at.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import emulated
import emulated_torch
import paged
import pytest
import torch
from cases import TOLERANCE
from emulated import Emulator
from emulated_torch import Placed
from helpers import relative_error, same_bytes
from paged import grouped, params_of, same_optimizers
from torch import Tensor

import qlora_native as qn
from qlora_native import reference
from qlora_native.ops import _cuda_kernels, _cuda_products, _library

OPS = torch.ops.qlora_native
GEMV, SPLIT_K, TILE, TWO_STEP = range(4)


def test_it_has_the_functions_of_the_real_module(emulator: Emulator) -> None:
    extra = {"play", "new_stream", "take_launches", "take_reports", "num_schedules", "set_memory", "memory"}
    extra |= {"allocate", "release", "take_managed_counters", "run_streams", "num_queued", "synchronize"}
    extra |= {"set_strict", "add_range", "forget_range", "call_on_stream", "new_event", "record_event", "wait_event"}
    extra |= {"begin_capture", "end_capture", "launch_graph", "destroy_graph"}
    assert {name for name in vars(emulator.module) if not name.startswith("_")} == emulated.names_in_stub() | extra
    assert emulator.module.device_count() == 1


def run_decode() -> None:
    qn.quantize(torch.randn(300, 100)).dequantize()


def run_products() -> None:
    w = qn.quantize(torch.randn(128, 192))
    for m in (3, 40):
        x = torch.randn(m, 192).bfloat16().requires_grad_()
        a, b = torch.randn(4, 192, requires_grad=True), torch.randn(128, 4, requires_grad=True)
        (qn.linear(x, w).sum() + qn.lora_linear(x, w, a, b, 2.0).sum()).backward()


def run_loss() -> None:
    h = torch.randn(9, 64).bfloat16().requires_grad_()
    qn.linear_cross_entropy(h, qn.quantize(torch.randn(101, 64)), torch.arange(9)).backward()


def run_optimizers() -> None:
    for rule, bits in itertools.product(("AdamW", "Adam", "Lion"), (32, 8)):
        params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 4097, 20_000)]
        for param in params:
            param.grad = torch.randn_like(param)
        getattr(qn.optim, rule)(params, lr=1e-2, bits=bits, max_norm=1.0).step()


def run_ops_of_optimizers() -> None:
    lists = [[torch.randn(9000)] for _ in range(4)]
    OPS.adamw_step(*lists, [], [], [torch.zeros(())], 0.1, 0.9, 0.99, 1e-8, 0.0, True, 1.0)
    OPS.lion_step(*lists[:3], [], 0.1, 0.9, 0.99, 0.0, 1.0)
    OPS.gradient_norm([torch.randn(9000)])


RUNS = (run_decode, run_products, run_loss, run_optimizers, run_ops_of_optimizers)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_everything_is_launched_on_the_current_stream(emulator: Emulator, run: Callable[[], None]) -> None:
    emulator.stream = emulator.module.new_stream()
    run()
    launches = emulator.launches()
    assert launches and {stream for _, stream in launches} == {emulator.stream}
    assert max(blocks for blocks, _ in launches) > 1, "a grid of several blocks is wanted"


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_built_in_tables_are_part_of_the_kernels(emulator: Emulator, quant_type: str, double_quant: bool) -> None:
    """Nothing is uploaded, whose memory could be a graph's own; a checkpoint's tables are taken where it has some."""
    w = qn.quantize(torch.randn(300, 100), quant_type=quant_type, double_quant=double_quant)
    weight = w.op_args()
    assert weight.code is None and weight.nested_code is None and weight.pointers()[5:7] == (0, 0)
    assert same_bytes(OPS.dequantize_4bit(torch.float32, *weight), reference.dequantize(torch.float32, *weight))
    own = weight._replace(code=torch.arange(16.0), nested_code=torch.arange(256.0) if double_quant else None)
    assert same_bytes(OPS.dequantize_4bit(torch.float32, *own), reference.dequantize(torch.float32, *own))
    x = torch.randn(3, 100).bfloat16()
    assert relative_error(qn.linear(x, w), x.double() @ w.dequantize(torch.float32).double().t()) < 1e-2


def plan_of(
    m: int, n: int, k: int, r: int, dtype: int, forward: bool, always_fused: bool = False
) -> _cuda_products.Plan:
    module = _cuda_kernels.native(torch.device("cpu"))
    assert module is not None
    sizes = _cuda_products.Sizes(m, n, k, r, 64, dtype, forward)
    return _cuda_products.plan_of(module, sizes, torch.device("cpu"), always_fused=always_fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "forward", "kind"),
    [
        (1, 96, 128, True, GEMV),
        (8, 130, 192, True, GEMV),
        (16, 64, 1024, True, GEMV),
        (17, 64, 1024, True, SPLIT_K),
        (33, 192, 128, True, TILE),
        (5, 1024, 64, False, SPLIT_K),
        (70, 128, 320, False, TILE),
        (513, 64, 64, True, TWO_STEP),
        (9, 64, 65, True, TWO_STEP),
        (9, 67, 64, False, TWO_STEP),
    ],
)
def test_each_kind_of_plan(
    emulator: Emulator, m: int, n: int, k: int, forward: bool, kind: int, dtype: torch.dtype
) -> None:
    """With an adapter inside, and in each order of threads."""
    w = qn.quantize(torch.randn(n, k) / k**0.5)
    dense = reference.dequantize(dtype, *w.op_args()).double()
    a, b = torch.randn(8, k).to(dtype) / k**0.5, torch.randn(n, 8).to(dtype)
    x, bias = torch.randn(m, k if forward else n).to(dtype), torch.randn(n).to(dtype)
    number = {torch.bfloat16: 1, torch.float16: 2}[dtype]
    assert plan_of(m, n, k, 8, number, forward).kind == kind
    for schedule in range(emulator.module.num_schedules):
        emulator.play(schedule)
        if forward:
            y, xa = OPS.lora_linear_4bit(x, None, a, b, 0.5, bias, *w.op_args())
            truth = x.double() @ dense.t() + bias.double() + xa.double() @ (b * 0.5).double().t()
        else:
            xa = torch.zeros(m, 8, dtype=dtype)
            tokens = torch.randn(m, k).to(dtype)
            needed = [True, False, False, False]
            y = OPS.lora_linear_4bit_backward(x, tokens, xa, a, b, 0.5, False, needed, *w.op_args())[0]
            truth = x.double() @ dense + (0.5 * (x.double() @ b.double())) @ a.double()
        assert relative_error(y, truth) < 2 * TOLERANCE[dtype], schedule


def test_the_fused_kernels_can_be_asked_for(emulator: Emulator) -> None:
    assert [plan_of(4096, 64, 128, 0, 1, True, fused).kind for fused in (False, True)] == [TWO_STEP, TILE]


def test_an_older_card_multiplies_bf16_in_two_steps(emulator: Emulator) -> None:
    emulator.facts = _cuda_kernels.Facts(75, 4)
    emulator.play(0)
    assert plan_of(4, 64, 128, 0, 1, True).kind == TWO_STEP
    assert plan_of(4, 64, 128, 0, 2, True).kind == GEMV
    w = qn.quantize(torch.randn(64, 128))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(4, 128).to(dtype)
        truth = x.double() @ reference.dequantize(dtype, *w.op_args()).double().t()
        assert relative_error(qn.linear(x, w), truth) < TOLERANCE[dtype]


def test_addresses_that_allow_no_vectors(emulator: Emulator) -> None:
    w = qn.quantize(torch.randn(64, 128))
    dense = reference.dequantize(torch.bfloat16, *w.op_args()).double()
    x = torch.randn(4 * 128 + 1).bfloat16()[1:].view(4, 128)
    assert relative_error(qn.linear(x, w), x.double() @ dense.t()) < TOLERANCE[torch.bfloat16]
    w.packed = torch.cat([w.packed[:1], w.packed])[1:]
    assert relative_error(qn.linear(x, w), x.double() @ dense.t()) < TOLERANCE[torch.bfloat16]


CALL: dict[str, Any] = {
    "forward": True, "dtype": 1, "x": 4096, "bias": 0, "low": 0, "up": 0, "r": 0, "y": 4096, "m": 1, "n": 64, "k": 64,
    "plan": [0, 4, 16, 1, 0, 0, 0], "workspace": 0, "workspace_bytes": 0, "stream": 0, "weight": {"numel": 4096},
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"x": 4104}, "not aligned to 16 bytes"),
        ({"x": 0}, "x is a null pointer, but 64"),
        ({"numel": 4097}, "number of elements is not n \\* k"),
        ({"r": 4}, "has both factors"),
        ({"m": 0}, "m, n, k or r is out of range"),
        ({"forward": False, "bias": 4096}, "input gradient has no bias"),
        ({"plan": [3, 0, 0, 1, 0, 0, 0]}, "plan has no fused kernel"),
        ({"plan": [1, 16, 64, 4, 4, 0, 4096]}, "workspace is smaller than"),
    ],
)
def test_a_product_is_checked_at_the_boundary(emulator: Emulator, wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        emulator.module.linear_4bit(**emulated.arguments(CALL, **wrong))


def test_workspaces_are_checked_at_the_boundary(emulator: Emulator) -> None:
    module = emulator.module
    with pytest.raises(ValueError, match="the workspace is too small"):
        module.gradient_norm(0, 4096, 0, 4, 4096, module.gradient_norm_workspace(4) - 1, 4096, 0)
    with pytest.raises(ValueError, match="the workspace is too small"):
        module.quantize_scales(4096, 300, 4096, 4096, 4096, 4096, module.quantize_scales_workspace(300) - 1, 0)
    with pytest.raises(ValueError, match="tensors is a null pointer"):
        module.gradient_norm(0, 0, 1, 0, 4096, 1 << 20, 4096, 0)
    with pytest.raises(ValueError, match="quant_type is 2"):
        module.quantize_4bit(0, 4096, 64, 64, 2, 4096, 4096, 4096, 0)


def give_grads(number: int, scale: float, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        paged.give_grads(params_of(optimizer), number, scale, skip=False)


@pytest.fixture
def num_launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call a function on the emulated device, and count the launches."""
    module = emulated.module_or_skip(request.config)

    def call(function: Callable[[], object]) -> int:
        with monkeypatch.context() as patch, emulated.kernels(module, patch) as emulator:
            function()
            return len(emulator.launches())

    return call


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rule", ["AdamW", "Adam", "Lion"])
def test_a_step_on_a_device_gives_the_bytes_of_the_cpu(num_launches: Callable[..., int], rule: str, bits: int) -> None:
    """Clipped steps of several groups, learning rates that change, and a step that is skipped; two launches each."""
    there, here = (grouped(rule, bits=bits, max_norm=1.0) for _ in range(2))
    for step, scale in enumerate((1.0, 1e-3, float("nan"), 1.0)):
        give_grads(step, scale, there, here)
        for optimizer in (there, here):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        here.step()
        assert num_launches(there.step) == 2
        assert there.skipped == here.skipped == (scale != scale)
        assert there.grad_norm == here.grad_norm or scale != scale
        assert same_optimizers(there, here), step


def test_gradient_scaler_is_heeded_on_the_device(num_launches: Callable[..., int]) -> None:
    there, here = (grouped("AdamW") for _ in range(2))
    for step, found_inf in enumerate((0.0, 1.0)):
        give_grads(step, 1024.0, there, here)
        for optimizer in (there, here):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(found_inf)
        here.step()
        assert num_launches(there.step) == 1
        assert there.skipped == here.skipped == bool(found_inf)
        assert same_optimizers(there, here)


def test_ops_that_wait_for_the_device_are_kept_out_of_graphs() -> None:
    tagged = {
        name
        for name in _library.SCHEMAS
        if torch.Tag.cudagraph_unsafe
        in getattr(getattr(OPS, name.split(".")[0]), (name + ".default").split(".")[1]).tags
    }
    assert tagged >= {"quantize_4bit", "search_scales_4bit", "gradient_norm", "adamw_step", "lion_step"}
    assert not tagged & {"linear_4bit", "linear_4bit_grad_input", "lora_linear_4bit", "dequantize_4bit", "rms_norm"}


def test_rows_of_a_graph_are_kept_and_a_later_step_writes_its_own(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph copies from host memory at every replay, over what the eager steps between them wrote."""
    optimizer: Any = grouped("AdamW")
    give_grads(0, 1.0, optimizer)
    optimizer.step()
    assert optimizer._table is not None and optimizer._table.on_device is not None
    table = optimizer._table.on_device
    address = table.options.data_ptr()
    with monkeypatch.context() as patch:
        patch.setattr(_cuda_kernels, "is_capturing", lambda device: True)
        optimizer.step()
    (source,) = table.of_graphs
    assert source.tolist() == table.tensors.tolist() == optimizer._table.rows.tolist()
    table.tensors.zero_()  # as a replay of some other rows would leave it
    optimizer.step()
    assert table.tensors.tolist() == optimizer._table.rows.tolist()
    assert table.of_graphs == [source] and table.options.data_ptr() == address


# ---------------------------------------------------------------------------------------------------------------------
# Whose memory the kernels read, as the ops call them: every access looked at, every tensor with its exact bounds


@pytest.fixture
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Placed]:
    module = emulated.module_or_skip(request.config, "_cuda_emulated_checked")
    with emulated.kernels(module, monkeypatch) as emulator, emulated_torch.placed(emulator) as found:
        yield found


def report_of(memory: Placed, call: Callable[[], object]) -> str:
    """What the emulator says of a call that must fail."""
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        call()
    report: str = memory.module.take_reports()
    return report


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_kernels_stay_within_what_the_ops_give_them(memory: Placed, run: Callable[[], None]) -> None:
    run()


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def loss(w: qn.QuantizedWeight, labels: Tensor) -> object:
    return qn.linear_cross_entropy(bf16(9, 128), w, labels)


@pytest.mark.parametrize(
    ("call", "operand", "words"),
    [
        (loss, torch.arange(9), r"linear_cross_entropy\.cuh.*72 bytes of memory of"),
        (lambda w, bias: qn.linear(bf16(3, 128), w, bias), bf16(64), "128 bytes of memory of"),
        (lambda w, bias: qn.linear(bf16(40, 128), w, bias), bf16(64), "128 bytes of memory of"),
        (lambda w, b: qn.lora_linear(bf16(3, 128), w, bf16(8, 128), b, 2.0), bf16(64, 8), "memory of the host"),
    ],
    ids=["labels", "bias of few tokens", "bias of many", "adapter"],
)
def test_an_operand_on_the_host(memory: Placed, call: Callable[..., object], operand: Tensor, words: str) -> None:
    w = qn.quantize(torch.randn(64, 128))
    call(w, operand.clone())
    report = report_of(memory, lambda: call(w, memory.host(operand)))
    assert re.search(words, report), report


def test_int32_labels(memory: Placed, monkeypatch: pytest.MonkeyPatch) -> None:
    """To an op without the check of its operands: 36 bytes are read as 72."""
    kernel = inspect.unwrap(_library.IMPLEMENTATIONS["linear_cross_entropy", "CUDA"])
    monkeypatch.setitem(_library.IMPLEMENTATIONS, ("linear_cross_entropy", "CUDA"), kernel)
    w = qn.quantize(torch.randn(64, 128))
    loss(w, torch.arange(9))
    report = report_of(memory, lambda: loss(w, torch.arange(9, dtype=torch.int32)))
    assert "byte 32 of a device allocation" in report
