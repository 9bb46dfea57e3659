"""linear_cross_entropy against torch's cross entropy over full fp64 logits."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from cases import GGUF_TYPES
from helpers import gguf_weight, refuses, relative_error
from torch import Tensor

import qlora_native as qn
from qlora_native import _C
from qlora_native.ops import linear_cross_entropy as op

pytestmark = [pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]
Patch = pytest.MonkeyPatch
GRADIENT_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def labels_for(shape: tuple[int, ...], vocabulary: int, ignored: float) -> Tensor:
    labels = torch.randint(vocabulary, shape)
    return torch.where(torch.rand(shape) < ignored, -100, labels)


CASES = [
    *itertools.product(("dense", "nf4"), (0.0, 0.6), ([],)),
    *itertools.product(("dense", "nf4"), (0.3,), ([100, 0, 17],)),
    *((quant_type, 0.6, []) for quant_type in GGUF_TYPES),
]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", list(GRADIENT_TOLERANCE), ids=str)
@pytest.mark.parametrize(("form", "ignored", "replaced"), CASES)
def test_loss_and_gradients(
    monkeypatch: Patch, form: str, ignored: float, replaced: list[int], dtype: torch.dtype
) -> None:
    """The gradient of words with rows of their own is the rows', in fp32, and the weight has none."""
    weight: Any = (torch.randn(101, 64) / 8).to(dtype)
    if form == "dense":
        weight.requires_grad_(not replaced)
    else:
        weight = qn.quantize(weight) if form == "nf4" else gguf_weight(form, (100, 64))
    words = weight.shape[0]
    monkeypatch.setattr(op, "LOGIT_BYTES", 4 * words * 7)  # seven tokens a chunk: the last one is partial
    monkeypatch.setattr(op, "CPU_TOKENS", 7)
    monkeypatch.setattr(op, "DEVICE_TOKENS", 7)
    truth_weight = (weight if form == "dense" else weight.dequantize(dtype)).detach().double()
    h = torch.randn(4, 10, 64).to(dtype).requires_grad_()
    labels = labels_for((4, 10), words, ignored)
    rows = row_ids = None
    if replaced:
        rows, row_ids = torch.randn(len(replaced), 64, requires_grad=True), torch.tensor(replaced)
        truth_weight[row_ids] = rows.detach().to(dtype).double()
        labels[0, : len(replaced)] = row_ids
    truth_weight.requires_grad_()
    loss = qn.linear_cross_entropy(h, weight, labels, rows=rows, row_ids=row_ids)
    (loss * 3).backward()

    wide = h.detach().double().requires_grad_()
    logits = wide.reshape(-1, 64) @ truth_weight.t()
    truth = torch.nn.functional.cross_entropy(logits, labels.reshape(-1))
    (truth * 3).backward()
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(truth)) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert relative_error(h.grad, wide.grad) < GRADIENT_TOLERANCE[dtype]
    if rows is not None:
        assert rows.grad is not None and rows.grad.dtype == torch.float32
        assert relative_error(rows.grad, truth_weight.grad[row_ids]) < GRADIENT_TOLERANCE[dtype]
    elif form == "dense":
        assert relative_error(weight.grad, truth_weight.grad) < GRADIENT_TOLERANCE[dtype]


def test_other_ignore_index_and_ignored_rows_get_no_gradient() -> None:
    h = torch.randn(5, 16, requires_grad=True)
    labels = torch.tensor([1, 0, 2, 0, 3])
    weight = torch.randn(7, 16)
    loss = qn.linear_cross_entropy(h, weight, labels, ignore_index=0)
    loss.backward()
    want = torch.nn.functional.cross_entropy(h.detach() @ weight.t(), labels, ignore_index=0)
    assert abs(float(loss) - float(want)) < 1e-5
    assert h.grad is not None and (h.grad[[1, 3]] == 0).all() and (h.grad[[0, 2, 4]] != 0).any()


def test_nan_where_everything_is_ignored_as_in_torch_and_of_nan() -> None:
    h, weight = torch.randn(3, 16), torch.randn(7, 16)
    assert qn.linear_cross_entropy(h, weight, torch.full((3,), -100)).isnan()
    h[1, 0] = torch.nan
    assert qn.linear_cross_entropy(h, weight, torch.tensor([1, 2, 3])).isnan()


def test_no_gradient_work_without_grad() -> None:
    h = torch.randn(3, 16, requires_grad=True)
    with torch.no_grad():
        loss = qn.linear_cross_entropy(h, torch.randn(7, 16), torch.tensor([1, 2, 3]))
    assert not loss.requires_grad


@pytest.mark.devices("cpu")
def test_full_logits_never_exist() -> None:
    """The largest tensor that the op makes is one chunk of logits."""
    vocabulary, tokens = 50_000, 4_096
    h = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8)
    labels = labels_for((tokens,), vocabulary, 0.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        qn.linear_cross_entropy(h, weight, labels).backward()
    largest = max((event.self_cpu_memory_usage for event in profile.events()), default=0)
    assert 0 < largest < vocabulary * tokens * 4 / 10


@pytest.mark.devices("cpu")
def test_one_chunk_of_logits_at_a_time(monkeypatch: Patch) -> None:
    """A quantized weight's product allocates its own, so those of the chunk before are free by then."""
    monkeypatch.setattr(op, "chunk_tokens", lambda *_: 4)
    made: list[weakref.ref[Tensor]] = []
    product = op._product

    def logits_of(*arguments: Any) -> Tensor:
        assert all(reference() is None for reference in made)
        logits = product(*arguments)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(op, "_product", logits_of)
    qn.linear_cross_entropy(torch.randn(10, 64), qn.quantize(torch.randn(101, 64)), torch.arange(10))
    assert len(made) == 3


def test_a_label_that_is_no_word(request: pytest.FixtureRequest) -> None:
    call = torch.randn(3, 16), torch.randn(7, 16), torch.tensor([1, 7, 2])
    if request.node.callspec.params["device"] == "cpu":
        refuses("labels run from 1 to 7: expected 0 to 6", qn.linear_cross_entropy, *call)
    else:  # nothing waits for the labels
        assert qn.linear_cross_entropy(*call).isnan()


@pytest.mark.devices("cpu")
@pytest.mark.isa
@pytest.mark.parametrize("dtype", list(GRADIENT_TOLERANCE), ids=str)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 33, 4_099])
def test_softmax_of_a_chunk(dtype: torch.dtype, vocabulary: int) -> None:
    """The native sweep against fp64: losses to 1e-6, gradients to their rounding; large and small logits alike."""
    logits = (8 * torch.randn(9, vocabulary)).to(dtype)
    logits[0] += 60
    logits[1] *= 100
    targets, losses = torch.randint(vocabulary, (9,)), torch.empty(9)
    truth = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    gradient = torch.softmax(logits.double(), 1) - torch.nn.functional.one_hot(targets, vocabulary)
    rows = logits.clone()
    for need_gradient in (False, True):
        number = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
        _C.softmax_loss(number, rows.data_ptr(), targets.data_ptr(), 9, vocabulary, need_gradient, losses.data_ptr())
        assert (losses.double() - truth).abs().max() <= 1e-6 * truth.abs().max() + 1e-6
        assert need_gradient or torch.equal(rows, logits)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert ((rows.double() - gradient).abs() <= rounding * gradient.abs() + 2.5e-7).all()
