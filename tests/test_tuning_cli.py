"""qlora tune, over the emulator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import tuned
from emulated import Emulator
from transformers import GPT2Config, GPT2LMHeadModel
from tuned import Clock, rows_and_parts_win

from qlora_native import tuning
from qlora_native.cli import main


@pytest.fixture
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Emulator]:
    with tuned.tunable(request.config, monkeypatch, tmp_path / "plans") as found:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        shapes = tuning._shapes
        monkeypatch.setattr(tuning, "_shapes", lambda of, block_size, device: shapes(of, block_size, tuned.CPU))
        yield found


def test_every_linear_shape_of_a_model_is_tuned(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.write_model(tmp_path / "model")
    capsys.readouterr()
    Clock(monkeypatch, rows_and_parts_win)
    assert main.main(["tune", str(model), "--tokens", "3", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(r["n"], r["k"]) for r in found} == {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert {(r["m"], r["dtype"], r["block_size"]) for r in found} == {(4, "bfloat16", 64)}
    (file,) = (tmp_path / "plans").iterdir()
    assert len(json.loads(file.read_text(encoding="utf-8"))["entries"]) == len(found) == 16
    assert main.main(["tune", str(model), "--tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "[64, 128], 4 tokens, forward: gemv 4x64 for gemv 4x16, 15.62 ms for 62.5\n" in printed
    assert "[64, 128], 4 tokens, gradient, low memory: tile 16x64 stays, 1000 ms for 1000\n" in printed


def test_layers_that_are_stored_the_other_way_round(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    Clock(monkeypatch, rows_and_parts_win)
    assert main.main(["tune", str(tmp_path / "model"), "--tokens", "4", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(r["n"], r["k"]) for r in found} == {(192, 64), (64, 64), (256, 64), (64, 256)}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokens", "0"], "tokens are [0]: expected rank >= 0 and positive token counts"),
        (["--block-size", "48"], "block_size is 48"),
        (["--skip-modules", "q_prj"], "has no module 'q_prj'; did you mean"),
    ],
)
def test_a_mistake_is_one_sentence(
    emulator: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    model = tiny.write_model(tmp_path / "model")
    capsys.readouterr()
    assert main.main(["tune", str(model), *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("qlora: ") and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_model(tmp_path / "model")
    capsys.readouterr()
    assert main.main(["tune", str(model)]) == 2
    assert capsys.readouterr().err == "qlora: tune: torch finds no CUDA device: it is on one that tuning measures.\n"
