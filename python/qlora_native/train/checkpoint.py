"""Checkpoints that are whole or absent: written under a temporary name, every file and folder fsynced, then renamed.

``step-000200/`` holds the adapter in PEFT's format, ``trainer.safetensors`` (optimizer states and torch's random
state), ``trainer.json`` (step, data position, Python's and numpy's random state, losses so far) and the resolved
``config.yaml``. Where the model is cut over processes, the states lie in ``states/`` instead, written by all of them
through torch.distributed.checkpoint; any number of processes, cut or not, continues from either. The learning rate is
a function of the step, so a scheduler has no state of its own. The newest checkpoint is found by looking at the
folder's names; no pointer file exists that could point at something gone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_native._io import as_write_error, atomic_folder, partial_folder, reason, remove_folder
from qlora_native.distributed.ranks import Ranks
from qlora_native.distributed.states import (
    load_sharded_states,
    random_states,
    save_sharded_states,
    set_random_states,
    shard_states,
)
from qlora_native.errors import UserError

TENSORS, STATE, CONFIG, STATES = "trainer.safetensors", "trainer.json", "config.yaml", "states"
_NAME = re.compile(r"step-(\d{6,})")


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in ``output_dir``, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    save_adapter: Callable[[Path], None],  # writes the adapter's files into the folder it is given
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],  # JSON values: the step, the data position, whatever the loop wants back
    config: str,
    keep: int,
    ranks: Ranks | None = None,
) -> Path:
    """Write ``step-NNNNNN`` and, once it is safe on disk, delete all but the newest ``keep``. Returns its path.

    Every rank calls it, and ``save_adapter`` is called on every one.

    UserError if it cannot be written (a full disk, no permission): the half-written folder is removed, older
    checkpoints stay.
    """
    ranks = ranks or Ranks()
    folder = output_dir / f"step-{step:06d}"
    before = checkpoints(output_dir)
    advice = f"; {before[-1]} is intact, and --resume continues from it" if before else ""
    random_tensors, random_plain = random_states(ranks)
    with as_write_error(folder, advice), ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(atomic_folder(folder)))
        partial = partial_folder(folder)
        ranks.together(lambda: save_adapter(partial))
        tensors: dict[str, Tensor] = {}
        plain: dict[str, dict[str, Any]] = {}
        if ranks.is_sharded:
            save_sharded_states(partial / STATES, optimizer)
        else:
            tensors, plain = _split(optimizer.state_dict()["state"])

        def write() -> None:
            save_file({**tensors, **random_tensors}, partial / TENSORS)  # from where the states lie, without a copy
            (partial / STATE).write_text(
                json.dumps({**state, "optimizer": plain, "random": random_plain}), encoding="utf-8"
            )
            (partial / CONFIG).write_text(config, encoding="utf-8")
            stack.close()  # now it has its name

        ranks.on_first(write)
    if ranks.first:
        for old in checkpoints(output_dir)[:-keep]:
            remove_folder(old)
    return folder


def load_checkpoint(folder: Path, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None) -> dict[str, Any]:
    """Put back optimizer and random state; returns ``state`` as it was given to save_checkpoint. The adapter is the
    caller's to load.

    Hyper-parameters stay those of ``optimizer``: only what it learned is taken from the checkpoint. The number of
    ranks, and whether the model is cut over them, may differ from those that saved it.
    """
    ranks = ranks or Ranks()
    try:
        tensors = load_file(folder / TENSORS)
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        plain = state.pop("optimizer")
        if (folder / STATES).is_dir():
            optimizer_state = load_sharded_states(folder / STATES, optimizer, ranks)
        else:
            optimizer_state = shard_states(_join(tensors, plain), optimizer)
        restored = {**optimizer.state_dict(), "state": optimizer_state}
        optimizer.load_state_dict(restored)
        set_random_states(tensors, state.pop("random"), ranks)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({reason(error)}); "
            "delete that folder, and --resume continues from the one before it"
        ) from error
    return state


def _split(states: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors under ``optimizer.<parameter>.<name>`` and the rest, which must be JSON, under the same numbers and
    names."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for number, values in states.items():
        plain[str(number)] = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{name}"] = value.detach().cpu().contiguous()
    return tensors, plain


def _join(tensors: Mapping[str, Tensor], plain: Mapping[str, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    states: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in plain.items()}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            states[int(number)][name] = tensor
    return states
