"""Modules and names of release 0.1 are found under their old paths, with a warning that has the new one."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

# Old module, name, new module.
MOVED = [
    ("hf.build", "MetaModel", "models.build"),
    ("hf.build", "OUTPUT_EMBEDDING", "weights.shapes"),
    ("hf.config", "QLoRANativeConfig", "interop.config"),
    ("hf.load", "load_model", "models.load"),
    ("hf.load", "layer_progress", "models.progress"),
    ("hf.mapped", "Streaming", "models.mapped"),
    ("hf.merge", "recode", "models.recode"),
    ("hf.plan", "unscaled", "weights.float8"),
    ("hf.source", "open_source", "weights.open"),
    ("config", "TrainConfig", "tool.config"),
    ("train.loop", "Trainer", "tool.train.loop"),
    ("export.gguf", "export_gguf", "tool.export.gguf"),
    ("cli.main", "main", "tool.cli.main"),
    ("train.batches", "micro_batches", "data.batching"),
    ("train.graphs", "LossScale", "tool.train.checkpoint"),
    ("export.check", "verdict", "tool.evaluate.check"),
    ("data.standard_library", "examples", "tool.cli.standard_library"),
    ("optim.base", "Optimizer", "optim.step"),
    ("optim.rules", "Lion", "optim"),
    ("lora.adapter", "load_adapter", "lora.model"),
    ("lora.layer", "add_lora", "lora.model"),
    ("lora.layer", "select_targets", "lora.targets"),
]


@pytest.mark.parametrize(("old", "name", "new"), MOVED, ids=[f"{old}.{name}" for old, name, _ in MOVED])
def test_a_name_is_found_where_it_was(old: str, name: str, new: str) -> None:
    module = importlib.import_module(f"qlora_native.{old}")
    with pytest.warns(DeprecationWarning, match=rf"{old}.{name} is now qlora_native.{new}.{name}"):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(f"qlora_native.{new}"), name)
    with pytest.raises(AttributeError, match="gone"):
        _ = module.gone


def test_the_usual_statements_work_and_name_their_line() -> None:
    """In a process of its own, where nothing of the old package is imported yet."""
    code = "import qlora_native.hf.load\nfrom qlora_native.hf.source import open_source\n"
    code += "from qlora_native.hf import fuse\n"
    code += "print(qlora_native.hf.load.load_model is qlora_native.load_model, fuse.fuse is qlora_native.fuse)"
    done = subprocess.run([sys.executable, "-Wdefault", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
    lines = [line.partition(": DeprecationWarning")[0] for line in done.stderr.splitlines() if "is now" in line]
    assert lines == ["<string>:2", "<string>:4", "<string>:4"]
