"""What a model is loaded from: a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GgufConfig, PreTrainedConfig

from qlora_native.errors import UserError
from qlora_native.hf.build import MetaModel
from qlora_native.hf.checkpoint import Checkpoint, Scratch, StoredTensor, first_sentence
from qlora_native.hf.config import METHOD
from qlora_native.hf.plan import FLOATS, STATE_MARK, Plain, Plan, make_plan, unscaled


class SafetensorsSource:
    """A folder with ``config.json`` and safetensors, 16-bit or 32-bit, or 4-bit in bitsandbytes' format."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.checkpoint = Checkpoint(folder)
        self.config = read_config(folder)
        self.four_bit_config = four_bit_config(self.config, folder)
        self.is_four_bit = any(STATE_MARK in key for key in self.checkpoint.tensors)
        self._plan: Plan | None = None

    def plan(self, meta: MetaModel) -> Plan:
        """Made once for this source's config."""
        if self._plan is None:
            self._plan = make_plan(self.checkpoint, meta)
        meta.model._weight_conversions = self._plan.conversions  # save_pretrained reverses these
        return self._plan

    def read(self, stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        """The tensor, 16-bit if it is stored as 8-bit floats."""
        tensor = self.checkpoint.read(stored, scratch)
        if stored.scales is None:
            return tensor.bfloat16() if tensor.dtype in FLOATS else tensor
        try:
            return unscaled(tensor, self.checkpoint.read(stored.scales), torch.bfloat16)
        except ValueError as error:
            raise UserError(f"{stored.file}: {stored.name} cannot be used: {first_sentence(error)}") from error

    @property
    def files(self) -> list[Path]:
        """The files that make the model."""
        return [self.path / "config.json", *sorted({stored.file for stored in self.checkpoint.tensors.values()})]

    def generation_config(self) -> GenerationConfig | None:
        """The folder's own generation defaults, if it has any."""
        path = self.path / "generation_config.json"
        try:
            return GenerationConfig.from_pretrained(self.path) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be used: {first_sentence(error)}") from error


class _InMemory:
    """The tensors of a model that is in memory already, read as those of a :class:`Checkpoint` are."""

    def __init__(self, path: Path, values: dict[str, Tensor]) -> None:
        self.values = values
        self.tensors = {
            name: StoredTensor(name, path, value.dtype, tuple(value.shape), 0, value.nbytes)
            for name, value in values.items()
        }

    def read(self, stored: StoredTensor) -> Tensor:
        return self.values[stored.name]

    def read_part(self, stored: StoredTensor, begin: int, end: int) -> Tensor:
        return self.values[stored.name].view(-1)[begin:end]


class GgufSource:
    """One GGUF file, through transformers' own reader, which makes the whole 16-bit model first."""

    four_bit_config: dict[str, object] | None = None
    is_four_bit = False  # the blocks of GGUF are of another kind, and are dequantized on reading

    def __init__(self, path: Path) -> None:
        self.path, self.files, self._dtype = path, [path], torch.bfloat16
        self._checkpoint: _InMemory | None = None
        try:
            self.config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # the reader raises whatever it stumbles on, struct.error and IndexError among it
            raise self._unusable(error) from error
        self.config.name_or_path = str(path)

    @property
    def checkpoint(self) -> _InMemory:
        """The 16-bit model, made when first asked for; of tensors that are tied, the first."""
        if self._checkpoint is None:
            try:
                with _without_bar():
                    model = AutoModelForCausalLM.from_pretrained(
                        self.path.parent,
                        config=deepcopy(self.config),  # read from the file once more otherwise, which takes seconds
                        gguf_file=self.path.name,
                        quantization_config=GgufConfig(dequantize=True),
                        dtype=self._dtype,
                    )
            except Exception as error:
                raise self._unusable(error) from error
            once: dict[int, tuple[str, Tensor]] = {}
            for name, tensor in model.state_dict().items():
                once.setdefault(tensor.data_ptr(), (name, tensor.detach()))
            self._checkpoint = _InMemory(self.path, dict(once.values()))
        return self._checkpoint

    def plan(self, meta: MetaModel) -> Plan:
        """Each tensor as it is, in the model's dtype: transformers has matched the names."""
        if meta.dtype != self._dtype:
            self._dtype, self._checkpoint = meta.dtype, None
        return Plan([Plain(name, [stored]) for name, stored in self.checkpoint.tensors.items()], [], [])

    def read(self, stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        """The tensor, which is no longer kept here; asked for again, the whole model is made again."""
        if stored.name not in self.checkpoint.values:
            self._checkpoint = None
        return self.checkpoint.values.pop(stored.name)

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"{self.path} cannot be read as GGUF: {first_sentence(error)}")


Source = SafetensorsSource | GgufSource


def open_source(path: str | os.PathLike[str] | Source) -> Source:
    """What ``path`` holds, if it is not open already. :class:`UserError` names what is missing."""
    if isinstance(path, Source):
        return path
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"{path} is a file: expected a model folder or a .gguf file; give the folder that holds it."
            )
        return GgufSource(path)
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
        return GgufSource(found[0])
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter and no model: load its base model, then load_adapter(model, {str(path)!r})."
        )
    raise UserError(f"{path} has no config.json: expected a model folder as save_pretrained or `hf download` makes it.")


def read_config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: expected a JSON object; copy the file again.") from error
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


@contextmanager
def _without_bar() -> Iterator[None]:
    """No progress bar of transformers' reader where TQDM_DISABLE forbids it, which tqdm itself reads only on import."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is None or not os.environ.get("TQDM_DISABLE"):
        yield
        return
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


def load_tokenizer(model: str | os.PathLike[str] | Source) -> Any:
    """The tokenizer in the model's folder or GGUF file; UserError if there is no model or no tokenizer."""
    from transformers import AutoTokenizer

    path = model.path if isinstance(model, Source) else Path(model).expanduser()
    # A GGUF file is opened only for its error: transformers' reader takes seconds each time.
    if not isinstance(model, Source) and not (path.suffix == ".gguf" and path.is_file()):
        path = open_source(path).path
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the readers raise whatever they stumble on
        open_source(path)  # UserError if the model itself is broken
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"no usable tokenizer in {path} ({reason[:200]}); copy tokenizer.json and tokenizer_config.json "
            "of the model into it"
        ) from error
