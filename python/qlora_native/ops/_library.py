"""The one table of op schemas, how ops are registered, and what their files share, such as the scratch panel."""

from __future__ import annotations

import ctypes
import math
import mmap
import platform
import sys
import threading
import warnings
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor
from torch.nn import Parameter

from qlora_native import _C
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._operands import NESTED_BLOCK as NESTED_BLOCK
from qlora_native.ops._operands import Weight as Weight
from qlora_native.ops._operands import checked

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
    "gptq_4bit": "(Tensor t, Tensor factor, Tensor order, Tensor scales, int quant_type, int block_size) -> Tensor",
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
        f"bool low_memory, {WEIGHT}) -> (Tensor, Tensor, Tensor, Tensor)"
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
NOT_IN_GRAPHS = {*("quantize_4bit", "search_scales_4bit", "gptq_4bit")}
NOT_IN_GRAPHS |= {"adamw_step", "lion_step", "gradient_norm"}

LIBRARY = torch.library.Library("qlora_native", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.cudagraph_unsafe,) if _name in NOT_IN_GRAPHS else ())


IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {}  # by op and key
AUTOGRAD_NODES: dict[tuple[str, str], Callable[..., Any]] = {}  # the kernel with its derivative, by op and key
FROZEN = {name: len(Weight._fields) if WEIGHT in schema else 0 for name, schema in SCHEMAS.items()}  # last arguments
# Where the other tensors among an op's arguments stand.
TENSORS = {
    name: tuple(
        i for i, argument in enumerate(schema.split(") ->")[0].split(WEIGHT)[0].split(", ")) if "Tensor" in argument
    )
    for name, schema in SCHEMAS.items()
}


class _Recording(threading.local):
    on = False


recording = _Recording()  # whether this thread is inside a kernel that autograd records, or a derivative


