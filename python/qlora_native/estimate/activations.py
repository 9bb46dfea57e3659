"""What a decoder layer saves for its backward pass, by the kind of its parts. docs/memory.md explains each term.

A linear layer with an adapter saves its input, once for all layers that share it, and the input times A. What a norm
and an activation function save is measured on small ones. Attention saves q, k, v, its output and one number a head
and row, or, without a fused kernel, tables of [T, T]. Everything else saves nothing.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_native.estimate.model import Setting
from qlora_native.lora import LoRALinear
from qlora_native.lora.targets import plain_modules
from qlora_native.models.fuse import attends_in_fp32, fuse
from qlora_native.nn.experts import QuantizedExperts

# The last linear layer of an attention or an MLP; the others there read the block's input.
_OUTPUT = re.compile(r"(^|_)(o|out|down|c|fc2|fc_out|w2|wo|4h_to_h)(_proj|_lin)?$|^dense$|^dense_4h_to_h$")


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one decoder layer."""

    input: int  # its input, for each token
    token: float  # saved for each token
    shared: int  # part of `token` that is the input itself
    first: float  # part of `token` that is not saved where the input needs no gradient
    square: float  # saved for each pair of positions of a row
    spare: float  # gradients at the peak of its backward pass, for each token
    gradients: int  # of its adapters
    unknown: tuple[str, ...] = ()  # classes of parts that save more than what is counted here


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Path and module of the outermost layers that checkpointing recomputes."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not (found and path.startswith(f"{found[-1][0]}.")):
            found.append((path, module))
    return found


def most(config: Any, name: str) -> int | None:
    """A field of a model's config; where layers differ in it, the largest value. None if it is not there."""
    try:
        value: int | None = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to name one value for all layers
        value = max(getattr(layer, name, None) or 0 for layer in config.per_layer_config)
    return value or None


def head_shape(config: Any) -> tuple[int, int, int]:
    """Heads of queries, heads of keys, and elements of a head."""
    heads = most(config, "num_attention_heads") or 1
    return heads, most(config, "num_key_value_heads") or heads, most(config, "head_dim") or config.hidden_size // heads


