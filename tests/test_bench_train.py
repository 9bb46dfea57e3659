"""bench/bench_train.py on a tiny model: both sides of a peer take steps, set up as its name says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bench_train
import pytest
import tiny_models
import torch
import train_sides

import qlora_native as qn

pytest.importorskip("peft")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A 16-bit model, an adapter and two batches."""
    tiny_models.save(tmp_path / "model", dtype=torch.bfloat16)
    model = qn.add_lora(qn.load_model(tmp_path / "model"), qn.LoraConfig(r=4, seed=0))
    qn.save_adapter(model, tmp_path / "adapter")
    ids = tiny_models.tokens(rows=2, columns=16)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    torch.save({"train": [batch] * 2, "held_out": [batch]}, tmp_path / "batches.pt")
    return tmp_path


@pytest.mark.parametrize("peer", ["plain-tuned", "fp32-both"])
def test_both_sides_take_steps(peer: str, folder: Path) -> None:
    arguments = argparse.Namespace(learn=None, lr=1e-3, threads=1)
    prepared = {"loss": 1.0, "frozen": 1e4, "head": 1e3, "adapters": 1e3}
    measured = {"read_gb_per_s": 1e3, "write_gb_per_s": 1e3, "bf16_gflop_per_s": 1.0, "fp32_gflop_per_s": 0.5}
    row: dict[str, Any] = bench_train.compare(peer, arguments, folder, prepared, measured)
    losses = row["first_loss"]
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=2e-2)
    assert row["trainable_parameters"]["ours"] == row["trainable_parameters"]["theirs"] > 0
    rate = 0.5 if peer == "fp32-both" else 1.0  # the floor is that of the dtype that our side computes in
    assert row["products"]["floor_ms"] == pytest.approx(1e3 * sum(row["products"]["gflop"].values()) / rate, rel=1e-3)
    assert row["bars"][0]["rival"] == "theirs"


def test_peers_are_set_up_as_somebody_who_knows_them_would(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, dict[str, str]] = {}

    def started(name: str, command: list[str], env: dict[str, str] | None = None) -> None:
        found.setdefault(json.loads(command[-1])[1], {})[name] = "tuned" if env else "plain"

    monkeypatch.setattr(bench_train, "Child", started)
    for peer in ("plain-tuned", "fp32-both", "bitsandbytes-tuned", "bitsandbytes"):
        for name in ("ours", "theirs"):
            bench_train.side(name, peer, argparse.Namespace(lr=1e-3, threads=1), folder)
    assert {peer for peer, sides in found.items() if sides["theirs"] == "tuned"} == found.keys() - {"bitsandbytes"}
    assert all(sides["ours"] == "plain" for sides in found.values())
    peers = train_sides.PEERS
    assert peers["plain-tuned"].adapters == peers["plain-tuned"].dtype == torch.bfloat16
    assert peers["fp32-both"].ours == peers["fp32-both"].dtype == torch.float32


def test_the_bench_says_which_path_bitsandbytes_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    import common
    from bitsandbytes.backends.cpu import ops

    monkeypatch.setattr(common, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(ops, "gemm_4bit_forward_kernel", None, raising=False)
    assert common.bitsandbytes_kernels() is False
    monkeypatch.setattr(ops, "gemm_4bit_forward_kernel", object(), raising=False)
    assert common.bitsandbytes_kernels() is True
