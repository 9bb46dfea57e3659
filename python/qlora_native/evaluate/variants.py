"""The models that an evaluation compares, loaded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_native.errors import UserError
from qlora_native.hf.build import OUTPUT_EMBEDDING, MetaModel
from qlora_native.hf.load import CALIBRATED, METHODS, load_model
from qlora_native.hf.source import open_source
from qlora_native.lora import load_adapter

REFERENCE, FOUR_BIT, ADAPTED = "16-bit", "4-bit", " + adapter"


def load_dense(path: str | Path, dtype: torch.dtype = torch.bfloat16, device: Any = None) -> Any:
    """The model with nothing quantized, through the same reader and the same native modules as the 4-bit one."""
    source = open_source(Path(path), dtype)
    tree = MetaModel(source.config, dtype, torch.device("cpu"))
    if source.is_four_bit(tree):
        raise UserError(f"{path} holds 4-bit weights: expected the 16-bit model they were made from.")
    children = [name for name, _ in tree.model.named_children()]
    return load_model(path, dtype=dtype, device=device, skip_modules=(*children, OUTPUT_EMBEDDING))


@dataclass
class Variants:
    """Which forms of a model are compared.

    A 16-bit model is its own reference, and each of ``methods`` makes a 4-bit form of it. A model whose files are 4-bit
    is one form, and ``reference`` may name the 16-bit model it was made from. The adapter is measured on the first
    4-bit form.

    Raises:
        UserError: arguments that do not fit the model or each other.
    """

    model: Path
    methods: Sequence[str] = ()
    adapter: Path | None = None
    reference: Path | None = None
    calibration: Any = None  # as load_model takes it
    options: dict[str, Any] = field(default_factory=dict)  # of load_model besides

    def __post_init__(self) -> None:
        source = open_source(self.model, torch.bfloat16)
        self.is_four_bit = source.is_four_bit(MetaModel(source.config, torch.bfloat16, torch.device("cpu")))
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise UserError(f"{unknown[0]!r} is no method of quantizing: expected {', '.join(METHODS)}")
        if self.is_four_bit and self.methods:
            raise UserError(f"{self.model} is 4-bit already: methods are compared from the 16-bit model")
        if not self.is_four_bit and self.reference is not None:
            raise UserError(f"{self.model} is 16-bit and its own reference: leave the reference out")
        needing = [name for name in self.methods if name in CALIBRATED]
        if needing and self.calibration is None:
            raise UserError(f"method {needing[0]} needs calibration text, which must be another than the one evaluated")
        if self.adapter is not None and not (self.adapter / "adapter_config.json").is_file():
            raise UserError(f"{self.adapter} has no adapter_config.json: expected an adapter folder")

    @property
    def told(self) -> str:
        """The model as the user named it."""
        return str(self.model)

    def steps(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each side's name and what loads it, in the order in which they are to be measured."""
        dense = self.reference if self.is_four_bit else self.model
        if dense is not None:
            yield REFERENCE, partial(load_dense, dense, **self.options)
        forms: list[tuple[str, Callable[[], Any]]] = []
        if self.is_four_bit:
            forms.append((FOUR_BIT, partial(load_model, self.model, **self.options)))
        for method in self.methods or (() if self.is_four_bit else ("rtn",)):
            given = {"calibration": self.calibration} if method in CALIBRATED else {}
            forms.append((method, partial(load_model, self.model, method=method, **given, **self.options)))
        for number, (name, load) in enumerate(forms):
            yield name, load
            if number == 0 and self.adapter is not None:
                yield f"{name}{ADAPTED}", partial(_adapted, load, self.adapter)


def _adapted(load: Callable[[], Any], adapter: Path) -> Any:
    return load_adapter(load(), adapter)
