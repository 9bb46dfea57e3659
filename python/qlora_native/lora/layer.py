"""A linear layer with an adapter beside it, and putting adapters into a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.functional import dense_linear
from qlora_native.lora.config import ALL_LINEAR, LoraConfig
from qlora_native.lora.tokens import TokenRows, WithTokenRows
from qlora_native.nn.experts import Substitute, substitute_class
from qlora_native.nn.linear import QuantizedEmbedding, QuantizedLinear
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
        a = torch.empty(r, self.in_features, dtype=torch.float32, device="meta" if device.type == "meta" else "cpu")
        fill_a(a, generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device=device))
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


class TrainedWhole(Substitute):
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


def train_whole(modules: Iterable[nn.Module]) -> None:
    """Give the modules trainable fp32 copies of their parameters; those that share one share the copy."""
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        before = next((parameter.dtype for parameter in module.parameters()), torch.float32)
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if parameter not in copies:
                    copies[parameter] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
                setattr(part, name, copies[parameter])
        if before != torch.float32 and not isinstance(module, TrainedWhole):
            module._dtype_before = before  # type: ignore[assignment]
            module.__class__ = substitute_class(TrainedWhole, type(module))


def end_training_whole(model: nn.Module) -> None:
    """Give modules that were trained whole their own dtype and code back."""
    for module in model.modules():
        if isinstance(module, TrainedWhole):
            module.__class__ = type(module).__bases__[1]
            before = module.__dict__.pop("_dtype_before")
            for parameter in module.parameters():
                parameter.data = parameter.data.to(before)


def fill_a(a: Tensor, generator: torch.Generator | None) -> None:
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Put an adapter beside the linear layers that ``config`` targets, and freeze everything else.

    Args:
        model: from :func:`qlora_native.load_model`, or any module with linear layers; changed in place.
        config: see :class:`LoraConfig`. It stays with the model as ``model.lora_config``.

    Returns:
        The model. Its trainable parameters are the fp32 ``lora_A`` and ``lora_B``, those of ``modules_to_save`` and the
        rows of ``trainable_tokens``.

    Raises:
        ValueError: the model has an adapter already; a name that no linear layer has (the message lists near matches).
    """
    targets = select_targets(model, config)
    generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
    scales = {path: (config.rank_of(path), config.scale_of(path)) for path in targets}
    insert(model, scales, config, generator)
    return model


def unload_adapter(model: nn.Module) -> nn.Module:
    """Take the adapter out: the model is its frozen base again, but for ``modules_to_save``, which keep their values.

    They stay fp32. Another adapter can then be loaded or added. :func:`adapters_off` turns the adapter off for a while.
    """
    for path, layer in list(lora_layers(model)):
        model.set_submodule(path, layer.base_layer)
    end_training_rows(model)
    model.__dict__.pop("lora_config", None)
    saving = model.__dict__.get("save_pretrained")
    if isinstance(saving, partial) and len(saving.args) == 2:  # that of insert()
        del model.save_pretrained
        if saving.args[1] is not None:  # the one that refuses to write the weights of a GGUF file
            model.save_pretrained = saving.args[1]
    return model.requires_grad_(False)


def insert(
    model: nn.Module,
    targets: dict[str, tuple[int, float]],
    config: LoraConfig,
    generator: torch.Generator | None,
    beside: bool = False,
) -> None:
    """Wrap the layers of ``targets`` (path -> rank, scale) and set what is trainable. ``beside`` allows a model with
    adapters of other layers."""
    if not beside and any(True for _ in lora_layers(model)):
        raise ValueError("the model has an adapter already: merge it, or load the model again.")
    saved = trained_whole(model, config.modules_to_save)
    chosen = token_modules(model, config.trainable_tokens)
    if both := chosen.keys() & {*saved, *targets}:
        raise ValueError(
            f"trainable_tokens has tokens of {min(both)}, which modules_to_save or target_modules trains whole: leave "
            "out the tokens or the module."
        )
    last = max((max(ids) for _, ids in chosen.values()), default=-1)
    if chosen and last >= min(len(part.weight) for part, _ in chosen.values()):  # type: ignore[arg-type]
        _grow(model, last + 1)
    layers = {
        path: LoRALinear(model.get_submodule(path), rank, scale, config.dropout, generator)  # type: ignore[arg-type]
        for path, (rank, scale) in targets.items()
    }
    model.requires_grad_(False)  # nothing has changed before all layers are made
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    train_whole(saved.values())
    made: dict[Tensor, TokenRows] = {}  # by the weight, which tied modules share
    for module, ids in chosen.values():
        weight: Any = module.weight
        module.token_adapter = made.setdefault(weight, TokenRows(weight, ids))
        module.__class__ = substitute_class(WithTokenRows, type(module))
    if hasattr(model, "save_pretrained") and "lora_config" not in model.__dict__:
        from qlora_native.lora.adapter import save_pretrained

        model.save_pretrained = partial(save_pretrained, model, model.__dict__.get("save_pretrained"))  # type: ignore[assignment]
    model.lora_config = config  # type: ignore[assignment]


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


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model as if it had no adapter: an adapted layer stands for its base."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module.base_layer
        elif not (path.endswith(".base_layer") and isinstance(model.get_submodule(path[:-11]), LoRALinear)):
            yield path, module


