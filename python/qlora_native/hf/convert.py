"""A model folder into another number of bits, or another library's form of 4 bits, a few megabytes at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.errors import UserError
from qlora_native.hf.build import DTYPES, OUTPUT_EMBEDDING, MetaModel, first_sentence, four_bit_weights, is_plain_linear
from qlora_native.hf.checkpoint import Output, ShardWriter, StoredTensor, shard_names, write_index
from qlora_native.hf.config import METADATA, METHOD, QLoRANativeConfig
from qlora_native.hf.load import bitsandbytes_config
from qlora_native.hf.plan import Converted, FourBit, Plain, Plan, Step
from qlora_native.hf.source import SafetensorsSource, Source, open_source
from qlora_native.ops.quantize_4bit import double_quantize
from qlora_native.reference import NESTED_BLOCK
from qlora_native.weight import QuantizedWeight, bnb_state_key, quant_type_number, quantize, to_bnb, unpack_json

TARGETS = ("16bit", "qlora", "bitsandbytes")
PART = 1 << 22  # elements at a time: a multiple of every block size
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt", ".gguf", ".h5")

Parts = Iterator[Tensor]  # the elements of a flattened tensor, in order


@dataclass
class Job:
    """Tensors that are written together, and how."""

    outputs: list[Output]
    write: Callable[[ShardWriter], None]

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)


@dataclass
class ConvertReport:
    """What was written.

    Attributes:
        files: number of safetensors files.
        num_bytes: bytes of all tensors in them.
        quantized, dequantized: weights that became 4-bit, or ceased to be.
        copied: weights that were 4-bit and stay so, byte for byte.
    """

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

    Tensors keep their stored names. What is 4-bit already keeps its bytes when the target is 4-bit. Files that hold no
    weights are copied. Memory beyond the libraries: a few parts of 2^22 elements, the scales of the tensor at hand, and
    whole tensors only where one has to be turned (GPT-2), decoded from 4 bits (its packed bytes) or made of several by
    transformers (one expert of a stack).

    Args:
        source: a folder with config.json and safetensors, in one file or sharded: 32-bit, 16-bit, 8-bit floats, or
            4-bit in bitsandbytes' format.
        target: "16bit"; "bitsandbytes", which transformers loads by bitsandbytes; "qlora", the same tensors under a
            config that transformers loads by this library, where stacks of experts are 4-bit too.
        quant_type, block_size, double_quant, skip_modules: as :func:`qlora_native.load_model`, for weights that are not
            4-bit yet.
        dtype: of what is not 4-bit, and of decoded weights; None is config.json's if that is 16-bit, else bfloat16.
        shard_bytes: the largest file, unless one tensor alone is larger.

    Raises:
        UserError: the source is missing, broken or of a kind that is not read here.
        ValueError: an argument is wrong.
    """
    if target not in TARGETS:
        raise ValueError(f"convert: target is {target!r}: expected {', '.join(TARGETS)}.")
    opened = open_source(source, torch.bfloat16)
    if not isinstance(opened, SafetensorsSource):
        raise UserError(f"{source} is GGUF: expected a folder of safetensors; `qlora quantize` reads GGUF.")
    stored_dtype = opened.config.dtype
    dtype = dtype or (stored_dtype if stored_dtype in DTYPES[:2] else torch.bfloat16)
    options: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    quantize(torch.zeros(1), **options)  # refuses wrong options before anything is written
    work = Conversion(opened, target, dtype, options, skip_modules)
    write_all(work, folder, shard_bytes)
    config = json.loads((source / "config.json").read_bytes())
    write_config(folder, config, work.config(), dtype)
    copy_other_files(source, folder)
    return work.report


def write_all(work: Conversion, folder: Path, shard_bytes: int) -> None:
    """Write every job's tensors into safetensors files of at most ``shard_bytes``, unless one tensor is larger."""
    files: list[list[Job]] = [[]]
    for job in work.jobs():
        if files[-1] and sum(one.num_bytes for one in files[-1]) + job.num_bytes > shard_bytes:
            files.append([])
        files[-1].append(job)
    weight_map: dict[str, str] = {}
    for name, jobs in zip(shard_names(len(files)), files, strict=True):
        outputs = [output for job in jobs for output in job.outputs]
        writer = ShardWriter(folder / name, outputs)
        try:
            for job in jobs:
                job.write(writer)
            writer.close()
        finally:
            writer.abandon()
        work.report.num_bytes += writer.num_bytes
        weight_map |= {output.name: name for output in outputs}
    work.report.files = len(files)
    if len(files) > 1:
        write_index(folder, weight_map, work.report.num_bytes)


