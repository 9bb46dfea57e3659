"""The one table of op schemas, and how ops are registered.

A frozen weight is nine arguments of a schema. The functions registered here get them as one, a :class:`Weight`, last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache, wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._operands import Weight, check_of

# A frozen weight as op arguments, always last. absmax is fp32 [blocks], or uint8 [blocks] with the two nested
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
    "gptq_4bit": "(Tensor t, Tensor factor, Tensor order, Tensor scales, int quant_type, int block_size) -> Tensor",
    "dequantize_4bit": f"(ScalarType dtype, {WEIGHT}) -> Tensor",
    "dequantize_4bit.out": f"(Tensor(a!) out, {WEIGHT}) -> ()",
    "linear_4bit": f"(Tensor x, Tensor? bias, {WEIGHT}) -> Tensor",
    "linear_4bit_grad_input": f"(Tensor grad_y, {WEIGHT}) -> Tensor",
    "lora_linear_4bit": (
        f"(Tensor x, Tensor? x_lora, Tensor a, Tensor b, float scale, Tensor? bias, {WEIGHT}) -> (Tensor, Tensor)"
    ),
    "lora_linear_4bit_backward": (
        "(Tensor grad_y, Tensor x, Tensor xa, Tensor a, Tensor b, float scale, bool separate, bool[4] needed, "
        f"{WEIGHT}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "dense_linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "dense_linear_grad_input": "(Tensor grad_y, Tensor weight) -> Tensor",
    "dense_linear_grad_weight": "(Tensor grad_y, Tensor x) -> Tensor",
    "linear_cross_entropy": (
        "(Tensor h, Tensor labels, int ignore_index, bool need_grad_h, bool need_grad_weight, Tensor? rows, "
        f"Tensor? row_ids, {WEIGHT_OR_DENSE}) -> (Tensor, Tensor, Tensor)"
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

# Ops that wait for the device, or copy from memory of the host that is gone at a replay: not for CUDA graphs.
# torch.compile leaves them out of its own.
NOT_IN_GRAPHS = {
    *("quantize_4bit", "search_scales_4bit", "gptq_4bit"),
    *("adamw_step", "lion_step", "gradient_norm"),
}

LIBRARY = torch.library.Library("qlora_native", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(
        _name + _schema, tags=(torch.Tag.cudagraph_unsafe,) if _name in NOT_IN_GRAPHS else ()
    )

Function = Callable[..., Any]
Values = tuple[Any, ...]  # arguments, or a gradient for each of them

FROZEN = {name for name, schema in SCHEMAS.items() if WEIGHT in schema}
NUM_PARTS = len(Weight._fields)


def _arguments(schema: str) -> list[list[str]]:
    """Type and name of each argument but a frozen weight."""
    listed = schema[1 : schema.index(") ->")].split(WEIGHT)[0]
    return [argument.split() for argument in listed.split(", ") if argument]


PARAMETERS = {
    name: [parameter for _, parameter in _arguments(schema)] for name, schema in SCHEMAS.items()
}
# Where the tensors among these stand.
TENSORS = {
    name: [place for place, (kind, _) in enumerate(_arguments(schema)) if kind.startswith("Tensor")]
    for name, schema in SCHEMAS.items()
}

# By op and dispatch key: the function that :func:`implement` was given, which trusts its operands; the same behind the
# check of the operands; both with the derivative, as an autograd node; the node that a recomputation within a backward
# pass takes; and the kernel as the dispatcher calls it, by the schema.
FUNCTIONS: dict[tuple[str, str], Function] = {}
KERNELS: dict[tuple[str, str], Function] = {}
NODES: dict[tuple[str, str], Function] = {}
RECOMPUTED: dict[tuple[str, str], Function] = {}
IMPLEMENTATIONS: dict[tuple[str, str], Function] = {}
CHECKS = {name: check_of(name, PARAMETERS[name], name in FROZEN) for name in SCHEMAS}


class _Recording(threading.local):
    on = False
    again = False


# Whether this thread is inside a kernel that autograd records, or a derivative; whether in a product that a backward
# pass computes again, to compute its input gradient next.
recording = _Recording()


def _with_weight(arguments: Values) -> Values:
    """The arguments of a schema with a frozen weight, which becomes one."""
    weight = tuple.__new__(Weight, arguments[-NUM_PARTS:])
    return (*arguments[:-NUM_PARTS], weight)


def _by_schema(name: str, kernel: Function) -> Function:
    """A kernel as the dispatcher calls it."""
    if name not in FROZEN:
        return kernel

    @wraps(kernel)
    def by_schema(*arguments: Any) -> Any:
        return kernel(*_with_weight(arguments))

    return by_schema


def _behind(check: Function, function: Function) -> Function:
    @wraps(function)
    def kernel(*arguments: Any) -> Any:
        check(arguments)
        return function(*arguments)

    return kernel


def implement(name: str, device: str) -> Callable[[Function], Function]:
    """Registers the decorated function as the op's kernel for a dispatch key (``CPU``, ``CUDA``, ...).

    What is called is the function behind the check of the operands; called by its own name, it trusts them.
    """

    def register(function: Function) -> Function:
        kernel = _behind(CHECKS[name], function)
        by_schema = _by_schema(name, kernel)
        LIBRARY.impl(name, by_schema, device)
        FUNCTIONS[name, device], KERNELS[name, device], IMPLEMENTATIONS[name, device] = (
            function,
            kernel,
            by_schema,
        )
        return function

    return register


def fake(name: str) -> Callable[[Function], Function]:
    """Registers the decorated function as the op's shape propagation for tracing, behind the same check."""

    def register(function: Function) -> Function:
        check = check_of(name, PARAMETERS[name], name in FROZEN, is_traced=True)
        by_schema = _by_schema(name, _behind(check, function))
        torch.library.register_fake(f"qlora_native::{name}", by_schema, lib=LIBRARY)
        return function

    return register


