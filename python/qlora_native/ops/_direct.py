"""Ops, and products of a frozen weight, without torch's dispatcher, where that makes no difference.

For one token the dispatcher costs more than a small layer's product. Without autocast, compilers, transforms, modes
and profilers, nothing would notice: then :func:`call` goes straight to the kernel that the dispatcher would end at, or
under autograd to a node over it, and :func:`product` straight to the native function, all with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_dynamo_compiling as is_compiling  # all else that compiles enters modes

from qlora_native import _C
from qlora_native._native import DTYPE_NUMBER
from qlora_native._pages import buffer, gather_pages
from qlora_native.ops._library import FROZEN, KERNELS, NODES, RECOMPUTED, TENSORS, Values, recording
from qlora_native.ops._operands import Weight

_CPU = torch.device("cpu")
_is_grad_enabled = torch.is_grad_enabled
_graph_task = torch._C._current_graph_task_id  # -1 outside of a backward pass
may_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)  # whether for any device
_matrix_forward = _C.matrix_forward
_PLAIN = (Tensor, torch.nn.Parameter)
_PLAIN_OR_NONE = (*_PLAIN, type(None))
Matrix = tuple[int, int, object]  # N, K, and the native form of a weight [N, K]


def _key_sets() -> tuple[Any, Any, Any, dict[int, str], frozenset[int]]:
    """Torch's functions that read dispatch keys, and the sets that a plain tensor and a plain thread may have."""
    key = torch._C.DispatchKey
    keys = torch._C.DispatchKeySet
    devices: dict[int, str] = {}
    for device in ("CPU", "CUDA"):
        own = keys(getattr(key, device)) | keys(getattr(key, f"Autocast{device}"))
        derivative = keys(key.ADInplaceOrView) | keys(getattr(key, f"Autograd{device}"))
        devices |= {own.raw_repr(): device, (own | derivative).raw_repr(): device}  # the first in inference mode
    thread = keys(key.BackendSelect)
    return (
        torch._C._dispatch_keys,
        torch._C._dispatch_tls_local_include_set,
        torch._C._is_torch_function_mode_enabled,
        devices,
        frozenset((thread.raw_repr(), (thread | keys(key.ADInplaceOrView)).raw_repr())),
    )


try:
    _keys, _included, _has_function_mode, _DEVICES, _THREAD_KEYS = _key_sets()
except AttributeError:  # a torch without these functions: every call goes through the dispatcher
    _DEVICES = {}
_TENSOR_KEYS = frozenset(keys for keys, device in _DEVICES.items() if device == "CPU")


def _thread_is_plain() -> bool:
    """Whether nothing in this thread treats ops specially."""
    return (
        bool(_DEVICES)
        and _included().raw_repr() in _THREAD_KEYS
        and not _has_function_mode()
        and not may_autocast()
        and forward_ad._current_level < 0
        and not _profiler_enabled()
    )


def _is_plain(tensor: Tensor) -> bool:
    return bool(_TENSOR_KEYS) and type(tensor) in _PLAIN and _keys(tensor).raw_repr() in _TENSOR_KEYS


