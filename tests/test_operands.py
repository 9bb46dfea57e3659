"""No op reads past an operand: of every call, each tensor in turn is of another dtype, size or device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
from calls import CALLS, op_of, overload_of, places, with_other
from helpers import refuses
from torch import Tensor

import qlora_native as qn
from qlora_native.ops import _cuda_kernels
from qlora_native.ops._library import IMPLEMENTATIONS, SCHEMAS
from qlora_native.ops._operands import TABLE


def test_what_may_be_none_is_what_the_schema_has_so() -> None:
    for op, schema in SCHEMAS.items():
        kinds = {words.split()[-1]: words.split()[0] for words in schema[1 : schema.index(") ->")].split(", ")}
        for operand in TABLE[op]:
            may_be_none = operand.name == "packed" or kinds[operand.name] == "Tensor?"  # packed: where it is dense
            assert operand.is_optional == may_be_none, (op, operand.name)


def test_every_native_function_is_called() -> None:
    import operands

    assert operands.native_names() == {*operands.NATIVE}


# What an op is asked to take apart, whatever its size.
OF_ANY_SIZE = {("quantize_4bit", 0), ("gradient_norm", 0), ("search_scales_4bit", 2), ("experts_4bit", 1)}
# Biases and adapters are cast, as rows of a head, and gradients to the dtype of their parameters.
OF_ANY_FLOAT = {
    *(("adamw_step", 1), ("lion_step", 1), ("linear_4bit", 1), ("dense_linear", 2), ("linear_cross_entropy", 5)),
    *(("lora_linear_4bit", i) for i in (2, 3, 5)),
    *(("lora_linear_4bit_backward", i) for i in (3, 4)),
    *(("experts_4bit", i) for i in (3, 4)),
    *(("experts_4bit_backward", i) for i in (4, 5)),
}


def wrong_twins(op: str, i: int, tensor: Tensor) -> Iterator[Tensor]:
    yield tensor.to(torch.int32 if tensor.dtype != torch.int32 else torch.int64)
    if tensor.is_floating_point() and i != 0 and (op, i) not in OF_ANY_FLOAT:
        yield tensor.double() if tensor.dim() else tensor.int()
    if tensor.numel() and (op, i) not in OF_ANY_SIZE:
        yield torch.cat([tensor.reshape(-1)] * 2)[: tensor.numel() + 1].clone()
        yield tensor.reshape(-1)[: tensor.numel() - 1].clone()
        if tensor.dim() > 1 and (op, i) != ("dense_linear_grad_weight", 0):  # of any N
            yield tensor[: tensor.shape[0] - 1].clone() if i else tensor[..., :-1].clone()


@pytest.mark.parametrize("call", CALLS)
def test_an_operand_that_does_not_fit_is_refused(call: str) -> None:
    """In a sentence that begins with the op and says what was given, or which operand it does not fit."""
    op, arguments = op_of(call), CALLS[call]()
    others = "|".join(operand.name for operand in TABLE[op])
    overload_of(call)(*arguments)
    for i, inner, tensor in places(arguments):
        for wrong in wrong_twins(op, i, tensor):
            given = re.escape(str(wrong.dtype if wrong.dtype != tensor.dtype else list(wrong.shape)))
            sentence = rf"^({op}: |quantized weight ).*{given}|^{op}: ({others}) is .*: expected "
            refuses(sentence, overload_of(call), *with_other(CALLS[call](), i, inner, wrong))


@pytest.mark.parametrize("call", CALLS)
def test_an_operand_on_another_device_is_refused(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels of a CUDA device, too, before they load anything; and where shapes are traced."""

    def no_kernel(*_: Any) -> None:
        raise AssertionError("the operands are checked first")

    monkeypatch.setattr(_cuda_kernels, "native", no_kernel)
    arguments = CALLS[call]()
    found = list(places(arguments))
    if len(found) == 1 or any(inner is not None for _, inner, _ in found):
        return
    by_schema = IMPLEMENTATIONS.get((op_of(call), "CUDA"))
    for i, inner, tensor in found:
        for kernel in filter(None, (overload_of(call), by_schema)):
            with pytest.raises(ValueError, match="on meta|on cpu"):
                kernel(*with_other(CALLS[call](), i, inner, tensor.to("meta")))


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
        qn.linear_cross_entropy(torch.randn(3, 64), torch.randn(48, 64), torch.arange(3, dtype=torch.int32))
    sentence(found.value)


def test_a_broadcast_rstd_is_read_within_its_bounds() -> None:
    """Its memory holds one number, and the kernel reads one a row."""
    rows = torch.randn(4096, 8)
    rstd, ones = torch.full((1,), 2.0).expand(4096), torch.ones(8)
    backward = torch.ops.qlora_native.rms_norm_backward
    assert torch.equal(backward(rows, rows, ones, rstd, 1e-5), backward(rows, rows, ones, rstd.clone(), 1e-5))


OTHER_DATA = r"parameter 0 is \[{0}\], its state exp_avg .*\[5000\] .*expected .* \[{0}\]"


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rule", ["AdamW", "Lion"])
def test_states_of_other_data_are_refused(rule: str, bits: int) -> None:
    """Fewer elements would be written out of bounds, and a narrower dtype too."""
    param = torch.nn.Parameter(torch.randn(5000))
    optimizer = getattr(qn.optim, rule)([param], bits=bits)

    def step(data: Tensor, grad: Tensor) -> None:
        param.data, param.grad = data, None
        param.grad = grad
        optimizer.step()

    step(param.data, torch.randn(5000))
    for size in (10, 6000):
        with pytest.raises(ValueError, match=OTHER_DATA.format(size)):
            step(torch.zeros(size), torch.zeros(size))
    before = torch.randn(5000).bfloat16()
    step(before.clone(), torch.randn(5000).bfloat16())  # another dtype is no other size
    assert not torch.equal(param.data, before) and param.dtype == torch.bfloat16
    assert param.grad is not None
    param.grad.data = torch.zeros(10).bfloat16()
    with pytest.raises(ValueError, match=r"its gradient \[10\]"):
        optimizer.step()
    param.grad = None
    param.grad = torch.randn(5000).bfloat16()
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"][:4000].clone()
    with pytest.raises(ValueError, match=r"its state exp_avg .* \[4000\] .*expected .* \[5000\]"):
        optimizer.step()
