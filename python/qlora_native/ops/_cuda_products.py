"""Products with a quantized CUDA weight: the fused kernels, or panels of it and torch's own GEMM, as the plan says.

The plan is native and a pure function of sizes (cuda/matmul_plan.h), or what ``qn.tune`` measured to be faster on this
card. Whatever the path, a weight is never dense as a whole, unless it fits a panel.
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

from qlora_native import reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops import _cuda_kernels, _tuned_plans, dequantize_4bit
from qlora_native.ops._library import Weight
from qlora_native.ops._products import Adapter

TWO_STEP = 3  # MatmulKind::kTwoStep
ALIGNMENT = 16  # bytes, of what the fused kernels read and write
NESTED_BLOCK = 256  # scales


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

    def problem(self) -> _tuned_plans.Problem:
        """What a measured choice is looked up by: all but the rank."""
        return _tuned_plans.Problem(self.m, self.n, self.k, self.block_size, self.dtype, self.forward, self.low_memory)


def question_of(sizes: Sizes, facts: _cuda_kernels.Facts) -> tuple[int, ...]:
    """MatmulQuestion of cuda/matmul_plan.h, field by field."""
    return (*sizes, facts.compute_capability, facts.sm_count)


@lru_cache(maxsize=4096)
def plan_of(module: ModuleType, sizes: Sizes, device: torch.device) -> Plan:
    """The plan for these sizes, all of them positive, on a device: the measured choice, or the built-in one."""
    facts = _cuda_kernels.facts(device)
    question = question_of(sizes, facts)
    choice = _tuned_plans.choice_of(module, sizes.problem(), facts)
    fields = None if choice is None else module.plan_of_choice(question, choice)
    return Plan(*(module.plan_matmul(question) if fields is None else fields))


def sizes_of(
    is_forward: bool, x: torch.Tensor, weight: Weight, adapter: Adapter | None, low_memory: bool = False
) -> Sizes:
    """Of a product of x [M, K], or of a gradient [M, N], with a weight [N, K]."""
    n, k = weight.shape
    rank = 0 if adapter is None else adapter.low.shape[1]
    number = DTYPE_NUMBER.get(x.dtype, DTYPE_NUMBER[torch.float32])
    return Sizes(x.shape[0], n, k, rank, weight.block_size, number, is_forward, low_memory)


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the fused kernels take it: contiguous, at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if _is_aligned(tensor) else tensor.clone()


def rows_of(weight: Weight, first: int, last: int) -> Weight:
    """Rows of a weight [N, K] as a weight of their own, without a copy; ``first`` must be at a multiple of grain()."""
    k = weight.shape[1]
    begin, end = first * k, last * k
    blocks = slice(begin // weight.block_size, -(-end // weight.block_size))
    nested = slice(blocks.start // NESTED_BLOCK, -(-blocks.stop // NESTED_BLOCK))
    return weight._replace(
        packed=weight.packed[begin // 2 : (end + 1) // 2],
        absmax=weight.absmax[blocks],
        nested_absmax=None if weight.nested_absmax is None else weight.nested_absmax[nested],
        shape=[last - first, k],
    )


def grain(weight: Weight) -> int:
    """Rows may be taken out from multiples of this on: there a block of scales begins."""
    group = weight.block_size * (1 if weight.nested_absmax is None else NESTED_BLOCK)
    return group // math.gcd(group, weight.shape[1])


def _with_plain_scales(weight: Weight) -> Weight:
    """The same weight with its scales in fp32."""
    absmax = reference.scales(weight.absmax, weight.nested_absmax, weight.nested_offset, weight.nested_code)
    return weight._replace(absmax=absmax, nested_absmax=None, nested_offset=None)


class Products:
    """The products of ``_products`` for CUDA tensors, by the kernels of a native module; those of dense operands are
    torch's."""

    MAKES_LOW = False

    def __init__(self, module: ModuleType, low_memory: bool) -> None:
        self.module = module
        self.low_memory = low_memory

    def dense_forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x W^T for x [M, K] and a dense W [N, K]. Returns [M, N]."""
        return torch.mm(x, weight.t())

    def dense_grad_input(self, grad_y: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """scale * grad_y W for grad_y [M, N] and a dense W [N, K]. Returns [M, K]."""
        return torch.mm(grad_y, weight) * scale

    def outer(self, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
        """scale * left^T right for left [M, r] and right [M, C], in fp32 or wider. Returns [r, C]."""
        return torch.mm(left.t(), right).to(torch.promote_types(left.dtype, torch.float32)) * scale

    def forward(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, adapter: Adapter | None = None
    ) -> torch.Tensor:
        """x W^T + bias + low up^T for x [M, K]. Returns [M, N] in x's dtype."""
        return self._product(True, x, weight, None if bias is None else bias.to(x.dtype), adapter)

    def grad_input(self, grad_y: torch.Tensor, weight: Weight, adapter: Adapter | None = None) -> torch.Tensor:
        """grad_y W + low up for grad_y [M, N]. Returns [M, K] in grad_y's dtype."""
        return self._product(False, grad_y, weight, None, adapter)

    def _product(
        self, is_forward: bool, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, adapter: Adapter | None
    ) -> torch.Tensor:
        sizes = sizes_of(is_forward, x, weight, adapter, self.low_memory)
        if not (sizes.m and sizes.n and sizes.k):
            return self._two_step(is_forward, x, weight, bias, adapter, sizes.n)
        return self.by_plan(plan_of(self.module, sizes, x.device), sizes, x, weight, bias, adapter)

    def by_plan(
        self,
        plan: Plan,
        sizes: Sizes,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        adapter: Adapter | None,
    ) -> torch.Tensor:
        """The product of these sizes by a plan for them."""
        if plan.kind != TWO_STEP and _is_aligned(weight.packed):
            return self._fused(sizes, plan, x, weight, bias, adapter)
        return self._two_step(sizes.forward, x, weight, bias, adapter, plan.panel_rows or sizes.n)

    def _fused(
        self,
        sizes: Sizes,
        plan: Plan,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        adapter: Adapter | None,
    ) -> torch.Tensor:
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
                sizes.m, sizes.n, sizes.k, tuple(plan), workspace.data_ptr(), workspace.numel(), stream, *pointers,
            )  # fmt: skip
        return y

    def _two_step(
        self,
        is_forward: bool,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        adapter: Adapter | None,
        panel_rows: int,
    ) -> torch.Tensor:
        """By panels of rows of W. An input gradient of several panels is rounded to its dtype once a panel."""
        n, k = weight.shape
        if 0 < panel_rows < n:
            if panel_rows % grain(weight) and weight.nested_absmax is not None:
                weight = _with_plain_scales(weight)
            panel_rows = -(-panel_rows // grain(weight)) * grain(weight)
        stored = x.dtype if x.dtype in DTYPE_NUMBER else torch.float32
        panel = torch.empty(min(panel_rows, n), k, dtype=stored, device=x.device)
        y = x.new_empty(x.shape[0], n) if is_forward else x.new_zeros(x.shape[0], k)
        for first in range(0, n, max(1, panel_rows)):
            last = min(first + panel_rows, n)
            dequantize_4bit.launch(self.module, rows_of(weight, first, last), panel[: last - first])
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


def products(low_memory: bool) -> Products | None:
    """None, after a warning, where torch has a device on which the native kernels cannot run."""
    module = _cuda_kernels.native()
    return None if module is None else Products(module, low_memory)
