"""What a pass over noise shows of each linear layer, family by family, and what decides where none can run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tiny_models import distance, logits, save
from transformers import AutoModelForCausalLM

import qlora_native as qn
from qlora_native import errors
from qlora_native.lora import LoraConfig, add_lora, lora_layers
from qlora_native.lora.targets import select_targets
from qlora_native.models.build import four_bit_parts
from qlora_native.models.load import load_model
from qlora_native.nn import probe as probes
from qlora_native.nn.linear import AskedLinear
from qlora_native.nn.probe import OTHER, READ, UNUSED, USED, Use, kind_of, probe
from qlora_native.tool.cli import main
from qlora_native.weights.shapes import four_bit_weights

CHANGES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 8},
    "bart": {"decoder_layers": 2, "decoder_ffn_dim": 96, "decoder_attention_heads": 4, "encoder_layers": 1},
}
# Linear layers beside the output embedding: in 4 bits, adapted by all-linear, left dense.
NUMBERS = {
    "afmoe": (17, 16, 0),
    "axk2": (28, 22, 0),
    "bart": (20, 12, 0),
    "deepseek_v3": (16, 16, 0),
    "deepseek_v32": (22, 16, 0),
    "deepseek_v4": (18, 18, 2),
    "falcon": (8, 8, 0),
    "gemma3n_text": (31, 31, 4),
    "gpt_oss": (8, 8, 0),
    "granitemoehybrid": (8, 8, 0),
    "hunyuan_v1_moe": (16, 14, 0),
    "hy_v4": (24, 18, 0),
    "jamba": (10, 10, 1),
    "llama4_text": (14, 14, 2),
    "longcat_flash": (32, 32, 2),
    "mamba2": (4, 4, 0),
    "nemotron_h": (10, 10, 0),
    "phimoe": (8, 8, 2),
    "qwen3": (14, 14, 0),
    "qwen3_next": (14, 14, 0),
    "zaya": (18, 10, 0),
}
# How the paths of those end that are not both.
INDEXER = {f"indexer.{name}": UNUSED for name in ("wq_b", "wk", "weights_proj")}
LEFT: dict[str, dict[str, Use]] = {
    "afmoe": {"router.gate": UNUSED},
    "axk2": INDEXER,
    "bart": {f"encoder_attn.{name}": UNUSED for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "deepseek_v32": INDEXER,
    "deepseek_v4": {"self_attn.o_a_proj": OTHER},
    "gemma3n_text": {"altup.correction_coefs": READ, "altup.prediction_coefs": READ},
    "hunyuan_v1_moe": {"gate.wg": UNUSED},
    "hy_v4": INDEXER,
    "jamba": {"mamba.dt_proj": READ},
    "llama4_text": {"feed_forward.router": OTHER},
    "longcat_flash": {"router.classifier": READ},
    "phimoe": {"mlp.router": OTHER},
    "zaya": dict.fromkeys(("gate.down_proj", *(f"router_mlp.{name}" for name in ("fc1", "fc2", "out_proj"))), UNUSED),
}


def made(kind: str) -> Any:
    return families.make(kind, **CHANGES.get(kind, {}))


@pytest.mark.parametrize("kind", families.known(" ".join(NUMBERS)))
def test_the_use_of_each_linear_layer(kind: str) -> None:
    model, random = made(kind), torch.random.get_rng_state()
    uses, failed = probe(model)
    assert not failed and torch.equal(torch.random.get_rng_state(), random)
    left = {path: use for path, use in uses.items() if use != USED}
    expected = LEFT.get(kind, {})
    assert {end for end in expected for path in left if path.endswith(f".{end}")} == expected.keys()
    assert all(use == expected[end] for path, use in left.items() for end in expected if path.endswith(f".{end}"))
    assert all(path.endswith(tuple(expected)) for path in left)
    head = model.get_output_embeddings()
    chosen = four_bit_weights(model, ("lm_head",), 32, lambda name: False)
    in_4_bits = {name.removesuffix(".weight") for name in chosen if name.endswith(".weight")}
    linears = {path for path in uses if model.get_submodule(path) is not head}
    assert (len(in_4_bits), len(select_targets(model, LoraConfig())), len(linears - in_4_bits)) == NUMBERS[kind]


def test_a_family_without_others_needs_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kind: type, config: Any) -> dict[str, Use]:
        ran.append(kind)
        return {}

    ran: list[type] = []
    monkeypatch.setattr(probes, "_run", run)
    add_lora(load_model(save(tmp_path / "llama"), dtype=torch.float32), LoraConfig())
    assert not ran
    monkeypatch.setattr(probes, "_found", {})
    folder = save(tmp_path / "gemma", "Gemma", head_dim=16)
    for _ in range(2):
        add_lora(load_model(folder, dtype=torch.float32), LoraConfig())
    assert len(ran) == 1


def test_where_a_pass_fails_sources_decide(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sentence: Callable[[object], None],
) -> None:
    def fail(kind: type, config: Any) -> dict[str, Use]:
        raise ImportError("timm is missing\nin two lines")

    made("nemotron_h").save_pretrained(tmp_path)
    for run in (probes._run, fail):
        monkeypatch.setattr(probes, "_run", run)
        monkeypatch.setattr(probes, "_found", {})
        monkeypatch.setattr(errors, "_warned", set())
        model = load_model(tmp_path, dtype=torch.float32)
        (name,) = (name for name in model.load_report.kinds if name.endswith("mixer.out_proj"))
        about = model.load_report.kinds[name]
        assert any(".out_proj" in path for path in four_bit_parts(model)) is (run is not fail)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            adapted = {kind_of(path) for path, _ in lora_layers(add_lora(model, LoraConfig()))}
        assert (name in adapted) is (run is not fail)
        sentence(f"{name}: {about}")
        sentence([str(each.message) for each in given])
        assert main.main(["doctor", str(tmp_path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["layers"][name] == about
        assert main.main(["doctor", str(tmp_path)]) == 0
        assert about in capsys.readouterr().out


@pytest.mark.parametrize("kind", families.known("deepseek_v32"))
def test_a_packed_weight_answers_the_dtype_of_the_dense_one(tmp_path: Path, kind: str) -> None:
    made(kind).save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense", dtype=torch.float32)
    model.save_pretrained(tmp_path / "4bit")
    again = load_model(tmp_path / "4bit", dtype=torch.float32)
    config = qn.QLoRANativeConfig(compute_dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    for each in (model, again, deepcopy(again), theirs):
        layer = each.get_submodule("model.layers.0.self_attn.indexer.weights_proj")
        assert isinstance(layer, AskedLinear)
        assert "model.layers.0.self_attn.indexer.weights_proj.weight" in four_bit_parts(each)
        assert (layer.weight.dtype, layer.weight.shape) == (torch.float32, (layer.out_features, layer.in_features))
        assert layer.weight.isnan().all()  # what multiplies by it shows
        assert layer.state_dict()["weight"].dtype == torch.uint8
        assert distance(logits(each), logits(model)) < 1e-5
    adapted = {kind_of(path) for path in select_targets(model, LoraConfig())}
    assert not any("indexer" in kind for kind in adapted)
