"""The model as modules without memory, filled tensor by tensor, and finished as transformers would have finished it.

Everything that leans on how transformers builds a model stands in this file and in ``plan.py``.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_tie_weights
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..nn import QuantizedLinear
from ..weight import QuantizedWeight
from .files import some_of

OUTPUT_EMBEDDING = "lm_head"


class Tree:
    """A causal LM on the meta device, and what has arrived in it.

    ``shapes`` holds the name of every parameter and persistent buffer with its meta tensor, as the model was built:
    the linears that become 4-bit are exchanged one at a time, when their weight arrives, because transformers' own
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
        self._in_fp32 = _patterns_kept_in_fp32(self.model, dtype)

    def linears(self, skip_modules: Iterable[str] = ()) -> dict[str, nn.Module]:
        """The modules that may become 4-bit, by path: every plain linear but the tied ones and those that
        ``skip_modules`` names.

        A name there stands for the module of that path or path ending, and all under it; ``"lm_head"`` also for the
        output embedding of models that call it otherwise. Raises ValueError for a name that stands for nothing.
        """
        tied = {*self.tied, *self.tied.values()}
        skip = list(skip_modules)
        names = [name for name, _ in self.model.named_modules() if name]
        for entry in skip:
            if entry != OUTPUT_EMBEDDING and not any(_stands_for(entry, name) for name in names):
                near = get_close_matches(entry, {*names, *(name.rpartition(".")[2] for name in names)}, n=3)
                hint = f"; did you mean {' or '.join(near)}?" if near else "."
                raise ValueError(f"skip_modules: {type(self.model).__name__} has no module {entry!r}{hint}")
        output = self.model.get_output_embeddings() if OUTPUT_EMBEDDING in skip else None
        return {
            name: module
            for name, module in self.model.named_modules()
            if _is_plain_linear(module)
            and module is not output
            and f"{name}.weight" not in tied
            and not any(_stands_for(entry, name) for entry in skip)
            and not self._in_fp32(f"{name}.weight")
            and not _is_read_raw(*self._parent(name))
        }

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor takes when it stays as it is."""
        expected = self.shapes[name].dtype
        return torch.float32 if expected.is_floating_point and self._in_fp32(name) else expected

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
        """Exchange the linear whose weight is ``name`` by a QuantizedLinear around ``weight``, which is [out, in].

        ``transposed`` says that the model stores this weight as [in, out] (GPT-2's Conv1D).
        """
        expected = tuple(self.shapes[name].shape)
        if tuple(weight.shape) != (expected[::-1] if transposed else expected):
            raise _other_shape(file, name, weight.shape, expected)
        path = name.removesuffix(".weight")
        old = self.model.get_submodule(path)
        layer = QuantizedLinear.from_quantized(weight)
        if old.bias is not None:
            layer.bias = old.bias
        layer.fan_in_fan_out = transposed  # type: ignore[assignment]  # merging gives the layer back as it was
        layer._is_hf_initialized = True  # type: ignore[assignment]
        self.model.set_submodule(path, layer)
        self._arrived(name, layer.weight)

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
        for name in self.missing:  # left to transformers' initialisation by its own list
            parent, leaf = self._parent(name)
            empty = torch.empty_like(self.shapes[name], device=self.device)
            setattr(parent, leaf, nn.Parameter(empty, requires_grad=False) if leaf in parent._parameters else empty)
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:
                parent, leaf = self._parent(name)
                setattr(parent, leaf, torch.empty_like(buffer, device=self.device))
        model.initialize_weights()
        model.requires_grad_(False)
        return model.eval()

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


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether the module's forward is x W^T + b; a subclass of nn.Linear may compute something else (routers do)."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def _is_read_raw(parent: nn.Module, name: str) -> bool:
    """Whether the code of ``parent`` takes the weight out of its layer ``name``, where packed bytes would break it.

    Mamba multiplies with ``self.dt_proj.weight``, some routers with ``self.classifier.weight``. A look at the dtype or
    the device does no harm, and slices are taken only where tensor parallelism is imitated, which is off by default.
    Being wrong here costs a layer its 4 bits, no more.
    """
    used = rf"(?<!isinstance\()self\.{re.escape(name)}\.weight\b(?!\[|\.(dtype|device|shape)\b)"
    return re.search(used, _source_of(type(parent))) is not None  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _source_of(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time: nothing to look at
        return ""


def _patterns_kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    strict = model._keep_in_fp32_modules_strict if dtype in (torch.float16, torch.bfloat16) else ()
    loose = model._keep_in_fp32_modules if dtype is torch.float16 else ()
    patterns = [pattern.replace("*", ".*") for pattern in {*(strict or ()), *(loose or ())}]
    if not patterns:
        return lambda name: False
    return re.compile("|".join(f"({pattern})" for pattern in patterns)).search


def _stands_for(entry: str, path: str) -> bool:
    return f".{entry}." in f".{path}."


def _other_shape(file: str, name: str, got: Iterable[int], expected: Iterable[int]) -> UserError:
    return UserError(
        f"{file}: tensor {name} is {list(got)}, but {list(expected)} by config.json; the two are of different models."
    )
