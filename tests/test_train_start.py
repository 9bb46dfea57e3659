"""``qlora train`` without a config file, how a run begins by its rows, and the one figure of memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import tiny
import yaml
from safetensors.torch import load_file
from sentences import Check

import qlora_native as qn
from qlora_native.data.dataset import load_dataset
from qlora_native.tool.cli._start import MOST_EPOCHS, schedule
from qlora_native.tool.cli.main import main
from qlora_native.tool.cli.train import config_of
from qlora_native.tool.config import TrainConfig
from qlora_native.weights.open import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_files(tmp_path_factory.mktemp("start"), rows=200)


def words(files: Path, *more: object) -> list[str]:
    return ["--model", str(files / "model"), "--train", str(files / "train.jsonl"), *map(str, more)]


@pytest.mark.parametrize(
    ("rows", "wide", "epochs"),
    [
        (1, 4, MOST_EPOCHS),
        (20, 4, 10),
        (190, 4, 3),
        (400, 4, 1),
        (799, 4, 1),
        (800, 8, 1),
        (1600, 16, 1),
        (10**6, 16, 1),
    ],
)
def test_few_rows_get_enough_steps(rows: int, wide: int, epochs: int) -> None:
    assert schedule(rows) == (wide, epochs)
    assert rows * epochs / wide >= 100 or epochs == MOST_EPOCHS


def test_what_is_not_given_suits_the_rows(files: Path) -> None:
    config = config_of(words(files))
    options = config.train
    assert (options.batch_size * options.grad_accum, options.epochs, options.optimizer) == (4, 3, "adamw")
    assert (options.batch_size, config.data.max_length) == (4, 256)  # of rows so short, all at once
    assert 0 < options.eval_every <= 144 // 5
    given = config_of(words(files, "--batch_size", 2, "--steps", 7, "--max_length", 99, "--optimizer", "lion"))
    options = given.train
    assert (options.batch_size, options.grad_accum, options.steps, options.epochs) == (2, 2, 7, None)
    assert (given.data.max_length, options.optimizer) == (99, "lion")
    assert config_of(words(files, "--grad_accum", 4)).train.batch_size == 1


def test_a_model_and_rows_are_enough(files: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    held = tmp_path / "held.jsonl"
    held.write_text((files / "train.jsonl").read_text().splitlines()[0] + "\n")
    assert main(["train", *words(files, "--eval", held, "--steps", 3, "--output_dir", out)]) == 0
    assert "step 3/3" in capsys.readouterr().out
    resolved = TrainConfig.from_file(out / "adapter" / "config.yaml")
    assert (resolved.train.batch_size, resolved.train.steps, resolved.data.eval) == (4, 3, str(held))
    # Without a file again, the checkpoint has what was chosen.
    more = words(files, "--eval", held, "--steps", 5, "--output_dir", out)
    assert main(["train", *more, "--resume"]) == 0
    assert "after step 3" in capsys.readouterr().out
    assert [line["step"] for line in runs.metrics(out) if "loss" in line] == [1, 2, 3, 4, 5]


def test_answers_are_in_the_report_unless_no_rows_are_held_out(files: Path, tmp_path: Path) -> None:
    assert main(["train", *words(files, "--steps", 2, "--output_dir", tmp_path / "out")]) == 0
    lines = runs.metrics(tmp_path / "out")
    assert [len(line["samples"]) for line in lines if "samples" in line] == [2, 2]
    expected = [sample["expected"] for line in lines for sample in line.get("samples", ())]
    page = (tmp_path / "out" / "report.html").read_text()
    assert len(expected) == 4 and all(text in page for text in expected)
    without = config_of(words(files, "--eval_fraction", 0))
    assert without.train.samples == 0 and config_of(words(files)).train.samples == 2
    assert TrainConfig.from_values(yaml.safe_load(without.to_yaml())).train.samples == 0


@pytest.mark.parametrize(
    "given", ["", "--model base", "--train {0}/train.jsonl", "--model {0}/model --train gone.jsonl"]
)
def test_a_mistake_without_a_file(files: Path, given: str, mistake: Callable[..., str], sentence: Check) -> None:
    sentence(mistake("train", *given.format(files).split()))


def test_the_first_line_is_what_is_trained(files: Path, tmp_path: Path, capsys: Capture, sentence: Check) -> None:
    four, gguf = tmp_path / "four", tmp_path / "file.gguf"
    qn.load_model(files / "model").save_pretrained(four)
    tiny.write_tokenizer(four)
    assert main(["export", str(files / "model"), "--to", "gguf", "--type", "q4_k", "--out", str(gguf)]) == 0
    rows = ["--train", str(files / "train.jsonl"), "--steps", "1", "--samples", "0"]
    for number, (model, more) in enumerate(
        [(files / "model", []), (four, ["--r", "4"]), (gguf, ["--rank_pattern", "q_proj=8"]), (gguf, ["--type", "nf4"])]
    ):
        capsys.readouterr()
        assert main(["train", "--model", str(model), *rows, *more, "--output_dir", str(tmp_path / str(number))]) == 0
        line = capsys.readouterr().out.splitlines()[0]
        sentence(line)
        adapter = load_file(tmp_path / str(number) / "adapter" / "adapter_model.safetensors")
        count = sum(tensor.numel() for tensor in adapter.values())
        assert f"{count / 1000:.3g} k of" in line and f"on {len(adapter) // 2} layers" in line


def test_estimate_takes_what_train_takes(
    files: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes((files / "train.jsonl").read_bytes())
    model, rows = str(files / "model"), str(files / "train.jsonl")
    assert main(["estimate", model]) == 0
    assert "longest" not in capsys.readouterr().out  # of a file that nobody named
    words = ["--model", model, "--train", rows]
    assert main(["estimate", *words]) == 0
    printed = capsys.readouterr().out
    assert f"(the longest of 190 rows of {rows})" in printed
    assert main(["estimate", model, "--gpu", "24GB", "--cpu", *words[2:]]) == 0
    assert capsys.readouterr().out.startswith(printed.splitlines()[0])
    (total,) = re.findall(r"total +([\d,]+ MiB)", printed)
    assert "up to 0.5 GiB" in printed
    assert main(["train", *words, "--steps", "1", "--output_dir", "out"]) == 0
    assert re.findall(r"predicted ([\d,]+ MiB)", capsys.readouterr().out) == [total]


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_one_figure_of_memory(files: Path, tmp_path: Path, kind: str, capsys: Capture) -> None:
    """What `config init` prints, what `estimate` prints of that file, and what the run and its report predict."""
    model, path = str(files / "model"), tmp_path / "mine.yaml"
    if kind == "gguf":
        model = str(tmp_path / "file.gguf")
        assert main(["export", str(files / "model"), "--to", "gguf", "--type", "q8_0", "--out", model]) == 0
    rows = str(files / "train.jsonl")
    assert main(["config", "init", model, "--train", rows, "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "set " not in printed and f"qlora train {path}" in printed
    values = yaml.safe_load(path.read_text())
    assert (values["model"], values["data"]["train"], values["train"]["epochs"]) == (model, rows, 3)
    assert values["output_dir"] == {"folder": "model-qlora", "gguf": "file-qlora"}[kind]
    assert values["train"]["dtype"] == "auto"
    (widest,) = re.findall(r"; up to (\S+) fit", path.read_text())
    assert widest == f"{int(widest.replace(',', '')):,}" and "," in widest
    (first,) = re.findall(r": ([\d,]+ MiB) of [\d,.]+ [MG]iB by", path.read_text().splitlines()[0])
    more = ["--output_dir", str(tmp_path / "out"), "--steps", "1"]
    assert main(["estimate", str(path), *more]) == 0
    printed = capsys.readouterr().out
    assert "longest of 190 rows" in printed
    assert re.findall(r"total +([\d,]+ MiB)", printed) == [first]
    assert main(["train", str(path), *more]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"predicted ([\d,]+ MiB)", printed) == [first]
    memory = json.loads((tmp_path / "out" / "report.json").read_text())["memory"]
    assert main(["estimate", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == sum(memory["predicted"].values())
    longest = load_dataset(rows, load_tokenizer(files / "model")).lengths.max()
    assert 0 <= found["setting"]["length"] - longest < 8 and found["setting"]["batch_size"] == 4
    assert main(["estimate", str(path), "--seq-length", "200", "--json"]) == 0
    longer = json.loads(capsys.readouterr().out)
    assert longer["setting"]["length"] == 200 and longer["total"] > found["total"]
