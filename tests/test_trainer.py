"""transformers' Trainer and TRL's SFTTrainer on 4-bit models with our optimizer; a whole step under torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FACTS, write_model
from tiny_models import save, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import qlora_native as qn
from qlora_native import _C
from qlora_native.lora import lora_layers

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base"), num_hidden_layers=1)


def base(folder: Path, config: Any = None) -> Any:
    options: dict[str, Any] = {"quantization_config": config or qn.QLoRANativeConfig(), "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def adapted(folder: Path) -> Any:
    model = base(folder)
    torch.manual_seed(0)
    return peft.get_peft_model(model, qn.peft_config(r=4))


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments that both trainers take."""
    return {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
        "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True, **changes,
    }  # fmt: skip


def losses(trainer: Any, resume: str | None = None) -> list[float]:
    """Those of the steps of ``trainer.train``."""
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer_of(model: Any, out: Path, optimizer: Any = None, **options: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    args = TrainingArguments(**arguments(out, **options))
    return Trainer(model=model, args=args, train_dataset=rows, optimizer_cls_and_kwargs=optimizer)


def test_trainer_with_our_optimizer(tmp_path: Path, folder: Path) -> None:
    def run(name: str, kind: Any, resume: str | None = None, bits: int | None = None, **options: Any) -> list[float]:
        values = {"lr": 1e-2, "weight_decay": 0.1} if bits is None else {"lr": 1e-2, "bits": bits}
        return losses(trainer_of(adapted(folder), tmp_path / name, (kind, values), **options), resume)

    expected = run("torch", torch.optim.AdamW)
    got = run("ours", qn.optim.AdamW)
    assert got == pytest.approx(expected, rel=1e-5)
    assert len(set(got)) == 4
    assert run("kept", qn.optim.AdamW, gradient_checkpointing=True) == pytest.approx(got, rel=1e-6)
    assert run("again", qn.optim.AdamW, str(tmp_path / "ours" / "checkpoint-2")) == got
    assert run("eight", qn.optim.AdamW, bits=8, save_strategy="no") == pytest.approx(expected, rel=2e-2)


def test_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from qlora_native.interop.peft import QuantizedLoraLinear

    folder = write_model(tmp_path / "base", num_hidden_layers=1)
    rows = [{"text": f"what is {color}? {thing}"} for color, thing in FACTS]
    options = arguments(tmp_path, max_steps=8, save_strategy="no", gradient_checkpointing=True, bf16=False)
    trainer = trl.SFTTrainer(
        model=base(folder),
        args=trl.SFTConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=qn.peft_config(r=4),
        optimizer_cls_and_kwargs=(qn.optim.AdamW, {"lr": 1e-2}),
    )
    seen = losses(trainer)
    assert len(seen) == 8 and seen[-1] < seen[0]
    assert sum(isinstance(module, QuantizedLoraLinear) for module in trainer.model.modules()) == 7
    assert type(trainer.optimizer.optimizer) is qn.optim.AdamW
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)


def test_an_adapter_of_add_lora_is_saved_and_resumed_by_trainer(tmp_path: Path, folder: Path) -> None:
    """save_pretrained, checkpoints and the best model are adapters that PEFT loads; resuming gives the same losses."""

    def ours(seed: int) -> Any:
        model = qn.load_model(folder, dtype=torch.float32, device="cpu")
        return qn.add_lora(model, qn.LoraConfig(r=4, seed=seed))

    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    kept = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}

    def trainer(seed: int, name: str, **options: Any) -> Trainer:
        args = TrainingArguments(**arguments(tmp_path / name, **options))
        return Trainer(model=ours(seed), args=args, train_dataset=rows, eval_dataset=rows)

    first, again = trainer(0, "first", **kept), trainer(1, "again", **kept)
    expected = losses(first)
    assert losses(again, str(tmp_path / "first" / "checkpoint-2")) == expected
    with torch.no_grad():
        for _, layer in lora_layers(again.model):
            layer.lora_B.zero_()
    again._load_best_model()
    batch = tokens()
    logits = first.model.eval()(input_ids=batch).logits
    torch.testing.assert_close(again.model.eval()(input_ids=batch).logits, logits)

    first.save_model(str(tmp_path / "saved"))
    assert not [*tmp_path.rglob("model*.safetensors")]
    theirs = peft.PeftModel.from_pretrained(base(folder), tmp_path / "saved").eval()
    torch.testing.assert_close(theirs(input_ids=batch).logits, logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="model.push_to_hub"):
        first.model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    qn.merge(first.model, base="dequantized", dtype=torch.float32).save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(whole(input_ids=batch).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(_C, "MappedFile"), reason="files are mapped on Linux")
