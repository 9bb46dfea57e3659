"""How much of what an adapter learned is left in a model without it."""

from __future__ import annotations

from typing import Any

from qlora_native._io import without_nan
from qlora_native.tool.evaluate.measure import Scores


def retention(base: Scores, adapted: Scores, shipped: Scores) -> dict[str, Any]:
    """(L_base - L_shipped) / (L_base - L_adapted) of held-out losses on the same rows, as JSON values.

    Above 1, the model without an adapter is better than the one with it. The standard error is that of a ratio of two
    paired differences with rows as the sample, by the delta method (:func:`qlora_native.tool.evaluate.measure.ratio`).

    Args:
        base: the 4-bit model that the adapter was trained on, adapted: the same with the adapter beside it,
        shipped: the model without one.
    """
    share, error = shipped.closed(base, adapted)
    sides = {"base": base, "adapted": adapted, "shipped": shipped}
    losses = {f"{name}_loss": scores.loss[0] for name, scores in sides.items()}
    return without_nan(
        {"retention": share, "retention_error": error, **losses, "tokens": int(base.tokens.sum())}
    )


def describe(found: dict[str, Any]) -> str:
    """One line of what :func:`retention` found."""
    share = found["retention"]
    error = found["retention_error"]
    text = (
        "unknown" if share is None else f"{share:.3f}" + ("" if error is None else f" ± {error:.3f}")
    )
    return (
        f"retention {text}: held-out loss {found['base_loss']:.4f} of the 4-bit base, {found['adapted_loss']:.4f} with "
        f"the adapter, {found['shipped_loss']:.4f} without it as shipped; {found['tokens']:,} tokens"
    )
