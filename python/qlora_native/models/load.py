"""load_model: a causal LM from a folder, 4-bit, with one tensor at a time in 16 bits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_native import _C
from qlora_native._memory import trim_heap
from qlora_native._threads import sleep_while_busy
from qlora_native.errors import UserError
from qlora_native.models import fuse as fusion
from qlora_native.models.build import MetaModel, four_bit_parts
from qlora_native.models.progress import Progress
from qlora_native.nn.experts import without_stacks
from qlora_native.weight import CALIBRATED, METHODS, TENSOR_FIELDS, quantize
from qlora_native.weights.config import METADATA, bitsandbytes_config
from qlora_native.weights.files import FileMap, mapped_part, some_of
from qlora_native.weights.open import SafetensorsSource, open_source
from qlora_native.weights.shapes import MODEL_DTYPES, OUTPUT_EMBEDDING, kinds
from qlora_native.weights.stream import AUTO, KEEP, Item, Source

RESIDENCIES = ("auto", "mapped", "memory")


@dataclass(frozen=True)
class LoadReport:
    """What a loaded model is made of, kept as ``model.load_report``.

    Attributes:
        path: the folder or GGUF file it came from.
        bytes_4bit: bytes of the 4-bit weights, or of all in GGUF's formats, their scales included.
        bytes_dense: bytes of every other parameter and buffer.
        dense: bytes of each parameter that is not 4-bit, by name, largest first; tied ones once.
        method: of its 4-bit weights: "rtn", "wmse" or "gptq"; "keep" for those of a GGUF file; None if nothing
            is 4-bit, or if a folder of 4-bit weights does not name it.
        calibration: what the statistics were gathered from: sha256 of the tokens, rows, length, tokens, seed; None for
            methods without data.
        fell_back: weights that did not get the method on loading, and why; "name[3]" is expert 3 of a stack.
        seconds: that loading took.
        bytes_mapped: of the weights that lie in mapped files, 0 with residency "memory".
        copied: tensors over 64 KiB that could not be mapped with the others, and why.
        kinds: what became of its linear layers and experts, and why; by their paths, with ``*`` in place of numbers.
    """

    path: Path
    bytes_4bit: int
    bytes_dense: int
    dense: dict[str, int]
    method: str | None = None
    calibration: dict[str, Any] | None = None
    fell_back: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_mapped: int = 0
    copied: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model."""
        return self.bytes_4bit + self.bytes_dense

    @property
    def is_kept(self) -> bool:
        """Whether the weights are those of a GGUF file as they are."""
        return self.method == KEEP

    @property
    def share_4bit(self) -> float:
        """The part of all bytes that is 4-bit weights, 0 to 1."""
        return self.bytes_4bit / (self.num_bytes or 1)

    def __str__(self) -> str:
        named = [f"{name} ({num_bytes / 2**20:.1f} MiB)" for name, num_bytes in self.dense.items()]
        large = sum(num_bytes >= 2**20 / 20 for num_bytes in self.dense.values())
        kind = "quantized" if self.is_kept else "4-bit"
        text = f"{self.num_bytes / 2**20:.1f} MiB, {100 * self.share_4bit:.1f} % of them {kind}; not {kind}: "
        text += some_of(named, min(8, max(1, large))) or "nothing"
        if self.calibration is not None:
            text += f"; {self.method} by {self.calibration['tokens']:,} tokens"
        if self.fell_back:
            text += f"; {len(self.fell_back)} weights were not calibrated ({some_of(list(self.fell_back), 3)})"
        if self.bytes_mapped:
            text += f"; {self.bytes_mapped / 2**20:.1f} MiB are mapped from the files"
        if self.copied:
            text += f"; {len(self.copied)} tensors had to be copied ({some_of(list(self.copied), 3)})"
        return text


