"""Adapters added to the weights: a 4-bit model with an adapter becomes a plain 16-bit model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_native.errors import UserError
from qlora_native.hf.build import DTYPES, OUTPUT_EMBEDDING, MetaModel, four_bit_weights, put_dense
from qlora_native.hf.checkpoint import Output, ShardWriter
from qlora_native.hf.config import METADATA
from qlora_native.hf.convert import (
    Conversion,
    Job,
    copy_other_files,
    decoded_parts,
    rows_of_a_part,
    slices,
    write_all,
    write_config,
)
from qlora_native.hf.fuse import unfuse
from qlora_native.hf.load import LoadReport, make_report
from qlora_native.hf.plan import Converted, FourBit, Plain, Step
from qlora_native.hf.source import SafetensorsSource, open_source
from qlora_native.lora import LoRALinear
from qlora_native.lora.adapter import StoredAdapter, read_adapter
from qlora_native.lora.config import ZERO
from qlora_native.lora.layer import trained_whole
from qlora_native.nn.experts import quantized_stacks, take_stack
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.weight import QuantizedWeight

BASES = ("original", "dequantized")


def merge(model: PreTrainedModel, base: str = "original", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Turn the model into dense layers with W + scale * B A, the sum taken in fp32 and rounded once to ``dtype``.

    Layers without an adapter become dense as well, so the result is an ordinary transformers model for
    ``save_pretrained``; GPT-2's transposed layers are what they were.

    Args:
        model: from :func:`qlora_native.load_model`, with an adapter or without; changed in place, layer by layer.
        base: the W: "original" reads the 16-bit weights again from where the model was loaded, one tensor at a time;
            "dequantized" takes the 4-bit ones, which are what the adapter was trained on.
        dtype: of the whole result: bfloat16, float16 or float32.

    Returns:
        The model, frozen.

    Raises:
        ValueError: a wrong argument; "original" for a model that was not loaded by load_model, or with an adapter that
            began with what 4 bits lost, which the original weights have not lost.
        UserError: the original weights are gone, or are 4-bit themselves.
    """
    if base not in BASES:
        raise ValueError(f"merge: base is {base!r}: expected 'original' or 'dequantized'.")
    if dtype not in DTYPES:
        raise ValueError(f"merge: dtype is {dtype}: expected torch.bfloat16, torch.float16 or torch.float32.")
    report: LoadReport | None = getattr(model, "load_report", None)
    has_stacks = any(True for _ in quantized_stacks(model))
    if base == "original":
        config = model.__dict__.get("lora_config")
        if config is not None and config.init != ZERO:
            raise ValueError(
                f"merge: the adapter began with init {config.init!r}, which corrects the 4-bit weights: expected "
                "base='dequantized'."
            )
        if report is None:
            raise ValueError("merge: the model was not loaded by load_model: expected base='dequantized'.")
        _from_original(model, report, dtype)
    else:
        for path, layer in list(_layers(model)):
            inner = _inner(layer)
            if isinstance(inner, QuantizedLinear):
                _make_dense(model, path, layer, inner.quantized.dequantize(torch.float32), dtype)
            else:
                _make_dense(model, path, layer, inner.weight, dtype)
        for _, experts, name, weight in list(quantized_stacks(model)):
            take_stack(experts, name, weight.dequantize(dtype))
    if has_stacks:
        model.__dict__.pop("_weight_conversions", None)  # transformers' own for this class: experts one by one again
    unfuse(model)
    loaded_as = model.config.dtype
    for parameter in model.parameters():
        if parameter.dtype == loaded_as:  # what is kept in fp32 stays so
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("lora_config", None)
    if report is not None:
        model.load_report = make_report(model, report.path)
    return model.requires_grad_(False)


