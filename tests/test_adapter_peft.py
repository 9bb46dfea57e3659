"""Adapter folders against the peft package, in both directions, and every way such a folder can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import dense_twin, distance, fill, logits, make, save

import qlora_native as qn
from qlora_native.lora import LoraConfig, add_lora, load_adapter, lora_layers, save_adapter
from qlora_native.models.load import load_model

peft = pytest.importorskip("peft")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
RANKS = {"q_proj": 4, r"layers\.1\..*up_proj": 2}


OURS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("GPT2", {}),
    ("Qwen2", {}),
    ("Llama", {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"]}),  # short names would select too much
    ("Llama", {"rslora": True, "alpha": 5, "rank_pattern": RANKS, "alpha_pattern": {"o_proj": 3}}),
    ("Llama", {"rank_pattern": {"up_proj": 4, r"layers\.1\..*_proj": 2}}),  # the first that matches counts
    ("Llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("Llama", {"target_modules": ["q_proj"], "trainable_tokens": [3, 9, 5]}),
    ("Llama", {"trainable_tokens": {"lm_head": [4], "embed_tokens": [3]}}),
    ("Gemma3Text", {"trainable_tokens": [3, 9]}),  # tied, and the embedding is scaled
    ("Llama", {"dropout": 0.25}),
    ("Llama", {"layers_to_transform": [1]}),
    ("GPT2", {"layers_to_transform": [0], "rank_pattern": {"c_attn": 2}}),
]


@pytest.mark.parametrize(("kind", "options"), OURS, ids=lambda part: part if isinstance(part, str) else "+".join(part))
def test_ours_loads_in_peft(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    folder = save(tmp_path / "base", kind)
    model = load_model(folder, dtype=torch.float32)
    twin = dense_twin(folder, model)[0]
    plain = logits(model)
    fill(add_lora(model, LoraConfig(**{"r": 8, "seed": 0, **options})))
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
    assert distance(logits(theirs), logits(model)) < 1e-5
    assert distance(logits(model), plain) > 0.01
    wrapped = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert wrapped == set(dict(lora_layers(model)))
    again = load_model(folder, dtype=torch.float32)
    state = torch.get_rng_state()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(again), logits(model))


THEIRS: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.1\.(self_attn|mlp)\.(q|up)_proj"},  # a string is a regular expression
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"target_modules": "all-linear", "rank_pattern": RANKS, "alpha_pattern": {"o_proj": 3}},
    {"target_modules": "all-linear", "rank_pattern": RANKS, "use_rslora": True, "lora_alpha": 5},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},  # of the input embedding alone
    {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7], "embed_tokens": [3, 4]}},
    {"target_modules": ["lm_head", "v_proj"]},
    {"target_modules": ["v_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.5},
]


@pytest.mark.parametrize("options", THEIRS, ids=lambda options: "+".join(map(str, options.values()))[:40])
def test_theirs_loads_here(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save(tmp_path / "base")
    model = load_model(folder, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, **options)
    theirs = fill(peft.get_peft_model(dense_twin(folder, model)[0], config)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    assert load_adapter(model, tmp_path / "adapter") is model
    assert distance(logits(model), logits(theirs)) < 1e-5
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name or "lm_head" in name or "embed" in name for name in trainable)
    save_adapter(model, tmp_path / "again")
    first, second = (load_file(tmp_path / name / TENSORS) for name in ("adapter", "again"))
    first = {name: tensor for name, tensor in first.items() if "base_layer" not in name}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_files_are_as_peft_writes_them(tmp_path: Path) -> None:
    folder = save(tmp_path / "base")
    model = load_model(folder)  # bf16: the adapter is fp32 all the same
    add_lora(model, LoraConfig(r=4, alpha=16, dropout=0.05))
    save_adapter(model, tmp_path / "ours")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    peft.get_peft_model(make(), config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / TENSORS) for name in ("ours", "theirs"))
    forms = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (ours, theirs)]
    assert forms[0] == forms[1]
    with safe_open(tmp_path / "ours" / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    written = json.loads((tmp_path / "ours" / CONFIG).read_text())
    known = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert set(written) <= set(known), "peft warns about keys that it does not know"
    assert written["target_modules"] == sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    for key in ("peft_type", "task_type", "bias", "use_dora", "fan_in_fan_out", "init_lora_weights"):
        assert written[key] == known[key], key
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (4, 16, 0.05)
    assert written["base_model_name_or_path"] == str(folder)


def test_loading_into_an_adapter_keeps_its_parameters(tmp_path: Path) -> None:
    """An optimizer holds the parameters: loading must fill them, not exchange them."""
    folder = save(tmp_path / "base")
    first = load_model(folder)
    fill(add_lora(first, LoraConfig(r=4, seed=1)))
    save_adapter(first, tmp_path / "adapter")
    second = add_lora(load_model(folder), LoraConfig(r=4, seed=2))
    parameters = [parameter for parameter in second.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(second, tmp_path / "adapter")
    assert all(a is b for a, b in zip(parameters, (p for p in second.parameters() if p.requires_grad), strict=True))
    assert torch.equal(logits(first), logits(second))
    with pytest.warns(UserWarning, match="takes the place of"):
        load_adapter(second, tmp_path / "adapter")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model under base/ and an adapter of rank 4 under adapter/."""
    root = tmp_path_factory.mktemp("sound")
    model = load_model(save(root / "base"))
    fill(add_lora(model, LoraConfig(r=4)))
    save_adapter(model, root / "adapter")
    return root


