"""The model as modules without memory, filled tensor by tensor, and finished as transformers would have finished it.

Everything that leans on how transformers builds a model stands in this file and in ``plan.py``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_tie_weights

from ..errors import UserError
from ..weight import QuantizedWeight
from .files import some_of
from .layers import patterns_kept_in_fp32, put_four_bit


class Tree:
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
