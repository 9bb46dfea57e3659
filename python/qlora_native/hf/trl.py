"""TRL's trainers multiply by the dense weight of the output embedding themselves: one that is quantized is decoded.

TRL looks the function up in this module of its own when a trainer is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from trl.trainer import utils

from qlora_native.nn.linear import QuantizedLinear


def _with_dense_head(add: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(add)
    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> Any:
        head = model.get_output_embeddings()
        if isinstance(head, QuantizedLinear):
            dense = head.dequantize()
            warnings.warn(
                f"TRL multiplies by the output embedding's dense weight: its {head.quantized.quant_type} is decoded, "
                f"{dense.weight.nbytes / 2**20:,.0f} MiB.",
                stacklevel=2,
            )
            model.set_output_embeddings(dense)
            model.config.tie_word_embeddings = False  # the input embedding stays quantized
            model.all_tied_weights_keys = {}
        return add(model, *args, **kwargs)

    return add_fused_lm_head


if hasattr(utils, "add_fused_lm_head"):  # older versions take the model's own logits
    utils.add_fused_lm_head = _with_dense_head(utils.add_fused_lm_head)
