"""What a model costs each of several processes, from its shapes: bytes held, gathered and sent, before any of it is
there. docs/scaling.md derives the formulas; the tests hold them against bytes that were counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qlora_native.distributed.sharding import blocks_of, untied_embeddings
from qlora_native.nn.experts import QuantizedExperts
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.weight import QuantizedWeight


@dataclass(frozen=True)
class Group:
    """What is gathered and let go as one, in bytes of one rank; FSDP fills every part up to the largest one's size.

    Attributes:
        frozen: its part of codes, scales and dense weights. trained: its part of the parameters that are trained.
    """

    frozen: int
    trained: int

    @property
    def part(self) -> int:
        """Bytes that one rank holds and sends to each other one."""
        return self.frozen + self.trained


@dataclass(frozen=True)
class RankPlan:
    """One rank of ``world``.

    Attributes:
        world: ranks. cut: the model is cut over them (fsdp); else each has all of it (ddp).
        frozen: bytes of frozen weights that the rank holds, whole buffers included.
        trained: bytes of trained parameters that it holds; gradients take as much, and optimizer states in proportion.
        gathered_blocks: the most bytes of gathered weights while blocks run: one block, those that are on their way,
            the message that brings one, and what belongs to no block.
        gathered_input: the same while the input embedding and its message are there; gathered_output, the output's.
        received: bytes that it receives in a step. sent: bytes that it sends.
    """

    world: int
    cut: bool
    frozen: int
    trained: int
    gathered_blocks: int
    gathered_input: int
    gathered_output: int
    received: int
    sent: int

    def seconds(self, bytes_per_second: float) -> float:
        """What a step's messages take on a link of so many bytes a second each way, if nothing else hides them."""
        return max(self.received, self.sent) / bytes_per_second


def plan_rank(
    model: nn.Module, world: int, *, cut: bool = True, micro_batches: int = 1, reshard: bool = True, prefetch: int = 1
) -> RankPlan:
    """The plan for a model with adapters, on the meta device or any other, as it is before :func:`shard`.

    ``micro_batches`` are those of one rank in a step; ``reshard`` and ``prefetch`` as :func:`shard`'s.
    """
    scales = sum(weight.absmax.nbytes for part in model.modules() for weight in _weights(part).values())
    buffers = sum(buffer.nbytes for buffer in model.buffers()) - scales
    others = world - 1
    if not cut:
        whole = _group(model, 1)
        # In a ring every byte passes twice: once to be summed, once with the sum.
        moved = math.ceil(2 * others / world * whole.trained)
        return RankPlan(world, False, whole.frozen + buffers, whole.trained, 0, 0, 0, moved, moved)
    embeddings = untied_embeddings(model)
    apart = [*blocks_of(model), *(module for module in embeddings if module is not None)]
    groups = {module: _group(module, world) for module in apart}
    blocks = [groups[block] for block in blocks_of(model)]
    first, last = (0 if module is None else groups[module].part for module in embeddings)
    root = _group(model, world, leave_out={id(p) for module in apart for p in module.parameters()})
    # A block is gathered for the forward pass, and again for the backward pass if it was let go in between.
    gathers = sum(block.part for block in blocks) * (2 if reshard else 1) + first + last + root.part
    every = [*groups.values(), root]
    sums = sum(group.trained for group in every)
    moved = micro_batches * others * (gathers + sums)
    parts = sorted((block.part for block in blocks), reverse=True)
    running = sum(parts[: 1 + prefetch]) if reshard else sum(parts)
    # While a message is there, so is what is unpacked from it: what is gathered last counts twice.
    one = max(parts, default=0)
    kept = 0 if reshard else sum(parts)  # blocks that ran
    return RankPlan(
        world=world,
        cut=True,
        frozen=sum(group.frozen for group in every) + buffers,
        trained=sums,
        gathered_blocks=world * (root.part + running + one),
        gathered_input=world * (root.part + 2 * first),
        gathered_output=world * (root.part + 2 * last + kept),
        received=moved,
        sent=moved,
    )


def _group(module: nn.Module, world: int, leave_out: set[int] | None = None) -> Group:
    frozen = trained = 0
    for parameter, rows, row_bytes in _rows(module):
        if leave_out is None or id(parameter) not in leave_out:
            part = math.ceil(rows / world) * row_bytes
            frozen, trained = (frozen, trained + part) if parameter.requires_grad else (frozen + part, trained)
    return Group(frozen, trained)


def _rows(module: nn.Module) -> Iterator[tuple[Tensor, int, int]]:
    """Each parameter with the rows that it is cut into, as ``QuantizedLinear.lay_out_for_sharding`` has them, and
    bytes of a row."""
    seen: set[int] = set()
    for part in module.modules():
        weights = _weights(part)
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            rows, weight = parameter.shape[0], weights.get(name)
            if weight is not None:
                if weight.numel() % weight.block_size == 0:
                    rows = weight.absmax.numel()
                yield parameter, weight.absmax.numel(), weight.absmax.itemsize
            yield parameter, rows, parameter.nbytes // rows


def _weights(module: nn.Module) -> dict[str, QuantizedWeight]:
    """The 4-bit weights that are parameters of the module itself, by name."""
    if isinstance(module, QuantizedLinear):
        return {"weight": module.quantized}
    names = module._stacks if isinstance(module, QuantizedExperts) else ()
    return {name: stack for name in names if (stack := module.stack(name)) is not None}  # type: ignore[operator]
