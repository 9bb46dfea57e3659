"""What a model is loaded from: a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
)

from qlora_native.errors import UserError
from qlora_native.hf.build import MetaModel, NamedTensors, first_sentence
from qlora_native.hf.checkpoint import Checkpoint, Scratch, StoredTensor
from qlora_native.hf.config import METHOD
from qlora_native.hf.plan import FLOATS, Converted, FourBit, Plain, Plan, Step, make_plan, unscaled
from qlora_native.weight import QuantizedWeight, from_bnb


def never(name: str) -> bool:
    """No."""
    return False


def always(name: str) -> bool:
    """Yes."""
    return True


class SafetensorsSource:
    """A folder with ``config.json`` and safetensors, 16-bit or 32-bit, or 4-bit in bitsandbytes' format."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.checkpoint = Checkpoint.open(folder)
        self.config = read_config(folder)
        self.four_bit_config: dict[str, object] | None = four_bit_config(self.config, folder)
        self._plan: Plan | None = None

    def plan(self, tree: MetaModel) -> Plan:
        """The plan for this tree; made once, before anything in the tree is exchanged."""
        if self._plan is None:
            self._plan = make_plan(self.checkpoint, tree)
            tree.model._weight_conversions = self._plan.conversions  # save_pretrained turns these round
        return self._plan

    def unexpected(self, tree: MetaModel) -> list[str]:
        """Stored names that the model has no place for."""
        return self.plan(tree).unexpected

    def is_four_bit(self, tree: MetaModel) -> bool:
        """Whether the weights are 4-bit in the files."""
        return self.plan(tree).is_four_bit

    def iter_tensors(
        self,
        tree: MetaModel,
        wanted: Callable[[str], bool],
        is_copied: Callable[[str, torch.dtype], bool],
        in_slices: Callable[[str], bool] = never,
        among: Callable[[str], bool] = always,
    ) -> NamedTensors:
        """Each wanted tensor of the model, one after another in the order of the files.

        ``is_copied(name, stored dtype)`` says that the loader will not keep the tensor itself; it then lies in shared
        scratch memory. ``in_slices(name)`` says that it takes a stack of experts slice by slice. ``among`` is a
        coarser ``wanted`` that also spares the conversions: it tells tensors of one module tree from those of another.
        """
        plan = self.plan(tree)
        steps = [step for step in plan.steps if among(step.name) and (isinstance(step, Converted) or wanted(step.name))]
        copied = [
            step.stored.num_bytes
            for step in steps
            if isinstance(step, Plain) and is_copied(step.name, step.stored.dtype)
        ]
        scratch = Scratch(max(copied, default=0))
        for step in steps:
            if isinstance(step, Plain):
                reuse = is_copied(step.name, step.stored.dtype)
                yield step.name, self.read(plan, step.stored, scratch if reuse else None), str(step.stored.file)
            elif isinstance(step, FourBit):
                yield step.name, self.four_bit(step), str(step.parts[0].file)
            elif step.is_stack and in_slices(step.name):
                yield step.name, step.slices(partial(self.read, plan)), str(step.parts[0][1].file)
            else:
                for name, tensor in step.run(tree.model, partial(self.read, plan)):
                    if wanted(name):
                        yield name, tensor, str(step.parts[0][1].file)

    def read(self, plan: Plan, stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        """The tensor, 16-bit if it is stored as 8-bit floats."""
        tensor = self.checkpoint.read(stored, scratch)
        scales = plan.scales.get(stored.name)
        if scales is None:
            return tensor.bfloat16() if tensor.dtype in FLOATS else tensor
        try:
            return unscaled(tensor, self.checkpoint.read(scales), torch.bfloat16)
        except ValueError as error:
            raise UserError(f"{stored.file}: {stored.name} cannot be used: {first_sentence(error)}") from error

    def identity(self) -> dict[str, object]:
        """What tells whether the folder is still the one it was: its files' names, sizes and times."""
        files = [self.path / "config.json", *sorted({stored.file for stored in self.checkpoint.tensors.values()})]
        return _identity(files)

    def generation_config(self) -> GenerationConfig | None:
        """The folder's own generation defaults, if it has any."""
        if not (self.path / "generation_config.json").is_file():
            return None
        try:
            return GenerationConfig.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path / 'generation_config.json'} cannot be used: {first_sentence(error)}"
            ) from error

    def four_bit(self, step: FourBit) -> QuantizedWeight:
        """The weight whose parts the step names."""
        tensors = {stored.name: self.checkpoint.read(stored) for stored in step.parts}
        try:
            return from_bnb(tensors, step.prefix)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{step.parts[0].file}: 4-bit weight {step.prefix} cannot be used: {first_sentence(error)}"
            ) from error


