"""A run on a card that is too small for the model: which layers stream, and from how many tokens on it costs nothing.

A product of m tokens reaches m / (m + 128) of a card's best rate, as bench/gpu_model.py has it. Copies run beside the
products; a forward pass takes less time than a backward pass for as many bytes, so it decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qlora_native.estimate.memory import Estimate, Estimator
from qlora_native.models.build import four_bit_parts
from qlora_native.models.device_layers import layer_units
from qlora_native.models.residency import Residency, plan_residency

RAMP = 128  # tokens at which a product reaches half of the best rate


class Rates(NamedTuple):
    """Of a card, by NVIDIA's data sheets."""

    tflops: float  # 16 bits, fp32 sums, dense
    share: float  # of them that products reach: half on a T4, which 70 W limit
    bus_gb_per_s: float  # that pinned memory reaches over the PCIe of the card's generation, 16 lanes


PCIE = {3: 12.0, 4: 25.0, 5: 50.0}  # GB/s
CARDS = {
    "T4": Rates(65, 0.5, PCIE[3]),
    "A100": Rates(312, 0.8, PCIE[4]),
    "H100": Rates(989, 0.8, PCIE[5]),
    "H200": Rates(989, 0.8, PCIE[5]),
    "4090": Rates(165, 0.8, PCIE[4]),
    "5090": Rates(209, 0.8, PCIE[5]),
}


@dataclass(frozen=True)
class CardRun:
    """A run on a card through which layers stream; ``estimate`` is what it takes of the card."""

    estimate: Estimate
    residency: Residency
    elements: int  # of the 4-bit weights that a pass multiplies by

    @property
    def pass_bytes(self) -> int:
        """Copied in the forward pass of a micro-batch, and as many in its backward pass."""
        return self.residency.bytes_read() // 2

    @property
    def step_bytes(self) -> int:
        """Copied in a step."""
        return 2 * self.pass_bytes * self.estimate.setting.micro_batches

    def hidden_from(self, card: Rates, bus_gb_per_s: float | None = None) -> int:
        """The least tokens of a micro-batch whose products take as long as the copies of their pass."""
        seconds = self.pass_bytes / (1e9 * (bus_gb_per_s or card.bus_gb_per_s))
        rate = 1e12 * card.tflops * card.share
        return max(1, math.ceil(seconds * rate / (2 * self.elements)) - RAMP)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; tokens by card, over the bus of its generation."""
        plan = self.residency
        return {
            "layers": len(plan.units),
            "streamed_layers": len(plan.streamed),
            "slots": plan.slots,
            "card_bytes": self.estimate.total + self.estimate.reserve,
            "pinned_bytes": plan.streamed_bytes,
            "step_bytes": self.step_bytes,
            "hidden_from_tokens": {name: self.hidden_from(card) for name, card in CARDS.items()},
        }


def streamed_on(estimator: Estimator, card: int, **changes: Any) -> CardRun | None:
    """The run on a card with so many free bytes, with as few streamed layers as it allows; None if not even two slots
    fit. ``changes`` are those of :meth:`Estimator.at`."""
    whole = estimator.at(**changes, cuda_graph=False)
    units = layer_units(estimator.modules)
    inside = sum(unit.num_bytes for unit in units)
    try:
        residency = plan_residency(units, card - (whole.total + whole.reserve - inside))
    except ValueError:
        return None
    there = 1 - (inside - residency.num_bytes) / max(1, whole.peak.weights + whole.peak.scales)
    moments = {
        name: replace(terms, weights=round(there * terms.weights), scales=round(there * terms.scales))
        for name, terms in whole.moments.items()
    }
    elements = sum(weight.numel() for weight in four_bit_parts(estimator.model).values())
    return CardRun(replace(whole, moments=moments), residency, elements)
