"""A tiny model and an adapter of PEFT's own making, for the tests of what is done with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import tiny
import torch
from transformers import AutoModelForCausalLM

IDS = torch.arange(10, 58).view(2, 24)
SCALE, RANK = 2.0, 4


def make_adapter(model_folder: Path, folder: Path, targets: Any = "all-linear", **options: Any) -> Path:
    """An adapter of PEFT's own making, whose change is about a fifth of each weight."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    model.save_pretrained(folder)
    return folder


def write_model_and_adapter(folder: Path) -> Path:
    """``folder/model`` with the tiny tokenizer, and ``folder/adapter``."""
    tiny.write_model(folder / "model")
    make_adapter(folder / "model", folder / "adapter")
    return folder
