"""Several files with weights: what an epoch trains of each, in an order that a resumed run continues."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
from runs import metrics
from test_data_template import byte_tokenizer

from qlora_native.data.batching import BatchSampler, PackedBatchSampler, Sampler, mixed_rows
from qlora_native.data.dataset import load_dataset
from qlora_native.errors import UserError
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer
from qlora_native.tool.train.setup import make_sampler
from qlora_native.weights.open import load_tokenizer

LENGTHS = np.arange(3, 23)
FILE = np.repeat([0, 1, 2], [12, 5, 3])  # of 20 rows
WEIGHTS = [1, 2, 1]  # 5, 10 and 5 rows an epoch


def test_an_epoch_has_each_files_share_and_every_row_comes_before_one_comes_again() -> None:
    seen = np.concatenate([mixed_rows((FILE, WEIGHTS), 7, epoch) for epoch in range(12)])
    by_epoch = seen.reshape(12, 20)
    assert all(np.bincount(FILE[rows]).tolist() == [5, 10, 5] for rows in by_epoch)
    for number, size in enumerate((12, 5, 3)):
        stream = seen[FILE[seen] == number]
        for start in range(0, len(stream) - size + 1, size):
            assert sorted(stream[start : start + size]) == np.flatnonzero(number == FILE).tolist()
    assert not np.array_equal(by_epoch[0], by_epoch[1])
    assert np.array_equal(mixed_rows((FILE, [3, 6, 3]), 7, 5), by_epoch[5]), "proportions alone count"
    assert not np.array_equal(mixed_rows((FILE, WEIGHTS), 8, 5), by_epoch[5])


@pytest.mark.parametrize("weights", [[1, 1, 1], [1e-3, 5, 1e3], [0.7, 0.2, 0.1], [1e-9, 1e-9, 1]])
def test_shares_are_exact_to_a_row(weights: list[float]) -> None:
    counts = np.bincount(FILE[mixed_rows((FILE, weights), 0, 3)], minlength=3)
    assert counts.sum() == 20 and np.all(np.abs(counts - 20 * np.array(weights) / sum(weights)) <= 1)


def make(packed: bool, weights: Any = WEIGHTS, file: np.ndarray = FILE) -> Sampler:
    sampler: Sampler = PackedBatchSampler(LENGTHS, 2, 32, seed=1) if packed else BatchSampler(LENGTHS, 3, seed=1)
    sampler.mix = None if weights is None else (file, weights)
    return sampler


@pytest.mark.parametrize("packed", [False, True])
def test_a_sampler_resumes_in_an_epoch_and_with_these_weights_alone(packed: bool) -> None:
    sampler = make(packed)
    batches = sampler
    epoch = [next(batches) for _ in range(sampler.count(0))]
    flat = [row for batch in epoch for item in batch for row in (item if packed else [item])]
    assert Counter(FILE[flat].tolist()) == {0: 5, 1: 10, 2: 5}
    next(batches)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = [next(batches) for _ in range(10)]
    resumed = make(packed)
    resumed.load_state_dict(state)
    again = resumed
    assert [next(again) for _ in range(10)] == rest
    for other in (make(packed, [1, 1, 1]), make(packed, None), make(packed, file=FILE[::-1])):
        with pytest.raises(UserError, match="cannot be resumed: .* other weights"):
            other.load_state_dict(state)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows
        )
    return path


CHAT = [{"role": "user", "content": 'q, "r"\ns'}, {"role": "assistant", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "im_start", "parameters": {}}}  # a name that the template renders


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "tools": [TOOL]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        {"instruction": "q", "input": "i", "output": "a", "history": [["p", "o"]]},
        {"prompt": "q: ", "completion": "a"},
        {"text": "ab,c\n"},
    ],
    ids=lambda row: next(iter(row)),
)
def test_a_csv_file_gives_the_tokens_of_the_same_rows_in_jsonl(tmp_path: Path, row: dict[str, Any]) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text(f"{json.dumps(row)}\n" * 2)
    one, other = (load_dataset(file, byte_tokenizer()) for file in (lines, write_csv(tmp_path / "rows.csv", [row] * 2)))
    assert one.stats.format == other.stats.format and len(one) == len(other) == 2
    assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.labels, other.labels)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 20 rows of JSONL and 4 of CSV."""
    folder = runs.write_files(tmp_path_factory.mktemp("files"), num_hidden_layers=1)
    rows = [{"instruction": f"say {color}", "output": thing} for color, thing in tiny.FACTS[:4]]
    write_csv(folder / "more.csv", rows)
    return folder


@pytest.fixture
def settings(files: Path, tmp_path: Path) -> dict[str, Any]:
    data = {"train": [str(files / "train.jsonl"), str(files / "more.csv")], "weights": [1, 3]}
    return runs.settings(files, tmp_path / "out", data, {"r": 2}, steps=6, batch_size=4, grad_accum=1, save_every=4)


def test_a_run_over_two_files_resumes_with_the_same_bytes(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["data"]["chat_template"] = "{{ 'Chat: ' }}" + tiny.CHAT_TEMPLATE
    trainer = Trainer(TrainConfig.model_validate(settings), quiet=True)
    summary = trainer.train()
    adapter, lines = (summary.adapter_dir / "adapter_model.safetensors").read_bytes(), metrics(tmp_path / "out")
    card = (summary.adapter_dir / "README.md").read_text()
    files = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in settings["data"]["train"]}
    assert len(files) == 2 and all(f"`{path}` | `{digest}`" in card for path, digest in files.items())
    # As the adapter was trained, so its answers are asked for.
    tokenizer = load_tokenizer(settings["model"], summary.adapter_dir)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "Chat: <|user|>a<|end|>"

    assert main(["merge", settings["model"], str(summary.adapter_dir), "--out", str(tmp_path / "merged")]) == 0
    assert load_tokenizer(tmp_path / "merged").chat_template == settings["data"]["chat_template"]

    settings["output_dir"] = str(tmp_path / "again")
    config = TrainConfig.model_validate(settings)
    with pytest.raises(runs.Crash):
        Trainer(config, quiet=True, on_step=runs.crash_at(5)).train()
    changed = config.model_copy(update={"resume": "auto", "data": config.data.model_copy(update={"weights": [1, 2]})})
    with pytest.raises(UserError, match="other weights"):
        Trainer(changed, quiet=True).train()
    summary = Trainer(config.model_copy(update={"resume": "auto"}), quiet=True).train()
    assert (summary.adapter_dir / "adapter_model.safetensors").read_bytes() == adapter
    assert metrics(tmp_path / "again") == lines


def test_a_file_without_a_row_left_is_refused(settings: dict[str, Any]) -> None:
    config = TrainConfig.model_validate(settings)
    rows = load_dataset(config.data.files, load_tokenizer(config.model))
    assert make_sampler(config, rows).mix is not None
    with pytest.raises(UserError, match="more.csv has no row left"):
        make_sampler(config, rows.subset(np.flatnonzero(rows.file == 0)))
