"""Benches in their smallest form: they run to their end, and both sides compute the same; no test looks at a time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import any_file_page
import bench_generate
import bench_gguf
import bench_optim
import bench_packing
import bench_real
import bench_residency
import bench_train
import common
import four_bit_folder
import linear_contenders
import pytest
import tiny
import tiny_models
import torch

import qlora_native as qn
from qlora_native.tool.cli import standard_library

CEILINGS = {"read_gb_per_s": 20.0, "write_gb_per_s": 20.0, "copy_gb_per_s": 20.0}
CEILINGS |= {"bf16_gflop_per_s": 100.0, "fp32_gflop_per_s": 50.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """The rows of a script's result; ``words`` follow its name on the command line."""

    def rows(script: ModuleType, *words: object) -> list[dict[str, Any]]:
        out = tmp_path / "result.json"
        monkeypatch.setattr(script, "ceilings", lambda *_, **__: CEILINGS, raising=False)
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words), "--json", str(out)])
        script.main()
        return list(json.loads(out.read_text(encoding="utf-8"))["rows"])

    return rows


def test_steps_of_every_optimizer(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_optim, "CASES", {"tiny": (3, 1000)})
    rows = run(bench_optim, "--repeats", 1)
    assert [row["optimizer"] for row in rows] == list(bench_optim.ours())
    assert all(row["match"] and row["parameters"] == 3000 and bench_optim.FUSED in row["ours_over"] for row in rows)


