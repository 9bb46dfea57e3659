"""What a decoder layer saves for its backward pass: one layer of each kind runs on fake tensors, which have shapes and
no memory, and what autograd saves is counted. docs/memory.md explains each term.

Experts alone are a formula: how many tokens each of them meets depends on the tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_native.lora import LoRALinear
from qlora_native.models import fuse
from qlora_native.tool.estimate.model import Setting

TOKENS = 16  # of the shortest row that is run
Kind = tuple[str | None, str]  # of layers: the name in config.layer_types, and all of their modules


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
    unknown: str = ""  # its class, if it does not run on fake tensors: then only the inputs of adapters are counted


class Saved(NamedTuple):
    """Bytes that a call saves for its backward pass."""

    total: int
    has_input: bool  # whether the input is among them
    of_input: int = 0  # those that are not saved where the input needs no gradient


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The outermost layers that checkpointing recomputes."""
    found = list[nn.Module]()
    inside = set[nn.Module]()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside = {*module.modules()}
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
    return (
        heads,
        most(config, "num_key_value_heads") or heads,
        most(config, "head_dim") or config.hidden_size // heads,
    )


def norm_bytes(model: PreTrainedModel, setting: Setting) -> int:
    """What the norms outside of the decoder layers keep for each token."""
    inside = {part for layer in decoder_layers(model) for part in layer.modules()}
    rows = 1 << 20  # beside so many, what it keeps once is nothing
    found = 0
    for norm in model.modules():
        weight = getattr(norm, "weight", None)
        is_norm = (
            "norm" in type(norm).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1
        )
        if weight is not None and is_norm and norm not in inside:
            twin = _as_loaded(norm, setting)
            with FakeTensorMode(allow_non_fake_inputs=True):
                twin.to_empty(device="cpu")
                x = torch.empty(
                    rows, len(weight), dtype=setting.dtype, device="cpu", requires_grad=True
                )
                found += _saved(partial(twin, x), x, twin.parameters()).total // rows
    return found