def load_model(
    path: str | os.PathLike[str] | Source,
    *,
    quant_type: str = AUTO,
    block_size: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | int | None = None,
    skip_modules: Iterable[str] | None = None,
    method: str | None = None,
    calibration: Any = None,
    fuse: bool = True,
    residency: str = "auto",
    work_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    reader: Callable[[Source, MetaModel, Iterable[Item]], None] | None = None,
) -> PreTrainedModel:
    """Load any transformers causal LM with its linear layers in 4 bits.

    Memory peaks at the 4-bit model plus the largest tensor; with "wmse" and "gptq", plus one decoder layer in 16 bits,
    what it computes of the sequences at hand, and its statistics. The model comes back in evaluation mode, every
    parameter frozen; ``model.load_report`` names what is 4-bit and what is not.

    Args:
        path: a folder with ``config.json`` and safetensors (one file or sharded; fp32, bf16, fp16, or 4-bit in
            bitsandbytes' format), a ``.gguf`` file, or a folder that holds one; or what
            :func:`qlora_native.weights.open.open_source` made of it.
        quant_type: "nf4" or "fp4", as :func:`qlora_native.quantize`; or "keep", which leaves the weights of a GGUF
            file in its bytes, mapped, in Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL or MXFP4,
            embeddings too. "auto" is "keep" for such a file without ``method``, and "nf4" for all else. Weights that
            are 4-bit already keep what they have.
        block_size, double_quant: as :func:`qlora_native.quantize`, for "nf4" and "fp4".
        dtype: of everything that stays dense, and the dtype that the 4-bit weights stand for: bfloat16, float16 or
            float32.
        device: where the model goes; None is torch's default device.
        skip_modules: linear layers to leave dense: module paths or path endings, with all under them. "lm_head"
            means the output embedding, whatever the model calls it, and is the default, but for weights that are kept.
            Tied weights stay dense, unless they are kept.
        method: how codes and scales are chosen. "rtn" rounds to nearest under each block's largest magnitude, as
            bitsandbytes does; "wmse" searches each block's scale, sign included, for the least error weighted by the
            mean square of the input channels; "gptq" also passes the error of each column on to the next ones
            (Frantar et al., 2022). None is "wmse" with calibration data and "rtn" without.
        calibration: for "wmse" and "gptq": a file that ``qlora train`` reads, a list of texts, token tensors, or a
            :class:`qlora_native.CalibrationData`, which also limits how much of it is taken.
        fuse: give the modules between the products native kernels where they compute the same to rounding, as
            :func:`qlora_native.fuse` does.
        residency: "memory" copies the weights, "mapped" uses those of a 4-bit folder or a kept GGUF file in place: they
            are read when they are first used, processes share them, and nothing is ever written to the files. A dense
            weight that holds a NaN is then found when a loss is not finite, not on loading. "auto" maps where that is
            possible: a 4-bit folder, the CPU, Linux.
        work_dir: with calibration, a folder of this load's own on a disk: finished layers and hidden states are kept
            there, a load that was killed goes on from it, and a load that ends removes it.
        progress: called with a line of text, the layers done, and the layers in all, with calibration; else with
            tensors, every few seconds.
        reader: stores the tensors, in place of reading all of them here; without calibration
            (:func:`qlora_native.distributed.load_model`).

    Raises:
        UserError: the files are missing, broken, of another model or hold a NaN; the sentence names the file and the
            tensor. The calibration data are too short or cannot be read; the model has no layers to run one by one.
        ValueError: an argument is wrong.
    """
    if dtype not in MODEL_DTYPES:
        raise ValueError(
            f"load_model: dtype is {dtype}: expected torch.bfloat16, torch.float16 or torch.float32."
        )
    if quant_type == AUTO and not (method is None and calibration is None):
        quant_type = "nf4"
    method = method or ("rtn" if calibration is None else CALIBRATED[0])
    if method not in METHODS:
        raise ValueError(
            f"load_model: method is {method!r}: expected {', '.join(map(repr, METHODS))}."
        )
    if calibration is not None and method not in CALIBRATED:
        raise ValueError(
            f"load_model: method {method!r} takes no calibration data: leave calibration out."
        )
    if calibration is None and method in CALIBRATED:
        raise ValueError(
            f"load_model: method {method!r} needs calibration data: give calibration a file or texts."
        )
    if isinstance(skip_modules, str):
        raise ValueError(
            f"load_model: skip_modules is the string {skip_modules!r}: expected a list of module names."
        )
    if residency not in RESIDENCIES:
        raise ValueError(
            f"load_model: residency is {residency!r}: expected {', '.join(map(repr, RESIDENCIES))}."
        )
    rounded = "nf4" if quant_type in (AUTO, KEEP) else quant_type
    options: dict[str, Any] = {
        "quant_type": rounded,
        "block_size": block_size,
        "double_quant": double_quant,
    }
    quantize(torch.zeros(1), **options)  # refuses wrong options before minutes of reading

    sleep_while_busy()
    began = time.monotonic()
    target = torch.get_default_device() if device is None else torch.device(device)
    source = open_source(path)
    meta = MetaModel(source.config, dtype, target)
    is_kept = source.keeps(quant_type)
    made: dict[str, Any] = {"method": KEEP if is_kept else method}
    fell_back: dict[str, str] = {}
    if is_kept and method != "rtn":
        raise UserError(
            f"{source.path} keeps its weights with quant_type {KEEP!r}: method {method!r} is for 'nf4'."
        )
    is_mapped = _can_map(source, is_kept, residency, target, reader is None)
    copied: dict[str, str] = {}  # why, of the tensors that could not be mapped
    names: dict[str, bool] = {}  # of the weights that become 4-bit here
    if not source.has_four_bit_weights and not is_kept:
        names = meta.four_bit_weights(
            (OUTPUT_EMBEDDING,) if skip_modules is None else skip_modules, block_size
        )
    elif method != "rtn":
        raise UserError(
            f"{source.path} is 4-bit already: method {method!r} needs the 16-bit model it was made from."
        )
    if method in CALIBRATED:
        from qlora_native.models.calibrate import calibrated

        folder = None if work_dir is None else Path(work_dir)
        work = source, meta, names, options, method
        made["calibration"], fell_back = calibrated(*work, calibration, folder, progress)
    elif is_kept:  # every process maps the file
        match = source.match_kept(meta, skip_modules or (), is_mapped)
        meta.load(meta.rounded(source, match.rounded, options, entries=match.entries), progress)
    else:
        read = None
        if is_mapped:
            file_map = FileMap(source.read)
            copied, read = file_map.copied, file_map.read
        items = meta.rounded(source, names, options, read=read)
        if reader is None:
            meta.load(items, progress)
        else:
            reader(source, meta, items)
    model = meta.finish()
    if isinstance(source, SafetensorsSource):
        model.generation_config = source.generation_config() or model.generation_config
    model._weight_conversions = without_stacks(
        getattr(model, "_weight_conversions", None) or (), model
    )
    if four_bit_parts(model):
        dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        ours = {**bitsandbytes_config(dtype, options, dense), METADATA: made}
        model.config.quantization_config = source.four_bit_config or ours
        if is_kept:
            model.config.quantization_config = {"quant_method": "gguf", METADATA: made}
        if any(weight.is_gguf for weight in four_bit_parts(model).values()):
            model.save_pretrained = partial(_refuse_saving, source.path)
    else:
        model.config.__dict__.pop("quantization_config", None)
    if fuse:
        fusion.fuse(model)
    from qlora_native.models.decode import decode_by_graphs  # which no reader of a training loop needs

    decode_by_graphs(model)
    trim_heap()
    report = replace(
        make_report(model, source.path), fell_back=fell_back, seconds=time.monotonic() - began
    )
    if is_mapped:
        tensors = chain(model.parameters(), model.buffers())
        bytes_mapped = sum(tensor.nbytes for tensor in tensors if mapped_part(tensor) is not None)
        report = replace(report, bytes_mapped=bytes_mapped, copied=copied)
    model.load_report = report
    return model


