"""The model on the meta device, filled tensor by tensor, and finished as transformers would have finished it."""

from __future__ import annotations

import inspect
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_tie_weights
from transformers.pytorch_utils import Conv1D

from qlora_native._memory import trim_heap
from qlora_native._pages import interleave
from qlora_native.errors import UserError
from qlora_native.hf.checkpoint import Scratch, StoredTensor, check_finite, first_sentence, mapped_part, some_of
from qlora_native.hf.plan import FLOATS, STATE_MARK, Converted, Plain, Plan, Read, Step
from qlora_native.nn.experts import put_stack, quantized_stacks, stacks_of
from qlora_native.nn.linear import QuantizedEmbedding, QuantizedLinear
from qlora_native.ops.quantize_4bit import double_quantize
from qlora_native.reference import NESTED_BLOCK
from qlora_native.weight import QuantizedWeight, quantize

if TYPE_CHECKING:
    from qlora_native.hf.source import Source

OUTPUT_EMBEDDING = "lm_head"
PROGRESS_SECONDS = 3.0  # between two lines of loading
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dense_beside(trained: Sequence[str], tokens: object, is_kept: bool) -> list[str]:
    """The ``skip_modules`` of a base whose modules ``trained`` are trained whole, and ``tokens`` of its embeddings if
    there are some; its 4-bit weights are kept or new."""
    beside = ["embed_tokens", OUTPUT_EMBEDDING] if tokens else []
    return [*trained, *beside] if is_kept else [OUTPUT_EMBEDDING, *trained]


Value = Tensor | QuantizedWeight


