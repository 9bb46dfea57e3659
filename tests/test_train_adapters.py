"""Adapters of ``qlora train`` against PEFT and plain torch on the decoded weights: the same values after some steps,
under the names that PEFT gives them; and runs that start from an adapter, ``qlora train --adapter DIR``."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import peft
import peft.optimizers
import pytest
import runs
import tiny
import torch
import torch.nn.functional as F
import yaml
from gguf_files import write_gguf
from pydantic import ValidationError
from runs import Crash, crash_at, metrics
from safetensors.torch import load_file
from sentences import Check
from tiny_models import dense_twin, distance, logits, tokens
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_native.data.batching import micro_batches
from qlora_native.data.dataset import load_split
from qlora_native.distributed.loading import load_model as sharded
from qlora_native.errors import UserError
from qlora_native.lora import LoraConfig, adapters_off, add_lora, load_adapter
from qlora_native.lora.tokens import token_rows
from qlora_native.models.load import load_model
from qlora_native.models.loss import causal_lm_loss
from qlora_native.models.merge import merge
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.estimate import Estimator, Setting
from qlora_native.tool.train import prepare
from qlora_native.tool.train.loop import Trainer, TrainSummary
from qlora_native.tool.train.setup import learning_rate, make_sampler, prepare_model
from qlora_native.weights.open import load_tokenizer

STEPS, LR = 4, 5e-3
TENSORS = "adapter_model.safetensors"
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_files(tmp_path_factory.mktemp("files"), rows=8)
    for name, count in {"many": 24, "more": 9, "held": 7}.items():
        tiny.write_rows(folder / f"{name}.jsonl", count)
    return folder


def config_of(files: Path, out: Path, lora: dict[str, Any], **train: Any) -> TrainConfig:
    options = {"steps": STEPS, "batch_size": 2, "grad_accum": 2, "lr": LR, "clip": 0, "dtype": "float32", **train}
    return TrainConfig.model_validate(runs.settings(files, out, None, {"r": 4, "alpha": 8, **lora}, **options))


def peft_twin(config: TrainConfig, options: dict[str, Any]) -> Any:
    """PEFT's adapter on the decoded model, which begins as that of ``config`` does."""
    folder = Path(config.model)
    ours = prepare_model(config, quiet=True)
    twin = dense_twin(folder, load_model(folder, dtype=torch.float32))[0]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": NAMES, "task_type": "CAUSAL_LM", **options}
    theirs = peft.get_peft_model(twin, peft.LoraConfig(**settings))
    for name, parameter in theirs.named_parameters():
        if ".lora_A." in name:
            parameter.data.copy_(
                ours.get_parameter(name.removeprefix("base_model.model.").replace(".default.weight", ""))
            )
    return theirs.train()


def train_in_plain_torch(config: TrainConfig, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """The steps of the run: each row's trained tokens count alike."""
    rows = load_split(tokenizer=load_tokenizer(config.model), **config.row_options)[0]
    sampler = make_sampler(config, rows)
    ratios = [group["lr"] / LR for group in optimizer.param_groups]
    for step in range(STEPS):
        items = next(sampler)
        (batch,) = micro_batches(rows, items, len(items), 1, torch.device("cpu"))
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
        F.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten()).backward()
        rate = learning_rate(step, STEPS, peak=LR, warmup=config.train.warmup, scheduler="cosine")
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = rate * ratio
        optimizer.step()
        optimizer.zero_grad()


def plain_adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, weight_decay=0.0)


def lora_plus(model: Any) -> torch.optim.Optimizer:
    return peft.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=8)


