"""What quantizing and training did to a model: loss, perplexity, divergence from 16 bits, multiple choice.

``measure.py`` is one pass of one model over one text, ``texts.py`` and ``choices.py`` read what is measured on,
``sides.py`` says which forms of a model are compared, ``comparison.py`` compares them, ``report.py`` writes it down,
``harness.py`` hands a model to lm-eval.
"""

from __future__ import annotations

from qlora_native.evaluate.choices import Accuracy, Choices, load_choices
from qlora_native.evaluate.comparison import Comparison, SideResult, compare
from qlora_native.evaluate.measure import Kept, Scores, measure
from qlora_native.evaluate.texts import Text, load_text
from qlora_native.evaluate.variants import Variants, load_dense

__all__ = [
    "Accuracy",
    "Choices",
    "Comparison",
    "Kept",
    "Scores",
    "SideResult",
    "Text",
    "Variants",
    "compare",
    "load_choices",
    "load_dense",
    "load_text",
    "measure",
]
