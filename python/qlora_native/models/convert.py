"""A model folder into another number of bits, or another library's form of 4 bits, a few megabytes at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from qlora_native._io import is_own_file, read_json
from qlora_native._threads import sleep_while_busy
from qlora_native.data.template import TEMPLATE
from qlora_native.errors import UserError
from qlora_native.models.build import MetaModel, join
from qlora_native.reference import NESTED_BLOCK
from qlora_native.weight import QuantizedWeight, bnb_state_key, quantize, to_bnb, unpack_json
from qlora_native.weights.config import METADATA, METHOD, bitsandbytes_config, native_config
from qlora_native.weights.files import INDEX_NAME, WEIGHTS_NAME, Output, ShardWriter, StoredTensor, first_sentence
from qlora_native.weights.float8 import FLOATS
from qlora_native.weights.match import STATE_MARK, Converted, FourBit, Plain, Plan, Step
from qlora_native.weights.open import open_source
from qlora_native.weights.shapes import DTYPES, OUTPUT_EMBEDDING, is_transposed
from qlora_native.weights.source import SafetensorsSource, Source

PART = 1 << 22  # elements at a time: a multiple of every block size
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt", ".gguf", ".h5")

Parts = Iterator[Tensor]  # the elements of a flattened tensor, in order


class Job(NamedTuple):
    """Tensors that are written together, and how."""

    outputs: list[Output]
    write: Callable[[ShardWriter], None]


@dataclass
class ConvertReport:
    """Numbers of files, of bytes in their tensors, and of weights that became 4-bit, became dense, or stayed 4-bit."""

    files: int = 0
    num_bytes: int = 0
    quantized: int = 0
    dequantized: int = 0
    copied: int = 0


def convert(
    source: Path,
    folder: Path,
    target: str,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype | None = None,
    skip_modules: tuple[str, ...] = (OUTPUT_EMBEDDING,),
    shard_bytes: int = 4 * 10**9,
) -> ConvertReport:
    """Write the model of ``source`` into ``folder``, which is there and empty.

    Tensors keep their stored names, and 4-bit weights their bytes when the target is 4-bit. Files that hold no weights
    are copied. Memory beyond the libraries: a few parts of 2^22 elements, the scales of the tensor at hand, and whole
    tensors only where one has to be transposed (GPT-2), decoded from 4 bits (its packed bytes) or made of several by
    transformers (one expert of a stack).

    Args:
        target: "16bit"; "bitsandbytes"; or "qlora", where stacks of experts are 4-bit too.
        quant_type, block_size, double_quant, skip_modules: for weights that are not 4-bit yet.
        dtype: of what is not 4-bit, and of decoded weights; None is config.json's if that is 16-bit, else bfloat16.
        shard_bytes: the largest file, unless one tensor alone is larger.
    """
    opened = open_source(source)
    if not isinstance(opened, SafetensorsSource):
        reader = f"`qlora export {source} --to safetensors`" if target == "16bit" else f"`qlora quantize {source}`"
        raise UserError(f"{source} is GGUF: expected a folder of safetensors; {reader} reads it.")
    dtype = dtype or (opened.config.dtype if opened.config.dtype in DTYPES[:2] else torch.bfloat16)
    options: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    quantize(torch.zeros(1), **options)  # refuses wrong options before anything is written
    work = Conversion(opened, target, dtype, options, skip_modules)
    work.write(folder, shard_bytes)
    return work.report


class Conversion:
    """One run: what is read, what it becomes, and the jobs that lead there."""

    def __init__(
        self, source: Source, target: str, dtype: torch.dtype, options: dict[str, Any], skip_modules: tuple[str, ...]
    ) -> None:
        sleep_while_busy()
        self.source, self.target, self.dtype, self.options = source, target, dtype, options
        self.adapter_folder: Path | None = None  # of what is merged, with its chat template
        self.meta = MetaModel(source.config, dtype, torch.device("cpu"))
        self.report = ConvertReport()
        modules = self.meta.model.named_modules()
        self.transposed = {f"{path}.weight" for path, module in modules if is_transposed(module)}
        self.plan: Plan = source.plan(self.meta)
        self.four_bit = {step.name for step in self.plan.steps if isinstance(step, FourBit)}
        stacks = sorted(name for name in self.four_bit if not name.endswith(".weight"))
        if target == "bitsandbytes" and stacks:
            raise UserError(
                f"{source.path} holds stacks of experts in 4 bits ({stacks[0]}), which bitsandbytes does not have: "
                "convert it to 16bit first, and that to bitsandbytes."
            )
        self.weights: set[str] = set()  # what becomes 4-bit
        if target != "16bit" and not self.four_bit:
            chosen = self.meta.four_bit_weights(skip_modules, options["block_size"])
            self.weights = {name for name in chosen if target == "qlora" or name.endswith(".weight")}
        self._storage = torch.uint8
        first = next((step for step in self.plan.steps if isinstance(step, FourBit)), None)
        if first is not None:  # what is quantized again is quantized alike
            state = self._state(first)
            self.options = {"quant_type": state["quant_type"], "block_size": state["blocksize"]}
            self.options["double_quant"] = "nested_blocksize" in state
            self._storage = source.checkpoint.tensors[first.key].dtype

    def write(self, folder: Path, shard_bytes: int) -> None:
        """Write safetensors files of at most ``shard_bytes``, unless one tensor is larger; beside them config.json, and
        whatever lies beside the source's weights (tokenizer, license)."""
        files: list[list[Job]] = [[]]
        size = 0
        for job in self.jobs():
            num_bytes = sum(output.num_bytes for output in job.outputs)
            if files[-1] and size + num_bytes > shard_bytes:
                files.append([])
                size = 0
            files[-1].append(job)
            size += num_bytes
        weight_map: dict[str, str] = {}
        for number, jobs in enumerate(files, 1):
            suffix = f"-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else ".safetensors"
            name = WEIGHTS_NAME.replace(".safetensors", suffix)
            outputs = [output for job in jobs for output in job.outputs]
            with ShardWriter(folder / name, outputs, self.source.path) as writer:
                for job in jobs:
                    job.write(writer)
            self.report.num_bytes += writer.num_bytes
            weight_map |= {output.name: name for output in outputs}
        self.report.files = len(files)
        written = {"config.json": self.config()}
        if self.source.path.suffix == ".gguf":
            written["generation_config.json"] = GenerationConfig.from_model_config(self.source.config).to_diff_dict()
        if len(files) > 1:
            written[INDEX_NAME] = {"metadata": {"total_size": self.report.num_bytes}, "weight_map": weight_map}
        for name, value in written.items():
            (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in self.source.path.iterdir() if self.source.path.is_dir() else ():
            if not path.name.endswith(_WEIGHT_FILES) and path.name != "config.json" and is_own_file(path):
                shutil.copyfile(path, folder / path.name)
        if self.adapter_folder is not None and is_own_file(self.adapter_folder / TEMPLATE):
            shutil.copyfile(self.adapter_folder / TEMPLATE, folder / TEMPLATE)

    def config(self) -> dict[str, Any]:
        """config.json: the source's, with another ``quantization_config`` and dtype."""
        if isinstance(self.source, SafetensorsSource):
            config = read_json(self.source.path / "config.json")
        else:
            config = {key: value for key, value in self.source.config.to_dict().items() if "_name_or_path" not in key}
        config.pop("quantization_config", None)
        config["architectures"] = config.get("architectures") or [type(self.meta.model).__name__]
        if (quantization := self.quantization_config()) is not None:
            config["quantization_config"] = quantization
        names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        return config | dict.fromkeys(names, str(self.dtype).removeprefix("torch."))

    def quantization_config(self) -> dict[str, Any] | None:
        """Of what was written; None where nothing is 4-bit."""
        names = self.four_bit | self.weights
        if self.target == "16bit" or not names:
            return None
        old: dict[str, Any] = self.source.four_bit_config or {}
        if old and (old.get("quant_method") == METHOD) == (self.target == "qlora"):
            return dict(old)
        compute = old.get("compute_dtype", old.get("bnb_4bit_compute_dtype"))
        modules = self.meta.model.named_modules()
        dense = [path for path, module in modules if type(module) is nn.Linear and f"{path}.weight" not in names]
        made: dict[str, Any] = {METADATA: old.get(METADATA, {}) if old else {"method": "rtn"}}
        if self.target == "qlora":
            return native_config(dense, self.options, compute, **made)
        config = {**bitsandbytes_config(self.dtype, self.options, dense), **made}
        config["bnb_4bit_quant_storage"] = str(self._storage).removeprefix("torch.")
        return config | ({"bnb_4bit_compute_dtype": compute} if compute else {})

    def jobs(self) -> Iterator[Job]:
        """In the order of the files."""
        for step in self.plan.steps:
            yield from self.jobs_of(step)
        for stored in self.plan.unexpected:
            yield Job([Output(stored.name, stored.dtype, stored.shape)], partial(self._copy, stored, True))

    def jobs_of(self, step: Step) -> Iterator[Job]:
        """What one step of the plan becomes."""
        if isinstance(step, FourBit):
            yield self._decoded(step) if self.target == "16bit" else self._copied(step)
        elif step.name not in self.weights or (isinstance(step, Converted) and len(step.converter.target_patterns) > 1):
            yield from (self._dense(stored, self.meta.dtype_of(step.name)) for stored in step.parts)
        elif isinstance(step, Plain):
            yield self._packed(step.key, step, self.parts(step.stored, step.name in self.transposed))
        else:
            yield self._packed(step.name, step, self._parts_of_stack(step))

    def parts(self, stored: StoredTensor, transposed: bool = False) -> Parts:
        """The elements of a stored tensor, or of its transpose, whole rows at a time; 8-bit floats as 16-bit."""
        is_8bit = stored.scales is not None or stored.dtype in FLOATS
        if is_8bit or transposed:
            whole = (self.source if is_8bit else self.source.checkpoint).read(stored)
            yield from slices(whole.t() if transposed else whole)
            return
        numel, size = math.prod(stored.shape), part_size(stored.shape)
        for begin in range(0, numel, size):
            yield self.source.checkpoint.read_part(stored, begin, min(begin + size, numel))

    def _parts_of_stack(self, step: Converted) -> Parts:
        read = self.source.read
        whole = (tensor for _, tensor in step.iter_tensors(self.meta.model, read))
        for stack in step.slices(read) if step.is_stack else whole:
            yield from slices(stack)

    def _dense(self, stored: StoredTensor, dtype: torch.dtype) -> Job:
        dtype = dtype if stored.dtype.is_floating_point else stored.dtype

        def write(writer: ShardWriter) -> None:
            for part in self.parts(stored):
                writer.write(stored.name, part.to(dtype))

        return Job([Output(stored.name, dtype, stored.shape)], write)

    def _packed(self, key: str, step: Step, parts: Parts) -> Job:
        """The weight of a step in 4 bits, made of its ``parts`` when the job runs, under the name ``key``."""
        numel, nested = math.prod(self.shape(step)), self.options["double_quant"]
        blocks = -(-numel // self.options["block_size"])
        outputs = [
            Output(key, torch.uint8, ((numel + 1) // 2, 1)),
            Output(f"{key}.absmax", torch.uint8 if nested else torch.float32, (blocks,)),
            Output(f"{key}.quant_map", torch.float32, (16,)),
            Output(f"{key}{STATE_MARK}{self.options['quant_type']}", torch.uint8, None),
        ]
        if nested:
            outputs.append(Output(f"{key}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)))
            outputs.append(Output(f"{key}.nested_quant_map", torch.float32, (256,)))

        def write(writer: ShardWriter) -> None:
            weight = self.quantized(key, step, parts, partial(writer.write, key))
            for name, tensor in to_bnb(weight, key).items():
                if name != key:
                    writer.write(name, tensor)
            self.report.quantized += 1

        return Job(outputs, write)

    def shape(self, step: Step) -> tuple[int, ...]:
        """Of the weight as a product sees it."""
        shape = tuple(self.meta.shapes[step.name].shape)
        return shape[::-1] if step.name in self.transposed else shape

    def quantized(
        self, key: str, step: Step, parts: Parts, write: Callable[[Tensor], None] | None = None
    ) -> QuantizedWeight:
        """The weight of a step, quantized part by part; with ``write``, which takes the codes, without these."""
        options = {**self.options, "double_quant": False}

        def quantized_parts() -> Iterator[QuantizedWeight]:
            done = 0
            for part in parts:
                try:
                    yield quantize(part, **options)
                except ValueError as error:
                    reason = first_sentence(error)
                    if len(bad := (~part.isfinite()).nonzero()):
                        found = f"its element {done + int(bad[0])} is {float(part[bad[0]])}"
                        reason = f"{found}: only finite weights can be quantized."
                    raise UserError(f"{step.file}: weight {key} cannot be quantized: {reason}") from error
                done += part.numel()

        return join(quantized_parts(), self.shape(step), self.dtype, self.options, write=write)

    def _state(self, step: FourBit) -> dict[str, Any]:
        stored = {part.name: part for part in step.parts}
        key = bnb_state_key(stored, step.key)
        try:
            return unpack_json(self.source.checkpoint.read(stored[key or ""]))
        except (KeyError, ValueError) as error:
            raise UserError(f"{step.file}: {step.key} has no valid quant state ({error}).") from error

    def _copied(self, step: FourBit) -> Job:
        outputs = [Output(part.name, part.dtype, part.shape) for part in step.parts]

        def write(writer: ShardWriter) -> None:
            for part in step.parts:
                self._copy(part, part.name == step.key, writer)
            self.report.copied += 1

        return Job(outputs, write)

    def _copy(self, stored: StoredTensor, as_bytes: bool, writer: ShardWriter) -> None:
        """Write a tensor as it is stored; ``as_bytes`` what may hold any, such as packed codes in a dtype of floats."""
        numel = math.prod(stored.shape)
        for begin in range(0, numel, PART):
            part = self.source.checkpoint.read_part(stored, begin, min(begin + PART, numel))
            writer.write(stored.name, part.view(torch.uint8) if as_bytes else part)

    def _decoded(self, step: FourBit) -> Job:
        def write(writer: ShardWriter) -> None:
            weight = step.weight(self.source.read)
            is_transposed = step.name in self.transposed
            parts = slices(weight.dequantize(self.dtype).t()) if is_transposed else decoded_parts(weight, self.dtype)
            for part in parts:
                writer.write(step.key, part)
            self.report.dequantized += 1

        return Job([Output(step.key, self.dtype, tuple(self.meta.shapes[step.name].shape))], write)


def slices(whole: Tensor) -> Parts:
    """The elements of a tensor in row-major order, contiguous, in parts of :func:`part_size`."""
    if whole.is_contiguous():
        yield from whole.view(-1).split(part_size(whole.shape))
        return
    for part in whole.split(max(1, part_size(whole.shape) // whole[0].numel())):
        yield part.contiguous().view(-1)


def part_size(shape: tuple[int, ...]) -> int:
    """About PART elements: rows of a tensor that are whole blocks of any size."""
    width = max(1, shape[-1]) if shape else 1
    step = width * (4096 // math.gcd(width, 4096))
    return step * max(1, PART // step)


def decoded_parts(weight: QuantizedWeight, dtype: torch.dtype) -> Parts:
    """The decoded elements in order, in parts of :func:`part_size`."""
    flat, size = weight.flatten(), part_size(weight.shape)
    for begin in range(0, flat.numel(), size):
        yield flat.slice(begin, min(begin + size, flat.numel())).dequantize(dtype)
