"""FSDP2 (``torch.distributed.fsdp.fully_shard``) over 4-bit weights: bytes are sharded, gathered and freed as bytes.

FSDP2 takes frozen parameters of any dtype; its mixed precision casts floating-point ones alone, and parameters of
several dtypes are gathered together, as bytes. So a weight is laid out in rows of one block, its scales beside it in
rows of one scale, and both are sharded at the ends of blocks. The second level of double quantization, 1/256 of the
scales, stays whole on every rank.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from qlora_native.nn.experts import QuantizedExperts
from qlora_native.nn.linear import QuantizedLinear


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    reshard_after_forward: bool | int = True,
    policy: MixedPrecisionPolicy | None = None,
    prefetch: int = 1,
) -> nn.Module:
    """Shard a model over the ranks of a mesh, in place; each block is gathered when it runs and freed afterwards.

    Args:
        model: on the mesh's device or on meta, with its adapters: parameters added later are not sharded.
        mesh: of one dimension, or of two: copies x shards. None is all ranks in one dimension.
        reshard_after_forward: as ``fully_shard``'s, for the blocks. False keeps a block from forward to backward: one
            gather a step less, at the price of the whole 4-bit model.
        policy: mixed precision; reaches what is floating-point, so adapters and dense weights, never codes and scales.
        prefetch: how many blocks ahead are gathered while one runs.

    Returns:
        The model, now an ``FSDPModule`` as well. Gradients are averaged over the ranks.
    """
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    lay_out(model)
    embedding, head = untied_embeddings(model)
    groups = [(block, reshard_after_forward) for block in blocks_of(model)]
    # The loss uses the head after its forward.
    for module, reshard in [*groups, (embedding, True), (head, False)]:
        if module is not None and not isinstance(module, FSDPModule):
            fully_shard(module, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    # Gather the next blocks while one runs, in forward and in backward order.
    blocks: list[Any] = [block for block in blocks_of(model) if isinstance(block, FSDPModule)]
    for at, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[at + 1 : at + 1 + prefetch])
        # With an empty list FSDP takes whatever ran before, for the first block the embedding, in vain.
        block.set_modules_to_backward_prefetch(blocks[max(0, at - prefetch) : at][::-1] or [block])
    return model


def lay_out(module: nn.Module) -> None:
    """Lay out every 4-bit weight in the module, codes and scales, as parameters whose rows are blocks, in place.

    :func:`shard` does it. Call it before the ``fully_shard`` of another library, so that the scales are sharded too.
    """
    for part in module.modules():
        if isinstance(part, (QuantizedLinear, QuantizedExperts)):
            part.lay_out_for_sharding()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that FSDP gathers and frees as one: the members with parameters of the outermost module lists, which
    in a transformer are its layers."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(member for member in child if any(True for _ in member.parameters()))
            else:
                visit(child)

    visit(model)
    return found


def untied_embeddings(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Input and output embedding, each if it shares no weight with another module."""

    def alone(getter: str) -> nn.Module | None:
        module: nn.Module | None = getattr(model, getter, lambda: None)()
        if module is None or module is model:
            return None
        own, inside = {id(parameter) for parameter in module.parameters()}, set(module.modules())
        elsewhere = {
            id(p)
            for part in model.modules()
            if part not in inside
            for p in part.parameters(recurse=False)
        }
        return None if own & elsewhere else module

    return alone("get_input_embeddings"), alone("get_output_embeddings")


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer states in a checkpoint


States = dict[int, dict[str, Any]]  # by the number of the parameter, as in an optimizer's state_dict


def save_sharded_states(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Each rank writes its parts of the states; every rank calls it. OSError if one of them cannot write."""
    states: States = optimizer.state_dict()["state"]
    named = {
        f"{number}.{name}": value for number, state in states.items() for name, value in state.items()
    }
    with _causes():
        dcp.save(named, storage_writer=dcp.FileSystemWriter(folder))


@contextmanager
def _causes() -> Iterator[None]:
    """Raise in place of a CheckpointException, which is a BaseException, the cause on one of the ranks."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error


# What the metadata of a checkpoint consist of, beside torch's dtypes. A pickle can name any function, and calls it.
_METADATA = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    **dict.fromkeys(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(
            f".metadata names {module}.{name}, which is no part of a checkpoint's metadata"
        )


class _Reader(dcp.FileSystemReader):
    """torch's, which unpickles whatever the metadata name, and entries that are no tensors too."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f".metadata has {key} as a {type(entry).__name__}, expected a tensor")
        for place in metadata.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(
                    f".metadata names the file {place.relative_path!r}, expected one beside it"
                )
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def load_sharded_states(folder: Path, optimizer: torch.optim.Optimizer) -> States:
    """The states that :func:`save_sharded_states` wrote, sharded like the parameters: each rank reads its own."""
    reader = _Reader(folder)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    named: dict[str, Any] = {}
    for key in reader.read_metadata().state_dict_metadata:
        number, _, name = key.partition(".")
        named[key] = (
            torch.zeros(())
            if name == "step"
            else torch.zeros_like(params[int(number)], dtype=torch.float32)
        )
    with warnings.catch_warnings(), _causes():
        # One process does so as intended.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(named, storage_reader=reader, no_dist=not dist.is_initialized())
    states: States = {}
    for key, value in named.items():
        number, _, name = key.partition(".")
        states.setdefault(int(number), {})[name] = value
    return states
