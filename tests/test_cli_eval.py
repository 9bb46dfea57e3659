"""``qlora eval`` from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from tiny import write_model, write_rows, write_tokenizer
from transformers import AutoModelForCausalLM

import qlora_native as qn
from qlora_native.data.dataset import load_dataset
from qlora_native.tool.cli import main
from qlora_native.tool.train.loop import Trainer
from qlora_native.weights.open import load_tokenizer


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
    assert names[:4] == ["", "16-bit base", "base, 4-bit by rtn", "base, 4-bit by wmse"]
    assert "peak memory" in done.stdout and (tmp_path / "r" / "report.md").is_file()


@pytest.fixture(scope="module")
def adapter(files: Path) -> Path:
    """Trained until it knows most rows."""
    values = runs.settings(files, files / "run", {"train": str(files / "held.jsonl")}, steps=40, lr=4e-3, samples=0)
    return Trainer(qn.TrainConfig.from_values(values), quiet=True).train().adapter_dir


@torch.no_grad()
def exact_rows(model: torch.nn.Module, rows: Sequence[dict[str, Any]]) -> int:
    """How many answers greedy generation gives token for token."""
    count = 0
    for row in rows:
        start = int((row["labels"] >= 0).argmax())
        ids = torch.from_numpy(row["input_ids"].astype("int64"))
        prompt, expected = ids[None, :start], ids[start:]
        options = {"do_sample": False, "max_new_tokens": len(expected), "eos_token_id": int(expected[-1])}
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, start:]  # type: ignore[operator]
        count += torch.equal(found, expected)
    return count


def test_is_it_better(files: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(files / "four"), "--adapter", str(adapter), "--data", str(files / "held.jsonl")]
    assert main.main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    base, tuned = (side["texts"]["held.jsonl"] for side in printed["sides"])
    assert printed["better"] == {"held.jsonl": True}
    assert (
        tuned["change"] == pytest.approx(tuned["loss"] - base["loss"]) and 0 < tuned["change_error"] < -tuned["change"]
    )
    assert base["change"] is base["kl"] is tuned["closed"] is None
    tokenizer = load_tokenizer(files / "four")
    rows = load_dataset(files / "held.jsonl", tokenizer)
    models = {"base": qn.load_model(files / "four"), "tuned": qn.load_adapter(qn.load_model(files / "four"), adapter)}
    counts = {name: exact_rows(model.eval(), rows) for name, model in models.items()}
    assert counts["tuned"] > counts["base"] and len(rows) == 6
    assert (base["exact"], tuned["exact"]) == pytest.approx((counts["base"] / 6, counts["tuned"] / 6))
    assert [*printed["answers"][0]] == ["text", "question", "expected", "base", "tuned"] and len(
        printed["answers"]
    ) == 5
    for about, row in zip(printed["answers"], rows, strict=False):
        ids = row["input_ids"].tolist()
        start = int((row["labels"] >= 0).argmax())
        assert about["expected"] == tokenizer.decode(ids[start:-1]).strip() and "what is" in about["question"]
    matched = sum(about["tuned"] == about["expected"] for about in printed["answers"])
    assert matched == exact_rows(models["tuned"], [rows[at] for at in range(5)])

    assert main.main([*words, "--answers", "2"]) == 0
    text = capsys.readouterr().out
    head = next(line for line in text.splitlines() if line.startswith("| "))
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["", "loss", "perplexity", "less base", "exact"]
    assert f"| {counts['tuned']} of 6" in text and "Better with the adapter: " in text
    assert [text.count(f"   - {part}: ") for part in ("question", "expected", "base", "tuned")] == [2] * 4


NAMES = ["16-bit base", "base, 4-bit by rtn", "base, 4-bit by rtn + adapter"]


def test_no_column_is_empty_or_compares_a_thing_with_itself(
    files: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(files / "model"), "--data", str(files / "held.jsonl"), str(files / "notes.txt")]
    assert main.main([*words, "--adapter", str(adapter), "--answers", "0"]) == 0
    text, tables = capsys.readouterr().out, []
    for name in ("held.jsonl", "notes.txt"):
        rows = text.partition(f"**{name}**")[2].split("\n\n")[1].splitlines()
        tables.append([[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if "---" not in row])
    for part in tables:
        head, *body = part
        assert [row[0] for row in body] == NAMES and "gap closed" not in head
        assert all(any(row[at] for row in body) for at in range(len(head)))
        assert not body[0][head.index("KL to 16-bit")]
    assert "exact" in tables[0][0] and "exact" not in tables[1][0]  # plain text has no answers
    (legend,) = re.findall("^Rows: .*$", text, re.MULTILINE)
    assert all(f"{name}: " in legend for name in NAMES)


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
        (["{model}", "--data", "{held}", "--answers", "-1"], "--answers is -1: expected 0"),
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
