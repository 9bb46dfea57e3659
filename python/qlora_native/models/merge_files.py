"""A model with an adapter added to its weights, tensor by tensor from files into files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_native._io import is_own_file
from qlora_native.data.template import TEMPLATE
from qlora_native.errors import UserError
from qlora_native.lora.adapter import StoredAdapter, read_adapter
from qlora_native.lora.tokens import DELTA, put_rows
from qlora_native.models.convert import Conversion
from qlora_native.weights.config import METADATA
from qlora_native.weights.open import open_source
from qlora_native.weights.shapes import OUTPUT_EMBEDDING
from qlora_native.weights.stream import AUTO, KEEP, Entry, Item, stream
from qlora_native.weights.transforms import adding, decoding, recoding, rounding

TARGETS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "nf4": torch.bfloat16}


class Merging(Conversion):
    """W + scale * B A of every adapted weight, the sum taken in fp32 and rounded once.

    ``codes`` are files of packed codes by the path of an adapted layer, which it gets under the scales of its 4-bit W
    (:func:`qlora_native.models.recode.calibrated_codes`); without one the sum is rounded to nearest.

    Memory is that of a conversion, with the packed bytes of a 4-bit weight; the whole 16-bit model if it is GGUF.

    Args:
        adapter: a folder in PEFT's format; None merges nothing.
        base: the W: "original" is what the files hold, "dequantized" what ``load_model`` makes of it in 4 bits.
        to: one of ``TARGETS``; "nf4" is bitsandbytes' format.
        quant_type, block_size, double_quant, skip_modules: for weights that are not 4-bit yet. A GGUF file that
            load_model keeps as it is has one W.
    """

    def __init__(
        self,
        path: Path,
        adapter: Path | None,
        *,
        base: str = "original",
        to: str = "bf16",
        quant_type: str = AUTO,
        block_size: int = 64,
        double_quant: bool = True,
        skip_modules: tuple[str, ...] = (OUTPUT_EMBEDDING,),
    ) -> None:
        source = open_source(path)
        self.is_kept = source.keeps(quant_type)
        rounded = "nf4" if quant_type in (AUTO, KEEP) else quant_type
        options: dict[str, Any] = {
            "quant_type": rounded,
            "block_size": block_size,
            "double_quant": double_quant,
        }
        super().__init__(
            source, "bitsandbytes" if to == "nf4" else "16bit", TARGETS[to], options, skip_modules
        )
        self.adapter_folder, self.skip_modules = adapter, skip_modules
        if self.four_bit and base == "original":
            raise UserError(
                f"{source.path} holds 4-bit weights and no original ones: merge with --base dequantized, or give the "
                "16-bit model that it was made from."
            )
        # What load_model would make 4-bit: decoded, it is the base that the adapter was trained on.
        self.rounded: set[str] = set()
        if base == "dequantized" and not self.four_bit and not self.is_kept:
            self.rounded = {*self.meta.four_bit_weights(skip_modules, block_size)}
            if stacks := sorted(name for name in self.rounded if not name.endswith(".weight")):
                raise UserError(
                    f"{source.path} has stacks of experts ({stacks[0]}), which are merged from 4 bits only where they "
                    f"are stored so: `qlora convert {source.path} DIR --to qlora` first, then merge that folder; "
                    "or merge into the 16-bit weights with --base original."
                )
        self.codes: dict[str, Path] = {}
        for name in self.meta.transposed:  # an adapter is read for linear layers
            if not name.endswith(".weight"):
                continue
            width, height = self.meta.shapes[name].shape
            self.meta.model.set_submodule(
                name.removesuffix(".weight"), nn.Linear(width, height, device="meta")
            )
        self.adapter = (
            StoredAdapter({}, {}) if adapter is None else read_adapter(self.meta.model, adapter)
        )
        tied = self.meta.tied
        for module, ids in dict(self.adapter.config.trainable_tokens).items():
            name, rows = f"{module}.weight", self.adapter.saved.pop(f"{module}.{DELTA}")
            if name in self.entries and self.entries[name].converter is None:
                item = next(self.items(adapted=False, entries=[self.entries[name]]))
                rows = put_rows(torch.cat([*item.rows()]).float(), torch.tensor(ids), rows)
                source.config.get_text_config().vocab_size = len(rows)
            self.adapter.saved[name] = rows
        origins = {tied.get(name, name): tensor for name, tensor in self.adapter.saved.items()}
        self.replaced = origins | {name: origins[to] for name, to in tied.items() if to in origins}
        # Tied embeddings are separated where only the output one has an adapter.
        self.untied = any(f"{path}.weight" in tied for path in self.adapter.pairs)

    def items(self, adapted: bool = True, entries: list[Entry] | None = None) -> Iterator[Item]:
        """The stream of the merged model, or of some ``entries``; not ``adapted``, of the weights that the adapter is
        added to, decoded."""
        entries = [*self.match.entries, *self._untied_entries()] if entries is None else entries
        transforms = [rounding(self.meta, self.rounded, self.options), decoding(lambda name: True)]
        if adapted:
            weights = set() if self.target == "16bit" else {*self.four_bit, *self.weights}
            transforms[1:] = [
                recoding(self.codes),
                decoding(self._is_decoded),
                adding(self.adapter, self.replaced),
                rounding(self.meta, weights - self.replaced.keys(), self.options),
            ]
        return stream(self.source, self.meta, transforms, entries=entries)

    def changes(self, name: str) -> bool:
        """Whether the weight is not simply copied, cast, quantized or decoded."""
        is_adapted = name.removesuffix(".weight") in self.adapter.pairs or name in self.replaced
        return is_adapted or (self.target == "16bit" and name in self.rounded)

    def _is_decoded(self, name: str) -> bool:
        return self.target == "16bit" or (
            self.changes(name) and name.removesuffix(".weight") not in self.codes
        )

    def write(self, folder: Path, shard_bytes: int) -> None:
        """Write the folder, as :meth:`Conversion.write`, with the chat template of the adapter."""
        super().write(folder, shard_bytes)
        if self.adapter_folder is not None and is_own_file(self.adapter_folder / TEMPLATE):
            shutil.copyfile(self.adapter_folder / TEMPLATE, folder / TEMPLATE)

    def config(self, four_bit: set[str]) -> dict[str, Any]:
        """As :meth:`Conversion.config`."""
        config = super().config(four_bit)
        if self.untied:
            config["tie_word_embeddings"] = False
        if four_bit:
            config["quantization_config"][METADATA] = {"method": "gptq" if self.codes else "rtn"}
        return config

    def _untied_entries(self) -> list[Entry]:
        """Output embeddings that are not in the files because they were tied, and have an adapter; UserError for other
        adapted weights that are not there."""
        found = []
        for name in sorted(
            {f"{path}.weight" for path in self.adapter.pairs} | self.adapter.saved.keys()
        ):
            entry, origin = self.entries.get(name), self.entries.get(self.meta.tied.get(name, ""))
            if entry is not None and entry.converter is None:
                continue
            if origin is None or not origin.is_plain:
                raise UserError(
                    f"{self.source.path} stores {name} in several tensors, where no adapter can be merged file by "
                    "file: merge in memory, with qlora_native.merge(model) and model.save_pretrained(folder)."
                )
            if name not in self.replaced:
                found.append(Entry(name, name, origin.parts))
        return found
