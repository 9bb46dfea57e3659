"""qlora estimate: bytes against a loaded model, kept activations against what autograd keeps, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_models
import torch
from helpers import SavedTensors
from laws import ROOT
from sentences import Check
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

import qlora_native as qn
from qlora_native import _C
from qlora_native.lora import LoraConfig
from qlora_native.models import fuse
from qlora_native.models.loss import causal_lm_loss
from qlora_native.nn.experts import QuantizedExperts, by_expert
from qlora_native.ops import _cuda_copies
from qlora_native.ops.causal_attention import ALIGNMENT
from qlora_native.tool.cli.config import PRESETS, preset, shipped
from qlora_native.tool.cli.estimate import card_bytes, each_rank
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig, keys
from qlora_native.tool.estimate import Estimator, Setting
from qlora_native.tool.estimate.activations import head_shape, layer_bytes
from qlora_native.tool.estimate.cards import streamed_on
from qlora_native.tool.estimate.memory import CUDA_CONTEXT, THREAD_SCRATCH, state_bytes
from qlora_native.tool.train.memory import fit
from qlora_native.tool.train.setup import make_optimizer

GIB = 1 << 30
RANK, ROWS, LENGTH = 8, 2, 64
# Class, options, how far the kept bytes may be off: those of experts on a GPU depend on how many tokens each of them
# happens to meet.
KINDS: list[tuple[str, dict[str, Any], float]] = [
    ("Llama", {"head_dim": 32}, 0.0),
    ("Mistral", {"sliding_window": 32}, 0.002),
    ("Qwen2", {"tie_word_embeddings": True}, 0.0),
    ("Qwen3", {"head_dim": 32}, 0.0),
    ("Gemma", {"head_dim": 32}, 0.005),
    ("Gemma3Text", {"head_dim": 32}, 0.005),
    ("Llama", {"hidden_size": 192, "num_key_value_heads": 1}, 0.0),  # heads of 48
    ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}, 0.001),  # its MLP has no module of its own
    ("Phi3", {}, 0.0),
    ("Qwen3Moe", {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}, 0.08),
]


def assert_same_bytes(estimator: Estimator, model: Any) -> None:
    got, expected = estimator.model.load_report, model.load_report
    assert (got.bytes_4bit, got.bytes_dense) == (expected.bytes_4bit, expected.bytes_dense)


def assert_same_graph(folder: Path, device: str, tolerance: float) -> tuple[Estimator, Any, dict[str, torch.Tensor]]:
    """The bytes of a loaded model and those that its graph keeps are as predicted. Returns the model and its batch."""
    setting = Setting(lora=LoraConfig(r=RANK), batch_size=ROWS, length=LENGTH, device=device)
    estimator = Estimator(folder, setting)
    model = qn.load_model(folder)
    assert_same_bytes(estimator, model)

    qn.add_lora(model, LoraConfig(r=RANK)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert estimator.adapters == sum(p.nbytes for p in trained)

    ids = tiny_models.tokens(ROWS, LENGTH)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    with SavedTensors() as saved:
        loss = causal_lm_loss(model, batch)
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved.tensors}
    in_graph = sum(num_bytes for address, num_bytes in kept.items() if address not in own)
    assert loss.requires_grad

    tokens, config = ROWS * LENGTH, model.config
    layers = layer_bytes(estimator.model, setting)
    predicted = sum(tokens * (layer.token + LENGTH * layer.square) for layer in layers) - tokens * layers[0].first
    predicted += tokens * (estimator.norm_bytes + 2 * config.hidden_size + 8)
    predicted += 2 * 2 * LENGTH * head_shape(config)[2] * hasattr(config, "rope_parameters")  # the rotation's angles
    assert abs(predicted - in_graph) <= tolerance * in_graph, (predicted, in_graph)
    return estimator, model, batch


ON_A_CPU: list[tuple[str, dict[str, Any], float]] = [
    ("GPTNeoX", {}, 0.008),  # rotates a quarter of a head
    ("Mamba", {}, 0.005),
]


def each_kind(kinds: list[tuple[str, dict[str, Any], float]]) -> pytest.MarkDecorator:
    names = [f"{kind}{number}" for number, (kind, *_) in enumerate(kinds)]
    return pytest.mark.parametrize(("kind", "options", "tolerance"), kinds, ids=names)


@each_kind([*KINDS, *ON_A_CPU])
def test_bytes_are_those_of_a_loaded_model_and_of_its_graph(
    kind: str, options: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    assert_same_graph(tiny_models.save(tmp_path, kind, torch.bfloat16, **options), "cpu", tolerance)


@each_kind(KINDS)
@pytest.mark.usefixtures("emulator")
def test_bytes_on_a_gpu(
    kind: str, options: dict[str, Any], tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model whose norms, gates and rotations are fused there, whose experts take turns, and of the copies of its
    adapters."""
    monkeypatch.setattr(fuse, "is_on_cpu", lambda tensor: False)
    monkeypatch.setattr(QuantizedExperts, "forward", lambda self, *x: by_expert(self, *x, product=self._product))
    monkeypatch.setattr(_cuda_copies, "_copies", {})
    folder = tiny_models.save(tmp_path, kind, torch.bfloat16, **options)
    estimator, model, batch = assert_same_graph(folder, "cuda", tolerance)
    torch.optim.SGD(p for p in model.parameters() if p.requires_grad).step()
    causal_lm_loss(model, batch).backward()
    kept = [copy for copies in _cuda_copies._copies.values() for copy in copies.kept.values()]
    assert estimator.at().peak.copies == sum(copy.nbytes for copy in kept) == estimator.adapters // 2


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_pool_of_graphs(checkpointing: bool) -> None:
    """It is as large as the passes of the longest rows, whose place nothing else can take."""
    options: dict[str, Any] = {"device": "cuda", "checkpointing": checkpointing, "micro_batches": 1}
    found = Estimator(LLAMA_8B, Setting(**options)).at()
    eager = Estimator(LLAMA_8B, Setting(**options, cuda_graph=False)).at()
    passes = [found.moments[name] for name in ("loss", "backward")]
    assert found.graphs == max(terms.activations + terms.loss + terms.scratch for terms in passes) > 0 == eager.graphs
    assert found.moments["loss"].gradients == found.peak.adapters and eager.moments["loss"].gradients == 0
    needed = found.total + CUDA_CONTEXT + found.graphs
    assert found.fits(needed) and not found.fits(needed - 1)
    # The loop leaves these eager; a model that changes its logits, too.
    dropout = Setting(**options, lora=LoraConfig(dropout=0.1))
    assert (Estimator(LLAMA_8B, dropout).at().graphs == 0) is checkpointing
    softcapped = config_of("gemma2", 512, 1024, 2, 4, 2, 4000, head_dim=64)
    sizes = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    experts = config_of("qwen3_moe", 512, 1024, 2, 4, 2, 4000, head_dim=64, **sizes)
    assert all(Estimator(config, Setting(**options)).at().graphs == 0 for config in (softcapped, experts))
    config = TrainConfig.from_values({"model": "m", "data": {"train": "x"}, "train": {"cuda_graph": "off"}})
    assert not Setting.from_config(config, "cuda").cuda_graph