def test_trainer_over_layers_that_stream(tmp_path: Path) -> None:
    """An adapter of PEFT over mapped layers, none of which stays in memory."""
    from qlora_native.models.mapped import Streaming

    path = save(tmp_path / "dense", hidden_size=256, intermediate_size=768, num_hidden_layers=4)
    qn.load_model(path, dtype=torch.float32).save_pretrained(tmp_path / "four")

    def run(residency: str) -> list[float]:
        torch.manual_seed(0)
        base = qn.load_model(tmp_path / "four", dtype=torch.float32, residency=residency)
        model = peft.get_peft_model(base, qn.peft_config(r=4))
        streaming = Streaming(model, 0) if residency == "mapped" else None
        trainer = trainer_of(model, tmp_path / residency, save_strategy="no", gradient_checkpointing=True)
        got = losses(trainer)
        assert streaming is None or streaming.stream.bytes_read > 3 * streaming.plan.bytes_read()
        return got

    assert run("mapped") == run("memory")


def test_sft_trainer_saves_the_adapter_of_add_lora_alone(tmp_path: Path) -> None:
    """Its checkpoints are adapters, from which it resumes with the same losses and which PEFT loads."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    folder = write_model(tmp_path / "base", num_hidden_layers=1)
    rows = Dataset.from_list([{"text": f"what is {color}? {thing}"} for color, thing in FACTS])

    def trainer(seed: int, name: str) -> Any:
        model = qn.add_lora(qn.load_model(folder, dtype=torch.float32, device="cpu"), qn.LoraConfig(r=4, seed=seed))
        args = trl.SFTConfig(**arguments(tmp_path / name, bf16=False))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)

    first, again = trainer(0, "first"), trainer(1, "again")
    expected = losses(first)
    assert losses(again, str(tmp_path / "first" / "checkpoint-2")) == expected
    first.save_model(str(tmp_path / "saved"))
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("model*.safetensors")}
    adapters = {path.parent.name for path in tmp_path.rglob("adapter_model.safetensors")}
    assert written == {"base"} and adapters == {"checkpoint-2", "checkpoint-4", "saved"}
    batch = tokens()
    theirs = peft.PeftModel.from_pretrained(base(folder), tmp_path / "saved").eval()
    logits = first.model.eval()(input_ids=batch).logits
    torch.testing.assert_close(theirs(input_ids=batch).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ["ours", "peft"])
def test_a_whole_step_compiles_without_a_break(
    folder: Path, adapter: str, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """fullgraph=True raises at the first break."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def fresh() -> Any:
        if adapter == "peft":
            return adapted(folder).train()
        return qn.add_lora(qn.load_model(folder, dtype=torch.float32), qn.LoraConfig(r=4, seed=0)).train()

    batch = tokens()

    def loss_of(model: Any) -> torch.Tensor:
        return model(input_ids=batch, labels=batch, use_cache=False).loss

    plain, model = fresh(), fresh()
    loss_of(plain).backward()
    torch._dynamo.reset()
    step = torch.compile(lambda: loss_of(model), fullgraph=True, backend=backend)
    for _ in range(2):
        model.zero_grad()
        step().backward()
    expected, got = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (plain, model))
    assert got.keys() == expected.keys() and len(got) == 14
    for name, gradient in got.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


def test_the_losses_are_those_with_bitsandbytes_config(tmp_path: Path) -> None:
    """The usual script from the same 4-bit bytes and adapter; bench/bench_switch.py does it on a real model."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    dense = save(tmp_path / "dense", num_hidden_layers=1, intermediate_size=128)  # their CPU code wants whole blocks
    settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    theirs = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    made = base(dense, theirs)
    made.save_pretrained(tmp_path / "four_bit")
    torch.manual_seed(0)
    peft.get_peft_model(made, peft.LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")

    def run_with(config: Any) -> list[float]:
        model = peft.prepare_model_for_kbit_training(base(tmp_path / "four_bit", config))
        model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
        return losses(trainer_of(model, tmp_path / "out", save_strategy="no"))

    ours = qn.QLoRANativeConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    assert run_with(ours) == pytest.approx(run_with(theirs), abs=1e-5)
