"""Evaluation against plain torch on each row alone, in fp64: losses, divergences, their errors; texts; reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model, write_rows
from tiny_models import make
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_native as qn
from qlora_native.errors import UserError
from qlora_native.tool.evaluate import measure as measuring
from qlora_native.tool.evaluate.comparison import Comparison, VariantResult, compare
from qlora_native.tool.evaluate.measure import Scores, measure
from qlora_native.tool.evaluate.report import tables, write_report
from qlora_native.tool.evaluate.retention import retention
from qlora_native.tool.evaluate.texts import load_text
from qlora_native.tool.evaluate.variants import Variants

CALIBRATION = torch.arange(320).remainder(299).view(10, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter for it, rows and plain text."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder / "model")
    write_rows(folder / "held.jsonl", 9)
    (folder / "notes.txt").write_text("what is red? blood\nsay, what is blue and good? sky\n" * 9, encoding="utf-8")
    model = qn.add_lora(qn.load_model(folder / "model"), qn.LoraConfig(r=4, seed=0))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    qn.save_adapter(model, folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "model")


def rows_of(lengths: list[int], vocabulary: int = 300) -> list[dict[str, np.ndarray]]:
    """Random rows; some tokens of each are not predicted."""
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = generator.integers(5, vocabulary, length).astype(np.int32)
        labels = np.where(generator.random(length) < 0.3, -100, ids).astype(np.int32)
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@torch.no_grad()
def by_hand(model: Any, rows: list[dict[str, np.ndarray]], reference: Any) -> Scores:
    """Each row alone through the models' own logits, reduced in fp64."""
    sums: list[list[float]] = []
    for row in rows:
        ids = torch.from_numpy(row["input_ids"]).long()[None]
        targets = torch.from_numpy(row["labels"]).long()[1:]
        chosen = targets != -100
        ours, theirs = (one(input_ids=ids).logits[0, :-1].double().log_softmax(1)[chosen] for one in (model, reference))
        nats, kl = -ours.gather(1, targets[chosen][:, None]).sum(), (theirs.exp() * (theirs - ours)).sum()
        sums.append([int(chosen.sum()), float(nats), float(kl), int((ours.argmax(1) == theirs.argmax(1)).sum())])
    return Scores(*torch.tensor(sums, dtype=torch.float64).t())


def assert_close(scores: Scores, expected: Scores, atol: float) -> None:
    assert scores.kl is not None and scores.agreed is not None and expected.kl is not None
    assert torch.equal(scores.tokens, expected.tokens) and torch.equal(scores.agreed, expected.agreed)  # type: ignore[arg-type]
    assert torch.allclose(scores.nats, expected.nats, rtol=1e-4)
    assert torch.allclose(scores.kl, expected.kl, rtol=1e-3, atol=atol)


def test_sums_are_those_of_each_row_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([5, 40, 17, 2, 40, 33])
    dense = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    model = qn.load_model(folder / "model", dtype=torch.float32)
    expected = by_hand(model, rows, dense)
    monkeypatch.setattr(measuring, "BATCH_TOKENS", 64)
    monkeypatch.setattr(measuring, "LOGITS_BYTES", 4 * 300 * 7)  # seven tokens, and a part of the vocabulary, at a time
    model.train()
    reference, kept = measure(dense, rows, 1, keep_in=tmp_path)
    other = measure(dense, rows[:2], 1, keep_in=tmp_path)[1]  # a second text's file leaves the first one's alone
    scores, nothing = measure(model, rows, 1, against=kept)
    assert nothing is None and other is not None and model.training
    assert_close(scores, expected, atol=1e-5)
    assert scores.excess(reference)[0] == pytest.approx(scores.loss[0] - reference.loss[0])
    itself = measure(dense, rows, 1, against=kept)[0]
    assert itself.divergence == (0.0, 0.0) and itself.agreement == (1.0, 0.0)


