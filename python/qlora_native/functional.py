"""The differentiable functions: products with a quantized weight, and the loss over a large vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_native.ops._direct import call, unobserved
from qlora_native.ops._engine import autocast
from qlora_native.ops._operands import Weight
from qlora_native.ops.linear_4bit import linear_4bit, product
from qlora_native.ops.lora_linear_4bit import adapted_at_once, lora_linear_4bit
from qlora_native.weight import QuantizedWeight

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for a dense weight [N, K], differentiable in all three, as torch's ``linear``.

    In 16 bits on a CPU it is the native product, whose speed does not depend on bf16 instructions; elsewhere torch's.
    """
    plain = x.device.type == "cpu" and x.dtype in SIXTEEN_BITS and x.dtype == weight.dtype
    if not plain or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(x, weight, bias)
    return call("dense_linear", x, weight, bias)


def linear(x: Tensor, w: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with a 4-bit weight.

    The weight is decoded panel by panel straight to x's dtype and multiplied with fp32 sums, never all of a large
    one at once: on CUDA, a panel for many tokens is up to 256 MiB. Nothing decoded is saved for backward.
    Differentiable (any number of times) in ``x`` and ``bias``; the weight is frozen. Under autocast, x is cast as
    torch's linear would cast it.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64.
        w: [N, K].
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the numbers.
    """
    y = product(w._matrix(), x, bias) if unobserved(x, bias) else None
    return linear_4bit(x, w.op_args(), bias) if y is None else y


def dequantize_rows(w: QuantizedWeight, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of a weight in a GGUF format: an embedding whose table stays as the file holds it.

    Args:
        w: [V, K] of whole blocks a row.
        ids: int64 or int32 [...], 0 <= id < V.
        dtype: float32, bfloat16 or float16; the weight's own by default.

    Returns:
        [..., K], each value as :meth:`QuantizedWeight.dequantize` rounds it. No gradient flows.

    Raises:
        ValueError: a weight of another format, or whose rows are no whole blocks.
        IndexError: an id out of range, on a CPU.
    """
    if not w.is_gguf or len(w.shape) != 2 or w.shape[1] % w.block_size:
        raise ValueError(
            f"dequantize_rows: the weight is {list(w.shape)} in {w.quant_type}: expected [V, K] in a GGUF format with "
            "rows of whole blocks."
        )
    rows = torch.nn.functional.embedding(ids, w.packed.view(w.shape[0], -1))
    found = w.with_arguments(
        w.op_args()._replace(packed=rows.view(-1), shape=[ids.numel(), w.shape[1]])
    )
    return found.dequantize(dtype).view(*ids.shape, w.shape[1])


def lora_linear(
    x: Tensor,
    w: QuantizedWeight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    x_lora: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scale * (x_lora A^T) B^T as one autograd node.

    Saved for backward: x_lora, x_lora A^T, A and B; nothing dequantized. Adapters are cast to x's dtype for their
    products (to float32 for a few tokens on a CPU) and get gradients in their own dtype.

    Args:
        x: [..., K].
        w: [N, K], frozen.
        a: [r, K], float32 or bfloat16.
        b: [N, r], likewise.
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
        bias: [N] or None.
        x_lora: what the adapter sees in place of x (x after dropout), [..., K] in x's dtype.

    Returns:
        [..., N] in x's dtype. Gradients flow to x, x_lora, a, b and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the numbers.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """
    y = adapted_at_once(w._matrix, x, bias, a, b, scale) if x_lora is None else None
    return lora_linear_4bit(x, w.op_args(), a, b, scale, bias, x_lora) if y is None else y


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    ignore_index: int = -100,
    rows: Tensor | None = None,
    row_ids: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of the logits ``h @ weight.T``, which never exist as a whole.

    On a CPU, rows whose label is ``ignore_index`` are not computed at all; on other devices nothing waits, so that
    a CUDA graph can capture the loss. The gradient is formed together with the loss, chunk by chunk, so memory is one
    chunk of logits whatever the number of tokens.

    Args:
        h: hidden states [..., K].
        weight: output embedding [V, K], dense in h's dtype or a QuantizedWeight.
        labels: int64 [...], 0 <= label < V or ``ignore_index``.
        rows: [R, K], in the place of those of the weight with the numbers ``row_ids``, int64 [R]; or None.

    Returns:
        fp32 [] (fp64 for fp64 input); NaN if every label is ignored, as torch's cross entropy, and, except on a CPU, if
        one is out of range. Gradients for h, and for rows or else a dense weight that require one; once differentiable.

    Raises:
        ValueError: shapes or dtypes that do not fit; on a CPU, a label out of range.
    """
    derived = weight if rows is None else rows
    need_grad_weight = (
        torch.is_grad_enabled() and isinstance(derived, Tensor) and derived.requires_grad
    )
    if isinstance(weight, QuantizedWeight):
        h = autocast(h)[0]  # type: ignore[assignment]
        arguments = weight.op_args()
    else:
        h, weight = autocast(h, weight)  # type: ignore[assignment]
        arguments = Weight(weight, None, None, None, None, None, list(weight.shape), 0, 64)  # type: ignore[arg-type]
    options = (
        ignore_index,
        torch.is_grad_enabled() and h.requires_grad,
        need_grad_weight,
        rows,
        row_ids,
    )
    return torch.ops.qlora_native.linear_cross_entropy(h, labels, *options, *arguments)[0]
