"""The tokens of calibration data: the same ones every time, and an error where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import qlora_native as qn
from qlora_native.calibration.data import CalibrationData, as_calibration, take_tokens

TEXTS = [f"what is {color}? {thing} and nothing else, number {n}" for n in range(8) for color, thing in tiny.FACTS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def take(given: Any, tokenizer: Any = None, method: str = "wmse", positions: int | None = 256) -> Any:
    return take_tokens(as_calibration(given), method, lambda: tokenizer, 300, positions)


def test_texts_become_sequences_in_an_order_of_the_seed(tokenizer: Any) -> None:
    def taken(seed: int) -> Any:
        return take(CalibrationData(TEXTS, rows=4, length=32, seed=seed), tokenizer)

    one = taken(0)
    assert (one.ids.shape, one.ids.dtype) == ((4, 32), torch.int64)
    assert torch.equal(one.ids, taken(0).ids)
    brought = CalibrationData(TEXTS, rows=4, length=32, tokenizer=tokenizer)
    assert torch.equal(one.ids, take(brought, None).ids)
    assert one.sha256 == taken(0).sha256 != taken(1).sha256
    assert one.describe() == {"sha256": one.sha256, "rows": 4, "length": 32, "tokens": 128, "seed": 0}
    # Whole documents, each ended by the end token, one after another.
    texts = tokenizer.decode(take(CalibrationData(TEXTS, rows=1, length=128), tokenizer).ids[0]).split("<|end|>")
    assert len(texts) > 2 and set(texts[:-1]) < set(TEXTS)


def test_a_file_gives_the_rows_that_training_sees(tokenizer: Any, tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl")
    text = tokenizer.decode(take(CalibrationData(path, rows=2, length=40), tokenizer).ids.flatten())
    assert text.count("<|user|>") >= 3 and text.count("<|assistant|>") >= 3
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    from_file = take(CalibrationData(plain, rows=4, length=32, seed=3), tokenizer)
    assert torch.equal(from_file.ids, take(CalibrationData(TEXTS, rows=4, length=32, seed=3), tokenizer).ids)


def test_long_documents_give_their_first_tokens_and_more_only_where_needed(tokenizer: Any) -> None:
    documents = [torch.full((100,), number) for number in range(3)]
    few = take(CalibrationData(documents, rows=3, length=20)).ids
    assert sorted(few.unique().tolist()) == [0, 1, 2]
    assert torch.equal(few, few[:, :1].expand(-1, 20))
    all_of_it = take(CalibrationData(documents, rows=15, length=20)).ids
    assert all_of_it.flatten().bincount().tolist() == [100, 100, 100]


def test_defaults(tokenizer: Any) -> None:
    long = [torch.arange(200).repeat(100)] * 8
    assert take(long, positions=None).ids.shape == (16, 512)
    assert take(long, method="gptq", positions=None).ids.shape == (128, 512)
    assert take(long).ids.shape == (16, 256)  # no longer than the model takes
    short = take([torch.arange(200).repeat(15)], positions=None)  # 3000 tokens, of 8192 wanted
    assert short.ids.shape == (5, 512)
    assert short.wanted == 8192


def test_a_tensor_is_taken_as_it_is() -> None:
    ids = torch.arange(60, dtype=torch.int32).view(4, 15)
    assert torch.equal(take(ids).ids, ids.long())
    for wrong in (ids[0], ids.float(), ids[:0]):
        with pytest.raises(ValueError, match=r"calibration is a tensor .* \[rows, length\]"):
            take(wrong)
    with pytest.raises(ValueError, match="leave rows and length out"):
        take(CalibrationData(ids, rows=2))


def test_drawn_sequences_are_kept_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "kept.safetensors"
    documents = [torch.arange(200).repeat(30)]
    drawn = take(CalibrationData(documents, rows=4, length=20, seed=7, keep=file), positions=None)
    again = take(file, positions=None)
    assert torch.equal(again.ids, drawn.ids)
    assert again.describe() == drawn.describe()
    assert again.describe()["seed"] == 7
    with pytest.raises(ValueError, match="leave rows and length out"):
        take(CalibrationData(file, rows=2))
    (tmp_path / "not.safetensors").write_bytes(b"not one")
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "other.safetensors")
    save_file({"input_ids": torch.ones(2, 3)}, tmp_path / "floats.safetensors")
    for name, match in (
        ("none", "cannot be read: No such file"),
        ("not", "cannot be read: .*header"),
        ("other", "cannot be read: .*input_ids"),
        ("floats", r"input_ids is \[2, 3\] of torch.float32: expected token numbers"),
    ):
        with pytest.raises(qn.UserError, match=f"{name}.safetensors:? {match}"):
            take(tmp_path / f"{name}.safetensors")


def test_errors_have_numbers(tokenizer: Any, tmp_path: Path) -> None:
    def refused(source: Any, match: str, kind: type[Exception] = qn.UserError, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            take(source, tokenizer, **options)

    refused(["too short"], r"calibration: \d+ tokens of text, expected at least 2,048 to calibrate wmse \(16 sequences")
    refused(["too short"], "expected at least 8,192 to calibrate gptq", method="gptq")
    refused([], "calibration: 0 tokens of text")
    refused(["", "  \n"], "calibration: 0 tokens of text")
    refused(CalibrationData(TEXTS, rows=1, length=300), "sequences of 300 tokens, but the model has 256 positions")
    refused([torch.full((4000,), 300)], "token numbers from 300 to 300, but the model's lie from 0 to 299")
    refused(CalibrationData(TEXTS, rows=0), "rows is 0", ValueError)
    refused([torch.ones(3, 3)], r"entry 0 of the list is a tensor \[3, 3\] of torch.float32", ValueError)
    refused([3], "entry 0 of the list is a int", ValueError)
    refused(tmp_path / "none.jsonl", "no such data file")
    path = tmp_path / "rows.jsonl"
    for text, match in (
        ('{"id": 3, "score": 0.5}', ":1.*(score|id)"),
        ("", ".*the file has no rows"),
        ('{"text": "a"}', r": \d+ tokens of text, expected at least 2,048"),
    ):
        path.write_text(text)
        refused(path, rf"rows\.jsonl{match}")
