"""An adapter in the codes of its 4-bit base, whose scales stay."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_native.calibration.adapted import adapted_codes, correction
from qlora_native.calibration.data import CalibrationData
from qlora_native.calibration.statistics import Statistics
from qlora_native.lora import LoRALinear, load_adapter, lora_layers
from qlora_native.models.calibrate import side_by_side, tokens_for
from qlora_native.models.load import load_model
from qlora_native.models.loss import hidden_states
from qlora_native.models.mapped import BESIDE, stream_if_needed
from qlora_native.models.merge_files import Merging
from qlora_native.models.progress import Progress
from qlora_native.nn.linear import QuantizedLinear


def calibrated_codes(
    work: Merging, adapter: Path, given: CalibrationData, folder: Path, progress: Progress
) -> dict[str, Path]:
    """The files for ``work.codes``, made in ``folder`` by recoding the model as it was trained, 4-bit with the adapter
    beside it.

    Beside the model there are the sequences' activations and the statistics of one layer. What torch computes is on one
    thread, so that the bytes are the same for any number of them.
    """
    ids = tokens_for(work.source, given, "wmse").ids
    codes: dict[str, Path] = {}
    options = {} if work.is_kept else {**work.options, "skip_modules": work.skip_modules}
    model: Any = load_adapter(load_model(work.source.path, **options, fuse=False), adapter)
    streaming = stream_if_needed(model, None, BESIDE)
    total = sum(isinstance(layer.base_layer, QuantizedLinear) for _, layer in lora_layers(model))
    progress(
        f"finding the codes of {total} weights with {len(ids)} sequences of {ids.shape[1]} tokens",
        0,
        total,
    )

    def write(path: str, packed: Tensor) -> None:
        codes[path] = folder / f"{len(codes)}.codes"
        packed.cpu().numpy().tofile(codes[path])
        progress(f"layer {len(codes)} of {total}", len(codes), total)

    with (
        side_by_side(model.device) as (pool, _),
        nullcontext() if streaming is None else closing(streaming),
    ):
        recode(model, ids, pool, write)
    return codes


@torch.no_grad()
def recode(model: Any, ids: Tensor, pool: Executor, write: Callable[[str, Tensor], None]) -> None:
    """Find the codes of each adapted 4-bit layer, and ``write`` them, packed, under the layer's path.

    The sequences ids [n, length] pass through the model twice, side by side: as it was trained, with the adapter beside
    its 4-bit weights, and as it ships, through the codes that were just found. A layer's codes are those with which the
    second pass comes nearest to what the first one gives, so what earlier layers lost is made good by later ones.
    """
    shared: dict[str, Any] = {}  # q, k and v have the same input

    def forward(layer: LoRALinear, plain: Callable[[Tensor], Tensor], path: str, x: Tensor) -> Tensor:
        # An expert has some tokens; fused layers pass [tokens, K].
        both = x.numel() == 2 * ids.numel() * x.shape[-1]
        trained, ships = x.chunk(2) if both else (x, x)
        if shared.get("x") is not x:
            statistic = Statistics(full=True)
            statistic.add([{(path, None): [ships]}], pool)
            hessian: Any = statistic.of[path, None].hessian()
            found = correction(hessian, trained, ships, pool) if both else None
            shared.update(x=x, hessian=hessian, correction=found)
        weight: Any = layer.base_layer.quantized
        adapter = layer.lora_A, layer.lora_B, layer.scale
        packed = adapted_codes(weight, *adapter, shared["hessian"], shared["correction"])
        write(path, packed)
        if not both:
            return plain(x)
        new = QuantizedLinear.from_quantized(weight.with_packed(packed), layer.bias)
        return torch.cat([plain(trained), new(ships)])

    layers = {
        path: layer
        for path, layer in lora_layers(model)
        if isinstance(layer.base_layer, QuantizedLinear)
    }
    for path, layer in layers.items():
        layer.forward = partial(forward, layer, layer.forward, path)  # type: ignore[method-assign]
    try:
        hidden_states(model, {"input_ids": torch.cat([ids, ids]).to(model.device)})
    finally:
        for layer in layers.values():
            del layer.forward
