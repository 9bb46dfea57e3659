"""A run on a card that is too small for the model: which layers stream through it, and what that takes of the card."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_native.models.device_layers import layer_units
from qlora_native.models.residency import Residency, plan_residency
from qlora_native.tool.estimate.memory import Estimate, Estimator


@dataclass(frozen=True)
class CardRun:
    """A run on a card through which layers stream; ``estimate`` is what it takes of the card."""

    estimate: Estimate
    residency: Residency

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        plan = self.residency
        return {
            "layers": len(plan.units),
            "streamed_layers": len(plan.streamed),
            "slots": plan.slots,
            "card_bytes": self.estimate.total + self.estimate.reserve,
            "pinned_bytes": plan.streamed_bytes,
            "step_bytes": plan.bytes_read() * self.estimate.setting.micro_batches,
        }


def streamed_on(estimator: Estimator, card: int) -> CardRun | None:
    """The run on a card with so many free bytes, with as few streamed layers as it allows; None if not even two slots
    fit."""
    resident = estimator.at(cuda_graph=False)
    units = layer_units(estimator.modules)
    layer_bytes = sum(unit.num_bytes for unit in units)
    try:
        residency = plan_residency(units, card - (resident.total + resident.reserve - layer_bytes))
    except ValueError:
        return None
    terms = resident.peak
    share = 1 - (layer_bytes - residency.num_bytes) / max(1, terms.weights + terms.scales)
    moments = {
        name: replace(terms, weights=round(share * terms.weights), scales=round(share * terms.scales))
        for name, terms in resident.moments.items()
    }
    return CardRun(replace(resident, moments=moments), residency)
