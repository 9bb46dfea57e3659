"""Stacks of experts in 4 bits: transformers' fused experts, whose weights are three-dimensional parameters.

transformers computes them by one rule (``transformers.integrations.moe``): up projection, gate, down projection, each
with a slice [N, K] an expert. A module that this rule covers becomes 4-bit one parameter at a time and keeps its class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.functional import dense_linear, linear, lora_linear
from qlora_native.nn.linear import KeepsBits, from_tensors, in_rows, scales_in, state_key, to_tensors
from qlora_native.ops.experts_4bit import experts_4bit
from qlora_native.weight import TENSOR_FIELDS, QuantizedWeight

# A [E, r, K], B [E, N, r] and the scale of an adapter of a stack.
Factors = tuple[Tensor, Tensor, float]
Product = Callable[[str, int, Tensor], Tensor]
STACKS = ("gate_up_proj", "up_proj", "down_proj")
_SCALES = TENSOR_FIELDS[1:]
_LAID_OUT = "_absmax_bytes"  # ends the name of the parameter that holds a stack's scales


class Substitute(nn.Module):
    """First base of a class that takes another's place in a model, under its name; the second base is that class.

    Copies and pickles keep the substitution.
    """

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Class attributes that depend on the class replaced."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind, base = type(self).__bases__
        return (
            _blank,
            (kind, base),
            self.__getstate__() if hasattr(self, "__getstate__") else vars(self),
        )


_made: dict[tuple[type[Substitute], type[nn.Module]], type[nn.Module]] = {}


def substitute_class(kind: type[Substitute], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` with ``kind``'s forward; the same one every time."""
    if (kind, base) not in _made:
        members = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        _made[kind, base] = type(base.__name__, (kind, base), {**members, **kind.members(base)})
    return _made[kind, base]


def _blank(kind: type[Substitute], base: type[nn.Module]) -> nn.Module:
    made = substitute_class(kind, base)
    return made.__new__(made)


