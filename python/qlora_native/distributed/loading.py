"""A checkpoint that several processes load together.

Each tensor is read by one rank, quantized there, and sent to the others in its 4 bits: together the ranks read the
files once, and none holds more of the 16-bit model than the tensor at hand. A block that is complete is cut at once,
so a rank holds its part of the model, the blocks that are not complete, and no more. The bytes are those of a load on
one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from qlora_native._memory import trim_heap
from qlora_native.distributed.sharding import blocks_of, lay_out, shard
from qlora_native.errors import UserError
from qlora_native.hf.build import Loader, MetaModel
from qlora_native.hf.fuse import fuse
from qlora_native.hf.load import load_model as load_alone
from qlora_native.hf.source import SafetensorsSource, Source, always
from qlora_native.lora import LoraConfig
from qlora_native.lora.adapter import copy_whole
from qlora_native.lora.config import ALL_LINEAR
from qlora_native.lora.layer import LoRALinear, fill_a, insert, linear_layers, lora_layers, matches, select_targets
from qlora_native.weight import TENSOR_FIELDS, QuantizedWeight


@dataclass
class Reading:
    """What this rank read, kept as ``model.reading``."""

    bytes_read: int = 0  # from the files
    bytes_received: int = 0  # 4-bit weights and dense tensors, sent by other ranks


def load_model(
    path: str | os.PathLike[str],
    *,
    mesh: DeviceMesh | None = None,
    cut: bool = True,
    lora: LoraConfig | None = None,
    reshard_after_forward: bool = True,
    **options: Any,
) -> Any:
    """Load a model on all ranks of the process group together; every rank calls it alike.

    Args:
        path, options: as :func:`qlora_native.load_model`, without calibration. Ranks on several hosts need the same
            files under the same path.
        mesh: as :func:`shard`.
        cut: give every rank its part (FSDP2), as :func:`shard` does; False gives every rank the whole model.
        lora: adapters to add, as :func:`qlora_native.add_lora`; those of a seed are the same for any number of ranks.
        reshard_after_forward: as :func:`shard`.

    Raises:
        UserError, ValueError: as ``qn.load_model``; what one rank finds wrong, all raise.
    """
    if lora is not None and lora.seed is None:
        raise ValueError("load_model: lora has no seed: give it one, so that every rank starts the same adapter.")
    reading = Reading()
    fused = options.pop("fuse", True)

    def finished(model: nn.Module, path: str) -> None:
        block = model.get_submodule(path)
        if not cut or any(buffer.is_meta for buffer in block.buffers()):
            return  # what is not complete now is cut at the end
        if fused:
            fuse(block)
        if lora is not None:
            _adapt(model, path, lora)
        lay_out(block)
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
        arrived: list[Any] = [*block.modules(), *block.parameters()]
        for part in arrived:
            part._is_hf_initialized = True  # keeps transformers' initialization off what replaced the tensors
        trim_heap()

    model: Any = load_alone(
        path, fuse=fused, reader=lambda source, loader: _read_together(source, loader, reading, finished), **options
    )
    if lora is not None:
        _complete_adapters(model, lora)
    model.reading = reading
    return shard(model, mesh, reshard_after_forward=reshard_after_forward) if cut else model


def _adapt(model: nn.Module, prefix: str, config: LoraConfig) -> None:
    """Put adapters into one block; their values are drawn at the end."""
    for path in linear_layers(model):
        named = config.target_modules == ALL_LINEAR or any(matches(path, name) for name in config.target_modules)
        if path.startswith(f"{prefix}.") and named:
            layer: Any = model.get_submodule(path)
            adapted = LoRALinear(layer, config.rank_of(path), config.scale_of(path), config.dropout, torch.Generator())
            model.set_submodule(path, adapted)


def _complete_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Adapters for what has none yet, and in the model's order the values that a load on one process draws."""
    present = {path for path, _ in lora_layers(model)}
    targets = select_targets(model, config.target_modules)
    generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
    insert(
        model,
        {path: (config.rank_of(path), config.scale_of(path)) for path in targets if path not in present},
        config,
        torch.Generator(),
        beside=True,
    )
    layers = dict(lora_layers(model))
    for path in targets:
        layer = layers[path]
        a = torch.empty(layer.lora_A.shape)
        fill_a(a, generator)
        copy_whole(layer.lora_A, a)
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _read_together(
    source: Source, loader: Loader, reading: Reading, finished: Callable[[nn.Module, str], None]
) -> None:
    """Bring every tensor into the tree of every rank."""
    tree, rank = loader.tree, dist.get_rank()
    places = {module: path for path, module in tree.model.named_modules()}
    paths = [places[block] for block in blocks_of(tree.model)]
    missing = {path: {name for name in tree.shapes if name.startswith(f"{path}.")} for path in paths}
    block_of = {name: path for path, names in missing.items() for name in names}

    def arrived(name: str) -> None:
        path = block_of.get(name)
        if path is None:
            return
        missing[path].discard(name)
        if not missing[path]:
            finished(tree.model, path)

    loads = [0] * dist.get_world_size()
    for step, num_bytes in _steps(source, tree):
        owner = loads.index(min(loads))
        loads[owner] += num_bytes
        if owner == rank:
            reading.bytes_read += num_bytes
            _send_step(source, loader, step, arrived)
        else:
            for name in _receive_step(tree, owner, reading):
                arrived(name)
            loader.trim(num_bytes)


