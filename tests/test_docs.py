"""Scripts of the pages on other libraries, run in a folder with a small model; figures of the pages, compared with the
estimator and the benches' results; names of the reference, compared with the code."""

from __future__ import annotations

import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from laws import ROOT
from tiny import write_model

import qlora_native as qn
from qlora_native.cli.main import COMMANDS, main
from qlora_native.ops._library import SCHEMAS

sys.path.insert(0, str(ROOT / "bench"))
import memory_page
import scaling_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
# Page, packages that its script needs, what it leaves behind.
PAGES = [
    ("transformers", (), ("four-bit/model.safetensors", "dense/model.safetensors")),
    ("peft", ("peft",), ("adapter/adapter_model.safetensors", "merged-four-bit/model.safetensors")),
    ("trl", ("peft", "trl", "datasets"), ("adapter/adapter_model.safetensors",)),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("page", "needs", "leaves"), PAGES, ids=[page[0] for page in PAGES])
def test_the_script_of_the_page_runs(
    page: str, needs: tuple[str, ...], leaves: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in needs:
        pytest.importorskip(package)
    (script,) = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.M | re.S)
    write_model(tmp_path / "base-model", num_hidden_layers=1)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, f"docs/{page}.md", "exec"), {"__name__": "__main__"})
    assert all((tmp_path / name).is_file() for name in leaves)


@pytest.mark.parametrize("module", [scaling_page, memory_page], ids=lambda module: module.__name__)
def test_the_figures_of_the_page_are_those_that_its_script_writes(module: Any) -> None:
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.page(text) == text, f"run: python bench/{module.__name__}.py --write"
    assert module.page(text.replace("| yes |", "| no |").replace("+0.5 %", "+0.4 %")) == text  # it would be seen


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def reference(name: str) -> str:
    return (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name_and_no_other() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    entries = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(entries) == len(set(entries))
    for entry in entries:
        pkgutil.resolve_name(entry)
    namespaces = {"__version__", "distributed", "nn", "ops", "optim"}
    assert {f"qlora_native.{name}" for name in set(qn.__all__) - namespaces} <= set(entries)


def test_the_page_of_operators_has_every_schema() -> None:
    assert set(re.findall(r"`(\w+(?:\.out)?)`", reference("ops"))) >= set(SCHEMAS)


def test_the_page_of_commands_has_every_command_with_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(r"^\| `qlora (\w+)[^|]*\|[^|]*\|([^|]*)\|$", reference("command-line"), re.MULTILINE)
    assert {name for name, _ in rows} == set(COMMANDS)
    for name, options in rows:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert set(re.findall(r"`(--[\w-]+)`", options)) <= set(re.findall(r"--[\w-]+", capsys.readouterr().out)), name


def test_contributing_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "python" / "qlora_native"
    rooms = {path.stem for path in package.iterdir() if path.suffix in ("", ".py")} - {
        "__init__",
        "__main__",
        "__pycache__",
    }
    listed = set(re.findall(r"[\w/]+", text.partition("from the bottom up")[2].partition("`tests/laws.py`")[0]))
    assert {room for room in rooms if room not in listed and f"{room}/" not in listed} == set()
