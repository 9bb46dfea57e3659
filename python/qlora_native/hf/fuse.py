"""Native kernels in place of what stands between a model's matrix products: norms, gated MLPs, attention.

Nothing is known here by its class's name. A module is looked at for its parts, computed once both ways on numbers that
tell the two apart, and replaced only where the results agree; whatever differs (Gemma's norm of weight 1 + w, a GELU, a
clamp, interleaved rotation) stays as it is. Parameters, names and state_dict keys do not change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.functional import SIXTEEN_BITS, dense_linear
from qlora_native.hf.attention import TOLERANCE, agree, is_ours, with_native_parts
from qlora_native.nn.substitute import Substitute, substitute_class
from qlora_native.ops import _pages
from qlora_native.ops._direct import call

LARGE = 1 << 22  # elements of a dense weight that no cache holds


def fuse(model: nn.Module) -> dict[str, int]:
    """Give the modules of a CPU model that allow it a forward of native kernels; others are left alone.

    Outputs agree to rounding and less is kept for backward: a norm keeps its input and one number a row, a gated MLP
    its two branches and their product, a rotation nothing of its own size. Calling it twice changes nothing. A deep
    copy or pickle of the model stays fused.

    Returns:
        How many modules were fused, by kind: ``norm``, ``mlp``, ``attention``, ``linear``.
    """
    counts: Counter[str] = Counter()
    for kinds in ((Dense,), (Norm, GatedMLP, Attention)):  # the latter are tried out with their linear layers
        for module in list(model.modules()):
            if isinstance(module, Fused):
                continue
            for kind in kinds:
                settings = kind.recognize(module)
                if settings is not None:
                    vars(module).update(settings)
                    module.__class__ = substitute_class(kind, type(module))
                    counts[kind.label] += 1
                    break
    return dict(counts)


def unfuse(model: nn.Module) -> None:
    """Give the modules that :func:`fuse` changed their own code back."""
    for module in model.modules():
        if isinstance(module, Fused):
            for setting in [name for name in vars(module) if name.startswith("_fused_")]:
                delattr(module, setting)
            module.__class__ = type(module).__bases__[1]


class Fused(Substitute):
    """What fused classes have in common: they are subclasses of the class they replace, under its name."""

    label = ""

    @classmethod
    def recognize(cls, module: nn.Module) -> dict[str, Any] | None:
        """Attributes to set, named ``_fused_...``, if ``module`` computes what this class would, or None."""
        raise NotImplementedError


class Norm(Fused):
    """weight * x / rms(x)."""

    label = "norm"
    _fused_eps: float
    weight: nn.Parameter

    @classmethod
    def recognize(cls, module: nn.Module) -> dict[str, Any] | None:
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        if (
            list(own) != ["weight"]
            or weight is None
            or len(list(module.children())) > 0
            or len(list(module.buffers())) > 0
        ):
            return None
        if weight.dim() != 1 or not is_ours(weight) or type(module).__module__.startswith("torch."):
            return None
        candidates = {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2}
        for eps in sorted(candidates):
            # Rows about as small as eps show where it is added and which it is.
            probe = _noise(4, weight.shape[0]) * torch.tensor([[1.0], [30.0], [eps**0.5], [eps**0.5 / 8]])
            probe = probe.to(weight.dtype)
            if agree(_attempt(module, probe), torch.ops.qlora_native.rms_norm(probe, weight.detach(), eps)[0]):
                return {"_fused_eps": eps}
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] to the same shape."""
        if args or kwargs or x.dtype != self.weight.dtype or not is_ours(x):
            return super().forward(x, *args, **kwargs)
        return call("rms_norm", x, self.weight, self._fused_eps)[0]


class GatedMLP(Fused):
    """down(silu(gate(x)) * up(x))."""

    label = "mlp"
    _fused_parts: tuple[str, str, str]  # names of gate, up, down

    @classmethod
    def recognize(cls, module: nn.Module) -> dict[str, Any] | None:
        parts = dict(module.named_children())
        linears = [name for name, part in parts.items() if _is_linear(part)]
        others = [part for name, part in parts.items() if name not in linears]
        if len(linears) != 3 or len(others) != 1 or list(others[0].parameters()) or list(module.parameters(False)):
            return None
        dtype = _dtype_of(parts[linears[0]])
        if dtype not in TOLERANCE or not all(is_ours(tensor, dtype=False) for tensor in module.parameters()):
            return None
        line = torch.linspace(-12.0, 12.0, 97).to(dtype)
        if not agree(_attempt(others[0], line), nn.functional.silu(line)):
            return None
        for gate, up, down in permutations(linears):
            wide, narrow = _shape(parts[gate]), _shape(parts[down])
            if _shape(parts[up]) != wide or narrow != wide[::-1]:
                continue
            # Large numbers would show a clamp.
            probe = (_noise(2, wide[1]) * torch.tensor([[1.0], [40.0]])).to(dtype)
            with _quiet(module), torch.no_grad():
                got = parts[down](torch.ops.qlora_native.swiglu(parts[gate](probe), parts[up](probe)))
                if agree(_attempt(module, probe), got, each_row=True):
                    return {"_fused_parts": (gate, up, down)}
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] to the same shape."""
        if args or kwargs or x.dtype not in TOLERANCE or not is_ours(x):
            return super().forward(x, *args, **kwargs)
        gate, up, down = (getattr(self, name) for name in self._fused_parts)
        return down(call("swiglu", gate(x), up(x)))


class Attention(Fused):
    """An attention whose forward rotates q and k by a function of its module, or calls transformers' sdpa."""

    label = "attention"

    @classmethod
    def recognize(cls, module: nn.Module) -> dict[str, Any] | None:
        parameter = next(module.parameters(), None)
        if parameter is None or not is_ours(parameter, dtype=False):
            return None
        forward = type(module).forward
        return {} if isinstance(forward, FunctionType) and with_native_parts(forward) is not forward else None

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        return {"forward": with_native_parts(base.forward)}  # type: ignore[arg-type]


class Dense(Fused):
    """A dense linear layer in 16 bits: an output embedding, or what is left out of the quantization."""

    label = "linear"
    weight: nn.Parameter
    bias: nn.Parameter | None

    @classmethod
    def recognize(cls, module: nn.Module) -> dict[str, Any] | None:
        if type(module) is not nn.Linear or module.weight.dtype not in SIXTEEN_BITS or not is_ours(module.weight):
            return None
        if module.weight.numel() >= LARGE and module.weight.is_contiguous():
            _pages.gather(module.weight)
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        return dense_linear(x, self.weight, self.bias)


def _is_linear(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _shape(linear: Any) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _dtype_of(linear: Any) -> torch.dtype | None:
    """In what dtype a linear layer, dense, 4-bit or adapted, is meant to compute."""
    layer = getattr(linear, "base_layer", linear)
    quantized = getattr(layer, "quantized", None)
    return quantized.dtype if quantized is not None else getattr(getattr(layer, "weight", None), "dtype", None)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """The module itself training, as dropout in its own forward must show; its parts not: theirs stays theirs."""
    before = {part: part.training for part in module.modules()}
    try:
        for part in before:
            part.training = part is module
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for part, training in before.items():
            part.training = training


@torch.no_grad()
def _attempt(module: nn.Module, x: Tensor) -> Any:
    """The module's answer to ``x``, or None if it wants something else."""
    try:
        return module(x)
    except Exception:  # whatever an unknown module raises, it is not what is looked for
        return None