PATTERNS = {"layers_to_transform": [1], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"mlp\..*": 3.0}}
WHOLE = {"modules_to_save": ["embed_tokens", "model.norm", "lm_head"]}
TOKENS = {"trainable_tokens": ["<|user|>", 4]}
IDS = [2, 4]
RUNS: list[tuple[dict[str, Any], dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = [
    (PATTERNS, PATTERNS, plain_adamw),
    ({"lora_plus_ratio": 8}, {}, lora_plus),
    (WHOLE, WHOLE, plain_adamw),
    (TOKENS, {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}}, plain_adamw),
]


@pytest.mark.parametrize(("ours", "theirs", "optimizer_of"), RUNS, ids=["+".join(ours) for ours, *_ in RUNS])
def test_a_run_ends_where_peft_and_torch_do(
    files: Path, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], optimizer_of: Any
) -> None:
    config = config_of(files, tmp_path / "out", ours)
    summary = Trainer(config, quiet=True).train()
    model = peft_twin(config, theirs)
    start = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    train_in_plain_torch(config, model, optimizer_of(model))
    got, expected = load_file(summary.adapter_dir / TENSORS), peft.get_peft_model_state_dict(model)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        moved = float((tensor - start[name]).abs().max())
        assert moved > LR and float((got[name] - tensor).abs().max()) < 0.02 * moved, name


NEW = {"trainable_tokens": ["<|new|>", "<|user|>", "<|newer|>"]}  # of which the tokenizer of 300 lacks two


@pytest.mark.parametrize(
    ("trained", "dtype"), [(WHOLE, "bfloat16"), (NEW, "bfloat16"), ({}, "float16")], ids=["whole", "new", "float16"]
)
def test_a_run_that_crashed_ends_as_if_it_had_not(
    files: Path, tmp_path: Path, trained: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 the scale of the loss is lowered before the checkpoint and once more after it."""
    monkeypatch.setattr(prepare, "LARGEST_SCALE", 2.0**22)
    lora = {**PATTERNS, **trained, "lora_plus_ratio": 8, "dropout": 0.3}
    whole, crashed = (
        config_of(files, tmp_path / name, lora, save_every=2, dtype=dtype, optimizer="adamw8bit")
        for name in ("whole", "crashed")
    )
    Trainer(whole, quiet=True).train()
    with pytest.raises(Crash):
        Trainer(crashed, quiet=True, on_step=crash_at(3)).train()
    torch.rand(5)
    Trainer(crashed.model_copy(update={"resume": "auto"}), quiet=True).train()
    one, other = (tmp_path / name for name in ("whole", "crashed"))
    assert metrics(one) == metrics(other)
    assert [line["grad_norm"] is None for line in metrics(one)] == [dtype == "float16"] * 3 + [False]
    assert (one / "adapter" / TENSORS).read_bytes() == (other / "adapter" / TENSORS).read_bytes()


def test_whole_modules_have_fp32_copies(files: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Steps much smaller than the distance of two bf16 numbers move them."""
    config = config_of(files, tmp_path / "out", WHOLE, dtype="bfloat16", lr=1e-6)
    trainer = Trainer(config, quiet=True)
    summary = trainer.train()
    plain: Any = load_model(Path(config.model))
    for name in ("lm_head", "model.embed_tokens", "model.norm"):
        stored = load_file(summary.adapter_dir / TENSORS)[f"base_model.model.{name}.weight"]
        before = plain.get_parameter(f"{name}.weight").float()
        assert stored.dtype == torch.float32 and 0 < float((stored - before).abs().max()) < 1e-5
        assert plain.get_parameter(f"{name}.weight").dtype == torch.bfloat16
    again: Any = load_adapter(plain, summary.adapter_dir)
    assert logits(again).dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(trainer.model.eval()))
    merged = merge(again, "dequantized")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    # Without the fused class that a dense layer has on a CPU, the head is still a plain one.
    unfused: Any = add_lora(load_model(Path(config.model), fuse=False), LoraConfig(modules_to_save=["lm_head"]))
    causal_lm_loss(unfused, {"input_ids": tokens(), "labels": tokens()}).backward()
    assert float(unfused.lm_head.weight.grad.abs().max()) > 0
    assert not [str(warning.message) for warning in recwarn if "output embedding" in str(warning.message)]


