"""`qlora bench` and what `qlora doctor` says of a model; no test looks at a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tiny
import torch

from qlora_native.ops import _cuda_kernels, _cuda_products, _library
from qlora_native.tool.cli import bench, main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("bench") / "model")


def test_every_op_is_measured_and_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "--shape", "8", "256", "128", "--rounds", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["op"] for row in rows] == list(bench.CONTESTS)
    for row in rows:
        assert row["match"], row
        assert row["m"] == (None if row["op"] in bench.WITHOUT_TOKENS else 8) and (row["n"], row["k"]) == (256, 128)
        low, high = row["quartiles"]
        assert 0 < low <= row["times_as_fast"] <= high and row["ours_ms"] > 0 and row["torch_ms"] > 0


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "linear", lambda x, w: torch.zeros(x.shape[0], w.shape[0], dtype=x.dtype))
    assert main.main(["bench", "linear_4bit", "--shape", "2", "64", "64", "--rounds", "1"]) == 0
    assert "NO MATCH: relative error 1" in capsys.readouterr().out


def test_shapes_of_a_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "linear_4bit", "--model", str(model), "--tokens", "1", "3", "--rounds", "1"]) == 0
    head, _, name, columns, *rows = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in head and "\x1b" not in head
    assert name.startswith("linear_4bit, against F.linear") and columns.split()[:3] == ["M", "[N,", "K]"]
    sizes = ["[32, 64]", "[64, 64]", "[64, 128]", "[128, 64]"]
    assert [row.split()[:3] for row in rows] == [[str(m), *size.split()] for size in sizes for m in (1, 3)]
    assert len({row.index("(") for row in rows}) == 1  # a table


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rival_has_the_dtype(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "dequantize_4bit", "--shape", "1", "64", "64", "--dtype", dtype]) == 0
    assert f"dequantize_4bit, against a copy in {dtype}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bench", "linear"], "argument OP: invalid choice: 'linear'"),
        (["bench", "--shape", "1", "2"], "argument --shape: expected 3 arguments"),
        (["bench", "--shape", "1", "0", "64"], "--shape is 0: expected 1 or more"),
        (["bench", "--model", "m", "--shape", "1", "2", "3"], "--model and --shape were given"),
        (["bench", "--model", "gone"], "gone is not there"),
        (["doctor", "gone"], "gone is not there"),
    ],
)
def test_mistakes(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_doctor_names_the_kernel_of_each_shape(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["doctor", str(model), "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    rows = [tuple(row[key] for key in ("n", "k", "layers", "tokens")) for row in kernels[:6]]
    assert rows == [(n, 64, 4, tokens) for n in (32, 64) for tokens in (1, 16, 512)]
    assert all("rows of the weight" in row["kernel"] for row in kernels)

    # On a CUDA device: what the plan says, asked with the card's facts.
    plan = MagicMock(side_effect=lambda asked: (2, 64, 128, 1, 3, 0, 0) if asked[0] > 16 else (0, 4, 16, 1, 0, 0, 0))
    card = {"name": "A GPU", "major": 9, "minor": 0, "total_memory": 80 << 30, "multi_processor_count": 132}
    properties = SimpleNamespace(**card, is_integrated=False)
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    module = MagicMock(has_concurrent_managed_access=lambda number: True, plan_matmul=plan)
    monkeypatch.setattr(_library, "module_for", lambda device: module)
    _cuda_kernels.facts.cache_clear()
    _cuda_products.plan_of.cache_clear()
    try:
        assert main.main(["doctor", str(model)]) == 0
    finally:
        _cuda_kernels.facts.cache_clear()
        _cuda_products.plan_of.cache_clear()
    printed = capsys.readouterr().out
    expected = [line.split(None, 2)[2] for line in printed.splitlines() if line.startswith("[64, 128]")]
    assert expected == [
        "2 layers, 1 tokens: gemv 4x16",
        "2 layers, 16 tokens: gemv 4x16",
        "2 layers, 512 tokens: tile 64x128",
    ]
    (asked,) = plan.call_args_list[0].args
    assert asked[:3] == (1, 32, 64) and asked[-3:] == (90, 132, 0)