def test_logits_that_are_more_than_a_product(tmp_path: Path) -> None:
    rows = rows_of([12, 7], 128)
    dense, other = (make("Gemma2", seed=seed, final_logit_softcapping=3.0, head_dim=16) for seed in (0, 1))
    for model in (dense, other):
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    warning = "changes its logits after the output embedding"
    with pytest.warns(UserWarning, match=warning):
        _, kept = measure(dense, rows, 0, keep_in=tmp_path)
    with pytest.warns(UserWarning, match=warning):
        scores, _ = measure(other, rows, 0, against=kept)
    assert kept is not None and kept.head is None
    assert_close(scores, by_hand(other, rows, dense), atol=1e-8)


def test_errors_are_those_of_rows_drawn_again() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(20, 60, (400,)).double()
    level = torch.randn(400).double()  # rows differ far more from each other than two models on one row
    best = Scores(tokens, tokens * (2 + level))
    worst = Scores(tokens, tokens * (2.3 + level + 0.05 * torch.randn(400).double()))
    mine = Scores(tokens, tokens * (2.1 + level + 0.05 * torch.randn(400).double()))
    again = [torch.randint(400, (400,)) for _ in range(600)]

    def drawn(scores: Scores, rows: torch.Tensor) -> Scores:
        return Scores(scores.tokens[rows], scores.nats[rows])

    for (estimate, error), function in (
        (mine.loss, lambda rows: drawn(mine, rows).loss[0]),
        (mine.excess(best), lambda rows: drawn(mine, rows).excess(drawn(best, rows))[0]),
        (mine.closed(worst, best), lambda rows: drawn(mine, rows).closed(drawn(worst, rows), drawn(best, rows))[0]),
    ):
        values = torch.tensor([function(rows) for rows in again], dtype=torch.float64)
        assert estimate == pytest.approx(float(values.mean()), abs=4 * error)
        assert error == pytest.approx(float(values.std()), rel=0.12)
    assert mine.closed(worst, best)[0] == pytest.approx(2 / 3, abs=0.05)
    assert mine.excess(best)[1] < 0.1 * mine.loss[1]
    assert math.isnan(Scores(tokens[:1], tokens[:1]).loss[1])

    found = retention(worst, best, mine)
    assert (found["retention"], found["retention_error"]) == mine.closed(worst, best)
    assert found["retention"] == pytest.approx(
        (found["base_loss"] - found["shipped_loss"]) / (found["base_loss"] - found["adapted_loss"])
    )
    assert retention(worst, worst, mine)["retention"] is None  # the adapter learned nothing


