"""The memory and messages of each of several processes, predicted from a model's shapes.

docs/scaling.md derives the formulas; the tests compare them with counted bytes.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from qlora_native.distributed.sharding import blocks_of, untied_embeddings
from qlora_native.nn.experts import QuantizedExperts
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.weight import QuantizedWeight


class Group(NamedTuple):
    """One rank's part of the parameters that FSDP gathers and frees as one, in bytes; FSDP pads it to the largest."""

    frozen: int  # codes, scales and dense weights
    trained: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of ``world``."""

    world: int
    sharded: bool  # whether the model is sharded over the ranks (fsdp); else each has all of it (ddp)
    frozen: int  # held, of frozen weights, unsharded buffers included
    # Held, of trained parameters; gradients take as much, and optimizer states in proportion.
    trained: int
    # Gathered at most while blocks run: one block, the prefetched one, the message that brings one, and what belongs
    # to no block; and while the input or the output embedding and its message are held.
    gathered_blocks: int
    gathered_input: int
    gathered_output: int
    received: int  # in a step
    sent: int


def rank_memory(
    model: nn.Module, world: int, *, sharded: bool = True, micro_batches: int = 1, reshard: bool = True
) -> RankMemory:
    """The bytes for a model with adapters, on the meta device or any other, as it is before :func:`shard`.

    ``micro_batches`` are those of one rank in a step, ``reshard`` is as :func:`shard`'s, which prefetches one block.
    """
    scales = sum(
        weight.absmax.nbytes for part in model.modules() for weight in _weights(part).values()
    )
    buffers = sum(buffer.nbytes for buffer in model.buffers()) - scales
    others = world - 1
    if not sharded:
        held = _group(model, 1)
        # In a ring every byte passes twice: once to be summed, once with the sum.
        moved = math.ceil(2 * others / world * held.trained)
        return RankMemory(world, False, held.frozen + buffers, held.trained, 0, 0, 0, moved, moved)
    blocks, embeddings = blocks_of(model), untied_embeddings(model)
    apart = [*blocks, *(module for module in embeddings if module is not None)]
    groups = {module: _group(module, world) for module in apart}
    first, last = (0 if module is None else sum(groups[module]) for module in embeddings)
    root = _group(model, world, leave_out={id(p) for module in apart for p in module.parameters()})
    parts = sorted((sum(groups[block]) for block in blocks), reverse=True)
    rest = sum(root)
    # A block is gathered for the forward pass, and again for the backward pass if it was freed in between.
    gathers = sum(parts) * (2 if reshard else 1) + first + last + rest
    trained = sum(group.trained for group in [*groups.values(), root])
    moved = micro_batches * others * (gathers + trained)
    running = sum(parts[:2]) if reshard else sum(parts)
    kept = 0 if reshard else sum(parts)  # blocks that ran
    # A message and what is unpacked from it are held at once: what is gathered last counts twice.
    return RankMemory(
        world=world,
        sharded=True,
        frozen=sum(group.frozen for group in [*groups.values(), root]) + buffers,
        trained=trained,
        gathered_blocks=world * (rest + running + max(parts, default=0)),
        gathered_input=world * (rest + 2 * first),
        gathered_output=world * (rest + 2 * last + kept),
        received=moved,
        sent=moved,
    )


def _group(module: nn.Module, world: int, leave_out: Container[int] = ()) -> Group:
    sizes = [0, 0]
    for parameter, rows, row_bytes in _rows(module):
        if id(parameter) not in leave_out:
            sizes[parameter.requires_grad] += math.ceil(rows / world) * row_bytes
    return Group(*sizes)


def _rows(module: nn.Module) -> Iterator[tuple[Tensor, int, int]]:
    """Each parameter, the number of its rows after ``QuantizedLinear.lay_out_for_sharding``, and bytes of a row."""
    seen: set[int] = set()
    for part in module.modules():
        weights = _weights(part)
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            rows, weight = parameter.shape[0], weights.get(name)
            if weight is not None and weight.absmax.numel():  # a GGUF format has its scales inside
                if weight.numel() % weight.block_size == 0:
                    rows = weight.absmax.numel()
                yield parameter, weight.absmax.numel(), weight.absmax.itemsize
            yield parameter, rows, parameter.nbytes // rows


def _weights(module: nn.Module) -> dict[str, QuantizedWeight]:
    """The 4-bit weights that are parameters of the module itself, by name."""
    if isinstance(module, QuantizedLinear):
        return {"weight": module.quantized}
    if isinstance(module, QuantizedExperts):
        return {name: stack for name in module._stacks if (stack := module.stack(name)) is not None}
    return {}
