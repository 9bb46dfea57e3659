"""Statistics of the inputs of weights: sums over tokens, gathered while a decoder layer runs.

Sums are taken sequence by sequence in a fixed order, and each partial product by one thread, so that the same bytes
come out whatever the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from qlora_native.errors import UserError
from qlora_native.functional import dense_linear
from qlora_native.nn.experts import STACKS, by_expert

Key = tuple[str, int | None]  # the parameter's name, and the expert for a stack
Inputs = dict[Key, list[Tensor]]  # [..., K] each, in the order of the calls

# Weight of the first token of a sequence in the moments alone. Every later token attends to it, and a few channels have
# values there that no other token has: left out, SmolLM2-135M loses 0.23 nats more, counted once 0.003 more, 16 times
# 0.002 more (on text that was not calibrated on).
FIRST_TOKEN = 4.0
_TILE = 256  # columns of a block of x^T x that one thread computes


class Statistic:
    """Sums over the tokens of one input x [K] of ``sharers`` weights: of x^2, and of x x^T if ``full``."""

    def __init__(self, channels: int, full: bool, sharers: int, device: torch.device) -> None:
        self.sharers = sharers
        self.tokens = 0
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self.products = torch.zeros(channels, channels, device=device) if full else None

    @property
    def moment(self) -> Tensor:
        """Mean of x^2, fp32 [K]."""
        return (self.squares / max(self.tokens, 1)).float()

    def hessian(self) -> Tensor | None:
        """Mean of x x^T, fp32 [K, K], in place of the sums; None unless they were taken."""
        if self.products is None:
            return None
        size = len(self.squares)
        for start, stop in tiles(size):
            self.products[stop:, start:stop] = self.products[start:stop, stop:].t()
        return self.products.div_(max(self.tokens, 1))

    def add_squares(self, inputs: Sequence[Tensor], length: int | None) -> None:
        """Add the squares of each x [tokens, K]; the first token of ``length`` counts :data:`FIRST_TOKEN` times."""
        for x in inputs:
            self.tokens += len(x)
            squares = x.float().square()
            if len(x) == length:
                squares[0] *= FIRST_TOKEN
            self.squares += squares.sum(0, dtype=torch.float64)

    def add_tile(
        self, rows: tuple[int, int], columns: tuple[int, int], inputs: Sequence[Tensor]
    ) -> None:
        """Add one tile of x^T x, for one x [tokens, K] fp32 after another."""
        assert self.products is not None
        target = self.products[slice(*rows), slice(*columns)]
        for x in inputs:
            target.addmm_(x[:, slice(*rows)].t(), x[:, slice(*columns)])


def tiles(size: int) -> list[tuple[int, int]]:
    """Begin and end of equal parts of ``size`` columns."""
    count = -(-size // _TILE)
    width = -(-size // count + 15) // 16 * 16  # whole cache lines
    return [(start, min(start + width, size)) for start in range(0, size, width)]


class Statistics:
    """One :class:`Statistic` for each distinct input of a layer's weights: q, k and v share theirs.

    Weights share an input if it is the same tensor in the first sequence that reaches them. With ``full``, x x^T is
    summed too. In inputs of ``length`` tokens the first counts :data:`FIRST_TOKEN` times; None counts all alike.
    """

    def __init__(self, full: bool, length: int | None = None) -> None:
        self.full = full
        self.length = length
        self.of: dict[Key, Statistic] = {}

    def groups(self) -> list[tuple[Statistic, list[Key]]]:
        """Each statistic with the weights that share it, in the order in which the layer uses them."""
        members: dict[int, tuple[Statistic, list[Key]]] = {}
        for key, statistic in self.of.items():
            members.setdefault(id(statistic), (statistic, []))[1].append(key)
        return list(members.values())

    def add(self, sequences: Sequence[Inputs], pool: Executor) -> None:
        """Add the inputs of whole sequences, in that order."""
        taken: dict[int, tuple[Statistic, list[Tensor]]] = {}
        for inputs in sequences:
            shared: dict[tuple[int, ...], list[Key]] = {}  # weights by their input tensors
            for key, tensors in inputs.items():
                shared.setdefault(tuple(map(id, tensors)), []).append(key)
            for keys in shared.values():
                tensors = [x.reshape(-1, x.shape[-1]) for x in inputs[keys[0]]]
                statistic = self._statistic(keys, tensors[0])
                taken.setdefault(id(statistic), (statistic, []))[1].extend(tensors)
        tasks: list[Callable[[], None]] = []
        for statistic, tensors in taken.values():
            tasks.append(partial(statistic.add_squares, tensors, self.length))
            if self.full:
                exact = list(pool.map(Tensor.float, tensors))
                spans = tiles(tensors[0].shape[1])
                for index, rows in enumerate(spans):
                    tasks += [
                        partial(statistic.add_tile, rows, columns, exact) for columns in spans[index:]
                    ]
        list(pool.map(lambda task: task(), tasks))

    def _statistic(self, keys: list[Key], x: Tensor) -> Statistic:
        known = {id(self.of[key]) if key in self.of else None for key in keys}
        if known == {None}:
            made = Statistic(x.shape[1], self.full, len(keys), x.device)
            self.of |= dict.fromkeys(keys, made)
        elif len(known) > 1 or self.of[keys[0]].sharers != len(keys):
            raise UserError(
                f"{keys[0][0]}: its input is another weight's too for some texts and not for others, so this model "
                "cannot be calibrated; load it with method 'rtn'."
            )
        return self.of[keys[0]]


class InputTaps:
    """Records the inputs of the linears and the stacks of experts of a layer, for each thread apart."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @contextmanager
    def on(self, layer: nn.Module, prefix: str, names: Iterable[str]) -> Iterator[None]:
        """While entered, record the inputs of the parameters ``names`` of ``layer``, which start with ``prefix``."""
        handles = []
        experts = set()
        for name in names:
            path, _, leaf = name.removeprefix(prefix).rpartition(".")
            module = layer.get_submodule(path)
            if leaf in STACKS:
                experts.add((name.rpartition(".")[0], module))
            else:
                handles.append(
                    module.register_forward_pre_hook(partial(self._note_input, name), with_kwargs=True)
                )
        for path, module in experts:
            product = partial(
                self._product, path, module, {name for name in names if name.startswith(f"{path}.")}
            )
            module.forward = partial(by_expert, module, product=product)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for _, module in experts:
                del module.forward

    @contextmanager
    def noting(self) -> Iterator[Inputs]:
        """The inputs of this thread's forwards while entered."""
        inputs: Inputs = {}
        self._thread.inputs = inputs
        try:
            yield inputs
        finally:
            self._thread.inputs = None

    def _note_input(
        self, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        self._note((name, None), args[0] if args else next(iter(kwargs.values())))

    def _product(
        self, path: str, module: nn.Module, names: set[str], leaf: str, expert: int, x: Tensor
    ) -> Tensor:
        if f"{path}.{leaf}" in names:
            self._note((f"{path}.{leaf}", expert), x)
        dense = getattr(module, leaf)[expert]
        return dense_linear(x, dense.t() if module.is_transposed else dense)

    def _note(self, key: Key, x: Tensor) -> None:
        inputs: Inputs | None = getattr(self._thread, "inputs", None)
        if inputs is not None:
            inputs.setdefault(key, []).append(x)