def select_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the linear layers that get an adapter, in the model's order. ValueError for names, numbers of layers and
    patterns that select none."""
    saved = tuple(f"{path}." for path in trained_whole(model, config.modules_to_save))
    named = [path for path in _named_targets(model, config.target_modules) if not f"{path}.".startswith(saved)]
    targets = [path for path in named if config.includes(path)]
    for number in config.layers_to_transform or ():
        if not any(f".{number}." in path for path in targets):
            raise ValueError(f"layers_to_transform: {type(model).__name__} has no layer {number} to adapt.")
    if unmatched := config.unmatched_patterns(targets):
        raise ValueError(f"rank_pattern or alpha_pattern: {unmatched[0]!r} matches no layer that gets an adapter.")
    return targets


def _named_targets(model: nn.Module, names: str | Sequence[str]) -> list[str]:
    linears = {path: module for path, module in plain_modules(model) if isinstance(module, nn.Linear)}
    if names == ALL_LINEAR:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = [path for path, module in linears.items() if module is not output]
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no linear layers to adapt.")
        return chosen
    return _selected(model, names, "target_modules", "linear layer", linears)


def trained_whole(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that ``modules_to_save`` selects, by path, and those that share a parameter with them. ValueError for
    unknown ones and for 4-bit ones."""
    modules = {path: module for path, module in plain_modules(model) if path}
    chosen = {path: modules[path] for path in _selected(model, names, "modules_to_save", "module", modules)}
    inside = {part for module in chosen.values() for part in module.modules()}
    shared = {parameter for module in inside for parameter in module.parameters()}
    for path, module in modules.items():
        if module not in inside and not shared.isdisjoint(module.parameters(recurse=False)):
            chosen[path] = module
    for path, module in chosen.items():
        if any(isinstance(part, (QuantizedLinear, QuantizedEmbedding)) for part in module.modules()):
            raise ValueError(
                f"modules_to_save: {path} is quantized, which cannot be trained whole: "
                f"load the model with skip_modules=({path.rpartition('.')[2]!r},), or adapt it instead."
            )
    return chosen


def end_training_rows(model: nn.Module) -> None:
    """Give modules with rows of ``trainable_tokens`` their own rows and code back."""
    for module in model.modules():
        if isinstance(module, WithTokenRows):
            module.__class__ = type(module).__bases__[1]
            del module.token_adapter


def token_modules(
    model: nn.Module, tokens: Sequence[int] | dict[str, list[int]]
) -> dict[str, tuple[nn.Module, list[int]]]:
    """The modules whose rows ``trainable_tokens`` selects, by path, and those that share their weight, with the ids.
    ValueError for unknown ones, and for rows that cannot be trained."""
    modules = {path: module for path, module in plain_modules(model) if path}
    if not isinstance(tokens, dict):
        ends = _embeddings(model) if tokens else []
        tokens = {path: list(tokens) for path, module in modules.items() if module in ends}
    own: dict[Tensor | None, list[int]] = {}
    for name, ids in tokens.items():
        for path in _selected(model, [name], "trainable_tokens", "module", modules):
            own[modules[path]._parameters.get("weight")] = ids
    chosen = {path: (part, own[w]) for path, part in modules.items() if (w := part._parameters.get("weight")) in own}
    for path, (part, ids) in chosen.items():
        is_plain = type(part).forward in (nn.Embedding.forward, WithTokenRows.forward)
        is_plain = is_plain or isinstance(getattr(part, "embed_scale", None), Tensor)
        is_linear = isinstance(part, nn.Linear) and not isinstance(part, QuantizedLinear) and part.bias is None
        rows = len(part._parameters["weight"]) if is_plain or is_linear else 0  # type: ignore[arg-type]
        if not rows or any(token not in ids for token in range(rows, 1 + max(ids))):
            raise ValueError(
                f"trainable_tokens: {path} ({type(part).__name__}, {rows:,} rows) cannot train token {max(ids)}: "
                "expected a dense embedding, or linear layer without a bias, as skip_modules=('embed_tokens', "
                "'lm_head') of load_model leaves them, and a token of its rows or next to them."
            )
    return chosen


def _embeddings(model: Any) -> list[nn.Module]:
    return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]


@torch.no_grad()
def _grow(model: Any, rows: int) -> None:
    """Give the embeddings of the model more rows, the mean of the others, up to so many."""
    grown: dict[Tensor, nn.Parameter] = {}
    for module in _embeddings(model):
        weight: Any = module.weight
        if weight not in grown:
            more = weight.mean(0, dtype=torch.float32).to(weight.dtype).expand(rows - len(weight), -1)
            grown[weight] = nn.Parameter(torch.cat([weight, more]), requires_grad=False)
        module.weight = grown[weight]
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", rows)
    model.vocab_size = model.config.get_text_config().vocab_size = rows


def matches(path: str, name: str) -> bool:
    """Whether ``name`` selects the module at ``path``, by PEFT's rule for lists."""
    return path == name or path.endswith(f".{name}")


def _selected(model: nn.Module, names: Sequence[str], option: str, kind: str, paths: Iterable[str]) -> list[str]:
    """The paths that ``names`` selects; ValueError for a name that selects none."""
    for name in names:
        if not any(matches(path, name) for path in paths):
            known = sorted({path.rpartition(".")[2] for path in paths})
            near = get_close_matches(name, known, n=3) or get_close_matches(name, list(paths), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known[:12])}."
            raise ValueError(f"{option}: {type(model).__name__} has no {kind} named {name!r}: {hint}")
    return [path for path in paths if any(matches(path, name) for name in names)]
