"""``qlora eval`` from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import write_model, write_rows, write_tokenizer
from transformers import AutoModelForCausalLM

import qlora_native as qn
from qlora_native.cli import main
from qlora_native.data.dataset import load_dataset
from qlora_native.hf.source import load_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its 4-bit form, rows and text."""
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "model", num_hidden_layers=1)
    write_rows(folder / "held.jsonl", 6)
    (folder / "notes.txt").write_text("what is red? blood. " * 300, encoding="utf-8")
    rows = (f'{{"text": "what is blue and good number {number}? sky"}}\n' for number in range(160))
    (folder / "calibration.jsonl").write_text("".join(rows), encoding="utf-8")
    qn.load_model(folder / "model").save_pretrained(folder / "four")
    write_tokenizer(folder / "four")
    return folder


def test_the_command_line_compares_and_reports_plainly(files: Path, tmp_path: Path) -> None:
    words: list[str | Path] = [sys.executable, "-m", "qlora_native", "eval", files / "model"]
    words += ["--report", tmp_path / "r", "--compare", "rtn", "wmse", "--calibration", files / "calibration.jsonl"]
    words += ["--data", files / "held.jsonl", files / "notes.txt"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    table = done.stdout.partition("**held.jsonl**")[2]
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert names[:4] == ["", "16-bit", "rtn", "wmse"]
    assert "peak memory" in done.stdout and (tmp_path / "r" / "report.md").is_file()


def test_json_is_one_object_and_nothing_else(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(files / "four"), "--reference", str(files / "model"), "--data", str(files / "held.jsonl")]
    assert main.main([*words, "--rows", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [side["name"] for side in printed["sides"]] == ["16-bit", "4-bit"]
    row = printed["sides"][1]["texts"]["held.jsonl"]
    assert row["kl"] > 0 and row["closed"] is None and printed["peak_rss_bytes"] > 0


def test_dtype_is_that_of_the_models(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def loss(*words: str) -> float:
        assert main.main(["eval", str(files / "model"), "--data", str(files / "held.jsonl"), "--json", *words]) == 0
        return float(json.loads(capsys.readouterr().out)["sides"][0]["texts"]["held.jsonl"]["loss"])

    model = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    rows = load_dataset(files / "held.jsonl", load_tokenizer(files / "model"))
    totals = [0.0, 0]
    for row in rows:
        ids, labels = (torch.from_numpy(row[key].astype("int64")) for key in ("input_ids", "labels"))
        count = int((labels >= 0).sum())
        totals[0] += model(ids[None], labels=labels[None]).loss.item() * count
        totals[1] += count
    truth = totals[0] / totals[1]
    assert loss("--dtype", "float32") == pytest.approx(truth, rel=1e-5)
    assert abs(loss() - truth) > 1e-5 * truth, "bfloat16"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["{model}"], "--data FILE or --lm-eval TASK"),
        (["{model}", "--choices", "{held}"], "--lm-eval TASK"),
        (["{model}", "--data", "{files}/gone.jsonl"], "gone.jsonl: no such data file"),
        (["{model}", "--data", "{held}", "--compare", "rtn", "gptq"], "method gptq needs calibration text"),
        (["{model}", "--data", "{held}", "--compare", "rnt"], "'rnt' is no method"),
        (["{model}", "--data", "{held}", "--compare", "wmse", "--calibration", "{held}"], "held.jsonl is evaluated"),
        (["{four}", "--data", "{held}", "--compare", "wmse"], "four is 4-bit already"),
        (["{model}", "--data", "{held}", "--reference", "{model}"], "16-bit and its own reference"),
        (["{four}", "--data", "{held}", "--reference", "{four}"], "four holds 4-bit weights: expected the 16-bit"),
        (["{model}", "--data", "{held}", "--adapter", "{files}"], "adapter_config.json"),
        (["{files}/gone", "--data", "{held}"], "gone is not there: expected"),
        (["{model}", "--data", "{held}", "--max-length", "1"], "--max-length is 1: expected 2"),
        (["{model}", "--data", "{held}", "--rows", "0"], "--rows is 0: expected 1"),
        (["{model}", "--data", "{held}", "{files}/model/../held.jsonl"], "two files are called held.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence(
    files: Path, words: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill = {"files": files, "model": files / "model", "four": files / "four", "held": files / "held.jsonl"}
    assert main.main(["eval", *(word.format(**fill) for word in words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("qlora")]) == 1 and match in lines[-1], lines
