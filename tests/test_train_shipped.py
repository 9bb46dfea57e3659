"""lora.ship: the run ends with a 4-bit model that is, code for code, the one that the last evaluation was of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from helpers import relative_error
from runs import Crash, crash_at, metrics, write_files
from tiny_models import four_bit_layers

import qlora_native as qn
from qlora_native.data.dataset import load_split
from qlora_native.errors import UserError
from qlora_native.lora import lora_layers
from qlora_native.models import recode as module
from qlora_native.models.calibrate import side_by_side
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.evaluate.retention import describe
from qlora_native.tool.train import shipping
from qlora_native.tool.train.loop import Trainer, TrainSummary
from qlora_native.tool.train.shipping import Shipping

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


def trainer(files: Path, out: Path, on_step: Any = None, resume: str | None = None, **options: Any) -> Trainer:
    lora = {"r": 4, "alpha": 8, "dropout": 0.1, "ship": "nf4", **options.pop("lora", {})}
    train = {"steps": 6, "batch_size": 3, "grad_accum": 2, "lr": 5e-3, "save_every": 2, "eval_every": 3, **options}
    settings = runs.settings(files, out, {"eval_fraction": 0.2}, lora, **train)
    return Trainer(TrainConfig.model_validate({**settings, "resume": resume}), quiet=True, on_step=on_step)


@pytest.fixture(scope="module")
def shipped(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, TrainSummary]:
    run = trainer(files, tmp_path_factory.mktemp("shipped") / "out")
    return run, run.train()


def test_the_model_written_is_the_model_evaluated(shipped: tuple[Trainer, TrainSummary]) -> None:
    run, summary = shipped
    folder: Any = summary.shipped_dir
    assert folder is not None
    layers: dict[str, Any] = dict(lora_layers(run.model))
    loaded: Any = qn.load_model(folder)
    assert loaded.load_report.method == "trained"
    changed = 0.0
    for path, layer in four_bit_layers(loaded).items():
        expected = layers[path].shipped
        assert torch.equal(layer.quantized.packed, expected.packed), path
        base = layers[path].base_layer.quantized
        assert torch.equal(layer.quantized.absmax, base.absmax)
        changed += float((expected.packed != base.packed).double().mean()) / len(layers)
    assert 0.001 < changed < 0.5
    held_out: Any = load_split(tokenizer=run.tokenizer, **run.config.row_options)[1]
    run_of_it = Trainer(run.config, model=loaded, tokenizer=run.tokenizer, quiet=True)
    assert run_of_it.evaluate(held_out) == pytest.approx(summary.loss_after, abs=1e-6)

    found: Any = summary.retention
    assert found["shipped_loss"] == pytest.approx(summary.loss_after) and found["tokens"] > 0
    assert found["base_loss"] == pytest.approx(summary.loss_before)  # B is zero at the start
    beside: Any = qn.load_adapter(qn.load_model(run.config.model), summary.adapter_dir)
    adapted = Trainer(run.config, model=beside, tokenizer=run.tokenizer, quiet=True).evaluate(held_out)
    assert found["adapted_loss"] == pytest.approx(adapted, abs=1e-6)
    share = (summary.loss_before - summary.loss_after) / (summary.loss_before - adapted)  # type: ignore[operator]
    assert found["retention"] == pytest.approx(share, abs=1e-4) and found["retention_error"] > 0
    card = (summary.adapter_dir / "README.md").read_text(encoding="utf-8")
    assert describe(found) in card


def test_the_codes_are_those_of_a_merge(shipped: tuple[Trainer, TrainSummary], monkeypatch: pytest.MonkeyPatch) -> None:
    """Found while every layer computes as it was trained; what is found is used afterwards."""
    run, summary = shipped
    given: list[torch.Tensor] = []

    def recode(model: Any, ids: torch.Tensor, *rest: Any) -> None:
        given.append(ids)
        module.recode(model, ids, *rest)

    def beside() -> Any:
        return qn.load_adapter(qn.load_model(run.config.model), summary.adapter_dir)

    monkeypatch.setattr(shipping, "recode", recode)
    model = beside()
    rows = load_split(tokenizer=run.tokenizer, **run.config.row_options)[0]
    Shipping(run.config, model, rows, 6, print).recode()
    merged: dict[str, torch.Tensor] = {}
    with side_by_side(torch.device("cpu")) as (pool, _):
        module.recode(beside(), given[0], pool, merged.__setitem__)
    for (path, layer), (_, of_run) in zip(lora_layers(model), lora_layers(run.model), strict=True):
        assert torch.equal(layer.shipped.packed, merged[path]), path  # type: ignore[union-attr]
        assert torch.equal(of_run.shipped.packed, merged[path]), path  # type: ignore[union-attr]


def test_it_loads_elsewhere(shipped: tuple[Trainer, TrainSummary], theirs: Any) -> None:
    del theirs
    folder = shipped[1].shipped_dir
    assert folder is not None
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12)[None] + 3
    other = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    ours: Any = qn.load_model(folder)
    for path, layer in four_bit_layers(ours).items():
        assert torch.equal(other.get_submodule(path).weight.data.view(-1), layer.quantized.packed), path
    assert relative_error(other(ids).logits, ours(ids).logits) < 5e-2  # in bf16


def test_a_run_that_crashed_ships_the_same_bytes(
    files: Path, tmp_path: Path, shipped: tuple[Trainer, TrainSummary]
) -> None:
    with pytest.raises(Crash):
        trainer(files, tmp_path / "out", crash_at(5)).train()
    trainer(files, tmp_path / "out", resume="auto").train()
    before = Path(shipped[0].config.output_dir)
    for name in ("shipped/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (before / name).read_bytes(), name
    assert metrics(tmp_path / "out") == metrics(before)


def test_layers_that_cannot_ship_so_are_refused(files: Path, tmp_path: Path) -> None:
    run = trainer(files, tmp_path / "out", lora={"target_modules": ["lm_head"]})
    with pytest.raises(UserError, match="lora.ship is nf4, and lm_head is dense"):
        run.train()