def _steps(source: Source, tree: MetaModel) -> Iterator[tuple[str | None, int]]:
    """The names that ``iter_tensors`` can be asked for one at a time, with the bytes in the files; a GGUF file comes
    as a whole."""
    if not isinstance(source, SafetensorsSource):
        yield None, source.path.stat().st_size
        return
    for step in source.plan(tree).steps:
        yield step.name, step.num_bytes


class _SendingTree:
    """The tree as the loader of the rank that reads sees it: what is put there goes to the others first."""

    def __init__(self, tree: MetaModel, arrived: Callable[[str], None]) -> None:
        self._tree, self._arrived = tree, arrived

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tree, name)

    def put(self, name: str, tensor: Tensor, file: str) -> None:
        """As ``MetaModel.put``."""
        tensor = tensor.to(self._tree.device, self._tree.dtype_of(name)).contiguous()
        _send({"name": name, "file": file, "tensors": {"": tensor}})
        self._tree.put(name, tensor, file)
        self._arrived(name)

    def put_quantized(self, name: str, weight: QuantizedWeight, transposed: bool, file: str) -> None:
        """As ``MetaModel.put_quantized``."""
        about = {key: value for key, value in weight.__getstate__().items() if key not in TENSOR_FIELDS}
        tensors = {key: getattr(weight, key).contiguous() for key in TENSOR_FIELDS if getattr(weight, key) is not None}
        _send({"name": name, "file": file, "transposed": transposed, "about": about, "tensors": tensors})
        self._tree.put_quantized(name, weight, transposed, file)
        self._arrived(name)


def _send_step(source: Source, loader: Loader, step: str | None, arrived: Callable[[str], None]) -> None:
    tree = loader.tree
    among = always if step is None else step.__eq__
    try:
        loader.tree = _SendingTree(tree, arrived)  # type: ignore[assignment]
        loader.take_all(source.iter_tensors(tree, always, loader.is_copied, loader.weights.__contains__, among))
    except UserError as error:
        _send({"error": str(error), "tensors": {}})
        raise
    finally:
        loader.tree = tree
    _send({"tensors": {}})


def _send(message: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = message["tensors"]
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    rank = dist.get_rank()
    dist.broadcast_object_list([{**message, "tensors": shapes}], src=rank)
    for tensor in tensors.values():
        if tensor.numel():
            dist.broadcast(tensor, src=rank)


def _receive_step(tree: MetaModel, owner: int, reading: Reading) -> Iterator[str]:
    """Put what ``owner`` sends where it belongs; the name of each tensor that arrived."""
    while True:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=owner)
        message = box[0]
        if "error" in message:
            raise UserError(message["error"])
        if "name" not in message:
            return
        tensors: dict[str, Tensor] = {}
        for key, (shape, dtype) in message["tensors"].items():
            tensors[key] = torch.empty(shape, dtype=dtype, device=tree.device)
            if tensors[key].numel():
                dist.broadcast(tensors[key], src=owner)
            reading.bytes_received += tensors[key].nbytes
        name, file = message["name"], message["file"]
        if "about" in message:
            weight = object.__new__(QuantizedWeight)
            weight.__dict__.update(dict.fromkeys(TENSOR_FIELDS), **message["about"], **tensors)
            tree.put_quantized(name, weight, message["transposed"], file)
        else:
            tree.put(name, tensors[""], file)
        yield name
