"""FSDP2 (``torch.distributed.fsdp.fully_shard``) over 4-bit weights: bytes are cut, gathered and let go as bytes.

FSDP2 takes frozen parameters of any dtype; its mixed precision casts floating-point ones alone, and parameters of
several dtypes are gathered together, as bytes. So a weight needs no disguise: it is laid out in rows of one block, its
scales beside it in rows of one scale, and both are cut where blocks end. What is 1/256 of the scales (the second level
of double quantization) stays whole on every rank.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from qlora_native.nn.experts import QuantizedExperts
from qlora_native.nn.linear import QuantizedLinear


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    reshard_after_forward: bool | int = True,
    policy: MixedPrecisionPolicy | None = None,
    offload: OffloadPolicy | None = None,
    prefetch: int = 1,
) -> nn.Module:
    """Cut a model over the ranks of a mesh, in place; each block is gathered when it runs and let go afterwards.

    Args:
        model: on the mesh's device or on meta, with its adapters: parameters added later are not cut.
        mesh: of one dimension, or of two: copies x shards. None is all ranks in one dimension.
        reshard_after_forward: as ``fully_shard``'s, for the blocks. False keeps a block from forward to backward: one
            gather a step less, at the price of the whole 4-bit model.
        policy: mixed precision; reaches what is floating-point, so adapters and dense weights, never codes and scales.
        offload: as ``fully_shard``'s.
        prefetch: how many blocks ahead are gathered while one runs.

    Returns:
        The model, now an ``FSDPModule`` as well. Gradients are averaged over the ranks.
    """
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    if offload is not None:
        options["offload_policy"] = offload
    lay_out(model)
    for block in blocks_of(model):
        if not isinstance(block, FSDPModule):
            fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    embedding, head = untied_embeddings(model)
    if embedding is not None and not isinstance(embedding, FSDPModule):
        fully_shard(embedding, reshard_after_forward=True, **options)
    if head is not None and not isinstance(head, FSDPModule):
        fully_shard(head, reshard_after_forward=False, **options)  # the loss multiplies by it after its forward
    fully_shard(model, reshard_after_forward=False, **options)
    set_prefetch(model, prefetch)
    return model


def lay_out(module: nn.Module) -> None:
    """Make every 4-bit weight in the module, codes and scales, parameters that are cut at blocks, in place.

    :func:`shard` does it; before another program's ``fully_shard``, as accelerate's, it has the scales cut too.
    """
    for part in module.modules():
        if isinstance(part, (QuantizedLinear, QuantizedExperts)):
            part.lay_out_for_sharding()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered and let go as one: the members of the outermost lists of modules with parameters, which in a
    transformer are its layers."""
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
    """Input and output embedding, each if it shares no weight with another module: they are large, and are needed at
    different times."""
    return _alone(model, "get_input_embeddings"), _alone(model, "get_output_embeddings")


def _alone(model: nn.Module, getter: str) -> nn.Module | None:
    find = getattr(model, getter, None)
    module: nn.Module | None = find() if callable(find) else None
    if module is None or module is model:
        return None
    own = {id(parameter) for parameter in module.parameters()}
    inside = set(module.modules())
    elsewhere = {id(p) for part in model.modules() if part not in inside for p in part.parameters(recurse=False)}
    return None if own & elsewhere else module


def set_prefetch(model: nn.Module, ahead: int) -> None:
    """Gather the next ``ahead`` blocks while one runs, in forward and in backward order."""
    blocks = [block for block in blocks_of(model) if isinstance(block, FSDPModule)]
    for at, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[at + 1 : at + 1 + ahead])  # type: ignore[arg-type]
        # With an empty list FSDP takes whatever ran before, for the first block the embedding, in vain.
        before = blocks[max(0, at - ahead) : at][::-1] or [block]
        block.set_modules_to_backward_prefetch(before)  # type: ignore[arg-type]
