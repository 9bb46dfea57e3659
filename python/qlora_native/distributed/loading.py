"""A checkpoint that several processes load together.

One rank reads each tensor, quantizes it and sends it to the others in its 4 bits: together the ranks read the files
once, and none holds more of the 16-bit model than one tensor. A complete block is sharded at once, so a rank holds its
part of the model and the incomplete blocks. The bytes are those of a load on one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from qlora_native._memory import trim_heap
from qlora_native.distributed.sharding import blocks_of, lay_out, shard
from qlora_native.errors import UserError
from qlora_native.lora import LoraConfig
from qlora_native.lora.adapter import copy_into
from qlora_native.lora.layer import LoRALinear, fill_a, lora_layers
from qlora_native.lora.model import insert
from qlora_native.lora.targets import select_targets
from qlora_native.models.build import MetaModel
from qlora_native.models.fuse import fuse
from qlora_native.models.load import load_model as load_alone
from qlora_native.weight import QuantizedWeight
from qlora_native.weights.open import SafetensorsSource, open_source
from qlora_native.weights.stream import AUTO, Item, Source, Value


@dataclass
class Reading:
    """Bytes that this rank read and received, kept as ``model.reading``."""

    bytes_read: int = 0  # from the files
    bytes_received: int = 0  # 4-bit weights and dense tensors, sent by other ranks


def load_model(
    path: str | os.PathLike[str] | Source,
    *,
    mesh: DeviceMesh | None = None,
    sharded: bool = True,
    lora: LoraConfig | None = None,
    reshard_after_forward: bool = True,
    **options: Any,
) -> Any:
    """Load a model on all ranks of the process group together; every rank calls it alike.

    Args:
        path, options: as :func:`qlora_native.load_model`, without calibration. Ranks on several hosts need the same
            files under the same path.
        mesh: as :func:`shard`.
        sharded: give every rank its part (FSDP2), as :func:`shard` does; False gives every rank the whole model.
        lora: adapters to add, as :func:`qlora_native.add_lora`; those of a seed are the same for any number of ranks.
        reshard_after_forward: as :func:`shard`.

    Raises:
        UserError: as ``qn.load_model``; an error of one rank is raised by all.
        ValueError: likewise.
    """
    if lora is not None and lora.seed is None:
        raise ValueError(
            "load_model: lora has no seed: give it one, so that every rank starts the same adapter."
        )
    if sharded and lora is not None and (lora.modules_to_save or lora.trainable_tokens):
        trained = "modules_to_save" if lora.modules_to_save else "trainable_tokens"
        raise ValueError(
            f"load_model: lora has {trained}, which are not sharded: expected sharded=False, or none."
        )
    reading, fused = Reading(), options.pop("fuse", True)
    if sharded and (source := open_source(path)).keeps(options.get("quant_type", AUTO)):
        raise UserError(
            f"{source.path} is GGUF, whose weights cannot be sharded as they are: load it with quant_type 'nf4', or "
            "whole on every rank (parallel: ddp)."
        )

    def finished(model: nn.Module, path: str) -> None:
        block = model.get_submodule(path)
        if not sharded or any(buffer.is_meta for buffer in block.buffers()):
            return  # an incomplete block is sharded at the end
        if fused:
            fuse(block)
        if lora is not None:
            _adapt(model, path, lora)
        lay_out(block)
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
        parts: list[Any] = [*block.modules(), *block.parameters()]
        for part in parts:
            # Keeps transformers' initialization off what replaced the tensors.
            part._is_hf_initialized = True
        trim_heap()

    def read(source: Source, meta: MetaModel, items: Iterable[Item]) -> None:
        _read_together(source, meta, items, reading, finished)

    model: Any = load_alone(path, fuse=fused, reader=read, **options)
    if lora is not None:
        _complete_adapters(model, lora)
    model.reading = reading
    return shard(model, mesh, reshard_after_forward=reshard_after_forward) if sharded else model


def _adapt(model: nn.Module, prefix: str, config: LoraConfig) -> None:
    """Put adapters into one block; their values are drawn at the end."""
    for path in select_targets(model, config):
        if path.startswith(f"{prefix}."):
            layer: Any = model.get_submodule(path)
            adapted = LoRALinear(
                layer, config.rank_of(path), config.scale_of(path), config.dropout, torch.Generator()
            )
            model.set_submodule(path, adapted)


def _complete_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Adapters for what has none yet, and in the model's order the values that a load on one process draws."""
    present = {path for path, _ in lora_layers(model)}
    targets = select_targets(model, config)
    generator = torch.Generator().manual_seed(config.seed or 0)  # load_model requires a seed
    others = {
        path: (config.rank_of(path), config.scale_of(path)) for path in targets if path not in present
    }
    insert(model, others, config, torch.Generator(), beside=True)
    layers = dict(lora_layers(model))
    for path in targets:
        layer = layers[path]
        a = torch.empty(layer.lora_A.shape)
        fill_a(a, generator)
        copy_into(layer.lora_A, a)
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)