class QuantizedExperts(Substitute, KeepsBits):
    """A module of experts with stacks [E, N, K] in 4 bits; ``forward`` as transformers' own.

    Where the class replaced ``is_transposed``, its dense stacks are [E, K, N]. A stack lies under its own name as
    frozen uint8 [ceil(n/2), 1], its scales beside it as buffers; the state_dict holds the keys of
    :func:`qlora_native.to_bnb`. ``compute_dtype`` is as in :class:`qlora_native.nn.QuantizedLinear`.
    """

    compute_dtype: torch.dtype | None = None
    at_home: Callable[[Tensor], Tensor] | None = None  # as that of QuantizedLinear

    # The class replaced has these.
    num_experts: int
    has_bias: bool
    has_gate: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    _stacks: dict[str, QuantizedWeight]
    _slices: dict[str, list[QuantizedWeight]]
    adapters: dict[str, list[Factors]]  # of stacks by name, for as long as a forward with them lasts

    def stack(self, name: str) -> QuantizedWeight | None:
        """The stack of that name as a value, or None if it is dense."""
        about = self._stacks.get(name)
        if about is None:
            return None
        scales: dict[str, Any] = {field: self._buffers.get(f"{name}_{field}") for field in _SCALES}
        stored = self._parameters.get(name + _LAID_OUT)
        if stored is not None:
            scales["absmax"] = scales_in(stored, scales["nested_absmax"] is not None)
        packed: Any = self._parameters[name]
        return about.with_arguments(about.op_args()._replace(packed=packed.view(-1), **scales))

    def lay_out_for_sharding(self) -> None:
        """As that of :class:`qlora_native.nn.QuantizedLinear`, for every stack."""
        for name, about in self._stacks.items():
            absmax = self._buffers.pop(f"{name}_absmax", None)
            if absmax is not None:
                packed: Any = self._parameters[name]
                rows, stored = in_rows(packed, absmax, about.numel(), about.block_size)
                setattr(self, name, rows)
                setattr(self, name + _LAID_OUT, stored)
        self._slices.clear()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, K] of tokens that go to experts top_k_index [T, k]; returns [T, K]."""
        up = "gate_up_proj" if self.has_gate else "up_proj"
        is_grouped = hidden_states.device.type == "cpu" and {up, "down_proj"} <= self._stacks.keys()
        if not is_grouped or any(len(factors) > 1 for factors in self.adapters.values()):
            return by_expert(self, hidden_states, top_k_index, top_k_weights, product=self._product)
        tokens, count = top_k_index.shape
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        # Rows of experts that another process has come last, behind the last offset.
        bounds = torch.arange(self.num_experts + 1, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, bounds)
        inner = self._products(up, hidden_states, order // count, experts, offsets)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outer = self._products("down_proj", inner, None, experts, offsets)
        # As transformers' grouped_mm: weighted, in the order of the tokens, summed in fp32 over their experts.
        weighted = outer * top_k_weights.reshape(-1, 1).index_select(0, order)
        weighted = weighted.index_select(0, order.argsort()).view(tokens, count, outer.shape[1])
        return weighted.sum(1).to(hidden_states.dtype)

    def _products(
        self, name: str, x: Tensor, token: Tensor | None, experts: Tensor, offsets: Tensor
    ) -> Tensor:
        """Those of a stack in 4 bits with sorted rows, as the op takes them, each expert with its adapter and bias."""
        weight: Any = self.stack(name)
        factors: Any = self.adapters.get(name) or [()]
        dtype = self.compute_dtype or x.dtype
        y = experts_4bit(x.to(dtype), token, offsets, weight.op_args(), *factors[0]).to(x.dtype)
        if not self.has_bias:
            return y
        # With zeros for rows of no expert.
        biases = nn.functional.pad(getattr(self, f"{name}_bias"), (0, 0, 0, 1))
        return y + biases.to(y.dtype).index_select(0, experts.clamp(max=self.num_experts))

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        stack = self.stack(name)
        if stack is None:
            dense = getattr(self, name)[expert]
            return dense_linear(x, dense.t() if self.is_transposed else dense)
        if self.compute_dtype is not None and self.compute_dtype != x.dtype:
            return self._product(name, expert, x.to(self.compute_dtype)).to(x.dtype)
        slices = self._slices.get(name)
        if slices is None or slices[0].packed.data_ptr() != stack.packed.data_ptr():
            slices = self._slices[name] = [stack[index] for index in range(self.num_experts)]
        weight = slices[expert]
        if not self.adapters.get(name):
            return linear(x, weight)
        (a, b, scale), *others = self.adapters[name]
        y = lora_linear(x, weight, a[expert], b[expert], scale)
        for a, b, scale in others:
            low = dense_linear(x, a[expert].to(x.dtype))
            y = y + dense_linear(low, b[expert].to(x.dtype)) * scale
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedExperts:
        self._slices.clear()
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slices": {}}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.is_sharded:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        home = self.at_home or (lambda tensor: tensor)
        for name, parameter in self._parameters.items():
            stack = self.stack(name)
            if stack is not None:
                destination.update(to_tensors(stack.map(home), prefix + name))
            elif parameter is not None and not name.endswith(_LAID_OUT):
                destination[prefix + name] = home(parameter if keep_vars else parameter.detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if self.is_sharded:
            return super()._load_from_state_dict(state_dict, prefix, *others)
        missing_keys: list[str] = others[2]
        for name, parameter in list(self._parameters.items()):
            if name not in self._stacks:
                if prefix + name in state_dict and parameter is not None:
                    with torch.no_grad():
                        parameter.copy_(state_dict[prefix + name])
            elif state_key(state_dict, prefix + name) is None:
                missing_keys.append(prefix + name)
            else:
                device = self._parameters[name].device  # type: ignore[union-attr]
                put_stack(self, name, from_tensors(state_dict, prefix + name).to(device))


def by_expert(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    product: Product,
) -> Tensor:
    """The rule of a module that :func:`stacks_of` names, expert by expert: ``product(name, e, x [t, K])`` is x times
    the transpose of that stack's slice e [N, K]; biases ``<name>_bias`` [E, N] are added here."""

    def affine(name: str, expert: int, x: Tensor) -> Tensor:
        y = product(name, expert, x)
        return y + getattr(experts, f"{name}_bias")[expert].to(y.dtype) if experts.has_bias else y

    up, activate = (
        ("gate_up_proj", experts._apply_gate) if experts.has_gate else ("up_proj", experts.act_fn)
    )
    result = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= experts.num_experts:  # another process has it
            continue
        token, position = torch.where(top_k_index == expert)
        inner = activate(affine(up, expert, hidden_states[token]))
        outer = affine("down_proj", expert, inner) * top_k_weights[token, position, None]
        result = result.index_add(0, token, outer.to(result.dtype))
    return result


