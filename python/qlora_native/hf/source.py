"""What a model is loaded from: a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from qlora_native._io import announced, check_folder, panics_caught, read_json, reading, regular, user_path
from qlora_native.data.readers import fetch_model, hub_id
from qlora_native.data.template import TEMPLATE
from qlora_native.errors import UserError
from qlora_native.hf.build import MetaModel
from qlora_native.hf.checkpoint import Checkpoint, FileMap, Scratch, StoredTensor, first_sentence
from qlora_native.hf.config import METHOD
from qlora_native.hf.plan import FLOATS, STATE_MARK, Plan, make_plan, unscaled

# For a quant_type: the bytes of a GGUF file as they are; and "keep" for such a file, "nf4" for all else.
KEEP, AUTO = "keep", "auto"


class Source:
    """What a model is loaded from."""

    path: Path
    files: list[Path]  # that make the model
    config: PreTrainedConfig
    checkpoint: Any  # what reads tensors and parts of them, with the methods of a Checkpoint
    four_bit_config: dict[str, object] | None = None  # the files' own description of weights that are 4-bit already
    is_four_bit = False
    is_whole = False  # the whole 16-bit model is made on reading
    file_map: FileMap | None = None  # of the load in progress, if tensors are to be mapped

    def plan(self, meta: MetaModel) -> Plan:
        """Which stored tensors become which of the model."""
        raise NotImplementedError

    def read(self, stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        """The tensor, in 16 or 32 bits."""
        raise NotImplementedError

    def kept_plan(self, meta: MetaModel, skip_modules: Iterable[str], is_mapped: bool) -> Plan:
        """The plan in which weights keep their bytes, but for those of ``skip_modules``; see :meth:`keeps`. Unless
        ``is_mapped`` they are copied into memory."""
        raise NotImplementedError

    def keeps(self, quant_type: str) -> bool:
        """Whether ``quant_type``, of :func:`qlora_native.load_model`, keeps the bytes of a GGUF file."""
        if quant_type == KEEP and not self.is_four_bit:
            raise UserError(f"{self.path} holds 16-bit weights: quant_type {KEEP!r} keeps those of a GGUF file.")
        return False


class SafetensorsSource(Source):
    """A folder with ``config.json`` and safetensors, 16-bit or 32-bit, or 4-bit in bitsandbytes' format."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        check_folder(folder)
        self.checkpoint = Checkpoint(folder)
        self.config = read_config(folder)
        self.four_bit_config = four_bit_config(self.config, folder)
        self.is_four_bit = any(STATE_MARK in key for key in self.checkpoint.tensors)
        weights = {stored.file for stored in self.checkpoint.tensors.values()}
        self.files = [folder / "config.json", *sorted(weights)]
        self._plan: Plan | None = None

    def plan(self, meta: MetaModel) -> Plan:
        """Made once for this source's config."""
        if self._plan is None:
            plan = make_plan(self.checkpoint, meta)
            meta.check(plan, self.checkpoint.read, str(self.path))
            self._plan = plan
        meta.model._weight_conversions = self._plan.conversions  # save_pretrained reverses these
        return self._plan

    def read(self, stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        """The tensor, 16-bit if it is stored as 8-bit floats."""
        mapped = None if self.file_map is None else self.file_map.tensor(stored, scratch)
        if mapped is not None:
            return mapped
        tensor = self.checkpoint.read(stored, scratch)
        if stored.scales is None:
            return tensor.bfloat16() if tensor.dtype in FLOATS else tensor
        try:
            return unscaled(tensor, self.checkpoint.read(stored.scales), torch.bfloat16)
        except ValueError as error:
            raise UserError(f"{stored.file}: {stored.name} cannot be used: {first_sentence(error)}") from error

    def generation_config(self) -> GenerationConfig | None:
        """The folder's own generation defaults, if it has any."""
        path = self.path / "generation_config.json"
        if not path.is_file():
            return None
        read_json(path)
        with reading(path):
            return GenerationConfig.from_pretrained(self.path)


def _gguf_source(path: Path) -> Source:
    try:
        from qlora_native.hf.gguf_source import GgufSource
    except ImportError as error:
        raise UserError(f"{path} needs the package gguf: `pip install gguf` brings it.") from error
    return GgufSource(regular(path))


def open_source(path: str | os.PathLike[str] | Source) -> Source:
    """What ``path`` holds, if it is not open already. :class:`UserError` names what is missing."""
    if isinstance(path, Source):
        return path
    path = user_path(path)
    if not path.exists() and hub_id(path):
        path = fetch_model(str(path))
    if path.exists() and not path.is_dir():
        if path.suffix != ".gguf":
            raise UserError(
                f"{path} is a file: expected a model folder or a .gguf file; give the folder that holds it."
            )
        return _gguf_source(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is not there: expected a model folder or a .gguf file; a model of the Hugging Face hub is "
            "fetched with `hf download NAME --local-dir FOLDER`."
        )
    if (path / "config.json").is_file():
        return SafetensorsSource(path)
    if found := sorted(path.glob("*.gguf")):
        if len(found) > 1:
            raise UserError(f"{path} holds {len(found)} GGUF files: name the one to load, such as {found[0]}.")
        return _gguf_source(found[0])
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter and no model: load its base model, then load_adapter(model, {str(path)!r})."
        )
    raise UserError(f"{path} has no config.json: expected a model folder as save_pretrained or `hf download` makes it.")


