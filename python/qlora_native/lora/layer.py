"""A linear layer with an adapter beside it, and modules that are trained themselves; what a model holds of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native._moved import names_from
from qlora_native.functional import dense_linear
from qlora_native.lora.tokens import TokenRows, WithTokenRows
from qlora_native.nn.experts import Substitute, substitute_class
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.weight import QuantizedWeight


class LoRALinear(nn.Module):
    """y = base(x) + scale * B A dropout(x), one autograd node over a 4-bit base; base(x) if ``enabled`` is False.

    ``lora_A`` [r, K] and ``lora_B`` [N, r] are fp32 masters, cast to x's dtype for the products. A begins uniform
    (Kaiming with a = sqrt 5), B at zero, so a new adapter changes nothing. ``generator``, for A, is a CPU's; None is
    torch's global one. With a weight ``shipped``, the layer computes with that alone.
    """

    shipped: QuantizedWeight | None = None

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        scale: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r, self.scale, self.dropout = r, scale, dropout
        self.enabled = True
        device = base_layer.weight.device
        # Drawn on the CPU whatever the device, so that a seed means the same adapter everywhere.
        a = torch.empty(
            r, self.in_features, dtype=torch.float32, device="meta" if device.type == "meta" else "cpu"
        )
        fill_a(a, generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(
            torch.zeros(self.out_features, r, dtype=torch.float32, device=device)
        )
        self.train(base_layer.training)

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The base layer's: packed bytes for a 4-bit one."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: scale * B A, fp32 [N, K]."""
        return (self.lora_B.detach().float() @ self.lora_A.detach().float()) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in x's dtype."""
        base = self.base_layer
        if not self.enabled:
            return base(x)
        if self.shipped is not None:
            return QuantizedLinear.from_quantized(self.shipped, base.bias)(x)
        dropped = nn.functional.dropout(x, self.dropout) if self.training and self.dropout else None
        if isinstance(base, QuantizedLinear):
            return base.with_adapter(x, self.lora_A, self.lora_B, self.scale, dropped)
        seen = x if dropped is None else dropped
        low = dense_linear(seen, self.lora_A.to(x.dtype))
        return base(x) + dense_linear(low, self.lora_B.to(x.dtype)) * self.scale

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"r={self.r}, scale={self.scale:g}{dropout}"


class TrainedModule(Substitute):
    """A module of ``modules_to_save``: its parameters are fp32, it computes in fp32, and its outputs have their former
    dtype."""

    _dtype_before: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*(_cast(each, torch.float32) for each in args), **kwargs)
        return tuple(map(self._as_before, out)) if isinstance(out, tuple) else self._as_before(out)

    def _as_before(self, value: Any) -> Any:
        return _cast(value, self._dtype_before)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def train_modules(modules: Iterable[nn.Module]) -> None:
    """Give the modules trainable fp32 copies of their parameters; those that share one share the copy."""
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        before = next((parameter.dtype for parameter in module.parameters()), torch.float32)
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if parameter not in copies:
                    copies[parameter] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
                setattr(part, name, copies[parameter])
        if before != torch.float32 and not isinstance(module, TrainedModule):
            module._dtype_before = before  # type: ignore[assignment]
            module.__class__ = substitute_class(TrainedModule, type(module))


def end_training_modules(model: nn.Module) -> None:
    """Give modules of ``modules_to_save`` their own dtype and code back."""
    for module in model.modules():
        if isinstance(module, TrainedModule):
            module.__class__ = type(module).__bases__[1]
            before = module.__dict__.pop("_dtype_before")
            for parameter in module.parameters():
                parameter.data = parameter.data.to(before)


def fill_a(a: Tensor, generator: torch.Generator | None) -> None:
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every adapted layer with its path."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes as if it had no adapter (``modules_to_save`` excepted)."""
    adapters = [module for module in model.modules() if isinstance(module, (LoRALinear, TokenRows))]
    before = {adapter: adapter.enabled for adapter in adapters}
    try:
        for adapter in before:
            adapter.enabled = False
        yield model
    finally:
        for adapter, enabled in before.items():
            adapter.enabled = enabled


def end_training_rows(model: nn.Module) -> None:
    """Give modules with rows of ``trainable_tokens`` their own rows and code back."""
    for module in model.modules():
        if isinstance(module, WithTokenRows):
            module.__class__ = type(module).__bases__[1]
            del module.token_adapter


__getattr__ = names_from(
    __name__,
    dict.fromkeys(("add_lora", "insert", "unload_adapter"), "qlora_native.lora.model")
    | dict.fromkeys(("matches", "plain_modules", "select_targets"), "qlora_native.lora.targets"),
)
