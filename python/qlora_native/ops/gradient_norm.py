"""gradient_norm: the Euclidean norm of a list of gradients taken as one vector, in double precision."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._library import fake, implement
from qlora_native.ops._optim import address_of, row_of, table_of


def check(grads: list[Tensor]) -> None:
    for number, grad in enumerate(grads):
        if grad.dtype not in DTYPE_NUMBER or grad.layout is not torch.strided:
            raise ValueError(
                f"gradient_norm: gradient {number} is {grad.dtype}, {grad.layout}: expected float32, bfloat16 or "
                "float16, dense."
            )


def _table(grads: list[Tensor]) -> tuple[list[Tensor], array[int]]:
    """Contiguous gradients, to be kept while the native code runs, and rows of them alone."""
    dense = [grad.contiguous() for grad in grads]
    return dense, table_of([row_of(grad, grad, {}) for grad in dense])


@implement("gradient_norm", "CPU")
def cpu(grads: list[Tensor]) -> Tensor:
    check(grads)
    dense, table = _table(grads)
    return torch.tensor(_C.gradient_norm(address_of(table), len(dense)), dtype=torch.float64)


@implement("gradient_norm", "CUDA")
def cuda(grads: list[Tensor]) -> Tensor:
    from qlora_native.ops import _cuda_kernels
    from qlora_native.ops._cuda_optim import DeviceTable

    check(grads)
    device = grads[0].device
    module = _cuda_kernels.native(device)
    if module is None or any(grad.device != device for grad in grads):
        return reference.gradient_norm(grads)
    dense, table = _table(grads)
    return DeviceTable(module, "gradient_norm", table, len(dense), device).measure(table)


@implement("gradient_norm", "CompositeExplicitAutograd")
def anywhere(grads: list[Tensor]) -> Tensor:
    check(grads)
    return reference.gradient_norm(grads)


@fake("gradient_norm")
def shapes(grads: list[Tensor]) -> Tensor:
    check(grads)
    return grads[0].new_empty((), dtype=torch.float64)
