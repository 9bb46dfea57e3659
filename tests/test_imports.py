"""Imports: old paths of release 0.1 give what moved, with a warning; ours follows what other packages import."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where nothing is imported yet."""
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


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
    code = "import qlora_native.hf.load\nfrom qlora_native.hf.source import open_source\n"
    code += "from qlora_native.hf import fuse\n"
    code += "print(qlora_native.hf.load.load_model is qlora_native.load_model, fuse.fuse is qlora_native.fuse)"
    done = run(code, "-Wdefault")
    assert done.stdout == "True True\n"
    lines = [line.partition(": DeprecationWarning")[0] for line in done.stderr.splitlines() if "is now" in line]
    assert lines == ["<string>:2", "<string>:4", "<string>:4"]


HOOK = """
import sys
sys.path.insert(0, {folder!r})
import qlora_native._import_hooks as late
late.REGISTRIES = {{"outer.registry": "follower", "outer.other": "broken"}}
late.watch()
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import outer.registry, outer.other
loader = outer.registry.__loader__
print(outer.registry.followed, outer.other.value, type(loader).__name__, outer.registry.__spec__.loader is loader)
print(*[str(one.message) for one in caught if "qlora" in str(one.message)])
"""


def test_ours_follows_and_a_failure_of_ours_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "registry.py").write_text("followed = False\n")
    (tmp_path / "outer" / "other.py").write_text("value = 7\n")
    (tmp_path / "follower.py").write_text("from outer import registry\nregistry.followed = True\n")
    (tmp_path / "broken.py").write_text("from outer.other import gone\n")
    first, second = run(HOOK.format(folder=str(tmp_path))).stdout.splitlines()
    assert first == "True 7 SourceFileLoader True"
    assert second.startswith("qlora_native does not fit") and "outer (cannot import name 'gone'" in second


def test_dir_has_what_is_imported_when_it_is_first_used() -> None:
    code = "import qlora_native as qn; print({*qn.__all__} - {*dir(qn)}, 'load_model' in vars(qn))"
    assert run(code).stdout == "set() False\n"
