"""The model as modules without memory, filled tensor by tensor, and finished as transformers would have finished it.

Everything that leans on how transformers builds a model stands in this file and in ``plan.py``.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_tie_weights
from transformers.pytorch_utils import Conv1D

from qlora_native._memory import trim_heap
from qlora_native.calibration.quantize import quantize_calibrated
from qlora_native.errors import UserError
from qlora_native.hf.checkpoint import some_of
from qlora_native.nn.experts import QuantizedExperts, put_stack, quantized_stacks, stacks_of, take_stack
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.ops import _pages
from qlora_native.ops.quantize_4bit import double_quantize
from qlora_native.reference import NESTED_BLOCK
from qlora_native.weight import QuantizedWeight, quantize

OUTPUT_EMBEDDING = "lm_head"

# (name in the model, tensor, where it came from). The tensor may lie in memory that the next one overwrites; a stack
# may come as its slices.
NamedTensors = Iterator[tuple[str, Tensor | QuantizedWeight | Iterator[Tensor], str]]


def four_bit_weights(
    model: PreTrainedModel, skip_modules: Iterable[str], block_size: int, in_fp32: Callable[[str], object]
) -> dict[str, bool]:
    """The parameters that may become 4-bit, by name, and whether the model stores them transposed, as [in, out].

    These are the weights of every plain linear and the stacks of fused experts, but for tied ones, those that
    ``in_fp32`` keeps, and those under the modules that ``skip_modules`` names. A name there stands for the module of
    that path or path ending, and all under it; ``"lm_head"`` also for the output embedding of models that call it
    otherwise. Raises ValueError for a name that stands for nothing.
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
        f"{path}.weight": not isinstance(module, nn.Linear)
        for path, module in model.named_modules()
        if is_plain_linear(module)
        and module is not output
        and not any(_stands_for(entry, path) for entry in skip)
        and not _is_read_raw(model, path)
    }
    for path, name, _ in stacks_of(model, block_size):
        if not any(_stands_for(entry, path) for entry in skip):
            chosen[f"{path}.{name}"] = False
    return {name: transposed for name, transposed in chosen.items() if name not in tied and not in_fp32(name)}


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module's forward is x W^T + b; a subclass of nn.Linear may compute something else (routers do)."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def put_four_bit(model: nn.Module, name: str, weight: QuantizedWeight, transposed: bool) -> Tensor:
    """Exchange the linear, or the stack of experts, whose parameter is ``name`` for its 4-bit form.

    ``weight`` is [out, in], or [experts, out, in]; ``transposed`` says that the model stores it as [in, out] (GPT-2's
    Conv1D). Returns the parameter that now has that name.
    """
    path, _, leaf = name.rpartition(".")
    old = model.get_submodule(path)
    if leaf != "weight":
        put_stack(old, leaf, weight)
        layer = old
    elif isinstance(old, QuantizedLinear):
        old.quantized = weight
        layer = old
    else:
        layer = QuantizedLinear.from_quantized(weight)
        if old.bias is not None:
            layer.bias = old.bias  # type: ignore[assignment]
        layer.fan_in_fan_out = transposed  # type: ignore[assignment]  # merging gives the layer back as it was
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


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Every 4-bit layer and stack as the dense one it stands for, with its decoded weight, one at a time."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            put_dense(model, path, module, module.quantized.dequantize(dtype))
    for _, experts, name, weight in list(quantized_stacks(model)):
        take_stack(experts, name, weight.dequantize(dtype))


