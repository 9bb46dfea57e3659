"""A run on a card that is too small for the model: which layers stream through it, and what that takes of the card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qlora_native.models.device_layers import layer_units
from qlora_native.models.residency import Residency, plan_residency
from qlora_native.tool.estimate.memory import Estimate, Estimator


@dataclass(frozen=True)
class CardRun:
    """A run on a card through which layers stream; ``estimate`` is what it takes of the card."""

    estimate: Estimate
    residency: Residency

    @property
    def pass_bytes(self) -> int:
        """Copied in the forward pass of a micro-batch, and as many in its backward pass."""
        return self.residency.bytes_read() // 2

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        plan = self.residency
        return {
            "layers": len(plan.units),
            "streamed_layers": len(plan.streamed),
            "slots": plan.slots,
            "card_bytes": self.estimate.total + self.estimate.reserve,
            "pinned_bytes": plan.streamed_bytes,
            "step_bytes": 2 * self.pass_bytes * self.estimate.setting.micro_batches,
        }


def streamed_on(estimator: Estimator, card: int, **changes: Any) -> CardRun | None:
    """The run on a card with so many free bytes, with as few streamed layers as it allows; None if not even two slots
    fit. ``changes`` are those of :meth:`Estimator.at`."""
    resident = estimator.at(**changes, cuda_graph=False)
    units = layer_units(estimator.modules)
    layer_bytes = sum(unit.num_bytes for unit in units)
    beside_layers = resident.total + resident.reserve - layer_bytes
    try:
        residency = plan_residency(units, card - beside_layers)
    except ValueError:
        return None
    weights = max(1, resident.peak.weights + resident.peak.scales)
    share = 1 - (layer_bytes - residency.num_bytes) / weights
    moments = {
        name: replace(terms, weights=round(share * terms.weights), scales=round(share * terms.scales))
        for name, terms in resident.moments.items()
    }
    return CardRun(replace(resident, moments=moments), residency)
