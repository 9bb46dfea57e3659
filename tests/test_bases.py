"""A run, its card, chat, eval, merge and export take the same base weights, for every kind of base."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_files
import peft
import pytest
import tiny
import torch
import yaml

import qlora_native as qn
from qlora_native.cli import main
from qlora_native.hf.load import load_dense
from qlora_native.hf.trained import STORED
from qlora_native.train.progress import read_metrics

IDS = torch.arange(5, 45)[None]
KINDS = {  # the model, section quant of the config, and whether the run stores its base
    "folder": ("model", {}, False),
    "folder-wmse": ("model", {"method": "wmse"}, True),
    "folder-gptq": ("model", {"method": "gptq", "block_size": 32}, True),
    "folder-unstored": ("model", {"method": "wmse", "save": False}, False),
    "folder-signed": ("model", {"method": "rtn_signed"}, True),
    "four-bit": ("nf4", {}, False),
    "kept": ("kept.gguf", {}, False),
    "converted": ("kept.gguf", {"type": "nf4", "block_size": 128}, False),
    "converted-wmse": ("kept.gguf", {"method": "wmse"}, True),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    gguf_files.write_gguf(folder / "kept.gguf", initializer_range=0.06)  # of the folder "model"
    assert main.main(["quantize", str(folder / "model"), "--out", str(folder / "nf4"), "--block-size", "32"]) == 0
    tiny.write_rows(folder / "rows.jsonl", 8)
    tiny.write_rows(folder / "held.jsonl", 12)
    text = " ".join(f"what is {color}? {thing} and {number}" for number in range(60) for color, thing in tiny.FACTS)
    lines = [json.dumps({"text": f"{number} {text}"}) for number in range(8)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def run(files: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of a run of two steps."""
    model, quant, _ = KINDS[request.param]
    out = files / request.param
    quant = quant | ({"calibration": str(files / "text.jsonl")} if quant.get("method") in ("wmse", "gptq") else {})
    values = {"model": str(files / model), "output_dir": str(out), "quant": quant, "lora": {"r": 4}}
    values["data"] = {"train": str(files / "rows.jsonl"), "eval": str(files / "held.jsonl")}
    values["train"] = {"steps": 4, "batch_size": 2, "grad_accum": 1, "lr": 0.02, "save_every": 2, "eval_every": 4}
    config = files / f"{request.param}.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main.main(["train", str(config)]) == 0
    return out


def command(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main.main([*map(str, words), "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def model_of(run: Path) -> Path:
    return Path(yaml.safe_load((run / "adapter" / "config.yaml").read_text())["model"])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits[0].float().log_softmax(-1)


def divergence(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def other_base(run: Path) -> torch.Tensor:
    """Of the adapter over weights that are near those of its run: in 16 bits, or NF4 where they are kept."""
    if run.name == "kept":
        model = qn.load_model(model_of(run), quant_type="nf4")
    else:
        model = load_dense(run.parent / "model" if run.name == "four-bit" else model_of(run))
    return logits(qn.load_adapter(model, run / "adapter"))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        yield


def test_every_command_and_snippet_of_the_card(run: Path, tmp_path: Path) -> None:
    """They end well, and what they load computes what was trained."""
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8").replace("path/to/this/folder", f"{run}/adapter")
    loaded: list[torch.Tensor] = []
    with inside(tmp_path):
        blocks = re.findall(r"`(qlora [^`]+)`|```(python|sh)\n(.*?)```", text, re.DOTALL)
        commands = [inline or block for inline, kind, block in blocks if kind != "python"]
        lines = [line for block in commands for line in block.splitlines() if line.startswith("qlora ")]
        for line in dict.fromkeys(lines):
            assert main.main(shlex.split(line)[1:]) == 0, line
        for _, kind, block in blocks:
            if kind == "python":
                names: dict[str, Any] = {}
                exec(block, names)
                model = names["model"]
                assert isinstance(model, peft.PeftModel) == ("PeftModel" in block)
                loaded.append(logits(model.eval()))
        report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    ours, theirs = loaded
    assert 10 * divergence(theirs, ours) < divergence(other_base(run), ours)
    assert 10 * report["logits"][-1]["kl_mean"] < divergence(other_base(run), ours)
    assert "not the model" not in report["verdict"]
    assert any("merge" in line for line in lines)
    assert any("gguf-adapter" in line for line in lines) == (run.name == "kept")


def test_the_commands_take_the_weights_that_were_trained(run: Path, tmp_path: Path, capsys: Any) -> None:
    model, adapter, is_stored = model_of(run), run / "adapter", KINDS[run.name][2]
    assert (run / STORED).is_dir() == is_stored
    if run.name == "folder-unstored":
        return
    held_out = [line["eval_loss"] for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line]
    rows = run.parent / "held.jsonl"
    answers = command(capsys, "chat", model, "--adapter", adapter, "--prompt", "what is red?", "--max-tokens", 3)
    assert [answer["from"] for answer in answers["answers"]] == ["base", "adapter"]
    sides = command(capsys, "eval", model, "--data", rows, "--adapter", adapter)["sides"]
    losses = {side["name"]: side["texts"]["held.jsonl"]["loss"] for side in sides}
    (name,) = (name for name in losses if name.endswith(" + adapter"))
    assert len(losses) == 3 - (run.name == "four-bit")
    assert [losses[name.removesuffix(" + adapter")], losses[name]] == pytest.approx(held_out, abs=0.01)
    merged = command(capsys, "merge", model, adapter, "--out", tmp_path / "merged", "--check", "--sample", rows)
    assert "not the model" not in merged["verdict"] and merged["retention"]["retained"] == pytest.approx(1, abs=0.02)
    made = command(capsys, "export", model, "--adapter", adapter, "--to", "gguf", "--out", tmp_path / "tuned.gguf")
    assert made["num_bytes"] > 0
    whole, exported = (logits(load_dense(tmp_path / name)) for name in ("merged", "tuned.gguf"))
    assert 10 * divergence(exported, whole) < divergence(other_base(run), whole)
    command(capsys, "export", model, "--adapter", adapter, "--to", "peft", "--out", tmp_path / "peft")
    named = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == (run / STORED if is_stored else model)
