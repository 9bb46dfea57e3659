"""What stands between the ops and the CUDA kernels, executed without a GPU: bindings, plans, streams, device tables.

The op tests themselves run over the emulator too, as `[emulated-...]`; here is what they do not look at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from cases import TOLERANCE
from emulated import Emulator
from helpers import relative_error, same_bytes
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


@pytest.mark.parametrize(
    "run", [run_decode, run_products, run_loss, run_optimizers, run_ops_of_optimizers], ids=lambda run: run.__name__
)
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


def same(*twins: torch.optim.Optimizer) -> bool:
    states = [[*map(Tensor.detach, params_of(o)), *(t for s in o.state.values() for t in s.values())] for o in twins]
    return all(same_bytes(x, y) for x, y in zip(*states, strict=True))


def twins(rule: str, **options: object) -> tuple[qn.optim.AdamW, qn.optim.AdamW]:
    """Two optimizers, groups of their own learning rates, over equal parameters of all dtypes."""
    sizes = (5, 4097, 20_000)
    start = [torch.randn(n).to(dtype) for dtype in (torch.float32, torch.bfloat16) for n in sizes]
    made = []
    for _ in "ab":
        params = [torch.nn.Parameter(t.clone()) for t in start]
        groups = [{"params": params[:4], "lr": 1e-2}, {"params": params[4:], "lr": 3e-3, "weight_decay": 0.1}]
        made.append(getattr(qn.optim, rule)(groups, **options))
    return made[0], made[1]


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_grads(there: torch.optim.Optimizer, here: torch.optim.Optimizer, scale: float) -> None:
    for one, other in zip(params_of(there), params_of(here), strict=True):
        grad = (torch.randn(one.shape) * scale).to(one.dtype)
        one.grad, other.grad = grad, grad.clone()


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
    there, here = twins(rule, bits=bits, max_norm=1.0)
    for step, scale in enumerate((1.0, 1e-3, float("nan"), 1.0)):
        give_grads(there, here, scale)
        for optimizer in (there, here):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        here.step()
        assert num_launches(there.step) == 2
        assert there.skipped == here.skipped == (scale != scale)
        assert there.grad_norm == here.grad_norm or scale != scale
        assert same(there, here), step


def test_gradient_scaler_is_heeded_on_the_device(num_launches: Callable[..., int]) -> None:
    there, here = twins("AdamW", bits=32)
    for found_inf in (0.0, 1.0):
        give_grads(there, here, 1024.0)
        for optimizer in (there, here):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(found_inf)  # type: ignore[attr-defined]
        here.step()
        assert num_launches(there.step) == 1
        assert there.skipped == here.skipped == bool(found_inf)
        assert same(there, here)


def test_gradients_of_another_dtype_take_the_reference(emulator: Emulator) -> None:
    param, other, grad = torch.ones(300).bfloat16(), torch.ones(300).bfloat16(), torch.randn(300)
    states = [torch.zeros(300)], [torch.zeros(300)]
    OPS.adamw_step([param], [grad], *states, [], [], [torch.zeros(())], 0.1, 0.9, 0.99, 1e-8, 0.0, True, 1.0)
    assert emulator.launches() == []
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "decoupled": True}
    state = torch.zeros(300), torch.zeros(300), None, None, torch.zeros(())
    reference.adamw_step(other, grad, *state, grad_factor=1.0, **options)  # type: ignore[arg-type]
    assert same_bytes(param, other)


def test_ops_that_wait_for_the_device_are_kept_out_of_graphs() -> None:
    tagged = {
        name
        for name in _library.SCHEMAS
        if torch.Tag.cudagraph_unsafe
        in getattr(getattr(OPS, name.split(".")[0]), (name + ".default").split(".")[1]).tags
    }
    assert tagged >= {"quantize_4bit", "search_scales_4bit", "gradient_norm", "adamw_step", "lion_step"}
    assert not tagged & {"linear_4bit", "linear_4bit_grad_input", "lora_linear_4bit", "dequantize_4bit", "rms_norm"}


@pytest.mark.parametrize("rule", ["AdamW", "Adam", "Lion"])
def test_a_captured_step_reads_the_learning_rate_of_its_replay(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """A replay launches the same kernels with the same arguments; bytes as of eager steps, whose count goes on."""
    captured, eager = twins(rule, bits=8, max_norm=1.0)
    launched: list[Callable[[], None]] = []
    capturing = [False]

    def recording(name: str) -> Callable[..., None]:
        launch = getattr(emulator.module, name)

        def call(*arguments: Any) -> None:
            if capturing[0]:
                launched.append(lambda: launch(*arguments))
            else:
                launch(*arguments)

        return call

    for name in ("gradient_norm", "lion_step" if rule == "Lion" else "adamw_step"):
        monkeypatch.setattr(emulator.module, name, recording(name))
    monkeypatch.setattr(_cuda_kernels, "is_capturing", lambda device: capturing[0])
    give_grads(captured, eager, 1.0)
    capturing[0] = True
    with pytest.raises(RuntimeError, match="run one step"):
        captured.step()
    capturing[0] = False
    captured.step()
    eager.step()
    give_grads(captured, eager, 1.0)  # at other addresses, which the graph's own copy brings
    capturing[0] = True
    captured.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="call write_options"):
        captured.step()
    capturing[0] = False
    captured.param_groups[0]["lr"] = 1e-2
    launched.clear()
    capturing[0] = True
    captured.step()
    capturing[0] = False
    for step in range(3):
        for optimizer in (captured, eager):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.param_groups[1]["betas"] = (0.9 - 0.1 * step, 0.99)
        captured.write_options()
        for launch in launched:
            launch()
        eager.step()
        assert same(captured, eager), step
    give_grads(captured, eager, 1.0)  # a step after replays goes by its own gradients
    for optimizer in (captured, eager):
        optimizer.step()
    assert same(captured, eager)


def test_rows_of_a_graph_are_kept_and_a_later_step_writes_its_own(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph copies from host memory at every replay, over what the eager steps between them wrote."""
    optimizer, other = twins("AdamW", bits=32)
    give_grads(optimizer, other, 1.0)
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