def notes_of(source: Source, quant_type: str = AUTO) -> list[str]:
    """What a user should read before training, a sentence each: whether the weights of a GGUF file stay as they are
    with ``quant_type``, and what llama.cpp cannot run."""
    try:
        from qlora_native.hf.gguf import ARCHITECTURES
    except ImportError:  # of the package gguf, without which nothing is exported for llama.cpp
        return []
    name, kind = source.path.name, source.config.model_type
    notes = []
    if source.path.suffix == ".gguf" and quant_type != KEEP and not source.keeps(quant_type):
        why = f"those of {kind} are not kept"
        why = "without quant.type and quant.method they stay" if source.keeps(AUTO) else why
        notes.append(f"{name}: its weights are converted to 4 bits anew and do not stay as they are; {why}")
    if kind not in ARCHITECTURES:
        notes.append(
            f"{name}: llama.cpp's formats are not written for {kind}; what is trained can be merged into safetensors"
        )
    return notes


# What transformers makes a list or a module each of, and the most of them; a kernel of the hub, which would be code.
_COUNT = re.compile(r"(n|num)_(.*_)?(layers?|experts?|blocks?)|block_count")
MOST_LAYERS = 2048
_DROPOUT = re.compile("dropout|pdrop|layerdrop")
_WIDTH = re.compile("hidden_size|n_embd|d_model")
_HUB_KERNEL = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def check_config(path: Path, values: dict[str, Any]) -> None:
    """UserError for numbers of layers that no model has, which would take all memory, for a width of none, for shares
    to drop that are none, and for code of the hub."""
    for key, value in values.items():
        if isinstance(value, dict):
            check_config(path, value)
        elif isinstance(value, int) and _COUNT.fullmatch(key) and not 0 <= value <= MOST_LAYERS:
            raise UserError(f"{path}: {key} is {value:,}: expected 0 to {MOST_LAYERS:,}.")
        elif isinstance(value, int) and _WIDTH.fullmatch(key) and value < 1:
            raise UserError(f"{path}: {key} is {value:,}: expected 1 or more.")
        elif type(value) in (int, float) and _DROPOUT.search(key) and not 0 <= value < 1:
            raise UserError(f"{path}: {key} is {value}: expected 0 or more and less than 1.")
        elif isinstance(value, str) and _HUB_KERNEL.fullmatch(key) and "/" in value:
            raise UserError(f"{path}: {key} is {value!r}, code of a hub, which is not run: expected 'sdpa' or 'eager'.")


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a folder; UserError if it is none that transformers can use."""
    path = folder / "config.json"
    values = read_json(path)
    with reading(path):
        check_config(path, values)
        window = values.get("sliding_window")
        if window is not None and (type(window) is not int or not 0 < window < 1 << 31):
            raise ValueError(f"sliding_window is {window!r}: expected a whole number over 0, or null")
    kind = values.get("model_type")
    if not kind:
        raise UserError(f"{path} has no model_type: expected the configuration of a transformers model.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its validators raise types of their own, with the reason as the cause
        reason = first_sentence(error.__cause__ or error)
        raise UserError(f"{path} (model type {kind}) cannot be used: {reason}") from error
    config.name_or_path = str(folder)
    return config


def four_bit_config(config: PreTrainedConfig, folder: Path) -> dict[str, object] | None:
    """config.json's own description of 4-bit weights; UserError for other quantized weights but 8-bit floats."""
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    values = dict(given if isinstance(given, dict) else given.to_dict())
    method = values.get("quant_method")
    if method == METHOD or (method == "bitsandbytes" and (values.get("load_in_4bit") or values.get("_load_in_4bit"))):
        return values
    if method == "fp8":
        return None
    kind = "8-bit bitsandbytes" if values.get("load_in_8bit") else method or "unknown"
    raise UserError(
        f"{folder} holds {kind} weights: expected 16-bit or 32-bit weights, 8-bit floats, or 4-bit in bitsandbytes' "
        "format; load the original model."
    )


def load_tokenizer(model: str | os.PathLike[str] | Source, adapter: Path | None = None) -> Any:
    """The tokenizer in a model's folder or GGUF file, as transformers' ``AutoTokenizer`` makes it.

    Args:
        model: a model folder, a ``.gguf`` file, or an id of the Hugging Face hub.
        adapter: the folder of an adapter, whose tokenizer, or chat template, is taken if it has one.

    Raises:
        UserError: there is no model, or no usable tokenizer.
    """
    from transformers import AutoTokenizer

    path = model.path if isinstance(model, Source) else user_path(model)
    # A GGUF file is opened only for its error: transformers' reader takes seconds each time.
    if not isinstance(model, Source) and not (path.suffix == ".gguf" and path.is_file()):
        path = open_source(path).path
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        path = adapter
    try:
        if path.suffix == ".gguf":
            from qlora_native.hf.gguf_source import without_arrays

            what = f"Loading the tokenizer of {path.name}, which takes longer the more tokens it has"
            with announced(what), without_arrays():
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        else:
            check_folder(path)
            with panics_caught():
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
                tokenizer("a")  # raises here what settings of a wrong type would raise later
        if adapter is not None and (adapter / TEMPLATE).is_file():
            tokenizer.chat_template = (adapter / TEMPLATE).read_text(encoding="utf-8")
        return tokenizer
    except Exception as error:  # the readers raise whatever they stumble on
        open_source(path)  # UserError if the model itself is broken
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"no usable tokenizer in {path} ({reason[:200]}); copy tokenizer.json and tokenizer_config.json "
            "of the model into it"
        ) from error
