"""The one table of op schemas, and what the ops' files share: the weight's arguments and the scratch panel."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from qlora_native import _native

# A quantized weight as op arguments, always last. absmax is fp32 [blocks], or uint8 [blocks] with the two nested
# tensors beside it; code and nested_code are None for the built-in tables.
WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor? code, Tensor? nested_code, "
    "SymInt[] shape, int quant_type, int block_size"
)
# For linear_cross_entropy, whose weight may also be dense: then absmax is None and packed is the weight [V, K].
WEIGHT_OR_DENSE = WEIGHT.replace("Tensor absmax", "Tensor? absmax")

SCHEMAS = {
    "quantize_4bit": (
        "(Tensor t, int quant_type, int block_size, bool double_quant) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # multiplier holds one value for each `group` blocks; the results are packed codes and the indices into the table.
    "search_scales_4bit": (
        "(Tensor t, Tensor moment, Tensor table, Tensor multiplier, Tensor offset, Tensor initial, int group, "
        "float low, float high, int quant_type, int block_size) -> (Tensor, Tensor)"
    ),
    "gptq_4bit": ("(Tensor t, Tensor factor, Tensor order, Tensor scales, int quant_type, int block_size) -> Tensor"),
    "dequantize_4bit": f"(ScalarType dtype, {WEIGHT}) -> Tensor",
    "dequantize_4bit.out": f"(Tensor(a!) out, {WEIGHT}) -> ()",
    "linear_4bit": f"(Tensor x, Tensor? bias, bool low_memory, {WEIGHT}) -> Tensor",
    "linear_4bit_grad_input": f"(Tensor grad_y, bool low_memory, {WEIGHT}) -> Tensor",
    "lora_linear_4bit": (
        "(Tensor x, Tensor? x_lora, Tensor a, Tensor b, float scale, Tensor? bias, bool low_memory, "
        f"{WEIGHT}) -> (Tensor, Tensor)"
    ),
    "lora_linear_4bit_backward": (
        "(Tensor grad_y, Tensor x, Tensor xa, Tensor a, Tensor b, float scale, bool separate, bool[4] needed, "
        "bool low_memory, "
        f"{WEIGHT}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "dense_linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "dense_linear_grad_input": "(Tensor grad_y, Tensor weight) -> Tensor",
    "dense_linear_grad_weight": "(Tensor grad_y, Tensor x) -> Tensor",
    "linear_cross_entropy": (
        f"(Tensor h, Tensor labels, int ignore_index, bool need_grad_h, bool need_grad_weight, {WEIGHT_OR_DENSE})"
        " -> (Tensor, Tensor, Tensor)"
    ),
    # The optimizers take lists of one tensor a parameter; the lists of absmax are empty for 32-bit states.
    "adamw_step": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] exp_avg_absmaxes, Tensor(e!)[] exp_avg_sq_absmaxes, Tensor(f!)[] steps, float lr, float beta1, "
        "float beta2, float eps, float weight_decay, bool decoupled, float grad_factor) -> ()"
    ),
    "lion_step": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_absmaxes, float lr, "
        "float beta1, float beta2, float weight_decay, float grad_factor) -> ()"
    ),
    "gradient_norm": "(Tensor[] grads) -> Tensor",
    "causal_attention": "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    "causal_attention_backward": (
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward": "(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, float eps) -> Tensor",
    "rotary": "(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    "swiglu": "(Tensor gate, Tensor up) -> Tensor",
    "swiglu_backward": "(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor, Tensor)",
}

LIBRARY = torch.library.Library("qlora_native", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)


IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {}  # by op and dispatch key
CPU_NODES: dict[str, Callable[..., Any]] = {}  # the CPU kernel with its derivative, by op


def implement(name: str, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the op's kernel for a dispatch key (``CPU``, ``CUDA``, ...)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.impl(name, function, device)
        IMPLEMENTATIONS[name, device] = function
        return function

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the op's shape propagation for tracing."""
    return torch.library.register_fake(f"qlora_native::{name}", lib=LIBRARY)


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Registers the op's derivative: with the dispatcher, and as a node over the CPU kernel alone."""
    torch.library.register_autograd(f"qlora_native::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    kernel = IMPLEMENTATIONS.get((name, "CPU"))
    if kernel is None:  # the same for all devices, of other ops
        return

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = kernel(*inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    CPU_NODES[name] = type(f"{name}_cpu", (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]


class Weight(NamedTuple):
    """The weight arguments of an op, by name."""

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None
    code: torch.Tensor | None
    nested_code: torch.Tensor | None
    shape: list[int]
    quant_type: int
    block_size: int

    def pointers(self) -> tuple[int, ...]:
        """Arguments of the native functions that take a weight, checked for size, dtype and contiguity."""
        numel = math.prod(self.shape)
        blocks = -(-numel // self.block_size)
        nested = self.nested_absmax is not None
        sizes = (
            ("packed", self.packed, torch.uint8, (numel + 1) // 2),
            ("absmax", self.absmax, torch.uint8 if nested else torch.float32, blocks),
            ("nested_absmax", self.nested_absmax, torch.float32, -(-blocks // 256)),
            ("nested_offset", self.nested_offset, torch.float32, 1),
            ("nested_code", self.nested_code, torch.float32, 256),
            ("code", self.code, torch.float32, 16),
        )
        addresses: dict[str, int] = {}
        for name, tensor, dtype, count in sizes:
            addresses[name] = 0
            if tensor is None:
                continue
            if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous():
                raise ValueError(
                    f"quantized weight {list(self.shape)} in blocks of {self.block_size}: {name} is {tensor.dtype} "
                    f"{list(tensor.shape)} with strides {tensor.stride()}: expected {count} contiguous {dtype} values."
                )
            if tensor.device != self.packed.device:
                raise ValueError(
                    f"quantized weight: {name} is on {tensor.device}, packed on {self.packed.device}: "
                    "move the weight as a whole with .to(device)."
                )
            addresses[name] = tensor.data_ptr()
        return (
            addresses["packed"],
            0 if nested else addresses["absmax"],
            addresses["absmax"] if nested else 0,
            addresses["nested_absmax"],
            addresses["nested_offset"],
            addresses["nested_code"],
            addresses["code"],
            self.quant_type,
            numel,
            self.block_size,
        )


def weight_of(arguments: tuple[Any, ...]) -> Weight:
    """The trailing weight arguments of an op call."""
    return Weight(*arguments)


def check_matrix(op: str, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, features: int) -> None:
    """Refuses shapes and dtypes that do not fit; ``features`` is the axis of the weight that x's last axis meets."""
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight is {list(weight.shape)}: expected two dimensions, [N, K].")
    if x.dim() == 0 or x.shape[-1] != weight.shape[features]:
        raise ValueError(
            f"{op}: weight is {list(weight.shape)} in blocks of {weight.block_size}, but x is {list(x.shape)}: "
            f"expected last dimension {weight.shape[features]}."
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{op}: x is {x.dtype}: expected float32, bfloat16, float16 or float64.")
    if x.device != weight.packed.device:
        raise ValueError(f"{op}: x is on {x.device}, the weight on {weight.packed.device}: move one to the other.")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"{op}: bias is {list(bias.shape)}: expected [{weight.shape[0]}].")


_scratch = threading.local()


def _grown(num_bytes: int) -> torch.Tensor:
    held: torch.Tensor | None = getattr(_scratch, "buffer", None)
    if held is None or held.numel() < num_bytes:
        with torch.inference_mode(False):
            held = torch.empty(num_bytes, dtype=torch.uint8)
        _scratch.buffer = held
    return held


def scratch(count: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized tensor [count] in this thread's reusable buffer: no page faults after the first call.

    Valid until the thread's next call. The buffer only grows, up to the largest size asked for.
    """
    num_bytes = count * dtype.itemsize
    return _grown(num_bytes)[:num_bytes].view(dtype)


def buffer(num_bytes: int) -> tuple[int, int]:
    """Address and size in bytes of the same buffer, which holds ``num_bytes`` at least."""
    held = _grown(num_bytes)
    return held.data_ptr(), held.numel()


_warned: set[str] = set()


def say_once(sentence: str) -> None:
    """A slower path announces itself, once a process."""
    if sentence not in _warned:
        _warned.add(sentence)
        warnings.warn(sentence, stacklevel=3)


def native_dtype(dtype: torch.dtype) -> int:
    """The number under which a dtype crosses into C++."""
    return _native.DTYPE_NUMBER[dtype]