def _can_map(
    source: Source, is_kept: bool, residency: str, device: torch.device, is_alone: bool
) -> bool:
    """Whether weights are used where they lie in their files. UserError for "mapped" where that cannot be."""
    needs = {
        "a folder of 4-bit safetensors or a GGUF file whose weights are kept": is_kept
        or source.has_four_bit_weights,
        "one process, since several read such a folder together": is_kept or is_alone,
        "a model on the CPU": device.type == "cpu",
        "Linux": hasattr(_C, "MappedFile"),
    }
    missing = [text for text, has in needs.items() if not has]
    if residency == "mapped" and missing:
        raise UserError(
            f"{source.path} cannot be mapped: residency 'mapped' needs {' and '.join(missing)}."
        )
    return residency != "memory" and not missing


def _refuse_saving(path: Path, *_: Any, **__: Any) -> None:
    raise UserError(
        f"the weights of this model are those of {path}, which it keeps as they are: save the adapter, and load it "
        "over that file; or qlora_native.merge(model) first."
    )


def load_dense(path: str | os.PathLike[str] | Source, **options: Any) -> PreTrainedModel:
    """As :func:`load_model`, with nothing quantized."""
    source = open_source(path)
    if source.has_four_bit_weights:
        raise UserError(
            f"{source.path} holds 4-bit weights: expected the 16-bit model they were made from."
        )
    meta = MetaModel(source.config, torch.bfloat16, torch.device("meta"))
    return load_model(
        source, skip_modules=[name for name, _ in meta.model.named_children()], **options
    )


def make_report(model: PreTrainedModel, path: Path) -> LoadReport:
    four_bit = four_bit_parts(model)
    scales = {id(getattr(weight, name)) for weight in four_bit.values() for name in TENSOR_FIELDS[1:]}
    dense = {name: tensor.nbytes for name, tensor in model.named_parameters() if name not in four_bit}
    config = getattr(model.config, "quantization_config", None) or {}
    metadata = (config if isinstance(config, dict) else config.to_dict()).get(METADATA) or {}
    return LoadReport(
        path=path,
        bytes_4bit=sum(weight.nbytes for weight in four_bit.values()),
        bytes_dense=sum(dense.values())
        + sum(buffer.nbytes for buffer in model.buffers() if id(buffer) not in scales),
        dense=dict(sorted(dense.items(), key=lambda item: -item[1])),
        method=metadata.get("method") if four_bit else None,
        calibration=metadata.get("calibration"),
        kinds=kinds(model, four_bit),
    )
