"""`qlora export --to gguf-adapter`: what llama.cpp adds to each matrix is what PEFT adds; by the gguf package and,
with --llama-cpp, by llama.cpp itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapters import RANK, make_adapter
from helpers import relative_error
from test_export import export, model_of
from torch.nn.functional import cross_entropy

from qlora_native.data.dataset import load_dataset
from qlora_native.tool.cli.demo import demo_config, model_file
from qlora_native.tool.cli.standard_library import write_split
from qlora_native.tool.train.loop import Trainer
from qlora_native.weights.open import load_tokenizer

gguf = pytest.importorskip("gguf")


def matrices(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2}


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Qwen3", {"use_rslora": True}),
    ("Mistral", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3.0}}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=[kind for kind, _ in OPTIONS])
def test_it_adds_what_merging_adds(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = model_of(tmp_path / "model", kind, head_dim=16)
    adapter = make_adapter(model, tmp_path / "adapter", **options)
    export(adapter, "--to", "gguf-adapter")
    export(model, "--to", "gguf", "--type", "f32", "--out", tmp_path / "base.gguf")
    export(model, "--adapter", adapter, "--to", "gguf", "--type", "f32", "--out", tmp_path / "merged.gguf")
    base, merged, parts = (matrices(tmp_path / f"{name}.gguf") for name in ("base", "merged", "adapter"))
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "adapter.gguf").fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == ("qwen3" if kind == "Qwen3" else "llama")
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert {f"{name}.lora_{side}" for name in changed for side in "ab"} == parts.keys() and len(changed) == 14
    for name in changed:
        a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
        assert len(a) == (2 if "attn_q" in name and "rank_pattern" in options else RANK)
        delta = fields["adapter.lora.alpha"] / len(a) * (b @ a)
        np.testing.assert_allclose(delta, merged[name] - base[name], atol=1e-6)


def test_mistakes(tmp_path: Path, mistake: Callable[..., str], sentence: Callable[[str], None]) -> None:
    model = model_of(tmp_path / "model", "Llama", num_hidden_layers=1)
    adapter = make_adapter(model, tmp_path / "adapter", modules_to_save=["lm_head"])
    tied = model_of(tmp_path / "tied", "Llama", num_hidden_layers=1, tie_word_embeddings=True)
    make_adapter(tied, tmp_path / "head", ["lm_head", "q_proj"])
    other = model_of(tmp_path / "gpt2", "GPT2", n_layer=1)
    make_adapter(other, tmp_path / "other")
    make_adapter(model, tmp_path / "dora", use_dora=True)
    made = make_adapter(model, tmp_path / "nameless")
    edit = made / "adapter_config.json"
    edit.write_text(json.dumps({**json.loads(edit.read_text()), "base_model_name_or_path": None}))
    make_adapter(model, tmp_path / "rows", ["q_proj"], trainable_token_indices=[3])
    for words in ("adapter", "rows", "head", "other", "dora", "nameless", "model"):
        sentence(mistake("export", tmp_path / words, "--to", "gguf-adapter"))
    sentence(mistake("export", adapter, "--to", "gguf-adapter", "--type", "f16"))
    sentence(mistake("export", model, "--to", "gguf"))
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def evaluated(path: Path, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """llama.cpp's logits [T, V]."""
    import llama_cpp

    options = {"lora_path": None if adapter is None else str(adapter), "n_ctx": 512, "n_threads": 1}
    runner = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **options)
    runner.eval(ids)
    logits = torch.from_numpy(runner.scores[: len(ids)].copy())
    runner.close()
    return logits


@torch.no_grad()
def mean_losses(rows: Sequence[list[int]], *sides: Callable[[list[int]], torch.Tensor]) -> list[float]:
    """The mean loss of rows by each side's logits, one side after the other: ggml takes a thread's AMX tiles to stay
    configured, and dies of our kernels in between."""
    found = []
    for side in sides:
        losses = [cross_entropy(side(ids)[:-1].float(), torch.tensor(ids[1:]), reduction="none") for ids in rows]
        found.append(float(torch.cat(losses).mean()))
    return found


@pytest.fixture
def llama_cpp(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--llama-cpp"):
        pytest.skip("--llama-cpp was not given; .ci/full gives it")


@torch.no_grad()
@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=[kind for kind, _ in OPTIONS])
def test_llama_cpp_runs_it(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = model_of(tmp_path / "model", kind, head_dim=16)
    adapter = make_adapter(model, tmp_path / "adapter", **options)
    export(adapter, "--to", "gguf-adapter")
    export(model, "--to", "gguf", "--type", "f32", "--out", tmp_path / "base.gguf")
    ids = list(range(10, 58))
    expected = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)(torch.tensor([ids])).logits[
        0
    ]
    assert relative_error(evaluated(tmp_path / "base.gguf", tmp_path / "adapter.gguf", ids), expected) < 1e-2
    assert relative_error(evaluated(tmp_path / "base.gguf", None, ids), expected) > 1e-1


@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_over_the_kept_file(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The mean loss of held-out rows, of SmolLM2's own Q4_1 file with an adapter that was trained on it as it is."""
    path = model_file()
    write_split(tmp_path / "run" / "data", 700, 12)
    config = demo_config(path, tmp_path / "run", 10, 5e-4, 0, keep=True)
    trainer = Trainer(config)
    trainer.train()
    export(tmp_path / "run" / "adapter", "--to", "gguf-adapter")
    model = trainer.model.eval()
    rows = load_dataset(config.data.eval or "", load_tokenizer(path), max_length=256, format=None, train_on="all")
    adapter = tmp_path / "run" / "adapter.gguf"
    ours, theirs, base = mean_losses(
        [row["input_ids"].tolist() for row in rows],
        lambda ids: model(torch.tensor([ids])).logits[0],
        lambda ids: evaluated(path, adapter, ids),
        lambda ids: evaluated(path, None, ids),
    )
    record_property("held-out loss with the adapter, here and in llama.cpp, and of its base", (ours, theirs, base))
    assert abs(ours - theirs) < 0.01 < base - theirs
