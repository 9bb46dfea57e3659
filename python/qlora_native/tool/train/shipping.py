"""``lora.ship``: the codes that ship, found after the last step, and writing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_native._io import as_write_error, atomic_file, atomic_folder
from qlora_native.calibration.adapted import TOKENS
from qlora_native.data.batching import permutation
from qlora_native.data.dataset import TokenizedDataset
from qlora_native.distributed import OneProcess
from qlora_native.errors import UserError
from qlora_native.lora import adapters_off, lora_layers
from qlora_native.models.calibrate import side_by_side
from qlora_native.models.recode import recode
from qlora_native.nn import QuantizedLinear
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.evaluate.measure import Scores
from qlora_native.tool.evaluate.retention import retention
from qlora_native.tool.train.checkpoint import TrainState
from qlora_native.tool.train.progress import Observer
from qlora_native.weights.config import METADATA
from qlora_native.weights.files import aligned_files
from qlora_native.weights.gguf_source import GgufSource

MOST_ROWS = 1024  # that tokens for the calibration are taken from
METHOD = "trained"  # how the 4-bit weights were made, in config.json


class Shipping(Observer):
    """Finds the codes that adapted layers ship as after the last of ``total`` steps, lets them compute with those in
    the last evaluation, and writes them.

    UserError for a model whose adapted layers cannot ship so.
    """

    work = "calibrating what ships"

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        rows: TokenizedDataset,
        total: int,
        note: Callable[[str], object],
    ) -> None:
        self.model: Any = model
        self._rows, self._length, self._total, self._note = rows, config.data.max_length, total, note
        self.layers: dict[str, Any] = dict(lora_layers(model))
        self._format = wanted = config.lora.ship
        self.name = "shipped.gguf" if wanted == "gguf" else "shipped"  # of what is written
        for path, layer in self.layers.items():
            weight = getattr(layer.base_layer, "quantized", None)
            found = "dense" if weight is None else weight.quant_type
            if ("gguf" if weight is not None and weight.is_gguf else found) != wanted:
                raise UserError(
                    f"lora.ship is {wanted}, and {path} is {found}: codes ship in the format that the layer is trained "
                    "in; set lora.ship to that, or lora.target_modules to layers that have it"
                )
            if layer.base_layer.is_sharded:
                raise UserError(
                    "lora.ship is set, and the model is sharded: set parallel to ddp or none"
                )

    def evaluating(self, state: TrainState) -> None:
        if state.step >= self._total:
            self.recode()
            self._note(f"after step {state.step} the weights are those that ship, {self._format}")

    def recode(self) -> None:
        """Let the layers compute with the codes of a merge that is calibrated on training rows."""
        model, rows, length = self.model, self._rows, self._length
        found = dict[str, torch.Tensor]()
        taken = (rows[int(row)]["input_ids"] for row in permutation(len(rows), 0)[:MOST_ROWS])
        ids = torch.from_numpy(np.concatenate([*taken])[:TOKENS].astype(np.int64))
        ids = ids[: len(ids) // length * length].view(-1, length) if len(ids) > length else ids[None]
        model.eval()
        with side_by_side(model.device) as (pool, _):
            recode(model, ids, pool, found.__setitem__)
        model.train()
        # The codes go in at the end: meanwhile the layers compute as they were trained.
        for path, packed in found.items():
            weight = self.layers[path].base_layer.quantized
            self.layers[path].shipped = weight.with_packed(packed)

    def retention(
        self, losses: Callable[[], list[tuple[float, int]]], ranks: OneProcess
    ) -> dict[str, Any] | None:
        """What the model that ships keeps of what the adapter learned, with micro-batches as the sample; None if
        modules are trained whole, of which no earlier values are kept.

        ``losses`` are nats and tokens of each of this rank's micro-batches, by the model as it is then.
        """
        if self.model.lora_config.modules_to_save:
            return None

        def scores() -> Scores:
            parts = [part for of_rank in ranks.gather(losses()) for part in of_rank]
            nats, tokens = torch.tensor(parts, dtype=torch.float64).t()
            return Scores(tokens, nats)

        shipped = scores()
        weights = [layer.shipped for layer in self.layers.values()]
        try:
            for layer in self.layers.values():
                layer.shipped = None
            adapted = scores()
            with adapters_off(self.model):
                base = scores()
        finally:
            for layer, weight in zip(self.layers.values(), weights, strict=True):
                layer.shipped = weight
        return retention(base, adapted, shipped)

    def write(self, path: Path, tokenizer: Any) -> Path:
        """Write the model with these codes and no adapter: the GGUF file that it came from, or a folder in
        bitsandbytes' format."""
        if path.suffix == ".gguf":
            weights = ((f"{name}.weight", layer.shipped.packed) for name, layer in self.layers.items())
            with as_write_error(path), atomic_file(path) as partial:
                GgufSource(self.model.load_report.path).write_copy(partial, weights)
            return path
        with (
            as_write_error(path),
            atomic_folder(path) as partial,
            aligned_files(),
            self._without_adapters(),
        ):
            self.model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        return path

    @contextmanager
    @torch.no_grad()
    def _without_adapters(self) -> Iterator[None]:
        config = self.model.config
        before = config.quantization_config
        made = before if isinstance(before, dict) else before.to_dict()
        try:
            config.quantization_config = {**made, METADATA: {"method": METHOD}}
            for path, layer in self.layers.items():
                self.model.set_submodule(
                    path, QuantizedLinear.from_quantized(layer.shipped, layer.bias)
                )
            yield
        finally:
            config.quantization_config = before
            for path, layer in self.layers.items():
                self.model.set_submodule(path, layer)
