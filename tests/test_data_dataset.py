"""From a file to arrays: every format end to end, the counts, what is dropped, and that batches come out of it."""

from __future__ import annotations

import csv
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentences import Check
from test_data_template import NO_SYSTEM, byte_tokenizer, im, marked

from qlora_native.data.batching import BatchSampler, collate
from qlora_native.data.dataset import TokenizedDataset, load_dataset
from qlora_native.data.template import Encoded
from qlora_native.errors import UserError


def jsonl(folder: Path, *rows: Any, name: str = "train.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def alpaca(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "output": answer}


def shown(tokenizer: Any, dataset: TokenizedDataset, index: int) -> str:
    row = dataset[index]
    return marked(tokenizer, Encoded(row["input_ids"].tolist(), row["labels"].tolist()))


HEADER = 1 + 5 + 1 + 2 + 1 + 10  # tokens of an exchange before its answer, the question being one byte
MESSAGES = [{"role": "user", "content": 'q, "r"\ns'}, {"role": "assistant", "content": "a"}]
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
TOOL = {"type": "function", "function": {"name": "im_start", "parameters": {}}}  # a name that the template renders
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": MESSAGES, "tools": [TOOL]}, im('u:q, "r"\ns', "a!a")),
    "sharegpt": ({"conversations": TURNS, "system": "s"}, im("s:s", "u:q", "a!a")),
    "alpaca": (
        {"instruction": "q", "input": "i", "output": "a", "history": [["p", "o"]]},
        im("u:p", "a!o", "u:q\n\ni", "a!a"),
    ),
    "prompt-completion": ({"prompt": "q: ", "completion": "a"}, "q: [[a<|im_end|>]]"),
    "text": ({"text": "ab,c\n"}, "a[[b,c\n<|im_end|>]]"),
}


@pytest.mark.parametrize("format", ROWS)
def test_every_format_from_file_to_tokens(tmp_path: Path, format: str) -> None:
    tokenizer = byte_tokenizer()
    row, text = ROWS[format]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
        csv.writer(file).writerows([row, cells, cells])
    for path in (jsonl(tmp_path, row, row), tmp_path / "rows.csv"):
        dataset = load_dataset(path, tokenizer)
        assert (dataset.stats.format, dataset.stats.inferred) == (format, True)
        assert [shown(tokenizer, dataset, index) for index in range(len(dataset))] == [text, text]
    forced = load_dataset(jsonl(tmp_path, {"text": "abc", **row, "extra": 1}), tokenizer, format=format)
    assert (forced.stats.format, forced.stats.inferred) == (format, False)
    assert shown(tokenizer, forced, 0) == text


