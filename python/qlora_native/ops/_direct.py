"""Ops without torch's dispatcher, where that makes no difference.

For one token the dispatcher costs more than a small layer's product. Without autocast, compilers, transforms, modes
and profilers, nothing would notice: then :func:`call` goes straight to the kernel that the dispatcher would end at, or
under autograd to a node over it, with the same bits. What is :func:`unobserved` may go to a native function at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_dynamo_compiling as is_compiling  # all else that compiles enters modes

from qlora_native._moved import names_from
from qlora_native.ops._library import FROZEN, KERNELS, NODES, RECOMPUTED, TENSORS, Values, recording

_is_grad_enabled = torch.is_grad_enabled
_graph_task = torch._C._current_graph_task_id  # -1 outside of a backward pass
may_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)  # whether for any device
PLAIN = (Tensor, torch.nn.Parameter)
_PLAIN_OR_NONE = {*PLAIN, type(None)}


def _key_sets() -> tuple[Any, Any, Any, dict[int, str], frozenset[int]]:
    """Torch's functions that read dispatch keys, and the sets that a plain tensor and a plain thread may have."""
    key = torch._C.DispatchKey
    keys = torch._C.DispatchKeySet
    devices: dict[int, str] = {}
    for device in ("CPU", "CUDA"):
        own = keys(getattr(key, device)) | keys(getattr(key, f"Autocast{device}"))
        derivative = keys(key.ADInplaceOrView) | keys(getattr(key, f"Autograd{device}"))
        # Tensors have the first in inference mode.
        devices |= {own.raw_repr(): device, (own | derivative).raw_repr(): device}
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


def is_plain(tensor: Tensor) -> bool:
    return bool(_TENSOR_KEYS) and type(tensor) in PLAIN and _keys(tensor).raw_repr() in _TENSOR_KEYS


def unobserved(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an op on these operands would go straight to its CPU kernel, with nothing to record or to transform."""
    if type(x) is not Tensor or is_compiling() or not _thread_is_plain():
        return False
    records = _is_grad_enabled()
    return all(t is None or (is_plain(t) and not (records and t.requires_grad)) for t in (x, *others))


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


def kernel_of(
    name: str, arguments: Values, looked_at: Sequence[int] | None = None
) -> Callable[..., Any] | None:
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
            found = _DEVICES.get(_keys(tensor).raw_repr()) if type(tensor) in PLAIN else None
            if found is None or device not in ("", found):
                return None
            device = found
            needs_grad = needs_grad or tensor.requires_grad
    if (
        looked_at is None
        and name in FROZEN
        and not _PLAIN_OR_NONE.issuperset(map(type, arguments[-1][:6]))
    ):
        return None
    if not (needs_grad and _is_grad_enabled()):
        return KERNELS.get((name, device))
    return (NODES if _graph_task() < 0 else RECOMPUTED).get((name, device))


# Pickles of release 0.1 name this.
__getattr__ = names_from(__name__, {"Prepared": "qlora_native.ops.linear_4bit"})