def test_plain_text_is_split_into_windows(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    ids = tokenizer((folder / "notes.txt").read_text(encoding="utf-8"))["input_ids"]
    text = load_text(folder / "notes.txt", tokenizer, max_length=32)
    assert np.concatenate([row["input_ids"] for row in text.rows]).tolist() == ids
    assert {len(row["input_ids"]) for row in text.rows[:-1]} == {32}
    assert len(load_text(folder / "notes.txt", tokenizer, max_length=32, limit=2).rows) == 2
    rows = load_text(folder / "held.jsonl", tokenizer)
    assert len(rows.rows) == 9 and "format messages" in rows.about and len(rows.sha256) == 64
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, match in (("empty", "0 tokens, expected at least 2"), ("latin", "0xe9 at 3"), ("gone", "No such")):
        with pytest.raises(UserError, match=match):
            load_text(tmp_path / f"{name}.txt", tokenizer)


def cells_of(page: str, name: str) -> dict[str, str]:
    """The cells of a variant in the first table, by their columns."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return dict(zip(lines[0], next(line for line in lines if line[0] == name), strict=True))


@pytest.fixture(scope="module")
def comparison(folder: Path, tokenizer: Any) -> Comparison:
    """Every kind of variant."""
    options: Any = {"methods": ["rtn", "wmse"], "calibration": CALIBRATION}
    variants = Variants(folder / "model", adapter=folder / "adapter", **options)
    texts = [load_text(folder / name, tokenizer, max_length=32) for name in ("held.jsonl", "notes.txt")]
    return compare(variants, texts, tokenizer, pad_id=1)


def test_variants_are_the_models_they_name(comparison: Comparison, folder: Path, tokenizer: Any) -> None:
    assert [variant.name for variant in comparison.variants] == ["16-bit", "rtn", "rtn + adapter", "wmse"]
    text = load_text(folder / "notes.txt", tokenizer, max_length=32)
    for name, model in (
        ("16-bit", AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)),
        ("rtn", qn.load_model(folder / "model")),
        ("rtn + adapter", qn.load_adapter(qn.load_model(folder / "model"), folder / "adapter")),
        ("wmse", qn.load_model(folder / "model", calibration=CALIBRATION)),
    ):
        found = next(one for one in comparison.variants if one.name == name).texts["notes.txt"]
        assert found.loss[0] == pytest.approx(measure(model, text.rows, 1)[0].loss[0], rel=5e-3), name


def test_the_report_holds_the_measurements(comparison: Comparison, tmp_path: Path, monkeypatch: Any) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    draw = figure.draw
    monkeypatch.setattr(figure, "draw", lambda self, renderer: drawn.extend(self.axes) or draw(self, renderer))  # type: ignore[func-returns-value]
    assert write_report(comparison, tmp_path, ["notes.txt: plain text"])
    assert drawn[0].get_title() == "model"
    labels = [" ".join(label.get_text().split()) for label in drawn[0].get_xticklabels()]
    assert labels == [side.label for side in comparison.variants]
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "\n".join(tables(comparison)) in page and "- notes.txt: plain text" in page
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    row = {side["name"]: side["texts"]["notes.txt"] for side in report["sides"]}
    assert row["rtn"]["excess"] == pytest.approx(row["rtn"]["loss"] - row["16-bit"]["loss"])
    closed = 1 - row["wmse"]["excess"] / row["rtn"]["excess"]
    assert row["wmse"]["closed"] == pytest.approx(closed) and row["rtn + adapter"]["closed"] is None
    cells = cells_of(page, "base, 4-bit by wmse")
    first = report["sides"][3]["texts"]["held.jsonl"]
    assert cells["loss"].split() == [f"{first['loss']:.4f}", "±", f"{first['loss_error']:.4f}"]
    assert f"{100 * first['same_first']:.1f} ±" in cells["same first token"]
    assert f"{100 * first['closed']:.1f} ±" in cells["gap closed"]


def test_a_shipped_model_is_compared_with_the_adapter(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """In 16 bits over the 4-bit base, so that it is the adapter's model but for one rounding."""
    if not (folder / "shipped").is_dir():
        model = qn.load_adapter(qn.load_model(folder / "model"), folder / "adapter")
        qn.merge(model, "dequantized").save_pretrained(folder / "shipped")
    variants = Variants(folder / "model", adapter=folder / "adapter", shipped=folder / "shipped")
    found = compare(variants, [load_text(folder / "held.jsonl", tokenizer)], tokenizer, pad_id=1)
    assert [variant.name for variant in found.variants] == ["16-bit", "rtn", "rtn + adapter", "shipped"]
    rows: list[Any] = [found.text_row(variant, "held.jsonl") for variant in found.variants[1:]]
    base, adapted, shipped = rows
    share = (base["loss"] - shipped["loss"]) / (base["loss"] - adapted["loss"])
    assert shipped["retention"] == pytest.approx(share) and share == pytest.approx(1, abs=0.1)
    assert shipped["closed"] is None and "retention" not in adapted
    write_report(found, tmp_path, [])
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    kept = cells_of(page, "shipped")["retention"].split()
    assert kept == [f"{shipped['retention']:.4f}", "±", f"{shipped['retention_error']:.4f}"]
    with pytest.raises(UserError, match="give the adapter"):
        Variants(folder / "model", shipped=folder / "shipped")


def test_a_comparison_without_a_reference_has_no_column_for_it(comparison: Comparison, tmp_path: Path) -> None:
    one = VariantResult("4-bit", 10, 0.1, texts=comparison.variants[1].texts)
    alone = Comparison("model", [one])
    assert alone.text_row(one, "notes.txt")["excess"] is None
    assert "not a number" not in json.dumps(alone.as_dict(), allow_nan=False)
    write_report(alone, tmp_path, [])
