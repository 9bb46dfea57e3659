"""The table of tensors that the optimizers' native functions read: one row a tensor, addresses and sizes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from qlora_native import _C, _native

# Columns of a row, as in cpp/python/tensor_rows.h.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, EXP_AVG_ABSMAX, EXP_AVG_SQ_ABSMAX, STEP, NUMEL, DTYPE, GROUP = range(
    _C.optim_row_length
)
State = torch.Tensor | None


def row_of(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: State,
    exp_avg_absmax: State,
    exp_avg_sq_absmax: State,
    step: State,
    group: int = 0,
) -> list[int]:
    """One row. All tensors are contiguous and on one device, grad of param's dtype; the caller keeps them alive."""
    tensors = (param, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, step)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return [*addresses, param.numel(), _native.DTYPE_NUMBER[param.dtype], group]


def table_of(rows: Sequence[Sequence[int]]) -> array[int]:
    """Rows one after another, int64 [len(rows) * row length]."""
    table = array("q")
    for row in rows:
        table.extend(row)
    return table


def address_of(table: array[int]) -> int:
    """Where a table stands, for the native call."""
    return table.buffer_info()[0]


def check_lists(op: str, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    """Refuses lists that do not fit together, tensor by tensor."""
    if len(params) != len(grads):
        raise ValueError(f"{op}: {len(params)} parameters, but {len(grads)} gradients: expected as many.")
    for number, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if param.dtype not in _native.DTYPE_NUMBER:
            raise ValueError(
                f"{op}: parameter {number} is {param.dtype}: expected float32, bfloat16 or float16; "
                "convert the model, or leave the parameter to torch.optim."
            )
        if grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"{op}: parameter {number} is {list(param.shape)} on {param.device}, its gradient {list(grad.shape)} "
                f"on {grad.device}: expected the same."
            )


def check_states(
    op: str,
    params: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    absmaxes: Sequence[torch.Tensor],
    codes: torch.dtype,
    name: str,
) -> None:
    """Refuses states that are neither fp32 without absmax nor ``codes`` with one fp32 absmax a block."""
    if len(states) != len(params) or len(absmaxes) not in (0, len(params)):
        raise ValueError(
            f"{op}: {len(params)} parameters, but {len(states)} tensors {name} and {len(absmaxes)} of its absmax: "
            "expected one each, and no absmax for 32-bit states."
        )
    dtype = codes if absmaxes else torch.float32
    for number, (param, state) in enumerate(zip(params, states, strict=True)):
        blocks = -(-param.numel() // _native.STATE_BLOCK)
        absmax = absmaxes[number] if absmaxes else None
        fits = state.dtype == dtype and state.shape == param.shape and state.is_contiguous()
        if absmax is not None:
            fits = fits and absmax.dtype == torch.float32 and absmax.numel() == blocks and absmax.is_contiguous()
            fits = fits and absmax.device == param.device
        if not fits or state.device != param.device:
            beside = "" if absmax is None else f" with an absmax of {absmax.dtype} {list(absmax.shape)}"
            wanted = "" if absmax is None else f" with an absmax of float32 [{blocks}]"
            raise ValueError(
                f"{op}: {name} {number} is {state.dtype} {list(state.shape)} on {state.device}{beside}: expected "
                f"contiguous {dtype} {list(param.shape)} on {param.device}{wanted}."
            )


def check_steps(op: str, params: Sequence[torch.Tensor], steps: Sequence[torch.Tensor]) -> None:
    """Refuses step counters that are not one fp32 number each."""
    if len(steps) != len(params) or any(step.dtype != torch.float32 or step.numel() != 1 for step in steps):
        raise ValueError(f"{op}: expected {len(params)} step counters, float32 [] each.")


def on_one_device(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> bool:
    """Whether the native kernels take these at once: one device, and each gradient of its parameter's dtype."""
    return len({param.device for param in params}) == 1 and all(
        param.dtype == grad.dtype for param, grad in zip(params, grads, strict=True)
    )


class Plain:
    """A parameter and its gradient as the native code takes them: contiguous, of one dtype. ``done`` writes back."""

    def __init__(self, param: torch.Tensor, grad: torch.Tensor) -> None:
        self.original = param
        self.param = param.contiguous()
        self.grad = grad.contiguous()

    def done(self) -> None:
        if self.param is not self.original:
            self.original.copy_(self.param)
