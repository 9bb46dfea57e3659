"""A run, its card, chat, eval, merge and export take the same base weights, for every kind of base."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import gguf_files
import peft
import pytest
import tiny
import tiny_models
import torch
import yaml
from runs import Crash, crash_at

import qlora_native as qn
from qlora_native.models.load import load_dense
from qlora_native.models.trained import RECORD, STORED, read_record, stored_base
from qlora_native.tool.cli import main
from qlora_native.tool.train.progress import read_metrics
from qlora_native.weights.open import notes_of, open_source

IDS = torch.arange(5, 45)[None]
Kind = tuple[str, dict[str, Any], bool]  # the model, section quant of the config, and whether the run stores its base
KINDS: dict[str, Kind] = {
    "folder": ("model", {}, False),
    "folder-wmse": ("model", {"method": "wmse"}, True),
    "folder-gptq": ("model", {"method": "gptq", "block_size": 32}, True),
    "folder-unstored": ("model", {"method": "wmse", "save": False}, False),
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
    return trained(files, request.param)


def trained(files: Path, kind: str) -> Path:
    """The folder of a run of four steps, made once."""
    if not (files / kind).is_dir():
        assert main.main(["train", str(config_of(files, kind))]) == 0
    return files / kind


def losses_of(run: Path) -> list[float]:
    """Of the held-out rows, before and after training."""
    return [line["eval_loss"] for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line]


TRAIN = {"steps": 4, "batch_size": 2, "grad_accum": 1, "lr": 0.02, "save_every": 2, "eval_every": 4}


def config_of(files: Path, kind: str, out: Path | None = None, **changes: Any) -> Path:
    """The config of the run of a kind, or of one into ``out`` with ``changes``, where None is a section left out."""
    (model, quant, _), out = KINDS[kind], out or files / kind
    quant = quant | ({"calibration": str(files / "text.jsonl")} if "method" in quant else {})
    values = {"model": str(files / model), "output_dir": str(out), "quant": quant, "lora": {"r": 4}, "train": TRAIN}
    values |= {"data": {"train": str(files / "rows.jsonl"), "eval": str(files / "held.jsonl")}, **changes}
    out.with_suffix(".yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return out.with_suffix(".yaml")


def test_a_run_that_starts_from_the_adapter_is_on_the_same_weights(files: Path, run: Path, tmp_path: Path) -> None:
    """Whatever they were made by, without a section ``quant``: the loss goes on where the first run ended."""
    changes: dict[str, Any] = {"quant": None, "lora": {"adapter": str(run / "adapter")}}
    changes["train"] = {**TRAIN, "steps": 1, "eval_every": 1}
    code = main.main(["train", str(config_of(files, run.name, tmp_path / "more", **changes))])
    assert code == (2 if run.name == "folder-unstored" else 0)
    if code:
        return
    assert losses_of(tmp_path / "more")[0] == pytest.approx(losses_of(run)[-1], abs=1e-6)
    adapter, source = tmp_path / "more" / "adapter", open_source(model_of(run))
    assert read_record(adapter).get("sha256") == read_record(run / "adapter").get("sha256")
    assert (stored_base(adapter, source) is not None) == KINDS[run.name][2]


def test_an_adapter_of_other_weights_is_no_start(files: Path, tmp_path: Path) -> None:
    lora = {"adapter": str(trained(files, "folder-wmse") / "adapter")}
    assert main.main(["train", str(config_of(files, "kept", tmp_path / "out", lora=lora))]) == 2
    assert not (tmp_path / "out" / "adapter").exists()


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


def test_every_command_and_snippet_of_the_card(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end well, and what they load computes what was trained."""
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8").replace("path/to/this/folder", f"{run}/adapter")
    blocks = re.findall(r"`(qlora [^`]+)`|```(python|sh)\n(.*?)```", text, re.DOTALL)
    commands = [inline or block for inline, kind, block in blocks if kind != "python"]
    lines = [line for block in commands for line in block.splitlines() if line.startswith("qlora ")]
    loaded: list[torch.Tensor] = []
    monkeypatch.chdir(tmp_path)
    for line in dict.fromkeys(lines):
        assert main.main(shlex.split(line)[1:]) == 0, line
    for block in [block for _, kind, block in blocks if kind == "python"]:
        names: dict[str, Any] = {}
        exec(block, names)
        assert isinstance(names["model"], peft.PeftModel) == ("PeftModel" in block)
        loaded.append(logits(names["model"].eval()))
    report = json.loads(Path("merged/merge_report.json").read_text())
    ours, theirs = loaded
    method = yaml.safe_load((run / "adapter" / "config.yaml").read_text())["quant"]["method"]
    assert (f"by {method}" in text) == (run.name not in ("kept", "four-bit"))
    assert 10 * divergence(theirs, ours) < divergence(other_base(run), ours)
    assert 10 * report["logits"][-1]["kl_mean"] < divergence(other_base(run), ours)
    assert "not the model" not in report["verdict"]
    assert any("merge" in line for line in lines)
    assert any("gguf-adapter" in line for line in lines) == (run.name == "kept")


