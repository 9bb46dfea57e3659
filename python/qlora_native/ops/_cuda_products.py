"""Products with a quantized CUDA weight: by the fused kernels, or by two steps, decoding it for torch's GEMM.

The plan is native and a pure function of sizes (cuda/matmul_plan.h).
"""

from __future__ import annotations

import os
import weakref
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops import _cuda_choice, _cuda_kernels
from qlora_native.ops._cuda_copies import copy_of
from qlora_native.ops._engine import Adapter, Engine, address
from qlora_native.ops._library import recording
from qlora_native.ops._operands import Weight

_graph_task = torch._C._current_graph_task_id  # -1 outside of a backward pass
Panel = tuple[int, int, int, int, int]  # length of a row, rows [begin, end), columns [begin, end)
KINDS = ("gemv", "split_k", "tile", "two_step")  # index = MatmulKind
TWO_STEP = 3
ALIGNMENT = 16  # bytes, of what the fused kernels read and write
# Of a decoded weight at a time: every layer of an 8B model is one panel, only heads and the largest of a 70B are more.
PANEL_BYTES = 256 << 20
PANEL_GRAINS = (1024, 256)  # columns: a tile of the decoder, one of torch's GEMM
# Of decoded weights that stay from the recomputation of a checkpointed layer to its backward pass, at a time.
KEPT_BYTES = int(os.environ.get("QLORA_NATIVE_KEEP_DECODED_MIB") or 0) << 20


class Plan(NamedTuple):
    """MatmulPlan of cuda/matmul_plan.h, field by field."""

    kind: int
    rows: int
    columns: int
    splits: int
    stages: int
    shared_bytes: int
    workspace_bytes: int

    def __str__(self) -> str:
        if self.rows == 0:
            return KINDS[self.kind]
        parts = f" in {self.splits} parts" if self.splits > 1 else ""
        return f"{KINDS[self.kind]} {self.rows}x{self.columns}{parts}"


TWO_STEPS = Plan(TWO_STEP, 0, 0, 1, 0, 0, 0)


class Sizes(NamedTuple):
    """What a plan depends on beside the device and the type, in the order of the native function."""

    m: int
    n: int
    k: int
    r: int
    block_size: int
    dtype: int
    forward: bool


@lru_cache(maxsize=4096)
def plan_of(
    module: ModuleType,
    sizes: Sizes,
    device: torch.device,
    quant_type: int = 0,
    always_fused: bool = False,
) -> Plan:
    """The plan of a product. ``always_fused``, with which the checks on a card reach every kernel, is for any m."""
    facts = _cuda_kernels.facts(device)
    return Plan(
        *module.plan_matmul(
            (*sizes, always_fused, facts.compute_capability, facts.sm_count, quant_type)
        )
    )


