"""The model on the meta device, filled tensor by tensor, and finished as transformers would have finished it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_native._memory import trim_heap
from qlora_native.errors import UserError
from qlora_native.nn.experts import put_stack, quantized_stacks
from qlora_native.nn.linear import QuantizedEmbedding, QuantizedLinear
from qlora_native.ops._library import interleave
from qlora_native.ops.quantize_4bit import double_quantize
from qlora_native.reference import NESTED_BLOCK
from qlora_native.weight import QuantizedWeight, quantize
from qlora_native.weights.files import Scratch, check_finite, first_sentence, mapped_part
from qlora_native.weights.match import Converted, Plain, Step
from qlora_native.weights.shapes import ModelShapes, is_transposed
from qlora_native.weights.source import Source

PROGRESS_SECONDS = 3.0  # between two lines of loading

Value = Tensor | QuantizedWeight


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
        layer = QuantizedLinear.from_quantized(weight)
        if old.bias is not None:
            layer.bias = old.bias  # type: ignore[assignment]
        layer.fan_in_fan_out = is_transposed(old)  # type: ignore[assignment]  # merging gives the layer back as it was
        layer.train(old.training)
        model.set_submodule(path, layer)
    layer._is_hf_initialized = True  # type: ignore[assignment]  # keeps transformers' initialization off it
    parameter: Tensor = getattr(layer, leaf)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
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
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)) and (name := f"{path}.weight") in parameters
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
        self.weights: dict[str, bool] = {}  # to be quantized on reading -> whether the model stores it transposed
        self.options: dict[str, Any] = {}  # of qlora_native.quantize, for these
        self.rounding: Callable[..., QuantizedWeight] = quantize
        self.trim = HeapTrimmer()

    def load(self, source: Source, steps: list[Step], progress: Callable[[str, int, int], None] | None = None) -> None:
        """Read the steps' tensors and store them, quantized or dense, one at a time."""
        scratch, shown = self.scratch(steps), time.monotonic()
        for number, step in enumerate(steps):
            if progress is not None and time.monotonic() > shown + PROGRESS_SECONDS:
                progress(f"Loading: {number} of {len(steps)} tensors", number, len(steps))
                shown = time.monotonic()
            for name, value in self.iter_tensors(source, step, scratch):
                self.store(name, value, step.file)
            self.trim(step.num_bytes)

    def scratch(self, steps: Iterable[Step]) -> Scratch:
        """Memory for each of the stored tensors that the model does not keep as they are."""
        return Scratch(max((step.num_bytes for step in steps if self.is_copied(step)), default=0))

    def is_copied(self, step: Step) -> bool:
        """Whether the model keeps something made of the stored tensor, not the tensor itself."""
        return isinstance(step, Plain) and (
            step.name in self.weights or step.stored.dtype != self.dtype_of(step.name) or self.device.type != "cpu"
        )

    def iter_tensors(self, source: Source, step: Step, scratch: Scratch) -> Iterator[tuple[str, Value]]:
        """What the model stores of a step, by name: 4-bit, or dense in its dtype; on the model's device."""
        if isinstance(step, Converted) and step.is_stack and step.name in self.weights:
            yield step.name, self._quantized_stack(source, step)
            return
        for name, value in step.iter_tensors(self.model, source.read, scratch if self.is_copied(step) else None):
            if isinstance(value, QuantizedWeight):
                yield name, value.to(self.device)
            elif name in self.weights:
                weight = self.quantized(name, value.to(self.device), step.file, self.rounding)
                yield name, self.finished(weight)
            else:
                yield name, self.dense(name, value, step.file)

    def dense(self, name: str, tensor: Tensor, file: str) -> Tensor:
        """The tensor in the model's dtype and on its device. UserError for a NaN or an infinity, but in a mapped file,
        of which nothing is read yet (:func:`qlora_native.models.mapped.check_mapped_finite`)."""
        made = tensor.to(self.device, self.dtype_of(name))
        if mapped_part(made) is None:
            check_finite(tensor, name, file)
        return made

    def finished(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The weight with the model's dtype, in memory that its products read fast."""
        weight.dtype = self.dtype
        interleave(weight.packed)
        return weight

    def quantized(self, name: str, tensor: Tensor, file: str, function: Callable[..., Any], **changes: Any) -> Any:
        """The parameter ``name``, or a slice of it, by ``function`` with the options, but for ``changes`` to them."""
        tensor = tensor.t().contiguous() if self.weights[name] else tensor
        try:
            return function(tensor, **{**self.options, **changes})
        except ValueError as error:
            reason = re.sub(r"^quantize\w*: ", "", first_sentence(error))
            raise UserError(f"{file}: weight {name} cannot be quantized: {reason}") from error

    def _quantized_stack(self, source: Source, step: Converted) -> QuantizedWeight:
        parts = (
            self.quantized(step.name, one.to(self.device), step.file, self.rounding, double_quant=False)
            for one in step.slices(source.read)
        )
        return self.finished(join(parts, self.shapes[step.name].shape, self.dtype, self.options, self.device))

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
        initialized = {module for module in self.model.modules() if "_is_hf_initialized" in vars(module)}
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
        group = {origin, *(other for other, to in self.tied.items() if to == origin)} - {name} - self.missing
        return any(torch.equal(tensor, self.model.get_parameter(other)) for other in group)


def join(
    parts: Iterable[QuantizedWeight],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    options: dict[str, Any],
    device: torch.device | str = "cpu",
    write: Callable[[Tensor], object] | None = None,
) -> QuantizedWeight:
    """The bytes of a tensor quantized whole, of its parts quantized one after another.

    ``parts`` go from the first element to the last, with fp32 scales; all but the last have an even number of whole
    blocks. ``shape`` and ``dtype`` are of the whole. With ``write``, which takes the codes of each part, it has none.
    """
    block, done = options["block_size"], 0
    packed = torch.empty(0 if write else (math.prod(shape) + 1) // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-math.prod(shape) // block), device=device)
    for part in parts:
        if write is None:
            packed[done // 2 :][: part.packed.numel()] = part.packed
        else:
            write(part.packed)
        scales[done // block :][: part.absmax.numel()] = part.absmax
        done += part.numel()
        del part  # before the next is made
    if done != math.prod(shape):
        raise ValueError(f"join: the parts have {done:,} elements: expected {math.prod(shape):,} of {list(shape)}.")
    about = {"shape": shape, "dtype": dtype, "quant_type": options["quant_type"], "block_size": block}
    if not options["double_quant"]:
        return QuantizedWeight(packed, scales, **about)
    codes = torch.empty(scales.numel(), dtype=torch.uint8)
    nested, offset = torch.empty(-(-scales.numel() // NESTED_BLOCK)), torch.empty(())
    double_quantize(scales.cpu(), codes, nested, offset)
    return QuantizedWeight(packed, codes, nested_absmax=nested, nested_offset=offset, **about).to(device)