def _read_together(
    source: Source,
    meta: MetaModel,
    items: Iterable[Item],
    reading: Reading,
    finished: Callable[[nn.Module, str], None],
) -> None:
    rank = dist.get_rank()
    places = {module: path for path, module in meta.model.named_modules()}
    paths = [places[block] for block in blocks_of(meta.model)]
    missing = {path: {name for name in meta.shapes if name.startswith(f"{path}.")} for path in paths}
    block_of = {name: path for path, names in missing.items() for name in names}

    def stored(name: str) -> None:
        if name in block_of:
            path = block_of[name]
            missing[path].discard(name)
            if not missing[path]:
                finished(meta.model, path)

    groups: Iterable[tuple[Iterable[Item], int]] = [(items, source.path.stat().st_size)]
    # Only the rank that reads a GGUF file looks into it.
    if isinstance(source, SafetensorsSource):
        groups = [([item], item.entry.num_bytes) for item in items]
    loads = [0] * dist.get_world_size()
    for group, num_bytes in groups:
        owner = loads.index(min(loads))
        loads[owner] += num_bytes
        if owner == rank:
            reading.bytes_read += num_bytes
            _send_tensors(meta, group, stored)
        else:
            for name in _receive_tensors(meta, owner, reading):
                stored(name)
        meta.trim(num_bytes)


def _send_tensors(meta: MetaModel, items: Iterable[Item], stored: Callable[[str], None]) -> None:
    """Read the items, and store each tensor once the other ranks have it."""
    rank = dist.get_rank()
    try:
        for item in items:
            file = item.entry.file
            for name, value in meta.values(item):
                sent = _of_each(value, Tensor.contiguous)
                dist.broadcast_object_list(
                    [(name, file, _of_each(sent, lambda tensor: tensor.to("meta")))], src=rank
                )
                _of_each(sent, partial(_broadcast, src=rank))
                meta.store(name, value, file)
                stored(name)
    except UserError as error:
        dist.broadcast_object_list([error], src=rank)
        raise
    dist.broadcast_object_list([None], src=rank)


def _receive_tensors(meta: MetaModel, owner: int, reading: Reading) -> Iterator[str]:
    """Store what ``owner`` sends; yields the name of each tensor."""

    def receive(like: Tensor) -> Tensor:
        reading.bytes_received += like.nbytes
        return _broadcast(torch.empty_like(like, device=meta.device), src=owner)

    while True:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=owner)
        if box[0] is None:
            return
        if isinstance(box[0], UserError):
            raise UserError(str(box[0]))
        name, file, shell = box[0]
        meta.store(name, _of_each(shell, receive), file)
        yield name


def _broadcast(tensor: Tensor, src: int) -> Tensor:
    if tensor.numel():
        dist.broadcast(tensor, src=src)
    return tensor


def _of_each(value: Value, function: Callable[[Tensor], Tensor]) -> Value:
    """What ``function`` makes of each tensor of a value."""
    return value.map(function) if isinstance(value, QuantizedWeight) else function(value)
