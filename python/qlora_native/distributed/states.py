"""The random state of Python, numpy and torch, as it stands in a checkpoint."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qlora_native import reference
from qlora_native.distributed.ranks import Ranks
from qlora_native.ops._library import part_of
from qlora_native.optim.base import is_sharded, shard_like


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every generator: torch's as uint8 tensors ``random.cpu`` and ``random.cuda.N``, the others as JSON
    values."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return tensors, {
        "numpy": [name, np.asarray(words).tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def set_random_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put such a state back; other entries of ``tensors`` are not looked at."""
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if f"random.cuda.{number}" in tensors:
                torch.cuda.set_rng_state(tensors[f"random.cuda.{number}"], number)
    name, words, position, has_gauss, gauss = plain["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = plain["python"]
    random.setstate((version, tuple(internal), gauss_next))


States = dict[int, dict[str, Any]]


def save_sharded_states(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Each rank writes its parts of the states. Every rank calls it.

    Raises OSError if one of them cannot write.
    """
    import torch.distributed.checkpoint as dcp

    states: States = optimizer.state_dict()["state"]
    named = {f"{number}.{name}": value for number, state in states.items() for name, value in state.items()}
    try:
        dcp.save(named, storage_writer=dcp.FileSystemWriter(folder), no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), error) from error


def load_sharded_states(folder: Path, optimizer: torch.optim.Optimizer, ranks: Ranks) -> States:
    """The states that :func:`save_sharded_states` wrote, sharded like the parameters: each rank reads its own."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    params = _parameters(optimizer)
    named: dict[str, Any] = {}
    for key in reader.read_metadata().state_dict_metadata:
        number, _, name = key.partition(".")
        named[key] = torch.zeros(()) if name == "step" else _like(params[int(number)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as is asked for
        dcp.load(named, storage_reader=reader, no_dist=ranks.world == 1)
    states: States = {}
    for key, value in named.items():
        number, _, name = key.partition(".")
        states.setdefault(int(number), {})[name] = value
    return states


def shard_states(states: States, optimizer: torch.optim.Optimizer) -> States:
    """Whole states cut like the optimizer's parameters; as they are where those are whole."""
    from torch.distributed.tensor import distribute_tensor

    cut: States = {}
    for number, (param, state) in enumerate(zip(_parameters(optimizer), states.values(), strict=True)):
        cut[number] = dict(state)
        if not is_sharded(param):
            continue
        cut[number] = {name: value for name, value in state.items() if not name.endswith("_absmax")}
        for name, value in cut[number].items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                absmax = state.get(f"{name}_absmax")
                wide = value if absmax is None else reference.decode_state(value, absmax)
                cut[number][name] = distribute_tensor(
                    wide.to(param.device),
                    param.device_mesh,  # type: ignore[attr-defined]
                    param.placements,  # type: ignore[attr-defined]
                    src_data_rank=None,
                )
    return cut


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _like(param: Tensor) -> Tensor:
    """Zeros in fp32 in the shape of a parameter, cut as it is."""
    part = torch.zeros(part_of(param).shape, device=part_of(param).device)
    return shard_like(param, part) if is_sharded(param) else part


# ---------------------------------------------------------------------------------------------------------------------
# Random states


def random_states(ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As :func:`random_state`, with torch's state of each further rank under ``rank.N.random...``."""
    tensors, plain = random_state()
    if ranks.world > 1:
        everyone: list[Any] = [None] * ranks.world
        dist.all_gather_object(everyone, tensors)
        tensors = dict(everyone[0])
        for rank, of_rank in enumerate(everyone[1:], 1):
            tensors |= {f"rank.{rank}.{name}": tensor for name, tensor in of_rank.items()}
    return tensors, plain


def set_random_states(tensors: Mapping[str, Tensor], plain: Mapping[str, Any], ranks: Ranks) -> None:
    """Put this rank's back; a rank that was not there when they were saved keeps what it has."""
    prefix = f"rank.{ranks.rank}." if ranks.rank else ""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}random")}
    if own:
        set_random_state(own, plain)
