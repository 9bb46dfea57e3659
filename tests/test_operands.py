"""No op reads past an operand: of every call, each tensor in turn is of another dtype, size or device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
from helpers import gguf_weight
from torch import Tensor

import qlora_native as qn
from qlora_native.ops import _cuda_kernels
from qlora_native.ops._library import IMPLEMENTATIONS, SCHEMAS
from qlora_native.ops._operands import TABLE

M, N, K, R = 3, 48, 64, 4


def weight(double_quant: bool = True) -> list[Any]:
    return list(qn.quantize(torch.randn(N, K), double_quant=double_quant).op_args())


def blocks(quant_type: str) -> list[Any]:
    return list(gguf_weight(quant_type, (N, K)).op_args())


def heads(count: int) -> Tensor:
    return torch.randn(2, count, 5, 16)


def moments(*dtypes: torch.dtype) -> list[list[Tensor]]:
    return [[torch.zeros(300, dtype=dtype)] for dtype in dtypes]


x, y, low = torch.randn(M, K), torch.randn(M, N), torch.randn(M, R)
a, b, bias = torch.randn(R, K), torch.randn(N, R), torch.randn(N)
q, k, fp32 = heads(4), heads(2), torch.float32

CALLS: dict[str, Callable[[], list[Any]]] = {
    "quantize_4bit": lambda: [x, 0, 64, True],
    "search_scales_4bit": lambda: [
        *(x, torch.rand(K), torch.rand(8), torch.rand(M), torch.zeros(1), torch.zeros(M, dtype=torch.uint8)),
        *(1, 0.5, 1.5, 0, 64),
    ],
    "gptq_4bit": lambda: [x, torch.eye(K), torch.arange(K), torch.ones(M), 0, 64],
    "dequantize_4bit": lambda: [torch.bfloat16, *weight()],
    "dequantize_4bit.out": lambda: [torch.empty(N, K), *weight()],
    "linear_4bit": lambda: [x, bias, *weight()],
    "linear_4bit_grad_input": lambda: [y, *weight(False)],
    "lora_linear_4bit": lambda: [x, x.clone(), a, b, 2.0, bias, *weight()],
    "lora_linear_4bit_backward": lambda: [y, x, low, a, b, 2.0, False, [True, False, True, True], *weight()],
    "dense_linear": lambda: [x.half(), torch.randn(N, K).half(), bias],
    "dense_linear_grad_input": lambda: [y.half(), torch.randn(N, K).half()],
    "dense_linear_grad_weight": lambda: [y.half(), x.half()],
    "linear_cross_entropy": lambda: [x, torch.arange(M), -100, True, False, None, None, *weight()],
    "dequantize_4bit q4_0": lambda: [torch.bfloat16, *blocks("q4_0")],
    "dequantize_4bit.out q4_k": lambda: [torch.empty(N, K), *blocks("q4_k")],
    "linear_4bit q8_0": lambda: [x, bias, *blocks("q8_0")],
    "linear_4bit q4_1": lambda: [x.bfloat16(), bias, *blocks("q4_1")],
    "linear_4bit_grad_input q5_k": lambda: [y, *blocks("q5_k")],
    "lora_linear_4bit q5_1": lambda: [x, x.clone(), a, b, 2.0, bias, *blocks("q5_1")],
    "lora_linear_4bit_backward q5_0": lambda: [
        *(y, x, low, a, b, 2.0, False, [True, False, True, True]),
        *blocks("q5_0"),
    ],
    "linear_cross_entropy q6_k": lambda: [x, torch.arange(M), -100, True, False, None, None, *blocks("q6_k")],
    "linear_cross_entropy iq4_nl": lambda: [x, torch.arange(M), -100, True, False, None, None, *blocks("iq4_nl")],
    "linear_cross_entropy dense": lambda: [
        *(x, torch.arange(M), -100, True, True, torch.randn(R, K), torch.arange(R)),
        *(torch.randn(N, K), None, None, None, None, None, [N, K], 0, 64),
    ],
    "adamw_step": lambda: [
        *moments(fp32, fp32, torch.int8, torch.uint8), [torch.zeros(2)], [torch.zeros(2)], [torch.zeros(())],
        *(0.1, 0.9, 0.99, 1e-8, 0.0, True, 1.0),
    ],
    "lion_step": lambda: [*moments(fp32, fp32, fp32), [], 0.1, 0.9, 0.99, 0.0, 1.0],
    "gradient_norm": lambda: [[x, y]],
    "causal_attention": lambda: [q, k, k.clone(), 0.25],
    "causal_attention_backward": lambda: [q, q, k, k.clone(), q, torch.randn(2, 4, 5), 0.25],
    "rms_norm": lambda: [x, torch.ones(K), 1e-5],
    "rms_norm_backward": lambda: [x, x, torch.ones(K), torch.ones(M), 1e-5],
    "rotary": lambda: [q, torch.randn(1, 5, 16), torch.randn(1, 5, 16), False],
    "swiglu": lambda: [x, x.clone()],
    "swiglu_backward": lambda: [x, x.clone(), x.clone()],
}  # fmt: skip


def test_every_op_is_called() -> None:
    assert {name.split()[0] for name in CALLS} == {*SCHEMAS}


def test_what_may_be_none_is_what_the_schema_has_so() -> None:
    for op, schema in SCHEMAS.items():
        kinds = {words.split()[-1]: words.split()[0] for words in schema[1 : schema.index(") ->")].split(", ")}
        for operand in TABLE[op]:
            may_be_none = operand.name == "packed" or kinds[operand.name] == "Tensor?"  # packed: where it is dense
            assert operand.is_optional == may_be_none, (op, operand.name)


def test_every_native_function_is_called() -> None:
    import operands

    assert operands.native_names() == {*operands.NATIVE}


def run(call: str, arguments: list[Any], device: str = "CPU") -> Any:
    name = call.split()[0]
    if device == "CUDA":
        return IMPLEMENTATIONS[name, device](*arguments)
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.qlora_native, packet), overload or "default")(*arguments)


def places(arguments: list[Any]) -> Iterator[tuple[int, int | None, Tensor]]:
    """Where the tensors of a call stand: the argument's number, and the number in its list."""
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            yield i, None, value
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            yield i, 0, value[0]


