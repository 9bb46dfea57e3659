"""A linear layer with an adapter beside it, and putting adapters into a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from qlora_native.functional import dense_linear
from qlora_native.lora.config import ALL_LINEAR, H_SVD, ZERO, LoraConfig
from qlora_native.lora.start import LayerStatistics, residual_factors
from qlora_native.nn.linear import QuantizedLinear


class LoRALinear(nn.Module):
    """y = base(x) + scale * B A dropout(x), one autograd node over a 4-bit base.

    ``lora_A`` [r, K] and ``lora_B`` [N, r] are fp32 masters, cast to x's dtype for the products. A begins uniform
    (Kaiming with a = sqrt 5), B at zero, so a new adapter changes nothing.

    Args:
        base_layer: a QuantizedLinear, or a dense nn.Linear; K inputs, N outputs.
        r, scale, dropout: see :class:`LoraConfig`.
        generator: a CPU generator for A; None is torch's global one.

    Attributes:
        enabled: False makes the layer its base alone.
    """

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
        a = torch.empty(r, self.in_features, dtype=torch.float32, device="meta" if device.type == "meta" else "cpu")
        fill_a(a, generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device=device))
        self.train(base_layer.training)

    @property
    def in_features(self) -> int:
        """K."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: packed bytes for a 4-bit one."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: scale * B A, fp32 [N, K]."""
        return (self.lora_B.detach().float() @ self.lora_A.detach().float()) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in x's dtype."""
        base = self.base_layer
        if not self.enabled:
            return base(x)
        dropped = nn.functional.dropout(x, self.dropout) if self.training and self.dropout else None
        if isinstance(base, QuantizedLinear):
            return base.with_adapter(x, self.lora_A, self.lora_B, self.scale, dropped)
        seen = x if dropped is None else dropped
        low = dense_linear(seen, self.lora_A.to(x.dtype))
        return base(x) + dense_linear(low, self.lora_B.to(x.dtype)) * self.scale

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"r={self.r}, scale={self.scale:g}{dropout}"


def fill_a(a: Tensor, generator: torch.Generator | None) -> None:
    """The start of ``lora_A``, which is the next of the generator's numbers."""
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


def add_lora(model: nn.Module, config: LoraConfig, statistics: Iterable[LayerStatistics] | None = None) -> nn.Module:
    """Put an adapter beside the linear layers that ``config`` targets, and freeze everything else.

    Args:
        model: from :func:`qlora_native.load_model`, or any module with linear layers; changed in place.
        config: see :class:`LoraConfig`. It stays with the model as ``model.lora_config``.
        statistics: for ``init`` "h_svd" and "loftq": each layer's 16-bit weight, with the second moments of its inputs
            for "h_svd", as :func:`qlora_native.lora_statistics` reads and gathers them. Layers that they leave out,
            and dense ones, which lost nothing, begin as with "zero".

    Returns:
        The model. Its trainable parameters are the fp32 ``lora_A`` and ``lora_B``, and those of ``modules_to_save``.

    Raises:
        ValueError: the model has an adapter already; a name that stands for no linear layer (near matches are told);
            statistics that are missing, or of another model.
    """
    if (config.init == ZERO) != (statistics is None):
        told = "takes no statistics" if config.init == ZERO else "needs statistics: qn.lora_statistics(model, ...)"
        raise ValueError(f"add_lora: init {config.init!r} {told}.")
    targets = select_targets(model, config.target_modules)
    generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
    insert(model, {path: (config.rank_of(path), config.scale_of(path)) for path in targets}, config, generator)
    if statistics is not None:
        _start(model, config, statistics)
    return model


