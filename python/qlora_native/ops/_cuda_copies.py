"""Copies of adapter matrices as their products take them, of another dtype or scaled, kept from one pass of a training
step to the next.

A write through ``.data`` or a pointer changes no version, so a version alone would let a copy grow stale, and training
stop unseen. So copies are kept only of what an optimizer of torch's, ours among them, has stepped before, from one step
of it to the next, and only in passes that autograd records: not of matrices that are updated by hand, sharded or
gathered, and not in an evaluation, for which averaged weights may be put in place. Version, memory and strides must be
the same beside, and the stream that of the copy. A CUDA graph that holds an optimizer's step shows no replay: what it
steps is never kept again.

A generation keeps its own copies from token to token (:func:`kept_in`): nobody puts other weights in place there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from qlora_native.ops import _cuda_kernels
from qlora_native.ops._library import Values, recording


class Copies:
    """The copies of a matrix that an optimizer steps, by dtype and factor."""

    __slots__ = ("alias", "in_graph", "kept", "matrix", "state")

    def __init__(self, matrix: Tensor) -> None:
        name = id(matrix)
        self.matrix = weakref.ref(matrix, lambda _: _copies.pop(name, None))
        self.in_graph = False  # a graph steps it
        self.forget()

    def forget(self) -> None:
        self.state: Values | None = None  # of the matrix when the copies were made
        self.alias: Tensor | None = None  # keeps its memory, so that no other tensor has its address
        self.kept: dict[tuple[torch.dtype, float], Tensor] = {}


_copies: dict[int, Copies] = {}  # by the id of the matrix


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        in_graph = any(_cuda_kernels.is_capturing(param.device) for param in group["params"][:1])
        for param in group["params"]:
            copies = _copies.get(id(param))
            if copies is None or copies.matrix() is not param:
                copies = _copies[id(param)] = Copies(param)
            copies.forget()
            copies.in_graph = copies.in_graph or in_graph


register_optimizer_step_post_hook(_after_step)


# By the id of a matrix, the copy's dtype and its factor: the matrix, its version and address, and the copy.
Kept = dict[tuple[int, torch.dtype, float], tuple[Tensor, tuple[int, int], Tensor]]


class _Generation(threading.local):
    copies: Kept | None = None


_generation = _Generation()


@contextmanager
def kept_in(copies: Kept) -> Iterator[None]:
    """Passes of this thread take copies from ``copies``, to which they add what is missing; a capture adds nothing."""
    before, _generation.copies = _generation.copies, copies
    try:
        yield
    finally:
        _generation.copies = before


def are_current(copies: Kept) -> bool:
    """Whether no matrix has changed since it was copied, as far as its version and its address show."""
    return all(_state(matrix) == state for matrix, state, _ in copies.values())


def _state(matrix: Tensor) -> tuple[int, int]:
    return 0 if matrix.is_inference() else matrix._version, matrix.data_ptr()


def copy_of(matrix: Tensor, dtype: torch.dtype, scale: float, make: Callable[..., Tensor]) -> Tensor:
    """``make(matrix, dtype, scale)``, which is scale times the matrix in a dtype; a kept one, where it still holds."""
    if not recording.on:
        kept = _generation.copies
        if kept is None or not isinstance(matrix, torch.nn.Parameter):
            return make(matrix, dtype, scale)
        found = kept.get((id(matrix), dtype, scale))
        if found is None or found[1] != _state(matrix):
            found = matrix, _state(matrix), make(matrix, dtype, scale)
            if not _cuda_kernels.is_capturing(matrix.device):
                kept[id(matrix), dtype, scale] = found
        return found[2]
    copies = _copies.get(id(matrix))
    if (
        copies is None
        or copies.in_graph
        or copies.matrix() is not matrix
        or _cuda_kernels.is_capturing(matrix.device)
    ):
        return make(matrix, dtype, scale)
    stream = _cuda_kernels.raw_stream(matrix.get_device())
    state = matrix._version, matrix.data_ptr(), matrix.stride(), stream
    if copies.state != state:
        copies.forget()
        copies.state = state
        copies.alias = matrix.detach()
    copy = copies.kept.get((dtype, scale))
    if copy is None:
        copy = copies.kept[dtype, scale] = make(matrix, dtype, scale)
    return copy
