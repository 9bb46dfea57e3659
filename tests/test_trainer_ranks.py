"""transformers' Trainer and a loop of accelerate over two processes, by DDP and by FSDP2, on 4-bit models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from ranks import adapters, distance, on_ranks
from safetensors.torch import load_file
from tiny_models import save, tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import qlora_native as qn
from qlora_native import distributed
from qlora_native.lora.layer import lora_layers
from qlora_native.nn import QuantizedLinear

peft = pytest.importorskip("peft")

TOLERANCE = 1e-5
FSDP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """accelerate turns FSDP on where its devices are GPUs of some kind (accelerate/state.py, ``AcceleratorState``'s
    ``__init__``: MULTI_GPU to MULTI_NEURON, not MULTI_CPU); inside, it does the same on CPUs."""
    start = AcceleratorState.__init__

    def started(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", started)
        yield
    AcceleratorState._reset_state(True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def adapted(folder: Path, seed: int = 0) -> Any:
    config = qn.QLoRANativeConfig()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, qn.peft_config(r=3))


def trained(folder: Path, out: Path, world: int, resume: Path | None = None, **changes: Any) -> Trainer:
    """Four steps of four rows, which differ in their number of trained tokens."""
    rows = [{"input_ids": row, "labels": row.clone()} for row in tokens(16)]
    for number, row in enumerate(rows):
        row["labels"][: 1 + number % 5] = -100
    options: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 4 // world, "report_to": [],
        "use_cpu": True, "save_steps": 2, "logging_steps": 1, "disable_tqdm": True, **changes,
    }  # fmt: skip
    trainer = Trainer(
        model=adapted(folder, 0 if resume is None else 1),  # what resumes begins with another adapter
        args=TrainingArguments(**options),
        train_dataset=rows,
        optimizer_cls_and_kwargs=(qn.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def same_codes(model: Any, folder: Path) -> None:
    """Every 4-bit weight of a sharded model, gathered, against that of a load on one process."""
    alone = {name: layer for name, layer in adapted(folder).named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(alone) == 14
    for name, expected in alone.items():
        layer = model.get_submodule(name)
        assert isinstance(layer.weight, DTensor) and layer.weight.dtype == torch.uint8
        assert layer.weight.to_local().numel() == expected.weight.numel() // dist.get_world_size()
        assert torch.equal(layer.weight.full_tensor(), expected.weight)
        assert torch.equal(layer.absmax, expected.absmax)


def codes_under_bf16(folder: Path) -> None:
    """A step of a loop of accelerate in bf16, over bytes that would be every number and every NaN of bf16."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", fsdp_plugin=plugin)
    model = qn.add_lora(qn.load_model(folder), qn.LoraConfig(r=3, seed=1)).train()
    patterns = torch.arange(1 << 16).to(torch.uint16).view(torch.uint8)
    kept, seen = {}, set()
    for number, (path, layer) in enumerate(lora_layers(model)):
        base: Any = layer.base_layer
        weight = base.quantized
        weight.packed.copy_(patterns.roll(-4096 * number)[: weight.packed.numel()])
        kept[path] = weight.packed.clone(), weight.absmax.clone()
    distributed.lay_out(model)  # now the scales are sharded too
    optimizer = qn.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)

    def check(path: str, weight: qn.QuantizedWeight) -> None:
        assert not isinstance(weight.packed, DTensor) and torch.equal(weight.packed, kept[path][0])
        assert torch.equal(weight.absmax, kept[path][1])
        seen.add(path)

    for path, layer in lora_layers(model):
        layer.register_forward_hook(lambda layer, *_, path=path: check(path, layer.base_layer.quantized))
    rows = tokens(2)
    accelerator.backward(model(input_ids=rows, labels=rows, use_cache=False).loss)
    optimizer.step()
    assert seen == kept.keys()
    for path, layer in lora_layers(model):
        for part, expected in zip((layer.base_layer.weight, layer.base_layer.absmax_bytes), kept[path], strict=True):
            assert isinstance(part, DTensor) and torch.equal(part.full_tensor().view(-1), expected)


def on_two(rank: int, world: int, folder: Path, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Distance of the adapter from that of one process, for each way."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in names.items()}  # as accelerate launch; the group is there
    base, found = folder / "model", {}
    trainer = trained(base, folder / "ddp", world)
    assert trainer.accelerator.distributed_type == DistributedType.MULTI_CPU
    found["ddp"] = distance(adapters(trainer.model), expected)
    AcceleratorState._reset_state(True)
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        settings: dict[str, Any] = {"fsdp": True, "fsdp_config": {**FSDP, "state_dict_type": kind}}
        for resume in (None, folder / kind / "checkpoint-2"):
            with fsdp_on_cpu():
                trainer = trained(base, folder / kind, world, resume, **settings)
                assert trainer.accelerator.is_fsdp2
                same_codes(trainer.model, base)
                found[f"{kind}, {resume}"] = distance(adapters(trainer.model), expected)
    with pytest.raises(ValueError, match="before it is sharded"):
        trainer.model.get_base_model().save_pretrained(folder / "whole")
    with fsdp_on_cpu():
        codes_under_bf16(base)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    with pytest.raises(ValueError, match="set fsdp_cpu_ram_efficient_loading to false"):
        adapted(base)
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    expected = adapters(trained(save(tmp_path / "model"), tmp_path / "one", 1).model)
    assert len(expected) == 28
    for found in on_ranks(2, on_two, tmp_path, expected):
        assert max(found.values()) <= TOLERANCE, found
    saved = load_file(tmp_path / "FULL_STATE_DICT" / "checkpoint-4" / "adapter_model.safetensors")
    whole = {name.replace(".default", ""): value for name, value in expected.items()}
    assert distance(saved, whole) <= TOLERANCE
