"""Products with a quantized CUDA weight: the fused kernels, or panels of it, never dense as a whole, and torch's GEMM.

The plan is native and a pure function of sizes (cuda/matmul_plan.h).
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops import _cuda_kernels, dequantize_4bit
from qlora_native.ops._library import NESTED_BLOCK, Weight
from qlora_native.ops.linear_4bit import Adapter, Engine

KINDS = ("gemv", "split_k", "tile", "two_step")  # index = MatmulKind
TWO_STEP = 3
ALIGNMENT = 16  # bytes, of what the fused kernels read and write


class Plan(NamedTuple):
    """MatmulPlan of cuda/matmul_plan.h, field by field."""

    kind: int
    rows: int
    columns: int
    splits: int
    stages: int
    shared_bytes: int
    workspace_bytes: int
    panel_rows: int

    def __str__(self) -> str:
        if self.rows == 0:
            return KINDS[self.kind]
        parts = f" in {self.splits} parts" if self.splits > 1 else ""
        return f"{KINDS[self.kind]} {self.rows}x{self.columns}{parts}"


class Sizes(NamedTuple):
    """What a plan depends on beside the device, in the order of the native function."""

    m: int
    n: int
    k: int
    r: int
    block_size: int
    dtype: int
    forward: bool
    low_memory: bool


@lru_cache(maxsize=4096)
def plan_of(module: ModuleType, sizes: Sizes, device: torch.device) -> Plan:
    facts = _cuda_kernels.facts(device)
    return Plan(*module.plan_matmul((*sizes, facts.compute_capability, facts.sm_count)))


def _plain(tensor: Tensor) -> Tensor:
    """The tensor as the fused kernels take it: contiguous, at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


class Cuda(Engine):
    """The kernels of a native module; products of dense operands are torch's."""

    def __init__(self, module: ModuleType, low_memory: bool) -> None:
        super().__init__(low_memory)
        self.module = module

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter | None = None) -> Tensor:
        return self._product(True, x, weight, None if bias is None else bias.to(x.dtype), adapter)

    def grad_input(self, grad_y: Tensor, weight: Weight, adapter: Adapter | None = None) -> Tensor:
        return self._product(False, grad_y, weight, None, adapter)

    def _product(
        self, is_forward: bool, x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter | None
    ) -> Tensor:
        rank = 0 if adapter is None else adapter.low.shape[1]
        number = DTYPE_NUMBER.get(x.dtype, DTYPE_NUMBER[torch.float32])
        n, k = weight.shape
        sizes = Sizes(x.shape[0], n, k, rank, weight.block_size, number, is_forward, self.low_memory)
        if not (sizes.m and sizes.n and sizes.k):
            return self._two_step(is_forward, x, weight, bias, adapter, sizes.n)
        plan = plan_of(self.module, sizes, x.device)
        if plan.kind != TWO_STEP and weight.packed.data_ptr() % ALIGNMENT == 0:
            return self._fused(sizes, plan, x, weight, bias, adapter)
        return self._two_step(is_forward, x, weight, bias, adapter, plan.panel_rows or sizes.n)

    def _fused(
        self, sizes: Sizes, plan: Plan, x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter | None
    ) -> Tensor:
        x = _plain(x)
        y = x.new_empty(sizes.m, sizes.n if sizes.forward else sizes.k)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=x.device)
        operands = [bias, *(adapter[:2] if adapter is not None else (None, None))]
        kept = [None if operand is None else _plain(operand) for operand in operands]
        bias_at, low_at, up_at = (0 if operand is None else operand.data_ptr() for operand in kept)
        with _cuda_kernels.launching(x.device) as stream:
            pointers = _cuda_kernels.with_tables(weight).pointers()
            self.module.linear_4bit(
                sizes.forward, sizes.dtype, x.data_ptr(), bias_at, low_at, up_at, sizes.r, y.data_ptr(),
                sizes.m, sizes.n, sizes.k, tuple(plan), workspace.data_ptr(), workspace.numel(), stream, pointers,
            )  # fmt: skip
        return y

    def _two_step(
        self, is_forward: bool, x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter | None, panel_rows: int
    ) -> Tensor:
        """By panels of rows of W. An input gradient of several panels is rounded to its dtype once a panel."""
        n, k = weight.shape
        if 0 < panel_rows < n:
            # A panel begins at a block of scales; where it would begin inside a nested one, scales become fp32.
            nested = weight.nested_absmax is not None
            if nested and panel_rows * k % (weight.block_size * NESTED_BLOCK):
                absmax = reference.scales(weight.absmax, weight.nested_absmax, weight.nested_offset, weight.nested_code)
                weight = weight._replace(absmax=absmax, nested_absmax=None, nested_offset=None)
            grain = weight.block_size // math.gcd(weight.block_size, k)
            panel_rows = -(-panel_rows // grain) * grain
        stored = x.dtype if x.dtype in DTYPE_NUMBER else torch.float32
        panel = torch.empty(min(panel_rows, n), k, dtype=stored, device=x.device)
        y = x.new_empty(x.shape[0], n) if is_forward else x.new_zeros(x.shape[0], k)
        for first in range(0, n, max(1, panel_rows)):
            last = min(first + panel_rows, n)
            dequantize_4bit.launch(self.module, weight.slice(first, last), panel[: last - first])
            dense = panel[: last - first].to(x.dtype)
            if not is_forward:
                y.addmm_(x[:, first:last], dense)
            elif bias is None:
                torch.mm(x, dense.t(), out=y[:, first:last])
            else:
                torch.addmm(bias[first:last], x, dense.t(), out=y[:, first:last])
        if adapter is not None:
            y.addmm_(adapter.low, adapter.up.t() if is_forward else adapter.up)
        return y
