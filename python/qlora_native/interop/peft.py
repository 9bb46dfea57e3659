"""PEFT's LoRA on our 4-bit layers: one autograd node where the adapter is plain LoRA, PEFT's own code elsewhere.

PEFT chooses the class of an adapted layer by a list of functions. Its public way into the list, custom modules of a
config, is lost when the config is saved; so this file puts ours before PEFT's default one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, cast

import torch
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from qlora_native.lora import LoraConfig as LoraDefaults
from qlora_native.nn.experts import Factors, QuantizedExperts, put_stack
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.weight import QuantizedWeight, quantize

# Where PEFT's cache of a layer holds the weight from before a merge.
_UNMERGED = "qlora_native.unmerged"
# What lora_A and lora_B may begin with where the base weight is neither read as floats nor changed.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


class QuantizedLoraLinear(Linear):
    """PEFT's LoRA layer over a :class:`qlora_native.nn.QuantizedLinear`.

    One active plain adapter (LoRA or rsLoRA, with or without dropout) is one autograd node with the base; all else goes
    through PEFT's own forward, with the base's decoded weight where it uses one. Merging quantizes the sum of the
    decoded weight and the adapters anew; unmerging puts the earlier bytes back.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any
    ) -> None:
        config.fan_in_fan_out = False  # a 4-bit weight is [N, K] whatever the dense layer was
        super().__init__(base_layer, adapter_name, config, **options)

    def get_base_layer(self) -> nn.Module:
        return self.__dict__.get("_stand_in") or super().get_base_layer()

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any
    ) -> None:
        init = config.init_lora_weights
        if init not in _PLAIN_INITS:
            raise ValueError(
                f"init_lora_weights is {init!r}, which takes the adapter out of the base's weights, and these are "
                f"4-bit: expected one of {', '.join(map(repr, _PLAIN_INITS))}."
            )
        reads_weight = init == "orthogonal" or self.resolve_lora_variant(config=config) is not None
        with self._standing_in() if reads_weight else nullcontext():
            super().update_layer(adapter_name, r, lora_alpha, config=config, **options)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_on = not self.disable_adapters and not self.merged
        active = [name for name in self.active_adapters if is_on and name in self.lora_A]
        reads_weight = any(name in self.lora_variant for name in active)
        is_plain = len(active) == 1 and not reads_weight and not self.lora_bias[active[0]]
        base: Any = self.base_layer
        if args or kwargs or not is_plain or not isinstance(base, QuantizedLinear):
            with self._standing_in() if reads_weight else nullcontext():
                return super().forward(x, *args, **kwargs)
        name = active[0]
        seen = x if base.compute_dtype is None else x.to(base.compute_dtype)
        dropout = self.lora_dropout[name]
        dropped = None if isinstance(dropout, nn.Identity) or not dropout.training else dropout(seen)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        y: Tensor = base.with_adapter(seen, a, b, self.scaling[name], dropped)
        return y.to(x.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weight, which is quantized anew; its bytes are kept for :meth:`unmerge`."""
        if "_stand_in" in self.__dict__:  # PEFT merges again what it took out for a moment
            super().merge(safe_merge, adapter_names)
            return
        base: Any = self.get_base_layer()
        before, merged = base.quantized, len(self.merged_adapters)
        with self._standing_in() as dense:
            super().merge(safe_merge, adapter_names)
        if len(self.merged_adapters) == merged:
            return
        self._caches.setdefault(_UNMERGED, before)
        base.quantized = _quantized_like(before, dense.weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        if "_stand_in" in self.__dict__ or not self.merged:
            super().unmerge()
            return
        base: Any = self.get_base_layer()
        for name in self.merged_adapters:
            self._caches.pop(f"{name}-weight_norm", None)  # DoRA's, of no use any more
            if self.lora_bias.get(name):
                base.bias.data -= self.lora_B[name].bias * self.scaling[name]
        self.merged_adapters.clear()
        base.quantized = self._caches.pop(_UNMERGED)

    @contextmanager
    def _standing_in(self) -> Iterator[nn.Linear]:
        """Inside, PEFT's code finds a dense fp32 layer of the decoded weight, and the same bias, as the base."""
        base: Any = self.get_base_layer()
        dense = base.dequantize(torch.float32)
        self.__dict__["_stand_in"] = dense  # not an attribute: it must not become a part of the module
        try:
            yield dense
        finally:
            del self.__dict__["_stand_in"]


class QuantizedWeightWrapper(QuantizedLoraLinear):
    """The same for a weight that ``target_parameters`` names."""

    parameter_name = "weight"


class QuantizedParamWrapper(ParamWrapper):
    """PEFT's LoRA on one stack of 4-bit experts: each expert's product is one autograd node with its adapter."""

    def get_param(self) -> Tensor:
        """A tensor of the dense stack's shape, dtype and device, all that PEFT asks it for, over one number."""
        stack = self._experts.stack(self.parameter_name)
        if stack is None:
            return super().get_param()
        like = torch.empty(1, dtype=stack.dtype, device=stack.device).expand(stack.shape)
        return like.mT if self._experts.is_transposed else like

    @property
    def _experts(self) -> QuantizedExperts:
        return cast(QuantizedExperts, self.get_base_layer())

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        if self._experts.stack(self.parameter_name) is None:
            with super()._activate_lora(active_adapters):
                yield
            return
        adapters = self._experts.adapters
        adapters[self.parameter_name] = [
            self._factors(name) for name in active_adapters if name in self.lora_A
        ]
        try:
            yield
        finally:
            del adapters[self.parameter_name]

    def _factors(self, name: str) -> Factors:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        stacked = b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return a.view(self.num_experts, -1, a.shape[1]), stacked, self.scaling[name]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the decoded stack, which is quantized anew; its bytes are kept for :meth:`unmerge`."""
        before = self._experts.stack(self.parameter_name)
        names = [
            name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A
        ]
        if before is None or not names:
            super().merge(safe_merge, adapter_names)
            return
        dense = before.dequantize(torch.float32)
        for name in names:
            delta = self.get_delta_weight(name)
            dense += delta.mT if self._experts.is_transposed else delta
        if safe_merge and not dense.isfinite().all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken"
            )
        self._caches.setdefault(_UNMERGED, before)
        put_stack(self._experts, self.parameter_name, _quantized_like(before, dense))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        before = self._caches.pop(_UNMERGED, None)
        if before is None:
            super().unmerge()
            return
        put_stack(self._experts, self.parameter_name, before)
        self.merged_adapters.clear()


# By which PEFT recognizes what may be wrapped for another stack, or get another adapter.
QuantizedParamWrapper.__name__ = QuantizedWeightWrapper.__name__ = "ParamWrapper"


def _quantized_like(before: QuantizedWeight, dense: Tensor) -> QuantizedWeight:
    if before.is_gguf:
        raise ValueError(
            f"merge: the weights are those of a GGUF file in {before.quant_type}, which stay as they are: "
            "qlora_native.merge(model) or `qlora merge` makes a 16-bit model."
        )
    options = {name: getattr(before, name) for name in ("quant_type", "block_size", "double_quant")}
    after = quantize(dense, **options)
    after.dtype, after.storage_dtype = before.dtype, before.storage_dtype
    return after


_LINEAR_NAMES = (
    *(
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "out_proj",
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "dense",
    ),
    *(
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "c_fc",
        "c_proj",
        "dense_h_to_4h",
        "dense_4h_to_h",
    ),
    *("fc1", "fc2"),
)


def peft_config(**options: Any) -> LoraConfig:
    """A PEFT ``LoraConfig`` for ``peft.get_peft_model`` on a 4-bit model, with this library's defaults.

    Args:
        options: PEFT's own; left out, ``r`` is 16, ``lora_alpha`` 32, ``target_modules`` "all-linear" and
            ``task_type`` "CAUSAL_LM". With ``layers_to_transform`` they are the usual names of linear layers.
    """
    ours = LoraDefaults()
    # PEFT allows "all-linear" for all layers alone; names that a model does not have select nothing.
    targets = (
        ours.target_modules if options.get("layers_to_transform") is None else list(_LINEAR_NAMES)
    )
    defaults = {
        "r": ours.r,
        "lora_alpha": ours.alpha,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**defaults, **options})


_default = lora_model.dispatch_default


@wraps(_default)
def _dispatch(target: nn.Module, adapter_name: str, *args: Any, **options: Any) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, QuantizedLinear):
        is_weight = options.pop("parameter_name", None) is not None
        made = QuantizedWeightWrapper if is_weight else QuantizedLoraLinear
        return made(target, adapter_name, *args, **options)
    if isinstance(base, QuantizedExperts) and options.get("parameter_name") is not None:
        return QuantizedParamWrapper(target, adapter_name, *args, **options)
    return _default(target, adapter_name, *args, **options)


lora_model.dispatch_default = _dispatch