def test_packed_rows(run: Callable[..., Any], tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", max_position_embeddings=2048, initializer_range=0.02)
    (row,) = run(bench_packing, "--model", folder, "--rows", 4, "--batch", 2, "--repeats", 1)
    assert row["match"] and set(row["tokens_per_second"]) == {"padded", "grouped", "ours"}


def test_every_gguf_format_has_a_row_for_each_product(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_contenders, "cache_bytes", lambda: 1 << 16)
    result = run(bench_gguf, "--n", 256, "--k", 256, "--m", 1, 64, "--repeats", 2, "--threads", 2)
    rows = {(row["type"], row["m"], row["direction"]): row for row in result}
    assert len(rows) == 3 * len(bench_gguf.GGUF_TYPES) and all(row["match"] for row in result)
    for (name, m, _), row in rows.items():
        expected = [("nf4", 1.15)] if m == 64 else [("ggml", 0.8)] if name in bench_gguf.STREAMED else []
        assert [(bar["rival"], bar["bar"]) for bar in row["bars"]] == expected
    rows["q4_0", 1, "forward"]["ours_over"]["ggml"] = [0.5, 0.8, 1.0]
    table = any_file_page.formats({"avx2": {"rows": result}})
    _, _, *lines = (line.strip("| ").split(" | ") for line in table.splitlines())
    assert len(lines) == len(bench_gguf.GGUF_TYPES) and {len(line) for line in lines} == {6}
    assert next(line for line in lines if line[0] == "Q4_0")[3] == "1.25 (1-2)"


def test_decoding_is_compared_with_the_model_that_ours_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_generate, "bitsandbytes_model", lambda folder: None)  # a peer, where there is one
    models = bench_generate.sides(tiny_models.save(tmp_path, dtype=torch.bfloat16))
    prompt = tiny_models.tokens(rows=1)
    row = bench_generate.compare(models, prompt, count=4, repeats=2, measured=CEILINGS)
    assert row["match"] and set(row["tokens_per_second"]) == set(models)
    assert set(row["tokens"]) == {"ours", "unfused", "dequantized"} and row["tokens"]["dequantized"] == {"equal": True}
    layers = tiny_models.four_bit_layers(models["ours"]).values()
    assert row["megabytes_read_a_token"]["layers"] == sum(layer.quantized.nbytes for layer in layers) / 1e6
    dense, free, free_layers = (models[name] for name in ("dequantized", "free", "layers free"))
    for path, layer in tiny_models.four_bit_layers(models["unfused"]).items():
        assert torch.equal(dense.get_submodule(path).weight, layer.quantized.dequantize(torch.bfloat16))
    assert not tiny_models.four_bit_layers(dense) and not tiny_models.four_bit_layers(free_layers)
    # Free layers keep the shapes.
    nothing = tiny_models.logits(free)
    assert nothing.shape == tiny_models.logits(models["ours"]).shape and not nothing.any()
    assert tiny_models.logits(free_layers).any()
    free.generation_config.eos_token_id = 0  # its tokens are all 0, and an end of text does not stop it
    assert bench_generate.decode(free, prompt, 5).tolist() == [0] * 5
    tokens = torch.tensor([3, 4, 5])
    assert bench_generate.first_difference(tokens, torch.tensor([3, 1, 2])) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Training against PEFT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A 16-bit model, an adapter and two batches."""
    pytest.importorskip("peft")
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
    measured: Any = {**CEILINGS, "bf16_gflop_per_s": 1.0, "fp32_gflop_per_s": 0.5}
    row: dict[str, Any] = bench_train.compare(peer, arguments, folder, prepared, measured)
    losses = row["first_loss"]
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=2e-2)
    assert row["trainable_parameters"]["ours"] == row["trainable_parameters"]["theirs"] > 0
    rate = 0.5 if peer == "fp32-both" else 1.0  # the floor is that of the dtype that our side computes in
    assert row["products"]["floor_ms"] == pytest.approx(1e3 * sum(row["products"]["gflop"].values()) / rate, rel=1e-3)
    assert row["bars"][0]["rival"] == "theirs"


@pytest.mark.parametrize("kernel", [None, object()], ids=["its wheel's", "a hub's"])
def test_the_bench_says_which_path_bitsandbytes_took(kernel: object, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(common, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(ops, "gemm_4bit_forward_kernel", kernel, raising=False)
    assert common.bitsandbytes_kernels() is (kernel is not None)


def test_rows_of_a_real_model(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny file in place of a real one, a short task, no llama.cpp, which loads none so small. A second run measures
    nothing that is there, and only what was asked for."""
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    few = [(f"module{n}", f"def f{n}():\n    return {n}", f"Return {n}.") for n in range(64)]
    file = write_gguf(tmp_path / "model.gguf", num_hidden_layers=1)
    monkeypatch.setattr(standard_library, "examples", lambda most: iter(few))
    monkeypatch.setattr(bench_real, "birth", lambda: {"commit": "c0ffee", "changed": False})
    monkeypatch.setattr(bench_real, "has_llama_cpp", lambda: False)
    monkeypatch.setattr(bench_real, "model_file", lambda name: file)
    classes = ("amx", "avx512_bf16", "avx512", "avx2", "scalar")
    monkeypatch.setattr(bench_real, "BARS", dict.fromkeys(classes, (2.4, 0.45)))
    counts = {"steps": 2, "learn-steps": 2, "new-tokens": 3, "repeats": 1, "threads": 1, "work": tmp_path / "work"}
    words = ["--models", "1.5b", *(word for name, count in counts.items() for word in (f"--{name}", count))]
    words += ["--seeds", "3", "4"]

    rows = run(bench_real, *words)
    kinds = [(row["part"], row.get("checkpointing")) for row in rows]
    assert kinds == [("train", True), ("train", False), ("learn", False), ("generate", None)]
    assert all(row["match"] and row["kept"] and row["model"] == "1.5b" for row in rows)
    bars = [[(bar["measure"], bar["bar"]) for bar in row["bars"]] for row in rows]
    nats = ("nats from the held-out loss", 0.02)
    assert bars == [[("times as fast", 2.4), ("of the peak memory", 0.45)], [], [nats], []]
    assert all(row["of_floor"] > 0 and row["peak_rss_mib"]["ours"] > 0 for row in rows[:3])
    before, after = rows[2]["held_out_loss"]["theirs"]
    assert after < before and rows[2]["bars"][0]["met"]
    assert [row["seeds"] for row in rows] == [[3], [3], [3, 4], [3]]
    by_seed = rows[2]["held_out_loss_by_seed"]["theirs"]
    assert by_seed[0][1] != by_seed[1][1]  # another adapter and another order of rows
    assert [before, after] == pytest.approx([sum(losses) / 2 for losses in zip(*by_seed, strict=True)])
    assert rows[2]["held_out_loss"]["ours"][0] == pytest.approx(rows[2]["held_out_reference"], rel=5e-3)
    assert set(rows[3]["tokens_per_second"]) == {"ours", "ours+adapter", "theirs", "theirs+adapter"}

    monkeypatch.setattr(bench_real, "child", lambda *_: pytest.fail("measured again"))
    (tmp_path / "result.json").unlink()
    assert run(bench_real, *words, "--parts", "learn") == [rows[2]]
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        run(bench_real, *words, "--parts", "learn", "--lr", "1e-3")


# ---------------------------------------------------------------------------------------------------------------------
# A folder of random codes, mapped and copied


@pytest.fixture(scope="module")
def random_codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_bit_folder.write_folder("tiny", tmp_path_factory.mktemp("residency") / "tiny")


def test_a_folder_of_random_codes_opens_mapped_and_copied(random_codes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Callable[[list[str]], dict[str, Any]]] = []
    monkeypatch.setattr(bench_residency, "serve", served.append)
    for residency in ("memory", "mapped"):
        found = bench_residency.opened(random_codes, residency)
        assert found["seconds"] > 0 and found["private_mib"] < 1000
        bench_residency.passes(random_codes, residency, 8)
    assert len({answer([])["sha256"] for answer in served}) == 1
    bench_residency.forget(random_codes)
    assert bench_residency.swap_bytes() >= 0


def test_a_run_on_it_is_its_own_reference(random_codes: Path, tmp_path: Path) -> None:
    row = {"limit_gib": None, **bench_residency.train(random_codes, tmp_path, 32)}
    bench_residency.judge({"rows": [row]})
    assert row["match"] and row["speed_to_unlimited"] == pytest.approx(1) and row["bars"] == []
    assert row["tokens"] == 32 and len(row["loss"]) == bench_residency.STEPS