def test_graphs_are_off_where_their_memory_alone_does_not_fit() -> None:
    """Nothing streams before that; on a card that is too small for layers on the way, nothing else can be done."""
    estimator = Estimator(LLAMA_8B, Setting(device="cuda"))
    found, eager = estimator.at(), estimator.at(cuda_graph=False)
    needed, without = (estimate.total + estimate.reserve for estimate in (found, eager))
    assert without < needed - 1
    for free, graphs, streams in (
        (needed, True, False),
        (needed - 1, False, False),
        (without, False, False),
        (without - 1, True, True),
        (GIB, False, False),
    ):
        forecast = fit(estimator, free)
        assert forecast.has_room_for_graphs is graphs and (forecast.layers_budget is not None) is streams
        assert forecast.estimate is not None and (forecast.estimate.graphs > 0) is (graphs and not streams)


def test_weights_that_are_4_bit_already(tmp_path: Path) -> None:
    model = qn.load_model(tiny_models.save(tmp_path / "a", "Llama", torch.bfloat16), block_size=128)
    model.save_pretrained(tmp_path / "b")
    assert_same_bytes(Estimator(tmp_path / "b", Setting()), model)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion"])
def test_bytes_of_optimizer_states(name: str, tmp_path: Path) -> None:
    options = TrainConfig.from_values({"model": "m", "data": {"train": "x"}, "train": {"optimizer": name}}).train
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (100, 4096, 70_000)]
    optimizer = make_optimizer(options.model_copy(update={"paged": False}), parameters, tmp_path)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in parameters:
        state = {key: value for key, value in optimizer.state[parameter].items() if key != "step"}
        assert state_bytes(parameter.numel(), name) == sum(t.nbytes for t in state.values())


