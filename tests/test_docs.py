"""The pages on other libraries: each one's script, run as it stands in a folder with a small model; and the pages with
figures: they stand there as the estimator and the results of the benches have them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from laws import ROOT
from tiny import write_model

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