def test_tied_embeddings_are_trained_as_one_and_load_in_peft(tmp_path: Path) -> None:
    files = runs.write_files(tmp_path / "files", rows=8, tie_word_embeddings=True)
    trainer = Trainer(config_of(files, tmp_path / "out", {"modules_to_save": ["embed_tokens"]}), quiet=True)
    folder, model = trainer.train().adapter_dir, trainer.model.eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    base = load_model(files / "model", dtype=torch.float32)
    assert float((base.lm_head.weight - model.lm_head.weight).abs().max()) > LR
    theirs = peft.PeftModel.from_pretrained(dense_twin(files / "model", base)[0], folder)
    assert distance(logits(theirs), logits(model)) < 1e-5
    assert torch.equal(logits(load_adapter(base, folder)), logits(model))
    merged = merge(model, "original", torch.float32)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_new_tokens_are_rows_that_are_trained_and_merged(tmp_path: Path) -> None:
    """Of embeddings that are tied: PEFT loads them over a resized model, and every other row keeps its bits."""
    files = runs.write_files(tmp_path / "files", rows=8, tie_word_embeddings=True)
    lines = (files / "train.jsonl").read_text().replace("what is", "<|new|> is<|newer|>")
    (files / "train.jsonl").write_text(lines)
    trainer = Trainer(config_of(files, tmp_path / "out", NEW), quiet=True)
    folder, model = trainer.train().adapter_dir, trainer.model.eval()
    assert model.config.vocab_size == model.lm_head.out_features == 2 + len(load_tokenizer(files / "model"))
    assert load_tokenizer(files / "model", folder).convert_tokens_to_ids(NEW["trainable_tokens"]) == [300, 2, 301]
    base = load_model(files / "model", dtype=torch.float32)
    table = base.model.embed_tokens.weight.clone()
    rows = load_file(folder / TENSORS)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    start = torch.stack([table.mean(0), table[2], table.mean(0)])
    assert all(LR < float(moved) < STEPS * 2 * LR for moved in (rows - start).abs().amax(1))

    twin = dense_twin(files / "model", base)[0]
    twin.resize_token_embeddings(302, mean_resizing=False)
    ids = torch.tensor([[5, 300, 2, 301, 7]])
    got = model(ids).logits
    theirs = peft.PeftModel.from_pretrained(twin, folder)
    assert distance(theirs(ids).logits, got) < 1e-5
    hidden = model.model(ids).last_hidden_state
    assert distance(F.linear(hidden, model.lm_head.weight), got) < 1e-5
    with adapters_off(model):
        known = ids[:, ::2]
        assert distance(model(known).logits[..., :300], base(known).logits) < 1e-5
    assert torch.equal(load_adapter(base, folder)(ids).logits, got)

    for words in (["--to", "fp32"], ["--base", "dequantized", "--to", "fp32", "--check"]):
        out = tmp_path / words[1]
        assert main(["merge", str(files / "model"), str(folder), "--out", str(out), *words]) == 0
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(merged.get_input_embeddings().weight[torch.tensor([300, 2, 301])], rows)
        untouched = [token for token in range(300) if token != 2]
        assert torch.equal(merged.get_input_embeddings().weight[untouched], table[untouched])
        assert load_tokenizer(out).convert_tokens_to_ids("<|newer|>") == 301
    assert distance(merged(ids).logits, got) < 1e-5
    in_memory = merge(model, "dequantized", torch.float32)
    assert distance(in_memory(ids).logits, got) < 1e-5 and type(in_memory.lm_head) is torch.nn.Linear
    assert in_memory.lm_head.weight is in_memory.model.embed_tokens.weight