def config_of(kind: str, hidden: int, inner: int, layers: int, heads: int, groups: int, words: int, **more: Any) -> Any:
    return AutoConfig.for_model(
        kind, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=words, tie_word_embeddings=False, **more,
    )  # fmt: skip


LLAMA_8B = config_of("llama", 4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = config_of("llama", 8192, 28672, 80, 64, 8, 128256)
GEMMA_7B = config_of("gemma", 3072, 24576, 28, 16, 16, 256000, head_dim=256)
QWEN_06B = config_of("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128)
SMOL = config_of("llama", 576, 1536, 30, 9, 3, 49152)
SMOL.tie_word_embeddings = QWEN_06B.tie_word_embeddings = True


@pytest.mark.parametrize(
    ("config", "four_bit", "dense"),
    [  # weights in 4-bit layers, and in others, counted by hand from the sizes
        (LLAMA_8B, 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 2 * 128256 * 4096 + 65 * 4096),
        (LLAMA_70B, 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672), 2 * 128256 * 8192 + 161 * 8192),
        (config_of("mistral", 4096, 14336, 32, 32, 8, 32768), 6_979_321_856, 2 * 32768 * 4096 + 65 * 4096),
        (GEMMA_7B, 7_751_073_792, 2 * 256000 * 3072 + 57 * 3072),
    ],
    ids=["llama-8b", "llama-70b", "mistral-7b", "gemma-7b"],
)
def test_known_models(config: Any, four_bit: int, dense: int) -> None:
    estimator = Estimator(config, Setting(device="cuda"))
    peak = estimator.at().peak
    assert peak.weights == four_bit // 2
    assert peak.scales == pytest.approx(four_bit / 64 * (1 + 4 / 256), rel=1e-3)
    assert peak.dense == pytest.approx(2 * dense, rel=1e-5)
    # More of anything never takes less.
    totals = [estimator.at(length=length).total for length in (256, 1024, 4096)]
    assert totals == sorted(totals)
    assert estimator.at(checkpointing=False).total > estimator.at().total
    assert estimator.at(optimizer="adamw8bit").total < estimator.at().total
    estimator.positions = 1 << 20
    longest = estimator.longest(48 * GIB, 1)
    for length in (longest, longest + 64) if longest else ():
        assert estimator.at(batch_size=1, length=length).fits(48 * GIB) is (length == longest)


def test_scratch_and_logits_on_a_gpu() -> None:
    """A decoded weight, up to 256 MiB; the logits of 1,024 tokens, as the loss takes them there."""
    eight, seventy = (
        Estimator(config, Setting(device="cuda", batch_size=1, length=4096)).at().moments["loss"]
        for config in (LLAMA_8B, LLAMA_70B)
    )
    assert eight.scratch == 2 * 4096 * 14336 and seventy.scratch == 256 << 20
    logits, states = 2 * 1024 * (128256 + 2 * 4096), 2 * 2 * 4096 * 4096  # states: h and its gradient
    assert logits + states <= eight.loss <= logits + 3 * states


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),  # heads of 48
        ("llama", {"head_dim": 80}),
        ("opt", {"ffn_dim": 384, "word_embed_proj_dim": 192}),
        ("gemma4_text", {"num_global_key_value_heads": 1}),  # the width of a head differs from layer to layer
        ("mamba2", {"num_heads": 8, "head_dim": 48}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_heads_of_any_width_and_layers_of_any_kind(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        kind,
        **({"hidden_size": 192, "num_hidden_layers": 2} if kind == "mamba2" else sizes),
        vocab_size=4000,
        **options,
    )
    estimator = Estimator(config, Setting(dtype=dtype))
    few, many, all_kept = estimator.at(length=128), estimator.at(), estimator.at(checkpointing=False)
    assert few.total < many.total < all_kept.total and many.is_rough == ()
    assert many.total == sum(vars(many.peak).values()) == max(terms.total for terms in many.moments.values())


def test_a_layer_that_does_not_run_without_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states[hidden_states > 0]

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", refuses)
    estimate = Estimator(SMOL, Setting()).at(checkpointing=False)
    # Seven inputs of adapters, three of them wide, and the seven intermediates.
    token = 2 * (4 * 576 + 2 * 576 + 1536 + 7 * 16)
    assert estimate.is_rough == ("LlamaDecoderLayer",)
    assert estimate.moments["loss"].activations > 4 * 1024 * 30 * token


@pytest.mark.parametrize("width", [32, 48, 36])
def test_only_the_native_attention_has_scratch(width: int) -> None:
    config = config_of("llama", 4 * width, 256, 1, 4, 2, 400)
    scratch = Estimator(config, Setting(length=256)).at().moments["step"].scratch
    shape = (4, 4, 2, 256, width)
    expected = _C.causal_attention_scratch_bytes(1, shape, True) + ALIGNMENT if width != 36 else 0
    assert scratch == THREAD_SCRATCH * torch.get_num_threads() + expected


# Model, device, bytes of it, processes, GiB that the file's first line claims.
RECIPES: dict[str, tuple[Any, str, int, int, int | None]] = {
    "smollm2": (SMOL, "cpu", 2 * GIB, 1, None),
    "cpu": (QWEN_06B, "cpu", 3 * GIB, 1, None),
    "llama-70b": (LLAMA_70B, "cuda", 48 * GIB, 1, 43),
    "multi-gpu": (LLAMA_70B, "cuda", 24 * GIB, 4, 18),
}


def test_every_shipped_config_fits_its_card() -> None:
    assert set(shipped()) == set(RECIPES)
    for name, (model, device, limit, gpus, claimed) in RECIPES.items():
        config = TrainConfig.from_file(shipped()[name])
        estimator = Estimator(model, Setting.from_config(config, device))
        estimate = estimator.at()
        total = estimate.total + estimate.reserve
        if gpus > 1:
            total = next(rank.total for rank in each_rank(estimator, config, gpus) if rank.mode == "fsdp")
            assert config.parallel == "fsdp" and not estimate.fits(limit)  # or it needs no recipe of its own
        assert total <= limit, (name, total)
        assert claimed is None or round(total / GIB) == claimed, (name, total)
        first = shipped()[name].read_text(encoding="utf-8").splitlines()[0]
        assert claimed is None or f"{claimed} GB in all" in first


# config.json of the models of the presets: type, width, inner width, layers, heads, groups, words, and what is its own.
PRESET_MODELS: dict[str, tuple[Any, ...]] = {
    "deepseek-r1-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, {}),
    "gemma-2-9b": ("gemma2", 3584, 14336, 42, 16, 8, 256000, {"head_dim": 256}),
    "gemma-3-1b": ("gemma3_text", 1152, 6912, 26, 4, 1, 262144, {"head_dim": 256}),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, {}),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 32768, {}),
    "mixtral-8x7b": ("mixtral", 4096, 14336, 32, 32, 8, 32000, {"num_local_experts": 8}),
    "phi-4": ("phi3", 5120, 17920, 40, 40, 10, 100352, {"pad_token_id": 0}),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, {}),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 151936, {"head_dim": 128}),
    "smollm2-1.7b": ("llama", 2048, 8192, 24, 32, 32, 49152, {}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_a_card_of_24_gb_and_mixtral_one_of_48(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(preset(name))
    *sizes, more = PRESET_MODELS[name]
    config_of(*sizes, max_position_embeddings=8192, **more).save_pretrained(tmp_path)
    words = ["estimate", str(tmp_path / "run.yaml"), "--model", str(tmp_path), "--json", "--gpu"]
    assert main([*words, "48GB" if name == "mixtral-8x7b" else "24GB"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["on_card"] is None and printed["moments"]["step"]["adapters"] > 1e6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate")
    tiny.write_model(folder / "model")
    LLAMA_8B.save_pretrained(folder / "llama-8b")
    (folder / "empty").mkdir()
    return folder


def test_estimate_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    words = ["estimate", str(folder / "llama-8b"), "--gpu", "24GB", "--seq-length", "2048", "--batch-size", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "qlora_native", *words, "--plot", str(picture)],
        capture_output=True, text=True, cwd=ROOT / "tests", env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4-bit weights           3,328 MiB" in done.stdout and "which fits 24.00 GiB" in done.stdout
    assert done.stdout.isascii()  # no box, no bar, no color where there is no terminal
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_estimate_json_and_overrides(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder / "model")
    assert main(["estimate", model, "--json", "--cpu", "--lora.r", "4", "--grad_checkpointing", "false"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["setting"]["r"] == 4 and printed["setting"]["grad_checkpointing"] is False
    most = max(moment["total"] for moment in printed["moments"].values())
    assert printed["total"] == sum(printed["peak"].values()) == most
    (tmp_path / "run.yaml").write_text(f"model: {model}\ndata: {{train: rows.jsonl, max_length: 32}}\n")
    assert main(["estimate", str(tmp_path / "run.yaml"), "--json", "--cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["setting"]["length"] == 32
    most = ["--seq-length", str(1 << 24), "--batch-size", str(1 << 20), "--r", str(1 << 16)]
    assert main(["estimate", model, "--json", "--cpu", *most]) == 0  # at once
    assert json.loads(capsys.readouterr().out)["peak"]["activations"] > 1 << 44


def test_a_peak_while_finding_the_codes_that_ship_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The formulas need square matrices of the widest layer: more than a step of few tokens."""
    words = ["estimate", str(folder / "llama-8b"), "--cpu", "--lora.ship", "nf4", "--batch-size", "1", "--seq-length"]
    assert main([*words, "64", "--json"]) == 0
    moments = json.loads(capsys.readouterr().out)["moments"]
    assert max(moments, key=lambda name: moments[name]["total"]) == "shipping"
    assert main([*words, "64"]) == 0
    assert "codes that ship" in capsys.readouterr().out


def test_no_row_is_longer_than_the_model_has_positions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(folder / "model"), "--json", "--gpu", "24GB"]) == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert [entry["length"] for entry in fits] == [256] * 7  # max_position_embeddings
    assert main(["config", "init", str(folder / "model"), "--gpu", "24GB"]) == 0
    assert "max_length: 256 " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "{0}/gone",
        "{0}/empty",
        "{0}/model --gpu 5TB",
        "{0}/model --gpu big",
        "{0}/model --gpu 0GB",
        "{0}/model --plot x.txt",
        "{0}/model --rank 4",
        "{0}/model --batch-size 0",
        "--gpu 24GB",
    ],
)
def test_estimate_mistakes(folder: Path, words: str, mistake: Callable[..., str], sentence: Check) -> None:
    sentence(mistake("estimate", *words.format(folder).split()))


def test_card_sizes() -> None:
    assert card_bytes("24GB") == card_bytes("24") == card_bytes("24 GiB") == 24 * GIB
    assert card_bytes("1.5g") == 3 * GIB // 2 and card_bytes("16384MB") == 16 * GIB


def test_config_init_for_a_model_and_a_card(folder: Path, tmp_path: Path, mistake: Callable[..., str]) -> None:
    model, path = str(folder / "llama-8b"), tmp_path / "mine.yaml"
    assert main(["config", "init", model, "--gpu", "16GB", "--out", str(path)]) == 0
    config = TrainConfig.from_file(path)
    assert Estimator(LLAMA_8B, Setting.from_config(config, "cuda")).at().fits(16 * GIB)
    assert config.train.batch_size * config.train.grad_accum == 8 and config.data.max_length == 2048
    lines = path.read_text().splitlines()
    assert lines[1] == f"#   qlora train {path}"
    assert all(" # " in line for line in lines if line.startswith("  "))
    refused = mistake("config", "init", model, "--gpu", "4GB")
    assert "not fit a card of 4GB" in refused and "256 tokens" in refused
    assert "gone is no model folder" in mistake("config", "init", "gone", "--gpu", "4GB")


@pytest.mark.slow_memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "length"), [("llama", 128), pytest.param("llama48", 512, marks=pytest.mark.long)])
def test_the_peak_of_a_run_is_as_predicted(name: str, length: int, tmp_path: Path) -> None:
    """Cells of bench_estimate, which has the others: a llama of 50 MB, and one with heads of 48."""
    import bench_estimate

    folder = bench_estimate.write_model(name, tmp_path / "model", vocabulary=16000, num_hidden_layers=4)
    row = bench_estimate.cell(folder, length, checkpointing=False, steps=2)
    for measure, bar in bench_estimate.BARS.items():
        assert abs(row[measure]["error"]) <= bar, (measure, row)
    assert row["reported_by_the_run"] == pytest.approx(row["total"]["measured"], rel=0.05)


def test_the_page_of_keys_is_that_of_the_schema() -> None:
    import config_page

    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert config_page.page() == page, "run: python bench/config_page.py > docs/config.md"
    assert all(f"`{key}`" in page for key in keys())


def test_a_model_larger_than_the_card_streams(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", str(folder / "llama-8b"), "--json", "--batch-size", "1", "--gpu"]
    assert main([*words, "6GB"]) == 0
    found = json.loads(capsys.readouterr().out)
    streaming = found["on_card"]
    assert 0 < streaming["streamed_layers"] < streaming["layers"] == 32 and streaming["slots"] == 3
    assert streaming["card_bytes"] <= 6 * GIB < found["total"]
    assert main([*words, "24GB"]) == 0
    assert json.loads(capsys.readouterr().out)["on_card"] is None
    estimator = Estimator(LLAMA_8B, Setting(device="cuda", batch_size=1))
    assert streamed_on(estimator, GIB) is None
