"""A GGUF file with an adapter in its codes, by `qlora export --type keep` and by `lora.ship: gguf`: what changes and by
how much; with --llama-cpp, the loss that llama.cpp has of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import make_adapter
from gguf_files import MIX, write_gguf
from runs import settings
from test_export import export
from test_gguf_adapter import evaluated, mean_losses
from torch import Tensor

import qlora_native as qn
from qlora_native import gguf_blocks
from qlora_native._native import quant_type_number
from qlora_native.calibration.data import as_calibration, take_tokens
from qlora_native.data.dataset import load_dataset, load_split
from qlora_native.lora import lora_layers
from qlora_native.models.load import load_model
from qlora_native.tool.cli.demo import demo_config, model_file
from qlora_native.tool.cli.standard_library import write_split
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer
from qlora_native.weights.gguf import DENSE
from qlora_native.weights.open import load_tokenizer

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of many types, an adapter over it, and rows."""
    folder = tmp_path_factory.mktemp("shipped")
    write_gguf(folder / "file.gguf")
    tiny.write_rows(folder / "train.jsonl", 20)
    tiny.write_rows(folder / "text.jsonl", 200)
    model = qn.add_lora(load_model(folder / "file.gguf"), qn.LoraConfig(r=4, seed=1, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.005
    qn.save_adapter(model, folder / "adapter")
    return folder


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).double()


@torch.no_grad()
def test_the_file_with_other_codes(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the adapter's change in llama.cpp's own names and order of rows."""
    source, out, text = files / "file.gguf", tmp_path / "out.gguf", files / "text.jsonl"
    export(
        source, "--adapter", files / "adapter", "--to", "gguf", "--type", "keep", "--out", out, "--calibration", text
    )
    said = capsys.readouterr().err
    (total,) = re.findall(r"finding the codes of (\d+) weights with \d+ sequences of \d+ tokens", said)
    assert said.splitlines()[-1] == f"calibrating: layer {total} of {total}" and said.count("calibrating: layer") >= 8
    export(source, "--to", "gguf", "--type", "f32", "--out", tmp_path / "plain.gguf")
    export(source, "--adapter", files / "adapter", "--to", "gguf", "--type", "f32", "--out", tmp_path / "merged.gguf")
    before, after, plain, merged = (tensors(tmp_path / path) for path in (source, out, "plain.gguf", "merged.gguf"))
    whole = [path.read_bytes() for path in (source, out)]
    outside = [bytearray(content) for content in whole]
    changes: dict[str, Tensor] = {}
    for name, tensor in after.items():
        change = torch.from_numpy(merged[name].data - plain[name].data).double()
        assert (before[name].data == tensor.data).all() == (not change.any()), name
        if change.any():
            changes[name] = change
            for content in outside:
                content[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = bytes(tensor.n_bytes)
    assert len(whole[0]) == len(whole[1]) and outside[0] == outside[1] and len(changes) == 14
    for name, change in changes.items():
        kind, moved = after[name].tensor_type.name.lower(), values(after[name]) - values(before[name])
        if kind in DENSE:
            assert torch.allclose(values(after[name]), values(before[name]) + change, rtol=2**-8, atol=1e-6), name
            continue
        number = quant_type_number(kind)
        old, new = (
            torch.from_numpy(side[name].data.copy()).view(-1, qn._native.GGUF_BLOCKS[number][1])
            for side in (before, after)
        )
        assert torch.equal(gguf_blocks.with_codes(new, gguf_blocks.codes(old, number), number), old), name
        assert moved.any(), name
    adapted: Any = qn.load_adapter(load_model(source), files / "adapter")
    ids = take_tokens(as_calibration(str(text)), "wmse", lambda: load_tokenizer(source), 300, None).ids[:4]
    base, beside, ships = (model(ids).logits.double() for model in (load_model(source), adapted, load_model(out)))
    moved, wanted = ships - base, beside - base
    assert float((moved * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.15)
    assert float((ships - beside).norm() / wanted.norm()) < 0.9  # of 4 bits and a random adapter


def test_a_run_ends_with_the_file_that_it_evaluated(files: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "ship": "gguf", "target_modules": ["q_proj", "o_proj", "gate_proj"]}
    train = {"steps": 4, "batch_size": 3, "lr": 5e-3, "eval_every": 2}
    config = settings(files, tmp_path, {"eval_fraction": 0.2}, lora, **train) | {"model": str(files / "file.gguf")}
    run = Trainer(TrainConfig.model_validate(config), quiet=True)
    summary = run.train()
    assert summary.shipped_dir == tmp_path / "shipped.gguf"
    loaded: Any = load_model(tmp_path / "shipped.gguf")
    changed = 0
    for path, layer in lora_layers(run.model):
        base: Any = layer.base_layer
        packed = loaded.get_submodule(path).quantized.packed
        assert torch.equal(packed, layer.shipped.packed)  # type: ignore[union-attr]
        changed += int((packed != base.quantized.packed).sum())
    assert changed > 100
    held_out: Any = load_split(tokenizer=run.tokenizer, **run.config.row_options)[1]
    again = Trainer(run.config, model=loaded, tokenizer=run.tokenizer, quiet=True)
    assert again.evaluate(held_out) == pytest.approx(summary.loss_after, abs=1e-6)


def test_mistakes(files: Path, tmp_path: Path, mistake: Callable[..., str]) -> None:
    def refused(model: Path, adapter: Path) -> str:
        words = ("--to", "gguf", "--type", "keep", "--calibration", "text.jsonl", "--out", tmp_path / "out.gguf")
        return mistake("export", model, "--adapter", adapter, *words)

    assert "is no GGUF file" in refused(files / "model", files / "adapter")
    odd = write_gguf(tmp_path / "odd.gguf", {**MIX, "attn_v": "q2_k"})
    assert "v_proj in q2_k" in refused(odd, files / "adapter")
    tied = write_gguf(tmp_path / "tied.gguf", tie_word_embeddings=True)
    make_adapter(tmp_path / "model", tmp_path / "head", ["lm_head"])
    assert "an adapter of linear layers" in refused(tied, tmp_path / "head")
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("quant_type", ["q4_0", "q4_k"])
def test_llama_cpp_has_the_same_loss(
    request: pytest.FixtureRequest, tmp_path: Path, quant_type: str, record_property: Callable[[str, object], None]
) -> None:
    """SmolLM2's own file in another type, an adapter trained on that as it is, and the file with the adapter in it."""
    if not request.config.getoption("--llama-cpp"):
        pytest.skip("--llama-cpp was not given; .ci/full gives it")
    base, out = tmp_path / "base.gguf", tmp_path / "run" / "shipped.gguf"
    export(model_file(), "--to", "gguf", "--type", quant_type, "--out", base)
    write_split(tmp_path / "run" / "data", 700, 12)
    config = demo_config(base, tmp_path / "run", 10, 5e-4, 0, keep=True)
    config = config.model_copy(update={"lora": replace(config.lora, ship="gguf")})
    summary = Trainer(config, quiet=True).train()
    rows = load_dataset(config.data.eval or "", load_tokenizer(out), max_length=256, format=None, train_on="all")
    model = load_model(out).eval()
    ours, theirs = mean_losses(
        [row["input_ids"].tolist() for row in rows],
        lambda ids: model(torch.tensor([ids])).logits[0],
        lambda ids: evaluated(out, None, ids),
    )
    record_property("held-out loss of the file that ships, here and in llama.cpp", (ours, theirs))
    assert abs(ours - theirs) < 0.02 and (summary.loss_before or 0) - (summary.loss_after or 0) > 0.3
    assert summary.retention is not None and summary.retention["retention"] > 0.9
