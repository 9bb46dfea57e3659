"""Run the decoder layers of a causal LM one by one: their arguments, the hidden states between two of them, and the
folder of those that an interrupted run has finished.

The arguments of a layer (rotary tables, masks) are not rebuilt here: the model's own forward runs once for each
sequence, with its layers replaced by stubs that return their hidden states and record the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_native._io import as_write_error, atomic_file, fsync, write_whole
from qlora_native.errors import UserError
from qlora_native.weight import QuantizedWeight, from_bnb, to_bnb

MOST_IN_MEMORY = 1 << 28  # bytes of hidden states
LAYER_FORMAT = 2  # of the files of finished layers; earlier ones have no number

_PLAIN = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a layer beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str  # of the hidden states, or "" if they are the first argument

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output [1, length, H] for those hidden states."""
        first, named = ((), {self.keyword: hidden}) if self.keyword else ((hidden,), {})
        out = layer(*first, *self.args, **named, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of the model's decoder layers and its path. UserError if there is no such list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for path, module in model.named_modules():  # outer ones first
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise _unlike(model, f"it has no list of {count} decoder layers")


class _Stop(Exception):
    """The last stub has been called."""


class _StubOutput(Tensor):
    """Hidden states that can also be indexed and unpacked as the tuple that some layers return."""

    def __getitem__(self, index: Any) -> Any:
        return self if index == 0 else super().__getitem__(index)

    def __iter__(self) -> Any:
        return iter((self,))


class LayerCalls:
    """The arguments of each layer of a model, which must be the same for every sequence."""

    def __init__(self, model: Any, layers: nn.ModuleList) -> None:
        self._model = model
        self._layers = layers
        self._calls: list[LayerCall] = []

    def __getitem__(self, index: int) -> LayerCall:
        return self._calls[index]

    @torch.no_grad()
    def first_input(self, ids: Tensor) -> Tensor:
        """The first layer's hidden states [1, length, H] for ids [1, length].

        Raises UserError if the layers do not simply follow one another, or their arguments depend on the tokens.
        """
        calls: list[LayerCall] = []
        entered: list[Tensor] = []
        with _stubs(self._model, self._layers, calls, entered), suppress(_Stop):
            self._model(input_ids=ids, use_cache=False)
        if len(calls) != len(self._layers):
            raise _unlike(self._model, f"{len(calls)} of its {len(self._layers)} layers are called")
        if not self._calls:
            self._calls = calls
        elif not all(map(_same, map(vars, self._calls), map(vars, calls))):
            raise _unlike(self._model, "what its layers are given depends on the tokens")
        return entered[0]


@contextmanager
def _stubs(
    model: Any, layers: nn.ModuleList, calls: list[LayerCall], entered: list[Tensor]
) -> Iterator[None]:
    def stub(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            name = "" if args else next(iter(kwargs))
            hidden = args[0] if args else kwargs.pop(name)
            if index != len(calls):
                raise _unlike(model, f"layer {index} is called after {len(calls)} others")
            if entered and hidden.data_ptr() != entered[-1].data_ptr():
                raise _unlike(model, f"something is done to the hidden states before layer {index}")
            for key, value in [*enumerate(args[1:], 1), *kwargs.items()]:
                if not _is_plain(value):
                    raise _unlike(model, f"layer {index} is given {key}, a {type(value).__name__}")
            calls.append(LayerCall(args[1:], kwargs, name))
            entered.append(hidden.as_subclass(Tensor))
            if len(calls) == len(layers):
                raise _Stop
            return hidden.as_subclass(_StubOutput)

        return forward

    for index, layer in enumerate(layers):
        layer.forward = stub(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_plain(value: Any) -> bool:
    """Whether the value can be passed again: tensors and constants, but no cache that layers write to."""
    return (
        all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, _PLAIN)
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return bool(one == other)


def _unlike(model: Any, what: str) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be calibrated layer by layer: {what}; load it with method 'rtn', "
        "which needs no data."
    )


# ---- between two layers


class HiddenStates:
    """Tensors [1, length, H], one a sequence: the inputs of the current layer, and those of the next.

    They lie in files of ``folder``, or in memory if it is None, where a layer's output replaces its input.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path | None) -> None:
        self.shape = shape  # [rows, length, H]
        self.dtype = dtype
        self.folder = folder
        self.layer = 0  # the current one
        self._memory = torch.empty(shape, dtype=dtype) if folder is None else None

    def read(self, row: int) -> Tensor:
        """The input of the current layer, in memory of its own."""
        if self._memory is not None:
            return self._memory[row : row + 1].clone()
        raw = torch.empty(1, *self.shape[1:], dtype=self.dtype)
        with hidden_file(self.folder, self.layer).open("rb") as file:
            file.seek(row * raw.nbytes)
            if file.readinto(_bytes(raw)) != raw.nbytes:
                raise OSError(f"{file.name} ends before row {row}")
        return raw

    def begin(self, layer: int) -> None:
        """Make room for the input of ``layer``: the current one, or the next."""
        if self.folder is not None:
            path = hidden_file(self.folder, layer)
            with as_write_error(path), path.open("wb") as file:
                file.truncate(torch.Size(self.shape).numel() * self.dtype.itemsize)

    def write(self, row: int, value: Tensor, layer: int) -> None:
        """Store the input of ``layer`` for one sequence."""
        value = value.detach().to("cpu", self.dtype).contiguous()
        if self._memory is not None:
            self._memory[row : row + 1] = value
            return
        path = hidden_file(self.folder, layer)
        with as_write_error(path), path.open("r+b") as file:
            file.seek(row * value.nbytes)
            file.write(_bytes(value))

    def sync(self, layer: int) -> None:
        """Wait until the input of ``layer`` is on the disk."""
        if self.folder is not None:
            path = hidden_file(self.folder, layer)
            with as_write_error(path):
                fsync(path)

    def advance(self) -> None:
        """Go on to the next layer and delete the input of this one."""
        if self.folder is not None:
            hidden_file(self.folder, self.layer).unlink()
        self.layer += 1


def hidden_file(folder: Path | None, layer: int) -> Path:
    """The file of the input of ``layer``."""
    assert folder is not None
    return folder / f"hidden-{layer:04}.bin"


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy().data


# ---- an interrupted run


class FinishedLayers:
    """A folder from which an interrupted run goes on: a file a layer, in bitsandbytes' format, and ``run.json``.

    ``run`` is everything that determines the bytes, as JSON values. The files of another run, or of another format, are
    deleted; ``changed`` then names the settings that differ.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self.folder = folder
        self.changed = []
        run = json.loads(json.dumps({**run, "format": LAYER_FORMAT}))
        earlier = {}
        with suppress(OSError, ValueError):
            earlier = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if earlier != run:
            if earlier:
                self.changed = sorted(
                    name for name in {*run, *earlier} if run.get(name) != earlier.get(name)
                )
            shutil.rmtree(folder, ignore_errors=True)
            with as_write_error(folder / "run.json"):
                write_whole(folder / "run.json", json.dumps(run, indent=2))
        self.count = 0
        while self._file(self.count).is_file():
            self.count += 1
        if not hidden_file(folder, self.count).is_file():
            self.count = 0
        for path in folder.glob("hidden-*"):
            # A killed run leaves the file of the next layer half written.
            if path != hidden_file(folder, self.count):
                path.unlink()

    def load(self, index: int) -> tuple[dict[str, QuantizedWeight], dict[str, str]]:
        """The 4-bit weights of a layer by name, and those that fell back."""
        with safe_open(self._file(index), framework="pt") as file:
            layer = json.loads(file.metadata()["layer"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: from_bnb(tensors, name) for name in layer["names"]}, layer["fell_back"]

    def save(self, index: int, weights: dict[str, QuantizedWeight], fell_back: dict[str, str]) -> None:
        """Write a layer to the disk, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            tensors |= {key: tensor.cpu().contiguous() for key, tensor in to_bnb(weight, name).items()}
        with as_write_error(self._file(index)), atomic_file(self._file(index)) as path:
            save_file(
                tensors, path, {"layer": json.dumps({"names": list(weights), "fell_back": fell_back})}
            )

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:04}.safetensors"
