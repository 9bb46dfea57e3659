"""How a run stops and continues: checkpoints that are whole or absent, which of them to resume from, and Ctrl-C.

``step-000200/`` holds the adapter in PEFT's format, ``trainer.safetensors`` (optimizer states and torch's random
state), ``trainer.json`` (step, data position, Python's and numpy's random state, losses so far) and the resolved
``config.yaml``. It is written under a temporary name, fsynced, then renamed. The states of a sharded model lie in
``states/`` instead, written by all processes through torch.distributed.checkpoint; any number of processes, sharded or
not, continues from either.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_native._io import (
    as_write_error,
    atomic_folder,
    check_folder,
    partial_folder,
    read_json,
    reading,
    remove_folder,
    user_path,
)
from qlora_native.distributed import OneProcess
from qlora_native.errors import Brief, UserError
from qlora_native.tool.config import TrainConfig, keys, read_yaml
from qlora_native.tool.sections import NonNegative

TENSORS, STATE, CONFIG, STATES = "trainer.safetensors", "trainer.json", "config.yaml", "states"
BEFORE = "delete that checkpoint, and --resume continues from the one before it"
_NAME = re.compile(r"step-(\d{6,})")

# Keys that stay the same between two halves of a run, with their defaults, for runs whose config does not have the key
# yet. The data have a check of their own: the sampler compares the rows.
_FIXED = {
    key: field.get_default(call_default_factory=True)
    for key, field in keys().items()
    if re.match(r"quant\.|lora\.|train\.(seed|batch_size|grad_accum|dtype|optimizer)$", key)
}

LARGEST_SCALE = 65536.0  # of a loss in float16
SCALE_STEPS = 200  # without an overflow, after which it is doubled


@dataclass
class LossScale:
    """What the loss is multiplied by in float16, in which small gradients would be zero (Micikevicius et al., "Mixed
    precision training", 2018): a power of two, 1 where nothing is scaled, and the number of steps since it changed."""

    value: float = 1.0
    steps: int = 0

    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the gradients by it."""
        for parameter in parameters if self.value != 1 else ():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.value)

    def update(self, loss: float, norm: float) -> bool:
        """Count a step by its loss and its gradient's norm: halve the scale after an overflow, double it after
        SCALE_STEPS without one. Returns whether the gradient is not finite because of the scale: its loss is finite."""
        has_overflowed = self.value != 1 and math.isfinite(loss) and not math.isfinite(norm)
        self.steps += 1
        if has_overflowed:
            self.value /= 2
            self.steps = 0
        elif self.steps >= SCALE_STEPS and 1 < self.value < LARGEST_SCALE and math.isfinite(loss):
            self.value *= 2
            self.steps = 0
        return has_overflowed


@dataclass
class TrainState:
    """The loop's own part of a checkpoint; losses are held-out ones in nats per token, None without held-out rows."""

    step: NonNegative = 0
    tokens: NonNegative = 0
    skipped: NonNegative = 0
    skipped_in_a_row: NonNegative = 0
    loss_before: float | None = None
    loss_after: float | None = None
    best_loss: float | None = None
    best_step: NonNegative | None = None
    since_best: NonNegative = 0  # evaluations
    samples: list[dict[str, str]] = field(default_factory=list)  # the last answers, beside the first
    scale: LossScale = field(default_factory=LossScale)
    data: dict[str, Any] = field(default_factory=dict)  # of the sampler

    def count_evaluation(self, loss: float) -> bool:
        """Count a held-out loss; returns whether training has brought it below every earlier one."""
        is_best = self.best_loss is None or loss < self.best_loss
        self.loss_after = loss
        self.since_best = 0 if is_best else self.since_best + 1
        if is_best:
            self.best_loss = loss
            self.best_step = self.step or None
        if self.step == 0:
            self.loss_before = loss
        return is_best and self.step > 0


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in ``output_dir``, oldest first."""
    found = [
        path
        for path in output_dir.glob("step-*")
        if _NAME.fullmatch(path.name) and (path / STATE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    save_adapter: Callable[[Path], None],  # writes the adapter's files into the folder it is given
    optimizer: torch.optim.Optimizer,
    state: Mapping[
        str, Any
    ],  # JSON values: the step, the data position, whatever the loop needs again
    config: str,
    keep: int,
    ranks: OneProcess,
) -> Path:
    """Write ``step-NNNNNN`` and, once it is safe on disk, delete all but the newest ``keep``. Returns its path. Every
    rank calls it, and ``save_adapter`` is called on every one.

    UserError if it cannot be written: the half-written folder is removed, older checkpoints stay.
    """
    folder = output_dir / f"step-{step:06d}"
    partial = partial_folder(folder)
    before = checkpoints(output_dir)
    advice = f"; {before[-1]} is intact, and --resume continues from it" if before else ""
    own, random_plain = random_state()
    tensors = {
        f"rank.{rank}.{name}" if rank else name: state
        for rank, states in enumerate(ranks.gather(own))
        for name, state in states.items()
    }
    plain: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        with ranks.together(), as_write_error(folder, advice):
            if ranks.is_first:
                stack.enter_context(atomic_folder(folder))
        with ranks.together(), as_write_error(folder, advice):
            save_adapter(partial)
        if ranks.is_sharded:
            from qlora_native.distributed.sharding import save_sharded_states

            with as_write_error(folder, advice):
                save_sharded_states(partial / STATES, optimizer)
        else:
            for number, values in optimizer.state_dict()["state"].items():
                plain[number] = {}
                for name, value in values.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer.{number}.{name}"] = value.detach().cpu().contiguous()
                    else:
                        plain[number][name] = value
        with ranks.together(), as_write_error(folder, advice):
            if ranks.is_first:
                save_file(tensors, partial / TENSORS)  # from where the states lie, without a copy
                content = {**state, "optimizer": plain, "random": random_plain}
                (partial / STATE).write_text(json.dumps(content), encoding="utf-8")
                (partial / CONFIG).write_text(config, encoding="utf-8")
                stack.close()  # gives the folder its name
    if ranks.is_first:
        for old in checkpoints(output_dir)[:-keep]:
            remove_folder(old)
    return folder


def load_checkpoint(
    folder: Path, optimizer: torch.optim.Optimizer, ranks: OneProcess
) -> dict[str, Any]:
    """Restore the optimizer's states, not its hyper-parameters, and the random state; returns ``state`` as it was given
    to save_checkpoint. The number of ranks, and whether the model is sharded over them, may differ."""
    with reading(folder, BEFORE):
        check_folder(folder)
        tensors = load_file(folder / TENSORS)
        state = read_json(folder / STATE, BEFORE)
        states: dict[int, dict[str, Any]] = {
            int(number): values for number, values in state.pop("optimizer").items()
        }
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".", 2)
                states[int(number)][name] = tensor
        if (folder / STATES).is_dir():
            from qlora_native.distributed.sharding import load_sharded_states

            states = load_sharded_states(folder / STATES, optimizer)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        # A rank that did not exist when the checkpoint was made keeps its own state.
        prefix = f"rank.{ranks.rank}." if ranks.rank else ""
        plain = state.pop("random")
        own = {
            key.removeprefix(prefix): tensors[key]
            for key in tensors
            if key.startswith(f"{prefix}random")
        }
        if own:
            set_random_state(own, plain)
    return state


NUMPY_WORDS = 624  # of its generator's state


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every generator: torch's as uint8 tensors ``random.cpu`` and ``random.cuda.N``, Python's and numpy's
    as JSON values."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {
            f"random.cuda.{number}": state
            for number, state in enumerate(torch.cuda.get_rng_state_all())
        }
    name, words, *others = np.random.get_state()
    return tensors, {"numpy": [name, words.tolist(), *others], "python": random.getstate()}  # type: ignore[attr-defined]


def set_random_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Restore the state that :func:`random_state` returned; other entries of ``tensors`` are ignored."""
    torch.set_rng_state(tensors["random.cpu"])
    for number in range(torch.cuda.device_count()):
        if f"random.cuda.{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{number}"], number)
    _, words, position, *_ = plain["numpy"]
    if not 0 <= position <= len(words) == NUMPY_WORDS:  # numpy reads there unchecked
        raise ValueError(
            f"numpy's random state is at {position} of {len(words)} words, expected {NUMPY_WORDS}"
        )
    np.random.set_state(plain["numpy"])
    version, internal, gauss_next = plain["python"]
    random.setstate((version, tuple(internal), gauss_next))


