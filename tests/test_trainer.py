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

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base"), num_hidden_layers=1)


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=qn.QLoRANativeConfig(), dtype=torch.float32)


def adapted(folder: Path) -> Any:
    model = base(folder)
    torch.manual_seed(0)
    return peft.get_peft_model(model, qn.peft_config(r=4))


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments that both trainers take."""
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        **changes,
    }


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run(
    folder: Path, out: Path, optimizer: tuple[Any, dict[str, Any]], resume: Any = None, **options: Any
) -> list[float]:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    trainer = Trainer(
        model=adapted(folder),
        args=TrainingArguments(**arguments(out, **options)),
        train_dataset=rows,
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses(trainer)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainer_with_our_optimizer(tmp_path: Path, folder: Path) -> None:
    expected = run(folder, tmp_path / "torch", (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}))
    ours = (qn.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1})
    got = run(folder, tmp_path / "ours", ours)
    assert got == pytest.approx(expected, rel=1e-5)
    assert len(set(got)) == 4
    assert run(folder, tmp_path / "kept", ours, gradient_checkpointing=True) == pytest.approx(got, rel=1e-6)
    again = run(folder, tmp_path / "again", ours, resume=str(tmp_path / "ours" / "checkpoint-2"))
    assert again == got
    eight_bit = run(folder, tmp_path / "eight", (qn.optim.AdamW, {"lr": 1e-2, "bits": 8}), save_strategy="no")
    assert eight_bit == pytest.approx(expected, rel=2e-2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from qlora_native.hf.peft import QuantizedLoraLinear

    folder = write_model(tmp_path / "base", num_hidden_layers=1)
    rows = [{"text": f"what is {color}? {thing}"} for color, thing in FACTS]
    trainer = trl.SFTTrainer(
        model=base(folder),
        args=trl.SFTConfig(
            **arguments(tmp_path, max_steps=8, save_strategy="no"), gradient_checkpointing=True, bf16=False
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=qn.peft_config(r=4),
        optimizer_cls_and_kwargs=(qn.optim.AdamW, {"lr": 1e-2}),
    )
    trainer.train()
    assert sum(isinstance(module, QuantizedLoraLinear) for module in trainer.model.modules()) == 7
    assert type(trainer.optimizer.optimizer) is qn.optim.AdamW
    seen = losses(trainer)
    assert len(seen) == 8
    assert seen[-1] < seen[0]
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("adapter", ["ours", "peft"])
def test_a_whole_step_compiles_without_a_break(
    folder: Path, adapter: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """fullgraph=True raises at the first break. ``--backend inductor`` generates code too, which takes a minute."""
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
    step = torch.compile(lambda: loss_of(model), fullgraph=True, backend=pytestconfig.getoption("--backend"))
    for _ in range(2):
        model.zero_grad()
        step().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got.keys() == expected.keys()
    assert len(got) == 14
    for name, gradient in got.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_losses_are_those_with_bitsandbytes_config(tmp_path: Path) -> None:
    """The usual script from the same 4-bit bytes and adapter; bench/bench_switch.py does it on a real model."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    dense = save(tmp_path / "dense", num_hidden_layers=1, intermediate_size=128)  # their CPU code wants whole blocks
    settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    theirs = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    made = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=theirs, dtype=torch.float32, device_map="cpu"
    )
    made.save_pretrained(tmp_path / "four_bit")
    torch.manual_seed(0)
    peft.get_peft_model(made, peft.LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]

    def run_with(config: Any) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "four_bit", quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        model = peft.prepare_model_for_kbit_training(model)
        model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
        args = TrainingArguments(**arguments(tmp_path / "out", save_strategy="no"))
        trainer = Trainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        return losses(trainer)

    ours = qn.QLoRANativeConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    assert run_with(ours) == pytest.approx(run_with(theirs), abs=1e-5)