def test_the_commands_take_the_weights_that_were_trained(run: Path, tmp_path: Path, printed: Any) -> None:
    model, adapter, is_stored = model_of(run), run / "adapter", KINDS[run.name][2]
    assert (run / STORED).is_dir() == is_stored
    if run.name == "folder-unstored":
        return
    held_out = losses_of(run)
    rows = run.parent / "held.jsonl"
    answers = printed("chat", model, "--adapter", adapter, "--prompt", "what is red?", "--max-tokens", 3)
    assert [answer["from"] for answer in answers["answers"]] == ["base", "adapter"]
    evaluated = printed("eval", model, "--data", rows, "--adapter", adapter)
    sides, method = evaluated["sides"], KINDS[run.name][1].get("method", "rtn")
    label = "base, as in its file" if run.name == "kept" else f"base, 4-bit by {method}"
    assert [side["label"] for side in sides[-2:]] == [label, f"{label} + adapter"]
    assert [*evaluated["answers"][0]][-2:] == ["base", "tuned"]
    assert [str(run / STORED) in said["stderr"] for said in (answers, evaluated)] == [is_stored] * 2
    losses = {side["name"]: side["texts"]["held.jsonl"]["loss"] for side in sides}
    (name,) = (name for name in losses if name.endswith(" + adapter"))
    assert len(losses) == 2 + run.name.startswith("folder")  # the others have no 16-bit original
    assert [losses[name.removesuffix(" + adapter")], losses[name]] == pytest.approx(held_out, abs=0.01)
    merged = printed("merge", model, adapter, "--out", tmp_path / "merged", "--check", "--sample", rows)
    kept = merged["retention"]
    # A run of four steps may learn so little on some CPUs that rounding is more of it, as the error says.
    assert kept["retention"] == pytest.approx(1, abs=max(0.1, kept["retention_error"]))
    assert kept["shipped_loss"] == pytest.approx(kept["adapted_loss"], rel=0.01)
    assert "not the model" not in merged["verdict"]
    made = printed("export", model, "--adapter", adapter, "--to", "gguf", "--out", tmp_path / "tuned.gguf")
    assert made["num_bytes"] > 0
    whole, exported = (logits(load_dense(tmp_path / name)) for name in ("merged", "tuned.gguf"))
    assert 10 * divergence(exported, whole) < divergence(other_base(run), whole)
    printed("export", model, "--adapter", adapter, "--to", "peft", "--out", tmp_path / "peft")
    named = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == (run / STORED if is_stored else model)


COMMANDS = {
    "chat": "chat {model} --adapter {adapter} --prompt x",
    "eval": "eval {model} --data {rows} --adapter {adapter}",
    "merge": "merge {model} {adapter} --out {out}",
    "gguf": "export {model} --adapter {adapter} --to gguf --out {out}.gguf",
    "peft": "export {model} --adapter {adapter} --to peft --out {out}",
    "gguf-adapter": "export {model} --adapter {adapter} --to gguf-adapter --out {out}.gguf",
}


def refused_alike(mistake: Any, model: Path, adapter: Path, out: Path) -> str:
    """The one sentence with which every command refuses."""
    places = {"model": model, "adapter": adapter, "out": out, "rows": adapter.parents[1] / "held.jsonl"}
    places["rows"] = places["rows"] if places["rows"].is_file() else adapter.parents[2] / "held.jsonl"
    found = {mistake(*words.format(**places).split()).partition(": ")[2] for words in COMMANDS.values()}
    (sentence,) = found
    return str(sentence)