def four_bit_parts(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Every 4-bit weight of the model by the name of its parameter."""
    parts = {
        f"{path}.weight": module.quantized
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    return parts | {f"{path}.{name}": weight for path, _, name, weight in quantized_stacks(model)}


def is_four_bit(model: nn.Module) -> bool:
    """Whether anything in the model is 4-bit."""
    return any(isinstance(module, (QuantizedLinear, QuantizedExperts)) for module in model.modules())


def patterns_kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], object]:
    """Whether a name is of those that transformers keeps in fp32 when the model is loaded in ``dtype``."""
    strict = model._keep_in_fp32_modules_strict if dtype in (torch.float16, torch.bfloat16) else ()
    loose = model._keep_in_fp32_modules if dtype is torch.float16 else ()
    patterns = [pattern.replace("*", ".*") for pattern in {*(strict or ()), *(loose or ())}]
    return re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)").search


def _is_read_raw(model: nn.Module, path: str) -> bool:
    """Whether the code of the parent takes the weight out of this layer, where packed bytes would break it.

    Mamba multiplies with ``self.dt_proj.weight``, some routers with ``self.classifier.weight``. A look at the dtype or
    the device does no harm, and slices are taken only where tensor parallelism is imitated, which is off by default.
    Being wrong here costs a layer its 4 bits, no more.
    """
    parent, _, name = path.rpartition(".")
    used = rf"(?<!isinstance\()self\.{re.escape(name)}\.weight\b(?!\[|\.(dtype|device|shape)\b)"
    return re.search(used, _source_of(type(model.get_submodule(parent)))) is not None  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _source_of(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time: nothing to look at
        return ""


def _stands_for(entry: str, path: str) -> bool:
    return f".{entry}." in f".{path}."


class MetaModel:
    """A causal LM on the meta device, and what has arrived in it.

    ``shapes`` holds the name of every parameter and persistent buffer with its meta tensor, as the model was built:
    the layers that become 4-bit are exchanged one at a time, when their weight arrives, because transformers' own
    conversions read the shapes of those that have not arrived.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        try:
            with torch.device("meta"), no_tie_weights():
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=False
                )
        except (ValueError, KeyError, ImportError) as error:
            where, kind = config.name_or_path, config.model_type
            if "Unrecognized configuration class" in str(error):
                raise UserError(
                    f"{where} holds a {kind} model: expected a causal language model, such as llama or qwen3."
                ) from error
            raise UserError(f"{where}: transformers cannot build this {kind} model: {first_sentence(error)}") from error
        self.shapes: dict[str, Tensor] = dict(self.model.state_dict())
        self.missing = set(self.shapes)
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)  # what is tied -> what it is tied to
        self.in_fp32 = patterns_kept_in_fp32(self.model, dtype)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor takes when it stays as it is."""
        expected = self.shapes[name].dtype
        return torch.float32 if expected.is_floating_point and self.in_fp32(name) else expected

    def put(self, name: str, tensor: Tensor, file: str) -> None:
        """Make ``tensor`` the parameter or buffer ``name``, in the model's dtype and on its device.

        Of two equal tensors that the model ties, the second is dropped: :meth:`finish` makes it again from the first.
        """
        expected = self.shapes[name]
        if tensor.shape != expected.shape:
            raise _other_shape(file, name, tensor.shape, expected.shape)
        parent, leaf = self._parent(name)
        tensor = tensor.to(self.device, self.dtype_of(name))
        if any(torch.equal(tensor, self.model.get_parameter(twin)) for twin in self._twins(name)):
            return
        if leaf in parent._parameters:
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(parent, leaf, tensor)
        self._arrived(name, tensor)

    def put_quantized(self, name: str, weight: QuantizedWeight, transposed: bool, file: str) -> None:
        """Exchange what holds the parameter ``name`` for its 4-bit form, as :func:`layers.put_four_bit` says."""
        expected = tuple(self.shapes[name].shape)
        if tuple(weight.shape) != (expected[::-1] if transposed else expected):
            raise _other_shape(file, name, weight.shape, expected)
        put_four_bit(self.model, name, weight, transposed)
        self.missing.discard(name)

    def finish(self, unexpected: Iterable[str], where: str) -> PreTrainedModel:
        """Tie what is tied, compute the buffers that no file holds, and refuse a model that lacks a weight.

        Warns about tensors in the files that the model has no place for.
        """
        model = self.model
        model.tie_weights(missing_keys=self.missing, recompute_mapping=False)
        ignored = "|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ())
        absent = sorted(name for name in self.missing if not (ignored and re.search(ignored, name)))
        extra = self._without_ignored(unexpected)
        if absent:
            also = f", and has {len(extra)} that the model does not know ({some_of(extra)})" if extra else ""
            raise UserError(
                f"{where} lacks {len(absent)} of the {len(self.shapes)} tensors of {type(model).__name__} "
                f"({some_of(absent)}){also}; config.json and the weights are of different models, or the copy is "
                "incomplete."
            )
        if extra:
            warnings.warn(
                f"{where}: left out {len(extra)} of the stored tensors, for which {type(model).__name__} has no place "
                f"({some_of(extra)}).",
                stacklevel=4,
            )
        for name in self.missing:  # left to transformers' initialization by its own list
            parent, leaf = self._parent(name)
            empty = torch.empty_like(self.shapes[name], device=self.device)
            setattr(parent, leaf, nn.Parameter(empty, requires_grad=False) if leaf in parent._parameters else empty)
        self._compute_buffers()
        model.requires_grad_(False)
        return model.eval()

    def prepare(self) -> PreTrainedModel:
        """The model in a state in which those of its layers that have arrived can run; others are still to come."""
        self.model.tie_weights(missing_keys=set(self.missing), recompute_mapping=False)
        initialized = {module for module in self.model.modules() if "_is_hf_initialized" in vars(module)}
        self._compute_buffers()
        for module in self.model.modules():
            if module not in initialized:  # finish() looks at it again
                vars(module).pop("_is_hf_initialized", None)
        return self.model.eval()

    def _compute_buffers(self) -> None:
        for name, buffer in list(self.model.named_buffers()):
            if buffer.is_meta:
                parent, leaf = self._parent(name)
                setattr(parent, leaf, torch.empty_like(buffer, device=self.device))
        self.model.initialize_weights()

    def _without_ignored(self, unexpected: Iterable[str]) -> list[str]:
        # Older checkpoints hold buffers that are computed today.
        patterns = [*(self.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"position_ids$"]
        ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
        return sorted(name for name in unexpected if not ignored.search(name))

    def _parent(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _twins(self, name: str) -> list[str]:
        """The tensors tied to ``name`` that are here already."""
        origin = self.tied.get(name, name)
        group = [origin, *(other for other, to in self.tied.items() if to == origin)]
        return [other for other in group if other != name and other not in self.missing]

    def _arrived(self, name: str, tensor: Tensor) -> None:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # keeps initialize_weights() off it
        self.missing.discard(name)


def first_sentence(error: BaseException) -> str:
    """The first sentence of another library's message, ending in one full stop."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return re.split(r"\.\s|\n", text or type(error).__name__)[0].rstrip(".") + "."