class Checkpoint(NamedTuple):
    """What a run continues from: the folder, and how the weights were quantized that it was trained on."""

    folder: Path
    quant_type: str
    method: str

    def refuse(self, changed: str) -> None:
        """UserError for settings that are not those of the checkpoint, each as ``key old -> new``."""
        raise UserError(
            f"{self.folder} was made with other settings: {changed}; "
            "set them back, or start anew with another --output_dir"
        )


def find_checkpoint(config: TrainConfig, output_dir: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint to continue from, or None to start anew.

    UserError if ``resume`` names something else, if the checkpoint was made with other settings, or if ``resume`` is
    not set although ``output_dir`` holds checkpoints of an earlier run. What the config leaves open, as
    ``quant.type: auto`` does, is not compared.
    """
    found = checkpoints(output_dir)
    if resume is None and found:
        raise UserError(
            f"{output_dir} holds an earlier run ({found[-1].name}); "
            "continue it with --resume, or start anew with another --output_dir"
        )
    if resume is None or (resume == "auto" and not found):
        return None
    folder = found[-1] if resume == "auto" else user_path(resume)
    if not (folder / STATE).is_file():
        near = f"; {found[-1]} is one" if found else ""
        raise UserError(f"resume is {folder}, which is no checkpoint (it has no {STATE}){near}")
    quant = config.quant
    is_open = {
        "quant.save": True,
        "quant.type": quant.type == "auto",
        "quant.method": quant.falls_back,
    }
    changed = []
    now = config.model_dump(mode="json")
    with reading(folder / CONFIG, BEFORE):
        before = read_yaml(folder / CONFIG)[0]
        if Path(before["model"]).name != Path(config.model).name:  # the folder may have moved
            changed.append(f"model {before['model']} -> {config.model}")
        for key, default in _FIXED.items():
            block, name = key.split(".")
            was = before[block].get(name, default)
            if was != now[block][name] and not is_open.get(key):
                changed.append(f"{key} {was} -> {now[block][name]}")
        checkpoint = Checkpoint(folder, before["quant"]["type"], before["quant"]["method"])
    if changed:
        checkpoint.refuse(", ".join(changed))
    return checkpoint


SAME_SIGNAL_SECONDS = 5.0
_HANGUP: int | None = getattr(signal, "SIGHUP", None)  # not on Windows


class StoppedBySignal(Brief, KeyboardInterrupt):
    """Training was stopped by the signal ``number``; ``code`` is what a command exits with."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


class Interrupted(StoppedBySignal):
    """After everything was saved; the message names the checkpoint."""


class StopRequest:
    """The first SIGINT, SIGTERM or SIGHUP sets ``requested`` and ``number``, so that the loop finishes its step and
    saves; a second one raises StoppedBySignal. On several processes one within a few seconds counts as the first: a
    terminal and torchrun both send Ctrl-C."""

    def __init__(self, ranks: OneProcess) -> None:
        self.requested, self._ranks, self._since = False, ranks, 0.0
        self.number: int = signal.SIGINT  # of another process, if this one has none
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if (
            self.requested
            and self._ranks.world > 1
            and time.monotonic() - self._since < SAME_SIGNAL_SECONDS
        ):
            return
        if self.requested:
            raise StoppedBySignal(
                "stopped at once by the second signal; the last checkpoint is intact", number
            )
        self.requested, self.number, self._since = True, number, time.monotonic()
        if number == _HANGUP:
            for descriptor in self._terminals:  # gone: what is printed from now on would be an OSError
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if self._ranks.is_first:
            print(
                "\nfinishing this step and saving; interrupt again to stop at once",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def stop_request(ranks: OneProcess) -> Iterator[StopRequest]:
    """A :class:`StopRequest` that handles signals inside the block; does nothing outside the main thread, where Python
    allows no handlers."""
    stop = StopRequest(ranks)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, _HANGUP):
            if number is None or (number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN):
                continue  # there is none here, or nohup ignores it
            before[number] = signal.signal(number, stop.on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