def test_every_command_refuses_other_weights_alike(files: Path, tmp_path: Path, mistake: Any, sentence: Any) -> None:
    gguf_files.write_gguf(tmp_path / "other.gguf", initializer_range=0.05)
    (tmp_path / "model").rename(tmp_path / "other")
    assert main.main(["quantize", str(tmp_path / "other"), "--out", str(tmp_path / "other-nf4")]) == 0
    pairs = [(kind, given) for kind in ("folder-wmse", "four-bit") for given in ("other", "other-nf4")]
    for kind, given in [*pairs, ("kept", "other.gguf")]:
        said = refused_alike(mistake, tmp_path / given, trained(files, kind) / "adapter", tmp_path / "out")
        sentence(said.replace(str(files), "DIR").replace(str(tmp_path), "TMP"))
    assert not (tmp_path / "out").exists()


def test_stored_weights_that_are_gone_are_made_again(files: Path, tmp_path: Path, mistake: Any, printed: Any) -> None:
    run = trained(files, "folder-wmse")
    before = (run / "adapter" / RECORD).read_bytes()
    (run / STORED).rename(tmp_path / STORED)
    said = refused_alike(mistake, files / "model", run / "adapter", tmp_path / "out")
    (again,) = re.findall("`(qlora quantize [^`]+)`", said)
    assert main.main(shlex.split(again)[1:]) == 0
    words = ("chat", files / "model", "--adapter", run / "adapter", "--prompt", "x", "--max-tokens", 2)
    assert len(printed(*words)["answers"]) == 2
    assert (run / "adapter" / RECORD).read_bytes() == before
    said = refused_alike(mistake, files / "model", trained(files, "folder-unstored") / "adapter", tmp_path / "out")
    assert re.search("`qlora quantize .* --out DIR`", said)


def test_the_adapter_for_llama_cpp_is_of_what_it_runs(files: Path, tmp_path: Path, mistake: Any, sentence: Any) -> None:
    for kind in ("folder", "converted", "converted-wmse"):
        adapter = trained(files, kind) / "adapter"
        words = ("export", model_of(files / kind), "--adapter", adapter, "--to", "gguf-adapter", "--out")
        sentence(mistake(*words, tmp_path / "no.gguf").replace(str(files), "DIR"))
        assert main.main([*map(str, words), str(tmp_path / f"{kind}.gguf"), "--base", "original"]) == 0


@pytest.mark.parametrize("kind", ["folder-wmse", "kept"])
def test_the_second_half_takes_the_same_weights(files: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Stored ones are not made again."""
    whole, config = trained(files, kind), str(config_of(files, kind))
    half = ["--output_dir", str(files / f"half of {kind}")]
    with pytest.raises(Crash):
        qn.Trainer(qn.TrainConfig.from_file(config, half), on_step=crash_at(3)).train()
    monkeypatch.setattr("qlora_native.models.calibrate.calibrated", None)
    assert main.main(["train", config, *half, "--resume"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", *([RECORD] if kind == "folder-wmse" else [])):
        assert (Path(half[1]) / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


@pytest.mark.parametrize("model", ["kept.gguf", "model", "nf4"])
@pytest.mark.parametrize("gpu", [(), ("--gpu", "24GB")])
def test_what_init_writes_is_what_it_says(
    files: Path, tmp_path: Path, printed: Any, monkeypatch: pytest.MonkeyPatch, model: str, gpu: tuple[str, ...]
) -> None:
    """A file that stays as it is gets no section quant, and the header has the memory of exactly that config."""
    monkeypatch.chdir(files)
    written = tmp_path / "config.yaml"
    assert main.main(["config", "init", model, *gpu, "--out", str(written)]) == 0
    text = written.read_text(encoding="utf-8")
    assert ("quant" in yaml.safe_load(text)) == (model == "model")
    said = re.search(r": ([\d,]+) MiB of ", text)
    estimate = printed("estimate", written, *gpu)
    assert said is not None
    assert int(said[1].replace(",", "")) == round((estimate["total"] + estimate["reserve"]) / 2**20)


def test_notes_before_training(files: Path, tmp_path: Path, sentence: Any) -> None:
    kept, other = open_source(files / "kept.gguf"), open_source(tiny_models.save(tmp_path / "gemma3", "Gemma3Text"))
    assert notes_of(kept) == notes_of(open_source(files / "model")) == []
    sentence([*notes_of(kept, "nf4"), *notes_of(other)])
    quant = qn.TrainConfig.from_values({"model": "x", "data": {"train": "x"}, "quant": {"method": "wmse"}}).quant
    assert quant.options["quant_type"] == "nf4"