def stacks_of(model: nn.Module, block_size: int) -> Iterator[tuple[str, str, Tensor]]:
    """(module path, parameter name, parameter) of the dense stacks that can become 4-bit, [E, N, K], or [E, K, N] where
    the module ``is_transposed``."""
    settings = ("has_post_expert_norm", "_is_expert_parallel")
    for path, module in model.named_modules():
        # transformers' rule for experts is all that the module does.
        if hasattr(module, "_apply_gate") and all(
            getattr(module, name, True) is False for name in settings
        ):
            for name, parameter in module.named_parameters(recurse=False):
                if name in STACKS and parameter.dim() == 3 and parameter[0].numel() % block_size == 0:
                    yield path, name, parameter


def put_stack(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Make ``weight`` [E, N, K] the parameter ``name`` of a module that :func:`stacks_of` names."""
    if not isinstance(module, QuantizedExperts):
        module.__class__ = substitute_class(QuantizedExperts, type(module))
        module._stacks, module._slices, module.adapters = {}, {}, {}  # type: ignore[assignment]
    assert isinstance(module, QuantizedExperts)
    if name + _LAID_OUT in module._parameters:
        raise ValueError(f"{name}: a stack laid out for sharding cannot be exchanged: load it before.")
    setattr(module, name, nn.Parameter(weight.packed.view(-1, 1), requires_grad=False))
    for field in _SCALES:
        module.register_buffer(f"{name}_{field}", getattr(weight, field))
    module._stacks[name] = weight.map(lambda tensor: None)
    module._slices.clear()


def take_stack(module: QuantizedExperts, name: str, dense: Tensor) -> None:
    """Put ``dense`` [E, N, K] back in place of the 4-bit stack, as the module's class stores it; the module gets that
    class back with the last."""
    del module._stacks[name]
    for field in _SCALES:
        module._buffers.pop(f"{name}_{field}", None)
    module._parameters.pop(name + _LAID_OUT, None)
    dense = dense.mT.contiguous() if module.is_transposed else dense
    setattr(module, name, nn.Parameter(dense, requires_grad=False))
    if not module._stacks:
        for attribute in ("_stacks", "_slices", "adapters", "compute_dtype"):
            vars(module).pop(attribute, None)
        module.__class__ = type(module).__bases__[1]


def quantized_stacks(model: nn.Module) -> Iterator[tuple[str, QuantizedExperts, str, QuantizedWeight]]:
    """(module path, module, parameter name, weight) of every 4-bit stack."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            for name in list(module._stacks):
                weight = module.stack(name)
                assert weight is not None
                yield (
                    path,
                    module,
                    name,
                    weight if module.at_home is None else weight.map(module.at_home),
                )


def without_stacks(conversions: Iterable[Any], model: nn.Module) -> list[Any]:
    """transformers' conversions but for those that made a 4-bit stack: they cannot be undone on packed bytes."""
    names = [f"{path}.{name}" for path, _, name, _ in quantized_stacks(model)]

    def makes_one(entry: Any) -> bool:
        ends = tuple(str(target).lstrip(".^") for target in entry.target_patterns)
        return hasattr(entry, "operations") and any(name.endswith(ends) for name in names)

    return [entry for entry in conversions if not makes_one(entry)]
