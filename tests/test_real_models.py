"""The whole way on models that people use: load, train, chat, eval and export, each from its own GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_native.tool.cli.demo import demo_config
from qlora_native.tool.cli.demo_models import MODELS
from qlora_native.tool.cli.standard_library import write_split
from qlora_native.tool.train.loop import Trainer

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", [name for name in MODELS if name != "smollm2"])
def test_a_real_model(
    name: str,
    real_model: Callable[[str], Path],
    tmp_path: Path,
    printed: Callable[..., dict[str, Any]],
    record_property: Callable[[str, object], None],
) -> None:
    """Ten steps lower the held-out loss, and chat, eval and export find the weights that were trained on."""
    gguf = pytest.importorskip("gguf")
    path, about, run = real_model(name), MODELS[name], tmp_path / "run"
    _, held_out, _, _ = write_split(run / "data", 700, 8)
    config = demo_config(path, run, 10, 5e-4, 0, keep=about.keep, grad_checkpointing=about.grad_checkpointing)
    if not about.keep:
        quant = config.quant.model_copy(update={"method": "rtn"})  # calibration takes a minute, and the demo has it
        config = config.model_copy(update={"quant": quant})
    trainer = Trainer(config)
    summary = trainer.train()
    assert trainer.model.load_report.is_kept is about.keep
    assert summary.loss_before is not None and summary.loss_after is not None
    assert summary.loss_after < summary.loss_before - 0.1 and summary.skipped_steps == 0
    record_property(f"{name}: held-out loss before and after", (summary.loss_before, summary.loss_after))
    memory = json.loads((run / "report.json").read_text())["memory"]
    predicted, measured = sum(memory["predicted"].values()), memory["measured"] + memory["mapped"]
    assert 0.9 < predicted / measured < 1.25 or not memory["measured"], memory
    del trainer

    adapter = summary.adapter_dir
    words: tuple[object, ...] = ("--adapter", adapter, "--prompt", "What is 2 + 2?", "--max-tokens", 8)
    answers = printed("chat", path, *words)["answers"]
    assert [answer["from"] for answer in answers] == ["base", "adapter"]
    assert name == "gemma-270m" or "4" in answers[0]["text"]  # that one was not taught to answer

    words = ("--data", held_out, "--adapter", adapter, "--report", tmp_path / "report")
    sides = printed("eval", path, *words)["sides"]
    losses = {side["name"]: side["texts"]["heldout.jsonl"]["loss"] for side in sides}
    *_, base, trained = losses.values()
    assert base == pytest.approx(summary.loss_before, abs=0.01), losses
    assert trained == pytest.approx(summary.loss_after, abs=0.01), losses

    if about.keep:
        printed("export", adapter, "--to", "gguf-adapter", "--out", tmp_path / "adapter.gguf")
        reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
        assert reader.fields["general.type"].contents() == "adapter" and len(reader.tensors) % 14 == 0  # 7 layers, A, B
    else:
        printed("export", path, "--adapter", adapter, "--to", "peft", "--out", tmp_path / "exported")
        assert (tmp_path / "exported" / "adapter_model.safetensors").is_file()
