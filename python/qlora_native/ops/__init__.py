"""The ops behind ``torch.ops.qlora_native``: kernels per device, fake and derivative (to add one: CONTRIBUTING.md)."""

from __future__ import annotations

from qlora_native.ops import (  # noqa: F401  (importing them registers the ops)
    adamw_step,
    causal_attention,
    dense_linear,
    dequantize_4bit,
    experts_4bit,
    gptq_4bit,
    gradient_norm,
    linear_4bit,
    linear_cross_entropy,
    lion_step,
    lora_linear_4bit,
    quantize_4bit,
    rms_norm,
    rotary,
    search_scales_4bit,
    swiglu,
)
from qlora_native.ops._library import SCHEMAS as SCHEMAS