def unobserved(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an op on these operands would go straight to its CPU kernel, with nothing to record or to transform."""
    if type(x) is not Tensor or is_compiling() or not _thread_is_plain():
        return False
    records = _is_grad_enabled()
    return all(t is None or (_is_plain(t) and not (records and t.requires_grad)) for t in (x, *others))


def call(name: str, *arguments: Any) -> Any:
    """The op of that name: without the dispatcher where only autograd would notice, which gets the node it would get.

    For a layer in training, the way through ``torch.library``'s derivative takes longer than all of our own Python.
    """
    kernel = kernel_of(name, arguments)
    return by_dispatcher(name, *arguments) if kernel is None else kernel(*arguments)


def call_in_derivative(name: str, *arguments: Any) -> Any:
    """:func:`call` of an op on the gradient of an output and saved tensors, while no gradients are recorded.

    In the derivative of one of our nodes the saved tensors were looked at when it was recorded.
    """
    kernel = kernel_of(name, arguments, (0,) if recording.on else None)
    return by_dispatcher(name, *arguments) if kernel is None else kernel(*arguments)


def by_dispatcher(name: str, *arguments: Any) -> Any:
    """The op by its schema, which has a frozen weight in parts."""
    op = getattr(torch.ops.qlora_native, name)
    return op(*arguments[:-1], *arguments[-1]) if name in FROZEN else op(*arguments)


def kernel_of(name: str, arguments: Values, looked_at: Sequence[int] | None = None) -> Callable[..., Any] | None:
    """What the dispatcher would end at; None where it has more to do, or the tensors are not all on one device.

    Only the arguments ``looked_at``, by number, are looked at; by default, all tensors. Of a frozen weight's the type
    is enough, beside what the check of the operands refuses: no transform makes such bytes.
    """
    if is_compiling() or not _thread_is_plain():  # a mode would see what is read of a tensor
        return None
    device = ""
    needs_grad = False
    for place in TENSORS[name] if looked_at is None else looked_at:
        tensor = arguments[place]
        if tensor is not None:
            found = _DEVICES.get(_keys(tensor).raw_repr()) if type(tensor) in _PLAIN else None
            if found is None or device not in ("", found):
                return None
            device = found
            needs_grad = needs_grad or tensor.requires_grad
    if looked_at is None and name in FROZEN:
        for part in arguments[-1][:6]:
            if type(part) not in _PLAIN_OR_NONE:
                return None
    if not (needs_grad and _is_grad_enabled()):
        return KERNELS.get((name, device))
    return (NODES if _graph_task() < 0 else RECOMPUTED).get((name, device))


class Prepared:
    """A weight's native form, made when first used and again when a tensor lies elsewhere; copies get their own."""

    __slots__ = ("_made",)

    def __init__(self) -> None:
        self._made: tuple[Any, Matrix | None] = (None, None)  # replaced as a whole: threads may share an owner

    def __reduce__(self) -> Values:
        return Prepared, ()

    def matrix(self, weight: Values) -> Matrix | None:
        """The native matrix of weight arguments, or None unless they are two-dimensional plain tensors in CPU memory.

        Raises ValueError for tensors that do not fit each other.
        """
        parts = weight[:6]
        numbers = weight[6:]
        if type(parts[0]) not in _PLAIN or type(parts[1]) not in _PLAIN:
            return None
        key = [t if t is None else (t.data_ptr(), t.numel()) for t in parts]
        key += numbers
        made, matrix = self._made
        if made == key:
            return matrix
        if len(numbers[0]) != 2 or not all(t is None or (type(t) in _PLAIN and t.device == _CPU) for t in parts):
            return None
        checked = Weight(*weight)
        checked.check()
        n, k = checked.shape
        matrix = (n, k, _C.matrix(n, k, checked.pointers()))
        self._made = key, matrix
        gather_pages(parts[0])
        return matrix


def product(matrix: Matrix | None, x: Tensor, bias: Tensor | None, *adapter: Any) -> Tensor | None:
    """x W^T + bias for operands that are :func:`unobserved`, or None where the kernel cannot take them as they are.

    ``adapter``: what the native function takes last.
    """
    shape = x.shape
    if matrix is None or x.dtype not in DTYPE_NUMBER or not shape or not x.is_contiguous():
        return None
    n, k, native = matrix
    rows = x.numel() // k if n and k and shape[-1] == k else 0
    if not rows or not (bias is None or (bias.dtype == x.dtype and bias.shape == (n,) and bias.is_contiguous())):
        return None
    y = torch.empty((*shape[:-1], n), dtype=x.dtype, device=_CPU)
    addend = 0 if bias is None else bias.data_ptr()
    arguments = (native, DTYPE_NUMBER[x.dtype], x.data_ptr(), addend, y.data_ptr(), rows)
    room = buffer(0)
    while needed := _matrix_forward(*arguments, *room, *adapter):
        room = buffer(needed)
    return y


def is_few(x: Tensor) -> bool:
    """Whether few_rows() of the kernels covers x [..., K], a few tokens in one of their dtypes."""
    number = DTYPE_NUMBER.get(x.dtype)
    return number is not None and x.dim() > 0 and 0 < x.numel() <= _C.few_rows(number) * x.shape[-1]


def adapted_product(
    matrix: Matrix | None, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """x W^T + bias + scale * low B^T and low = x A^T for x that :func:`is_few`, or None where operands do not fit.

    A [r, K] and B [N, r] are multiplied as they are stored, in fp32; low [..., r] is in x's dtype.
    """
    x = x.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if matrix is None or a.dim() != 2:
        return None
    n, k, _ = matrix
    rank = a.shape[0]
    if not rank or a.shape[1] != k or b.shape != (n, rank):
        return None
    a = a.float().contiguous()
    b = b.float().contiguous()
    low = torch.empty((*x.shape[:-1], rank), dtype=x.dtype, device=_CPU)
    y = product(matrix, x, bias, a.data_ptr(), b.data_ptr(), scale, low.data_ptr(), rank)
    return None if y is None else (y, low)


def adapted_at_once(
    matrix: Callable[[], Matrix | None], x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor | None:
    """The first result of :func:`adapted_product` past the dispatcher, or None where that is not possible."""
    if (
        (a.requires_grad and _is_grad_enabled())
        or is_compiling()
        or not _is_plain(x)
        or not is_few(x)
        or not unobserved(x, a, b, bias)
    ):
        return None
    made = adapted_product(matrix(), x, bias, a, b, scale)
    return None if made is None else made[0]
