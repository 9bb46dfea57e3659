"""Forward and backward passes of micro-batches as CUDA graphs, one for each shape of them.

Eager, a layer-step of a small micro-batch waits for the host. The optimizer's step, two launches, stays outside, and so
do the learning rate, clipping, paging and what decides whether to step at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from qlora_native.config import TrainConfig
from qlora_native.data.template import IGNORE_INDEX
from qlora_native.models.loss import has_plain_head, is_random, without_needless_mask
from qlora_native.train.batches import Batch
from qlora_native.weights.files import replaced

EAGER_PASSES = 2  # of a shape before its capture: they warm up cuBLAS and everything that is made once
MOST_GRAPHS = 32  # their activations share memory, their launches do not
LARGEST_SCALE = 65536.0  # of a loss in float16
SCALE_STEPS = 200  # without an overflow, after which it is doubled

Shape = tuple[tuple[str, torch.Size], ...]
Replay = Callable[[], None]


def why_eager(config: TrainConfig, model: Any, world: int = 1) -> str | None:
    """Why the passes of a run are not captured, "" where nobody would expect it; None if they are."""
    if config.train.cuda_graph == "off" or model.device.type != "cuda":
        return ""
    if world > 1:
        return f"{world} processes exchange gradients"
    if getattr(model, "streamed_layers", None) is not None:
        return "layers stream to the device"
    if config.train.grad_checkpointing and is_random(model):
        return "gradient checkpointing takes the random state of dropout to the host"
    return None


class Passes:
    """Forward and backward passes that leave gradients in the parameters; replayed where ``is_captured``.

    ``loss_of`` is the mean loss of a micro-batch; ``note`` prints why passes are not captured any more.
    """

    def __init__(
        self, model: Any, loss_of: Callable[[Batch], Tensor], note: Callable[[str], None], *, is_captured: bool = False
    ) -> None:
        self.model, self.loss_of, self.note, self.is_captured = model, loss_of, note, is_captured
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.grads: dict[Tensor, Tensor] = {}  # of the first step, in which all others leave theirs
        self.seen: dict[Shape, int] = {}
        self.graphs: dict[Shape, tuple[Batch, Replay]] = {}
        self.last: torch.cuda.CUDAGraph | None = None
        self.weight, self.loss = (torch.zeros((), device=model.device) for _ in range(2))

    def begin(self) -> None:
        """Before the micro-batches of a step: no gradients, and no loss."""
        self.loss.zero_()
        for parameter, grad in self.grads.items():
            parameter.grad = grad.zero_()

    def run(self, batch: Batch, weight: float, factor: int = 1) -> None:
        """Adds ``weight`` times a micro-batch's loss to ``loss``, and ``factor`` times its gradient."""
        self.weight.fill_(weight)
        plain = self._without_mask(batch) if self.is_captured else None
        if plain is None:
            self._pass(batch, factor)
            return
        shape = tuple((key, value.shape) for key, value in plain.items())
        self.seen[shape] = self.seen.get(shape, 0) + 1
        is_new = shape not in self.graphs and len(self.graphs) < MOST_GRAPHS
        if is_new and self.grads and self.seen[shape] > EAGER_PASSES:
            self._capture(shape, plain, factor)
        if shape not in self.graphs:
            self._pass(plain, factor)
            return
        inputs, replay = self.graphs[shape]
        for key, value in plain.items():
            inputs[key].copy_(value)
        replay()

    def end(self) -> None:
        """After the last micro-batch of a step, with gradients in the parameters."""
        if self.is_captured and not self.grads:
            self.grads = {p: p.grad for p in self.parameters if p.grad is not None}

    def _pass(self, batch: Batch, factor: int) -> None:
        share = self.loss_of(batch) * self.weight
        (share * factor).backward()
        self.loss += share.detach()

    def _without_mask(self, batch: Batch) -> Batch | None:
        """The batch without a mask that hides nothing a trained token sees; None if it hides something, or the loss
        is taken from logits, of which a graph cannot choose some. Both wait for the device, as no graph can."""
        if not has_plain_head(self.model, batch):
            return None
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        mask = without_needless_mask(self.model, inputs, targets).get("attention_mask")
        if mask is not None and not bool((mask != 0).all()):
            return None
        return {key: value for key, value in batch.items() if key != "attention_mask"}

    def _capture(self, shape: Shape, batch: Batch, factor: int) -> None:
        inputs = {key: value.clone() for key, value in batch.items()}
        # Transformers cannot find out in a capture that rows are not packed, and would build a table for attention
        # across them.
        alone = replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
        try:
            with captured(self.last) as graph, nullcontext() if "position_ids" in inputs else alone:
                self._pass(inputs, factor)
            if any(parameter.grad is not None and parameter not in self.grads for parameter in self.parameters):
                raise RuntimeError("which parameters have a gradient depends on the batch")
        except RuntimeError as error:  # all passes from here on are eager
            self.is_captured, self.graphs = False, {}
            self.note(f"CUDA graphs are off: {str(error).splitlines()[0]}")
        else:
            self.last, self.graphs[shape] = graph, (inputs, graph.replay)


@contextmanager
def captured(last: torch.cuda.CUDAGraph | None) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures into the graph that it gives, with the memory of the last one: they run one after another."""
    graph, pool = torch.cuda.CUDAGraph(), None if last is None else last.pool()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # backward has a thread of its own
        yield graph


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

    def is_lowered(self, loss: float, norm: float, note: Callable[[str], None]) -> bool:
        """Whether a step's gradient overflowed, its loss did not, and a lower scale is tried; ``norm`` is the
        gradient's."""
        self.steps += 1
        if self.value == 1 or not math.isfinite(loss):
            return False
        if math.isfinite(norm):
            if self.steps >= SCALE_STEPS and self.value < LARGEST_SCALE:
                self.value, self.steps = 2 * self.value, 0
            return False
        self.value, self.steps = self.value / 2, 0
        note(f"the gradient overflows in float16, step skipped; from here on the loss is scaled by {self.value:g}")
        return True