def autograd(
    name: str, backward: Function, setup_context: Function, before: Function | None = None
) -> None:
    """Registers the op's derivative: with the dispatcher, and as a node over the CPU or the CUDA kernel alone.

    ``backward`` returns a gradient or None for each argument but a frozen weight. For a product, ``before`` computes
    what ``setup_context`` saves of the outputs behind the first: see :func:`_saved_first`.
    """

    is_frozen = name in FROZEN

    def setup_by_schema(ctx: Any, inputs: Values, output: Any) -> None:
        setup_context(ctx, _with_weight(inputs) if is_frozen else inputs, output)

    def backward_by_schema(ctx: Any, *grads: Any) -> Any:
        return *backward(ctx, *grads), *[None] * (NUM_PARTS if is_frozen else 0)

    torch.library.register_autograd(
        f"qlora_native::{name}", backward_by_schema, setup_context=setup_by_schema, lib=LIBRARY
    )
    for device in ("CPU", "CUDA"):
        if (name, device) in FUNCTIONS:  # else the same for all devices, of other ops
            NODES[name, device] = RECOMPUTED[name, device] = _node(
                name, device, backward, setup_context
            )
            if before is not None:
                RECOMPUTED[name, device] = _saved_first(name, device, backward, setup_context, before)


def _node(name: str, device: str, backward: Function, setup_context: Function) -> Function:
    """The kernel with its derivative. Autograd, which looks at each input, sees a frozen weight as one."""
    check = CHECKS[name]
    function = FUNCTIONS[name, device]
    of_weight = [None] * (name in FROZEN)

    def forward(ctx: Any, *inputs: Any) -> Any:
        check(inputs)
        recording.on = True
        try:
            output = function(*inputs)
        finally:
            recording.on = False
        setup_context(ctx, inputs, output)
        return output

    def derivative(ctx: Any, *grads: Any) -> Any:
        recording.on = True
        try:
            found = backward(ctx, *grads)
        finally:
            recording.on = False  # also after a node within this one: what was kept is then made again
        return (*found, *of_weight)

    return _applied(f"{name}_{device.lower()}", forward, derivative)


def _applied(name: str, forward: Function, backward: Function) -> Function:
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node = type(name, (torch.autograd.Function,), members)
    # Past a check for functorch's transforms, without which alone nodes are taken.
    return super(torch.autograd.Function, node).apply  # type: ignore[misc]