def implement(name: str, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the op's kernel for a dispatch key (``CPU``, ``CUDA``, ...).

    What is called is the function behind the check of the operands; called by its own name, it trusts them.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        kernel = checked(name, SCHEMAS[name], function)
        LIBRARY.impl(name, kernel, device)
        IMPLEMENTATIONS[name, device] = kernel
        return function

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the op's shape propagation for tracing, behind the same check."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"qlora_native::{name}", checked(name, SCHEMAS[name], function), lib=LIBRARY)
        return function

    return register


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Registers the op's derivative: with the dispatcher, and as a node over the CPU or the CUDA kernel alone."""
    torch.library.register_autograd(f"qlora_native::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    for device in ("CPU", "CUDA"):
        if (name, device) in IMPLEMENTATIONS:  # else the same for all devices, of other ops
            AUTOGRAD_NODES[name, device] = _node(
                f"{name}_{device.lower()}", IMPLEMENTATIONS[name, device], backward, setup_context, FROZEN[name]
            )


def _node(
    name: str, kernel: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None], frozen: int
) -> Callable[..., Any]:
    """The last ``frozen`` inputs have no gradient: autograd, which looks at each input, is given them as one."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        if frozen:
            inputs = (*inputs[:-1], *inputs[-1])
        before, recording.on = recording.on, True
        try:
            output = kernel(*inputs)
        finally:
            recording.on = before
        setup_context(ctx, inputs, output)
        return output

    def derivative(ctx: Any, *grads: Any) -> Any:
        before, recording.on = recording.on, True
        try:
            found = backward(ctx, *grads)
        finally:
            recording.on = before
        return (*found[:-frozen], None) if frozen else found

    members = {"forward": staticmethod(forward), "backward": staticmethod(derivative)}
    node = type(name, (torch.autograd.Function,), members)
    apply: Callable[..., Any] = super(torch.autograd.Function, node).apply  # type: ignore[misc]
    # Past a check for functorch's transforms, without which alone nodes are taken.
    return (lambda *inputs: apply(*inputs[:-frozen], inputs[-frozen:])) if frozen else apply


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The ``setup_context`` of an op whose derivative needs all of its inputs, which are tensors."""
    ctx.save_for_backward(*inputs)


_scratch = threading.local()


def _grown(num_bytes: int) -> Tensor:
    held: Tensor | None = getattr(_scratch, "buffer", None)
    if held is None or held.numel() < num_bytes:
        with torch.inference_mode(False):
            held = torch.empty(num_bytes, dtype=torch.uint8)
        _scratch.buffer = held
    return held


def scratch(count: int, dtype: torch.dtype) -> Tensor:
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
    """Warn about a slower path, or of what is done instead, once a process."""
    if sentence not in _warned:
        _warned.add(sentence)
        warnings.warn(sentence, stacklevel=3)


@cache
def cuda_modules() -> tuple[Any, Any]:
    """_cuda_kernels and _cuda_products, imported with the first CUDA tensor, and once: the statement alone takes a
    microsecond of each call."""
    from qlora_native.ops import _cuda_kernels, _cuda_products

    return _cuda_kernels, _cuda_products


def module_for(device: torch.device) -> ModuleType | None:
    """The native module with the kernels of a CUDA device, None for any other device and where it cannot run."""
    if device.type != "cuda":
        return None
    module: ModuleType | None = cuda_modules()[0].native(device)
    return module


Run = Callable[..., None]  # a native function, on a CUDA device's current stream


def implement_natively(name: str, anywhere: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the op's kernel for CPU and CUDA, before whose arguments it gets the native
    function of the op's name; ``anywhere`` computes where there is none for the device or the first tensor's dtype."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @implement(name, "CPU")
        def cpu(first: Tensor, *others: Any) -> Any:
            if first.dtype not in DTYPE_NUMBER:
                return anywhere(first, *others)
            return function(getattr(_C, name), first, *others)

        @implement(name, "CUDA")
        def cuda(first: Tensor, *others: Any) -> Any:
            module = module_for(first.device)
            if module is None or first.dtype not in DTYPE_NUMBER:
                return anywhere(first, *others)

            def run(*arguments: Any) -> None:
                with cuda_modules()[0].launching(first.device) as stream:
                    getattr(module, name)(*arguments, stream)

            return function(run, first, *others)

        return function

    return register


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the very tensor; any other tensor itself."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


# Blocks of memory for the large outputs of the CPU's ops, kept for outputs to come.
# A layer frees what it has computed and the next one asks for the same sizes. Given back to the system, those pages are
# cleared anew each time, and in glibc's heap an aligned block seldom fits the hole that one of its
# size has left, so that the heap grows to several times what is used. Here a block that came back serves the next
# request of its size, and blocks in use and kept are together never more than the most that were in use at one time:
# nothing is held beyond what a step needs anyway.

LEAST = 256 << 10  # bytes of an output; smaller ones are malloc's
PAGE = 4096
SPARE = 4  # a block serves requests that leave at most a quarter of their own size unused


class Kept(NamedTuple):
    """A free block; of one size, the one that came back last stands first."""

    size: int
    age: int  # counts down
    memory: mmap.mmap


class Blocks:
    """Lends blocks; ``used`` and ``kept`` are bytes lent and free, ``most`` the most that were lent at one time."""

    def __init__(self) -> None:
        self.used = self.kept = self.most = 0
        self._age = 0
        self._free: list[Kept] = []  # in order
        # Blocks come back from the garbage collector, in the midst of anything: they wait here for the next request.
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()

    def lend(self, num_bytes: int) -> memoryview:
        """At least so many bytes, uninitialized, at the begin of a page; they are lent as long as the view lives."""
        size = -(-num_bytes // PAGE) * PAGE
        with self._lock:
            self._take_back()
            at = bisect_left(self._free, (size,))
            if at < len(self._free) and self._free[at].size <= size + size // SPARE:
                memory = self._free.pop(at).memory
                self.kept -= len(memory)
            else:
                self._drop(self.most - self.used - size)
                memory = _pages(size)
            self.used += len(memory)
            self.most = max(self.most, self.used)
        view = memoryview(memory)
        finalize(view, self._returned.append, memory).atexit = False
        return view

    def release(self) -> None:
        """Give free blocks to the system, and forget how many were lent."""
        with self._lock:
            self._take_back()
            self._drop(0)
            self.most = self.used

    def _take_back(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            self._age -= 1
            insort(self._free, Kept(len(memory), self._age, memory))
            self.used -= len(memory)
            self.kept += len(memory)

    def _drop(self, limit: int) -> None:
        """Give back those that were free for longest, until no more than ``limit`` bytes are kept."""
        while self._free and self.kept > limit:
            oldest = max(self._free, key=lambda block: block.age)
            self._free.remove(oldest)
            self.kept -= oldest.size


def _pages(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


BLOCKS = Blocks()
_are_kept = False


def keep_blocks() -> None:
    """From now on :func:`empty_like` takes large tensors from ``BLOCKS``: for a process that trains."""
    global _are_kept
    _are_kept = True


def empty_like(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """An uninitialized contiguous tensor of x's dtype, device and shape, or of another shape.

    Large ones on the CPU lie in blocks that are kept, if that was asked for. Those of tracers have no memory.
    """
    shape = x.shape if shape is None else shape
    if not _are_kept or type(x) not in (Tensor, Parameter) or x.device.type != "cpu":
        return x.new_empty(shape)
    count = math.prod(shape)
    num_bytes = count * x.dtype.itemsize
    if num_bytes < LEAST:
        return x.new_empty(shape)
    try:
        block = BLOCKS.lend(num_bytes)
    except OSError:  # no memory: what is kept may be in the way, and torch's error is the one that callers know
        BLOCKS.release()
        return x.new_empty(shape)
    return torch.frombuffer(block, dtype=x.dtype, count=count).resize_(shape)  # a view would have a base


# Large weights lie in huge pages, and are spread over NUMA nodes: a product of one token reads a weight once, from end
# to end. With pages of 4 KiB the processor translates an address for every row or two; and a weight that one thread
# wrote lies on one node, whose memory all threads then share.

# linux/mman.h and include/uapi/asm-generic/mman-common.h
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
HUGE_PAGE = 2 << 20  # bytes; where they are larger, the advice is refused or does less
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# include/uapi/linux/mempolicy.h, and the numbers of mbind among the system calls
MPOL_INTERLEAVE, MPOL_MF_MOVE = 3, 2
MBIND = {"x86_64": 237, "aarch64": 235}
NODES = Path("/sys/devices/system/node/online")


@cache
def _madvise() -> Callable[..., Any] | None:
    """The C library's madvise, or None where there is none or huge pages are disabled."""
    try:
        enabled = sys.platform == "linux" and "[never]" not in SETTING.read_text(encoding="ascii")
        return ctypes.CDLL(None).madvise if enabled else None
    except (OSError, AttributeError):
        return None


@cache
def nodes() -> tuple[int, ...]:
    """The machine's NUMA nodes; empty where the system does not list them."""
    try:
        parts = [part.split("-") for part in NODES.read_text(encoding="ascii").strip().split(",")]
        return tuple(node for part in parts for node in range(int(part[0]), int(part[-1]) + 1))
    except (OSError, ValueError):
        return ()


def interleave(tensor: Tensor, over: tuple[int, ...] | None = None) -> bool:
    """Spread the pages of a contiguous CPU tensor, present or not, over NUMA nodes in turns; whether the kernel did.

    Nothing is done for memory within one page, nor, unless ``over`` names nodes, on a machine with one node.
    """
    over = nodes() if over is None and len(nodes()) > 1 else over
    number = MBIND.get(platform.machine())
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if not over or number is None or sys.platform != "linux" or first >= last:
        return False
    mask = ctypes.c_ulong(sum(1 << node for node in over))
    arguments = (number, first, last - first, MPOL_INTERLEAVE, ctypes.addressof(mask), 8 * ctypes.sizeof(mask))
    return bool(ctypes.CDLL(None).syscall(*map(ctypes.c_long, arguments), ctypes.c_long(MPOL_MF_MOVE)) == 0)


def _advise(tensor: Tensor, advice: int) -> bool:
    """Whether the kernel took the advice for the whole huge pages within a contiguous CPU tensor's memory."""
    start = tensor.data_ptr()
    first = -(-start // HUGE_PAGE) * HUGE_PAGE
    last = (start + tensor.numel() * tensor.element_size()) // HUGE_PAGE * HUGE_PAGE
    madvise = _madvise() if first < last else None
    return madvise is not None and madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice) == 0


def expect_pages(tensor: Tensor) -> bool:
    """Have memory that was not yet written come in huge pages, with fewer page faults, and from all NUMA nodes."""
    interleave(tensor)
    return _advise(tensor, MADV_HUGEPAGE)


def gather_pages(tensor: Tensor) -> bool:
    """Move memory that is already there into huge pages (Linux 6.1); at no cost where it lies in such."""
    return _advise(tensor, MADV_COLLAPSE)
