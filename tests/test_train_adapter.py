"""A run that starts from an adapter: ``qlora train --adapter DIR``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import runs
import tiny
import torch
import yaml
from safetensors.torch import load_file
from sentences import Check
from transformers import AutoModelForCausalLM

import qlora_native as qn
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer, TrainSummary

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = {"r": 8, "alpha": 24, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 4}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": LORA,
    "whole": {**LORA, "rslora": True, "modules_to_save": ["lm_head"]},
    "tokens": {**LORA, "trainable_tokens": ["<|new|>", "<|user|>"]},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_files(tmp_path_factory.mktemp("adapters"), rows=24)
    tiny.write_rows(folder / "held.jsonl", 7)
    tiny.write_rows(folder / "more.jsonl", 9)
    return folder


def run(files: Path, out: Path, lora: dict[str, Any], rows: str = "train", **train: Any) -> TrainSummary:
    data = {"train": str(files / f"{rows}.jsonl"), "eval": str(files / "held.jsonl")}
    options = {"steps": 6, "batch_size": 4, "grad_accum": 1, "lr": 1e-3, "samples": 0, **train}
    return Trainer(TrainConfig.from_values(runs.settings(files, out, data, lora, **options)), quiet=True).train()


@pytest.fixture(scope="module", params=KINDS)
def first(files: Path, request: pytest.FixtureRequest) -> tuple[str, TrainSummary]:
    return request.param, run(files, files / request.param, KINDS[request.param])


def test_it_goes_on_where_the_other_ended(files: Path, tmp_path: Path, first: tuple[str, TrainSummary]) -> None:
    kind, before = first
    after = run(files, tmp_path / "out", {"adapter": str(before.adapter_dir), "dropout": 0.1}, "more")
    assert before.loss_after is not None and before.loss_before is not None and after.loss_after is not None
    assert after.loss_before == pytest.approx(before.loss_after, abs=1e-6)
    assert after.loss_after < before.loss_after < before.loss_before
    # What it is: the layers, ranks and scales of the first, in the config too.
    settings = [json.loads((each.adapter_dir / "adapter_config.json").read_text()) for each in (before, after)]
    assert settings[1].pop("lora_dropout") == 0.1 and settings[0].pop("lora_dropout") == 0.0
    assert settings[0] == settings[1]
    written = yaml.safe_load((after.adapter_dir / "config.yaml").read_text())["lora"]
    assert (written["r"], written["alpha"]) == (settings[0]["r"], settings[0]["lora_alpha"])
    tensors = [load_file(each.adapter_dir / "adapter_model.safetensors") for each in (before, after)]
    assert tensors[0].keys() == tensors[1].keys()
    assert any(not torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    again = TrainConfig.from_file(after.adapter_dir / "config.yaml")  # which has every key
    assert again.lora.adapter == str(before.adapter_dir)
    if kind == "plain":  # of another library: the same function
        base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, after.adapter_dir).eval()
        dense = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
        ours = qn.load_adapter(dense, after.adapter_dir).eval()
        ids = torch.arange(5, 20)[None]
        with torch.no_grad():
            assert float((theirs(ids).logits - ours(ids).logits).abs().max()) < 1e-4


def test_it_can_be_stopped_and_resumed(files: Path, tmp_path: Path) -> None:
    """The checkpoint goes on, not the adapter that the run started from."""
    start = {"adapter": str(run(files, tmp_path / "first", LORA).adapter_dir), "dropout": 0.3}
    whole = run(files, tmp_path / "whole", start, "more", save_every=2, keep=9)
    values = runs.settings(files, tmp_path / "parts", {"train": str(files / "more.jsonl")}, start)
    values["data"] |= {"eval": str(files / "held.jsonl")}
    values["train"] |= {"steps": 6, "batch_size": 4, "grad_accum": 1, "lr": 1e-3, "samples": 0, "save_every": 2}
    with pytest.raises(runs.Crash):
        Trainer(TrainConfig.from_values(values), quiet=True, on_step=runs.crash_at(5)).train()
    parts = Trainer(TrainConfig.from_values({**values, "resume": "auto"}), quiet=True).train()
    name = "adapter_model.safetensors"
    assert (whole.adapter_dir / name).read_bytes() == (parts.adapter_dir / name).read_bytes()


@pytest.mark.parametrize(
    "given", ["--r 4", "--alpha 3 --rslora", "--target_modules [q_proj]", "--adapter {0}/gone", "--adapter {0}/first"]
)
def test_what_the_adapter_decides_is_not_given_too(
    files: Path, tmp_path: Path, given: str, mistake: Callable[..., str], sentence: Check
) -> None:
    if not (files / "first").exists():
        run(files, files / "first", LORA)
    words = ["--model", files / "model", "--train", files / "more.jsonl", "--output_dir", tmp_path / "out"]
    words += ["--adapter", files / "first" / "adapter", *given.format(files).split()]
    sentence(mistake("train", *words).replace(str(files), "FILES"))
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run(files, tmp_path / "first", LORA)
    words = ["--model", str(files / "model"), "--train", str(files / "more.jsonl"), "--steps", "2"]
    words += ["--eval", str(files / "held.jsonl"), "--adapter", str(before.adapter_dir)]
    assert main(["train", *words, "--output_dir", str(tmp_path / "out")]) == 0
    assert f"held-out loss {before.loss_after:.4f}  " in capsys.readouterr().out.partition("step 1/2")[0]
    other = tmp_path / "for-peft"
    words = ["export", str(files / "model"), "--adapter", str(tmp_path / "out" / "adapter"), "--to", "peft"]
    assert main([*words, "--out", str(other)]) == 0
    assert json.loads((other / "adapter_config.json").read_text())["r"] == 8