class InMemory:
    """The tensors of a model that is in memory already, read as those of a :class:`Checkpoint` are."""

    def __init__(self, path: Path, values: dict[str, Tensor]) -> None:
        self._values = values
        self.tensors = {
            name: StoredTensor(name, path, value.dtype, tuple(value.shape), 0, value.nbytes)
            for name, value in values.items()
        }

    def read(self, stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        """The tensor itself."""
        return self._values[stored.name]

    def read_part(self, stored: StoredTensor, begin: int, end: int) -> Tensor:
        """Elements ``begin`` to ``end`` of the flattened tensor."""
        return self._values[stored.name].view(-1)[begin:end]


class GgufSource:
    """One GGUF file, through transformers' own reader, which makes the whole 16-bit model first."""

    four_bit_config: dict[str, object] | None = None

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path, self._dtype = path, dtype
        self._dense: dict[str, Tensor] | None = None
        self._checkpoint: InMemory | None = None
        try:
            self.config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # the reader raises whatever it stumbles on, struct.error and IndexError among it
            raise self._unusable(error) from error
        self.config.name_or_path = str(path)

    def unexpected(self, tree: MetaModel) -> list[str]:
        """Nothing: transformers has matched the names."""
        return []

    @property
    def checkpoint(self) -> InMemory:
        """The 16-bit model, made when first asked for; of tensors that are tied, the first."""
        if self._checkpoint is None:
            once: dict[int, tuple[str, Tensor]] = {}
            for name, tensor in self._read().items():
                once.setdefault(tensor.data_ptr(), (name, tensor))
            self._checkpoint = InMemory(self.path, dict(once.values()))
        return self._checkpoint

    def plan(self, tree: MetaModel) -> Plan:
        """Each tensor as it is: transformers has matched the names."""
        steps: list[Step] = [Plain(name, stored) for name, stored in self.checkpoint.tensors.items()]
        return Plan(steps, [], [], {})

    def read(self, plan: Plan, stored: StoredTensor) -> Tensor:
        """The tensor."""
        return self.checkpoint.read(stored)

    def four_bit(self, step: FourBit) -> QuantizedWeight:
        """Never asked for: no step of the plan is 4-bit."""
        raise AssertionError(step)

    def is_four_bit(self, tree: MetaModel) -> bool:
        """Never: the blocks of GGUF are of another kind, and are dequantized on reading."""
        return False

    def iter_tensors(
        self,
        tree: MetaModel,
        wanted: Callable[[str], bool],
        is_copied: Callable[[str, torch.dtype], bool],
        in_slices: Callable[[str], bool] = never,
        among: Callable[[str], bool] = always,
    ) -> NamedTensors:
        """As for safetensors; here the peak is the 16-bit model, and each tensor of it is dropped once handed over:
        it arrives once."""
        if self._dense is None:
            self._dense = self._read()
        for name in [name for name in self._dense if among(name) and wanted(name)]:
            yield name, self._dense.pop(name), str(self.path)

    def _read(self) -> dict[str, Tensor]:
        try:
            with _without_bar():
                dense = AutoModelForCausalLM.from_pretrained(
                    self.path.parent,
                    config=deepcopy(self.config),  # read from the file once more otherwise, which takes seconds
                    gguf_file=self.path.name,
                    quantization_config=GgufConfig(dequantize=True),
                    dtype=self._dtype,
                )
        except Exception as error:
            raise self._unusable(error) from error
        return {name: tensor.detach() for name, tensor in dense.state_dict().items()}

    def identity(self) -> dict[str, object]:
        """What tells whether the file is still the one it was."""
        return _identity([self.path])

    def generation_config(self) -> GenerationConfig | None:
        """GGUF holds none."""
        return None

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"{self.path} cannot be read as GGUF: {first_sentence(error)}")


Source = SafetensorsSource | GgufSource


def _identity(files: list[Path]) -> dict[str, object]:
    return {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def open_source(path: Path, dtype: torch.dtype) -> Source:
    """Find out what ``path`` holds. Raises :class:`UserError` saying what is missing."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"{path} is a file: expected a model folder or a .gguf file; give the folder that holds it."
            )
        return GgufSource(path, dtype)
    if not path.is_dir():
        raise UserError(
            f"{path} is not there: expected a model folder or a .gguf file; a model of the Hugging Face hub is "
            "fetched with "
            f"`hf download NAME --local-dir FOLDER`."
        )
    if (path / "config.json").is_file():
        return SafetensorsSource(path)
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return GgufSource(found[0], dtype)
    if found:
        raise UserError(f"{path} holds {len(found)} GGUF files: name the one to load, such as {found[0]}.")
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
    """config.json's own description of 4-bit weights; None for 8-bit floats; refuses every other kind of quantized
    weights."""
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    values = dict(given if isinstance(given, dict) else given.to_dict())
    method = values.get("quant_method")
    if method == METHOD or (method == "bitsandbytes" and (values.get("load_in_4bit") or values.get("_load_in_4bit"))):
        return values
    if method == "fp8":
        return None
    kind = "8-bit bitsandbytes" if values.get("load_in_8bit") else values.get("quant_method", "unknown")
    raise UserError(
        f"{folder} holds {kind} weights: expected 16-bit or 32-bit weights, 8-bit floats, or 4-bit in bitsandbytes' "
        "format; load the original model."
    )


@contextmanager
def _without_bar() -> Iterator[None]:
    """No progress bar of transformers' reader where TQDM_DISABLE forbids it: tqdm itself looks at that while it is
    imported, which torch does before anybody can set it."""
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


def load_tokenizer(model: str | Source) -> Any:
    """The tokenizer beside the model: in its folder, or in its GGUF file. UserError if there is no model or no
    tokenizer."""
    from transformers import AutoTokenizer

    path = Path(model).expanduser() if isinstance(model, str) else model.path
    # A GGUF file is opened only to say what is wrong with it: transformers' reader takes seconds each time.
    if isinstance(model, str) and not (path.suffix == ".gguf" and path.is_file()):
        path = open_source(path, torch.bfloat16).path
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the readers raise whatever they stumble on
        open_source(path, torch.bfloat16)  # its UserError says so if the model itself is broken
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"no usable tokenizer in {path} ({reason[:200]}); copy tokenizer.json and tokenizer_config.json "
            "of the model into it"
        ) from error