def is_defining(call: str, i: int) -> bool:
    """Whether an argument may be any float of any size, as what the op is asked to take apart."""
    return (call.split()[0], i) in {("quantize_4bit", 0), ("gradient_norm", 0), ("search_scales_4bit", 2)}


def wrong_twins(call: str, i: int, tensor: Tensor) -> Iterator[Tensor]:
    yield tensor.to(torch.int32 if tensor.dtype != torch.int32 else torch.int64)
    if tensor.is_floating_point() and i != 0:
        yield tensor.double() if tensor.dim() else tensor.int()
    if tensor.numel() and not is_defining(call, i):
        yield torch.cat([tensor.reshape(-1)] * 2)[: tensor.numel() + 1].clone()
        yield tensor.reshape(-1)[: tensor.numel() - 1].clone()
        if tensor.dim() > 1 and (call, i) != ("dense_linear_grad_weight", 0):  # of any N
            yield tensor[: tensor.shape[0] - 1].clone() if i else tensor[..., :-1].clone()


FLOAT_OF_ANY_KIND = {
    ("adamw_step", 1),
    ("lion_step", 1),
    ("linear_4bit", 1),
    ("dense_linear", 2),
    ("lora_linear_4bit", 5),
    ("linear_cross_entropy", 5),
}  # biases are cast, as rows of a head
FLOAT_OF_ANY_KIND |= {(op, i) for op, first in (("lora_linear_4bit", 2), ("lora_linear_4bit_backward", 3))
                      for i in (first, first + 1)}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_an_operand_that_does_not_fit_is_refused(call: str) -> None:
    arguments = CALLS[call]()
    run(call, arguments)
    for i, inner, tensor in places(arguments):
        for wrong in wrong_twins(call, i, tensor):
            if wrong.dtype == torch.float64 and (call.split()[0], i) in FLOAT_OF_ANY_KIND:
                continue
            given = CALLS[call]()
            given[i] = wrong if inner is None else [wrong, *given[i][1:]]
            what = f"argument {i}: {wrong.dtype} {list(wrong.shape)} in place of {tensor.dtype} {list(tensor.shape)}"
            try:
                run(call, given)
            except ValueError as error:
                if re.match(rf"{call.split()[0]}: |quantized weight ", str(error)):
                    continue
                raise
            pytest.fail(f"{call} took {what}")


