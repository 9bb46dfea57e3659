"""The card beside an adapter, and the loggers, after a run of two steps."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import yaml
from sentences import Check

import qlora_native as qn
from qlora_native.errors import UserError
from qlora_native.tool.cli import main
from qlora_native.tool.cli._weights import as_trained, merge_base
from qlora_native.tool.train.progress import make_loggers, read_metrics

Run = tuple[Path, list[Any]]  # the folder, and the calls of the package trackio


def stand_in(name: str, *functions: str) -> Any:
    """For a package of which these functions are used; the packages themselves are tried below."""
    return Mock(spec=[*functions, "__spec__"], __spec__=ModuleSpec(name, None))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, trackio = tmp_path_factory.mktemp("card"), stand_in("trackio", "init", "log", "finish")
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
    return folder, trackio.mock_calls


def test_the_card_has_data_config_losses_and_versions(run: Run) -> None:
    folder, _ = run
    text = (folder / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["base_model"] == str(folder / "model") and head["library_name"] == "peft" and "lora" in head["tags"]
    assert hashlib.sha256((folder / "rows.jsonl").read_bytes()).hexdigest() in body
    losses = [line["eval_loss"] for line in read_metrics(folder / "out" / "metrics.jsonl") if "eval_loss" in line]
    assert f"{losses[0]:.4f} before" in body and f"{losses[-1]:.4f} nats" in body
    assert f"- torch {version('torch')}" in body and f"- qlora_native {qn.__version__}" in body
    (config,) = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)
    assert yaml.safe_load(config) == yaml.safe_load((folder / "out" / "adapter" / "config.yaml").read_text())
    assert (folder / "out" / "best" / "README.md").is_file() == (folder / "out" / "best").is_dir()


def test_the_run_is_taken_at_its_word(run: Run, tmp_path: Path) -> None:
    """Beside what test_bases.py shows with every command."""
    given: dict[str, Any] = {"model": run[0] / "model", "adapter": tmp_path / "a"}
    shutil.copytree(run[0] / "out" / "adapter", tmp_path / "a")
    assert as_trained(Namespace(**given)).options == {"quant_type": "nf4", "block_size": 32, "double_quant": True}
    assert as_trained(Namespace(**given, block_size=128)).options["block_size"] == 128
    config = tmp_path / "a" / "config.yaml"
    config.write_text(config.read_text().replace("method: rtn\n", "method: gptq\n"))
    assert merge_base(Namespace(**given, base="original"))[1].options["block_size"] == 32
    with pytest.raises(UserError, match=r"made by gptq.*`qlora quantize \S+ --method gptq --calibration FILE --block-"):
        as_trained(Namespace(**given))
    (tmp_path / "calibration.safetensors").touch()
    with pytest.raises(UserError, match=rf"--calibration {tmp_path}/calibration.safetensors --block-size 32 --out"):
        as_trained(Namespace(**given))


def test_trackio_gets_every_line(run: Run) -> None:
    folder, (first, *logs, last) = run
    assert (first[0], last[0]) == ("init", "finish") and first.kwargs["config"]["train"]["steps"] == 2
    lines = read_metrics(folder / "out" / "metrics.jsonl")
    assert [log.kwargs["step"] for log in logs] == [line["step"] for line in lines]
    for log, line in zip(logs, lines, strict=True):
        key, name = ("eval_loss", "eval/loss") if "eval_loss" in line else ("loss", "train/loss")
        assert log.args[0][name] == pytest.approx(line[key])


RECORDS: list[dict[str, Any]] = [
    {"step": 3, "loss": 0.5, "lr": float("nan"), "samples": [{"answer": "x"}], "text": "x"},
    {"step": 4, "eval_loss": 0.25},
]
LOGGED = [({"train/loss": 0.5}, 3), ({"eval/loss": 0.25}, 4)]


def write_to(name: str, folder: Path) -> None:
    (logger,) = make_loggers([name], folder / "run", {"lora": {"r": 3}})
    for record in RECORDS:
        logger.write(record)
    logger.close()


@pytest.mark.parametrize(
    ("name", "functions", "log", "last"),
    [
        ("wandb", ("init",), "log", "finish"),
        ("mlflow", ("set_experiment", "start_run", "log_dict"), "log_metrics", "end_run"),
    ],
)
def test_the_other_loggers_get_it_too(
    name: str, functions: tuple[str, ...], log: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = stand_in(name, *functions, log, last)
    monkeypatch.setitem(sys.modules, name, package)
    write_to(name, tmp_path)
    calls = package.mock_calls
    assert [call[0] for call in calls] == [*functions, log, log, last]
    assert [(call.args[0], call.kwargs["step"]) for call in calls if call[0] == log] == LOGGED
    assert "'run'" in str(calls) and "'r': 3" in str(calls) and "'qlora_native'" in str(calls)


def test_tensorboard_itself(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_to("tensorboard", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert [({tag: event.value}, event.step) for tag in tags for event in events.Scalars(tag)] == LOGGED


def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    write_to("mlflow", tmp_path)
    (found,) = mlflow.search_runs(experiment_names=["qlora_native"], output_format="list")
    assert found.info.run_name == "run" and found.data.metrics == {"train/loss": 0.5, "eval/loss": 0.25}


def test_trackio_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # which it reads when it is imported
    trackio = pytest.importorskip("trackio")
    write_to("trackio", tmp_path)
    (run,) = trackio.Api().runs("qlora_native")
    assert (run.name, run.config["lora"]) == ("run", {"r": 3})
    (first, second) = trackio.SQLiteStorage.get_logs("qlora_native", "run")
    assert (first["step"], first["train/loss"], second["step"], second["eval/loss"]) == (3, 0.5, 4, 0.25)


def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for key, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    (logger,) = make_loggers(["wandb"], tmp_path / "run", {"lora": {"r": 3}})
    logger.write({"step": 3, "loss": 0.5})
    logger.write({"step": 3, "eval_loss": 0.25})
    logger.write({"step": 4, "text": "x"})  # which ends step 3
    run, summary = wandb.run, dict(wandb.run.summary)
    assert (run.name, run.project, run.config["lora"]) == ("run", "qlora_native", {"r": 3})
    logger.close()
    assert (summary["train/loss"], summary["eval/loss"]) == (0.5, 0.25)


def test_a_logger_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentence: Check) -> None:
    wandb = stand_in("wandb", "init")
    wandb.init.side_effect = RuntimeError("No API key configured.\nUse `wandb login` to log in.")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError) as refused:
        make_loggers(["wandb"], tmp_path / "run", {})
    sentence(refused.value)


def test_a_logger_that_is_not_there_is_reported_first(run: Run, mistake: Callable[..., str], sentence: Check) -> None:
    folder, _ = run
    words = ["train", folder / "config.yaml", "--output_dir", folder / "none", "--model", "gone"]
    # The logger of the config, without the stand-in.
    sentence(mistake(*words))
    sentence(mistake(*words, "--logging", "[comet]"))
