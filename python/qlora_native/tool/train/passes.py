"""Losses and gradients of rows: each process computes its share of a step's micro-batches, on a CUDA device by graphs,
one for each shape of them.

Eager, a layer-step of a small micro-batch waits for the host. The optimizer's step, two launches, stays outside, and so
do the learning rate, clipping, paging and what decides whether to step at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from qlora_native.data.batching import Batch, Items, evaluation_order, micro_batches
from qlora_native.data.dataset import TokenizedDataset
from qlora_native.data.template import IGNORE_INDEX, padding_id
from qlora_native.distributed import OneProcess
from qlora_native.models.graphs import Pool, rehearsed, why_not_captured
from qlora_native.models.loss import (
    causal_lm_loss,
    has_plain_head,
    is_random,
    trained_tokens,
    without_needless_mask,
)
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.checkpoint import LossScale
from qlora_native.weights.files import replaced

EAGER_PASSES = 2  # of a shape before its capture: they warm up cuBLAS and everything that is made once
MOST_GRAPHS = 32  # their activations share memory, their launches do not

Shape = tuple[tuple[str, torch.Size], ...]


def why_eager(config: TrainConfig, model: Any, world: int = 1, *, has_room: bool = True) -> str | None:
    """Why the passes of a run are not captured, "" where nobody would expect it; None if they are."""
    if config.train.cuda_graph == "off" or model.device.type != "cuda":
        return ""
    if world > 1:
        return f"{world} processes exchange gradients"
    if not has_room:
        return "the card has no room for their memory beside the run's"
    if reason := why_not_captured(model):
        return reason
    if config.train.grad_checkpointing and is_random(model):
        return "gradient checkpointing takes the random state of dropout to the host"
    return None


class Passes:
    """Forward and backward passes that leave gradients in the parameters; replayed where ``is_captured``.

    ``note`` prints why passes are not captured any more.
    """

    def __init__(
        self, model: Any, note: Callable[[str], object], *, is_captured: bool = False
    ) -> None:
        self.model, self.note, self.is_captured = model, note, is_captured
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.grads: dict[Tensor, Tensor] = {}  # of the first step, in which all others leave theirs
        self.seen: dict[Shape, int] = {}
        self.graphs: dict[Shape, tuple[Batch, torch.cuda.CUDAGraph]] = {}
        self.pool: Pool | None = None
        self.weight, self.loss = (torch.zeros((), device=model.device) for _ in range(2))

    def run(self, batches: Iterable[tuple[Batch, float]], factor: int = 1) -> None:
        """Sets ``loss`` to the sum of the losses of a step's micro-batches, each times its weight, and the gradients of
        the parameters to ``factor`` times its gradient."""
        self.loss.zero_()
        for parameter, grad in self.grads.items():
            parameter.grad = grad.zero_()
        for batch, weight in batches:
            self.weight.fill_(weight)
            self._run(batch, factor)
        if self.is_captured and not self.grads:
            self.grads = {p: p.grad for p in self.parameters if p.grad is not None}

    def _run(self, batch: Batch, factor: int) -> None:
        plain = self._without_mask(batch) if self.is_captured else None
        if plain is None:
            self._pass(batch, factor)
            return
        shape = tuple((key, value.shape) for key, value in plain.items())
        self.seen[shape] = self.seen.get(shape, 0) + 1
        is_new = shape not in self.graphs and len(self.graphs) < MOST_GRAPHS
        if is_new and self.seen[shape] == EAGER_PASSES:
            self._rehearse(plain, factor)
            return
        if is_new and self.grads and self.seen[shape] > EAGER_PASSES:
            self._capture(shape, plain, factor)
        if shape not in self.graphs:
            self._pass(plain, factor)
            return
        inputs, graph = self.graphs[shape]
        for key, value in plain.items():
            inputs[key].copy_(value)
        graph.replay()

    def _pass(self, batch: Batch, factor: int) -> None:
        share = causal_lm_loss(self.model, batch) * self.weight
        (share * factor).backward()
        self.loss += share.detach()

    def _without_mask(self, batch: Batch) -> Batch | None:
        """The batch without a mask that hides nothing a trained token sees; None if it hides something, or the loss
        is taken from logits, of which a graph cannot choose some. Both wait for the device, as no graph can."""
        if not has_plain_head(self.model, batch):
            return None
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        mask = without_needless_mask(self.model, batch, targets).get("attention_mask")
        if mask is not None and not bool((mask != 0).all()):
            return None
        return {key: value for key, value in batch.items() if key != "attention_mask"}

    def _rehearse(self, batch: Batch, factor: int) -> None:
        with rehearsed() as waits, _as_not_packed(batch):
            self._pass(batch, factor)
        if waits:
            self.stop_capturing(f"the host waits for the device in {waits[0]}")

    def _capture(self, shape: Shape, batch: Batch, factor: int) -> None:
        inputs = {key: value.clone() for key, value in batch.items()}
        reason = ""
        try:
            self.pool = self.pool or Pool()
            with self.pool.captured(self.parameters) as graph, _as_not_packed(inputs):
                self._pass(inputs, factor)
                if any(p.grad is not None and p not in self.grads for p in self.parameters):
                    raise RuntimeError("which parameters have a gradient depends on the batch")
            self.graphs[shape] = inputs, graph
        except RuntimeError as error:
            # A spoiled capture raises a second time where it ends.
            reason = str(error.__context__ or error).splitlines()[0]
        if reason:  # the traceback, which holds memory of the capture, is gone
            self.stop_capturing(reason)

    def stop_capturing(self, reason: str) -> None:
        """All passes from here on are eager, and the memory of graphs is free."""
        if self.is_captured:
            self.is_captured = False
            self.graphs, self.pool = {}, None
            self.note(f"CUDA graphs are off: {reason}")


def _as_not_packed(batch: Batch) -> AbstractContextManager[None]:
    """Transformers cannot find out in a capture that rows are not packed, and would build a table for attention across
    them."""
    if "position_ids" in batch:
        return nullcontext()
    return replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


class Learner:
    """Computes with ``model`` as the config says, through CUDA graphs if its passes are captured; ``note`` prints why
    they are not any more. On one process ``ranks`` does nothing."""

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        tokenizer: Any,
        ranks: OneProcess,
        note: Callable[[str], object] = print,
        *,
        is_captured: bool = False,
    ) -> None:
        self.config, self.model, self.ranks = config, model, ranks
        self._pad_id = padding_id(tokenizer)
        self._passes = Passes(model, note, is_captured=is_captured)
        self.stop_capturing = self._passes.stop_capturing

    def learn(self, rows: TokenizedDataset, items: Items, scale: LossScale) -> tuple[float, int, int]:
        """Forward and backward passes of one step: its loss, its tokens, and how many of them are trained.

        Each micro-batch weighs as much as its share of the step's trained tokens, on all processes together. So the
        gradient is that of the mean over these tokens, however the rows are divided.
        """
        ranks = self.ranks
        passes = self._passes
        batches = list(self._micro_batches(rows, items))
        trained = int(ranks.sum(sum(count for _, count in batches))[0])
        weighted = [(batch, scale.value * count / trained) for batch, count in batches]
        passes.run(weighted, ranks.averaged_over)
        ranks.add_gradients(passes.parameters)
        scale.unscale(passes.parameters)
        tokens = int(sum(rows.lengths[item].sum() for item in items))
        return ranks.sum(passes.loss.item() / scale.value)[0], tokens, trained

    def evaluate(self, rows: TokenizedDataset) -> float:
        """Mean loss in nats over every trained token of ``rows``, with dropout off; draws no random number."""
        parts = self.losses(rows)
        nats, trained = self.ranks.sum(
            sum(nats for nats, _ in parts), sum(count for _, count in parts)
        )
        return nats / trained

    @torch.no_grad()
    def losses(self, rows: TokenizedDataset) -> list[tuple[float, int]]:
        """Nats and trained tokens of each of this process's micro-batches of ``rows``."""
        data = self.config.data
        items: Items = evaluation_order(rows.lengths, data.max_length if data.packing else None)
        self.model.eval()
        try:
            batches = self._micro_batches(rows, items)
            return [
                (causal_lm_loss(self.model, batch).item() * count, count) for batch, count in batches
            ]
        finally:
            self.model.train()

    def _micro_batches(self, rows: TokenizedDataset, items: Items) -> Iterator[tuple[Batch, int]]:
        """This process's micro-batches, each with its number of trained tokens: 0 for a filler, which a sharded model
        computes with since its processes gather weights together."""
        size = self.config.train.batch_size
        fillers = [(filler, False) for filler in self.ranks.filler(items, size)]
        for part, is_trained in [(self.ranks.mine(items), True), *fillers]:
            for batch in micro_batches(rows, part, size, self._pad_id, self.model.device):
                yield batch, trained_tokens(batch) if is_trained else 0