@torch.no_grad()
def _start(model: nn.Module, config: LoraConfig, statistics: Iterable[LayerStatistics]) -> None:
    """Give the adapters of 4-bit layers the values that correct these layers best."""
    layers = dict(lora_layers(model))
    started = 0
    for known in statistics:
        layer = layers.get(known.path)
        if layer is None or not isinstance(layer.base_layer, QuantizedLinear):
            continue
        shape = (layer.out_features, layer.in_features)
        if tuple(known.weight.shape) != shape:
            raise ValueError(
                f"add_lora: the statistics of {known.path} hold a weight {list(known.weight.shape)}, the layer's is "
                f"{list(shape)}: they are of another model."
            )
        if config.init == H_SVD and known.metric is None:
            raise ValueError(f"add_lora: init 'h_svd' needs the inputs' second moments, which {known.path} lacks.")
        metric = known.metric if config.init == H_SVD else None
        decoded = layer.base_layer.quantized.dequantize(torch.float32)
        residual = known.weight.to(decoded.device, torch.float32) - decoded
        a, b = residual_factors(
            residual, layer.r, layer.scale, None if metric is None else metric.to(residual), config.seed or 0
        )
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
        started += 1
    if not started:
        raise ValueError("add_lora: the statistics are of none of the adapted 4-bit layers.")


def insert(
    model: nn.Module,
    targets: dict[str, tuple[int, float]],
    config: LoraConfig,
    generator: torch.Generator | None,
    beside: bool = False,
) -> None:
    """Wrap the layers of ``targets`` (path -> rank, scale) and set what is trainable; ``beside`` an adapter of other
    layers only if it says so."""
    if not beside and any(True for _ in lora_layers(model)):
        raise ValueError("the model has an adapter already: merge it, or load the model again.")
    saved = trained_whole(model, config.modules_to_save)
    model.requires_grad_(False)
    for path, (rank, scale) in targets.items():
        layer = LoRALinear(model.get_submodule(path), rank, scale, config.dropout, generator)  # type: ignore[arg-type]
        model.set_submodule(path, layer)
    for module in saved.values():
        module.requires_grad_(True)
    model.lora_config = config  # type: ignore[assignment]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every adapted layer with its path."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model answers as if it had no adapter (``modules_to_save`` excepted)."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer outside the adapters, by path."""
    return {path: module for path, module in plain_modules(model) if isinstance(module, nn.Linear)}


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model as if it had no adapter: an adapted layer stands for its base."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module.base_layer
        elif not (path.endswith(".base_layer") and isinstance(model.get_submodule(path[:-11]), LoRALinear)):
            yield path, module


def select_targets(model: nn.Module, names: str | Sequence[str]) -> list[str]:
    """Paths of the linear layers that ``names`` means, in the model's order. Raises ValueError for unknown ones."""
    linears = linear_layers(model)
    if names == ALL_LINEAR:
        find_output = getattr(model, "get_output_embeddings", lambda: None)
        output = find_output()
        chosen = [path for path, module in linears.items() if module is not output]
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no linear layers to adapt.")
        return chosen
    for name in names:
        if not any(matches(path, name) for path in linears):
            raise ValueError(_unknown(model, name, "target_modules", "linear layer", linears))
    return [path for path in linears if any(matches(path, name) for name in names)]


def trained_whole(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that ``modules_to_save`` means, by path. Raises ValueError for unknown ones and for 4-bit ones."""
    modules = {path: module for path, module in plain_modules(model) if path}
    for name in names:
        if not any(matches(path, name) for path in modules):
            raise ValueError(_unknown(model, name, "modules_to_save", "module", modules))
    chosen = {path: module for path, module in modules.items() if any(matches(path, name) for name in names)}
    for path, module in chosen.items():
        if any(isinstance(part, QuantizedLinear) for part in module.modules()):
            raise ValueError(
                f"modules_to_save: {path} is 4-bit, which cannot be trained whole: "
                f"load the model with skip_modules=({path.rpartition('.')[2]!r},), or adapt it instead."
            )
    return chosen


def matches(path: str, name: str) -> bool:
    """Whether ``name`` means the module at ``path``, by PEFT's rule for lists."""
    return path == name or path.endswith(f".{name}")


def _unknown(model: nn.Module, name: str, option: str, kind: str, paths: Iterable[str]) -> str:
    known = sorted({path.rpartition(".")[2] for path in paths})
    near = get_close_matches(name, known, n=3) or get_close_matches(name, list(paths), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known[:12])}."
    return f"{option}: {type(model).__name__} has no {kind} named {name!r}: {hint}"