@pytest.mark.parametrize("call", CALLS)
def test_an_operand_on_another_device_is_refused(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels of a CUDA device, too, before they load anything; and where shapes are traced."""

    def no_kernel(*_: Any) -> None:
        raise AssertionError("the operands are checked first")

    monkeypatch.setattr(_cuda_kernels, "native", no_kernel)
    arguments = CALLS[call]()
    found = list(places(arguments))
    lists = any(inner is not None for _, inner, _ in found)
    for i, inner, tensor in found if len(found) > 1 and not lists else []:
        for device in ("CPU", "CUDA") if (call.split()[0], "CUDA") in IMPLEMENTATIONS else ("CPU",):
            given = CALLS[call]()
            given[i] = tensor.to("meta") if inner is None else [tensor.to("meta"), *given[i][1:]]
            with pytest.raises(ValueError, match="on meta|on cpu"):
                run(call, given, device)


def test_other_operands_are_refused_or_right(
    tmp_path: Path, record_property: Callable[[str, object], None], pytestconfig: pytest.Config
) -> None:
    """Every tensor and every number of every call is replaced by others, in processes of their own: operands.py."""
    found = workers.outcomes("operands.py", tmp_path, pytestconfig.getoption("--every-operand"))
    count, wrong = workers.summary(found)
    record_property("operands replaced", count)
    assert len(found) >= 3000 and not wrong, "\n".join([count, *wrong])


def test_the_sentence_names_the_operand(sentence: Any) -> None:
    with pytest.raises(ValueError) as found:
        qn.linear_cross_entropy(x, torch.randn(N, K), torch.arange(M, dtype=torch.int32))
    sentence(found.value)


def test_a_broadcast_rstd_is_read_within_its_bounds() -> None:
    """Its memory holds one number, and the kernel reads one a row."""
    rows = torch.randn(4096, 8)
    rstd, ones = torch.full((1,), 2.0).expand(4096), torch.ones(8)
    backward = torch.ops.qlora_native.rms_norm_backward
    assert torch.equal(backward(rows, rows, ones, rstd, 1e-5), backward(rows, rows, ones, rstd.clone(), 1e-5))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rule", ["AdamW", "Lion"])
def test_states_of_other_data_are_refused(rule: str, bits: int) -> None:
    """Fewer elements would be written out of bounds, and a narrower dtype too."""
    param = torch.nn.Parameter(torch.randn(5000))
    optimizer = getattr(qn.optim, rule)([param], bits=bits)

    def step(data: Tensor, grad: Tensor) -> None:
        param.data = data
        param.grad = None
        param.grad = grad
        optimizer.step()

    step(param.data, torch.randn(5000))
    with pytest.raises(ValueError, match=r"parameter 0 is \[10\], its state exp_avg .*\[5000\] .*expected .* \[10\]"):
        step(torch.zeros(10), torch.zeros(10))
    with pytest.raises(ValueError, match=r"is \[6000\], its state exp_avg .*\[5000\] .*expected .* \[6000\]"):
        step(torch.zeros(6000), torch.zeros(6000))
    before = torch.randn(5000).bfloat16()
    step(before.clone(), torch.randn(5000).bfloat16())  # another dtype is no other size
    assert not torch.equal(param.data, before) and param.dtype == torch.bfloat16


def test_a_gradient_of_other_data_is_refused() -> None:
    param = torch.nn.Parameter(torch.randn(5000))
    param.grad = torch.randn(5000)
    optimizer = qn.optim.AdamW([param])
    optimizer.step()
    param.grad.data = torch.zeros(10)
    with pytest.raises(ValueError, match=r"its gradient \[10\]"):
        optimizer.step()


def test_a_state_of_another_size_is_refused() -> None:
    param = torch.nn.Parameter(torch.randn(5000))
    param.grad = torch.randn(5000)
    optimizer = qn.optim.AdamW([param])
    optimizer.step()
    optimizer.state[param]["exp_avg_sq"] = torch.zeros(4000)
    with pytest.raises(ValueError, match=r"its state exp_avg_sq torch.float32 \[4000\] .*expected .* \[5000\]"):
        optimizer.step()
