"""Loss and divergence of a model on rows of tokens, with no more than a block of logits in memory.

Two models are compared one after the other: of the first, the input of its output embedding is kept, [tokens, hidden]
in the model's own dtype, some eighty times smaller than its logits, which it reproduces exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_native.data.batching import collate
from qlora_native.data.template import IGNORE_INDEX
from qlora_native.models.fuse import modes_kept
from qlora_native.models.loss import has_plain_head, hidden_states, without_needless_mask
from qlora_native.models.mapped import BESIDE, check_mapped_finite, stream_if_needed
from qlora_native.nn.linear import QuantizedLinear

BATCH_TOKENS = 2048  # in one forward pass, padding included
LOGITS_BYTES = 1 << 26  # of one block of fp32 logits; four such blocks are alive at once

Rows = Sequence[Mapping[str, np.ndarray]]  # "input_ids" and "labels", each int32 [length]


@dataclass(frozen=True)
class Scores:
    """Sums over the tokens of each row, fp64 [rows], for one model and one text."""

    tokens: Tensor  # predicted
    nats: Tensor  # their cross-entropy
    kl: Tensor | None = None  # KL(reference || model) in nats; None without a reference
    # Tokens whose most likely successor is the reference's; None without a reference.
    agreed: Tensor | None = None
    wrong: Tensor | None = None  # tokens that are not the most likely ones

    @property
    def loss(self) -> tuple[float, float]:
        """Mean cross-entropy in nats a token, and its standard error."""
        return ratio(self.nats, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss[0], 700.0))

    @property
    def divergence(self) -> tuple[float, float] | None:
        """Mean KL divergence in nats a token, and its standard error."""
        return None if self.kl is None else ratio(self.kl, self.tokens)

    @property
    def agreement(self) -> tuple[float, float] | None:
        """Share of tokens whose most likely successor is the reference's, and its standard error."""
        return None if self.agreed is None else ratio(self.agreed, self.tokens)

    @property
    def exact(self) -> tuple[float, float] | None:
        """Share of rows whose every predicted token is the most likely one, so that greedy generation writes them, and
        its standard error."""
        return (
            None
            if self.wrong is None
            else ratio((self.wrong == 0).double(), torch.ones_like(self.wrong))
        )

    def excess(self, other: Scores) -> tuple[float, float]:
        """This loss less ``other``'s on the same rows, in nats a token, and the standard error of the paired
        difference."""
        return ratio(self.nats - other.nats, self.tokens)

    def closed(self, worst: Scores, best: Scores) -> tuple[float, float]:
        """The share of the gap between ``worst`` and ``best`` that this closes, and its standard error."""
        share, error = ratio(self.nats - best.nats, worst.nats - best.nats)
        return 1 - share, error


def ratio(values: Tensor, weights: Tensor) -> tuple[float, float]:
    """sum(values) / sum(weights) over rows, fp64 [rows], and its standard error with rows as the sample.

    The error is the linearized one of a ratio estimator (Cochran, "Sampling Techniques", section 2.11); nan for fewer
    than two rows. Both are nan where the weights sum to zero.
    """
    total = float(weights.sum())
    rows = len(values)
    share = float(values.sum()) / total if total else math.nan
    if rows < 2 or not total:
        return share, math.nan
    residuals = values - share * weights
    return share, math.sqrt(rows / (rows - 1) * float(residuals.square().sum())) / abs(total)


