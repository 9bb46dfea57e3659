"""The pages on other libraries: each one's script, run as it stands in a folder with a small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import write_model

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