@lru_cache(maxsize=4096)
def panel_columns(width: int, depth: int, itemsize: int) -> int:
    """Columns of y [M, width] whose weights, ``depth`` elements each, are decoded at once."""
    most = max(1, PANEL_BYTES // max(1, depth * itemsize))
    return (
        width
        if width <= most
        else next((most - most % grain for grain in PANEL_GRAINS if most >= grain), most)
    )


def _placed(tensor: Any) -> tuple[Any, int]:
    """The tensor as the fused kernels take it, contiguous and at a multiple of 16 bytes, and its address."""
    if tensor is None:
        return None, 0
    at = tensor.data_ptr()
    if at % ALIGNMENT or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        at = tensor.data_ptr()
    return tensor, at


def decode(module: ModuleType, weight: Weight, out: Tensor, panel: Panel | None = None) -> None:
    """Decodes a weight, or a panel of it, into the contiguous ``out``, in the order of torch's current stream."""
    if numel := out.numel():
        panel = panel or (numel, 0, 1, 0, numel)
        with _cuda_kernels.launching(out.device) as stream:
            module.dequantize_4bit(
                DTYPE_NUMBER[out.dtype], out.data_ptr(), panel, stream, weight.pointers()
            )


Key = tuple[int, torch.dtype, int, int]  # of a decoded weight: the address of its codes, dtype, N, K


class _Kept(dict[Key, Tensor]):
    """Of a backward pass, which owns it, and drops it at its end, also at one by an error."""


_passes: weakref.WeakValueDictionary[int, _Kept] = weakref.WeakValueDictionary()


def _keep(key: Key, decoded: Tensor) -> None:
    number = _graph_task()
    kept = _passes.get(number)
    if kept is None:
        kept = _passes[number] = _Kept()
        torch.autograd.Variable._execution_engine.queue_callback(kept.clear)
    kept.pop(key, None)
    if sum(other.nbytes for other in [*kept.values(), decoded]) <= KEPT_BYTES:
        kept[key] = decoded


class Cuda(Engine):
    """The kernels of a native module; products of dense operands are torch's."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def product(
        self,
        is_forward: bool,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        adapter: Adapter | None = None,
        plan: Plan | None = None,
    ) -> Tensor:
        if bias is not None:
            bias = bias.to(x.dtype)
        number = DTYPE_NUMBER.get(x.dtype)
        if not number or weight.packed.data_ptr() % ALIGNMENT:  # 0 is fp32, in which none is fused
            return self._two_step(is_forward, x, weight, bias, adapter)
        m, (n, k), device = x.shape[0], weight.shape, x.device
        low, up = (None, None) if adapter is None else adapter[:2]
        rank = 0 if low is None else low.shape[1]
        sizes = m, n, k, rank, weight.block_size, number, is_forward  # as Sizes has them
        if plan is None:
            plan = TWO_STEPS
            if m and n and k:
                plan = plan_of(self.module, sizes, device, weight.quant_type)
                if m in _cuda_choice.TOKENS and (card := _cuda_choice.card(self.module, device)):
                    fused = plan_of(self.module, sizes, device, weight.quant_type, True)
                    if fused.kind != TWO_STEP:
                        ways = fused, TWO_STEPS
                        operands = is_forward, x, weight, bias, adapter
                        runs = [partial(self.product, *operands, way) for way in ways]
                        key = *sizes, weight.quant_type
                        plan = ways[_cuda_choice.fastest(card, device, key, ways.index(plan), runs)]
        if plan.kind == TWO_STEP:
            return self._two_step(is_forward, x, weight, bias, adapter)
        x, x_at = _placed(x)
        bias, bias_at = _placed(bias)
        low, low_at = _placed(low)
        up, up_at = _placed(up)
        y = x.new_empty(m, n if is_forward else k)
        room = plan.workspace_bytes
        workspace = torch.empty(room, dtype=torch.uint8, device=device) if room else None
        with _cuda_kernels.launching(device) as stream:
            self.module.linear_4bit(
                is_forward, number, x_at, bias_at, low_at, up_at, rank, y.data_ptr(), m, n, k, tuple(plan),
                address(workspace), room, stream, weight.pointers(),
            )  # fmt: skip
        return y

    def _two_step(
        self, is_forward: bool, x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter | None
    ) -> Tensor:
        """By panels of W that are columns of y, so that each sum is rounded once; of most weights, one.

        The low-rank term comes first and W's product adds to it, which spares a pass over y.
        """
        n, k = weight.shape
        width, depth = (n, k) if is_forward else (k, n)
        stored = x.dtype if x.dtype in DTYPE_NUMBER else torch.float32
        columns = panel_columns(width, depth, stored.itemsize)
        if columns >= width:  # the same with fewer operations of the host
            key = weight.packed.data_ptr(), stored, n, k
            decoded = None
            if KEPT_BYTES and not is_forward:
                decoded = _passes.get(_graph_task(), _Kept()).pop(key, None)
            if decoded is None:
                decoded = x.new_empty(n, k, dtype=stored)
                decode(self.module, weight, decoded)
                if KEPT_BYTES and recording.again:
                    _keep(key, decoded)
            right = decoded if stored == x.dtype else decoded.to(x.dtype)
            if is_forward:
                right = right.t()
            if adapter is None:
                return torch.mm(x, right) if bias is None else torch.addmm(bias, x, right)
            up = adapter.up.t() if is_forward else adapter.up
            y = torch.mm(adapter.low, up) if bias is None else torch.addmm(bias, adapter.low, up)
            return y.addmm_(x, right)
        # From torch's allocator, which returns the same block to the next layer on this stream.
        panel = torch.empty(columns * depth, dtype=stored, device=x.device)
        y = x.new_empty(x.shape[0], width)
        if adapter is not None:
            multiply_into(bias, adapter.low, adapter.up.t() if is_forward else adapter.up, y)
        for first in range(0, width, max(1, columns)):
            last = min(first + columns, width)
            rectangle = (first, last, 0, k) if is_forward else (0, n, first, last)
            decoded = panel[: (last - first) * depth].view(
                (last - first, k) if is_forward else (n, last - first)
            )
            decode(self.module, weight, decoded, (k, *rectangle))
            right = decoded.to(x.dtype)
            out = y[:, first:last]
            addend = out if adapter is not None else None if bias is None else bias[first:last]
            multiply_into(addend, x, right.t() if is_forward else right, out)
        return y

    def dense(
        self,
        is_forward: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        if is_forward or scale == 1.0:
            return super().dense(is_forward, x, weight, bias, scale, out)
        if out is None:
            out = x.new_empty(x.shape[0], weight.shape[1])
        return out.addmm_(x, weight, beta=0, alpha=scale)  # beta 0: what is in out is not read

    def adapter(self, matrix: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        if scale == 1.0 and matrix.dtype == dtype:
            return matrix
        return copy_of(matrix, dtype, scale, self.narrow)

    def grad_low(self, grad_y: Tensor, b: Tensor, scale: float) -> Tensor:
        if b.dtype == grad_y.dtype:
            return self.dense(False, grad_y, b, scale=scale)
        # By the copy of B that forward multiplied.
        return torch.mm(grad_y, self.adapter(b, grad_y.dtype, scale))

    def narrow(self, tensor: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        if scale == 1.0 or torch.float64 in (tensor.dtype, dtype):
            return super().narrow(tensor, dtype, scale)
        # torch computes in the operand's dtype.
        wide = tensor if tensor.dtype == dtype else tensor.float()
        return torch.mul(wide, scale, out=torch.empty(tensor.shape, dtype=dtype, device=tensor.device))

    def outer(
        self, left: Tensor, right: Tensor, scale: float, dtype: torch.dtype, transposed: bool = False
    ) -> Tensor:
        given = left.dtype
        is_wide = given == dtype == torch.float32
        if not is_wide and (given.itemsize > 2 or (dtype == given and scale == 1.0)):
            # torch's product rounds once as well.
            return super().outer(left, right, scale, dtype, transposed)
        if transposed:
            left, right = right, left
        if is_wide:
            return self.dense(False, left.t(), right, scale=scale)
        product = wide_product(left.t(), right)
        if dtype != torch.float32:
            return self.narrow(product, dtype, scale)
        return product if scale == 1.0 else product.mul_(_as_tensor(scale))


@lru_cache
def _as_tensor(number: float) -> Tensor:
    """The number as torch makes it of one at every call, but in the dtype of the product, which spares a conversion."""
    return torch.tensor(number, dtype=torch.float32, device="cpu")


def multiply_into(addend: Tensor | None, left: Tensor, right: Tensor, out: Tensor) -> None:
    """Fills ``out`` [M, C] with left right + addend, which may be a bias [C] or ``out`` itself, by one launch."""
    if addend is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(addend, left, right, out=out)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left right in fp32 for operands in 16 bits. Torch has this product on CUDA alone: tests replace it."""
    return torch.mm(left, right, out_dtype=torch.float32)
