"""Several forms of one model on the same texts: 16-bit, 4-bit by each method, with an adapter."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora_native.evaluate.choices import Accuracy, Choices, accuracy
from qlora_native.evaluate.harness import run_tasks
from qlora_native.evaluate.measure import Kept, Scores, measure
from qlora_native.evaluate.texts import Text
from qlora_native.evaluate.variants import ADAPTED, REFERENCE, Variants

Note = Callable[[str], None]


@dataclass
class SideResult:
    """What one form of the model made of everything it was given; keys are the names of files and tasks."""

    name: str
    num_bytes: int  # of its weights
    seconds_to_load: float
    texts: dict[str, Scores] = field(default_factory=dict)
    choices: dict[str, Accuracy] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def learned(self) -> bool:
        """Whether it has an adapter."""
        return self.name.endswith(ADAPTED)


@dataclass(frozen=True)
class Comparison:
    """The sides in the order in which they were measured; the 16-bit reference, if there is one, comes first."""

    model: str
    sides: list[SideResult]

    @property
    def reference(self) -> SideResult | None:
        """The 16-bit model."""
        return self.sides[0] if self.sides[0].name == REFERENCE else None

    @property
    def baseline(self) -> SideResult | None:
        """What the share of the gap closed is counted from: plain rounding, if it is among the sides."""
        return next((side for side in self.sides if side.name == "rtn"), None)

    def text_row(self, side: SideResult, text: str) -> dict[str, float | None]:
        """The figures of one side on one text; those against the reference are None without one, shares of the gap
        closed without plain rounding."""
        scores = side.texts[text]
        best = self.reference.texts[text] if self.reference else None
        worst = self.baseline.texts[text] if self.baseline else None
        found: dict[str, tuple[float, float] | None] = {"loss": scores.loss}
        found["excess"] = scores.excess(best) if best else None
        found["kl"], found["same_first"] = scores.divergence, scores.agreement
        # What an adapter learned is no part of what 4 bits lost.
        found["closed"] = scores.closed(worst, best) if best and worst and not side.learned else None
        row: dict[str, float | None] = {"tokens": float(scores.tokens.sum()), "perplexity": scores.perplexity}
        for name, pair in found.items():
            row[name], row[f"{name}_error"] = pair or (None, None)
        return row

    def as_dict(self) -> dict[str, Any]:
        """For JSON: errors are standard errors, nan written as None."""
        sides = []
        for side in self.sides:
            sides.append(
                {
                    "name": side.name,
                    "bytes": side.num_bytes,
                    "seconds_to_load": round(side.seconds_to_load, 2),
                    "texts": {name: _finite(self.text_row(side, name)) for name in side.texts},
                    "choices": {name: _choices_row(found) for name, found in side.choices.items()},
                    "tasks": side.tasks,
                }
            )
        return {"model": self.model, "sides": sides}


def compare(
    sides: Variants,
    texts: Sequence[Text],
    choices: Sequence[Choices],
    tokenizer: Any,
    *,
    pad_id: int,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    note: Note = lambda text: None,
) -> Comparison:
    """Measure each side on everything, one model in memory at a time.

    Of the reference, some two bytes a token and element of the hidden state are kept in a temporary file.

    Args:
        pad_id: what fills shorter rows.
        tasks: of lm-eval; ``limit`` documents of each.
        note: called with a line for each thing measured.
    """
    done: list[SideResult] = []
    kept: dict[str, Kept] = {}
    with TemporaryDirectory(prefix="qlora-eval-") as folder:
        for name, model, seconds in _loaded(sides):
            side = SideResult(name, _num_bytes(model), seconds)
            note(f"{name}: {side.num_bytes / 2**20:,.0f} MiB of weights, loaded in {seconds:.1f} s")
            for text in texts:
                keep_in = Path(folder) if name == REFERENCE else None
                scores, reference = measure(model, text.rows, pad_id, against=kept.get(text.name), keep_in=keep_in)
                if reference is not None:
                    kept[text.name] = reference
                side.texts[text.name] = scores
                note(f"{name}: {text.name}: loss {scores.loss[0]:.4f}, perplexity {scores.perplexity:,.2f}")
            for questions in choices:
                scores, _ = measure(model, questions.rows, pad_id)
                found = side.choices[questions.name] = accuracy(questions, scores.nats)
                note(f"{name}: {questions.name}: {found.plain[0]:.1%} of {found.questions:,} questions right")
            if tasks:
                side.tasks = run_tasks(model, tokenizer, tasks, limit)
            done.append(side)
    return Comparison(sides.told, done)


def _loaded(sides: Variants) -> Iterator[tuple[str, Any, float]]:
    """Each side's name, model and seconds of loading; the model before is let go first."""
    for name, load in sides.steps():
        began = time.monotonic()
        model = load()
        seconds = time.monotonic() - began
        yield name, model, seconds
        del model
        gc.collect()


def _num_bytes(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in {id(one): one for one in tensors}.values())


def _choices_row(found: Accuracy) -> dict[str, Any]:
    row = {"questions": found.questions, "accuracy": found.plain[0], "accuracy_error": found.plain[1]}
    return _finite(row | {"accuracy_by_byte": found.normalized[0], "accuracy_by_byte_error": found.normalized[1]})


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
