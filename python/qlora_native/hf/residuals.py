"""What an adapter can begin with: the 16-bit weights behind a 4-bit model, and the inputs that its layers meet."""

from __future__ import annotations

from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_native.errors import UserError
from qlora_native.hf.build import MetaModel, is_transposed
from qlora_native.hf.fuse import modes_kept
from qlora_native.hf.load import LoadReport
from qlora_native.hf.plan import Converted
from qlora_native.hf.source import Source, load_tokenizer, open_source
from qlora_native.lora import LayerStatistics
from qlora_native.nn.linear import QuantizedLinear


def lora_statistics(
    model: PreTrainedModel, calibration: Any = None, *, full: bool = True, source: Source | None = None
) -> Iterator[LayerStatistics]:
    """What :func:`qlora_native.add_lora` needs for ``init`` "h_svd" (with calibration) and "loftq" (without).

    The 16-bit weights are read again from where the model was loaded, one at a time, while the result is iterated
    over. The inputs are those of the 4-bit model as it stands, gathered in one pass before the first result.

    Args:
        model: from :func:`qlora_native.load_model`, 16-bit in its files, without an adapter.
        calibration: text as :func:`qlora_native.load_model` takes it; by default 128 sequences of 512 tokens, or 16
            with ``full=False``.
        full: gather E[x x^T], fp32 [K, K] for each distinct input: 4 K^2 bytes, all layers at once. False gathers its
            diagonal alone, in next to no memory.
        source: where the model was loaded from, if that is open already.

    Raises:
        UserError: the model's files are gone, 4-bit, or another model's; too little calibration text.
        ValueError: the model was not loaded by load_model, or has an adapter.
    """
    report: LoadReport | None = getattr(model, "load_report", None)
    layers = {f"{path}.weight": layer for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    if report is None or not layers:
        raise ValueError("lora_statistics: expected a model from load_model with 4-bit linear layers.")
    if any(".base_layer." in name for name in layers):
        raise ValueError("lora_statistics: the model has an adapter already: gather statistics before add_lora.")
    source = open_source(source or report.path)
    if report.is_kept:
        raise UserError(f"the model keeps the weights of {report.path}, so nothing was lost: begin with init 'zero'.")
    if source.is_four_bit:
        raise UserError(
            f"{report.path} holds 4-bit weights and no 16-bit ones, so what was lost is not known: "
            "load the 16-bit model."
        )
    metrics = {} if calibration is None else _metrics(model, calibration, full, list(layers), source)
    return _read(source, layers, metrics)


def _read(source: Source, names: Container[str], metrics: dict[str, Tensor]) -> Iterator[LayerStatistics]:
    meta = MetaModel(source.config, torch.bfloat16, torch.device("cpu"))
    for step in source.plan(meta).steps:
        if step.name not in names and not isinstance(step, Converted):
            continue
        for name, value in step.iter_tensors(meta.model, source.read):
            if name in names:
                path = name.removesuffix(".weight")
                transposed = is_transposed(meta.model.get_submodule(path))
                assert isinstance(value, Tensor)
                yield LayerStatistics(path, value.t() if transposed else value, metrics.get(name))


@torch.no_grad()
def _metrics(
    model: PreTrainedModel, calibration: Any, full: bool, names: list[str], source: Source
) -> dict[str, Tensor]:
    """E[x x^T] or E[x^2] of the inputs of each weight that has had any."""
    from qlora_native.calibration.data import as_calibration, take_tokens
    from qlora_native.calibration.statistics import InputTaps, Statistics

    text = model.config.get_text_config()
    tokens = take_tokens(
        as_calibration(calibration),
        "gptq" if full else "wmse",
        partial(load_tokenizer, source),
        text.vocab_size,
        getattr(text, "max_position_embeddings", None),
    )
    statistics, taps = Statistics(full), InputTaps()
    with modes_kept(model), taps.on(model, "", names), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        model.eval()
        for row in tokens.ids:
            with taps.noting() as inputs:
                model.base_model(input_ids=row[None].to(model.device), use_cache=False)
            statistics.add([inputs], pool)
    found: dict[str, Tensor] = {}
    for statistic, keys in statistics.groups():
        hessian = statistic.hessian()
        metric = statistic.moment if hessian is None else hessian
        found |= {name: metric for name, expert in keys if expert is None}
    return found