def norms_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of each norm with a weight of one dimension."""
    for path, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if "norm" in type(part).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1:
            yield path, part


def norm_bytes(norm: Any, setting: Setting) -> float:
    """What a norm keeps for each row."""
    width = norm.weight.shape[0]
    return _kept_by(norm, width, setting) * width


class DecoderLayer:
    """One decoder layer of a model with adapters, on the meta device."""

    def __init__(self, layer: nn.Module, model: PreTrainedModel, setting: Setting) -> None:
        self.layer, self.setting = layer, setting
        self.config: Any = model.config.get_text_config()
        self.size = setting.dtype.itemsize
        self.hidden: int = self.config.hidden_size
        # name of the parent -> its linear layers by their own name
        self.blocks: dict[str, dict[str, nn.Linear]] = {}
        for path, module in plain_modules(layer):
            if isinstance(module, nn.Linear):
                parent, _, name = path.rpartition(".")
                self.blocks.setdefault(parent, {})[name] = module
        self.adapted = {path: module for path, module in layer.named_modules() if isinstance(module, LoRALinear)}

    def bytes(self) -> LayerBytes:
        """What it keeps in training."""
        norms = list(self._norms())
        first = next((norm_bytes(n, self.setting) for n, _ in norms if n.weight.shape == (self.hidden,)), 0.0)
        shares = self.hidden * self.size <= first < self.hidden * (self.size + 1)  # the input, and little beside it
        dropouts = sum(isinstance(module, nn.Dropout) and module.p > 0 for module in self.layer.modules())
        token = self._linears() + sum(rows * norm_bytes(n, self.setting) for n, rows in norms)
        token += dropouts * self.hidden * (1 if self.setting.device == "cuda" else self.size)
        square = spare = 0.0
        for parent, linears in self.blocks.items():
            module = self.layer.get_submodule(parent)
            if "attention" in type(module).__name__.lower():
                kept, square = self._attention(module, parent, linears)
                token += kept
            elif len(linears) > 1:
                kept, spare_here = self._mlp(module, parent, linears)
                token, spare = token + kept, max(spare, spare_here)
        for module in self.layer.modules():
            if isinstance(module, QuantizedExperts) or hasattr(module, "_apply_gate"):
                kept, spare_here = self._experts(module)
                token, spare = token + kept, max(spare, spare_here)
        return LayerBytes(
            input=self.hidden * self.size,
            token=token,
            shared=self.hidden * self.size if shares else 0,
            first=first,
            square=square,
            spare=self.hidden * self.size + spare,
            gradients=sum(p.nbytes for p in self.layer.parameters() if p.requires_grad),
            unknown=tuple(dict.fromkeys(type(m).__name__ for m in self.layer.modules() if _is_recurrent(m))),
        )

    def _linears(self) -> float:
        """Inputs of adapted layers, each once; x A^T; with dropout the dropped-out copy and what was dropped."""
        inputs: set[tuple[str, int, bool]] = set()
        kept = 0
        dropped = self.size + (1 if self.setting.device == "cuda" else self.size)
        for path, module in self.adapted.items():
            parent, _, name = path.rpartition(".")
            kept += module.r * self.size
            if module.dropout:
                kept += module.in_features * dropped
            else:
                inputs.add((parent, module.in_features, _is_output(name)))
        return kept + sum(width for _, width, _ in inputs) * self.size

    def _has_adapted_output(self, parent: str) -> bool:
        """Whether the last linear layer of a block has an adapter, so that its input is counted there."""
        paths = (f"{parent}.{name}" if parent else name for name in self.blocks[parent] if _is_output(name))
        return any(path in self.adapted for path in paths)

    def _norms(self) -> Iterator[tuple[Any, int]]:
        """Each norm, and how many rows a token has there: one, or one a head."""
        for path, module in norms_of(self.layer):
            parent, _, name = path.rpartition(".")
            beside = self.blocks.get(parent, {})
            source = beside.get(f"{name.partition('_')[0]}_proj")  # q_norm follows q_proj
            yield module, max(1, source.out_features // module.weight.shape[0]) if source is not None else 1

    def _attention(self, module: nn.Module, parent: str, linears: dict[str, nn.Linear]) -> tuple[float, float]:
        """Bytes a token, bytes a pair of positions."""
        heads, key_heads, _ = head_shape(self.config)
        groups = heads // key_heads
        outputs = [linear for name, linear in linears.items() if _is_output(name)]
        inner = sum(linear.out_features for name, linear in linears.items() if not _is_output(name))
        context = outputs[0].in_features if outputs else heads * self.hidden
        if len(linears) - len(outputs) == 1 and hasattr(self.config, "rope_parameters"):
            # The rotation copies q and k; v is a view of the product's output.
            inner += inner - context // groups
        output = 0 if self._has_adapted_output(parent) else context
        kept = float(self.size * (inner + output))
        dropout = float(getattr(self.config, "attention_dropout", getattr(self.config, "attn_pdrop", 0.0)) or 0.0)
        is_masked = self._is_windowed(module) and self.setting.length > int(self.config.sliding_window)
        expanded = max(0, 2 * (context - context // groups)) * self.size  # k and v, once a query head
        if self.config._attn_implementation == "eager":
            softcap = getattr(self.config, "attn_logit_softcapping", None) is not None
            return kept + expanded, heads * (4.0 + self.size * (2 if softcap else 1))
        if dropout and self.setting.device == "cpu":  # torch's plain attention, in fp32
            return kept + 3 * 4 * context, heads * 12.0
        if is_masked and self.setting.device == "cpu" and self.size == 2 and attends_in_fp32():
            return self.size * output + 4.0 * (4 * context + heads), 4.0  # q, k, v and what comes out, in fp32
        if is_masked:  # a table [T, T] in the dtype of q, made anew in each layer; k and v once a query head
            return kept + 4 * heads + expanded, float(self.size)
        return kept + 4 * heads, 0.0

    def _is_windowed(self, module: nn.Module) -> bool:
        """Whether a layer's positions see a window of the earlier ones only."""
        if getattr(self.config, "sliding_window", None) is None or not getattr(self.config, "use_sliding_window", True):
            return False
        kinds, number = getattr(self.config, "layer_types", None), getattr(module, "layer_idx", None)
        return not kinds or number is None or kinds[number] == "sliding_attention"

    def _mlp(self, module: nn.Module, parent: str, linears: dict[str, nn.Linear]) -> tuple[float, float]:
        """Bytes kept a token, bytes of gradients a token."""
        outputs = [linear for name, linear in linears.items() if _is_output(name)]
        made = sum(linear.out_features for name, linear in linears.items() if not _is_output(name))
        inner = outputs[0].in_features if outputs else made
        counted = self._has_adapted_output(parent)  # the product, there
        activation = next(filter(_is_activation, module.children()), None)
        if made < 2 * inner:  # no gate
            each = self.size if activation is None else _kept_by(activation, 64, self.setting, with_output=not counted)
            return inner * each, 2 * self.size * inner
        if _is_native_mlp(module, self.setting.dtype):
            return made * self.size, 2 * self.size * inner
        gate = 0.0 if activation is None else _kept_by(activation, 64, self.setting, with_output=False) * inner
        return gate + self.size * inner * (2 if counted else 3), 2 * self.size * inner

    def _experts(self, module: nn.Module) -> tuple[float, float]:
        """As transformers computes experts, one after another over the tokens that go to each."""
        chosen = getattr(self.config, "num_experts_per_tok", 1) or 1
        sizes = [getattr(self.config, name, None) for name in ("moe_intermediate_size", "intermediate_size")]
        inner = next(filter(None, sizes), self.hidden)
        return chosen * (self.size * (4 * inner + 2 * self.hidden) + 16.0), 2 * self.size * inner