@dataclass(frozen=True)
class Reference:
    """A reference's scores on a text, and the inputs of its output embedding; for a model that changes its logits after
    that product, the logits themselves."""

    scores: Scores
    states: Tensor  # [tokens, hidden], or the logits, [tokens, vocabulary]
    head: Tensor | None  # [vocabulary, hidden], or None


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off, and layers streamed where a mapped model does not fit; afterwards the model is as it was."""
    streaming = stream_if_needed(model, None, BESIDE)
    with (
        modes_kept(model),
        torch.no_grad(),
        nullcontext() if streaming is None else closing(streaming),
    ):
        model.eval()
        yield


def measure(
    model: Any,
    rows: Rows,
    pad_id: int,
    *,
    against: Reference | None = None,
    keep_in: Path | None = None,
) -> tuple[Scores, Reference | None]:
    """One pass of a causal LM over ``rows``, with dropout off; afterwards it is in the mode it was in.

    Args:
        against: the reference, from a pass over the same rows.
        keep_in: a folder for the states that make this model a reference; without it none are kept.
    """
    sums = torch.zeros(3 if against is None else 5, len(rows), dtype=torch.float64)
    kept: Tensor | None = None
    done = 0
    with evaluating(model):
        head = _head_of(model)
        for numbers, batch in _batches(rows, pad_id):
            inputs = {key: value.to(model.device) for key, value in batch.items()}
            targets = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
            inputs = without_needless_mask(model, inputs, targets)
            trained = targets != IGNORE_INDEX
            output = (
                model(**inputs, use_cache=False).logits
                if head is None
                else hidden_states(model, inputs)[0]
            )
            states = output[trained]
            if keep_in is not None and kept is None:
                kept = _file(keep_in, rows, states)
            row_of = torch.tensor(numbers)[:, None].expand_as(targets)[trained.cpu()]
            step = max(1, LOGITS_BYTES // (4 * (states.shape[-1] if head is None else len(head))))
            columns = (column.split(step) for column in (states, targets[trained], row_of))
            for part, expected, places in zip(*columns, strict=True):
                here = slice(done, done + len(part))
                found = log_probabilities(part, head)
                nats = F.nll_loss(found, expected, reduction="none")
                likeliest = found.argmax(1)
                values = [torch.ones_like(nats), nats, likeliest != expected]
                if kept is not None:
                    kept[here] = part.to(kept.device)
                if against is not None:
                    theirs = log_probabilities(against.states[here].to(found.device), against.head)
                    values.append(F.kl_div(found, theirs, reduction="none", log_target=True).sum(1))
                    values.append(theirs.argmax(1) == likeliest)
                for total, value in zip(sums, values, strict=True):
                    total.index_add_(0, places, value.double().cpu())
                done += len(part)
    scores = Scores(**dict(zip(("tokens", "nats", "wrong", "kl", "agreed"), sums, strict=False)))
    if not math.isfinite(float(scores.nats.sum())):
        check_mapped_finite(
            model, str(model.load_report.path) if hasattr(model, "load_report") else ""
        )
    return scores, None if kept is None else Reference(scores, kept, head)


def _head_of(model: Any) -> Tensor | None:
    """The dense output embedding, [vocabulary, hidden], or None if logits are more than a product with it."""
    if not has_plain_head(
        model, {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=model.device)}
    ):
        return None
    head = model.get_output_embeddings()
    weight: Tensor = (
        head.quantized.dequantize() if isinstance(head, QuantizedLinear) else head.weight.detach()
    )
    return weight


def log_probabilities(states: Tensor, head: Tensor | None) -> Tensor:
    """log softmax in fp32, [tokens, vocabulary], of states [tokens, hidden] through ``head`` [vocabulary, hidden]."""
    states = states.float()
    if head is not None:
        # The whole head in fp32 may be as large as the model.
        step = max(1, LOGITS_BYTES // (4 * head.shape[1]))
        states = torch.cat([states @ part.float().t() for part in head.split(step)], 1)
    return states.log_softmax(1)


def _file(folder: Path, rows: Rows, like: Tensor) -> Tensor:
    """A tensor [predicted tokens, width] in a file of ``folder``, which may be larger than memory."""
    shape = sum(int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in rows), like.shape[-1]
    path = folder / "reference.bin"
    mapped = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=like.dtype)
    path.unlink()
    return mapped.view(shape)


def _batches(rows: Rows, pad_id: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Rows of like length together, the longest first: (their numbers, the padded batch)."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]["input_ids"]))
    while order:
        size = max(1, BATCH_TOKENS // len(rows[order[0]]["input_ids"]))
        numbers, order = order[:size], order[size:]
        yield numbers, collate([rows[number] for number in numbers], pad_id)
