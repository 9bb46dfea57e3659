"""Adapters that begin with what 4 bits lost: against an exact decomposition in fp64, through PEFT, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import write_model, write_rows
from tiny_models import dense_twin, distance, logits, make, save, tokens

from qlora_native import lora_statistics
from qlora_native.config import TrainConfig
from qlora_native.errors import UserError
from qlora_native.hf.load import load_model
from qlora_native.hf.merge import merge
from qlora_native.hf.source import load_tokenizer
from qlora_native.lora import LayerStatistics, LoraConfig, add_lora, load_adapter, lora_layers, save_adapter
from qlora_native.lora.layer import residual_factors
from qlora_native.train.batches import load_rows
from qlora_native.train.setup import prepare_model

peft = pytest.importorskip("peft")
CALIBRATION = tokens(24, 64, seed=5)


def weighted(error: torch.Tensor, metric: torch.Tensor | None) -> float:
    """trace(E H E^T) in fp64."""
    h = torch.eye(error.shape[1], dtype=torch.float64) if metric is None else metric.double()
    h = torch.diag(h) if h.dim() == 1 else h
    return float((error.double() @ h * error.double()).sum())


def best(residual: torch.Tensor, metric: torch.Tensor | None, rank: int) -> float:
    """The least that any matrix of this rank leaves: the tail of the singular values of residual H^(1/2)."""
    h = torch.eye(residual.shape[1], dtype=torch.float64) if metric is None else metric.double()
    values, vectors = torch.linalg.eigh(torch.diag(h) if h.dim() == 1 else h)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    return float(torch.linalg.svdvals(residual.double() @ root)[rank:].square().sum())


def metrics(k: int) -> dict[str, torch.Tensor | None]:
    """None, a diagonal, and the second moments of inputs that span a part of their space only."""
    torch.manual_seed(3)
    x = torch.randn(k // 2, k) * torch.logspace(-1, 1, k)
    return {"none": None, "moment": x.square().mean(0), "singular": x.t() @ x / len(x)}


@pytest.mark.parametrize("shape", [(96, 64), (64, 160), (8, 40)], ids=str)
@pytest.mark.parametrize("kind", ["none", "moment", "singular"])
def test_it_is_the_best_of_its_rank(shape: tuple[int, int], kind: str) -> None:
    torch.manual_seed(0)
    residual, metric = torch.randn(shape), metrics(shape[1])[kind]
    a, b = residual_factors(residual, 12, 2.0, metric)
    assert a.shape == (12, shape[1]) and b.shape == (shape[0], 12)
    before, after = weighted(residual, metric), weighted(residual - 2.0 * b @ a, metric)
    floor = best(residual, metric, min(12, *shape))
    assert floor - 1e-5 * before <= after <= floor + 1e-2 * (before - floor)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-4)


def test_nothing_lost_is_nothing_to_begin_with_and_a_nan_is_refused() -> None:
    assert not any(factor.any() for factor in residual_factors(torch.zeros(32, 48), 4, 1.0))
    for metric in (torch.full((48,), float("nan")), torch.ones(47)):
        with pytest.raises(ValueError, match=rf"metric is \[{len(metric)}\]: expected \[48\] or \[48, 48\]"):
            residual_factors(torch.ones(32, 48), 4, 1.0, metric)


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("init", ["h_svd", "loftq"])
def test_it_corrects_the_layers_and_loads_in_peft(tmp_path: Path, kind: str, init: str) -> None:
    folder = save(tmp_path / "base", kind)
    exact = logits(make(kind))
    model = load_model(folder, dtype=torch.float32)
    twin = dense_twin(folder, model)[0]
    plain = logits(model)
    statistics = list(lora_statistics(model, CALIBRATION if init == "h_svd" else None))
    add_lora(model, LoraConfig(r=16, init=init, seed=0), statistics)
    assert all(layer.lora_B.any() for _, layer in lora_layers(model))
    assert (logits(model) - exact).norm() < 0.9 * (plain - exact).norm()

    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
    assert distance(logits(theirs), logits(model)) < 1e-5
    again = load_adapter(load_model(folder, dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match=f"adapter began with init '{init}'.* base='dequantized'"):
        merge(again)
    assert distance(logits(merge(again, "dequantized", torch.float32)), logits(model)) < 1e-5


def test_the_inputs_are_those_of_the_model(tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "base"), dtype=torch.float32)
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(CALIBRATION)
    handle.remove()
    x = torch.cat(seen).double()
    for full, expected in ((True, x.t() @ x / len(x)), (False, x.square().mean(0))):
        found = {known.path: known for known in lora_statistics(model, CALIBRATION, full=full)}
        metric = found["model.layers.1.mlp.down_proj"].metric
        assert len(found) == 14 and metric is not None
        assert torch.allclose(metric.double(), expected, rtol=1e-4, atol=1e-6)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "base"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"init 'h_svd' needs statistics: qn.lora_statistics\(model"):
        add_lora(model, LoraConfig(init="h_svd"))
    with pytest.raises(ValueError, match="init 'zero' takes no statistics"):
        add_lora(model, LoraConfig(), [])
    with pytest.raises(ValueError, match="expected a model from load_model"):
        lora_statistics(make())
    add_lora(model, LoraConfig())
    with pytest.raises(ValueError, match="has an adapter already"):
        lora_statistics(model)
    for layer, shape, message in (
        (0, (3, 4), r"hold a weight \[3, 4\]"),
        (0, (96, 64), "needs the inputs' second moments"),
        (9, (96, 64), "of none of the adapted 4-bit layers"),
    ):
        statistics = LayerStatistics(f"model.layers.{layer}.mlp.up_proj", torch.zeros(shape))
        with pytest.raises(ValueError, match=message):
            add_lora(load_model(tmp_path / "base", dtype=torch.float32), LoraConfig(init="h_svd"), [statistics])
    load_model(tmp_path / "base", dtype=torch.float32).save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match="holds 4-bit weights and no 16-bit ones"):
        lora_statistics(load_model(tmp_path / "four", dtype=torch.float32))


def test_a_config_asks_for_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", num_hidden_layers=1)
    config = TrainConfig.model_validate(
        {
            "model": str(folder),
            "output_dir": str(tmp_path / "out"),
            "data": {"train": str(write_rows(tmp_path / "train.jsonl", 200)), "eval_fraction": 0.0},
            "lora": {"r": 4, "init": "h_svd"},
            "train": {"steps": 1, "dtype": "float32"},
        }
    )
    rows, _ = load_rows(config, load_tokenizer(str(folder)))
    model = prepare_model(config, rows=rows, quiet=True)
    assert all(layer.lora_B.any() and layer.lora_B.requires_grad for _, layer in lora_layers(model))
    with pytest.raises(UserError, match="lora.init is h_svd: it needs the training"):
        prepare_model(config, quiet=True)
