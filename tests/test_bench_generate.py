"""bench/bench_generate.py on a tiny model: what it compares, not how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_generate as bench
import pytest
import tiny_models
import torch

from qlora_native.nn import QuantizedLinear


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(bench, "bitsandbytes_model", lambda folder: None)  # a peer, where there is one
    return bench.sides(tiny_models.save(tmp_path, dtype=torch.bfloat16))


def test_compare(models: dict[str, Any]) -> None:
    ceilings = {"read_gb_per_s": 20.0, "copy_gb_per_s": 20.0, "write_gb_per_s": 20.0}
    row = bench.compare(models, tiny_models.tokens(rows=1), count=4, repeats=2, measured=ceilings)
    assert set(row["tokens_per_second"]) == set(models)
    assert row["match"]
    assert set(row["tokens"]) == {"ours", "unfused", "dequantized"}
    assert row["tokens"]["dequantized"] == {"equal": True}
    layers = [m for m in models["ours"].modules() if isinstance(m, QuantizedLinear)]
    assert row["megabytes_read_a_token"]["layers"] == sum(m.quantized.nbytes for m in layers) / 1e6


def test_the_truth_is_the_model_that_ours_stands_for(models: dict[str, Any]) -> None:
    ours, dense = models["unfused"], models["dequantized"]
    for path, layer in ours.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(dense.get_submodule(path).weight, layer.quantized.dequantize(torch.bfloat16))
    assert not any(isinstance(m, QuantizedLinear) for m in dense.modules())
    assert dense.get_input_embeddings().weight is ours.get_input_embeddings().weight
    assert tiny_models.distance(tiny_models.logits(ours).float(), tiny_models.logits(dense).float()) < 2e-2


def test_free_layers_keep_the_shapes(models: dict[str, Any]) -> None:
    shape = tiny_models.logits(models["ours"]).shape
    assert tiny_models.logits(models["free"]).shape == shape
    assert not tiny_models.logits(models["free"]).any()
    assert tiny_models.logits(models["layers free"]).any()
    assert not any(isinstance(m, QuantizedLinear) for m in models["layers free"].modules())
    model = models["free"]  # its tokens are all 0, and an end of text does not stop it
    model.generation_config.eos_token_id = 0
    assert bench.decode(model, tiny_models.tokens(rows=1), 5).tolist() == [0] * 5


def test_first_difference() -> None:
    tokens = torch.tensor([3, 4, 5])
    assert bench.first_difference(tokens, tokens.clone()) is None
    assert bench.first_difference(tokens, torch.tensor([3, 1, 2])) == 1
