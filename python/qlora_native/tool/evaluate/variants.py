"""The models that an evaluation compares, loaded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qlora_native.errors import UserError
from qlora_native.lora import load_adapter
from qlora_native.models.device_layers import load_to_device
from qlora_native.models.load import LoadReport, load_dense
from qlora_native.models.trained import TrainedBase
from qlora_native.weight import CALIBRATED, METHODS
from qlora_native.weights.open import open_source
from qlora_native.weights.stream import AUTO, Source

REFERENCE = "16-bit"
BASELINE = "rtn"  # plain rounding, from which the share of the gap closed is counted
FOUR_BIT = "4-bit"
KEPT = "as it is"
ADAPTED = " + adapter"
SHIPPED = "shipped"


def label_of(name: str, report: LoadReport) -> str:
    """What a variant is in plain words, with the method that really made its 4-bit weights."""
    if name in (REFERENCE, SHIPPED):
        return f"{name} base" if name == REFERENCE else name
    made = f"4-bit by {report.method}" if report.method else "4-bit"
    return f"base, {'as in its file' if report.is_kept else made}{ADAPTED * name.endswith(ADAPTED)}"


@dataclass
class Variants:
    """Which forms of a model are compared; UserError for arguments that do not fit the model or each other.

    A 16-bit model is its own reference, and each of ``methods`` makes a 4-bit form of it. A model whose files are 4-bit
    is one form, and ``reference`` may name the 16-bit model it was made from. A GGUF file whose weights are kept is
    such a form too, unless methods are named. The adapter is measured on the first form, which is what it was
    ``trained`` on, and ``shipped`` is a model into which it was merged.
    """

    model: Path
    methods: Sequence[str] = ()
    adapter: Path | None = None
    shipped: Path | None = None
    # What the adapter was trained on, if that is not the first form.
    trained: TrainedBase | None = None
    reference: Path | None = None
    calibration: Any = None  # as load_model takes it
    options: dict[str, Any] = field(default_factory=dict)  # of load_model besides

    def __post_init__(self) -> None:
        self.stored = stored_form(open_source(self.model))
        if self.methods and self.stored == FOUR_BIT:
            raise UserError(
                f"{self.model} is 4-bit already: methods are compared from the 16-bit model"
            )
        if self.methods:
            self.stored = None
        for name in self.methods:
            if name not in METHODS:
                raise UserError(f"{name!r} is no method of quantizing: expected {', '.join(METHODS)}")
            if name in CALIBRATED and self.calibration is None:
                raise UserError(
                    f"method {name} needs calibration text, which must be another than the one evaluated"
                )
        if self.stored is None and self.reference is not None:
            raise UserError(f"{self.model} is 16-bit and its own reference: leave the reference out")
        if self.adapter is not None and not (self.adapter / "adapter_config.json").is_file():
            raise UserError(f"{self.adapter} has no adapter_config.json: expected an adapter folder")
        if self.shipped is not None and self.adapter is None:
            raise UserError(
                f"{self.shipped} is compared with the adapter that was merged into it: give the adapter"
            )

    def loaders(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each variant's name and a function that loads it, in the order in which they are to be measured."""
        dense = self.reference if self.stored else self.model
        if dense is not None:
            yield REFERENCE, partial(load_dense, dense, **self.options)
        load = partial(load_to_device, self.model, **self.options)
        forms = [(self.stored, load)] if self.stored else []
        for method in () if forms else self.methods or (BASELINE,):
            calibration = {"calibration": self.calibration} if method in CALIBRATED else {}
            forms.append((method, partial(load, method=method, **calibration)))
        if (base := self.trained) is not None:
            name = (
                stored_form(open_source(base.path), base.options.get("quant_type", AUTO)) or BASELINE
            )
            others = [form for form in forms if form[0] in self.methods and form[0] != name]
            forms = [
                (name, partial(load_to_device, base.path, **base.options | self.options)),
                *others,
            ]
        yield from forms[:1]
        if (adapter := self.adapter) is not None:
            name, load = forms[0]
            yield f"{name}{ADAPTED}", lambda: load_adapter(load(), adapter)
        if self.shipped is not None:
            made = load_to_device if open_source(self.shipped).has_four_bit_weights else load_dense
            yield SHIPPED, partial(made, self.shipped, **self.options)
        yield from forms[1:]


def stored_form(source: Source, quant_type: str = AUTO) -> str | None:
    """What a model is in its files, if it is not rounded when it is loaded."""
    if source.has_four_bit_weights:
        return FOUR_BIT
    return KEPT if source.keeps(quant_type) else None
