"""The model on the meta device, filled tensor by tensor, and finished as transformers would have finished it."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_native._memory import trim_heap
from qlora_native.nn.experts import put_stack, quantized_stacks
from qlora_native.nn.linear import AskedLinear, QuantizedEmbedding, QuantizedLinear
from qlora_native.nn.probe import is_asked_for_dtype
from qlora_native.weight import QuantizedWeight, quantize
from qlora_native.weights.files import check_finite, mapped_part
from qlora_native.weights.shapes import ModelShapes, is_transposed
from qlora_native.weights.stream import Entry, Item, Source, Value, stream
from qlora_native.weights.transforms import rounding

PROGRESS_SECONDS = 3.0  # between two lines of loading


def put_four_bit(model: nn.Module, name: str, weight: QuantizedWeight) -> Tensor:
    """Make ``weight``, [out, in] or [experts, out, in], the parameter ``name``, which is returned."""
    path, _, leaf = name.rpartition(".")
    layer = old = model.get_submodule(path)
    if leaf != "weight":
        put_stack(old, leaf, weight)
    elif isinstance(old, QuantizedLinear):
        old.quantized = weight
    elif isinstance(old, nn.Embedding):
        layer = QuantizedEmbedding(weight).train(old.training)
        model.set_submodule(path, layer)
    else:
        kind = AskedLinear if is_asked_for_dtype(model, path) else QuantizedLinear
        layer = kind.from_quantized(weight)
        if old.bias is not None:
            layer.bias = old.bias  # type: ignore[assignment]
        layer.fan_in_fan_out = is_transposed(old)  # type: ignore[assignment]  # merging gives the layer back as it was
        layer.train(old.training)
        model.set_submodule(path, layer)
    layer._is_hf_initialized = True  # type: ignore[assignment]  # keeps transformers' initialization off it
    parameter: Any = layer._parameters[leaf]
    parameter._is_hf_initialized = True
    return parameter


def put_dense(model: nn.Module, path: str, inner: QuantizedLinear | nn.Linear, weight: Tensor) -> None:
    """Put the dense layer that ``inner`` stood for at ``path``: ``weight`` [out, in], and inner's bias."""
    if getattr(inner, "fan_in_fan_out", False):
        dense: nn.Module = Conv1D(1, 1)
        dense.nx, dense.nf = inner.in_features, inner.out_features  # type: ignore[assignment]
        weight = weight.t().contiguous()
    else:
        dense = nn.Linear(inner.in_features, inner.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.register_parameter("bias", inner.bias)
    model.set_submodule(path, dense.train(inner.training))


def four_bit_parts(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Every quantized weight of the model by the name of its parameter; of tied ones the first."""
    parameters = dict(model.named_parameters())
    parts = {
        name: module.quantized
        for path, module in model.named_modules()
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding))
        and (name := f"{path}.weight") in parameters
    }
    return parts | {f"{path}.{name}": weight for path, _, name, weight in quantized_stacks(model)}


class HeapTrimmer:
    """Counts bytes that were read, and gives memory back now and then."""

    num_bytes = 0

    def __call__(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self.num_bytes > 1 << 27:
            self.num_bytes = 0
            trim_heap()


class MetaModel(ModelShapes):
    """A causal LM on the meta device, into which tensors are stored one after another.

    The layers that become 4-bit are replaced one at a time, when their weight is stored, because transformers' own
    conversions read the shapes of those that are still to come.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype)
        self.device = device
        self.missing = set(self.shapes)
        self.trim = HeapTrimmer()

    def load(
        self, items: Iterable[Item], progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        """Read the items and store them, one at a time."""
        items, shown = [*items], time.monotonic()
        for number, item in enumerate(items):
            if progress is not None and time.monotonic() > shown + PROGRESS_SECONDS:
                progress(f"Loading: {number} of {len(items)} tensors", number, len(items))
                shown = time.monotonic()
            for name, value in self.values(item):
                self.store(name, value, item.entry.file)
            self.trim(item.entry.num_bytes)

    def rounded(
        self,
        source: Source,
        names: Container[str],
        options: Mapping[str, Any],
        function: Callable[..., QuantizedWeight] = quantize,
        **others: Any,
    ) -> Iterator[Item]:
        """The stream to this model in which the weights of these names are quantized; ``others`` are its options."""
        transform = rounding(self, names, options, function, self.device)

        def is_lasting(entry: Entry) -> bool:
            return entry.name not in names and self.keeps(entry)

        return stream(source, self, [transform], is_lasting=is_lasting, **others)

    def keeps(self, entry: Entry) -> bool:
        """Whether a stored tensor that stays dense becomes the parameter itself."""
        return entry.parts[0].dtype == self.dtype_of(entry.name) and self.device.type == "cpu"

    def values(self, item: Item) -> Iterator[tuple[str, Value]]:
        """What the model holds of an item, by name: 4-bit, or dense in its dtype; on the model's device."""
        for name, value in item.values():
            if isinstance(value, QuantizedWeight):
                yield name, value.to(self.device)
            else:
                yield name, self.dense(name, value, item.entry.file)

    def dense(self, name: str, tensor: Tensor, file: str) -> Tensor:
        """The tensor in the model's dtype and on its device. UserError for a NaN or an infinity, but not in a mapped
        file, which is not read yet (:func:`qlora_native.models.mapped.check_mapped_finite`)."""
        made = tensor.to(self.device, self.dtype_of(name))
        if mapped_part(made) is None:
            check_finite(tensor, name, file)
        return made

    def store(self, name: str, value: Value, file: str) -> None:
        """Make ``value`` the parameter or buffer ``name``; of two equal tied tensors the second is dropped."""
        self.check_shape(name, value, file)
        if isinstance(value, QuantizedWeight):
            parameter = put_four_bit(self.model, name, value)
            for tied in [other for other, origin in self.tied.items() if origin == name]:
                put_four_bit(self.model, tied, value)
                self.model.get_submodule(tied.rpartition(".")[0]).weight = parameter
                self.missing.discard(tied)
        elif self._has_twin(name, value):
            return
        else:  # the mark keeps initialize_weights() off it
            self._set(name, value)._is_hf_initialized = True  # type: ignore[attr-defined]
        self.missing.discard(name)

    def finish(self) -> PreTrainedModel:
        """Tie weights, compute the buffers that no file holds."""
        model = self.model
        model.tie_weights(missing_keys=self.missing, recompute_mapping=False)
        for name in self.missing:  # left to transformers' initialization by its own list
            self._set(name, torch.empty_like(self.shapes[name], device=self.device))
        self._compute_buffers()
        model.requires_grad_(False)
        return model.eval()

    def prepare(self) -> PreTrainedModel:
        """The model in a state in which those of its layers that are stored can run; others are still to come."""
        self.model.tie_weights(missing_keys=set(self.missing), recompute_mapping=False)
        initialized = {
            module for module in self.model.modules() if "_is_hf_initialized" in vars(module)
        }
        self._compute_buffers()
        for module in self.model.modules():
            if module not in initialized:  # finish() initializes it again
                vars(module).pop("_is_hf_initialized", None)
        return self.model.eval()

    def _compute_buffers(self) -> None:
        for name, buffer in list(self.model.named_buffers()):
            if buffer.is_meta:
                self._set(name, torch.empty_like(buffer, device=self.device))
        self.model.initialize_weights()

    def _set(self, name: str, tensor: Tensor) -> Tensor:
        """Make the tensor the parameter or buffer of that name, which is returned."""
        path, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(path)
        if leaf in parent._parameters:
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(parent, leaf, tensor)
        return tensor

    def _has_twin(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor that is tied to ``name`` is stored already, with the same values."""
        origin = self.tied.get(name, name)
        group = (
            {origin, *(other for other, to in self.tied.items() if to == origin)}
            - {name}
            - self.missing
        )
        return any(torch.equal(tensor, self.model.get_parameter(other)) for other in group)