@pytest.mark.parametrize("lora", [WHOLE, TOKENS, {"rank_pattern": {"q_proj": 2}}], ids="+".join)
def test_the_estimate_counts_what_is_trained(files: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    config = config_of(files, tmp_path / "out", lora, dtype="bfloat16")
    estimator = Estimator(Path(config.model), Setting.from_config(config, "cpu"))
    model = prepare_model(config, tokenizer=load_tokenizer(config.model), quiet=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_bytes = sum(parameter.nbytes for parameter in trained)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    held -= sum(part.token_ids.nbytes for part in token_rows(model).values())  # 8 bytes a token
    step = estimator.at(paged=False).moments["step"]
    assert (step.adapters, step.gradients, step.optimizer) == (num_bytes, num_bytes, 2 * num_bytes)
    assert step.weights + step.scales + step.dense + step.adapters == held


def test_an_embeddings_gradient_is_there_twice_only_when_it_is_added() -> None:
    """Measured with these embeddings on 8 layers and one micro-batch: 336.5 MiB at the peak, of which it has 62.5."""
    config = LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=64, num_hidden_layers=1)
    lora = LoraConfig(modules_to_save=["embed_tokens"])
    estimator = Estimator(config, Setting(lora=lora, batch_size=1, length=16))
    alone, added = (estimator.at(micro_batches=count).moments["backward"].gradients for count in (1, 2))
    assert (alone, added) == (estimator.adapters, estimator.adapters + 4 * 32000 * 512)


def test_whole_modules_of_a_gguf_file(tmp_path: Path) -> None:
    """Its embeddings stay quantized unless they are trained."""
    file = write_gguf(tmp_path / "model.gguf", num_hidden_layers=1)
    values = runs.settings(tmp_path, tmp_path / "out", lora={"r": 4, "alpha": 8}, dtype="bfloat16")
    values["model"] = str(file)
    config = TrainConfig.model_validate(values | {"lora": {**values["lora"], "modules_to_save": ["embed_tokens"]}})
    model = prepare_model(config, quiet=True)
    assert model.model.embed_tokens.weight.dtype == torch.float32 and model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.quantized.quant_type == "q6_k" and model.load_report.is_kept
    assert Estimator(file, Setting.from_config(config, "cpu")).whole == model.model.embed_tokens.weight.nbytes
    config = TrainConfig.model_validate(values | {"lora": {**values["lora"], "trainable_tokens": [2, 4]}})
    model = prepare_model(config, tokenizer=load_tokenizer(file), quiet=True)
    assert list(token_rows(model)) == ["model.embed_tokens", "lm_head"]
    assert Estimator(file, Setting.from_config(config, "cpu")).trained == [
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    ]


@pytest.mark.parametrize("trained", [WHOLE, TOKENS], ids="+".join)
@pytest.mark.parametrize("other", [{"parallel": "fsdp"}, {"ship": "gguf"}], ids="+".join)
def test_what_does_not_go_with_whole_modules(trained: dict[str, Any], other: dict[str, Any]) -> None:
    values = {"model": "m", "data": {"train": "x"}, "lora": {**trained, **other}}
    if "parallel" in other:
        values |= {"lora": trained, **other}
    with pytest.raises(UserError, match=rf"{next(iter(trained))} .*(parallel is fsdp|ship is gguf)"):
        TrainConfig.from_values(values)


def test_tokens_whose_rows_cannot_be_trained(files: Path, tmp_path: Path, sentence: Check) -> None:
    for lora in (
        {"trainable_tokens": [300]},  # the tokenizer has no such token
        {**TOKENS, "modules_to_save": ["lm_head"]},
        {**TOKENS, "target_modules": ["lm_head"]},
        {**TOKENS, "ship": "nf4"},
    ):
        with pytest.raises((UserError, ValidationError)) as error:
            Trainer(config_of(files, tmp_path / "out", lora), quiet=True).train()
        sentence(str(error.value).partition("[type=")[0])
    for wrong in ([301], {"q_proj": [3]}, {"wte": [3]}, [2, 2], [-1]):
        with pytest.raises(ValueError) as error:
            add_lora(load_model(files / "model"), LoraConfig(trainable_tokens=wrong))
        sentence(str(error.value))
    for unsharded in ({"trainable_tokens": [2]}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError) as error:
            sharded(files / "model", lora=LoraConfig(seed=0, **unsharded))
        sentence(str(error.value))


# ---------------------------------------------------------------------------------------------------------------------
# From an adapter

LORA = {"r": 8, "alpha": 24, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 4}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": LORA,
    "whole": {**LORA, "rslora": True, "modules_to_save": ["lm_head"]},
    "tokens": {**LORA, "trainable_tokens": ["<|new|>", "<|user|>"]},
}


def run(
    files: Path, out: Path, lora: dict[str, Any], rows: str = "more", on_step: Any = None, **train: Any
) -> TrainSummary:
    data = {"train": str(files / f"{rows}.jsonl"), "eval": str(files / "held.jsonl")}
    resume = train.pop("resume", None)
    options = {"steps": 6, "batch_size": 4, "grad_accum": 1, "lr": 1e-3, "samples": 0, **train}
    values = {**runs.settings(files, out, data, lora, **options), "resume": resume}
    return Trainer(TrainConfig.from_values(values), quiet=True, on_step=on_step).train()


