"""A causal LM on the meta device: the names and shapes of its tensors, and which of its weights may be 4-bit."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from copy import deepcopy
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_tie_weights
from transformers.pytorch_utils import Conv1D

from qlora_native.errors import UserError
from qlora_native.nn.experts import stacks_of
from qlora_native.nn.probe import Use, kind_of, probe, stacks
from qlora_native.weight import QuantizedWeight
from qlora_native.weights.files import first_sentence

OUTPUT_EMBEDDING = "lm_head"
EXPERTS = Use(True, False, "experts, which get no adapter and stay dense in some layouts")
MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dense_beside(trained: Sequence[str], tokens: object, is_kept: bool) -> list[str]:
    """The ``skip_modules`` of a base whose modules ``trained`` are trained whole, and ``tokens`` of its embeddings if
    there are some; its 4-bit weights are kept or new."""
    beside = ["embed_tokens", OUTPUT_EMBEDDING] if tokens else []
    return [*trained, *beside] if is_kept else [OUTPUT_EMBEDDING, *trained]


def four_bit_weights(
    model: PreTrainedModel,
    skip_modules: Iterable[str],
    block_size: int,
    in_fp32: Callable[[str], object],
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
            near = get_close_matches(
                entry, {*names, *(name.rpartition(".")[2] for name in names)}, n=3
            )
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise ValueError(f"skip_modules: {type(model).__name__} has no module {entry!r}{hint}")
    output = model.get_output_embeddings() if OUTPUT_EMBEDDING in skip else None
    modules = (
        (path, model.get_submodule(path)) for path, use in probe(model)[0].items() if use.four_bit
    )
    chosen = {
        f"{path}.weight": is_transposed(module) for path, module in modules if module is not output
    }
    chosen |= turned_stacks(model, block_size)
    return {
        name: transposed
        for name, transposed in chosen.items()
        if name not in tied
        and not in_fp32(name)
        and not any(_stands_for(entry, name.rpartition(".")[0]) for entry in skip)
    }


def kinds(model: PreTrainedModel, four_bit: Container[str]) -> dict[str, str]:
    """What becomes of the linear layers and stacks of experts of a model whose parameters ``four_bit`` are 4-bit, and
    why: by their paths, with ``*`` in place of numbers."""
    found = defaultdict[str, Counter[str]](Counter)
    layers, failed = probe(model)
    uses = {f"{path}.weight": use for path, use in layers.items()}
    uses |= dict.fromkeys(stacks(model), EXPERTS)
    output = model.get_output_embeddings()
    for name, use in uses.items():
        is_output = model.get_submodule(name.rpartition(".")[0]) is output
        is_adapted = use.adapted and not is_output
        why = use.why or ("" if name in four_bit or is_output else "tied, in fp32 or of skip_modules")
        text = (
            f"{'4-bit' if name in four_bit else 'dense'}, {'adapted' if is_adapted else 'not adapted'}"
        )
        text += f": {why}" if why else ""
        text += f" (by its source: {failed})" if failed else ""
        found[kind_of(name.removesuffix(".weight"))][text] += 1
    return {
        kind: "; ".join(f"{number} {text}" for text, number in counts.items())
        for kind, counts in found.items()
    }


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is a linear that stores its weight as [in, out] (GPT-2's Conv1D)."""
    return type(module) is Conv1D


def turned_stacks(model: nn.Module, block_size: int = 1) -> dict[str, bool]:
    """The stacks that can become 4-bit, by name, and whether the model stores them transposed, as [E, in, out]."""
    return {
        f"{path}.{name}": bool(model.get_submodule(path).is_transposed)
        for path, name, _ in stacks_of(model, block_size)
    }


def turned(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a matrix, or of a stack of them, transposed."""
    return (*shape[:-2], shape[-1], shape[-2])


def keepable_embeddings(meta: ModelShapes, skip_modules: Iterable[str]) -> set[str]:
    """The weights of plain embeddings that can stay quantized: all that is tied to them are plain linear layers, and
    none is of ``skip_modules``."""
    found, output = set(), meta.model.get_output_embeddings()
    for path, module in meta.model.named_modules():
        users = [
            path,
            *(name.rpartition(".")[0] for name, to in meta.tied.items() if to == f"{path}.weight"),
        ]
        heads = [meta.model.get_submodule(user) for user in users[1:]]
        skipped = any(_stands_for(entry, user) for entry in skip_modules for user in users)
        skipped = skipped or (OUTPUT_EMBEDDING in skip_modules and output in heads)
        if (
            type(module) is nn.Embedding
            and all(type(head) is nn.Linear for head in heads)
            and not skipped
        ):
            found.add(f"{path}.weight")
    return found


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], object]:
    """Whether a name is of those that transformers keeps in fp32 when the model is loaded in ``dtype``."""
    strict = model._keep_in_fp32_modules_strict if dtype in (torch.float16, torch.bfloat16) else ()
    loose = model._keep_in_fp32_modules if dtype is torch.float16 else ()
    patterns = [pattern.replace("*", ".*") for pattern in {*(strict or ()), *(loose or ())}]
    return re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)").search


def _stands_for(entry: str, path: str) -> bool:
    return f".{entry}." in f".{path}."


class ModelShapes:
    """A causal LM on the meta device, and the names, shapes and dtypes of what it is to hold."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        self.dtype = dtype
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
        # What is tied -> what it is tied to.
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        self.in_fp32 = kept_in_fp32(self.model, dtype)
        modules = self.model.named_modules()
        # As [in, out], or [E, in, out].
        self.transposed = {f"{path}.weight" for path, module in modules if is_transposed(module)}
        self.transposed |= {name for name, is_so in turned_stacks(self.model).items() if is_so}

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor takes when it stays dense."""
        expected = self.shapes[name].dtype
        return torch.float32 if expected.is_floating_point and self.in_fp32(name) else expected

    def four_bit_weights(self, skip_modules: Iterable[str], block_size: int) -> dict[str, bool]:
        """As the function of this name."""
        return four_bit_weights(self.model, skip_modules, block_size, self.in_fp32)

    def check_shape(self, name: str, value: Tensor | QuantizedWeight, file: str) -> None:
        """UserError unless the tensor has the shape of the model's parameter or buffer ``name``."""
        expected = self.shapes[name].shape
        transposed = isinstance(value, QuantizedWeight) and name in self.transposed
        if value.shape != (turned(expected) if transposed else expected):
            raise UserError(
                f"{file}: tensor {name} is {list(value.shape)}, but {list(expected)} by config.json; the two are of "
                "different models."
            )
