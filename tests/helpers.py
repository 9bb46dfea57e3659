"""What several tests need: comparisons by bit and by relative error."""

from __future__ import annotations

import io
import multiprocessing
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qlora_native as qn
from qlora_native import _C, reference
from qlora_native.weight import TENSOR_FIELDS

# For tests whose page files lie in pytest's temporary folder.
needs_page_files = pytest.mark.skipif(
    sys.platform != "linux" or _C.lies_in_memory(tempfile.gettempdir()),
    reason="page files are Linux's, and the folder for temporary files is to be on a disk",
)


def demo_model_or_skip() -> Path:
    """The demo's model, from the cache or from its package."""
    from qlora_native.tool.cli.demo_model import available_model_file

    file = available_model_file()
    if file is None:
        pytest.skip("no demo model in the cache: `qlora demo` fetches it")
    return file


def program(name: str) -> str:
    """The path of a program, without which the test is skipped."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on PATH")
    return found


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Collects what autograd keeps for backward while it is entered."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        super().__init__(self._keep, lambda t: t)

    def _keep(self, t: torch.Tensor) -> torch.Tensor:
        self.tensors.append(t)
        return t

    def __enter__(self) -> SavedTensors:  # type: ignore[override]
        super().__enter__()
        return self


def signed(w: qn.QuantizedWeight) -> qn.QuantizedWeight:
    """The same codes under scales of which every other one is negative; a nested offset near 0 comes of itself."""
    scales = w.scales().clone()
    scales[::2].neg_()
    signed_w = w.to(w.device)
    signed_w.absmax = scales
    if w.double_quant:
        signed_w.absmax, signed_w.nested_absmax, signed_w.nested_offset = reference.quantize_scales(scales)
    return signed_w


# Where the scale and the minimum of a GGUF block lie, and the most that each is multiplied by.
HALVES = {
    "q4_0": {0: 8}, "q4_1": {0: 15, 2: 1}, "q5_0": {0: 16}, "q5_1": {0: 31, 2: 1}, "q8_0": {0: 128},
    "q4_k": {0: 63 * 15, 2: 63}, "q5_k": {0: 63 * 31, 2: 63}, "q6_k": {208: 128 * 32}, "iq4_nl": {0: 127},
    "mxfp4": {},
}  # fmt: skip


def gguf_weight(
    quant_type: str, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, any_scale: bool = False
) -> qn.QuantizedWeight:
    """A weight of random bytes in blocks of a GGUF format. Its elements are of the order of 0.1 with scales of both
    signs, or with ``any_scale`` scales are any half: infinite, NaN and subnormal ones too."""
    w = qn.QuantizedWeight.empty(shape, dtype=dtype, quant_type=quant_type, device="cpu")
    blocks = torch.randint(256, (len(w.packed) // bytes_of(w), bytes_of(w)), dtype=torch.uint8, device="cpu")
    for at, most in {}.items() if any_scale else HALVES[quant_type].items():
        blocks[:, at : at + 2] = (torch.randn(len(blocks), 1, device="cpu") / (4 * most)).half().view(torch.uint8)
    if quant_type == "mxfp4" and not any_scale:  # powers of two
        blocks[:, :1] = torch.randint(119, 124, (len(blocks), 1), dtype=torch.uint8, device="cpu")
    w.packed.copy_(blocks.view(-1))
    return w.to(torch.get_default_device())


def bytes_of(w: qn.QuantizedWeight) -> int:
    """Bytes of a block."""
    return qn._native.GGUF_BLOCKS[w.op_args().quant_type][1]


def gguf_truth(w: qn.QuantizedWeight) -> torch.Tensor:
    """The values of the ``gguf`` package, fp32."""
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(
            w.packed.view(-1, bytes_of(w)).cpu().numpy(), gguf.GGMLQuantizationType[w.quant_type.upper()]
        )
    return torch.from_numpy(values).view(w.shape).to(w.device)


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and values; NaN equals NaN, +0 equals -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan])


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(left, right)


def same_weight(a: qn.QuantizedWeight, b: qn.QuantizedWeight) -> bool:
    """Equal fields, tensors by bytes."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in TENSOR_FIELDS]
    fields = ("shape", "dtype", "quant_type", "block_size", "storage_dtype")
    return all(getattr(a, name) == getattr(b, name) for name in fields) and all(
        left is right if left is None or right is None else same_bytes(left, right) for left, right in pairs
    )


def relative_error(got: torch.Tensor | None, truth: torch.Tensor | None) -> float:
    """Frobenius norm of the difference over that of the truth, in double precision; neither may be None."""
    assert got is not None and truth is not None
    difference = (got.detach().double() - truth.detach().double()).norm()
    return float(difference / truth.detach().double().norm().clamp_min(1e-30)) if truth.numel() else 0.0


def errors_in_fp64(
    function: Callable[..., torch.Tensor], truth: Callable[..., torch.Tensor], *tensors: torch.Tensor
) -> list[float]:
    """Relative errors of a function's output and of its gradients, against ``truth`` of the same values in fp64."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = function(*leaves), truth(*wide)
    assert y.dtype == tensors[0].dtype and y.shape == expected.shape
    grad_y = torch.randn(y.shape).to(y.dtype)
    y.backward(grad_y)
    expected.backward(grad_y.double())
    return [relative_error(y, expected), *(relative_error(a.grad, b.grad) for a, b in zip(leaves, wide, strict=True))]


def same_bytes_under_threads(function: Callable[[], Any], counts: Iterable[int] = (1, 2, 5)) -> Any:
    """What a function gives, a tensor or several, which is the same under each number of torch's threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            result = function()
            results.append([result] if isinstance(result, torch.Tensor) else result)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bytes(a, b) for a, b in zip(results[0], other, strict=True))
    return result


def refuses(match: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """A call raises a ValueError whose message matches."""
    with pytest.raises(ValueError, match=match):
        function(*arguments, **options)


def through_a_file(saved: Any, **options: Any) -> Any:
    """What torch.load gives of what torch.save wrote."""
    torch.save(saved, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, **options)


@contextmanager
def sampled(read: Callable[[], int]) -> Iterator[list[int]]:
    """What ``read`` returns, again and again, in another thread; one reading at least."""
    seen, ends = [read()], threading.Event()

    def sample() -> None:
        while not ends.wait(0.0005):
            seen.append(read())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield seen
    finally:
        ends.set()
        thread.join()


def exit_code_of_fork(function: Callable[[], object]) -> int | None:
    """0 if the function returned, 1 if it raised, in a forked child; negative if that had to be killed."""
    child = multiprocessing.get_context("fork").Process(target=function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
        child.start()
    child.join(60)
    child.kill()
    child.join()
    return child.exitcode
