"""Which modules of a model an adapter changes: names as PEFT resolves them, and what they select."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from qlora_native.errors import say_once
from qlora_native.lora.config import ALL_LINEAR, LoraConfig
from qlora_native.lora.layer import LoRALinear
from qlora_native.lora.tokens import WithTokenRows
from qlora_native.nn.linear import QuantizedEmbedding, QuantizedLinear
from qlora_native.nn.probe import USED, kind_of, probe, stacks


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model as if it had no adapter: an adapted layer stands for its base."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module.base_layer
        elif not (
            path.endswith(".base_layer") and isinstance(model.get_submodule(path[:-11]), LoRALinear)
        ):
            yield path, module


def select_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the linear layers that get an adapter, in the model's order. ValueError for names, numbers of layers and
    patterns that select none."""
    saved = tuple(f"{path}." for path in saved_modules(model, config.modules_to_save))
    named = [
        path
        for path in _named_targets(model, config.target_modules)
        if not f"{path}.".startswith(saved)
    ]
    targets = [path for path in named if config.includes(path)]
    for number in config.layers_to_transform or ():
        if not any(f".{number}." in path for path in targets):
            raise ValueError(
                f"layers_to_transform: {type(model).__name__} has no layer {number} to adapt."
            )
    if unmatched := config.unmatched_patterns(targets):
        raise ValueError(
            f"rank_pattern or alpha_pattern: {unmatched[0]!r} matches no layer that gets an adapter."
        )
    return targets


def _named_targets(model: nn.Module, names: str | Sequence[str]) -> list[str]:
    linears = {path: module for path, module in plain_modules(model) if isinstance(module, nn.Linear)}
    if names == ALL_LINEAR:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        uses, failed = probe(model)
        chosen = [
            path
            for path, module in linears.items()
            if module is not output and uses.get(path, USED).adapted
        ]
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no linear layers to adapt.")
        left = [path for path, use in uses.items() if (path not in linears if use.adapted else failed)]
        if left := sorted({kind_of(path) for path in [*left, *stacks(model)]}):
            reason = f" (no pass showed their use: {failed})" if failed else ""
            say_once(f"target_modules {ALL_LINEAR!r} leaves out {', '.join(left)}{reason}.")
        return chosen
    return _selected(model, names, "target_modules", "linear layer", linears)


def saved_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that ``modules_to_save`` selects, by path, and those that share a parameter with them. ValueError for
    unknown ones and for 4-bit ones."""
    modules = {path: module for path, module in plain_modules(model) if path}
    chosen = {
        path: modules[path] for path in _selected(model, names, "modules_to_save", "module", modules)
    }
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


def token_modules(
    model: nn.Module, tokens: Sequence[int] | dict[str, list[int]]
) -> dict[str, tuple[nn.Module, list[int]]]:
    """The modules whose rows ``trainable_tokens`` selects, by path, and those that share their weight, with the ids.
    ValueError for unknown ones, and for rows that cannot be trained."""
    modules = {path: module for path, module in plain_modules(model) if path}
    if not isinstance(tokens, dict):
        ends = embeddings(model) if tokens else []
        tokens = {path: list(tokens) for path, module in modules.items() if module in ends}
    own: dict[Tensor | None, list[int]] = {}
    for name, ids in tokens.items():
        for path in _selected(model, [name], "trainable_tokens", "module", modules):
            own[modules[path]._parameters.get("weight")] = ids
    chosen = {
        path: (part, own[w])
        for path, part in modules.items()
        if (w := part._parameters.get("weight")) in own
    }
    for path, (part, ids) in chosen.items():
        is_plain = type(part).forward in (nn.Embedding.forward, WithTokenRows.forward)
        is_plain = is_plain or isinstance(getattr(part, "embed_scale", None), Tensor)
        is_linear = (
            isinstance(part, nn.Linear) and not isinstance(part, QuantizedLinear) and part.bias is None
        )
        rows = len(part._parameters["weight"]) if is_plain or is_linear else 0  # type: ignore[arg-type]
        if not rows or any(token not in ids for token in range(rows, 1 + max(ids))):
            raise ValueError(
                f"trainable_tokens: {path} ({type(part).__name__}, {rows:,} rows) cannot train token {max(ids)}: "
                "expected a dense embedding, or linear layer without a bias, as skip_modules=('embed_tokens', "
                "'lm_head') of load_model leaves them, and a token of its rows or next to them."
            )
    return chosen


def embeddings(model: Any) -> list[nn.Module]:
    return [
        end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None
    ]


def matches(path: str, name: str) -> bool:
    """Whether ``name`` selects the module at ``path``, by PEFT's rule for lists."""
    return path == name or path.endswith(f".{name}")


def _selected(
    model: nn.Module, names: Sequence[str], option: str, kind: str, paths: Iterable[str]
) -> list[str]:
    """The paths that ``names`` selects; ValueError for a name that selects none."""
    for name in names:
        if not any(matches(path, name) for path in paths):
            known = sorted({path.rpartition(".")[2] for path in paths})
            near = get_close_matches(name, known, n=3) or get_close_matches(name, list(paths), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known[:12])}."
            raise ValueError(f"{option}: {type(model).__name__} has no {kind} named {name!r}: {hint}")
    return [path for path in paths if any(matches(path, name) for name in names)]
