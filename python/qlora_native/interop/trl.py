"""The log-probabilities of TRL's trainers, computed for a few tokens at a time.

TRL multiplies by the output embedding's dense weight itself, 4,096 tokens by 32,768 words at a time, and on a CPU also
the tokens that have no label. Here one that is quantized stays so, on any device; on a CPU the tokens without a label
are left out, and a chunk of logits is that of ``qn.linear_cross_entropy``.

TRL has no registry for this, so :func:`patch_trl` replaces functions of its. It looks those of the chunks up in this
module of its own in each forward; the one that a trainer calls when it is made its modules import by name, so it is
replaced in all that are loaded.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary
from trl.trainer import utils

from qlora_native import functional
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.ops.linear_cross_entropy import chunk_tokens
from qlora_native.weight import QuantizedWeight

_theirs: Any = getattr(utils, "_ChunkedLogProbFunction", None)
# A head's packed bytes, which TRL hands on -> a reference to the head.
_quantized_heads = WeakTensorKeyDictionary()

# Log-probabilities and what the trainers log beside them, [M] each.
Outputs = tuple[Tensor | None, ...]


def _remember_head(add: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(add)
    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> Any:
        head = model.get_output_embeddings()
        if isinstance(head, QuantizedLinear):
            _quantized_heads[head.weight] = weakref.ref(head)
        return add(model, *args, **kwargs)

    return add_fused_lm_head


def _of_chunk(
    h: Tensor,  # [M, K]
    weight: Tensor | QuantizedWeight,  # [V, K]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [M]
    temperature: float,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> Outputs:
    if isinstance(weight, QuantizedWeight):
        logits = functional.linear(h, weight, bias)
    else:
        logits = functional.dense_linear(
            h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype)
        )
    logits = logits.float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    chosen, log_sum = logits.gather(1, targets[:, None])[:, 0], logits.logsumexp(1)
    fixed = logits.detach()
    found = {
        "entropy": lambda: log_sum - ((logits - log_sum[:, None]).exp() * logits).sum(1),
        "log_sum_sq_probs": lambda: (2 * fixed).logsumexp(1) - 2 * log_sum.detach(),
        "mean_logits": lambda: fixed.mean(1),
        "is_top1": lambda: fixed.argmax(1) == targets,
    }
    return chosen - log_sum, *(
        compute() if name in outputs else None for name, compute in found.items()
    )


class ChunkedLogProbs:
    """In the place of TRL's autograd function of this interface."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Any, bias: Tensor | None, targets: Tensor, *options: Any
    ) -> Outputs:
        head = _quantized_heads.get(weight)
        if head is None and hidden.device.type != "cpu":
            return _theirs.apply(hidden, weight, bias, targets, *options)
        if head is not None:
            weight = head().quantized
        temperature, _, softcap, scale, outputs = options
        size = chunk_tokens(hidden.device.type, weight.shape[0], hidden.dtype.itemsize, len(hidden))
        given = temperature, softcap, scale, outputs
        parts = [
            checkpoint(
                _of_chunk,
                h,
                weight,
                bias,
                chosen,
                *given,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for h, chosen in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        return tuple(
            None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
        )


def patch_trl() -> None:
    """Let TRL's trainers take log-probabilities by the chunks of this library.

    Needed for a model whose output embedding is quantized, as that of a GGUF file; with others it saves memory and time
    on a CPU. It replaces three functions of ``trl.trainer.utils``, whatever was imported before, and is called once a
    process. Older versions of TRL have none of these functions and stay as they are.
    """
    if not hasattr(utils, "add_fused_lm_head") or utils._ChunkedLogProbFunction is ChunkedLogProbs:
        return
    use_triton, add = utils._use_triton, utils.add_fused_lm_head
    # With Triton, labels alone would be scored.
    utils._use_triton = lambda device: device.type == "cpu" or use_triton(device)
    utils._ChunkedLogProbFunction = ChunkedLogProbs
    ours = _remember_head(add)
    for names in [vars(module) for name, module in sys.modules.items() if name.startswith("trl.")]:
        if names.get("add_fused_lm_head") is add:
            names["add_fused_lm_head"] = ours
