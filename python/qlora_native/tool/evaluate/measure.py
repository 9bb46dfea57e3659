"""Loss and divergence of a model on rows of tokens, with no more than a block of logits in memory.

Two models are compared one after the other: of the first, the input of its output embedding is kept, [tokens, hidden]
in the model's own dtype, some eighty times smaller than its logits, which it reproduces exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
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
    agreed: Tensor | None = None  # tokens whose most likely successor is the reference's; None without a reference
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
        return None if self.wrong is None else ratio((self.wrong == 0).double(), torch.ones_like(self.wrong))

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


@torch.no_grad()
def measure(
    model: Any, rows: Rows, pad_id: int, *, against: Reference | None = None, keep_in: Path | None = None
) -> tuple[Scores, Reference | None]:
    """One pass of a causal LM over ``rows``, with dropout off; afterwards it is in the mode it was in.

    Args:
        against: the reference, from a pass over the same rows.
        keep_in: a folder for the states that make this model a reference; without it none are kept.
    """
    from qlora_native.models.mapped import BESIDE, check_mapped_finite, stream_if_needed

    streaming = stream_if_needed(model, None, BESIDE)
    with modes_kept(model), nullcontext() if streaming is None else closing(streaming):
        model.eval()
        scores, kept = _measure(model, rows, pad_id, against, keep_in)
    if not math.isfinite(float(scores.nats.sum())):
        check_mapped_finite(model, str(model.load_report.path) if hasattr(model, "load_report") else "")
    return scores, kept


def _measure(
    model: Any, rows: Rows, pad_id: int, against: Reference | None, keep_in: Path | None
) -> tuple[Scores, Reference | None]:
    sums = torch.zeros(3 if against is None else 5, len(rows), dtype=torch.float64)
    plain: bool | None = None
    head = kept = None
    done = 0
    for numbers, batch in _batches(rows, pad_id):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        inputs = without_needless_mask(model, inputs, targets)
        if plain is None:
            plain = has_plain_head(model, inputs)
            if plain:
                output = model.get_output_embeddings()
                head = output.quantized.dequantize() if isinstance(output, QuantizedLinear) else output.weight.detach()
        trained = targets != IGNORE_INDEX
        states = (hidden_states(model, inputs)[0] if plain else model(**inputs, use_cache=False).logits)[trained]
        if keep_in is not None:
            kept = _file(keep_in, rows, states) if kept is None else kept
            kept[done : done + len(states)] = states.to(kept.device)
        row_of = torch.tensor(numbers)[:, None].expand_as(targets)[trained.cpu()]
        step = max(1, LOGITS_BYTES // (4 * (len(head) if head is not None else states.shape[-1])))
        for at in range(0, len(states), step):
            part = slice(at, at + step)
            found = log_probabilities(states[part], head)
            expected_tokens = targets[trained][part]
            likeliest = found.argmax(1)
            picked = -found.gather(1, expected_tokens[:, None]).squeeze(1)
            values = [torch.ones_like(picked), picked, likeliest != expected_tokens]
            if against is not None:
                theirs = against.states[done + at : done + at + len(found)].to(found.device)
                expected = log_probabilities(theirs, against.head)
                values.append(F.kl_div(found, expected, reduction="none", log_target=True).sum(1))
                values.append(expected.argmax(1) == likeliest)
            for total, value in zip(sums, values, strict=True):
                total.index_add_(0, row_of[part], value.double().cpu())
        done += len(states)
    scores = Scores(**dict(zip(("tokens", "nats", "wrong", "kl", "agreed"), sums, strict=False)))
    return scores, None if kept is None else Reference(scores, kept, head)


def log_probabilities(states: Tensor, head: Tensor | None) -> Tensor:
    """log softmax in fp32, [tokens, vocabulary], of states [tokens, hidden] through ``head`` [vocabulary, hidden]."""
    if head is None:
        return states.float().log_softmax(1)
    logits = torch.empty(len(states), len(head), dtype=torch.float32, device=states.device)
    states = states.float()
    step = max(1, LOGITS_BYTES // (4 * head.shape[1]))
    for at in range(0, len(head), step):  # the whole head in fp32 may be as large as the model
        torch.mm(states, head[at : at + step].float().t(), out=logits[:, at : at + step])
    return logits.log_softmax(1)


def _file(folder: Path, rows: Rows, like: Tensor) -> Tensor:
    """A tensor [predicted tokens, width] in a file of ``folder``, which may be larger than memory."""
    count = sum(int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in rows)
    path = folder / "reference.bin"
    width = like.shape[-1]
    path.unlink(missing_ok=True)  # a reference that was kept there before keeps its own bytes
    mapped = torch.from_file(str(path), shared=True, size=max(1, count * width), dtype=like.dtype)
    path.unlink()
    return mapped[: count * width].view(count, width)


def _batches(rows: Rows, pad_id: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Rows of like length together, the longest first: (their numbers, the padded batch)."""
    order = np.argsort([-len(row["input_ids"]) for row in rows], kind="stable").tolist()
    at = 0
    while at < len(order):
        size = max(1, BATCH_TOKENS // len(rows[order[at]]["input_ids"]))
        numbers = order[at : at + size]
        yield numbers, collate([rows[number] for number in numbers], pad_id)
        at += size