def layer_bytes(model: PreTrainedModel, setting: Setting) -> list[LayerBytes]:
    """Of each decoder layer of a model with adapters, on the meta device."""
    twin = _Twin(model, setting)
    config = twin.config
    size = setting.dtype.itemsize
    hidden = config.hidden_size
    step = getattr(config, "chunk_size", None) or TOKENS  # mixers with a state compute whole chunks
    least = 1
    if twin.window is not None and setting.length > twin.window:  # attention in longer rows is masked
        step = twin.window
        least = 2
    elif twin.window is not None:
        step = max(1, min(step, twin.window // 3))
    # A layer saves constant + token T + square T^2 of a row of T tokens: three lengths give the two that grow.
    runs = [twin.run(step * (least + more)) for more in range(3)]
    found = []
    for kind, layer in zip(twin.kinds, decoder_layers(model), strict=True):
        modules = list(layer.modules())
        square = first = 0.0
        shared = 0
        unknown = ""
        saved = [run[kind] for run in runs if kind in run]
        if len(saved) == len(runs):
            low, middle, high = saved
            square = (high.total - 2 * middle.total + low.total) / (2 * step**2)
            token = (middle.total - low.total) / step - square * step * (2 * least + 1)
            first = (middle.of_input - low.of_input) / step
            shared = hidden * size * low.has_input
        else:
            unknown = type(layer).__name__
            token = sum(
                size * (part.in_features + part.r) for part in modules if isinstance(part, LoRALinear)
            )
        widest = max(
            (part.in_features for part in modules if isinstance(part, nn.Linear)), default=hidden
        )
        if any(map(_is_experts, modules)):
            inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
            chosen = getattr(config, "num_experts_per_tok", None) or 1
            if setting.device == "cuda":  # one after another
                token += chosen * (size * (4 * inner + 2 * hidden) + 16)
                widest = max(widest, inner)
            else:
                token += chosen * (size * (3 * inner + hidden + 1) + 24)
                widest = max(widest, chosen * hidden)
        spare = size * (hidden + 2 * widest)
        gradients = sum(p.nbytes for p in layer.parameters() if p.requires_grad)
        found.append(
            LayerBytes(hidden * size, token, shared, first, square, spare, gradients, unknown)
        )
    return found


class _Done(Exception):
    """A layer of each kind has run."""


class _Twin:
    """A copy of a model, of fake tensors, in which all layers of a kind are one layer, fused as on loading.

    The tensors are those of a CPU also for a GPU, since autograd needs a torch that was built for the device.
    """

    def __init__(self, model: PreTrainedModel, setting: Setting) -> None:
        self.config: Any = model.config.get_text_config()
        layers = decoder_layers(model)
        types = getattr(self.config, "layer_types", None) or [None] * len(layers)
        self.kinds: list[Kind] = [(types[number], str(layer)) for number, layer in enumerate(layers)]
        has_windows = getattr(self.config, "use_sliding_window", True)
        self.window: int | None = getattr(self.config, "sliding_window", None) if has_windows else None
        self.found: dict[Kind, Saved] = {}
        of_kind: dict[Kind, nn.Module] = {}
        copies: dict[int, Any] = {}
        for kind, layer in zip(self.kinds, layers, strict=True):
            if kind not in of_kind:
                of_kind[kind] = _as_loaded(layer, setting)
                of_kind[kind].register_forward_pre_hook(partial(self._measure, kind), with_kwargs=True)
            copies[id(layer)] = of_kind[kind]
        self.model: Any = copy.deepcopy(model, copies).train()
        for module in self.model.modules():
            if _is_experts(module):
                module.forward = lambda hidden_states, *_: hidden_states
            # The tables of some types depend on what positions hold.
            if rope := getattr(module, "rope_type", None):
                module.rope_type = (
                    "default" if isinstance(rope, str) else dict.fromkeys(rope, "default")
                )
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = _AsOnCuda(setting.dtype) if setting.device == "cuda" else nullcontext()
        with self.mode:
            self.model.to_empty(device="cpu")

    def run(self, length: int) -> dict[Kind, Saved]:
        """What a layer of each kind saves of one row; without those that do not run on fake tensors."""
        self.found = {}
        # An unknown model may raise anything.
        with suppress(Exception), self.mode, self.device, torch.no_grad():
            self.model(
                input_ids=torch.zeros(1, length, dtype=torch.long, device="cpu"), use_cache=False
            )
        return self.found

    def _measure(self, kind: Kind, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kind in self.found:
            return
        hidden = args[0] if args else next(iter(kwargs.values()))
        is_windowed = kind[0] in (None, "sliding_attention")
        is_masked = self.window is not None and hidden.shape[-2] > self.window and is_windowed
        own = [
            *layer.parameters(),
            *layer.buffers(),
            *filter(torch.is_tensor, tree_leaves((args, kwargs))),
        ]

        def saved(needs_grad: bool) -> Saved:
            x = torch.empty_like(hidden, requires_grad=needs_grad)

            def argument(value: Any) -> Any:
                """As it would be for numbers: no mask where every position sees all earlier ones, else the mask of one
                document."""
                if isinstance(value, Tensor) and value.dim() == 4 and value.dtype == torch.bool:
                    setattr(value, fuse._FOUND, None)
                    return value if is_masked else None
                return x if value is hidden else value

            inputs, named = tree_map(argument, (args, kwargs))
            return _saved(partial(layer.forward, *inputs, **named), x, own)

        trained = saved(True)
        self.found[kind] = trained._replace(of_input=trained.total - saved(False).total)
        if self.found.keys() == set(self.kinds):
            raise _Done


def _saved(call: Callable[[], Any], x: Tensor, own: Iterable[Tensor]) -> Saved:
    """What a call with the input ``x`` saves, each storage once, without ``own`` tensors."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # which holds it, so that no other gets its address
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    for tensor in own:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return Saved(
        sum(storage.nbytes() for storage in storages.values()), x.untyped_storage()._cdata in storages
    )


def _is_experts(module: nn.Module) -> bool:
    """Whether it is transformers' module of experts."""
    return hasattr(module, "_apply_gate")


def _as_loaded(module: nn.Module, setting: Setting) -> nn.Module:
    """A copy with the native parts that loading gives a module; they are found by computing, with small linear layers
    in place of its own."""
    small = copy.deepcopy(module)
    result = copy.deepcopy(module)
    for path, part in module.named_modules():
        if isinstance(part, (nn.Linear, LoRALinear)) and "base_layer" not in path:
            sizes = (8, 16) if part.out_features > part.in_features else (16, 8)
            small.set_submodule(path, nn.Linear(*sizes, bias=False, device="meta"))
    small = small.to_empty(device="cpu").to(setting.dtype).requires_grad_(False)
    for parameter in small.parameters():
        parameter.fill_(1.0)
    with torch.random.fork_rng(devices=[]):
        fuse.fuse(small)
    for path, part in small.named_modules():
        if isinstance(part, fuse.Fused) and not isinstance(part, fuse.Dense):
            target = result.get_submodule(path)
            vars(target).update(
                {name: value for name, value in vars(part).items() if name.startswith("_fused")}
            )
            target.__class__ = type(part)
    return result


class _AsOnCuda(TorchFunctionMode):
    """What a GPU saves where it differs from a CPU: of dropout a boolean mask, of attention no mask of dropout, and its
    operands in their own dtype on every machine."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.dropout:
            return _boolean_dropout(*args, **kwargs)
        if function is nn.functional.scaled_dot_product_attention:
            args = [operand.to(self.dtype) for operand in args]
            kwargs = {**kwargs, "dropout_p": 0.0}
        return function(*args, **kwargs)


def _boolean_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if p and training else input