def _from_original(model: PreTrainedModel, report: LoadReport, dtype: torch.dtype) -> None:
    source = open_source(report.path, dtype)
    tree = MetaModel(source.config, dtype, torch.device("cpu"))
    if source.is_four_bit(tree):
        raise UserError(f"{report.path} holds 4-bit weights and no original ones: merge with base 'dequantized'.")
    layers = {f"{path}.weight": (path, layer) for path, layer in _layers(model)}
    stacks = {f"{path}.{name}": (experts, name, weight) for path, experts, name, weight in quantized_stacks(model)}
    parameters = {name.replace(".base_layer.", "."): tensor for name, tensor in model.named_parameters()}
    config = model.__dict__.get("lora_config")
    trained = tuple(f"{path}." for path in trained_whole(model, config.modules_to_save)) if config else ()

    def is_wanted(name: str) -> bool:
        """Layers to replace, and whatever the model holds in a dtype that loses something against the files."""
        parameter = parameters.get(name)
        return (
            name in layers
            or name in stacks
            or (parameter is not None and parameter.dtype != tree.dtype_of(name) and not name.startswith(trained))
        )

    absent = {*layers, *stacks}
    tied_to = {tree.tied[name]: name for name in layers if name in tree.tied}  # of which a file may hold one
    for name, value, _ in source.iter_tensors(tree, lambda n: is_wanted(n) or n in tied_to, lambda name, stored: True):
        assert isinstance(value, Tensor)
        absent.discard(name)
        if name in tied_to:
            absent.discard(tied_to[name])
            _make_dense(model, *layers[tied_to[name]], value, dtype)
            if not is_wanted(name):
                continue
        if name in stacks:
            experts, leaf, weight = stacks[name]
            if value.shape != weight.shape:
                raise _changed(report, f"{name} is {list(value.shape)} there now")
            take_stack(experts, leaf, value.to(weight.device, dtype, copy=True))
            continue
        if name not in layers:
            parameters[name].data = value.to(parameters[name].device, tree.dtype_of(name), copy=True)
            continue
        path, layer = layers[name]
        if isinstance(tree.model.get_submodule(path), Conv1D):
            value = value.t()
        if tuple(value.shape) != (_inner(layer).out_features, _inner(layer).in_features):
            raise _changed(report, f"{name} is {list(value.shape)} there now")
        _make_dense(model, path, layer, value, dtype)
    if absent:
        raise _changed(report, f"{sorted(absent)[0]} is no longer there")


def _changed(report: LoadReport, what: str) -> UserError:
    return UserError(f"{report.path} has changed since the model was loaded: {what}; load the model again.")


def _layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear | QuantizedLinear]]:
    """The layers that become dense: adapted ones, and 4-bit ones without an adapter."""
    adapted = ""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            adapted = f"{path}.base_layer"
            yield path, module
        elif isinstance(module, QuantizedLinear) and path != adapted:
            yield path, module


def _inner(layer: LoRALinear | QuantizedLinear) -> nn.Linear:
    return layer.base_layer if isinstance(layer, LoRALinear) else layer


@torch.no_grad()
def _make_dense(
    model: PreTrainedModel, path: str, layer: LoRALinear | QuantizedLinear, weight: Tensor, dtype: torch.dtype
) -> None:
    """Put a dense layer of ``weight`` [N, K], plus the adapter's delta, at ``path``."""
    inner = _inner(layer)
    device = inner.weight.device
    if isinstance(layer, LoRALinear):
        total = layer.delta().add_(weight.to(device)).to(dtype)
        if f"{path}.weight" in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
            model.config.tie_word_embeddings = False  # one of the two has changed
            model.all_tied_weights_keys = {}
    else:
        total = weight.to(device, dtype, copy=True)
    put_dense(model, path, inner, total)


TARGETS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "nf4": torch.bfloat16}


def merge_files(work: Merging, folder: Path, shard_bytes: int = 4 * 10**9) -> None:
    """Write W + scale * B A of every adapted weight, and all other tensors, into ``folder``, which is there and empty.

    The sum is taken in fp32 and rounded once. Tensors keep their stored names, and files that hold no weights are
    copied. Memory beyond the libraries: a few parts of 2^22 elements; the packed bytes of a 4-bit weight; whole tensors
    where :func:`qlora_native.hf.convert.convert` holds them too; the whole 16-bit model if it comes from GGUF.

    Raises:
        UserError: a file is broken; an adapted weight is stored in several tensors.
    """
    write_all(work, folder, shard_bytes)
    if isinstance(work.source, SafetensorsSource):
        config = json.loads((work.source.path / "config.json").read_bytes())
        copy_other_files(work.source.path, folder)
    else:
        config = {key: value for key, value in work.source.config.to_dict().items() if key != "_name_or_path"}
    if work.untied:
        config["tie_word_embeddings"] = False
    write_config(folder, config, work.config(), work.dtype)