def _saved_first(
    name: str, device: str, backward: Function, setup_context: Function, before: Function
) -> Function:
    """:func:`_node`, which saves before it computes the product.

    ``torch.utils.checkpoint`` ends a recomputation by an exception when its last tensor is saved. A node saves after
    its forward: the last product of a layer, a quarter of the recomputation, would be computed for nothing.
    """
    function = FUNCTIONS[name, device]

    def save(ctx: Any, contexts: list[Any], *inputs: Any) -> Any:
        CHECKS[name](inputs)
        contexts.append(ctx)
        found = before(*inputs)
        setup_context(ctx, inputs, (None, *found))
        return found

    def compute(ctx: Any, saved: Any, found: Values, *inputs: Any) -> Any:
        ctx.saved = saved
        # As `setup_context` has it, where there is a second output.
        ctx.set_materialize_grads(not found)
        recording.on = True
        recording.again = ctx.needs_input_grad[2]
        try:
            return function(*inputs, *found)
        finally:
            recording.on = recording.again = False

    def derivative(ctx: Any, *grads: Any) -> Any:
        """Called where someone differentiates within a checkpoint; else the graph of a recomputation is thrown away."""
        seen = SimpleNamespace(**vars(ctx.saved), saved_tensors=ctx.saved.saved_tensors)
        seen.needs_input_grad = ctx.needs_input_grad[2:]
        return None, None, *backward(seen, *grads), None

    apply_save = _applied(f"{name}_saved", save, derivative)
    apply_compute = _applied(f"{name}_computed", compute, derivative)

    def apply(*inputs: Any) -> Any:
        contexts: list[Any] = []
        found = apply_save(contexts, *inputs)
        return apply_compute(contexts[0], [one.detach() for one in found], *inputs)

    return apply


def save_inputs(ctx: Any, inputs: Values, output: Any) -> None:
    """The ``setup_context`` of an op whose derivative needs all of its inputs, which are tensors."""
    ctx.save_for_backward(*inputs)


@cache
def cuda_kernels() -> Any:
    """The module ``_cuda_kernels``, imported with the first CUDA tensor, and once: the statement alone takes a
    microsecond of each call."""
    from qlora_native.ops import _cuda_kernels

    return _cuda_kernels


def module_for(device: torch.device) -> ModuleType | None:
    """The native module with the kernels of a CUDA device, None for any other device and where it cannot run."""
    if device.type != "cuda":
        return None
    return cuda_kernels().native(device)


def is_native(tensor: Tensor) -> bool:
    """Whether the native functions have its dtype."""
    return tensor.dtype in DTYPE_NUMBER


def plain(arguments: Iterable[Any]) -> Iterator[Any]:
    """As native functions take them: of a tensor its address, of a dtype its number."""
    for value in arguments:
        if isinstance(value, Tensor):
            yield value.data_ptr()
        elif isinstance(value, torch.dtype):
            yield DTYPE_NUMBER[value]
        else:
            yield value


def define(
    name: str,
    outputs: Function,
    values: Function,
    native: Function,
    on_cuda: bool = True,
    takes: Callable[[Tensor], bool] = is_native,
) -> None:
    """Registers an op by three functions of its arguments.

    * ``outputs`` makes the results, uninitialized, and refuses what does not fit; it is the fake as well.
    * ``values`` computes them in plain torch, where there is no kernel for the device or the first operand.
    * ``native`` fills them: ``native(run, results, *arguments)`` calls by ``run`` the native function of the op's name,
      with :func:`plain` arguments.

    The kernels compute for first operands that they take.
    """
    fake(name)(outputs)

    @implement(name, "CompositeExplicitAutograd")
    def anywhere(*arguments: Any) -> Any:
        results = outputs(*arguments)
        found = values(*arguments)
        if isinstance(results, Tensor):
            return results.copy_(found)
        for result, value in zip(results, found, strict=True):
            result.copy_(value)
        return results

    def cpu(first: Tensor, *others: Any) -> Any:
        if not takes(first):
            return anywhere(first, *others)
        results = outputs(first, *others)
        native(lambda *given: getattr(_C, name)(*plain(given)), results, first, *others)
        return results

    def cuda(first: Tensor, *others: Any) -> Any:
        module = module_for(first.device)
        if module is None or not takes(first):
            return anywhere(first, *others)

        def run(*given: Any) -> None:
            with cuda_kernels().launching(first.device) as stream:
                getattr(module, name)(*plain(given), stream)

        results = outputs(first, *others)
        native(run, results, first, *others)
        return results

    implement(name, "CPU")(cpu)
    if on_cuda:
        implement(name, "CUDA")(cuda)
