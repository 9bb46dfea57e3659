"""Several forms of one model on the same texts: 16-bit, 4-bit by each method, with an adapter."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora_native._io import without_nan
from qlora_native.data.template import check_vocabulary
from qlora_native.tool.evaluate.answers import answers, as_text, has_answer, split_row
from qlora_native.tool.evaluate.harness import run_tasks
from qlora_native.tool.evaluate.measure import Reference, Scores, measure
from qlora_native.tool.evaluate.retention import retention
from qlora_native.tool.evaluate.texts import Text
from qlora_native.tool.evaluate.variants import (
    ADAPTED,
    BASELINE,
    REFERENCE,
    SHIPPED,
    Variants,
    label_of,
)


@dataclass
class VariantResult:
    """The scores of one form of the model, by the name of the text or task."""

    name: str
    num_bytes: int  # of its weights
    seconds_to_load: float
    texts: dict[str, Scores] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    label: str = ""  # for people; the name is that of older versions, which JSON keeps


@dataclass(frozen=True)
class Comparison:
    """The variants in the order in which they were measured; the 16-bit reference, if there is one, comes first."""

    model: str
    variants: list[VariantResult]
    # Text, question, expected, base and tuned.
    answers: list[dict[str, str]] = field(default_factory=list)

    def named(self, name: str) -> VariantResult | None:
        """The variant of this name, if it is among them."""
        return next((variant for variant in self.variants if variant.name == name), None)

    @property
    def reference(self) -> VariantResult | None:
        return self.named(REFERENCE)

    @property
    def adapted(self) -> tuple[VariantResult, VariantResult] | None:
        """The form with the adapter, which was measured after the same without, and that one first."""
        return next((pair for pair in pairwise(self.variants) if pair[1].name.endswith(ADAPTED)), None)

    def is_better(self, text: str) -> bool | None:
        """Whether the adapter lowers the loss on a text by more than twice the standard error; None for less, either
        way, and without an adapter."""
        if self.adapted is None:
            return None
        base, tuned = (variant.texts[text] for variant in self.adapted)
        change, error = tuned.excess(base)
        return change < 0 if abs(change) > 2 * error else None

    def text_row(self, variant: VariantResult, text: str) -> dict[str, float | None]:
        """The figures of one variant on one text; those against the reference are None without one, shares of the gap
        closed without plain rounding."""
        scores = variant.texts[text]
        worst, best = (side and side.texts[text] for side in (self.named(BASELINE), self.reference))
        # What an adapter learned is no part of what 4 bits lost.
        is_adapted = variant.name.endswith((ADAPTED, SHIPPED))
        base, tuned = (
            (side.texts[text] for side in self.adapted)
            if is_adapted and self.adapted
            else (None, None)
        )
        pairs = {
            "loss": scores.loss,
            "excess": scores.excess(best) if best else None,
            "kl": scores.divergence,
            "same_first": scores.agreement,
            "closed": scores.closed(worst, best) if worst and best and not is_adapted else None,
            "exact": scores.exact,
            "change": scores.excess(base) if base else None,
        }
        row: dict[str, float | None] = {
            "tokens": float(scores.tokens.sum()),
            "perplexity": scores.perplexity,
        }
        for name, pair in pairs.items():
            row[name], row[f"{name}_error"] = pair or (None, None)
        if variant.name == SHIPPED and base and tuned:
            found = retention(base, tuned, scores)
            row |= {key: found[key] for key in ("retention", "retention_error")}
        return row

    def as_dict(self) -> dict[str, Any]:
        """For JSON: errors are standard errors, nan written as None."""
        rows = [
            {
                "name": variant.name,
                "label": variant.label,
                "bytes": variant.num_bytes,
                "seconds_to_load": round(variant.seconds_to_load, 2),
                "texts": {name: without_nan(self.text_row(variant, name)) for name in variant.texts},
                "choices": {},  # older versions wrote multiple choice here; lm-eval's tasks have taken its place
                "tasks": variant.tasks,
            }
            for variant in self.variants
        ]
        better = {text: self.is_better(text) for text in self.variants[0].texts}
        return {"model": self.model, "sides": rows, "better": better, "answers": self.answers}


def compare(
    variants: Variants,
    texts: Sequence[Text],
    tokenizer: Any,
    *,
    pad_id: int,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    answered: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure each variant on all texts and tasks of lm-eval (``limit`` documents of each), one model in memory at a
    time; ``note`` is called with a line for each thing measured. Base and adapter answer the first rows of each text
    that has answers, ``answered`` of them.

    Of the reference, some two bytes a token and element of the hidden state are kept in a temporary file.
    """
    results: list[VariantResult] = []
    kept: dict[str, Reference | None] = {}
    asked = [
        (text.name, row) for text in texts for row in islice(text.rows, answered) if has_answer(row)
    ]
    found = [_question(tokenizer, name, row) for name, row in asked]
    with TemporaryDirectory(prefix="qlora-eval-") as folder:
        for name, load in variants.loaders():
            began = time.monotonic()
            note(f"{name}: loading")
            model = load()
            seconds = time.monotonic() - began
            num_bytes = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
            result = VariantResult(name, num_bytes, seconds, label=label_of(name, model.load_report))
            note(f"{result.label}: {num_bytes / 2**20:,.0f} MiB of weights, loaded in {seconds:.1f} s")
            for text in texts:
                highest = max(int(row["input_ids"].max()) for row in text.rows)
                check_vocabulary(max(highest, pad_id), tokenizer, model, text.name)
                keep_in = Path(folder) if name == REFERENCE else None
                scores, made = measure(
                    model, text.rows, pad_id, against=kept.get(text.name), keep_in=keep_in
                )
                kept.setdefault(text.name, made)  # of the first variant, if that is the reference
                if not any(map(has_answer, text.rows)):
                    scores = replace(scores, wrong=None)
                result.texts[text.name] = scores
                note(
                    f"{result.label}: {text.name}: loss {scores.loss[0]:.4f}, perplexity {scores.perplexity:,.2f}"
                )
            if tasks:
                result.tasks = run_tasks(model, tokenizer, tasks, limit)
            side = "tuned" if name.endswith(ADAPTED) else "base"
            if found and name not in (REFERENCE, SHIPPED) and side not in found[0]:
                replies = answers(model, tokenizer, [row for _, row in asked])
                for about, reply in zip(found, replies, strict=True):
                    about[side] = reply
            results.append(result)
            del model
            gc.collect()
    return Comparison(str(variants.model), results, found)


def _question(tokenizer: Any, name: str, row: Any) -> dict[str, str]:
    prompt, expected = split_row(row)
    return {
        "text": name,
        "question": as_text(tokenizer, prompt),
        "expected": as_text(tokenizer, expected),
    }