@pytest.fixture(scope="module")
def first(files: Path) -> Callable[[str], TrainSummary]:
    """The run whose adapter others start from, by kind."""
    return lru_cache(lambda kind: run(files, files / kind, KINDS[kind], "many"))


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_where_the_other_ended(
    files: Path, tmp_path: Path, first: Callable[[str], TrainSummary], kind: str
) -> None:
    before = first(kind)
    after = run(files, tmp_path / "out", {"adapter": str(before.adapter_dir), "dropout": 0.1})
    assert before.loss_after is not None and before.loss_before is not None and after.loss_after is not None
    assert after.loss_before == pytest.approx(before.loss_after, abs=1e-6)
    assert after.loss_after < before.loss_after < before.loss_before
    # What it is: the layers, ranks and scales of the first, in the config too.
    settings = [json.loads((each.adapter_dir / "adapter_config.json").read_text()) for each in (before, after)]
    assert settings[1].pop("lora_dropout") == 0.1 and settings[0].pop("lora_dropout") == 0.0
    assert settings[0] == settings[1]
    written = yaml.safe_load((after.adapter_dir / "config.yaml").read_text())["lora"]
    assert (written["r"], written["alpha"]) == (settings[0]["r"], settings[0]["lora_alpha"])
    again = TrainConfig.from_file(after.adapter_dir / "config.yaml")  # which has every key
    assert again.lora.adapter == str(before.adapter_dir)
    if kind == "plain":  # of another library: the same function
        bases = [AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32) for _ in range(2)]
        theirs = peft.PeftModel.from_pretrained(bases[0], after.adapter_dir).eval()
        ours = load_adapter(bases[1], after.adapter_dir).eval()
        assert float((logits(theirs) - logits(ours)).abs().max()) < 1e-4


def test_it_can_be_stopped_and_resumed(files: Path, tmp_path: Path, first: Callable[[str], TrainSummary]) -> None:
    """The checkpoint goes on, not the adapter that the run started from."""
    start = {"adapter": str(first("plain").adapter_dir), "dropout": 0.3}
    whole = run(files, tmp_path / "whole", start, save_every=2, keep=9)
    with pytest.raises(Crash):
        run(files, tmp_path / "parts", start, on_step=crash_at(5), save_every=2)
    parts = run(files, tmp_path / "parts", start, save_every=2, resume="auto")
    assert (whole.adapter_dir / TENSORS).read_bytes() == (parts.adapter_dir / TENSORS).read_bytes()


@pytest.mark.parametrize(
    "given", ["--r 4", "--alpha 3 --rslora", "--target_modules [q_proj]", "--adapter {0}/gone", "--adapter {0}/plain"]
)
def test_what_the_adapter_decides_is_not_given_too(
    files: Path, tmp_path: Path, first: Any, given: str, mistake: Callable[..., str], sentence: Check
) -> None:
    words = ["--model", files / "model", "--train", files / "more.jsonl", "--output_dir", tmp_path / "out"]
    words += ["--adapter", first("plain").adapter_dir, *given.format(files).split()]
    sentence(mistake("train", *words).replace(str(files), "FILES"))
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(
    files: Path, tmp_path: Path, first: Callable[[str], TrainSummary], capsys: pytest.CaptureFixture[str]
) -> None:
    before = first("plain")
    words = ["--model", str(files / "model"), "--train", str(files / "more.jsonl"), "--steps", "2"]
    words += ["--eval", str(files / "held.jsonl"), "--adapter", str(before.adapter_dir)]
    capsys.readouterr()
    assert main(["train", *words, "--output_dir", str(tmp_path / "out")]) == 0
    assert f"held-out loss {before.loss_after:.4f}  " in capsys.readouterr().out.partition("step 1/2")[0]
    words = ["export", str(files / "model"), "--adapter", str(tmp_path / "out" / "adapter"), "--to", "peft"]
    assert main([*words, "--out", str(tmp_path / "peft")]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 8
