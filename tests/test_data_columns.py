"""``data.columns``: a file's own names for the keys of a format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from sentences import Check

from qlora_native.data.dataset import load_dataset
from qlora_native.data.formats import infer_format
from qlora_native.data.readers import SourceRow
from qlora_native.errors import UserError
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig
from qlora_native.weights.open import load_tokenizer

COLUMNS = {"instruction": "question", "output": "sql"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("columns")
    tiny.write_model(folder / "model")
    facts = tiny.FACTS
    write(folder / "rows.jsonl", [{"id": n, "question": q, "sql": a, "text": "x"} for n, (q, a) in enumerate(facts)])
    write(folder / "ours.jsonl", [{"instruction": q, "output": a} for q, a in facts])
    lines = ["id,question,sql", *(f"{number},{q},{a}" for number, (q, a) in enumerate(facts))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_rows_are_those_of_a_file_with_our_names(files: Path, name: str) -> None:
    tokenizer = load_tokenizer(files / "model")
    expected = load_dataset(files / "ours.jsonl", tokenizer)
    found = load_dataset(files / name, tokenizer, columns=COLUMNS)
    assert found.stats.format == "alpaca" and len(found) == len(tiny.FACTS)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.labels.tolist() == expected.labels.tolist()
    # One of several files may have our names already.
    both = load_dataset([files / name, files / "ours.jsonl"], tokenizer, columns=COLUMNS)
    assert len(both) == 2 * len(tiny.FACTS)


def test_what_is_named_decides_the_format() -> None:
    row = SourceRow("d.jsonl:1", 1, {"instruction": "i", "output": "o", "prompt": "p", "completion": "c"})
    assert (infer_format([row]), infer_format([row], ["prompt"])) == ("alpaca", "prompt-completion")
    assert infer_format([row], ["system"]) == "alpaca"


@pytest.mark.parametrize(
    "words",
    [
        "--columns instruction=question output=sql",
        "--data.columns.instruction question --data.columns.output sql",
        "--columns {instruction:\xa0question,output:\xa0sql}",
    ],
)
def test_from_the_command_line(files: Path, words: str) -> None:
    given = [word.replace("\xa0", " ") for word in words.split(" ")]
    values = {"model": str(files / "model"), "data": {"train": str(files / "rows.jsonl")}}
    config = TrainConfig.from_values(values, given)
    assert config.data.columns == COLUMNS
    assert TrainConfig.from_values(yaml.safe_load(config.to_yaml())).data.columns == COLUMNS


@pytest.mark.parametrize("given", [{"output": "sq"}, {"output": "wholly other"}, {"outptu": "sql"}, {"x": "sql"}])
def test_mistakes(files: Path, given: dict[str, str], mistake: Callable[..., str], sentence: Check) -> None:
    words = [f"--data.columns.{key}={column}" for key, column in ({"instruction": "question"} | given).items()]
    line = mistake("data", "check", files / "rows.jsonl", "--model", files / "model", *words)
    sentence(line.replace(str(files), "FILES"))


def test_every_command_reads_them(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = str(files / "model"), str(files / "rows.jsonl")
    words = ["--columns", "instruction=question", "output=sql"]
    assert main(["data", "show", rows, "--model", model, *words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["files"][0]["format"] == "alpaca" and shown["rows"][0]["parts"][0]["text"].count("red") == 1
    out = ["--output_dir", str(tmp_path / "out"), "--samples", "0"]
    assert main(["train", "--model", model, "--train", rows, *words, "--steps", "1", *out]) == 0
    capsys.readouterr()
    # The adapter's run names the columns, unless they are given.
    evaluated = ["eval", model, "--data", rows, "--json"]
    losses = []
    for more in (["--adapter", str(tmp_path / "out" / "adapter")], words):
        assert main([*evaluated, *more]) == 0
        losses.append(json.loads(capsys.readouterr().out)["sides"][0]["texts"]["rows.jsonl"]["loss"])
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match="output"):
        load_dataset(rows, load_tokenizer(model), columns={"instruction": "question"})