def copy_other_files(source: Path, folder: Path) -> None:
    """What lies beside the weights: tokenizer, generation defaults, license."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES) and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


class Conversion:
    """One run: what is read, what is wanted, and the jobs that lead there."""

    def __init__(
        self,
        source: Source,
        target: str,
        dtype: torch.dtype,
        options: dict[str, Any],
        skip_modules: tuple[str, ...],
    ) -> None:
        self.source, self.target, self.dtype, self.options = source, target, dtype, options
        self.tree = MetaModel(source.config, dtype, torch.device("cpu"))
        self.report = ConvertReport()
        modules = self.tree.model.named_modules()
        # Weights [in, out] of layers that multiply from the right.
        self.turned = {f"{n}.weight" for n, m in modules if is_plain_linear(m) and not isinstance(m, nn.Linear)}
        self.plan: Plan = source.plan(self.tree)
        self.four_bit = {step.name for step in self.plan.steps if isinstance(step, FourBit)}
        stacks = sorted(name for name in self.four_bit if not name.endswith(".weight"))
        if target == "bitsandbytes" and stacks:
            raise UserError(
                f"{source.path} holds stacks of experts in 4 bits ({stacks[0]}), which bitsandbytes does not have: "
                "convert it to 16bit first, and that to bitsandbytes."
            )
        self.weights: dict[str, bool] = {}  # what becomes 4-bit -> whether the model stores it transposed
        if target != "16bit" and not self.four_bit:
            chosen = four_bit_weights(self.tree.model, skip_modules, options["block_size"], self.tree.in_fp32)
            keeps = target == "qlora"
            self.weights = {name: turned for name, turned in chosen.items() if keeps or name.endswith(".weight")}

    def config(self) -> dict[str, Any] | None:
        """quantization_config of what was written; None where nothing is 4-bit."""
        names = self.four_bit | self.weights.keys()
        if self.target == "16bit" or not names:
            return None
        old: dict[str, Any] = self.source.four_bit_config or {}
        if (old.get("quant_method") == METHOD) == (self.target == "qlora") and old:
            return dict(old)
        options, storage = self.options, "uint8"
        compute = old.get("compute_dtype", old.get("bnb_4bit_compute_dtype"))
        first = next((step for step in self.plan.steps if isinstance(step, FourBit)), None)
        if first is not None:
            state = self._state(first)
            options = {"quant_type": state["quant_type"], "block_size": state["blocksize"]}
            options["double_quant"] = "nested_blocksize" in state
            packed = next(part for part in first.parts if part.name == first.prefix)
            storage = str(packed.dtype).removeprefix("torch.")
        modules = self.tree.model.named_modules()
        dense = [path for path, module in modules if type(module) is nn.Linear and f"{path}.weight" not in names]
        made = {METADATA: old.get(METADATA, {})} if old else {METADATA: {"method": "rtn"}}
        if self.target == "qlora":
            return QLoRANativeConfig(**options, skip_modules=dense, compute_dtype=compute, **made).to_dict()
        told = {**bitsandbytes_config(self.dtype, options, dense), **made}
        return {**told, "bnb_4bit_quant_storage": storage, **({"bnb_4bit_compute_dtype": compute} if compute else {})}

    def jobs(self) -> Iterator[Job]:
        """In the order of the files."""
        for step in self.plan.steps:
            yield from self.jobs_of(step)
        for name in self.plan.unexpected:
            stored = self.source.checkpoint.tensors[name]
            yield self._dense(stored, stored.dtype)

    def jobs_of(self, step: Step) -> Iterator[Job]:
        """What one step of the plan becomes."""
        if isinstance(step, FourBit):
            yield self._decoded(step) if self.target == "16bit" else self._copied(step)
        elif isinstance(step, Plain):
            turned = self.weights.get(step.name)
            if turned is None:
                yield self._dense(step.stored, self.tree.dtype_of(step.name))
            else:
                yield self._quantized(step.stored.name, step.stored, turned)
        elif step.name in self.weights and len(step.converter.target_patterns) == 1:
            yield self._stacked(step)
        else:
            yield from (self._dense(stored, self.tree.dtype_of(step.name)) for _, stored in step.parts)

    # -----------------------------------------------------------------------------------------------------------------
    # Parts of a stored tensor

    def _flat(self, stored: StoredTensor, turned: bool) -> Parts:
        """The elements of a stored tensor, transposed if ``turned``."""
        numel = math.prod(stored.shape)
        if self.is_read_whole(stored) or turned:
            whole = self.source.read(self.plan, stored)
            yield from slices(whole.t() if turned else whole)
            return
        for begin in range(0, numel, PART):
            yield self.source.checkpoint.read_part(stored, begin, min(begin + PART, numel))

    def is_read_whole(self, stored: StoredTensor) -> bool:
        """Whether its elements are more than its bytes: 8-bit floats have scales beside them."""
        return stored.name in self.plan.scales or stored.dtype.itemsize == 1

    def _dense(self, stored: StoredTensor, dtype: torch.dtype) -> Job:
        kept = not stored.dtype.is_floating_point
        output = Output(stored.name, stored.dtype if kept else dtype, stored.shape)

        def write(writer: ShardWriter) -> None:
            if kept:
                writer.write(stored.name, self.source.checkpoint.read(stored))
                return
            for part in self._flat(stored, turned=False):
                writer.write(stored.name, part.to(dtype))

        return Job([output], write)

    # -----------------------------------------------------------------------------------------------------------------
    # To 4 bits

    def _quantized(self, key: str, stored: StoredTensor, turned: bool) -> Job:
        shape = stored.shape[::-1] if turned else stored.shape
        return self._packed(key, shape, str(stored.file), lambda: self._flat(stored, turned))

    def _stacked(self, step: Converted) -> Job:
        def parts() -> Parts:
            read = partial(self.source.read, self.plan)
            stacks = step.slices(read) if step.is_stack else (t for _, t in step.run(self.tree.model, read))
            for stack in stacks:
                yield from slices(stack)

        return self._packed(step.name, tuple(self.tree.shapes[step.name].shape), str(step.parts[0][1].file), parts)

    def _packed(self, key: str, shape: tuple[int, ...], file: str, parts: Callable[[], Parts]) -> Job:
        quant_type, block, nested = (self.options[name] for name in ("quant_type", "block_size", "double_quant"))
        numel = math.prod(shape)
        blocks = -(-numel // block)
        outputs = [
            Output(key, torch.uint8, ((numel + 1) // 2, 1)),
            Output(f"{key}.absmax", torch.uint8 if nested else torch.float32, (blocks,)),
            Output(f"{key}.quant_map", torch.float32, (16,)),
            Output(f"{key}.quant_state.bitsandbytes__{quant_type}", torch.uint8, None),
        ]
        if nested:
            outputs.append(Output(f"{key}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)))
            outputs.append(Output(f"{key}.nested_quant_map", torch.float32, (256,)))

        def write(writer: ShardWriter) -> None:
            weight = self.quantized(key, shape, file, parts(), partial(writer.write, key))
            for name, tensor in to_bnb(weight, key).items():
                if name != key:
                    writer.write(name, tensor)
            self.report.quantized += 1

        return Job(outputs, write)

    def quantized(
        self, key: str, shape: tuple[int, ...], file: str, parts: Parts, take: Callable[[Tensor], None]
    ) -> QuantizedWeight:
        """Quantize part by part, the scales of all parts together, with the same bytes as the tensor in one.

        Args:
            key: of the weight, and file: where it lies, for messages. shape: of the whole.
            parts: flat, from the first element to the last, all but the last one whole blocks.
            take: called with the codes of each part, in their order.

        Returns:
            The weight, without codes.
        """
        quant_type, block, nested = (self.options[name] for name in ("quant_type", "block_size", "double_quant"))
        number, blocks = quant_type_number(quant_type), -(-math.prod(shape) // block)
        scales, done = torch.empty(blocks), 0
        for part in parts:
            try:
                packed, absmax, _, _ = torch.ops.qlora_native.quantize_4bit(part, number, block, False)
            except ValueError as error:
                raise UserError(f"{file}: weight {key} cannot be quantized: {_bad(part, done, error)}") from error
            take(packed)
            scales[done // block : done // block + len(absmax)] = absmax
            done += part.numel()
        about = {"shape": shape, "dtype": self.dtype, "quant_type": quant_type, "block_size": block}
        weight = QuantizedWeight(torch.empty(0, dtype=torch.uint8), scales, **about)
        if nested:
            weight.absmax, weight.nested_offset = torch.empty(blocks, dtype=torch.uint8), torch.empty(())
            weight.nested_absmax = torch.empty(-(-blocks // NESTED_BLOCK))
            double_quantize(scales, weight.absmax, weight.nested_absmax, weight.nested_offset)
        return weight

    # -----------------------------------------------------------------------------------------------------------------
    # From 4 bits

    def _state(self, step: FourBit) -> dict[str, Any]:
        stored = {part.name: part for part in step.parts}
        key = bnb_state_key(stored, step.prefix)
        try:
            return unpack_json(self.source.checkpoint.read(stored[key or ""]))
        except (KeyError, ValueError) as error:
            raise UserError(f"{step.parts[0].file}: {step.prefix} has no valid quant state ({error}).") from error

    def _copied(self, step: FourBit) -> Job:
        outputs = [Output(part.name, part.dtype, part.shape) for part in step.parts]

        def write(writer: ShardWriter) -> None:
            for part in step.parts:
                if part.num_bytes:
                    for piece in self._pieces(part):
                        writer.write(part.name, piece)
            self.report.copied += 1

        return Job(outputs, write)

    def _pieces(self, stored: StoredTensor) -> Parts:
        numel = math.prod(stored.shape)
        for begin in range(0, numel, PART):
            yield self.source.checkpoint.read_part(stored, begin, min(begin + PART, numel))

    def _decoded(self, step: FourBit) -> Job:
        shape = tuple(self._state(step)["shape"])
        expected = tuple(self.tree.shapes[step.name].shape)
        turned = step.name in self.turned
        if (shape[::-1] if turned else shape) != expected:
            raise UserError(
                f"{step.parts[0].file}: weight {step.prefix} is {list(shape)}, but {list(expected)} by config.json; "
                "the two are of different models."
            )

        def write(writer: ShardWriter) -> None:
            weight = self.source.four_bit(step)
            parts = slices(weight.dequantize(self.dtype).t()) if turned else decoded_parts(weight, self.dtype)
            for part in parts:
                writer.write(step.prefix, part)
            self.report.dequantized += 1

        return Job([Output(step.prefix, self.dtype, expected)], write)


def slices(whole: Tensor) -> Parts:
    """The elements of a tensor in row-major order, contiguous, in parts of whole blocks of any size."""
    if whole.is_contiguous():
        yield from whole.view(-1).split(PART)
        return
    for part in whole.split(rows_of_a_part(whole[0].numel())):
        yield part.contiguous().view(-1)


def rows_of_a_part(width: int) -> int:
    """How many rows of ``width`` elements make a part of whole blocks of any size."""
    step = 4096 // math.gcd(width, 4096)
    return step * max(1, PART // (width * step))


def decoded_parts(weight: QuantizedWeight, dtype: torch.dtype, size: int = PART) -> Parts:
    """The decoded elements in order, ``size`` (whole blocks) at a time."""
    scales, numel, block = weight.scales(), weight.numel(), weight.block_size
    for begin in range(0, numel, size):
        end = min(begin + size, numel)
        part = QuantizedWeight(
            weight.packed[begin // 2 : (end + 1) // 2],
            scales[begin // block : -(-end // block)],
            shape=(end - begin,),
            dtype=dtype,
            quant_type=weight.quant_type,
            block_size=block,
            code=weight.code,
        )
        yield part.dequantize()


def _bad(part: Tensor, done: int, error: ValueError) -> str:
    finite = part.isfinite()
    if bool(finite.all()):
        return first_sentence(error)
    index = int((~finite).nonzero()[0])
    return f"its element {done + index} is {float(part[index])}: only finite weights can be quantized."


def write_config(folder: Path, config: dict[str, Any], quantization: dict[str, Any] | None, dtype: torch.dtype) -> None:
    """config.json: the source's, with another ``quantization_config`` and dtype."""
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    config |= dict.fromkeys(names, str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
