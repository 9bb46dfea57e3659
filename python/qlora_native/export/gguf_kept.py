"""A GGUF file with an adapter in its codes: the same file, scales and metadata, in which other levels were chosen."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_native.calibration.data import CalibrationData, take_tokens
from qlora_native.errors import UserError
from qlora_native.hf.checkpoint import StoredTensor
from qlora_native.hf.gguf import ARCHITECTURES, DENSE_NAMES, KEPT
from qlora_native.hf.gguf_source import GgufSource
from qlora_native.hf.load import load_model
from qlora_native.hf.loss import causal_lm_loss
from qlora_native.hf.merge import Merging
from qlora_native.hf.plan import Plain
from qlora_native.hf.source import load_tokenizer
from qlora_native.lora import load_adapter, lora_layers
from qlora_native.lora.shipped import SAMPLED_TOKENS, gain_of, moved
from qlora_native.nn.linear import QuantizedLinear

ROWS = 4  # of the text, from the beginning of which inputs are taken


def export_kept(work: Merging, path: Path, adapter_folder: Path, text: str) -> dict[str, Any]:
    """Write ``path``, the GGUF file of the source with the adapter in its blocks.

    Codes become those of :func:`~qlora_native.lora.shipped.moved`, with gains found on the inputs that ``text`` gives
    the mapped model, as calibration reads it; floats the rounded sum. ``changed`` of the result is the share of bytes
    that are others, by tensor. UserError for another source, and for an adapter that the file's tensors cannot take.
    """
    source, adapter = work.source, work.adapter
    if not isinstance(source, GgufSource) or source.architecture is None:
        raise UserError(
            f"{source.path} is no GGUF file of {', '.join(ARCHITECTURES)}: --type keep keeps the types of such a file"
        )
    if adapter.whole or work.untied or not adapter.pairs:
        raise UserError(
            f"--type keep takes an adapter of linear layers alone, whose weights are tensors of their own in "
            f"{source.path}; export with another --type"
        )
    stored = {step.name: step.stored for step in work.plan.steps if isinstance(step, Plain)}
    for module in adapter.pairs:
        if (kind := source.kind_of(stored[f"{module}.weight"])) not in KEPT | DENSE_NAMES:
            raise UserError(f"{source.path} has {module} in {kind}: expected one of {', '.join(sorted(KEPT))}")
    gains, changed = _gains(source, adapter_folder, text), dict[str, float]()

    def weights() -> Iterator[tuple[str, Tensor]]:
        for module, pair in adapter.pairs.items():
            name = f"{module}.weight"
            before, after = _with_adapter(source, stored[name], *pair, gains.get(module, 1.0))
            changed[name] = float((before != after).double().mean())
            yield name, after

    source.write_copy(path, weights())
    return {"tensors": len(source.gguf.tensors), "num_bytes": path.stat().st_size, "changed": changed}


@torch.no_grad()
def _gains(source: GgufSource, adapter: Path, text: str) -> dict[str, float]:
    """The gains of adapted layers by path, on one thread, so that the bytes are the same for any number of them."""
    model: Any = load_adapter(load_model(source), adapter)
    data, config = CalibrationData(text, rows=ROWS), source.config
    drawn = take_tokens(
        data, "wmse", lambda: load_tokenizer(source.path), config.vocab_size, config.max_position_embeddings
    )
    found: dict[str, float] = {}

    def find(path: str, layer: Any, inputs: tuple[Any, ...]) -> None:
        if isinstance(layer.base_layer, QuantizedLinear):
            found[path] = gain_of(layer, inputs[0])

    for path, layer in lora_layers(model):
        layer.register_forward_pre_hook(partial(find, path))
    ids, threads = drawn.ids[:, : SAMPLED_TOKENS // ROWS], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        causal_lm_loss(model.eval(), {"input_ids": ids, "labels": ids})
    finally:
        torch.set_num_threads(threads)
    return found


@torch.no_grad()
def _with_adapter(
    source: GgufSource, stored: StoredTensor, a: Tensor, b: Tensor, scale: float, gain: float
) -> tuple[Tensor, Tensor]:
    """The bytes of a weight before and after, in the model's order of rows."""
    a, b = a.float(), b.float()
    if source.kind_of(stored) in DENSE_NAMES:
        before = source.read(stored)
        after = (before.float() + b @ a * scale).to(before.dtype)
        return before.view(torch.uint8), after.view(torch.uint8)
    weight = source.quantized(stored, torch.float32, True)
    return weight.packed, moved(weight, a, b, scale * gain).packed
