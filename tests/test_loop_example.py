"""examples/loop.py, the thin loop that pages point at: it stays thin, learns, and PEFT answers the same."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import ROOT
from runs import write_files
from safetensors.torch import load_file, save_file

import qlora_native as qn
from qlora_native.lora import save_adapter

LOOP = ROOT / "examples" / "loop.py"


def figures(printed: str) -> list[float]:
    """The first loss, the last one, and the relative distance of PEFT's logits."""
    return [float(figure) for figure in re.findall(r"\d\.\d+(?:e[-+]\d+)?", printed)]


def test_it_fits_a_screen() -> None:
    assert len(LOOP.read_text(encoding="utf-8").splitlines()) <= 60


def test_the_loss_falls_and_peft_computes_the_same_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    files, out = write_files(tmp_path), tmp_path / "adapter"
    train = runpy.run_path(str(LOOP))["train"]
    arguments = str(files / "model"), str(files / "train.jsonl"), str(out), torch.float32
    train(*arguments, 5)
    first, last, distance = figures(capsys.readouterr().out)
    assert last < first / 2 and distance < 1e-5
    saved = load_file(out / "adapter_model.safetensors")
    assert sum(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name) == 14

    # An adapter that is not the one in memory would be seen.
    def save_half(model: Any, folder: str) -> None:
        save_adapter(model, folder)
        file = Path(folder) / "adapter_model.safetensors"
        save_file({name: tensor * 0.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})

    monkeypatch.setattr(qn, "save_adapter", save_half)
    train(*arguments, 2)
    assert figures(capsys.readouterr().out)[2] > 1e-3


@pytest.mark.long
def test_its_own_command_runs(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    files = write_files(tmp_path)
    words = [sys.executable, *map(str, (LOOP, files / "model", files / "train.jsonl", tmp_path / "adapter"))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last, distance = figures(done.stdout)
    assert last < first and distance < 0.1  # of two orders of rounding in bf16