def test_rows_and_arrays(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    dataset = load_dataset(jsonl(tmp_path, alpaca("q", "a"), "\n", alpaca("q", "bcd")), tokenizer)
    assert len(dataset) == 2
    assert (dataset.lines.tolist(), dataset.trained.tolist()) == ([1, 3], [2, 4])
    assert (dataset.lengths.tolist(), dataset.starts.tolist()) == ([HEADER + 3, HEADER + 5], [0, HEADER + 3])
    assert dataset.input_ids.dtype == dataset.labels.dtype == np.int32
    second = dataset[1]
    assert np.array_equal(second["input_ids"], dataset.input_ids[HEADER + 3 :])
    assert np.shares_memory(second["labels"], dataset.labels)
    assert np.array_equal(dataset[-1]["labels"], second["labels"])
    assert len(list(dataset)) == 2
    for index in (2, -3):
        with pytest.raises(IndexError):
            dataset[index]
    with pytest.raises(ValueError, match="read-only"):
        second["input_ids"][0] = 1
    assert dataset.labels[dataset.starts].tolist() == [-100, -100]


def test_counts_of_kept_truncated_and_dropped_rows(tmp_path: Path, sentence: Check) -> None:
    rows = [alpaca("q", "a"), alpaca("q", "abcdefgh"), alpaca("q" * 30, "a"), alpaca("q", "abc")]
    file = jsonl(tmp_path, *rows)
    dataset = load_dataset(file, byte_tokenizer(), max_length=HEADER + 5)
    stats = dataset.stats
    assert (dataset.lines.tolist(), dataset.truncated.tolist()) == ([1, 2, 4], [False, True, False])
    assert (stats.rows, stats.dropped, stats.dropped_too_long, stats.truncated) == (3, 1, 1, 1)
    assert (dataset.dropped.lines.tolist(), dataset.dropped.too_long.tolist()) == ([3], [True])
    assert stats.tokens == (HEADER + 3) + (HEADER + 5) + (HEADER + 5)
    assert stats.trained_tokens == 2 + 5 + 4
    assert stats.share_trained == pytest.approx(11 / stats.tokens)
    assert stats.files == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    assert (stats.path, stats.max_length, stats.train_on, stats.template) == (str(file), 25, "answers", "tokenizer")
    as_json = json.loads(json.dumps(stats.as_dict()))
    assert (as_json["dropped"], as_json["share_trained"]) == (1, stats.share_trained)
    sentence(stats.describe())


def test_the_default_template_and_moved_system_messages_are_described(tmp_path: Path, sentence: Check) -> None:
    file = jsonl(tmp_path, {**alpaca("q", "a"), "system": "s"}, alpaca("q", "a"))
    plain = load_dataset(file, byte_tokenizer(None, eos="</s>"), format="alpaca")
    assert plain.stats.template == "default"
    sentence(plain.stats.describe())
    folded = load_dataset(file, byte_tokenizer(NO_SYSTEM))
    assert folded.stats.folded_system == 1
    sentence(folded.stats.describe())
    assert load_dataset(jsonl(tmp_path, {"text": "abc"}), byte_tokenizer(None)).stats.template == "none"


def test_train_on_all_and_limit(tmp_path: Path) -> None:
    file = jsonl(tmp_path, alpaca("q", "a"), alpaca("q", "b"), "{broken\n")
    stats = load_dataset(file, byte_tokenizer(), train_on="all", limit=2).stats
    assert (stats.trained_tokens, stats.train_on) == (stats.tokens - 2, "all")


@pytest.mark.parametrize("line", [2, 21, 40])
def test_a_bad_row_anywhere_is_named(tmp_path: Path, line: int) -> None:
    rows: list[Any] = [alpaca("q", "a")] * 40
    for bad, match in (("{broken\n", "JSON"), ({"instruction": "q"}, "needs 'output'"), (alpaca("q", ""), "is empty")):
        file = jsonl(tmp_path, *rows[: line - 1], bad, *rows[line:])
        with pytest.raises(UserError, match=f"^{file}:{line}: .*{match}"):
            load_dataset(file, byte_tokenizer())


def test_a_file_without_anything_to_train(tmp_path: Path, sentence: Check) -> None:
    for match, rows in (
        (f"2 of 2 rows .*max_length={HEADER} ", [alpaca("q", "a"), alpaca("r", "b")]),
        ("none of the 1 rows", [{"messages": [{"role": "user", "content": "q"}]}]),
    ):
        with pytest.raises(UserError, match=match) as caught:
            load_dataset(jsonl(tmp_path, *rows), byte_tokenizer(), max_length=HEADER)
        sentence(caught.value)
    with pytest.raises(ValueError, match="format is 'json', expected"):
        load_dataset(tmp_path / "train.jsonl", byte_tokenizer(), format="json")


# ---- parts of a data set


def test_subset_keeps_rows_lines_and_counts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = [*(alpaca("q", letter * size) for size, letter in enumerate("abcd", 1)), alpaca("q" * 30, "a")]
    whole = load_dataset(jsonl(tmp_path, *rows), tokenizer, max_length=HEADER + 4)
    part = whole.subset([3, 0])
    assert [shown(tokenizer, part, index) for index in range(2)] == [shown(tokenizer, whole, index) for index in (3, 0)]
    assert (part.lines.tolist(), part.truncated.tolist()) == ([4, 1], [True, False])
    assert (part.stats.rows, part.stats.truncated, part.stats.trained_tokens) == (2, 1, 4 + 2)
    assert part.stats.dropped == whole.stats.dropped == 1, "of the file"
    assert part.stats.tokens == 2 * HEADER + 4 + 3
    assert part.input_ids is whole.input_ids, "no copy"
    with pytest.raises(IndexError):
        whole.subset([4])


def test_split_holds_out_the_same_rows_for_the_same_seed(tmp_path: Path) -> None:
    whole = load_dataset(jsonl(tmp_path, *(alpaca("q", "a" * size) for size in range(1, 21))), byte_tokenizer())
    train, held = whole.split(5, seed=1)
    assert (len(train), len(held)) == (15, 5)
    assert sorted([*train.lines, *held.lines]) == whole.lines.tolist()
    assert held.lines.tolist() == sorted(held.lines)
    assert whole.split(5, seed=1)[1].lines.tolist() == held.lines.tolist()
    assert whole.split(5, seed=2)[1].lines.tolist() != held.lines.tolist()
    for bad in (20, 21):
        with pytest.raises(UserError, match=f"20 usable rows: holding {bad} out"):
            whole.split(bad)


def test_memory_is_bounded_however_long_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's and numpy's memory while a file is read whose tokens take far more."""
    tokenizer = byte_tokenizer()
    rows = [{"text": f"{number:04} " + "abcdefgh" * 62} for number in range(400)]
    file = jsonl(tmp_path, *rows)
    held = load_dataset(file, tokenizer, max_length=4096, limit=100)
    monkeypatch.setattr("qlora_native.data.dataset.CHUNK_BYTES", 1 << 14)
    load_dataset(file, tokenizer, max_length=4096, limit=1)
    tracemalloc.start()
    try:
        dataset = load_dataset(file, tokenizer, max_length=4096, folder=tmp_path / "tokens")
        train, _ = dataset.split(40)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    token_bytes = 8 * dataset.stats.tokens
    assert token_bytes > 1.5e6 and peak < token_bytes / 3
    assert list((tmp_path / "tokens").iterdir()) == [], "the file has no name"
    for key in ("input_ids", "labels"):
        assert all(np.array_equal(dataset[at][key], held[at][key]) for at in (0, 7, 99))
    assert int((train[100]["labels"] != -100).sum()) == train.trained[100]
    sampler = BatchSampler(train.lengths, 2)
    batch = collate([train[at] for at in sampler.batches(0)[0]], 0)
    assert batch["input_ids"].shape == (2, 504)
    with pytest.raises(ValueError, match="read-only"):
        dataset[0]["input_ids"][0] = 1


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_native.data.dataset.CHUNK_BYTES", 8)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"could not write .*file: .*; .*make room there"):
        load_dataset(jsonl(tmp_path, alpaca("q", "a")), byte_tokenizer(), folder=tmp_path / "file")
