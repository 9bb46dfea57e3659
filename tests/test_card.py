"""The card beside an adapter, and the loggers, after a run of two steps."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import tiny
import torch
import yaml
from sentences import Check

import qlora_native as qn
from qlora_native.cli import main
from qlora_native.cli._weights import as_trained
from qlora_native.errors import UserError
from qlora_native.train.progress import make_loggers, read_metrics

Run = tuple[Path, list[tuple[str, Any]]]  # the folder, and the calls of the package trackio


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("card")
    calls: list[tuple[str, Any]] = []
    trackio = SimpleNamespace(  # the package itself needs a service of its own
        __spec__=ModuleType("spec"),
        init=lambda **options: calls.append(("init", options)),
        log=lambda values, step: calls.append(("log", (step, values))),
        finish=lambda: calls.append(("finish", None)),
    )
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", 8)
    (folder / "config.yaml").write_text(
        f"model: {folder / 'model'}\noutput_dir: {folder / 'out'}\nlogging: [trackio]\n"
        f"data: {{train: {folder / 'rows.jsonl'}}}\nquant: {{block_size: 32}}\n"
        "train: {steps: 2, batch_size: 2, grad_accum: 1, eval_every: 1}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "trackio", trackio)
        assert main.main(["train", str(folder / "config.yaml")]) == 0
    return folder, calls


def test_the_card_has_data_config_losses_and_versions(run: Run) -> None:
    folder, _ = run
    text = (folder / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["base_model"] == str(folder / "model") and head["library_name"] == "peft" and "lora" in head["tags"]
    assert hashlib.sha256((folder / "rows.jsonl").read_bytes()).hexdigest() in body
    losses = [line["eval_loss"] for line in read_metrics(folder / "out" / "metrics.jsonl") if "eval_loss" in line]
    assert f"{losses[0]:.4f} before training, {losses[-1]:.4f} nats a token" in body
    assert f"- torch {version('torch')}" in body and f"- qlora_native {qn.__version__}" in body
    (config,) = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)
    assert yaml.safe_load(config) == yaml.safe_load((folder / "out" / "adapter" / "config.yaml").read_text())
    assert (folder / "out" / "best" / "README.md").is_file() == (folder / "out" / "best").is_dir()


@torch.no_grad()
def test_its_code_loads_the_adapter(run: Run) -> None:
    folder, _ = run
    text = (folder / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for code, names in zip(codes, (ours, theirs), strict=True):
        exec(code.replace("path/to/this/folder", str(folder / "out" / "adapter")), names)
    assert ours["model"].model.layers[0].mlp.up_proj.base_layer.quantized.block_size == 32
    assert isinstance(theirs["model"], peft.PeftModel)


def test_chat_and_merge_take_the_run_at_its_word(run: Run, tmp_path: Path) -> None:
    folder, _ = run
    adapter, config = folder / "out" / "adapter", folder / "out" / "adapter" / "config.yaml"

    def taken(rounds: bool = True, **given: Any) -> dict[str, Any]:
        options = {"model": folder / "model", "adapter": adapter, "skip_modules": None, "quant_type": None}
        return as_trained(Namespace(**{**options, "block_size": None, "double_quant": None, **given}), rounds)

    assert taken() == {"quant_type": "nf4", "block_size": 32, "double_quant": True}
    assert taken(block_size=128)["block_size"] == 128
    shutil.copytree(adapter, tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    (adapter / "config.yaml").write_text(config.read_text().replace("method: rtn\n", "method: gptq\n"))
    assert taken(rounds=False)["block_size"] == 32
    with pytest.raises(UserError, match=r"made by gptq.*`qlora quantize \S+ --method gptq --calibration FILE --block-"):
        taken()
    (tmp_path / "calibration.safetensors").touch()
    with pytest.raises(UserError, match=rf"--calibration {tmp_path}/calibration.safetensors --block-size 32 --out"):
        taken()


def test_the_folder_of_a_run_is_no_adapter(run: Run, mistake: Callable[..., str]) -> None:
    folder, _ = run
    refused = mistake("merge", folder / "model", folder / "out", "--out", folder / "new")
    assert f"did you mean {folder / 'out' / 'adapter'}?" in refused


def test_trackio_gets_every_line(run: Run) -> None:
    folder, calls = run
    (first, options), *logs, (last, _) = calls
    assert (first, last) == ("init", "finish") and options["config"]["train"]["steps"] == 2
    lines = read_metrics(folder / "out" / "metrics.jsonl")
    assert [step for _, (step, _) in logs] == [line["step"] for line in lines]
    for (_, (_, values)), line in zip(logs, lines, strict=True):
        key, name = ("eval_loss", "eval/loss") if "eval_loss" in line else ("loss", "train/loss")
        assert values[name] == pytest.approx(line[key])


def test_a_logger_that_is_not_there_is_reported_first(run: Run, mistake: Callable[..., str], sentence: Check) -> None:
    folder, _ = run
    words = ["train", folder / "config.yaml", "--output_dir", folder / "none", "--model", "gone"]
    # The logger of the config, without the stand-in.
    sentence(mistake(*words))
    sentence(mistake(*words, "--logging", "[wandb]"))


def test_tensorboard_gets_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logger,) = make_loggers(["tensorboard"], tmp_path, {})
    logger.write({"step": 3, "loss": 0.5, "lr": float("nan"), "text": "x"})
    logger.write({"step": 4, "eval_loss": 0.25})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "eval/loss"]
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(4, 0.25)]
