"""``qlora estimate --gpus N``: the memory of one of N processes, what it sends and receives, and what that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from qlora_native.cli.estimate import size
from qlora_native.errors import UserError
from qlora_native.estimate import Estimate, Estimator, Terms
from qlora_native.parallel.plan import RankPlan, plan_rank
from qlora_native.train.config import TrainConfig


@dataclass(frozen=True)
class Rank:
    """One of several processes: ``moments`` are bytes by the part of a run, ``seconds`` those of a step's messages."""

    mode: str
    plan: RankPlan
    moments: dict[str, int]
    reserve: int
    seconds: float

    @property
    def total(self) -> int:
        """The peak, with what a card keeps for itself."""
        return max(self.moments.values()) + self.reserve


def each_rank(estimator: Estimator, estimate: Estimate, config: TrainConfig, world: int, link: int) -> list[Rank]:
    """A rank under ddp and one under fsdp. UserError if there are no two of them, or no rows for each."""
    options = config.train
    rows = options.batch_size * options.grad_accum
    if not 2 <= world <= rows:
        raise UserError(
            f"--gpus is {world}: expected 2 to {rows}, since a step learns from batch_size * grad_accum = {rows} rows"
        )
    micro_batches = math.ceil(math.ceil(rows / world) / options.batch_size)
    found = []
    for mode in ("ddp", "fsdp"):
        plan = plan_rank(estimator.anatomy.model, world, cut=mode == "fsdp", micro_batches=micro_batches)
        local = estimator.at(micro_batches=micro_batches, batch_size=min(options.batch_size, math.ceil(rows / world)))
        # The input embedding comes before all that grows with the tokens.
        begin = replace(local.moments["loss"], activations=0, loss=0, scratch=0)
        moments = {name: _of_rank(name, terms, plan) for name, terms in {"input": begin, **local.moments}.items()}
        found.append(Rank(mode, plan, moments, estimate.reserve, plan.seconds(link)))
    return found


def _of_rank(moment: str, terms: Terms, plan: RankPlan) -> int:
    """Bytes of one moment, with this rank's part of what is cut."""
    part = plan.trained / terms.adapters if terms.adapters else 1.0
    own = replace(
        terms,
        weights=plan.frozen,
        scales=0,
        dense=0,
        adapters=math.ceil(terms.adapters * part),
        gradients=math.ceil(terms.gradients * part),
        optimizer=math.ceil(terms.optimizer * part),
    )
    gathered = {"input": plan.gathered_input, "loss": plan.gathered_output, "backward": plan.gathered_blocks}
    return own.total + gathered.get(moment, 0)


def told_ranks(ranks: list[Rank]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {"mode": rank.mode, "total": rank.total, "seconds": rank.seconds, "moments": rank.moments, **vars(rank.plan)}
        for rank in ranks
    ]


def rank_lines(ranks: list[Rank], card: int | None) -> list[str]:
    """A few lines on each mode."""
    lines = []
    for rank in ranks:
        plan = rank.plan
        verdict = "" if card is None else f", which {'fits' if rank.total <= card else 'does not fit'} {size(card)}"
        held = f"{size(plan.frozen)} of frozen weights"
        if plan.cut:
            most = max(plan.gathered_blocks, plan.gathered_input, plan.gathered_output)
            held += f" and up to {size(most)} gathered for a moment"
        lines.append(
            f"{rank.mode} on {plan.world}: {size(rank.total)} a card{verdict}; {held}; "
            f"{size(plan.received)} received a step, {rank.seconds:.2g} s on that link"
        )
    return lines
