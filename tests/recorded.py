"""What torch is asked to multiply while code runs: every product and attention, with its operands.

torch's profiler records each call that passes the dispatcher, on every thread: those inside of our own ops, which a
TorchDispatchMode does not see, and those of a backward pass too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

PRODUCT = re.compile(
    r"(^|_)(mm|addmm|bmm|baddbmm|addbmm|mv|addmv|dot|vdot|inner|linear|bilinear|matmul|einsum|tensordot|attention"
    r"|conv\dd|convolution\w*)(_|$)"
)
SIXTEEN = {"c10::BFloat16": "bf16", "c10::Half": "fp16"}


class Product(NamedTuple):
    """A call: the operator, the shapes and dtypes of its tensors, and the functions of Python that it came from."""

    operator: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    lines: tuple[str, ...]  # the innermost first

    @property
    def is_16bit(self) -> bool:
        return any(dtype in SIXTEEN for dtype, _ in self.operands) and all(0 not in shape for _, shape in self.operands)

    def __str__(self) -> str:
        tensors = ", ".join(f"{SIXTEEN.get(dtype, dtype)} {list(shape)}" for dtype, shape in self.operands)
        return f"{self.operator}({tensors})" + (f" from {' < '.join(self.lines)}" if self.lines else "")


def products_of(code: Callable[[], Any], with_lines: bool = False) -> list[Product]:
    """The products that ``code`` asks torch for, those inside of another left out; lines take most of the time."""
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    options: dict[str, Any] = {"record_shapes": True, "with_stack": with_lines, "experimental_config": everywhere}
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        code()
    threads: dict[int, list[Any]] = {}
    for event in profiler.profiler.kineto_results.events():
        threads.setdefault(event.start_thread_id(), []).append(event)
    return [product for events in threads.values() for product in _products(events)]


def _products(events: Iterable[Any]) -> Iterable[Product]:
    """Those of one thread, whose events lie within one another."""
    around: list[tuple[int, str, bool]] = []  # end, name, whether it is a product
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.end_ns())):
        while around and around[-1][0] <= event.start_ns():
            around.pop()
        try:
            name: str = event.name()
        except UnicodeDecodeError:  # of a Python function, whose name the profiler has truncated
            name = ""
        library, *operator = name.split("::")
        is_product = len(operator) == 1 and library != "qlora_native" and PRODUCT.search(operator[0]) is not None
        if is_product and not any(inside for _, _, inside in around):
            shapes = zip(event.dtypes(), event.shapes(), strict=True)
            operands = tuple((dtype, tuple(shape)) for dtype, shape in shapes if dtype not in ("", "Scalar"))
            lines = [line for _, line, _ in reversed(around) if ".py(" in line and "torch/" not in line]
            yield Product(name, operands, tuple(lines[:3]))
        around.append((event.end_ns(), name, is_product))