def _is_output(name: str) -> bool:
    return _OUTPUT.search(name) is not None


def _is_recurrent(module: nn.Module) -> bool:
    """Whether a state goes through it from position to position: such mixers begin with a short convolution."""
    return any(isinstance(part, nn.Conv1d) for part in module.children())


def _is_activation(module: nn.Module) -> bool:
    """Whether it is elementwise; in a layer without a module for its MLP, other parts are its siblings."""
    has_table = any(parameter.dim() > 1 for parameter in module.parameters())
    is_other = isinstance(module, nn.Dropout) or "norm" in type(module).__name__.lower()
    return not (has_table or is_other or any(True for _ in module.children()))


_cache: dict[tuple[Any, ...], Any] = {}  # results of the two functions below


def _kept_by(module: nn.Module, width: int, setting: Setting, with_output: bool = True) -> float:
    """Bytes for each element of x that a norm or an activation function saves, measured on rows of ``width``."""
    key = (type(module), width, setting.dtype, setting.device, with_output)
    if key not in _cache:
        small = _on_the_cpu(module, setting.dtype)
        fuse(small)
        few, more = (kept_bytes(small, torch.ones(n, width, dtype=setting.dtype), with_output) for n in (8, 16))
        _cache[key] = (more - few) / (8 * width)  # what does not grow with the rows is small
    saved: float = _cache[key]
    return saved


def kept_bytes(module: nn.Module, x: Tensor, with_output: bool = True) -> int:
    """Bytes that a call saves for its backward pass, without its parameters; each storage counts once.

    ``with_output`` counts the output too. Each required argument of the call is like ``x``.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    kept: dict[int, int] = {}
    alive = []  # an address is no name for a tensor that is gone

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
        count = max(1, sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in needed))
        output = module(*(x.clone().requires_grad_() for _ in range(count)))
    if not with_output:
        own.add(output.untyped_storage().data_ptr())
    return sum(size for address, size in kept.items() if address not in own)


def _is_native_mlp(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether :func:`qlora_native.fuse` takes an MLP like this one, tried with small layers in place of its own."""
    if any(part.out_features == part.in_features for part in module.children() if isinstance(part, nn.Linear)):
        return False
    key = (type(module), dtype)
    if key not in _cache:
        small = copy.copy(module)
        small._modules = dict(module._modules)
        for name, part in module.named_children():
            if isinstance(part, (nn.Linear, LoRALinear)):
                wide = part.out_features > part.in_features
                small._modules[name] = nn.Linear(8, 16, False) if wide else nn.Linear(16, 8, False)
        _cache[key] = "mlp" in fuse(_on_the_cpu(small, dtype, keep=True))
    return bool(_cache[key])


def _on_the_cpu(module: nn.Module, dtype: torch.dtype, keep: bool = False) -> nn.Module:
    """A copy of a module of the meta device, its weights ones; ``keep`` leaves what is on the CPU already."""
    with torch.random.fork_rng(devices=[]):
        small = copy.deepcopy(module)
        if not keep:
            small = small.to_empty(device="cpu")
            for parameter in small.parameters():
                parameter.data.fill_(1.0)
        return small.to(dtype).requires_grad_(False)