@pytest.fixture
def adapter(tmp_path: Path, sound: Path) -> Path:
    """A copy of that adapter."""
    return Path(shutil.copytree(sound / "adapter", tmp_path / "adapter"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS)


def put(folder: Path, name: str, *shape: int) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"base_model.model.{name}": torch.zeros(shape)}))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

WRONG: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda f: (f / CONFIG).unlink(), r"has no adapter_config\.json: expected"),
    ("config is not JSON", lambda f: (f / CONFIG).write_text("{"), r"adapter_config\.json cannot be read"),
    ("no tensors", lambda f: (f / TENSORS).unlink(), r"has no adapter_model\.safetensors"),
    ("pickle", lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), r"adapter_model\.bin, is not read"),
    ("cut short", lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:500]), "cannot be read"),
    ("prompt tuning", lambda f: edit_config(f, peft_type="PROMPT_TUNING"), "peft_type is 'PROMPT_TUNING'"),
    ("DoRA", lambda f: edit_config(f, use_dora=True), "sets use_dora to True, which"),
    ("biases", lambda f: edit_config(f, bias="all"), "sets bias to 'all'"),
    ("PiSSA", lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "pissa_niter_4.*changes the base"),
    ("config of another rank", lambda f: edit_config(f, r=8), r"is \[4, 96\], but adapter_config\.json has rank 8"),
    ("no rank", lambda f: edit_config(f, r=None), r"adapter_config\.json cannot be read: .*rank"),
    ("half a pair", lambda f: edit_tensors(f, lambda t: t.pop(KEY)), "holds lora_B of .*q_proj but not"),
    ("nothing", lambda f: edit_tensors(f, lambda t: t.clear()), "holds no lora_A and lora_B"),
    ("embedding adapter", lambda f: put(f, "x.lora_embedding_A", 2), "x.lora_embedding_A belongs to a kind"),
    ("whole of another model", lambda f: put(f, "lm_head.weight", 9, 64), r"head\.weight \[9, 64\].*as \[128, 64\]"),
    ("whole of 4 bits", lambda f: put(f, "model.layers.0.mlp.up_proj.weight", 96, 64), r"up_proj\.weight \[96, 64\]"),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_adapters_are_one_sentence(
    adapter: Path, sound: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(adapter)
    model = load_model(sound / "base")
    before = logits(model)
    with pytest.raises(qn.UserError, match=message) as error:
        load_adapter(model, adapter)
    assert str(adapter) in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert torch.equal(logits(model), before), "the model must be as it was"


def test_an_adapter_of_another_base(tmp_path: Path, sound: Path) -> None:
    wider = "trained on .*base: that of .*down_proj is for 96 inputs and 64 outputs.*128 and 64"
    for name, changes, message in (
        ("wider", {"intermediate_size": 128}, wider),
        (
            "shallow",
            {"num_hidden_layers": 1},
            r"trained on .*base: it is for model\.layers\.1\..*but LlamaForCausalLM has no such module",
        ),
        ("other", {"kind": "GPT2"}, "GPT2LMHeadModel has no such module"),
    ):
        with pytest.raises(qn.UserError, match=message):
            load_adapter(load_model(save(tmp_path / name, **changes)), sound / "adapter")


def test_an_adapter_other_than_the_models(sound: Path) -> None:
    for options, message in (
        ({"r": 8}, "has rank 4 and scale 8, the model's has rank 8 and scale 4"),
        ({"r": 4, "rslora": True}, "scale 8, the model's has rank 4 and scale 16"),
        ({"r": 4, "target_modules": ["q_proj"]}, "changes 14 layers and the model's adapter 2"),
    ):
        with pytest.raises(qn.UserError, match=message):
            load_adapter(add_lora(load_model(sound / "base"), LoraConfig(**options)), sound / "adapter")


def test_saving_without_an_adapter() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter: call add_lora"):
        save_adapter(make(), "nowhere")


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by setrlimit")
def test_a_full_disk_leaves_the_old_adapter(adapter: Path, sound: Path) -> None:
    import resource

    model = load_adapter(load_model(sound / "base"), adapter)
    for _, layer in lora_layers(model):
        layer.lora_B.data.fill_(1)
    before, limits = contents(adapter), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(qn.UserError, match=r"cannot write the adapter .* unchanged"):
            save_adapter(model, adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(adapter) == before


def test_both_files_are_renamed_only_when_both_are_written(
    adapter: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_lora(load_model(sound / "base"), LoraConfig(r=2))
    before = contents(adapter)
    calls: list[int] = []

    def second_fails(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(qn.UserError, match="No space left .* is unchanged"):
        save_adapter(model, adapter)
    assert contents(adapter) == before