def _other_shape(file: str, name: str, got: Iterable[int], expected: Iterable[int]) -> UserError:
    return UserError(
        f"{file}: tensor {name} is {list(got)}, but {list(expected)} by config.json; the two are of different models."
    )


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRIM_EVERY_BYTES = 1 << 27

Result = TypeVar("Result")


class Loader:
    """Puts tensors into a tree, one after another.

    Args:
        tree: the model. weights: what becomes 4-bit, and whether the model stores it transposed.
        options: of :func:`qlora_native.quantize`. signed: let a scale be negative where that is nearer.
        dtype: that the 4-bit weights stand for.
    """

    def __init__(
        self, tree: MetaModel, weights: dict[str, bool], options: dict[str, Any], signed: bool, dtype: torch.dtype
    ) -> None:
        self.tree, self.weights, self.options, self.signed, self.dtype = tree, weights, options, signed, dtype
        self._passed = 0

    def is_copied(self, name: str, stored: torch.dtype) -> bool:
        """Whether :meth:`take_all` does not keep the tensor itself."""
        return name in self.weights or stored != self.tree.dtype_of(name) or self.tree.device.type != "cpu"

    def take_all(self, tensors: NamedTensors) -> None:
        """Put everything that arrives in its place."""
        tree = self.tree
        for name, value, file in tensors:
            if isinstance(value, Iterator):
                shape = tree.shapes[name].shape
                parts = self._quantized_slices(name, value, shape, file)
                self.put_four_bit(name, self.joined(name, parts, shape, file), file)
                self.trim(2 * shape.numel())
            elif isinstance(value, QuantizedWeight):
                module = tree.model.get_submodule(name.rpartition(".")[0])
                transposed = is_plain_linear(module) and not isinstance(module, nn.Linear)
                tree.put_quantized(name, value.to(tree.device), transposed, file)
            elif name in self.weights:
                self.put_four_bit(name, self.nearest(name, value.to(tree.device), file), file)
            else:
                self.put_dense(name, value, file)
            self.trim(value.nbytes if isinstance(value, Tensor) else 0)

    def put_dense(self, name: str, value: Tensor, file: str) -> None:
        """As it is, in the model's dtype. UserError for a NaN or an infinity."""
        _check_finite(name, value, file)
        self.tree.put(name, value, file)

    def put_four_bit(self, name: str, weight: QuantizedWeight, file: str) -> None:
        """In the model's dtype, whatever that of the file: everything dense is cast likewise."""
        weight.dtype = self.dtype
        _pages.interleave(weight.packed)
        self.tree.put_quantized(name, weight, self.weights[name], file)

    def nearest(self, name: str, tensor: Tensor, file: str, **changes: Any) -> QuantizedWeight:
        """The tensor of the parameter ``name``, or one slice of it, each element rounded to the nearest level;
        ``changes`` are to the options."""
        if self.signed:
            return self.quantized(name, tensor, file, _signed, **changes)
        return self.quantized(name, tensor, file, quantize, **changes)

    def quantized(
        self, name: str, tensor: Tensor, file: str, function: Callable[..., Result], **changes: Any
    ) -> Result:
        """The tensor [out, in] by ``function`` with the options; what is wrong with it is told as of ``name``."""
        if tensor.dtype not in DTYPES:
            raise UserError(f"{file}: weight {name} is {tensor.dtype}: expected float32, bfloat16 or float16.")
        turned = tensor.t().contiguous() if self.weights[name] else tensor
        try:
            return function(turned, **{**self.options, **changes})
        except ValueError as error:
            reason = re.sub(r"^quantize\w*: ", "", first_sentence(error))
            raise UserError(f"{file}: weight {name} cannot be quantized: {reason}") from error

    def _quantized_slices(
        self, name: str, slices: Iterator[Tensor], shape: torch.Size, file: str
    ) -> Iterator[QuantizedWeight]:
        for one in slices:
            if one.shape != (1, *shape[1:]):
                raise UserError(
                    f"{file}: a part of {name} is {list(one.shape[1:])}, but {list(shape[1:])} by config.json."
                )
            yield self.nearest(name, one.to(self.tree.device), file, double_quant=False)

    def joined(self, name: str, parts: Iterator[QuantizedWeight], shape: torch.Size, file: str) -> QuantizedWeight:
        """A stack [E, N, K] of its slices, whose scales are in fp32: the bytes of the stack quantized whole, without
        the stack in 16 bits."""
        block, done, device = self.options["block_size"], 0, self.tree.device
        packed = torch.empty(shape.numel() // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(shape.numel() // block, device=device)
        for part in parts:
            packed[done // 2 :][: part.packed.numel()] = part.packed
            scales[done // block :][: part.absmax.numel()] = part.absmax
            done += part.numel()
            del part  # before the next is made
        if done != shape.numel():
            raise UserError(f"{file}: {name} has {done // shape[1:].numel()} parts, but {shape[0]} by config.json.")
        about = {key: self.options[key] for key in ("quant_type", "block_size")}
        weight = QuantizedWeight(packed, scales, shape=shape, dtype=self.dtype, **about)
        if self.options["double_quant"]:
            codes = torch.empty(scales.numel(), dtype=torch.uint8)
            nested, offset = torch.empty(-(-scales.numel() // NESTED_BLOCK)), torch.empty(())
            double_quantize(scales.cpu(), codes, nested, offset)
            weight.absmax, weight.nested_absmax, weight.nested_offset = (t.to(device) for t in (codes, nested, offset))
        return weight

    def trim(self, num_bytes: int) -> None:
        """Count bytes that were passed on, and give memory back now and then."""
        self._passed += num_bytes
        if self._passed > TRIM_EVERY_BYTES:
            self._passed = 0
            trim_heap()


def _signed(tensor: Tensor, **options: Any) -> QuantizedWeight:
    return quantize_calibrated(tensor, "rtn_signed", **options).weight


def _check_finite(name: str, tensor: Tensor, file: str) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.dtype not in (*DTYPES, torch.float64):
        raise UserError(f"{file}: tensor {name} is {tensor.dtype}: expected float32, bfloat16 or float16.")
    low, high = torch.aminmax(tensor)  # one pass without a mask as large as the tensor; both pass a NaN on
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(
            f"{file}: tensor {name} holds a NaN or an infinity: expected finite numbers; copy or train the model again."
        )