def four_bit_weights(
    model: PreTrainedModel, skip_modules: Iterable[str], block_size: int, in_fp32: Callable[[str], object]
) -> dict[str, bool]:
    """The parameters that may become 4-bit, by name, and whether the model stores them transposed, as [in, out].

    These are the weights of every plain linear and the stacks of fused experts, but for tied ones, those that
    ``in_fp32`` keeps, and those under the modules that ``skip_modules`` names. Raises ValueError for a name there that
    stands for nothing.
    """
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    skip = list(skip_modules)
    names = [name for name, _ in model.named_modules() if name]
    for entry in skip:
        if entry != OUTPUT_EMBEDDING and not any(_stands_for(entry, name) for name in names):
            near = get_close_matches(entry, {*names, *(name.rpartition(".")[2] for name in names)}, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise ValueError(f"skip_modules: {type(model).__name__} has no module {entry!r}{hint}")
    output = model.get_output_embeddings() if OUTPUT_EMBEDDING in skip else None
    chosen = {
        f"{path}.weight": is_transposed(module)
        for path, module in model.named_modules()
        if is_plain_linear(module) and module is not output and not _is_read_raw(model, path)
    }
    chosen |= {f"{path}.{name}": False for path, name, _ in stacks_of(model, block_size)}
    return {
        name: transposed
        for name, transposed in chosen.items()
        if name not in tied
        and not in_fp32(name)
        and not any(_stands_for(entry, name.rpartition(".")[0]) for entry in skip)
    }


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module's forward is x W^T + b; a subclass of nn.Linear may compute something else (routers do)."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is a linear that stores its weight as [in, out] (GPT-2's Conv1D)."""
    return is_plain_linear(module) and not isinstance(module, nn.Linear)


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


def keepable_embeddings(meta: MetaModel, skip_modules: Iterable[str]) -> set[str]:
    """The weights of plain embeddings that can stay quantized: all that is tied to them are plain linear layers, and
    none is of ``skip_modules``."""
    found, output = set(), meta.model.get_output_embeddings()
    for path, module in meta.model.named_modules():
        users = [path, *(name.rpartition(".")[0] for name, to in meta.tied.items() if to == f"{path}.weight")]
        heads = [meta.model.get_submodule(user) for user in users[1:]]
        skipped = any(_stands_for(entry, user) for entry in skip_modules for user in users)
        skipped = skipped or (OUTPUT_EMBEDDING in skip_modules and output in heads)
        if type(module) is nn.Embedding and all(type(head) is nn.Linear for head in heads) and not skipped:
            found.add(f"{path}.weight")
    return found


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


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], object]:
    """Whether a name is of those that transformers keeps in fp32 when the model is loaded in ``dtype``."""
    strict = model._keep_in_fp32_modules_strict if dtype in (torch.float16, torch.bfloat16) else ()
    loose = model._keep_in_fp32_modules if dtype is torch.float16 else ()
    patterns = [pattern.replace("*", ".*") for pattern in {*(strict or ()), *(loose or ())}]
    return re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)").search


def _is_read_raw(model: nn.Module, path: str) -> bool:
    """Whether the parent's code uses this layer's weight itself, as Mamba does ``self.dt_proj.weight``.

    Slices are taken only where tensor parallelism is imitated, which is off by default.
    """
    parent, _, name = path.rpartition(".")
    used = rf"(?<!isinstance\()self\.{re.escape(name)}\.weight\b(?!\[|\.(dtype|device|shape)\b)"
    return re.search(used, _source_of(type(model.get_submodule(parent)))) is not None  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _source_of(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time
        return ""


def _stands_for(entry: str, path: str) -> bool:
    return f".{entry}." in f".{path}."


class HeapTrimmer:
    """Counts bytes that were read, and gives memory back now and then."""

    num_bytes = 0

    def __call__(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self.num_bytes > 1 << 27:
            self.num_bytes = 0
            trim_heap()


class MetaModel:
    """A causal LM on the meta device, into which tensors are read one after another.

    The layers that become 4-bit are replaced one at a time, when their weight is stored, because transformers' own
    conversions read the shapes of those that are still to come.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        try:
            with torch.device("meta"), no_tie_weights():
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    deepcopy(config), dtype=dtype, trust_remote_code=False
                )
        except Exception as error:  # of sizes that make no model: a TypeError, a ZeroDivisionError
            where, kind = config.name_or_path, config.model_type
            reason = f"{where}: transformers cannot build this {kind} model: {first_sentence(error)}"
            if "Unrecognized configuration class" in str(error):
                reason = f"{where} holds a {kind} model: expected a causal language model, such as llama or qwen3."
            raise UserError(reason) from error
        self.shapes: dict[str, Tensor] = dict(self.model.state_dict())  # as the model was built
        self.missing = set(self.shapes)
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)  # what is tied -> what it is tied to
        self.in_fp32 = kept_in_fp32(self.model, dtype)
        self.weights: dict[str, bool] = {}  # to be quantized on reading -> whether the model stores it transposed
        self.options: dict[str, Any] = {}  # of qlora_native.quantize, for these
        self.rounding: Callable[..., QuantizedWeight] = quantize
        self.trim = HeapTrimmer()

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor takes when it stays dense."""
        expected = self.shapes[name].dtype
        return torch.float32 if expected.is_floating_point and self.in_fp32(name) else expected

    def four_bit_weights(self, skip_modules: Iterable[str], block_size: int) -> dict[str, bool]:
        return four_bit_weights(self.model, skip_modules, block_size, self.in_fp32)

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
        of which nothing is read yet (:func:`qlora_native.hf.mapped.check_mapped_finite`)."""
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

    def check(self, plan: Plan, read_state: Read, where: str) -> None:
        """UserError if the plan lacks tensors of the model, or has one of another shape or kind, before any is read."""

        def read(stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
            if STATE_MARK in stored.name:
                return read_state(stored)
            dtype = torch.bfloat16 if stored.dtype in FLOATS else stored.dtype
            return torch.empty(stored.shape, dtype=dtype, device="meta")

        found = set()
        for step in plan.steps:  # a converter keeps what it is given
            once = deepcopy(step) if isinstance(step, Converted) else step
            for name, value in once.iter_tensors(self.model, read):
                self.check_shape(name, value, step.file)
                if isinstance(value, Tensor) and not _is_like(value.dtype, self.shapes[name].dtype):
                    expected = "float32, bfloat16 or float16" if self.shapes[name].is_floating_point() else "integers"
                    raise UserError(f"{step.file}: tensor {name} is {value.dtype}: expected {expected}.")
                found.add(name)
        origins = {self.tied.get(name, name) for name in found}  # of tied tensors any one is enough
        absent = [name for name in self.shapes if name not in found and self.tied.get(name, name) not in origins]
        absent = _without_ignored(absent, *(self.model._keys_to_ignore_on_load_missing or ()))
        computed_today = (r"rotary_emb\.inv_freq", r"position_ids$")  # buffers that older checkpoints hold
        unexpected = [stored.name for stored in plan.unexpected]
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        extra, kind = _without_ignored(unexpected, *computed_today, *ignored), type(self.model).__name__
        if absent:
            also = f", and has {len(extra)} that the model has no place for ({some_of(extra)})" if extra else ""
            raise UserError(
                f"{where} lacks {len(absent)} of the {len(self.shapes)} tensors of {kind} "
                f"({some_of(absent)}){also}; config.json and the weights are of different models, or the copy is "
                "incomplete."
            )
        if extra:
            warnings.warn(
                f"{where}: {kind} has no place for {len(extra)} of the stored tensors ({some_of(extra)}).", stacklevel=4
            )

    def check_shape(self, name: str, value: Value, file: str) -> None:
        """UserError unless the tensor has the shape of the model's parameter or buffer ``name``."""
        expected = self.shapes[name].shape
        parent = self.model.get_submodule(name.rpartition(".")[0])
        transposed = isinstance(value, QuantizedWeight) and is_transposed(parent)
        if value.shape != (expected[::-1] if transposed else expected):
            raise UserError(
                f"{file}: tensor {name} is {list(value.shape)}, but {list(expected)} by config.json; the two are of "
                "different models."
            )

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


def _is_like(dtype: torch.dtype, expected: torch.dtype) -> bool:
    """Whether a stored tensor can become one of the model: integers remain integers, floats have 16 bits or more."""
    return dtype in (*DTYPES, torch.float64) if expected.is_floating_point else not dtype.is_floating_point


def _without_ignored(names: Iterable[str], *patterns: str) -> list[str]:
    return sorted(name for name in names if not any(re.search(pattern, name) for pattern in patterns))


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