class Merging(Conversion):
    """A conversion in which adapted weights take up their adapter.

    Args:
        path: a model folder or a .gguf file.
        adapter: a folder in PEFT's format; None merges nothing.
        base: the W: "original" is what the files hold, "dequantized" what ``load_model`` makes of it in 4 bits.
        to: "bf16", "fp16", "fp32" or "nf4", the last in bitsandbytes' format.
        quant_type, block_size, double_quant, skip_modules: as :func:`qlora_native.load_model`, for weights that are not
            4-bit yet.

    Attributes:
        adapter: what is merged; empty without an adapter.
        untied: whether tied embeddings part, as only the output one has an adapter.

    Raises:
        UserError: a file is missing or broken, or model and adapter do not belong together.
        ValueError: an argument is wrong.
    """

    def __init__(
        self,
        path: Path,
        adapter: Path | None,
        *,
        base: str = "original",
        to: str = "bf16",
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        skip_modules: tuple[str, ...] = (OUTPUT_EMBEDDING,),
    ) -> None:
        if base not in BASES:
            raise ValueError(f"merge: base is {base!r}: expected 'original' or 'dequantized'.")
        options: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
        source = open_source(path, TARGETS[to])
        super().__init__(source, "bitsandbytes" if to == "nf4" else "16bit", TARGETS[to], options, skip_modules)
        if self.four_bit and base == "original":
            raise UserError(
                f"{source.path} holds 4-bit weights and no original ones: merge with --base dequantized, or give the "
                "16-bit model that it was made from."
            )
        self.skip_modules = skip_modules
        first = next((step for step in self.plan.steps if isinstance(step, FourBit)), None)
        if first is not None:  # what is quantized again is quantized alike
            state = self._state(first)
            self.options = {"quant_type": state["quant_type"], "block_size": state["blocksize"]}
            self.options["double_quant"] = "nested_blocksize" in state
        # What load_model would make 4-bit: decoded, it is the base that the adapter was trained on.
        self.rounded: set[str] = set()
        if base == "dequantized" and not self.four_bit:
            self.rounded = {*four_bit_weights(self.tree.model, skip_modules, block_size, self.tree.in_fp32)}
            stacks = sorted(name for name in self.rounded if not name.endswith(".weight"))
            if stacks:
                raise UserError(
                    f"{source.path} has stacks of experts ({stacks[0]}), which are merged from 4 bits only where they "
                    f"are stored so: `qlora convert {source.path} DIR --to qlora` first, then merge that folder."
                )
        for name in self.turned:  # GPT-2's layers become what an adapter knows; on this device they have no memory
            width, height = self.tree.shapes[name].shape
            self.tree.model.set_submodule(name.removesuffix(".weight"), nn.Linear(width, height, device="meta"))
        self.adapter = StoredAdapter({}, {}) if adapter is None else read_adapter(self.tree.model, adapter)
        tied = self.tree.tied
        origins = {tied.get(name, name): tensor for name, tensor in self.adapter.whole.items()}
        self.whole = origins | {name: origins[to] for name, to in tied.items() if to in origins}
        # Tied embeddings part where only the output one has an adapter.
        self.untied = any(f"{path}.weight" in tied for path in self.adapter.pairs)

    def config(self) -> dict[str, Any] | None:
        """quantization_config of what was written: what an adapter changed is rounded to nearest."""
        told = super().config()
        return told and {**told, METADATA: {"method": "rtn"}}

    def jobs(self) -> Iterator[Job]:
        """In the order of the files; an output embedding that is no longer tied comes last."""
        yield from super().jobs()
        for step in self._parted():
            yield self._merged(step, step.name)

    def merged_steps(self) -> list[Step]:
        """What :meth:`rows` may be asked for: the steps of the plan, and an output embedding that is no longer tied."""
        return [*self.plan.steps, *self._parted()]

    def _parted(self) -> list[Plain]:
        """Output embeddings that are not in the files because they were tied, and have an adapter; UserError for other
        adapted weights that are not there."""
        steps = {step.name: step for step in self.plan.steps}
        adapted = {f"{path}.weight" for path in self.adapter.pairs} | self.adapter.whole.keys()
        found = []
        for name in sorted(adapted):
            step = steps.get(name)
            origin = steps.get(self.tree.tied.get(name, ""))
            if isinstance(step, (Plain, FourBit)) or (name in self.whole and isinstance(origin, Plain)):
                continue
            if isinstance(origin, Plain):
                found.append(Plain(name, origin.stored))
                continue
            raise UserError(
                f"{self.source.path} stores {name} in several tensors, where no adapter can be merged file by file: "
                "merge in memory, with qlora_native.merge(model) and model.save_pretrained(folder)."
            )
        return found

    def jobs_of(self, step: Step) -> Iterator[Job]:
        """As without an adapter, but for the weights that it changes, and those that are decoded from 4 bits."""
        if isinstance(step, Converted) or not self.changes(step):
            yield from super().jobs_of(step)
        else:
            yield self._merged(step, step.prefix if isinstance(step, FourBit) else step.stored.name)

    def changes(self, step: Step) -> bool:
        """Whether the weight is not simply copied, cast, quantized or decoded."""
        adapted = step.name.removesuffix(".weight") in self.adapter.pairs or step.name in self.whole
        return adapted or (step.name in self.rounded and self.target == "16bit")

    def becomes_four_bit(self, step: Step) -> bool:
        """Whether the result holds the weight in 4 bits."""
        if self.target == "16bit" or step.name in self.whole:
            return False
        return step.name in self.four_bit or step.name in self.weights

    def _merged(self, step: Plain | FourBit, key: str) -> Job:
        if self.becomes_four_bit(step):
            file = str(step.parts[0].file if isinstance(step, FourBit) else step.stored.file)
            rows, width = self.shape(step)
            return self._packed(key, (rows, width), file, lambda: (part.view(-1) for part in self.rows(step)))
        dtype = self.tree.dtype_of(step.name)

        def write(writer: ShardWriter) -> None:
            if step.name in self.turned:
                whole = torch.cat([part.to(dtype) for part in self.rows(step)])
                for part in slices(whole.t()):
                    writer.write(key, part)
                return
            for part in self.rows(step):
                writer.write(key, part.to(dtype))

        return Job([Output(key, dtype, tuple(self.tree.shapes[step.name].shape))], write)

    def shape(self, step: Plain | FourBit) -> tuple[int, int]:
        """[N, K] of the weight as a product sees it; [1, length] of a vector."""
        shape = tuple(self.tree.shapes[step.name].shape)
        shape = shape[::-1] if step.name in self.turned else shape
        return math.prod(shape[:-1]), shape[-1]

    def rows(self, step: Plain | FourBit) -> Iterator[Tensor]:
        """The merged weight from top to bottom, fp32 [n, K] at a time."""
        whole = self.whole.get(step.name)
        if whole is not None:
            yield from whole.float().reshape(self.shape(step)).split(rows_of_a_part(whole.shape[-1]))
            return
        pair = self.adapter.pairs.get(step.name.removesuffix(".weight"))
        done = 0
        for part in self.base_rows(step):
            part = part.float()
            if pair is not None:
                a, b, scale = pair
                part = part + (b[done : done + len(part)].float() @ a.float()) * scale
            done += len(part)
            yield part

    def base_rows(self, step: Plain | FourBit) -> Iterator[Tensor]:
        """The weight that the adapter comes upon, [n, K] at a time: fp32 if decoded from 4 bits, else as stored."""
        height, width = self.shape(step)
        size = rows_of_a_part(width)
        if isinstance(step, FourBit):
            weight = self.source.four_bit(step)
        elif step.name in self.rounded:
            weight = self._quantized_whole(step)
        else:
            stored = step.stored
            if self.is_read_whole(stored) or step.name in self.turned:
                whole = self.source.read(self.plan, stored)
                yield from (whole.t() if step.name in self.turned else whole.view(height, width)).split(size)
                return
            for begin in range(0, height, size):
                end = min(begin + size, height)
                yield self.source.checkpoint.read_part(stored, begin * width, end * width).view(-1, width)
            return
        for part in decoded_parts(weight, torch.float32, size * width):
            yield part.view(-1, width)

    def _quantized_whole(self, step: Plain) -> QuantizedWeight:
        """In 4 bits, from parts of what is stored."""
        stored, shape = step.stored, self.shape(step)
        packed, done = torch.empty((math.prod(shape) + 1) // 2, dtype=torch.uint8), 0

        def take(codes: Tensor) -> None:
            nonlocal done
            packed[done : done + len(codes)] = codes
            done += len(codes)

        parts = self._flat(stored, step.name in self.turned)
        weight = self.quantized(stored.name, shape, str(stored.file), parts, take)
        weight.packed = packed
        return weight
